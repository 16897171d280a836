//! Our 2:4 sparsity against that of compressed-tensors and of torch, both ways.
//! The fixture and what its tensors mean: test/golden/make_sparse24.py.

mod support;

use std::collections::BTreeMap;

use serde_json::{Value, json};
use support::golden::Golden;
use support::{make, name, on_every_level, quantized};
use viva_core::Error;
use viva_core::format::{Quantized, Spec};
use viva_core::io::EntryDType;
use viva_core::layout::{self, Layout, Modules, Source};
use viva_core::tensor::{DType, Tensor};

const SUFFIXES: [&str; 4] = ["compressed", "bitmask", "shape", "weight_scale"];

fn compressed_tensors() -> &'static dyn Layout {
    layout::layout("compressed-tensors").unwrap()
}

type Stored = BTreeMap<String, Tensor>;

/// The tensors of a case as a file holds them.
fn stored(golden: &Golden, case: &str) -> Stored {
    let suffixes = match case.ends_with("dense") {
        true => &SUFFIXES[..3],
        false => &SUFFIXES[..],
    };
    let tensor = |s: &&str| (format!("m.{s}"), golden.tensor(&format!("{case}/{s}")));
    suffixes.iter().map(tensor).collect()
}

fn read(stored: &Stored) -> viva_core::Result<Quantized> {
    let get = |name: &str| {
        stored
            .get(name)
            .cloned()
            .ok_or_else(|| Error::UnknownTensor {
                name: name.into(),
                hint: String::new(),
            })
    };
    compressed_tensors().read("m.weight", &Source::new(&get, &Value::Null))
}

/// The tensors of a file that holds `q`.
fn written(q: &Quantized) -> Stored {
    let layout = compressed_tensors();
    let entries = layout.entries(&q.spec, "m.weight", &q.shape, q.dtype);
    let spelled = layout.spell("m.weight", q).unwrap();
    let fixed = entries.unwrap().fixed;
    assert_eq!(fixed.len(), spelled.len());
    let tensor = |(entry, (name, bytes)): (viva_core::io::FixedEntry, (String, _))| {
        assert_eq!(entry.name, name);
        let EntryDType::Known(dtype) = entry.dtype else {
            panic!("{name}");
        };
        let bytes: std::borrow::Cow<[u8]> = bytes;
        (
            name,
            Tensor::from_slice(dtype, &entry.shape, &bytes).unwrap(),
        )
    };
    fixed.into_iter().zip(spelled).map(tensor).collect()
}

fn same_tensors(ours: &Stored, theirs: &Stored, what: &str) {
    let names = |t: &Stored| t.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(ours), names(theirs), "{what}");
    for (name, tensor) in ours {
        let expected = &theirs[name];
        assert_eq!(tensor.dtype(), expected.dtype(), "{name} of {what}");
        assert_eq!(tensor.shape(), expected.shape(), "{name} of {what}");
        assert_eq!(tensor.bytes(), expected.bytes(), "{name} of {what}");
    }
}

fn spec_of(scheme: &str) -> Spec {
    let values = |v| ("values", name(v));
    let tensor = || ("block_size", name("tensor"));
    match scheme {
        "dense" => make("sparse24", &[]),
        "fp8_channel" => make("sparse24", &[values("fp8_e4m3")]),
        "fp8_tensor" => make("sparse24", &[values("fp8_e4m3"), tensor()]),
        "int8_channel" => make("sparse24", &[values("int8")]),
        "int8_tensor" => make("sparse24", &[values("int8"), tensor()]),
        other => panic!("{other}"),
    }
}

#[test]
fn what_it_wrote_is_read_and_written_again() {
    on_every_level("what_it_wrote_is_read_and_written_again", |digest| {
        let golden = Golden::open("sparse24");
        let cases = golden.cases("dequantized");
        assert_eq!(cases.len(), 20);
        for case in cases {
            let stored = stored(&golden, &case);
            let q = read(&stored).unwrap_or_else(|e| panic!("{case}: {e}"));
            let expected = golden.tensor(&format!("{case}/dequantized"));
            let values = support::dequantized(&q, expected.dtype());
            assert_eq!(values.shape(), expected.shape(), "{case}");
            // As numbers: the sign of a zero is not theirs to say.
            assert_eq!(values.to_f32_vec(), expected.to_f32_vec(), "{case}");
            digest.bytes(values.bytes());
            same_tensors(&written(&q), &stored, &case);
        }
    });
}

