//! nf4 and fp4 as bitsandbytes defines them (Dettmers et al., "QLoRA", 2023).
//!
//! The tensor is cut, row after row, into blocks of a power of two; each block
//! is scaled by its largest magnitude and every element takes the nearest of
//! sixteen values: `value = table[code] · absmax`. The last block may be short.
//!
//! With double quantization the absmax are themselves stored in 8 bits: their
//! mean is taken off and the rest goes through the dynamic map in blocks of 256,
//! `absmax = map[code] · nested_absmax + nested_offset`.

use std::ops::Range;
use std::sync::LazyLock;

use crate::error::{Error, Result};
use crate::format::{
    Decode, Extremes, Format, Granularity, Grid, Input, MAX_BLOCK, Method, NOT_FINITE, OptionValue,
    Options, Part, Quantized, Scale, Spec, Values, Zero,
};
use crate::formats::dynamic_map::{self, DYNAMIC_MAP};
use crate::simd::codebook::{Codebook, Encode, LEAST, decode_run};
use crate::simd::nibble::{self, Order};
use crate::simd::runs::OfBlocks;
use crate::simd::sink::{Out, Sink, Source};
use crate::simd::{Isa, dispatch};
use crate::steps::{Lows, StepForm, Steps, nearest_steps};
use crate::tensor::{DType, Tensor, element_count, narrow};

/// A format that looks its values up in a table of sixteen.
pub struct Codebook4 {
    name: &'static str,
    about: &'static str,
    /// The value of each code.
    pub table: [f32; 16],
    book: LazyLock<Codebook>,
}

const NF4_TABLE: [f32; 16] = [
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.3949175,
    -0.28444138,
    -0.18477343,
    -0.091050036,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.562617,
    0.72295684,
    1.0,
];

/// E2M1 divided by twelve, in the order of bitsandbytes' codes.
const FP4_TABLE: [f32; 16] = [
    0.0,
    0.0052083335,
    0.6666667,
    1.0,
    0.33333334,
    0.5,
    0.16666667,
    0.25,
    0.0,
    -0.0052083335,
    -0.6666667,
    -1.0,
    -0.33333334,
    -0.5,
    -0.16666667,
    -0.25,
];

pub static NF4: Codebook4 = Codebook4 {
    name: "nf4",
    about: "4-bit quantiles of a normal distribution, blocks of 64 (QLoRA)",
    table: NF4_TABLE,
    book: LazyLock::new(|| Codebook::new(&NF4_TABLE)),
};

pub static FP4: Codebook4 = Codebook4 {
    name: "fp4",
    about: "4-bit floats of bitsandbytes, blocks of 64",
    table: FP4_TABLE,
    book: LazyLock::new(|| Codebook::new(&FP4_TABLE)),
};

impl Format for Codebook4 {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn resolve(&self, options: &mut Options) -> Result<Spec> {
        let methods = [("rtn", Method::Rtn), ("mse", Method::Mse)];
        let method = options.take_name("method", &methods, Method::Rtn)?;
        let block = match options.take("block_size") {
            None => 64,
            Some(OptionValue::Int(n)) if (2..=MAX_BLOCK).contains(&n) && n.count_ones() == 1 => {
                n as usize
            }
            Some(v) => {
                return Err(Error::option(
                    "block_size",
                    format!("expected a power of two from 2 to {MAX_BLOCK}, got {v}"),
                ));
            }
        };
        Ok(Spec {
            format: self.name.into(),
            method,
            granularity: Granularity::Block(block),
            symmetric: true,
            zero: Zero::Integer,
            scale: Scale::Absmax,
            scale_dtype: DType::F32,
            double_quant: options.take_bool("double_quant", false)?,
            act_order: false,
            values: Values::Source,
            input: Input::default(),
        })
    }

    fn options(&self, spec: &Spec) -> Vec<(&'static str, OptionValue)> {
        vec![
            ("method", spec.method.into()),
            ("block_size", spec.granularity.into()),
            ("double_quant", OptionValue::Bool(spec.double_quant)),
        ]
    }

