//! The block formats of ggml, as GGUF files and llama.cpp hold them.
//!
//! Rows are cut into blocks of 32 elements (`q_blocks`, `iq4`) or of 256
//! (`k_quants`, `iq4`); a block holds its codes and its scales side by side.
//! Method rtn gives the bytes of ggml's own quantizers as C defines them, every
//! operation rounded by itself. (Where a compiler fuses multiplications with
//! additions, as for aarch64, ggml's own codes differ here and there.) mse
//! searches for the least squared error, and is never worse in any block.

use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::Pod;
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::error::{Error, Result};
use crate::format::{
    Decode, Extremes, Format, Granularity, Input, Method, OptionValue, Options, Part, Quantized,
    Scale, Spec, Values, Zero,
};
use crate::formats::ggml_steps::{Rows, StepBlock};
use crate::formats::ggml_types::GgmlType;
use crate::method::mse::ROUND;
use crate::simd::sink::{Out, Sink, Source, Stored, push_all};
use crate::simd::{Isa, LANES, Op, columns, dispatch};
use crate::steps::{StepForm, Steps};
use crate::tensor::{DType, element_count};

/// One block, byte for byte as it lies in a file.
pub trait Block: Pod + Send + Sync + StepBlock {
    const TYPE: &'static GgmlType;
    /// One line for a list of formats.
    const ABOUT: &'static str;

    /// Encodes whole blocks as ggml does.
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Self], scales: &mut Halves);

    /// Encodes whole blocks with scales searched for the least squared error.
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Self], scales: &mut Halves);

    /// The values of one block.
    fn decode<I: Isa>(&self, isa: I, out: &mut impl Sink<I>);
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

    /// The same of sixteen.
    #[inline(always)]
    pub(super) fn store_each(&mut self, scales: &[f32; LANES]) -> [[u8; 2]; LANES] {
        let mut halves = [f16::ZERO; LANES];
        halves.convert_from_f32_slice(scales);
        for (half, &scale) in halves.iter().zip(scales) {
            if !half.is_finite() {
                self.too_large = Some(scale);
            }
        }
        halves.map(f16::to_le_bytes)
    }

    /// Notes scales that are no numbers: sums of squares were past f32.
    #[inline(always)]
    pub(super) fn check(&mut self, scales: &[f32]) {
        if let Some(&scale) = scales.iter().find(|s| !s.is_finite()) {
            self.too_large = Some(scale);
        }
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
            zero: Zero::Integer,
            scale: Scale::Step,
            scale_dtype: DType::F16,
            double_quant: false,
            act_order: false,
            values: Values::Source,
            input: Input::default(),
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
    block.decode(isa, &mut Stored::new(isa, values));
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
    fn decode_into(&self, start: usize, out: Out) {
        let range = start..start + out.values.len();
        out.fill(ValuesOf {
            blocks: self.blocks,
            range,
        });
    }

    fn steps(&self) -> Option<&dyn Steps> {
        Some(self)
    }
}

impl<B: Block> Steps for Decoder<'_, B> {
    fn form(&self) -> StepForm {
        B::FORM
    }

    fn codes(&self, row: usize, out: &mut [u8]) {
        Rows(self.blocks).codes(row, out);
    }

    fn numbers(&self, row: usize, scales: &mut [f32], lows: &mut [f32]) {
        Rows(self.blocks).numbers(row, scales, lows);
    }

    fn units(&self, row: usize, scales: &mut [f32], lows: &mut [f32]) {
        Rows(self.blocks).units(row, scales, lows);
    }
}

struct ValuesOf<'a, B> {
    blocks: &'a [B],
    range: Range<usize>,
}

impl<B: Block> Source for ValuesOf<'_, B> {
    #[inline(always)]
    fn pour<I: Isa>(self, isa: I, sink: &mut impl Sink<I>) {
        let (len, Range { start, end }) = (B::TYPE.block_len, self.range);
        let whole = start.div_ceil(len)..end / len;
        if whole.start > whole.end {
            // Within one block.
            return part(isa, &self.blocks[whole.end], start % len..end % len, sink);
        }
        if start % len > 0 {
            part(isa, &self.blocks[whole.start - 1], start % len..len, sink);
        }
        for block in &self.blocks[whole.clone()] {
            block.decode(isa, sink);
        }
        if end % len > 0 {
            part(isa, &self.blocks[whole.end], 0..end % len, sink);
        }
    }
}

/// Some values of a block.
#[inline(always)]
fn part<I: Isa, B: Block>(isa: I, block: &B, range: Range<usize>, sink: &mut impl Sink<I>) {
    let mut values = [0f32; LONGEST];
    block.decode(isa, &mut Stored::new(isa, &mut values));
    push_all(isa, &values[range], sink);
}

/// Codes as floats.
#[inline(always)]
pub(super) fn float_codes<I: Isa>(isa: I, codes: [u8; LANES]) -> I::F {
    isa.int_to_float(isa.load_u8(&codes))
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

/// The nearest integer, ties to even, in the low bits of a sum: what ggml takes
/// for any argument, also one too large for it.
#[inline(always)]
pub(super) fn nearest(v: f32) -> i32 {
    ((v + ROUND).to_bits() & 0x007f_ffff) as i32 - 0x0040_0000
}

/// What [`nearest`] makes of (x + add) / d, between `lo` and `hi`, plus `shift`.
#[inline(always)]
pub(super) fn nearest_codes<I: Isa, const N: usize>(
    isa: I,
    x: &[f32; N],
    (add, d): (f32, f32),
    (lo, hi): (i32, i32),
    shift: i32,
) -> [u8; N] {
    let (add, d) = (isa.splat(add), isa.splat(d));
    let (lo, hi) = (isa.splat(lo as f32), isa.splat(hi as f32));
    let mut codes = [0u8; N];
    for (x, out) in x.as_chunks().0.iter().zip(codes.as_chunks_mut().0) {
        let v = isa.div(isa.add(isa.load(x), add), d);
        let code = isa.add(columns::nearest(isa, v, lo, hi), isa.splat(shift as f32));
        isa.store_u8(isa.truncate(code), out);
    }
    codes
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
