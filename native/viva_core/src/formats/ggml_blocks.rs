//! The block formats of ggml, as GGUF files and llama.cpp hold them.
//!
//! Rows are cut into blocks of 32 elements, or of 256 (see `k_quants` and
//! `iq4`); a block holds its codes and its scales side by side. Method rtn gives
//! the bytes of ggml's own quantizers as a compiler without fused
//! multiply-add builds them (x86-64's baseline); mse searches for less error.
//!
//! | format | code | value |
//! |---|---|---|
//! | q8_0 | −127…127 | code · d |
//! | q4_0, q5_0 | 0…15, 0…31 | (code − 8) · d, (code − 16) · d |
//! | q4_1, q5_1 | 0…15, 0…31 | code · d + m |
//!
//! d and m are f16. Of a block of 4-bit codes byte i holds element i in its low
//! and element i + 16 in its high half.

use std::marker::PhantomData;

use bytemuck::{Pod, Zeroable};
use half::f16;

use crate::error::{Error, Result};
use crate::format::{
    Decode, Extremes, Format, Granularity, Method, OptionValue, Options, Part, Quantized, Scale,
    Spec,
};
use crate::formats::ggml_types::GgmlType;
use crate::method::mse::ROUND;
use crate::simd::columns::{self, Affine, Columns};
use crate::simd::stats::absmax;
use crate::simd::{Isa, LANES, Op, dispatch};
use crate::tensor::{DType, element_count};

/// One block, byte for byte as it lies in a file.
pub trait Block: Pod + Send + Sync {
    const TYPE: &'static GgmlType;
    /// One line for a list of formats.
    const ABOUT: &'static str;

    /// Encodes whole blocks as ggml does.
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Self], scales: &mut Halves);

    /// Encodes whole blocks with scales searched for the least squared error.
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Self], scales: &mut Halves);

    /// The values of one block.
    fn decode<I: Isa>(&self, isa: I, out: &mut [f32]);
}

/// ggml's type of that name, whose size the block must have.
pub(super) const fn type_of<B>(name: &str) -> &'static GgmlType {
    match GgmlType::by_name(name) {
        Some(found) if found.block_bytes == size_of::<B>() => found,
        _ => panic!("no type of that name and size"),
    }
}

/// Stores scales as f16 and remembers one that f16 cannot hold.
#[derive(Default)]
pub struct Halves {
    too_large: Option<f32>,
}

impl Halves {
    #[inline(always)]
    pub(super) fn store(&mut self, scale: f32) -> [u8; 2] {
        let half = f16::from_f32(scale);
        if !half.is_finite() {
            self.too_large = Some(scale);
        }
        half.to_le_bytes()
    }
}

/// The scale that [`Halves::store`] stored.
#[inline(always)]
pub(super) fn widened(half: [u8; 2]) -> f32 {
    f16::from_le_bytes(half).to_f32()
}

/// The format of a kind of block.
pub struct Blocks<B>(PhantomData<B>);

impl<B: Block> Blocks<B> {
    /// The registry's entry.
    pub const FORMAT: &'static dyn Format = &Blocks::<B>(PhantomData);
}

impl<B: Block> Format for Blocks<B> {
    fn name(&self) -> &'static str {
        B::TYPE.name
    }

    fn about(&self) -> &'static str {
        B::ABOUT
    }

    fn resolve(&self, options: &mut Options) -> Result<Spec> {
        let methods = [("rtn", Method::Rtn), ("mse", Method::Mse)];
        Ok(Spec {
            format: self.name().into(),
            method: options.take_name("method", &methods, Method::Rtn)?,
            granularity: Granularity::Block(B::TYPE.block_len),
            symmetric: false,
            scale: Scale::Step,
            scale_dtype: DType::F16,
            double_quant: false,
        })
    }

    fn options(&self, spec: &Spec) -> Vec<(&'static str, OptionValue)> {
        vec![("method", spec.method.into())]
    }

    fn check_shape(&self, _spec: &Spec, shape: &[usize]) -> Result<()> {
        let row = shape.last().copied().unwrap_or(1);
        let block = B::TYPE.block_len;
        match row % block {
            0 => Ok(()),
            _ => Err(Error::Indivisible { row, block }),
        }
    }

    fn parts(&self, spec: &Spec, shape: &[usize]) -> Result<Vec<Part>> {
        self.check_shape(spec, shape)?;
        let n = element_count(shape)?;
        let row = shape.last().copied().unwrap_or(1);
        let shape = if n == 0 {
            vec![0, 0]
        } else {
            let bytes = B::TYPE.row_bytes(row).ok_or_else(|| Error::ShapeOverflow {
                shape: shape.to_vec(),
            })?;
            vec![n / row, bytes]
        };
        Ok(vec![Part {
            name: "blocks",
            dtype: DType::U8,
            shape,
            block_bits: 8 * B::TYPE.block_bytes,
        }])
    }

    fn encode(
        &self,
        spec: &Spec,
        _block_len: usize,
        _extremes: Option<Extremes>,
        x: &[f32],
        parts: &mut [&mut [u8]],
    ) -> Result<()> {
        let mut scales = Halves::default();
        dispatch(EncodeBlocks::<B> {
            method: spec.method,
            x,
            out: bytemuck::cast_slice_mut(parts[0]),
            scales: &mut scales,
        });
        match scales.too_large {
            None => Ok(()),
            // The squares of large weights are past f32, and so is what they give.
            Some(scale) => Err(Error::ScaleOverflow {
                scale: if scale.is_finite() {
                    scale.abs()
                } else {
                    f32::MAX
                },
                dtype: DType::F16.name().into(),
            }),
        }
    }

    fn decoder<'a>(&'a self, q: &'a Quantized) -> Result<Box<dyn Decode + 'a>> {
        Ok(Box::new(Decoder::<B> {
            blocks: bytemuck::cast_slice(q.part("blocks")?.bytes()),
        }))
    }
}

