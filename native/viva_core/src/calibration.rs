//! What is remembered of the activations that weights met: enough for every
//! method, in memory that does not grow with their number.
//!
//! A calibration is saved as a safetensors file that other programs can write
//! too. For every layer, named as its module is:
//!
//! | tensor | dtype, shape | what |
//! |---|---|---|
//! | `….gram` | f32 `[k, k]` | Σ xᵀx over all rows x of activations |
//! | `….sum_abs` | f64 `[k]` | Σ abs(x) |
//! | `….max_abs` | f32 `[k]` | max abs(x) |
//! | `….samples` | f32 `[rows, k]` | some of the rows |
//! | `….tokens` | i64 `[1]` | how many rows there were |
//!
//! A layer may also have `….samples` alone, of any float dtype: rows that the rest
//! is summed up from.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::{
    EntryDType, FixedEntry, Metadata, ShardWriter, TensorFile, sync_directory, unknown_tensor,
};
use crate::method::gram::Gram;
use crate::ops::quantize::check_floats;
use crate::ops::{Cancel, pool};
use crate::tensor::{DType, Tensor};

/// Rows of activations that are kept as they are.
pub const SAMPLES: usize = 512;

/// Statistics over activations `[tokens, k]` of one layer's input.
///
/// The same batches in the same order give the same bits on every machine. The
/// kept rows do not even depend on the order: they are those of least hash, each
/// once, so that they are an even draw from all distinct rows.
#[derive(Clone, Debug)]
pub struct Statistics {
    columns: usize,
    tokens: u64,
    sum_abs: Vec<f64>,
    max_abs: Vec<f32>,
    gram: Gram,
    capacity: usize,
    samples: BTreeMap<u64, Vec<f32>>,
}

impl Statistics {
    /// Nothing seen yet. Memory is that of the Gram matrix, 2 · k² bytes, and of
    /// `samples` rows.
    pub fn new(columns: usize, samples: usize) -> Statistics {
        Statistics {
            columns,
            tokens: 0,
            sum_abs: vec![0.0; columns],
            max_abs: vec![0.0; columns],
            gram: Gram::zeroed(columns),
            capacity: samples,
            samples: BTreeMap::new(),
        }
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Rows that are kept at most.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Rows seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Mean magnitude of each column.
    pub fn mean_abs(&self) -> Vec<f32> {
        let tokens = self.tokens.max(1) as f64;
        self.sum_abs.iter().map(|s| (s / tokens) as f32).collect()
    }

    /// Largest magnitude of each column.
    pub fn max_abs(&self) -> &[f32] {
        &self.max_abs
    }

    /// Σ xᵀx over all rows.
    pub fn gram(&self) -> &Gram {
        &self.gram
    }

    /// The kept rows `[rows, columns]`.
    ///
    /// # Errors
    /// None but that of a tensor too large for memory.
    pub fn rows(&self) -> Result<Tensor> {
        let shape = [self.samples.len(), self.columns];
        Tensor::from_slice(DType::F32, &shape, &self.samples())
    }

    /// The kept rows, one after the other.
    pub fn samples(&self) -> Vec<f32> {
        self.samples.values().flatten().copied().collect()
    }

    /// Those of one batch of activations `[…, k]`, with up to `samples` of its
    /// rows.
    ///
    /// # Errors
    /// `ShapeMismatch` unless x has a dimension, `UnsupportedDtype`, `NonFinite`,
    /// `Cancelled`.
    pub fn of(x: &Tensor, samples: usize, cancel: &Cancel) -> Result<Statistics> {
        let columns = x.row_len();
        if x.shape().is_empty() || columns == 0 {
            return Err(Error::ShapeMismatch {
                what: "activations [tokens, k]".into(),
                expected: vec![x.len(), 1],
                actual: x.shape().to_vec(),
            });
        }
        check_floats(x)?;
        let mut batch = Statistics::new(columns, samples);
        let mut scratch = Vec::new();
        let x = x.f32_chunk(0..x.len(), &mut scratch);
        pool::run(|| batch.gram.add(x, cancel))?;
        for row in x.chunks_exact(columns) {
            let columns = batch.sum_abs.iter_mut().zip(&mut batch.max_abs);
            for ((sum, most), v) in columns.zip(row) {
                *sum += f64::from(v.abs());
                *most = most.max(v.abs());
            }
            batch.tokens += 1;
            batch.sample(row);
        }
        Ok(batch)
    }

    fn sample(&mut self, row: &[f32]) {
        if self.capacity == 0 {
            return;
        }
        let hash = hash(row);
        if self.samples.len() == self.capacity {
            match self.samples.last_key_value() {
                Some((&last, _)) if hash < last => {}
                _ => return,
            }
        }
        self.samples.entry(hash).or_insert_with(|| row.to_vec());
        if self.samples.len() > self.capacity {
            self.samples.pop_last();
        }
    }

    /// Adds what another saw, a batch for instance.
    ///
    /// # Errors
    /// `ShapeMismatch` unless both have as many columns.
    pub fn merge(&mut self, other: &Statistics) -> Result<()> {
        if other.columns != self.columns {
            return Err(Error::ShapeMismatch {
                what: "statistics that are merged".into(),
                expected: vec![self.columns],
                actual: vec![other.columns],
            });
        }
        self.tokens += other.tokens;
        for (mine, theirs) in self.sum_abs.iter_mut().zip(&other.sum_abs) {
            *mine += theirs;
        }
        for (mine, theirs) in self.max_abs.iter_mut().zip(&other.max_abs) {
            *mine = mine.max(*theirs);
        }
        self.gram.merge(&other.gram);
        for row in other.samples.values() {
            self.sample(row);
        }
        Ok(())
    }
}

/// Statistics of many layers, by name.
#[derive(Clone, Debug)]
pub struct Calibration {
    samples: usize,
    layers: BTreeMap<String, Arc<Statistics>>,
}

const PARTS: [&str; 5] = ["gram", "sum_abs", "max_abs", "samples", "tokens"];

impl Calibration {
    /// No layers yet; `samples` rows are kept of each.
    pub fn new(samples: usize) -> Calibration {
        Calibration {
            samples,
            layers: BTreeMap::new(),
        }
    }

