//! x · qᵀ as LLM.int8() computes it (Dettmers et al., 2022), the arithmetic of
//! bitsandbytes' `Linear8bitLt`.
//!
//! Columns of x in which any element reaches 6 stay floats and are multiplied
//! with the dequantized weights of those columns. The rest of each row of x is
//! rounded to f16, then to 8 bits by its largest magnitude, and its dot products
//! with the codes are integers.

use std::ops::Range;

use super::Cancel;
use super::batch::Blocks;
use super::epilogue::Epilogue;
use super::int8::{Codes, Job, Panels};
use super::matmul::{BATCH, activations, check};
use super::packed::Plan;
use super::pool::Threads;
use crate::error::{Error, Result};
use crate::format::{Granularity, Quantized, Scale};
use crate::simd::dispatch;
use crate::simd::dot::DotInts;
use crate::simd::outliers::{Bytes, Look, OUTLIER};
use crate::simd::product::{Spread, WIDE};
use crate::steps::{Lows, StepForm, Steps};
use crate::tensor::Tensor;

/// 1/127² as bitsandbytes multiplies with it.
const PER_SQUARE: f32 = 6.200_124e-5;

/// Computes `x · qᵀ` into `out`.
///
/// # Errors
/// `InvalidOption` unless q is symmetric int8 with one scale a row, and what
/// [`super::matmul::matmul_into`] returns.
pub fn matmul_into(
    x: &Tensor,
    q: &Quantized,
    epilogue: Epilogue,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    check(x, q, &epilogue, out)?;
    let spec = &q.spec;
    if spec.format != "int8" || !spec.symmetric || spec.granularity != Granularity::Row {
        return Err(Error::option(
            "compute",
            "llm_int8 multiplies symmetric int8 with one scale a row; quantize to int8 with block_size row",
        ));
    }
    let mut widened = Vec::new();
    let Some(x) = activations(x, q, &mut widened)? else {
        return epilogue.write_zeros(q.shape[0], out);
    };
    let weights = Weights::of(q)?;
    let (m, n, k) = (x.len() / weights.k, weights.n, weights.k);
    let threads = Threads::for_products(m, (n, k));
    threads.run(|| {
        let a = Activations::split(x, k);
        let mut blocks = match m {
            ..BATCH => weights.dots(&a, threads, cancel)?,
            _ => {
                let plan = &Plan::new(weights.form(), (n, k));
                let panels = &Panels::Steps(&weights);
                let x = &a;
                Job { x, m, plan, panels }.by_rows(threads, cancel)?
            }
        };
        blocks.each(
            1,
            threads,
            cancel,
            || (),
            |_, block, sums| {
                sums.iter_mut().for_each(|sum| *sum *= PER_SQUARE);
                for (&column, a) in a.columns.iter().zip(a.kept.chunks_exact(m)) {
                    let x = &weights.line(block * WIDE, column)[..];
                    dispatch(Spread { a, x, y: sums });
                }
            },
        )?;
        blocks.write(&epilogue, out, threads, cancel)
    })
}

/// Weights as steps under the largest magnitude of their row.
struct Weights<'a> {
    n: usize,
    k: usize,
    codes: &'a [i8],
    absmax: Vec<f32>,
}

impl Weights<'_> {
    fn of(q: &Quantized) -> Result<Weights<'_>> {
        let steps = match q.spec.scale {
            Scale::Absmax => 1.0,
            _ => 127.0,
        };
        let mut absmax = q.part("scales")?.to_f32_vec();
        absmax.iter_mut().for_each(|scale| *scale *= steps);
        Ok(Weights {
            n: q.shape[0],
            k: q.shape[1],
            codes: bytemuck::cast_slice(q.part("codes")?.bytes()),
            absmax,
        })
    }

    fn row(&self, row: usize) -> &[i8] {
        &self.codes[row * self.k..(row + 1) * self.k]
    }

    /// A column's weights from that row on; zeros past the last.
    fn line(&self, first: usize, column: usize) -> [f32; WIDE] {
        let mut line = [0.0; WIDE];
        for (v, row) in line.iter_mut().zip(first..self.n) {
            *v = f32::from(self.row(row)[column]) * (self.absmax[row] * (1.0 / 127.0));
        }
        line
    }

    /// Products with fewer than [`BATCH`] rows, from the codes as they lie.
    fn dots(&self, a: &Activations, threads: Threads, cancel: &Cancel) -> Result<Blocks> {
        let m = a.scales.len();
        let mut blocks = Blocks::zeroed(self.n, m);
        blocks.each(
            1,
            threads,
            cancel,
            || (),
            |_, block, sums| {
                let mut dots = [0i32; BATCH];
                let first = block * WIDE;
                for row in first..self.n.min(first + WIDE) {
                    dispatch(DotInts {
                        x: bytemuck::cast_slice(&a.codes),
                        w: self.row(row),
                        out: &mut dots[..m],
                    });
                    let lines = sums.chunks_exact_mut(WIDE);
                    for ((line, dot), scale) in lines.zip(dots).zip(&a.scales) {
                        line[row - first] = dot as f32 * (scale * self.absmax[row]);
                    }
                }
            },
        )?;
        Ok(blocks)
    }
}

impl Steps for Weights<'_> {
    fn form(&self) -> StepForm {
        StepForm {
            block: self.k,
            halves: false,
            table: None,
            zero: 128,
            lows: Lows::Nothing,
            shared: 1,
        }
    }

    fn codes(&self, row: usize, out: &mut [u8]) {
        for (out, code) in out.iter_mut().zip(self.row(row)) {
            *out = *code as u8 ^ 128;
        }
    }

    fn numbers(&self, row: usize, scales: &mut [f32], _lows: &mut [f32]) {
        scales.fill(self.absmax[row]);
    }
}

/// Rows of x in 8 bits, and what is too large for that.
struct Activations {
    k: usize,
    /// Signed bytes.
    codes: Vec<u8>,
    scales: Vec<f32>,
    /// Outlier columns, and their elements column after column.
    columns: Vec<usize>,
    kept: Vec<f32>,
}

impl Activations {
    fn split(x: &[f32], k: usize) -> Activations {
        let mut most = vec![0f32; k];
        let rows = x.chunks_exact(k);
        let look = |x| {
            let most = &mut most[..];
            dispatch(Look { x, most })
        };
        let scales: Vec<f32> = rows.clone().map(look).collect();
        let mut codes = vec![0u8; x.len()];
        for ((x, out), &scale) in rows.zip(codes.chunks_exact_mut(k)).zip(&scales) {
            if scale > 0.0 {
                let (most, by) = (&most[..], 127.0 / scale);
                dispatch(Bytes { x, most, by, out });
            }
        }
        let columns: Vec<usize> = (0..k).filter(|&c| most[c] >= OUTLIER).collect();
        let elements = columns.iter().flat_map(|&c| x.iter().skip(c).step_by(k));
        Activations {
            k,
            codes,
            scales,
            kept: elements.copied().collect(),
            columns,
        }
    }
}

impl Codes for Activations {
    fn write(&self, row: usize, groups: &[Range<usize>], out: &mut [u8], steps: &mut [(f32, i32)]) {
        let each = out.len() / groups.len();
        for ((columns, out), steps) in groups.iter().zip(out.chunks_exact_mut(each)).zip(steps) {
            let codes = &self.codes[row * self.k..][columns.clone()];
            out[..codes.len()].copy_from_slice(codes);
            let sum = codes.iter().map(|&code| i32::from(code as i8)).sum();
            *steps = (self.scales[row], sum);
        }
    }
}
