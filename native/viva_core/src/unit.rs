//! The work of one unit of a job: one tensor of a checkpoint, quantized and
//! written, or copied as it is.

mod parts;
mod ranges;

pub use parts::{Part, accept, file_hash, source_hash, verify};
pub(crate) use parts::{PartWriter, WINDOW};
pub use ranges::{Ranges, quantize_rows_into, source_rows_hash};

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::format::{Extremes, OptionValue, Quantized, Spec};
use crate::io::{Checkpoint, Entry, EntryDType, FixedEntry, ShardFile, ShardWriter};
use crate::layout::gguf::{self, RowOrder};
use crate::layout::{self, Entries, Layout};
use crate::method::calibrated::{self, Calibrated};
use crate::method::fold::Observed;
use crate::ops::metrics::{self, Metrics, Seen};
use crate::ops::{Cancel, pool, quantize};
use crate::tensor::{Tensor, narrow};

/// A spec, the layout in which tensors are written, and what the method does to
/// weights by their activations.
pub struct Target {
    pub spec: Spec,
    pub layout: &'static dyn Layout,
    pub calibrated: Option<Calibrated>,
}

/// One tensor of the source in the plan of a shard.
pub struct Planned {
    pub name: String,
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
    /// What some rows add to the metrics of their tensor.
    pub seen: Option<Seen>,
    /// Of the layer's output, on rows of activations that the method saw.
    pub output_error: Option<f64>,
    /// Of what was read.
    pub source_hash: [u8; 16],
    /// What was written.
    pub parts: Vec<Part>,
}

impl Target {
    /// From a user's options; without a layout's name, the first that can hold the
    /// format.
    ///
    /// # Errors
    /// `UnknownFormat`, `UnknownLayout`, `InvalidOption`, and `LayoutMismatch`
    /// where the layout cannot hold what they ask for.
    pub fn resolve(
        format: &str,
        options: Vec<(String, OptionValue)>,
        layout: Option<&str>,
    ) -> Result<Target> {
        let (calibrated, options) = calibrated::take(options)?;
        let (spec, layout) = layout::resolve(format, &options, layout)?;
        if let Some(how) = &calibrated {
            if how.rotate {
                return Err(layout::no_place_for(layout.name(), &spec, layout::ROTATED));
            }
            if how.gptq.is_some() {
                // Refuses the formats whose codes cannot be chosen one by one.
                let any = Extremes { min: 0.0, max: 1.0 };
                spec.format()?.grid(&spec, Some(any))?;
            }
        }
        Ok(Target {
            spec,
            layout,
            calibrated,
        })
    }

    /// Every choice made, as the options that would make it again.
    pub fn options(&self) -> Result<Vec<(&'static str, OptionValue)>> {
        let mut options = self.spec.format()?.options(&self.spec);
        if let Some(calibrated) = &self.calibrated {
            for (name, _) in &mut options {
                if *name == "method" {
                    *name = "scales";
                }
            }
            options.extend(calibrated.options());
        }
        Ok(options)
    }

    /// What a tensor of this shape is quantized with.
    pub fn spec_for(&self, shape: &[usize]) -> Result<Cow<'_, Spec>> {
        self.layout.spec_for(&self.spec, shape)
    }

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
        let spec = self.spec_for(shape)?;
        spec.format()?.check_shape(&spec, shape)?;
        self.layout.entries(&spec, name, shape, known)
    }

    /// The ranges of rows in which a huge tensor is done, if they do not depend on each
    /// other.
    pub fn ranges(&self, source: &Checkpoint, name: &str) -> Result<Option<Ranges>> {
        let entry = source.entry(name)?;
        let order = match self.layout.whole_file() {
            None => None,
            Some(whole) => whole.row_order(source, entry)?,
        };
        match (entry.dtype, order) {
            (EntryDType::Known(dtype), None) => Ranges::of(self, name, dtype, &entry.shape),
            _ => Ok(None),
        }
    }

    /// Checks that the layout can hold a checkpoint at all.
    pub fn check_source(&self, source: &Checkpoint) -> Result<()> {
        let quantized = |e: &&Entry| matches!(e.dtype, EntryDType::Ggml(_));
        if let Some(entry) = source.entries().find(quantized) {
            return Err(Error::InvalidFile {
                path: source.path().display().to_string(),
                message: format!(
                    "its weights are quantized already ({}); start from the original checkpoint",
                    entry.dtype.name()
                ),
            });
        }
        let Some(whole) = self.layout.whole_file() else {
            return match source.gguf_metadata() {
                None => Ok(()),
                Some(_) => Err(Error::LayoutMismatch {
                    layout: self.layout.name().into(),
                    format: self.spec.format.clone(),
                    message: "a GGUF file can only be written as a GGUF file again".into(),
                }),
            };
        };
        whole.metadata(source, Some(&self.spec))?;
        whole.more(source)?;
        for entry in source.entries() {
            whole.kept(source, entry)?;
            whole.row_order(source, entry)?;
        }
        Ok(())
    }
}

