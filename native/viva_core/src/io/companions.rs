//! The files of a model directory that are not weights and belong into a copy.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A file to carry along.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Companion {
    /// Where it lies below the model directory, and will lie below the copy.
    pub relative: PathBuf,
    /// Where to read it.
    pub file: PathBuf,
}

/// Ends of the names of files that hold weights, in any program's format.
const WEIGHTS: [&str; 20] = [
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".onnx.data",
    ".ot",
    ".tflite",
    ".npz",
    ".npy",
    ".pdparams",
    ".mlmodel",
    ".nemo",
    ".llamafile",
];

/// Whether a file of that name holds weights.
pub(super) fn is_weights(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    WEIGHTS.iter().any(|end| name.ends_with(end))
}

/// Whether a file of that name says which file holds which weights.
fn is_index(name: &str) -> bool {
    name.strip_suffix(".index.json").is_some_and(is_weights)
}

/// Finds the companions of a model directory, sorted by path.
///
/// Hidden files and links to directories are left out; so is a subdirectory
/// with weights in it, which holds another edition of the model (`onnx/`,
/// `original/`) – unless `modules.json` lists it: then it is a part of a
/// sentence-transformers model and is carried whole.
pub(super) fn find(directory: &Path) -> Result<Vec<Companion>> {
    let modules = listed_modules(directory);
    let mut found = Vec::new();
    for (name, path, is_dir) in children(directory)? {
        if is_dir {
            let mut below = Vec::new();
            let has_weights = gather(&path, Path::new(&name), &mut below)?;
            if !has_weights || modules.contains(&name) {
                found.append(&mut below);
            }
        } else if !is_weights(&name) && !is_index(&name) {
            found.push(Companion {
                relative: name.into(),
                file: path,
            });
        }
    }
    found.sort();
    Ok(found)
}

/// Collects all files below a directory; true when weights are among them.
fn gather(directory: &Path, relative: &Path, found: &mut Vec<Companion>) -> Result<bool> {
    let mut has_weights = false;
    for (name, path, is_dir) in children(directory)? {
        let relative = relative.join(&name);
        if is_dir {
            has_weights |= gather(&path, &relative, found)?;
        } else {
            has_weights |= is_weights(&name);
            found.push(Companion {
                relative,
                file: path,
            });
        }
    }
    Ok(has_weights)
}

/// Visible files and real directories of a directory: name, path, is directory.
fn children(directory: &Path) -> Result<Vec<(String, PathBuf, bool)>> {
    let mut children = Vec::new();
    let io = |e| Error::io(directory, &e);
    for item in std::fs::read_dir(directory).map_err(io)? {
        let item = item.map_err(io)?;
        // A name that is not UTF-8 is no model file, nor could an index or a
        // configuration refer to it.
        let Ok(name) = item.file_name().into_string() else {
            continue;
        };
        if name.starts_with('.') {
            continue;
        }
        let path = item.path();
        let link = item.file_type().map_err(io)?.is_symlink();
        let kind = std::fs::metadata(&path).map_err(|e| Error::io(&path, &e))?;
        if kind.is_file() || (kind.is_dir() && !link) {
            children.push((name, path, kind.is_dir()));
        }
    }
    Ok(children)
}

/// Directories that a sentence-transformers `modules.json` names, if there is one.
fn listed_modules(directory: &Path) -> Vec<String> {
    #[derive(serde::Deserialize)]
    struct Module {
        path: String,
    }
    let Ok(bytes) = std::fs::read(directory.join("modules.json")) else {
        return Vec::new();
    };
    let modules: Vec<Module> = serde_json::from_slice(&bytes).unwrap_or_default();
    modules.into_iter().map(|m| m.path).collect()
}
