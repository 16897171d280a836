//! 2:4 sparsity by what the model sees: of every four neighbouring weights of a
//! row two become zeros.
//!
//! A weight counts by its magnitude times the importance of its column:
//!
//! | method | importance of column j | weights that stay |
//! |---|---|---|
//! | `magnitude` | 1 | as they are |
//! | `wanda` | ‖x_j‖, the norm of its activations (Sun et al., 2023) | as they are |
//! | `sparsegpt` | R_jj | make up for those that go (Frantar and Alistarh, 2023) |
//!
//! R is the factor of [`super::factor`]: (w·R_jj)² is what the output loses with
//! the weight when all later ones do their best to make up for it, the `w²/[H⁻¹]_jj`
//! of the paper. SparseGPT goes through the columns as GPTQ does, with zero for
//! what goes and the weight as it has become for what stays. In a pass that also
//! rounds what stays, both errors go on to later columns together, and each of the
//! three may say what goes.

use rayon::prelude::*;

use super::calibrated::{check, take_damping};
use super::factor::Factor;
use super::gptq::Gptq;
use super::gram::Gram;
use super::stripe::{Plan, Room, STRIPE, Stripe, rows_of};
use crate::calibration::Statistics;
use crate::error::{Error, Result};
use crate::format::{Grid, OptionValue, Options};
use crate::ops::quantize::check_floats;
use crate::ops::{self, Cancel, pool};
use crate::simd::dispatch;
use crate::simd::product::WIDE;
use crate::simd::sparsity::{GROUP, Pick};
use crate::simd::stats::IsFinite;
use crate::tensor::{DType, Tensor, narrow, widen};

/// By what it is chosen which weights go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sparsity {
    Magnitude,
    Wanda,
    Sparsegpt,
}

impl Sparsity {
    pub const ALL: [Sparsity; 3] = [Sparsity::Magnitude, Sparsity::Wanda, Sparsity::Sparsegpt];

    pub fn name(self) -> &'static str {
        match self {
            Sparsity::Magnitude => "magnitude",
            Sparsity::Wanda => "wanda",
            Sparsity::Sparsegpt => "sparsegpt",
        }
    }
}

/// What the magnitudes of each column's weights are multiplied by.
pub struct Importance(Vec<f32>);

impl Importance {
    /// For columns in natural order.
    pub fn new(sparsity: Sparsity, gram: &Gram, factor: &Factor) -> Importance {
        let inverses = factor.inverse_diagonal.iter();
        Importance(match sparsity {
            Sparsity::Magnitude => vec![1.0; gram.columns()],
            Sparsity::Wanda => norms(gram).collect(),
            // A column that no activation reached goes first, whatever the
            // factor has on its diagonal.
            Sparsity::Sparsegpt => gram
                .diagonal()
                .zip(inverses)
                .map(|(d, inverse)| if d > 0.0 { 1.0 / inverse } else { 0.0 })
                .collect(),
        })
    }

    /// The masks of the group of columns that begins at `j`, one for each row of
    /// a panel, by what its weights would best be now. `weights` and `sums` are of
    /// those columns, a line of [`WIDE`] for each.
    pub fn masks(&self, factor: &Factor, j: usize, weights: &[f32], sums: &[f32]) -> [u8; WIDE] {
        let mut sums: [[f32; WIDE]; GROUP] =
            std::array::from_fn(|t| std::array::from_fn(|lane| sums[t * WIDE + lane]));
        let mut scores = [[0f32; GROUP]; WIDE];
        for t in 0..GROUP {
            let inverse = factor.inverse_diagonal[j + t];
            let changes = sums[t].map(|sum| sum * inverse);
            for lane in 0..WIDE {
                let x = weights[t * WIDE + lane] + changes[lane];
                scores[lane][t] = x * self.0[j + t];
            }
            for (i, sum) in sums[t + 1..].iter_mut().enumerate() {
                let r = factor.at(j + t, j + t + 1 + i);
                for (sum, change) in sum.iter_mut().zip(&changes) {
                    *sum -= change * r;
                }
            }
        }
        let mut masks = [0u8; WIDE];
        dispatch(Pick {
            scores: scores.as_flattened(),
            masks: &mut masks,
        });
        masks
    }
}

/// ‖x_j‖ of every column.
fn norms(gram: &Gram) -> impl Iterator<Item = f32> {
    gram.diagonal().map(f32::sqrt)
}

