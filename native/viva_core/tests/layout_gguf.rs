//! A whole model as a GGUF file: what is written, and that it is read again.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use tempfile::TempDir;
use viva_core::Error;
use viva_core::content::{self, Read};
use viva_core::format::Quantized;
use viva_core::formats::ggml_types::GgmlType;
use viva_core::io::gguf::{Metadata, Value};
use viva_core::io::{Checkpoint, FixedEntry, ShardWriter};
use viva_core::layout;
use viva_core::ops::Cancel;
use viva_core::tensor::{DType, Tensor};
use viva_core::unit::{self, Planned, Target};

use support::{f32_tensor, float_tensor, gaussian, make, quantized};

const TINY: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../examples/models/viva-tiny"
);

fn target(format: &str) -> Target {
    let (spec, layout) = layout::resolve(format, &[], Some("gguf")).unwrap();
    Target {
        spec,
        layout,
        calibrated: None,
    }
}

/// Writes `source` as a GGUF file whose projections of layers are quantized.
fn write(source: &Checkpoint, format: &str) -> viva_core::Result<(TempDir, PathBuf)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let target = target(format);
    target.check_source(source)?;
    let quantize = |name: &str| {
        let projection = name.contains("_proj.") || name.contains("attn_q.");
        projection && name.ends_with("weight")
    };
    let planned = source.entries().map(|e| Planned {
        name: e.name.clone(),
        quantize: quantize(&e.name),
    });
    let planned = planned.collect();
    let shard = unit::create_shard(&path, source, Some(&target), planned, BTreeMap::new())?;
    for entry in source.entries() {
        let (name, cancel) = (&entry.name, Cancel::new());
        let done = match quantize(name) {
            true => unit::quantize_into(source, name, &target, None, &shard, &cancel)?,
            false => unit::keep_into(source, name, Some(&target), None, &shard, &cancel)?,
        };
        assert_eq!(done.elements, entry.shape.iter().product::<usize>());
        assert_eq!(done.input_bytes, entry.nbytes());
    }
    shard.finish()?;
    Ok((dir, path))
}

fn read_quantized(checkpoint: &Checkpoint, name: &str) -> Quantized {
    match content::read(checkpoint, name).unwrap() {
        Read::Quantized(q) => q,
        Read::Dense(t) => panic!("{name} is {t:?}"),
    }
}

fn read_dense(checkpoint: &Checkpoint, name: &str) -> Tensor {
    match content::read(checkpoint, name).unwrap() {
        Read::Dense(tensor) => tensor,
        Read::Quantized(q) => panic!("{name} is {}", q.spec.format),
    }
}

#[test]
fn a_model_is_the_same_under_both_names() {
    let source = Checkpoint::open(TINY).unwrap();
    for format in ["q8_0", "q4_k"] {
        let (_dir, path) = write(&source, format).unwrap();
        let written = Checkpoint::open(&path).unwrap();
        assert_eq!(written.len(), source.len());
        let spec = make(format, &[]);
        for entry in source.entries() {
            let original = source.tensor(&entry.name).unwrap();
            if entry.name.contains("_proj.") {
                let read = read_quantized(&written, &entry.name);
                let direct = quantized(&original, &spec);
                assert_eq!(
                    read.parts[0].1.bytes(),
                    direct.parts[0].1.bytes(),
                    "{}",
                    entry.name
                );
                assert_eq!((&read.shape, &read.spec), (&direct.shape, &spec));
            } else {
                let read = read_dense(&written, &entry.name);
                assert_eq!(read.to_f32_vec(), original.to_f32_vec());
                let dtype = match entry.shape.len() {
                    1 => DType::F32,
                    _ => original.dtype(),
                };
                assert_eq!((read.dtype(), read.shape()), (dtype, original.shape()));
            }
        }
    }
}

