//! Integer codes: choosing scales, encoding, decoding.

use half::{bf16, f16};

use super::stats::{absmax, range_with_zero};
use super::vector::round_f16;
use super::{Isa, LANES, Op};
use crate::method::mse::{Best, ROUND, squared_error};
use crate::tensor::DType;

/// The codes of one integer format: value = (code − offset) · scale.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Least and greatest of code − offset for symmetric formats, of code for
    /// asymmetric ones.
    pub lo: i32,
    pub hi: i32,
    /// What is added before a symmetric code is stored.
    pub offset: i32,
    pub symmetric: bool,
    /// Symmetric rtn: scale = absmax / divisor.
    pub divisor: f32,
}

/// Scale and zero point of one block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fit {
    pub scale: f32,
    pub zero: i32,
}

/// Rounds a scale to the dtype that stores it.
#[inline(always)]
pub fn round_scale(dtype: DType, scale: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(scale).to_f32(),
        DType::BF16 => bf16::from_f32(scale).to_f32(),
        _ => scale,
    }
}

/// Clamps, then rounds to the nearest integer, ties to even.
#[inline(always)]
pub(crate) fn round_clamped<I: Isa>(isa: I, v: I::F, lo: f32, hi: f32) -> I::F {
    let v = isa.min(isa.max(v, isa.splat(lo)), isa.splat(hi));
    isa.sub(isa.add(v, isa.splat(ROUND)), isa.splat(ROUND))
}

/// Integer codes of `x`, from `ratio(x)` = x / scale.
#[inline(always)]
fn codes<I: Isa>(
    isa: I,
    x: &[f32],
    out: &mut [u8],
    (lo, hi): (i32, i32),
    add: i32,
    ratio: impl Fn(I::F) -> I::F,
) {
    let (lo, hi) = (isa.splat(lo as f32), isa.splat(hi as f32));
    let round = isa.splat(ROUND);
    // The bits of ROUND + n are those of ROUND, plus n.
    let shift = isa.splat_u((add as u32).wrapping_sub(ROUND.to_bits()));
    let code = |v: I::F| {
        let clamped = isa.min(isa.max(ratio(v), lo), hi);
        isa.add_u(isa.bits(isa.add(clamped, round)), shift)
    };
    let (chunks, tail) = x.as_chunks::<LANES>();
    let (outs, out_tail) = out.as_chunks_mut::<LANES>();
    for (x, out) in chunks.iter().zip(outs) {
        isa.store_u8(code(isa.load(x)), out);
    }
    if !tail.is_empty() {
        let mut lanes = [0u8; LANES];
        isa.store_u8(code(isa.load_part(tail, 0.0)), &mut lanes);
        out_tail.copy_from_slice(&lanes[..tail.len()]);
    }
}

impl Grid {
    /// Σ(x − value)² under `fit`.
    #[inline(always)]
    fn error<I: Isa>(self, isa: I, x: &[f32], fit: Fit) -> f32 {
        let zero = if self.symmetric { 0 } else { fit.zero };
        let (lo, hi) = ((self.lo - zero) as f32, (self.hi - zero) as f32);
        let scale = isa.splat(fit.scale);
        squared_error(isa, x, |v| {
            isa.mul(round_clamped(isa, isa.div(v, scale), lo, hi), scale)
        })
    }

    /// Round to nearest: the scale that just covers the extremes.
    #[inline(always)]
    pub fn rtn(self, dtype: DType, low: f32, high: f32) -> Fit {
        if self.symmetric {
            let most = if -low > high { -low } else { high };
            return Fit {
                scale: round_scale(dtype, most / self.divisor),
                zero: self.offset,
            };
        }
        let levels = (self.hi - self.lo) as f32;
        // Halves first: the difference of two large finite values can overflow.
        let scale = round_scale(dtype, (high * 0.5 - low * 0.5) / (levels * 0.5));
        self.with_zero(scale, -low)
    }

    #[inline(always)]
    fn with_zero(self, scale: f32, minus_low: f32) -> Fit {
        let zero = if scale > 0.0 {
            ((minus_low / scale).clamp(self.lo as f32, self.hi as f32) + ROUND - ROUND) as i32
        } else {
            0
        };
        Fit { scale, zero }
    }