    /// Rows that are kept of each layer.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// The layers, by name.
    pub fn layers(&self) -> impl Iterator<Item = (&str, &Statistics)> {
        self.layers.iter().map(|(name, s)| (name.as_str(), &**s))
    }

    /// The statistics of one layer.
    ///
    /// # Errors
    /// `UnknownTensor`, with a similar name where there is one.
    pub fn layer(&self, name: &str) -> Result<Arc<Statistics>> {
        match self.layers.get(name) {
            Some(statistics) => Ok(Arc::clone(statistics)),
            None => Err(unknown_tensor(name, self.layers.keys().map(String::as_str))),
        }
    }

    /// Adds to the statistics of a layer.
    ///
    /// # Errors
    /// `ShapeMismatch` where the layer has another number of columns.
    pub fn add(&mut self, name: &str, statistics: Statistics) -> Result<()> {
        match self.layers.get_mut(name) {
            Some(layer) => Arc::make_mut(layer).merge(&statistics),
            None => {
                self.layers.insert(name.into(), Arc::new(statistics));
                Ok(())
            }
        }
    }

    /// Adds what another saw.
    ///
    /// # Errors
    /// `ShapeMismatch` where a layer has another number of columns; what came
    /// before it is added.
    pub fn merge(&mut self, other: &Calibration) -> Result<()> {
        let layers = other.layers();
        let mut layers = layers.map(|(name, statistics)| (name, statistics.clone()));
        layers.try_for_each(|(name, statistics)| self.add(name, statistics))
    }

    /// Writes a file; it appears under its name only when it is complete and
    /// synced.
    ///
    /// # Errors
    /// `Io`, and `InvalidFile` when two layers' tensors have one name.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".partial-{}", std::process::id()));
        let partial = path.with_file_name(name);
        let written = self.write(&partial).and_then(|()| {
            std::fs::rename(&partial, path).map_err(|e| Error::io(path, &e))?;
            match path.parent() {
                Some(directory) if directory != Path::new("") => sync_directory(directory),
                _ => sync_directory(Path::new(".")),
            }
        });
        if written.is_err() {
            // The error that counts is the first one.
            let _ = std::fs::remove_file(&partial);
        }
        written
    }

    fn write(&self, path: &Path) -> Result<()> {
        let fixed = self.layers().flat_map(|(name, s)| {
            let k = s.columns;
            let shapes = [
                (DType::F32, vec![k, k]),
                (DType::F64, vec![k]),
                (DType::F32, vec![k]),
                (DType::F32, vec![s.samples.len(), k]),
                (DType::I64, vec![1]),
            ];
            PARTS
                .into_iter()
                .zip(shapes)
                .map(move |(part, (dtype, shape))| FixedEntry {
                    name: format!("{name}.{part}"),
                    dtype: EntryDType::Known(dtype),
                    shape,
                })
        });
        let metadata = BTreeMap::from([("samples".to_string(), self.samples.to_string())]);
        let file = ShardWriter::create(path, fixed.collect(), Vec::new(), metadata)?;
        for (name, s) in self.layers() {
            let part = |part| format!("{name}.{part}");
            let mut row = vec![0f32; s.columns];
            for i in 0..s.columns {
                row.iter_mut()
                    .enumerate()
                    .for_each(|(j, g)| *g = s.gram.at(i, j));
                let bytes = bytemuck::cast_slice(&row);
                file.write_at(&part(PARTS[0]), i * bytes.len(), bytes)?;
            }
            file.write(&part(PARTS[1]), bytemuck::cast_slice(&s.sum_abs))?;
            file.write(&part(PARTS[2]), bytemuck::cast_slice(&s.max_abs))?;
            file.write(&part(PARTS[3]), bytemuck::cast_slice(&s.samples()))?;
            file.write(&part(PARTS[4]), &(s.tokens as i64).to_le_bytes())?;
        }
        file.finish().map(|_| ())
    }

