//! The mse search: never worse than round-to-nearest, the same bits on every
//! ISA level. And any operation: the same bits on any number of threads.

mod support;

use support::{gaussian, int, make, name, on_every_level, quantized, yes};
use viva_core::calibration::{SAMPLES, Statistics};
use viva_core::format::{OptionValue, Spec};
use viva_core::method::calibrated;
use viva_core::method::sparsity::{Sparsify, Sparsity, sparsify_into};
use viva_core::ops::dequantize::dequantize;
use viva_core::ops::{Cancel, dump, matmul, metrics, pool};
use viva_core::tensor::{DType, Tensor};

/// Pairs of specs that differ in the method alone, with the elements of a block.
fn pairs() -> Vec<(Spec, Spec, usize)> {
    let mut pairs = Vec::new();
    let mut add = |format: &str, block: OptionValue, len: usize, more: &[(&str, OptionValue)]| {
        let with = |method: &str| {
            let mut options = vec![("method", name(method)), ("block_size", block.clone())];
            options.extend_from_slice(more);
            make(format, &options)
        };
        pairs.push((with("rtn"), with("mse"), len));
    };
    for format in ["int8", "int4", "int3", "int2"] {
        let float = ("zero_point", name("float"));
        for dtype in ["f32", "f16", "bf16"] {
            let more = [float.clone(), ("scale_dtype", name(dtype))];
            add(format, int(16), 16, &more);
            add(format, int(80), 80, &more);
            add(format, name("row"), 160, &more);
        }
        for symmetric in [true, false] {
            for dtype in ["f32", "f16", "bf16"] {
                let more = [("symmetric", yes(symmetric)), ("scale_dtype", name(dtype))];
                add(format, int(16), 16, &more);
                add(format, int(80), 80, &more);
                add(format, name("row"), 160, &more);
            }
        }
    }
    for format in ["nf4", "fp4", "dynamic8"] {
        add(format, int(2), 2, &[]);
        add(format, int(32), 32, &[]);
        add(format, int(64), 64, &[]);
    }
    for format in ["fp8_e4m3", "fp8_e5m2"] {
        for dtype in ["f32", "f16", "bf16"] {
            let more = [("scale_dtype", name(dtype))];
            add(format, int(20), 20, &more);
            add(format, name("row"), 160, &more);
        }
    }
    let mut add = |format: &str, len: usize, more: &[(&str, OptionValue)]| {
        let with = |method: &str| {
            let mut options = vec![("method", name(method))];
            options.extend_from_slice(more);
            make(format, &options)
        };
        pairs.push((with("rtn"), with("mse"), len));
    };
    for format in ["mxfp8", "mxfp8_e5m2", "mxfp4"] {
        for rule in ["floor", "bump", "round"] {
            add(format, 32, &[("scale", name(rule))]);
        }
    }
    add("nvfp4", 16, &[]);
    pairs
}

fn tensors() -> Vec<(&'static str, Tensor)> {
    let g = gaussian(5 * 160, 1);
    let made = |f: &dyn Fn(usize, f32) -> f32| -> Tensor {
        let x: Vec<f32> = g.iter().enumerate().map(|(i, &v)| f(i, v)).collect();
        support::f32_tensor(&[5, 160], &x)
    };
    vec![
        ("gaussian", made(&|_, v| v)),
        ("heavy tails", made(&|_, v| v * v * v)),
        (
            "zero blocks",
            made(&|i, v| if i / 32 % 2 == 0 { 0.0 } else { v }),
        ),
        ("positive", made(&|_, v| v.abs() + 0.5)),
        ("negative", made(&|_, v| -v.abs() - 0.5)),
        (
            "one outlier",
            made(&|i, v| if i % 64 == 7 { 50.0 } else { v }),
        ),
        ("constant", made(&|_, _| 0.3)),
        ("small", made(&|_, v| v * 1e-4)),
        ("large", made(&|_, v| v * 1e3)),
        ("integers", made(&|_, v| (v * 3.0).round())),
    ]
}

fn block_errors(x: &[f32], y: &[f32], block: usize) -> Vec<f64> {
    let error = |(x, y): (&[f32], &[f32])| {
        let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
        x.iter().zip(y).map(square).sum()
    };
    x.chunks(block).zip(y.chunks(block)).map(error).collect()
}

#[test]
fn mse_is_never_worse_than_rtn_in_any_block() {
    on_every_level("mse_is_never_worse_than_rtn_in_any_block", |digest| {
        let mut gained = 0;
        for (rtn, mse, block) in pairs() {
            for (kind, x) in tensors() {
                let values = x.to_f32_vec();
                let errors = |spec: &Spec| {
                    let q = quantized(&x, spec);
                    (dequantize(&q).unwrap(), q)
                };
                let ((plain, _), (searched, q)) = (errors(&rtn), errors(&mse));
                digest.parts(&q);
                let plain = block_errors(&values, &plain, block);
                let searched = block_errors(&values, &searched, block);
                for (i, (p, s)) in plain.iter().zip(&searched).enumerate() {
                    // The search compares sums of f32.
                    assert!(
                        *s <= p * (1.0 + 1e-5),
                        "{s} > {p} in block {i} of {kind} {mse:?}"
                    );
                    gained += usize::from(*s < p * 0.99);
                }
            }
        }
        assert!(gained > 1000, "the search found {gained} better scales");
    });
}

