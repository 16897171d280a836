//! Scale and bias of least squared error, by search.
//!
//! For codes v fixed, Σ(x − s·v − b)² is least on the regression line of x over
//! v, and then lower than that of the mean by cov(x, v)²/var(v). So candidate
//! ranges are judged by the codes that they give, and the winner is refined:
//! codes from the line, the line from the codes.

use crate::simd::Isa;
use crate::simd::affine::{Line, range};
use crate::simd::runs::each_and_ones;
use crate::tensor::DType;

/// Candidates for each end of the range.
const STEPS: usize = 7;

/// The line of least squared error as it is stored; never worse than `rtn`.
#[inline(always)]
pub fn least_squares<I: Isa>(isa: I, x: &[f32], top: f32, dtype: DType, rtn: Line) -> Line {
    let rtn = rtn.stored(dtype);
    let usable = |line: Line| line.scale != 0.0 && line.scale.is_finite() && line.bias.is_finite();
    if !usable(rtn) {
        return rtn;
    }
    let (low, high) = range(isa, x);
    let width = high - low;
    // More levels leave less to gain from clipping: the search narrows.
    let depth = if top > 31.0 { 0.03 } else { 0.25 };
    let mut sum = isa.splat(0.0);
    each_and_ones(
        isa,
        x,
        #[inline(always)]
        |x, one| sum = isa.add(sum, isa.mul(x, one)),
    );
    let mean = isa.sum(sum) / x.len() as f32;
    let mut best = (0.0, rtn);
    for a in 0..STEPS {
        for b in 0..STEPS {
            let cut = |i: usize| width * depth * i as f32 / (STEPS - 1) as f32;
            let bias = low + cut(a);
            let scale = (high - cut(b) - bias) / top;
            attempt(isa, x, top, mean, Line { scale, bias }, &mut best);
        }
    }
    for _ in 0..2 {
        attempt(isa, x, top, mean, best.1, &mut best);
    }
    let found = best.1.stored(dtype);
    if usable(found) && found.error(isa, x, top) < rtn.error(isa, x, top) {
        found
    } else {
        rtn
    }
}

/// Replaces `best` by the regression line of the codes that `line` gives, if
/// that takes more off the error.
#[inline(always)]
fn attempt<I: Isa>(isa: I, x: &[f32], top: f32, mean: f32, line: Line, best: &mut (f32, Line)) {
    if !(line.scale != 0.0 && line.scale.is_finite()) {
        return;
    }
    let nothing = isa.splat(0.0);
    let (mut v1, mut v2, mut xv) = (nothing, nothing, nothing);
    let center = isa.splat(mean);
    each_and_ones(
        isa,
        x,
        #[inline(always)]
        |x, one| {
            let v = isa.mul(line.code(isa, x, top), one);
            v1 = isa.add(v1, v);
            v2 = isa.add(v2, isa.mul(v, v));
            xv = isa.add(xv, isa.mul(isa.sub(x, center), v));
        },
    );
    let (v1, v2, xv) = (isa.sum(v1), isa.sum(v2), isa.sum(xv));
    let mean_v = v1 / x.len() as f32;
    let variance = v2 - v1 * mean_v;
    if variance > 0.0 && xv * xv > best.0 * variance {
        let scale = xv / variance;
        let bias = mean - scale * mean_v;
        *best = (xv * xv / variance, Line { scale, bias });
    }
}
