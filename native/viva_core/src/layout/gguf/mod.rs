//! GGUF: one file with a whole Llama, as llama.cpp loads and runs it.
//!
//! Blocks of ggml's formats stand in the file as they are in memory, but for two
//! formats: see `blocks`. Around them everything has llama.cpp's spelling: the
//! names, the order of the rows of queries and keys, hyper-parameters and
//! tokenizer as metadata.

mod blocks;
mod llama;
mod names;
mod restore;
mod rows;
mod tokenizer;

use std::borrow::Cow;
use std::path::Path;

use serde_json::{Value as Json, json};

use super::{Entries, Found, Layout, Modules, Source, Spelled, WholeFile, invalid, refuse};
use crate::error::{Error, Result};
use crate::format::{OptionValue, Quantized, Spec};
use crate::io::gguf::{Metadata, Value};
use crate::io::{Checkpoint, Entry, EntryDType, FixedEntry};
use crate::tensor::{DType, Tensor};

use self::blocks::block_type;

pub use self::blocks::{quantized, scaled_weight, weight_scale};
pub use self::rows::RowOrder;

pub struct Gguf;

/// The one part of every format whose blocks stand in a file as they are.
const BLOCKS: &str = "blocks";

/// The version of ggml's formats that quantized files have to name.
const QUANTIZATION_VERSION: u32 = 2;

/// The tensor of llama3's scaling of positions.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

const FILE_TYPE: &str = "general.file_type";
const VERSION: &str = "general.quantization_version";

/// What llama.cpp calls files whose weights are mostly of one format.
const FILE_TYPES: [(&str, u32); 14] = [
    ("q4_0", 2),
    ("q4_1", 3),
    ("q8_0", 7),
    ("q5_0", 8),
    ("q5_1", 9),
    ("q2_k", 10),
    ("q3_k", 11),
    ("q4_k", 14),
    ("q5_k", 16),
    ("q6_k", 18),
    ("iq4_nl", 25),
    ("iq4_xs", 30),
    ("mxfp4", 38),
    ("nvfp4", 39),
];

/// Formats of long blocks, and the format of short ones that llama.cpp takes
/// for rows which those do not divide.
const FALLBACKS: [(&str, &str); 6] = [
    ("q2_k", "q4_0"),
    ("q3_k", "q4_0"),
    ("q4_k", "q5_0"),
    ("q5_k", "q5_1"),
    ("q6_k", "q8_0"),
    ("iq4_xs", "iq4_nl"),
];

impl Layout for Gguf {
    fn name(&self) -> &'static str {
        "gguf"
    }

    fn about(&self) -> &'static str {
        "ggml's blocks in one GGUF file with tokenizer, as llama.cpp runs Llamas"
    }

    fn defaults(&self, format: &str) -> Vec<(String, OptionValue)> {
        blocks::defaults(format)
    }

    fn check(&self, spec: &Spec) -> Result<()> {
        match block_type(spec) {
            Some(_) => Ok(()),
            None => Err(refuse(
                self,
                spec,
                "it holds the formats of ggml: q8_0, q4_k …",
            )),
        }
    }

    fn spec_for<'a>(&self, spec: &'a Spec, shape: &[usize]) -> Result<Cow<'a, Spec>> {
        let fallback = FALLBACKS.iter().find(|(long, _)| *long == spec.format);
        match (spec.format()?.check_shape(spec, shape), fallback) {
            (Err(Error::Indivisible { .. }), Some((_, short))) => {
                let options = spec.format()?.options(spec).into_iter();
                let options = options.map(|(k, v)| (k.to_string(), v)).collect();
                Ok(Cow::Owned(super::spec(short, options)?))
            }
            _ => Ok(Cow::Borrowed(spec)),
        }
    }

    fn entries(&self, spec: &Spec, name: &str, shape: &[usize], _dtype: DType) -> Result<Entries> {
        let Some(ggml) = block_type(spec) else {
            return Err(refuse(self, spec, "ggml has no such format"));
        };
        if shape.len() != 2 {
            return Err(refuse(self, spec, "its quantized weights are matrices"));
        }
        let dtype = EntryDType::Ggml(ggml);
        // Blocks may be longer than what the format divides rows into.
        dtype.nbytes(shape)?;
        let name = in_file(name)?;
        let mut entries = Entries::default();
        if let Some(scale) = blocks::scale_name(spec, &name) {
            entries.fixed(scale, DType::F32, vec![1]);
        }
        entries.fixed.push(FixedEntry {
            name,
            dtype,
            shape: shape.to_vec(),
        });
        Ok(entries)
    }

    fn bytes<'a>(&self, name: &str, q: &'a Quantized) -> Result<Spelled<'a>> {
        blocks::spell(name, q)
    }

    fn rows_in_order(&self) -> bool {
        true
    }

    fn config(&self, _modules: &Modules, _config: &mut Json) {}

    fn holds_embeddings(&self) -> bool {
        true
    }

    fn read_back(&self, q: &Quantized) -> Result<Option<Quantized>> {
        blocks::read_back(q)
    }

    fn find(&self, _has: &dyn Fn(&str) -> bool, _all: &[&str]) -> Vec<Found> {
        // Not by names: the dtype of its one entry tells a quantized tensor.
        Vec::new()
    }

    fn read(&self, name: &str, _source: &Source) -> Result<Quantized> {
        Err(invalid(name, "is no tensor of a GGUF file"))
    }

    fn whole_file(&self) -> Option<&dyn WholeFile> {
        Some(self)
    }
}

