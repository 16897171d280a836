//! The native work of jobs: specs with layouts, shards, units, output
//! directories.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use rustler::{Atom, Binary, Encoder, Env, Term};
use serde_json::Value;
use viva_core::Error;
use viva_core::io::{self, EntryDType, OutputDir, ShardFile, WrittenShard};
use viva_core::layout::Modules;
use viva_core::ops::metrics::Seen;
use viva_core::tensor::DType;
use viva_core::unit::{self, Done, Planned, Target};

use crate::error::{Failure, Outcome};
use crate::record;
use crate::resource::{
    CancelRef, CheckpointRef, ObservedRef, OutputRef, OutputResource, ShardRef, ShardResource,
    TargetRef, TargetResource,
};
use crate::terms::{self, Name, Options};

#[rustler::nif]
fn spec_new<'a>(env: Env<'a>, format: Name, options: Options, layout: Name) -> Outcome<Term<'a>> {
    // nil leaves the choice to the format.
    let name = Some(layout.0.as_str()).filter(|&n| n != "nil");
    let target = Target::resolve(&format.0, options.0, name)?;
    let fields = [
        ("format", terms::atom(env, &target.spec.format)),
        ("layout", terms::atom(env, target.layout.name())),
        ("options", terms::options(env, target.options()?)),
        ("calibrated", target.calibrated.is_some().encode(env)),
    ];
    let resource = TargetRef::new(TargetResource(target));
    let mut all = vec![("ref", resource.encode(env))];
    all.extend(fields);
    Ok(terms::map(env, &all))
}

#[rustler::nif]
fn plan_tensor<'a>(
    env: Env<'a>,
    target: TargetRef,
    name: String,
    shape: Vec<usize>,
    dtype: String,
) -> Outcome<Term<'a>> {
    let dtype = EntryDType::Known(DType::from_name(&dtype)?);
    let entries = target.0.entries(&name, dtype, &shape)?;
    let format = &target.0.spec_for(&shape)?.format;
    let fields = [
        ("bytes", entries.nbytes()?.encode(env)),
        ("format", terms::atom(env, format)),
    ];
    Ok(terms::map(env, &fields))
}

/// `{rows, bytes}`: how many rows of a huge tensor a unit does, and the memory that it
/// takes; nil where the tensor is one unit.
#[rustler::nif]
fn plan_rows(
    target: TargetRef,
    source: CheckpointRef,
    name: String,
) -> Outcome<Option<(usize, usize)>> {
    let ranges = target.0.ranges(&*source.0.get()?, &name)?;
    Ok(ranges.map(|r| (r.rows, r.bytes)))
}

/// Whether the layout can hold the checkpoint; the name of the one file that it
/// makes of it, or nil.
#[rustler::nif(schedule = "DirtyIo")]
fn plan_source(target: TargetRef, source: CheckpointRef) -> Outcome<Option<&'static str>> {
    target.0.check_source(&*source.0.get()?)?;
    let whole = target.0.layout.whole_file();
    Ok(whole.map(|whole| whole.file_name()))
}

/// The config of the written directory, and the files that repeat it:
/// `{name, json}` pairs.
#[rustler::nif(schedule = "DirtyCpu")]
fn config_files(
    target: TargetRef,
    config: Binary,
    kept: Vec<String>,
) -> Outcome<Vec<(&'static str, String)>> {
    let mut value: Value = serde_json::from_slice(&config).map_err(|e| Error::InvalidFile {
        path: "config.json".into(),
        message: e.to_string(),
    })?;
    let Target { layout, spec, .. } = &target.0;
    layout.config(&Modules::all(spec, &kept), &mut value);
    let mut files = layout.companions(&value);
    files.insert(0, ("config.json", value));
    let text = |(name, value): (_, Value)| (name, format!("{value:#}\n"));
    Ok(files.into_iter().map(text).collect())
}

#[rustler::nif(schedule = "DirtyIo")]
fn output_open(target: String, force: bool, protected: Vec<String>) -> Outcome<OutputRef> {
    let protected: Vec<PathBuf> = protected.into_iter().map(PathBuf::from).collect();
    let output = OutputDir::open(Path::new(&target), force, &protected)?;
    Ok(OutputRef::new(OutputResource(Mutex::new(Some(output)))))
}

