//! NVFP4: blocks of 16 E2M1 elements under an E4M3 scale, and one f32 scale
//! for the tensor. value = element · (scale / global_scale).
//!
//! As compressed-tensors chooses them (`step`), global_scale = 448 · 6 / the
//! tensor's largest magnitude, and scale = the block's largest magnitude / 6 ·
//! global_scale, rounded; a scale of zero becomes 0.125. `floor` rounds that
//! global_scale down to a power of two, which can be divided by and multiplied
//! with alike; ggml's own quantizer (`ggml`) does without one. The mse method tries the
//! neighbours of that scale too, from the block's largest magnitude just past 6
//! to below 4.

use super::scaled::{Elements, absmax, check_rows};
use crate::error::Result;
use crate::format::{
    Decode, Extremes, Format, Granularity, Grid, Input, Method, OptionValue, Options, Part,
    Quantized, Scale, Spec, Values, Zero,
};
use crate::small_float::{E2M1, E4M3, E4M3_VALUES};
use crate::tensor::{DType, Tensor, element_count};

/// Elements that share a scale.
pub const BLOCK: usize = 16;

pub struct Nvfp4;

pub static NVFP4: Nvfp4 = Nvfp4;

const ELEMENTS: Elements = Elements::E2M1;

/// Codes of scales that the search tries, counted from that of rtn. E4M3 has 8
/// codes a binade: 6 becomes 4 near the fifth.
const TRIED: [i32; 10] = [0, -2, -1, 1, 2, 3, 4, 5, 6, 7];

/// The code of 0.125, which compressed-tensors stores in place of zero.
const LEAST: u8 = 0x20;

/// The largest positive code.
const MOST: i32 = 0x7e;

fn global_scale(rule: Scale, extremes: Option<Extremes>) -> f32 {
    // Not needed, and not there, where ggml chooses.
    let Some(extremes) = extremes else {
        return 1.0;
    };
    // Two roundings, as torch divides a number by a tensor.
    let global = 1.0 / extremes.absmax().max(f32::MIN_POSITIVE) * (E4M3.max() * E2M1.max());
    // Where a tensor is so small that this overflows it keeps its own scale.
    if !global.is_finite() {
        return 1.0;
    }
    match rule {
        // The power of two below: the exponent alone.
        Scale::Floor => f32::from_bits(global.to_bits() & 0x7f80_0000),
        _ => global,
    }
}

/// The code of a scale as ggml rounds it: half up, subnormal codes up to the
/// last of them; what would be 256 or more becomes the largest.
fn ggml_scale(scale: f32) -> u8 {
    let bits = scale.to_bits();
    // From the bias of f32 to that of E4M3.
    let rebias = 127 - 7;
    if bits >> 23 <= rebias {
        return ((scale * 512.0 + 0.5) as u8).min(7);
    }
    match ((bits + (1 << 19)) >> 20) - (rebias << 3) {
        code @ ..0x78 => code as u8,
        _ => MOST as u8,
    }
}

/// The code of each block's scale.
fn choose_scales(
    spec: &Spec,
    block_len: usize,
    extremes: Option<Extremes>,
    x: &[f32],
    scales: &mut [u8],
) {
    let global = global_scale(spec.scale, extremes);
    let value = |code: u8| E4M3_VALUES[usize::from(code)] / global;
    for (scale, most) in scales.iter_mut().zip(absmax(x, block_len)) {
        *scale = match spec.scale {
            Scale::Ggml => ggml_scale(most / E2M1.max()),
            _ => match E4M3.encode(global * (most / E2M1.max())) {
                0 => LEAST,
                code => code,
            },
        };
    }
    if spec.method == Method::Mse {
        let tried = |code: u8| TRIED.map(|by| (i32::from(code) + by).clamp(1, MOST) as u8);
        let candidates: Vec<f32> = scales
            .iter()
            .flat_map(|&code| tried(code).map(value))
            .collect();
        let best = ELEMENTS.search(x, block_len, &candidates, TRIED.len());
        for (scale, best) in scales.iter_mut().zip(best) {
            *scale = tried(*scale)[usize::from(best)];
        }
    }
}

