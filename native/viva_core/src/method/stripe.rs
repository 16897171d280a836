//! Rows on their way through the columns, as GPTQ takes them: stripes of rows that
//! go through all columns on their own, so that the result does not depend on the
//! number of threads.

use super::factor::Factor;
use super::gptq::{Gptq, Order};
use super::sparsity::Importance;
use crate::error::Result;
use crate::format::{Grid, Method, Spec};
use crate::ops::Cancel;
use crate::simd::dispatch;
use crate::simd::product::{NARROW, Product, Spread, WIDE};
use crate::simd::sparsity::GROUP;

/// Clipped ranges that are tried for a block, in steps of 1/20 down from 1.
const TRIALS: usize = 10;

/// Blocks for which they are tried: the cost grows with their length.
const LONGEST_TRIED: usize = 512;

/// Rows that go through the columns together: two panels for each one of R read.
pub(super) const STRIPE: usize = 2 * WIDE;

/// Columns whose errors are multiplied at once, from L1, and that are rounded
/// together where no block says how many.
const STEP: usize = 128;

/// What all stripes share.
pub(super) struct Plan<'a> {
    pub grid: &'a dyn Grid,
    /// Columns that share a scale.
    pub block: usize,
    /// Blocks are of columns in the order in which they are rounded.
    pub by_order: bool,
    /// Scales are chosen when a block is reached.
    pub dynamic: bool,
    /// With `dynamic`: beside the grid's own choice, scales of clipped ranges are
    /// tried, and those stay under which the block costs least of the output.
    pub trials: Option<&'a dyn Grid>,
    /// What says which two of four columns become zeros, if any do.
    pub importance: Option<Importance>,
}

impl<'a> Plan<'a> {
    /// `clipping` is the grid whose scales follow from the ends of a range.
    pub fn new(
        spec: &Spec,
        options: &Gptq,
        block: usize,
        (grid, clipping): (&'a dyn Grid, &'a dyn Grid),
        importance: Option<Importance>,
    ) -> Plan<'a> {
        // Scales that are quantized in turn are not the ones chosen on the way.
        let dynamic = (options.order == Order::Natural || spec.act_order)
            && !spec.double_quant
            && block.is_multiple_of(NARROW);
        Plan {
            grid,
            block,
            by_order: spec.act_order,
            dynamic,
            trials: (spec.method == Method::Mse && block <= LONGEST_TRIED).then_some(clipping),
            importance,
        }
    }
}

/// Buffers of a thread's stripes. Each has a panel of [`WIDE`] rows after the
/// other, in each of them a line of `WIDE` for every column or block.
#[derive(Default)]
pub(super) struct Room {
    /// Weights in the factor's order; errors, where they have been rounded.
    e: Vec<f32>,
    /// Of blocks in the tensor's order, unless they follow the factor's.
    pub scales: Vec<f32>,
    pub zeros: Vec<f32>,
}

/// Scales of a block, and zero points, one a row.
struct Fit {
    scales: Vec<f32>,
    zeros: Vec<f32>,
}

impl Fit {
    fn zeroed(rows: usize) -> Fit {
        Fit {
            scales: vec![0.0; rows],
            zeros: vec![0.0; rows],
        }
    }
}

