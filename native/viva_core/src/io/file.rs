//! One file of tensors, checked once and read in place.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::entry::{Entry, EntryDType, unknown_tensor};
use super::mapped::Mapped;
use super::{Metadata, file_name, gguf, invalid, safetensors};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// A safetensors or GGUF file, mapped. Tensors share the mapping and keep it
/// alive.
#[derive(Debug)]
pub struct TensorFile {
    map: Arc<Mapped>,
    /// Offset in the file, in bytes, of the data that entries count from.
    data_start: usize,
    entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
    metadata: Metadata,
}

impl TensorFile {
    /// Maps the file and checks its whole header. A name that ends in `.gguf`
    /// is of a GGUF file; every other file has to be a safetensors file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::InvalidFile`] with what is
    /// wrong when it is not valid.
    pub fn open(path: impl AsRef<Path>) -> Result<TensorFile> {
        let path = path.as_ref();
        let map = Mapped::open(path)?;
        let read = match gguf::is_name(&file_name(path)) {
            true => gguf::Header::read(map.as_ref())
                .map(|(h, start)| (h.entries, Metadata::Gguf(h.metadata), start)),
            false => safetensors::Header::read(map.as_ref())
                .map(|(h, start)| (h.entries, Metadata::Safetensors(h.metadata), start)),
        };
        let (entries, metadata, data_start) = read.map_err(|message| invalid(path, message))?;
        // The header is in our own memory now.
        map.give_back(0..data_start);
        let by_name = (entries.iter().enumerate())
            .map(|(i, e)| (e.name.clone(), i))
            .collect();
        Ok(TensorFile {
            map: Arc::new(map),
            data_start,
            entries,
            by_name,
            metadata,
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        self.map.path()
    }

    /// Length of the whole file in bytes.
    pub fn file_bytes(&self) -> usize {
        self.map.len()
    }

    /// All entries, in the order of their bytes in the file.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What it says beside its tensors.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The entry of that name.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], with a similar name where there is one.
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        match self.by_name.get(name) {
            Some(&i) => Ok(&self.entries[i]),
            None => Err(unknown_tensor(
                name,
                self.entries.iter().map(|e| e.name.as_str()),
            )),
        }
    }

    /// The tensor of that name, in place.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], or [`Error::UnsupportedDtype`] for an entry
    /// that can only be carried through as [`bytes`](Self::bytes).
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let entry = self.entry(name)?;
        let EntryDType::Known(dtype) = entry.dtype else {
            return Err(Error::UnsupportedDtype {
                op: format!("reading tensor {name:?}"),
                dtype: entry.dtype.name(),
            });
        };
        let map = Arc::clone(&self.map);
        Tensor::new(dtype, entry.shape.clone(), map, self.in_file(entry))
    }

    /// The bytes of the entry of that name as a vector of u8, in place.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn byte_tensor(&self, name: &str) -> Result<Tensor> {
        let range = self.in_file(self.entry(name)?);
        let map = Arc::clone(&self.map);
        Tensor::new(DType::U8, vec![range.len()], map, range)
    }

    /// The bytes of the entry of that name, in place.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let range = self.in_file(self.entry(name)?);
        Ok(&(*self.map).as_ref()[range])
    }

    /// The mapping, and where in it the bytes of that entry are.
    pub(super) fn mapping(&self, name: &str) -> Result<(Arc<Mapped>, std::ops::Range<usize>)> {
        Ok((Arc::clone(&self.map), self.in_file(self.entry(name)?)))
    }

    /// Drops the resident pages of that entry; see [`Mapped::give_back`].
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn give_back(&self, name: &str) -> Result<()> {
        self.give_back_part(name, 0..usize::MAX)
    }

    /// The same of those bytes of the entry, cut short where it ends.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn give_back_part(&self, name: &str, part: std::ops::Range<usize>) -> Result<()> {
        let all = self.in_file(self.entry(name)?);
        let at = |offset: usize| all.start + offset.min(all.len());
        self.map.give_back(at(part.start)..at(part.end));
        Ok(())
    }

    /// Checks that the file was not cut or grown since it was opened.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] when it was.
    pub fn check_unchanged(&self) -> Result<()> {
        self.map.check_unchanged()
    }

    fn in_file(&self, entry: &Entry) -> std::ops::Range<usize> {
        self.data_start + entry.range.start..self.data_start + entry.range.end
    }
}