#[test]
fn queries_and_keys_have_the_rows_of_llama_cpp() {
    let source = Checkpoint::open(TINY).unwrap();
    let (_dir, path) = write(&source, "q8_0").unwrap();
    let written = Checkpoint::open(&path).unwrap();
    let half = 32;
    for (theirs, ours) in [
        (
            "blk.1.attn_q.weight",
            "model.layers.1.self_attn.q_proj.weight",
        ),
        (
            "blk.1.attn_k.weight",
            "model.layers.1.self_attn.k_proj.weight",
        ),
    ] {
        let (theirs, ours) = (
            read_quantized(&written, theirs),
            read_quantized(&written, ours),
        );
        let (theirs, ours) = (theirs.parts[0].1.clone(), ours.parts[0].1.clone());
        let row = theirs.shape()[1];
        let of = |t: &Tensor, i: usize| t.bytes()[i * row..(i + 1) * row].to_vec();
        // Row 2i + j of a head in the file is row i + j · d/2.
        for i in 0..theirs.shape()[0] {
            let (head, r) = (i / (2 * half), i % (2 * half));
            let from = head * 2 * half + r % 2 * half + r / 2;
            assert_eq!(of(&theirs, i), of(&ours, from));
        }
    }
    let (theirs, ours) = (
        "blk.1.attn_v.weight",
        "model.layers.1.self_attn.v_proj.weight",
    );
    let (theirs, ours) = (
        read_quantized(&written, theirs),
        read_quantized(&written, ours),
    );
    assert_eq!(theirs.parts[0].1.bytes(), ours.parts[0].1.bytes());
}

#[test]
fn the_file_says_what_llama_cpp_asks() {
    let source = Checkpoint::open(TINY).unwrap();
    let (_dir, path) = write(&source, "q8_0").unwrap();
    let written = Checkpoint::open(&path).unwrap();
    let metadata = written.gguf_metadata().unwrap();
    let expected: [(&str, Value); 22] = [
        ("general.architecture", "llama".into()),
        ("general.type", "model".into()),
        ("general.name", "viva-tiny".into()),
        ("general.file_type", 7u32.into()),
        ("general.quantization_version", 2u32.into()),
        ("llama.block_count", 2u32.into()),
        ("llama.context_length", 1024u32.into()),
        ("llama.embedding_length", 256u32.into()),
        ("llama.feed_forward_length", 512u32.into()),
        ("llama.attention.head_count", 4u32.into()),
        ("llama.attention.head_count_kv", 2u32.into()),
        ("llama.attention.key_length", 64u32.into()),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5f32.into()),
        ("llama.rope.freq_base", 10000f32.into()),
        ("llama.rope.dimension_count", 64u32.into()),
        ("llama.vocab_size", 1024u32.into()),
        ("tokenizer.ggml.model", "gpt2".into()),
        ("tokenizer.ggml.pre", "gpt-2".into()),
        ("tokenizer.ggml.bos_token_id", 0u32.into()),
        ("tokenizer.ggml.eos_token_id", 1u32.into()),
        ("tokenizer.ggml.add_bos_token", true.into()),
        ("tokenizer.ggml.add_eos_token", false.into()),
    ];
    for (key, value) in expected {
        assert_eq!(metadata.get(key), Some(&value), "{key}");
    }
    let array = |key: &str| -> Vec<Value> {
        metadata
            .get(key)
            .unwrap()
            .as_array()
            .unwrap()
            .iter()
            .collect()
    };
    let tokens = array("tokenizer.ggml.tokens");
    assert_eq!(tokens.len(), 1024);
    assert_eq!(tokens[..3], ["<s>".into(), "</s>".into(), "!".into()]);
    let kinds = array("tokenizer.ggml.token_type");
    assert_eq!(kinds[..3], [Value::I32(3), Value::I32(3), Value::I32(1)]);
    assert_eq!(array("tokenizer.ggml.merges")[0], "\u{120} t".into());

    // The configuration comes back, as far as the metadata says it.
    let read = layout::gguf::config(&written).unwrap();
    let own = source.config().unwrap();
    for key in [
        "hidden_size",
        "rope_parameters",
        "rms_norm_eps",
        "head_dim",
        "tie_word_embeddings",
    ] {
        assert_eq!(read[key], own[key], "{key}");
    }
}

#[test]
fn rows_that_long_blocks_do_not_divide_get_short_ones() {
    for (format, short) in [
        ("q2_k", "q4_0"),
        ("q3_k", "q4_0"),
        ("q4_k", "q5_0"),
        ("q5_k", "q5_1"),
        ("q6_k", "q8_0"),
        ("iq4_xs", "iq4_nl"),
    ] {
        let target = target(format);
        assert_eq!(target.spec_for(&[4, 512]).unwrap().format, format);
        assert_eq!(target.spec_for(&[4, 96]).unwrap().format, short);
        let name = "model.layers.0.mlp.up_proj.weight";
        let entries = target.entries(name, DType::F32.into(), &[4, 96]).unwrap();
        assert_eq!(entries.fixed[0].dtype.name(), short);
        assert_eq!(entries.fixed[0].name, "blk.0.ffn_up.weight");
        let refused = target
            .entries(name, DType::F32.into(), &[4, 48])
            .unwrap_err();
        assert!(
            matches!(refused, Error::Indivisible { row: 48, .. }),
            "{refused}"
        );
    }
    let norm = target("q8_0").entries("model.norm.weight", DType::F32.into(), &[32]);
    assert!(
        matches!(norm, Err(Error::LayoutMismatch { .. })),
        "{norm:?}"
    );

    let searched = [("method".to_string(), support::name("mse"))];
    let (spec, layout) = layout::resolve("q4_k", &searched, Some("gguf")).unwrap();
    let target = Target {
        spec,
        layout,
        calibrated: None,
    };
    assert_eq!(
        *target.spec_for(&[4, 96]).unwrap(),
        make("q5_0", &[("method", support::name("mse"))])
    );
}

