//! Integer codes: choosing scales, encoding, decoding.

use half::{bf16, f16};

use super::bf16::round_bf16;
use super::runs;
use super::stats::{absmax_each, range_each, range_with_zero, stays_zero, together};
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

/// The same of sixteen scales.
#[inline(always)]
fn round_scales<I: Isa>(isa: I, dtype: DType, scales: I::F) -> I::F {
    match dtype {
        DType::F16 => isa.round_f16(scales),
        DType::BF16 => round_bf16(isa, scales),
        _ => scales,
    }
}

/// Division by one number of what is rounded to an integer afterwards.
#[derive(Clone, Copy)]
pub(crate) struct Quotient<I: Isa> {
    isa: I,
    divisor: I::F,
    minus_divisor: I::F,
    inverse: I::F,
    /// Whether a product, mended by its remainder, does for the division.
    mended: bool,
}

impl<I: Isa> Quotient<I> {
    /// Division by `divisor`, whose reciprocal is `inverse`.
    #[inline(always)]
    pub fn new(isa: I, divisor: f32, inverse: f32) -> Quotient<I> {
        Quotient {
            isa,
            divisor: isa.splat(divisor),
            minus_divisor: isa.splat(-divisor),
            inverse: isa.splat(inverse),
            // Far from where remainders lose bits below the least f32.
            mended: I::FUSES && (1e-27..1e27).contains(&divisor.abs()),
        }
    }

    /// What rounds to the same integer, up to 256, as v / divisor does.
    #[inline(always)]
    pub fn of(self, v: I::F) -> I::F {
        let isa = self.isa;
        if self.mended {
            let near = isa.mul(v, self.inverse);
            let rest = isa.fused(near, self.minus_divisor, v);
            isa.fused(rest, self.inverse, near)
        } else {
            isa.div(v, self.divisor)
        }
    }
}

/// Clamps, then rounds to the nearest integer, ties to even.
#[inline(always)]
pub(crate) fn round_clamped<I: Isa>(isa: I, v: I::F, lo: f32, hi: f32) -> I::F {
    let v = isa.min(isa.max(v, isa.splat(lo)), isa.splat(hi));
    isa.sub(isa.add(v, isa.splat(ROUND)), isa.splat(ROUND))
}

/// What becomes of x before it is clamped and rounded.
pub(crate) trait Ratio<I: Isa>: Copy {
    fn of(self, isa: I, x: I::F) -> I::F;
}

impl<I: Isa> Ratio<I> for Quotient<I> {
    #[inline(always)]
    fn of(self, _isa: I, x: I::F) -> I::F {
        self.of(x)
    }
}

/// Codes: ratios clamped, rounded and shifted.
#[derive(Clone, Copy)]
pub(crate) struct Rounding<I: Isa> {
    isa: I,
    lo: I::F,
    hi: I::F,
    round: I::F,
    shift: I::U,
}

impl<I: Isa> Rounding<I> {
    /// Codes from `lo` to `hi`, and `add` on top.
    #[inline(always)]
    pub fn new(isa: I, (lo, hi): (i32, i32), add: i32) -> Rounding<I> {
        Rounding {
            isa,
            lo: isa.splat(lo as f32),
            hi: isa.splat(hi as f32),
            round: isa.splat(ROUND),
            // The bits of ROUND + n are those of ROUND, plus n.
            shift: isa.splat_u((add as u32).wrapping_sub(ROUND.to_bits())),
        }
    }

    #[inline(always)]
    fn code(self, ratio: I::F) -> I::U {
        let isa = self.isa;
        let clamped = isa.min(isa.max(ratio, self.lo), self.hi);
        isa.add_u(isa.bits(isa.add(clamped, self.round)), self.shift)
    }

    /// The codes of `x`; `ahead` as [`runs::encode`] takes it.
    #[inline(always)]
    pub fn codes(self, x: &[f32], ahead: usize, out: &mut [u8], ratio: impl Ratio<I>) {
        let isa = self.isa;
        runs::encode(
            isa,
            x,
            ahead,
            out,
            #[inline(always)]
            |x| self.code(ratio.of(isa, x)),
        );
    }
}

/// LLM.int8(): what f16 makes of x, times 127 / absmax.
#[derive(Clone, Copy)]
struct HalfProduct<I: Isa>(I::F);

impl<I: Isa> Ratio<I> for HalfProduct<I> {
    #[inline(always)]
    fn of(self, isa: I, x: I::F) -> I::F {
        isa.mul(isa.round_f16(x), self.0)
    }
}

