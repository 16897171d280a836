//! Factors in bf16, with products and sums in f32.
//!
//! Two consecutive numbers share a word of 32 bits, the first in its low half, so
//! that panels of pairs lie as those of f32 do, at half their depth. Levels that
//! multiply pairs in one instruction have a token of their own beside those of
//! [`Isa`], as levels of bytes do.

#[cfg(target_arch = "x86_64")]
use super::Avx512Bf16;
use super::memory::prefetch;
use super::{Isa, LANES, Level, Op, Portable};

/// What kernels of pairs need beside an [`Isa`].
pub trait Pairs: Isa {
    /// The words of thirty-two numbers, each rounded to nearest, ties to even.
    /// Subnormal numbers become zeros where the instruction makes them so.
    fn pair(self, first: Self::F, second: Self::F) -> Self::F;
    /// sum + Σ a·b over both numbers of each word. In which order, how often it is
    /// rounded, and whether subnormal numbers count, is the level's.
    fn dot_pairs(self, a: Self::F, b: Self::F, sum: Self::F) -> Self::F;
}

/// A kernel of pairs: see [`Op`].
pub trait PairsOp {
    type Output;
    fn run<I: Pairs>(self, isa: I) -> Self::Output;
}

/// Whether the level in force has instructions for pairs.
pub fn has_pairs() -> bool {
    super::level() >= Level::Avx512Bf16
}

/// Runs a kernel at the level in force.
#[inline]
pub fn dispatch<O: PairsOp>(op: O) -> O::Output {
    dispatch_at(super::level(), op)
}

/// Runs a kernel at `level`, or at the baseline where that has no such
/// instructions.
#[inline]
pub fn dispatch_at<O: PairsOp>(level: Level, op: O) -> O::Output {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 | Level::Avx512Amx => {
            if let Some(token) = Avx512Bf16::detect() {
                return token.dispatch_pairs(op);
            }
        }
        _ => {}
    }
    op.run(Portable)
}

impl Pairs for Portable {
    #[inline(always)]
    fn pair(self, first: Self::F, second: Self::F) -> Self::F {
        let mut halves = [0u16; 2 * LANES];
        for (half, v) in halves.iter_mut().zip(first.iter().chain(&second)) {
            *half = half::bf16::from_f32(*v).to_bits();
        }
        let (words, _) = halves.as_chunks::<2>();
        std::array::from_fn(|i| {
            let [low, high] = words[i].map(u32::from);
            f32::from_bits(high << 16 | low)
        })
    }
    #[inline(always)]
    fn dot_pairs(self, a: Self::F, b: Self::F, sum: Self::F) -> Self::F {
        let low = |v: f32| f32::from_bits(v.to_bits() << 16);
        let high = |v: f32| f32::from_bits(v.to_bits() & 0xffff_0000);
        let sum = self.fused(a.map(low), b.map(low), sum);
        self.fused(a.map(high), b.map(high), sum)
    }
}

/// Numbers as pairs, in place: their words take the first half of the slice, whose
/// length is a multiple of two vectors.
pub struct Pair<'a>(pub &'a mut [f32]);

impl PairsOp for Pair<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Pairs>(self, isa: I) {
        let (lines, _) = self.0.as_chunks_mut::<LANES>();
        for i in 0..lines.len() / 2 {
            let words = isa.pair(isa.load(&lines[2 * i]), isa.load(&lines[2 * i + 1]));
            isa.store(words, &mut lines[i]);
        }
    }
}

/// The nearest bf16, ties to even, as f32. Infinities and what is no number stay as
/// they are.
#[inline(always)]
pub fn round_bf16<I: Isa>(isa: I, v: I::F) -> I::F {
    let bits = isa.bits(v);
    // Up from a half where the last digit that is kept is odd.
    let odd = isa.and(isa.upper_half(bits), isa.splat_u(1));
    let up = isa.add_u(isa.add_u(bits, isa.splat_u(0x7fff)), odd);
    let rounded = isa.floats(isa.and(up, isa.splat_u(0xffff_0000)));
    isa.choose(isa.splat(f32::INFINITY), isa.abs(v), rounded, v)
}

/// Rounds numbers to bf16 and leaves them f32, in a slice whose length is a
/// multiple of a vector.
pub struct Round<'a>(pub &'a mut [f32]);

