//! The hyper-parameters of the Llama family: `config.json` and GGUF's metadata.

use serde_json::{Map, Value as Json, json};

use super::names::Rotated;
use crate::io::gguf::{Metadata, Value};

/// What llama.cpp calls the architecture; `llama.` begins its keys.
pub(super) const ARCHITECTURE: &str = "llama";

/// The `model_type`s whose code in `transformers` computes the same.
const MODEL_TYPES: [&str; 2] = ["llama", "mistral"];

/// Whole numbers of `config.json`, their keys after `llama.`, and whether a
/// model cannot be without them.
const COUNTS: [(&str, &str, bool); 7] = [
    ("num_hidden_layers", "block_count", true),
    ("max_position_embeddings", "context_length", true),
    ("hidden_size", "embedding_length", true),
    ("intermediate_size", "feed_forward_length", true),
    ("num_attention_heads", "attention.head_count", true),
    ("num_key_value_heads", "attention.head_count_kv", false),
    ("vocab_size", "vocab_size", true),
];

const RMS_EPS: &str = "attention.layer_norm_rms_epsilon";
const ROPE_BASE: &str = "rope.freq_base";
const ROPE_DIMENSIONS: &str = "rope.dimension_count";
const SCALING: &str = "rope.scaling";

/// Base of rotary embeddings where a configuration says nothing.
const DEFAULT_THETA: f64 = 10000.0;

fn key(name: &str) -> String {
    format!("{ARCHITECTURE}.{name}")
}

fn count(config: &Json, name: &str) -> Result<Option<u32>, String> {
    match config.get(name) {
        None | Some(Json::Null) => Ok(None),
        Some(v) => v
            .as_u64()
            .and_then(|v| u32::try_from(v).ok())
            .map(Some)
            .ok_or_else(|| format!("{name} is {v}, not a count")),
    }
}

fn needed(config: &Json, name: &str) -> Result<u32, String> {
    count(config, name)?.ok_or_else(|| format!("{name} is missing"))
}

fn number(config: &Json, name: &str) -> Option<f64> {
    config.get(name).and_then(Json::as_f64)
}

/// Rows of one attention head.
fn head_size(config: &Json) -> Result<u32, String> {
    if let Some(size) = count(config, "head_dim")? {
        return Ok(size);
    }
    let heads = needed(config, "num_attention_heads")?.max(1);
    Ok(needed(config, "hidden_size")? / heads)
}

/// Heads of a projection that is turned by position.
pub(super) fn heads(config: &Json, rotated: Rotated) -> Result<usize, String> {
    let queries = needed(config, "num_attention_heads")?;
    let heads = match rotated {
        Rotated::Query => queries,
        Rotated::Key => count(config, "num_key_value_heads")?.unwrap_or(queries),
    };
    Ok(heads as usize)
}

/// How positions are scaled, in the newest spelling of `config.json` or an older one.
struct Rope<'a> {
    theta: f64,
    kind: &'a str,
    parameters: &'a Json,
}

fn rope(config: &Json) -> Rope<'_> {
    let given = |name| config.get(name).filter(|v| v.is_object());
    let parameters = given("rope_parameters").or_else(|| given("rope_scaling"));
    let parameters = parameters.unwrap_or(&Json::Null);
    let kind = ["rope_type", "type"]
        .iter()
        .find_map(|k| parameters.get(k)?.as_str());
    Rope {
        theta: number(parameters, "rope_theta")
            .or_else(|| number(config, "rope_theta"))
            .unwrap_or(DEFAULT_THETA),
        kind: kind.unwrap_or("default"),
        parameters,
    }
}

