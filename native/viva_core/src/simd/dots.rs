//! Dot products of bytes: what products with 8-bit activations are made of.
//!
//! Sixty-four bytes hold four consecutive columns of sixteen rows; a step adds to
//! lane i the dot product of its four bytes with four bytes of activations, which
//! all lanes share. Sums of integers are exact, so levels agree bit for bit.
//!
//! Levels with instructions for this have tokens of their own beside those of
//! [`Isa`], so that kernels of floats are not compiled again for them.

use half::f16;

#[cfg(target_arch = "x86_64")]
use super::{Avx2, Avx2Vnni, Avx512, Avx512Vnni};
use super::{Isa, LANES, Level, Portable};
#[cfg(target_arch = "aarch64")]
use super::{Neon, NeonDotprod, NeonI8mm};

/// Bytes of a vector.
pub const BYTES: usize = 4 * LANES;

/// What kernels of bytes need beside an [`Isa`].
pub trait Dots: Isa {
    /// Sixty-four bytes.
    type B: Copy;
    /// What [`Dots::dot`] takes off every w, where both factors have to be signed:
    /// who adds up products begins with so many times Σx.
    const LESS: i32 = 0;

    fn load_bytes(self, x: &[u8; BYTES]) -> Self::B;
    fn store_bytes(self, v: Self::B, out: &mut [u8; BYTES]);
    /// Little-endian words.
    fn load_u32(self, x: &[u8; BYTES]) -> Self::U;
    /// Little-endian f16, widened.
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F;
    /// The low four bits of each byte.
    fn low_halves(self, v: Self::B) -> Self::B;
    /// The high four bits of each byte.
    fn high_halves(self, v: Self::B) -> Self::B;
    /// A table of sixteen, as [`Dots::lookup_bytes`] wants it.
    fn load_table(self, table: &[u8; 16]) -> Self::B;
    /// `table[index]` of each byte; indices are below 16.
    fn lookup_bytes(self, table: Self::B, index: Self::B) -> Self::B;
    /// sum + Σ(w − LESS)·x over the four bytes of each lane: w unsigned, x signed.
    fn dot(self, sum: Self::U, w: Self::B, x: [i8; 4]) -> Self::U;
}

/// Four activations as all lanes take them, the first in the low byte.
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
#[inline(always)]
pub(super) fn word(x: [i8; 4]) -> u32 {
    u32::from_le_bytes(bytemuck::cast(x))
}

/// A kernel of bytes: see [`Op`](super::Op).
pub trait DotsOp {
    type Output;
    fn run<I: Dots>(self, isa: I) -> Self::Output;
}

/// Runs a kernel at the level in force.
#[inline]
pub fn dispatch<O: DotsOp>(op: O) -> O::Output {
    dispatch_at(super::level(), op)
}

/// Runs a kernel at `level`, or at the baseline where the machine lacks it.
#[inline]
pub fn dispatch_at<O: DotsOp>(level: Level, op: O) -> O::Output {
    macro_rules! at {
        ($token:ident) => {
            if let Some(token) = $token::detect() {
                return token.dispatch_dots(op);
            }
        };
    }
    match level {
        #[cfg(target_arch = "aarch64")]
        Level::Neon => at!(Neon),
        #[cfg(target_arch = "aarch64")]
        Level::NeonDotprod => at!(NeonDotprod),
        #[cfg(target_arch = "aarch64")]
        Level::NeonI8mm => at!(NeonI8mm),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => at!(Avx2),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2Vnni => at!(Avx2Vnni),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => at!(Avx512),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Vnni | Level::Avx512Bf16 | Level::Avx512Amx => at!(Avx512Vnni),
        _ => {}
    }
    op.run(Portable)
}

impl Dots for Portable {
    type B = [u8; BYTES];

    #[inline(always)]
    fn load_bytes(self, x: &[u8; BYTES]) -> Self::B {
        *x
    }
    #[inline(always)]
    fn store_bytes(self, v: Self::B, out: &mut [u8; BYTES]) {
        *out = v;
    }
    #[inline(always)]
    fn load_u32(self, x: &[u8; BYTES]) -> Self::U {
        let (words, _) = x.as_chunks::<4>();
        std::array::from_fn(|i| u32::from_le_bytes(words[i]))
    }
    #[inline(always)]
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F {
        let (halves, _) = x.as_chunks::<2>();
        std::array::from_fn(|i| f16::from_le_bytes(halves[i]).to_f32())
    }
    #[inline(always)]
    fn low_halves(self, v: Self::B) -> Self::B {
        v.map(|b| b & 15)
    }
    #[inline(always)]
    fn high_halves(self, v: Self::B) -> Self::B {
        v.map(|b| b >> 4)
    }
    #[inline(always)]
    fn load_table(self, table: &[u8; 16]) -> Self::B {
        std::array::from_fn(|i| table[i % 16])
    }
    #[inline(always)]
    fn lookup_bytes(self, table: Self::B, index: Self::B) -> Self::B {
        index.map(|i| table[usize::from(i & 15)])
    }
    #[inline(always)]
    fn dot(self, mut sum: Self::U, w: Self::B, x: [i8; 4]) -> Self::U {
        for (sum, w) in sum.iter_mut().zip(w.as_chunks::<4>().0) {
            for (&w, &x) in w.iter().zip(&x) {
                *sum = sum.wrapping_add((i32::from(w) * i32::from(x)) as u32);
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::levels;

    struct Each<'a> {
        w: &'a [u8; BYTES],
        table: &'a [u8; 16],
        x: [i8; 4],
    }

    impl DotsOp for Each<'_> {
        type Output = [[u32; LANES]; 4];

        #[inline(always)]
        fn run<I: Dots>(self, isa: I) -> Self::Output {
            let w = isa.load_bytes(self.w);
            let table = isa.load_table(self.table);
            let (low, high) = (isa.low_halves(w), isa.high_halves(w));
            let sum: i32 = self.x.into_iter().map(i32::from).sum();
            let start = isa.splat_u((7 + I::LESS * sum) as u32);
            [w, low, high, isa.lookup_bytes(table, low)].map(|w| {
                let mut out = [0; LANES];
                isa.store_u(isa.dot(start, w, self.x), &mut out);
                out
            })
        }
    }

    #[test]
    fn every_level_has_the_exact_sums() {
        let table = std::array::from_fn(|i| (i * 17) as u8);
        for seed in 0..100u32 {
            let byte = |i: usize| (i as u32 * 7919 + seed * 104_729).rotate_left(seed) as u8;
            // The extremes too, where sums in sixteen bits would saturate.
            let w = std::array::from_fn(|i| if seed == 0 { 255 } else { byte(i) });
            let x = match seed {
                0 => [127; 4],
                1 => [-128; 4],
                _ => std::array::from_fn(|i| byte(i + 99) as i8),
            };
            let steps: [&dyn Fn(u8) -> u8; 4] = [&|w| w, &|w| w & 15, &|w| w >> 4, &|w| {
                table[usize::from(w & 15)]
            }];
            let expected = steps.map(|step| {
                std::array::from_fn(|lane| {
                    let products = w[4 * lane..].iter().zip(x);
                    let sum: i32 = products
                        .map(|(&w, x)| i32::from(step(w)) * i32::from(x))
                        .sum();
                    (7 + sum) as u32
                })
            });
            for level in levels() {
                let each = Each {
                    w: &w,
                    table: &table,
                    x,
                };
                assert_eq!(dispatch_at(level, each), expected, "{level:?}");
            }
        }
    }
}
