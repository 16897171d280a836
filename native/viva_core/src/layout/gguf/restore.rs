//! The files of a model directory that a GGUF file stands for: the tokenizer's,
//! and what of the configuration is told by a tensor.

use serde_json::{Map, Value as Json, json};

use super::llama;
use super::tokenizer::{CONTROL, SPLITS, UNUSED, USER_DEFINED};
use crate::io::gguf::{Metadata, Value};

/// Words that `tokenizer.ggml.pre` has for how texts are cut, where it is not by
/// an expression of [`SPLITS`].
const GPT_2: &str = "gpt-2";
const SMOLLM: &str = "smollm";

/// Tokenizers that take a word whole where it is a token.
const WHOLE_WORDS: [&str; 2] = ["llama-bpe", "tekken"];

/// `tokenizer.json` and `tokenizer_config.json` of a byte-level BPE tokenizer;
/// none for any other kind, of which a GGUF file does not tell enough.
pub(super) fn tokenizer(metadata: &Metadata) -> Vec<(&'static str, Json)> {
    let tokenizer = Restored::of(metadata);
    tokenizer.map_or(Vec::new(), |tokenizer| {
        vec![
            ("tokenizer.json", tokenizer.json()),
            ("tokenizer_config.json", tokenizer.settings()),
        ]
    })
}

struct Restored<'a> {
    metadata: &'a Metadata,
    pre: &'a str,
    tokens: Vec<String>,
    kinds: Vec<i64>,
}

impl<'a> Restored<'a> {
    fn of(metadata: &'a Metadata) -> Option<Restored<'a>> {
        let get = |key: &str| metadata.get(&format!("tokenizer.ggml.{key}"));
        if get("model")?.as_str()? != "gpt2" {
            return None;
        }
        let tokens = strings(get("tokens")?)?;
        let kinds = get("token_type").and_then(Value::as_array);
        let kinds = kinds.map(|kinds| {
            kinds.iter().map(|kind| match kind {
                Value::I32(kind) => i64::from(kind),
                other => other.as_u64().map_or(0, |kind| kind as i64),
            })
        });
        let restored = Restored {
            metadata,
            pre: get("pre").and_then(Value::as_str).unwrap_or(GPT_2),
            kinds: kinds.map_or_else(|| vec![1; tokens.len()], Iterator::collect),
            tokens,
        };
        (restored.kinds.len() == restored.tokens.len() && restored.cutter().is_some())
            .then_some(restored)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(&format!("tokenizer.ggml.{key}"))
    }

    /// How texts are cut into words.
    fn cutter(&self) -> Option<Json> {
        let bytes = |words: bool| {
            json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": words,
            })
        };
        let sequence =
            |first: Json, last: Json| json!({"type": "Sequence", "pretokenizers": [first, last]});
        match self.pre {
            GPT_2 => Some(bytes(true)),
            SMOLLM => Some(sequence(
                json!({"type": "Digits", "individual_digits": true}),
                bytes(true),
            )),
            pre => {
                let (regex, _) = SPLITS.iter().find(|(_, name)| *name == pre)?;
                let split = json!({
                    "type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
                    "invert": false,
                });
                Some(sequence(split, bytes(false)))
            }
        }
    }

    fn json(&self) -> Json {
        let numbered = || self.tokens.iter().zip(&self.kinds).enumerate();
        // Rows that no text reaches only fill the embedding up.
        let vocab: Map<String, Json> = numbered()
            .filter(|(_, (_, kind))| **kind != i64::from(UNUSED))
            .map(|(id, (token, _))| (token.clone(), json!(id)))
            .collect();
        let added: Vec<Json> = numbered()
            .filter(|(_, (_, kind))| {
                [CONTROL, USER_DEFINED]
                    .iter()
                    .any(|k| i64::from(*k) == **kind)
            })
            .map(|(id, (token, kind))| {
                json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": *kind == i64::from(CONTROL),
                })
            })
            .collect();
        let merges = self.get("merges").and_then(strings).unwrap_or_default();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": self.cutter(),
            "post_processor": self.template(),
            "decoder": {
                "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                "use_regex": true,
            },
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": WHOLE_WORDS.contains(&self.pre),
                "vocab": vocab,
                "merges": merges,
            },
        })
    }

    /// The token of that name, with its id.
    fn special(&self, name: &str) -> Option<(&str, u64)> {
        let id = self.get(&format!("{name}_token_id"))?.as_u64()?;
        let token = self.tokens.get(usize::try_from(id).ok()?)?;
        Some((token, id))
    }

    fn adds(&self, name: &str) -> bool {
        let key = format!("add_{name}_token");
        self.get(&key).and_then(Value::as_bool).unwrap_or(false)
    }

    /// What is put around a text.
    fn template(&self) -> Json {
        let of = |name: &str| self.special(name).filter(|_| self.adds(name));
        let (first, last) = (of("bos"), of("eos"));
        if first.is_none() && last.is_none() {
            return Json::Null;
        }
        let special =
            |token: &str, part: u8| json!({"SpecialToken": {"id": token, "type_id": part}});
        let around = |text: &str, part: u8| {
            let mut pieces = Vec::new();
            pieces.extend(first.map(|(token, _)| special(token, part)));
            pieces.push(json!({"Sequence": {"id": text, "type_id": part}}));
            pieces.extend(last.map(|(token, _)| special(token, part)));
            pieces
        };
        let used: Map<String, Json> = [first, last]
            .into_iter()
            .flatten()
            .map(|(token, id)| {
                let value = json!({"id": token, "ids": [id], "tokens": [token]});
                (token.to_string(), value)
            })
            .collect();
        let pair = [around("A", 0), around("B", 1)].concat();
        json!({
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": pair,
            "special_tokens": used,
        })
    }

    fn settings(&self) -> Json {
        let mut settings = Map::new();
        settings.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        settings.insert("clean_up_tokenization_spaces".into(), json!(false));
        for (ours, theirs) in [
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        ] {
            if let Some((token, _)) = self.special(theirs) {
                settings.insert(format!("{ours}_token"), json!(token));
            }
        }
        for name in ["bos", "eos"] {
            settings.insert(format!("add_{name}_token"), json!(self.adds(name)));
        }
        let template = self.metadata.get("tokenizer.chat_template");
        if let Some(template) = template.and_then(Value::as_str) {
            settings.insert("chat_template".into(), json!(template));
        }
        Json::Object(settings)
    }
}

