//! Extremes and finiteness of a slice.

use super::{Isa, LANES, Op};

const ABS: u32 = 0x7fff_ffff;
const INFINITE: u32 = 0x7f80_0000;

/// The largest magnitude. Magnitudes of floats order like their bits, so this
/// is an integer maximum; a NaN or infinity wins it, which [`IsFinite`] sees.
#[inline(always)]
pub fn absmax<I: Isa>(isa: I, x: &[f32]) -> f32 {
    let mask = isa.splat_u(ABS);
    let step = |most: I::U, v: I::F| isa.max_u(most, isa.and(isa.bits(v), mask));
    let (chunks, tail) = x.as_chunks::<LANES>();
    let (pairs, single) = chunks.as_chunks::<2>();
    // Two accumulators hide the latency of the maximum.
    let mut most = [isa.splat_u(0); 2];
    for [a, b] in pairs {
        most = [step(most[0], isa.load(a)), step(most[1], isa.load(b))];
    }
    for a in single {
        most[0] = step(most[0], isa.load(a));
    }
    if !tail.is_empty() {
        most[1] = step(most[1], isa.load_part(tail, 0.0));
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
}
