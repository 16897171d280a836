//! The scales of columns that AWQ tries: powers of the mean magnitude of what a
//! column meets, alone or against powers of that of its weights.

use rayon::prelude::*;

use super::awq::Weight;

/// Exponents: 0, 1/20 … 19/20.
const POINTS: usize = 20;

/// Rows whose magnitudes are summed together.
const STRIPE: usize = 64;

/// Which scales are tried. That of 1, which leaves columns as they are, always is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DuoScaling {
    /// x̄^r: what a column meets.
    #[default]
    No,
    /// x̄^r / w̄^(1−r): against what its weights are in their blocks.
    Yes,
    Both,
}

/// The scales, the one that leaves columns as they are first; `apart` is between
/// exponents, in twentieths. `mean` are mean magnitudes of the input that
/// all `weights` read. Call it inside the pool.
pub fn candidates(
    weights: &[Weight],
    mean: &[f32],
    duo: DuoScaling,
    apart: usize,
) -> Vec<Vec<f32>> {
    let roots_of = |x: &mut dyn Iterator<Item = f64>| x.map(twentieth_root).collect::<Vec<_>>();
    let x = roots_of(&mut mean.iter().map(|&m| f64::from(m)));
    let alone = |point: i32| normalized(x.iter().map(|x| x.powi(point)));
    let points = || (0..POINTS as i32).step_by(apart);
    let mut found = match duo {
        DuoScaling::Yes => vec![alone(0)],
        _ => points().map(alone).collect(),
    };
    if duo != DuoScaling::No {
        let w = roots_of(&mut magnitudes(weights, mean.len()).into_iter());
        let columns = || x.iter().zip(&w);
        let against = |point: i32| {
            let rest = POINTS as i32 - point;
            normalized(columns().map(|(x, w)| x.powi(point) / (w.powi(rest) + 1e-4)))
        };
        found.extend(points().map(against));
    }
    found
}

/// The mean over all rows of each weight's part of the greatest in its block.
fn magnitudes(weights: &[Weight], k: usize) -> Vec<f64> {
    let mut sums = vec![0f64; k];
    let mut rows = 0;
    for (w, spec) in weights {
        let block = spec.block_len(w.shape()).clamp(1, k);
        let starts = (0..w.len()).into_par_iter().step_by(STRIPE * k);
        let stripes = starts.map_init(Vec::new, |wide, first| {
            let mut sums = vec![0f64; k];
            let end = w.len().min(first + STRIPE * k);
            for row in w.f32_chunk(first..end, wide).chunks_exact(k) {
                for (w, sums) in row.chunks(block).zip(sums.chunks_mut(block)) {
                    let most = w.iter().fold(0f32, |most, w| most.max(w.abs()));
                    // A block of zeros adds nothing.
                    if most > 0.0 {
                        for (sum, w) in sums.iter_mut().zip(w) {
                            *sum += f64::from(w.abs() / most);
                        }
                    }
                }
            }
            sums
        });
        // In the order of the stripes: not that in which threads end.
        for stripe in stripes.collect::<Vec<_>>() {
            for (sum, more) in sums.iter_mut().zip(stripe) {
                *sum += more;
            }
        }
        rows += w.len() / k;
    }
    sums.iter().map(|sum| sum / rows.max(1) as f64).collect()
}

/// As AWQ does it: clamped from below, then divided by √(max · min).
fn normalized(s: impl Iterator<Item = f64>) -> Vec<f32> {
    let s: Vec<f64> = s.map(|s| s.max(1e-4)).collect();
    let most = s.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let least = s.iter().copied().fold(f64::INFINITY, f64::min);
    let norm = (most * least).sqrt();
    s.iter().map(|s| (s / norm) as f32).collect()
}

