//! x · qᵀ as LLM.int8() computes it (Dettmers et al., 2022), the arithmetic of
//! bitsandbytes' `Linear8bitLt`.
//!
//! Columns of x in which any element reaches 6 stay floats and are multiplied
//! with the dequantized weights of those columns. The rest of each row of x is
//! rounded to f16, then to 8 bits by its largest magnitude, and its dot products
//! with the codes are integers.

use super::matmul::{activations, check, write_rows};
use super::pool::Threads;
use super::{CHUNK, Cancel};
use crate::error::{Error, Result};
use crate::format::{Granularity, Quantized, Scale};
use crate::simd::dispatch;
use crate::simd::dot::DotInts;
use crate::simd::vector::round_f16;
use crate::tensor::{DType, Tensor};

/// The magnitude from which on an element makes its column an outlier.
pub const THRESHOLD: f32 = 6.0;

/// 1/127² as bitsandbytes multiplies with it.
const PER_SQUARE: f32 = 6.200_124e-5;

/// Computes `x · qᵀ` into `out`, rounded once to `dtype`.
///
/// # Errors
/// `InvalidOption` unless q is symmetric int8 with one scale a row, and what
/// [`super::matmul::matmul_into`] returns.
pub fn matmul_into(
    x: &Tensor,
    q: &Quantized,
    dtype: DType,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    check(x, q, dtype, out)?;
    let spec = &q.spec;
    if spec.format != "int8" || !spec.symmetric || spec.granularity != Granularity::Row {
        return Err(Error::option(
            "compute",
            "llm_int8 multiplies symmetric int8 with one scale a row; quantize to int8 with block_size row",
        ));
    }
    let mut widened = Vec::new();
    let Some(x) = activations(x, q, out, &mut widened)? else {
        return Ok(());
    };
    let (n, k) = (q.shape[0], q.shape[1]);
    let absmax = match spec.scale {
        Scale::Absmax => 1.0,
        _ => 127.0,
    };
    let mut scales = q.part("scales")?.to_f32_vec();
    scales.iter_mut().for_each(|s| *s *= absmax);
    let codes: &[i8] = bytemuck::cast_slice(q.part("codes")?.bytes());
    let threads = Threads::for_products(x.len() / k, (n, k));
    threads.run(|| {
        let a = Activations::split(x, k);
        let m = a.scales.len();
        let rows = (4 * CHUNK / k).clamp(1, 64);
        let mut columns = vec![0f32; n * m];
        let work = |dots: &mut Vec<i32>, t: usize, out: &mut [f32]| {
            let first = t * rows;
            for (j, out) in out.chunks_mut(m).enumerate() {
                let row = first + j;
                let weights = &codes[row * k..(row + 1) * k];
                dots.resize(m, 0i32);
                dispatch(DotInts {
                    x: &a.codes,
                    w: weights,
                    out: dots,
                });
                for (i, out) in out.iter_mut().enumerate() {
                    let whole = dots[i] as f32 * (a.scales[i] * scales[row]) * PER_SQUARE;
                    *out = whole + a.outliers(i, weights, scales[row]);
                }
            }
            Ok(())
        };
        threads.chunks(&mut columns, rows * m, cancel, Vec::new, work)?;
        write_rows(&columns, (n, m), dtype, out, threads, cancel)
    })
}

/// Rows of x in 8 bits, and what is too large for that.
struct Activations {
    codes: Vec<i8>,
    scales: Vec<f32>,
    /// Outlier columns, and their elements row after row.
    columns: Vec<usize>,
    kept: Vec<f32>,
}

impl Activations {
    fn split(x: &[f32], k: usize) -> Activations {
        let is_outlier = |v: f32| round_f16(v).abs() >= THRESHOLD;
        let mut outlier = vec![false; k];
        for row in x.chunks(k) {
            for (outlier, &v) in outlier.iter_mut().zip(row) {
                *outlier |= is_outlier(v);
            }
        }
        let columns: Vec<usize> = (0..k).filter(|&c| outlier[c]).collect();
        let mut a = Activations {
            codes: vec![0; x.len()],
            scales: Vec::with_capacity(x.len() / k),
            kept: Vec::with_capacity(x.len() / k * columns.len()),
            columns,
        };
        for (row, codes) in x.chunks(k).zip(a.codes.chunks_mut(k)) {
            // The others of an outlier's column count for the scale.
            let inside = row.iter().filter(|&&v| !is_outlier(v));
            let most = inside.fold(0f32, |most, &v| match v.is_nan() || most.is_nan() {
                true => f32::NAN,
                false => most.max(round_f16(v).abs()),
            });
            a.scales.push(most);
            a.kept.extend(a.columns.iter().map(|&c| row[c]));
            if most == 0.0 {
                continue;
            }
            let factor = 127.0 / most;
            for ((code, &v), &outlier) in codes.iter_mut().zip(row).zip(&outlier) {
                if !outlier {
                    *code = (round_f16(v) * factor).round_ties_even() as i8;
                }
            }
        }
        a
    }

    /// What the outlier columns add for row `i` of x.
    fn outliers(&self, i: usize, weights: &[i8], scale: f32) -> f32 {
        let kept = &self.kept[i * self.columns.len()..];
        let products = self.columns.iter().zip(kept);
        let sum: f32 = products.map(|(&c, x)| x * f32::from(weights[c])).sum();
        sum * (scale * (1.0 / 127.0))
    }
}
