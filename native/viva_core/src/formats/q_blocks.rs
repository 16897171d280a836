//! ggml's formats with blocks of 32 and one scale a block.
//!
//! | format | code | value |
//! |---|---|---|
//! | q8_0 | −127…127 | code · d |
//! | q4_0, q5_0 | 0…15, 0…31 | (code − 8) · d, (code − 16) · d |
//! | q4_1, q5_1 | 0…15, 0…31 | code · d + m |
//!
//! d and m are f16. Byte i of 4-bit codes holds element i in its low and element
//! i + 16 in its high half.

use bytemuck::{Pod, Zeroable};

use super::ggml_blocks::{
    Block, Halves, blocks_of, float_codes, nearest_codes, pack_halves, sixteens, type_of,
    unpack_halves, widened,
};
use super::ggml_types::GgmlType;
use crate::simd::columns::{self, Affine, Columns};
use crate::simd::memory::prefetch;
use crate::simd::sink::Sink;
use crate::simd::stats::{absmax_each, range_each};
use crate::simd::{Isa, LANES};

/// Elements from those of a block to what is asked for while they are encoded: sixteen
/// blocks on.
const AHEAD: usize = 16 * 32;

/// The fifth bits of 32 codes, bit i that of element i.
#[inline(always)]
fn pack_fifth(codes: &[u8; 32]) -> [u8; 4] {
    let mut bits = 0u32;
    for (i, &code) in codes.iter().enumerate() {
        bits |= u32::from(code >> 4) << i;
    }
    bits.to_le_bytes()
}

#[inline(always)]
pub(super) fn add_fifth([low, high]: [[u8; 16]; 2], bits: [u8; 4]) -> [[u8; 16]; 2] {
    let bits = u32::from_le_bytes(bits);
    [
        std::array::from_fn(|i| low[i] | ((bits >> i & 1) << 4) as u8),
        std::array::from_fn(|i| high[i] | ((bits >> (i + 16) & 1) << 4) as u8),
    ]
}

/// 1/d; none of zero. Codes times the infinite inverse of a subnormal d have no
/// meaning, and x86-64 makes zeros of them.
enum Inverse {
    Of(f32),
    Infinite,
}

impl Inverse {
    #[inline(always)]
    fn new(d: f32) -> Inverse {
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        if inverse.is_finite() {
            Inverse::Of(inverse)
        } else {
            Inverse::Infinite
        }
    }

    /// Codes of x from code(x, 1/d), cut off at `top`.
    #[inline(always)]
    fn codes<I: Isa>(
        &self,
        isa: I,
        x: &[f32; 32],
        top: f32,
        code: impl Fn(I::F, I::F) -> I::F,
    ) -> [u8; 32] {
        let mut codes = [0u8; 32];
        if let Inverse::Of(inverse) = *self {
            let (inverse, top) = (isa.splat(inverse), isa.splat(top));
            for (x, out) in x.as_chunks().0.iter().zip(codes.as_chunks_mut().0) {
                prefetch(x.as_ptr().wrapping_add(AHEAD), size_of_val(x));
                let code = isa.min(code(isa.load(x), inverse), top);
                isa.store_u8(isa.truncate(code), out);
            }
        }
        codes
    }
}

/// The element of largest magnitude of up to sixteen blocks, the first of several.
#[inline(always)]
fn signed_absmax_each<I: Isa>(isa: I, x: &[f32]) -> I::F {
    let (low, high) = range_each(isa, x, 32, &mut isa.splat(0.0));
    let (mut lows, mut highs, mut signed) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
    isa.store(low, &mut lows);
    isa.store(high, &mut highs);
    let minus_low = isa.sub(isa.splat(0.0), low);
    isa.store(isa.choose(high, minus_low, high, low), &mut signed);
    for (i, x) in x.chunks(32).enumerate() {
        if highs[i] == -lows[i] {
            let first = x.iter().copied().find(|v| v.abs() == highs[i]);
            signed[i] = first.filter(|v| *v != 0.0).unwrap_or(0.0);
        }
    }
    isa.load(&signed)
}

