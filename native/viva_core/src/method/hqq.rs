//! HQQ: the zero point of least error in an Lp norm, p = 0.7, by half-quadratic
//! splitting (Badri and Shaji, "Half-Quadratic Quantization", 2023). No data is
//! needed but the weights.
//!
//! The scale spans the block. With e the error of every weight, the part of it
//! that the norm takes for an outlier is w = sign(e) · max(|e| − |e|^(p−1)/β, 0);
//! the next zero point is the mean of code − (x − w)/scale, and β grows by κ.
//! Each block keeps the zero point of least squared error, and stops when it
//! finds one again. (The hqq package stops all blocks at once, after twenty
//! rounds or when their mean error no longer falls, and leaves β as it is; twice
//! the rounds are what it takes to stay below its error at every width.)

use super::mse::lanes;
use crate::simd::affine::{Line, range};
use crate::simd::int::round_clamped;
use crate::simd::{Isa, LANES};

const ROUNDS: usize = 40;
const BETA: f32 = 10.0;
const KAPPA: f32 = 1.01;

/// Below it |e|^0.3 · |e| stays under 1/β for every β of the rounds.
const NO_OUTLIER: f32 = 0.12;

/// The line of a block, its bias as exact as f32 holds it.
#[inline(always)]
pub fn zero_point<I: Isa>(isa: I, x: &[f32], top: f32) -> Line {
    let (low, high) = range(isa, x);
    // Halves first: the difference of two large finite values can overflow.
    let scale = (high * 0.5 - low * 0.5) / (top * 0.5);
    let inv = 1.0 / scale;
    if !(inv.is_finite() && scale.is_finite()) {
        return Line { scale, bias: low };
    }
    let mut zero = -low * inv;
    let mut best = (f32::INFINITY, zero);
    let mut beta = BETA;
    for _ in 0..ROUNDS {
        let (error, next) = round(isa, x, top, (scale, inv), zero, beta);
        if error < best.0 {
            best = (error, zero);
        }
        // NaN where a sum left the range of f32.
        if next == zero || next.is_nan() {
            break;
        }
        zero = next;
        beta *= KAPPA;
    }
    Line {
        scale,
        bias: -best.1 * scale,
    }
}

/// Σe² under a zero point, and the zero point that follows it.
#[inline(always)]
fn round<I: Isa>(
    isa: I,
    x: &[f32],
    top: f32,
    (scale, inv): (f32, f32),
    zero: f32,
    beta: f32,
) -> (f32, f32) {
    let nothing = isa.splat(0.0);
    let (scale, inv, zero) = (isa.splat(scale), isa.splat(inv), isa.splat(zero));
    let mut error = nothing;
    let mut shift = nothing;
    lanes(isa, x, |x, one| {
        let steps = isa.mul(x, inv);
        let code = round_clamped(isa, isa.add(steps, zero), 0.0, top);
        let e = isa.mul(isa.sub(x, isa.mul(isa.sub(code, zero), scale)), one);
        error = isa.add(error, isa.mul(e, e));
        let kept = isa.mul(isa.sub(x, shrink(isa, e, beta)), inv);
        shift = isa.add(shift, isa.mul(isa.sub(code, kept), one));
    });
    (isa.sum(error), isa.sum(shift) / x.len() as f32)
}

/// The outlier's part of each error.
#[inline(always)]
fn shrink<I: Isa>(isa: I, e: I::F, beta: f32) -> I::F {
    let mut errors = [0f32; LANES];
    isa.store(e, &mut errors);
    let most = errors.iter().fold(0f32, |m, e| m.max(e.abs()));
    if most < NO_OUTLIER {
        return isa.splat(0.0);
    }
    isa.load(&errors.map(|e| shrink_one(e, beta)))
}

fn shrink_one(e: f32, beta: f32) -> f32 {
    let magnitude = e.abs();
    if magnitude < NO_OUTLIER {
        return 0.0;
    }
    let root = tenth_root_inverse(magnitude);
    let rest = magnitude - (root * root * root) as f32 / beta;
    if rest > 0.0 { rest.copysign(e) } else { 0.0 }
}

/// a^(−1/10) by Newton's method: libraries round powers differently, and bytes
/// have to be the same on every machine.
fn tenth_root_inverse(a: f32) -> f64 {
    let a = f64::from(a);
    // Dividing the bits divides the exponent, and the mantissa roughly.
    const ONE: u64 = 0x3ff0_0000_0000_0000;
    let mut y = f64::from_bits(ONE + ONE / 10 - a.to_bits() / 10);
    for _ in 0..5 {
        let y2 = y * y;
        let y5 = y2 * y2 * y;
        y *= 1.1 - 0.1 * (a * y5 * y5);
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_exact_to_f32() {
        for i in 0..2000 {
            let a = 0.12f32 * 1.0003f32.powi(i * 150);
            if a.is_infinite() {
                break;
            }
            let expected = f64::from(a).powf(-0.1);
            let got = tenth_root_inverse(a);
            assert!((got / expected - 1.0).abs() < 1e-12, "{a}: {got}");
        }
    }
}
