//! Products with many rows of x: panels of activations with panels of decoded
//! weights.
//!
//! Activations are packed once a call, eight rows side by side. Of the weights 32
//! rows are decoded and transposed into a panel that stays in L2 while all panels
//! of activations pass over it, so a weight is decoded once a call. Every
//! result is one chain of fused multiply-adds in the order of k: the same bits on
//! every level, for every number of threads and whatever other rows come along.

use std::ops::Range;

use rayon::prelude::*;

use super::Cancel;
use crate::error::Result;
use crate::format::Decode;
use crate::simd::product::{NARROW, Product, Transpose, WIDE};
use crate::simd::{LANES, dispatch};
use crate::tensor::{DType, narrow};

/// Elements of [`WIDE`] rows of weights that are decoded together: 256 KiB, for L2.
const DEPTH: usize = 2048;
/// Elements that are multiplied together: 16 KiB of weights stay in L1 while the
/// activations stream by.
const SLICE: usize = 128;
/// Elements from a decoded row to the next. Rows a power of two apart would
/// share a few lines of L1.
const STRIDE: usize = DEPTH + LANES;
/// Panels of activations that one task multiplies before it looks at the flag.
const PANELS: usize = 16;

/// Results as they are computed: for each [`WIDE`] rows of weights a line of
/// [`WIDE`] sums for each row of x.
pub(super) struct Blocks {
    n: usize,
    /// Rows of x, with those that fill the last tile.
    padded: usize,
    sums: Vec<f32>,
}

impl Blocks {
    pub fn zeroed(n: usize, padded: usize) -> Blocks {
        Blocks {
            n,
            padded,
            sums: vec![0f32; n.next_multiple_of(WIDE) * padded],
        }
    }

    /// The sums of each block.
    pub fn chunks_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.sums.chunks_exact_mut(WIDE * self.padded)
    }

    /// The sums of so many blocks at a time.
    pub fn par_chunks_mut(
        &mut self,
        blocks: usize,
    ) -> impl IndexedParallelIterator<Item = &mut [f32]> {
        self.sums.par_chunks_mut(blocks * WIDE * self.padded)
    }

    /// Writes the results as rows of `dtype`. Call it inside the pool.
    pub fn write(&self, dtype: DType, out: &mut [u8]) -> Result<()> {
        out.par_chunks_mut(self.n * dtype.size())
            .enumerate()
            .try_for_each_init(Vec::new, |row, (i, out)| self.write_row(i, row, dtype, out))
    }

    /// The same on the calling thread.
    pub fn write_at_once(&self, dtype: DType, out: &mut [u8]) -> Result<()> {
        let mut row = Vec::new();
        out.chunks_mut(self.n * dtype.size())
            .enumerate()
            .try_for_each(|(i, out)| self.write_row(i, &mut row, dtype, out))
    }

    fn write_row(&self, i: usize, row: &mut Vec<f32>, dtype: DType, out: &mut [u8]) -> Result<()> {
        if self.padded == 1 {
            return narrow(dtype, &self.sums[..self.n], out);
        }
        row.clear();
        for block in self.sums.chunks_exact(WIDE * self.padded) {
            row.extend_from_slice(&block[i * WIDE..][..WIDE]);
        }
        narrow(dtype, &row[..self.n], out)
    }
}

/// `x · qᵀ` for rows of k and n rows of weights. Call it inside the pool.
pub(super) fn multiply(
    x: &[f32],
    decoder: &dyn Decode,
    (n, k): (usize, usize),
    cancel: &Cancel,
) -> Result<Blocks> {
    let x = pack(x, k);
    let padded = x.len() / k;
    let mut blocks = Blocks::zeroed(n, padded);
    blocks.par_chunks_mut(1).enumerate().try_for_each_init(
        Weights::default,
        |weights, (block, sums)| {
            let rows = block * WIDE..n.min((block + 1) * WIDE);
            for at in (0..k).step_by(DEPTH) {
                let depth = DEPTH.min(k - at);
                weights.decode(decoder, rows.clone(), (k, at, depth));
                let weights = &weights.panel;
                // Threads that ran out of blocks take some of these.
                sums.par_chunks_mut(PANELS * NARROW * WIDE)
                    .zip(x.par_chunks(PANELS * NARROW * k))
                    .try_for_each(|(sums, x)| {
                        cancel.check()?;
                        for (s, b) in weights.chunks(SLICE * WIDE).enumerate() {
                            let from = NARROW * (at + s * SLICE);
                            let panels = x.chunks_exact(NARROW * k);
                            for (x, c) in panels.zip(sums.chunks_exact_mut(NARROW * WIDE)) {
                                let a = &x[from..][..b.len() / WIDE * NARROW];
                                dispatch(Product { a, b, c });
                            }
                        }
                        Ok(())
                    })?;
            }
            Ok(())
        },
    )?;
    Ok(blocks)
}

/// Panels of [`NARROW`] rows of x, each `[k, NARROW]`; zeros past the last row.
fn pack(x: &[f32], k: usize) -> Vec<f32> {
    let mut panels = vec![0f32; (x.len() / k).next_multiple_of(NARROW) * k];
    panels
        .par_chunks_mut(NARROW * k)
        .zip(x.par_chunks(NARROW * k))
        .for_each(|(panel, rows)| {
            let (lines, _) = panel.as_chunks_mut::<NARROW>();
            // A stretch of lines at a time, which L1 holds until all rows are in.
            for (s, lines) in lines.chunks_mut(SLICE).enumerate() {
                for (i, row) in rows.chunks_exact(k).enumerate() {
                    for (line, &v) in lines.iter_mut().zip(&row[s * SLICE..]) {
                        line[i] = v;
                    }
                }
            }
        });
    panels
}

/// [`WIDE`] rows of weights, decoded.
#[derive(Default)]
struct Weights {
    rows: Vec<f32>,
    /// A panel of `[depth, WIDE]`.
    panel: Vec<f32>,
}

impl Weights {
    /// Decodes elements `at .. at + depth` of those rows of k. Columns past the
    /// last row hold what was there before, for sums that nobody reads.
    fn decode(
        &mut self,
        decoder: &dyn Decode,
        mut which: Range<usize>,
        (k, at, depth): (usize, usize, usize),
    ) {
        self.rows.resize(LANES * STRIDE, 0.0);
        self.panel.resize(WIDE * depth, 0.0);
        for lane in (0..WIDE).step_by(LANES) {
            for (out, row) in self.rows.chunks_exact_mut(STRIDE).zip(&mut which) {
                decoder.decode(row * k + at, &mut out[..depth]);
            }
            dispatch(Transpose {
                rows: &self.rows,
                stride: STRIDE,
                at: lane,
                panel: &mut self.panel,
            });
        }
    }
}
