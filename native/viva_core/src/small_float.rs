//! Floats of eight and four bits, and their way to f32 and back.
//!
//! | | sign, exponent, mantissa | largest | infinity | NaN |
//! |---|---|---|---|---|
//! | [`E4M3`] | 1, 4, 3 | 448 | none | 0x7f |
//! | [`E5M2`] | 1, 5, 2 | 57344 | 0x7c | 0x7d … 0x7f |
//! | [`E2M1`] | 1, 2, 1 | 6 | none | none |
//! | [`e8m0`] | 0, 8, 0 | 2¹²⁷ | none | 0xff |
//!
//! They are those of the OCP's 8-bit and MX specifications (E4M3 is what other
//! programs call e4m3fn). Numbers round to nearest, ties to even, and finite
//! ones past the largest become the largest. Plain arithmetic without branches:
//! the compiler's own vectors do.

const ABS: u32 = 0x7fff_ffff;
const INFINITE: u32 = 0x7f80_0000;

/// A float with a sign, whose codes fit a byte.
#[derive(Clone, Copy, Debug)]
pub struct SmallFloat {
    mantissa_bits: u32,
    bias: u32,
    sign_bit: u32,
    /// Codes without their sign: of the largest finite value, and of what
    /// infinity and NaN become.
    largest: u32,
    infinity: u32,
    nan: u32,
}

pub const E4M3: SmallFloat = SmallFloat {
    mantissa_bits: 3,
    bias: 7,
    sign_bit: 7,
    largest: 0x7e,
    infinity: 0x7e,
    nan: 0x7f,
};

pub const E5M2: SmallFloat = SmallFloat {
    mantissa_bits: 2,
    bias: 15,
    sign_bit: 7,
    largest: 0x7b,
    infinity: 0x7c,
    nan: 0x7f,
};

/// Without a NaN: what is none becomes the largest.
pub const E2M1: SmallFloat = SmallFloat {
    mantissa_bits: 1,
    bias: 1,
    sign_bit: 3,
    largest: 7,
    infinity: 7,
    nan: 7,
};

/// The value of each code.
pub static E4M3_VALUES: [f32; 256] = E4M3.values();
pub static E5M2_VALUES: [f32; 256] = E5M2.values();
pub static E2M1_VALUES: [f32; 16] = E2M1.values();

impl SmallFloat {
    /// Bits of an f32 mantissa that this one lacks.
    const fn cut(self) -> u32 {
        23 - self.mantissa_bits
    }

    /// The exponent of f32 minus that of this float.
    const fn rebias(self) -> u32 {
        127 - self.bias
    }

    /// The largest finite value.
    pub const fn max(self) -> f32 {
        self.decode(self.largest as u8)
    }

    /// The bits of 1.5 · 2²³ · the distance of the values below the least
    /// normal one: adding and subtracting that number rounds to such values.
    const fn subnormal_rounder(self) -> u32 {
        ((self.rebias() + 1 + self.cut()) << 23) | 0x0040_0000
    }

    /// What [`nearest`](crate::simd::small_float::nearest) needs: bits of an
    /// f32 mantissa to round off, and the bits of the least normal value.
    pub(crate) const fn rounding(self) -> (u32, u32) {
        (self.cut(), (self.rebias() + 1) << 23)
    }

    /// The code of the nearest value.
    #[inline(always)]
    pub fn encode(self, x: f32) -> u8 {
        let bits = x.to_bits();
        let magnitude = bits & ABS;
        let cut = self.cut();
        // The even neighbour takes a tie; a carry goes into the exponent.
        let even = (magnitude >> cut) & 1;
        let normal = ((magnitude + (1 << (cut - 1)) - 1 + even) >> cut)
            .wrapping_sub(self.rebias() << self.mantissa_bits);
        let rounder = self.subnormal_rounder();
        let subnormal = (f32::from_bits(magnitude) + f32::from_bits(rounder))
            .to_bits()
            .wrapping_sub(rounder);
        let least_normal = (self.rebias() + 1) << 23;
        let code = if magnitude < least_normal {
            subnormal
        } else {
            normal
        };
        let code = if code < self.largest {
            code
        } else {
            self.largest
        };
        let code = if magnitude == INFINITE {
            self.infinity
        } else {
            code
        };
        let code = if magnitude > INFINITE { self.nan } else { code };
        (code | ((bits >> 31) << self.sign_bit)) as u8
    }

    /// By how many bits a code is shifted to be an f32 with too small an exponent,
    /// and what mends that.
    pub fn widening(self) -> (u32, f32) {
        (self.cut(), f32::from_bits((127 + self.rebias()) << 23))
    }

    /// What the code of infinity would be worth as a number; none where there is no
    /// infinity.
    pub fn infinity(self) -> Option<f32> {
        let (shift, factor) = self.widening();
        let has = self.infinity != self.largest;
        has.then(|| f32::from_bits(self.infinity << shift) * factor)
    }

    /// The value of a code.
    pub const fn decode(self, code: u8) -> f32 {
        let sign = (code as u32 >> self.sign_bit) << 31;
        let magnitude = code as u32 & ((1 << self.sign_bit) - 1);
        let value = if magnitude == self.infinity && self.infinity != self.largest {
            INFINITE
        } else if magnitude > self.largest {
            0x7fc0_0000
        } else {
            // As an f32 with too small an exponent, which the product mends;
            // subnormal codes are subnormal there too.
            let two_to_rebias = f32::from_bits((127 + self.rebias()) << 23);
            (f32::from_bits(magnitude << self.cut()) * two_to_rebias).to_bits()
        };
        f32::from_bits(value | sign)
    }

    const fn values<const N: usize>(self) -> [f32; N] {
        let mut values = [0.0; N];
        let mut code = 0;
        while code < N {
            values[code] = self.decode(code as u8);
            code += 1;
        }
        values
    }
}

/// Powers of two from 2⁻¹²⁷ to 2¹²⁷: the scales of the MX formats.
pub mod e8m0 {
    use super::{ABS, INFINITE};

    pub const NAN: u8 = 0xff;

    /// The code of the nearest power of two, halfway up, as ml_dtypes rounds.
    /// Zero becomes the least one; no other value has a NaN's code but negative
    /// numbers, infinity and NaN.
    #[inline(always)]
    pub fn encode(x: f32) -> u8 {
        let bits = x.to_bits();
        if bits & ABS >= INFINITE || (bits >> 31 == 1 && bits & ABS != 0) {
            return NAN;
        }
        let magnitude = bits & ABS;
        // Between its least two powers ml_dtypes, and torch too, goes up only.
        let code = if magnitude < 0x0080_0000 {
            u32::from(magnitude > 0x0040_0000)
        } else {
            (magnitude + 0x0040_0000) >> 23
        };
        code.min(254) as u8
    }

    /// The value of a code.
    #[inline(always)]
    pub const fn decode(code: u8) -> f32 {
        match code {
            0 => f32::from_bits(0x0040_0000),
            NAN => f32::NAN,
            _ => f32::from_bits((code as u32) << 23),
        }
    }
}
