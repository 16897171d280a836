//! ggml's K formats: blocks of 256 whose sub-blocks have integer scales of
//! their own.
//!
//! | format | sub-blocks | code | value |
//! |---|---|---|---|
//! | q6_k | 16 of 16 | 6 bits | (code − 32) · d · l, l signed 8-bit |
//! | q5_k, q4_k | 8 of 32 | 5, 4 bits | code · d · l − m · k, 6-bit l and k |
//! | q3_k | 16 of 16 | 3 bits | (code − 4) · d · (l − 32), 6-bit l |
//! | q2_k | 16 of 16 | 2 bits | code · d · l − m · k, 4-bit l and k |
//!
//! d and m are f16. The sub-blocks' scales are searched one by one (see
//! `simd::columns`), rounded to integers under the largest, and codes are chosen
//! anew for what is stored. ggml weights errors, by the element in q2_k, by its
//! square in q3_k and q6_k, and by the root of the mean square added to the
//! element in the others; mse weights all alike.

use bytemuck::{Pod, Zeroable};

use super::ggml_blocks::{
    Block, Halves, blocks_of, float_codes, nearest, nearest_codes, type_of, widened,
};
use super::ggml_types::GgmlType;
use super::k_pack::{
    bit_sixteen, either, low_sixteen, pack_bits, pack_low, pack_pairs, pack_quarters,
    quarter_sixteen, unpack_pairs,
};
use crate::simd::columns::{self, Affine, Columns, Found};
use crate::simd::sink::Sink;
use crate::simd::{Isa, LANES};

/// Codes of 256 elements in sub-blocks of N. `sub(i, x)` gives the codes of
/// sub-block i, or none where its scale is zero: those of the search stay.
#[inline(always)]
fn recoded<const N: usize>(
    x: &[f32; 256],
    found: &Found<N>,
    first_lane: usize,
    sub: impl Fn(usize, &[f32; N]) -> Option<[u8; N]>,
) -> [u8; 256] {
    let mut codes = [0u8; 256];
    let subs = x
        .as_chunks::<N>()
        .0
        .iter()
        .zip(codes.as_chunks_mut::<N>().0);
    for (i, (x, out)) in subs.enumerate() {
        *out = sub(i, x).unwrap_or_else(|| found.codes(first_lane + i));
    }
    codes
}

/// The value of largest magnitude, the first of several.
#[inline(always)]
fn signed_largest(scales: &[f32]) -> f32 {
    let mut largest = 0f32;
    for &scale in scales {
        if scale.abs() > largest.abs() {
            largest = scale;
        }
    }
    largest
}

