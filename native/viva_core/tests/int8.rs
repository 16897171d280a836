//! x · qᵀ in 8-bit integers, bit for bit against a scalar definition at every ISA
//! level, and its error against f64.

mod support;

use support::{every_spec, f32_tensor, float_tensor, gaussian, make, on_every_level, quantized};
use viva_core::format::{Quantized, Spec};
use viva_core::ops::dequantize::dequantize;
use viva_core::ops::int8::{matmul_into, matmul_packed};
use viva_core::ops::matmul::matmul_shape;
use viva_core::ops::packed::pack;
use viva_core::ops::quantize::quantize;
use viva_core::ops::{Cancel, pool};
use viva_core::steps::{Lows, Steps};
use viva_core::tensor::{DType, Tensor};

/// Both ways to the product: of packed weights, and of weights as they lie.
fn products(x: &Tensor, q: &Quantized, dtype: DType) -> [Tensor; 2] {
    let shape = matmul_shape(x, &q.shape).unwrap();
    let mut out = vec![0u8; shape.iter().product::<usize>() * dtype.size()];
    matmul_into(x, q, dtype.into(), &mut out, &Cancel::new()).unwrap();
    let straight = Tensor::from_slice(dtype, &shape, &out).unwrap();
    let packed = pack(q, &Cancel::new()).unwrap();
    out.fill(0xff);
    matmul_packed(x, &packed, dtype.into(), &mut out, &Cancel::new()).unwrap();
    [straight, Tensor::from_slice(dtype, &shape, &out).unwrap()]
}

/// A group's activations in 8 bits: the step, and how many.
fn rounded(x: &[f32]) -> (f32, Vec<i32>) {
    let most = x
        .iter()
        .fold(0f32, |m, v| if v.is_nan() { *v } else { m.max(v.abs()) });
    let scale = most / 127.0;
    if x.iter().any(|v| !v.is_finite()) {
        return (f32::NAN, vec![0; x.len()]);
    }
    if scale == 0.0 {
        return (0.0, vec![0; x.len()]);
    }
    let code = |v: &f32| (v / scale).clamp(-127.0, 127.0).round_ties_even() as i32;
    (scale, x.iter().map(code).collect())
}

/// One element of the product, as it is defined.
fn element(x: &[f32], steps: &dyn Steps, row: usize) -> f32 {
    let form = steps.form();
    let block = form.block.min(x.len());
    let mut codes = vec![0u8; x.len()];
    let (mut scales, mut lows) = (vec![0f32; x.len() / block], vec![0f32; x.len() / block]);
    steps.codes(row, &mut codes);
    steps.numbers(row, &mut scales, &mut lows);
    if form.shared > 1 {
        let shares = scales.len() / form.shared;
        let (mut units, mut unit_lows) = (vec![0f32; shares], vec![0f32; shares]);
        steps.units(row, &mut units, &mut unit_lows);
        for i in 0..scales.len() {
            scales[i] *= units[i / form.shared];
            lows[i] *= unit_lows[i / form.shared];
        }
    }
    let step = |code: u8| match form.table {
        Some(table) => i32::from(table[usize::from(code)]),
        None => i32::from(code),
    };
    let mut y = 0f32;
    for (i, (x, codes)) in x.chunks(block).zip(codes.chunks(block)).enumerate() {
        let (by, x) = rounded(x);
        let terms = x.iter().zip(codes);
        let sum: i32 = terms
            .map(|(x, &code)| x * (step(code) - i32::from(form.zero)))
            .sum();
        y = (scales[i] * by).mul_add(sum as f32, y);
        let low = match form.lows {
            Lows::Nothing => continue,
            Lows::ZeroPoints => 0.0 - scales[i] * lows[i],
            Lows::Biases => lows[i],
        };
        y = low.mul_add(by * x.iter().sum::<i32>() as f32, y);
    }
    y
}

/// The specs whose weights are steps in rows of k.
fn specs_for(k: usize) -> Vec<Spec> {
    let x = f32_tensor(&[1, k], &vec![1.0; k]);
    let is_made_of_steps =
        |s: &Spec| quantize(&x, s, &Cancel::new()).is_ok_and(|q| pack(&q, &Cancel::new()).is_ok());
    every_spec().into_iter().filter(is_made_of_steps).collect()
}

fn check(x: &Tensor, q: &Quantized) {
    let (n, k) = (q.shape[0], q.shape[1]);
    let decoder = q.spec.format().unwrap().decoder(q).unwrap();
    let steps = decoder.steps().unwrap();
    let values = x.to_f32_vec();
    let rows = values.chunks_exact(k);
    let expected: Vec<f32> = rows
        .flat_map(|x| (0..n).map(move |row| element(x, steps, row)))
        .collect();
    for y in products(x, q, DType::F32) {
        for (i, (y, e)) in y.to_f32_vec().into_iter().zip(&expected).enumerate() {
            let same = y == *e || (y.is_nan() && e.is_nan());
            assert!(same, "[{}, {}] {y} is not {e}: {:?}", i / n, i % n, q.spec);
        }
    }
}

#[test]
fn products_are_as_defined_for_every_format_and_size() {
    on_every_level("products_are_as_defined_for_every_format_and_size", |_| {
        for (n, k) in [(1, 1), (3, 7), (33, 32), (5, 96), (70, 129), (31, 512)] {
            let w = f32_tensor(&[n, k], &gaussian(n * k, k as u64));
            for spec in specs_for(k) {
                let q = quantized(&w, &spec);
                for m in [1, 2, 5, 9, 12, 17, 25] {
                    check(&f32_tensor(&[m, k], &gaussian(m * k, m as u64)), &q);
                }
            }
        }
    });
}