/// The same, without what an earlier job left.
#[rustler::nif(schedule = "DirtyIo")]
fn output_create(target: String, force: bool, protected: Vec<String>) -> Outcome<OutputRef> {
    let protected: Vec<PathBuf> = protected.into_iter().map(PathBuf::from).collect();
    let output = OutputDir::create(Path::new(&target), force, &protected)?;
    Ok(OutputRef::new(OutputResource(Mutex::new(Some(output)))))
}

/// Runs `f` on an output that is neither committed nor aborted.
pub fn with_output<R>(
    output: &OutputRef,
    f: impl FnOnce(&mut OutputDir) -> Result<R, Error>,
) -> Result<R, Error> {
    let mut slot = output.0.lock().unwrap_or_else(|e| e.into_inner());
    slot.as_mut().ok_or(Error::Released).and_then(f)
}

pub fn take_output(output: &OutputRef) -> Option<OutputDir> {
    output.0.lock().unwrap_or_else(|e| e.into_inner()).take()
}

#[rustler::nif]
fn output_path(output: OutputRef) -> Outcome<String> {
    Ok(with_output(&output, |o| {
        Ok(o.path().to_string_lossy().into_owned())
    })?)
}

#[rustler::nif(schedule = "DirtyIo")]
fn output_carry(output: OutputRef, file: String, relative: String) -> Outcome<Atom> {
    with_output(&output, |o| o.carry(Path::new(&file), &relative))?;
    Ok(rustler::types::atom::ok())
}

#[rustler::nif(schedule = "DirtyIo")]
fn output_write(output: OutputRef, relative: String, bytes: Binary) -> Outcome<usize> {
    with_output(&output, |o| o.write_file(&relative, &bytes))?;
    Ok(bytes.len())
}

#[rustler::nif(schedule = "DirtyIo")]
fn output_commit(output: OutputRef) -> Outcome<String> {
    let output = take_output(&output).ok_or(Error::Released)?;
    let target = output.target().to_string_lossy().into_owned();
    output.commit()?;
    Ok(target)
}

#[rustler::nif(schedule = "DirtyIo")]
fn output_abort(output: OutputRef) -> Outcome<Atom> {
    if let Some(output) = take_output(&output) {
        output.abort()?;
    }
    Ok(rustler::types::atom::ok())
}

/// The file of a shard: nil, or the mark of the one that another node made.
pub fn shard_file(path: String, mark: Option<String>) -> ShardFile {
    match mark {
        None => ShardFile::from(path),
        Some(mark) => ShardFile::joined(path, mark),
    }
}

/// Starts the file that holds these tensors of `source`, each `{name, :quantize}`
/// or `{name, :keep}`.
#[rustler::nif(schedule = "DirtyIo")]
fn shard_create(
    env: Env,
    path: String,
    mark: Option<String>,
    target: Option<TargetRef>,
    tensors: Vec<(String, Atom)>,
    source: CheckpointRef,
    metadata: HashMap<String, String>,
) -> Outcome<ShardRef> {
    let source = source.0.get()?;
    let quantize = terms::atom(env, "quantize");
    let planned = tensors
        .into_iter()
        .map(|(name, action)| Planned {
            quantize: action.to_term(env) == quantize,
            name,
        })
        .collect();
    let target = target.as_ref().map(|t| &t.0);
    let metadata = metadata.into_iter().collect();
    let shard = unit::create_shard(shard_file(path, mark), &source, target, planned, metadata)?;
    Ok(ShardRef::new(ShardResource(shard)))
}

/// Quantizes and writes a tensor, or `{first, after_last}` of its rows.
#[rustler::nif(schedule = "DirtyCpu")]
fn unit_quantize<'a>(
    env: Env<'a>,
    source: CheckpointRef,
    (name, rows): (String, Option<(usize, usize)>),
    target: TargetRef,
    observed: Option<ObservedRef>,
    shard: ShardRef,
    cancel: CancelRef,
) -> Outcome<Term<'a>> {
    let source = source.0.get()?;
    let (target, shard, cancel) = (&target.0, &shard.0, cancel.enter()?);
    let seen = observed.as_ref().map(|o| &o.0);
    let done = match rows {
        None => unit::quantize_into(&source, &name, target, seen, shard, &cancel)?,
        Some((first, last)) => {
            unit::quantize_rows_into(&source, &name, first..last, target, shard, &cancel)?
        }
    };
    Ok(done_term(env, done))
}

