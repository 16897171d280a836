//! Input at the edges: not finite, empty, too large, misnamed. Bad data is an
//! error that says what to change; nothing panics.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use support::{every_spec, f32_tensor, gaussian, int, make, name, quantized, try_make, yes};
use viva_core::format::{FORMATS, OptionValue, Quantized, Spec};
use viva_core::ops::dequantize::{dequantize, dequantize_into};
use viva_core::ops::quantize::quantize;
use viva_core::ops::{Cancel, cast, dump, matmul, metrics};
use viva_core::tensor::{DType, Tensor};
use viva_core::{Error, Result};

fn try_quantize(x: &Tensor, spec: &Spec) -> Result<Quantized> {
    quantize(x, spec, &Cancel::new())
}

/// The option that an error names.
fn option_of<T: std::fmt::Debug>(result: Result<T>) -> String {
    match result {
        Err(Error::InvalidOption { option, .. }) => option,
        other => panic!("{other:?} names no option"),
    }
}

#[test]
fn values_that_are_not_finite_are_counted_and_found() {
    // One chunk of work, several, and rows of several chunks.
    for shape in [[1, 32], [3, 64], [700, 96], [3, 40_000]] {
        let n = shape[0] * shape[1];
        let clean = gaussian(n, 1);
        for spec in every_spec() {
            for (at, bad) in [
                (0, f32::NAN),
                (n / 2, f32::INFINITY),
                (n - 1, f32::NEG_INFINITY),
                (n - 1, -f32::NAN),
                // Its payload carries into the sign where bits are added to.
                (n - 1, f32::from_bits(0x7fff_ffff)),
            ] {
                let mut x = clean.clone();
                x[at] = bad;
                let (nan, inf) = (u64::from(bad.is_nan()), u64::from(bad.is_infinite()));
                let first = at as u64;
                assert_eq!(
                    try_quantize(&f32_tensor(&shape, &x), &spec).unwrap_err(),
                    Error::NonFinite { nan, inf, first },
                    "{bad} at {at} of {shape:?} in {spec:?}"
                );
            }
        }
    }
}

#[test]
fn every_value_that_is_not_finite_is_counted() {
    let mut x = gaussian(100 * 512, 2);
    for (i, v) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY]
        .into_iter()
        .enumerate()
    {
        x.iter_mut()
            .skip(1000 + i)
            .step_by(5000)
            .for_each(|x| *x = v);
    }
    let expected = Error::NonFinite {
        nan: 11,
        inf: 22,
        first: 1000,
    };
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
        for x in [
            support::float_tensor(dtype, &[100, 512], &x),
            support::unaligned_tensor(dtype, &[100, 512], &x),
        ] {
            for spec in every_spec() {
                assert_eq!(try_quantize(&x, &spec).unwrap_err(), expected);
            }
        }
    }
    // Arithmetic is f32: what f64 holds and f32 does not is infinite.
    let x = Tensor::from_slice(DType::F64, &[2], &[1.0, 1e300]).unwrap();
    let expected = Error::NonFinite {
        nan: 0,
        inf: 1,
        first: 1,
    };
    assert_eq!(try_quantize(&x, &make("nf4", &[])).unwrap_err(), expected);
}

#[test]
fn empty_tensors_go_through_everything() {
    let shapes = [
        vec![0],
        vec![0, 64],
        vec![4, 0],
        vec![2, 0, 3],
        vec![0, usize::MAX],
        vec![usize::MAX, 0, 2],
        vec![0, usize::MAX, usize::MAX],
    ];
    for shape in shapes {
        for dtype in [DType::F32, DType::F16] {
            let x = Tensor::from_slice::<u8>(dtype, &shape, &[]).unwrap();
            for spec in every_spec() {
                let q = match try_quantize(&x, &spec) {
                    Ok(q) => q,
                    // Rows that no block divides, though there are none.
                    Err(Error::Indivisible { .. }) if shape.last() != Some(&0) => continue,
                    Err(e) => panic!("{shape:?} {spec:?}: {e}"),
                };
                q.validate().unwrap();
                assert_eq!((q.len(), q.shape.as_slice()), (0, shape.as_slice()));
                let index = q.part("group_index").map_or(0, |part| part.bytes().len());
                assert!(q.nbytes() < 16 + index && q.bits_per_weight().is_finite());
                assert!(dequantize(&q).unwrap().is_empty());
                assert_eq!(support::dequantized(&q, DType::BF16).len(), 0);
                let m = metrics::quantized(&x, &q, &Cancel::new()).unwrap();
                assert_eq!((m.mse, m.mean_error, m.max_error), (0.0, 0.0, 0.0));
                let back = dump::load(Arc::new(dump::dump(&q).unwrap())).unwrap();
                assert_eq!((back.spec, back.shape), (q.spec, q.shape));
            }
        }
    }
}

