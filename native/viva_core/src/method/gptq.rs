//! GPTQ: columns are rounded one after the other, each making up for what those
//! before it did to the layer's output (Frantar et al., "GPTQ", 2022).
//!
//! [`super::factor`] says what a column is rounded to. Here rows are cut into
//! stripes that go through all columns on their own, so that the result does not
//! depend on the number of threads.

use rayon::prelude::*;

use super::factor::Factor;
use super::gram::Gram;
use super::sparsity::{Importance, Sparsity};
use crate::error::{Error, Result};
use crate::format::{Extremes, Grid, Quantized, Spec, Zero};
use crate::ops::{Cancel, pool, quantize};
use crate::simd::dispatch;
use crate::simd::product::{NARROW, Product, Spread, WIDE};
use crate::simd::sparsity::GROUP;
use crate::tensor::{DType, Tensor};

/// In which order columns are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As they stand; each block's scale is chosen when it is reached.
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
            damping: 0.01,
            order: Order::Activation,
            sparsity: None,
        }
    }
}

/// Rows that go through the columns together: two panels for each one of R read.
pub(super) const STRIPE: usize = 2 * WIDE;

/// Columns whose errors are multiplied at once, from L1, and that are rounded
/// together where no block says how many.
const STEP: usize = 128;

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
    let block = spec.block_len(w.shape());
    if k % block != 0 {
        return Err(Error::Indivisible { row: k, block });
    }
    quantize::check_floats(w)?;
    let extremes = quantize::needed_extremes(w, spec, cancel)?;
    let grid = &*format.grid(spec, extremes)?;
    check_sparsity(grid, spec, options, k)?;
    let order = order_of(gram, options.order);
    let (codes, scales, zeros) = pool::run(|| {
        let factor = Factor::new(gram, order.clone(), options.damping, cancel)?;
        let plan = Plan {
            grid,
            block,
            by_order: spec.act_order,
            // Scales that are quantized in turn are not the ones chosen on the way.
            dynamic: (options.order == Order::Natural || spec.act_order)
                && !spec.double_quant
                && block.is_multiple_of(NARROW),
            importance: options
                .sparsity
                .map(|sparsity| Importance::new(sparsity, gram, &factor)),
        };
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

fn order_of(gram: &Gram, order: Order) -> Vec<u32> {
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

/// What all stripes share.
pub(super) struct Plan<'a> {
    pub grid: &'a dyn Grid,
    /// Columns that share a scale.
    pub block: usize,
    /// Blocks are of columns in the order in which they are rounded.
    pub by_order: bool,
    /// Scales are chosen when a block is reached.
    pub dynamic: bool,
    /// What says which two of four columns become zeros, if any do.
    pub importance: Option<Importance>,
}

/// Buffers of a thread's stripes. Each has a panel of [`WIDE`] rows after the
/// other, in each of them a line of `WIDE` for every column or block.
#[derive(Default)]
pub(super) struct Room {
    /// Weights in the factor's order; errors, where they have been rounded.
    e: Vec<f32>,
    /// Of blocks in the tensor's order, unless they follow the factor's.
    scales: Vec<f32>,
    zeros: Vec<f32>,
}

/// Rows on their way through the columns.
pub(super) struct Stripe<'a> {
    plan: &'a Plan<'a>,
    factor: &'a Factor,
    rows: usize,
    panels: usize,
    room: &'a mut Room,
}

impl<'a> Stripe<'a> {
    pub fn new(
        plan: &'a Plan<'a>,
        factor: &'a Factor,
        w: &[f32],
        room: &'a mut Room,
    ) -> Result<Stripe<'a>> {
        let k = factor.columns();
        let (rows, blocks) = (w.len() / k, k / plan.block);
        let panels = rows.div_ceil(WIDE);
        // Rows past the last are zeros, and so are their scales.
        let cleared = |lines: &mut Vec<f32>, columns: usize| {
            lines.clear();
            lines.resize(panels * columns * WIDE, 0.0);
        };
        cleared(&mut room.e, k);
        cleared(&mut room.scales, blocks);
        cleared(&mut room.zeros, blocks);
        lines_of(w, k, |column| factor.place[column] as usize, &mut room.e);
        if !plan.dynamic {
            let mut scales = vec![0f32; rows * blocks];
            let mut zeros = vec![0f32; rows * blocks];
            plan.grid.fit(w, plan.block, &mut scales, &mut zeros)?;
            lines_of(&scales, blocks, |block| block, &mut room.scales);
            lines_of(&zeros, blocks, |block| block, &mut room.zeros);
        }
        Ok(Stripe {
            plan,
            factor,
            rows,
            panels,
            room,
        })
    }

    fn columns(&self) -> usize {
        self.factor.columns()
    }

    /// Rounds all columns: `write` gets the codes and the values of a column of a
    /// panel, and where that line begins in panels of columns in the tensor's
    /// order, which [`rows_of`] turns into rows.
    pub fn round(
        &mut self,
        mut write: impl FnMut(usize, &[u8; WIDE], &[f32; WIDE]),
        cancel: &Cancel,
    ) -> Result<()> {
        let k = self.columns();
        let step = if self.plan.dynamic {
            self.plan.block
        } else {
            STEP
        };
        let mut sums = vec![0f32; self.panels * step.next_multiple_of(NARROW) * WIDE];
        for first in (0..k).step_by(step) {
            cancel.check()?;
            let last = (first + step).min(k);
            self.feedback(first, last, &mut sums);
            if self.plan.dynamic {
                self.choose_scales(first, last, &sums)?;
            }
            self.round_columns(first, last, &mut sums, &mut write);
        }
        Ok(())
    }

    /// Σ_{t<first} e_t R_tj for columns `first .. last`, all panels.
    fn feedback(&self, first: usize, last: usize, sums: &mut [f32]) {
        let k = self.columns();
        let height = sums.len() / self.panels;
        sums.fill(0.0);
        for (p, sums) in sums.chunks_exact_mut(height).enumerate() {
            for from in (0..first).step_by(STEP) {
                let to = first.min(from + STEP);
                let b = &self.room.e[(p * k + from) * WIDE..(p * k + to) * WIDE];
                for at in (first..last).step_by(NARROW) {
                    let a = &self.factor.panels[at / NARROW][from * NARROW..to * NARROW];
                    let c = &mut sums[(at - first) * WIDE..][..NARROW * WIDE];
                    dispatch(Product { a, b, c });
                }
            }
        }
    }

    /// Chooses the scales of the block of columns `first .. last` from what its
    /// weights would best be now, if they were not rounded.
    fn choose_scales(&mut self, first: usize, last: usize, sums: &[f32]) -> Result<()> {
        let (k, block) = (self.columns(), self.plan.block);
        let height = sums.len() / self.panels;
        let mut x = vec![0f32; self.rows.next_multiple_of(WIDE) * block];
        for p in 0..self.panels {
            let mut sums = sums[p * height..(p + 1) * height].to_vec();
            let mut errors = self.room.e[(p * k + first) * WIDE..(p * k + last) * WIDE].to_vec();
            self.walk(first, last, &mut sums, &mut errors, |j, free, values| {
                for lane in 0..WIDE {
                    x[(p * WIDE + lane) * block + j - first] = free[lane];
                }
                *values = *free;
            });
        }
        let mut scales = vec![0f32; self.rows];
        let mut zeros = vec![0f32; self.rows];
        let x = &x[..self.rows * block];
        self.plan.grid.fit(x, block, &mut scales, &mut zeros)?;
        let (at, blocks) = (self.block_of(first), k / block);
        for p in 0..self.panels {
            let rows = p * WIDE..self.rows.min((p + 1) * WIDE);
            let line = (p * blocks + at) * WIDE..;
            self.room.scales[line.clone()][..rows.len()].copy_from_slice(&scales[rows.clone()]);
            self.room.zeros[line][..rows.len()].copy_from_slice(&zeros[rows]);
        }
        Ok(())
    }

    /// The block that column j of the factor's order belongs to.
    fn block_of(&self, j: usize) -> usize {
        match self.plan.by_order {
            true => j / self.plan.block,
            false => self.factor.order[j] as usize / self.plan.block,
        }
    }

    /// Goes through columns `first .. last` of one panel. `errors` holds their
    /// weights; `each` gets what those of a column would best be now, and says
    /// what they become. Their errors count in the sums after it.
    fn walk(
        &self,
        first: usize,
        last: usize,
        sums: &mut [f32],
        errors: &mut [f32],
        mut each: impl FnMut(usize, &[f32; WIDE], &mut [f32; WIDE]),
    ) {
        let mut kept = [u8::MAX; WIDE];
        for at in (first..last).step_by(NARROW) {
            let r = &self.factor.panels[at / NARROW];
            let (before, here) = errors.split_at_mut((at - first) * WIDE);
            let c = &mut sums[(at - first) * WIDE..][..NARROW * WIDE];
            dispatch(Product {
                a: &r[first * NARROW..at * NARROW],
                b: before,
                c,
            });
            let width = NARROW.min(last - at);
            for j in 0..width {
                let later = j * WIDE..;
                if let Some(importance) = &self.plan.importance
                    && j % GROUP == 0
                {
                    kept = importance.masks(
                        self.factor,
                        at + j,
                        &here[later.clone()],
                        &c[later.clone()],
                    );
                }
                let (sum, y) = c[..width * WIDE][later].split_at_mut(WIDE);
                let error = &mut here[j * WIDE..(j + 1) * WIDE];
                let inverse = self.factor.inverse_diagonal[at + j];
                let (mut x, mut values) = ([0f32; WIDE], [0f32; WIDE]);
                for lane in 0..WIDE {
                    x[lane] = error[lane] + sum[lane] * inverse;
                }
                if self.plan.importance.is_some() {
                    for (x, kept) in x.iter_mut().zip(kept) {
                        if kept >> (j % GROUP) & 1 == 0 {
                            *x = 0.0;
                        }
                    }
                }
                each(at + j, &x, &mut values);
                for (error, value) in error.iter_mut().zip(values) {
                    *error -= value;
                }
                let a = &r[(at + j) * NARROW..][j + 1..NARROW];
                dispatch(Spread { a, x: error, y });
            }
        }
    }

    /// Rounds columns `first .. last`; weights become errors.
    fn round_columns(
        &mut self,
        first: usize,
        last: usize,
        sums: &mut [f32],
        write: &mut impl FnMut(usize, &[u8; WIDE], &[f32; WIDE]),
    ) {
        let (k, blocks) = (self.columns(), self.columns() / self.plan.block);
        let height = sums.len() / self.panels;
        for p in 0..self.panels {
            let rows = WIDE.min(self.rows - p * WIDE);
            let sums = &mut sums[p * height..(p + 1) * height];
            let weights = (p * k + first) * WIDE..(p * k + last) * WIDE;
            let mut errors = self.room.e[weights.clone()].to_vec();
            self.walk(first, last, sums, &mut errors, |j, x, values| {
                let block = (p * blocks + self.block_of(j)) * WIDE;
                let mut codes = [0u8; WIDE];
                self.plan.grid.round(
                    &x[..rows],
                    &self.room.scales[block..][..rows],
                    &self.room.zeros[block..][..rows],
                    &mut codes[..rows],
                    &mut values[..rows],
                );
                let column = self.factor.order[j] as usize;
                write((p * k + column) * WIDE, &codes, values);
            });
            self.room.e[weights].copy_from_slice(&errors);
        }
    }
}

