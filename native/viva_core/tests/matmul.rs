//! x · qᵀ against sums in f64 over the dequantized weights, at every ISA level.
//!
//! The tolerance: a sum of k products in f32, in whatever order and fused or
//! not, is off by at most k · 2⁻²⁴ · Σ|x||w| (to first order; twice that is
//! allowed here), by 2⁻¹⁵⁰ a step where it is subnormal, and a result in f16 or
//! bf16 by its own last rounding more.

mod support;

use support::{
    every_spec, exact_product, f32_tensor, float_tensor, gaussian, make, on_every_level, quantized,
    yes,
};
use viva_core::format::{Quantized, Spec};
use viva_core::ops::dequantize::dequantize;
use viva_core::ops::matmul::{BATCH, matmul_into, part_of_small};
use viva_core::ops::quantize::quantize;
use viva_core::ops::{Cancel, pool};
use viva_core::tensor::{DType, Tensor};
use viva_core::{Error, Result};

fn matmul(x: &Tensor, q: &Quantized, dtype: DType) -> Result<Tensor> {
    support::product("f32", x, q, dtype)
}

/// Half the distance of two neighbours at 1, and the least distance of all.
fn rounding(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        DType::BF16 => (2f64.powi(-8), 2f64.powi(-134)),
        _ => (2f64.powi(-24), 2f64.powi(-150)),
    }
}

fn check(x: &Tensor, q: &Quantized, dtype: DType) {
    let &[n, k] = q.shape.as_slice() else {
        panic!("{:?}", q.shape);
    };
    let what = format!("{x:?} · {:?} as {dtype:?} {:?}", q.shape, q.spec);
    let y = matmul(x, q, dtype).unwrap();
    let mut shape = x.shape().to_vec();
    *shape.last_mut().unwrap() = n;
    assert_eq!(y.shape(), shape, "{what}");
    let (x, w, y) = (x.to_f32_vec(), dequantize(q).unwrap(), y.to_f32_vec());
    let (relative, least) = rounding(dtype);
    for (i, (sum, magnitudes)) in exact_product(&x, &w, k).into_iter().enumerate() {
        let steps = 2.0 * k as f64 * (2f64.powi(-24) * magnitudes + 2f64.powi(-150));
        let tolerance = steps + relative * sum.abs() * 1.001 + least;
        let got = f64::from(y[i]);
        assert!(
            (got - sum).abs() <= tolerance,
            "[{}, {}] {got} is not {sum}: {what}",
            i / n,
            i % n
        );
    }
}

/// Specs whose blocks a row of k takes.
fn specs_for(k: usize) -> Vec<Spec> {
    let x = f32_tensor(&[1, k], &vec![1.0; k]);
    let fits = |s: &Spec| quantize(&x, s, &Cancel::new()).is_ok();
    every_spec().into_iter().filter(fits).collect()
}

#[test]
fn products_of_every_format_and_size() {
    on_every_level("products_of_every_format_and_size", |_| {
        for (n, k) in [
            (1, 1),
            (3, 7),
            (4, 16),
            (5, 33),
            (13, 64),
            (7, 96),
            (66, 129),
            (9, 608),
        ] {
            let w = f32_tensor(&[n, k], &gaussian(n * k, k as u64));
            for spec in specs_for(k) {
                let q = quantized(&w, &spec);
                for m in [1, 2, 3, 8, 17] {
                    let x = f32_tensor(&[m, k], &gaussian(m * k, m as u64));
                    check(&x, &q, DType::F32);
                }
            }
        }
    });
}

#[test]
fn every_dtype_in_and_out_at_any_address() {
    on_every_level("every_dtype_in_and_out_at_any_address", |_| {
        let w = f32_tensor(&[19, 96], &gaussian(19 * 96, 1));
        let values = gaussian(3 * 96, 2);
        for spec in every_spec() {
            let specs_fit = quantize(&w, &spec, &Cancel::new());
            let Ok(q) = specs_fit else { continue };
            for from in [DType::F32, DType::F16, DType::BF16, DType::F64] {
                for to in [DType::F32, DType::F16, DType::BF16, DType::F64] {
                    check(&float_tensor(from, &[3, 96], &values), &q, to);
                    check(&support::unaligned_tensor(from, &[3, 96], &values), &q, to);
                }
            }
        }
    });
}

#[test]
fn leading_dimensions_are_a_batch() {
    let w = f32_tensor(&[10, 64], &gaussian(640, 3));
    for spec in every_spec() {
        let q = quantized(&w, &spec);
        let values = gaussian(6 * 64, 4);
        let flat = f32_tensor(&[6, 64], &values);
        let expected = matmul(&flat, &q, DType::F32).unwrap();
        for shape in [vec![2, 3, 64], vec![1, 6, 1, 64]] {
            let x = f32_tensor(&shape, &values);
            check(&x, &q, DType::F32);
            assert_eq!(
                matmul(&x, &q, DType::F32).unwrap().bytes(),
                expected.bytes()
            );
        }
        // A vector gives a vector.
        check(&f32_tensor(&[64], &values[..64]), &q, DType::F32);
    }
}

