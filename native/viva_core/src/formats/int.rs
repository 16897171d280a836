//! Integer formats of 8 to 2 bits, symmetric and asymmetric.
//!
//! With n bits and top = 2ⁿ − 1:
//!
//! | | code | value |
//! |---|---|---|
//! | symmetric int8, step | −127…127 as i8 | code · scale, scale = absmax/127 |
//! | symmetric int8, absmax | −127…127 as i8 | code · scale · (1/127), scale = absmax of the weights in f16: bitsandbytes' LLM.int8() |
//! | symmetric, fewer bits | 0…top, stored + 2ⁿ⁻¹ | (code − 2ⁿ⁻¹) · scale, scale = absmax/(top/2): compressed-tensors |
//! | asymmetric | 0…top | (code − zero) · scale, scale = (max − min)/top: AWQ, GPTQ |
//! | asymmetric, float zero point | 0…top | code · scale + bias: MLX (rtn), HQQ |
//!
//! With an integer zero, min and max include zero, so that zero is stored
//! exactly, and codes are the quotient by the stored scale, rounded to nearest
//! with ties to even. Codes below 8 bits are one stream of bits, least first.
//!
//! Under `act_order` element c of every row belongs to block `group_index[c]`
//! of that row, as GPTQ stores weights that it took in another order.

mod decode;
mod grid;

use crate::error::{Error, Result};
use crate::format::{
    self, Decode, Extremes, Format, Granularity, Input, MAX_BLOCK, Method, OptionValue, Options,
    Part, Quantized, Scale, Spec, Values, Zero,
};
use crate::simd::affine;
use crate::simd::bits;
use crate::simd::dispatch;
use crate::simd::int::{Choice, Encode, Fit, Grid};
use crate::simd::stats::RangeWithZero;
use crate::simd::vector::round_f16;
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

pub static INT6: Int = Int {
    name: "int6",
    about: "6-bit integers in groups of 128, with a zero point",
    bits: 6,
    granularity: Granularity::Block(128),
    symmetric: false,
};

pub static INT5: Int = Int {
    name: "int5",
    about: "5-bit integers in groups of 128, with a zero point",
    bits: 5,
    granularity: Granularity::Block(128),
    symmetric: false,
};

pub static INT4: Int = Int {
    name: "int4",
    about: "4-bit integers in groups of 128, with a zero point",
    bits: 4,
    granularity: Granularity::Block(128),
    symmetric: false,
};

pub static INT3: Int = Int {
    name: "int3",
    about: "3-bit integers in groups of 128, with a zero point",
    bits: 3,
    granularity: Granularity::Block(128),
    symmetric: false,
};

pub static INT2: Int = Int {
    name: "int2",
    about: "2-bit integers in groups of 64, with a zero point",
    bits: 2,
    granularity: Granularity::Block(64),
    symmetric: false,
};

/// Bits of a code of the integer format of that name.
pub fn width(format: &str) -> Option<usize> {
    [&INT8, &INT6, &INT5, &INT4, &INT3, &INT2]
        .into_iter()
        .find(|int| int.name == format)
        .map(|int| int.bits)
}

/// The name of the integer format of that many bits.
pub fn name_of(width: usize) -> Option<&'static str> {
    [&INT8, &INT6, &INT5, &INT4, &INT3, &INT2]
        .into_iter()
        .find(|int| int.bits == width)
        .map(|int| int.name)
}