impl Op for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for line in self.0.as_chunks_mut::<LANES>().0 {
            isa.store(round_bf16(isa, isa.load(line)), line);
        }
    }
}

/// Numbers as bf16, to nearest, ties to even; a NaN stays one.
pub struct Narrow<'a> {
    pub x: &'a [f32],
    /// Little-endian.
    pub out: &'a mut [[u8; 2]],
}

impl Op for Narrow<'_> {
    type Output = ();

    // Integers alone: the compiler's own vectors do.
    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        for (v, out) in self.x.iter().zip(self.out) {
            let bits = v.to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            let quiet = bits >> 16 | 0x40;
            let nan = bits & 0x7fff_ffff > 0x7f80_0000;
            *out = (if nan { quiet } else { rounded } as u16).to_le_bytes();
        }
    }
}

/// Elements from one that is widened to one that is asked for early.
const AHEAD: usize = 512;

/// Numbers in bf16 as f32; a NaN keeps its payload.
pub struct Widen<'a> {
    /// Little-endian.
    pub x: &'a [[u8; 2]],
    pub out: &'a mut [f32],
}

#[inline(always)]
fn widen(v: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(v)) << 16)
}

impl Op for Widen<'_> {
    type Output = ();

    // As above.
    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let (lines, rest) = self.x.as_chunks::<{ 2 * LANES }>();
        let (outs, out_rest) = self.out.as_chunks_mut::<{ 2 * LANES }>();
        for (line, out) in lines.iter().zip(outs) {
            prefetch(line.as_ptr().wrapping_add(AHEAD), size_of_val(line));
            for (v, out) in line.iter().zip(out) {
                *out = widen(*v);
            }
        }
        for (v, out) in rest.iter().zip(out_rest) {
            *out = widen(*v);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::simd::{dispatch_at as dispatch_floats, levels};

    const VALUES: [f32; 16] = [
        0.0,
        1.0,
        1.003_906_2,
        1.003_906_3,
        1.011_718_8,
        -2.7,
        3.39e38,
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        1e-30,
        -1.2e-38,
        0.1,
        1e20,
        -65_504.5,
        7.0,
    ];

    fn values() -> Vec<f32> {
        let more = (0..48).map(|i| (i as f32 - 20.3) * 1.7f32.powi(i % 13));
        VALUES.into_iter().chain(more).collect()
    }

    #[test]
    fn numbers_are_rounded_to_nearest_even_on_every_level() {
        let values = values();
        let expected: Vec<f32> = values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
        for level in levels() {
            let mut rounded = values.clone();
            dispatch_floats(level, Round(&mut rounded));
            assert_eq!(rounded, expected, "{level:?}");
            let mut words = values.clone();
            dispatch_at(level, Pair(&mut words));
            let halves: &[bf16] = bytemuck::cast_slice(&words[..values.len() / 2]);
            for (half, expected) in halves.iter().zip(&expected) {
                assert_eq!(half.to_f32(), *expected, "{level:?}");
            }
        }
        for nan in [
            f32::NAN,
            f32::from_bits(0x7f80_0001),
            f32::from_bits(0xffff_ffff),
        ] {
            for level in levels() {
                let mut v = [nan; 2 * LANES];
                dispatch_floats(level, Round(&mut v));
                assert!(v.iter().all(|v| v.is_nan()), "{level:?}");
                dispatch_at(level, Pair(&mut v));
                let halves: &[bf16] = bytemuck::cast_slice(&v[..LANES]);
                assert!(halves.iter().all(|v| v.is_nan()), "{level:?}");
            }
        }
    }

    #[test]
    fn every_level_narrows_as_the_definition() {
        // Every sign and exponent, and mantissas around every kind of tie.
        let around = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        let x: Vec<f32> = (0..=u16::MAX)
            .flat_map(|high| around.map(|low| f32::from_bits(u32::from(high) << 16 | low)))
            .collect();
        for level in levels() {
            let mut out = vec![[0; 2]; x.len()];
            dispatch_floats(
                level,
                Narrow {
                    x: &x,
                    out: &mut out,
                },
            );
            for (v, out) in x.iter().zip(out) {
                let expected = bf16::from_f32(*v).to_bits();
                assert_eq!(u16::from_le_bytes(out), expected, "{v:e} at {level:?}");
            }
        }
    }
}