fn strings(value: &Value) -> Option<Vec<String>> {
    let items = value.as_array()?.iter();
    items
        .map(|item| item.as_str().map(str::to_string))
        .collect()
}

/// Whether two factors are one, computed by different programs.
const NEAR: f32 = 1e-4;

/// Says in `config` what gives these factors of llama3's scaling; false when the
/// parameters that models are published with do not.
pub(super) fn tell_factors(config: &mut Json, factors: &[f32]) -> bool {
    let Some(&factor) = factors.iter().max_by(|a, b| a.total_cmp(b)) else {
        return false;
    };
    let plain = config["rope_parameters"].clone();
    config["rope_parameters"] = json!({
        "rope_type": "llama3",
        "rope_theta": plain["rope_theta"],
        "factor": f64::from(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let is_near = |(a, b): (&f32, &f32)| (a - b).abs() <= NEAR * b.abs();
    let told = matches!(llama::rope_factors(config), Ok(Some(given))
        if given.len() == factors.len() && given.iter().zip(factors).all(is_near));
    if !told {
        config["rope_parameters"] = plain;
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::gguf::{Array, ValueType};

    fn metadata(pre: &str, adds_bos: bool) -> Metadata {
        let tokens = ["<s>", "a", "b", "ab", "[PAD4]", "<user>"];
        let kinds = [CONTROL, 1, 1, 1, UNUSED, USER_DEFINED].map(Value::I32);
        [
            ("model", Value::from("gpt2")),
            ("pre", pre.into()),
            ("tokens", Array::strings(tokens).into()),
            (
                "token_type",
                Array::new(ValueType::I32, kinds).map_or(Value::I32(0), Value::Array),
            ),
            ("merges", Array::strings(["a b"]).into()),
            ("bos_token_id", 0u32.into()),
            ("add_bos_token", adds_bos.into()),
        ]
        .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
        .into_iter()
        .collect()
    }

    #[test]
    fn a_tokenizer_is_told_again() {
        let files = tokenizer(&metadata(SMOLLM, true));
        let [(_, json), (_, settings)] = &files[..] else {
            panic!("two files, not {}", files.len());
        };
        assert_eq!(
            json["model"]["vocab"],
            json!({"<s>": 0, "a": 1, "b": 2, "ab": 3, "<user>": 5})
        );
        assert_eq!(json["model"]["merges"], json!(["a b"]));
        let added = json["added_tokens"].as_array().unwrap();
        let added: Vec<_> = added.iter().map(|t| (&t["id"], &t["special"])).collect();
        assert_eq!(
            added,
            [(&json!(0), &json!(true)), (&json!(5), &json!(false))]
        );
        assert_eq!(
            json["post_processor"]["single"][0]["SpecialToken"]["id"],
            "<s>"
        );
        assert_eq!(json["pre_tokenizer"]["pretokenizers"][0]["type"], "Digits");
        assert_eq!(
            (&settings["bos_token"], &settings["add_bos_token"]),
            (&json!("<s>"), &json!(true))
        );
        let plain = tokenizer(&metadata(GPT_2, false));
        assert_eq!(plain[0].1["post_processor"], Json::Null);
        assert_eq!(plain[0].1["pre_tokenizer"]["use_regex"], true);
    }

    #[test]
    fn other_tokenizers_are_not_made_up() {
        assert!(tokenizer(&metadata("of another program", false)).is_empty());
        let mut sentencepiece = metadata(GPT_2, false);
        sentencepiece.set("tokenizer.ggml.model", "llama");
        assert!(tokenizer(&sentencepiece).is_empty());
    }

    #[test]
    fn factors_of_llama3_are_named() {
        let plain = json!({
            "hidden_size": 256, "num_attention_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        });
        let mut llama3 = plain.clone();
        llama3["rope_parameters"] = json!({
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        let factors = llama::rope_factors(&llama3).unwrap().unwrap();
        let mut told = plain.clone();
        assert!(tell_factors(&mut told, &factors));
        assert_eq!(told, llama3);
        let mut other = plain.clone();
        assert!(!tell_factors(&mut other, &[1.0, 7.0]));
        assert_eq!(other, plain);
    }
}