    /// Reads a file that [`Calibration::save`] or another program wrote.
    ///
    /// # Errors
    /// `Io`, `InvalidFile` where a tensor is missing, of another dtype or shape,
    /// or holds what no activations give.
    pub fn load(path: &Path) -> Result<Calibration> {
        let file = TensorFile::open(path)?;
        let samples = match file.metadata() {
            Metadata::Safetensors(m) => m.get("samples").and_then(|n| n.parse().ok()),
            Metadata::Gguf(_) => None,
        };
        let mut calibration = Calibration::new(samples.unwrap_or(SAMPLES));
        let entries: BTreeSet<&str> = file.entries().iter().map(|e| e.name.as_str()).collect();
        let layers: BTreeSet<&str> = entries.iter().filter_map(|e| layer_of(e)).collect();
        for name in layers {
            let has = |part: &&str| entries.contains(format!("{name}.{part}").as_str());
            let parts: Vec<&str> = PARTS.into_iter().filter(has).collect();
            let statistics = match parts[..] {
                ["samples"] => {
                    let rows = file.tensor(&format!("{name}.samples"))?;
                    Statistics::of(&rows, calibration.samples, &Cancel::new())?
                }
                _ => Statistics::read(&file, name, calibration.samples)?,
            };
            calibration.layers.insert(name.into(), Arc::new(statistics));
        }
        match calibration.layers.is_empty() {
            false => Ok(calibration),
            true => Err(Error::InvalidFile {
                path: path.display().to_string(),
                message: "holds no statistics: no tensor is named ….gram or ….samples".into(),
            }),
        }
    }
}

/// The layer that an entry of a file speaks of.
fn layer_of(entry: &str) -> Option<&str> {
    [".gram", ".samples"]
        .iter()
        .find_map(|part| entry.strip_suffix(part))
}

impl Statistics {
    fn read(file: &TensorFile, name: &str, samples: usize) -> Result<Statistics> {
        let invalid = |message: String| Error::InvalidFile {
            path: file.path().display().to_string(),
            message,
        };
        let tensor = |part: &str, dtype: DType, shape: &[Option<usize>]| -> Result<Tensor> {
            let name = format!("{name}.{part}");
            let tensor = file.tensor(&name)?;
            let fits = tensor.shape().len() == shape.len()
                && tensor
                    .shape()
                    .iter()
                    .zip(shape)
                    .all(|(a, b)| b.is_none_or(|b| b == *a));
            match tensor.dtype() == dtype && fits {
                true => Ok(tensor),
                false => Err(invalid(format!(
                    "tensor {name:?} is {} {:?}, not {} {shape:?}",
                    tensor.dtype().name(),
                    tensor.shape(),
                    dtype.name()
                ))),
            }
        };
        let sum_abs = tensor("sum_abs", DType::F64, &[None])?;
        let k = sum_abs.len();
        let gram = tensor("gram", DType::F32, &[Some(k), Some(k)])?;
        let max_abs = tensor("max_abs", DType::F32, &[Some(k)])?;
        let rows = tensor("samples", DType::F32, &[None, Some(k)])?;
        let tokens = tensor("tokens", DType::I64, &[Some(1)])?;
        let mut statistics = Statistics::new(k, samples);
        for tensor in [&gram, &max_abs, &rows] {
            check_floats(tensor)?;
        }
        statistics.gram = Gram::from_square(&gram.to_f32_vec(), k);
        if statistics.gram.diagonal().any(|d| d < 0.0) {
            return Err(invalid(format!(
                "{name}.gram has a negative sum of squares"
            )));
        }
        statistics.max_abs = max_abs.to_f32_vec();
        statistics.sum_abs = sum_abs
            .bytes()
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| f64::from_le_bytes(*b))
            .collect();
        if !statistics
            .sum_abs
            .iter()
            .all(|s| s.is_finite() && *s >= 0.0)
        {
            return Err(invalid(format!("{name}.sum_abs is no sum of magnitudes")));
        }
        let mut bytes = [0u8; 8];
        bytes.copy_from_slice(tokens.bytes());
        statistics.tokens = u64::try_from(i64::from_le_bytes(bytes))
            .map_err(|_| invalid(format!("{name}.tokens is negative")))?;
        if k > 0 {
            for row in rows.to_f32_vec().chunks_exact(k) {
                statistics.sample(row);
            }
        }
        Ok(statistics)
    }
}

/// FNV-1a over the bits of a row, mixed once more so that every bit counts.
fn hash(row: &[f32]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for v in row {
        hash = (hash ^ u64::from(v.to_bits())).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^= hash >> 32;
    hash = hash.wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^ (hash >> 32)
}
