//! The MX formats of the OCP: blocks of 32 floats under a power of two, stored
//! as its exponent in a byte. value = element · 2^(code − 127).
//!
//! | | elements | bits per weight |
//! |---|---|---|
//! | mxfp8, mxfp8_e5m2 | E4M3, E5M2 | 8.25 |
//! | mxfp4 | E2M1, two a byte with the first in the low bits | 4.25 |
//!
//! The exponent follows from the block's largest magnitude by one of four
//! rules, since programs differ: see [`Scale`]. The mse method tries that
//! exponent and its two neighbours.

use super::scaled::{Elements, absmax, check_rows};
use crate::error::Result;
use crate::format::{
    Decode, Extremes, Format, Granularity, Grid, Input, Method, OptionValue, Options, Part,
    Quantized, Scale, Spec, Values, Zero,
};
use crate::small_float::e8m0;
use crate::tensor::{DType, element_count, narrow};

/// Elements that share an exponent.
pub const BLOCK: usize = 32;

pub struct Mx {
    name: &'static str,
    about: &'static str,
    elements: Elements,
}

pub static MXFP8: Mx = Mx {
    name: "mxfp8",
    about: "8-bit floats of 3 mantissa bits, a power of two for 32 of them (OCP MX)",
    elements: Elements::E4M3,
};

pub static MXFP8_E5M2: Mx = Mx {
    name: "mxfp8_e5m2",
    about: "8-bit floats of 2 mantissa bits, a power of two for 32 of them (OCP MX)",
    elements: Elements::E5M2,
};

pub static MXFP4: Mx = Mx {
    name: "mxfp4",
    about: "4-bit floats, a power of two for 32 of them (OCP MX)",
    elements: Elements::E2M1,
};

/// The greatest whole number up to log₂ `most`, where ggml has the logarithm in
/// f32: the nearest below a power of two count as that power.
fn log2_rounded_down(most: f32) -> i32 {
    let most = f64::from(most);
    let exponent = (most.to_bits() >> 52) as i32 - 1023;
    let next = (exponent + 1) as f32;
    // log₂(1 − δ) = −δ / ln 2, for δ far above its square.
    let short = (1.0 - most / f64::from(next).exp2()) / std::f64::consts::LN_2;
    let spacing = f64::from(next - next.next_down());
    exponent + i32::from(short <= spacing / 2.0)
}

impl Mx {
    /// The code of a block's exponent.
    fn exponent(&self, rule: Scale, most: f32) -> u8 {
        let largest = self.elements.float().max();
        let bits = most.to_bits();
        // The biased exponent of the largest element, less the bias of E8M0.
        let top = (largest.to_bits() >> 23) - 127;
        let code = match rule {
            // Where the mantissa is 1.75 or more, elements with one bit of it
            // would round up to the next binade.
            Scale::Bump => ((bits + (1 << 21)) >> 23).saturating_sub(top),
            Scale::Ggml => {
                let exponent = 127 + log2_rounded_down(most);
                (exponent.max(0) as u32).saturating_sub(top)
            }
            // Up from √2 on.
            Scale::Round => ((most / largest).to_bits() + 0x004a_fb0c) >> 23,
            _ => (bits >> 23).saturating_sub(top),
        };
        code.min(254) as u8
    }

    /// The exponent of each block.
    fn exponents(&self, spec: &Spec, block_len: usize, x: &[f32], exponents: &mut [u8]) {
        for (exponent, most) in exponents.iter_mut().zip(absmax(x, block_len)) {
            *exponent = self.exponent(spec.scale, most);
        }
        if spec.method == Method::Mse {
            let tried = |code: u8| [code, code.saturating_sub(1), (code + 1).min(254)];
            let candidates: Vec<f32> = exponents
                .iter()
                .flat_map(|&code| tried(code).map(e8m0::decode))
                .collect();
            let best = self.elements.search(x, block_len, &candidates, 3);
            for (exponent, best) in exponents.iter_mut().zip(best) {
                *exponent = tried(*exponent)[usize::from(best)];
            }
        }
    }
}

impl Format for Mx {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn resolve(&self, options: &mut Options) -> Result<Spec> {
        let methods = [("rtn", Method::Rtn), ("mse", Method::Mse)];
        let mut rules = vec![
            ("floor", Scale::Floor),
            ("bump", Scale::Bump),
            ("round", Scale::Round),
        ];
        if self.elements == Elements::E2M1 {
            rules.push(("ggml", Scale::Ggml));
        }
        Ok(Spec {
            format: self.name.into(),
            method: options.take_name("method", &methods, Method::Rtn)?,
            granularity: Granularity::Block(BLOCK),
            symmetric: true,
            zero: Zero::Integer,
            scale: options.take_name("scale", &rules, Scale::Floor)?,
            scale_dtype: DType::F8E8M0,
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
            self.elements.part(shape, n, BLOCK),
            Part {
                name: "scales",
                dtype: DType::F8E8M0,
                shape: vec![n / BLOCK],
                block_bits: 8,
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
        let [codes, exponents] = parts else {
            return Ok(());
        };
        self.exponents(spec, block_len, x, exponents);
        let scales: Vec<f32> = exponents.iter().map(|&code| e8m0::decode(code)).collect();
        self.elements
            .encode(x, block_len, &scales, spec.scale, codes);
        Ok(())
    }

    fn grid<'a>(
        &'a self,
        spec: &'a Spec,
        _extremes: Option<Extremes>,
    ) -> Result<Box<dyn Grid + 'a>> {
        Ok(Box::new(MxGrid { format: self, spec }))
    }

    fn decoder<'a>(&'a self, q: &'a Quantized) -> Result<Box<dyn Decode + 'a>> {
        let mut decoder = self.elements.decoder(q.part("codes")?, q.part("scales")?);
        decoder.block_len = BLOCK;
        Ok(Box::new(decoder))
    }
}

struct MxGrid<'a> {
    format: &'a Mx,
    spec: &'a Spec,
}

impl Grid for MxGrid<'_> {
    fn fit(
        &self,
        x: &[f32],
        block_len: usize,
        scales: &mut [f32],
        _zeros: &mut [f32],
    ) -> Result<()> {
        let mut exponents = vec![0u8; scales.len()];
        self.format
            .exponents(self.spec, block_len, x, &mut exponents);
        for (scale, exponent) in scales.iter_mut().zip(exponents) {
            *scale = e8m0::decode(exponent);
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
        let mut exponents = vec![0u8; scales.len()];
        narrow(DType::F8E8M0, scales, &mut exponents)?;
        Ok(vec![self.format.elements.pack(codes), exponents])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_of_f32_round_up_to_whole_numbers() {
        for (most, expected) in [
            (1.0, 0),
            (1.5, 0),
            (0.75, -1),
            // 2 − 8.6e−8 is nearer to the number below 2, 4 − 8.6e−8 to 4.
            (4f32.next_down(), 1),
            (16f32.next_down(), 4),
            (0.125f32.next_down(), -3),
            (0.125f32.next_down().next_down(), -4),
            (1f32.next_down(), -1),
            (f32::MAX, 128),
            (f32::MIN_POSITIVE, -126),
            (f32::from_bits(1), -149),
        ] {
            assert_eq!(log2_rounded_down(most), expected, "{most:e}");
        }
    }
}