/// Around the edges of panels, blocks of weights and slices of k.
#[test]
fn batches_of_every_cut() {
    on_every_level("batches_of_every_cut", |digest| {
        for (n, k) in [
            (1, 1023),
            (31, 64),
            (32, 1024),
            (33, 1025),
            (65, 2080),
            (130, 96),
        ] {
            let w = f32_tensor(&[n, k], &gaussian(n * k, 15));
            let mut specs = vec![
                make("int8", &[]),
                make("int8", &[("symmetric", yes(false))]),
            ];
            if k % 32 == 0 {
                specs.extend([make("nf4", &[]), make("q4_0", &[]), make("mxfp4", &[])]);
            }
            for spec in specs {
                let q = quantized(&w, &spec);
                for m in [7, 8, 9, 16, 33, 129] {
                    let x = f32_tensor(&[m, k], &gaussian(m * k, m as u64));
                    check(&x, &q, DType::F32);
                    if m >= BATCH {
                        digest.bytes(matmul(&x, &q, DType::F32).unwrap().bytes());
                    }
                }
            }
        }
        let w = quantized(
            &f32_tensor(&[40, 96], &gaussian(3840, 16)),
            &make("nf4", &[]),
        );
        let values = gaussian(11 * 96, 17);
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            check(
                &support::unaligned_tensor(dtype, &[11, 96], &values),
                &w,
                dtype,
            );
        }
    });
}

/// Neither the pool nor the other rows of x change a bit of a row's result.
#[test]
fn rows_are_the_same_bits_in_any_company() {
    let (n, k) = (200, 1100);
    let w = f32_tensor(&[n, k], &gaussian(n * k, 18));
    let values = gaussian(150 * k, 19);
    let q = quantized(&w, &make("int8", &[]));
    let product = |rows: std::ops::Range<usize>| {
        let x = f32_tensor(&[rows.len(), k], &values[rows.start * k..rows.end * k]);
        matmul(&x, &q, DType::F32).unwrap().to_f32_vec()
    };
    pool::configure(1).unwrap();
    let (tokens, batch) = (product(3..3 + BATCH - 1), product(0..150));
    for threads in [1, 2, 5] {
        pool::configure(threads).unwrap();
        assert_eq!(product(0..150), batch, "{threads}");
        assert_eq!(product(140..150), batch[140 * n..], "{threads}");
        for (i, tokens) in tokens.chunks(n).enumerate() {
            assert_eq!(product(3 + i..4 + i), tokens, "{threads}");
        }
    }
}

/// What is not a number, or hardly one, stays in its own row.
#[test]
fn odd_activations_of_a_batch() {
    on_every_level("odd_activations_of_a_batch", |_| {
        let (n, k) = (37, 96);
        let q = quantized(
            &f32_tensor(&[n, k], &gaussian(n * k, 20)),
            &make("nf4", &[]),
        );
        let weights = dequantize(&q).unwrap();
        for m in [5, 8, 13] {
            let mut values = gaussian(m * k, 21);
            values[..k].fill(0.0);
            values[k..2 * k].iter_mut().for_each(|v| *v *= 1e-40);
            values[2 * k + 5] = f32::NAN;
            values[3 * k + 7] = f32::NEG_INFINITY;
            let y = matmul(&f32_tensor(&[m, k], &values), &q, DType::F32).unwrap();
            let y = y.to_f32_vec();
            assert!(y[..n].iter().all(|&v| v == 0.0));
            assert!(y[2 * n..3 * n].iter().all(|v| v.is_nan()));
            for (y, w) in y[3 * n..4 * n].iter().zip(weights.chunks(k)) {
                match w[7] {
                    0.0 => assert!(y.is_nan()),
                    w => assert_eq!(*y, f32::NEG_INFINITY * w),
                }
            }
            // The others, by themselves.
            let tame: Vec<usize> = (0..m).filter(|i| ![2, 3].contains(i)).collect();
            let rows = tame.iter().flat_map(|i| &values[i * k..(i + 1) * k]);
            let x = f32_tensor(&[tame.len(), k], &rows.copied().collect::<Vec<f32>>());
            check(&x, &q, DType::F32);
            if tame.len() >= BATCH {
                let alone = matmul(&x, &q, DType::F32).unwrap().to_f32_vec();
                for (alone, i) in alone.chunks(n).zip(tame) {
                    assert_eq!(alone, &y[i * n..(i + 1) * n]);
                }
            }
        }
    });
}

/// Several tiles of weights and rows longer than a chunk of work.
#[test]
fn large_products() {
    on_every_level("large_products", |_| {
        for (n, k) in [(300, 1024), (70, 17_000)] {
            let w = f32_tensor(&[n, k], &gaussian(n * k, 5));
            for spec in [make("int8", &[]), make("nf4", &[])] {
                let q = quantized(&w, &spec);
                for m in [1, 5, 12] {
                    check(&f32_tensor(&[m, k], &gaussian(m * k, 6)), &q, DType::F32);
                }
            }
        }
    });
}