/// (0…top) / largest for positive scales; nothing above zero gives zeros.
#[inline(always)]
fn integers<const S: usize>(scales: &[f32], top: f32) -> (f32, [u8; S]) {
    let largest = scales
        .iter()
        .copied()
        .fold(0.0, |a, v| if v > a { v } else { a });
    let inverse = if largest > 0.0 { top / largest } else { 0.0 };
    let integers = std::array::from_fn(|i| (nearest(inverse * scales[i]) as u8).min(top as u8));
    (largest / top, integers)
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q6K {
    pub(super) low: [u8; 128],
    pub(super) high: [u8; 64],
    pub(super) scales: [u8; 16],
    pub(super) d: [u8; 2],
}

/// ggml tries the largest element at −32 and from −31.1 to −32.9.
fn q6_numerators() -> impl Iterator<Item = f32> {
    let steps = (-9..=9).filter(|&i| i != 0);
    [-32.0]
        .into_iter()
        .chain(steps.map(|i| -(32.0 + 0.1 * i as f32)))
}

impl Q6K {
    #[inline(always)]
    fn fill<I: Isa>(&mut self, isa: I, x: &[f32; 256], found: &Found<16>, scales: &mut Halves) {
        scales.check(&found.scale);
        let largest = signed_largest(&found.scale);
        if largest.abs() < columns::LEAST {
            return;
        }
        let inverse = -128.0 / largest;
        self.d = scales.store(1.0 / inverse);
        let d = widened(self.d);
        self.scales = found
            .scale
            .map(|scale| nearest(inverse * scale).min(127) as u8);
        let codes = recoded(
            x,
            found,
            0,
            #[inline(always)]
            |i, x| {
                let d = d * f32::from(self.scales[i] as i8);
                if d == 0.0 {
                    return None;
                }
                Some(nearest_codes(isa, x, (0.0, d), (-32, 31), 32))
            },
        );
        self.low = pack_low::<64>(&codes);
        self.high = pack_quarters(&codes, 4);
    }
}

impl Block for Q6K {
    const TYPE: &'static GgmlType = type_of::<Q6K>("q6_k");
    const ABOUT: &'static str = "ggml: 6-bit integers, 6.56 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Q6K], scales: &mut Halves) {
        for (x, block) in blocks_of(x, out) {
            let columns = Columns::of(isa, x);
            let weights = columns.map(
                isa,
                #[inline(always)]
                |v| isa.mul(v, v),
            );
            let found = columns::symmetric(isa, &columns, &weights, 32.0, q6_numerators());
            block.fill(isa, x, &found, scales);
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Q6K], scales: &mut Halves) {
        for (x, block) in blocks_of(x, out) {
            let columns = Columns::of(isa, x);
            let steps = (0..24).map(|i| 33.0 - 0.2 * i as f32);
            let numerators = steps.flat_map(|n| [-n, n - 1.0]);
            let found = columns::symmetric(isa, &columns, &Columns::ones(), 32.0, numerators);
            block.fill(isa, x, &found, scales);
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut impl Sink<I>) {
        let (d, offset) = (isa.splat(isa.widen(self.d)), isa.splat(32.0));
        let mut scales = [0f32; LANES];
        let integers = isa.int_to_float(isa.load_i8(&self.scales));
        isa.store(isa.mul(d, integers), &mut scales);
        for (i, &d) in scales.iter().enumerate() {
            let low = low_sixteen::<64>(&self.low, i);
            let codes = either(low, quarter_sixteen(&self.high, i).map(|c| c << 4));
            let code = isa.sub(float_codes(isa, codes), offset);
            out.push(isa.mul(isa.splat(d), code));
        }
    }
}

/// Scales of q4_k and q5_k, as they lie before the codes.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Pairs {
    pub(super) d: [u8; 2],
    pub(super) m: [u8; 2],
    pub(super) packed: [u8; 12],
}

impl Pairs {
    /// Stores what was found and gives the codes under it.
    #[inline(always)]
    fn fill<I: Isa>(
        &mut self,
        isa: I,
        x: &[f32; 256],
        found: &Found<32>,
        first_lane: usize,
        top: i32,
        scales: &mut Halves,
    ) -> [u8; 256] {
        let lanes = first_lane..first_lane + 8;
        let minima = found.low.map(|low| -low);
        let (d, l) = integers(&found.scale[lanes.clone()], 63.0);
        let (m, k) = integers(&minima[lanes], 63.0);
        self.d = scales.store(d);
        self.m = scales.store(m);
        self.packed = pack_pairs(l, k);
        let (d, m) = (widened(self.d), widened(self.m));
        recoded(
            x,
            found,
            first_lane,
            #[inline(always)]
            |i, x| {
                let d = d * f32::from(l[i]);
                if d == 0.0 {
                    return None;
                }
                Some(nearest_codes(isa, x, (m * f32::from(k[i]), d), (0, top), 0))
            },
        )
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, codes: impl Fn(usize) -> [u8; LANES], out: &mut impl Sink<I>) {
        let (d, m) = (isa.widen(self.d), isa.widen(self.m));
        let integers = isa.int_to_float(isa.load_u8(&unpack_pairs(&self.packed)));
        let by = std::array::from_fn(|i| if i < 8 { d } else { m });
        let mut numbers = [0f32; LANES];
        isa.store(isa.mul(integers, isa.load(&by)), &mut numbers);
        for i in 0..LANES {
            let (d, m) = (isa.splat(numbers[i / 2]), isa.splat(numbers[8 + i / 2]));
            let code = float_codes(isa, codes(i));
            out.push(isa.sub(isa.mul(d, code), m));
        }
    }
}

/// √mean(x²) + |x|, over each sub-block.
#[inline(always)]
fn pair_weights<I: Isa>(isa: I, x: &Columns<32>) -> Columns<32> {
    let root = x.root_mean_square(isa);
    x.map(
        isa,
        #[inline(always)]
        |v| isa.add(root, isa.abs(v)),
    )
}

const fn ggml_search(top: f32, from: f32, tries: u32, absolute: bool) -> Affine {
    Affine {
        top,
        from,
        step: 0.1,
        tries,
        absolute,
        low_at_most_zero: true,
    }
}

