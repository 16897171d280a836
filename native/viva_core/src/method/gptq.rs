//! GPTQ: columns are rounded one after the other, each making up for what those
//! before it did to the layer's output (Frantar et al., "GPTQ", 2022).
//!
//! [`super::factor`] says what a column is rounded to, and `stripe` takes
//! rows through the columns.

use rayon::prelude::*;

use super::factor::Factor;
use super::gram::Gram;
use super::input;
use super::sparsity::{Importance, Sparsity};
use super::stripe::{Plan, Room, STRIPE, Stripe, rows_of};
use crate::error::{Error, Result};
use crate::format::{Extremes, Grid, Method, Quantized, Spec, Zero};
use crate::ops::{Cancel, pool, quantize};
use crate::simd::product::WIDE;
use crate::simd::sparsity::GROUP;
use crate::tensor::{DType, Tensor};

/// In which order columns are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As they stand; each block's scale is chosen when it is reached, where the
    /// spec's method searches scales by what they cost of the output.
    Natural,
    /// By falling activation. Scales are chosen before, from the weights as they
    /// are; under a spec's `act_order` blocks follow the order instead, and
    /// their scales are chosen when they are reached.
    Activation,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gptq {
    /// What is added to the diagonal of H, as a part of its mean.
    pub damping: f32,
    pub order: Order,
    /// Two of every four columns become zeros when they are reached. The order is
    /// then natural: such columns are neighbours.
    pub sparsity: Option<Sparsity>,
}

impl Default for Gptq {
    fn default() -> Gptq {
        Gptq {
            damping: 0.05,
            order: Order::Natural,
            sparsity: None,
        }
    }
}

/// Quantizes `w` so that its error costs little on activations of this Gram
/// matrix.
///
/// # Errors
/// `ShapeMismatch` unless w is a matrix `[n, k]` and the Gram matrix has k
/// columns, `Indivisible` when blocks cross rows, `SingularHessian`, and those of
/// [`quantize::quantize`].
pub fn quantize(
    w: &Tensor,
    spec: &Spec,
    gram: &Gram,
    options: &Gptq,
    cancel: &Cancel,
) -> Result<Quantized> {
    let &[n, k] = w.shape() else {
        return Err(Error::ShapeMismatch {
            what: "gptq takes a matrix [n, k]".into(),
            expected: vec![w.len() / w.row_len().max(1), w.row_len()],
            actual: w.shape().to_vec(),
        });
    };
    if gram.columns() != k {
        return Err(Error::ShapeMismatch {
            what: "activations [tokens, k] of a weight [n, k]".into(),
            expected: vec![k],
            actual: vec![gram.columns()],
        });
    }
    if n == 0 || k == 0 {
        return quantize::quantize(w, spec, cancel);
    }
    let format = spec.format()?;
    format.check_shape(spec, w.shape())?;
    let block = block_of(spec, w.shape())?;
    quantize::check_floats(w)?;
    let extremes = quantize::needed_extremes(w, spec, cancel)?;
    let grid = &*format.grid(spec, extremes)?;
    check_sparsity(grid, spec, options, k)?;
    let to_nearest = to_nearest(spec);
    let clipping = format.grid(&to_nearest, extremes)?;
    let order = order_of(gram, options.order);
    let (codes, scales, zeros) = pool::run(|| {
        let factor = Factor::new(gram, order.clone(), options.damping, cancel)?;
        let importance = options
            .sparsity
            .map(|sparsity| Importance::new(sparsity, gram, &factor));
        let plan = Plan::new(spec, options, block, (grid, &*clipping), importance);
        let mut codes = vec![0u8; n * k];
        let mut scales = vec![0f32; n * k / block];
        let mut zeros = vec![0f32; n * k / block];
        codes
            .par_chunks_mut(STRIPE * k)
            .zip(scales.par_chunks_mut(STRIPE * k / block))
            .zip(zeros.par_chunks_mut(STRIPE * k / block))
            .enumerate()
            .try_for_each_init(
                Default::default,
                |scratch, (s, ((codes, scales), zeros))| {
                    let (wide, room, lines): &mut (Vec<f32>, Room, Vec<u8>) = scratch;
                    let first = s * STRIPE * k;
                    let w = w.f32_chunk(first..first + codes.len(), wide);
                    let mut stripe = Stripe::new(&plan, &factor, w, room)?;
                    lines.resize(STRIPE * k, 0);
                    let write = |at, codes: &[u8; WIDE], _: &_| {
                        lines[at..at + WIDE].copy_from_slice(codes);
                    };
                    stripe.round(write, cancel)?;
                    rows_of(lines, k, codes);
                    rows_of(&room.scales, k / block, scales);
                    rows_of(&room.zeros, k / block, zeros);
                    Ok(())
                },
            )?;
        Ok((codes, scales, zeros))
    })?;
    let mut parts = assemble(grid, spec, w, extremes, (&codes, &scales, &zeros))?;
    if spec.act_order {
        let mut index = vec![0i32; k];
        for (at, &column) in order.iter().enumerate() {
            index[column as usize] = (at / block) as i32;
        }
        if let Some((_, part)) = parts.iter_mut().find(|(name, _)| *name == "group_index") {
            *part = Tensor::from_slice(DType::I32, &[k], &index)?;
        }
    }
    Ok(Quantized {
        spec: spec.clone(),
        shape: w.shape().to_vec(),
        dtype: w.dtype(),
        parts,
    })
}

