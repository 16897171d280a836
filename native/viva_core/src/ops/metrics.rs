//! How close one tensor is to another.

use rayon::prelude::*;
use serde::Serialize;

use super::{CHUNK, Cancel, pool};
use crate::error::{Error, Result};
use crate::format::Quantized;
use crate::method::input;
use crate::simd::{Isa, LANES, Op, dispatch};
use crate::tensor::Tensor;

/// Decibels that one bit buys a Gaussian source at the rate–distortion bound:
/// 20·log10(2).
pub const DB_PER_BIT: f64 = 6.020_599_913_279_624;

/// Error of an approximation y of x. Ratios are infinite where there is no
/// error, and NaN where there is no signal either.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Metrics {
    /// Mean of (x − y)².
    pub mse: f64,
    /// 10·log10(Σx² / Σ(x − y)²).
    pub sqnr_db: f64,
    /// 10·log10(max|x|² / mse).
    pub psnr_db: f64,
    /// Σxy / √(Σx² Σy²).
    pub cosine: f64,
    /// Mean of |x − y|.
    pub mean_error: f64,
    /// max |x − y|.
    pub max_error: f64,
}

/// Elements that are compared at once. Sums in f64 take several times as long as
/// quantizing does: shorter runs than elsewhere, so that others get the core as
/// often.
pub const RUN: usize = CHUNK / 4;

/// What runs of elements add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sums {
    xx: f64,
    yy: f64,
    xy: f64,
    ee: f64,
    e: f64,
    max_x: f32,
    max_e: f32,
}

struct Accumulate<'a> {
    x: &'a [f32],
    y: &'a [f32],
}

impl Op for Accumulate<'_> {
    type Output = Sums;

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> Sums {
        const HALF: usize = LANES / 2;
        let mut xx = [0f64; HALF];
        let mut yy = [0f64; HALF];
        let mut xy = [0f64; HALF];
        let mut ee = [0f64; HALF];
        let mut abs_e = [0f64; HALF];
        let mut max_x = [0f32; HALF];
        let mut max_e = [0f32; HALF];
        let mut step = |x: &[f32], y: &[f32]| {
            for i in 0..x.len().min(HALF) {
                let (a, b) = (f64::from(x[i]), f64::from(y[i]));
                let e = a - b;
                xx[i] += a * a;
                yy[i] += b * b;
                xy[i] += a * b;
                ee[i] += e * e;
                abs_e[i] += e.abs();
                let (ax, ae) = (x[i].abs(), (x[i] - y[i]).abs());
                max_x[i] = if ax > max_x[i] { ax } else { max_x[i] };
                max_e[i] = if ae > max_e[i] { ae } else { max_e[i] };
            }
        };
        let (xs, x_tail) = self.x.as_chunks::<HALF>();
        let (ys, y_tail) = self.y.as_chunks::<HALF>();
        for (x, y) in xs.iter().zip(ys) {
            step(x, y);
        }
        step(x_tail, y_tail);
        Sums {
            xx: xx.iter().sum(),
            yy: yy.iter().sum(),
            xy: xy.iter().sum(),
            ee: ee.iter().sum(),
            e: abs_e.iter().sum(),
            max_x: max_x.into_iter().fold(0.0, f32::max),
            max_e: max_e.into_iter().fold(0.0, f32::max),
        }
    }
}

impl Sums {
    fn and(self, b: Sums) -> Sums {
        Sums {
            xx: self.xx + b.xx,
            yy: self.yy + b.yy,
            xy: self.xy + b.xy,
            ee: self.ee + b.ee,
            e: self.e + b.e,
            max_x: self.max_x.max(b.max_x),
            max_e: self.max_e.max(b.max_e),
        }
    }
}

/// What a tensor, or some rows of it, adds to the error of the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seen {
    sums: Sums,
    elements: usize,
}

