//! Damaged GGUF files are refused, or read as what they say.

#[path = "support/mutation.rs"]
mod mutation;
mod support;

use viva_core::formats::ggml_types::GGML_TYPES;
use viva_core::io::gguf::{Array, Metadata, Value, ValueType};
use viva_core::io::{EntryDType, FixedEntry, ShardWriter};

use support::Random;

#[global_allocator]
static ALLOCATOR: mutation::Counting = mutation::Counting;

/// A file with these tensors, of random content.
fn file(metadata: Metadata, tensors: Vec<FixedEntry>) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seed.gguf");
    let mut random = Random(7);
    let writer = ShardWriter::create(&path, tensors.clone(), vec![], metadata).unwrap();
    for entry in tensors {
        let len = entry.dtype.nbytes(&entry.shape).unwrap();
        let bytes: Vec<u8> = (0..len).map(|_| random.bits() as u8).collect();
        writer.write(&entry.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    std::fs::read(path).unwrap()
}

fn entry(name: &str, ggml: &str, shape: &[usize]) -> FixedEntry {
    let ggml = GGML_TYPES.iter().find(|t| t.name == ggml).unwrap();
    FixedEntry {
        name: name.into(),
        dtype: EntryDType::from(ggml),
        shape: shape.to_vec(),
    }
}

/// A small Llama as llama.cpp has it.
fn llama() -> Vec<u8> {
    let tokens: Vec<String> = (0..200).map(|i| format!("token{i}")).collect();
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", "llama");
    metadata.set("general.alignment", 64u32);
    metadata.set("llama.block_count", 1u32);
    metadata.set("llama.attention.head_count", 2u32);
    metadata.set("llama.attention.head_count_kv", 1u32);
    metadata.set("llama.rope.freq_base", 10000f32);
    let texts = Array::strings(tokens.iter().map(String::as_str));
    metadata.set("tokenizer.ggml.tokens", texts);
    let kinds = Array::new(ValueType::I32, (0..200).map(Value::I32));
    metadata.set("tokenizer.ggml.token_type", kinds.unwrap());
    let tensors = vec![
        entry("token_embd.weight", "bf16", &[8, 32]),
        entry("blk.0.attn_norm.weight", "f32", &[32]),
        entry("blk.0.attn_q.weight", "q4_1", &[8, 32]),
        entry("blk.0.attn_k.weight", "q8_0", &[4, 32]),
        entry("blk.0.attn_q.bias", "f32", &[8]),
    ];
    file(metadata, tensors)
}

/// A tensor of every type, and a value of every kind.
fn everything() -> Vec<u8> {
    let inner = Array::new(ValueType::Bool, [true.into(), false.into()]).unwrap();
    let nested = Array::new(
        ValueType::Array,
        [inner.into(), Array::strings(["x"]).into()],
    );
    let mut metadata = Metadata::default();
    for (i, value) in [
        Value::U8(1),
        Value::I8(-1),
        Value::U16(1),
        Value::I16(-1),
        Value::U32(1),
        Value::I32(-1),
        Value::F32(1.0),
        Value::U64(1),
        Value::I64(-1),
        Value::F64(1.0),
        true.into(),
        "text".into(),
        nested.unwrap().into(),
    ]
    .into_iter()
    .enumerate()
    {
        metadata.set(format!("key.{i}"), value);
    }
    let tensors = GGML_TYPES
        .iter()
        .map(|t| entry(&format!("{}.weight", t.name), t.name, &[2, t.block_len]))
        .collect();
    file(metadata, tensors)
}

#[test]
fn damaged_files_do_no_harm() {
    let mut older = llama();
    older[4] = 2;
    let seeds = [
        llama(),
        everything(),
        older,
        file(Metadata::default(), vec![]),
    ];
    mutation::open_damaged("damaged.gguf", &seeds);
}
