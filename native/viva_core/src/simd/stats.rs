//! Extremes and finiteness of a slice.

use super::{Isa, LANES, Op};

const ABS: u32 = 0x7fff_ffff;
const INFINITE: u32 = 0x7f80_0000;

/// The larger of a magnitude and that of v, as bits.
#[inline(always)]
fn larger<I: Isa>(isa: I, most: I::U, v: I::F) -> I::U {
    isa.max_u(most, isa.and(isa.bits(v), isa.splat_u(ABS)))
}

/// The largest magnitude. Magnitudes of floats order like their bits, so this
/// is an integer maximum; a NaN or infinity wins it, which [`IsFinite`] sees.
#[inline(always)]
pub fn absmax<I: Isa>(isa: I, x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let (pairs, single) = chunks.as_chunks::<2>();
    // Two accumulators hide the latency of the maximum.
    let mut most = [isa.splat_u(0); 2];
    for [a, b] in pairs {
        most = [
            larger(isa, most[0], isa.load(a)),
            larger(isa, most[1], isa.load(b)),
        ];
    }
    for a in single {
        most[0] = larger(isa, most[0], isa.load(a));
    }
    if !tail.is_empty() {
        most[1] = larger(isa, most[1], isa.load_part(tail, 0.0));
    }
    let mut lanes = [0u32; LANES];
    isa.store_u(isa.max_u(most[0], most[1]), &mut lanes);
    f32::from_bits(lanes.into_iter().fold(0, u32::max))
}

/// The least and greatest of the values and zero. The slice is finite.
#[inline(always)]
pub fn range_with_zero<I: Isa>(isa: I, x: &[f32]) -> (f32, f32) {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut low = isa.splat(0.0);
    let mut high = low;
    for chunk in chunks {
        let v = isa.load(chunk);
        low = isa.min(v, low);
        high = isa.max(v, high);
    }
    if !tail.is_empty() {
        let v = isa.load_part(tail, 0.0);
        low = isa.min(v, low);
        high = isa.max(v, high);
    }
    let (mut lows, mut highs) = ([0f32; LANES], [0f32; LANES]);
    isa.store(low, &mut lows);
    isa.store(high, &mut highs);
    (
        lows.into_iter().fold(0.0, |m, v| if v < m { v } else { m }),
        highs
            .into_iter()
            .fold(0.0, |m, v| if v > m { v } else { m }),
    )
}

/// How many blocks of that length are looked at together: as many as one vector
/// has lanes, while they stay in the nearest cache.
pub const fn together(block_len: usize) -> usize {
    if block_len <= 256 { LANES } else { 1 }
}

/// [`absmax`] of up to sixteen blocks, one a lane; zeros in the lanes past them.
/// `finite` stays zero while all elements are numbers.
#[inline(always)]
pub fn absmax_each<I: Isa>(isa: I, x: &[f32], block_len: usize, finite: &mut I::F) -> I::F {
    let most = absmax_lanes(isa, x, block_len);
    *finite = isa.mul_add(most, isa.splat(0.0), *finite);
    most
}

/// Whether what `absmax_each` and `range_each` add up is zero still.
#[inline(always)]
pub fn stays_zero<I: Isa>(isa: I, finite: I::F) -> bool {
    isa.sum(finite) == 0.0
}

#[inline(always)]
fn absmax_lanes<I: Isa>(isa: I, x: &[f32], block_len: usize) -> I::F {
    let (vectors, tail) = x.as_chunks::<LANES>();
    if tail.is_empty() && vectors.len() == block_len && block_len.is_multiple_of(LANES) {
        let mut most = [isa.splat(0.0); LANES];
        for (block, most) in vectors.chunks_exact(block_len / LANES).zip(&mut most) {
            let mut m = isa.splat_u(0);
            for v in block {
                m = larger(isa, m, isa.load(v));
            }
            *most = isa.floats(m);
        }
        let mut most_each = isa.splat_u(0);
        for row in isa.transpose(most) {
            most_each = isa.max_u(most_each, isa.bits(row));
        }
        return isa.floats(most_each);
    }
    let mut most = [0f32; LANES];
    for (block, most) in x.chunks(block_len).zip(&mut most) {
        *most = absmax(isa, block);
    }
    isa.load(&most)
}

