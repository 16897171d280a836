//! The vector of a kernel: sixteen lanes, however wide the registers are.
//!
//! A level is a token that implements [`Isa`]. Every level has the same sixteen
//! logical lanes, so element i of a slice always meets lane i mod 16 and sums
//! are the same bits everywhere; only [`Isa::mul_add`] may round differently.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::nibble::{self, Order};

/// Lanes of every vector.
pub const LANES: usize = 16;

/// A vector in memory as the machine has its lines there.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Line(pub [f32; LANES]);

impl Line {
    /// Lines of zeros with room for so many f32: vectors that begin anywhere else lie in
    /// two lines each, and are read at half the rate.
    pub fn zeroed(floats: usize) -> Vec<Line> {
        bytemuck::allocation::zeroed_vec(floats.div_ceil(LANES))
    }
}

/// The operations that kernels need, on sixteen lanes of f32 or u32.
pub trait Isa: Copy {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen u32.
    type U: Copy;
    /// Vectors that fit into registers beside a few operands.
    const ACCUMULATORS: usize;
    /// Whether [`Isa::fused`] is one instruction.
    const FUSES: bool;
    /// Whether [`Isa::stream`] goes past the caches.
    const STREAMS: bool = false;

    fn splat(self, v: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, v: Self::F, out: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, fused where the level has the instruction: only for sums
    /// that state a tolerance.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// a · b + c, rounded once on every level: for sums that decide which bytes
    /// are written. Slow where the level lacks the instruction.
    fn fused(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// a < b ? a : b. Neither is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// a > b ? a : b. Neither is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// a > b ? yes : no; no where either is NaN.
    fn choose(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;
    /// Rounds to the nearest f16, ties to even, and back.
    fn round_f16(self, v: Self::F) -> Self::F;
    /// An f16 from its bytes.
    #[inline(always)]
    fn widen(self, half: [u8; 2]) -> f32 {
        f16::from_le_bytes(half).to_f32()
    }
    /// Signed integers to floats.
    fn int_to_float(self, v: Self::U) -> Self::F;
    /// Numbers below 2³¹ to signed integers, toward zero.
    fn truncate(self, v: Self::F) -> Self::U;
    /// `table[index]` a lane; indices are below 16.
    fn lookup(self, table: Self::F, index: Self::U) -> Self::F;

    fn splat_u(self, v: u32) -> Self::U;
    /// The bits of each lane.
    fn bits(self, v: Self::F) -> Self::U;
    /// The floats of those bits.
    fn floats(self, v: Self::U) -> Self::F;
    fn and(self, a: Self::U, b: Self::U) -> Self::U;
    /// Each lane shifted left, by less than 32.
    fn shift_left(self, v: Self::U, by: u32) -> Self::U;
    fn add_u(self, a: Self::U, b: Self::U) -> Self::U;
    fn sub_u(self, a: Self::U, b: Self::U) -> Self::U;
    fn max_u(self, a: Self::U, b: Self::U) -> Self::U;
    /// 2 · index + (a > b): one step of a binary search in all lanes.
    fn descend(self, index: Self::U, a: Self::F, b: Self::F) -> Self::U;
    fn load_u8(self, x: &[u8; LANES]) -> Self::U;
    fn load_i8(self, x: &[u8; LANES]) -> Self::U;
    /// Codes of four bits, two a byte.
    #[inline(always)]
    fn load_u4(self, x: &[u8; LANES / 2], order: Order) -> Self::U {
        let mut codes = [0; LANES];
        nibble::unpack(order, x, 0, &mut codes);
        self.load_u8(&codes)
    }
    /// The low byte of each lane.
    fn store_u8(self, v: Self::U, out: &mut [u8; LANES]);
    fn store_u(self, v: Self::U, out: &mut [u32; LANES]);

    /// Stores a line past the caches, where the level has the instruction. Others see
    /// it after [`streamed`](super::memory::streamed) alone.
    #[inline(always)]
    fn stream(self, v: Self::F, out: &mut Line) {
        self.store(v, &mut out.0);
    }

    /// |v|.
    #[inline(always)]
    fn abs(self, v: Self::F) -> Self::F {
        self.floats(self.and(self.bits(v), self.splat_u(0x7fff_ffff)))
    }

    /// The upper half of each lane, as a number.
    #[inline(always)]
    fn upper_half(self, v: Self::U) -> Self::U {
        let mut lanes = [0; LANES];
        self.store_u(v, &mut lanes);
        self.bits(self.load(&lanes.map(|v| f32::from_bits(v >> 16))))
    }

    /// index + (a > b).
    #[inline(always)]
    fn count(self, index: Self::U, a: Self::F, b: Self::F) -> Self::U {
        self.add_u(index, self.descend(self.splat_u(0), a, b))
    }

    /// `table[index]` a lane, by the low five bits of the index.
    #[inline(always)]
    fn lookup_32(self, table: [Self::F; 2], index: Self::U) -> Self::F {
        let half = self.int_to_float(self.and(index, self.splat_u(16)));
        let within = self.and(index, self.splat_u(15));
        let low = self.lookup(table[0], within);
        let high = self.lookup(table[1], within);
        self.choose(half, self.splat(8.0), high, low)
    }

    /// Lane j of vector i in lane i of vector j.
    #[inline(always)]
    fn transpose(self, v: [Self::F; LANES]) -> [Self::F; LANES] {
        let mut rows = [[0f32; LANES]; LANES];
        for (v, row) in v.into_iter().zip(&mut rows) {
            self.store(v, row);
        }
        std::array::from_fn(|j| self.load(&rows.map(|row| row[j])))
    }

    /// The lanes added in a fixed tree.
    #[inline(always)]
    fn sum(self, v: Self::F) -> f32 {
        let mut lanes = [0f32; LANES];
        self.store(v, &mut lanes);
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    /// Up to sixteen elements, `fill` in the lanes past them.
    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> Self::F {
        let mut lanes = [fill; LANES];
        lanes[..x.len()].copy_from_slice(x);
        self.load(&lanes)
    }

    /// The first lanes, as many as `out` holds.
    #[inline(always)]
    fn store_part(self, v: Self::F, out: &mut [f32]) {
        let mut lanes = [0f32; LANES];
        self.store(v, &mut lanes);
        out.copy_from_slice(&lanes[..out.len()]);
    }
}

/// No assumption beyond the target's baseline.
#[derive(Clone, Copy)]
pub struct Portable;

#[inline(always)]
fn each<A: Copy, B: Copy, C>(a: [A; LANES], b: [B; LANES], f: impl Fn(A, B) -> C) -> [C; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Isa for Portable {
    type F = [f32; LANES];
    type U = [u32; LANES];
    const ACCUMULATORS: usize = 4;
    const FUSES: bool = cfg!(target_arch = "aarch64");

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        [v; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        *out = v;
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // aarch64 has the instruction in its baseline; x86-64 would call libm.
        if cfg!(target_arch = "aarch64") {
            std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
        } else {
            self.add(self.mul(a, b), c)
        }
    }
    #[inline(always)]
    fn fused(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn choose(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F {
        std::array::from_fn(|i| if a[i] > b[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn round_f16(self, v: Self::F) -> Self::F {
        v.map(round_f16)
    }
    #[inline(always)]
    fn int_to_float(self, v: Self::U) -> Self::F {
        v.map(|v| v as i32 as f32)
    }
    #[inline(always)]
    fn truncate(self, v: Self::F) -> Self::U {
        v.map(|v| v as i32 as u32)
    }
    #[inline(always)]
    fn lookup(self, table: Self::F, index: Self::U) -> Self::F {
        index.map(|i| table[i as usize & 15])
    }
    #[inline(always)]
    fn splat_u(self, v: u32) -> Self::U {
        [v; LANES]
    }
    #[inline(always)]
    fn bits(self, v: Self::F) -> Self::U {
        v.map(f32::to_bits)
    }
    #[inline(always)]
    fn floats(self, v: Self::U) -> Self::F {
        v.map(f32::from_bits)
    }
    #[inline(always)]
    fn and(self, a: Self::U, b: Self::U) -> Self::U {
        each(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn shift_left(self, v: Self::U, by: u32) -> Self::U {
        v.map(|v| v << by)
    }
    #[inline(always)]
    fn add_u(self, a: Self::U, b: Self::U) -> Self::U {
        each(a, b, u32::wrapping_add)
    }
    #[inline(always)]
    fn sub_u(self, a: Self::U, b: Self::U) -> Self::U {
        each(a, b, u32::wrapping_sub)
    }
    #[inline(always)]
    fn max_u(self, a: Self::U, b: Self::U) -> Self::U {
        each(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn descend(self, index: Self::U, a: Self::F, b: Self::F) -> Self::U {
        std::array::from_fn(|i| 2 * index[i] + u32::from(a[i] > b[i]))
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::U {
        x.map(u32::from)
    }
    #[inline(always)]
    fn load_i8(self, x: &[u8; LANES]) -> Self::U {
        x.map(|v| i32::from(v as i8) as u32)
    }
    #[inline(always)]
    fn store_u8(self, v: Self::U, out: &mut [u8; LANES]) {
        *out = v.map(|v| v as u8);
    }
    #[inline(always)]
    fn store_u(self, v: Self::U, out: &mut [u32; LANES]) {
        *out = v;
    }
}

/// Rounds to the nearest f16, ties to even, in f32 arithmetic.
#[inline(always)]
pub fn round_f16(v: f32) -> f32 {
    let bits = v.to_bits();
    let sign = bits & 0x8000_0000;
    let mag = bits & 0x7fff_ffff;
    let rounded = if mag >= 0x477f_f000 {
        0x7f80_0000
    } else if mag < 0x3880_0000 {
        // Below 2⁻¹⁴ f16 counts in steps of 2⁻²⁴, the spacing of f32 at 0.5.
        ((f32::from_bits(mag) + 0.5) - 0.5).to_bits()
    } else {
        // 13 mantissa bits go; the even neighbour takes a tie.
        (mag + 0xfff + ((mag >> 13) & 1)) & !0x1fff
    };
    f32::from_bits(rounded | sign)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Op, dispatch_at, levels};

    /// Every operation whose result is the same bits on every level.
    struct Operations {
        a: [f32; LANES],
        b: [f32; LANES],
        c: [f32; LANES],
        bytes: [u8; LANES],
    }

    impl Op for Operations {
        type Output = Vec<[u32; LANES]>;

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> Self::Output {
            let [a, b, c] = [self.a, self.b, self.c].map(|x| isa.load(&x));
            let [unsigned, signed] = [isa.load_u8(&self.bytes), isa.load_i8(&self.bytes)];
            let half = self.bytes.first_chunk().unwrap();
            let [low_first, high_first] =
                [Order::LowFirst, Order::HighFirst].map(|order| isa.load_u4(half, order));
            let whole = isa.int_to_float(signed);
            let (x, y) = (isa.bits(a), isa.bits(b));
            let index = isa.and(unsigned, isa.splat_u(15));
            let floats = [
                isa.add(a, b),
                isa.sub(a, b),
                isa.mul(a, b),
                isa.div(a, b),
                isa.fused(a, b, c),
                isa.min(a, b),
                isa.max(a, b),
                isa.choose(a, b, b, c),
                isa.round_f16(a),
                isa.lookup(a, index),
                isa.floats(y),
                whole,
            ];
            let turned = isa.transpose(std::array::from_fn(|i| floats[i % floats.len()]));
            let ints = [
                isa.truncate(isa.div(whole, isa.splat(3.7))),
                isa.descend(index, a, b),
                isa.add_u(x, y),
                isa.sub_u(x, y),
                isa.shift_left(x, 24),
                isa.max_u(x, y),
                unsigned,
                signed,
                low_first,
                high_first,
            ];
            let ints = floats
                .into_iter()
                .chain(turned)
                .map(|v| isa.bits(v))
                .chain(ints);
            let mut results: Vec<_> = ints
                .map(|v| {
                    let mut lanes = [0; LANES];
                    isa.store_u(v, &mut lanes);
                    lanes
                })
                .collect();
            let mut bytes = [0; LANES];
            isa.store_u8(x, &mut bytes);
            results.push(bytes.map(u32::from));
            results.push([isa.sum(whole).to_bits(); LANES]);
            results
        }
    }

    // One of each sign, and what lies around the bounds and ties of f16.
    const VALUES: [f32; 20] = [
        0.0,
        1.0,
        1.000_488_3,
        1.000_488_4,
        1.001_464_8,
        -7.25,
        65504.0,
        65519.996,
        65520.0,
        6.103_515_6e-5,
        6.1e-5,
        2.980_232_2e-8,
        2.980_232_5e-8,
        8.940_697e-8,
        1e-41,
        f32::MAX,
        f32::MIN_POSITIVE,
        f32::INFINITY,
        3.5e-4,
        1234.567,
    ];

    #[test]
    fn every_operation_is_the_portable_one() {
        let value = |i: usize| {
            let v = VALUES[i % VALUES.len()];
            if (i / VALUES.len()).is_multiple_of(2) {
                v
            } else {
                -v
            }
        };
        let signed = 2 * VALUES.len();
        for shift in 0..signed {
            let operations = || Operations {
                a: std::array::from_fn(value),
                b: std::array::from_fn(|i| value(i + shift)),
                c: std::array::from_fn(|i| value(3 * i + shift)),
                bytes: std::array::from_fn(|i| (i * 37 + shift * 7) as u8),
            };
            let expected = operations().run(Portable);
            for level in levels() {
                let got = dispatch_at(level, operations());
                for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    let same = |(&g, &e): (&u32, &u32)| {
                        let nan = |bits| f32::from_bits(bits).is_nan();
                        g == e || nan(g) && nan(e)
                    };
                    assert!(
                        got.iter().zip(expected).all(same),
                        "{level:?}, operation {i}, shift {shift}:\n{got:x?}\n{expected:x?}"
                    );
                }
            }
        }
    }

    #[test]
    fn comparisons_with_nan_are_false() {
        struct Compare([f32; LANES], [f32; LANES]);

        impl Op for Compare {
            type Output = ([f32; LANES], [u32; LANES]);

            #[inline(always)]
            fn run<I: Isa>(self, isa: I) -> Self::Output {
                let (a, b) = (isa.load(&self.0), isa.load(&self.1));
                let (mut chosen, mut node) = ([0.0; LANES], [0; LANES]);
                isa.store(
                    isa.choose(a, b, isa.splat(1.0), isa.splat(2.0)),
                    &mut chosen,
                );
                isa.store_u(isa.descend(isa.splat_u(3), a, b), &mut node);
                (chosen, node)
            }
        }

        let (nan, one) = ([f32::NAN; LANES], [1.0; LANES]);
        for level in levels() {
            for (a, b) in [(nan, one), (one, nan), (nan, nan)] {
                let got = dispatch_at(level, Compare(a, b));
                assert_eq!(got, ([2.0; LANES], [6; LANES]), "{level:?}");
            }
        }
    }

    #[test]
    fn f16_is_rounded_to_nearest() {
        for v in VALUES.into_iter().flat_map(|v| [v, -v]) {
            let expected = f16::from_f32(v).to_f32();
            assert_eq!(round_f16(v).to_bits(), expected.to_bits(), "{v:e}");
        }
    }
}
