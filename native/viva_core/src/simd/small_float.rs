//! Floats of eight and four bits under scales.
//!
//! Codes are made by [`SmallFloat::encode`] itself: plain arithmetic that the
//! compiler turns into each level's vectors. Searches need values only, which
//! [`nearest`] gives in fewer steps.

use super::runs;
use super::sink::Sink;
use super::stats::absmax;
use super::{Isa, LANES, Op};
use crate::method::mse::squared_error;
use crate::small_float::SmallFloat;

/// The values nearest to v, ties to even, clamped to the largest.
#[inline(always)]
pub fn nearest<I: Isa>(isa: I, float: SmallFloat, v: I::F) -> I::F {
    let (cut, least_normal) = float.rounding();
    let most = isa.splat(float.max());
    let v = isa.min(isa.max(v, isa.splat(-float.max())), most);
    // 1.5 · 2²³ · the distance of neighbours at v: adding and subtracting it
    // rounds to a multiple of that distance.
    let binade = isa.and(isa.bits(v), isa.splat_u(0x7f80_0000));
    let binade = isa.max_u(binade, isa.splat_u(least_normal));
    let rounder = isa.floats(isa.add_u(binade, isa.splat_u((cut << 23) | 0x0040_0000)));
    isa.sub(isa.add(v, rounder), rounder)
}

/// The largest magnitude of each block.
pub struct BlockAbsmax<'a> {
    pub x: &'a [f32],
    pub block_len: usize,
    pub out: &'a mut [f32],
}

impl Op for BlockAbsmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (x, most) in self.x.chunks(self.block_len).zip(self.out) {
            *most = absmax(isa, x);
        }
    }
}

/// Codes of whole blocks, one a byte. A scale of zero makes codes of zero, and
/// so does a negative zero, as it does in compressed-tensors.
pub struct Encode<'a> {
    pub float: SmallFloat,
    pub x: &'a [f32],
    pub block_len: usize,
    pub scales: &'a [f32],
    pub codes: &'a mut [u8],
}

impl Op for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let float = self.float;
        let blocks = self
            .x
            .chunks(self.block_len)
            .zip(self.codes.chunks_mut(self.block_len));
        for ((x, codes), &scale) in blocks.zip(self.scales) {
            if scale == 0.0 {
                codes.fill(0);
                continue;
            }
            for (code, &v) in codes.iter_mut().zip(x) {
                *code = float.encode(v / scale + 0.0);
            }
        }
    }
}

/// Codes of E2M1 for whole blocks, one a byte, where of two values as near the
/// one nearer to zero is taken, and zero has no sign: as ggml does. A scale of
/// zero makes codes of zero.
pub struct EncodeTowardZero<'a> {
    pub x: &'a [f32],
    pub block_len: usize,
    pub scales: &'a [f32],
    pub codes: &'a mut [u8],
}

/// Halfway between the magnitudes of E2M1.
const MIDPOINTS: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];

impl Op for EncodeTowardZero<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let blocks = self
            .x
            .chunks(self.block_len)
            .zip(self.codes.chunks_mut(self.block_len));
        for ((x, codes), &scale) in blocks.zip(self.scales) {
            if scale == 0.0 {
                codes.fill(0);
                continue;
            }
            // Exact: scales have at most four bits of mantissa.
            let midpoints = MIDPOINTS.map(|m| m * scale);
            for (code, &v) in codes.iter_mut().zip(x) {
                let magnitude: u8 = midpoints.iter().map(|&m| u8::from(v.abs() > m)).sum();
                let sign = u8::from(v < -midpoints[0]) << 3;
                *code = magnitude | sign;
            }
        }
    }
}

/// Which of its candidate scales gives each block the least squared error; the
/// first of equals.
pub struct Search<'a> {
    pub float: SmallFloat,
    pub x: &'a [f32],
    pub block_len: usize,
    /// As many a block as there are elements of `out` per block.
    pub candidates: &'a [f32],
    pub each: usize,
    pub out: &'a mut [u8],
}

impl Op for Search<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let blocks = self
            .x
            .chunks(self.block_len)
            .zip(self.candidates.chunks(self.each));
        for ((x, candidates), best) in blocks.zip(self.out) {
            *best = 0;
            let mut least = f32::INFINITY;
            for (i, &scale) in candidates.iter().enumerate() {
                if scale == 0.0 {
                    continue;
                }
                let by = isa.splat(scale);
                let error = squared_error(
                    isa,
                    x,
                    #[inline(always)]
                    |v| isa.mul(nearest(isa, self.float, isa.div(v, by)), by),
                );
                if error < least {
                    least = error;
                    *best = i as u8;
                }
            }
        }
    }
}

/// The values of codes of eight bits, as [`SmallFloat::decode`] gives them.
#[inline(always)]
fn values<I: Isa>(isa: I, float: SmallFloat, codes: &[u8; LANES]) -> I::F {
    let codes = isa.load_u8(codes);
    let (shift, factor) = float.widening();
    let magnitude = isa.shift_left(isa.and(codes, isa.splat_u(0x7f)), shift);
    let value = isa.mul(isa.floats(magnitude), isa.splat(factor));
    // What would come after the largest value is infinity, or no number.
    let past = isa.splat(float.max());
    let value = match float.infinity() {
        None => isa.choose(value, past, isa.splat(f32::NAN), value),
        Some(infinity) => {
            let number = isa.choose(value, past, isa.splat(f32::INFINITY), value);
            isa.choose(value, isa.splat(infinity), isa.splat(f32::NAN), number)
        }
    };
    let sign = isa.shift_left(isa.and(codes, isa.splat_u(0x80)), 24);
    isa.floats(isa.add_u(isa.bits(value), sign))
}

/// Values of consecutive codes of eight bits under one scale.
#[inline(always)]
pub fn decode_run<I: Isa>(
    isa: I,
    float: SmallFloat,
    codes: &[u8],
    scale: f32,
    out: &mut impl Sink<I>,
) {
    let scale = isa.splat(scale);
    runs::decode(
        codes,
        out,
        #[inline(always)]
        |codes| isa.mul(values(isa, float, codes), scale),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{dispatch_at, levels};
    use crate::small_float::{E2M1, E4M3, E5M2};

    struct Nearest<'a>(SmallFloat, &'a [f32; LANES]);

    impl Op for Nearest<'_> {
        type Output = [f32; LANES];

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> [f32; LANES] {
            let mut out = [0.0; LANES];
            isa.store(nearest(isa, self.0, isa.load(self.1)), &mut out);
            out
        }
    }

    #[test]
    fn nearest_values_are_those_of_the_codes() {
        for float in [E4M3, E5M2, E2M1] {
            for level in levels() {
                // Every sign and exponent, mantissas around every tie.
                for high in 0..1u32 << 15 {
                    let bits = |low: u32| f32::from_bits((high << 17) | low);
                    let x: [f32; LANES] = std::array::from_fn(|i| {
                        bits([0, 1, 0xffff, 0x1_0000, 0x1_0001, 0x1_fffe, 0x1_ffff, 0x8000][i % 8])
                    });
                    if !x.iter().all(|v| v.is_finite()) {
                        continue;
                    }
                    let got = dispatch_at(level, Nearest(float, &x));
                    for (v, got) in x.into_iter().zip(got) {
                        assert_eq!(float.decode(float.encode(v)), got, "{v:e} {float:?}");
                    }
                }
            }
        }
    }
}
