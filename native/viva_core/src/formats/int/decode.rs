//! Reading integer codes back.

use std::ops::Range;

use super::Int;
use crate::error::Result;
use crate::format::{Decode, Granularity, Quantized, Scale, Zero};
use crate::simd::Isa;
use crate::simd::affine::Line;
use crate::simd::bits;
use crate::simd::int::Scaled;
use crate::simd::nibble::Order;
use crate::simd::runs::{self, OfBlocks};
use crate::simd::sink::{Out, Sink, Source, push_all};
use crate::steps::{Lows, StepForm, Steps};
use crate::tensor::Tensor;

/// 1/127 as LLM.int8() multiplies with it.
const ONE_127TH: f32 = f32::from_bits(0x3c01_0204);

/// Codes that are unpacked together.
const UNPACKED: usize = 256;

pub(super) struct Decoder<'a> {
    bits: usize,
    signed: bool,
    offset: i32,
    block_len: usize,
    factor: f32,
    codes: &'a [u8],
    scales: &'a Tensor,
    zeros: Option<&'a [u8]>,
    biases: Option<&'a Tensor>,
    /// The block of each element of a row, counted from the row's first.
    order: Option<Vec<usize>>,
}

impl<'a> Decoder<'a> {
    pub fn new(int: &Int, q: &'a Quantized) -> Result<Decoder<'a>> {
        let part_if = |wanted: bool, name| match wanted {
            true => q.part(name).map(Some),
            false => Ok(None),
        };
        let float = q.spec.zero == Zero::Float;
        let zeros = part_if(!q.spec.symmetric && !float, "zero_points")?;
        let order = part_if(q.spec.act_order, "group_index")?;
        Ok(Decoder {
            bits: int.bits,
            signed: int.bits == 8 && q.spec.symmetric,
            offset: int.grid(q.spec.symmetric).offset,
            block_len: match q.spec.granularity {
                Granularity::Tensor => usize::MAX,
                _ => q.spec.block_len(&q.shape).max(1),
            },
            factor: match q.spec.scale {
                Scale::Absmax => ONE_127TH,
                _ => 1.0,
            },
            codes: q.part("codes")?.bytes(),
            scales: q.part("scales")?,
            zeros: zeros.map(Tensor::bytes),
            biases: part_if(float, "biases")?,
            order: order.map(|index| {
                let bytes = index.bytes().as_chunks::<4>().0;
                let group = |b: &[u8; 4]| u32::from_le_bytes(*b) as usize;
                bytes.iter().map(group).collect()
            }),
        })
    }

    fn zero(&self, block: usize) -> i32 {
        match self.zeros {
            None => self.offset,
            Some(zeros) => i32::from(bits::get(self.bits, zeros, block)),
        }
    }

    /// The scalar definition: the value of a code of `block`.
    #[inline(always)]
    fn value(&self, code: u8, block: usize, (scale, bias): (f32, Option<&f32>)) -> f32 {
        if let Some(bias) = bias {
            return f32::from(code) * scale + bias;
        }
        let code = match self.signed {
            true => i32::from(code as i8),
            false => i32::from(code) - self.zero(block),
        };
        code as f32 * scale * self.factor
    }

    /// The blocks from which elements `start .. end` come.
    fn blocks(&self, start: usize, end: usize) -> std::ops::Range<usize> {
        match &self.order {
            None => start / self.block_len..(end - 1) / self.block_len + 1,
            Some(index) => {
                let groups = index.len() / self.block_len;
                start / index.len() * groups..((end - 1) / index.len() + 1) * groups
            }
        }
    }
}

impl Decode for Decoder<'_> {
    fn decode_into(&self, start: usize, out: Out) {
        if out.values.is_empty() {
            return;
        }
        let range = start..start + out.values.len();
        let blocks = self.blocks(range.start, range.end);
        let (mut for_scales, mut for_biases) = (Vec::new(), Vec::new());
        out.fill(ValuesOf {
            decoder: self,
            scales: self.scales.f32_chunk(blocks.clone(), &mut for_scales),
            biases: match self.biases {
                Some(biases) => biases.f32_chunk(blocks.clone(), &mut for_biases),
                None => &[],
            },
            first: blocks.start,
            range,
        });
    }

    fn steps(&self) -> Option<&dyn Steps> {
        // An order of its own has no runs of one scale.
        match self.order {
            None => Some(self),
            Some(_) => None,
        }
    }
}

