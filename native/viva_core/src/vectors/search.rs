//! The vectors of a set that are nearest to others.

use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;

use super::encode::{prepared, spec};
use super::nearest::{Nearest, put};
use super::settings::{Codes, Rescore, Settings};
use crate::error::{Error, Result};
use crate::format::Quantized;
use crate::io::Checkpoint;
use crate::ops::epilogue::Epilogue;
use crate::ops::matmul::matmul_into;
use crate::ops::{Cancel, pool};
use crate::simd::dispatch;
use crate::simd::dot::DotRows;
use crate::simd::signs::{Query, Scores};
use crate::tensor::{DType, Tensor};

/// Scores that are there at once.
const SCORES: usize = 1 << 20;

/// What a search finds of what is there to be found, from 0 to 1.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recall {
    /// Vectors of the set, each of which looks for the others.
    pub queries: usize,
    /// How many of the nearest count.
    pub nearest: usize,
    /// How many of the best by codes are scored again.
    pub candidates: usize,
    /// By codes alone.
    pub codes: f64,
    /// With the candidates scored again.
    pub rescored: Option<f64>,
    /// The same of binary codes whose queries are binary too, which is what databases
    /// search by.
    pub hamming: Option<f64>,
    pub hamming_rescored: Option<f64>,
}

/// How is searched.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// How many of the nearest.
    pub most: usize,
    /// How many of the best by codes are scored again; none if it is less than `most`.
    pub candidates: usize,
    /// Binary codes by their distance to those of the query.
    pub hamming: bool,
    /// For each query a vector that it does not find.
    pub but: Option<&'a [u64]>,
}

/// A set of vectors as it lies on the disk, mapped.
#[derive(Debug)]
pub struct Stored {
    pub settings: Settings,
    pub dimension: usize,
    pub rows: usize,
    codes: Tensor,
    scale: Option<Tensor>,
    mean: Option<Vec<f32>>,
    rescore: Option<(Tensor, Option<Tensor>)>,
    files: Checkpoint,
    /// Whether what was looked at is given back: the memory of a set that is measured once
    /// does not grow with it, while one that is searched again and again stays mapped.
    pub(super) once: bool,
}

impl Stored {
    /// Opens the directory that a writer finished.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::InvalidFile`] when it is none.
    pub fn open(path: impl AsRef<Path>) -> Result<Stored> {
        let path = path.as_ref();
        let none = |message: &str| Error::InvalidFile {
            path: path.display().to_string(),
            message: format!("{message}: it is no directory that vectors were compressed to"),
        };
        let files = Checkpoint::open(path)?;
        let said =
            (files.shards().iter()).find_map(|s| Settings::from_metadata(s.metadata().strings()?));
        let (settings, dimension) = said.ok_or_else(|| none("does not say what its codes are"))?;
        settings.check_dimension(dimension)?;
        let rows = files.tensor("codes")?.shape().first().copied().unwrap_or(0);
        let mut tensors = Vec::new();
        for (name, dtype, row) in settings.tensors(dimension) {
            let tensor = files.tensor(name)?;
            let shape: Vec<usize> = std::iter::once(rows).chain(row).collect();
            if tensor.dtype() != dtype || tensor.shape() != shape {
                return Err(none(&format!("has a {name} of another shape")));
            }
            tensors.push((name, tensor));
        }
        let take = |name: &str| {
            let found = tensors.iter().find(|(n, _)| *n == name);
            found.map(|(_, tensor)| tensor.clone())
        };
        let mean = settings.center.then(|| files.tensor("mean")).transpose()?;
        let mean = mean.map(|m| m.to_f32_vec());
        if mean.as_ref().is_some_and(|m| m.len() != dimension) {
            return Err(none("has a mean of another length"));
        }
        Ok(Stored {
            settings,
            dimension,
            rows,
            codes: take("codes").ok_or_else(|| none("has no codes"))?,
            scale: take("scale"),
            mean,
            rescore: take("rescore").map(|codes| (codes, take("rescore_scale"))),
            files,
            once: false,
        })
    }

    /// Whether its codes are one bit for each element.
    pub fn is_binary(&self) -> bool {
        self.settings.codes == Codes::Binary
    }

    /// Whether it has what the best are scored by again.
    pub fn rescores(&self) -> bool {
        self.rescore.is_some()
    }

