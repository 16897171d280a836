//! The work of one unit of a job: one tensor of a checkpoint, quantized and
//! written, or copied as it is.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::format::Spec;
use crate::io::{Checkpoint, EntryDType, FixedEntry, ShardWriter};
use crate::layout::{self, Entries, Layout, Source};
use crate::ops::metrics::{self, Metrics};
use crate::ops::{Cancel, pool, quantize};

/// A spec, and the layout in which tensors are written.
pub struct Target {
    pub spec: Spec,
    pub layout: &'static dyn Layout,
}

/// One tensor in the plan of a shard.
pub struct Planned {
    pub name: String,
    pub dtype: EntryDType,
    pub shape: Vec<usize>,
    pub quantize: bool,
}

/// What came of one tensor.
#[derive(Debug)]
pub struct Done {
    pub input_bytes: usize,
    pub output_bytes: usize,
    pub elements: usize,
    /// Bits of codes, scales and zero points; `None` when it was copied.
    pub bits_per_weight: Option<f64>,
    pub metrics: Option<Metrics>,
}

impl Target {
    /// What a tensor adds to a file, or why it cannot be quantized so.
    pub fn entries(&self, name: &str, dtype: EntryDType, shape: &[usize]) -> Result<Entries> {
        let known = match dtype {
            EntryDType::Known(known) if known.is_float() => known,
            other => {
                return Err(Error::UnsupportedDtype {
                    op: "quantize".into(),
                    dtype: other.name(),
                });
            }
        };
        self.spec.format()?.check_shape(&self.spec, shape)?;
        self.layout.entries(&self.spec, name, shape, known)
    }
}

/// Starts a shard for the planned tensors.
pub fn create_shard(
    path: &Path,
    target: Option<&Target>,
    planned: Vec<Planned>,
    metadata: BTreeMap<String, String>,
) -> Result<ShardWriter> {
    let mut all = Entries::default();
    for p in planned {
        match target {
            Some(target) if p.quantize => {
                let entries = target.entries(&p.name, p.dtype, &p.shape)?;
                all.fixed.extend(entries.fixed);
                all.late.extend(entries.late);
            }
            _ => all.fixed.push(FixedEntry {
                name: p.name,
                dtype: p.dtype,
                shape: p.shape,
            }),
        }
    }
    ShardWriter::create(path, all.fixed, all.late, metadata)
}

/// Quantizes one tensor and writes it; its mapped pages are given back. All of
/// it runs on the pool, whose threads give way to the BEAM's schedulers.
pub fn quantize_into(
    source: &Checkpoint,
    name: &str,
    target: &Target,
    shard: &ShardWriter,
    cancel: &Cancel,
) -> Result<Done> {
    source.check_unchanged(name)?;
    let tensor = source.tensor(name)?;
    let late = target
        .layout
        .entries(&target.spec, name, tensor.shape(), tensor.dtype())?
        .late;
    let done = pool::run(|| {
        let q = quantize::quantize(&tensor, &target.spec, cancel)?;
        let metrics = metrics::quantized(&tensor, &q, cancel)?;
        // The source is done with: its pages go before the output's arrive.
        source.give_back(name)?;
        let mut output_bytes = 0;
        for (part, bytes) in target.layout.spell(name, &q)? {
            output_bytes += bytes.len();
            if late.iter().any(|l| l.name == part) {
                shard.write_late(&part, &bytes)?;
            } else {
                write(shard, &part, &bytes, cancel)?;
            }
        }
        Ok(Done {
            input_bytes: tensor.bytes().len(),
            output_bytes,
            elements: tensor.len(),
            bits_per_weight: Some(q.bits_per_weight()),
            metrics: Some(metrics),
        })
    });
    if done.is_err() {
        source.give_back(name)?;
    }
    done
}

/// Bytes that are written between two looks at the cancel flag.
const COPY: usize = 1 << 20;

/// Writes one tensor of a shard, piece by piece.
fn write(shard: &ShardWriter, name: &str, bytes: &[u8], cancel: &Cancel) -> Result<()> {
    for (i, chunk) in bytes.chunks(COPY).enumerate() {
        cancel.check()?;
        shard.write_at(name, i * COPY, chunk)?;
    }
    Ok(())
}

/// Copies one tensor as it is; its mapped pages are given back.
pub fn keep_into(
    source: &Checkpoint,
    name: &str,
    shard: &ShardWriter,
    cancel: &Cancel,
) -> Result<Done> {
    source.check_unchanged(name)?;
    let bytes = source.bytes(name)?;
    let elements = source.entry(name)?.shape.iter().product();
    let done = (|| {
        write(shard, name, bytes, cancel)?;
        Ok(Done {
            input_bytes: bytes.len(),
            output_bytes: bytes.len(),
            elements,
            bits_per_weight: None,
            metrics: None,
        })
    })();
    source.give_back(name)?;
    done
}

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
            None => (
                entry.name.clone(),
                entry.dtype.name(),
                None,
                entry.shape.clone(),
                vec![entry.name.clone()],
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

/// Reads one quantized weight of a checkpoint, whatever its layout.
pub fn read_quantized(source: &Checkpoint, name: &str) -> Result<Option<crate::format::Quantized>> {
    let names: Vec<&str> = source.entries().map(|e| e.name.as_str()).collect();
    match layout::find(&names).into_iter().find(|f| f.name == name) {
        None => Ok(None),
        Some(f) => {
            let tensor = |name: &str| source.tensor(name);
            let from = Source::new(&tensor, source.config().unwrap_or(&Value::Null));
            layout::layout(f.layout)?.read(name, &from).map(Some)
        }
    }
}
