//! Scales that are folded into the operation before leave what a model computes as
//! it was, whatever that operation is.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::json;
use viva_core::Error;
use viva_core::calibration::{Calibration, Recorded, Statistics};
use viva_core::content::{self, Read};
use viva_core::format::OptionValue;
use viva_core::io::{Checkpoint, EntryDType, FixedEntry, ShardWriter};
use viva_core::method::fold::{self, Observed};
use viva_core::ops::Cancel;
use viva_core::ops::output_error;
use viva_core::tensor::{DType, Tensor};
use viva_core::unit::{self, Planned, Target};

mod support;

use support::{dequantized, f32_tensor, float_tensor, gaussian, int, name};

const HIDDEN: usize = 64;
const INNER: usize = 128;
const HEADS: usize = 4;
const TOKENS: usize = 24;

type Weights = HashMap<String, Tensor>;

fn matrix(seed: u64, rows: usize, columns: usize) -> Tensor {
    let values: Vec<f32> = gaussian(rows * columns, seed)
        .iter()
        .map(|v| v / (columns as f32).sqrt())
        .collect();
    float_tensor(DType::BF16, &[rows, columns], &values)
}

/// Norms with channels far larger than the others: what scales are for.
fn vector(seed: u64, n: usize) -> Tensor {
    let values: Vec<f32> = gaussian(n, seed)
        .iter()
        .enumerate()
        .map(|(i, v)| (1.0 + 0.3 * v) * if i % 13 == 5 { 6.0 } else { 1.0 })
        .collect();
    float_tensor(DType::BF16, &[n], &values)
}

fn layer(fused: bool, values: usize) -> Weights {
    let mut all = Weights::new();
    let mut add = |name: &str, tensor| all.insert(format!("model.layers.0.{name}"), tensor);
    add("input_layernorm.weight", vector(1, HIDDEN));
    add("post_attention_layernorm.weight", vector(2, HIDDEN));
    if fused {
        add("self_attn.qkv_proj.weight", matrix(3, 3 * HIDDEN, HIDDEN));
        add("mlp.gate_up_proj.weight", matrix(4, 2 * INNER, HIDDEN));
    } else {
        add("self_attn.q_proj.weight", matrix(5, HIDDEN, HIDDEN));
        add("self_attn.k_proj.weight", matrix(6, values, HIDDEN));
        add("self_attn.v_proj.weight", matrix(7, values, HIDDEN));
        add("self_attn.v_proj.bias", vector(8, values));
        add("mlp.gate_proj.weight", matrix(9, INNER, HIDDEN));
        add("mlp.up_proj.weight", matrix(10, INNER, HIDDEN));
    }
    add("self_attn.o_proj.weight", matrix(11, HIDDEN, HIDDEN));
    add("mlp.down_proj.weight", matrix(12, HIDDEN, INNER));
    all
}

/// x · wᵀ + b.
fn linear(w: &Tensor, bias: Option<&Tensor>, x: &[f32]) -> Vec<f32> {
    let k = w.row_len();
    let w = w.to_f32_vec();
    let bias = bias.map(Tensor::to_f32_vec);
    let mut out = Vec::new();
    for x in x.chunks_exact(k) {
        for (i, w) in w.chunks_exact(k).enumerate() {
            let y: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            out.push(y + bias.as_ref().map_or(0.0, |b| b[i]));
        }
    }
    out
}

fn norm(w: &Tensor, x: &[f32]) -> Vec<f32> {
    let w = w.to_f32_vec();
    let row = |x: &[f32]| {
        let mean = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
        let by = 1.0 / (mean + 1e-6).sqrt();
        x.iter()
            .zip(&w)
            .map(|(x, w)| x * by * w)
            .collect::<Vec<_>>()
    };
    x.chunks_exact(HIDDEN).flat_map(row).collect()
}

fn columns(x: &[f32], row: usize, from: usize, to: usize) -> Vec<f32> {
    x.chunks_exact(row)
        .flat_map(|x| x[from..to].to_vec())
        .collect()
}

