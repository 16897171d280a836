//! Quantized tensor → dense floats.

use rayon::prelude::*;

use super::{CHUNK, Cancel, pool};
use crate::error::{Error, Result};
use crate::format::Quantized;
use crate::method::input;
use crate::simd::memory;
use crate::simd::sink::Out;
use crate::tensor::{DType, narrow};

/// Bytes of a result of which caches lose the first before the last are written.
const PAST_CACHES: usize = 16 << 20;

/// Elements of one task then: it ends with waiting for what it wrote.
const STREAMED: usize = 256 * 1024;

/// Bytes that [`dequantize_into`] writes.
pub fn dequantized_len(q: &Quantized, dtype: DType) -> usize {
    q.len() * dtype.size()
}

/// Writes the values of `q`, rounded once from f32 to `dtype`, into `out`.
///
/// # Errors
/// `UnsupportedDtype` unless `dtype` is floating point, `SizeMismatch` unless
/// `out` has exactly the result's size, `Cancelled`.
pub fn dequantize_into(q: &Quantized, dtype: DType, out: &mut [u8], cancel: &Cancel) -> Result<()> {
    if !dtype.is_float() {
        return Err(Error::UnsupportedDtype {
            op: "dequantize".into(),
            dtype: dtype.name().into(),
        });
    }
    let expected = dequantized_len(q, dtype);
    if out.len() != expected {
        return Err(Error::SizeMismatch {
            what: "bytes of the dequantized tensor".into(),
            expected,
            actual: out.len(),
        });
    }
    let decoder = input::decoder(q)?;
    memory::use_huge_pages(out);
    let size = dtype.size();
    let past_caches = dtype == DType::F32 && out.len() >= PAST_CACHES;
    let chunk = if past_caches { STREAMED } else { CHUNK };
    pool::run(|| {
        out.par_chunks_mut(chunk * size)
            .enumerate()
            .try_for_each_init(Vec::new, |scratch, (i, out)| {
                cancel.check()?;
                if dtype == DType::F32
                    && let Ok(out) = bytemuck::try_cast_slice_mut(out)
                {
                    let values = Out {
                        values: out,
                        past_caches,
                    };
                    decoder.decode_into(i * chunk, values);
                    return Ok(());
                }
                scratch.clear();
                scratch.resize(out.len() / size, 0f32);
                decoder.decode(i * chunk, scratch);
                narrow(dtype, scratch, out)
            })
    })
}

/// The values of `q` as f32.
pub fn dequantize(q: &Quantized) -> Result<Vec<f32>> {
    let mut out = vec![0f32; q.len()];
    dequantize_into(
        q,
        DType::F32,
        bytemuck::cast_slice_mut(&mut out),
        &Cancel::new(),
    )?;
    Ok(out)
}