/// Of floats, and of f32 weights as fp8: the bytes that it makes, whether zeros
/// are there already or not; except that a row of zeros has a scale that is not.
#[test]
fn quantizing_gives_its_bytes() {
    on_every_level("quantizing_gives_its_bytes", |digest| {
        let golden = Golden::open("sparse24");
        let mut equal = 0;
        for case in golden.cases("dequantized") {
            let (weight, scheme) = case.split_once('/').unwrap();
            // Its int8 has another scale, and of 16 bits it makes quotients of 16 bits.
            let same = scheme == "dense" || scheme.starts_with("fp8") && weight.starts_with("f32");
            if !same {
                continue;
            }
            for x in [weight.to_string(), format!("{weight}/pruned")] {
                let x = golden.tensor(&x);
                let q = quantized(&x, &spec_of(scheme));
                digest.parts(&q);
                let mut ours = written(&q);
                let mut theirs = stored(&golden, &case);
                let [a, b] = [&mut ours, &mut theirs].map(|t| t.remove("m.weight_scale"));
                assert_eq!(a.is_some(), b.is_some(), "{case}");
                for (a, b) in a.iter().zip(&b) {
                    for (a, b) in a.to_f32_vec().into_iter().zip(b.to_f32_vec()) {
                        assert!(a == b || a == 0.0 && b == f32::EPSILON, "{a} {b} {case}");
                    }
                }
                same_tensors(&ours, &theirs, &case);
                equal += 1;
            }
        }
        assert_eq!(equal, 2 * 8);
    });
}

/// The two of four that `torch.topk` takes of any numbers.
struct TopTwo(Vec<u8>);

impl TopTwo {
    fn of(&self, keys: [i64; 4]) -> u8 {
        let rank = |key: i64| {
            let mut below: Vec<i64> = keys.into_iter().filter(|k| *k < key).collect();
            below.sort();
            below.dedup();
            below.len()
        };
        let group = keys.into_iter().fold(0, |at, key| 4 * at + rank(key));
        (0..4).map(|i| self.0[4 * group + i] << i).sum()
    }
}

/// A group's mask and what it keeps, as our parts have them.
fn groups(q: &Quantized) -> Vec<(u8, [Vec<u8>; 2])> {
    let bits = q.part("bitmask").unwrap().bytes();
    let (codes, columns) = (&q.parts[0].1, q.shape[1]);
    let size = codes.dtype().size();
    let code = |i: usize| codes.bytes()[i * size..(i + 1) * size].to_vec();
    (0..q.len() / 4)
        .map(|g| {
            let (row, at) = (g / (columns / 4), g % (columns / 4));
            let byte = bits[row * columns.div_ceil(8) + at / 2];
            let mask = byte >> (4 * (at % 2)) & 15;
            (mask, [code(2 * g), code(2 * g + 1)])
        })
        .collect()
}

/// Whatever we store, compressed-tensors would store the same of the dense
/// tensor that it stands for: its codes and the zeros between them. (Negative
/// zeros of 8 bits, which it drops first, are no longer there to be seen.)
#[test]
fn its_choice_among_what_is_stored_is_ours() {
    let golden = Golden::open("sparse24");
    let top = TopTwo(golden.tensor("groups/mask").bytes().to_vec());
    let x = golden.tensor("groups");
    for (g, (mask, _)) in groups(&quantized(&x, &make("sparse24", &[])))
        .iter()
        .enumerate()
    {
        let group = &x.to_f32_vec()[4 * g..][..4];
        let keys = std::array::from_fn(|i| group[i] as i64);
        assert_eq!(*mask, top.of(keys), "{group:?}");
    }
    let mut zeros = 0;
    for weight in ["f32.32x128", "bf16.32x128", "f16.32x128", "f32.6x100"] {
        let x = golden.tensor(weight);
        for values in ["source", "f16", "bf16", "int8", "fp8_e4m3"] {
            let q = quantized(&x, &make("sparse24", &[("values", name(values))]));
            for (mask, codes) in groups(&q) {
                let mut dense = [0i64; 4];
                let places = (0..4).filter(|i| mask >> i & 1 == 1);
                for (i, code) in places.zip(codes) {
                    // Magnitudes as it sees them: integers of 8 bits, floats of more.
                    dense[i] = match code[..] {
                        [b] => i64::from((b as i8).wrapping_abs()),
                        [a, b] => i64::from(u16::from_le_bytes([a, b]) & 0x7fff),
                        _ => i64::from(u32::from_le_bytes(code.try_into().unwrap()) & !0 >> 1),
                    };
                }
                if dense.iter().filter(|key| **key > 0).count() < 2 {
                    zeros += 1;
                    if values == "fp8_e4m3" {
                        continue;
                    }
                }
                assert_eq!(mask, top.of(dense), "{weight} {values} {dense:?}");
            }
        }
    }
    assert!(zeros > 1000, "{zeros}");
}

