//! 8-bit floats of bitsandbytes: blocks of any power of two under the signed
//! dynamic map (`quantize_blockwise`), byte for byte as its CPU library does it.
//!
//! The tensor is cut, row after row, into blocks; value = map\[code\] · absmax.
//! The last block may be short. No program stores weights of it in files: it
//! is what optimizers keep their states in, and lives in dumps.

use crate::error::{Error, Result};
use crate::format::{
    Decode, Extremes, Format, Granularity, Input, MAX_BLOCK, Method, OptionValue, Options, Part,
    Quantized, Scale, Spec, Values, Zero,
};
use crate::formats::dynamic_map::{self, DYNAMIC_MAP};
use crate::simd::dispatch;
use crate::simd::sink::Out;
use crate::simd::stats::Absmax;
use crate::tensor::{DType, Tensor, element_count, narrow};

/// The format.
pub struct Dynamic8;

pub static DYNAMIC8: Dynamic8 = Dynamic8;

impl Format for Dynamic8 {
    fn name(&self) -> &'static str {
        "dynamic8"
    }

    fn about(&self) -> &'static str {
        "8-bit dynamic map of bitsandbytes, blocks of 256"
    }

    fn resolve(&self, options: &mut Options) -> Result<Spec> {
        let methods = [("rtn", Method::Rtn), ("mse", Method::Mse)];
        let method = options.take_name("method", &methods, Method::Rtn)?;
        let block = match options.take("block_size") {
            None => 256,
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
            format: self.name().into(),
            method,
            granularity: Granularity::Block(block),
            symmetric: true,
            zero: Zero::Integer,
            scale: Scale::Absmax,
            scale_dtype: DType::F32,
            double_quant: false,
            act_order: false,
            values: Values::Source,
            input: Input::default(),
        })
    }

    fn options(&self, spec: &Spec) -> Vec<(&'static str, OptionValue)> {
        vec![
            ("method", spec.method.into()),
            ("block_size", spec.granularity.into()),
        ]
    }

    fn check_shape(&self, _spec: &Spec, _shape: &[usize]) -> Result<()> {
        Ok(())
    }

    fn parts(&self, spec: &Spec, shape: &[usize]) -> Result<Vec<Part>> {
        let n = element_count(shape)?;
        let block_len = spec.block_len(shape);
        Ok(vec![
            Part {
                name: "codes",
                dtype: DType::U8,
                shape: shape.to_vec(),
                block_bits: 8 * block_len,
            },
            Part {
                name: "absmax",
                dtype: DType::F32,
                shape: vec![n.div_ceil(block_len)],
                block_bits: 32,
            },
        ])
    }

    fn encode(
        &self,
        spec: &Spec,
        block_len: usize,
        _extremes: Option<Extremes>,
        x: &[f32],
        parts: &mut [&mut [u8]],
    ) -> Result<()> {
        let blocks = x.chunks(block_len).zip(parts[0].chunks_mut(block_len));
        let absmax: Vec<f32> = blocks
            .map(|(x, codes)| {
                let most = dispatch(Absmax(x));
                let absmax = match spec.method {
                    Method::Mse => search(x, most, codes),
                    _ => most,
                };
                dynamic_map::encode(x, absmax, codes);
                absmax
            })
            .collect();
        narrow(DType::F32, &absmax, parts[1])
    }

    fn decoder<'a>(&'a self, q: &'a Quantized) -> Result<Box<dyn Decode + 'a>> {
        Ok(Box::new(Decoder {
            block_len: q.spec.block_len(&q.shape),
            codes: q.part("codes")?.bytes(),
            absmax: q.part("absmax")?,
        }))
    }
}

/// The absmax of least squared error; never worse than the block's own. For
/// codes fixed the best one is Σxv / Σv².
fn search(x: &[f32], most: f32, codes: &mut [u8]) -> f32 {
    let map = &*DYNAMIC_MAP;
    let mut error = |absmax: f32, refined: &mut f32| {
        dynamic_map::encode(x, absmax, codes);
        let (mut error, mut xv, mut vv) = (0f64, 0f64, 0f64);
        for (&x, &code) in x.iter().zip(codes.iter()) {
            let (x, v) = (f64::from(x), f64::from(map[usize::from(code)]));
            let e = x - v * f64::from(absmax);
            error += e * e;
            xv += x * v;
            vv += v * v;
        }
        *refined = (xv / vv) as f32;
        error
    };
    let mut next = most;
    let mut best = (error(most, &mut next), most);
    for step in 0..16 {
        let mut refined = 0.0;
        error(most * (1.0 - 0.02 * step as f32), &mut refined);
        // Zero, infinite or NaN where the block is zero or its squares are.
        if refined.is_normal() && refined > 0.0 {
            let error = error(refined, &mut next);
            if error < best.0 {
                best = (error, refined);
            }
        }
    }
    best.1
}

struct Decoder<'a> {
    block_len: usize,
    codes: &'a [u8],
    absmax: &'a Tensor,
}

impl Decode for Decoder<'_> {
    fn decode_into(&self, start: usize, out: Out) {
        let map = &*DYNAMIC_MAP;
        let mut at = start;
        let mut out = out.values;
        let mut scratch = Vec::new();
        while !out.is_empty() {
            let block = at / self.block_len;
            let n = (self.block_len - at % self.block_len).min(out.len());
            let absmax = self.absmax.f32_chunk(block..block + 1, &mut scratch)[0];
            let (run, rest) = out.split_at_mut(n);
            for (value, &code) in run.iter_mut().zip(&self.codes[at..at + n]) {
                *value = map[usize::from(code)] * absmax;
            }
            out = rest;
            at += n;
        }
    }
}