    /// Scale (and zero point) of least squared error; never worse than `rtn`.
    #[inline(always)]
    fn mse<I: Isa>(self, isa: I, dtype: DType, x: &[f32]) -> Fit {
        let (low, high) = range_with_zero(isa, x);
        let rtn = self.rtn(dtype, low, high);
        let usable = |scale: f32| scale != 0.0 && scale.is_finite();
        if !usable(rtn.scale) {
            return rtn;
        }
        // More levels leave less to gain from clipping: the search narrows.
        let levels = (self.hi - self.lo) as f32;
        let depth = if levels > 31.0 { 0.06 } else { 0.45 };
        let mut best = Best::none();
        if self.symmetric {
            let most = if -low > high { -low } else { high };
            let (lo, hi) = (self.lo as f32, self.hi as f32);
            // The side that reaches further down takes the extreme value.
            let widest = if -lo > hi { -lo } else { hi };
            let signs: &[f32] = if -lo > hi { &[1.0, -1.0] } else { &[1.0] };
            for &sign in signs {
                for step in 0..24 {
                    let shrink = 1.02 + (1.0 / self.divisor) - depth * step as f32 / 23.0;
                    let inv = sign * widest / (most * shrink);
                    let inv = isa.splat(inv);
                    best.attempt(isa, x, 0.0, |v| round_clamped(isa, isa.mul(v, inv), lo, hi));
                }
            }
        } else {
            for a in 0..7 {
                for b in 0..7 {
                    let low = low * (1.0 - depth * a as f32 / 6.0);
                    let high = high * (1.0 - depth * b as f32 / 6.0);
                    let scale = (high * 0.5 - low * 0.5) / (levels * 0.5);
                    if !usable(scale) {
                        continue;
                    }
                    let zero = self.with_zero(scale, -low).zero as f32;
                    let (lo, hi) = (self.lo as f32 - zero, self.hi as f32 - zero);
                    let inv = isa.splat(1.0 / scale);
                    best.attempt(isa, x, zero, |v| {
                        round_clamped(isa, isa.mul(v, inv), lo, hi)
                    });
                }
            }
        }
        // The best scale for some codes gives other codes.
        for _ in 0..2 {
            let (scale, zero) = (best.scale, best.zero);
            if usable(scale) {
                let (lo, hi) = (self.lo as f32 - zero, self.hi as f32 - zero);
                let inv = isa.splat(1.0 / scale);
                best.attempt(isa, x, zero, |v| {
                    round_clamped(isa, isa.mul(v, inv), lo, hi)
                });
            }
        }
        let found = Fit {
            scale: round_scale(dtype, best.scale),
            zero: if self.symmetric {
                self.offset
            } else {
                best.zero as i32
            },
        };
        if !usable(found.scale) || self.error(isa, x, rtn) <= self.error(isa, x, found) {
            return rtn;
        }
        found
    }
}

/// How the scale of a block is chosen.
#[derive(Clone, Copy, Debug)]
pub enum Choice {
    Rtn(DType),
    Mse(DType),
    /// LLM.int8(): weights through f16, scale = absmax, multiplied by 127/absmax.
    Absmax,
    /// One scale for the whole tensor, found before.
    Fixed(Fit),
    /// The same under the rule of LLM.int8().
    FixedAbsmax(f32),
}

/// Encodes whole blocks: one code a byte, one scale and zero point a block.
pub struct Encode<'a> {
    pub grid: Grid,
    pub choice: Choice,
    pub block_len: usize,
    pub x: &'a [f32],
    pub codes: &'a mut [u8],
    pub scales: &'a mut [f32],
    pub zeros: &'a mut [u8],
}

impl Op for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Grid { lo, hi, offset, .. } = self.grid;
        let blocks = self
            .x
            .chunks(self.block_len)
            .zip(self.codes.chunks_mut(self.block_len));
        for (((x, out), scale), zero) in blocks.zip(self.scales).zip(self.zeros) {
            let absmax_rule = match self.choice {
                Choice::Absmax => Some(round_f16(absmax(isa, x))),
                Choice::FixedAbsmax(most) => Some(most),
                _ => None,
            };
            if let Some(most) = absmax_rule {
                *scale = most;
                // Two roundings, as torch divides a number by a tensor; f16 has
                // no magnitude so small that its reciprocal overflows.
                let inv = if most > 0.0 {
                    (1.0 / most) * 127.0
                } else {
                    0.0
                };
                let inv = isa.splat(inv);
                codes(isa, x, out, (lo, hi), offset, |v| {
                    isa.mul(isa.round_f16(v), inv)
                });
                continue;
            }
            let fit = match self.choice {
                Choice::Mse(dtype) => self.grid.mse(isa, dtype, x),
                Choice::Fixed(fit) => fit,
                Choice::Rtn(dtype) if self.grid.symmetric => {
                    let most = absmax(isa, x);
                    self.grid.rtn(dtype, -most, most)
                }
                Choice::Rtn(dtype) => {
                    let (low, high) = range_with_zero(isa, x);
                    self.grid.rtn(dtype, low, high)
                }
                Choice::Absmax | Choice::FixedAbsmax(_) => continue,
            };
            *scale = fit.scale;
            *zero = fit.zero as u8;
            if fit.scale == 0.0 {
                out.fill(fit.zero as u8);
                continue;
            }
            let (lo, hi) = if self.grid.symmetric {
                (lo, hi)
            } else {
                (lo - fit.zero, hi - fit.zero)
            };
            let scale = isa.splat(fit.scale);
            codes(isa, x, out, (lo, hi), fit.zero, |v| isa.div(v, scale));
        }
    }
}