/// A name in the file: llama.cpp's own, or what it calls the tensor.
fn in_file(name: &str) -> Result<String> {
    if names::from_gguf(name).is_some() {
        return Ok(name.into());
    }
    names::to_gguf(name).ok_or_else(|| invalid(name, "has no name in llama.cpp's Llama"))
}

impl WholeFile for Gguf {
    fn file_name(&self) -> &'static str {
        "model.gguf"
    }

    fn metadata(&self, source: &Checkpoint, spec: Option<&Spec>) -> Result<crate::io::Metadata> {
        let mut metadata = match source.gguf_metadata() {
            Some(own) => own.clone(),
            None => from_model(source)?,
        };
        if let Some(spec) = spec {
            let file_type = FILE_TYPES.iter().find(|(name, _)| *name == spec.format);
            if let Some((_, file_type)) = file_type {
                metadata.set(FILE_TYPE, *file_type);
            }
            metadata.set(VERSION, QUANTIZATION_VERSION);
        }
        Ok(metadata.into())
    }

    fn kept(&self, source: &Checkpoint, entry: &Entry) -> Result<Option<FixedEntry>> {
        if source.gguf_metadata().is_some() {
            return Ok(Some(FixedEntry {
                name: entry.name.clone(),
                dtype: entry.dtype,
                shape: entry.shape.clone(),
            }));
        }
        if names::is_derived(&entry.name) {
            return Ok(None);
        }
        let dtype = match entry.dtype {
            // llama.cpp computes norms and biases in f32 alone.
            EntryDType::Known(dtype) if dtype.is_float() && entry.shape.len() < 2 => DType::F32,
            EntryDType::Known(dtype @ (DType::F32 | DType::F16 | DType::BF16)) => dtype,
            EntryDType::Known(dtype) if dtype.is_float() => DType::F32,
            other => {
                return Err(invalid(
                    &entry.name,
                    format!("{} tensors have no place in a GGUF file", other.name()),
                ));
            }
        };
        Ok(Some(FixedEntry {
            name: in_file(&entry.name)?,
            dtype: dtype.into(),
            shape: entry.shape.clone(),
        }))
    }

    fn row_order(&self, source: &Checkpoint, entry: &Entry) -> Result<Option<RowOrder>> {
        match (source.config(), names::rotated(&entry.name)) {
            (Some(config), Some(rotated)) if source.gguf_metadata().is_none() => {
                order(config, &entry.name, rotated, &entry.shape).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn more(&self, source: &Checkpoint) -> Result<Vec<(FixedEntry, Vec<u8>)>> {
        let (Some(config), None) = (source.config(), source.gguf_metadata()) else {
            return Ok(Vec::new());
        };
        let factors = llama::rope_factors(config).map_err(|m| no_llama(source, m))?;
        Ok(factors.map_or(Vec::new(), |factors| {
            let entry = FixedEntry {
                name: ROPE_FACTORS.into(),
                dtype: DType::F32.into(),
                shape: vec![factors.len()],
            };
            vec![(entry, bytemuck::cast_slice(&factors).to_vec())]
        }))
    }
}

fn order(config: &Json, name: &str, rotated: names::Rotated, shape: &[usize]) -> Result<RowOrder> {
    let &rows = shape.first().unwrap_or(&1);
    llama::heads(config, rotated)
        .and_then(|heads| RowOrder::new(rows, heads))
        .map_err(|message| invalid(name, message))
}

fn no_llama(source: &Checkpoint, message: String) -> Error {
    invalid_file(&source.path().join("config.json"), message)
}

fn invalid_file(path: &Path, message: String) -> Error {
    Error::InvalidFile {
        path: path.display().to_string(),
        message,
    }
}

/// The metadata of a model directory: what llama.cpp's own converter writes of it.
fn from_model(source: &Checkpoint) -> Result<Metadata> {
    let lacks = |what: &str| {
        let message =
            format!("has no {what}, which a GGUF file holds too: give the directory of the model");
        invalid_file(source.path(), message)
    };
    let config = source.config().ok_or_else(|| lacks("config.json"))?;
    let companions = source.companions()?;
    let file = |name: &str| {
        let found = companions.iter().find(|c| c.relative == Path::new(name));
        found.map(|c| c.file.as_path())
    };
    let mut metadata: Metadata = [
        ("general.architecture", Value::from(llama::ARCHITECTURE)),
        ("general.type", "model".into()),
    ]
    .into_iter()
    .collect();
    let directory = std::fs::canonicalize(source.path()).ok();
    if let Some(name) = directory.as_deref().and_then(Path::file_name) {
        metadata.set("general.name", name.to_string_lossy().into_owned());
    }
    let tokenizer = file("tokenizer.json").ok_or_else(|| lacks("tokenizer.json"))?;
    let files = tokenizer::Files {
        tokenizer,
        settings: file("tokenizer_config.json"),
        chat_template: file("chat_template.jinja"),
        config,
    };
    let model = llama::metadata(config).map_err(|message| no_llama(source, message))?;
    for (key, value) in model.into_iter().chain(files.metadata()?) {
        metadata.set(key, value);
    }
    Ok(metadata)
}

/// Where a GGUF file of a Llama has the tensor of `transformers`' name, and the
/// order that its rows have there.
pub fn locate(source: &Checkpoint, name: &str) -> Result<Option<(String, Option<RowOrder>)>> {
    let config = source.gguf_metadata().and_then(llama::config);
    let (Some(config), Some(theirs)) = (config, names::to_gguf(name)) else {
        return Ok(None);
    };
    let Ok(entry) = source.entry(&theirs) else {
        return Ok(None);
    };
    let order = match names::rotated(name) {
        Some(rotated) => Some(order(&config, name, rotated, &entry.shape)?.undone()),
        None => None,
    };
    Ok(Some((theirs, order)))
}

/// `transformers`' name for a tensor in the GGUF file of a Llama.
pub fn renamed(source: &Checkpoint, name: &str) -> Option<String> {
    source.gguf_metadata().and_then(llama::config)?;
    names::from_gguf(name)
}

/// What `config.json` of the Llama in a GGUF file would say.
pub fn config(source: &Checkpoint) -> Option<Json> {
    let mut config = llama::config(source.gguf_metadata()?)?;
    // Without a head of its own the embedding is used.
    config["tie_word_embeddings"] = json!(source.entry("output.weight").is_err());
    if let Ok(factors) = source.tensor(ROPE_FACTORS) {
        restore::tell_factors(&mut config, &factors.to_f32_vec());
    }
    Some(config)
}

/// Whether [`config`] says what gives these factors.
pub fn rope_is_told(source: &Checkpoint, factors: &Tensor) -> bool {
    let config = source.gguf_metadata().and_then(llama::config);
    config.is_some_and(|mut c| restore::tell_factors(&mut c, &factors.to_f32_vec()))
}

/// The tokenizer's files of the model in a GGUF file, but for those that stand
/// beside it.
pub fn tokenizer_files(source: &Checkpoint) -> Result<Vec<(String, String)>> {
    let Some(metadata) = source.gguf_metadata() else {
        return Ok(Vec::new());
    };
    let beside = source.companions()?;
    let missing = |name: &str| !beside.iter().any(|c| c.relative == Path::new(name));
    let files = restore::tokenizer(metadata).into_iter();
    Ok(files
        .filter(|(name, _)| missing(name))
        .map(|(name, json)| (name.to_string(), format!("{json:#}\n")))
        .collect())
}

/// The same weights with their rows in another order.
pub fn reordered(name: &str, mut q: Quantized, order: RowOrder) -> Result<Quantized> {
    let [rows, _] = q.shape[..] else {
        return Err(invalid(name, "is a quantized projection, and no matrix"));
    };
    let declared = q.spec.format()?.parts(&q.spec, &q.shape)?;
    for ((_, part), declared) in q.parts.iter_mut().zip(declared) {
        // What belongs to the whole tensor stays.
        if declared.block_bits > 0 {
            *part = order.parts_of_rows(part, rows)?;
        }
    }
    Ok(q)
}
