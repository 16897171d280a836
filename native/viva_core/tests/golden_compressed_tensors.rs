//! Our tensors against those of compressed-tensors, both ways. The fixture and
//! what its tensors mean: test/golden/make_compressed_tensors.py.

mod support;

use std::borrow::Cow;
use std::collections::BTreeMap;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use support::{Digest, int, make, name, on_every_level, quantized};
use viva_core::Error;
use viva_core::format::{OptionValue, Quantized, Spec};
use viva_core::io::EntryDType;
use viva_core::layout::{self, Layout, Modules, Source};
use viva_core::tensor::{DType, Tensor};

const FIXTURE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../test/golden/compressed_tensors.safetensors"
);

fn compressed_tensors() -> &'static dyn Layout {
    layout::layout("compressed-tensors").unwrap()
}

struct Golden<'a>(SafeTensors<'a>);

impl Golden<'_> {
    fn tensor(&self, name: &str) -> Option<Tensor> {
        let view = self.0.tensor(name).ok()?;
        let EntryDType::Known(dtype) = EntryDType::from(view.dtype()) else {
            panic!("{name}");
        };
        Some(Tensor::from_slice(dtype, view.shape(), view.data()).unwrap())
    }

    /// `{weight}/{scheme}` of all.
    fn cases(&self) -> Vec<String> {
        let names = self.0.names();
        let cases = names.iter().filter_map(|n| n.strip_suffix("/dequantized"));
        let mut cases: Vec<String> = cases.map(String::from).collect();
        cases.sort();
        cases
    }

    /// The tensors of a case by their suffix.
    fn stored(&self, case: &str) -> BTreeMap<String, Tensor> {
        let prefix = format!("{case}/");
        let names = self.0.names().into_iter();
        names
            .filter_map(|n| Some((n.strip_prefix(&prefix)?, self.tensor(n)?)))
            .filter(|(suffix, _)| suffix.starts_with("weight"))
            .map(|(suffix, tensor)| (suffix.to_string(), tensor))
            .collect()
    }
}

fn with_golden(f: impl FnOnce(&Golden)) {
    let bytes = std::fs::read(FIXTURE).unwrap();
    f(&Golden(SafeTensors::deserialize(&bytes).unwrap()));
}

fn read(stored: &BTreeMap<String, Tensor>, config: &Value) -> viva_core::Result<Quantized> {
    let get = |name: &str| {
        let suffix = name.strip_prefix("m.").unwrap();
        stored
            .get(suffix)
            .cloned()
            .ok_or_else(|| Error::UnknownTensor {
                name: name.into(),
                hint: String::new(),
            })
    };
    compressed_tensors().read("m.weight", &Source::new(&get, config))
}

/// The tensors of a file that holds `q`, by their suffix.
fn written(q: &Quantized) -> BTreeMap<String, Tensor> {
    let layout = compressed_tensors();
    let spelled = layout.spell("m.weight", q).unwrap();
    let entries = layout
        .entries(&q.spec, "m.weight", &q.shape, q.dtype)
        .unwrap();
    assert_eq!(entries.fixed.len(), spelled.len());
    entries
        .fixed
        .iter()
        .zip(spelled)
        .map(|(entry, (name, bytes)): (_, (String, Cow<[u8]>))| {
            assert_eq!(entry.name, name);
            let EntryDType::Known(dtype) = entry.dtype else {
                panic!("{name}");
            };
            let tensor = Tensor::from_slice(dtype, &entry.shape, &bytes).unwrap();
            (name["m.".len()..].to_string(), tensor)
        })
        .collect()
}

fn same_tensors(ours: &BTreeMap<String, Tensor>, theirs: &BTreeMap<String, Tensor>, what: &str) {
    let names = |t: &BTreeMap<String, Tensor>| t.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(ours), names(theirs), "{what}");
    for (name, tensor) in ours {
        let expected = &theirs[name];
        assert_eq!(tensor.dtype(), expected.dtype(), "{name} of {what}");
        assert_eq!(tensor.shape(), expected.shape(), "{name} of {what}");
        assert_eq!(tensor.bytes(), expected.bytes(), "{name} of {what}");
    }
}

