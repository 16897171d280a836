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

use super::mse::ROUND;
use crate::simd::Isa;
use crate::simd::affine::{Line, range};
use crate::simd::int::round_clamped;
use crate::simd::runs::each_and_ones;

const ROUNDS: usize = 40;
const BETA: f32 = 10.0;
const KAPPA: f32 = 1.01;

/// Errors up to β^(−1/1.3) are no outliers: what bounds that from below for β of
/// the first round, and by how much less it is in each round that follows.
const NO_OUTLIER: f32 = 0.17;
const FALL: f32 = 0.992_37;

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
    let (mut beta, mut no_outlier) = (BETA, NO_OUTLIER);
    // Codes between the ends are off by half a step and by what f32 rounds away.
    let inner = 0.5001 * scale + 1e-6 * (high - low.min(0.0));
    for _ in 0..ROUNDS {
        let end = |x: f32| {
            let code = (x * inv + zero).clamp(0.0, top) + ROUND - ROUND;
            (x - (code - zero) * scale).abs()
        };
        let most = end(low).max(end(high)).max(inner);
        let (error, next) = match most < no_outlier {
            true => round(
                isa,
                x,
                top,
                (scale, inv),
                zero,
                #[inline(always)]
                |_| isa.splat(0.0),
            ),
            false => round(
                isa,
                x,
                top,
                (scale, inv),
                zero,
                #[inline(always)]
                |e| shrink(isa, e, beta),
            ),
        };
        if error < best.0 {
            best = (error, zero);
        }
        // NaN where a sum left the range of f32.
        if next == zero || next.is_nan() {
            break;
        }
        zero = next;
        beta *= KAPPA;
        no_outlier *= FALL;
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
    outlier: impl Fn(I::F) -> I::F,
) -> (f32, f32) {
    let nothing = isa.splat(0.0);
    let (scale, inv, zero) = (isa.splat(scale), isa.splat(inv), isa.splat(zero));
    let mut error = nothing;
    let mut shift = nothing;
    each_and_ones(
        isa,
        x,
        #[inline(always)]
        |x, one| {
            let steps = isa.mul(x, inv);
            let code = round_clamped(isa, isa.add(steps, zero), 0.0, top);
            let e = isa.mul(isa.sub(x, isa.mul(isa.sub(code, zero), scale)), one);
            error = isa.add(error, isa.mul(e, e));
            let kept = isa.mul(isa.sub(x, outlier(e)), inv);
            shift = isa.add(shift, isa.mul(isa.sub(code, kept), one));
        },
    );
    (isa.sum(error), isa.sum(shift) / x.len() as f32)
}

/// The outlier's part of each error.
#[inline(always)]
fn shrink<I: Isa>(isa: I, e: I::F, beta: f32) -> I::F {
    let nothing = isa.splat(0.0);
    let magnitude = isa.abs(e);
    let root = tenth_root_inverse(isa, magnitude);
    let cube = isa.mul(isa.mul(root, root), root);
    let rest = isa.sub(magnitude, isa.mul(cube, isa.splat(1.0 / beta)));
    let rest = isa.choose(rest, nothing, rest, nothing);
    let sign = isa.and(isa.bits(e), isa.splat_u(0x8000_0000));
    isa.floats(isa.add_u(isa.bits(rest), sign))
}

/// a^(−1/10) by Newton's method: libraries round powers differently, and bytes
/// have to be the same on every machine. What it is of zero is finite.
#[inline(always)]
fn tenth_root_inverse<I: Isa>(isa: I, a: I::F) -> I::F {
    // A tenth of the bits is a tenth of the exponent, and roughly of the mantissa.
    const ONE: f32 = 0x3f80_0000 as f32;
    let bits = isa.mul(isa.int_to_float(isa.bits(a)), isa.splat(0.1));
    let mut y = isa.floats(isa.truncate(isa.sub(isa.splat(1.1 * ONE), bits)));
    let (full, tenth) = (isa.splat(1.1), isa.splat(0.1));
    for _ in 0..4 {
        let y2 = isa.mul(y, y);
        let y5 = isa.mul(isa.mul(y2, y2), y);
        // y⁵ twice: y¹⁰ of the largest numbers has few bits left.
        let one = isa.mul(isa.mul(a, y5), y5);
        y = isa.mul(y, isa.sub(full, isa.mul(one, tenth)));
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{LANES, Portable};

    #[test]
    fn roots_are_exact_to_f32() {
        for i in 0..2000 {
            let a = 1e-6f32 * 1.0003f32.powi(i * 150);
            if a.is_infinite() {
                break;
            }
            let expected = f64::from(a).powf(-0.1);
            let got = f64::from(tenth_root_inverse(Portable, [a; LANES])[0]);
            assert!((got / expected - 1.0).abs() < 1e-6, "{a}: {got}");
        }
        assert!(tenth_root_inverse(Portable, [0.0; LANES])[0].is_finite());
    }

    #[test]
    fn below_the_bound_nothing_is_an_outlier() {
        let (mut beta, mut no_outlier) = (BETA, NO_OUTLIER);
        for _ in 0..ROUNDS {
            assert_eq!(shrink(Portable, [no_outlier; LANES], beta)[0], 0.0);
            assert!(shrink(Portable, [-1.01 * no_outlier; LANES], beta)[0] < 0.0);
            beta *= KAPPA;
            no_outlier *= FALL;
        }
    }
}
