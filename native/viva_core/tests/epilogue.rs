//! Bias and residual added on the way against the same added afterwards, and the
//! arithmetic that `auto` chooses.

mod support;

use support::{f32_tensor, float_tensor, gaussian, make, on_every_level, product, quantized};
use viva_core::Error;
use viva_core::format::Quantized;
use viva_core::ops::Cancel;
use viva_core::ops::epilogue::Epilogue;
use viva_core::ops::int8::matmul_packed;
use viva_core::ops::matmul::{BATCH, by_name};
use viva_core::ops::packed::pack;
use viva_core::simd::bf16::has_pairs;
use viva_core::tensor::{DType, Tensor, narrow};

/// (sums + bias) + residual, rounded.
fn after(sums: &Tensor, epilogue: Epilogue) -> Vec<u8> {
    let mut sums = sums.to_f32_vec();
    for added in [epilogue.bias, epilogue.residual].into_iter().flatten() {
        let added = added.to_f32_vec();
        for (sum, v) in sums.iter_mut().zip(added.iter().cycle()) {
            *sum += v;
        }
    }
    let mut out = vec![0; sums.len() * epilogue.dtype.size()];
    narrow(epilogue.dtype, &sums, &mut out).unwrap();
    out
}

fn check(x: &Tensor, q: &Quantized, compute: &str, epilogue: Epilogue) {
    let sums = product(compute, x, q, DType::F32).unwrap();
    let expected = after(&sums, epilogue);
    let mut out = vec![0xff; expected.len()];
    let what = format!("{compute} {x:?} {epilogue:?}");
    by_name(compute).unwrap()(x, q, epilogue, &mut out, &Cancel::new()).unwrap();
    assert!(out == expected, "{what}");
    if compute == "int8" {
        let packed = pack(q, &Cancel::new()).unwrap();
        out.fill(0xff);
        matmul_packed(x, &packed, epilogue, &mut out, &Cancel::new()).unwrap();
        assert!(out == expected, "packed {what}");
    }
}

#[test]
fn added_on_the_way_is_added_afterwards() {
    on_every_level("added_on_the_way_is_added_afterwards", |_| {
        let (n, k) = (45, 96);
        let q = quantized(
            &f32_tensor(&[n, k], &gaussian(n * k, 1)),
            &make("int8", &[]),
        );
        for m in [1, 3, BATCH, 21, 100] {
            let x = f32_tensor(&[m, k], &gaussian(m * k, 2));
            for dtype in [DType::F32, DType::BF16] {
                let bias = float_tensor(dtype, &[n], &gaussian(n, 3));
                let residual = support::unaligned_tensor(DType::F16, &[m, n], &gaussian(m * n, 4));
                for (bias, residual) in [
                    (Some(&bias), None),
                    (None, Some(&residual)),
                    (Some(&bias), Some(&residual)),
                ] {
                    let epilogue = Epilogue {
                        dtype,
                        bias,
                        residual,
                    };
                    for compute in ["f32", "bf16", "int8", "llm_int8", "auto"] {
                        check(&x, &q, compute, epilogue);
                    }
                }
            }
        }
    });
}

#[test]
fn sums_of_nothing_are_what_is_added() {
    let empty = |shape: &[usize]| Tensor::from_slice::<u8>(DType::F32, shape, &[]).unwrap();
    let q = quantized(&empty(&[3, 0]), &make("int8", &[]));
    let (bias, residual) = (f32_tensor(&[3], &[1.0; 3]), f32_tensor(&[2, 3], &[2.0; 6]));
    let epilogue = Epilogue {
        dtype: DType::F32,
        bias: Some(&bias),
        residual: Some(&residual),
    };
    for compute in ["f32", "bf16", "int8", "llm_int8", "auto"] {
        let mut out = [0f32; 6];
        let bytes = bytemuck::cast_slice_mut(&mut out);
        by_name(compute).unwrap()(&empty(&[2, 0]), &q, epilogue, bytes, &Cancel::new()).unwrap();
        assert_eq!(out, [3.0; 6], "{compute}");
    }
}

#[test]
fn what_cannot_be_added_is_named() {
    let (m, n, k) = (2, 6, 64);
    let q = quantized(&f32_tensor(&[n, k], &gaussian(n * k, 5)), &make("nf4", &[]));
    let x = f32_tensor(&[m, k], &gaussian(m * k, 6));
    let refused = |bias: Option<&Tensor>, residual: Option<&Tensor>| {
        let epilogue = Epilogue {
            dtype: DType::F32,
            bias,
            residual,
        };
        let mut out = vec![0; m * n * 4];
        by_name("f32").unwrap()(&x, &q, epilogue, &mut out, &Cancel::new()).unwrap_err()
    };
    let zeros = |shape: &[usize]| f32_tensor(shape, &vec![0.0; shape.iter().product()]);
    for shape in [vec![], vec![1], vec![m], vec![1, n], vec![m, n]] {
        let error = refused(Some(&zeros(&shape)), None);
        let named = matches!(&error, Error::ShapeMismatch { expected, .. } if *expected == [n]);
        assert!(named && error.to_string().contains("bias"), "{error}");
    }
    for shape in [vec![n], vec![n, m], vec![1, m, n], vec![m * n]] {
        let error = refused(None, Some(&zeros(&shape)));
        let named = matches!(&error, Error::ShapeMismatch { expected, .. } if *expected == [m, n]);
        assert!(named && error.to_string().contains("residual"), "{error}");
    }
    let ints = Tensor::from_slice(DType::I32, &[n], &[1i32; 6]).unwrap();
    let error = refused(Some(&ints), None);
    assert!(
        matches!(&error, Error::UnsupportedDtype { op, .. } if op.contains("bias")),
        "{error}"
    );
}

#[test]
fn auto_is_int8_or_bf16_from_some_rows_on() {
    let (n, k) = (40, 96);
    let w = f32_tensor(&[n, k], &gaussian(n * k, 7));
    // Blocks that cross rows.
    let crossing = f32_tensor(&[10, 100], &gaussian(1000, 8));
    let floats = if has_pairs() { "bf16" } else { "f32" };
    for (m, w, format, chosen) in [
        (BATCH, &w, "q4_0", "int8"),
        (BATCH, &w, "int8", "int8"),
        (BATCH, &w, "fp8_e4m3", floats),
        (BATCH, &crossing, "nf4", floats),
        (BATCH - 1, &w, "int8", "f32"),
    ] {
        let k = w.row_len();
        let x = f32_tensor(&[m, k], &gaussian(m * k, 9));
        let q = quantized(w, &make(format, &[]));
        let y = product("auto", &x, &q, DType::F32).unwrap();
        let expected = product(chosen, &x, &q, DType::F32).unwrap();
        assert_eq!(y.bytes(), expected.bytes(), "{m} {format}");
    }
}