#[test]
fn products_past_the_result_s_range_are_infinite_and_nan_stays() {
    let w = f32_tensor(&[2, 32], &[300.0; 64]);
    let q = quantized(&w, &make("int8", &[]));
    let x = f32_tensor(&[1, 32], &[300.0; 32]);
    let y = matmul(&x, &q, DType::F16).unwrap();
    assert_eq!(y.to_f32_vec(), [f32::INFINITY; 2]);
    let mut values = [1.0; 32];
    values[31] = f32::NAN;
    let y = matmul(&f32_tensor(&[1, 32], &values), &q, DType::F32).unwrap();
    assert!(y.to_f32_vec().iter().all(|v| v.is_nan()));
}

#[test]
fn shapes_that_do_not_meet_are_refused() {
    let q = quantized(&f32_tensor(&[6, 64], &gaussian(384, 7)), &make("nf4", &[]));
    let refused = |x: Tensor, q: &Quantized, expected: &[usize]| match matmul(&x, q, DType::F32)
        .unwrap_err()
    {
        Error::ShapeMismatch { expected: e, .. } => assert_eq!(e, expected),
        other => panic!("{other:?}"),
    };
    let x = |shape: &[usize]| f32_tensor(shape, &vec![1.0; shape.iter().product()]);
    refused(x(&[2, 63]), &q, &[2, 64]);
    refused(x(&[64, 2]), &q, &[64, 64]);
    refused(x(&[2, 3, 6]), &q, &[6, 64]);
    refused(x(&[2, 0]), &q, &[0, 64]);
    refused(x(&[]), &q, &[1, 64]);
    // Only matrices are multiplied.
    for shape in [vec![64], vec![2, 3, 64], vec![1, 0, 64]] {
        let n = shape.iter().product();
        let q = quantized(&f32_tensor(&shape, &gaussian(n, 8)), &make("nf4", &[]));
        refused(x(&[2, 64]), &q, &[n / 64, 64]);
    }
}

#[test]
fn dtypes_and_sizes_that_do_not_fit_are_refused() {
    let q = quantized(&f32_tensor(&[6, 64], &gaussian(384, 9)), &make("nf4", &[]));
    let x = f32_tensor(&[2, 64], &gaussian(128, 10));
    let ints = Tensor::from_slice(DType::I32, &[2, 64], &[1i32; 128]).unwrap();
    for (x, dtype) in [(&ints, DType::F32), (&x, DType::I32), (&x, DType::U8)] {
        let refused = matmul(x, &q, dtype).unwrap_err();
        assert!(matches!(refused, Error::UnsupportedDtype { .. }));
    }
    for len in [0, 4 * 12 - 1, 4 * 13] {
        let mut out = vec![0; len];
        let refused = matmul_into(&x, &q, DType::F32.into(), &mut out, &Cancel::new());
        assert!(matches!(refused, Err(Error::SizeMismatch { .. })));
    }
}

#[test]
fn empty_products() {
    let empty = |shape: &[usize]| Tensor::from_slice::<u8>(DType::F32, shape, &[]).unwrap();
    for spec in every_spec() {
        // No rows of x, no rows of q.
        let q = quantized(&f32_tensor(&[6, 64], &gaussian(384, 11)), &spec);
        assert_eq!(
            matmul(&empty(&[0, 64]), &q, DType::F32).unwrap().shape(),
            [0, 6]
        );
        let y = matmul(&empty(&[2, 0, 64]), &q, DType::BF16).unwrap();
        assert_eq!(y.shape(), [2, 0, 6]);
        let q = quantized(&empty(&[0, 64]), &spec);
        let x = f32_tensor(&[2, 64], &gaussian(128, 12));
        assert_eq!(matmul(&x, &q, DType::F32).unwrap().shape(), [2, 0]);
        // Sums of nothing are zero, over what was there before.
        let q = quantized(&empty(&[3, 0]), &spec);
        let mut out = vec![0xff; 2 * 3 * 4];
        matmul_into(
            &empty(&[2, 0]),
            &q,
            DType::F32.into(),
            &mut out,
            &Cancel::new(),
        )
        .unwrap();
        assert_eq!(out, [0; 24]);
    }
}

#[test]
fn small_products_are_few_and_of_few_rows() {
    let token = part_of_small(&[256], 256).unwrap();
    assert!(token > 0.0 && token <= 1.0, "{token}");
    assert_eq!(part_of_small(&[1, 1, 256], 256), Some(token));
    assert_eq!(part_of_small(&[2, 128], 256), Some(token));
    assert_eq!(part_of_small(&[BATCH, 16], 16), None);
    assert_eq!(part_of_small(&[4096], 4096), None);
    // Zeros, but many of them.
    assert_eq!(part_of_small(&[1 << 30], 0), None);
    assert_eq!(part_of_small(&[4, usize::MAX / 4], 2), None);
}
