//! A set of vectors on its way to the disk.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use sha2::{Digest, Sha256};
use twox_hash::XxHash3_128;

use super::encode::{Encoder, prepared};
use super::nearest::{Nearest, Queries};
use super::search::{Recall, Stored, Terms};
use super::settings::Settings;
use crate::error::{Error, Result};
use crate::io::{RowsFile, index_json, sync_directory};
use crate::ops::{Cancel, pool};
use crate::tensor::{DType, Tensor};

/// What a search is measured by: how many of the nearest it finds, of so many.
pub(super) const NEAREST: usize = 10;

const INDEX: &str = "vectors.safetensors.index.json";

/// Writes vectors of a set, in any order of its pieces, from many threads.
#[derive(Debug)]
pub struct Writer {
    directory: PathBuf,
    encoder: Encoder,
    files: Vec<RowsFile>,
    queries: Queries,
    nearest: Mutex<Nearest>,
    /// Whether the names of its files are durable.
    named: AtomicBool,
}

/// What came of consecutive vectors, and what they are known again by.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    pub output_bytes: usize,
    /// Of the vectors.
    pub source_hash: [u8; 16],
    /// Of what was written of them.
    pub sha256: [u8; 32],
    /// What the queries find among them, exactly.
    pub nearest: Vec<u8>,
}

impl Writer {
    /// Starts the files of a set in a directory, or goes on with those that another
    /// writer of the same left. The mean, and as many queries, come from a sample of the
    /// vectors, which have these numbers; `rows` is how many there will be, if that is known.
    ///
    /// # Errors
    /// `InvalidOption` for a dimension that the codes cannot have, `NonFinite`,
    /// `UnsupportedDtype`, [`Error::Io`].
    pub fn create(
        directory: &Path,
        settings: Settings,
        (sample, ids): (&Tensor, &[u64]),
        queries: usize,
        rows: Option<usize>,
    ) -> Result<Writer> {
        settings.check_dimension(sample.row_len())?;
        let sample = prepared(settings.metric, sample, &Cancel::new())?;
        let encoder = Encoder::new(settings, &sample)?;
        let metadata = settings.metadata(encoder.dimension);
        let file = |name: &str, dtype: DType, row: &[usize], rows| {
            let path = directory.join(format!("{name}.safetensors"));
            RowsFile::create(path, (name, dtype, row), metadata.clone(), rows)
        };
        let files = settings.tensors(encoder.dimension).into_iter();
        let queries = Queries::of(&sample, ids, queries);
        Ok(Writer {
            directory: directory.into(),
            files: files
                .map(|(name, dtype, row)| file(name, dtype, &row, rows))
                .collect::<Result<_>>()?,
            nearest: Mutex::new(Nearest::new(queries.ids.len(), NEAREST)),
            queries,
            encoder,
            named: AtomicBool::new(false),
        })
    }

    /// Encodes and writes vectors from the one of that number on.
    ///
    /// # Errors
    /// `ShapeMismatch`, `NonFinite`, `UnsupportedDtype`, `InvalidOption`, `Cancelled`,
    /// [`Error::Io`].
    pub fn write(&self, first: usize, x: &Tensor, cancel: &Cancel) -> Result<Piece> {
        if x.shape().len() != 2 || x.row_len() != self.encoder.dimension {
            return Err(Error::ShapeMismatch {
                what: "vectors of one set".into(),
                expected: vec![x.shape()[0], self.encoder.dimension],
                actual: x.shape().to_vec(),
            });
        }
        let source_hash = source_hash(x);
        let x = prepared(self.encoder.settings.metric, x, cancel)?;
        let mut nearest = Nearest::new(self.queries.ids.len(), NEAREST);
        nearest.look(&self.queries, &x, first, cancel)?;
        let tensors = self.encoder.encode(&x, cancel)?;
        let digests = pool::run(|| {
            let write = |(file, bytes): (&RowsFile, &Vec<u8>)| {
                cancel.check()?;
                file.write(first, bytes)?;
                Ok(Sha256::digest(bytes))
            };
            let written = self.files.par_iter().zip(&tensors).map(write);
            written.collect::<Result<Vec<_>>>()
        })?;
        let output_bytes = tensors.iter().map(Vec::len).sum();
        let piece = Piece {
            output_bytes,
            source_hash,
            sha256: of_all(digests),
            nearest: nearest.to_bytes(),
        };
        self.found(&piece);
        Ok(piece)
    }

