//! What a checkpoint holds, as a person counts it: the tensors that spell one
//! quantized weight are one.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::error::Result;
use crate::format::Quantized;
use crate::io::{Checkpoint, EntryDType};
use crate::layout::gguf;
use crate::layout::{self, Found, Source};
use crate::tensor::Tensor;

/// One logical tensor of a checkpoint: the parts of a quantized weight count
/// as one.
pub struct Content {
    pub name: String,
    /// The format of a quantized weight, the dtype of any other.
    pub format: String,
    pub layout: Option<&'static str>,
    pub shape: Vec<usize>,
    pub nbytes: usize,
    pub bits_per_weight: f64,
    pub tensors: Vec<String>,
}

/// What a checkpoint holds, quantized weights folded.
pub fn contents(source: &Checkpoint) -> Result<Vec<Content>> {
    let names: Vec<&str> = source.entries().map(|e| e.name.as_str()).collect();
    let found = layout::find(&names);
    let tensor = |name: &str| source.tensor(name);
    let from = Source::new(&tensor, source.config().unwrap_or(&Value::Null));
    let part_of: BTreeMap<&str, usize> = found
        .iter()
        .enumerate()
        .flat_map(|(i, f)| f.tensors.iter().map(move |t| (t.as_str(), i)))
        .collect();
    let mut told = vec![false; found.len()];
    let mut contents = Vec::new();
    for entry in source.entries() {
        let (name, format, layout, shape, tensors) = match part_of.get(entry.name.as_str()) {
            Some(&i) if told[i] => continue,
            Some(&i) => {
                told[i] = true;
                let f = &found[i];
                let (format, shape) = layout::layout(f.layout)?.describe(&f.name, &from)?;
                (
                    f.name.clone(),
                    format,
                    Some(f.layout),
                    shape,
                    f.tensors.clone(),
                )
            }
            None if gguf::scaled_weight(source, entry).is_some() => continue,
            None => (
                entry.name.clone(),
                entry.dtype.name(),
                matches!(entry.dtype, EntryDType::Ggml(_)).then_some("gguf"),
                entry.shape.clone(),
                std::iter::once(entry)
                    .chain(gguf::weight_scale(source, entry))
                    .map(|e| e.name.clone())
                    .collect(),
            ),
        };
        let nbytes = tensors
            .iter()
            .map(|t| Ok(source.entry(t)?.nbytes()))
            .sum::<Result<usize>>()?;
        let elements: usize = shape.iter().product();
        contents.push(Content {
            name,
            format,
            layout,
            shape,
            nbytes,
            bits_per_weight: nbytes as f64 * 8.0 / elements.max(1) as f64,
            tensors,
        });
    }
    Ok(contents)
}

/// One tensor of a checkpoint.
pub enum Read {
    Dense(Tensor),
    Quantized(Quantized),
}

/// Reads one tensor, whatever its spelling. In a GGUF file of a Llama it may
/// have `transformers`' name too, and its rows are then in that order.
pub fn read(source: &Checkpoint, name: &str) -> Result<Read> {
    let names: Vec<&str> = source.entries().map(|e| e.name.as_str()).collect();
    match layout::find(&names).into_iter().find(|f| f.name == name) {
        Some(found) => read_found(source, &found).map(Read::Quantized),
        None => read_single(source, name),
    }
}

/// Reads a quantized tensor from those that spell it.
pub fn read_found(source: &Checkpoint, found: &Found) -> Result<Quantized> {
    for tensor in &found.tensors {
        source.check_unchanged(tensor)?;
    }
    let tensor = |name: &str| source.tensor(name);
    let from = Source::new(&tensor, source.config().unwrap_or(&Value::Null));
    layout::layout(found.layout)?.read(&found.name, &from)
}

/// Reads a tensor that one entry spells.
pub fn read_single(source: &Checkpoint, name: &str) -> Result<Read> {
    let (name, order) = match gguf::locate(source, name)? {
        Some((theirs, order)) => (theirs, order),
        None => (name.to_string(), None),
    };
    source.check_unchanged(&name)?;
    let entry = source.entry(&name)?;
    Ok(match entry.dtype {
        EntryDType::Ggml(ggml) => {
            let q = gguf::quantized(source, entry, ggml)?;
            Read::Quantized(match order {
                Some(order) => gguf::reordered(&name, q, order)?,
                None => q,
            })
        }
        _ => {
            let tensor = source.tensor(&name)?;
            Read::Dense(match order {
                Some(order) => order.tensor(&tensor)?,
                None => tensor,
            })
        }
    })
}
