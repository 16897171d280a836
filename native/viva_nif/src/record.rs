//! What is recorded of finished units, and known again by a later job.

use rustler::{Atom, Binary, Decoder, Encoder, Env, NewBinary, NifResult, Term};
use viva_core::Error;
use viva_core::io::{self, Found, OutputDir};
use viva_core::unit::{self, Part};

use crate::error::Outcome;
use crate::job::with_output;
use crate::resource::{CancelRef, CheckpointRef, ConversionRef, OutputRef, ShardRef};
use crate::terms;

/// Bytes as a binary.
pub struct Bytes(pub Vec<u8>);

impl Encoder for Bytes {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        let mut binary = NewBinary::new(env, self.0.len());
        binary.copy_from_slice(&self.0);
        binary.into()
    }
}

impl<'a> Decoder<'a> for Bytes {
    fn decode(term: Term<'a>) -> NifResult<Bytes> {
        Ok(Bytes(term.decode::<Binary>()?.to_vec()))
    }
}

/// `{name, {start, end}, sha256, late}`.
type PartTerm = (String, (usize, usize), Bytes, Option<Bytes>);

/// What a unit returns: `{stats, source_hash, parts}`.
pub fn done<'a>(
    env: Env<'a>,
    stats: Term<'a>,
    source_hash: [u8; 16],
    parts: Vec<Part>,
) -> Term<'a> {
    let part = |p: Part| -> PartTerm {
        let range = (p.range.start, p.range.end);
        (p.name, range, Bytes(p.sha256.into()), p.late.map(Bytes))
    };
    let parts: Vec<PartTerm> = parts.into_iter().map(part).collect();
    (stats, Bytes(source_hash.into()), parts).encode(env)
}

fn part((name, (start, end), sha256, late): PartTerm) -> Result<Part, Error> {
    let sha256 = sha256.0.try_into().map_err(|_| Error::InvalidOption {
        option: "parts".into(),
        message: format!("the hash of {name:?} is not one of SHA-256"),
    })?;
    let late = late.map(|l| l.0);
    Ok(Part {
        name,
        range: start..end,
        sha256,
        late,
    })
}

/// What was there when the output was opened, and the path of its manifest.
#[rustler::nif(schedule = "DirtyIo")]
fn output_found<'a>(env: Env<'a>, output: OutputRef) -> Outcome<(Term<'a>, String)> {
    Ok(with_output(&output, |o| {
        let found = match o.found() {
            Found::Nothing => "nothing",
            Found::Unfinished => "unfinished",
            Found::Published => "published",
        };
        Ok((
            terms::atom(env, found),
            o.manifest().to_string_lossy().into_owned(),
        ))
    })?)
}

/// Makes what these shards hold durable, and then that the manifest says so.
#[rustler::nif(schedule = "DirtyIo")]
fn output_record(
    output: OutputRef,
    shards: Vec<ShardRef>,
    at: u64,
    records: Binary,
) -> Outcome<usize> {
    // Not under the lock: others go on with the output meanwhile.
    let recorder = with_output(&output, |o| Ok(o.recorder()))?;
    let shards: Vec<_> = shards.iter().map(|s| &s.0).collect();
    recorder.record(&shards, at, &records)?;
    Ok(records.len())
}

/// Whether a shard holds these parts as they were recorded; they count as written
/// then.
#[rustler::nif(schedule = "DirtyIo")]
fn unit_verify(shard: ShardRef, parts: Vec<PartTerm>, cancel: CancelRef) -> Outcome<bool> {
    let parts = parts.into_iter().map(part);
    let parts = parts.collect::<Result<Vec<Part>, Error>>()?;
    Ok(unit::verify(&shard.0, &parts, &*cancel.enter()?)?)
}

/// These parts were written by another node, and synced by it.
#[rustler::nif(schedule = "DirtyIo")]
fn unit_accept(shard: ShardRef, parts: Vec<PartTerm>) -> Outcome<Atom> {
    for term in parts {
        unit::accept(&shard.0, &part(term)?)?;
    }
    Ok(rustler::types::atom::ok())
}

/// What the file of a shard is known by to other nodes.
#[rustler::nif(schedule = "DirtyIo")]
fn shard_mark(shard: ShardRef) -> Outcome<String> {
    Ok(shard.0.mark()?)
}

/// Makes what was written to a shard durable.
#[rustler::nif(schedule = "DirtyIo")]
fn shard_sync(shard: ShardRef) -> Outcome<Atom> {
    shard.0.sync()?;
    Ok(rustler::types::atom::ok())
}

/// A hash of what the unit of this name is read from.
#[rustler::nif(schedule = "DirtyIo")]
fn unit_source_hash<'a>(
    env: Env<'a>,
    source: CheckpointRef,
    name: String,
    rows: Option<(usize, usize)>,
    conversion: Option<ConversionRef>,
) -> Outcome<Term<'a>> {
    let source = source.0.get()?;
    let hash = match (conversion, rows) {
        (Some(conversion), _) => conversion.0.source_hash(&source, &name),
        (None, Some((first, last))) => unit::source_rows_hash(&source, &name, first..last),
        (None, None) => unit::source_hash(&source, [name.as_str()]),
    };
    Ok(Bytes(hash?.into()).encode(env))
}

/// A hash of what these tensors hold.
#[rustler::nif(schedule = "DirtyIo")]
fn source_hash<'a>(env: Env<'a>, source: CheckpointRef, names: Vec<String>) -> Outcome<Term<'a>> {
    let hash = unit::source_hash(&*source.0.get()?, names.iter().map(String::as_str))?;
    Ok(Bytes(hash.into()).encode(env))
}

/// Where the manifest of an unfinished output of that target is, or nil.
#[rustler::nif(schedule = "DirtyIo")]
fn output_manifest(target: String) -> Option<String> {
    let manifest = OutputDir::manifest_of(target);
    manifest.map(|m| m.to_string_lossy().into_owned())
}

/// Whether a job is writing in that directory now.
#[rustler::nif(schedule = "DirtyIo")]
fn output_locked(directory: String) -> bool {
    OutputDir::is_locked(directory)
}

/// `{bytes, identity}` of a file: the identity changes with everything that is
/// done to it.
#[rustler::nif(schedule = "DirtyIo")]
fn file_identity(path: String) -> Outcome<(u64, String)> {
    Ok(io::file_identity(path)?)
}

/// A hash of the whole content of a file.
#[rustler::nif(schedule = "DirtyIo")]
fn file_hash<'a>(env: Env<'a>, path: String) -> Outcome<Term<'a>> {
    Ok(Bytes(unit::file_hash(path)?.into()).encode(env))
}

/// How many native calls are under way with this flag.
#[rustler::nif]
fn cancel_calls(flag: CancelRef) -> usize {
    flag.calls()
}

/// Lets go of an output: what is recorded stays, the rest goes.
#[rustler::nif(schedule = "DirtyIo")]
fn output_release(output: OutputRef) -> Atom {
    drop(crate::job::take_output(&output));
    rustler::types::atom::ok()
}