/// A Llama of one layer with random weights, and its configuration and
/// tokenizer changed by `change`.
fn model(change: impl Fn(&mut Json, &mut Json), extra: &[(&str, &[usize])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let json = |name: &str| -> Json {
        let path = Path::new(TINY).join(name);
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    };
    let (mut config, mut tokenizer) = (json("config.json"), json("tokenizer.json"));
    config["head_dim"] = json!(8);
    config["hidden_size"] = json!(32);
    change(&mut config, &mut tokenizer);
    for (name, value) in [("config.json", config), ("tokenizer.json", tokenizer)] {
        if !value.is_null() {
            std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        }
    }
    let mut tensors: Vec<(&str, &[usize])> = vec![
        ("model.embed_tokens.weight", &[1024, 32]),
        ("model.layers.0.self_attn.q_proj.weight", &[32, 32]),
        ("model.layers.0.self_attn.q_proj.bias", &[32]),
        ("model.layers.0.self_attn.k_proj.weight", &[16, 32]),
        ("lm_head.weight", &[1024, 32]),
    ];
    tensors.extend_from_slice(extra);
    let fixed = tensors.iter().map(|(name, shape)| FixedEntry {
        name: name.to_string(),
        dtype: DType::F16.into(),
        shape: shape.to_vec(),
    });
    let path = dir.path().join("model.safetensors");
    let strings = BTreeMap::<String, String>::new();
    let writer = ShardWriter::create(path, fixed.collect(), vec![], strings).unwrap();
    for (i, (name, shape)) in tensors.iter().enumerate() {
        let values = gaussian(shape.iter().product(), i as u64);
        writer
            .write(name, float_tensor(DType::F16, shape, &values).bytes())
            .unwrap();
    }
    writer.finish().unwrap();
    dir
}

#[test]
fn biases_heads_and_derived_tables() {
    let inv_freq: (&str, &[usize]) = ("model.layers.0.self_attn.rotary_emb.inv_freq", &[4]);
    let llama3 = |config: &mut Json, _: &mut Json| {
        config["rope_parameters"] = json!({"rope_type": "llama3", "rope_theta": 500000.0});
        config["num_key_value_heads"] = json!(2);
    };
    let dir = model(llama3, &[inv_freq]);
    let source = Checkpoint::open(dir.path()).unwrap();
    let (_dir, path) = write(&source, "q8_0").unwrap();
    let written = Checkpoint::open(&path).unwrap();
    let names: Vec<&str> = written.entries().map(|e| e.name.as_str()).collect();
    assert!(names.contains(&"output.weight") && !names.iter().any(|n| n.contains("inv_freq")));
    let factors = written.tensor("rope_freqs.weight").unwrap();
    assert_eq!((factors.dtype(), factors.shape()), (DType::F32, &[4][..]));

    // The bias of a projection is turned with its rows, and is f32.
    let name = "model.layers.0.self_attn.q_proj.bias";
    let bias = source.tensor(name).unwrap().to_f32_vec();
    let stored = written.tensor("blk.0.attn_q.bias").unwrap();
    assert_eq!(stored.dtype(), DType::F32);
    assert_eq!(
        stored.to_f32_vec()[..4],
        [bias[0], bias[4], bias[1], bias[5]]
    );
    assert_eq!(read_dense(&written, name).to_f32_vec(), bias);
    // Two dimensions keep their dtype.
    assert_eq!(written.tensor("output.weight").unwrap().dtype(), DType::F16);
    let config = layout::gguf::config(&written).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);
}

