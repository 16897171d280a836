//! Activations of LLM.int8(): which of them are outliers, and the others in 8 bits.

use super::{Isa, LANES, Op};
use crate::method::mse::ROUND;

/// The least magnitude that f16 rounds to 6, from which on an element makes its
/// column an outlier.
pub const OUTLIER: f32 = 6.0 - 1.0 / 512.0;

/// Raises `most` to the magnitudes of a row, column by column: the greatest element
/// of the row that is no outlier, rounded to f16, or NaN where one is NaN.
pub struct Look<'a> {
    pub x: &'a [f32],
    pub most: &'a mut [f32],
}

impl Op for Look<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> f32 {
        let (zero, outlier) = (isa.splat(0.0), isa.splat(OUTLIER));
        let (mut inside, mut greatest) = (zero, isa.splat_u(0));
        let (lines, tail) = self.x.as_chunks::<LANES>();
        let (mosts, most_tail) = self.most.as_chunks_mut::<LANES>();
        for (x, most) in lines.iter().zip(mosts) {
            let (size, before) = (isa.abs(isa.load(x)), isa.load(most));
            isa.store(isa.choose(size, before, size, before), most);
            let counted = isa.choose(outlier, size, size, zero);
            inside = isa.choose(counted, inside, counted, inside);
            greatest = isa.max_u(greatest, isa.bits(size));
        }
        let size = isa.abs(isa.load_part(tail, 0.0));
        let before = isa.load_part(most_tail, 0.0);
        isa.store_part(isa.choose(size, before, size, before), most_tail);
        let counted = isa.choose(outlier, size, size, zero);
        inside = isa.choose(counted, inside, counted, inside);
        greatest = isa.max_u(greatest, isa.bits(size));
        let (mut insides, mut bits) = ([0f32; LANES], [0u32; LANES]);
        isa.store(isa.round_f16(inside), &mut insides);
        isa.store_u(greatest, &mut bits);
        // The bits of what is no number lie above those of infinity.
        match bits.into_iter().fold(0, u32::max) > f32::INFINITY.to_bits() {
            true => f32::NAN,
            false => insides.into_iter().fold(0.0, f32::max),
        }
    }
}

/// A row rounded to f16, times `by`, to the nearest integers, as signed bytes: zeros
/// in columns whose greatest magnitude is that of an outlier.
pub struct Bytes<'a> {
    pub x: &'a [f32],
    pub most: &'a [f32],
    pub by: f32,
    pub out: &'a mut [u8],
}

impl Op for Bytes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let by = isa.splat(self.by);
        let (lines, tail) = self.x.as_chunks::<LANES>();
        let (mosts, most_tail) = self.most.as_chunks::<LANES>();
        let (outs, out_tail) = self.out.as_chunks_mut::<LANES>();
        for ((x, most), out) in lines.iter().zip(mosts).zip(outs) {
            isa.store_u8(codes(isa, isa.load(x), isa.load(most), by), out);
        }
        let (x, most) = (isa.load_part(tail, 0.0), isa.load_part(most_tail, 0.0));
        let mut lanes = [0u8; LANES];
        isa.store_u8(codes(isa, x, most, by), &mut lanes);
        out_tail.copy_from_slice(&lanes[..tail.len()]);
    }
}

#[inline(always)]
fn codes<I: Isa>(isa: I, x: I::F, most: I::F, by: I::F) -> I::U {
    let kept = isa.choose(isa.splat(OUTLIER), most, x, isa.splat(0.0));
    let steps = isa.mul(isa.round_f16(kept), by);
    let rounded = isa.add(steps, isa.splat(ROUND));
    isa.sub_u(isa.bits(rounded), isa.splat_u(ROUND.to_bits()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::vector::round_f16;
    use crate::simd::{dispatch_at, levels};

    /// Around the threshold, and far from it.
    fn row(n: usize, seed: usize) -> Vec<f32> {
        let value = |i: usize| match (i * 31 + seed) % 23 {
            0 => 6.0,
            1 => OUTLIER,
            2 => f32::from_bits(OUTLIER.to_bits() - 1),
            3 => f32::NEG_INFINITY,
            4 => 1e-42,
            v => (v as f32 - 13.3) * 0.41,
        };
        (0..n).map(value).collect()
    }

    #[test]
    fn the_threshold_is_six_in_f16() {
        assert_eq!(round_f16(OUTLIER), 6.0);
        assert!(round_f16(f32::from_bits(OUTLIER.to_bits() - 1)) < 6.0);
    }

    #[test]
    fn rows_are_split_as_defined_on_every_level() {
        for (n, nan) in [
            (1, false),
            (15, false),
            (16, true),
            (33, false),
            (100, true),
        ] {
            let (mut x, before) = (row(n, 5), row(n, 9));
            if nan {
                x[n / 2] = f32::NAN;
            }
            let sizes: Vec<f32> = before.iter().map(|v| v.abs()).collect();
            let is_outlier = |v: f32| !v.is_nan() && round_f16(v).abs() >= 6.0;
            let inside = x.iter().filter(|v| !is_outlier(**v));
            let greatest = inside.fold(0f32, |m, v| match v.is_nan() || m.is_nan() {
                true => f32::NAN,
                false => m.max(round_f16(*v).abs()),
            });
            let raised: Vec<f32> = x.iter().zip(&sizes).map(|(v, m)| m.max(v.abs())).collect();
            let by = 127.0 / 6.0;
            let code = |(v, most): (&f32, &f32)| match is_outlier(*most) || v.is_nan() {
                true => 0,
                false => (round_f16(*v) * by).round_ties_even() as i8,
            };
            let tame: Vec<f32> = x
                .iter()
                .map(|v| if v.is_nan() { 0.0 } else { *v })
                .collect();
            let expected: Vec<i8> = tame.iter().zip(&raised).map(code).collect();
            for level in levels() {
                let mut most = sizes.clone();
                let look = Look {
                    x: &x,
                    most: &mut most,
                };
                let got = dispatch_at(level, look);
                assert!(
                    got == greatest || (got.is_nan() && greatest.is_nan()),
                    "{n} {level:?}: {got} is not {greatest}"
                );
                assert_eq!(most, raised, "{level:?}");
                let mut out = vec![0u8; n];
                let (x, most, out_bytes) = (&tame[..], &most[..], &mut out[..]);
                dispatch_at(
                    level,
                    Bytes {
                        x,
                        most,
                        by,
                        out: out_bytes,
                    },
                );
                let codes: Vec<i8> = out.into_iter().map(|code| code as i8).collect();
                assert_eq!(codes, expected, "{level:?}");
            }
        }
    }
}
