//! The scale of least squared error, by search.
//!
//! For codes v fixed, the error Σ(x − s·v)² is least at s = Σxv / Σv² and then
//! equals Σx² − (Σxv)² / Σv². So a candidate scale is judged by the codes that
//! it gives, with (Σxv)² / Σv² as its score, and the winner's own scale is
//! replaced by the best one for its codes. (The idea is ggml's
//! `make_qx_quants`; GPTQ and llm-compressor search the clipped range alone.)

use crate::simd::Isa;
use crate::simd::runs::each;

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