impl Int {
    fn grid(&self, symmetric: bool) -> Grid {
        let (lo, hi, offset, divisor) = match (self.bits, symmetric) {
            (8, true) => (-127, 127, 0, 127.0),
            (bits, true) => {
                let half = 1 << (bits - 1);
                (-half, half - 1, half, half as f32 - 0.5)
            }
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
            // The bias is one of the extremes, and larger than the scale.
            _ if spec.zero == Zero::Float => (extremes.absmax(), spec.scale_dtype),
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

    /// Codes, one a byte, scales, and zero points or biases of whole blocks.
    fn choose(
        &self,
        spec: &Spec,
        block_len: usize,
        extremes: Option<Extremes>,
        x: &[f32],
        (codes, scales, zeros, biases): (&mut [u8], &mut [f32], &mut [u8], &mut [f32]),
    ) -> Result<()> {
        let grid = self.grid(spec.symmetric);
        if spec.zero == Zero::Float {
            dispatch(affine::Encode {
                method: spec.method,
                top: grid.hi as f32,
                dtype: spec.scale_dtype,
                block_len,
                x,
                codes,
                scales,
                biases,
            });
        } else {
            let finite = dispatch(Encode {
                grid,
                choice: match (extremes, spec.scale, spec.method) {
                    (Some(e), Scale::Absmax, _) => {
                        Choice::FixedAbsmax(self.tensor_fit(spec, e).scale)
                    }
                    (Some(e), ..) => Choice::Fixed(self.tensor_fit(spec, e)),
                    (None, Scale::Absmax, _) => Choice::Absmax,
                    (None, _, Method::Mse) => Choice::Mse(spec.scale_dtype),
                    (None, ..) => Choice::Rtn(spec.scale_dtype),
                },
                block_len,
                x,
                codes,
                scales,
                zeros,
            });
            if !finite {
                return Err(format::NOT_FINITE);
            }
        }
        let mut finite = scales.iter().zip(biases.iter());
        match finite.position(|(s, b)| !(s.is_finite() && b.is_finite())) {
            None => Ok(()),
            Some(block) => Err(self.overflow(
                spec,
                extremes.unwrap_or_else(|| {
                    let end = x.len().min((block + 1) * block_len);
                    let (min, max) = dispatch(RangeWithZero(&x[block * block_len..end]));
                    Extremes { min, max }
                }),
            )),
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
        let methods = [
            ("rtn", Method::Rtn),
            ("mse", Method::Mse),
            ("hqq", Method::Hqq),
        ];
        let zeros = [("integer", Zero::Integer), ("float", Zero::Float)];
        let scales = [("step", Scale::Step), ("absmax", Scale::Absmax)];
        let dtypes = [
            ("f32", DType::F32),
            ("f16", DType::F16),
            ("bf16", DType::BF16),
        ];
        let method = options.take_name("method", &methods, Method::Rtn)?;
        let granularity = take_granularity(options, self.granularity)?;
        let zero = match method {
            Method::Hqq => Zero::Float,
            _ => Zero::Integer,
        };
        let zero = options.take_name("zero_point", &zeros, zero)?;
        let asymmetric = zero == Zero::Float || !self.symmetric;
        let symmetric = options.take_bool("symmetric", !asymmetric)?;
        let act_order = options.take_bool("act_order", false)?;
        let scale = options.take_name("scale", &scales, Scale::Step)?;
        // A scale a row costs nothing; a scale a block is worth halving.
        let default_dtype = match granularity {
            Granularity::Block(_) => DType::F16,
            _ if self.bits < 8 => DType::F16,
            _ => DType::F32,
        };
        let scale_dtype = options.take_name("scale_dtype", &dtypes, default_dtype)?;
        if scale == Scale::Absmax {
            if self.bits != 8 || !symmetric || method != Method::Rtn || act_order {
                return Err(Error::option(
                    "scale",
                    "absmax is LLM.int8()'s rule: symmetric int8 with method rtn only",
                ));
            }
            if scale_dtype != DType::F32 {
                return Err(Error::option("scale_dtype", "scale: absmax stores f32"));
            }
        }
        if granularity == Granularity::Tensor && (method != Method::Rtn || zero == Zero::Float) {
            return Err(Error::option(
                "block_size",
                "mse, hqq and float zero points are of rows or blocks; with block_size tensor use rtn",
            ));
        }
        if method == Method::Hqq && zero == Zero::Integer {
            return Err(Error::option("zero_point", "hqq finds a float one"));
        }
        if zero == Zero::Float && symmetric {
            return Err(Error::option(
                "symmetric",
                "a float zero point and hqq are asymmetric",
            ));
        }
        if act_order && !matches!(granularity, Granularity::Block(_)) {
            return Err(Error::option(
                "act_order",
                "it orders blocks; give block_size a number",
            ));
        }
        Ok(Spec {
            format: self.name.into(),
            method,
            granularity,
            symmetric,
            zero,
            scale,
            scale_dtype,
            double_quant: false,
            act_order,
            values: Values::Source,
            input: Input::default(),
        })
    }

    fn options(&self, spec: &Spec) -> Vec<(&'static str, OptionValue)> {
        vec![
            ("method", spec.method.into()),
            ("block_size", spec.granularity.into()),
            ("symmetric", OptionValue::Bool(spec.symmetric)),
            ("zero_point", spec.zero.into()),
            ("act_order", OptionValue::Bool(spec.act_order)),
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
        let mut parts = vec![
            Part {
                name: "codes",
                dtype: if self.bits == 8 && spec.symmetric {
                    DType::I8
                } else {
                    DType::U8
                },
                shape: match self.bits {
                    8 => shape.to_vec(),
                    bits => vec![bits::packed_len(bits, n)],
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
        match (spec.symmetric, spec.zero) {
            (true, _) => {}
            (false, Zero::Integer) => parts.push(Part {
                name: "zero_points",
                dtype: DType::U8,
                shape: vec![bits::packed_len(self.bits, blocks)],
                block_bits: per_block(self.bits),
            }),
            (false, Zero::Float) => parts.push(Part {
                name: "biases",
                ..parts[1].clone()
            }),
        }
        if spec.act_order {
            parts.push(Part {
                name: "group_index",
                dtype: DType::I32,
                shape: vec![shape.last().copied().unwrap_or(1)],
                block_bits: 0,
            });
        }
        Ok(parts)
    }

    fn needs_extremes(&self, spec: &Spec) -> bool {
        spec.granularity == Granularity::Tensor
    }

    fn sees_non_finite(&self, spec: &Spec) -> bool {
        let own_scales = spec.granularity != Granularity::Tensor;
        own_scales && spec.method == Method::Rtn && spec.zero == Zero::Integer
    }

    fn encode(
        &self,
        spec: &Spec,
        block_len: usize,
        extremes: Option<Extremes>,
        x: &[f32],
        parts: &mut [&mut [u8]],
    ) -> Result<()> {
        let blocks = x.len().div_ceil(block_len.max(1));
        let mut scales = vec![0f32; blocks];
        let mut zeros = vec![0u8; blocks];
        let mut biases = vec![0f32; blocks];
        let mut unpacked = vec![0u8; if self.bits < 8 { x.len() } else { 0 }];
        let codes = match self.bits {
            8 => &mut *parts[0],
            _ => &mut unpacked[..],
        };
        let chosen = (codes, &mut scales[..], &mut zeros[..], &mut biases[..]);
        self.choose(spec, block_len, extremes, x, chosen)?;
        if self.bits < 8 {
            bits::pack(self.bits, &unpacked, parts[0]);
        }
        if extremes.is_some() {
            return Ok(());
        }
        narrow(spec.scale_dtype, &scales, parts[1])?;
        match (spec.symmetric, spec.zero) {
            (true, _) => Ok(()),
            (false, Zero::Integer) => {
                bits::pack(self.bits, &zeros, parts[2]);
                Ok(())
            }
            (false, Zero::Float) => narrow(spec.scale_dtype, &biases, parts[2]),
        }
    }

    fn finish(
        &self,
        spec: &Spec,
        extremes: Option<Extremes>,
        mut working: Vec<(&'static str, Tensor)>,
    ) -> Result<Vec<(&'static str, Tensor)>> {
        if let (true, Granularity::Block(block)) = (spec.act_order, spec.granularity) {
            // Without activations their order is the one in which they stand.
            let (_, index) = &mut working[if spec.symmetric { 2 } else { 3 }];
            let groups: Vec<i32> = (0..index.len()).map(|c| (c / block) as i32).collect();
            *index = Tensor::from_slice(DType::I32, index.shape(), &groups)?;
        }
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

    fn check_parts(&self, q: &Quantized) -> Result<()> {
        if !q.spec.act_order {
            return Ok(());
        }
        let block = q.spec.block_len(&q.shape).max(1);
        let index = q.part("group_index")?;
        let groups = index.len() / block;
        let bytes = index.bytes().as_chunks::<4>().0;
        match bytes
            .iter()
            .position(|b| u32::from_le_bytes(*b) as usize >= groups)
        {
            None => Ok(()),
            Some(at) => Err(Error::InvalidDump {
                message: format!("group_index[{at}] is none of {groups} groups"),
            }),
        }
    }

    fn grid<'a>(
        &'a self,
        spec: &'a Spec,
        extremes: Option<Extremes>,
    ) -> Result<Box<dyn format::Grid + 'a>> {
        Ok(Box::new(grid::IntGrid::new(self, spec, extremes)?))
    }

    fn decoder<'a>(&'a self, q: &'a Quantized) -> Result<Box<dyn Decode + 'a>> {
        Ok(Box::new(decode::Decoder::new(self, q)?))
    }
}
