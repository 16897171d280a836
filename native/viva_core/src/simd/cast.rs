//! f32 to bf16.

use super::{Isa, Op};

/// Rounds to the nearest bf16, ties to even; a NaN stays one.
pub struct ToBf16<'a> {
    pub x: &'a [f32],
    /// Little-endian.
    pub out: &'a mut [[u8; 2]],
}

impl Op for ToBf16<'_> {
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

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::simd::{dispatch_at, levels};

    #[test]
    fn every_level_rounds_as_the_definition() {
        // Every sign and exponent, and mantissas around every kind of tie.
        let around = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        let x: Vec<f32> = (0..=u16::MAX)
            .flat_map(|high| around.map(|low| f32::from_bits(u32::from(high) << 16 | low)))
            .collect();
        for level in levels() {
            let mut out = vec![[0; 2]; x.len()];
            dispatch_at(
                level,
                ToBf16 {
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
