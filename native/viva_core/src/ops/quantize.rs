//! Dense tensor → quantized tensor.

use rayon::prelude::*;

use super::{CHUNK, Cancel, pool};
use crate::error::{Error, Result};
use crate::format::{Extremes, NOT_FINITE, Part, Quantized, Spec};
use crate::simd::dispatch;
use crate::simd::stats::{IsFinite, RangeWithZero};
use crate::tensor::{Buffer, DType, Tensor};

/// Quantizes `x` as `spec` says. The result does not depend on the number of
/// threads.
///
/// # Errors
/// `UnsupportedDtype` unless `x` is floating point, `Indivisible` when blocks do
/// not fit its rows, `NonFinite` when it holds a NaN or infinity,
/// `ScaleOverflow`, `Cancelled`.
pub fn quantize(x: &Tensor, spec: &Spec, cancel: &Cancel) -> Result<Quantized> {
    if !x.dtype().is_float() {
        return Err(Error::UnsupportedDtype {
            op: "quantize".into(),
            dtype: x.dtype().name().into(),
        });
    }
    let spec = &*spec.for_dtype(x.dtype())?;
    let format = spec.format()?;
    format.check_shape(spec, x.shape())?;
    let working = format.working_parts(spec, x.shape())?;
    let mut buffers: Vec<Buffer> = working
        .iter()
        .map(|p| Buffer::zeroed(p.shape.iter().product::<usize>() * p.dtype.size()))
        .collect();
    let block_len = spec.block_len(x.shape()).max(1);
    let unseen = !format.sees_non_finite(spec);
    let outcome = pool::run(|| {
        let extremes = needed_extremes(x, spec, cancel)?;
        let tasks = cut(x.len(), block_len, &working, &mut buffers);
        tasks
            .into_par_iter()
            .try_for_each_init(Vec::new, |scratch, mut task| {
                cancel.check()?;
                let values = x.f32_chunk(task.start..task.end, scratch);
                if unseen && !dispatch(IsFinite(values)) {
                    return Err(NOT_FINITE);
                }
                format.encode(spec, block_len, extremes, values, &mut task.parts)
            })?;
        Ok(extremes)
    });
    let extremes = match outcome {
        // Chunks only notice; what and where is counted once, over all. And a
        // scale of the whole tensor overflows in its finite chunks too.
        Err(error @ (Error::NonFinite { .. } | Error::ScaleOverflow { .. })) => {
            return Err(count_non_finite(x).unwrap_or(error));
        }
        other => other?,
    };
    let filled = working
        .into_iter()
        .zip(buffers)
        .map(|(p, buffer)| Ok((p.name, Tensor::from_buffer(p.dtype, p.shape, buffer)?)))
        .collect::<Result<Vec<_>>>()?;
    Ok(Quantized {
        parts: format.finish(spec, extremes, filled)?,
        spec: spec.clone(),
        shape: x.shape().to_vec(),
        dtype: x.dtype(),
    })
}