/// Where squares leave the range of f32 the search may gain nothing, but it
/// must not lose, nor make anything that is not a number.
#[test]
fn mse_survives_magnitudes_whose_squares_do_not_fit() {
    on_every_level(
        "mse_survives_magnitudes_whose_squares_do_not_fit",
        |digest| {
            let g = gaussian(5 * 160, 2);
            for factor in [1e-45, 1e-42, 1e-38, 1e-30, 1e25, 1e37] {
                let x: Vec<f32> = g.iter().map(|v| v * factor).collect();
                let x = support::f32_tensor(&[5, 160], &x);
                for (rtn, mse, _) in pairs() {
                    if mse.scale_dtype != DType::F32 {
                        continue;
                    }
                    let q = quantized(&x, &mse);
                    digest.parts(&q);
                    let y = dequantize(&q).unwrap();
                    assert!(y.iter().all(|v| v.is_finite()), "{factor:e} {mse:?}");
                    let error = |y: &[f32]| block_errors(&x.to_f32_vec(), y, 800)[0];
                    let plain = error(&dequantize(&quantized(&x, &rtn)).unwrap());
                    assert!(error(&y) <= plain * (1.0 + 1e-5), "{factor:e} {mse:?}");
                }
            }
        },
    );
}

/// What methods that see activations make of rows of several stripes, from sums over
/// several passes.
fn by_activations() -> Vec<Vec<u8>> {
    let (n, k, cancel) = (150, 256, Cancel::new());
    let mut x = gaussian(600 * k, 5);
    for i in 1..x.len() {
        x[i] += 0.5 * x[i - 1];
    }
    let x = support::f32_tensor(&[600, k], &x);
    let s = Statistics::of(&x, SAMPLES, &cancel).unwrap();
    let w = support::f32_tensor(&[n, k], &gaussian(n * k, 6));
    let mut all = Vec::new();
    for sparsity in Sparsity::ALL {
        let how = Sparsify {
            sparsity,
            damping: 0.01,
        };
        let mut out = vec![0u8; w.bytes().len()];
        sparsify_into(&w, &how, &s, &mut out, &cancel).unwrap();
        all.push(out);
    }
    let quantize = |options: &[(&str, OptionValue)]| {
        let options = options.iter().map(|(n, v)| (n.to_string(), v.clone()));
        let (spec, how) = calibrated::resolve("int4", options.collect()).unwrap();
        let q = calibrated::quantize_calibrated(&w, &spec, &s, &how, &cancel).unwrap();
        dump::dump(&q).unwrap()
    };
    for method in calibrated::METHODS {
        all.push(quantize(&[("method", name(method)), ("rotate", yes(true))]));
    }
    let one_pass = [("method", name("gptq")), ("sparsity", name("sparsegpt"))];
    all.push(quantize(&one_pass));
    all
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    // Rows of many chunks, blocks that chunks do not end on, an odd count.
    let shapes = [vec![37, 1600], vec![3, 32_768], vec![70_016]];
    let mut first: Vec<Vec<u8>> = Vec::new();
    for threads in [1, 2, 3] {
        pool::configure(threads).unwrap();
        assert_eq!(pool::threads().unwrap(), threads);
        let mut all = Vec::new();
        for shape in &shapes {
            let n = shape.iter().product();
            let x = support::f32_tensor(shape, &gaussian(n, 3));
            for spec in support::every_spec() {
                let q = quantized(&x, &spec);
                all.push(dump::dump(&q).unwrap());
                let bf16 = support::dequantized(&q, DType::BF16);
                all.push(bf16.bytes().to_vec());
                let m = metrics::quantized(&x, &q, &Cancel::new()).unwrap();
                all.push(m.mse.to_bits().to_le_bytes().to_vec());
                if let &[n, k] = shape.as_slice() {
                    let x = support::f32_tensor(&[2, k], &gaussian(2 * k, 4));
                    let mut out = vec![0u8; 2 * n * 4];
                    matmul::matmul_into(&x, &q, DType::F32.into(), &mut out, &Cancel::new())
                        .unwrap();
                    all.push(out);
                }
            }
        }
        all.extend(by_activations());
        if first.is_empty() {
            first = all;
        } else {
            let differ = first.iter().zip(&all).position(|(a, b)| a != b);
            assert_eq!(differ, None, "{threads} threads");
        }
    }
    assert!(pool::configure(0).is_err());
    assert!(pool::configure(1025).is_err());
    assert_eq!(pool::threads().unwrap(), 3);
}