#[test]
fn a_gguf_file_is_written_again_as_it_is() {
    let dir = model(|config, _| config["num_key_value_heads"] = json!(2), &[]);
    let source = Checkpoint::open(dir.path()).unwrap();
    let path = dir.path().join("float.gguf");
    // Everything kept: a GGUF file of floats.
    let target = target("q8_0");
    let planned = source.entries().map(|e| Planned {
        name: e.name.clone(),
        quantize: false,
    });
    let planned = planned.collect();
    let shard =
        unit::create_shard(&path, &source, Some(&target), planned, BTreeMap::new()).unwrap();
    for entry in source.entries() {
        unit::keep_into(
            &source,
            &entry.name,
            Some(&target),
            None,
            &shard,
            &Cancel::new(),
        )
        .unwrap();
    }
    shard.finish().unwrap();

    let float = Checkpoint::open(&path).unwrap();
    let (_again, again) = write(&float, "q4_0").unwrap();
    let again = Checkpoint::open(again).unwrap();
    let direct = float.tensor("blk.0.attn_q.weight").unwrap();
    let direct = quantized(&direct, &make("q4_0", &[]));
    let read = read_quantized(&again, "blk.0.attn_q.weight");
    assert_eq!(read.parts[0].1.bytes(), direct.parts[0].1.bytes());
    assert_eq!(
        again.bytes("token_embd.weight").unwrap(),
        float.bytes("token_embd.weight").unwrap()
    );
    let metadata = again.gguf_metadata().unwrap();
    assert_eq!(metadata.get("general.file_type"), Some(&2u32.into()));
    assert_eq!(
        metadata.get("tokenizer.ggml.tokens"),
        float.gguf_metadata().unwrap().get("tokenizer.ggml.tokens")
    );

    let error = self::target("q4_0").check_source(&again).unwrap_err();
    assert!(
        error.to_string().contains("quantized already (q4_0)"),
        "{error}"
    );

    // No layout within safetensors has a place for it.
    let (spec, layout) = layout::resolve("nf4", &[], None).unwrap();
    let error = Target {
        spec,
        layout,
        calibrated: None,
    }
    .check_source(&float)
    .unwrap_err();
    assert!(matches!(error, Error::LayoutMismatch { .. }), "{error}");
}

#[test]
fn models_that_llama_cpp_would_not_understand_are_refused() {
    let nothing = |_: &mut Json, _: &mut Json| {};
    let check = |dir: TempDir, words: &str| {
        let source = Checkpoint::open(dir.path()).unwrap();
        let error = target("q8_0")
            .check_source(&source)
            .unwrap_err()
            .to_string();
        assert!(error.contains(words), "{error}");
    };
    check(
        model(|c, _| c["model_type"] = json!("gpt2"), &[]),
        "its model_type is gpt2",
    );
    check(model(|c, _| *c = Json::Null, &[]), "has no config.json");
    check(model(|_, t| *t = Json::Null, &[]), "has no tokenizer.json");
    check(
        model(|c, _| c["num_attention_heads"] = json!(5), &[]),
        "32 rows are not 5 heads",
    );
    check(
        model(|c, _| c["vocab_size"] = json!(1000), &[]),
        "a token of id 1023",
    );
    check(
        model(nothing, &[("model.other.weight", &[2, 2])]),
        "has no name in llama.cpp's Llama",
    );
    check(
        model(|_, t| t["model"]["type"] = json!("Unigram"), &[]),
        "only byte-level BPE",
    );
    check(
        model(|_, t| t["model"]["byte_fallback"] = json!(true), &[]),
        "with byte_fallback",
    );
    check(
        model(|_, t| t["normalizer"] = json!({"type": "NFC"}), &[]),
        "its normalizer",
    );
    check(
        model(
            |_, t| t["pre_tokenizer"] = json!({"type": "Whitespace"}),
            &[],
        ),
        "no name for",
    );
}

/// The pairs of a model whose tokenizer and settings were changed so.
fn tokenizer_of(
    change: impl Fn(&mut Json, &mut Json),
    settings: Option<Json>,
) -> BTreeMap<String, Value> {
    let dir = model(change, &[]);
    if let Some(settings) = settings {
        std::fs::write(
            dir.path().join("tokenizer_config.json"),
            settings.to_string(),
        )
        .unwrap();
    }
    let source = Checkpoint::open(dir.path()).unwrap();
    let whole = target("q8_0").layout.whole_file().unwrap();
    let metadata = whole.metadata(&source, None).unwrap();
    let pairs = metadata.gguf().unwrap().iter();
    pairs.map(|(k, v)| (k.to_string(), v.clone())).collect()
}

