//! Embedding vectors: matrices, codes of them, searches.

use std::path::Path;

use rustler::{Atom, Encoder, Env, Term};
use serde_json::Value;
use viva_core::Error;
use viva_core::io::Matrix;
use viva_core::vectors::{self, Piece, Settings, Stored, Terms, Writer};

use crate::error::Outcome;
use crate::json;
use crate::record::Bytes;
use crate::resource::{
    CancelRef, MatrixRef, MatrixResource, OutputRef, Slot, StoredRef, StoredResource, TensorRef,
    WriterRef, WriterResource,
};
use crate::terms::{self, Name};

/// `{codes, rescore, metric, center}`.
type SettingsTerm = (Name, Name, Name, bool);

fn settings((codes, rescore, metric, center): SettingsTerm) -> Result<Settings, Error> {
    let rescore = Some(rescore.0.as_str()).filter(|&name| name != "nil");
    Settings::resolve(&codes.0, rescore, &metric.0, center)
}

fn names<'a>(env: Env<'a>, settings: &Settings) -> Vec<(&'static str, Term<'a>)> {
    let [codes, rescore, metric] = settings.names();
    vec![
        ("codes", terms::atom(env, codes)),
        ("rescore", terms::atom(env, rescore)),
        ("metric", terms::atom(env, metric)),
        ("center", settings.center.encode(env)),
    ]
}

/// The settings with every choice made.
#[rustler::nif]
fn vectors_settings<'a>(env: Env<'a>, asked: SettingsTerm) -> Outcome<Term<'a>> {
    Ok(terms::map(env, &names(env, &settings(asked)?)))
}

#[rustler::nif(schedule = "DirtyIo")]
fn matrix_open<'a>(env: Env<'a>, path: String, tensor: Option<String>) -> Outcome<Term<'a>> {
    let matrix = Matrix::open(path, tensor.as_deref())?;
    let shape = matrix.tensor().shape();
    let fields = [
        ("rows", shape[0].encode(env)),
        ("dimension", shape[1].encode(env)),
        ("dtype", terms::atom(env, matrix.tensor().dtype().name())),
        ("bytes", matrix.tensor().bytes().len().encode(env)),
        ("file", matrix.path().to_string_lossy().encode(env)),
    ];
    let resource = MatrixRef::new(MatrixResource(matrix));
    let mut all = vec![("ref", resource.encode(env))];
    all.extend(fields);
    Ok(terms::map(env, &all))
}

#[rustler::nif]
fn matrix_rows<'a>(
    env: Env<'a>,
    matrix: MatrixRef,
    first: usize,
    count: usize,
) -> Outcome<Term<'a>> {
    Ok(terms::tensor(env, matrix.0.rows(first..first + count)?))
}

#[rustler::nif(schedule = "DirtyIo")]
fn matrix_give_back(matrix: MatrixRef, first: usize, count: usize) -> Atom {
    matrix.0.give_back(first..first + count);
    rustler::types::atom::ok()
}

/// A tensor of that many rows, chosen all over the matrix, and their numbers.
#[rustler::nif(schedule = "DirtyIo")]
fn matrix_sample<'a>(
    env: Env<'a>,
    matrix: MatrixRef,
    most: usize,
) -> Outcome<(Term<'a>, Vec<u64>)> {
    let (sample, ids) = matrix.0.sample(most)?;
    Ok((terms::tensor(env, sample), ids))
}

/// Starts the files of a set in an output, or goes on with them.
#[rustler::nif(schedule = "DirtyCpu")]
fn vectors_create(
    output: OutputRef,
    asked: SettingsTerm,
    sample: TensorRef,
    ids: Vec<u64>,
    queries: usize,
    rows: Option<usize>,
) -> Outcome<WriterRef> {
    let directory = crate::job::with_output(&output, |o| Ok(o.path().to_path_buf()))?;
    let sample = sample.0.get()?;
    let writer = Writer::create(&directory, settings(asked)?, (&sample, &ids), queries, rows)?;
    Ok(WriterRef::new(WriterResource(writer)))
}