/// Least and greatest; of zeros of both signs the first.
#[inline(always)]
fn range<I: Isa>(isa: I, x: &[f32; 32]) -> (f32, f32) {
    let (halves, _) = x.as_chunks::<LANES>();
    let (a, b) = (isa.load(&halves[0]), isa.load(&halves[1]));
    let (mut lows, mut highs) = ([0f32; LANES], [0f32; LANES]);
    isa.store(isa.min(a, b), &mut lows);
    isa.store(isa.max(a, b), &mut highs);
    let low = lows.into_iter().fold(f32::MAX, f32::min);
    let high = highs.into_iter().fold(f32::MIN, f32::max);
    (first_zero(low, x), first_zero(high, x))
}

/// A zero as the first of those numbers has it.
#[inline(always)]
fn first_zero(v: f32, x: &[f32; 32]) -> f32 {
    match v {
        0.0 => x.iter().copied().find(|&v| v == 0.0).unwrap_or(v),
        _ => v,
    }
}

/// Codes and scales of (code − half) · d, for up to sixteen blocks.
#[inline(always)]
fn symmetric_rtn<I: Isa>(
    isa: I,
    x: &[f32],
    half: f32,
    scales: &mut Halves,
    mut put: impl FnMut(usize, [u8; 2], [u8; 32]),
) {
    let d = isa.div(signed_absmax_each(isa, x), isa.splat(-half));
    let mut each = [0f32; LANES];
    isa.store(d, &mut each);
    let stored = scales.store_each(&each);
    let add = isa.splat(half + 0.5);
    for (i, x) in x.as_chunks().0.iter().enumerate() {
        let codes = Inverse::new(each[i]).codes(
            isa,
            x,
            2.0 * half - 1.0,
            #[inline(always)]
            |v, inverse| isa.add(isa.mul(v, inverse), add),
        );
        put(i, stored[i], codes);
    }
}

/// Codes, scale and least value of code · d + m.
#[inline(always)]
fn affine_rtn<I: Isa>(isa: I, x: &[f32; 32], top: f32) -> (f32, f32, [u8; 32]) {
    let (low, high) = range(isa, x);
    let d = (high - low) / top;
    let (least, half) = (isa.splat(low), isa.splat(0.5));
    let codes = Inverse::new(d).codes(
        isa,
        x,
        top,
        #[inline(always)]
        |v, inverse| isa.add(isa.mul(isa.sub(v, least), inverse), half),
    );
    (d, low, codes)
}

/// Scales of least squared error for codes −half…half − 1.
#[inline(always)]
fn symmetric_search<I: Isa>(isa: I, x: &[f32], half: f32) -> [f32; LANES] {
    let x = Columns::<32>::of(isa, x);
    // The largest element may take the last code, clip, or lie short of it;
    // with the other sign the last code of the shorter side.
    let span = if half > 16.0 { 2.5 } else { 0.5 * half };
    let steps = (0..24).map(move |i| half + 0.9 - span * i as f32 / 23.0);
    let numerators = steps.flat_map(|n| [-n, n - 1.0]);
    columns::symmetric(isa, &x, &Columns::ones(), half, numerators).scale
}

