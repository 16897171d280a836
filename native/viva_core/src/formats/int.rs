//! Integer formats: int8 and int4, symmetric and asymmetric.
//!
//! | | code | value |
//! |---|---|---|
//! | symmetric int8, step | −127…127 as i8 | code · scale, scale = absmax/127 |
//! | symmetric int8, absmax | −127…127 as i8 | code · scale · (1/127), scale = absmax of the weights in f16: bitsandbytes' LLM.int8() |
//! | asymmetric int8 | 0…255 | (code − zero) · scale, scale = (max − min)/255 |
//! | symmetric int4 | 0…15, stored + 8 | (code − 8) · scale, scale = absmax/7.5: compressed-tensors |
//! | asymmetric int4 | 0…15 | (code − zero) · scale, scale = (max − min)/15: AWQ, GPTQ |
//!
//! min and max include zero, so that zero is stored exactly. Codes are the
//! quotient by the stored scale, rounded to nearest with ties to even.

use crate::error::{Error, Result};
use crate::format::{
    Decode, Extremes, Format, Granularity, MAX_BLOCK, Method, OptionValue, Options, Part,
    Quantized, Scale, Spec, Zero,
};
use crate::simd::int::{Choice, Encode, Fit, Grid, decode_run};
use crate::simd::nibble::{self, Order};
use crate::simd::stats::RangeWithZero;
use crate::simd::vector::round_f16;
use crate::simd::{Isa, Op, dispatch};
use crate::tensor::{DType, Tensor, element_count, narrow};

/// An integer format of `bits` bits.
pub struct Int {
    name: &'static str,
    about: &'static str,
    bits: usize,
    granularity: Granularity,
    symmetric: bool,
}

pub static INT8: Int = Int {
    name: "int8",
    about: "8-bit integers, one scale a row (or tensor, or block)",
    bits: 8,
    granularity: Granularity::Row,
    symmetric: true,
};

pub static INT4: Int = Int {
    name: "int4",
    about: "4-bit integers in groups of 128, with a zero point",
    bits: 4,
    granularity: Granularity::Block(128),
    symmetric: false,
};

/// 1/127 as LLM.int8() multiplies with it.
const ONE_127TH: f32 = f32::from_bits(0x3c01_0204);

impl Int {
    fn grid(&self, symmetric: bool) -> Grid {
        let (lo, hi, offset, divisor) = match (self.bits, symmetric) {
            (8, true) => (-127, 127, 0, 127.0),
            (_, true) => (-8, 7, 8, 7.5),
            (bits, false) => (0, (1 << bits) - 1, 0, 0.0),
        };
        Grid {
            lo,
            hi,
            offset,
            symmetric,
            divisor,
        }
    }

    fn blocks(&self, spec: &Spec, shape: &[usize]) -> Result<usize> {
        let n = element_count(shape)?;
        Ok(match spec.granularity {
            Granularity::Tensor => 1,
            _ if n == 0 => 0,
            _ => n / spec.block_len(shape),
        })
    }

    /// A scale that overflowed its dtype would turn a whole block infinite.
    fn overflow(&self, spec: &Spec, extremes: Extremes) -> Error {
        let (scale, dtype) = match spec.scale {
            Scale::Absmax => (extremes.absmax(), DType::F16),
            _ => {
                let exact = self
                    .grid(spec.symmetric)
                    .rtn(DType::F32, extremes.min, extremes.max);
                (exact.scale, spec.scale_dtype)
            }
        };
        Error::ScaleOverflow {
            scale,
            dtype: dtype.name().into(),
        }
    }

    /// The one scale of a tensor under `Granularity::Tensor`.
    fn tensor_fit(&self, spec: &Spec, extremes: Extremes) -> Fit {
        match spec.scale {
            Scale::Absmax => Fit {
                scale: round_f16(extremes.absmax()),
                zero: 0,
            },
            _ => self
                .grid(spec.symmetric)
                .rtn(spec.scale_dtype, extremes.min, extremes.max),
        }
    }
}

fn take_granularity(options: &mut Options, default: Granularity) -> Result<Granularity> {
    match options.take("block_size") {
        None => Ok(default),
        Some(OptionValue::Name(n)) if n == "row" => Ok(Granularity::Row),
        Some(OptionValue::Name(n)) if n == "tensor" => Ok(Granularity::Tensor),
        Some(OptionValue::Int(n)) if (2..=MAX_BLOCK).contains(&n) && n % 2 == 0 => {
            Ok(Granularity::Block(n as usize))
        }
        Some(v) => Err(Error::option(
            "block_size",
            format!("expected row, tensor, or an even number up to {MAX_BLOCK}, got {v}"),
        )),
    }
}