/// Causal attention of all heads; rotary positions would change nothing here.
fn attention(q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
    let size = HIDDEN / HEADS;
    let mut out = vec![0f32; TOKENS * HIDDEN];
    for t in 0..TOKENS {
        for head in 0..HEADS {
            let at =
                |token: usize| token * HIDDEN + head * size..token * HIDDEN + (head + 1) * size;
            let score = |u: usize| -> f32 {
                let products = q[at(t)].iter().zip(&k[at(u)]).map(|(q, k)| q * k);
                products.sum::<f32>() / (size as f32).sqrt()
            };
            let scores: Vec<f32> = (0..=t).map(score).collect();
            let most = scores.iter().copied().fold(f32::MIN, f32::max);
            let scores: Vec<f32> = scores.iter().map(|s| (s - most).exp()).collect();
            let total: f32 = scores.iter().sum();
            for (u, score) in scores.iter().enumerate() {
                for (out, v) in out[at(t)].iter_mut().zip(&v[at(u)]) {
                    *out += score / total * v;
                }
            }
        }
    }
    out
}

/// A layer of a Llama, or of a Phi-3; `met` sees the input of every module.
fn forward(all: &Weights, x: &[f32], met: &mut dyn FnMut(&str, usize, &[f32])) -> Vec<f32> {
    let get = |name: &str| all.get(&format!("model.layers.0.{name}"));
    let mut run = |module: &str, x: &[f32]| {
        let w = get(&format!("{module}.weight")).unwrap();
        met(&format!("model.layers.0.{module}"), w.row_len(), x);
        linear(w, get(&format!("{module}.bias")), x)
    };
    let add = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x + y).collect::<Vec<f32>>();
    let normed = norm(get("input_layernorm.weight").unwrap(), x);
    let (q, k, v) = match get("self_attn.qkv_proj.weight") {
        Some(_) => {
            let all = run("self_attn.qkv_proj", &normed);
            let part = |i: usize| columns(&all, 3 * HIDDEN, i * HIDDEN, (i + 1) * HIDDEN);
            (part(0), part(1), part(2))
        }
        None => (
            run("self_attn.q_proj", &normed),
            run("self_attn.k_proj", &normed),
            run("self_attn.v_proj", &normed),
        ),
    };
    let x = add(x, &run("self_attn.o_proj", &attention(&q, &k, &v)));
    let normed = norm(get("post_attention_layernorm.weight").unwrap(), &x);
    let (gate, up) = match get("mlp.gate_up_proj.weight") {
        Some(_) => {
            let both = run("mlp.gate_up_proj", &normed);
            let part = |i: usize| columns(&both, 2 * INNER, i * INNER, (i + 1) * INNER);
            (part(0), part(1))
        }
        None => (run("mlp.gate_proj", &normed), run("mlp.up_proj", &normed)),
    };
    let inner: Vec<f32> = gate
        .iter()
        .zip(&up)
        .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
        .collect();
    add(&x, &run("mlp.down_proj", &inner))
}

fn save(dir: &Path, model_type: &str, all: &Weights) -> Checkpoint {
    let config = json!({ "model_type": model_type }).to_string();
    std::fs::write(dir.join("config.json"), config).unwrap();
    let mut names: Vec<&String> = all.keys().collect();
    names.sort();
    let entries = names.iter().map(|name| FixedEntry {
        name: (*name).clone(),
        dtype: EntryDType::Known(all[*name].dtype()),
        shape: all[*name].shape().to_vec(),
    });
    let path = dir.join("model.safetensors");
    let file = ShardWriter::create(&path, entries.collect(), Vec::new(), BTreeMap::new()).unwrap();
    for name in names {
        file.write(name, all[name].bytes()).unwrap();
    }
    file.finish().unwrap();
    Checkpoint::open(dir).unwrap()
}

fn target(method: &str) -> Target {
    let mut options = vec![
        ("method".to_string(), name(method)),
        ("symmetric".into(), OptionValue::Bool(false)),
        ("block_size".into(), int(32)),
    ];
    if method == "awq" {
        options.push(("clip".into(), OptionValue::Bool(false)));
    }
    Target::resolve("int8", options, Some("gptq")).unwrap()
}

fn quantized(source: &Checkpoint) -> Vec<String> {
    let names = source.entries().map(|e| e.name.clone());
    names.filter(|n| n.ends_with("_proj.weight")).collect()
}