/// `{output_bytes, source_hash, sha256, nearest}`.
type PieceTerm = (usize, Bytes, Bytes, Bytes);

#[rustler::nif(schedule = "DirtyCpu")]
fn vectors_write(
    writer: WriterRef,
    first: usize,
    vectors: TensorRef,
    cancel: CancelRef,
) -> Outcome<PieceTerm> {
    let vectors = vectors.0.get()?;
    let piece = writer.0.write(first, &vectors, &*cancel.enter()?)?;
    Ok((
        piece.output_bytes,
        Bytes(piece.source_hash.into()),
        Bytes(piece.sha256.into()),
        Bytes(piece.nearest),
    ))
}

/// Whether vectors are as they were recorded; they count as written then.
#[rustler::nif(schedule = "DirtyIo")]
fn vectors_verify(
    writer: WriterRef,
    first: usize,
    count: usize,
    piece: PieceTerm,
    cancel: CancelRef,
) -> Outcome<bool> {
    let (output_bytes, source_hash, sha256, nearest) = piece;
    let (Ok(source_hash), Ok(sha256)) = (source_hash.0.try_into(), sha256.0.try_into()) else {
        return Ok(false);
    };
    let piece = Piece {
        output_bytes,
        source_hash,
        sha256,
        nearest: nearest.0,
    };
    Ok(writer.0.verify(first, count, &piece, &*cancel.enter()?)?)
}

/// A hash by which vectors of a source are known again.
#[rustler::nif(schedule = "DirtyCpu")]
fn vectors_source_hash(vectors: TensorRef) -> Outcome<Bytes> {
    Ok(Bytes(vectors::source_hash(&*vectors.0.get()?).into()))
}

#[rustler::nif(schedule = "DirtyIo")]
fn vectors_sync(writer: WriterRef) -> Outcome<Atom> {
    writer.0.sync()?;
    Ok(rustler::types::atom::ok())
}

/// Completes the files: `[{name, bytes}]`.
#[rustler::nif(schedule = "DirtyIo")]
fn vectors_finish(writer: WriterRef, rows: usize) -> Outcome<Vec<(String, usize)>> {
    Ok(writer.0.finish(rows)?)
}

/// What a search in the finished files finds, or nil where there is nothing to find.
#[rustler::nif(schedule = "DirtyCpu")]
fn vectors_recall<'a>(
    env: Env<'a>,
    writer: WriterRef,
    oversample: usize,
    cancel: CancelRef,
) -> Outcome<Term<'a>> {
    let recall = writer.0.recall(oversample, &*cancel.enter()?)?;
    let recall = serde_json::to_value(recall).unwrap_or(Value::Null);
    Ok(json::to_term(env, &recall, json::Keys::Atoms))
}

#[rustler::nif(schedule = "DirtyIo")]
fn vectors_open<'a>(env: Env<'a>, path: String) -> Outcome<Term<'a>> {
    let stored = Stored::open(Path::new(&path))?;
    let mut fields = names(env, &stored.settings);
    fields.push(("count", stored.rows.encode(env)));
    fields.push(("dimension", stored.dimension.encode(env)));
    let resource = StoredRef::new(StoredResource(Slot::new(stored)));
    fields.push(("ref", resource.encode(env)));
    Ok(terms::map(env, &fields))
}

/// `[[{number, score}]]`.
#[rustler::nif(schedule = "DirtyCpu")]
fn vectors_search(
    stored: StoredRef,
    queries: TensorRef,
    most: usize,
    candidates: usize,
    hamming: bool,
) -> Outcome<Vec<Vec<(u64, f32)>>> {
    let terms = Terms {
        most,
        candidates,
        hamming,
        but: None,
    };
    let queries = queries.0.get()?;
    let found = stored
        .0
        .get()?
        .search(&queries, &terms, &Default::default())?;
    Ok(found.lists().to_vec())
}

#[rustler::nif]
fn vectors_release(stored: StoredRef) -> Atom {
    stored.0.release();
    rustler::types::atom::ok()
}
