//! Integer codes under a float zero point: value = code · scale + bias.

use super::int::{Quotient, Ratio, Rounding, round_clamped, round_scale};
use super::runs::each_and_ones;
use super::{Isa, LANES, Op};
use crate::format::Method;
use crate::method::{affine, hqq};
use crate::tensor::DType;

/// Scale and bias of one block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Line {
    pub scale: f32,
    pub bias: f32,
}

impl Line {
    /// Both as the dtype that stores them holds them.
    #[inline(always)]
    pub fn stored(self, dtype: DType) -> Line {
        Line {
            scale: round_scale(dtype, self.scale),
            bias: round_scale(dtype, self.bias),
        }
    }

    /// The code of x as a float, or NaN where the scale is zero.
    #[inline(always)]
    pub fn code<I: Isa>(self, isa: I, x: I::F, top: f32) -> I::F {
        let v = isa.div(isa.sub(x, isa.splat(self.bias)), isa.splat(self.scale));
        round_clamped(isa, v, 0.0, top)
    }

    /// The value of a code.
    #[inline(always)]
    pub fn value<I: Isa>(self, isa: I, code: I::F) -> I::F {
        isa.add(isa.mul(code, isa.splat(self.scale)), isa.splat(self.bias))
    }

    /// Σ(x − value)².
    #[inline(always)]
    pub fn error<I: Isa>(self, isa: I, x: &[f32], top: f32) -> f32 {
        let mut sum = isa.splat(0.0);
        each_and_ones(
            isa,
            x,
            #[inline(always)]
            |x, one| {
                let e = isa.sub(x, self.value(isa, self.code(isa, x, top)));
                sum = isa.add(sum, isa.mul(isa.mul(e, e), one));
            },
        );
        isa.sum(sum)
    }
}

/// Least and greatest of a block; zero is not among them unless it is there.
#[inline(always)]
pub fn range<I: Isa>(isa: I, x: &[f32]) -> (f32, f32) {
    let Some(&first) = x.first() else {
        return (0.0, 0.0);
    };
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut low = isa.load_part(tail, first);
    let mut high = low;
    for chunk in chunks {
        let v = isa.load(chunk);
        low = isa.min(v, low);
        high = isa.max(v, high);
    }
    let (mut lows, mut highs) = ([0f32; LANES], [0f32; LANES]);
    isa.store(low, &mut lows);
    isa.store(high, &mut highs);
    (
        lows.into_iter()
            .fold(first, |m, v| if v < m { v } else { m }),
        highs
            .into_iter()
            .fold(first, |m, v| if v > m { v } else { m }),
    )
}

/// Round to nearest as MLX does it: the extreme that is further from zero has a
/// code of its own, and so does zero where the range holds it.
#[inline(always)]
fn rtn<I: Isa>(isa: I, x: &[f32], top: f32) -> Line {
    let (low, high) = range(isa, x);
    let below = low.abs() > high.abs();
    let step = (high - low) / top;
    let step = if step > 1e-7 { step } else { 1e-7 };
    let scale = if below { step } else { -step };
    let edge = if below { low } else { high };
    let steps = (edge / scale).round_ties_even();
    if steps == 0.0 {
        return Line { scale, bias: 0.0 };
    }
    Line {
        scale: edge / steps,
        bias: edge,
    }
}

/// Encodes whole blocks: one code a byte, one scale and bias a block.
pub struct Encode<'a> {
    pub method: Method,
    /// The greatest code.
    pub top: f32,
    /// What stores scales and biases.
    pub dtype: DType,
    pub block_len: usize,
    pub x: &'a [f32],
    pub codes: &'a mut [u8],
    pub scales: &'a mut [f32],
    pub biases: &'a mut [f32],
}

impl Op for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (top, dtype) = (self.top, self.dtype);
        let blocks = self
            .x
            .chunks(self.block_len)
            .zip(self.codes.chunks_mut(self.block_len));
        for (((x, out), scale), bias) in blocks.zip(self.scales).zip(self.biases) {
            let line = match self.method {
                // MLX rounds what it stores after it has chosen the codes.
                Method::Rtn => rtn(isa, x, top),
                Method::Mse => affine::least_squares(isa, x, top, dtype, rtn(isa, x, top)),
                Method::Hqq => hqq::zero_point(isa, x, top).stored(dtype),
            };
            let stored = line.stored(dtype);
            (*scale, *bias) = (stored.scale, stored.bias);
            if line.scale == 0.0 {
                out.fill(0);
                continue;
            }
            codes(isa, x, out, line, top);
        }
    }
}

/// How far x lies above the bias, in steps of the scale.
#[derive(Clone, Copy)]
struct Steps<I: Isa> {
    bias: I::F,
    ratio: Quotient<I>,
}

impl<I: Isa> Ratio<I> for Steps<I> {
    #[inline(always)]
    fn of(self, isa: I, x: I::F) -> I::F {
        self.ratio.of(isa.sub(x, self.bias))
    }
}

#[inline(always)]
fn codes<I: Isa>(isa: I, x: &[f32], out: &mut [u8], line: Line, top: f32) {
    let steps = Steps {
        bias: isa.splat(line.bias),
        ratio: Quotient::new(isa, line.scale, 1.0 / line.scale),
    };
    Rounding::new(isa, (0, top as i32), 0).codes(x, 0, out, steps);
}