    /// Whether vectors that an earlier writer wrote are there still; they count then.
    ///
    /// # Errors
    /// `Cancelled`, [`Error::Io`].
    pub fn verify(
        &self,
        first: usize,
        rows: usize,
        piece: &Piece,
        cancel: &Cancel,
    ) -> Result<bool> {
        let mut digests = Vec::new();
        for file in &self.files {
            cancel.check()?;
            let mut bytes = vec![0; rows * file.row_bytes()];
            if !file.read(first, &mut bytes)? {
                return Ok(false);
            }
            digests.push(Sha256::digest(&bytes));
        }
        let same = piece.sha256 == of_all(digests);
        if same {
            self.found(piece);
        }
        Ok(same)
    }

    fn found(&self, piece: &Piece) {
        let mut nearest = self.nearest.lock().unwrap_or_else(PoisonError::into_inner);
        nearest.merge_bytes(&piece.nearest);
    }

    /// Syncs what is written so far to the disk, and at first the names of the files.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        self.files.iter().try_for_each(RowsFile::sync)?;
        if !self.named.load(Ordering::Acquire) {
            sync_directory(&self.directory)?;
            self.named.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Completes the files of that many vectors and writes the index: names and lengths of
    /// the files. Doing it again does no harm.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(&self, rows: usize) -> Result<Vec<(String, usize)>> {
        let mut written = Vec::new();
        for file in &self.files {
            written.push(file.finish(rows)?);
        }
        if let Some(mean) = &self.encoder.mean {
            let path = self.directory.join("mean.safetensors");
            let metadata = self.encoder.settings.metadata(mean.len());
            let file = RowsFile::create(path, ("mean", DType::F32, &[]), metadata, None)?;
            file.write(0, bytemuck::cast_slice(mean))?;
            written.push(file.finish(mean.len())?);
        }
        let index = self.directory.join(INDEX);
        std::fs::write(&index, index_json(&written)).map_err(|e| Error::io(&index, &e))?;
        Ok(written
            .into_iter()
            .map(|w| (w.file, w.file_bytes))
            .collect())
    }

    /// How many of the nearest vectors a search in the finished files finds. Nothing
    /// where there were no queries, or nothing to find.
    ///
    /// # Errors
    /// [`Error::InvalidFile`], [`Error::Io`], `Cancelled`.
    pub fn recall(&self, oversample: usize, cancel: &Cancel) -> Result<Option<Recall>> {
        let nearest = self.nearest.lock().unwrap_or_else(PoisonError::into_inner);
        let exact = nearest.lists();
        if exact.iter().all(Vec::is_empty) {
            return Ok(None);
        }
        let mut stored = Stored::open(&self.directory)?;
        stored.once = true;
        let x = &self.queries.values;
        let shape = [self.queries.ids.len(), self.encoder.dimension];
        let queries = Tensor::from_slice(DType::F32, &shape, x)?;
        let candidates = NEAREST * oversample;
        // One search tells of both: the best by codes are the first of its candidates.
        let recall = |hamming| -> Result<(f64, Option<f64>)> {
            let terms = Terms {
                most: NEAREST,
                candidates,
                hamming,
                but: Some(&self.queries.ids),
            };
            let found = stored.candidates(&queries, &terms, cancel)?;
            let again = stored.score_again(&queries, NEAREST, &found, cancel)?;
            let rescored = again.map(|again| share(exact, again.lists()));
            Ok((share(exact, found.lists()), rescored))
        };
        let (codes, rescored) = recall(false)?;
        let hamming = stored.is_binary().then(|| recall(true)).transpose()?;
        Ok(Some(Recall {
            queries: self.queries.ids.len(),
            nearest: NEAREST,
            candidates,
            codes,
            rescored,
            hamming: hamming.map(|(codes, _)| codes),
            hamming_rescored: hamming.and_then(|(_, rescored)| rescored),
        }))
    }
}

/// One hash of those of all files.
fn of_all(digests: impl IntoIterator<Item = impl AsRef<[u8]>>) -> [u8; 32] {
    let mut all = Sha256::new();
    digests.into_iter().for_each(|digest| all.update(digest));
    all.finalize().into()
}

/// A hash by which vectors of a source are known again.
pub fn source_hash(x: &Tensor) -> [u8; 16] {
    XxHash3_128::oneshot(x.bytes()).to_le_bytes()
}

/// The share of what is to be found that was found.
fn share(exact: &[Vec<(u64, f32)>], found: &[Vec<(u64, f32)>]) -> f64 {
    let hits = exact.iter().zip(found).map(|(exact, found)| {
        let best = &found[..found.len().min(NEAREST)];
        exact
            .iter()
            .filter(|(id, _)| best.iter().any(|(f, _)| f == id))
            .count()
    });
    let all: usize = exact.iter().map(Vec::len).sum();
    hits.sum::<usize>() as f64 / all.max(1) as f64
}