/// Elements of the largest block.
const LONGEST: usize = 256;

struct EncodeBlocks<'a, B> {
    method: Method,
    x: &'a [f32],
    out: &'a mut [B],
    scales: &'a mut Halves,
}

impl<B: Block> Op for EncodeBlocks<'_, B> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        B::encode(isa, self.x, self.out, self.scales);
        if self.method == Method::Mse {
            let mut searched = vec![B::zeroed(); self.out.len()];
            // What f16 cannot hold decodes to no number, and loses.
            B::search(isa, self.x, &mut searched, &mut Halves::default());
            let blocks = self.x.chunks_exact(B::TYPE.block_len).zip(self.out);
            for ((x, block), found) in blocks.zip(searched) {
                if error(isa, x, &found) < error(isa, x, block) {
                    *block = found;
                }
            }
        }
    }
}

/// Σ(x − value)².
#[inline(always)]
fn error<I: Isa, B: Block>(isa: I, x: &[f32], block: &B) -> f32 {
    let mut values = [0f32; LONGEST];
    let values = &mut values[..x.len()];
    block.decode(isa, values);
    let mut sum = isa.splat(0.0);
    for (x, y) in x.as_chunks().0.iter().zip(values.as_chunks().0) {
        let e = isa.sub(isa.load(x), isa.load(y));
        sum = isa.add(sum, isa.mul(e, e));
    }
    isa.sum(sum)
}

struct Decoder<'a, B> {
    blocks: &'a [B],
}

impl<B: Block> Decode for Decoder<'_, B> {
    fn decode(&self, start: usize, out: &mut [f32]) {
        dispatch(DecodeBlocks {
            blocks: self.blocks,
            start,
            out,
        });
    }
}

struct DecodeBlocks<'a, B> {
    blocks: &'a [B],
    start: usize,
    out: &'a mut [f32],
}

impl<B: Block> Op for DecodeBlocks<'_, B> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let len = B::TYPE.block_len;
        let (mut at, mut out) = (self.start, self.out);
        while !out.is_empty() {
            let (block, from) = (&self.blocks[at / len], at % len);
            let n = (len - from).min(out.len());
            let (run, rest) = out.split_at_mut(n);
            if n == len {
                block.decode(isa, run);
            } else {
                let mut whole = [0f32; LONGEST];
                block.decode(isa, &mut whole[..len]);
                run.copy_from_slice(&whole[from..from + n]);
            }
            out = rest;
            at += n;
        }
    }
}

/// value(code) of codes in their order.
#[inline(always)]
pub(super) fn decode_lanes<I: Isa, const R: usize>(
    isa: I,
    codes: [[u8; LANES]; R],
    out: &mut [f32],
    value: impl Fn(I::F) -> I::F,
) {
    for (codes, out) in codes.iter().zip(out.as_chunks_mut().0) {
        isa.store(value(isa.int_to_float(isa.load_u8(codes))), out);
    }
}

/// The elements of one block, N of them.
#[inline(always)]
pub(super) fn blocks_of<'a, const N: usize, B>(
    x: &'a [f32],
    out: &'a mut [B],
) -> impl Iterator<Item = (&'a [f32; N], &'a mut B)> {
    x.as_chunks::<N>().0.iter().zip(out)
}

/// Sixteen codes in the low halves, the next sixteen in the high ones.
#[inline(always)]
pub(super) fn pack_halves(codes: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|i| (codes[i] & 15) | (codes[i + 16] << 4))
}

