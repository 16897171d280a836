//! 8-bit floats under a scale a row, tensor or block: value = element · scale,
//! scale = absmax over the largest element (448 of E4M3, 57344 of E5M2).
//!
//! Elements are the quotient by the stored scale, rounded to nearest with ties
//! to even, as compressed-tensors makes them of f32 weights. (Of weights in 16
//! bits it rounds the quotient to 16 bits first.)

use super::scaled::{Elements, absmax, check_rows};
use crate::error::{Error, Result};
use crate::format::{
    Decode, Extremes, Format, Granularity, Grid, Input, MAX_BLOCK, Method, OptionValue, Options,
    Part, Quantized, Scale, Spec, Values, Zero,
};
use crate::simd::int::round_scale;
use crate::tensor::{DType, Tensor, element_count, narrow};

/// A format of 8-bit floats.
pub struct Fp8 {
    name: &'static str,
    about: &'static str,
    elements: Elements,
}

pub static FP8_E4M3: Fp8 = Fp8 {
    name: "fp8_e4m3",
    about: "8-bit floats of 3 mantissa bits, one scale a row (or tensor, or block)",
    elements: Elements::E4M3,
};

pub static FP8_E5M2: Fp8 = Fp8 {
    name: "fp8_e5m2",
    about: "8-bit floats of 2 mantissa bits, one scale a row (or tensor, or block)",
    elements: Elements::E5M2,
};

/// Scales that the search tries, over one binade: where the block lies in it
/// decides how close its values are to elements, and how many are subnormal.
const CANDIDATES: usize = 16;

impl Fp8 {
    fn scale(&self, spec: &Spec, most: f32) -> f32 {
        round_scale(spec.scale_dtype, most / self.elements.float().max())
    }

    /// A scale that overflowed its dtype would turn a whole block infinite.
    fn finite(&self, spec: &Spec, most: f32, scale: f32) -> Result<f32> {
        if scale.is_finite() {
            return Ok(scale);
        }
        Err(Error::ScaleOverflow {
            scale: most / self.elements.float().max(),
            dtype: spec.scale_dtype.name().into(),
        })
    }

    /// The stored scale of each block.
    fn scales(&self, spec: &Spec, block_len: usize, x: &[f32]) -> Result<Vec<f32>> {
        let mut scales = absmax(x, block_len);
        for scale in &mut scales {
            *scale = self.finite(spec, *scale, self.scale(spec, *scale))?;
        }
        if spec.method == Method::Rtn {
            return Ok(scales);
        }
        let steps: [f32; CANDIDATES] = std::array::from_fn(|i| 1.0 + i as f32 / CANDIDATES as f32);
        let candidates: Vec<f32> = scales
            .iter()
            .flat_map(|scale| {
                steps.map(|step| match round_scale(spec.scale_dtype, scale * step) {
                    s if s.is_finite() => s,
                    _ => *scale,
                })
            })
            .collect();
        let best = self.elements.search(x, block_len, &candidates, CANDIDATES);
        Ok(candidates
            .chunks(CANDIDATES)
            .zip(best)
            .map(|(c, best)| c[usize::from(best)])
            .collect())
    }
}