impl Grid {
    /// Σ(x − value)² under `fit`.
    #[inline(always)]
    fn error<I: Isa>(self, isa: I, x: &[f32], fit: Fit) -> f32 {
        let zero = if self.symmetric { 0 } else { fit.zero };
        let (lo, hi) = ((self.lo - zero) as f32, (self.hi - zero) as f32);
        let scale = isa.splat(fit.scale);
        squared_error(
            isa,
            x,
            #[inline(always)]
            |v| isa.mul(round_clamped(isa, isa.div(v, scale), lo, hi), scale),
        )
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

    /// [`Grid::rtn`] of sixteen blocks: scales, and zero points.
    #[inline(always)]
    fn rtn_each<I: Isa>(self, isa: I, dtype: DType, low: I::F, high: I::F) -> (I::F, I::U) {
        if self.symmetric {
            let scale = isa.div(high, isa.splat(self.divisor));
            let zero = isa.splat_u(self.offset as u32);
            return (round_scales(isa, dtype, scale), zero);
        }
        let half = isa.splat(0.5);
        let range = isa.sub(isa.mul(high, half), isa.mul(low, half));
        let levels = isa.splat((self.hi - self.lo) as f32 * 0.5);
        let scale = round_scales(isa, dtype, isa.div(range, levels));
        let nothing = isa.splat(0.0);
        let zero = isa.div(isa.sub(nothing, low), scale);
        let zero = round_clamped(isa, zero, self.lo as f32, self.hi as f32);
        (
            scale,
            isa.truncate(isa.choose(scale, nothing, zero, nothing)),
        )
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
                    best.attempt(
                        isa,
                        x,
                        0.0,
                        #[inline(always)]
                        |v| round_clamped(isa, isa.mul(v, inv), lo, hi),
                    );
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
                    best.attempt(
                        isa,
                        x,
                        zero,
                        #[inline(always)]
                        |v| round_clamped(isa, isa.mul(v, inv), lo, hi),
                    );
                }
            }
        }
        // The best scale for some codes gives other codes.
        for _ in 0..2 {
            let (scale, zero) = (best.scale, best.zero);
            if usable(scale) {
                let (lo, hi) = (self.lo as f32 - zero, self.hi as f32 - zero);
                let inv = isa.splat(1.0 / scale);
                best.attempt(
                    isa,
                    x,
                    zero,
                    #[inline(always)]
                    |v| round_clamped(isa, isa.mul(v, inv), lo, hi),
                );
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

impl Encode<'_> {
    /// Scales and zero points of up to sixteen blocks; `finite` as of
    /// `absmax_each`.
    #[inline(always)]
    fn fits<I: Isa>(&self, isa: I, x: &[f32], finite: &mut I::F) -> [Fit; LANES] {
        let fixed = |scale| [Fit { scale, zero: 0 }; LANES];
        let (scales, zeros) = match self.choice {
            Choice::Fixed(fit) => return [fit; LANES],
            Choice::FixedAbsmax(most) => return fixed(most),
            Choice::Mse(dtype) => {
                let mut fits = fixed(0.0);
                for (x, fit) in x.chunks(self.block_len).zip(&mut fits) {
                    *fit = self.grid.mse(isa, dtype, x);
                }
                return fits;
            }
            Choice::Absmax => {
                let most = absmax_each(isa, x, self.block_len, finite);
                (isa.round_f16(most), isa.splat_u(0))
            }
            Choice::Rtn(dtype) if self.grid.symmetric => {
                let most = absmax_each(isa, x, self.block_len, finite);
                self.grid.rtn_each(isa, dtype, most, most)
            }
            Choice::Rtn(dtype) => {
                let (low, high) = range_each(isa, x, self.block_len, finite);
                self.grid.rtn_each(isa, dtype, low, high)
            }
        };
        let (mut scale, mut zero) = ([0f32; LANES], [0u32; LANES]);
        isa.store(scales, &mut scale);
        isa.store_u(zeros, &mut zero);
        std::array::from_fn(|i| Fit {
            scale: scale[i],
            zero: zero[i] as i32,
        })
    }
}

impl Op for Encode<'_> {
    /// Whether all elements are numbers, as far as extremes were looked for: a
    /// search and a fixed scale tell nothing.
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) -> bool {
        let Grid { lo, hi, offset, .. } = self.grid;
        let group = together(self.block_len);
        let span = group.saturating_mul(self.block_len);
        let (codes_out, scales_out, zeros_out) = (
            std::mem::take(&mut self.codes),
            std::mem::take(&mut self.scales),
            std::mem::take(&mut self.zeros),
        );
        let groups = self.x.chunks(span).zip(codes_out.chunks_mut(span));
        let numbers = scales_out
            .chunks_mut(group)
            .zip(zeros_out.chunks_mut(group));
        let mut finite = isa.splat(0.0);
        for ((x, out), (scales, zeros)) in groups.zip(numbers) {
            let fits = self.fits(isa, x, &mut finite);
            let inverses = fits.map(|fit| 1.0 / fit.scale);
            let blocks = x.chunks(self.block_len).zip(out.chunks_mut(self.block_len));
            for (i, ((x, out), (scale, zero))) in
                blocks.zip(scales.iter_mut().zip(zeros)).enumerate()
            {
                let fit = fits[i];
                *scale = fit.scale;
                *zero = fit.zero as u8;
                if let Choice::Absmax | Choice::FixedAbsmax(_) = self.choice {
                    // Two roundings, as torch divides a number by a tensor; f16 has
                    // no magnitude so small that its reciprocal overflows.
                    let inv = if fit.scale > 0.0 {
                        inverses[i] * 127.0
                    } else {
                        0.0
                    };
                    let product = HalfProduct(isa.splat(inv));
                    Rounding::new(isa, (lo, hi), offset).codes(x, span, out, product);
                    continue;
                }
                if fit.scale == 0.0 {
                    out.fill(fit.zero as u8);
                    continue;
                }
                let (lo, hi) = if self.grid.symmetric {
                    (lo, hi)
                } else {
                    (lo - fit.zero, hi - fit.zero)
                };
                let ratio = Quotient::new(isa, fit.scale, inverses[i]);
                let rounding = Rounding::new(isa, (lo, hi), fit.zero);
                rounding.codes(x, span, out, ratio);
            }
        }
        stays_zero(isa, finite)
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
    let ratio = isa.choose(isa.abs(scale), nothing, ratio, nothing);
    let steps = isa.min(isa.max(ratio, from), to);
    let steps = isa.sub(isa.add(steps, round), round);
    let code = isa.bits(isa.add(isa.add(steps, add), round));
    let code = isa.sub_u(code, isa.splat_u(ROUND.to_bits()));
    (code, isa.add(isa.mul(steps, scale), bias))
}