/// The keys and values that llama.cpp wants of a model with this
/// `config.json`, or what of it has no spelling there.
pub(super) fn metadata(config: &Json) -> Result<Vec<(String, Value)>, String> {
    let model_type = config.get("model_type").and_then(Json::as_str);
    if !model_type.is_some_and(|t| MODEL_TYPES.contains(&t)) {
        return Err(format!(
            "its model_type is {}; this layout knows {}",
            model_type.unwrap_or("missing"),
            MODEL_TYPES.join(" and ")
        ));
    }
    // llama.cpp's llama has no other.
    if let Some(act) = config.get("hidden_act").filter(|v| *v != "silu") {
        return Err(format!(
            "its hidden_act is {act}, where llama.cpp computes silu"
        ));
    }
    let mut pairs = Vec::new();
    for (name, theirs, is_needed) in COUNTS {
        match count(config, name)? {
            Some(v) => pairs.push((key(theirs), v.into())),
            None if is_needed => return Err(format!("{name} is missing")),
            None => {}
        }
    }
    let eps = number(config, "rms_norm_eps").ok_or("rms_norm_eps is missing")?;
    let rope = rope(config);
    pairs.push((key(RMS_EPS), (eps as f32).into()));
    pairs.push((key(ROPE_BASE), (rope.theta as f32).into()));
    pairs.push((key(ROPE_DIMENSIONS), head_size(config)?.into()));
    if let Some(size) = count(config, "head_dim")? {
        pairs.push((key("attention.key_length"), size.into()));
        pairs.push((key("attention.value_length"), size.into()));
    }
    match rope.kind {
        // The factors of llama3 are a tensor: see `rope_factors`.
        "default" | "llama3" => {}
        "linear" => {
            let factor = number(rope.parameters, "factor").ok_or("rope factor is missing")?;
            pairs.push((key(&format!("{SCALING}.type")), "linear".into()));
            pairs.push((key(&format!("{SCALING}.factor")), (factor as f32).into()));
        }
        other => return Err(format!("its rope_type {other:?} has no spelling here")),
    }
    Ok(pairs)
}

/// The `config.json` of a Llama with this metadata. What the metadata does not
/// say – the dtype, whether the head is tied – is left out.
pub(super) fn config(metadata: &Metadata) -> Option<Json> {
    let architecture = metadata.get("general.architecture")?.as_str()?;
    if architecture != ARCHITECTURE {
        return None;
    }
    let get = |name: &str| metadata.get(&key(name));
    let mut config = Map::new();
    config.insert("architectures".into(), json!(["LlamaForCausalLM"]));
    config.insert("model_type".into(), json!("llama"));
    config.insert("hidden_act".into(), json!("silu"));
    for (ours, theirs, _) in COUNTS {
        if let Some(v) = get(theirs).and_then(Value::as_u64) {
            config.insert(ours.into(), json!(v));
        }
    }
    if let Some(v) = get("attention.key_length").and_then(Value::as_u64) {
        config.insert("head_dim".into(), json!(v));
    }
    if let Some(v) = get(RMS_EPS) {
        config.insert("rms_norm_eps".into(), shortest(v));
    }
    let mut rope = Map::from_iter([("rope_type".to_string(), json!("default"))]);
    let theta = get(ROPE_BASE).map_or(json!(DEFAULT_THETA), shortest);
    rope.insert("rope_theta".into(), theta);
    let linear = get(&format!("{SCALING}.type")).and_then(Value::as_str) == Some("linear");
    if let (true, Some(factor)) = (linear, get(&format!("{SCALING}.factor"))) {
        rope.insert("rope_type".into(), json!("linear"));
        rope.insert("factor".into(), shortest(factor));
    }
    config.insert("rope_parameters".into(), Json::Object(rope));
    for name in ["bos", "eos"] {
        let id = metadata.get(&format!("tokenizer.ggml.{name}_token_id"));
        if let Some(id) = id.and_then(Value::as_u64) {
            config.insert(format!("{name}_token_id"), json!(id));
        }
    }
    Some(Json::Object(config))
}

/// The number with the fewest digits that is this one in f32: 1e-5, not
/// 9.999999747378752e-6.
fn shortest(value: &Value) -> Json {
    match value {
        Value::F32(v) => v
            .to_string()
            .parse::<f64>()
            .map_or(Json::Null, |v| json!(v)),
        other => other.as_f64().map_or(Json::Null, |v| json!(v)),
    }
}