impl Format for Fp8 {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn resolve(&self, options: &mut Options) -> Result<Spec> {
        let methods = [("rtn", Method::Rtn), ("mse", Method::Mse)];
        let dtypes = [
            ("f32", DType::F32),
            ("f16", DType::F16),
            ("bf16", DType::BF16),
        ];
        let method = options.take_name("method", &methods, Method::Rtn)?;
        let granularity = match options.take("block_size") {
            None => Granularity::Row,
            Some(OptionValue::Name(n)) if n == "row" => Granularity::Row,
            Some(OptionValue::Name(n)) if n == "tensor" => Granularity::Tensor,
            Some(OptionValue::Int(n)) if (2..=MAX_BLOCK).contains(&n) => {
                Granularity::Block(n as usize)
            }
            Some(v) => {
                return Err(Error::option(
                    "block_size",
                    format!("expected row, tensor, or a number from 2 to {MAX_BLOCK}, got {v}"),
                ));
            }
        };
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
            symmetric: true,
            zero: Zero::Integer,
            scale: Scale::Step,
            scale_dtype: options.take_name("scale_dtype", &dtypes, DType::F32)?,
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
            (
                "scale_dtype",
                OptionValue::Name(spec.scale_dtype.name().into()),
            ),
        ]
    }

    fn check_shape(&self, spec: &Spec, shape: &[usize]) -> Result<()> {
        match spec.granularity {
            Granularity::Block(block) => check_rows(shape, block),
            _ => Ok(()),
        }
    }

    fn parts(&self, spec: &Spec, shape: &[usize]) -> Result<Vec<Part>> {
        let n = element_count(shape)?;
        let block_len = spec.block_len(shape);
        let (blocks, block_bits) = match spec.granularity {
            Granularity::Tensor => (1, 0),
            _ if n == 0 => (0, 8 * spec.scale_dtype.size()),
            _ => (n / block_len, 8 * spec.scale_dtype.size()),
        };
        Ok(vec![
            self.elements.part(shape, n, block_len),
            Part {
                name: "scales",
                dtype: spec.scale_dtype,
                shape: vec![blocks],
                block_bits,
            },
        ])
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
        let scales = match extremes {
            Some(e) => vec![self.scale(spec, e.absmax()); x.len().div_ceil(block_len)],
            None => self.scales(spec, block_len, x)?,
        };
        self.elements
            .encode(x, block_len, &scales, spec.scale, parts[0]);
        match extremes {
            Some(_) => Ok(()),
            None => narrow(spec.scale_dtype, &scales, parts[1]),
        }
    }

    fn finish(
        &self,
        spec: &Spec,
        extremes: Option<Extremes>,
        mut working: Vec<(&'static str, Tensor)>,
    ) -> Result<Vec<(&'static str, Tensor)>> {
        if let Some(extremes) = extremes {
            let most = extremes.absmax();
            let scale = self.finite(spec, most, self.scale(spec, most))?;
            let mut bytes = vec![0; spec.scale_dtype.size()];
            narrow(spec.scale_dtype, &[scale], &mut bytes)?;
            working[1].1 = Tensor::from_slice(spec.scale_dtype, &[1], &bytes)?;
        }
        Ok(working)
    }

    fn grid<'a>(
        &'a self,
        spec: &'a Spec,
        extremes: Option<Extremes>,
    ) -> Result<Box<dyn Grid + 'a>> {
        Ok(Box::new(Fp8Grid {
            format: self,
            spec,
            extremes,
        }))
    }

    fn decoder<'a>(&'a self, q: &'a Quantized) -> Result<Box<dyn Decode + 'a>> {
        let mut decoder = self.elements.decoder(q.part("codes")?, q.part("scales")?);
        if q.spec.granularity != Granularity::Tensor {
            decoder.block_len = q.spec.block_len(&q.shape).max(1);
        }
        Ok(Box::new(decoder))
    }
}

struct Fp8Grid<'a> {
    format: &'a Fp8,
    spec: &'a Spec,
    extremes: Option<Extremes>,
}

impl Grid for Fp8Grid<'_> {
    fn fit(
        &self,
        x: &[f32],
        block_len: usize,
        scales: &mut [f32],
        _zeros: &mut [f32],
    ) -> Result<()> {
        match self.extremes {
            Some(e) => scales.fill(self.format.scale(self.spec, e.absmax())),
            None => scales.copy_from_slice(&self.format.scales(self.spec, block_len, x)?),
        }
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
        self.format
            .elements
            .round(x, scales, self.spec.scale, codes, values);
    }

    fn store(&self, codes: &[u8], scales: &[f32], _zeros: &[f32]) -> Result<Vec<Vec<u8>>> {
        let codes = self.format.elements.pack(codes);
        if self.extremes.is_some() {
            // One scale, which follows from them.
            return Ok(vec![codes]);
        }
        let mut bytes = vec![0u8; scales.len() * self.spec.scale_dtype.size()];
        narrow(self.spec.scale_dtype, scales, &mut bytes)?;
        Ok(vec![codes, bytes])
    }
}