/// Codes and values of elements under scales and zero points of their own; a
/// float zero point is a bias.
pub struct Round<'a> {
    pub grid: Grid,
    pub float_zero: bool,
    pub x: &'a [f32],
    pub scales: &'a [f32],
    pub zeros: &'a [f32],
    pub codes: &'a mut [u8],
    pub values: &'a mut [f32],
}

impl Op for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (grid, float_zero) = (self.grid, self.float_zero);
        let (x, x_tail) = self.x.as_chunks::<LANES>();
        let (scales, scales_tail) = self.scales.as_chunks::<LANES>();
        let (zeros, zeros_tail) = self.zeros.as_chunks::<LANES>();
        let (codes, codes_tail) = self.codes.as_chunks_mut::<LANES>();
        let (values, values_tail) = self.values.as_chunks_mut::<LANES>();
        let terms = x.iter().zip(scales).zip(zeros);
        for (((x, scale), zero), (out, value)) in terms.zip(codes.iter_mut().zip(values)) {
            let terms = (isa.load(x), isa.load(scale), isa.load(zero));
            let (code, v) = round_one(isa, grid, float_zero, terms);
            isa.store_u8(code, out);
            isa.store(v, value);
        }
        if !x_tail.is_empty() {
            let terms = (
                isa.load_part(x_tail, 0.0),
                isa.load_part(scales_tail, 0.0),
                isa.load_part(zeros_tail, 0.0),
            );
            let (code, v) = round_one(isa, grid, float_zero, terms);
            let mut lanes = [0u8; LANES];
            isa.store_u8(code, &mut lanes);
            codes_tail.copy_from_slice(&lanes[..x_tail.len()]);
            isa.store_part(v, values_tail);
        }
    }
}

/// Codes and values of x under scales and zero points.
#[inline(always)]
fn round_one<I: Isa>(
    isa: I,
    grid: Grid,
    float_zero: bool,
    (x, scale, zero): (I::F, I::F, I::F),
) -> (I::U, I::F) {
    let (lo, hi) = (isa.splat(grid.lo as f32), isa.splat(grid.hi as f32));
    let (nothing, round) = (isa.splat(0.0), isa.splat(ROUND));
    // How far codes are from what counts as zero, and what that is worth.
    let (from, to, add, bias) = match (float_zero, grid.symmetric) {
        (true, _) => (lo, hi, nothing, zero),
        (false, true) => (lo, hi, isa.splat(grid.offset as f32), nothing),
        (false, false) => (isa.sub(lo, zero), isa.sub(hi, zero), zero, nothing),
    };
    let ratio = isa.div(isa.sub(x, bias), scale);
    // Under a scale of zero all is zero.
    let size = isa.floats(isa.and(isa.bits(scale), isa.splat_u(0x7fff_ffff)));
    let ratio = isa.choose(size, nothing, ratio, nothing);
    let steps = isa.min(isa.max(ratio, from), to);
    let steps = isa.sub(isa.add(steps, round), round);
    let code = isa.bits(isa.add(isa.add(steps, add), round));
    let code = isa.sub_u(code, isa.splat_u(ROUND.to_bits()));
    (code, isa.add(isa.mul(steps, scale), bias))
}

/// Values of consecutive codes under one scale: (code − zero) · scale · factor.
/// Codes are signed bytes for symmetric int8, unsigned otherwise.
#[inline(always)]
pub fn decode_run<I: Isa>(
    isa: I,
    codes: &[u8],
    signed: bool,
    zero: i32,
    (scale, factor): (f32, f32),
    out: &mut [f32],
) {
    let zero = isa.splat_u(zero as u32);
    let (scale, factor) = (isa.splat(scale), isa.splat(factor));
    let value = |codes: &[u8; LANES]| {
        let code = if signed {
            isa.load_i8(codes)
        } else {
            isa.sub_u(isa.load_u8(codes), zero)
        };
        isa.mul(isa.mul(isa.int_to_float(code), scale), factor)
    };
    let (chunks, tail) = codes.as_chunks::<LANES>();
    let (outs, out_tail) = out.as_chunks_mut::<LANES>();
    for (codes, out) in chunks.iter().zip(outs) {
        isa.store(value(codes), out);
    }
    if !tail.is_empty() {
        let mut lanes = [0u8; LANES];
        lanes[..tail.len()].copy_from_slice(tail);
        isa.store_part(value(&lanes), out_tail);
    }
}
