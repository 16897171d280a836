//! Integer formats as grids: codes under scales that are already chosen.

use super::Int;
use crate::error::{Error, Result};
use crate::format::{Extremes, Granularity, Grid, Scale, Spec, Zero};
use crate::simd::bits;
use crate::simd::dispatch;
use crate::simd::int::Round;
use crate::tensor::narrow;

pub(super) struct IntGrid<'a> {
    int: &'a Int,
    spec: &'a Spec,
    extremes: Option<Extremes>,
}

impl<'a> IntGrid<'a> {
    pub fn new(int: &'a Int, spec: &'a Spec, extremes: Option<Extremes>) -> Result<IntGrid<'a>> {
        if spec.scale == Scale::Absmax {
            return Err(Error::option(
                "scale",
                "absmax is the rule of LLM.int8(), whose codes are round to nearest; use scale: :step",
            ));
        }
        Ok(IntGrid {
            int,
            spec,
            extremes,
        })
    }

    fn float_zero(&self) -> bool {
        self.spec.zero == Zero::Float
    }
}

impl Grid for IntGrid<'_> {
    fn fit(
        &self,
        x: &[f32],
        block_len: usize,
        scales: &mut [f32],
        zeros: &mut [f32],
    ) -> Result<()> {
        if let Some(extremes) = self.extremes {
            let fit = self.int.tensor_fit(self.spec, extremes);
            scales.fill(fit.scale);
            zeros.fill(fit.zero as f32);
            return Ok(());
        }
        let mut codes = vec![0u8; x.len()];
        let mut integers = vec![0u8; zeros.len()];
        self.int.choose(
            self.spec,
            block_len,
            None,
            x,
            (&mut codes, scales, &mut integers, zeros),
        )?;
        if !self.float_zero() {
            for (zero, integer) in zeros.iter_mut().zip(integers) {
                *zero = f32::from(integer);
            }
        }
        Ok(())
    }

    fn round(
        &self,
        x: &[f32],
        scales: &[f32],
        zeros: &[f32],
        codes: &mut [u8],
        values: &mut [f32],
    ) {
        dispatch(Round {
            grid: self.int.grid(self.spec.symmetric),
            float_zero: self.float_zero(),
            x,
            scales,
            zeros,
            codes,
            values,
        });
    }

    fn store(&self, codes: &[u8], scales: &[f32], zeros: &[f32]) -> Result<Vec<Vec<u8>>> {
        let bits = self.int.bits;
        let mut packed = match bits {
            8 => codes.to_vec(),
            _ => vec![0u8; bits::packed_len(bits, codes.len())],
        };
        if bits < 8 {
            bits::pack(bits, codes, &mut packed);
        }
        let floats = |values: &[f32]| {
            let mut bytes = vec![0u8; values.len() * self.spec.scale_dtype.size()];
            narrow(self.spec.scale_dtype, values, &mut bytes).map(|()| bytes)
        };
        let mut parts = vec![packed];
        if self.spec.granularity == Granularity::Tensor {
            // They follow from the extremes.
            return Ok(parts);
        }
        parts.push(floats(scales)?);
        if self.float_zero() {
            parts.push(floats(zeros)?);
        } else if !self.spec.symmetric {
            let integers: Vec<u8> = zeros.iter().map(|&z| z as u8).collect();
            let mut packed = vec![0u8; bits::packed_len(bits, integers.len())];
            bits::pack(bits, &integers, &mut packed);
            parts.push(packed);
        }
        Ok(parts)
    }
}
