//! Products with many rows of x: panels of activations with panels of decoded
//! weights.
//!
//! Activations are packed once a call, eight rows side by side. Weights are decoded
//! and transposed into panels of 32 rows, some of which stay in L2 while all panels
//! of activations pass over them, so a weight is decoded once a call. What a panel
//! holds is a word of 32 bits: a number, or two of bf16.
//!
//! Every result is one chain in the order of k, of fused multiply-adds where words
//! are numbers: then the same bits on every level. With pairs, as with numbers, the
//! bits depend neither on the number of threads nor on what other rows come along.

use std::ops::Range;

use rayon::prelude::*;

use super::Cancel;
use super::epilogue::Epilogue;
use super::pool::Threads;
use crate::error::Result;
use crate::format::Decode;
use crate::simd::product::{NARROW, Product, Transpose, WIDE};
use crate::simd::{LANES, Line, bf16, dispatch};

/// Words of a row of weights that are decoded together.
const DEPTH: usize = 512;
/// Words that are multiplied together: 16 KiB of weights stay in L1 while the
/// activations stream by.
const SLICE: usize = 128;
/// Panels of weights at most that wait in L2 together, 64 KiB each: while one is in
/// L1, the slice of activations comes from L2 for the others too.
const WEIGHTS: usize = 4;
/// Panels of activations that one task multiplies before it looks at the flag, for
/// their slice to stay in L2 as well.
const ACTIVATIONS: usize = 32;
/// Elements from a decoded row to the next. Rows a power of two apart would
/// share a few lines of L1.
const STRIDE: usize = 2 * DEPTH + LANES;

/// What the words of panels are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Words {
    Numbers,
    /// Numbers rounded to bf16.
    Rounded,
    /// Two numbers in bf16.
    Pairs,
}

impl Words {
    /// Those of bf16 that the level in force multiplies best.
    pub fn bf16() -> Words {
        match bf16::has_pairs() {
            true => Words::Pairs,
            false => Words::Rounded,
        }
    }

    /// Numbers of a word.
    fn numbers(self) -> usize {
        match self {
            Words::Pairs => 2,
            _ => 1,
        }
    }

    /// Turns the first `len` numbers of a row into words, in place. What follows
    /// them up to a multiple of two vectors is lost.
    fn make(self, row: &mut [f32], len: usize) {
        let padded = len.next_multiple_of(2 * LANES);
        row[len..padded].fill(0.0);
        match self {
            Words::Numbers => {}
            Words::Rounded => dispatch(bf16::Round(&mut row[..padded])),
            Words::Pairs => bf16::dispatch(bf16::Pair(&mut row[..padded])),
        }
    }

    fn multiply(self, product: Product) {
        match self {
            Words::Pairs => bf16::dispatch(product),
            _ => dispatch(product),
        }
    }
}

/// Results as they are computed: for each [`WIDE`] rows of weights a line of
/// [`WIDE`] sums for each row of x.
pub(super) struct Blocks {
    n: usize,
    /// Rows of x, with those that fill the last tile.
    padded: usize,
    sums: Vec<Line>,
}

impl Blocks {
    pub fn zeroed(n: usize, padded: usize) -> Blocks {
        Blocks {
            n,
            padded,
            sums: Line::zeroed(n.next_multiple_of(WIDE) * padded),
        }
    }

    /// The sums of so many blocks at a time.
    pub fn par_chunks_mut(
        &mut self,
        blocks: usize,
    ) -> impl IndexedParallelIterator<Item = &mut [f32]> {
        let sums: &mut [f32] = bytemuck::cast_slice_mut(&mut self.sums);
        sums.par_chunks_mut(blocks * WIDE * self.padded)
    }