#[test]
fn many_tokens_and_long_rows() {
    on_every_level("many_tokens_and_long_rows", |_| {
        let w = f32_tensor(&[40, 256], &gaussian(40 * 256, 5));
        for format in ["int8", "int4", "nf4", "q4_0", "q4_k", "mxfp4"] {
            let q = quantized(&w, &make(format, &[]));
            check(&f32_tensor(&[301, 256], &gaussian(301 * 256, 6)), &q);
        }
        // A scale over more products than 32 bits have room for.
        let k = 150_000;
        let w = f32_tensor(&[3, k], &vec![1.0; 3 * k]);
        let q = quantized(&w, &make("int8", &[]));
        let [y, _] = products(&f32_tensor(&[1, k], &vec![1.0; k]), &q, DType::F32);
        for y in y.to_f32_vec() {
            assert!((y / k as f32 - 1.0).abs() < 1e-5, "{y}");
        }
    });
}

#[test]
fn zeros_subnormals_and_what_is_no_number() {
    on_every_level("zeros_subnormals_and_what_is_no_number", |_| {
        let k = 64;
        let w = f32_tensor(&[9, k], &gaussian(9 * k, 7));
        let mut x = gaussian(6 * k, 8);
        x[..k].fill(0.0);
        x[k..2 * k].iter_mut().for_each(|v| *v *= 1e-40);
        x[2 * k + 5] = f32::NAN;
        x[3 * k + 63] = f32::NEG_INFINITY;
        x[4 * k] = f32::MAX;
        for spec in specs_for(k) {
            let q = quantized(&w, &spec);
            check(&f32_tensor(&[6, k], &x), &q);
            let [y, _] = products(&f32_tensor(&[6, k], &x), &q, DType::F32);
            let y = y.to_f32_vec();
            assert!(y[..9].iter().all(|v| *v == 0.0), "{spec:?}");
            assert!(y[2 * 9..4 * 9].iter().all(|v| v.is_nan()), "{spec:?}");
            assert!(y[5 * 9..].iter().all(|v| v.is_finite()), "{spec:?}");
        }
    });
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let (n, k) = (300, 2048);
    let w = f32_tensor(&[n, k], &gaussian(n * k, 9));
    for format in ["int8", "int4", "q4_k"] {
        let q = quantized(&w, &make(format, &[]));
        for m in [2, 40, 200] {
            let x = f32_tensor(&[m, k], &gaussian(m * k, 10));
            let with = |threads| {
                pool::configure(threads).unwrap();
                products(&x, &q, DType::BF16).map(|y| y.bytes().to_vec())
            };
            assert_eq!(with(1), with(3), "{format}, {m}");
        }
    }
}

/// Half a step of 127 in activations, and where a table is rounded as much in
/// weights: about a percent of the result.
#[test]
fn errors_are_small_beside_those_of_the_weights() {
    let (n, k, m) = (64, 1024, 4);
    let w = f32_tensor(&[n, k], &gaussian(n * k, 11));
    let x = f32_tensor(&[m, k], &gaussian(m * k, 12));
    for spec in specs_for(k) {
        let q = quantized(&w, &spec);
        let w = dequantize(&q).unwrap();
        let [y, _] = products(&x, &q, DType::F32);
        let (mut error, mut size) = (0f64, 0f64);
        for (x, y) in x.to_f32_vec().chunks(k).zip(y.to_f32_vec().chunks(n)) {
            for (w, y) in w.chunks(k).zip(y) {
                let exact: f64 = x
                    .iter()
                    .zip(w)
                    .map(|(x, w)| f64::from(*x) * f64::from(*w))
                    .sum();
                error += (exact - f64::from(*y)).powi(2);
                size += exact * exact;
            }
        }
        let error = (error / size).sqrt();
        assert!(error < 0.012, "{error}: {spec:?}");
    }
}

#[test]
fn other_dtypes_and_what_cannot_be_packed() {
    let w = f32_tensor(&[10, 64], &gaussian(640, 13));
    let q = quantized(&w, &make("q4_0", &[]));
    for from in [DType::F16, DType::BF16, DType::F64] {
        check(&float_tensor(from, &[3, 64], &gaussian(192, 14)), &q);
    }
    let packed = pack(&q, &Cancel::new()).unwrap();
    assert_eq!((packed.shape(), packed.format()), (&[10, 64][..], "q4_0"));
    for format in ["fp8_e4m3", "dynamic8", "sparse24"] {
        let q = quantized(&w, &make(format, &[]));
        let error = pack(&q, &Cancel::new()).unwrap_err().to_string();
        assert!(
            error.contains(format) && error.contains("compute f32"),
            "{error}"
        );
    }
    // Blocks that cross rows.
    let w = f32_tensor(&[10, 100], &gaussian(1000, 15));
    let error = pack(&quantized(&w, &make("nf4", &[])), &Cancel::new()).unwrap_err();
    assert!(error.to_string().contains("cross the rows"), "{error}");
    let error = pack(
        &quantized(&f32_tensor(&[64], &[1.0; 64]), &make("int8", &[])),
        &Cancel::new(),
    );
    assert!(error.is_err());
}
