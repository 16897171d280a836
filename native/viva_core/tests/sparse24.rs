//! 2:4 sparsity: what stays, what it costs, and that nothing else changes.

mod support;

use support::{f32_tensor, float_tensor, gaussian, make, measure, name, on_every_level, quantized};
use viva_core::ops::{Cancel, dequantize, sparsity};
use viva_core::tensor::{DType, Tensor};
use viva_core::{Error, Result};

fn values(v: &str) -> viva_core::format::Spec {
    make("sparse24", &[("values", name(v))])
}

fn sparsified(x: &Tensor, scores: &Tensor) -> Result<Tensor> {
    let mut bytes = vec![0xffu8; x.bytes().len()];
    sparsity::sparsify_into(x, scores, &mut bytes, &Cancel::new())?;
    Tensor::from_slice(x.dtype(), x.shape(), &bytes)
}

/// Plain loops: of four the two of greatest magnitude, where none are equal.
fn pruned(x: &[f32], scores: &[f32]) -> Vec<f32> {
    let groups = x.chunks(4).zip(scores.chunks(4));
    let stay = |scores: &[f32], i: usize| {
        let before = scores.iter().filter(|s| s.abs() > scores[i].abs());
        before.count() < 2
    };
    groups
        .flat_map(|(x, scores)| (0..4).map(move |i| if stay(scores, i) { x[i] } else { 0.0 }))
        .collect()
}

const SHAPES: [[usize; 2]; 8] = [
    [1, 4],
    [3, 8],
    [5, 12],
    [7, 28],
    [2, 64],
    [3, 260],
    [9, 1020],
    [3, 40_004],
];

#[test]
fn two_of_four_stay_and_every_window_decodes() {
    on_every_level("two_of_four_stay_and_every_window_decodes", |digest| {
        for [rows, columns] in SHAPES {
            let x = gaussian(rows * columns, 3);
            let t = f32_tensor(&[rows, columns], &x);
            let expected = pruned(&x, &x);
            let q = quantized(&t, &values("source"));
            assert_eq!(dequantize::dequantize(&q).unwrap(), expected);
            for v in ["f16", "bf16", "int8", "fp8_e4m3"] {
                let q = quantized(&t, &values(v));
                digest.parts(&q);
                let whole = dequantize::dequantize(&q).unwrap();
                digest.bytes(&bytes_of(&whole));
                for (y, x) in whole.iter().zip(&expected) {
                    assert!(*x != 0.0 || *y == 0.0, "{y} of {x} in {v}");
                }
                let decoder = q.spec.format().unwrap().decoder(&q).unwrap();
                let n = whole.len();
                let starts = (0..n.min(40)).chain([n / 2 + 1, n - 3, n - 1]);
                for start in starts.filter(|s| *s < n) {
                    for len in [0, 1, 2, 3, 4, 5, 7, 16, 17, 33, 255, 257, 1000] {
                        let end = (start + len).min(n);
                        let out = support::decoded(&*decoder, start..end);
                        assert_eq!(out, &whole[start..end], "{start}..{end} of {n} in {v}");
                    }
                }
            }
        }
    });
}

fn bytes_of(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Codes and scales of what stays are those of a dense tensor of it alone.
#[test]
fn what_stays_is_encoded_as_it_would_be_alone() {
    for [rows, columns] in SHAPES {
        let x = gaussian(rows * columns, 4);
        let t = f32_tensor(&[rows, columns], &x);
        let pruned = pruned(&x, &x);
        let kept: Vec<f32> = pruned.iter().copied().filter(|v| *v != 0.0).collect();
        assert_eq!(kept.len(), x.len() / 2);
        let kept = f32_tensor(&[rows, columns / 2], &kept);
        for format in ["int8", "fp8_e4m3"] {
            for granularity in ["row", "tensor"] {
                let size = || ("block_size", name(granularity));
                let sparse = make("sparse24", &[("values", name(format)), size()]);
                let (q, alone) = (
                    quantized(&t, &sparse),
                    quantized(&kept, &make(format, &[size()])),
                );
                let scales =
                    |q: &viva_core::format::Quantized| q.part("scales").unwrap().to_f32_vec();
                assert_eq!(scales(&q), scales(&alone));
                let sums = |q| {
                    let y = dequantize::dequantize(q).unwrap();
                    y.iter().map(|v| f64::from(v.abs())).sum::<f64>()
                };
                assert!((sums(&q) - sums(&alone)).abs() < 1e-9 * sums(&q));
            }
        }
    }
}

#[test]
fn a_sparse_tensor_loses_nothing() {
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::F8E4M3] {
        let x = float_tensor(dtype, &[64, 96], &gaussian(64 * 96, 5));
        // Scores that keep other weights than the greatest.
        let scores = f32_tensor(&[64, 96], &gaussian(64 * 96, 6));
        let sparse = sparsified(&x, &scores).unwrap();
        let zeros = |t: &Tensor| t.to_f32_vec().iter().filter(|v| **v == 0.0).count();
        assert!(zeros(&sparse) >= 64 * 48);
        assert_eq!(
            sparse.to_f32_vec(),
            pruned(&x.to_f32_vec(), &scores.to_f32_vec())
        );
        let q = quantized(&sparse, &values("source"));
        // As numbers: a zero may lose its sign.
        let back = support::dequantized(&q, dtype);
        assert_eq!(back.to_f32_vec(), sparse.to_f32_vec());
        // Again, by its own magnitudes: it is sparse already.
        assert_eq!(
            sparsified(&sparse, &sparse).unwrap().to_f32_vec(),
            sparse.to_f32_vec()
        );
    }
}