/// x^(1/20). Libraries round powers differently, and bytes have to be the same
/// on every machine: a fifth root by Newton's method, and exact square roots.
fn twentieth_root(x: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    // Dividing the bits divides the exponent, and the mantissa roughly.
    const ONE: u64 = 0x3ff0_0000_0000_0000;
    let mut y = f64::from_bits(ONE - ONE / 5 + x.to_bits() / 5);
    for _ in 0..6 {
        y = 0.8 * y + 0.2 * (x / (y * y * y * y));
    }
    y.sqrt().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{OptionValue, spec};
    use crate::tensor::{DType, Tensor};

    #[test]
    fn roots_are_roots() {
        for i in -200..200 {
            let x = 1.37f64.powi(i);
            let y = twentieth_root(x).powi(20);
            assert!((y / x - 1.0).abs() < 1e-12, "{x}: {y}");
        }
        assert_eq!(twentieth_root(0.0), 0.0);
    }

    /// AutoAWQ's formula, in f64 and with the library's powers; groups of 4 in
    /// rows of 10 leave one of 2.
    #[test]
    fn duo_scaling_is_what_its_authors_compute() {
        let (k, rows) = (10, [70, 3]);
        let value = |i: usize| ((i * 7919 % 203) as f32 - 101.0) / 61.0;
        let weights = rows.map(|n| {
            let mut w: Vec<f32> = (0..n * k).map(|i| value(i + n)).collect();
            // A block of zeros, and a column of them.
            w[4..8].fill(0.0);
            w.chunks_exact_mut(k).for_each(|row| row[9] = 0.0);
            (w, n)
        });
        let tensors = weights
            .each_ref()
            .map(|(w, n)| Tensor::from_slice(DType::F32, &[*n, k], w).unwrap());
        let spec = spec("int4", vec![("block_size".into(), OptionValue::Int(4))]).unwrap();
        let given = tensors.each_ref().map(|w| (w, &spec));
        let mean: Vec<f32> = (0..k).map(|j| (j as f32).exp() - 1.0).collect();
        let mut w_mean = vec![0f64; k];
        for (w, n) in &weights {
            for (i, row) in (0..*n).zip(w.chunks_exact(k)) {
                for (j, w) in row.iter().enumerate() {
                    let group = &row[j / 4 * 4..k.min(j / 4 * 4 + 4)];
                    let most = group.iter().fold(0f32, |m, w| m.max(w.abs()));
                    let part = f64::from(w.abs()) / f64::from(most).max(1e-30);
                    assert!(part <= 1.0, "{i},{j}");
                    w_mean[j] += part / 73.0;
                }
            }
        }
        let found = candidates(&given, &mean, DuoScaling::Yes, 1);
        assert_eq!((found.len(), &found[0]), (21, &vec![1f32; k]));
        for (point, s) in found[1..].iter().enumerate() {
            let r = point as f64 / 20.0;
            let scale = |(x, w): (&f32, &f64)| f64::from(*x).powf(r) / (w.powf(1.0 - r) + 1e-4);
            let mut expected: Vec<f64> = mean.iter().zip(&w_mean).map(scale).collect();
            expected.iter_mut().for_each(|s| *s = s.max(1e-4));
            let most = expected.iter().copied().fold(0.0, f64::max);
            let least = expected.iter().copied().fold(f64::INFINITY, f64::min);
            for (s, expected) in s.iter().zip(expected) {
                let ratio = f64::from(*s) * (most * least).sqrt() / expected;
                assert!((ratio - 1.0).abs() < 1e-6, "{point}: {ratio}");
            }
        }
        // Both are one after the other; fewer of each are every other one.
        let both = candidates(&given, &mean, DuoScaling::Both, 1);
        let alone = candidates(&given, &mean, DuoScaling::No, 1);
        assert_eq!(both, [&alone[..], &found[1..]].concat());
        let fewer: Vec<_> = both.into_iter().step_by(2).collect();
        assert_eq!(candidates(&given, &mean, DuoScaling::Both, 2), fewer);
    }
}
