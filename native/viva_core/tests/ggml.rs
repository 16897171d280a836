//! ggml's formats by their own bounds, and what their blocks refuse.

mod support;

use support::bars::bars;
use support::{
    Digest, block_formats, f32_tensor, gaussian, make, measure, name, on_every_level, quantized,
    try_make,
};
use viva_core::Error;
use viva_core::format::{FORMATS, Spec};
use viva_core::formats::ggml_types::GgmlType;
use viva_core::ops::dequantize::dequantize;
use viva_core::ops::{Cancel, quantize::quantize};

fn with_method(format: &str, method: &str) -> Spec {
    make(format, &[("method", name(method))])
}

fn block_len(format: &str) -> usize {
    GgmlType::by_name(format).unwrap().block_len
}

/// ggml's test-quantize-fns: 4096 values of 0.1 + 2 cos(i), √Σe² / n.
#[test]
fn errors_stay_within_the_bounds_of_ggml() {
    let x: Vec<f32> = (0..4096).map(|i| 0.1 + 2.0 * (i as f32).cos()).collect();
    let tensor = f32_tensor(&[4096], &x);
    let bounds = bars().ggml_error;
    for bound in &bounds {
        for method in ["rtn", "mse"] {
            let spec = bound
                .recipe
                .spec_with(vec![("method".into(), name(method))]);
            let (m, _) = measure(&tensor, &spec);
            let error = (m.mse / 4096.0).sqrt();
            assert!(error < bound.error, "{:?} {method}: {error}", bound.recipe);
        }
    }
    let mut bounded: Vec<&str> = bounds.iter().map(|b| b.recipe.format.as_str()).collect();
    let names = FORMATS.iter().map(|f| f.name());
    let mut of_ggml: Vec<&str> = names.filter(|n| GgmlType::by_name(n).is_some()).collect();
    bounded.sort_unstable();
    of_ggml.sort_unstable();
    assert_eq!(bounded, of_ggml);
}

#[test]
fn mse_is_never_worse_than_rtn_in_any_block() {
    on_every_level(
        "mse_is_never_worse_than_rtn_in_any_block",
        |digest: &mut Digest| {
            let g = gaussian(9 * 512, 1);
            let made = |f: &dyn Fn(usize, f32) -> f32| -> Vec<f32> {
                g.iter().enumerate().map(|(i, &v)| f(i, v)).collect()
            };
            let kinds = [
                made(&|_, v| v),
                made(&|_, v| v * v * v),
                made(&|i, v| if i / 16 % 3 == 0 { 0.0 } else { v }),
                made(&|_, v| v.abs() + 0.5),
                made(&|_, v| -v.abs() - 0.5),
                made(&|i, v| if i % 64 == 7 { 50.0 } else { v }),
                made(&|_, _| 0.3),
                made(&|i, v| v * 10f32.powi(i as i32 / 16 % 9 - 6)),
                made(&|_, v| v * 1e-39),
            ];
            let mut gained = 0;
            for format in block_formats() {
                for x in &kinds {
                    let tensor = f32_tensor(&[9, 512], x);
                    let errors = |method| {
                        let q = quantized(&tensor, &with_method(format, method));
                        let y = dequantize(&q).unwrap();
                        let len = block_len(format);
                        let errors: Vec<f64> = x
                            .chunks(len)
                            .zip(y.chunks(len))
                            .map(|(x, y)| {
                                let square = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
                                x.iter().zip(y).map(square).sum()
                            })
                            .collect();
                        (errors, q)
                    };
                    let ((plain, _), (searched, q)) = (errors("rtn"), errors("mse"));
                    digest.parts(&q);
                    for (p, s) in plain.iter().zip(&searched) {
                        // The search compares sums of f32.
                        assert!(*s <= p * (1.0 + 1e-5), "{s} > {p} {format}");
                        gained += usize::from(*s < p * 0.99);
                    }
                }
            }
            assert!(gained > 2000, "the search found {gained} better blocks");
        },
    );
}

#[test]
fn rows_that_no_block_divides_are_named() {
    for format in block_formats() {
        let block = block_len(format);
        for row in [1, 16, block - 1, block + 16, 3 * block / 2] {
            let x = f32_tensor(&[2, row], &vec![1.0; 2 * row]);
            let refused = quantize(&x, &make(format, &[]), &Cancel::new());
            assert_eq!(refused.unwrap_err(), Error::Indivisible { row, block });
        }
        let empty = f32_tensor(&[0, block], &[]);
        let q = quantized(&empty, &make(format, &[]));
        assert!(q.is_empty() && q.nbytes() == 0);
        assert!(try_make(format, &[("block_size", support::int(64))]).is_err());
    }
}

#[test]
fn scales_past_f16_are_errors() {
    for format in block_formats() {
        for most in [1e9, 1e20, f32::MAX] {
            let mut x = gaussian(512, 2);
            x[300] = most;
            x[301] = -most;
            let x = f32_tensor(&[512], &x);
            for method in ["rtn", "mse"] {
                match quantize(&x, &with_method(format, method), &Cancel::new()) {
                    Err(Error::ScaleOverflow { scale, dtype }) => {
                        assert!(scale > 65504.0 && scale.is_finite(), "{format} {scale}");
                        assert_eq!(dtype, "f16");
                    }
                    other => panic!("{format} {most}: {other:?}"),
                }
            }
        }
    }
}

/// Decoding begins and ends anywhere, and never leaves the blocks.
#[test]
fn windows_are_pieces_of_the_whole() {
    let x = f32_tensor(&[3, 512], &gaussian(3 * 512, 3));
    let mut random = support::Random(4);
    for format in block_formats() {
        let q = quantized(&x, &make(format, &[]));
        let whole = dequantize(&q).unwrap();
        let decoder = q.spec.format().unwrap().decoder(&q).unwrap();
        for _ in 0..50 {
            let start = random.below(whole.len() + 1);
            let end = start + random.below(whole.len() - start + 1);
            let out = support::decoded(&*decoder, start..end);
            assert_eq!(out, &whole[start..end], "{format} {start}");
        }
    }
}