#[test]
fn what_cannot_be_pruned_is_an_error() {
    let x = f32_tensor(&[2, 8], &gaussian(16, 7));
    let odd = f32_tensor(&[2, 6], &gaussian(12, 7));
    let short = Error::Indivisible { row: 6, block: 4 };
    assert_eq!(sparsified(&odd, &odd).unwrap_err(), short);
    let quantize = viva_core::ops::quantize::quantize;
    let cancel = Cancel::new();
    assert_eq!(quantize(&odd, &values("int8"), &cancel).unwrap_err(), short);
    assert!(matches!(
        sparsified(&x, &f32_tensor(&[4, 4], &gaussian(16, 7))),
        Err(Error::ShapeMismatch { .. })
    ));
    let ints = Tensor::from_slice(DType::I8, &[2, 8], &[1u8; 16]).unwrap();
    for (x, scores) in [(&ints, &x), (&x, &ints)] {
        let refused = sparsified(x, scores);
        assert!(matches!(refused, Err(Error::UnsupportedDtype { .. })));
    }
    let mut bad = gaussian(16, 7);
    bad[9] = f32::NAN;
    let expected = Error::NonFinite {
        nan: 1,
        inf: 0,
        first: 9,
    };
    assert_eq!(
        sparsified(&x, &f32_tensor(&[2, 8], &bad)).unwrap_err(),
        expected
    );
    // 65520 rounds to an infinite f16.
    let large = f32_tensor(&[1, 4], &[65520.0, 1.0, 2.0, 3.0]);
    let refused = quantize(&large, &values("f16"), &cancel);
    assert!(matches!(refused, Err(Error::InvalidOption { option, .. }) if option == "values"));
    assert!(quantize(&large, &values("bf16"), &cancel).is_ok());
}

/// E[Σ of the two least squares of four normal numbers]/4, by its densities of
/// order: what dropping them costs, whatever stores the rest.
fn dropped_energy() -> f64 {
    // The square of a normal number is below t² with probability erf(t/√2); the
    // expected k-th least of four is the integral of P(fewer than k below).
    let (mut energy, step) = (0.0, 1e-4);
    let mut below = 0.0;
    for i in 0..80_000 {
        let t = (f64::from(i) + 0.5) * step;
        let density = (2.0 / std::f64::consts::PI).sqrt() * (-t * t / 2.0).exp();
        let p = below + density * step / 2.0;
        below += density * step;
        let none = (1.0 - p).powi(4);
        let one = 4.0 * p * (1.0 - p).powi(3);
        energy += 2.0 * t * (none + none + one) * step;
    }
    energy / 4.0
}

#[test]
fn the_error_is_that_of_the_two_least_of_four() {
    let theory = -10.0 * dropped_energy().log10();
    let x = gaussian(1024 * 4096, 1);
    let x = float_tensor(DType::BF16, &[1024, 4096], &x);
    let (m, bits) = measure(&x, &values("source"));
    println!(
        "theory {theory:.3} dB, measured {:.3} dB, {bits} bpw",
        m.sqnr_db
    );
    // Four million draws: a standard deviation of 0.01 dB.
    assert!((m.sqnr_db - theory).abs() < 0.05, "{} {theory}", m.sqnr_db);
    assert_eq!(bits, 9.0);
    for v in ["int8", "fp8_e4m3"] {
        let (m, bits) = measure(&x, &values(v));
        println!("{v} {:.3} dB, {bits} bpw", m.sqnr_db);
        assert!((m.sqnr_db - theory).abs() < 0.15, "{v} {}", m.sqnr_db);
        assert!((bits - 5.0).abs() < 0.01, "{v} {bits}");
    }
}