impl Format for Nvfp4 {
    fn name(&self) -> &'static str {
        "nvfp4"
    }

    fn about(&self) -> &'static str {
        "4-bit floats, an 8-bit scale for 16 of them and one for the tensor (NVIDIA)"
    }

    fn resolve(&self, options: &mut Options) -> Result<Spec> {
        let methods = [("rtn", Method::Rtn), ("mse", Method::Mse)];
        let rules = [
            ("step", Scale::Step),
            ("floor", Scale::Floor),
            ("ggml", Scale::Ggml),
        ];
        Ok(Spec {
            format: self.name().into(),
            method: options.take_name("method", &methods, Method::Rtn)?,
            granularity: Granularity::Block(BLOCK),
            symmetric: true,
            zero: Zero::Integer,
            scale: options.take_name("scale", &rules, Scale::Step)?,
            scale_dtype: DType::F8E4M3,
            double_quant: false,
            act_order: false,
            values: Values::Source,
            input: Input::default(),
        })
    }

    fn options(&self, spec: &Spec) -> Vec<(&'static str, OptionValue)> {
        vec![("method", spec.method.into()), ("scale", spec.scale.into())]
    }

    fn check_shape(&self, _spec: &Spec, shape: &[usize]) -> Result<()> {
        check_rows(shape, BLOCK)
    }

    fn parts(&self, _spec: &Spec, shape: &[usize]) -> Result<Vec<Part>> {
        let n = element_count(shape)?;
        Ok(vec![
            ELEMENTS.part(shape, n, BLOCK),
            Part {
                name: "scales",
                dtype: DType::F8E4M3,
                shape: vec![n / BLOCK],
                block_bits: 8,
            },
            Part {
                name: "global_scale",
                dtype: DType::F32,
                shape: vec![1],
                block_bits: 0,
            },
        ])
    }

    fn needs_extremes(&self, spec: &Spec) -> bool {
        spec.scale != Scale::Ggml
    }

    fn encode(
        &self,
        spec: &Spec,
        block_len: usize,
        extremes: Option<Extremes>,
        x: &[f32],
        parts: &mut [&mut [u8]],
    ) -> Result<()> {
        let [codes, scales, ..] = parts else {
            return Ok(());
        };
        choose_scales(spec, block_len, extremes, x, scales);
        let global = global_scale(spec.scale, extremes);
        let value = |code: u8| E4M3_VALUES[usize::from(code)] / global;
        let values: Vec<f32> = scales.iter().map(|&code| value(code)).collect();
        ELEMENTS.encode(x, block_len, &values, spec.scale, codes);
        Ok(())
    }

    fn finish(
        &self,
        spec: &Spec,
        extremes: Option<Extremes>,
        mut working: Vec<(&'static str, Tensor)>,
    ) -> Result<Vec<(&'static str, Tensor)>> {
        let global = [global_scale(spec.scale, extremes)];
        working[2].1 = Tensor::from_slice(DType::F32, &[1], &global)?;
        Ok(working)
    }

    fn grid<'a>(
        &'a self,
        spec: &'a Spec,
        extremes: Option<Extremes>,
    ) -> Result<Box<dyn Grid + 'a>> {
        Ok(Box::new(Nvfp4Grid { spec, extremes }))
    }

    fn decoder<'a>(&'a self, q: &'a Quantized) -> Result<Box<dyn Decode + 'a>> {
        let mut decoder = ELEMENTS.decoder(q.part("codes")?, q.part("scales")?);
        decoder.block_len = BLOCK;
        decoder.divisor = q.part("global_scale")?.to_f32_vec()[0];
        Ok(Box::new(decoder))
    }
}

struct Nvfp4Grid<'a> {
    spec: &'a Spec,
    extremes: Option<Extremes>,
}

impl Grid for Nvfp4Grid<'_> {
    /// The code of a scale stands where others have a zero point.
    fn fit(
        &self,
        x: &[f32],
        block_len: usize,
        scales: &mut [f32],
        zeros: &mut [f32],
    ) -> Result<()> {
        let mut codes = vec![0u8; scales.len()];
        choose_scales(self.spec, block_len, self.extremes, x, &mut codes);
        let global = global_scale(self.spec.scale, self.extremes);
        for ((scale, zero), code) in scales.iter_mut().zip(zeros).zip(codes) {
            *scale = E4M3_VALUES[usize::from(code)] / global;
            *zero = f32::from(code);
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
        ELEMENTS.round(x, scales, self.spec.scale, codes, values);
    }

    fn store(&self, codes: &[u8], _scales: &[f32], zeros: &[f32]) -> Result<Vec<Vec<u8>>> {
        let scales = zeros.iter().map(|&code| code as u8).collect();
        Ok(vec![ELEMENTS.pack(codes), scales])
    }
}
