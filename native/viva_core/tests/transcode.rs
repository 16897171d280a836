//! Quantized tensors from the formats of one layout to those of another: what is
//! called lossless decodes to the same values, and what must be lossless is.

mod support;

use viva_core::format::{OptionValue, Quantized};
use viva_core::layout::{self, layout};
use viva_core::ops::{Cancel, dequantize, metrics};
use viva_core::tensor::{DType, Tensor};
use viva_core::transcode::{choose, transcode};

use support::{f32_tensor, gaussian, int, name, quantized, yes};

/// A name that every layout has a spelling for.
const NAME: &str = "model.layers.0.mlp.up_proj.weight";

const LAYOUTS: [&str; 7] = [
    "bitsandbytes",
    "awq",
    "compressed-tensors",
    "gptq",
    "gptq_v2",
    "mlx",
    "gguf",
];

fn weights() -> Tensor {
    let mut x = gaussian(64 * 256, 7);
    // A block of zeros, and one whose values have one sign.
    x[..64].fill(0.0);
    x[256..384].iter_mut().for_each(|v| *v = v.abs() + 0.5);
    f32_tensor(&[64, 256], &x)
}

/// A tensor as `layout` holds it by default, or with more options.
fn source(format: &str, options: &[(&str, OptionValue)], name: &str) -> Quantized {
    let options: Vec<_> = options
        .iter()
        .map(|(k, v)| (k.to_string(), v.clone()))
        .collect();
    let (spec, _) = layout::resolve(format, &options, Some(name)).unwrap();
    let mut q = quantized(&weights(), &spec);
    q.dtype = DType::BF16;
    q
}

/// The format that `layout` gets, and the SQNR against the source; infinite
/// where the conversion says that it is lossless, which is checked here.
fn converted(q: &Quantized, to: &str) -> (Quantized, f64) {
    let layout = layout(to).unwrap();
    let spec = choose(q, layout, NAME).unwrap().unwrap();
    layout.check(&spec).unwrap();
    let (made, change) = transcode(q, &spec, &Cancel::new()).unwrap();
    assert_eq!(
        (&made.spec, &made.shape, made.dtype),
        (&spec, &q.shape, q.dtype)
    );
    made.validate().unwrap();
    let (from, to) = (
        dequantize::dequantize(q).unwrap(),
        dequantize::dequantize(&made).unwrap(),
    );
    let differ = from.iter().zip(&to).filter(|(a, b)| a != b).count();
    assert_eq!(change.changed, differ);
    assert_eq!(change.is_lossless(), differ == 0);
    let values = f32_tensor(&q.shape, &from);
    let sqnr = metrics::quantized(&values, &made, &Cancel::new())
        .unwrap()
        .sqnr_db;
    match change.metrics {
        None => assert_eq!(differ, 0),
        Some(metrics) => assert_eq!(metrics.sqnr_db, sqnr),
    }
    (made, sqnr)
}

#[test]
fn what_a_layout_holds_is_left_alone() {
    for (format, layout) in [
        ("nf4", "bitsandbytes"),
        ("int8", "bitsandbytes"),
        ("int4", "awq"),
        ("int3", "gptq"),
        ("int2", "gptq_v2"),
        ("nvfp4", "compressed-tensors"),
        ("int6", "mlx"),
        ("q4_k", "gguf"),
    ] {
        let q = source(format, &[], layout);
        let (made, sqnr) = converted(&q, layout);
        assert_eq!((made.spec, sqnr), (q.spec.clone(), f64::INFINITY));
        for ((_, a), (_, b)) in made.parts.iter().zip(&q.parts) {
            assert_eq!(a.bytes(), b.bytes());
        }
    }
}

#[test]
fn every_exact_way_is_found() {
    let f32_scales = [("scale_dtype", name("f32"))];
    let symmetric = [("symmetric", yes(true))];
    for (format, options, from, ways) in [
        // Symmetric to asymmetric, integer zero to float zero, groups cut.
        (
            "int4",
            &symmetric[..],
            "gptq",
            &[
                ("awq", "int4"),
                ("compressed-tensors", "int4"),
                ("mlx", "int4"),
                ("gguf", "q4_0"),
            ][..],
        ),
        (
            "int4",
            &[],
            "awq",
            &[
                ("gptq", "int4"),
                ("compressed-tensors", "int4"),
                ("mlx", "int4"),
                ("gguf", "q5_0"),
            ],
        ),
        (
            "int3",
            &[],
            "gptq",
            &[("awq", "int4"), ("mlx", "int3"), ("gguf", "q4_0")],
        ),
        (
            "int2",
            &[],
            "gptq_v2",
            &[("awq", "int4"), ("gptq", "int2"), ("gguf", "q4_0")],
        ),
        (
            "int8",
            &symmetric[..],
            "gptq",
            &[
                ("mlx", "int8"),
                ("compressed-tensors", "int8"),
                ("gguf", "q8_0"),
            ],
        ),
        (
            "q4_0",
            &[],
            "gguf",
            &[
                ("awq", "int4"),
                ("gptq", "int4"),
                ("compressed-tensors", "int4"),
                ("mlx", "int4"),
            ],
        ),
        ("q4_1", &[], "gguf", &[("mlx", "int4")]),
        (
            "q5_0",
            &[],
            "gguf",
            &[
                ("compressed-tensors", "int5"),
                ("mlx", "int5"),
                ("gptq", "int8"),
            ],
        ),
        ("q5_1", &[], "gguf", &[("mlx", "int5")]),
        (
            "q8_0",
            &[],
            "gguf",
            &[
                ("gptq", "int8"),
                ("compressed-tensors", "int8"),
                ("mlx", "int8"),
            ],
        ),
        (
            "int4",
            &[("block_size", int(32))],
            "mlx",
            &[("gguf", "q4_1")],
        ),
        // Scales of 24 bits stay what they are, and products with them.
        (
            "int4",
            &f32_scales[..],
            "compressed-tensors",
            &[("compressed-tensors", "int4")],
        ),
    ] {
        let q = source(format, options, from);
        for (to, expected) in ways {
            let (made, sqnr) = converted(&q, to);
            assert_eq!(
                (made.spec.format.as_str(), sqnr),
                (*expected, f64::INFINITY),
                "{format} in {from} to {to}"
            );
        }
    }
}