/// Everything that a job does, one step after the other; what the written model
/// computes with.
fn compress(source: &Checkpoint, target: &Target, seen: Calibration) -> (Weights, Vec<u8>, usize) {
    let cancel = Cancel::new();
    let observed = Observed::new(Recorded::Memory(seen));
    let names = quantized(source);
    let groups = fold::groups(source, target, &names).groups;
    // Any order, and a second time.
    for group in groups.iter().chain(groups.iter().rev()) {
        if let Some(scales) = observed.search(source, target, group, &cancel).unwrap() {
            observed.fold(source, group, scales).unwrap();
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let planned = source.entries().map(|e| Planned {
        name: e.name.clone(),
        quantize: names.contains(&e.name),
    });
    let planned = planned.collect();
    let shard = unit::create_shard(&path, source, Some(target), planned, BTreeMap::new()).unwrap();
    for entry in source.entries() {
        let seen = Some(&observed);
        match names.contains(&entry.name) {
            true => {
                let done = unit::quantize_into(source, &entry.name, target, seen, &shard, &cancel)
                    .unwrap();
                assert!(done.output_error.unwrap() < 0.02, "{}", entry.name);
            }
            false => {
                unit::keep_into(source, &entry.name, Some(target), seen, &shard, &cancel).unwrap();
            }
        }
    }
    shard.finish().unwrap();
    let written = Checkpoint::open(&path).unwrap();
    let read = source.entries().map(|e| {
        let tensor = match content::read(&written, &e.name).unwrap() {
            Read::Quantized(q) => dequantized(&q, DType::F32),
            Read::Dense(tensor) => tensor,
        };
        (e.name.clone(), tensor)
    });
    (read.collect(), std::fs::read(&path).unwrap(), groups.len())
}

fn relative(exact: &[f32], other: &[f32]) -> f32 {
    let noise: f32 = exact.iter().zip(other).map(|(a, b)| (a - b).powi(2)).sum();
    (noise / exact.iter().map(|a| a * a).sum::<f32>()).sqrt()
}

#[test]
fn a_folded_model_computes_what_it_did() {
    let x = gaussian(TOKENS * HIDDEN, 20);
    for (model_type, fused) in [("qwen2", false), ("phi3", true)] {
        let all = layer(fused, HIDDEN);
        let mut seen = Calibration::new(TOKENS);
        let exact = forward(&all, &x, &mut |module, k, x| {
            let x = f32_tensor(&[x.len() / k, k], x);
            let statistics = Statistics::of(&x, TOKENS, &Cancel::new()).unwrap();
            seen.add(module, statistics).unwrap();
        });
        let dir = tempfile::tempdir().unwrap();
        let source = save(dir.path(), model_type, &all);
        for method in ["smoothquant", "awq"] {
            let (written, bytes, groups) = compress(&source, &target(method), seen.clone());
            assert_eq!(groups, 4, "{model_type}");
            let folded = written
                .iter()
                .filter(|(name, w)| w.to_f32_vec() != all[*name].to_f32_vec())
                .filter(|(name, _)| name.contains("norm") || name.contains("bias"));
            assert_eq!(
                folded.count(),
                if fused { 2 } else { 3 },
                "{model_type} {method}"
            );
            // Codes of 8 bits leave little error; a scale that is not undone, much.
            let off = relative(&exact, &forward(&written, &x, &mut |_, _, _| {}));
            assert!(off < 0.02, "{model_type} {method}: {off}");
            assert_eq!(compress(&source, &target(method), seen.clone()).1, bytes);
        }
    }
}

#[test]
fn what_cannot_fold_says_why() {
    let groups = |model_type: &str, all: &Weights, kept: &str| {
        let dir = tempfile::tempdir().unwrap();
        let source = save(dir.path(), model_type, all);
        let mut names = quantized(&source);
        names.retain(|name| kept.is_empty() || !name.contains(kept));
        fold::groups(&source, &target("awq"), &names)
    };
    let why = |found: fold::Groups, module: &str| {
        let mut reasons = found.unscaled.into_iter();
        let found = reasons.find(|(name, _)| name.contains(module));
        found.unwrap_or_else(|| panic!("{module} is scaled")).1
    };
    let grouped = layer(false, HIDDEN / 2);
    let found = groups("llama", &grouped, "");
    assert_eq!(found.groups.len(), 3);
    assert!(why(found, "o_proj").contains("several of its columns"));
    let found = groups("llama", &layer(false, HIDDEN), "k_proj");
    assert!(why(found, "q_proj").contains("k_proj, which reads the same, is kept"));
    let found = groups("llama", &layer(false, HIDDEN), "up_proj");
    assert!(why(found, "down_proj").contains("up_proj, which would take its scales, is kept"));
    // Its norms multiply by 1 + w.
    let found = groups("gemma", &layer(false, HIDDEN), "");
    assert!(found.groups.is_empty());
    assert!(why(found, "q_proj").contains("gemma"));
    let mut headless = layer(false, HIDDEN);
    headless.remove("model.layers.0.input_layernorm.weight");
    assert!(why(groups("llama", &headless, ""), "v_proj").contains("no input_layernorm"));
    // Methods that scale nothing have no groups, and nothing to say.
    let dir = tempfile::tempdir().unwrap();
    let source = save(dir.path(), "llama", &grouped);
    let found = fold::groups(&source, &target("gptq"), &quantized(&source));
    assert!(found.groups.is_empty() && found.unscaled.is_empty());
}

#[test]
fn a_group_with_a_weight_that_is_not_finite_is_not_folded() {
    let mut all = layer(false, HIDDEN);
    let mut values = all["model.layers.0.mlp.up_proj.weight"].to_f32_vec();
    values[7] = f32::NAN;
    let poisoned = float_tensor(DType::BF16, &[INNER, HIDDEN], &values);
    all.insert("model.layers.0.mlp.up_proj.weight".into(), poisoned);
    let dir = tempfile::tempdir().unwrap();
    let source = save(dir.path(), "llama", &all);
    let target = target("awq");
    let x = f32_tensor(&[TOKENS, INNER], &gaussian(TOKENS * INNER, 3));
    let statistics = Statistics::of(&x, TOKENS, &Cancel::new()).unwrap();
    let mut seen = Calibration::new(TOKENS);
    seen.add("model.layers.0.mlp.down_proj", statistics)
        .unwrap();
    let observed = Observed::new(Recorded::Memory(seen));
    let groups = fold::groups(&source, &target, &quantized(&source)).groups;
    let down = groups.iter().find(|g| g.readers[0].contains("down_proj"));
    let error = observed
        .search(&source, &target, down.unwrap(), &Cancel::new())
        .unwrap_err();
    assert!(matches!(error, Error::NonFinite { nan: 1, .. }), "{error}");
    assert!(
        observed
            .vector("model.layers.0.post_attention_layernorm.weight")
            .is_none()
    );
}

#[test]
fn a_file_gives_what_memory_gives() {
    let x = f32_tensor(&[TOKENS, HIDDEN], &gaussian(TOKENS * HIDDEN, 5));
    let statistics = Statistics::of(&x, 8, &Cancel::new()).unwrap();
    let mut seen = Calibration::new(8);
    seen.add("a.q_proj", statistics).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seen.safetensors");
    seen.save(&path).unwrap();
    let memory = Recorded::Memory(seen);
    let file = Recorded::open(&path).unwrap();
    for recorded in [&memory, &file] {
        assert_eq!(recorded.layers(), [("a.q_proj", HIDDEN)]);
        assert_eq!(recorded.tokens("a.q_proj").unwrap(), TOKENS as u64);
        let Err(Error::UnknownTensor { hint, .. }) = recorded.layer("a.k_proj") else {
            panic!("no such layer");
        };
        assert!(hint.contains("q_proj"), "{hint}");
    }
    let (a, b) = (
        memory.layer("a.q_proj").unwrap(),
        file.layer("a.q_proj").unwrap(),
    );
    assert_eq!(a.samples(), b.samples());
    assert_eq!(a.mean_abs(), b.mean_abs());
    assert!(a.gram().diagonal().eq(b.gram().diagonal()));
    let w = f32_tensor(&[4, HIDDEN], &gaussian(4 * HIDDEN, 6));
    assert_eq!(
        output_error::dense(&w, &w, &x, &Cancel::new()).unwrap(),
        0.0
    );
}