/// [`range_with_zero`] of up to sixteen blocks, one a lane; zeros in the lanes
/// past them. `finite` stays zero while all elements are numbers.
#[inline(always)]
pub fn range_each<I: Isa>(isa: I, x: &[f32], block_len: usize, finite: &mut I::F) -> (I::F, I::F) {
    let (vectors, tail) = x.as_chunks::<LANES>();
    if tail.is_empty() && vectors.len() == block_len && block_len.is_multiple_of(LANES) {
        let zero = isa.splat(0.0);
        let (mut lows, mut highs) = ([zero; LANES], [zero; LANES]);
        let blocks = vectors.chunks_exact(block_len / LANES);
        for ((block, low), high) in blocks.zip(&mut lows).zip(&mut highs) {
            for v in block {
                let v = isa.load(v);
                *low = isa.min(v, *low);
                *high = isa.max(v, *high);
                *finite = isa.mul_add(v, zero, *finite);
            }
        }
        let (mut low, mut high) = (zero, zero);
        for v in isa.transpose(lows) {
            low = isa.min(v, low);
        }
        for v in isa.transpose(highs) {
            high = isa.max(v, high);
        }
        return (low, high);
    }
    let (mut lows, mut highs) = ([0f32; LANES], [0f32; LANES]);
    for (i, block) in x.chunks(block_len).enumerate() {
        (lows[i], highs[i]) = range_with_zero(isa, block);
        *finite = isa.mul_add(isa.splat(absmax(isa, block)), isa.splat(0.0), *finite);
    }
    (isa.load(&lows), isa.load(&highs))
}

/// Whether every element is a number.
pub struct IsFinite<'a>(pub &'a [f32]);

impl Op for IsFinite<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> bool {
        absmax(isa, self.0).to_bits() < INFINITE
    }
}

/// The largest magnitude of a slice of finite values.
pub struct Absmax<'a>(pub &'a [f32]);

impl Op for Absmax<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> f32 {
        absmax(isa, self.0)
    }
}

/// Least and greatest of a slice of finite values, and zero.
pub struct RangeWithZero<'a>(pub &'a [f32]);

impl Op for RangeWithZero<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> (f32, f32) {
        range_with_zero(isa, self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{dispatch_at, levels};

    #[test]
    fn finite_is_seen_at_every_position_and_level() {
        for n in [0, 1, 15, 16, 17, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| i as f32 - 7.5).collect();
            for level in levels() {
                assert!(dispatch_at(level, IsFinite(&x)));
                for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    for i in 0..n {
                        let mut y = x.clone();
                        y[i] = bad;
                        assert!(!dispatch_at(level, IsFinite(&y)), "{bad} at {i} of {n}");
                    }
                }
            }
        }
    }

    #[test]
    fn range_includes_zero() {
        for level in levels() {
            assert_eq!(dispatch_at(level, RangeWithZero(&[])), (0.0, 0.0));
            assert_eq!(dispatch_at(level, RangeWithZero(&[3.0, 5.0])), (0.0, 5.0));
            let x: Vec<f32> = (0..40).map(|i| (i as f32 * 0.7).sin()).collect();
            let lo = x.iter().copied().fold(0.0, f32::min);
            let hi = x.iter().copied().fold(0.0, f32::max);
            assert_eq!(dispatch_at(level, RangeWithZero(&x)), (lo, hi));
        }
    }

    struct Each<'a> {
        x: &'a [f32],
        block_len: usize,
    }

    impl Op for Each<'_> {
        /// Absmaxes, lows, highs, and whether each saw only numbers.
        type Output = ([[f32; LANES]; 3], [bool; 2]);

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> Self::Output {
            let (mut by_absmax, mut by_range) = (isa.splat(0.0), isa.splat(0.0));
            let most = absmax_each(isa, self.x, self.block_len, &mut by_absmax);
            let (low, high) = range_each(isa, self.x, self.block_len, &mut by_range);
            let lanes = [most, low, high].map(|v| {
                let mut lanes = [0f32; LANES];
                isa.store(v, &mut lanes);
                lanes
            });
            (
                lanes,
                [by_absmax, by_range].map(|finite| stays_zero(isa, finite)),
            )
        }
    }

    #[test]
    fn blocks_looked_at_together_are_as_one_by_one() {
        for block_len in [1, 2, 8, 15, 16, 24, 40, 64, 128, 256, 300] {
            let most = together(block_len) * block_len;
            for n in [1, most.div_ceil(2), most - block_len / 2, most] {
                let mut x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
                let mut expected = [[0f32; LANES]; 3];
                for (i, block) in x.chunks(block_len).enumerate() {
                    expected[1][i] = block.iter().copied().fold(0.0, f32::min);
                    expected[2][i] = block.iter().copied().fold(0.0, f32::max);
                    expected[0][i] = expected[2][i].max(-expected[1][i]);
                }
                for level in levels() {
                    let seen = dispatch_at(level, Each { x: &x, block_len });
                    let what = format!("{n} in blocks of {block_len} at {}", level.name());
                    assert_eq!(seen, (expected, [true; 2]), "{what}");
                }
                for bad in [
                    0x7fc0_0000,
                    0x7fff_ffff,
                    0xffff_ffff,
                    0x7f80_0000,
                    0xff80_0000,
                ] {
                    for i in [0, n / 2, n - 1] {
                        let number = std::mem::replace(&mut x[i], f32::from_bits(bad));
                        for level in levels() {
                            let (_, finite) = dispatch_at(level, Each { x: &x, block_len });
                            assert_eq!(finite, [false; 2], "{bad:x} at {i} of {n}");
                        }
                        x[i] = number;
                    }
                }
            }
        }
    }
}