/// The metadata of CUTLASS and cuSPARSELt: two indices of two bits a group, the
/// lower one in the low bits, low groups first. A zero that stays has no place
/// of its own there.
#[test]
fn masks_are_the_indices_of_torch() {
    let golden = Golden::open("sparse24");
    let q = quantized(&golden.tensor("bf16.32x128"), &make("sparse24", &[]));
    let meta = golden.tensor("bf16.32x128/cutlass/meta");
    let sparse = golden.tensor("bf16.32x128/cutlass/sparse");
    let mut compared = 0;
    for (g, (mask, codes)) in groups(&q).into_iter().enumerate() {
        if codes
            .iter()
            .any(|code| code[..] == [0, 0] || code[..] == [0, 0x80])
        {
            continue;
        }
        let indices = meta.bytes()[g / 2] >> (4 * (g % 2)) & 15;
        let (first, second) = (mask.trailing_zeros(), 7 - mask.leading_zeros());
        assert_eq!(u32::from(indices), first | second << 2, "group {g}");
        assert_eq!(sparse.bytes()[4 * g..][..4], codes.concat(), "group {g}");
        compared += 1;
    }
    assert!(compared > 800, "{compared}");
}

/// Without what is null, and what only its own observers read.
fn said(value: &Value) -> Value {
    match value {
        Value::Object(map) => map
            .iter()
            .filter(|(key, v)| !v.is_null() && !key.starts_with("observer"))
            .map(|(key, v)| (key.clone(), said(v)))
            .collect(),
        other => other.clone(),
    }
}

#[test]
fn configs_are_its_own() {
    let golden = Golden::open("sparse24");
    for case in golden.cases("config") {
        let scheme = case.split_once('/').unwrap().1;
        let theirs = golden.tensor(&format!("{case}/config"));
        let theirs: Value = serde_json::from_slice(theirs.bytes()).unwrap();
        let mut ours = json!({});
        let (spec, kept) = (spec_of(scheme), ["lm_head".to_string()]);
        compressed_tensors().config(&Modules::all(&spec, &kept), &mut ours);
        assert_eq!(said(&ours["quantization_config"]), said(&theirs), "{case}");
    }
}

#[test]
fn weights_are_found_by_their_bitmask() {
    let all = SUFFIXES.map(|s| format!("a.b.{s}"));
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let found = layout::find(&all);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].name, "a.b.weight");
    assert_eq!(found[0].layout, "compressed-tensors");
    assert_eq!(found[0].tensors, all);
    assert!(layout::find(&all[..2]).is_empty());
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let golden = Golden::open("sparse24");
    let refused = |stored: &Stored, what: &str| {
        assert!(read(stored).is_err(), "{what}");
    };
    for case in golden.cases("dequantized") {
        let whole = stored(&golden, &case);
        for (suffix, tensor) in &whole {
            let mut without = whole.clone();
            without.remove(suffix);
            // Without its bitmask a weight is another one, which is not there.
            refused(&without, suffix);
            let n = tensor.len();
            let bytes = vec![0u8; (n + 1) * 8];
            let of = |dtype: DType, shape: &[usize]| {
                let len = shape.iter().product::<usize>() * dtype.size();
                Tensor::from_slice(dtype, shape, &bytes[..len]).unwrap()
            };
            for damaged in [
                of(tensor.dtype(), &[n + 1, 1, 1]),
                of(DType::F64, tensor.shape()),
                of(DType::U8, &[]),
            ] {
                refused(
                    &[(suffix.clone(), damaged)]
                        .into_iter()
                        .fold(whole.clone(), put),
                    suffix,
                );
            }
        }
        let mut asymmetric = whole.clone();
        let zeros = Tensor::from_slice(DType::I8, &[1], &[0u8]).unwrap();
        asymmetric.insert("m.weight_zero_point".into(), zeros);
        refused(&asymmetric, "zero points");
        let bits = &whole["m.bitmask"];
        for at in [0, bits.len() / 2, bits.len() - 1] {
            for flipped in [1, 0x10] {
                let mut bytes = bits.bytes().to_vec();
                bytes[at] ^= flipped;
                let damaged = Tensor::from_slice(DType::U8, bits.shape(), &bytes).unwrap();
                refused(&put(whole.clone(), ("m.bitmask".into(), damaged)), "a bit");
            }
        }
    }
}

fn put(mut stored: Stored, (name, tensor): (String, Tensor)) -> Stored {
    stored.insert(name, tensor);
    stored
}
