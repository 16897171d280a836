//! A byte-level BPE tokenizer: `tokenizer.json` and what is beside it, as the
//! metadata from which llama.cpp builds its own.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value as Json;

use crate::error::{self, Error};
use crate::io::gguf::{Array, Value, ValueType};

/// Kinds of tokens, as llama.cpp numbers them.
const NORMAL: i32 = 1;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const UNUSED: i32 = 5;

/// Expressions that cut a text into words, and what llama.cpp calls them. It
/// has each of them compiled in, and takes no other.
pub(super) const SPLITS: [(&str, &str); 4] = [
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen2",
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "tekken",
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "gpt-4o",
    ),
];

#[derive(Deserialize)]
struct Tokenizer {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Json,
    #[serde(default)]
    pre_tokenizer: Json,
    #[serde(default)]
    post_processor: Json,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: usize,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    vocab: HashMap<String, usize>,
    #[serde(default)]
    merges: Vec<Merge>,
}

/// `"a b"`, or `["a", "b"]` in newer files.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair(String, String),
}

/// The files of a model directory that say how texts become tokens.
pub(super) struct Files<'a> {
    pub tokenizer: &'a Path,
    pub settings: Option<&'a Path>,
    pub chat_template: Option<&'a Path>,
    /// `config.json`.
    pub config: &'a Json,
}

fn read(path: &Path) -> error::Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::io(path, &e))
}

fn parse<'a, T: Deserialize<'a>>(path: &Path, bytes: &'a [u8]) -> error::Result<T> {
    serde_json::from_slice(bytes).map_err(|e| super::invalid_file(path, e.to_string()))
}

impl Files<'_> {
    /// The keys and values of these files.
    pub fn metadata(&self) -> error::Result<Vec<(String, Value)>> {
        let bytes = read(self.tokenizer)?;
        let tokenizer: Tokenizer = parse(self.tokenizer, &bytes)?;
        let settings: Json = match self.settings {
            None => Json::Null,
            Some(path) => parse(path, &read(path)?)?,
        };
        let mut pairs = tokenizer
            .metadata(&settings, self.config)
            .map_err(|message| super::invalid_file(self.tokenizer, message))?;
        let template = match (settings.get("chat_template"), self.chat_template) {
            (Some(Json::String(text)), _) => Some(text.clone()),
            (_, Some(path)) => Some(String::from_utf8_lossy(&read(path)?).into_owned()),
            _ => None,
        };
        if let Some(template) = template {
            pairs.push(("tokenizer.chat_template".into(), template.into()));
        }
        Ok(pairs)
    }
}

impl Tokenizer {
    fn metadata(&self, settings: &Json, config: &Json) -> Result<Vec<(String, Value)>, String> {
        if self.model.kind != "BPE" || self.model.byte_fallback {
            return Err(format!(
                "its {} model {}cannot be spelled in GGUF metadata here: only byte-level BPE can",
                self.model.kind,
                match self.model.byte_fallback {
                    true => "with byte_fallback ",
                    false => "",
                }
            ));
        }
        if !self.normalizer.is_null() {
            return Err("its normalizer has no spelling in GGUF metadata".into());
        }
        let (tokens, kinds) = self.tokens(config)?;
        let mut pairs: Vec<(String, Value)> = Vec::new();
        let mut add = |name: &str, value: Value| pairs.push((format!("tokenizer.{name}"), value));
        add("ggml.model", "gpt2".into());
        add("ggml.pre", self.pre_tokenizer_name()?.into());
        add(
            "ggml.tokens",
            Array::strings(tokens.iter().map(String::as_str)).into(),
        );
        let kinds = Array::new(ValueType::I32, kinds.into_iter().map(Value::I32));
        add(
            "ggml.token_type",
            kinds.map_or(Value::I32(NORMAL), Value::Array),
        );
        let merges: Vec<String> = self.model.merges.iter().map(Merge::text).collect();
        add(
            "ggml.merges",
            Array::strings(merges.iter().map(String::as_str)).into(),
        );
        let id = |name: &str| self.special_id(name, settings, config);
        for (name, theirs) in [
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        ] {
            if let Some(id) = id(name) {
                add(&format!("ggml.{theirs}_token_id"), id.into());
            }
        }
        for (name, place) in [("bos", Place::First), ("eos", Place::Last)] {
            let key = format!("add_{name}_token");
            let adds = settings.get(&key).and_then(Json::as_bool);
            let adds = adds.unwrap_or(id(name).is_some() && self.template(place) == id(name));
            add(&format!("ggml.{key}"), adds.into());
        }
        Ok(pairs)
    }