/// Rows whose cost stands for that of all.
const ASKED: usize = 128;

/// What rounding `w` costs of the output, squared, when its columns are scaled by s:
/// that of 128 of its rows, evenly spread, where it has more. `factor` is that
/// of the input as it is. Call it inside the pool.
///
/// # Errors
/// Those of [`quantize()`].
pub fn cost(
    w: &Tensor,
    spec: &Spec,
    factor: &Factor,
    s: &[f32],
    options: &Gptq,
    cancel: &Cancel,
) -> Result<f64> {
    let k = factor.columns();
    let n = w.len() / k;
    let apart = n.div_ceil(ASKED).max(1);
    let mut wide = Vec::new();
    let mut rows = Vec::with_capacity(n.div_ceil(apart) * k);
    for row in (0..n).step_by(apart) {
        rows.extend_from_slice(w.f32_chunk(row * k..(row + 1) * k, &mut wide));
    }
    input::scale(&mut rows, s);
    let scaled = factor.scaled(s);
    let format = spec.format()?;
    let block = block_of(spec, w.shape())?;
    let extremes = format.needs_extremes(spec).then(|| {
        let ends = |(low, high): (f32, f32), v: &f32| (low.min(*v), high.max(*v));
        let (min, max) = rows.iter().fold((0.0, 0.0), ends);
        Extremes { min, max }
    });
    let grid = format.grid(spec, extremes)?;
    let to_nearest = to_nearest(spec);
    let clipping = format.grid(&to_nearest, extremes)?;
    let plan = Plan::new(spec, options, block, (&*grid, &*clipping), None);
    let costs = rows
        .par_chunks(STRIPE * k)
        .map_init(Room::default, |room, rows| {
            Stripe::new(&plan, &scaled, rows, room)?.round(|_, _, _| {}, cancel)
        })
        .collect::<Result<Vec<f64>>>()?;
    // In the order of the stripes: not that in which threads end.
    Ok(costs.iter().sum())
}

/// Columns that share a scale; rows are whole blocks of them.
fn block_of(spec: &Spec, shape: &[usize]) -> Result<usize> {
    let (row, block) = (shape.last().copied().unwrap_or(1), spec.block_len(shape));
    match row % block {
        0 => Ok(block),
        _ => Err(Error::Indivisible { row, block }),
    }
}

/// What the search of a spec's method starts from.
fn to_nearest(spec: &Spec) -> Spec {
    Spec {
        method: Method::Rtn,
        ..spec.clone()
    }
}

/// Sparse columns are groups of neighbours, on grids that have a zero.
fn check_sparsity(grid: &dyn Grid, spec: &Spec, options: &Gptq, k: usize) -> Result<()> {
    if options.sparsity.is_none() {
        return match grid.two_of_four() {
            false => Ok(()),
            true => Err(Error::option(
                "sparsity",
                format!(
                    "{} keeps two of four weights; say which, by sparsity: :sparsegpt for instance",
                    spec.format
                ),
            )),
        };
    }
    if !k.is_multiple_of(GROUP) {
        return Err(Error::Indivisible {
            row: k,
            block: GROUP,
        });
    }
    if options.order != Order::Natural {
        return Err(Error::option(
            "order",
            "with sparsity columns are taken four neighbours at a time; use order: :natural",
        ));
    }
    if spec.zero == Zero::Float {
        return Err(Error::option(
            "zero_point",
            "a float one has no code that is exactly zero, which sparsity needs; use zero_point: :integer",
        ));
    }
    Ok(())
}

/// Columns as GPTQ takes them.
pub fn order_of(gram: &Gram, order: Order) -> Vec<u32> {
    let mut columns: Vec<u32> = (0..gram.columns() as u32).collect();
    if order == Order::Activation {
        let diagonal: Vec<f32> = gram.diagonal().collect();
        columns.sort_by(|&a, &b| diagonal[b as usize].total_cmp(&diagonal[a as usize]));
    }
    columns
}

fn assemble(
    grid: &dyn Grid,
    spec: &Spec,
    w: &Tensor,
    extremes: Option<Extremes>,
    (codes, scales, zeros): (&[u8], &[f32], &[f32]),
) -> Result<Vec<(&'static str, Tensor)>> {
    let format = spec.format()?;
    let mut stored = grid.store(codes, scales, zeros)?.into_iter();
    let working = format
        .working_parts(spec, w.shape())?
        .into_iter()
        .map(|part| {
            let len = part.shape.iter().product::<usize>() * part.dtype.size();
            let bytes = stored.next().unwrap_or_else(|| vec![0; len]);
            Ok((
                part.name,
                Tensor::from_slice(part.dtype, &part.shape, &bytes)?,
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    format.finish(spec, extremes, working)
}
