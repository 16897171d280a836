//! Vectors to codes.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use super::settings::{Codes, Metric, Rescore, Settings};
use crate::error::{Error, Result};
use crate::format::{Granularity, Method, Quantized, Scale, Spec, Values};
use crate::ops::quantize::{check_floats, quantize};
use crate::ops::{CHUNK, Cancel, pool};
use crate::simd::{bits, signs};
use crate::tensor::{Buffer, DType, Tensor, narrow};

/// How codes of a whole row with one f32 scale are chosen.
pub(super) fn spec(codes: Codes) -> Spec {
    let (format, method) = match codes {
        // The extremes of a vector are worth their step: with 8 bits nothing is gained.
        Codes::Int8 => ("int8", Method::Rtn),
        _ => ("int4", Method::Mse),
    };
    Spec {
        format: format.into(),
        method,
        granularity: Granularity::Row,
        symmetric: true,
        zero: Default::default(),
        scale: Scale::Step,
        scale_dtype: DType::F32,
        double_quant: false,
        act_order: false,
        values: Values::Source,
        input: Default::default(),
    }
}

/// Vectors as the metric looks at them, in f32.
///
/// # Errors
/// `UnsupportedDtype`, `NonFinite`, `Cancelled`.
pub fn prepared(metric: Metric, x: &Tensor, cancel: &Cancel) -> Result<Tensor> {
    if !x.dtype().is_float() {
        return Err(Error::UnsupportedDtype {
            op: "encoding vectors".into(),
            dtype: x.dtype().name().into(),
        });
    }
    let finite = AtomicBool::new(true);
    let fill = |row: usize, out: &mut [f32]| {
        let d = out.len();
        let mut scratch = Vec::new();
        out.copy_from_slice(x.f32_chunk(row * d..(row + 1) * d, &mut scratch));
        let squares = sum(d, |i| f64::from(out[i]) * f64::from(out[i]));
        if !squares.is_finite() {
            finite.store(false, Ordering::Relaxed);
        } else if metric == Metric::Cosine && squares > 0.0 {
            let length = squares.sqrt();
            out.iter_mut()
                .for_each(|v| *v = (f64::from(*v) / length) as f32);
        }
    };
    let made = rows(x.row_len(), x.shape()[0], cancel, fill)?;
    match finite.into_inner() {
        true => Ok(made),
        // What and where is counted only when there is something to count.
        false => check_floats(x).map(|()| made),
    }
}