    /// Every token of the model by its id, with its kind.
    fn tokens(&self, config: &Json) -> Result<(Vec<String>, Vec<i32>), String> {
        let known = self.model.vocab.values().copied();
        let largest = known.chain(self.added_tokens.iter().map(|t| t.id)).max();
        let count = largest.map_or(0, |id| id.saturating_add(1));
        let rows = config.get("vocab_size").and_then(Json::as_u64);
        let size = rows.map_or(count, |rows| rows as usize);
        if count > size {
            return Err(format!(
                "has a token of id {}, but the model's vocab_size is {size}",
                count - 1
            ));
        }
        // Rows that the tokenizer never gives: models round their number up.
        let mut tokens: Vec<String> = (0..size).map(|i| format!("[PAD{i}]")).collect();
        let mut kinds = vec![UNUSED; size];
        for (text, &id) in &self.model.vocab {
            tokens[id].clone_from(text);
            kinds[id] = NORMAL;
        }
        for token in &self.added_tokens {
            let control = token.special || looks_special(&token.content);
            kinds[token.id] = if control { CONTROL } else { USER_DEFINED };
            tokens[token.id] = match control {
                true => token.content.clone(),
                // llama.cpp takes them as they stand in a text.
                false => token.content.replace('\u{2581}', " "),
            };
        }
        Ok((tokens, kinds))
    }

    fn pre_tokenizer_name(&self) -> Result<&'static str, String> {
        let whole = std::slice::from_ref(&self.pre_tokenizer);
        let steps = match self.pre_tokenizer.get("pretokenizers") {
            Some(Json::Array(steps)) => &steps[..],
            _ => whole,
        };
        let kind = |step: &Json| step["type"].as_str().map(str::to_string);
        let is = |step: &Json, name: &str| kind(step).as_deref() == Some(name);
        // use_regex is true where nothing is said: GPT-2's own expression.
        let bytes = |step: &Json, words: bool| {
            is(step, "ByteLevel")
                && step["add_prefix_space"] != true
                && step["use_regex"].as_bool().unwrap_or(true) == words
        };
        let found = match steps {
            [only] if bytes(only, true) => Some("gpt-2"),
            [digits, last]
                if is(digits, "Digits")
                    && digits["individual_digits"] == true
                    && bytes(last, true) =>
            {
                Some("smollm")
            }
            [split, last]
                if is(split, "Split")
                    && split["behavior"] == "Isolated"
                    && split["invert"] != true
                    && bytes(last, false) =>
            {
                let regex = split["pattern"]["Regex"].as_str();
                (SPLITS.iter())
                    .find(|(pattern, _)| Some(*pattern) == regex)
                    .map(|(_, name)| *name)
            }
            _ => None,
        };
        found.ok_or_else(|| {
            format!(
                "cuts texts into words in a way that llama.cpp has no name for: {}",
                self.pre_tokenizer
            )
        })
    }

    /// The id of the special token of that name: by the text that the settings
    /// give it, or else as the configuration says.
    fn special_id(&self, name: &str, settings: &Json, config: &Json) -> Option<u32> {
        let text = match settings.get(format!("{name}_token")) {
            Some(Json::String(text)) => Some(text.as_str()),
            Some(other) => other["content"].as_str(),
            None => None,
        };
        let by_text = text.and_then(|text| self.added(text));
        let configured = match config.get(format!("{name}_token_id")) {
            // Any of them ends a text; the first is the model's own.
            Some(Json::Array(ids)) => ids.first().and_then(Json::as_u64),
            other => other.and_then(Json::as_u64),
        };
        by_text.or_else(|| u32::try_from(configured?).ok())
    }

    fn added(&self, text: &str) -> Option<u32> {
        let token = self.added_tokens.iter().find(|t| t.content == text)?;
        u32::try_from(token.id).ok()
    }

    /// The special token that the template of one text puts first or last.
    fn template(&self, place: Place) -> Option<u32> {
        let whole = std::slice::from_ref(&self.post_processor);
        let steps = match self.post_processor.get("processors") {
            Some(Json::Array(steps)) => &steps[..],
            _ => whole,
        };
        let template = steps.iter().find(|s| s["type"] == "TemplateProcessing")?;
        let single = template["single"].as_array()?;
        let piece = match place {
            Place::First => single.first(),
            Place::Last => single.last(),
        };
        self.added(piece?["SpecialToken"]["id"].as_str()?)
    }
}

#[derive(Clone, Copy)]
enum Place {
    First,
    Last,
}

impl Merge {
    /// Its two parts with a space between; one within a part is spelled as
    /// byte-level BPE spells that byte.
    fn text(&self) -> String {
        let part = |text: &str| text.replace(' ', "\u{120}");
        match self {
            Merge::Text(text) => text.clone(),
            Merge::Pair(left, right) => format!("{} {}", part(left), part(right)),
        }
    }
}

/// Tokens that some tokenizers forget to mark as special.
fn looks_special(text: &str) -> bool {
    let between = |start, end| text.starts_with(start) && text.ends_with(end);
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&text)
        || between("<|", "|>")
        || between("<\u{ff5c}", "\u{ff5c}>")
        || between("<unused", ">")
}