#[test]
fn scalars_and_single_elements() {
    for value in [0.0f32, -0.0, 1.0, -3.5, 1e-4, 6e4] {
        for shape in [vec![], vec![1], vec![1, 1]] {
            let x = f32_tensor(&shape, &[value]);
            for spec in every_spec() {
                let q = match try_quantize(&x, &spec) {
                    Ok(q) => q,
                    Err(Error::Indivisible { row: 1, .. }) => continue,
                    Err(e) => panic!("{value} {spec:?}: {e}"),
                };
                q.validate().unwrap();
                let y = dequantize(&q).unwrap()[0];
                // Half a step of the coarsest grid, and what its scale loses: two
                // symmetric bits have one step above zero, at two thirds.
                let step = if spec.format == "int2" { 0.34 } else { 0.1 };
                assert!(
                    (y - value).abs() <= step * value.abs(),
                    "{value} → {y} {spec:?}"
                );
            }
        }
    }
}

#[test]
fn rows_that_no_block_divides_are_named() {
    for format in ["int8", "int4"] {
        for (shape, block) in [
            (vec![4, 96], 64),
            (vec![63], 2),
            (vec![], 2),
            (vec![2, 3, 10], 20),
        ] {
            let row = shape.last().copied().unwrap_or(1);
            let x = f32_tensor(&shape, &vec![1.0; shape.iter().product()]);
            let spec = make(format, &[("block_size", int(block))]);
            let block = block as usize;
            let error = try_quantize(&x, &spec).unwrap_err();
            assert_eq!(error, Error::Indivisible { row, block });
            assert!(error.to_string().contains(&format!("divides {row}")));
        }
    }
}

#[test]
fn scales_past_their_dtype_are_errors_and_f32_holds_them() {
    let x: Vec<f32> = gaussian(4 * 128, 3).iter().map(|v| v * 1e30).collect();
    let x = f32_tensor(&[4, 128], &x);
    for format in ["int8", "int4"] {
        for method in ["rtn", "mse"] {
            for symmetric in [true, false] {
                for block in [int(64), name("row"), name("tensor")] {
                    if method == "mse" && block == name("tensor") {
                        continue;
                    }
                    let with = |dtype| {
                        let options = [
                            ("method", name(method)),
                            ("symmetric", yes(symmetric)),
                            ("block_size", block.clone()),
                            ("scale_dtype", name(dtype)),
                        ];
                        try_quantize(&x, &make(format, &options))
                    };
                    match with("f16").unwrap_err() {
                        Error::ScaleOverflow { scale, dtype } => {
                            assert_eq!(dtype, "f16");
                            assert!(scale > 65504.0 && scale.is_finite(), "{scale}");
                        }
                        other => panic!("{other:?}"),
                    }
                    for wide in ["f32", "bf16"] {
                        let y = dequantize(&with(wide).unwrap()).unwrap();
                        assert!(y.iter().all(|v| v.is_finite()));
                    }
                }
            }
        }
    }
}