/// Elements of a row that are moved at once: two cache lines.
const MOVED: usize = 32;

/// Rows of k elements as panels of lines, that of a column at its `place`.
fn lines_of(x: &[f32], k: usize, place: impl Fn(usize) -> usize, lines: &mut [f32]) {
    for (rows, panel) in x.chunks(WIDE * k).zip(lines.chunks_exact_mut(WIDE * k)) {
        for first in (0..k).step_by(MOVED) {
            let last = k.min(first + MOVED);
            for (lane, row) in rows.chunks_exact(k).enumerate() {
                for (column, &v) in (first..last).zip(&row[first..last]) {
                    panel[place(column) * WIDE + lane] = v;
                }
            }
        }
    }
}

/// Rows of k elements out of panels of lines.
pub(super) fn rows_of<T: Copy>(lines: &[T], k: usize, x: &mut [T]) {
    for (rows, panel) in x.chunks_mut(WIDE * k).zip(lines.chunks_exact(WIDE * k)) {
        for first in (0..k).step_by(MOVED) {
            let last = k.min(first + MOVED);
            for (lane, row) in rows.chunks_exact_mut(k).enumerate() {
                let lines = panel[first * WIDE..].chunks_exact(WIDE);
                for (out, line) in row[first..last].iter_mut().zip(lines) {
                    *out = line[lane];
                }
            }
        }
    }
}
