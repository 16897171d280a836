//! x · qᵀ of factors in bf16 against sums in f64 of the same factors, at every ISA
//! level, and its error against the factors that were not rounded.
//!
//! The tolerance is that of f32's sums, and what factors and sums below 2⁻¹²⁶ add,
//! which may count as zeros.

mod support;

use half::bf16;
use support::{
    every_spec, exact_product, f32_tensor, gaussian, make, on_every_level, product, quantized,
};
use viva_core::format::Quantized;
use viva_core::ops::dequantize::dequantize;
use viva_core::ops::matmul::BATCH;
use viva_core::ops::pool;
use viva_core::tensor::{DType, Tensor};

fn multiply(x: &Tensor, q: &Quantized) -> Vec<f32> {
    product("bf16", x, q, DType::F32).unwrap().to_f32_vec()
}

fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&v| bf16::from_f32(v).to_f32()).collect()
}

fn most(x: &[f32]) -> f64 {
    x.iter().fold(0.0, |m, v| m.max(f64::from(v.abs())))
}

fn check(x: &Tensor, q: &Quantized) {
    let (n, k) = (q.shape[0], q.shape[1]);
    let (values, w) = (rounded(&x.to_f32_vec()), rounded(&dequantize(q).unwrap()));
    let flushed = (2.0 + most(&values) + most(&w)) * 2f64.powi(-126);
    let y = multiply(x, q);
    for (i, (sum, size)) in exact_product(&values, &w, k).into_iter().enumerate() {
        let tolerance = 2.0 * k as f64 * (2f64.powi(-24) * size + flushed);
        let got = f64::from(y[i]);
        assert!(
            (got - sum).abs() <= tolerance,
            "[{}, {}] {got} is not {sum}: {x:?} · {:?} {:?}",
            i / n,
            i % n,
            q.shape,
            q.spec
        );
    }
}

#[test]
fn products_of_every_cut() {
    on_every_level("products_of_every_cut", |_| {
        for (n, k) in [
            (1, 1),
            (31, 63),
            (33, 127),
            (32, 255),
            (65, 1025),
            (140, 2080),
        ] {
            let w = f32_tensor(&[n, k], &gaussian(n * k, k as u64));
            let q = quantized(&w, &make("int8", &[]));
            for m in [8, 9, 17, 260] {
                check(&f32_tensor(&[m, k], &gaussian(m * k, m as u64)), &q);
            }
        }
    });
}

#[test]
fn zeros_subnormals_and_what_is_no_number() {
    on_every_level("zeros_subnormals_and_what_is_no_number", |_| {
        let (m, n, k) = (11, 37, 96);
        let q = quantized(&f32_tensor(&[n, k], &gaussian(n * k, 1)), &make("nf4", &[]));
        let mut x = gaussian(m * k, 2);
        x[..k].fill(0.0);
        x[k..2 * k].iter_mut().for_each(|v| *v *= 1e-40);
        x[2 * k..3 * k].iter_mut().for_each(|v| *v *= 1e35);
        check(&f32_tensor(&[m, k], &x), &q);
        let tame = multiply(&f32_tensor(&[m, k], &x), &q);
        x[3 * k + 5] = f32::NAN;
        x[4 * k + 7] = f32::NEG_INFINITY;
        let y = multiply(&f32_tensor(&[m, k], &x), &q);
        assert!(y[..n].iter().all(|&v| v == 0.0));
        assert!(y[3 * n..4 * n].iter().all(|v| v.is_nan()));
        assert!(y[4 * n..5 * n].iter().all(|v| !v.is_finite()));
        assert_eq!((&y[..3 * n], &y[5 * n..]), (&tame[..3 * n], &tame[5 * n..]));
    });
}

#[test]
fn neither_threads_nor_other_rows_change_a_bit() {
    let (n, k) = (300, 1100);
    let q = quantized(
        &f32_tensor(&[n, k], &gaussian(n * k, 3)),
        &make("int8", &[]),
    );
    let values = gaussian(300 * k, 4);
    let rows = |rows: std::ops::Range<usize>| {
        let x = &values[rows.start * k..rows.end * k];
        multiply(&f32_tensor(&[rows.len(), k], x), &q)
    };
    pool::configure(1).unwrap();
    let all = rows(0..300);
    for threads in [1, 2, 5] {
        pool::configure(threads).unwrap();
        assert_eq!(rows(0..300), all, "{threads}");
        assert_eq!(rows(280..300), all[280 * n..], "{threads}");
    }
}

#[test]
fn few_rows_are_not_rounded() {
    let q = quantized(
        &f32_tensor(&[40, 64], &gaussian(2560, 5)),
        &make("nf4", &[]),
    );
    let x = f32_tensor(&[BATCH - 1, 64], &gaussian((BATCH - 1) * 64, 6));
    let exact = product("f32", &x, &q, DType::BF16).unwrap();
    let y = product("bf16", &x, &q, DType::BF16).unwrap();
    assert_eq!(y.bytes(), exact.bytes());
}

/// Both factors are off by up to 2⁻⁸ of themselves, at most a third of its square on
/// average: 2⁻⁸ · √(2/3) of the result's norm.
#[test]
fn errors_are_those_of_rounding_the_factors() {
    let (n, k, m) = (64, 1024, BATCH);
    let w = f32_tensor(&[n, k], &gaussian(n * k, 7));
    let x = gaussian(m * k, 8);
    for spec in every_spec() {
        let q = quantized(&w, &spec);
        let y = multiply(&f32_tensor(&[m, k], &x), &q);
        let exact = exact_product(&x, &dequantize(&q).unwrap(), k);
        let (mut error, mut size) = (0f64, 0f64);
        for (y, (exact, _)) in y.into_iter().zip(exact) {
            error += (f64::from(y) - exact).powi(2);
            size += exact * exact;
        }
        let error = (error / size).sqrt();
        assert!(
            error < 2f64.powi(-8) * (2f64 / 3.0).sqrt(),
            "{error}: {spec:?}"
        );
    }
}