/// Starts a shard for the planned tensors of a checkpoint.
pub fn create_shard(
    at: impl Into<ShardFile>,
    source: &Checkpoint,
    target: Option<&Target>,
    planned: Vec<Planned>,
    metadata: BTreeMap<String, String>,
) -> Result<ShardWriter> {
    let whole = target.and_then(|t| t.layout.whole_file());
    let mut all = Entries::default();
    for Planned { name, quantize } in planned {
        let entry = source.entry(&name)?;
        match (target, whole) {
            (Some(target), _) if quantize => {
                let entries = target.entries(&name, entry.dtype, &entry.shape)?;
                all.fixed.extend(entries.fixed);
                all.late.extend(entries.late);
            }
            (_, Some(whole)) => all.fixed.extend(whole.kept(source, entry)?),
            _ => all.fixed.push(FixedEntry {
                name,
                dtype: entry.dtype,
                shape: entry.shape.clone(),
            }),
        }
    }
    let Some(whole) = whole else {
        return ShardWriter::create(at, all.fixed, all.late, metadata);
    };
    let metadata = whole.metadata(source, target.map(|t| &t.spec))?;
    let more = whole.more(source)?;
    all.fixed
        .extend(more.iter().map(|(entry, _)| entry.clone()));
    let shard = ShardWriter::create(at, all.fixed, all.late, metadata)?;
    for (entry, bytes) in more {
        shard.write(&entry.name, &bytes)?;
    }
    Ok(shard)
}

/// Quantizes one tensor, by what was observed of its layer if anything was, and
/// writes it; its mapped pages are given back. All of it runs on the pool, whose threads give way to the BEAM's schedulers.
pub fn quantize_into(
    source: &Checkpoint,
    name: &str,
    target: &Target,
    observed: Option<&Observed>,
    shard: &ShardWriter,
    cancel: &Cancel,
) -> Result<Done> {
    source.check_unchanged(name)?;
    let tensor = source.tensor(name)?;
    let spec = target.spec_for(tensor.shape())?;
    let order = match target.layout.whole_file() {
        None => None,
        Some(whole) => whole.row_order(source, source.entry(name)?)?,
    };
    let done = pool::run(|| {
        let (q, metrics, output_error) = match (observed, &target.calibrated) {
            (Some(observed), Some(how)) => observed.quantize(name, &tensor, &spec, how, cancel)?,
            (None, None) => {
                let q = quantize::quantize(&tensor, &spec, cancel)?;
                let metrics = metrics::quantized(&tensor, &q, cancel)?;
                (q, metrics, None)
            }
            _ => {
                return Err(Error::InvalidOption {
                    option: "statistics".into(),
                    message: "they go with a method that looks at activations, and it with them"
                        .into(),
                });
            }
        };
        let source_hash = source_hash(source, [name])?;
        // The source is done with: its pages go before the output's arrive.
        source.give_back(name)?;
        let bits_per_weight = q.bits_per_weight();
        let mut out = PartWriter::new(shard, cancel);
        spell_into(target.layout, name, q, order, &mut out)?;
        Ok(Done {
            input_bytes: tensor.bytes().len(),
            output_bytes: out.bytes(),
            elements: tensor.len(),
            bits_per_weight: Some(bits_per_weight),
            metrics: Some(metrics),
            seen: None,
            output_error,
            source_hash,
            parts: out.into_parts(),
        })
    });
    if done.is_err() {
        source.give_back(name)?;
    }
    done
}

/// Writes a quantized tensor as its layout spells it, its rows in that order.
pub(crate) fn spell_into(
    layout: &dyn Layout,
    name: &str,
    q: Quantized,
    order: Option<RowOrder>,
    out: &mut PartWriter,
) -> Result<()> {
    let late = layout.entries(&q.spec, name, &q.shape, q.dtype)?.late;
    let q = match order {
        Some(order) => gguf::reordered(name, q, order)?,
        None => q,
    };
    for (part, bytes) in layout.spell(name, &q)? {
        if late.iter().any(|l| l.name == part) {
            out.write_late(&part, &bytes)?;
        } else {
            out.write(&part, &bytes)?;
        }
    }
    Ok(())
}

