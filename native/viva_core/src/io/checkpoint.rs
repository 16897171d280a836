//! A model on disk: one safetensors or GGUF file, or a directory of them.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::companions::{self, Companion};
use super::entry::{Entry, unknown_tensor};
use super::file::TensorFile;
use super::mapped::Mapped;
use super::{file_name, gguf, invalid, stays_inside};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

const WHOLE: &str = "model.safetensors";
const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// A checkpoint, mapped. Its tensors are read in place.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    shards: Vec<TensorFile>,
    /// Name → shard.
    by_name: HashMap<String, usize>,
    config: Option<Value>,
    is_directory: bool,
}

impl Checkpoint {
    /// Opens a `.safetensors` or `.gguf` file, or a directory:
    /// `model.safetensors`, else the shards named by its
    /// `*.safetensors.index.json`, else its only `.safetensors` file, else its
    /// only `.gguf` file. The path of an index opens its directory.
    ///
    /// # Errors
    /// [`Error::Io`] when something cannot be read; [`Error::InvalidFile`] when
    /// a file is damaged, shards and index disagree, or there is nothing that
    /// can be read.
    pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, &e))?;
        if metadata.is_dir() {
            return Checkpoint::open_directory(path, None);
        }
        let name = file_name(path);
        if name.ends_with(INDEX_SUFFIX) {
            let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
            return Checkpoint::open_directory(parent.unwrap_or(Path::new(".")), Some(name));
        }
        if companions::is_weights(&name) && !is_readable(&name) {
            return Err(not_readable(path, &name));
        }
        Checkpoint::from_shards(path, vec![TensorFile::open(path)?], None, false)
    }

    fn open_directory(path: &Path, index: Option<String>) -> Result<Checkpoint> {
        let files = visible_files(path)?;
        let config = match files.iter().any(|f| f == "config.json") {
            true => Some(read_json(&path.join("config.json"))?),
            false => None,
        };
        let index = match index {
            Some(given) => Some(given),
            None => choose_index(path, &files)?,
        };
        let shards = match index {
            Some(index) => open_indexed(path, &index)?,
            None => vec![TensorFile::open(path.join(only_weights(path, &files)?))?],
        };
        Checkpoint::from_shards(path, shards, config, true)
    }

    fn from_shards(
        path: &Path,
        shards: Vec<TensorFile>,
        config: Option<Value>,
        is_directory: bool,
    ) -> Result<Checkpoint> {
        let mut by_name = HashMap::new();
        for (i, shard) in shards.iter().enumerate() {
            for entry in shard.entries() {
                if let Some(first) = by_name.insert(entry.name.clone(), i) {
                    let first: &TensorFile = &shards[first];
                    return Err(invalid(
                        shard.path(),
                        format!(
                            "tensor {:?} is also in {}; which of the two is meant cannot be known",
                            entry.name,
                            file_name(first.path())
                        ),
                    ));
                }
            }
        }
        Ok(Checkpoint {
            path: path.into(),
            shards,
            by_name,
            config,
            is_directory,
        })
    }

    /// The path it was opened by: a file or a directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its files, sorted by name.
    pub fn shards(&self) -> &[TensorFile] {
        &self.shards
    }

    /// The parsed `config.json` of a model directory that has one.
    pub fn config(&self) -> Option<&Value> {
        self.config.as_ref()
    }

    /// What the file says beside its tensors, if it is a GGUF file.
    pub fn gguf_metadata(&self) -> Option<&gguf::Metadata> {
        self.shards.first()?.metadata().gguf()
    }

    /// All entries, shard by shard in the order of their bytes: reading in this
    /// order reads every file once from front to back.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.shards.iter().flat_map(|s| s.entries())
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there is no entry at all.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Bytes of all tensors together, headers not counted.
    pub fn total_bytes(&self) -> usize {
        self.entries().map(Entry::nbytes).sum()
    }

    /// The entry of that name.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], with a similar name where there is one.
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        self.shard(name)?.entry(name)
    }

    /// The tensor of that name, in place.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], or [`Error::UnsupportedDtype`] for an entry
    /// that can only be carried through as [`bytes`](Self::bytes).
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.shard(name)?.tensor(name)
    }

    /// The bytes of the entry of that name as a vector of u8, in place.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn byte_tensor(&self, name: &str) -> Result<Tensor> {
        self.shard(name)?.byte_tensor(name)
    }

    /// The bytes of the entry of that name, in place.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        self.shard(name)?.bytes(name)
    }

    /// The mapping, and where in it the bytes of that entry are.
    pub(super) fn mapping(&self, name: &str) -> Result<(Arc<Mapped>, Range<usize>)> {
        self.shard(name)?.mapping(name)
    }

    /// Drops the resident pages of that entry, once it was read.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn give_back(&self, name: &str) -> Result<()> {
        self.shard(name)?.give_back(name)
    }

    /// The same of those bytes of the entry, cut short where it ends.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn give_back_part(&self, name: &str, part: std::ops::Range<usize>) -> Result<()> {
        self.shard(name)?.give_back_part(name, part)
    }

    /// Checks that the file which holds that entry was not cut or grown since
    /// it was opened: reading past a new end would kill the process.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], or [`Error::InvalidFile`] when it was.
    pub fn check_unchanged(&self, name: &str) -> Result<()> {
        self.shard(name)?.check_unchanged()
    }

    /// The other files of a model directory that belong into a copy of it:
    /// configuration, tokenizer, templates, license … Empty for a single file.
    ///
    /// # Errors
    /// [`Error::Io`] when a directory cannot be read or a link leads nowhere.
    pub fn companions(&self) -> Result<Vec<Companion>> {
        match self.is_directory {
            true => companions::find(&self.path),
            false => Ok(Vec::new()),
        }
    }

    /// The paths that an output written from this checkpoint must not replace:
    /// its own and its files', which may be links to elsewhere.
    pub fn protected_paths(&self) -> Vec<PathBuf> {
        let shards = self.shards.iter().map(|s| s.path().to_path_buf());
        std::iter::once(self.path.clone()).chain(shards).collect()
    }

    fn shard(&self, name: &str) -> Result<&TensorFile> {
        match self.by_name.get(name) {
            Some(&i) => Ok(&self.shards[i]),
            None => Err(unknown_tensor(
                name,
                self.entries().map(|e| e.name.as_str()),
            )),
        }
    }
}