    fn check_shape(&self, _spec: &Spec, _shape: &[usize]) -> Result<()> {
        Ok(())
    }

    fn parts(&self, spec: &Spec, shape: &[usize]) -> Result<Vec<Part>> {
        let mut parts = self.working_parts(spec, shape)?;
        if spec.double_quant {
            let blocks = parts[1].shape[0];
            let part = |name, dtype, n| Part {
                name,
                dtype,
                shape: vec![n],
                block_bits: 0,
            };
            parts[1].dtype = DType::U8;
            let nested = blocks.div_ceil(dynamic_map::BLOCK);
            parts.push(part("nested_absmax", DType::F32, nested));
            parts.push(part("nested_offset", DType::F32, 1));
        }
        Ok(parts)
    }

    fn working_parts(&self, spec: &Spec, shape: &[usize]) -> Result<Vec<Part>> {
        let n = element_count(shape)?;
        let block_len = spec.block_len(shape);
        Ok(vec![
            Part {
                name: "codes",
                dtype: DType::U8,
                shape: vec![n.div_ceil(2)],
                block_bits: 4 * block_len,
            },
            Part {
                name: "absmax",
                dtype: DType::F32,
                shape: vec![n.div_ceil(block_len)],
                block_bits: 32,
            },
        ])
    }

    fn sees_non_finite(&self, spec: &Spec) -> bool {
        spec.method == Method::Rtn
    }

    fn encode(
        &self,
        spec: &Spec,
        block_len: usize,
        _extremes: Option<Extremes>,
        x: &[f32],
        parts: &mut [&mut [u8]],
    ) -> Result<()> {
        let mut absmax = vec![0f32; x.len().div_ceil(block_len)];
        let mut codes = vec![0u8; x.len()];
        let finite = dispatch(Encode {
            book: &self.book,
            search: spec.method == Method::Mse,
            block_len,
            x,
            codes: &mut codes,
            absmax: &mut absmax,
        });
        if !finite {
            return Err(NOT_FINITE);
        }
        if codes.len() % 2 == 1 {
            // As bitsandbytes pads: with an element of zero.
            codes.push(self.book.code(0.0));
        }
        nibble::pack(Order::HighFirst, &codes, parts[0]);
        narrow(DType::F32, &absmax, parts[1])
    }

    fn finish(
        &self,
        spec: &Spec,
        _extremes: Option<Extremes>,
        mut working: Vec<(&'static str, Tensor)>,
    ) -> Result<Vec<(&'static str, Tensor)>> {
        if !spec.double_quant {
            return Ok(working);
        }
        let absmax = working[1].1.to_f32_vec();
        let nested = dynamic_map::double_quantize(&absmax);
        if !nested.offset.is_finite() {
            return Err(Error::option(
                "double_quant",
                "the sum of the scales is past the range of f32; quantize without it",
            ));
        }
        let blocks = nested.codes.len();
        let outer = nested.absmax.len();
        working[1].1 = Tensor::from_slice(DType::U8, &[blocks], &nested.codes)?;
        working.push((
            "nested_absmax",
            Tensor::from_slice(DType::F32, &[outer], &nested.absmax)?,
        ));
        working.push((
            "nested_offset",
            Tensor::from_slice(DType::F32, &[1], &[nested.offset])?,
        ));
        Ok(working)
    }

    fn grid<'a>(
        &'a self,
        spec: &'a Spec,
        _extremes: Option<Extremes>,
    ) -> Result<Box<dyn Grid + 'a>> {
        Ok(Box::new(CodebookGrid { format: self, spec }))
    }

    fn decoder<'a>(&'a self, q: &'a Quantized) -> Result<Box<dyn Decode + 'a>> {
        let absmax = if q.spec.double_quant {
            Absmax::Nested {
                codes: q.part("absmax")?.bytes(),
                absmax: q.part("nested_absmax")?.to_f32_vec(),
                offset: q.part("nested_offset")?.to_f32_vec()[0],
            }
        } else {
            Absmax::Plain(q.part("absmax")?)
        };
        Ok(Box::new(Decoder {
            table: &self.table,
            block_len: q.spec.block_len(&q.shape),
            codes: q.part("codes")?.bytes(),
            absmax,
        }))
    }
}