    /// The nearest vectors of each query, the best first, with their scores: cosines or
    /// products, of what codes stand for; of binary codes that are not scored again, sums
    /// that only rank.
    ///
    /// # Errors
    /// `ShapeMismatch`, `NonFinite`, `UnsupportedDtype`, `InvalidOption`, `Cancelled`.
    pub fn search(&self, queries: &Tensor, terms: &Terms, cancel: &Cancel) -> Result<Nearest> {
        let queries = self.prepared(queries, cancel)?;
        let again = self.rescores() && terms.candidates >= terms.most;
        let candidates = if again { terms.candidates } else { 0 };
        let found = self.candidates(
            &queries,
            &Terms {
                candidates,
                ..*terms
            },
            cancel,
        )?;
        let best = match again {
            true => self.score_again(&queries, terms.most, &found, cancel)?,
            false => None,
        };
        Ok(best.unwrap_or(found))
    }

    fn prepared(&self, queries: &Tensor, cancel: &Cancel) -> Result<Tensor> {
        if queries.shape().len() != 2 || queries.row_len() != self.dimension {
            let rows = queries.shape().first().copied().unwrap_or(1);
            return Err(Error::ShapeMismatch {
                what: "queries, a row each".into(),
                expected: vec![rows, self.dimension],
                actual: queries.shape().to_vec(),
            });
        }
        prepared(self.settings.metric, queries, cancel)
    }

    /// The best of prepared queries by codes alone: as many as are scored again, or as are
    /// wanted if that is more.
    ///
    /// # Errors
    /// Those of [`search`](Self::search).
    pub(super) fn candidates(
        &self,
        queries: &Tensor,
        terms: &Terms,
        cancel: &Cancel,
    ) -> Result<Nearest> {
        if terms.hamming && !self.is_binary() {
            return Err(Error::option("hamming", "it is a distance of binary codes"));
        }
        let most = terms.candidates.max(terms.most);
        let mut found = Nearest::new(queries.shape()[0], most);
        match self.is_binary() {
            true => self.look_at_bits(queries, terms, &mut found, cancel)?,
            false => self.look_at_integers(queries, terms, &mut found, cancel)?,
        }
        Ok(found)
    }

    /// Some bytes of a tensor were looked at.
    fn seen(&self, name: &str, part: std::ops::Range<usize>) -> Result<()> {
        match self.once {
            true => self.files.give_back_part(name, part),
            false => Ok(()),
        }
    }

