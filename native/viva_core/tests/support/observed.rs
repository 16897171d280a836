//! What calibrated methods are tested on: activations, what is kept of them, and
//! definitions in f64.

use viva_core::calibration::{SAMPLES, Statistics};
use viva_core::ops::Cancel;

use super::{f32_tensor, gaussian};

/// Correlated columns of very different strength, as those of a model are.
pub fn activations(tokens: usize, k: usize, seed: u64) -> Vec<f32> {
    let mut x = gaussian(tokens * k, seed);
    for row in x.chunks_exact_mut(k) {
        for i in 1..k {
            row[i] += 0.7 * row[i - 1];
        }
        for (i, v) in row.iter_mut().enumerate() {
            *v *= 0.2 + 8.0 / (1.0 + (i * 37 % k) as f32);
        }
    }
    x
}

pub fn statistics(x: &[f32], k: usize) -> Statistics {
    let x = f32_tensor(&[x.len() / k, k], x);
    Statistics::of(&x, SAMPLES, &Cancel::new()).unwrap()
}

/// ‖x·wᵀ − x·ŵᵀ‖ / ‖x·wᵀ‖, the products in f64.
pub fn output_error(x: &[f32], w: &[f32], back: &[f32], k: usize) -> f64 {
    let (mut error, mut signal) = (0.0, 0.0);
    for x in x.chunks_exact(k) {
        for (w, back) in w.chunks_exact(k).zip(back.chunks_exact(k)) {
            let dot = |w: &[f32]| -> f64 {
                let terms = x.iter().zip(w);
                terms.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
            };
            let y = dot(w);
            error += (y - dot(back)).powi(2);
            signal += y * y;
        }
    }
    (error / signal).sqrt()
}

/// The upper Cholesky factor of the inverse of XᵀX with a hundredth of its mean
/// diagonal on the diagonal, as the papers of GPTQ and SparseGPT have it.
pub fn factor_of_inverse(x: &[f32], k: usize) -> Vec<Vec<f64>> {
    let mut h = vec![vec![0f64; 2 * k]; k];
    for x in x.chunks_exact(k) {
        for i in 0..k {
            for j in 0..k {
                h[i][j] += f64::from(x[i]) * f64::from(x[j]);
            }
        }
    }
    let mean = (0..k).map(|i| h[i][i]).sum::<f64>() / k as f64;
    for i in 0..k {
        h[i][i] += 0.01 * mean;
        h[i][k + i] = 1.0;
    }
    for i in 0..k {
        let pivot = h[i][i];
        h[i].iter_mut().for_each(|v| *v /= pivot);
        let line = h[i].clone();
        for (_, row) in h.iter_mut().enumerate().filter(|(r, _)| *r != i) {
            let by = row[i];
            row.iter_mut().zip(&line).for_each(|(v, l)| *v -= by * l);
        }
    }
    let mut u = vec![vec![0f64; k]; k];
    for i in 0..k {
        for j in i..k {
            let above: f64 = (0..i).map(|t| u[t][i] * u[t][j]).sum();
            let rest = h[i][k + j] - above;
            u[i][j] = if i == j { rest.sqrt() } else { rest / u[i][i] };
        }
    }
    u
}