impl Steps for Decoder<'_> {
    fn form(&self) -> StepForm {
        StepForm {
            block: self.block_len,
            halves: self.bits <= 4,
            table: None,
            zero: match (self.zeros, self.biases, self.signed) {
                (None, None, true) => 128,
                (None, None, false) => self.offset as u8,
                _ => 0,
            },
            lows: match (self.zeros, self.biases) {
                (_, Some(_)) => Lows::Biases,
                (Some(_), None) => Lows::ZeroPoints,
                (None, None) => Lows::Nothing,
            },
            shared: 1,
        }
    }

    fn codes(&self, row: usize, out: &mut [u8]) {
        let start = row * out.len();
        if self.bits < 8 {
            return bits::unpack(self.bits, self.codes, start, out);
        }
        // The step of a signed code counts from −128.
        let flip = if self.signed { 128 } else { 0 };
        for (out, code) in out.iter_mut().zip(&self.codes[start..]) {
            *out = code ^ flip;
        }
    }

    fn numbers(&self, row: usize, scales: &mut [f32], lows: &mut [f32]) {
        let first = match self.block_len {
            // One scale for all rows.
            usize::MAX => 0,
            _ => row * scales.len(),
        };
        let blocks = first..first + scales.len();
        let mut scratch = Vec::new();
        let stored = self.scales.f32_chunk(blocks.clone(), &mut scratch);
        for (scale, stored) in scales.iter_mut().zip(stored) {
            *scale = stored * self.factor;
        }
        if let Some(biases) = self.biases {
            lows.copy_from_slice(biases.f32_chunk(blocks, &mut scratch));
        } else if self.zeros.is_some() {
            for (low, block) in lows.iter_mut().zip(blocks) {
                *low = self.zero(block) as f32;
            }
        }
    }
}

struct ValuesOf<'a, 'b> {
    decoder: &'a Decoder<'b>,
    scales: &'a [f32],
    biases: &'a [f32],
    first: usize,
    range: Range<usize>,
}

impl ValuesOf<'_, '_> {
    fn numbers(&self, block: usize) -> (f32, Option<&f32>) {
        let i = block - self.first;
        (self.scales[i], self.biases.get(i))
    }

    /// Values of consecutive codes of one block.
    #[inline(always)]
    fn run<I: Isa>(
        &self,
        isa: I,
        range: Range<usize>,
        sink: &mut impl Sink<I>,
        value: impl Fn(I::U) -> I::F,
    ) {
        let d = self.decoder;
        if d.bits == 4 {
            return runs::decode_halves(isa, (Order::LowFirst, d.codes), range, sink, value);
        }
        if d.bits == 8 {
            return runs::decode(
                &d.codes[range],
                sink,
                #[inline(always)]
                |codes| {
                    value(match d.signed {
                        true => isa.load_i8(codes),
                        false => isa.load_u8(codes),
                    })
                },
            );
        }
        let mut unpacked = [0u8; UNPACKED];
        let Range { mut start, end } = range;
        while start < end {
            let unpacked = &mut unpacked[..UNPACKED.min(end - start)];
            bits::unpack(d.bits, d.codes, start, unpacked);
            runs::decode(
                unpacked,
                sink,
                #[inline(always)]
                |codes| value(isa.load_u8(codes)),
            );
            start += unpacked.len();
        }
    }

    /// The scalar definition, element by element, where each has a block of its own.
    #[inline(always)]
    fn in_order<I: Isa>(&self, isa: I, index: &[usize], sink: &mut impl Sink<I>) {
        let d = self.decoder;
        let groups = index.len() / d.block_len;
        let Range { mut start, end } = self.range;
        let (mut row, mut column) = (start / index.len(), start % index.len());
        let (mut codes, mut values) = ([0u8; UNPACKED], [0f32; UNPACKED]);
        while start < end {
            let n = UNPACKED.min(end - start);
            bits::unpack(d.bits, d.codes, start, &mut codes[..n]);
            for (&code, value) in codes[..n].iter().zip(&mut values) {
                let block = row * groups + index[column];
                *value = d.value(code, block, self.numbers(block));
                column += 1;
                if column == index.len() {
                    (row, column) = (row + 1, 0);
                }
            }
            push_all(isa, &values[..n], sink);
            start += n;
        }
    }
}

impl Source for ValuesOf<'_, '_> {
    #[inline(always)]
    fn pour<I: Isa>(self, isa: I, sink: &mut impl Sink<I>) {
        let d = self.decoder;
        if let Some(index) = &d.order {
            return self.in_order(isa, index, sink);
        }
        let runs = OfBlocks::new(self.range.clone(), d.block_len);
        for (run, block) in runs.zip(self.first..) {
            match self.numbers(block) {
                (scale, Some(&bias)) => {
                    let line = Line { scale, bias };
                    self.run(
                        isa,
                        run,
                        sink,
                        #[inline(always)]
                        |codes| line.value(isa, isa.int_to_float(codes)),
                    );
                }
                (scale, None) => {
                    let line = Scaled {
                        zero: if d.signed { 0 } else { d.zero(block) },
                        scale,
                        factor: d.factor,
                    };
                    self.run(
                        isa,
                        run,
                        sink,
                        #[inline(always)]
                        |codes| line.values(isa, codes),
                    );
                }
            }
        }
    }
}
