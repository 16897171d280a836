//! What is remembered of the activations that a weight met: enough for every
//! method, in memory that does not grow with their number.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::method::gram::Gram;
use crate::ops::quantize::check_floats;
use crate::ops::{Cancel, pool};
use crate::tensor::Tensor;

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