    /// Calls `work` with the index and the sums of every block, and with what `room`
    /// makes once for many; `each` blocks are one task.
    pub fn each<S>(
        &mut self,
        each: usize,
        threads: Threads,
        cancel: &Cancel,
        room: impl Fn() -> S + Sync + Send,
        work: impl Fn(&mut S, usize, &mut [f32]) + Sync + Send,
    ) -> Result<()> {
        let size = WIDE * self.padded;
        let work = |room: &mut S, task: usize, sums: &mut [f32]| {
            for (i, sums) in sums.chunks_exact_mut(size).enumerate() {
                work(room, task * each + i, sums);
            }
            Ok(())
        };
        let sums = bytemuck::cast_slice_mut(&mut self.sums);
        threads.chunks(sums, each * size, cancel, room, work)
    }

    /// Writes the results. Call it inside [`Threads::run`].
    pub fn write(
        &self,
        epilogue: &Epilogue,
        out: &mut [u8],
        threads: Threads,
        cancel: &Cancel,
    ) -> Result<()> {
        let size = NARROW * self.n * epilogue.dtype.size();
        let work =
            |_: &mut (), i: usize, out: &mut [u8]| self.write_rows(i * NARROW, epilogue, out);
        threads.chunks(out, size, cancel, || (), work)
    }

    /// Writes rows from `first` on, block after block: their lines of a block are
    /// neighbours.
    fn write_rows(&self, first: usize, epilogue: &Epilogue, out: &mut [u8]) -> Result<()> {
        let size = epilogue.dtype.size();
        let sums: &[f32] = bytemuck::cast_slice(&self.sums);
        for (i, block) in sums.chunks_exact(WIDE * self.padded).enumerate() {
            let columns = i * WIDE..self.n.min((i + 1) * WIDE);
            let (lines, _) = block[first * WIDE..].as_chunks::<WIDE>();
            let rows = out.chunks_exact_mut(self.n * size);
            for ((row, out), mut line) in rows.enumerate().zip(lines.iter().copied()) {
                let out = &mut out[columns.start * size..columns.end * size];
                let sums = &mut line[..columns.len()];
                epilogue.write((first + row, columns.start), sums, out)?;
            }
        }
        Ok(())
    }
}

/// `x · qᵀ` for rows of k and n rows of weights. Call it inside the pool.
pub(super) fn multiply(
    x: &[f32],
    decoder: &dyn Decode,
    (n, k): (usize, usize),
    words: Words,
    cancel: &Cancel,
) -> Result<Blocks> {
    let padded = (x.len() / k).next_multiple_of(NARROW);
    let depth = k.div_ceil(words.numbers());
    let x = pack(x, k, words);
    let mut blocks = Blocks::zeroed(n, padded);
    let each = n.div_ceil(WIDE).div_ceil(rayon::current_num_threads());
    let each = each.clamp(1, WEIGHTS);
    blocks.par_chunks_mut(each).enumerate().try_for_each_init(
        || Weights::of(decoder, k, words),
        |weights, (task, sums)| {
            let rows = task * each * WIDE..n.min((task + 1) * each * WIDE);
            for at in (0..depth).step_by(DEPTH) {
                weights.decode(rows.clone(), at..depth.min(at + DEPTH));
                let weights = &*weights;
                // Threads that ran out of weights take some of the activations.
                stretches(sums, padded)
                    .into_par_iter()
                    .zip(x.par_chunks(ACTIVATIONS * NARROW * depth))
                    .try_for_each(|(mut sums, x)| {
                        cancel.check()?;
                        weights.times(&x[x.len() / depth * at..], x.len() / depth, &mut sums);
                        Ok(())
                    })?;
            }
            Ok(())
        },
    )?;
    Ok(blocks)
}

/// The sums of some blocks, cut as the activations are: for each stretch of these
/// its lines of every block.
fn stretches(sums: &mut [f32], padded: usize) -> Vec<Vec<&mut [f32]>> {
    let mut stretches = Vec::new();
    stretches.resize_with(padded.div_ceil(ACTIVATIONS * NARROW), Vec::new);
    for block in sums.chunks_exact_mut(padded * WIDE) {
        let pieces = block.chunks_mut(ACTIVATIONS * NARROW * WIDE);
        for (stretch, piece) in stretches.iter_mut().zip(pieces) {
            stretch.push(piece);
        }
    }
    stretches
}

