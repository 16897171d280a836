//! Our bytes against those of mlx, at every ISA level. The fixture and what its
//! tensors mean: test/golden/make_mlx.py.

mod support;

use support::golden::Golden;
use support::{dequantized, int, make, name, on_every_level, quantized};
use viva_core::format::Spec;
use viva_core::tensor::DType;

/// The spec of `{dtype}.…/b{bits}.g{group}`, and the weight's dtype.
fn spec_of(case: &str) -> (Spec, &str) {
    let (weight, made) = case.split_once('/').unwrap();
    let (dtype, _) = weight.split_once('.').unwrap();
    let (bits, group) = made[1..].split_once(".g").unwrap();
    let options = [
        ("zero_point", name("float")),
        ("block_size", int(group.parse().unwrap())),
        ("scale_dtype", name(dtype)),
    ];
    (make(&format!("int{bits}"), &options), weight)
}

#[test]
fn codes_scales_biases_and_values_are_theirs() {
    on_every_level("codes_scales_biases_and_values_are_theirs", |digest| {
        let golden = Golden::open("mlx");
        let cases = golden.cases("weight");
        assert_eq!(cases.len(), 3 * 6 * 3);
        for case in cases {
            let (spec, weight) = spec_of(&case);
            let q = quantized(&golden.tensor(weight), &spec);
            for (ours, theirs) in [
                ("codes", "weight"),
                ("scales", "scales"),
                ("biases", "biases"),
            ] {
                let expected = golden.tensor(&format!("{case}/{theirs}"));
                assert_eq!(
                    q.part(ours).unwrap().bytes(),
                    expected.bytes(),
                    "{case} {ours}"
                );
            }
            if case.ends_with("g64") {
                let expected = golden.floats(&format!("{case}/dequantized"));
                let values = dequantized(&q, DType::F32);
                support::same(&values.to_f32_vec(), &expected, format_args!("{case}"));
                digest.bytes(values.bytes());
            }
            digest.parts(&q);
        }
    });
}