/// LLM.int8() takes weights through f16, where 65520 rounds to infinity.
#[test]
fn weights_past_f16_overflow_the_absmax_rule() {
    for block in ["row", "tensor"] {
        let spec = make(
            "int8",
            &[("scale", name("absmax")), ("block_size", name(block))],
        );
        for (most, fits) in [
            (65504.0, true),
            (65519.996, true),
            (65520.0, false),
            (-1e30, false),
        ] {
            let mut x = gaussian(3 * 40_000, 4);
            x[70_000] = most;
            match try_quantize(&f32_tensor(&[3, 40_000], &x), &spec) {
                Ok(q) if fits => {
                    let y = dequantize(&q).unwrap();
                    assert!(y.iter().all(|v| v.is_finite()));
                    assert!((y[70_000] - 65504.0).abs() < 1.0);
                }
                Err(Error::ScaleOverflow { scale, dtype }) if !fits => {
                    assert_eq!((scale, dtype.as_str()), (most.abs(), "f16"));
                }
                other => panic!("{most}: {other:?}"),
            }
        }
    }
}

/// The largest finite values: an error, or values of the right sign that are
/// no NaN. (A step of MAX/127, rounded up, makes 127 of them infinite.)
#[test]
fn the_largest_floats_never_turn_into_nan() {
    let mut x = vec![0.5f32; 2 * 128];
    for i in (0..256).step_by(3) {
        x[i] = if i % 2 == 0 { f32::MAX } else { f32::MIN };
    }
    let t = f32_tensor(&[2, 128], &x);
    let mut taken = 0;
    for spec in every_spec() {
        match try_quantize(&t, &spec) {
            Ok(q) => {
                taken += 1;
                let y = dequantize(&q).unwrap();
                for (x, y) in x.iter().zip(&y) {
                    assert!(!y.is_nan(), "{spec:?}");
                    assert!(
                        x.abs() < 1.0 || x.signum() == y.signum(),
                        "{x} {y} {spec:?}"
                    );
                }
            }
            Err(Error::ScaleOverflow { scale, .. }) => assert!(scale.is_finite()),
            Err(Error::InvalidOption { option, .. }) => {
                assert!(["double_quant", "values"].contains(&&*option), "{option}");
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    assert!(taken > 5);
}

#[test]
fn integers_are_not_quantized_and_not_made() {
    for dtype in DType::ALL.into_iter().filter(|d| !d.is_float()) {
        let x = Tensor::from_slice(dtype, &[2, 32], &vec![0u8; 64 * dtype.size()]).unwrap();
        let unsupported = |r: Error| match r {
            Error::UnsupportedDtype { dtype: named, .. } => assert_eq!(named, dtype.name()),
            other => panic!("{other:?}"),
        };
        for spec in every_spec() {
            unsupported(try_quantize(&x, &spec).unwrap_err());
        }
        let floats = f32_tensor(&[2, 32], &gaussian(64, 5));
        let q = quantized(&floats, &make("nf4", &[]));
        let mut out = vec![0u8; 64 * dtype.size()];
        unsupported(dequantize_into(&q, dtype, &mut out, &Cancel::new()).unwrap_err());
        unsupported(cast::cast_into(&floats, dtype, &mut out, &Cancel::new()).unwrap_err());
    }
}

#[test]
fn invalid_options_are_named() {
    let block = |f, v| option_of(try_make(f, &[("block_size", v)]));
    for format in ["int8", "int4", "int3", "int2", "nf4", "fp4"] {
        for bad in [
            0,
            1,
            3,
            -1,
            -64,
            1 << 31,
            1 << 40,
            1 << 62,
            i64::MAX,
            i64::MIN,
        ] {
            assert_eq!(block(format, int(bad)), "block_size", "{format} {bad}");
        }
        for bad in [
            OptionValue::Float(64.0),
            yes(true),
            name("column"),
            name(""),
        ] {
            assert_eq!(block(format, bad), "block_size");
        }
        for bad in [
            int(3),
            name("rtn2"),
            name(""),
            yes(false),
            OptionValue::Float(f64::NAN),
        ] {
            assert_eq!(option_of(try_make(format, &[("method", bad)])), "method");
        }
        for unknown in ["blocksize", "Method", "", "scale_type"] {
            assert_eq!(option_of(try_make(format, &[(unknown, int(1))])), unknown);
        }
        // Known to one family and not to the other.
        let (foreign, own) = match format {
            "nf4" | "fp4" => ("symmetric", "double_quant"),
            _ => ("double_quant", "symmetric"),
        };
        assert_eq!(
            option_of(try_make(format, &[(foreign, yes(true))])),
            foreign
        );
        for bad in [int(3), name("true"), OptionValue::Float(1.0)] {
            assert_eq!(option_of(try_make(format, &[(own, bad)])), own);
        }
    }
    assert_eq!(block("nf4", name("row")), "block_size");
    assert_eq!(block("nf4", int(96)), "block_size");
    for dtype in ["f64", "i8", "F16", "float16"] {
        let bad = try_make("int8", &[("scale_dtype", name(dtype))]);
        assert_eq!(option_of(bad), "scale_dtype");
    }
    let absmax = |f, o, v| option_of(try_make(f, &[("scale", name("absmax")), (o, v)]));
    assert_eq!(absmax("int4", "block_size", name("row")), "scale");
    assert_eq!(absmax("int8", "symmetric", yes(false)), "scale");
    assert_eq!(absmax("int8", "method", name("mse")), "scale");
    assert_eq!(absmax("int8", "scale_dtype", name("f16")), "scale_dtype");
    let tensor = [("block_size", name("tensor")), ("method", name("mse"))];
    assert_eq!(option_of(try_make("int8", &tensor)), "block_size");
    let hqq = |o, v| option_of(try_make("int4", &[("method", name("hqq")), (o, v)]));
    assert_eq!(hqq("block_size", name("tensor")), "block_size");
    assert_eq!(hqq("zero_point", name("integer")), "zero_point");
    assert_eq!(hqq("zero_point", yes(true)), "zero_point");
    assert_eq!(hqq("symmetric", yes(true)), "symmetric");
    let ordered = [("act_order", yes(true)), ("block_size", name("row"))];
    assert_eq!(option_of(try_make("int4", &ordered)), "act_order");
    match try_make("int7", &[]).unwrap_err() {
        Error::UnknownFormat { name, known } => {
            let all: Vec<&str> = FORMATS.iter().map(|f| f.name()).collect();
            assert_eq!((name.as_str(), known), ("int7", all.join(", ")));
        }
        other => panic!("{other:?}"),
    }
}

/// The options of a spec give it again; dumps and reports rest on that.
#[test]
fn options_give_their_spec_again() {
    for spec in every_spec() {
        let options = spec.format().unwrap().options(&spec);
        assert_eq!(make(&spec.format, &options), spec);
    }
}

#[test]
fn blocks_larger_than_the_tensor_cost_nothing() {
    let x = gaussian(100, 6);
    let t = f32_tensor(&[4, 25], &x);
    for format in ["nf4", "fp4"] {
        for block in [128, 1 << 20, 1 << 30] {
            for double_quant in [false, true] {
                let options = [
                    ("block_size", int(block)),
                    ("double_quant", yes(double_quant)),
                ];
                let q = quantized(&t, &make(format, &options));
                assert!(q.nbytes() <= 50 + 4 + 1 + 8);
                let worst = metrics::quantized(&t, &q, &Cancel::new()).unwrap().sqnr_db;
                assert!(worst > 10.0);
            }
        }
    }
}

#[test]
fn a_cancelled_call_stops() {
    let cancel = Cancel::new();
    cancel.cancel();
    let x = f32_tensor(&[64, 64], &gaussian(4096, 7));
    for spec in every_spec() {
        let q = quantized(&x, &spec);
        assert_eq!(quantize(&x, &spec, &cancel).unwrap_err(), Error::Cancelled);
        let mut out = vec![0u8; 4096 * 4];
        let stopped = Err(Error::Cancelled);
        assert_eq!(dequantize_into(&q, DType::F32, &mut out, &cancel), stopped);
        assert_eq!(
            matmul::matmul_into(&x, &q, DType::F32.into(), &mut out, &cancel),
            stopped
        );
        assert_eq!(cast::cast_into(&x, DType::F32, &mut out, &cancel), stopped);
        assert_eq!(metrics::quantized(&x, &q, &cancel), Err(Error::Cancelled));
        assert_eq!(metrics::dense(&x, &x, &cancel), Err(Error::Cancelled));
    }
}

#[test]
fn a_call_under_way_stops_when_it_is_cancelled() {
    // A search over 16 million elements takes a good part of a second.
    let n = 1 << 24;
    let bytes = Arc::new(vec![0x3fu8; 2 * n]);
    let x = Tensor::new(DType::BF16, vec![n / 128, 128], bytes, 0..2 * n).unwrap();
    let spec = make("int4", &[("method", name("mse"))]);
    let cancel = Cancel::new();
    let flag = cancel.clone();
    let begun = Instant::now();
    let waiter = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        flag.cancel();
        Instant::now()
    });
    assert_eq!(quantize(&x, &spec, &cancel).unwrap_err(), Error::Cancelled);
    let asked = waiter.join().unwrap();
    assert!(
        asked.elapsed() < Duration::from_millis(500),
        "{:?}",
        begun.elapsed()
    );
}

#[test]
fn tensors_check_their_shapes_and_ranges() {
    let bytes = || Arc::new(vec![0u8; 64]);
    let made = |shape: &[usize], range| Tensor::new(DType::F32, shape.to_vec(), bytes(), range);
    assert!(made(&[4, 4], 0..64).is_ok());
    assert!(made(&[], 3..7).is_ok());
    assert!(made(&[0], 64..64).is_ok());
    let overflow = |r: Result<Tensor>| matches!(r, Err(Error::ShapeOverflow { .. }));
    assert!(overflow(made(&[usize::MAX], 0..64)));
    assert!(overflow(made(&[1 << 32, 1 << 32], 0..64)));
    assert!(overflow(made(&[1 << 61], 0..64)));
    assert!(overflow(made(&[1 << 40, 1 << 40, 0], 0..0)));
    let mismatch = |r: Result<Tensor>| matches!(r, Err(Error::SizeMismatch { .. }));
    for (shape, start, end) in [
        (vec![4, 4], 0, 63),
        (vec![4, 4], 1, 65),
        (vec![17], 0, 68),
        (vec![0], 65, 65),
        (vec![0], 8, 4),
        (vec![], usize::MAX - 3, 0),
    ] {
        assert!(
            mismatch(made(&shape, start..end)),
            "{shape:?} {start}..{end}"
        );
    }
    let t = made(&[4, 4], 0..64).unwrap();
    assert_eq!(t.reshaped(vec![2, 8]).unwrap().shape(), [2, 8]);
    assert!(mismatch(t.reshaped(vec![5])));
    assert!(overflow(t.reshaped(vec![usize::MAX, 2])));
}

#[test]
fn results_of_the_wrong_size_are_refused() {
    let x = f32_tensor(&[2, 64], &gaussian(128, 8));
    let q = quantized(&x, &make("nf4", &[]));
    for len in [0, 127 * 4, 128 * 4 + 1, 128 * 8] {
        let mut out = vec![0u8; len];
        let refused = dequantize_into(&q, DType::F32, &mut out, &Cancel::new());
        assert!(matches!(refused, Err(Error::SizeMismatch { .. })));
    }
}

#[test]
fn metrics_of_known_errors() {
    let cancel = Cancel::new();
    let x = f32_tensor(&[2, 2], &[1.0, -2.0, 3.0, 0.0]);
    let y = f32_tensor(&[2, 2], &[1.0, -2.0, 3.5, 0.0]);
    let m = metrics::dense(&x, &y, &cancel).unwrap();
    assert_eq!((m.mse, m.mean_error, m.max_error), (0.0625, 0.125, 0.5));
    assert!((m.sqnr_db - 10.0 * (14.0f64 / 0.25).log10()).abs() < 1e-9);
    assert!((m.psnr_db - 10.0 * (9.0f64 / 0.0625).log10()).abs() < 1e-9);
    assert!((m.cosine - 15.5 / (14.0f64 * 17.25).sqrt()).abs() < 1e-12);
    let same = metrics::dense(&x, &x, &cancel).unwrap();
    assert_eq!((same.mse, same.sqnr_db), (0.0, f64::INFINITY));
    let zeros = f32_tensor(&[2, 2], &[0.0; 4]);
    let none = metrics::dense(&zeros, &zeros, &cancel).unwrap();
    assert!(none.mse == 0.0 && none.sqnr_db.is_nan() && none.cosine.is_nan());
    let other = f32_tensor(&[4], &[0.0; 4]);
    let refused = metrics::dense(&x, &other, &cancel);
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
}
