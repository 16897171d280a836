//! Checkpoint files: reading in place, writing in a stream.
//!
//! Reading: [`Checkpoint`] finds the files of a model, [`TensorFile`] checks
//! and maps one of them, and tensors share the mapping; a [`Matrix`] is read row by
//! row. Writing: [`ShardWriter`] fills one file from many threads, [`RowsFile`] one whose
//! length nobody knows yet, [`OutputDir`] makes a directory appear under its final name
//! only when it is complete and synced.

mod checkpoint;
mod companions;
mod entry;
mod file;
pub mod gguf;
mod mapped;
mod matrix;
mod metadata;
mod npy;
mod output;
mod place;
mod rows;
mod safetensors;
mod shard_file;
mod shards;
mod writer;

pub use checkpoint::Checkpoint;
pub use companions::Companion;
pub(crate) use entry::unknown_tensor;
pub use entry::{Entry, EntryDType};
pub use file::TensorFile;
pub use mapped::{Mapped, mapped_bytes};
pub use matrix::Matrix;
pub use metadata::Metadata;
pub use output::{Found, OutputDir, Recorder, file_identity};
pub(crate) use place::sync_directory;
pub use rows::RowsFile;
pub use shard_file::ShardFile;
pub use shards::{WrittenShard, index_json, plan_shards, shard_name};
pub use writer::{FixedEntry, LateEntry, ShardWriter};

use std::path::{Component, Path};

use crate::error::Error;

/// Whether a relative path names something below the directory it is joined to.
fn stays_inside(relative: &Path) -> bool {
    relative.file_name().is_some()
        && relative
            .components()
            .all(|c| matches!(c, Component::Normal(_)))
}

fn invalid(path: &Path, message: impl Into<String>) -> Error {
    Error::InvalidFile {
        path: path.display().to_string(),
        message: message.into(),
    }
}

/// The last part of a path, for messages and indexes.
fn file_name(path: &Path) -> String {
    path.file_name()
        .map_or(String::new(), |n| n.to_string_lossy().into_owned())
}
