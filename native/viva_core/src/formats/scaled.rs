//! What the formats of scaled small floats share: value = element · scale.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::format::{Decode, Part, Scale};
use crate::simd::nibble::{self, Order};
use crate::simd::runs::OfBlocks;
use crate::simd::sink::{Out, Sink, Source};
use crate::simd::small_float::{self, BlockAbsmax, Encode, EncodeTowardZero, Search};
use crate::simd::{Isa, codebook, dispatch};
use crate::small_float::{E2M1, E2M1_VALUES, E4M3, E4M3_VALUES, E5M2, E5M2_VALUES, SmallFloat};
use crate::steps::{Lows, StepForm, Steps};
use crate::tensor::{DType, Tensor};

/// The floats that stand in for the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elements {
    E4M3,
    E5M2,
    E2M1,
}

impl Elements {
    pub fn float(self) -> SmallFloat {
        match self {
            Elements::E4M3 => E4M3,
            Elements::E5M2 => E5M2,
            Elements::E2M1 => E2M1,
        }
    }

    pub fn bits(self) -> usize {
        match self {
            Elements::E2M1 => 4,
            _ => 8,
        }
    }

    /// The codes of a tensor: one an element, or two a byte with the first in
    /// the low bits.
    pub fn part(self, shape: &[usize], n: usize, block_len: usize) -> Part {
        let (dtype, shape) = match self {
            Elements::E4M3 => (DType::F8E4M3, shape.to_vec()),
            Elements::E5M2 => (DType::F8E5M2, shape.to_vec()),
            Elements::E2M1 => (DType::U8, vec![n.div_ceil(2)]),
        };
        Part {
            name: "codes",
            dtype,
            shape,
            block_bits: self.bits() * block_len,
        }
    }

    /// Writes the codes of `x` under one scale a block, which was chosen by
    /// `rule`.
    pub fn encode(self, x: &[f32], block_len: usize, scales: &[f32], rule: Scale, out: &mut [u8]) {
        if self.bits() == 8 {
            return self.codes(x, block_len, scales, rule, out);
        }
        let mut codes = vec![0u8; x.len()];
        self.codes(x, block_len, scales, rule, &mut codes);
        nibble::pack(Order::LowFirst, &codes, out);
    }

    /// The same, one code a byte.
    fn codes(self, x: &[f32], block_len: usize, scales: &[f32], rule: Scale, codes: &mut [u8]) {
        match rule {
            Scale::Ggml => dispatch(EncodeTowardZero {
                x,
                block_len,
                scales,
                codes,
            }),
            _ => dispatch(Encode {
                float: self.float(),
                x,
                block_len,
                scales,
                codes,
            }),
        }
    }

    /// Codes and their values, each element under a scale of its own.
    pub fn round(
        self,
        x: &[f32],
        scales: &[f32],
        rule: Scale,
        codes: &mut [u8],
        values: &mut [f32],
    ) {
        self.codes(x, 1, scales, rule, codes);
        let table: &[f32] = match self {
            Elements::E4M3 => &E4M3_VALUES,
            Elements::E5M2 => &E5M2_VALUES,
            Elements::E2M1 => &E2M1_VALUES,
        };
        for ((value, &code), scale) in values.iter_mut().zip(&*codes).zip(scales) {
            *value = table[usize::from(code)] * scale;
        }
    }

    /// Codes as their part has them, from one a byte.
    pub fn pack(self, codes: &[u8]) -> Vec<u8> {
        if self.bits() == 8 {
            return codes.to_vec();
        }
        let mut packed = vec![0u8; codes.len().div_ceil(2)];
        nibble::pack(Order::LowFirst, codes, &mut packed);
        packed
    }

    /// For each block, which of `each` scales gives the least squared error.
    pub fn search(self, x: &[f32], block_len: usize, candidates: &[f32], each: usize) -> Vec<u8> {
        let mut best = vec![0u8; candidates.len() / each];
        dispatch(Search {
            float: self.float(),
            x,
            block_len,
            candidates,
            each,
            out: &mut best,
        });
        best
    }

    pub fn decoder<'a>(self, codes: &'a Tensor, scales: &'a Tensor) -> Decoder<'a> {
        Decoder {
            elements: self,
            block_len: usize::MAX,
            codes: codes.bytes(),
            scales,
            divisor: 1.0,
        }
    }
}

/// The largest magnitude of each block.
pub fn absmax(x: &[f32], block_len: usize) -> Vec<f32> {
    let mut out = vec![0f32; x.len().div_ceil(block_len)];
    dispatch(BlockAbsmax {
        x,
        block_len,
        out: &mut out,
    });
    out
}

/// Rows have to be whole blocks.
pub fn check_rows(shape: &[usize], block: usize) -> Result<()> {
    match shape.last().copied().unwrap_or(1) {
        row if row % block != 0 => Err(Error::Indivisible { row, block }),
        _ => Ok(()),
    }
}

/// Reads scaled elements back.
pub struct Decoder<'a> {
    elements: Elements,
    /// Elements that share a scale.
    pub block_len: usize,
    codes: &'a [u8],
    scales: &'a Tensor,
    /// What the stored scales are divided by.
    pub divisor: f32,
}

impl Decode for Decoder<'_> {
    fn decode_into(&self, start: usize, out: Out) {
        if out.values.is_empty() {
            return;
        }
        let end = start + out.values.len();
        let blocks = start / self.block_len..(end - 1) / self.block_len + 1;
        let mut scratch = Vec::new();
        out.fill(ValuesOf {
            decoder: self,
            scales: self.scales.f32_chunk(blocks, &mut scratch),
            range: start..end,
        });
    }

    fn steps(&self) -> Option<&dyn Steps> {
        match self.elements {
            Elements::E2M1 => Some(self),
            Elements::E4M3 | Elements::E5M2 => None,
        }
    }
}

impl Steps for Decoder<'_> {
    /// Four bits only: twice a value is a whole number up to 12.
    fn form(&self) -> StepForm {
        StepForm {
            block: self.block_len,
            halves: true,
            table: Some(E2M1_VALUES.map(|v| (2.0 * v + 12.0) as u8)),
            zero: 12,
            lows: Lows::Nothing,
            shared: 1,
        }
    }

    fn codes(&self, row: usize, out: &mut [u8]) {
        nibble::unpack(Order::LowFirst, self.codes, row * out.len(), out);
    }

    fn numbers(&self, row: usize, scales: &mut [f32], _lows: &mut [f32]) {
        let first = row * scales.len();
        let mut scratch = Vec::new();
        let stored = self
            .scales
            .f32_chunk(first..first + scales.len(), &mut scratch);
        for (scale, stored) in scales.iter_mut().zip(stored) {
            *scale = stored / self.divisor * 0.5;
        }
    }
}

struct ValuesOf<'a, 'b> {
    decoder: &'a Decoder<'b>,
    scales: &'a [f32],
    range: Range<usize>,
}

impl Source for ValuesOf<'_, '_> {
    #[inline(always)]
    fn pour<I: Isa>(self, isa: I, sink: &mut impl Sink<I>) {
        let d = self.decoder;
        let float = d.elements.float();
        for (run, &scale) in OfBlocks::new(self.range, d.block_len).zip(self.scales) {
            let scale = scale / d.divisor;
            if d.elements.bits() == 8 {
                small_float::decode_run(isa, float, &d.codes[run], scale, sink);
            } else {
                let packed = (Order::LowFirst, d.codes);
                codebook::decode_run(isa, &E2M1_VALUES, packed, run, scale, sink);
            }
        }
    }
}