struct CodebookGrid<'a> {
    format: &'a Codebook4,
    spec: &'a Spec,
}

impl Grid for CodebookGrid<'_> {
    fn fit(
        &self,
        x: &[f32],
        block_len: usize,
        scales: &mut [f32],
        _zeros: &mut [f32],
    ) -> Result<()> {
        let mut codes = vec![0u8; x.len()];
        dispatch(Encode {
            book: &self.format.book,
            search: self.spec.method == Method::Mse,
            block_len,
            x,
            codes: &mut codes,
            absmax: scales,
        });
        Ok(())
    }

    fn round(
        &self,
        x: &[f32],
        scales: &[f32],
        _zeros: &[f32],
        codes: &mut [u8],
        values: &mut [f32],
    ) {
        for (((&x, &scale), code), value) in x.iter().zip(scales).zip(codes).zip(values) {
            *code = self.format.book.code(x * (1.0 / scale.max(LEAST)));
            *value = self.format.table[usize::from(*code)] * scale;
        }
    }

    fn store(&self, codes: &[u8], scales: &[f32], _zeros: &[f32]) -> Result<Vec<Vec<u8>>> {
        let mut packed = vec![0u8; codes.len().div_ceil(2)];
        nibble::pack(Order::HighFirst, codes, &mut packed);
        Ok(vec![packed, bytemuck::cast_slice(scales).to_vec()])
    }
}

enum Absmax<'a> {
    Plain(&'a Tensor),
    Nested {
        codes: &'a [u8],
        absmax: Vec<f32>,
        offset: f32,
    },
}

impl Absmax<'_> {
    /// The absmax of blocks `range`, into `scratch` where they are not in place.
    fn chunk<'a>(&'a self, range: std::ops::Range<usize>, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        match self {
            Absmax::Plain(tensor) => tensor.f32_chunk(range, scratch),
            Absmax::Nested {
                codes,
                absmax,
                offset,
            } => {
                scratch.clear();
                scratch.extend(range.map(|b| {
                    DYNAMIC_MAP[usize::from(codes[b])] * absmax[b / dynamic_map::BLOCK] + offset
                }));
                scratch
            }
        }
    }
}

struct Decoder<'a> {
    table: &'a [f32; 16],
    block_len: usize,
    codes: &'a [u8],
    absmax: Absmax<'a>,
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
            absmax: self.absmax.chunk(blocks, &mut scratch),
            range: start..end,
        });
    }

    fn steps(&self) -> Option<&dyn Steps> {
        Some(self)
    }
}

impl Steps for Decoder<'_> {
    /// Values to a byte each: what int8 arithmetic can make of them.
    fn form(&self) -> StepForm {
        StepForm {
            block: self.block_len,
            halves: true,
            table: Some(nearest_steps(self.table)),
            zero: 128,
            lows: Lows::Nothing,
            shared: 1,
        }
    }

    fn codes(&self, row: usize, out: &mut [u8]) {
        nibble::unpack(Order::HighFirst, self.codes, row * out.len(), out);
    }

    fn numbers(&self, row: usize, scales: &mut [f32], _lows: &mut [f32]) {
        let first = row * scales.len();
        let mut scratch = Vec::new();
        let absmax = self.absmax.chunk(first..first + scales.len(), &mut scratch);
        for (scale, absmax) in scales.iter_mut().zip(absmax) {
            *scale = absmax / 127.0;
        }
    }
}

struct ValuesOf<'a, 'b> {
    decoder: &'a Decoder<'b>,
    absmax: &'a [f32],
    range: Range<usize>,
}

impl Source for ValuesOf<'_, '_> {
    #[inline(always)]
    fn pour<I: Isa>(self, isa: I, sink: &mut impl Sink<I>) {
        let d = self.decoder;
        let packed = (Order::HighFirst, d.codes);
        for (run, &scale) in OfBlocks::new(self.range, d.block_len).zip(self.absmax) {
            decode_run(isa, d.table, packed, run, scale, sink);
        }
    }
}
