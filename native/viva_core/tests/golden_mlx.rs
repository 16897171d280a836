//! Our bytes against those of mlx, at every ISA level. The fixture and what its
//! tensors mean: test/golden/make_mlx.py.

mod support;

use serde_json::json;
use support::golden::Golden;
use support::{dequantized, int, make, name, on_every_level, quantized};
use viva_core::format::Spec;
use viva_core::layout::{Modules, Source, layout};
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
        let layout = layout("mlx").unwrap();
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
            // The layout reads their file to what we made, and writes it again.
            let tensor = |name: &str| {
                let part = name.strip_prefix("m.").unwrap();
                Ok(golden.tensor(&format!("{case}/{part}")))
            };
            let group = spec.block_len(&[]);
            let mut config = json!({"quantization": {"group_size": 1, "bits": 9}});
            layout.check(&spec).unwrap();
            layout.config(&Modules::all(&spec, &[]), &mut config);
            assert_eq!(config["quantization"]["group_size"], group);
            let read = layout.read("m.weight", &Source::new(&tensor, &config));
            let read = read.unwrap();
            assert_eq!((&read.spec, &read.shape), (&q.spec, &q.shape), "{case}");
            let entries = layout.entries(&spec, "m.weight", &q.shape, q.dtype);
            let entries = entries.unwrap().fixed;
            let spelled = layout.spell("m.weight", &read).unwrap();
            for ((name, bytes), entry) in spelled.iter().zip(&entries) {
                let expected = tensor(name).unwrap();
                assert_eq!((name, &entry.shape[..]), (&entry.name, expected.shape()));
                assert_eq!(&bytes[..], expected.bytes(), "{case} {name}");
            }
        }
    });
}

#[test]
fn bits_and_groups_of_single_modules_and_modes_are_heeded() {
    let golden = Golden::open("mlx");
    let read = |config: serde_json::Value| {
        let tensor = |name: &str| {
            let part = name.strip_prefix("m.").unwrap();
            Ok(golden.tensor(&format!("f16.3x256/b8.g32/{part}")))
        };
        let layout = layout("mlx").unwrap();
        layout.read("m.weight", &Source::new(&tensor, &config))
    };
    let other =
        json!({"quantization": {"group_size": 64, "bits": 4, "m": {"group_size": 32, "bits": 8}}});
    assert_eq!(read(other).unwrap().spec.format, "int8");
    for bad in [
        json!(null),
        json!({"quantization": {"bits": 8}}),
        json!({"quantization": {"group_size": 32, "bits": 0}}),
        json!({"quantization": {"group_size": 0, "bits": 8}}),
        json!({"quantization": {"group_size": 32, "bits": 7}}),
        json!({"quantization": {"group_size": 64, "bits": 8}}),
        json!({"quantization": {"group_size": 32, "bits": 4}}),
        json!({"quantization": {"group_size": 32, "bits": 8, "mode": "mxfp8"}}),
    ] {
        assert!(read(bad.clone()).is_err(), "{bad}");
    }
}