/// What rows of k become when they are quantized and read back, for searches:
/// on the calling thread, by the rules of a whole tensor's extremes.
pub(crate) fn round_trip(
    spec: &Spec,
    extremes: Option<Extremes>,
    k: usize,
    x: &[f32],
    out: &mut Vec<f32>,
) -> Result<()> {
    let format = spec.format()?;
    let shape = vec![x.len() / k, k];
    let working = format.working_parts(spec, &shape)?;
    let mut bytes: Vec<Vec<u8>> = working
        .iter()
        .map(|p| vec![0u8; p.shape.iter().product::<usize>() * p.dtype.size()])
        .collect();
    let mut pieces: Vec<&mut [u8]> = bytes.iter_mut().map(Vec::as_mut_slice).collect();
    let block_len = spec.block_len(&shape).max(1);
    format.encode(spec, block_len, extremes, x, &mut pieces)?;
    let parts = working
        .into_iter()
        .zip(&bytes)
        .map(|(p, bytes)| Ok((p.name, Tensor::from_slice(p.dtype, &p.shape, bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    let q = Quantized {
        parts: format.finish(spec, extremes, parts)?,
        spec: spec.clone(),
        shape,
        dtype: DType::F32,
    };
    out.resize(x.len(), 0.0);
    format.decoder(&q)?.decode(0, out);
    Ok(())
}

/// Checks that a tensor is of floats, all of them numbers.
///
/// # Errors
/// `UnsupportedDtype`, `NonFinite`.
pub(crate) fn check_floats(x: &Tensor) -> Result<()> {
    if !x.dtype().is_float() {
        return Err(Error::UnsupportedDtype {
            op: "quantize".into(),
            dtype: x.dtype().name().into(),
        });
    }
    let mut scratch = Vec::new();
    let finite = (0..x.len()).step_by(CHUNK).all(|start| {
        let end = (start + CHUNK).min(x.len());
        dispatch(IsFinite(x.f32_chunk(start..end, &mut scratch)))
    });
    match finite {
        true => Ok(()),
        // What and where is counted only when there is something to count.
        false => count_non_finite(x).map_or(Ok(()), Err),
    }
}

/// The extremes of the tensor, where the spec's format asks for them.
pub(crate) fn needed_extremes(
    x: &Tensor,
    spec: &Spec,
    cancel: &Cancel,
) -> Result<Option<Extremes>> {
    match spec.format()?.needs_extremes(spec) {
        true => pool::run(|| extremes(x, cancel)).map(Some),
        false => Ok(None),
    }
}

/// A run of whole blocks, with its piece of every part.
struct Task<'a> {
    start: usize,
    end: usize,
    parts: Vec<&'a mut [u8]>,
}

/// Cuts `n` elements into runs of blocks that begin on a whole byte in every
/// part, and hands each run its own piece of the buffers.
fn cut<'a>(n: usize, block_len: usize, parts: &[Part], buffers: &'a mut [Buffer]) -> Vec<Task<'a>> {
    let mut step = 1;
    while parts.iter().any(|p| p.block_bits * step % 8 != 0) {
        step *= 2;
    }
    // Shorter than elsewhere: reading a mapped file for the first time and
    // choosing codes take long enough to cost others their turn.
    let blocks = (CHUNK / 2 / block_len / step).max(1) * step;
    let len = blocks * block_len;
    let mut rest: Vec<&mut [u8]> = buffers.iter_mut().map(Buffer::bytes_mut).collect();
    let mut tasks = Vec::with_capacity(n / len + 1);
    let mut start = 0;
    while start < n {
        let end = (start + len).min(n);
        let pieces = rest
            .iter_mut()
            .zip(parts)
            .map(|(rest, part)| {
                // The last run takes what is left, padding bits included.
                let bytes = if end == n && part.block_bits > 0 {
                    rest.len()
                } else {
                    blocks * part.block_bits / 8
                };
                let (piece, tail) = std::mem::take(rest).split_at_mut(bytes);
                *rest = tail;
                piece
            })
            .collect();
        tasks.push(Task {
            start,
            end,
            parts: pieces,
        });
        start = end;
    }
    tasks
}

/// The runs of a tensor that need no block boundaries.
pub(crate) fn runs(n: usize) -> impl IndexedParallelIterator<Item = std::ops::Range<usize>> {
    (0..n.div_ceil(CHUNK))
        .into_par_iter()
        .map(move |i| i * CHUNK..((i + 1) * CHUNK).min(n))
}

fn extremes(x: &Tensor, cancel: &Cancel) -> Result<Extremes> {
    runs(x.len())
        .map_init(Vec::new, |scratch, range| {
            cancel.check()?;
            let (min, max) = dispatch(RangeWithZero(x.f32_chunk(range, scratch)));
            Ok(Extremes { min, max })
        })
        .try_reduce(
            || Extremes { min: 0.0, max: 0.0 },
            |a, b| {
                Ok(Extremes {
                    min: a.min.min(b.min),
                    max: a.max.max(b.max),
                })
            },
        )
}

pub(super) fn count_non_finite(x: &Tensor) -> Option<Error> {
    let mut scratch = Vec::new();
    let (mut nan, mut inf, mut first) = (0, 0, None);
    for start in (0..x.len()).step_by(CHUNK) {
        let end = (start + CHUNK).min(x.len());
        for (i, v) in x.f32_chunk(start..end, &mut scratch).iter().enumerate() {
            if !v.is_finite() {
                nan += u64::from(v.is_nan());
                inf += u64::from(v.is_infinite());
                first.get_or_insert((start + i) as u64);
            }
        }
    }
    first.map(|first| Error::NonFinite { nan, inf, first })
}
