//! Weights as panels, for products in 8-bit integers.

use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use super::{Cancel, pool};
use crate::error::{Error, Result};
use crate::format::{Decode, INPUT_SCALE, Quantized};
use crate::simd::form::{Form, LINE, Low, ROWS, Scales, UNITS};
use crate::simd::product::Transpose;
use crate::simd::{LANES, dispatch};
use crate::steps::{Lows, StepForm, Steps};
use crate::tensor::{Buffer, DType, Tensor};

/// Elements of a group at most: sums of their products fit 32 bits.
const LONGEST: usize = 1 << 16;

/// A quantized matrix in panels, which this machine multiplies with and nothing
/// else reads: it is never written to a file.
#[derive(Clone, Debug)]
pub struct Packed {
    /// The matrix without its codes and scales.
    pub(super) of: Quantized,
    pub(super) plan: Plan,
    pub(super) panels: Tensor,
}

impl Packed {
    pub fn shape(&self) -> &[usize] {
        &self.of.shape
    }

    /// The dtype that it was quantized from.
    pub fn dtype(&self) -> DType {
        self.of.dtype
    }

    /// The name of its format.
    pub fn format(&self) -> &str {
        &self.of.spec.format
    }

    pub fn nbytes(&self) -> usize {
        self.panels.bytes().len()
    }
}

/// Packs a quantized matrix. The result holds nothing of `q`.
///
/// # Errors
/// `ShapeMismatch` unless q is a matrix; `InvalidOption` where its format is none of
/// integers, or its blocks cross rows; `Cancelled`.
pub fn pack(q: &Quantized, cancel: &Cancel) -> Result<Packed> {
    let &[n, k] = q.shape.as_slice() else {
        return Err(Error::ShapeMismatch {
            what: "packing takes a quantized matrix [n, k]".into(),
            expected: vec![q.len() / q.shape.last().copied().unwrap_or(1).max(1), 1],
            actual: q.shape.clone(),
        });
    };
    let decoder = q.spec.format()?.decoder(q)?;
    let (mut plan, steps) = Plan::of(q, &*decoder, "prepack", (n, k))?;
    if plan.form.scales == Scales::F32 && plan.is_of_halves(steps) {
        plan.form.scales = Scales::F16;
    }
    let mut buffer = Buffer::zeroed(n.div_ceil(ROWS) * plan.form.panel());
    if plan.form.panel() > 0 {
        pool::run(|| {
            buffer
                .bytes_mut()
                .par_chunks_mut(plan.form.panel())
                .enumerate()
                .try_for_each_init(Scratch::default, |scratch, (i, panel)| {
                    cancel.check()?;
                    plan.fill(steps, i, panel, scratch);
                    Ok(())
                })
        })?;
    }
    let len = buffer.as_ref().len();
    let mut of = q.clone();
    of.parts.retain(|(name, _)| *name == INPUT_SCALE);
    Ok(Packed {
        of,
        panels: Tensor::from_buffer(DType::U8, vec![len], buffer)?,
        plan,
    })
}

/// How a matrix lies in panels.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub n: usize,
    pub k: usize,
    pub form: Form,
    pub steps: StepForm,
    /// Elements of a block, and how many groups it is cut into.
    block: usize,
    cuts: usize,
}

/// Rows on their way into a panel.
#[derive(Default)]
pub(super) struct Scratch {
    codes: Vec<u8>,
    /// Codes with those that fill each group.
    padded: Vec<u8>,
    scales: Vec<f32>,
    lows: Vec<f32>,
    /// Units of scales and of biases.
    units: [Vec<f32>; 2],
    /// The four bytes that each row has in a line, line after line.
    words: Vec<f32>,
}