#[rustler::nif(schedule = "DirtyIo")]
fn unit_keep<'a>(
    env: Env<'a>,
    source: CheckpointRef,
    name: String,
    target: TargetRef,
    observed: Option<ObservedRef>,
    shard: ShardRef,
    cancel: CancelRef,
) -> Outcome<Term<'a>> {
    let source = source.0.get()?;
    let seen = observed.as_ref().map(|o| &o.0);
    let done = unit::keep_into(
        &source,
        &name,
        Some(&target.0),
        seen,
        &shard.0,
        &*cancel.enter()?,
    )?;
    Ok(done_term(env, done))
}

/// What `unit_keep` does, for one tensor after the other: how many nanoseconds each took, and
/// what came of it.
#[rustler::nif(schedule = "DirtyIo")]
fn units_keep<'a>(
    env: Env<'a>,
    source: CheckpointRef,
    names: Vec<String>,
    target: TargetRef,
    observed: Option<ObservedRef>,
    shard: ShardRef,
    cancel: CancelRef,
) -> Outcome<Vec<(u64, Outcome<Term<'a>>)>> {
    let source = source.0.get()?;
    let (target, shard, cancel) = (&target.0, &shard.0, cancel.enter()?);
    let seen = observed.as_ref().map(|o| &o.0);
    let keep = |name: String| {
        let began = Instant::now();
        let done = unit::keep_into(&source, &name, Some(target), seen, shard, &cancel);
        let took = began.elapsed().as_nanos() as u64;
        (took, done.map(|d| done_term(env, d)).map_err(Failure::from))
    };
    Ok(names.into_iter().map(keep).collect())
}

fn done_term<'a>(env: Env<'a>, done: Done) -> Term<'a> {
    record::done(env, stats(env, &done), done.source_hash, done.parts)
}

fn stats<'a>(env: Env<'a>, done: &Done) -> Term<'a> {
    let mut fields = vec![
        ("input_bytes", done.input_bytes.encode(env)),
        ("output_bytes", done.output_bytes.encode(env)),
        ("elements", done.elements.encode(env)),
    ];
    if let (Some(bits), Some(m)) = (done.bits_per_weight, &done.metrics) {
        fields.push(("bits_per_weight", bits.encode(env)));
        let error = done.output_error.map(|e| terms::number(env, e));
        fields.extend(error.map(|e| ("output_error", e)));
        let sums = done.seen.map(|s| s.to_numbers().to_vec().encode(env));
        fields.extend(sums.map(|s| ("sums", s)));
        return crate::tensor::metrics_map(env, m, &fields);
    }
    terms::map(env, &fields)
}

/// The metrics of a tensor from the `sums` of all its ranges of rows.
#[rustler::nif]
fn sums_metrics<'a>(env: Env<'a>, sums: Vec<Vec<f64>>) -> Outcome<Term<'a>> {
    let mut seen = sums.into_iter().map(|numbers| {
        let numbers = numbers.try_into().map_err(|_| Error::InvalidOption {
            option: "sums".into(),
            message: "are eight numbers".into(),
        })?;
        Ok::<Seen, Error>(Seen::from_numbers(numbers))
    });
    let seen = seen.try_fold(Seen::default(), |all, s| Ok::<_, Error>(all.and(s?)))?;
    Ok(crate::tensor::metrics_map(env, &seen.metrics(), &[]))
}

type WrittenTerm = (String, usize, Vec<(String, usize)>);

/// `{file, bytes, [{tensor, bytes}]}`, as `shard_index` takes it.
#[rustler::nif(schedule = "DirtyIo")]
fn shard_finish(shard: ShardRef) -> Outcome<WrittenTerm> {
    let written = shard.0.finish()?;
    Ok((written.file, written.file_bytes, written.tensors))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn shard_index(shards: Vec<WrittenTerm>) -> Outcome<String> {
    let shards: Vec<WrittenShard> = shards
        .into_iter()
        .map(|(file, file_bytes, tensors)| WrittenShard {
            file,
            file_bytes,
            tensors,
        })
        .collect();
    Ok(io::index_json(&shards))
}

/// The indexes of each shard's tensors.
#[rustler::nif(schedule = "DirtyCpu")]
fn plan_shards(sizes: Vec<usize>, max_shard_size: usize) -> Outcome<Vec<Vec<usize>>> {
    Ok(io::plan_shards(&sizes, max_shard_size))
}

/// The final name of a shard, from 0, among `count`.
#[rustler::nif]
fn shard_name(index: usize, count: usize) -> String {
    io::shard_name(index, count)
}