/// Rows of x as words: stretches of [`ACTIVATIONS`] panels, each slice after slice,
/// a slice panel after panel of `[SLICE, NARROW]`; zeros past the last row.
fn pack(x: &[f32], k: usize, words: Words) -> Vec<f32> {
    let depth = k.div_ceil(words.numbers());
    let mut packed = vec![0f32; (x.len() / k).next_multiple_of(NARROW) * depth];
    packed
        .par_chunks_mut(ACTIVATIONS * NARROW * depth)
        .zip(x.par_chunks(ACTIVATIONS * NARROW * k))
        .for_each(|(stretch, x)| {
            let rows = stretch.len() / depth;
            let slices = stretch.par_chunks_mut(rows * SLICE).enumerate();
            slices.for_each(|(s, slice)| {
                let from = s * SLICE * words.numbers();
                let len = (k - from).min(SLICE * words.numbers());
                let mut row = [0f32; 2 * SLICE];
                let panels = slice.chunks_exact_mut(slice.len() / rows * NARROW);
                for (panel, x) in panels.zip(x.chunks(NARROW * k)) {
                    let (lines, _) = panel.as_chunks_mut::<NARROW>();
                    for (i, x) in x.chunks_exact(k).enumerate() {
                        row[..len].copy_from_slice(&x[from..from + len]);
                        words.make(&mut row, len);
                        for (line, &word) in lines.iter_mut().zip(&row) {
                            line[i] = word;
                        }
                    }
                }
            });
        });
    packed
}

/// Some panels of weights, each of `[depth, WIDE]`.
struct Weights<'a> {
    decoder: &'a dyn Decode,
    k: usize,
    words: Words,
    rows: Vec<Line>,
    panels: Vec<Line>,
    depth: usize,
}

impl Weights<'_> {
    fn of(decoder: &dyn Decode, k: usize, words: Words) -> Weights<'_> {
        Weights {
            decoder,
            k,
            words,
            rows: Line::zeroed(LANES * STRIDE),
            panels: Vec::new(),
            depth: 0,
        }
    }

    /// Takes those words of those rows. Columns past the last row hold what was
    /// there before, for sums that nobody reads.
    fn decode(&mut self, rows: Range<usize>, words: Range<usize>) {
        self.depth = words.len();
        let from = words.start * self.words.numbers();
        let len = (self.k - from).min(words.len() * self.words.numbers());
        let panels = rows.len().div_ceil(WIDE);
        let words = panels * WIDE * self.depth;
        self.panels.resize(words / LANES, Line([0.0; LANES]));
        let mut rows = rows;
        let decoded: &mut [f32] = bytemuck::cast_slice_mut(&mut self.rows);
        let panels: &mut [f32] = bytemuck::cast_slice_mut(&mut self.panels);
        for panel in panels.chunks_exact_mut(WIDE * self.depth) {
            for at in (0..WIDE).step_by(LANES) {
                for (out, row) in decoded.chunks_exact_mut(STRIDE).zip(&mut rows) {
                    self.decoder.decode(row * self.k + from, &mut out[..len]);
                    self.words.make(out, len);
                }
                dispatch(Transpose {
                    rows: decoded,
                    stride: STRIDE,
                    at,
                    panel,
                });
            }
        }
    }

    /// Adds the products with so many rows of x, packed from these words on: for
    /// each panel of weights a line of sums a row.
    fn times(&self, x: &[f32], rows: usize, sums: &mut [&mut [f32]]) {
        for from in (0..self.depth).step_by(SLICE) {
            let len = SLICE.min(self.depth - from);
            let x = &x[rows * from..][..rows * len];
            let panels: &[f32] = bytemuck::cast_slice(&self.panels);
            let panels = panels.chunks_exact(WIDE * self.depth);
            for (panel, sums) in panels.zip(&mut *sums) {
                let b = &panel[WIDE * from..][..WIDE * len];
                let tiles = x.chunks_exact(NARROW * len);
                for (a, c) in tiles.zip(sums.chunks_exact_mut(NARROW * WIDE)) {
                    self.words.multiply(Product { a, b, c });
                }
            }
        }
    }
}