impl Format for Int {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn resolve(&self, options: &mut Options) -> Result<Spec> {
        let methods = [("rtn", Method::Rtn), ("mse", Method::Mse)];
        let scales = [("step", Scale::Step), ("absmax", Scale::Absmax)];
        let dtypes = [
            ("f32", DType::F32),
            ("f16", DType::F16),
            ("bf16", DType::BF16),
        ];
        let method = options.take_name("method", &methods, Method::Rtn)?;
        let granularity = take_granularity(options, self.granularity)?;
        let symmetric = options.take_bool("symmetric", self.symmetric)?;
        let scale = options.take_name("scale", &scales, Scale::Step)?;
        // A scale a row costs nothing; a scale a block is worth halving.
        let default_dtype = match granularity {
            Granularity::Block(_) => DType::F16,
            _ if self.bits < 8 => DType::F16,
            _ => DType::F32,
        };
        let scale_dtype = options.take_name("scale_dtype", &dtypes, default_dtype)?;
        if scale == Scale::Absmax {
            if self.bits != 8 || !symmetric || method != Method::Rtn {
                return Err(Error::option(
                    "scale",
                    "absmax is LLM.int8()'s rule: symmetric int8 with method rtn only",
                ));
            }
            if scale_dtype != DType::F32 {
                return Err(Error::option("scale_dtype", "scale: absmax stores f32"));
            }
        }
        if granularity == Granularity::Tensor && method == Method::Mse {
            return Err(Error::option(
                "method",
                "mse searches rows or blocks; with block_size tensor use rtn",
            ));
        }
        Ok(Spec {
            format: self.name.into(),
            method,
            granularity,
            symmetric,
            zero: Zero::Integer,
            scale,
            scale_dtype,
            double_quant: false,
            act_order: false,
        })
    }

    fn options(&self, spec: &Spec) -> Vec<(&'static str, OptionValue)> {
        vec![
            ("method", spec.method.into()),
            ("block_size", spec.granularity.into()),
            ("symmetric", OptionValue::Bool(spec.symmetric)),
            ("scale", spec.scale.into()),
            (
                "scale_dtype",
                OptionValue::Name(spec.scale_dtype.name().into()),
            ),
        ]
    }

    fn check_shape(&self, spec: &Spec, shape: &[usize]) -> Result<()> {
        let row = shape.last().copied().unwrap_or(1);
        match spec.granularity {
            Granularity::Block(block) if row % block != 0 => Err(Error::Indivisible { row, block }),
            _ => Ok(()),
        }
    }

    fn parts(&self, spec: &Spec, shape: &[usize]) -> Result<Vec<Part>> {
        let n = element_count(shape)?;
        let blocks = self.blocks(spec, shape)?;
        let block_len = spec.block_len(shape);
        let per_block = |bits| match spec.granularity {
            Granularity::Tensor => 0,
            _ => bits,
        };
        let packed = self.bits == 4;
        let mut parts = vec![
            Part {
                name: "codes",
                dtype: if self.bits == 8 && spec.symmetric {
                    DType::I8
                } else {
                    DType::U8
                },
                shape: if packed {
                    vec![n.div_ceil(2)]
                } else {
                    shape.to_vec()
                },
                block_bits: self.bits * block_len,
            },
            Part {
                name: "scales",
                dtype: spec.scale_dtype,
                shape: vec![blocks],
                block_bits: per_block(8 * spec.scale_dtype.size()),
            },
        ];
        if !spec.symmetric {
            parts.push(Part {
                name: "zero_points",
                dtype: DType::U8,
                shape: vec![if packed { blocks.div_ceil(2) } else { blocks }],
                block_bits: per_block(self.bits),
            });
        }
        Ok(parts)
    }

    fn needs_extremes(&self, spec: &Spec) -> bool {
        spec.granularity == Granularity::Tensor
    }