/// What llama3's scaling divides the frequency of each pair of rows by: the
/// tensor `rope_freqs.weight`. `None` for every other kind of scaling.
pub(super) fn rope_factors(config: &Json) -> Result<Option<Vec<f32>>, String> {
    let rope = rope(config);
    if rope.kind != "llama3" {
        return Ok(None);
    }
    let or = |name, default| number(rope.parameters, name).unwrap_or(default);
    let factor = or("factor", 8.0);
    let (low, high) = (or("low_freq_factor", 1.0), or("high_freq_factor", 4.0));
    let context = or("original_max_position_embeddings", 8192.0);
    let size = head_size(config)?;
    let factors = (0..size).step_by(2).map(|i| {
        // In the precision of the program that defined it.
        let exponent = i as f32 / size as f32;
        let frequency = 1.0 / (rope.theta as f32).powf(exponent);
        let wavelength = 2.0 * std::f64::consts::PI / f64::from(frequency);
        if wavelength < context / high {
            1.0
        } else if wavelength > context / low {
            factor as f32
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
        }
    });
    Ok(Some(factors.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Json {
        json!({
            "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 6,
            "max_position_embeddings": 1024, "hidden_size": 256, "intermediate_size": 768,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
            "head_dim": 64, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        })
    }

    fn with(name: &str, value: Json) -> Json {
        let mut config = sample();
        config[name] = value;
        config
    }

    #[test]
    fn hyper_parameters_are_translated_both_ways() {
        let linear = json!({"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0});
        for config in [sample(), with("rope_parameters", linear)] {
            let mut written: Metadata = metadata(&config).unwrap().into_iter().collect();
            assert!(super::config(&written).is_none());
            written.set("general.architecture", "llama");
            let mut read = super::config(&written).unwrap();
            assert_eq!(read["architectures"], json!(["LlamaForCausalLM"]));
            read.as_object_mut().unwrap().remove("architectures");
            assert_eq!(read, config);
        }
    }

    #[test]
    fn older_spellings_say_the_same() {
        let mut older = with("rope_theta", json!(10000.0));
        older.as_object_mut().unwrap().remove("rope_parameters");
        assert_eq!(metadata(&older), metadata(&sample()));
        older["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
        let newer = json!({"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0});
        assert_eq!(metadata(&older), metadata(&with("rope_parameters", newer)));
    }

    #[test]
    fn heads_and_their_size() {
        assert_eq!(heads(&sample(), Rotated::Query), Ok(4));
        assert_eq!(heads(&sample(), Rotated::Key), Ok(2));
        let mut plain = sample();
        for name in ["head_dim", "num_key_value_heads"] {
            plain.as_object_mut().unwrap().remove(name);
        }
        assert_eq!(heads(&plain, Rotated::Key), Ok(4));
        assert_eq!(head_size(&plain), Ok(64));
    }

    #[test]
    fn what_llama_cpp_cannot_be_told_is_refused() {
        for (name, value, words) in [
            ("model_type", json!("gpt2"), "its model_type is gpt2"),
            ("model_type", Json::Null, "its model_type is missing"),
            ("hidden_act", json!("gelu"), "hidden_act is \"gelu\""),
            ("hidden_size", Json::Null, "hidden_size is missing"),
            ("hidden_size", json!(-1), "hidden_size is -1, not a count"),
            ("rms_norm_eps", Json::Null, "rms_norm_eps is missing"),
            (
                "rope_parameters",
                json!({"rope_type": "yarn"}),
                "rope_type \"yarn\"",
            ),
        ] {
            let message = metadata(&with(name, value)).unwrap_err();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn llama3_divides_low_frequencies() {
        assert_eq!(rope_factors(&sample()), Ok(None));
        let llama3 = json!({
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        });
        let factors = rope_factors(&with("rope_parameters", llama3))
            .unwrap()
            .unwrap();
        assert_eq!(factors.len(), 32);
        assert_eq!((factors[0], factors[31]), (1.0, 32.0));
        assert!(factors.is_sorted());
    }
}
