//! What stands beside the weights of a converted model.

use serde_json::{Value, json};

use super::{Becomes, Conversion, alike};
use crate::error::Result;
use crate::format::Spec;
use crate::io::Checkpoint;
use crate::layout::{Modules, gguf};
use crate::tensor::DType;

/// A file by its name and its text.
pub type TextFile = (String, String);

/// Keys of `config.json` that say how weights are quantized.
const QUANTIZATION: [&str; 2] = ["quantization_config", "quantization"];

/// Files of a model directory that say how its weights are, or were, quantized.
pub const SIDECARS: [&str; 4] = [
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quant_log.csv",
];

impl Conversion {
    /// `config.json` of the target and the files beside it, where it is a model
    /// directory of safetensors; `kept` are modules with linear weights that are
    /// not quantized there.
    pub fn files(&self, source: &Checkpoint, kept: &[String]) -> Result<Vec<TextFile>> {
        if self.goal.whole_file().is_some() {
            return Ok(Vec::new());
        }
        let mut files = gguf::tokenizer_files(source)?;
        let implied = gguf::config(source);
        let Some(mut config) = source.config().cloned().or(implied) else {
            return Ok(files);
        };
        if let Value::Object(map) = &mut config {
            for key in QUANTIZATION {
                map.remove(key);
            }
            let is_said = ["dtype", "torch_dtype"]
                .iter()
                .any(|k| map.contains_key(*k));
            // In f32 the values of any file are exact.
            let own = (!is_said && source.gguf_metadata().is_some()).then_some(DType::F32);
            if let Some(name) = self.dtype.or(own).and_then(torch_name) {
                map.insert("dtype".into(), json!(name));
                if let Some(old) = map.get_mut("torch_dtype") {
                    *old = json!(name);
                }
            }
        }
        let mut beside = Vec::new();
        if let (Some(layout), Some((spec, _))) = (self.goal.layout(), self.specs().first()) {
            let others: Vec<(String, Spec)> = self
                .pieces
                .iter()
                .filter_map(|piece| match &piece.becomes {
                    Becomes::Quantized(s) if !alike(s, spec) => {
                        Some((piece.module().into(), s.clone()))
                    }
                    _ => None,
                })
                .collect();
            let modules = Modules {
                spec,
                others: &others,
                kept,
            };
            layout.config(&modules, &mut config);
            beside = layout.companions(&config);
        }
        beside.insert(0, ("config.json", config));
        files.extend(
            beside
                .into_iter()
                .map(|(name, json)| (name.to_string(), format!("{json:#}\n"))),
        );
        Ok(files)
    }
}

fn torch_name(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("float32"),
        DType::F16 => Some("float16"),
        DType::BF16 => Some("bfloat16"),
        _ => None,
    }
}