    fn encode(
        &self,
        spec: &Spec,
        block_len: usize,
        extremes: Option<Extremes>,
        x: &[f32],
        parts: &mut [&mut [u8]],
    ) -> Result<()> {
        let choice = match (extremes, spec.scale, spec.method) {
            (Some(e), Scale::Absmax, _) => Choice::FixedAbsmax(self.tensor_fit(spec, e).scale),
            (Some(e), _, _) => Choice::Fixed(self.tensor_fit(spec, e)),
            (None, Scale::Absmax, _) => Choice::Absmax,
            (None, _, Method::Rtn) => Choice::Rtn(spec.scale_dtype),
            (None, _, Method::Mse) => Choice::Mse(spec.scale_dtype),
        };
        let blocks = x.len().div_ceil(block_len.max(1));
        let mut scales = vec![0f32; blocks];
        let mut zeros = vec![0u8; blocks];
        let mut unpacked = vec![0u8; if self.bits == 4 { x.len() } else { 0 }];
        dispatch(Encode {
            grid: self.grid(spec.symmetric),
            choice,
            block_len,
            x,
            codes: if self.bits == 4 {
                &mut unpacked
            } else {
                &mut *parts[0]
            },
            scales: &mut scales,
            zeros: &mut zeros,
        });
        if let Some(block) = scales.iter().position(|s| !s.is_finite()) {
            let extremes = extremes.unwrap_or_else(|| {
                let end = x.len().min((block + 1) * block_len);
                let (min, max) = dispatch(RangeWithZero(&x[block * block_len..end]));
                Extremes { min, max }
            });
            return Err(self.overflow(spec, extremes));
        }
        if self.bits == 4 {
            nibble::pack(Order::LowFirst, &unpacked, parts[0]);
        }
        if extremes.is_some() {
            return Ok(());
        }
        narrow(spec.scale_dtype, &scales, parts[1])?;
        if let Some(out) = parts.get_mut(2) {
            match self.bits {
                4 => nibble::pack(Order::LowFirst, &zeros, out),
                _ => out.copy_from_slice(&zeros),
            }
        }
        Ok(())
    }

    fn finish(
        &self,
        spec: &Spec,
        extremes: Option<Extremes>,
        mut working: Vec<(&'static str, Tensor)>,
    ) -> Result<Vec<(&'static str, Tensor)>> {
        let Some(extremes) = extremes else {
            return Ok(working);
        };
        let fit = self.tensor_fit(spec, extremes);
        if !fit.scale.is_finite() {
            return Err(self.overflow(spec, extremes));
        }
        let mut bytes = vec![0; spec.scale_dtype.size()];
        narrow(spec.scale_dtype, &[fit.scale], &mut bytes)?;
        working[1].1 = Tensor::from_slice(spec.scale_dtype, &[1], &bytes)?;
        if let Some((_, zeros)) = working.get_mut(2) {
            *zeros = Tensor::from_slice(DType::U8, &[1], &[fit.zero as u8])?;
        }
        Ok(working)
    }

    fn decoder<'a>(&'a self, q: &'a Quantized) -> Result<Box<dyn Decode + 'a>> {
        let zeros = if q.spec.symmetric {
            None
        } else {
            Some(q.part("zero_points")?.bytes())
        };
        Ok(Box::new(Decoder {
            packed: self.bits == 4,
            signed: self.bits == 8 && q.spec.symmetric,
            offset: self.grid(q.spec.symmetric).offset,
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
            zeros,
        }))
    }
}

struct Decoder<'a> {
    packed: bool,
    signed: bool,
    offset: i32,
    block_len: usize,
    factor: f32,
    codes: &'a [u8],
    scales: &'a Tensor,
    zeros: Option<&'a [u8]>,
}

impl Decoder<'_> {
    fn zero(&self, block: usize) -> i32 {
        match self.zeros {
            None => self.offset,
            Some(zeros) if self.packed => i32::from(nibble::get(Order::LowFirst, zeros, block)),
            Some(zeros) => i32::from(zeros[block]),
        }
    }
}

impl Decode for Decoder<'_> {
    fn decode(&self, start: usize, out: &mut [f32]) {
        if out.is_empty() {
            return;
        }
        let first = start / self.block_len;
        let last = (start + out.len() - 1) / self.block_len;
        let mut scratch = Vec::new();
        let scales = self.scales.f32_chunk(first..last + 1, &mut scratch);
        dispatch(DecodeBlocks {
            decoder: self,
            scales,
            first,
            start,
            out,
        });
    }
}

struct DecodeBlocks<'a, 'b> {
    decoder: &'a Decoder<'b>,
    scales: &'a [f32],
    first: usize,
    start: usize,
    out: &'a mut [f32],
}

impl Op for DecodeBlocks<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let d = self.decoder;
        let end = self.start + self.out.len();
        let mut at = self.start;
        let mut out = self.out;
        let mut unpacked = [0u8; 256];
        while at < end {
            let block = at / d.block_len;
            let block_end = (block + 1).saturating_mul(d.block_len).min(end);
            let n = if d.packed {
                (block_end - at).min(unpacked.len())
            } else {
                block_end - at
            };
            let (run, rest) = out.split_at_mut(n);
            let codes = if d.packed {
                nibble::unpack(Order::LowFirst, d.codes, at, &mut unpacked[..n]);
                &unpacked[..n]
            } else {
                &d.codes[at..at + n]
            };
            let scale = self.scales[block - self.first];
            decode_run(isa, codes, d.signed, d.zero(block), (scale, d.factor), run);
            out = rest;
            at += n;
        }
    }
}