/// Blocks with both ends of their range drawn in.
fn clipped(x: &[f32], block: usize, ratio: f32) -> Vec<f32> {
    let mut out = x.to_vec();
    for block in out.chunks_exact_mut(block) {
        let low = block.iter().fold(0f32, |m, v| m.min(*v)) * ratio;
        let high = block.iter().fold(0f32, |m, v| m.max(*v)) * ratio;
        block.iter_mut().for_each(|v| *v = v.clamp(low, high));
    }
    out
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
    /// order, which [`rows_of`] turns into rows. Returns what that costs of the
    /// output, squared.
    pub fn round(
        &mut self,
        mut write: impl FnMut(usize, &[u8; WIDE], &[f32; WIDE]),
        cancel: &Cancel,
    ) -> Result<f64> {
        let k = self.columns();
        let mut cost = 0.0;
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
            cost += self.round_columns(first, last, &mut sums, &mut write);
        }
        Ok(cost)
    }

    /// Σ_{t<first} e_t R_tj for columns `first .. last`, all panels.
    fn feedback(&self, first: usize, last: usize, sums: &mut [f32]) {
        let k = self.columns();
        let height = sums.len() / self.panels;
        sums.fill(0.0);
        for from in (0..first).step_by(STEP) {
            let to = first.min(from + STEP);
            for at in (first..last).step_by(NARROW) {
                let a = &self.factor.panels[at / NARROW][from * NARROW..to * NARROW];
                // What was read of R, which is far larger than a cache, serves all.
                for (p, sums) in sums.chunks_exact_mut(height).enumerate() {
                    let b = &self.room.e[(p * k + from) * WIDE..(p * k + to) * WIDE];
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
        let mut fit = Fit::zeroed(self.rows);
        x.truncate(self.rows * block);
        let grid = self.plan.grid;
        grid.fit(&x, block, &mut fit.scales, &mut fit.zeros)?;
        if let Some(clipping) = self.plan.trials {
            let mut least = self.costs_of(first, last, sums, &fit);
            let mut trial = Fit::zeroed(self.rows);
            for step in 0..TRIALS {
                let clipped = clipped(&x, block, 1.0 - step as f32 / 20.0);
                clipping.fit(&clipped, block, &mut trial.scales, &mut trial.zeros)?;
                let costs = self.costs_of(first, last, sums, &trial);
                for (row, cost) in costs.into_iter().enumerate() {
                    if cost < least[row] {
                        least[row] = cost;
                        fit.scales[row] = trial.scales[row];
                        fit.zeros[row] = trial.zeros[row];
                    }
                }
            }
        }
        let (at, blocks) = (self.block_of(first), k / block);
        for p in 0..self.panels {
            let rows = p * WIDE..self.rows.min((p + 1) * WIDE);
            let line = (p * blocks + at) * WIDE..;
            self.room.scales[line.clone()][..rows.len()].copy_from_slice(&fit.scales[rows.clone()]);
            self.room.zeros[line][..rows.len()].copy_from_slice(&fit.zeros[rows]);
        }
        Ok(())
    }

    /// What columns `first .. last` of each row would cost of the output under these
    /// scales. What later columns cost hardly depends on that: they are rounded to
    /// nearest of what will then be best.
    fn costs_of(&self, first: usize, last: usize, sums: &[f32], fit: &Fit) -> Vec<f32> {
        let (k, height) = (self.columns(), sums.len() / self.panels);
        let mut costs = Vec::with_capacity(self.panels * WIDE);
        for p in 0..self.panels {
            let mut sums = sums[p * height..(p + 1) * height].to_vec();
            let mut errors = self.room.e[(p * k + first) * WIDE..(p * k + last) * WIDE].to_vec();
            let rows = p * WIDE..self.rows.min((p + 1) * WIDE);
            let (scales, zeros) = (&fit.scales[rows.clone()], &fit.zeros[rows.clone()]);
            let mut codes = [0u8; WIDE];
            let cost = self.walk(first, last, &mut sums, &mut errors, |_, x, values| {
                let len = rows.len();
                let (codes, values) = (&mut codes[..len], &mut values[..len]);
                self.plan
                    .grid
                    .round(&x[..len], scales, zeros, codes, values);
            });
            costs.extend(&cost[..rows.len()]);
        }
        costs
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
    /// what they become. Their errors count in the sums after it. Returns what each
    /// row's columns cost of the output.
    fn walk(
        &self,
        first: usize,
        last: usize,
        sums: &mut [f32],
        errors: &mut [f32],
        mut each: impl FnMut(usize, &[f32; WIDE], &mut [f32; WIDE]),
    ) -> [f32; WIDE] {
        let mut costs = [0f32; WIDE];
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
                let free = x;
                if self.plan.importance.is_some() {
                    for (x, kept) in x.iter_mut().zip(kept) {
                        if kept >> (j % GROUP) & 1 == 0 {
                            *x = 0.0;
                        }
                    }
                }
                each(at + j, &x, &mut values);
                for lane in 0..WIDE {
                    let lost = (free[lane] - values[lane]) / inverse;
                    costs[lane] += lost * lost;
                }
                for (error, value) in error.iter_mut().zip(values) {
                    *error -= value;
                }
                let a = &r[(at + j) * NARROW..][j + 1..NARROW];
                dispatch(Spread { a, x: error, y });
            }
        }
        costs
    }

    /// Rounds columns `first .. last`; weights become errors.
    fn round_columns(
        &mut self,
        first: usize,
        last: usize,
        sums: &mut [f32],
        write: &mut impl FnMut(usize, &[u8; WIDE], &[f32; WIDE]),
    ) -> f64 {
        let mut cost = 0.0;
        let (k, blocks) = (self.columns(), self.columns() / self.plan.block);
        let height = sums.len() / self.panels;
        for p in 0..self.panels {
            let rows = WIDE.min(self.rows - p * WIDE);
            let sums = &mut sums[p * height..(p + 1) * height];
            let weights = (p * k + first) * WIDE..(p * k + last) * WIDE;
            let mut errors = self.room.e[weights.clone()].to_vec();
            let costs = self.walk(first, last, sums, &mut errors, |j, x, values| {
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
            cost += costs[..rows].iter().map(|&c| f64::from(c)).sum::<f64>();
        }
        cost
    }
}

/// Elements of a row that are moved at once: some cache lines in a row, and as
/// many lines of a panel as the L1 cache holds.
const MOVED: usize = 128;

/// Rows of k elements as panels of lines, that of a column at its `place`.
fn lines_of(x: &[f32], k: usize, place: impl Fn(usize) -> usize, lines: &mut [f32]) {
    for (rows, panel) in x.chunks(WIDE * k).zip(lines.chunks_exact_mut(WIDE * k)) {
        let mut moved = [[0f32; WIDE]; MOVED];
        for first in (0..k).step_by(MOVED) {
            let last = k.min(first + MOVED);
            for (lane, row) in rows.chunks_exact(k).enumerate() {
                for (line, &v) in moved.iter_mut().zip(&row[first..last]) {
                    line[lane] = v;
                }
            }
            for (column, line) in (first..last).zip(&moved) {
                panel[place(column) * WIDE..][..WIDE].copy_from_slice(line);
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
