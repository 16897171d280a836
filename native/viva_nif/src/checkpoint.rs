//! Reading checkpoints.

use rustler::{Atom, Encoder, Env, Term};
use serde_json::Value;
use viva_core::content::{self, Read};
use viva_core::io::Checkpoint;
use viva_core::layout::gguf;

use crate::error::Outcome;
use crate::json::{self, Keys};
use crate::resource::{CheckpointRef, CheckpointResource, Slot};
use crate::terms;

fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

#[rustler::nif(schedule = "DirtyIo")]
fn checkpoint_open<'a>(env: Env<'a>, path: String) -> Outcome<Term<'a>> {
    let checkpoint = Checkpoint::open(&path)?;
    let entries: Vec<Term> = checkpoint
        .shards()
        .iter()
        .flat_map(|shard| {
            let file = text(shard.path()).encode(env);
            shard.entries().iter().map(move |e| (file, e))
        })
        .map(|(file, e)| {
            terms::map(
                env,
                &[
                    ("name", e.name.encode(env)),
                    ("dtype", e.dtype.name().encode(env)),
                    ("shape", e.shape.encode(env)),
                    ("nbytes", e.nbytes().encode(env)),
                    ("file", file),
                ],
            )
        })
        .collect();
    let files: Vec<String> = checkpoint.shards().iter().map(|s| text(s.path())).collect();
    let companions: Vec<Term> = checkpoint
        .companions()?
        .iter()
        .map(|c| {
            let fields = [
                ("relative", text(&c.relative).encode(env)),
                ("file", text(&c.file).encode(env)),
            ];
            terms::map(env, &fields)
        })
        .collect();
    let protected: Vec<String> = checkpoint
        .protected_paths()
        .iter()
        .map(|p| text(p))
        .collect();
    let implied = gguf::config(&checkpoint);
    let config = checkpoint.config().or(implied.as_ref());
    let config = config.unwrap_or(&Value::Null);
    let fields = [
        ("path", text(checkpoint.path()).encode(env)),
        ("total_bytes", checkpoint.total_bytes().encode(env)),
        ("config", json::to_term(env, config, Keys::Strings)),
        ("companions", companions.encode(env)),
        ("protected", protected.encode(env)),
        ("files", files.encode(env)),
        ("entries", entries.encode(env)),
    ];
    let resource = CheckpointRef::new(CheckpointResource(Slot::new(checkpoint)));
    let mut all = vec![("ref", resource.encode(env))];
    all.extend(fields);
    Ok(terms::map(env, &all))
}

#[rustler::nif(schedule = "DirtyIo")]
fn checkpoint_contents<'a>(env: Env<'a>, checkpoint: CheckpointRef) -> Outcome<Vec<Term<'a>>> {
    let contents = content::contents(&*checkpoint.0.get()?)?;
    Ok(contents
        .iter()
        .map(|c| {
            let layout = match c.layout {
                Some(name) => terms::atom(env, name),
                None => rustler::types::atom::nil().encode(env),
            };
            terms::map(
                env,
                &[
                    ("name", c.name.encode(env)),
                    ("format", c.format.encode(env)),
                    ("layout", layout),
                    ("shape", c.shape.encode(env)),
                    ("nbytes", c.nbytes.encode(env)),
                    ("bits_per_weight", c.bits_per_weight.encode(env)),
                    ("tensors", c.tensors.encode(env)),
                ],
            )
        })
        .collect())
}

/// A tensor mapped from the file, or a quantized weight read from its parts:
/// `{:tensor, map}` or `{:quantized, map}`.
#[rustler::nif(schedule = "DirtyIo")]
fn checkpoint_get<'a>(
    env: Env<'a>,
    checkpoint: CheckpointRef,
    name: String,
) -> Outcome<(Term<'a>, Term<'a>)> {
    Ok(match content::read(&*checkpoint.0.get()?, &name)? {
        Read::Quantized(q) => (terms::atom(env, "quantized"), terms::quantized(env, q)?),
        Read::Dense(tensor) => (terms::atom(env, "tensor"), terms::tensor(env, tensor)),
    })
}

#[rustler::nif]
fn checkpoint_release(checkpoint: CheckpointRef) -> Atom {
    checkpoint.0.release();
    rustler::types::atom::ok()
}