/// Scales and least values of least squared error for codes 0…top.
#[inline(always)]
fn affine_search<I: Isa>(isa: I, x: &[f32], top: f32) -> [(f32, f32); LANES] {
    let x = Columns::<32>::of(isa, x);
    let affine = Affine {
        top,
        from: -0.1 * top,
        step: 0.015 * top,
        tries: 28,
        absolute: false,
        low_at_most_zero: false,
    };
    let found = affine.search(isa, &x, &Columns::ones());
    std::array::from_fn(|i| (found.scale[i], found.low[i]))
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q8_0 {
    pub(super) d: [u8; 2],
    pub(super) codes: [u8; 32],
}

impl Block for Q8_0 {
    const TYPE: &'static GgmlType = type_of::<Q8_0>("q8_0");
    const ABOUT: &'static str = "ggml: 8-bit integers, 8.5 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Q8_0], scales: &mut Halves) {
        let (sign, nearly_half) = (isa.splat_u(1 << 31), 0.499_999_97_f32.to_bits());
        for (x, out) in sixteens(x, out) {
            let d = isa.div(
                absmax_each(isa, x, 32, &mut isa.splat(0.0)),
                isa.splat(127.0),
            );
            let mut each = [0f32; LANES];
            isa.store(d, &mut each);
            let stored = scales.store_each(&each);
            for (i, (x, block)) in blocks_of(x, out).enumerate() {
                // Half away from zero: the truncated sum is a hair short of a half more.
                block.codes = Inverse::new(each[i]).codes(
                    isa,
                    x,
                    127.0,
                    #[inline(always)]
                    |v, inverse| {
                        let v = isa.mul(v, inverse);
                        let signs = isa.and(isa.bits(v), sign);
                        isa.add(v, isa.floats(isa.add_u(signs, isa.splat_u(nearly_half))))
                    },
                );
                block.d = stored[i];
            }
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Q8_0], scales: &mut Halves) {
        for (x, out) in sixteens(x, out) {
            let found = symmetric_search(isa, x, 128.0);
            for ((x, block), d) in blocks_of(x, out).zip(found) {
                block.d = scales.store(d);
                let d = widened(block.d);
                block.codes = nearest_codes(isa, x, (0.0, d), (-128, 127), 0);
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut impl Sink<I>) {
        let d = isa.splat(isa.widen(self.d));
        for codes in self.codes.as_chunks().0 {
            out.push(isa.mul(isa.int_to_float(isa.load_i8(codes)), d));
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q4_0 {
    pub(super) d: [u8; 2],
    pub(super) codes: [u8; 16],
}

impl Block for Q4_0 {
    const TYPE: &'static GgmlType = type_of::<Q4_0>("q4_0");
    const ABOUT: &'static str = "ggml: 4-bit integers, 4.5 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Q4_0], scales: &mut Halves) {
        for (x, out) in sixteens(x, out) {
            symmetric_rtn(
                isa,
                x,
                8.0,
                scales,
                #[inline(always)]
                |i, d, codes| {
                    out[i].d = d;
                    out[i].codes = pack_halves(&codes);
                },
            );
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Q4_0], scales: &mut Halves) {
        for (x, out) in sixteens(x, out) {
            let found = symmetric_search(isa, x, 8.0);
            for ((x, block), d) in blocks_of(x, out).zip(found) {
                block.d = scales.store(d);
                let d = widened(block.d);
                let codes = nearest_codes(isa, x, (0.0, d), (-8, 7), 8);
                block.codes = pack_halves(&codes);
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut impl Sink<I>) {
        let (d, half) = (isa.splat(isa.widen(self.d)), isa.splat(8.0));
        let codes = unpack_halves(&self.codes);
        for codes in codes {
            let code = float_codes(isa, codes);
            out.push(isa.mul(isa.sub(code, half), d));
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q5_0 {
    pub(super) d: [u8; 2],
    pub(super) high: [u8; 4],
    pub(super) codes: [u8; 16],
}

impl Block for Q5_0 {
    const TYPE: &'static GgmlType = type_of::<Q5_0>("q5_0");
    const ABOUT: &'static str = "ggml: 5-bit integers, 5.5 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Q5_0], scales: &mut Halves) {
        for (x, out) in sixteens(x, out) {
            symmetric_rtn(
                isa,
                x,
                16.0,
                scales,
                #[inline(always)]
                |i, d, codes| {
                    out[i].d = d;
                    out[i].high = pack_fifth(&codes);
                    out[i].codes = pack_halves(&codes);
                },
            );
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Q5_0], scales: &mut Halves) {
        for (x, out) in sixteens(x, out) {
            let found = symmetric_search(isa, x, 16.0);
            for ((x, block), d) in blocks_of(x, out).zip(found) {
                block.d = scales.store(d);
                let d = widened(block.d);
                let codes = nearest_codes(isa, x, (0.0, d), (-16, 15), 16);
                block.high = pack_fifth(&codes);
                block.codes = pack_halves(&codes);
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut impl Sink<I>) {
        let (d, half) = (isa.splat(isa.widen(self.d)), isa.splat(16.0));
        let codes = add_fifth(unpack_halves(&self.codes), self.high);
        for codes in codes {
            let code = float_codes(isa, codes);
            out.push(isa.mul(isa.sub(code, half), d));
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q4_1 {
    pub(super) d: [u8; 2],
    pub(super) m: [u8; 2],
    pub(super) codes: [u8; 16],
}

impl Block for Q4_1 {
    const TYPE: &'static GgmlType = type_of::<Q4_1>("q4_1");
    const ABOUT: &'static str = "ggml: 4-bit integers above a least value, 5 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Q4_1], scales: &mut Halves) {
        for (x, block) in blocks_of(x, out) {
            let (d, m, codes) = affine_rtn(isa, x, 15.0);
            block.d = scales.store(d);
            block.m = scales.store(m);
            block.codes = pack_halves(&codes);
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Q4_1], scales: &mut Halves) {
        for (x, out) in sixteens(x, out) {
            let found = affine_search(isa, x, 15.0);
            for ((x, block), (d, m)) in blocks_of(x, out).zip(found) {
                block.d = scales.store(d);
                block.m = scales.store(m);
                let line = (-widened(block.m), widened(block.d));
                let codes = nearest_codes(isa, x, line, (0, 15), 0);
                block.codes = pack_halves(&codes);
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut impl Sink<I>) {
        let (d, m) = (isa.splat(isa.widen(self.d)), isa.splat(isa.widen(self.m)));
        let codes = unpack_halves(&self.codes);
        for codes in codes {
            let code = float_codes(isa, codes);
            out.push(isa.add(isa.mul(code, d), m));
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q5_1 {
    pub(super) d: [u8; 2],
    pub(super) m: [u8; 2],
    pub(super) high: [u8; 4],
    pub(super) codes: [u8; 16],
}

impl Block for Q5_1 {
    const TYPE: &'static GgmlType = type_of::<Q5_1>("q5_1");
    const ABOUT: &'static str = "ggml: 5-bit integers above a least value, 6 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Q5_1], scales: &mut Halves) {
        for (x, block) in blocks_of(x, out) {
            let (d, m, codes) = affine_rtn(isa, x, 31.0);
            block.d = scales.store(d);
            block.m = scales.store(m);
            block.high = pack_fifth(&codes);
            block.codes = pack_halves(&codes);
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Q5_1], scales: &mut Halves) {
        for (x, out) in sixteens(x, out) {
            let found = affine_search(isa, x, 31.0);
            for ((x, block), (d, m)) in blocks_of(x, out).zip(found) {
                block.d = scales.store(d);
                block.m = scales.store(m);
                let line = (-widened(block.m), widened(block.d));
                let codes = nearest_codes(isa, x, line, (0, 31), 0);
                block.high = pack_fifth(&codes);
                block.codes = pack_halves(&codes);
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut impl Sink<I>) {
        let (d, m) = (isa.splat(isa.widen(self.d)), isa.splat(isa.widen(self.m)));
        let codes = add_fifth(unpack_halves(&self.codes), self.high);
        for codes in codes {
            let code = float_codes(isa, codes);
            out.push(isa.add(isa.mul(code, d), m));
        }
    }
}
