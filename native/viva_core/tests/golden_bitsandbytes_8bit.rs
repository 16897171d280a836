//! 8-bit blocks and LLM.int8() products against those of bitsandbytes, at every
//! ISA level. The fixture: test/golden/make_bitsandbytes_8bit.py.

mod support;

use support::golden::Golden;
use support::{dequantized, int, make, name, on_every_level, quantized};
use viva_core::format::Quantized;
use viva_core::ops::matmul::by_name;
use viva_core::tensor::{DType, Tensor};
use viva_core::{Error, Result};

#[test]
fn blockwise_codes_scales_and_values_are_theirs() {
    on_every_level("blockwise_codes_scales_and_values_are_theirs", |digest| {
        let golden = Golden::open("bitsandbytes_8bit");
        let cases = golden.cases("codes");
        assert_eq!(cases.len(), 3 * 3 * 3);
        for case in cases {
            let (weight, block) = case.split_once("/b").unwrap();
            let spec = make("dynamic8", &[("block_size", int(block.parse().unwrap()))]);
            let q = quantized(&golden.tensor(weight), &spec);
            for part in ["codes", "absmax"] {
                let expected = golden.tensor(&format!("{case}/{part}"));
                assert_eq!(q.part(part).unwrap().bytes(), expected.bytes(), "{case}");
            }
            if block == "256" {
                let expected = golden.tensor(&format!("{case}/dequantized"));
                let values = dequantized(&q, expected.dtype());
                assert_eq!(values.to_f32_vec(), expected.to_f32_vec(), "{case}");
            }
            digest.parts(&q);
        }
    });
}

fn llm_int8(x: &Tensor, q: &Quantized) -> Result<Tensor> {
    support::product("llm_int8", x, q, x.dtype())
}

/// They round to the dtype of x three times, the integer part, the weights of
/// the outlier columns and the sum; ours once, at the end. So each is off by at
/// most 2 roundings of Σ|x||w| and of the sum, and f32 sums by a little more.
#[test]
fn products_are_theirs() {
    on_every_level("products_are_theirs", |digest| {
        let golden = Golden::open("bitsandbytes_8bit");
        let cases = golden.cases("y");
        assert_eq!(cases.len(), 4 * 3);
        for case in cases {
            let part = |part: &str| golden.tensor(&format!("{case}/{part}"));
            let (x, y) = (part("x"), part("y"));
            let q = quantized(&part("weight"), &make("int8", &[("scale", name("absmax"))]));
            let got = llm_int8(&x, &q).unwrap();
            digest.bytes(got.bytes());
            let (columns, rounding) = (
                q.shape[1],
                match x.dtype() {
                    DType::F32 => 2f32.powi(-22),
                    DType::F16 => 2f32.powi(-11),
                    _ => 2f32.powi(-8),
                },
            );
            let weights = dequantized(&q, DType::F32).to_f32_vec();
            let (got, y, x) = (got.to_f32_vec(), y.to_f32_vec(), x.to_f32_vec());
            for (i, (a, b)) in got.iter().zip(&y).enumerate() {
                let (row, column) = (i / q.shape[0], i % q.shape[0]);
                let x = &x[row * columns..(row + 1) * columns];
                let w = &weights[column * columns..(column + 1) * columns];
                let size: f32 = x.iter().zip(w).map(|(x, w)| (x * w).abs()).sum();
                let tolerance = rounding * (size + b.abs());
                assert!((a - b).abs() <= tolerance, "{case} {i}: {a} is not {b}");
            }
        }
    });
}

#[test]
fn outliers_are_multiplied_in_full() {
    // One large element would leave the others of its row no codes.
    let w = support::f32_tensor(&[8, 256], &support::gaussian(2048, 1));
    let mut x = support::gaussian(256 * 3, 2);
    x[300] = 4000.0;
    let x = support::f32_tensor(&[3, 256], &x);
    for scale in ["absmax", "step"] {
        let q = quantized(&w, &make("int8", &[("scale", name(scale))]));
        let exact = dequantized(&q, DType::F32).to_f32_vec();
        let got = llm_int8(&x, &q).unwrap().to_f32_vec();
        for (i, row) in x.to_f32_vec().chunks(256).enumerate() {
            for (j, w) in exact.chunks(256).enumerate() {
                let sum: f32 = row.iter().zip(w).map(|(x, w)| x * w).sum();
                // Half a step of a row's codes on each of 256 products.
                assert!((got[i * 8 + j] - sum).abs() < 1.0, "{scale} {i} {j}");
            }
        }
    }
}

#[test]
fn what_it_cannot_multiply_is_refused() {
    let w = support::f32_tensor(&[4, 64], &support::gaussian(256, 3));
    let x = support::f32_tensor(&[2, 64], &support::gaussian(128, 4));
    for (format, options) in [
        ("nf4", vec![]),
        ("int8", vec![("block_size", int(32))]),
        ("int8", vec![("symmetric", support::yes(false))]),
        ("int4", vec![("block_size", name("row"))]),
    ] {
        let q = quantized(&w, &make(format, &options));
        match llm_int8(&x, &q) {
            Err(Error::InvalidOption { option, .. }) => assert_eq!(option, "compute"),
            other => panic!("{other:?}"),
        }
    }
    assert!(by_name("int9").is_err());
    let q = quantized(&w, &make("int8", &[]));
    let nan = support::f32_tensor(&[1, 64], &[f32::NAN; 64]);
    let y = llm_int8(&nan, &q).unwrap().to_f32_vec();
    assert!(y.iter().all(|v| v.is_nan()));
    let zeros = support::f32_tensor(&[2, 64], &[0.0; 128]);
    assert_eq!(llm_int8(&zeros, &q).unwrap().to_f32_vec(), [0.0; 8]);
}