/// Values under one scale: (code − zero) · scale · factor.
#[derive(Clone, Copy, Debug)]
pub struct Scaled {
    pub zero: i32,
    pub scale: f32,
    pub factor: f32,
}

impl Scaled {
    /// The value of each code.
    #[inline(always)]
    pub fn values<I: Isa>(self, isa: I, codes: I::U) -> I::F {
        let steps = isa.int_to_float(isa.sub_u(codes, isa.splat_u(self.zero as u32)));
        isa.mul(
            isa.mul(steps, isa.splat(self.scale)),
            isa.splat(self.factor),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{dispatch_at, levels};

    /// Divisors 1 … 2, every so many.
    struct Quotients {
        first: u32,
        step: usize,
    }

    impl Op for Quotients {
        type Output = Option<f32>;

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> Option<f32> {
            let round = isa.splat(ROUND);
            for mantissa in (self.first..1 << 23).step_by(self.step) {
                let divisor = f32::from_bits(0x3f80_0000 | mantissa);
                let ratio = Quotient::new(isa, divisor, 1.0 / divisor);
                // Halfway between integers, and what lies around it.
                for half in 0..256 {
                    let tie = (half as f32 + 0.5) * divisor;
                    let near =
                        std::array::from_fn(|i| f32::from_bits(tie.to_bits() - 8 + i as u32));
                    let near = isa.load(&near);
                    let (mut own, mut exact) = ([0; LANES], [0; LANES]);
                    isa.store_u(isa.bits(isa.add(ratio.of(near), round)), &mut own);
                    let quotient = isa.div(near, isa.splat(divisor));
                    isa.store_u(isa.bits(isa.add(quotient, round)), &mut exact);
                    if own != exact {
                        return Some(divisor);
                    }
                }
            }
            None
        }
    }

    /// A step of 1 passes too, in a minute or two a level.
    #[test]
    fn quotients_round_as_divisions_do() {
        for level in levels() {
            let sample = Quotients {
                first: 5,
                step: 4099,
            };
            assert_eq!(dispatch_at(level, sample), None, "at {}", level.name());
        }
    }
}