/// Writes one tensor unquantized, as it is, as the layout keeps it, or with the
/// scales of the layers after it folded in; its mapped pages are given back.
pub fn keep_into(
    source: &Checkpoint,
    name: &str,
    target: Option<&Target>,
    observed: Option<&Observed>,
    shard: &ShardWriter,
    cancel: &Cancel,
) -> Result<Done> {
    source.check_unchanged(name)?;
    let entry = source.entry(name)?;
    let whole = target.and_then(|t| t.layout.whole_file());
    let divided = observed.and_then(|o| o.vector(name));
    let bytes = |divided: &Option<Tensor>| match divided {
        Some(tensor) => Ok(Cow::Owned(tensor.bytes().to_vec())),
        None => source.bytes(name).map(Cow::Borrowed),
    };
    let mut out = PartWriter::new(shard, cancel);
    let written = match whole {
        None if divided.is_none() => copy(source, name, name, &mut out),
        None => out.write(name, &bytes(&divided)?),
        Some(whole) => match whole.kept(source, entry)? {
            None => Ok(()),
            Some(kept) => {
                let order = whole.row_order(source, entry)?;
                match (kept.dtype == entry.dtype, order) {
                    (true, None) if divided.is_none() => copy(source, name, &kept.name, &mut out),
                    (true, None) => out.write(&kept.name, &bytes(&divided)?),
                    _ => {
                        let tensor = divided.map_or_else(|| source.tensor(name), Ok)?;
                        rewrite(source, &tensor, entry, &kept, order, &mut out)
                    }
                }
            }
        },
    };
    let source_hash = source_hash(source, [name]);
    source.give_back(name)?;
    written?;
    Ok(Done {
        input_bytes: entry.nbytes(),
        output_bytes: out.bytes(),
        elements: entry.shape.iter().product(),
        bits_per_weight: None,
        metrics: None,
        seen: None,
        output_error: None,
        source_hash: source_hash?,
        parts: out.into_parts(),
    })
}

/// Writes a tensor as it is, and gives its pages back on the way.
fn copy(source: &Checkpoint, name: &str, as_name: &str, out: &mut PartWriter) -> Result<()> {
    let mut stream = out.stream(as_name);
    for (i, window) in source.bytes(name)?.chunks(WINDOW).enumerate() {
        stream.write(window)?;
        source.give_back_part(name, i * WINDOW..(i + 1) * WINDOW)?;
    }
    out.end(stream);
    Ok(())
}

/// Bytes of rows that are rewritten at once.
const REWRITE: usize = 1 << 20;

/// Writes a tensor in another dtype or order of rows.
fn rewrite(
    source: &Checkpoint,
    tensor: &Tensor,
    entry: &Entry,
    kept: &FixedEntry,
    order: Option<RowOrder>,
    out: &mut PartWriter,
) -> Result<()> {
    let EntryDType::Known(dtype) = kept.dtype else {
        return Err(Error::UnsupportedDtype {
            op: format!("rewriting tensor {:?}", entry.name),
            dtype: kept.dtype.name(),
        });
    };
    let rows = entry.shape.first().copied().unwrap_or(1);
    let row = tensor.len() / rows.max(1);
    let at_once = (REWRITE / (row * dtype.size()).max(1)).max(1);
    let cancel = out.cancel();
    let mut stream = out.stream(&kept.name);
    let (mut scratch, mut bytes) = (Vec::new(), Vec::new());
    for first in (0..rows).step_by(at_once) {
        cancel.check()?;
        bytes.clear();
        for to in first..(first + at_once).min(rows) {
            let from = order.map_or(to, |o| o.source(to));
            let elements = from * row..(from + 1) * row;
            if tensor.dtype() == dtype {
                let size = dtype.size();
                bytes
                    .extend_from_slice(&tensor.bytes()[elements.start * size..elements.end * size]);
                continue;
            }
            let start = bytes.len();
            bytes.resize(start + row * dtype.size(), 0);
            let values = tensor.f32_chunk(elements, &mut scratch);
            narrow(dtype, values, &mut bytes[start..])?;
        }
        stream.write(&bytes)?;
        if order.is_none() {
            let read = row * tensor.dtype().size();
            source.give_back_part(&entry.name, first * read..(first + at_once) * read)?;
        }
    }
    out.end(stream);
    Ok(())
}