    fn blocks(&self, queries: usize) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let step = (SCORES / queries.max(1)).clamp(256, 1 << 16);
        let rows = self.rows;
        (0..rows)
            .step_by(step)
            .map(move |start| start..rows.min(start + step))
    }

    fn look_at_integers(
        &self,
        queries: &Tensor,
        terms: &Terms,
        found: &mut Nearest,
        cancel: &Cancel,
    ) -> Result<()> {
        let (most, spec) = (found.most(), spec(self.settings.codes));
        let Some(scale) = &self.scale else {
            return Ok(());
        };
        let scale = scale.reshaped(vec![self.rows, 1])?;
        let more = self.of_mean(queries);
        for rows in self.blocks(more.len()) {
            let n = rows.len();
            let codes = self.codes.rows(rows.clone())?;
            let q = Quantized {
                shape: vec![n, self.dimension],
                dtype: DType::F32,
                parts: vec![
                    (
                        "codes",
                        match self.settings.codes {
                            Codes::Int8 => codes,
                            _ => codes.reshaped(vec![n * self.dimension / 2])?,
                        },
                    ),
                    ("scales", scale.rows(rows.clone())?.reshaped(vec![n])?),
                ],
                spec: spec.clone(),
            };
            let mut scores = vec![0f32; more.len() * n];
            let out = bytemuck::cast_slice_mut(&mut scores);
            matmul_into(queries, &q, Epilogue::from(DType::F32), out, cancel)?;
            pool::run(|| {
                let all = found
                    .lists_mut()
                    .par_iter_mut()
                    .zip(scores.par_chunks_mut(n));
                all.enumerate().for_each(|(i, (list, scores))| {
                    scores.iter_mut().for_each(|s| *s += more[i]);
                    take(list, most, rows.start, scores, own(terms, i));
                });
                Ok(())
            })?;
            let row = self.codes.row_len();
            self.seen("codes", rows.start * row..rows.end * row)?;
        }
        Ok(())
    }

    fn look_at_bits(
        &self,
        queries: &Tensor,
        terms: &Terms,
        found: &mut Nearest,
        cancel: &Cancel,
    ) -> Result<()> {
        let most = found.most();
        let values = queries.to_f32_vec();
        let queries: Vec<Query> = (values.chunks_exact(self.dimension))
            .map(|x| match (terms.hamming, &self.mean) {
                (false, _) => Query::sums(x),
                (true, None) => Query::hamming(x),
                (true, Some(mean)) => {
                    let x: Vec<f32> = x.iter().zip(mean).map(|(x, m)| x - m).collect();
                    Query::hamming(&x)
                }
            })
            .collect();
        for rows in self.blocks(1) {
            let codes = self.codes.rows(rows.clone())?;
            pool::run(|| {
                let lists = found.lists_mut().par_iter_mut().zip(&queries);
                lists.enumerate().try_for_each_init(
                    || vec![0f32; rows.len()],
                    |scores, (i, (list, query))| {
                        cancel.check()?;
                        dispatch(Scores {
                            query,
                            rows: codes.bytes(),
                            row: codes.row_len(),
                            out: scores,
                        });
                        take(list, most, rows.start, scores, own(terms, i));
                        Ok(())
                    },
                )
            })?;
            let row = codes.row_len();
            self.seen("codes", rows.start * row..rows.end * row)?;
        }
        Ok(())
    }

    /// The best of what was found, by what there is to score it again.
    pub(super) fn score_again(
        &self,
        queries: &Tensor,
        most: usize,
        found: &Nearest,
        cancel: &Cancel,
    ) -> Result<Option<Nearest>> {
        let Some((codes, scale)) = &self.rescore else {
            return Ok(None);
        };
        /// Pages around one that is touched are mapped with it.
        const AROUND: usize = 64 << 10;
        let d = self.dimension;
        let (row_bytes, all) = (d * codes.dtype().size(), codes.bytes().len());
        let values = queries.to_f32_vec();
        // Vectors themselves have no mean taken from them.
        let more = match self.settings.rescore {
            Rescore::Int8 => self.of_mean(queries),
            _ => vec![0.0; found.lists().len()],
        };
        let mut best = Nearest::new(found.lists().len(), most);
        pool::run(|| {
            let lists = best.lists_mut().par_iter_mut().zip(found.lists());
            lists.enumerate().try_for_each(|(i, (list, candidates))| {
                cancel.check()?;
                let (mut scratch, mut one) = (Vec::new(), Vec::new());
                for &(id, _) in candidates {
                    let row = id as usize;
                    let mut score = [0f32];
                    dispatch(DotRows {
                        k: d,
                        x: &values[i * d..(i + 1) * d],
                        w: codes.f32_chunk(row * d..(row + 1) * d, &mut scratch),
                        out: &mut score,
                    });
                    let scale = scale
                        .as_ref()
                        .map_or(1.0, |s| s.f32_chunk(row..row + 1, &mut one)[0]);
                    put(list, most, (id, score[0] * scale + more[i]));
                    let (from, to) = (row * row_bytes, (row + 1) * row_bytes);
                    let part = from.saturating_sub(AROUND)..all.min(to + AROUND);
                    self.seen("rescore", part)?;
                }
                Ok(())
            })
        })?;
        Ok(Some(best))
    }

    /// What the mean, which codes lack, adds to the scores of each query.
    fn of_mean(&self, queries: &Tensor) -> Vec<f32> {
        let values = queries.to_f32_vec();
        let queries = values.chunks_exact(self.dimension);
        match &self.mean {
            None => queries.map(|_| 0.0).collect(),
            Some(mean) => queries
                .map(|x| {
                    let products = x
                        .iter()
                        .zip(mean)
                        .map(|(x, m)| f64::from(*x) * f64::from(*m));
                    products.sum::<f64>() as f32
                })
                .collect(),
        }
    }
}

fn own(terms: &Terms, query: usize) -> Option<u64> {
    terms.but.and_then(|but| but.get(query).copied())
}

fn take(list: &mut Vec<(u64, f32)>, most: usize, first: usize, scores: &[f32], own: Option<u64>) {
    for (row, &score) in scores.iter().enumerate() {
        // Most are worse than what is there already.
        if list.len() == most && list.last().is_some_and(|(_, least)| score <= *least) {
            continue;
        }
        let id = (first + row) as u64;
        if Some(id) != own {
            put(list, most, (id, score));
        }
    }
}
