//! Our packing against that of gptqmodel, in both checkpoint formats, at every
//! ISA level. The fixture and what its tensors mean: test/golden/make_gptq.py.

mod support;

use serde_json::{Value, json};
use support::golden::Golden;
use support::{dequantized, make, on_every_level, quantized};
use viva_core::format::Quantized;
use viva_core::layout::{self, Modules, Source, layout};
use viva_core::tensor::{DType, Tensor};
use viva_core::{Error, Result};

/// The file's tensors of one case under a checkpoint format.
fn read(golden: &Golden, case: &str, format: &str) -> Result<Quantized> {
    let tensor = |name: &str| -> Result<Tensor> {
        let part = match name.strip_prefix("m.") {
            Some("qzeros") if format == "gptq" => "qzeros_v1",
            Some(part) => part,
            None => panic!("{name}"),
        };
        Ok(golden.tensor(&format!("{case}/{part}")))
    };
    let config = json!({"quantization_config": {"checkpoint_format": format}});
    layout("gptq")?.read("m.weight", &Source::new(&tensor, &config))
}

#[test]
fn values_and_words_are_theirs_both_ways() {
    on_every_level("values_and_words_are_theirs_both_ways", |digest| {
        let golden = Golden::open("gptq");
        let cases = golden.cases("qweight");
        assert_eq!(cases.len(), 4 * 4);
        for case in &cases {
            for format in ["gptq", "gptq_v2"] {
                let q = read(&golden, case, format).unwrap();
                assert_eq!(q.spec.symmetric, case.contains(".sym"), "{case}");
                assert_eq!(q.spec.act_order, case.contains(".act"), "{case}");
                let values = dequantized(&q, DType::F16);
                let expected = golden.tensor(&format!("{case}/dequantized"));
                assert_eq!(
                    values.to_f32_vec(),
                    expected.to_f32_vec(),
                    "{case} {format}"
                );
                digest.bytes(values.bytes());
                // And back to the bytes of the file.
                let layout = layout(format).unwrap();
                layout.check(&q.spec).unwrap();
                let entries = layout.entries(&q.spec, "m.weight", &q.shape, q.dtype);
                let entries = entries.unwrap().fixed;
                let spelled = layout.spell("m.weight", &q).unwrap();
                assert_eq!(spelled.len(), entries.len());
                for ((name, bytes), entry) in spelled.iter().zip(&entries) {
                    let part = match name.strip_prefix("m.").unwrap() {
                        "qzeros" if format == "gptq" => "qzeros_v1",
                        part => part,
                    };
                    let expected = golden.tensor(&format!("{case}/{part}"));
                    assert_eq!(*name, entry.name);
                    assert_eq!(entry.shape, expected.shape(), "{case} {part}");
                    assert_eq!(&bytes[..], expected.bytes(), "{case} {format} {part}");
                }
            }
        }
    });
}

#[test]
fn other_packings_and_damaged_files_are_refused() {
    let golden = Golden::open("gptq");
    let refused = |f: &dyn Fn(&str, Tensor) -> Tensor, config: Value| {
        let tensor = |name: &str| {
            let part = &name["m.".len()..];
            Ok(f(part, golden.tensor(&format!("b4.g32.act/{part}"))))
        };
        let source = Source::new(&tensor, &config);
        layout("gptq")
            .unwrap()
            .read("m.weight", &source)
            .unwrap_err()
    };
    let same = |_: &str, t: Tensor| t;
    let marlin = json!({"quantization_config": {"checkpoint_format": "marlin"}});
    assert!(refused(&same, marlin).to_string().contains("marlin"));
    let with = |part: &'static str, made: Tensor| {
        move |name: &str, t: Tensor| if name == part { made.clone() } else { t }
    };
    for index in [4i32, -1, i32::MAX] {
        let mut g_idx = [0i32; 128];
        g_idx[77] = index;
        let bad = Tensor::from_slice(DType::I32, &[128], &g_idx).unwrap();
        let error = refused(&with("g_idx", bad), Value::Null);
        assert!(matches!(error, Error::InvalidDump { .. }), "{error}");
    }
    let empty = Tensor::from_slice::<u8>(DType::I32, &[0], &[]).unwrap();
    refused(&with("g_idx", empty), Value::Null);
    for shape in [vec![15, 32], vec![32, 16], vec![17, 32], vec![512]] {
        let n = shape.iter().product();
        let words = Tensor::from_slice(DType::I32, &shape, &vec![0i32; n]).unwrap();
        refused(&with("qweight", words), Value::Null);
    }
    let long = Tensor::from_slice(DType::I32, &[5, 4], &[0i32; 20]).unwrap();
    refused(&with("qzeros", long), Value::Null);
}

/// The names of the two differ in g_idx alone.
#[test]
fn gptq_and_awq_are_told_apart() {
    let found = |parts: &[&str]| {
        let names: Vec<String> = parts.iter().map(|p| format!("m.{p}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let found = layout::find(&names);
        found.iter().map(|f| f.layout).collect::<Vec<_>>()
    };
    assert_eq!(found(&["qweight", "qzeros", "scales", "g_idx"]), ["gptq"]);
    assert_eq!(found(&["qweight", "qzeros", "scales"]), ["awq"]);
    assert_eq!(found(&["weight", "scales", "biases"]), ["mlx"]);
    assert!(found(&["weight", "bias"]).is_empty());
}

#[test]
fn our_own_weights_come_back() {
    let x = support::f32_tensor(&[64, 96], &support::gaussian(64 * 96, 1));
    for (format, options) in [
        ("int8", vec![("scale_dtype", support::name("f16"))]),
        ("int8", vec![("block_size", support::int(32))]),
        ("int4", vec![("block_size", support::int(32))]),
        ("int3", vec![("block_size", support::name("row"))]),
        (
            "int2",
            vec![
                ("block_size", support::int(96)),
                ("symmetric", support::yes(true)),
            ],
        ),
    ] {
        let q = quantized(&x, &make(format, &options));
        for name in ["gptq", "gptq_v2"] {
            let layout = layout(name).unwrap();
            let spelled = layout.spell("m.weight", &q).unwrap();
            let entries = layout.entries(&q.spec, "m.weight", &q.shape, q.dtype);
            let entries = entries.unwrap().fixed;
            let tensor = |name: &str| {
                let i = spelled.iter().position(|(n, _)| n == name).unwrap();
                let viva_core::io::EntryDType::Known(dtype) = entries[i].dtype else {
                    panic!("{name}");
                };
                Tensor::from_slice(dtype, &entries[i].shape, &spelled[i].1)
            };
            let mut config = json!({});
            let kept = ["lm_head".to_string(), "a.b".into()];
            layout.config(&Modules::all(&q.spec, &kept), &mut config);
            let written = &config["quantization_config"];
            assert_eq!(written["checkpoint_format"], name);
            assert_eq!(written["dynamic"], json!({"-:^a\\.b$": {}}));
            assert_eq!(layout.companions(&config)[0].1, *written);
            let source = Source::new(&tensor, &config);
            let back = viva_core::layout::layout("gptq").unwrap();
            let back = back.read("m.weight", &source).unwrap();
            let values = |q| dequantized(q, DType::F32).to_f32_vec();
            assert_eq!(values(&back), values(&q), "{format} {name}");
        }
    }
}