#[inline(always)]
pub(super) fn unpack_halves(packed: &[u8; 16]) -> [[u8; 16]; 2] {
    [packed.map(|b| b & 15), packed.map(|b| b >> 4)]
}

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
fn add_fifth([low, high]: [[u8; 16]; 2], bits: [u8; 4]) -> [[u8; 16]; 2] {
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
    fn codes(&self, x: &[f32; 32], top: i32, code: impl Fn(f32, f32) -> f32) -> [u8; 32] {
        match *self {
            Inverse::Of(inverse) => x.map(|v| (code(v, inverse) as i32).min(top) as u8),
            Inverse::Infinite => [0; 32],
        }
    }
}

/// The element of largest magnitude, the first of several.
#[inline(always)]
fn signed_absmax<I: Isa>(isa: I, x: &[f32; 32]) -> f32 {
    let most = absmax(isa, x);
    if most == 0.0 {
        return 0.0;
    }
    x.iter().copied().find(|v| v.abs() == most).unwrap_or(most)
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
    let first_zero = |v: f32| match v {
        0.0 => x.iter().copied().find(|&v| v == 0.0).unwrap_or(v),
        _ => v,
    };
    (first_zero(low), first_zero(high))
}

/// Codes and scale of (code − half) · d.
#[inline(always)]
fn symmetric_rtn<I: Isa>(isa: I, x: &[f32; 32], half: f32) -> (f32, [u8; 32]) {
    let d = signed_absmax(isa, x) / -half;
    let top = 2 * half as i32 - 1;
    let codes = Inverse::new(d).codes(x, top, |v, inverse| v * inverse + (half + 0.5));
    (d, codes)
}

/// Codes, scale and least value of code · d + m.
#[inline(always)]
fn affine_rtn<I: Isa>(isa: I, x: &[f32; 32], top: f32) -> (f32, f32, [u8; 32]) {
    let (low, high) = range(isa, x);
    let d = (high - low) / top;
    let codes = Inverse::new(d).codes(x, top as i32, |v, inverse| (v - low) * inverse + 0.5);
    (d, low, codes)
}

/// The nearest integer, ties to even, in the low bits of a sum: what ggml takes
/// for any argument, also one too large for it.
#[inline(always)]
pub(super) fn nearest(v: f32) -> i32 {
    ((v + ROUND).to_bits() & 0x007f_ffff) as i32 - 0x0040_0000
}

/// Codes 0…top of (x + add) / d.
#[inline(always)]
pub(super) fn nearest_codes<const N: usize>(x: &[f32; N], add: f32, d: f32, top: i32) -> [u8; N] {
    x.map(|v| nearest((v + add) / d).clamp(0, top) as u8)
}

/// Sixteen blocks at a time, for the searches of `simd::columns`.
#[inline(always)]
pub(super) fn sixteens<'a, B: Block>(
    x: &'a [f32],
    out: &'a mut [B],
) -> impl Iterator<Item = (&'a [f32], &'a mut [B])> {
    x.chunks(LANES * B::TYPE.block_len)
        .zip(out.chunks_mut(LANES))
}

/// Scales of least squared error for codes −half…half − 1.
#[inline(always)]
fn symmetric_search<I: Isa>(isa: I, x: &[f32], half: f32) -> [f32; LANES] {
    let x = Columns::<32>::of(x);
    // The largest element may take the last code, clip, or lie short of it;
    // with the other sign the last code of the shorter side.
    let span = if half > 16.0 { 2.5 } else { 0.5 * half };
    let steps = (0..24).map(move |i| half + 0.9 - span * i as f32 / 23.0);
    let numerators = steps.flat_map(|n| [-n, n - 1.0]);
    columns::symmetric(isa, &x, &x.map(|_| 1.0), half, numerators).scale
}

