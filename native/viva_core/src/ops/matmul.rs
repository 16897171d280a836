//! x\[m, k\] · q\[n, k\]ᵀ, straight from the codes.
//!
//! What `compute: :f32` promises: weights are the floats that dequantizing gives,
//! products and sums are f32, and a result is rounded to its dtype once. A sum of
//! k products is off from the exact one by at most k · 2⁻²⁴ · Σ|x||w|, to first
//! order. Its order is fixed: the same bits for any number of threads, and on every
//! level that fuses multiplying and adding. It is one of two orders, by the rows of
//! x: fewer than [`BATCH`] are dot products of sixteen lanes, as many or more go to
//! [`super::batch`], which fuses on every level.
//!
//! What `compute: :bf16` promises: the same of x and weights rounded to bf16, to
//! nearest, ties to even. So a result is off from that of the unrounded factors by
//! at most 2⁻⁷ · Σ|x||w| more. The order of the sum, and whether factors and sums
//! below 2⁻¹²⁶ count as zeros, is the level's. Fewer than [`BATCH`] rows, where
//! rounding saves nothing, have the results of `compute: :f32`.

use super::batch::{self, Words};
use super::epilogue::{self, Epilogue};
use super::pool::{self, Threads};
use super::{CHUNK, Cancel};
use crate::error::{Error, Result};
use crate::format::{Decode, Input, Quantized};
use crate::method::input;
use crate::simd::bf16::has_pairs;
use crate::simd::dispatch;
use crate::simd::dot::{DotRows, ROWS};
use crate::simd::product::NARROW;
use crate::tensor::{Tensor, element_count};

/// Rows of x from which on panels pay for the packing.
pub const BATCH: usize = NARROW;

/// Products of numbers that one thread is done with before others would have begun,
/// and well within a millisecond whatever the format, the arithmetic and the level:
/// those of one token with 256 rows of 256.
const SMALL: usize = 1 << 16;

/// Products that take some milliseconds, and so little that waiting until the pool's
/// threads wake up is felt.
const FEW: usize = 1 << 30;

/// What part of the work that the calling thread does alone a product of this shape
/// is, over rows of k; none where it needs the pool.
pub fn part_of_small(shape: &[usize], k: usize) -> Option<f32> {
    let (n, rest) = shape.split_last()?;
    let m: usize = rest.iter().product();
    let products = m.saturating_mul(*n).saturating_mul(k.max(1));
    (m < BATCH && products <= SMALL).then_some(products as f32 / SMALL as f32)
}

impl Threads {
    /// For m rows of x and a matrix `[n, k]`.
    pub(super) fn for_products(m: usize, (n, k): (usize, usize)) -> Threads {
        match part_of_small(&[m, n], k) {
            Some(_) => Threads::Caller,
            None if m.saturating_mul(n).saturating_mul(k) <= FEW => Threads::CallerToo,
            None => Threads::Pool,
        }
    }
}

/// A way to compute `x · qᵀ` into a buffer.
pub type Matmul = fn(&Tensor, &Quantized, Epilogue, &mut [u8], &Cancel) -> Result<()>;

/// The way of that name: `f32` is [`matmul_into`], `bf16` [`matmul_bf16_into`],
/// `int8` and `llm_int8` are those of [`super::int8`] and [`super::llm_int8`], and
/// `auto` chooses as [`matmul_auto_into`] says.
pub fn by_name(compute: &str) -> Result<Matmul> {
    match compute {
        "f32" => Ok(matmul_into),
        "bf16" => Ok(matmul_bf16_into),
        "auto" => Ok(matmul_auto_into),
        super::int8::NAME => Ok(super::int8::matmul_into),
        "llm_int8" => Ok(super::llm_int8::matmul_into),
        other => Err(Error::option(
            "compute",
            format!("expected f32, bf16, int8, llm_int8 or auto, got {other}"),
        )),
    }
}

/// The shape of `x · qᵀ` for a q of that shape: that of x with its last dimension
/// replaced by the rows of q.
///
/// # Errors
/// `ShapeMismatch` unless q is a matrix whose rows are as long as those of x.
pub fn matmul_shape(x: &Tensor, q: &[usize]) -> Result<Vec<usize>> {
    let &[n, k] = q else {
        return Err(Error::ShapeMismatch {
            what: "matmul takes a quantized matrix [n, k]".into(),
            expected: vec![
                q.split_last().map_or(1, |(_, n)| n.iter().product()),
                *q.last().unwrap_or(&1),
            ],
            actual: q.to_vec(),
        });
    };
    match x.shape().split_last() {
        Some((&last, rest)) if last == k => {
            let mut shape = rest.to_vec();
            shape.push(n);
            element_count(&shape)?;
            Ok(shape)
        }
        _ => Err(Error::ShapeMismatch {
            what: "matmul: the last dimension of x is the k of the quantized [n, k]".into(),
            expected: vec![x.len() / x.row_len().max(1), k],
            actual: x.shape().to_vec(),
        }),
    }
}