impl Seen {
    /// That of a quantized tensor against its original.
    ///
    /// # Errors
    /// Those of [`quantized`].
    pub fn of(x: &Tensor, q: &Quantized, cancel: &Cancel) -> Result<Seen> {
        same_shape(x, &q.shape)?;
        let decoder = input::decoder(q)?;
        Seen::compare(x, cancel, |range, y| decoder.decode(range.start, y))
    }

    /// Compares `x` with what `fill` writes for a run of elements. Runs are summed
    /// in their order: the result does not depend on the number of threads.
    fn compare(
        x: &Tensor,
        cancel: &Cancel,
        fill: impl Fn(std::ops::Range<usize>, &mut Vec<f32>) + Sync,
    ) -> Result<Seen> {
        let sums = runs(x, cancel, fill)?;
        Ok(Seen {
            sums: sums.into_iter().fold(Sums::default(), Sums::and),
            elements: x.len(),
        })
    }

    /// Both together.
    pub fn and(self, other: Seen) -> Seen {
        Seen {
            sums: self.sums.and(other.sums),
            elements: self.elements + other.elements,
        }
    }

    /// As plain numbers.
    pub fn to_numbers(self) -> [f64; 8] {
        let s = self.sums;
        let (max_x, max_e) = (f64::from(s.max_x), f64::from(s.max_e));
        let elements = self.elements as f64;
        [s.xx, s.yy, s.xy, s.ee, s.e, max_x, max_e, elements]
    }

    /// From [`to_numbers`](Self::to_numbers).
    pub fn from_numbers([xx, yy, xy, ee, e, max_x, max_e, elements]: [f64; 8]) -> Seen {
        let (max_x, max_e) = (max_x as f32, max_e as f32);
        Seen {
            sums: Sums {
                xx,
                yy,
                xy,
                ee,
                e,
                max_x,
                max_e,
            },
            elements: elements as usize,
        }
    }

    pub fn metrics(&self) -> Metrics {
        let total = &self.sums;
        let n = self.elements.max(1) as f64;
        let mse = total.ee / n;
        let most = f64::from(total.max_x);
        Metrics {
            mse,
            sqnr_db: 10.0 * (total.xx / total.ee).log10(),
            psnr_db: 10.0 * (most * most / mse).log10(),
            cosine: total.xy / (total.xx.sqrt() * total.yy.sqrt()),
            mean_error: total.e / n,
            max_error: f64::from(total.max_e),
        }
    }
}

fn runs(
    x: &Tensor,
    cancel: &Cancel,
    fill: impl Fn(std::ops::Range<usize>, &mut Vec<f32>) + Sync,
) -> Result<Vec<Sums>> {
    pool::run(|| {
        (0..x.len().div_ceil(RUN))
            .into_par_iter()
            .map(|i| i * RUN..((i + 1) * RUN).min(x.len()))
            .map_init(
                || (Vec::new(), Vec::new()),
                |(scratch, y), range| {
                    cancel.check()?;
                    y.resize(range.len(), 0.0);
                    fill(range.clone(), y);
                    let x = x.f32_chunk(range, scratch);
                    Ok(dispatch(Accumulate { x, y }))
                },
            )
            .collect::<Result<Vec<Sums>>>()
    })
}

pub(super) fn same_shape(x: &Tensor, shape: &[usize]) -> Result<()> {
    if x.shape() == shape {
        return Ok(());
    }
    Err(Error::ShapeMismatch {
        what: "metrics compare tensors of one shape".into(),
        expected: x.shape().to_vec(),
        actual: shape.to_vec(),
    })
}

/// Error of a quantized tensor against its original.
pub fn quantized(x: &Tensor, q: &Quantized, cancel: &Cancel) -> Result<Metrics> {
    Ok(Seen::of(x, q, cancel)?.metrics())
}

/// Error of one dense tensor against another.
pub fn dense(x: &Tensor, y: &Tensor, cancel: &Cancel) -> Result<Metrics> {
    same_shape(x, y.shape())?;
    let seen = Seen::compare(x, cancel, |range, out| {
        let mut scratch = Vec::new();
        out.copy_from_slice(y.f32_chunk(range, &mut scratch));
    })?;
    Ok(seen.metrics())
}