/// Fills a matrix of f32 row by row, on the pool.
fn rows(
    d: usize,
    n: usize,
    cancel: &Cancel,
    fill: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<Tensor> {
    let each = (CHUNK / d).max(1);
    let mut out = Buffer::zeroed(n * d * 4);
    pool::run(|| {
        let values: &mut [f32] = bytemuck::cast_slice_mut(out.bytes_mut());
        let chunks = values.par_chunks_mut(each * d).enumerate();
        chunks.try_for_each(|(chunk, out)| {
            cancel.check()?;
            for (i, out) in out.chunks_exact_mut(d).enumerate() {
                fill(chunk * each + i, out);
            }
            Ok(())
        })
    })?;
    Tensor::from_buffer(DType::F32, vec![n, d], out)
}

/// Turns vectors of one set into what is written of them.
#[derive(Debug)]
pub struct Encoder {
    pub settings: Settings,
    pub dimension: usize,
    /// Of a sample; where vectors are centered.
    pub mean: Option<Vec<f32>>,
}

impl Encoder {
    /// For vectors of which these, prepared, are some.
    ///
    /// # Errors
    /// `InvalidOption` for a dimension that the codes cannot have.
    pub fn new(settings: Settings, sample: &Tensor) -> Result<Encoder> {
        let dimension = sample.row_len();
        settings.check_dimension(dimension)?;
        Ok(Encoder {
            settings,
            dimension,
            mean: settings
                .center
                .then(|| mean(&sample.to_f32_vec(), dimension)),
        })
    }

    /// What is written of these prepared vectors: the bytes of each tensor, in the order
    /// of `Settings::tensors`.
    ///
    /// # Errors
    /// `InvalidOption` where f16 cannot hold them, `Cancelled`.
    pub fn encode(&self, x: &Tensor, cancel: &Cancel) -> Result<Vec<Vec<u8>>> {
        let centered = match &self.mean {
            None => x.clone(),
            Some(mean) => self.centered(x, mean, cancel)?,
        };
        let mut tensors = match self.settings.codes {
            Codes::Binary => vec![self.signs(&centered, cancel)?],
            codes => integers(codes, &centered, cancel)?,
        };
        match self.settings.rescore {
            Rescore::Nothing => {}
            Rescore::Int8 => tensors.extend(integers(Codes::Int8, &centered, cancel)?),
            Rescore::F16 => tensors.push(halves(x, cancel)?),
        }
        Ok(tensors)
    }

    fn centered(&self, x: &Tensor, mean: &[f32], cancel: &Cancel) -> Result<Tensor> {
        let d = self.dimension;
        rows(d, x.shape()[0], cancel, |row, out| {
            let mut scratch = Vec::new();
            let x = x.f32_chunk(row * d..(row + 1) * d, &mut scratch);
            for ((out, x), mean) in out.iter_mut().zip(x).zip(mean) {
                *out = x - mean;
            }
        })
    }

    fn signs(&self, x: &Tensor, cancel: &Cancel) -> Result<Vec<u8>> {
        let d = self.dimension;
        let row = signs::packed_len(d);
        let mut out = vec![0; x.shape()[0] * row];
        pool::run(|| {
            out.par_chunks_mut(row)
                .enumerate()
                .try_for_each(|(i, out)| {
                    if i % 64 == 0 {
                        cancel.check()?;
                    }
                    let mut scratch = Vec::new();
                    signs::pack(x.f32_chunk(i * d..(i + 1) * d, &mut scratch), out);
                    Ok(())
                })
        })?;
        Ok(out)
    }
}

/// Codes and scales.
fn integers(codes: Codes, x: &Tensor, cancel: &Cancel) -> Result<Vec<Vec<u8>>> {
    let q = quantize(x, &spec(codes), cancel)?;
    let scales = true_scales(&q, codes, x, cancel)?;
    let bytes = q.part("codes")?.bytes().to_vec();
    Ok(vec![bytes, bytemuck::cast_slice(&scales).to_vec()])
}

/// The scales with which codes times their vector are its squared length; those of the
/// least error where the codes say nothing of it.
fn true_scales(q: &Quantized, codes: Codes, x: &Tensor, cancel: &Cancel) -> Result<Vec<f32>> {
    let d = x.row_len();
    let stored = q.part("codes")?.bytes();
    let mut scales = q.part("scales")?.to_f32_vec();
    pool::run(|| {
        scales.par_iter_mut().enumerate().try_for_each_init(
            || (Vec::new(), vec![0u8; d]),
            |(scratch, nibbles), (row, scale)| {
                if row % 64 == 0 {
                    cancel.check()?;
                }
                let range: Range<usize> = row * d..(row + 1) * d;
                let x = x.f32_chunk(range.clone(), scratch);
                let squares = sum(d, |i| f64::from(x[i]) * f64::from(x[i]));
                let product = match codes {
                    Codes::Int8 => {
                        let codes = &stored[range];
                        sum(d, |i| f64::from(x[i]) * f64::from(codes[i] as i8))
                    }
                    _ => {
                        bits::unpack(4, stored, range.start, nibbles);
                        sum(d, |i| f64::from(x[i]) * f64::from(nibbles[i] as i8 - 8))
                    }
                };
                let exact = (squares / product) as f32;
                if product != 0.0 && exact.is_finite() {
                    *scale = exact;
                }
                Ok(())
            },
        )
    })?;
    Ok(scales)
}

/// The sum of n terms, in an order that is the same everywhere.
fn sum(n: usize, term: impl Fn(usize) -> f64) -> f64 {
    let mut sums = [0f64; 8];
    for start in (0..n).step_by(8) {
        for (lane, sum) in sums.iter_mut().enumerate().take(n - start) {
            *sum += term(start + lane);
        }
    }
    sums.into_iter().sum()
}

fn halves(x: &Tensor, cancel: &Cancel) -> Result<Vec<u8>> {
    let mut out = vec![0; x.len() * 2];
    pool::run(|| {
        let chunks = out.par_chunks_mut(2 * CHUNK).enumerate();
        chunks.try_for_each_init(Vec::new, |scratch, (i, out)| {
            cancel.check()?;
            let x = x.f32_chunk(i * CHUNK..i * CHUNK + out.len() / 2, scratch);
            // What is larger is rounded to infinity.
            match x.iter().find(|v| v.abs() >= 65520.0) {
                Some(v) => Err(Error::option(
                    "rescore",
                    format!("f16 cannot hold {v}; choose int8"),
                )),
                None => narrow(DType::F16, x, out),
            }
        })
    })?;
    Ok(out)
}

fn mean(x: &[f32], d: usize) -> Vec<f32> {
    let mut sums = vec![0f64; d];
    for row in x.chunks_exact(d) {
        for (sum, &v) in sums.iter_mut().zip(row) {
            *sum += f64::from(v);
        }
    }
    let n = (x.len() / d).max(1) as f64;
    sums.into_iter().map(|sum| (sum / n) as f32).collect()
}
