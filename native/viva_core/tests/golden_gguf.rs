//! A file that the gguf package wrote: its metadata, its values, and the same
//! bytes written again, at every ISA level. test/golden/make_gguf.py makes it.

mod support;

use std::path::Path;

use support::{dequantized, on_every_level};
use viva_core::content::{self, Read};
use viva_core::io::gguf::Value;
use viva_core::io::{Checkpoint, FixedEntry, Metadata, ShardWriter, TensorFile};
use viva_core::tensor::DType;

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../test/golden/gguf.gguf");

fn metadata(file: &TensorFile) -> &viva_core::io::gguf::Metadata {
    match file.metadata() {
        Metadata::Gguf(metadata) => metadata,
        Metadata::Safetensors(_) => panic!("a GGUF file"),
    }
}

#[test]
fn metadata_of_every_type_is_theirs() {
    let file = TensorFile::open(FIXTURE).unwrap();
    let get = |key: &str| metadata(&file).get(key).unwrap();
    let scalars = [
        ("u8", Value::U8(250)),
        ("i8", Value::I8(-100)),
        ("u16", Value::U16(65000)),
        ("i16", Value::I16(-30000)),
        ("u32", Value::U32(4_000_000_000)),
        ("i32", Value::I32(-2_000_000_000)),
        ("u64", Value::U64((1 << 63) + 1)),
        ("i64", Value::I64(-(1 << 62))),
        ("f32", Value::F32(0.1)),
        ("f64", Value::F64(0.1)),
        ("bool", Value::Bool(true)),
        ("string", Value::String("naïve ✓".into())),
    ];
    for (key, value) in scalars {
        assert_eq!(*get(&format!("value.{key}")), value);
    }
    let strings: Vec<Value> = get("array.strings").as_array().unwrap().iter().collect();
    assert_eq!(strings, ["a", "", "bc"].map(|s| Value::String(s.into())));
    let ints: Vec<Value> = get("array.ints").as_array().unwrap().iter().collect();
    assert_eq!(ints, [1, -2, 3].map(Value::I32));
    let nested: Vec<usize> = get("array.nested")
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row.as_array().unwrap().len())
        .collect();
    assert_eq!(nested, [2, 1]);
}

#[test]
fn quantized_tensors_have_their_values() {
    on_every_level("quantized_tensors_have_their_values", |digest| {
        let checkpoint = Checkpoint::open(FIXTURE).unwrap();
        let mut compared = 0;
        for name in ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"] {
            let name = format!("w.{name}");
            let Read::Quantized(q) = content::read(&checkpoint, &name).unwrap() else {
                panic!("{name} is quantized");
            };
            let expected = checkpoint.tensor(&format!("{name}.values")).unwrap();
            let values = dequantized(&q, DType::F32);
            assert_eq!(values.shape(), expected.shape());
            // Zeros of both signs are one number here: gguf multiplies, ggml looks up.
            assert_eq!(values.to_f32_vec(), expected.to_f32_vec(), "{name}");
            digest.bytes(values.bytes());
            compared += 1;
        }
        assert_eq!(compared, 6);
    });
}

#[test]
fn written_again_it_is_the_same_file() {
    let file = TensorFile::open(FIXTURE).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("again.gguf");
    let entries = file.entries().iter().map(|e| FixedEntry {
        name: e.name.clone(),
        dtype: e.dtype,
        shape: e.shape.clone(),
    });
    let writer = ShardWriter::create(
        &path,
        entries.collect(),
        Vec::new(),
        Metadata::Gguf(metadata(&file).clone()),
    )
    .unwrap();
    for entry in file.entries() {
        writer
            .write(&entry.name, file.bytes(&entry.name).unwrap())
            .unwrap();
    }
    writer.finish().unwrap();
    let bytes = |path: &Path| std::fs::read(path).unwrap();
    let (ours, theirs) = (bytes(&path), bytes(Path::new(FIXTURE)));
    let differ = ours.iter().zip(&theirs).position(|(a, b)| a != b);
    assert_eq!((differ, ours.len()), (None, theirs.len()));
}