#[test]
fn pre_tokenizers_have_llama_cpps_names() {
    let bytes =
        |words: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": words});
    let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let split = json!({"type": "Split", "pattern": {"Regex": llama3}, "behavior": "Isolated", "invert": false});
    let digits = json!({"type": "Digits", "individual_digits": true});
    for (steps, name) in [
        (json!([bytes(true)]), "gpt-2"),
        (json!([digits, bytes(true)]), "smollm"),
        (json!([split, bytes(false)]), "llama-bpe"),
    ] {
        let whole = json!({"type": "Sequence", "pretokenizers": steps});
        let pairs = tokenizer_of(|_, t| t["pre_tokenizer"] = whole.clone(), None);
        assert_eq!(pairs["tokenizer.ggml.pre"].as_str(), Some(name));
    }
}

#[test]
fn settings_beside_the_tokenizer_come_first() {
    let settings = json!({
        "bos_token": "</s>", "eos_token": {"content": "<s>"}, "unk_token": "<s>",
        "add_bos_token": false, "add_eos_token": true, "chat_template": "{{ messages }}",
    });
    let added = |_: &mut Json, t: &mut Json| {
        let tokens = t["added_tokens"].as_array_mut().unwrap();
        tokens.push(json!({"id": 1020, "content": "<|odd|>", "special": false}));
        tokens.push(json!({"id": 1021, "content": "\u{2581}plain", "special": false}));
        t["model"]["merges"][0] = json!("a b");
        t["model"]["merges"][1] = json!([" ", "c"]);
    };
    let pairs = tokenizer_of(added, Some(settings));
    let get = |key: &str| pairs[&format!("tokenizer.{key}")].clone();
    assert_eq!(get("ggml.bos_token_id"), 1u32.into());
    assert_eq!(get("ggml.eos_token_id"), 0u32.into());
    assert_eq!(get("ggml.unknown_token_id"), 0u32.into());
    assert_eq!(get("ggml.add_bos_token"), false.into());
    assert_eq!(get("ggml.add_eos_token"), true.into());
    assert_eq!(get("chat_template"), "{{ messages }}".into());
    let at = |key: &str, i: usize| get(key).as_array().unwrap().iter().nth(i).unwrap();
    assert_eq!(at("ggml.tokens", 1020), "<|odd|>".into());
    assert_eq!(at("ggml.token_type", 1020), Value::I32(3));
    assert_eq!(at("ggml.tokens", 1021), " plain".into());
    assert_eq!(at("ggml.token_type", 1021), Value::I32(4));
    assert_eq!(at("ggml.merges", 0), "a b".into());
    assert_eq!(at("ggml.merges", 1), "\u{120} c".into());
}

#[test]
fn rows_beyond_the_tokenizer_are_unused_tokens() {
    let wider = |c: &mut Json, _: &mut Json| {
        c["vocab_size"] = json!(1026);
        c["eos_token_id"] = json!([1, 5]);
    };
    let pairs = tokenizer_of(wider, None);
    let at = |key: &str| pairs[key].as_array().unwrap().iter().last().unwrap();
    assert_eq!(at("tokenizer.ggml.tokens"), "[PAD1025]".into());
    assert_eq!(at("tokenizer.ggml.token_type"), Value::I32(5));
    assert_eq!(pairs["tokenizer.ggml.eos_token_id"], 1u32.into());
}

#[test]
fn only_formats_of_ggml_fit() {
    let error = layout::resolve("nf4", &[], Some("gguf")).err().unwrap();
    assert!(
        error.to_string().contains("it holds the formats of ggml"),
        "{error}"
    );
    // A format that no other layout holds goes there by itself.
    let (_, chosen) = layout::resolve("q5_k", &[], None).unwrap();
    assert_eq!(chosen.name(), "gguf");
    let x = f32_tensor(&[1, 256], &gaussian(256, 1));
    assert_eq!(quantized(&x, &make("q6_k", &[])).nbytes(), 210);
}

#[test]
fn blocks_of_formats_that_are_not_ours_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let name = "blk.0.ffn_up.weight";
    let fixed = FixedEntry {
        name: name.into(),
        dtype: GgmlType::by_name("iq2_xxs").unwrap().into(),
        shape: vec![1, 256],
    };
    let writer = ShardWriter::create(&path, vec![fixed], vec![], Metadata::default()).unwrap();
    writer.write(name, &[0; 66]).unwrap();
    writer.finish().unwrap();
    let source = Checkpoint::open(&path).unwrap();
    assert_eq!(content::contents(&source).unwrap()[0].format, "iq2_xxs");
    let error = content::read(&source, name).err().unwrap().to_string();
    assert!(error.contains("is of ggml's type iq2_xxs"), "{error}");
}
