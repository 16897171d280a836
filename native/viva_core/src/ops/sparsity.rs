//! 2:4 sparsity of dense tensors: two of every four weights become zeros.

use rayon::prelude::*;

use super::quantize::count_non_finite;
use super::{CHUNK, Cancel, pool};
use crate::error::{Error, Result};
use crate::format::{Format, Values};
use crate::formats::sparse24::{SPARSE24, floats};
use crate::simd::dispatch;
use crate::simd::sparsity::{GROUP, Pick};
use crate::simd::stats::IsFinite;
use crate::tensor::{DType, Tensor};

/// Writes `x`, with zeros for two of every four weights of its rows, into `out`,
/// which has exactly its size. The two with the greatest magnitudes of `scores`
/// stay as they are; a method that knows more than the weights themselves puts
/// what it knows there. What is written `sparse24` keeps whole.
///
/// # Errors
/// `UnsupportedDtype` unless both are floating point, `ShapeMismatch` unless
/// they are of one shape, `Indivisible` where rows are no whole groups,
/// `NonFinite`, `Cancelled`.
pub fn sparsify_into(x: &Tensor, scores: &Tensor, out: &mut [u8], cancel: &Cancel) -> Result<()> {
    check(x, out)?;
    check_dtype(scores)?;
    if scores.shape() != x.shape() {
        return Err(Error::ShapeMismatch {
            what: "sparsify takes a score for each weight".into(),
            expected: x.shape().to_vec(),
            actual: scores.shape().to_vec(),
        });
    }
    let size = x.dtype().size();
    let outcome = pool::run(|| {
        out.par_chunks_mut(CHUNK * size)
            .zip(x.bytes().par_chunks(CHUNK * size))
            .enumerate()
            .try_for_each_init(Vec::new, |scratch, (i, (out, bytes))| {
                cancel.check()?;
                let range = i * CHUNK..i * CHUNK + bytes.len() / size;
                let scores = scores.f32_chunk(range, scratch);
                if !dispatch(IsFinite(scores)) {
                    return Err(Error::NonFinite {
                        nan: 0,
                        inf: 0,
                        first: 0,
                    });
                }
                let mut masks = vec![0u8; scores.len() / GROUP];
                let masks = &mut masks[..];
                dispatch(Pick { scores, masks });
                let weights = out.chunks_mut(size).zip(bytes.chunks(size));
                for (w, (out, weight)) in weights.enumerate() {
                    match masks[w / GROUP] >> (w % GROUP) & 1 {
                        0 => out.fill(0),
                        _ => out.copy_from_slice(weight),
                    }
                }
                Ok(())
            })
    });
    // A chunk only notices; what and where is counted over all.
    match outcome {
        Err(error @ Error::NonFinite { .. }) => Err(count_non_finite(scores).unwrap_or(error)),
        other => other,
    }
}

/// That `x` can be sparse, and `out` take it.
pub(crate) fn check(x: &Tensor, out: &[u8]) -> Result<()> {
    check_dtype(x)?;
    SPARSE24.check_shape(&floats(Values::Source), x.shape())?;
    match out.len() == x.bytes().len() {
        true => Ok(()),
        false => Err(Error::SizeMismatch {
            what: "bytes of the sparse tensor".into(),
            expected: x.bytes().len(),
            actual: out.len(),
        }),
    }
}

fn check_dtype(x: &Tensor) -> Result<()> {
    // Powers of two have no zero.
    match x.dtype().is_float() && x.dtype() != DType::F8E8M0 {
        true => Ok(()),
        false => Err(Error::UnsupportedDtype {
            op: "sparsify".into(),
            dtype: x.dtype().name().into(),
        }),
    }
}