/// Computes `x · qᵀ` into `out`, in f32 arithmetic.
/// Weights are decoded a tile at a time into a scratch that stays in a cache; the
/// full float matrix never exists.
///
/// # Errors
/// `ShapeMismatch` and `UnsupportedDtype`, for what the epilogue adds too;
/// `SizeMismatch` for `out`, `Cancelled`.
pub fn matmul_into(
    x: &Tensor,
    q: &Quantized,
    epilogue: Epilogue,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    multiply(x, q, Words::Numbers, &epilogue, out, cancel)
}

/// The same with factors rounded to bf16 where x has many rows.
///
/// # Errors
/// Those of [`matmul_into`].
pub fn matmul_bf16_into(
    x: &Tensor,
    q: &Quantized,
    epilogue: Epilogue,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    multiply(x, q, Words::bf16(), &epilogue, out, cancel)
}

/// Of [`BATCH`] rows or more, in 8-bit integers where the weights are made of
/// integers; else in bf16 where the level in force has instructions for it. Else in
/// f32: with fewer rows decoding costs more than multiplying.
///
/// # Errors
/// Those of [`matmul_into`].
pub fn matmul_auto_into(
    x: &Tensor,
    q: &Quantized,
    epilogue: Epilogue,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    if x.len() < BATCH * x.row_len() {
        return matmul_into(x, q, epilogue, out, cancel);
    }
    match super::int8::matmul_into(x, q, epilogue, out, cancel) {
        // What int8 cannot multiply.
        Err(Error::InvalidOption { .. }) if has_pairs() => {
            matmul_bf16_into(x, q, epilogue, out, cancel)
        }
        Err(Error::InvalidOption { .. }) => matmul_into(x, q, epilogue, out, cancel),
        done => done,
    }
}

fn multiply(
    x: &Tensor,
    q: &Quantized,
    words: Words,
    epilogue: &Epilogue,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    check(x, q, epilogue, out)?;
    let mut widened = Vec::new();
    let Some(x) = activations(x, q, &mut widened)? else {
        return epilogue.write_zeros(q.shape[0], out);
    };
    let (n, k) = (q.shape[0], q.shape[1]);
    let m = x.len() / k;
    let decoder = q.spec.format()?.decoder(q)?;
    if m >= BATCH {
        return pool::run(|| {
            let blocks = batch::multiply(x, &*decoder, (n, k), words, cancel)?;
            blocks.write(epilogue, out, Threads::Pool, cancel)
        });
    }
    let threads = Threads::for_products(m, (n, k));
    threads.run(|| {
        let columns = dot_products(x, &*decoder, (n, k), threads, cancel)?;
        write_rows(&columns, (n, m), epilogue, out, threads, cancel)
    })
}

/// `x · qᵀ` column after column, so that each task owns its piece.
fn dot_products(
    x: &[f32],
    decoder: &dyn Decode,
    (n, k): (usize, usize),
    threads: Threads,
    cancel: &Cancel,
) -> Result<Vec<f32>> {
    let m = x.len() / k;
    // As long a stretch of codes at once as L2 holds the floats of: memory's
    // prefetchers start anew with each.
    let rows = (4 * CHUNK / k).clamp(1, 16) * ROWS;
    let mut columns = vec![0f32; n * m];
    let work = |tile: &mut Vec<f32>, t: usize, out: &mut [f32]| {
        tile.resize(out.len() / m * k, 0f32);
        decoder.decode(t * rows * k, tile);
        dispatch(DotRows { k, x, w: tile, out });
        Ok(())
    };
    threads.chunks(&mut columns, rows * m, cancel, Vec::new, work)?;
    Ok(columns)
}

/// Activations as the codes of q want them; none where there is nothing to multiply.
pub(super) fn activations<'a>(
    x: &'a Tensor,
    q: &Quantized,
    scratch: &'a mut Vec<f32>,
) -> Result<Option<&'a [f32]>> {
    if q.is_empty() || x.is_empty() {
        return Ok(None);
    }
    if q.spec.input == Input::default() {
        return Ok(Some(x.f32_chunk(0..x.len(), scratch)));
    }
    *scratch = x.to_f32_vec();
    input::prepare(q, scratch)?;
    Ok(Some(scratch))
}

/// Whether a product of these can be written into `out`.
pub(super) fn check(x: &Tensor, q: &Quantized, epilogue: &Epilogue, out: &[u8]) -> Result<()> {
    let shape = matmul_shape(x, &q.shape)?;
    epilogue::floats("matmul", x.dtype())?;
    epilogue.check(&shape)?;
    let expected = element_count(&shape)? * epilogue.dtype.size();
    if out.len() != expected {
        return Err(Error::SizeMismatch {
            what: "bytes of the product".into(),
            expected,
            actual: out.len(),
        });
    }
    Ok(())
}

/// Writes n columns of m sums each as m rows.
fn write_rows(
    columns: &[f32],
    (n, m): (usize, usize),
    epilogue: &Epilogue,
    out: &mut [u8],
    threads: Threads,
    cancel: &Cancel,
) -> Result<()> {
    let work = |row: &mut Vec<f32>, i: usize, out: &mut [u8]| {
        row.clear();
        row.extend(columns.iter().skip(i).step_by(m));
        epilogue.write((i, 0), row, out)
    };
    let size = n * epilogue.dtype.size();
    threads.chunks(out, size, cancel, Vec::new, work)
}
