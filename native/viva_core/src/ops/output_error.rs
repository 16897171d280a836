//! What an approximation of a weight does to the layer's output.

use std::ops::Range;

use rayon::prelude::*;

use super::quantize::check_floats;
use super::{Cancel, pool};
use crate::error::{Error, Result};
use crate::format::Quantized;
use crate::method::input;
use crate::simd::{Isa, LANES, Op, dispatch};
use crate::tensor::Tensor;

/// Rows of the weight that one pass over the activations serves.
const ROWS: usize = 8;
/// Sums of a dot product that go on side by side.
const SUMS: usize = LANES / 2;

/// Energies of a piece of the output.
#[derive(Clone, Copy, Default)]
struct Energies {
    output: f64,
    error: f64,
}

/// Energies of the outputs that rows x of activations give with rows of a weight,
/// and with rows of its error.
struct Measure<'a> {
    k: usize,
    x: &'a [f32],
    w: &'a [f64],
    e: &'a [f64],
}

impl Op for Measure<'_> {
    type Output = Energies;

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> Energies {
        let mut sums = Energies::default();
        let mut wide = vec![0f64; self.k];
        for x in self.x.chunks_exact(self.k) {
            for (wide, x) in wide.iter_mut().zip(x) {
                *wide = f64::from(*x);
            }
            let mut add = |output: f64, error: f64| {
                sums.output += output * output;
                sums.error += error * error;
            };
            let pairs = self.w.chunks(2 * self.k).zip(self.e.chunks(2 * self.k));
            for (w, e) in pairs {
                let (w, next_w) = w.split_at(self.k);
                let (e, next_e) = e.split_at(self.k);
                if next_w.is_empty() {
                    let [output, error] = dots(&wide, [w, e]);
                    add(output, error);
                } else {
                    let [output, error, next_output, next_error] =
                        dots(&wide, [w, e, next_w, next_e]);
                    add(output, error);
                    add(next_output, next_error);
                }
            }
        }
        sums
    }
}

/// Several at once, so that no sum waits for the one before. Multiplied and added
/// one after the other, never fused: the same bits on every level.
#[inline(always)]
fn dots<const R: usize>(x: &[f64], rows: [&[f64]; R]) -> [f64; R] {
    let mut sums = [[0f64; SUMS]; R];
    let (xs, x_tail) = x.as_chunks::<SUMS>();
    let chunks = rows.map(|row| &row.as_chunks::<SUMS>().0[..xs.len()]);
    for (c, x) in xs.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(chunks) {
            for i in 0..SUMS {
                sums[i] += x[i] * row[c][i];
            }
        }
    }
    for (sums, row) in sums.iter_mut().zip(rows) {
        let tail = &row[xs.len() * SUMS..];
        for ((sum, x), y) in sums.iter_mut().zip(x_tail).zip(tail) {
            *sum += x * y;
        }
    }
    sums.map(|sums| sums.iter().sum())
}

/// ‖X·Wᵀ − X·Ŵᵀ‖ / ‖X·Wᵀ‖ for activations X `[…, k]`, a weight W `[n, k]` and what
/// `fill` writes of Ŵ. NaN where both outputs are zero. Pieces are summed in their
/// order: the result does not depend on the number of threads.
fn measure(
    w: &Tensor,
    x: &Tensor,
    cancel: &Cancel,
    fill: impl Fn(Range<usize>, &mut [f32]) + Sync,
) -> Result<f64> {
    let k = w.row_len();
    if w.shape().len() != 2 || x.shape().is_empty() || x.row_len() != k {
        return Err(Error::ShapeMismatch {
            what: "activations [tokens, k] of a weight [n, k]".into(),
            expected: vec![x.len() / x.row_len().max(1), k],
            actual: x.shape().to_vec(),
        });
    }
    check_floats(x)?;
    if k == 0 {
        return Ok(f64::NAN);
    }
    let x = x.to_f32_vec();
    let pieces = pool::run(|| {
        (0..w.len())
            .into_par_iter()
            .step_by(ROWS * k)
            .map(|start| {
                cancel.check()?;
                let range = start..(start + ROWS * k).min(w.len());
                let (mut scratch, mut near) = (Vec::new(), vec![0f32; range.len()]);
                fill(range.clone(), &mut near);
                let exact = w.f32_chunk(range, &mut scratch);
                let w: Vec<f64> = exact.iter().map(|w| f64::from(*w)).collect();
                let e: Vec<f64> = w
                    .iter()
                    .zip(&near)
                    .map(|(w, y)| w - f64::from(*y))
                    .collect();
                let (w, e) = (&w[..], &e[..]);
                Ok(dispatch(Measure { k, x: &x, w, e }))
            })
            .collect::<Result<Vec<Energies>>>()
    })?;
    let total = pieces
        .into_iter()
        .fold(Energies::default(), |a, b| Energies {
            output: a.output + b.output,
            error: a.error + b.error,
        });
    Ok((total.error / total.output).sqrt())
}

fn same_shape(w: &Tensor, shape: &[usize]) -> Result<()> {
    if w.shape() == shape {
        return Ok(());
    }
    Err(Error::ShapeMismatch {
        what: "an output error compares weights of one shape".into(),
        expected: w.shape().to_vec(),
        actual: shape.to_vec(),
    })
}

/// Relative error of the output for rows `x` of activations, with a quantized
/// weight instead of `w`.
///
/// # Errors
/// `ShapeMismatch`, `UnsupportedDtype`, `NonFinite` for `x`, `Cancelled`.
pub fn quantized(w: &Tensor, q: &Quantized, x: &Tensor, cancel: &Cancel) -> Result<f64> {
    same_shape(w, &q.shape)?;
    let decoder = input::decoder(q)?;
    measure(w, x, cancel, |range, y| decoder.decode(range.start, y))
}

/// The same with another dense weight.
///
/// # Errors
/// Those of [`quantized`].
pub fn dense(w: &Tensor, y: &Tensor, x: &Tensor, cancel: &Cancel) -> Result<f64> {
    same_shape(w, y.shape())?;
    measure(w, x, cancel, |range, out| {
        let mut scratch = Vec::new();
        out.copy_from_slice(y.f32_chunk(range, &mut scratch));
    })
}