/// Schemes that are read and then written in another way: 2-D blocks become
/// blocks of rows, bytes with a zero point are packed.
const REWRITTEN: [&str; 2] = ["fp8_block", "int8_channel_asym"];

#[test]
fn what_it_wrote_is_read_and_written_again() {
    on_every_level("what_it_wrote_is_read_and_written_again", |digest| {
        with_golden(|golden| {
            let cases = golden.cases();
            assert_eq!(cases.len(), 39);
            for case in cases {
                let stored = golden.stored(&case);
                let scheme = case.split_once('/').unwrap().1;
                let config = match scheme {
                    "fp8_block" => json!({"quantization_config": {"config_groups": {"group_0": {
                        "weights": {"block_structure": [4, 32]}}}}}),
                    _ => Value::Null,
                };
                let q = read(&stored, &config).unwrap_or_else(|e| panic!("{case}: {e}"));
                let expected = golden.tensor(&format!("{case}/dequantized")).unwrap();
                let values = support::dequantized(&q, expected.dtype());
                assert_eq!(values.shape(), expected.shape(), "{case}");
                // As numbers: the sign of a zero is not theirs to say.
                assert_eq!(values.to_f32_vec(), expected.to_f32_vec(), "{case}");
                digest.bytes(values.bytes());
                if REWRITTEN.contains(&scheme) {
                    let again = read(&written(&q), &Value::Null).unwrap();
                    let again = support::dequantized(&again, expected.dtype());
                    assert_eq!(again.bytes(), values.bytes(), "{case}");
                } else {
                    same_tensors(&written(&q), &stored, &case);
                }
            }
        });
    });
}

/// The spec by which we make what a scheme makes.
fn spec_of(scheme: &str) -> Option<Spec> {
    let block = |n| ("block_size", int(n));
    let f32_scales = || ("scale_dtype", name("f32"));
    let symmetric = |v| ("symmetric", OptionValue::Bool(v));
    Some(match scheme {
        "fp8_channel" => make("fp8_e4m3", &[]),
        "fp8_tensor" => make("fp8_e4m3", &[("block_size", name("tensor"))]),
        "fp8_group" => make("fp8_e4m3", &[block(32)]),
        "int8_channel" => make("int8", &[]),
        "int8_tensor" => make("int8", &[("block_size", name("tensor"))]),
        "int8_group" => make("int8", &[block(32)]),
        "int4_group" => make("int4", &[block(32), symmetric(true), f32_scales()]),
        "int4_channel" => make(
            "int4",
            &[("block_size", name("row")), symmetric(true), f32_scales()],
        ),
        "int4_group_asym" => make("int4", &[block(32), f32_scales()]),
        "int4_channel_asym" => make("int4", &[("block_size", name("row")), f32_scales()]),
        "nvfp4" => make("nvfp4", &[]),
        "mxfp4" => make("mxfp4", &[("scale", name("bump"))]),
        "mxfp8" => make("mxfp8", &[("scale", name("bump"))]),
        _ => return None,
    })
}

/// Of f32 weights, bytes that it makes; except that where a block is zero it
/// stores a scale that is not (which no code multiplies).
#[test]
fn quantizing_gives_its_codes_and_scales() {
    on_every_level("quantizing_gives_its_codes_and_scales", |digest| {
        with_golden(|golden| {
            let mut equal = 0;
            for case in golden.cases() {
                let (weight, scheme) = case.split_once('/').unwrap();
                // Asymmetric integers follow AWQ, whose zero point is rounded
                // before it is added; int8 uses 254 steps of its 255.
                let by_rule = scheme.ends_with("asym") || scheme.starts_with("int8");
                let (false, Some(spec)) = (by_rule, spec_of(scheme)) else {
                    continue;
                };
                let x = golden.tensor(weight).unwrap();
                // Of 16 bits it makes quotients of 16 bits, which only powers of
                // two leave alone.
                if x.dtype() != DType::F32 && spec.scale_dtype != DType::F8E8M0 {
                    continue;
                }
                let ours = written(&quantized(&x, &spec));
                check(&ours, &golden.stored(&case), &case, digest);
                equal += 1;
            }
            assert_eq!(equal, 13);
        });
    });
}

