//! Our bytes against those of bitsandbytes, at every ISA level. The fixture
//! and what its tensors mean: test/golden/make_bitsandbytes.py.

mod support;

use support::golden::Golden;
use support::{Digest, int, make, name, on_every_level, quantized, yes};
use viva_core::format::{Quantized, Spec};
use viva_core::formats::codebook::{FP4, NF4};
use viva_core::formats::dynamic_map::{DYNAMIC_MAP, double_quantize};
use viva_core::tensor::{DType, Tensor, widen};

fn with_golden(f: impl FnOnce(&Golden)) {
    f(&Golden::open("bitsandbytes"));
}

/// Quantizes the weight of `case`, holds the parts named in `pairs` and the
/// dequantized values to the fixture.
fn compare(
    golden: &Golden,
    case: &str,
    spec: &Spec,
    pairs: &[(&str, &str)],
    digest: &mut Digest,
) -> Quantized {
    let (weight, _) = case.split_once('/').unwrap();
    let q = quantized(&golden.tensor(weight), spec);
    assert_eq!(q.parts.len(), pairs.len(), "{case}");
    for (ours, theirs) in pairs {
        let expected = golden.tensor(&format!("{case}/{theirs}"));
        let part = q.part(ours).unwrap();
        assert_eq!(part.dtype(), expected.dtype(), "{case} {ours}");
        assert_eq!(part.bytes(), expected.bytes(), "{case} {ours}");
    }
    let expected = golden.tensor(&format!("{case}/dequantized"));
    let values = support::dequantized(&q, expected.dtype());
    assert_eq!(values.shape(), expected.shape(), "{case}");
    // As numbers: the sign of a zero is not theirs to say. The fixture holds
    // no NaN, and widening keeps every other number apart.
    assert_eq!(values.to_f32_vec(), expected.to_f32_vec(), "{case}");
    digest.parts(&q);
    digest.bytes(values.bytes());
    q
}

#[test]
fn four_bit_codes_scales_and_values_are_theirs() {
    on_every_level("four_bit_codes_scales_and_values_are_theirs", |digest| {
        with_golden(|golden| {
            let cases = golden.cases("quant_state");
            assert_eq!(cases.len(), 3 * 3 * 2 * 2 * 2 + 1);
            for case in cases {
                // {weight}/{format}.b{block}[.dq]
                let (_, made) = case.split_once('/').unwrap();
                let mut words = made.split('.');
                let format = words.next().unwrap();
                let block = words.next().unwrap()[1..].parse().unwrap();
                let double_quant = words.next() == Some("dq");
                let spec = make(
                    format,
                    &[
                        ("block_size", int(block)),
                        ("double_quant", yes(double_quant)),
                    ],
                );
                let mut pairs = vec![("codes", "codes"), ("absmax", "absmax")];
                if double_quant {
                    pairs.push(("nested_absmax", "nested_absmax"));
                    pairs.push(("nested_offset", "offset"));
                }
                compare(golden, &case, &spec, &pairs, digest);
            }
        });
    });
}

#[test]
fn llm_int8_codes_scales_and_values_are_theirs() {
    on_every_level("llm_int8_codes_scales_and_values_are_theirs", |digest| {
        with_golden(|golden| {
            let spec = make("int8", &[("scale", name("absmax"))]);
            let cases = golden.cases("scale");
            assert_eq!(cases.len(), 3 * 3);
            for case in cases {
                let pairs = [("codes", "codes"), ("scales", "scale")];
                let q = compare(golden, &case, &spec, &pairs, digest);
                assert_eq!(q.part("codes").unwrap().shape(), q.shape);
            }
        });
    });
}

#[test]
fn dequantized_f16_and_bf16_are_rounded_once() {
    // The fixture's f32 values, rounded, whatever the weight was made from.
    with_golden(|golden| {
        let case = "f32.5x100/nf4.b64";
        let q = quantized(&golden.tensor("f32.5x100"), &make("nf4", &[]));
        let values = golden.floats(&format!("{case}/dequantized"));
        for dtype in [DType::F16, DType::BF16, DType::F64] {
            let expected = support::float_tensor(dtype, &[5, 100], &values);
            assert_eq!(support::dequantized(&q, dtype).bytes(), expected.bytes());
        }
    });
}

#[test]
fn nested_codes_offsets_and_absmax_are_theirs() {
    with_golden(|golden| {
        let cases = golden.cases("offset");
        let nested: Vec<_> = cases.iter().filter(|c| c.starts_with("nested.")).collect();
        assert_eq!(nested.len(), 9);
        for case in nested {
            let n: u64 = case["nested.".len()..].parse().unwrap();
            let absmax: Vec<f32> = (0..n)
                .map(|i| ((i * 2_654_435_761 % (1 << 32)) >> 8) as f32 / (1 << 24) as f32)
                .collect();
            let ours = double_quantize(&absmax);
            let theirs = |part: &str| golden.tensor(&format!("{case}/{part}"));
            assert_eq!(
                &[ours.offset],
                theirs("offset").to_f32_vec().as_slice(),
                "{case}"
            );
            assert_eq!(ours.absmax, theirs("absmax").to_f32_vec(), "{case}");
            assert_eq!(ours.codes, theirs("codes").bytes(), "{case}");
        }
    });
}

#[test]
fn tables_are_theirs() {
    with_golden(|golden| {
        let map = golden.floats("dynamic_map");
        support::same(&*DYNAMIC_MAP, &map, format_args!("the dynamic map"));
        assert_eq!(NF4.table.as_slice(), golden.floats("nf4_map"));
        assert_eq!(FP4.table.as_slice(), golden.floats("fp4_map"));
    });
}

/// Every byte of codes under several scales, against the tables of the fixture.
#[test]
fn every_code_decodes_to_its_value() {
    on_every_level("every_code_decodes_to_its_value", |digest| {
        with_golden(|golden| {
            for (format, map) in [("nf4", "nf4_map"), ("fp4", "fp4_map")] {
                let map = golden.floats(map);
                let bytes: Vec<u8> = (0..=255).collect();
                let absmax = [0.1f32, 3.0, 1e-38, 1e30];
                let q = Quantized {
                    spec: make(format, &[("block_size", int(128))]),
                    shape: vec![512],
                    dtype: DType::F32,
                    parts: vec![
                        (
                            "codes",
                            Tensor::from_slice(DType::U8, &[256], &bytes).unwrap(),
                        ),
                        ("absmax", support::f32_tensor(&[4], &absmax)),
                    ],
                };
                q.validate().unwrap();
                let values = support::dequantized(&q, DType::F32);
                let mut got = vec![0f32; 512];
                widen(DType::F32, values.bytes(), &mut got);
                for (i, v) in got.into_iter().enumerate() {
                    let byte = bytes[i / 2];
                    let code = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
                    assert_eq!(v, map[usize::from(code)] * absmax[i / 128], "{format} {i}");
                }
                digest.bytes(values.bytes());
            }
        });
    });
}