const fn mse_search(top: f32) -> Affine {
    Affine {
        top,
        from: -0.15 * top,
        step: 0.01 * top,
        tries: 40,
        absolute: false,
        low_at_most_zero: true,
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q5K {
    pub(super) scales: Pairs,
    pub(super) high: [u8; 32],
    pub(super) low: [u8; 128],
}

impl Q5K {
    #[inline(always)]
    fn fill<I: Isa>(
        &mut self,
        isa: I,
        x: &[f32; 256],
        found: &Found<32>,
        lane: usize,
        scales: &mut Halves,
    ) {
        let codes = self.scales.fill(isa, x, found, lane, 31, scales);
        self.high = pack_bits(&codes, 4);
        self.low = pack_low::<32>(&codes);
    }
}

impl Block for Q5K {
    const TYPE: &'static GgmlType = type_of::<Q5K>("q5_k");
    const ABOUT: &'static str = "ggml: 5-bit integers above minima, 5.5 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Q5K], scales: &mut Halves) {
        for (x, out) in x.chunks(512).zip(out.chunks_mut(2)) {
            let columns = Columns::of(isa, x);
            let weights = pair_weights(isa, &columns);
            let found = ggml_search(31.0, -0.5, 15, false).search(isa, &columns, &weights);
            for (i, (x, block)) in blocks_of(x, out).enumerate() {
                block.fill(isa, x, &found, 8 * i, scales);
            }
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Q5K], scales: &mut Halves) {
        for (x, out) in x.chunks(512).zip(out.chunks_mut(2)) {
            let columns = Columns::of(isa, x);
            let found = mse_search(31.0).search(isa, &columns, &Columns::ones());
            for (i, (x, block)) in blocks_of(x, out).enumerate() {
                block.fill(isa, x, &found, 8 * i, scales);
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut impl Sink<I>) {
        self.scales.decode(
            isa,
            #[inline(always)]
            |i| {
                let high = bit_sixteen(&self.high, i).map(|c| c << 4);
                either(low_sixteen::<32>(&self.low, i), high)
            },
            out,
        );
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q4K {
    pub(super) scales: Pairs,
    pub(super) codes: [u8; 128],
}

impl Block for Q4K {
    const TYPE: &'static GgmlType = type_of::<Q4K>("q4_k");
    const ABOUT: &'static str = "ggml: 4-bit integers above minima, 4.5 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Q4K], scales: &mut Halves) {
        for (x, out) in x.chunks(512).zip(out.chunks_mut(2)) {
            let columns = Columns::of(isa, x);
            let weights = pair_weights(isa, &columns);
            let found = ggml_search(15.0, -1.0, 20, false).search(isa, &columns, &weights);
            for (i, (x, block)) in blocks_of(x, out).enumerate() {
                let codes = block.scales.fill(isa, x, &found, 8 * i, 15, scales);
                block.codes = pack_low::<32>(&codes);
            }
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Q4K], scales: &mut Halves) {
        for (x, out) in x.chunks(512).zip(out.chunks_mut(2)) {
            let columns = Columns::of(isa, x);
            let found = mse_search(15.0).search(isa, &columns, &Columns::ones());
            for (i, (x, block)) in blocks_of(x, out).enumerate() {
                let codes = block.scales.fill(isa, x, &found, 8 * i, 15, scales);
                block.codes = pack_low::<32>(&codes);
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut impl Sink<I>) {
        self.scales.decode(
            isa,
            #[inline(always)]
            |i| low_sixteen::<32>(&self.codes, i),
            out,
        );
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q3K {
    pub(super) high: [u8; 32],
    pub(super) low: [u8; 64],
    pub(super) scales: [u8; 12],
    pub(super) d: [u8; 2],
}

impl Q3K {
    #[inline(always)]
    fn fill<I: Isa>(&mut self, isa: I, x: &[f32; 256], found: &Found<16>, scales: &mut Halves) {
        scales.check(&found.scale);
        let largest = signed_largest(&found.scale);
        let mut l = [0i32; 16];
        if largest == 0.0 {
            // Their bits are zeros, which say −32.
            l = [-32; 16];
        } else {
            let inverse = -32.0 / largest;
            self.d = scales.store(1.0 / inverse);
            l = l.map(|_| 0);
            for (l, scale) in l.iter_mut().zip(found.scale) {
                *l = i32::from(nearest(inverse * scale) as i8).clamp(-32, 31);
            }
        }
        for (i, l) in l.iter().enumerate() {
            let l = (l + 32) as u8;
            self.scales[i % 8] |= (l & 15) << (4 * (i / 8));
            self.scales[8 + i % 4] |= l >> 4 << (2 * (i / 4));
        }
        let d = widened(self.d);
        let codes = recoded(
            x,
            found,
            0,
            #[inline(always)]
            |i, x| {
                let d = d * l[i] as f32;
                if d == 0.0 {
                    return None;
                }
                Some(nearest_codes(isa, x, (0.0, d), (-4, 3), 4))
            },
        );
        self.high = pack_bits(&codes, 2);
        self.low = pack_quarters(&codes, 0);
    }

    /// What d is multiplied with for each sub-block.
    #[inline(always)]
    pub(super) fn multiples(&self) -> [i32; 16] {
        std::array::from_fn(|i| {
            let low = self.scales[i % 8] >> (4 * (i / 8)) & 15;
            let high = self.scales[8 + i % 4] >> (2 * (i / 4)) & 3;
            i32::from(low | high << 4) - 32
        })
    }
}

impl Block for Q3K {
    const TYPE: &'static GgmlType = type_of::<Q3K>("q3_k");
    const ABOUT: &'static str = "ggml: 3-bit integers, 3.44 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Q3K], scales: &mut Halves) {
        for (x, block) in blocks_of(x, out) {
            let found = columns::descent(isa, &Columns::of(isa, x), 4.0);
            block.fill(isa, x, &found, scales);
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Q3K], scales: &mut Halves) {
        for (x, block) in blocks_of(x, out) {
            let columns = Columns::of(isa, x);
            let steps = (0..24).map(|i| 4.8 - 0.1 * i as f32);
            let numerators = steps.flat_map(|n| [-n, n - 1.0]);
            let found = columns::symmetric(isa, &columns, &Columns::ones(), 4.0, numerators);
            block.fill(isa, x, &found, scales);
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut impl Sink<I>) {
        let (d, offset) = (isa.widen(self.d), isa.splat(4.0));
        for (i, &l) in self.multiples().iter().enumerate() {
            let high = bit_sixteen(&self.high, i).map(|c| c << 2);
            let codes = either(quarter_sixteen(&self.low, i), high);
            let code = isa.sub(float_codes(isa, codes), offset);
            out.push(isa.mul(isa.splat(d * l as f32), code));
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q2K {
    /// l in the low half, k in the high one.
    pub(super) scales: [u8; 16],
    pub(super) codes: [u8; 64],
    pub(super) d: [u8; 2],
    pub(super) m: [u8; 2],
}

impl Q2K {
    #[inline(always)]
    fn fill<I: Isa>(&mut self, isa: I, x: &[f32; 256], found: &Found<16>, scales: &mut Halves) {
        let (d, l) = integers::<16>(&found.scale, 15.0);
        let (m, k) = integers::<16>(&found.low.map(|low| -low), 15.0);
        self.d = scales.store(d);
        self.m = scales.store(m);
        self.scales = std::array::from_fn(|i| l[i] | k[i] << 4);
        let (d, m) = (widened(self.d), widened(self.m));
        let codes = recoded(
            x,
            found,
            0,
            #[inline(always)]
            |i, x| {
                let d = d * f32::from(l[i]);
                if d == 0.0 {
                    return None;
                }
                Some(nearest_codes(isa, x, (m * f32::from(k[i]), d), (0, 3), 0))
            },
        );
        self.codes = pack_quarters(&codes, 0);
    }
}

impl Block for Q2K {
    const TYPE: &'static GgmlType = type_of::<Q2K>("q2_k");
    const ABOUT: &'static str = "ggml: 2-bit integers above minima, 2.63 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Q2K], scales: &mut Halves) {
        for (x, block) in blocks_of(x, out) {
            let columns = Columns::of(isa, x);
            let weights = columns.map(
                isa,
                #[inline(always)]
                |v| isa.abs(v),
            );
            let found = ggml_search(3.0, -0.5, 15, true).search(isa, &columns, &weights);
            block.fill(isa, x, &found, scales);
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Q2K], scales: &mut Halves) {
        for (x, block) in blocks_of(x, out) {
            let columns = Columns::of(isa, x);
            let found = mse_search(3.0).search(isa, &columns, &Columns::ones());
            block.fill(isa, x, &found, scales);
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut impl Sink<I>) {
        let (d, m) = (isa.widen(self.d), isa.widen(self.m));
        for (i, &scales) in self.scales.iter().enumerate() {
            let d = isa.splat(d * f32::from(scales & 15));
            let m = isa.splat(m * f32::from(scales >> 4));
            let code = float_codes(isa, quarter_sixteen(&self.codes, i));
            out.push(isa.sub(isa.mul(d, code), m));
        }
    }
}
