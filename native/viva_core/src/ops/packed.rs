//! Weights as panels, for products in 8-bit integers.

use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use super::{Cancel, pool};
use crate::error::{Error, Result};
use crate::format::{Decode, INPUT_SCALE, Quantized};
use crate::simd::panel::{Form, LINE, Low, ROWS, Scales};
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
    if plan.is_of_halves(steps) {
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

/// One row on its way into a panel.
#[derive(Default)]
pub(super) struct Scratch {
    codes: Vec<u8>,
    scales: Vec<f32>,
    lows: Vec<f32>,
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
        let block = match form.block {
            usize::MAX => k.max(1),
            block => block,
        };
        if !k.is_multiple_of(block) {
            return refused(&format!(
                "blocks of {block} cross the rows of {k}; multiply with compute f32"
            ));
        }
        let cuts = block.div_ceil(LONGEST);
        let plan = Plan {
            n,
            k,
            form: Form {
                groups: k / block * cuts,
                quads: 2 * block.div_ceil(cuts).div_ceil(8),
                halves: form.halves,
                scales: Scales::F32,
                low: match form.lows {
                    Lows::Nothing => Low::Nothing,
                    Lows::ZeroPoints => Low::Zeros,
                    Lows::Biases => Low::Biases,
                },
            },
            steps: form,
            block,
            cuts,
        };
        Ok((plan, steps))
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

    /// Writes one panel, which holds zeros.
    pub fn fill(&self, steps: &dyn Steps, index: usize, panel: &mut [u8], scratch: &mut Scratch) {
        let blocks = self.k / self.block;
        scratch.codes.resize(self.k, 0);
        scratch.scales.resize(blocks, 0.0);
        scratch.lows.resize(blocks, 0.0);
        let rows = index * ROWS..self.n.min((index + 1) * ROWS);
        for (lane, row) in rows.enumerate() {
            steps.codes(row, &mut scratch.codes);
            steps.numbers(row, &mut scratch.scales, &mut scratch.lows);
            for (g, group) in panel.chunks_exact_mut(self.form.group()).enumerate() {
                let (header, lines) = group.split_at_mut(self.form.header());
                let block = g / self.cuts;
                self.put_numbers(header, lane, scratch.scales[block], scratch.lows[block]);
                self.put_codes(lines, lane, &scratch.codes[self.columns(g)]);
            }
        }
    }

    fn put_numbers(&self, header: &mut [u8], lane: usize, scale: f32, low: f32) {
        let put = |numbers: &mut [u8], v: f32| match self.form.scales {
            Scales::F16 => {
                numbers[2 * lane..][..2].copy_from_slice(&f16::from_f32(v).to_le_bytes());
            }
            Scales::F32 => numbers[4 * lane..][..4].copy_from_slice(&v.to_le_bytes()),
        };
        let (scales, lows) = header.split_at_mut(self.form.numbers());
        put(scales, scale);
        match self.form.low {
            Low::Nothing => {}
            Low::Zeros => lows[lane] = low as u8,
            Low::Biases => put(lows, low),
        }
    }

    fn put_codes(&self, lines: &mut [u8], lane: usize, codes: &[u8]) {
        let (lines, _) = lines.as_chunks_mut::<LINE>();
        let fours = codes.chunks(4);
        if !self.form.halves {
            for (line, four) in lines.iter_mut().zip(fours) {
                line[4 * lane..][..four.len()].copy_from_slice(four);
            }
            return;
        }
        for (line, eight) in lines.iter_mut().zip(codes.chunks(8)) {
            let line = &mut line[4 * lane..][..4];
            for (i, code) in eight.iter().enumerate() {
                line[i % 4] |= code << (i / 4 * 4);
            }
        }
    }
}
