//! Quantized values as a grid: a code for every weight while columns are rounded,
//! those that are not zero when they are stored.

use super::{Kept, mask_len, pack, size_of};
use crate::error::{Error, Result};
use crate::format::{Extremes, Granularity, Grid, Spec};
use crate::simd::sparsity::{GROUP, PLACES, pick};

pub(super) struct SparseGrid<'a> {
    inner: Box<dyn Grid + 'a>,
    spec: &'a Spec,
}

impl<'a> SparseGrid<'a> {
    pub fn new(spec: &'a Spec, extremes: Option<Extremes>) -> Result<SparseGrid<'a>> {
        match Kept::of(spec.values) {
            Kept::Quantized(format) => Ok(SparseGrid {
                inner: format.grid(spec, extremes)?,
                spec,
            }),
            Kept::Floats(_) => Err(Error::option(
                "values",
                "gptq rounds to int8 or fp8_e4m3; for floats make the tensor sparse first, by sparsegpt",
            )),
        }
    }
}

impl Grid for SparseGrid<'_> {
    fn two_of_four(&self) -> bool {
        true
    }

    fn fit(
        &self,
        x: &[f32],
        block_len: usize,
        scales: &mut [f32],
        zeros: &mut [f32],
    ) -> Result<()> {
        self.inner.fit(x, block_len, scales, zeros)
    }

    fn round(
        &self,
        x: &[f32],
        scales: &[f32],
        zeros: &[f32],
        codes: &mut [u8],
        values: &mut [f32],
    ) {
        self.inner.round(x, scales, zeros, codes, values);
    }

    fn store(&self, codes: &[u8], scales: &[f32], zeros: &[f32]) -> Result<Vec<Vec<u8>>> {
        let (groups, _) = codes.as_chunks::<GROUP>();
        let masks: Vec<u8> = groups
            .iter()
            .map(|g| pick(g.map(|code| size_of([code]))))
            .collect();
        let pairs = groups.iter().zip(&masks).flat_map(|(group, &mask)| {
            let (first, second) = PLACES[usize::from(mask)];
            [group[first], group[second]]
        });
        let kept: Vec<u8> = pairs.collect();
        let mut parts = self.inner.store(&kept, scales, zeros)?;
        if self.spec.granularity == Granularity::Tensor {
            // The one scale follows from the extremes.
            parts.push(vec![0; self.spec.scale_dtype.size()]);
        }
        // A row has a scale each, whatever is stored of them.
        let row = codes.len() / scales.len();
        let mut bitmask = vec![0u8; scales.len() * mask_len(row)];
        pack(&masks, row, &mut bitmask);
        parts.push(bitmask);
        Ok(parts)
    }
}
