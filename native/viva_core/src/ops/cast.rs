//! Dense tensor → the same values in another float dtype.

use super::{CHUNK, Cancel, pool};
use crate::error::Result;
use crate::tensor::{DType, Tensor, narrow};
use rayon::prelude::*;

/// Writes `x`, rounded once from f32, as `dtype` into `out`, which has exactly
/// the result's size.
pub fn cast_into(x: &Tensor, dtype: DType, out: &mut [u8], cancel: &Cancel) -> Result<()> {
    pool::run(|| {
        out.par_chunks_mut(CHUNK * dtype.size())
            .enumerate()
            .try_for_each_init(Vec::new, |scratch, (i, out)| {
                cancel.check()?;
                let start = i * CHUNK;
                let end = start + out.len() / dtype.size();
                narrow(dtype, x.f32_chunk(start..end, scratch), out)
            })
    })
}
