//! The scale of least squared error, by search.
//!
//! For codes v fixed, the error Σ(x − s·v)² is least at s = Σxv / Σv² and then
//! equals Σx² − (Σxv)² / Σv². So a candidate scale is judged by the codes that
//! it gives, with (Σxv)² / Σv² as its score, and the winner's own scale is
//! replaced by the best one for its codes. (The idea is ggml's
//! `make_qx_quants`; GPTQ and llm-compressor search the clipped range alone.)

use crate::simd::runs::each;
use crate::simd::{Isa, LANES};

/// 1.5 · 2²³: adding and subtracting it rounds to the nearest integer, ties to
/// even, for magnitudes up to 2²².
pub(crate) const ROUND: f32 = 12_582_912.0;

/// Σ(x − value)², where `value` is what x becomes; zero becomes zero.
#[inline(always)]
pub fn squared_error<I: Isa>(isa: I, x: &[f32], value: impl Fn(I::F) -> I::F) -> f32 {
    let mut sum = isa.splat(0.0);
    each(
        isa,
        x,
        #[inline(always)]
        |x| {
            let e = isa.sub(x, value(x));
            sum = isa.add(sum, isa.mul(e, e));
        },
    );
    isa.sum(sum)
}

/// The best scale found so far.
#[derive(Clone, Copy)]
pub struct Best {
    pub scale: f32,
    pub zero: f32,
    score: f32,
}

impl Best {
    /// Nothing tried yet.
    #[inline(always)]
    pub fn none() -> Best {
        Best {
            scale: 0.0,
            zero: 0.0,
            score: 0.0,
        }
    }

    /// Tries the codes that `code` makes of x (zero of zero); `zero` is
    /// remembered with them.
    #[inline(always)]
    pub fn attempt<I: Isa>(&mut self, isa: I, x: &[f32], zero: f32, code: impl Fn(I::F) -> I::F) {
        let mut xv = isa.splat(0.0);
        let mut vv = isa.splat(0.0);
        each(
            isa,
            x,
            #[inline(always)]
            |x| {
                let v = code(x);
                xv = isa.add(xv, isa.mul(x, v));
                vv = isa.add(vv, isa.mul(v, v));
            },
        );
        let (xv, vv) = (isa.sum(xv), isa.sum(vv));
        // No codes but zeros: nothing to scale.
        if vv > 0.0 && xv * xv > self.score * vv {
            *self = Best {
                scale: xv / vv,
                zero,
                score: xv * xv / vv,
            };
        }
    }
}

/// Sums of what `terms` makes of the elements of sixteen blocks, one block a lane and
/// one element a row: the bits of [`Isa::sum`] where each block is added by itself.
#[inline(always)]
pub fn sum_each<I: Isa, const N: usize>(
    isa: I,
    rows: &[[f32; LANES]],
    terms: impl Fn(I::F) -> [I::F; N],
) -> [I::F; N] {
    let mut sums = [[isa.splat(0.0); N]; LANES];
    for (i, sums) in sums.iter_mut().enumerate() {
        for rows in rows.as_chunks::<LANES>().0 {
            for (sum, term) in sums.iter_mut().zip(terms(isa.load(&rows[i]))) {
                *sum = isa.add(*sum, term);
            }
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        let (low, high) = sums.split_at_mut(width);
        for (low, high) in low.iter_mut().zip(high) {
            for (low, high) in low.iter_mut().zip(high) {
                *low = isa.add(*low, *high);
            }
        }
        width /= 2;
    }
    sums[0]
}

/// [`Best`] of sixteen blocks, one a lane.
#[derive(Clone, Copy)]
pub struct BestEach<I: Isa> {
    isa: I,
    pub scale: I::F,
    score: I::F,
}

impl<I: Isa> BestEach<I> {
    /// Nothing tried yet.
    #[inline(always)]
    pub fn none(isa: I) -> BestEach<I> {
        BestEach {
            isa,
            scale: isa.splat(0.0),
            score: isa.splat(0.0),
        }
    }

    /// Tries the codes that `code` makes of x.
    #[inline(always)]
    pub fn attempt(&mut self, rows: &[[f32; LANES]], code: impl Fn(I::F) -> I::F) {
        let isa = self.isa;
        let [xv, vv] = sum_each(
            isa,
            rows,
            #[inline(always)]
            |x| {
                let v = code(x);
                [isa.mul(x, v), isa.mul(v, v)]
            },
        );
        let (square, none) = (isa.mul(xv, xv), isa.splat(0.0));
        let bar = isa.mul(self.score, vv);
        let score = isa.choose(square, bar, isa.div(square, vv), self.score);
        let scale = isa.choose(square, bar, isa.div(xv, vv), self.scale);
        self.score = isa.choose(vv, none, score, self.score);
        self.scale = isa.choose(vv, none, scale, self.scale);
    }
}
