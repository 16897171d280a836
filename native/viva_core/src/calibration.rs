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
        let file = StatisticsFile::open(path)?;
        let mut calibration = Calibration::new(file.samples);
        for name in file.layers() {
            let statistics = file.read(name)?;
            calibration.layers.insert(name.into(), Arc::new(statistics));
        }
        Ok(calibration)
    }
}

/// A saved calibration, of which one layer at a time is read.
pub struct StatisticsFile {
    file: TensorFile,
    samples: usize,
}

impl StatisticsFile {
    fn open(path: &Path) -> Result<StatisticsFile> {
        let file = TensorFile::open(path)?;
        let samples = match file.metadata() {
            Metadata::Safetensors(m) => m.get("samples").and_then(|n| n.parse().ok()),
            Metadata::Gguf(_) => None,
        };
        let opened = StatisticsFile {
            file,
            samples: samples.unwrap_or(SAMPLES),
        };
        if opened.layers().is_empty() {
            return Err(Error::InvalidFile {
                path: path.display().to_string(),
                message: "holds no statistics: no tensor is named ….gram or ….samples".into(),
            });
        }
        Ok(opened)
    }

    fn layers(&self) -> BTreeSet<&str> {
        let entries = self.file.entries().iter();
        entries.filter_map(|e| layer_of(&e.name)).collect()
    }

    fn has(&self, name: &str, part: &str) -> bool {
        self.file.entry(&format!("{name}.{part}")).is_ok()
    }

    /// Whether there are rows of a layer, and no sums.
    fn rows_only(&self, name: &str) -> bool {
        PARTS
            .iter()
            .all(|part| self.has(name, part) == (*part == "samples"))
    }

    fn read(&self, name: &str) -> Result<Statistics> {
        if self.rows_only(name) {
            let rows = self.file.tensor(&format!("{name}.samples"))?;
            return Statistics::of(&rows, self.samples, &Cancel::new());
        }
        Statistics::read(&self.file, name, self.samples)
    }

    fn tokens(&self, name: &str) -> Result<u64> {
        if self.rows_only(name) {
            let rows = self.file.entry(&format!("{name}.samples"))?;
            return Ok(rows.shape.first().map_or(0, |n| *n as u64));
        }
        Statistics::read_tokens(&self.file, name)
    }

    fn columns(&self, name: &str) -> usize {
        let samples = self.file.entry(&format!("{name}.samples"));
        samples.map_or(0, |e| e.shape.last().copied().unwrap_or(0))
    }
}

/// Statistics of the layers of a model, wherever they are.
pub enum Recorded {
    Memory(Calibration),
    File(StatisticsFile),
}

impl Recorded {
    /// Those of a file, whose layers are read when they are asked for.
    ///
    /// # Errors
    /// `Io`, `InvalidFile`.
    pub fn open(path: &Path) -> Result<Recorded> {
        StatisticsFile::open(path).map(Recorded::File)
    }

    /// Every layer with the columns of its input.
    pub fn layers(&self) -> Vec<(&str, usize)> {
        match self {
            Recorded::Memory(c) => c.layers().map(|(name, s)| (name, s.columns)).collect(),
            Recorded::File(f) => {
                let layers = f.layers().into_iter();
                layers.map(|name| (name, f.columns(name))).collect()
            }
        }
    }

    /// Rows of activations that a layer met.
    ///
    /// # Errors
    /// As of [`Recorded::layer`].
    pub fn tokens(&self, name: &str) -> Result<u64> {
        match self {
            Recorded::Memory(c) => Ok(c.layer(name)?.tokens),
            Recorded::File(f) => f.tokens(name),
        }
    }

    /// The statistics of one layer.
    ///
    /// # Errors
    /// `UnknownTensor`, with a similar name where there is one; of a file, those of
    /// [`Calibration::load`].
    pub fn layer(&self, name: &str) -> Result<Arc<Statistics>> {
        match self {
            Recorded::Memory(calibration) => calibration.layer(name),
            Recorded::File(f) => {
                let layers = f.layers();
                if !layers.contains(name) {
                    return Err(unknown_tensor(name, layers.into_iter()));
                }
                f.file.check_unchanged()?;
                let statistics = f.read(name)?;
                for part in PARTS.iter().filter(|part| f.has(name, part)) {
                    f.file.give_back(&format!("{name}.{part}"))?;
                }
                Ok(Arc::new(statistics))
            }
        }
    }
}

/// One tensor of a layer; `None` in its shape fits any length.
fn part(
    file: &TensorFile,
    layer: &str,
    part: &str,
    dtype: DType,
    shape: &[Option<usize>],
) -> Result<Tensor> {
    let name = format!("{layer}.{part}");
    let tensor = file.tensor(&name)?;
    let lengths = tensor.shape().iter().zip(shape);
    let fits = tensor.shape().len() == shape.len()
        && lengths.into_iter().all(|(a, b)| b.is_none_or(|b| b == *a));
    match tensor.dtype() == dtype && fits {
        true => Ok(tensor),
        false => Err(invalid(
            file,
            format!(
                "tensor {name:?} is {} {:?}, not {} {shape:?}",
                tensor.dtype().name(),
                tensor.shape(),
                dtype.name()
            ),
        )),
    }
}

fn invalid(file: &TensorFile, message: String) -> Error {
    Error::InvalidFile {
        path: file.path().display().to_string(),
        message,
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
        let sum_abs = part(file, name, "sum_abs", DType::F64, &[None])?;
        let k = sum_abs.len();
        let gram = part(file, name, "gram", DType::F32, &[Some(k), Some(k)])?;
        let max_abs = part(file, name, "max_abs", DType::F32, &[Some(k)])?;
        let rows = part(file, name, "samples", DType::F32, &[None, Some(k)])?;
        let mut statistics = Statistics::new(k, samples);
        for tensor in [&gram, &max_abs, &rows] {
            check_floats(tensor)?;
        }
        statistics.gram = Gram::from_square(&gram.to_f32_vec(), k);
        if statistics.gram.diagonal().any(|d| d < 0.0) {
            return Err(invalid(
                file,
                format!("{name}.gram has a negative sum of squares"),
            ));
        }
        statistics.max_abs = max_abs.to_f32_vec();
        let sums = sum_abs.bytes().as_chunks::<8>().0.iter();
        statistics.sum_abs = sums.map(|b| f64::from_le_bytes(*b)).collect();
        let possible = |s: &f64| s.is_finite() && *s >= 0.0;
        if !statistics.sum_abs.iter().all(possible) {
            return Err(invalid(
                file,
                format!("{name}.sum_abs is no sum of magnitudes"),
            ));
        }
        statistics.tokens = Statistics::read_tokens(file, name)?;
        if k > 0 {
            for row in rows.to_f32_vec().chunks_exact(k) {
                statistics.sample(row);
            }
        }
        Ok(statistics)
    }

    fn read_tokens(file: &TensorFile, name: &str) -> Result<u64> {
        let tokens = part(file, name, "tokens", DType::I64, &[Some(1)])?;
        let mut bytes = [0u8; 8];
        bytes.copy_from_slice(tokens.bytes());
        u64::try_from(i64::from_le_bytes(bytes))
            .map_err(|_| invalid(file, format!("{name}.tokens is negative")))
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