/// The index of a directory, where one is needed and can be told.
fn choose_index(path: &Path, files: &[String]) -> Result<Option<String>> {
    let usual = format!("model{INDEX_SUFFIX}");
    // A whole model beside an index is what model loaders take.
    if files.iter().any(|f| f == WHOLE) {
        return Ok(None);
    }
    if files.contains(&usual) {
        return Ok(Some(usual));
    }
    let found: Vec<&String> = files.iter().filter(|f| f.ends_with(INDEX_SUFFIX)).collect();
    match found[..] {
        [] => Ok(None),
        [index] => Ok(Some(index.clone())),
        _ => Err(invalid(
            path,
            format!("has several indexes: {}; open one of them", join(&found)),
        )),
    }
}

/// The file of a directory that is read without an index.
fn only_weights(path: &Path, files: &[String]) -> Result<String> {
    if files.iter().any(|f| f == WHOLE) {
        return Ok(WHOLE.into());
    }
    // Beside safetensors, a GGUF file is another edition of the same model.
    let with =
        |test: fn(&str) -> bool| -> Vec<&String> { files.iter().filter(|f| test(f)).collect() };
    let found = [with(is_safetensors), with(gguf::is_name)];
    let found = found
        .into_iter()
        .find(|f| !f.is_empty())
        .unwrap_or_default();
    match found[..] {
        [file] => Ok(file.clone()),
        [] => match files.iter().find(|f| companions::is_weights(f)) {
            Some(other) => Err(not_readable(path, other)),
            None => Err(invalid(
                path,
                "holds no .safetensors file, no *.safetensors.index.json and no .gguf file",
            )),
        },
        _ => Err(invalid(
            path,
            format!(
                "holds {} files of weights and no index that says how they belong together; \
                 open one of them: {}",
                found.len(),
                join(&found)
            ),
        )),
    }
}

/// Opens the shards that an index names, and checks it against them.
fn open_indexed(directory: &Path, index: &str) -> Result<Vec<TensorFile>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index_path = directory.join(index);
    let Index { weight_map } = serde_json::from_value(read_json(&index_path)?).map_err(|e| {
        invalid(
            &index_path,
            format!("is not an index of weights, an object with a weight_map: {e}"),
        )
    })?;
    let mut shards: BTreeMap<&str, Option<TensorFile>> =
        weight_map.values().map(|f| (f.as_str(), None)).collect();
    if shards.is_empty() {
        return Err(invalid(&index_path, "names no tensor at all"));
    }
    for (file, shard) in &mut shards {
        if !stays_inside(Path::new(file)) {
            return Err(invalid(
                &index_path,
                format!("names the shard {file:?}, which is outside of its directory"),
            ));
        }
        let path = directory.join(file);
        if !path.exists() {
            return Err(invalid(
                &index_path,
                format!("names the shard {file:?}, which is missing"),
            ));
        }
        *shard = Some(TensorFile::open(path)?);
    }
    for (name, file) in &weight_map {
        let holds = |s: &TensorFile| s.entry(name).is_ok();
        if !shards[file.as_str()].as_ref().is_some_and(holds) {
            let elsewhere = shards
                .iter()
                .find(|(_, s)| s.as_ref().is_some_and(holds))
                .map_or(String::new(), |(f, _)| format!(" ({f:?} does)"));
            return Err(invalid(
                &index_path,
                format!("says that {file:?} holds tensor {name:?}, but it does not{elsewhere}"),
            ));
        }
    }
    // Tensors that the index forgot are still in the shards: none is lost.
    Ok(shards.into_values().flatten().collect())
}

/// Names of the files in a directory, links to files included, sorted.
fn visible_files(path: &Path) -> Result<Vec<String>> {
    let io = |e| Error::io(path, &e);
    let mut names = Vec::new();
    for item in std::fs::read_dir(path).map_err(io)? {
        let item = item.map_err(io)?;
        let name = item.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') && !item.path().is_dir() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, &e))?;
    serde_json::from_slice(&bytes).map_err(|e| invalid(path, format!("is not valid JSON: {e}")))
}

fn join(names: &[&String]) -> String {
    names
        .iter()
        .map(|n| n.as_str())
        .collect::<Vec<_>>()
        .join(", ")
}

fn is_safetensors(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn is_readable(name: &str) -> bool {
    is_safetensors(name) || gguf::is_name(name)
}

fn not_readable(path: &Path, file: &str) -> Error {
    let other = file.rsplit('.').next().unwrap_or_default();
    invalid(
        path,
        format!(
            "its weights are .{other} ({file}), which cannot be read; convert the model to \
             safetensors first (save_pretrained with safe_serialization=True)"
        ),
    )
}