#[test]
fn and_back_to_the_same_bytes() {
    for (format, from, by) in [
        ("q4_0", "gguf", "mlx"),
        ("q4_1", "gguf", "mlx"),
        ("q5_0", "gguf", "mlx"),
        ("q5_1", "gguf", "mlx"),
        ("q8_0", "gguf", "mlx"),
        ("q4_0", "gguf", "compressed-tensors"),
        ("q8_0", "gguf", "gptq"),
        ("int4", "awq", "gptq"),
        ("int4", "awq", "mlx"),
        ("int4", "mlx", "gguf"),
    ] {
        let options = match from {
            "mlx" => vec![("block_size", int(32))],
            "awq" => vec![("block_size", int(32))],
            _ => vec![],
        };
        let q = source(format, &options, from);
        let (there, _) = converted(&q, by);
        let (back, sqnr) = converted(&there, from);
        assert_eq!(
            (&back.spec.format, sqnr),
            (&q.spec.format, f64::INFINITY),
            "{format} {by}"
        );
        // A block of zeros has no zero point to be told by.
        let zeroless = from == "awq" && by == "mlx";
        for ((part, a), (_, b)) in back.parts.iter().zip(&q.parts).filter(|_| !zeroless) {
            assert_eq!(a.bytes(), b.bytes(), "{format} in {from} by {by}: {part}");
        }
    }
}

#[test]
fn what_has_no_exact_way_stays_near() {
    for (format, options, from, at_least) in [
        ("nf4", vec![], "bitsandbytes", 20.0),
        ("int8", vec![], "bitsandbytes", 20.0),
        ("fp8_e4m3", vec![], "compressed-tensors", 20.0),
        ("nvfp4", vec![], "compressed-tensors", 20.0),
        ("mxfp4", vec![], "compressed-tensors", 20.0),
        ("q4_k", vec![], "gguf", 20.0),
        ("q6_k", vec![], "gguf", 20.0),
        ("iq4_nl", vec![], "gguf", 20.0),
        ("q3_k", vec![], "gguf", 14.0),
        ("int4", vec![("method", name("hqq"))], "mlx", 20.0),
        (
            "int4",
            vec![("scale_dtype", name("f32"))],
            "compressed-tensors",
            20.0,
        ),
        ("int4", vec![("act_order", yes(true))], "gptq", 20.0),
    ] {
        let q = source(format, &options, from);
        for to in LAYOUTS {
            let (made, sqnr) = converted(&q, to);
            let told = format!("{format} in {from} to {} in {to}: {sqnr}", made.spec.format);
            assert!(sqnr > at_least, "{told}");
        }
    }
}

#[test]
fn codes_are_kept_where_only_scales_are_rounded() {
    // LLM.int8() multiplies with 1/127: the same codes, and scales of 16 or 24 bits.
    let q = source("int8", &[], "bitsandbytes");
    for (to, at_least) in [
        ("gguf", 65.0),
        ("gptq", 65.0),
        ("compressed-tensors", 130.0),
    ] {
        let (_, sqnr) = converted(&q, to);
        assert!(sqnr > at_least, "{to}: {sqnr}");
    }
    // Scales of f32 in f16.
    let options = [("scale_dtype", name("f32")), ("symmetric", yes(true))];
    let q = source("int4", &options, "compressed-tensors");
    for to in ["awq", "gptq", "gguf"] {
        let (_, sqnr) = converted(&q, to);
        assert!(sqnr > 60.0, "{to}: {sqnr}");
    }
}

#[test]
fn a_shape_without_a_place_is_refused() {
    let spec = layout::resolve("int4", &[], Some("compressed-tensors"))
        .unwrap()
        .0;
    let x = f32_tensor(&[3, 128], &gaussian(384, 1));
    let q = quantized(&x, &spec);
    for to in ["awq", "gptq"] {
        assert_eq!(choose(&q, layout(to).unwrap(), NAME).unwrap(), None);
    }
    // Names that a layout cannot spell have none either.
    assert_eq!(choose(&q, layout("mlx").unwrap(), "bare").unwrap(), None);
}
