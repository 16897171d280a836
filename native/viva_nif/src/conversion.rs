//! The native work of jobs that convert.

use std::collections::HashMap;

use rustler::{Encoder, Env, Term};
use viva_core::Error;
use viva_core::convert::{Becomes, Conversion, Goal, Piece, SIDECARS, TextFile};
use viva_core::tensor::DType;

use crate::error::Outcome;
use crate::job::shard_file;
use crate::record;
use crate::resource::{
    CancelRef, CheckpointRef, ConversionRef, ConversionResource, ShardRef, ShardResource,
};
use crate::terms::{self, Name};

/// A name that may be nil.
fn given(name: &Name) -> Option<&str> {
    Some(name.0.as_str()).filter(|&n| n != "nil")
}

fn float(name: &Name) -> Result<Option<DType>, Error> {
    let Some(given) = given(name) else {
        return Ok(None);
    };
    match DType::from_name(given) {
        Ok(dtype @ (DType::F32 | DType::F16 | DType::BF16)) => Ok(Some(dtype)),
        _ => Err(Error::InvalidOption {
            option: "dtype".into(),
            message: format!("expected f32, f16 or bf16, got {given:?}"),
        }),
    }
}

/// The names that are meant, or what is wrong with them: `{layout, dtype}`.
#[rustler::nif]
fn conversion_check<'a>(env: Env<'a>, layout: Name, dtype: Name) -> Outcome<(Term<'a>, Term<'a>)> {
    let goal = Goal::by_name(&layout.0)?;
    let dtype = float(&dtype)?.map_or("nil", DType::name);
    Ok((terms::atom(env, goal.name()), terms::atom(env, dtype)))
}

/// Decides for every tensor: `%{ref, file, units}`.
#[rustler::nif(schedule = "DirtyCpu")]
fn conversion_plan<'a>(
    env: Env<'a>,
    source: CheckpointRef,
    layout: Name,
    dtype: Name,
    outer: Vec<String>,
) -> Outcome<Term<'a>> {
    let source = source.0.get()?;
    let goal = Goal::by_name(&layout.0)?;
    let conversion = Conversion::plan(&source, goal, float(&dtype)?, &outer)?;
    let units = conversion.pieces.iter().map(|piece| {
        let bytes = conversion.entries(&source, piece)?.nbytes()?;
        Ok(unit(env, piece, bytes))
    });
    let units = units.collect::<Result<Vec<Term>, Error>>()?;
    let file = goal.whole_file().map(|whole| whole.file_name());
    let resource = ConversionRef::new(ConversionResource(conversion));
    let fields = [
        ("ref", resource.encode(env)),
        ("file", file.encode(env)),
        ("units", units.encode(env)),
    ];
    Ok(terms::map(env, &fields))
}

fn unit<'a>(env: Env<'a>, piece: &Piece, output_bytes: usize) -> Term<'a> {
    let name = |name: &str| terms::atom(env, name);
    let (action, format) = match &piece.becomes {
        Becomes::Quantized(spec) => ("convert", name(&spec.format)),
        Becomes::Dense(dtype) => ("convert", name(dtype.name())),
        Becomes::Kept | Becomes::Implied => ("keep", name("nil")),
    };
    let quantized = matches!(piece.becomes, Becomes::Quantized(_));
    let fields = [
        ("name", piece.name.encode(env)),
        ("dtype", piece.format.encode(env)),
        ("from", name(piece.layout.unwrap_or("nil"))),
        ("shape", piece.shape.encode(env)),
        ("action", name(action)),
        ("format", format),
        ("quantized", quantized.encode(env)),
        ("input_bytes", piece.input_bytes.encode(env)),
        ("output_bytes", output_bytes.encode(env)),
    ];
    terms::map(env, &fields)
}

/// Starts the file that holds the tensors of these names.
#[rustler::nif(schedule = "DirtyIo")]
fn conversion_shard(
    path: String,
    mark: Option<String>,
    conversion: ConversionRef,
    names: Vec<String>,
    source: CheckpointRef,
    metadata: HashMap<String, String>,
) -> Outcome<ShardRef> {
    let source = source.0.get()?;
    let metadata = metadata.into_iter().collect();
    let shard = conversion
        .0
        .create_shard(shard_file(path, mark), &source, &names, metadata)?;
    Ok(ShardRef::new(ShardResource(shard)))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn unit_convert<'a>(
    env: Env<'a>,
    source: CheckpointRef,
    name: String,
    conversion: ConversionRef,
    shard: ShardRef,
    cancel: CancelRef,
) -> Outcome<Term<'a>> {
    let source = source.0.get()?;
    let done = conversion
        .0
        .run(&source, &name, &shard.0, &*cancel.enter()?)?;
    let fields = [
        ("input_bytes", done.input_bytes.encode(env)),
        ("output_bytes", done.output_bytes.encode(env)),
        ("elements", done.elements.encode(env)),
        ("lossless", done.change.is_lossless().encode(env)),
        ("changed", done.change.changed.encode(env)),
    ];
    let stats = match &done.change.metrics {
        Some(metrics) => crate::tensor::metrics_map(env, metrics, &fields),
        None => terms::map(env, &fields),
    };
    Ok(record::done(env, stats, done.source_hash, done.parts))
}

/// `{name, text}` of the files beside the weights, and the names of those of
/// the source that speak of how it was quantized.
#[rustler::nif(schedule = "DirtyIo")]
fn conversion_files(
    conversion: ConversionRef,
    source: CheckpointRef,
    kept: Vec<String>,
) -> Outcome<(Vec<TextFile>, Vec<&'static str>)> {
    let files = conversion.0.files(&*source.0.get()?, &kept)?;
    Ok((files, SIDECARS.to_vec()))
}