fn check(
    ours: &BTreeMap<String, Tensor>,
    theirs: &BTreeMap<String, Tensor>,
    case: &str,
    digest: &mut Digest,
) {
    for (name, tensor) in ours {
        let expected = &theirs[name];
        digest.bytes(tensor.bytes());
        if name == "weight_scale" && expected.dtype() == DType::F32 {
            for (a, b) in tensor.to_f32_vec().iter().zip(expected.to_f32_vec()) {
                assert!(*a == b || *a == 0.0 && b == f32::EPSILON, "{a} {b} {case}");
            }
        } else {
            assert_eq!(tensor.bytes(), expected.bytes(), "{name} of {case}");
        }
    }
    assert_eq!(ours.len(), theirs.len(), "{case}");
}

#[test]
fn configs_are_its_own() {
    with_golden(|golden| {
        let mut compared = 0;
        for case in golden.cases() {
            let (_, scheme) = case.split_once('/').unwrap();
            let Some(config) = golden.tensor(&format!("{case}/config")) else {
                continue;
            };
            let Some(spec) = spec_of(scheme) else {
                continue;
            };
            let mut expected: Value = serde_json::from_slice(config.bytes()).unwrap();
            if scheme == "fp8_group" {
                // Weights alone: no kernel rounds activations for groups.
                expected["config_groups"]["group_0"]["input_activations"] = Value::Null;
            }
            let mut ours = json!({});
            let kept = ["lm_head".to_string()];
            compressed_tensors().config(&Modules::all(&spec, &kept), &mut ours);
            assert_eq!(ours["quantization_config"], expected, "{case}");
            compared += 1;
        }
        assert_eq!(compared, 28);
    });
}

#[test]
fn what_it_cannot_hold_is_refused() {
    let layout = compressed_tensors();
    let refused = |spec: &Spec| {
        let refused = layout.check(spec);
        assert!(
            matches!(refused, Err(Error::LayoutMismatch { .. })),
            "{spec:?}"
        );
    };
    refused(&make("nf4", &[]));
    refused(&make("fp8_e5m2", &[]));
    refused(&make("mxfp8_e5m2", &[]));
    refused(&make("int8", &[("scale", name("absmax"))]));
    let spec = make("nvfp4", &[]);
    assert!(
        layout
            .entries(&spec, "m.weight", &[64], DType::F32)
            .is_err()
    );
    assert!(
        layout
            .entries(&spec, "m.weight", &[4, 24], DType::F32)
            .is_err()
    );
    assert!(layout.entries(&spec, "m", &[4, 32], DType::F32).is_err());
}

/// Tensors that do not belong together: an error, whatever is wrong.
#[test]
fn damaged_weights_are_refused() {
    with_golden(|golden| {
        for case in golden.cases() {
            let stored = golden.stored(&case);
            for (suffix, tensor) in &stored {
                let refused = |damaged: Option<Tensor>, how: &str| {
                    let mut stored = stored.clone();
                    match damaged {
                        Some(damaged) => stored.insert(suffix.clone(), damaged),
                        None => stored.remove(suffix),
                    };
                    let read = read(&stored, &Value::Null);
                    assert!(read.is_err(), "{suffix} {how} in {case}");
                };
                let zeros = suffix == "weight_zero_point";
                // Without it the weight is another one, which is symmetric.
                if !zeros {
                    refused(None, "missing");
                }
                let n = tensor.len();
                let bytes = vec![0u8; (n + 1) * 8];
                refused(
                    Tensor::from_slice(
                        tensor.dtype(),
                        &[n + 1, 1, 1],
                        &bytes[..(n + 1) * tensor.dtype().size()],
                    )
                    .ok(),
                    "of another shape",
                );
                refused(
                    Tensor::from_slice(DType::F64, tensor.shape(), &bytes[..n * 8]).ok(),
                    "of another dtype",
                );
            }
        }
    });
}