/// Scales and least values of least squared error for codes 0…top.
#[inline(always)]
fn affine_search<I: Isa>(isa: I, x: &[f32], top: f32) -> [(f32, f32); LANES] {
    let x = Columns::<32>::of(x);
    let affine = Affine {
        top,
        from: -0.1 * top,
        step: 0.015 * top,
        tries: 28,
        absolute: false,
        low_at_most_zero: false,
    };
    let found = affine.search(isa, &x, &x.map(|_| 1.0));
    std::array::from_fn(|i| (found.scale[i], found.low[i]))
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q8_0 {
    d: [u8; 2],
    codes: [u8; 32],
}

impl Block for Q8_0 {
    const TYPE: &'static GgmlType = type_of::<Q8_0>("q8_0");
    const ABOUT: &'static str = "ggml: 8-bit integers, 8.5 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Q8_0], scales: &mut Halves) {
        for (x, block) in blocks_of(x, out) {
            let d = absmax(isa, x) / 127.0;
            // Half away from zero: the truncated sum is a hair short of a half more.
            block.codes = Inverse::new(d).codes(x, 127, |v, inverse| {
                let v = v * inverse;
                v + 0.499_999_97_f32.copysign(v)
            });
            block.d = scales.store(d);
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Q8_0], scales: &mut Halves) {
        for (x, out) in sixteens(x, out) {
            let found = symmetric_search(isa, x, 128.0);
            for ((x, block), d) in blocks_of(x, out).zip(found) {
                block.d = scales.store(d);
                let d = widened(block.d);
                block.codes = x.map(|v| nearest(v / d).clamp(-128, 127) as u8);
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut [f32]) {
        let d = isa.splat(widened(self.d));
        for (codes, out) in self.codes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
            isa.store(isa.mul(isa.int_to_float(isa.load_i8(codes)), d), out);
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q4_0 {
    d: [u8; 2],
    codes: [u8; 16],
}

impl Block for Q4_0 {
    const TYPE: &'static GgmlType = type_of::<Q4_0>("q4_0");
    const ABOUT: &'static str = "ggml: 4-bit integers, 4.5 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Q4_0], scales: &mut Halves) {
        for (x, block) in blocks_of(x, out) {
            let (d, codes) = symmetric_rtn(isa, x, 8.0);
            block.d = scales.store(d);
            block.codes = pack_halves(&codes);
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Q4_0], scales: &mut Halves) {
        for (x, out) in sixteens(x, out) {
            let found = symmetric_search(isa, x, 8.0);
            for ((x, block), d) in blocks_of(x, out).zip(found) {
                block.d = scales.store(d);
                let d = widened(block.d);
                let codes = x.map(|v| (nearest(v / d) + 8).clamp(0, 15) as u8);
                block.codes = pack_halves(&codes);
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut [f32]) {
        let (d, half) = (isa.splat(widened(self.d)), isa.splat(8.0));
        let codes = unpack_halves(&self.codes);
        decode_lanes(isa, codes, out, |code| isa.mul(isa.sub(code, half), d));
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q5_0 {
    d: [u8; 2],
    high: [u8; 4],
    codes: [u8; 16],
}

impl Block for Q5_0 {
    const TYPE: &'static GgmlType = type_of::<Q5_0>("q5_0");
    const ABOUT: &'static str = "ggml: 5-bit integers, 5.5 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Q5_0], scales: &mut Halves) {
        for (x, block) in blocks_of(x, out) {
            let (d, codes) = symmetric_rtn(isa, x, 16.0);
            block.d = scales.store(d);
            block.high = pack_fifth(&codes);
            block.codes = pack_halves(&codes);
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Q5_0], scales: &mut Halves) {
        for (x, out) in sixteens(x, out) {
            let found = symmetric_search(isa, x, 16.0);
            for ((x, block), d) in blocks_of(x, out).zip(found) {
                block.d = scales.store(d);
                let d = widened(block.d);
                let codes = x.map(|v| (nearest(v / d) + 16).clamp(0, 31) as u8);
                block.high = pack_fifth(&codes);
                block.codes = pack_halves(&codes);
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut [f32]) {
        let (d, half) = (isa.splat(widened(self.d)), isa.splat(16.0));
        let codes = add_fifth(unpack_halves(&self.codes), self.high);
        decode_lanes(isa, codes, out, |code| isa.mul(isa.sub(code, half), d));
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q4_1 {
    d: [u8; 2],
    m: [u8; 2],
    codes: [u8; 16],
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
                let codes = nearest_codes(x, -widened(block.m), widened(block.d), 15);
                block.codes = pack_halves(&codes);
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut [f32]) {
        let (d, m) = (isa.splat(widened(self.d)), isa.splat(widened(self.m)));
        let codes = unpack_halves(&self.codes);
        decode_lanes(isa, codes, out, |code| isa.add(isa.mul(code, d), m));
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Q5_1 {
    d: [u8; 2],
    m: [u8; 2],
    high: [u8; 4],
    codes: [u8; 16],
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
                let codes = nearest_codes(x, -widened(block.m), widened(block.d), 31);
                block.high = pack_fifth(&codes);
                block.codes = pack_halves(&codes);
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut [f32]) {
        let (d, m) = (isa.splat(widened(self.d)), isa.splat(widened(self.m)));
        let codes = add_fifth(unpack_halves(&self.codes), self.high);
        decode_lanes(isa, codes, out, |code| isa.add(isa.mul(code, d), m));
    }
}