impl Plan {
    /// The plan of a matrix, and what it is filled from; `op` is what the user asked
    /// for.
    pub fn of<'a>(
        q: &Quantized,
        decoder: &'a dyn Decode,
        op: &'static str,
        (n, k): (usize, usize),
    ) -> Result<(Plan, &'a dyn Steps)> {
        let refused = |why: &str| Err(Error::option(op, why.to_string()));
        let Some(steps) = decoder.steps() else {
            return refused(&format!(
                "{} is not made of integers under scales as they lie; multiply it with compute f32",
                q.spec.format
            ));
        };
        let form = steps.form();
        if form.block != usize::MAX && !k.is_multiple_of(form.block) {
            let block = form.block;
            return refused(&format!(
                "blocks of {block} cross the rows of {k}; multiply with compute f32"
            ));
        }
        Ok((Plan::new(form, (n, k)), steps))
    }

    /// The plan of steps of that form, whose blocks do not cross rows.
    pub fn new(form: StepForm, (n, k): (usize, usize)) -> Plan {
        let block = match form.block {
            usize::MAX => k.max(1),
            block => block,
        };
        let cuts = block.div_ceil(LONGEST);
        let groups = k / block * cuts;
        let (scales, shared) = match form.shared {
            1 => (Scales::F32, groups.max(1)),
            shared => (Scales::Multiples, shared),
        };
        Plan {
            n,
            k,
            form: Form {
                groups,
                shared,
                quads: 2 * block.div_ceil(cuts).div_ceil(8),
                halves: form.halves,
                scales,
                low: match form.lows {
                    Lows::Nothing => Low::Nothing,
                    Lows::ZeroPoints => Low::Zeros,
                    Lows::Biases => Low::Biases,
                },
            },
            steps: form,
            block,
            cuts,
        }
    }

    /// Whether f16 holds every scale and bias as it is.
    fn is_of_halves(&self, steps: &dyn Steps) -> bool {
        let holds = |v: &f32| f16::from_f32(*v).to_f32() == *v;
        let blocks = self.k / self.block;
        let (mut scales, mut lows) = (vec![0f32; blocks], vec![0f32; blocks]);
        (0..self.n).all(|row| {
            steps.numbers(row, &mut scales, &mut lows);
            scales.iter().all(holds) && (self.form.low != Low::Biases || lows.iter().all(holds))
        })
    }

    /// The columns of a group.
    pub fn columns(&self, group: usize) -> Range<usize> {
        let (block, cut) = (group / self.cuts, group % self.cuts);
        let len = self.block.div_ceil(self.cuts);
        let end = (block + 1) * self.block;
        let start = block * self.block + cut * len;
        start.min(end)..(start + len).min(end)
    }

    /// Writes one panel, which holds zeros and begins at a multiple of four bytes.
    pub fn fill(&self, steps: &dyn Steps, index: usize, panel: &mut [u8], scratch: &mut Scratch) {
        let form = &self.form;
        let words = form.lines() / LINE;
        // Whole vectors from the first word of the last group too.
        let stride = (form.groups * words).next_multiple_of(LANES) + LANES;
        let blocks = self.k / self.block;
        scratch.codes.resize(self.k, 0);
        scratch.padded.resize(form.groups * form.quads * 4, 0);
        scratch.scales.resize(blocks, 0.0);
        scratch.lows.resize(blocks, 0.0);
        scratch.words.resize(LANES * stride, 0.0);
        let [unit_scales, unit_lows] = &mut scratch.units;
        unit_scales.resize(form.groups / form.shared, 0.0);
        unit_lows.resize(form.groups / form.shared, 0.0);
        for half in (0..ROWS).step_by(LANES) {
            let first = index * ROWS + half;
            for (lane, row) in (first..self.n.min(first + LANES)).enumerate() {
                steps.codes(row, &mut scratch.codes);
                steps.numbers(row, &mut scratch.scales, &mut scratch.lows);
                let [unit_scales, unit_lows] = &mut scratch.units;
                steps.units(row, unit_scales, unit_lows);
                let padded = scratch.padded.chunks_exact_mut(form.quads * 4);
                for (group, padded) in padded.enumerate() {
                    let codes = &scratch.codes[self.columns(group)];
                    padded[..codes.len()].copy_from_slice(codes);
                }
                self.put_codes(&scratch.padded, &mut scratch.words[lane * stride..]);
                for group in 0..form.groups {
                    let block = group / self.cuts;
                    let numbers = [scratch.scales[block], scratch.lows[block]];
                    let (units, at) = form.at(group);
                    let header = &mut panel[at..][..form.header()];
                    self.put_numbers(header, half + lane, numbers);
                    if group % form.shared == 0 {
                        let numbers = scratch.units.each_ref().map(|u| u[group / form.shared]);
                        put_units(&mut panel[units..][..form.units()], half + lane, numbers);
                    }
                }
            }
            for group in 0..form.groups {
                let lines = form.at(group).1 + form.header();
                dispatch(Transpose {
                    rows: &scratch.words[group * words..],
                    stride,
                    at: half,
                    panel: bytemuck::cast_slice_mut(&mut panel[lines..][..form.lines()]),
                });
            }
        }
    }

    /// Codes as a row's words: four bytes each, or eight halves, the first four of
    /// them the low ones.
    fn put_codes(&self, codes: &[u8], words: &mut [f32]) {
        if !self.form.halves {
            let words: &mut [u8] = bytemuck::cast_slice_mut(words);
            return words[..codes.len()].copy_from_slice(codes);
        }
        for (word, eight) in words.iter_mut().zip(codes.as_chunks::<8>().0) {
            let eight = u64::from_le_bytes(*eight);
            let halves = (eight | eight >> 28) as u32;
            *word = f32::from_ne_bytes(halves.to_le_bytes());
        }
    }

    fn put_numbers(&self, header: &mut [u8], lane: usize, [scale, low]: [f32; 2]) {
        let put = |numbers: &mut [u8], v: f32| match self.form.scales {
            Scales::F16 => put_half(numbers, lane, v),
            Scales::F32 => numbers[4 * lane..][..4].copy_from_slice(&v.to_le_bytes()),
            Scales::Multiples => numbers[lane] = v as i8 as u8,
        };
        let (scales, lows) = header.split_at_mut(self.form.numbers());
        put(scales, scale);
        match self.form.low {
            Low::Nothing => {}
            Low::Zeros => lows[lane] = low as u8,
            Low::Biases => put(lows, low),
        }
    }
}

/// Writes one row's units.
fn put_units(units: &mut [u8], lane: usize, numbers: [f32; 2]) {
    for (units, v) in units.chunks_exact_mut(UNITS).zip(numbers) {
        put_half(units, lane, v);
    }
}

fn put_half(numbers: &mut [u8], lane: usize, v: f32) {
    numbers[2 * lane..][..2].copy_from_slice(&f16::from_f32(v).to_le_bytes());
}