/// How a tensor is made sparse by what its columns meet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sparsify {
    pub sparsity: Sparsity,
    /// As in [`Gptq`]; for `sparsegpt` alone.
    pub damping: f32,
}

/// What a user's options ask for.
///
/// # Errors
/// `InvalidOption`.
pub fn resolve(given: Vec<(String, OptionValue)>) -> Result<Sparsify> {
    let mut options = Options::new(given);
    let sparsity = options.take_name(
        "method",
        &Sparsity::ALL.map(|s| (s.name(), s)),
        Sparsity::Magnitude,
    )?;
    let mut damping = Gptq::default().damping;
    if sparsity == Sparsity::Sparsegpt {
        damping = take_damping(&mut options, damping)?;
    }
    options.finish(sparsity.name())?;
    Ok(Sparsify { sparsity, damping })
}

/// Writes `w`, with zeros for two of every four weights of its rows, into `out`,
/// which has exactly its size.
///
/// # Errors
/// Those of [`ops::sparsity::sparsify_into`], `ShapeMismatch` unless w is a matrix
/// whose rows have as many columns as the statistics, `SingularHessian`.
pub fn sparsify_into(
    w: &Tensor,
    how: &Sparsify,
    statistics: &Statistics,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    check(w, statistics)?;
    match how.sparsity {
        Sparsity::Magnitude => ops::sparsity::sparsify_into(w, w, out, cancel),
        Sparsity::Wanda => {
            let norms: Vec<f32> = norms(statistics.gram()).collect();
            let mut scores = w.to_f32_vec();
            for row in scores.chunks_exact_mut(norms.len().max(1)) {
                row.iter_mut().zip(&norms).for_each(|(w, norm)| *w *= norm);
            }
            let scores = Tensor::from_slice(DType::F32, w.shape(), &scores)?;
            ops::sparsity::sparsify_into(w, &scores, out, cancel)
        }
        Sparsity::Sparsegpt => {
            ops::sparsity::check(w, out)?;
            check_floats(w)?;
            if out.is_empty() {
                return Ok(());
            }
            pool::run(|| sparsegpt_into(w, statistics.gram(), how.damping, out, cancel))
        }
    }
}

fn sparsegpt_into(
    w: &Tensor,
    gram: &Gram,
    damping: f32,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    let (dtype, k) = (w.dtype(), gram.columns());
    let factor = Factor::new(gram, (0..k as u32).collect(), damping, cancel)?;
    let plan = Plan {
        grid: &Dense(dtype),
        block: k,
        by_order: false,
        dynamic: false,
        trials: None,
        importance: Some(Importance::new(Sparsity::Sparsegpt, gram, &factor)),
    };
    out.par_chunks_mut(STRIPE * k * dtype.size())
        .enumerate()
        .try_for_each_init(Default::default, |scratch, (s, out)| {
            let (wide, room, lines): &mut (Vec<f32>, Room, Vec<f32>) = scratch;
            let first = s * STRIPE * k;
            let w = w.f32_chunk(first..first + out.len() / dtype.size(), wide);
            lines.resize(STRIPE * k, 0.0);
            let write = |at, _: &_, values: &[f32; WIDE]| {
                lines[at..at + WIDE].copy_from_slice(values);
            };
            Stripe::new(&plan, &factor, w, room)?.round(write, cancel)?;
            let mut values = vec![0f32; w.len()];
            rows_of(lines, k, &mut values);
            if !dispatch(IsFinite(&values)) {
                return Err(Error::option(
                    "method",
                    format!(
                        "what makes up for other weights grows past all that {} holds; cast the tensor to f32 first",
                        dtype.name()
                    ),
                ));
            }
            narrow(dtype, &values, out)
        })
}

/// Weights as they are, but for the rounding to what stores them.
struct Dense(DType);

impl Grid for Dense {
    fn fit(&self, _: &[f32], _: usize, _: &mut [f32], _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn round(&self, x: &[f32], _: &[f32], _: &[f32], _: &mut [u8], values: &mut [f32]) {
        values.copy_from_slice(x);
        for values in values.chunks_mut(WIDE) {
            let mut stored = [0u8; 8 * WIDE];
            let stored = &mut stored[..values.len() * self.0.size()];
            // Refused is only what holds no floats, which no weight is of.
            if narrow(self.0, values, stored).is_ok() {
                widen(self.0, stored, values);
            }
        }
    }

    fn store(&self, _: &[u8], _: &[f32], _: &[f32]) -> Result<Vec<Vec<u8>>> {
        Ok(Vec::new())
    }
}
