//! Writing one file of tensors in place, in any order, from many threads.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use super::entry::{Entry, EntryDType, unknown_tensor};
use super::safetensors::METADATA;
use super::shard_file::{ShardFile, mark_of};
use super::shards::WrittenShard;
use super::{Metadata, file_name, invalid};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// A tensor whose size is known before anything is written.
#[derive(Clone, Debug)]
pub struct FixedEntry {
    pub name: String,
    pub dtype: EntryDType,
    pub shape: Vec<usize>,
}

/// A u8 vector whose length is known only once its content is. Only safetensors
/// files hold them.
#[derive(Clone, Debug)]
pub struct LateEntry {
    pub name: String,
    /// The most bytes that it may have.
    pub max_len: usize,
}

/// Writes one safetensors or GGUF file: its metadata is of one or the other.
/// All methods take `&self`: threads share it.
///
/// The disk space is reserved when it is made, so that a full disk is found out
/// before the work is done. Until [`finish`](Self::finish) returns, the file is
/// not valid: it belongs into an [`OutputDir`](super::OutputDir).
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    state: RwLock<State>,
    metadata: Metadata,
    /// Bytes of the header, padding included.
    data_start: usize,
    /// Tensors start at a multiple of this many bytes.
    alignment: usize,
    fixed: Vec<Slot>,
    by_name: HashMap<String, usize>,
    late: Mutex<Vec<LateSlot>>,
    /// Whether its name in the directory is durable.
    named: AtomicBool,
}

#[derive(Debug)]
enum State {
    /// Before the file is created.
    Planned,
    Open(File),
    Finished(WrittenShard),
}

#[derive(Debug)]
struct Slot {
    entry: Entry,
    written: Mutex<Coverage>,
}

#[derive(Debug)]
struct LateSlot {
    entry: LateEntry,
    bytes: Option<Vec<u8>>,
}

impl ShardWriter {
    /// Creates the file, or opens one that an earlier writer of the same entries
    /// left, and reserves its disk space. What it holds counts as written only
    /// after [`accept`](Self::accept).
    ///
    /// In a safetensors file tensors with wide elements come first, so that
    /// every tensor is aligned; otherwise they keep the order given. Late entries
    /// follow at the end.
    ///
    /// # Errors
    /// [`Error::Io`] with code `enospc` when the disk has no room for it;
    /// [`Error::InvalidFile`] when two entries have one name, there are too many
    /// of them for one header, or the file cannot hold one of that name, dtype
    /// or shape; [`Error::ShapeOverflow`].
    pub fn create(
        at: impl Into<ShardFile>,
        mut fixed: Vec<FixedEntry>,
        late: Vec<LateEntry>,
        metadata: impl Into<Metadata>,
    ) -> Result<ShardWriter> {
        let at = at.into();
        let path = at.path.clone();
        let metadata = metadata.into();
        let cannot = |message: String| invalid(&path, message);
        let names = || (fixed.iter().map(|e| &e.name)).chain(late.iter().map(|e| &e.name));
        let mut seen = HashSet::from([METADATA]);
        if let Some(twice) = names().find(|n| !seen.insert(n)) {
            return Err(cannot(format!("cannot hold two tensors named {twice:?}")));
        }

        match (&metadata, late.first()) {
            (Metadata::Safetensors(_), _) => fixed.sort_by_key(|e| Reverse(e.dtype.block().1)),
            (Metadata::Gguf(_), None) => {}
            (Metadata::Gguf(_), Some(late)) => {
                return Err(cannot(format!(
                    "cannot hold tensor {:?}, whose length is not known",
                    late.name
                )));
            }
        }
        let alignment = metadata.alignment().map_err(cannot)?;
        let mut slots = Vec::with_capacity(fixed.len());
        let mut end = 0usize;
        for FixedEntry { name, dtype, shape } in fixed {
            let overflow = || Error::ShapeOverflow {
                shape: shape.clone(),
            };
            let start = end
                .checked_next_multiple_of(alignment)
                .ok_or_else(overflow)?;
            end = start
                .checked_add(dtype.nbytes(&shape)?)
                .filter(|&end| end < isize::MAX as usize)
                .ok_or_else(overflow)?;
            let entry = Entry {
                name,
                dtype,
                shape,
                range: start..end,
            };
            slots.push(Slot {
                entry,
                written: Mutex::default(),
            });
        }
        for entry in &late {
            end = end
                .checked_add(entry.max_len)
                .filter(|&end| end < isize::MAX as usize)
                .ok_or_else(|| Error::ShapeOverflow {
                    shape: vec![entry.max_len],
                })?;
        }
        let by_name = (slots.iter().enumerate())
            .map(|(i, s)| (s.entry.name.clone(), i))
            .collect();
        let mut writer = ShardWriter {
            path,
            state: RwLock::new(State::Planned),
            metadata,
            data_start: 0,
            alignment,
            fixed: slots,
            by_name,
            late: Mutex::default(),
            named: AtomicBool::new(false),
        };

        // Numbers only get shorter when the late lengths are known.
        let longest: Vec<usize> = late.iter().map(|e| e.max_len).collect();
        writer.data_start = writer.header(writer.entries(&late, &longest))?.len();
        let len = writer.data_start + end.next_multiple_of(alignment);
        writer.state = RwLock::new(State::Open(at.open(len as u64)?));
        writer.late = Mutex::new(
            late.into_iter()
                .map(|entry| LateSlot { entry, bytes: None })
                .collect(),
        );
        Ok(writer)
    }

    /// What the file is known by to writers elsewhere: see [`ShardFile::joined`].
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::InvalidFile`] once it is finished.
    pub fn mark(&self) -> Result<String> {
        self.file(mark_of)
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a whole tensor. Writing it again replaces it.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], [`Error::SizeMismatch`], or [`Error::Io`].
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let slot = self.slot(name)?;
        if bytes.len() != slot.entry.nbytes() {
            return Err(Error::SizeMismatch {
                what: format!("bytes of tensor {name:?}"),
                expected: slot.entry.nbytes(),
                actual: bytes.len(),
            });
        }
        self.write_slot(slot, 0, bytes)
    }

    /// Writes part of a tensor, `offset` bytes after its start. Parts may come
    /// in any order, and may be written again.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], [`Error::SizeMismatch`] for a part that ends
    /// past the tensor's end, or [`Error::Io`].
    pub fn write_at(&self, name: &str, offset: usize, bytes: &[u8]) -> Result<()> {
        let slot = self.slot(name)?;
        let end = offset.saturating_add(bytes.len());
        if end > slot.entry.nbytes() {
            return Err(Error::SizeMismatch {
                what: format!("end in bytes of a part of tensor {name:?}, at most"),
                expected: slot.entry.nbytes(),
                actual: end,
            });
        }
        self.write_slot(slot, offset, bytes)
    }

    /// Sets the content of a late entry, kept in memory until the file is
    /// finished.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], or [`Error::SizeMismatch`] when it is longer
    /// than was said.
    pub fn write_late(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut late = lock(&self.late);
        let Some(slot) = late.iter_mut().find(|s| s.entry.name == name) else {
            return Err(unknown_tensor(
                name,
                late.iter().map(|s| s.entry.name.as_str()),
            ));
        };
        if bytes.len() > slot.entry.max_len {
            return Err(Error::SizeMismatch {
                what: format!("bytes of late tensor {name:?}, at most"),
                expected: slot.entry.max_len,
                actual: bytes.len(),
            });
        }
        slot.bytes = Some(bytes.to_vec());
        Ok(())
    }

    /// Reads part of a tensor back, `offset` bytes after its start.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], or [`Error::Io`].
    pub fn read_at(&self, name: &str, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let slot = self.slot(name)?;
        let at = self.data_start + slot.entry.range.start + offset;
        self.file(|file| file.read_exact_at(bytes, at as u64))
    }

    /// Bytes of a tensor that is not a late one.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn nbytes(&self, name: &str) -> Result<usize> {
        Ok(self.slot(name)?.entry.nbytes())
    }

    /// Takes that part of a tensor for written, as it is in the file.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn accept(&self, name: &str, part: Range<usize>) -> Result<()> {
        let slot = self.slot(name)?;
        lock(&slot.written).add(part.start..part.end.min(slot.entry.nbytes()));
        Ok(())
    }

    /// Syncs what is written so far to the disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        match &*state {
            State::Open(file) => file.sync_data().map_err(|e| Error::io(&self.path, &e)),
            // Finishing synced it.
            _ => Ok(()),
        }
    }

    pub(super) fn is_named(&self) -> bool {
        self.named.load(Ordering::Acquire)
    }

    /// Its directory was synced.
    pub(super) fn set_named(&self) {
        self.named.store(true, Ordering::Release);
    }

    /// Writes what comes last – late entries and the header –, cuts the file to
    /// its length, syncs it to the disk and closes it.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] when a tensor is not wholly written (it can still
    /// be, and `finish` called again); [`Error::Io`]. A finished file stays as it
    /// is: calling this again, as a worker does that is started anew, tells the
    /// same once more.
    pub fn finish(&self) -> Result<WrittenShard> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let file = match &*state {
            State::Finished(written) => return Ok(written.clone()),
            State::Open(file) => file,
            State::Planned => return Err(self.not_open()),
        };
        let late = lock(&self.late);
        self.check_complete(&late)?;

        let lengths: Vec<usize> = (late.iter())
            .map(|s| s.bytes.as_ref().map_or(0, Vec::len))
            .collect();
        let entries: Vec<LateEntry> = late.iter().map(|s| s.entry.clone()).collect();
        let entries = self.entries(&entries, &lengths);
        let tensors = (entries.iter())
            .map(|e| (e.name.clone(), e.nbytes()))
            .collect();
        let header = self.header(entries)?;

        let late_start = self.data_start + self.fixed_end();
        let late_bytes = late.iter().filter_map(|s| s.bytes.as_deref());
        let late_bytes = late_bytes.collect::<Vec<_>>().concat();
        let data = (self.fixed_end() + late_bytes.len()).next_multiple_of(self.alignment);
        let file_bytes = self.data_start + data;
        let io = |e: std::io::Error| Error::io(&self.path, &e);
        file.write_all_at(&late_bytes, late_start as u64)
            .map_err(io)?;
        file.write_all_at(&header, 0).map_err(io)?;
        file.set_len(file_bytes as u64).map_err(io)?;
        file.sync_all().map_err(io)?;

        let written = WrittenShard {
            file: file_name(&self.path),
            file_bytes,
            tensors,
        };
        *state = State::Finished(written.clone());
        Ok(written)
    }

    fn check_complete(&self, late: &[LateSlot]) -> Result<()> {
        for Slot { entry, written } in &self.fixed {
            let written = lock(written).bytes();
            if written != entry.nbytes() {
                return Err(invalid(
                    &self.path,
                    format!(
                        "cannot be finished: {written} of the {} bytes of tensor {:?} are written",
                        entry.nbytes(),
                        entry.name
                    ),
                ));
            }
        }
        match late.iter().find(|s| s.bytes.is_none()) {
            None => Ok(()),
            Some(slot) => Err(invalid(
                &self.path,
                format!(
                    "cannot be finished: late tensor {:?} is not written",
                    slot.entry.name
                ),
            )),
        }
    }

    fn write_slot(&self, slot: &Slot, offset: usize, bytes: &[u8]) -> Result<()> {
        let at = self.data_start + slot.entry.range.start + offset;
        self.file(|file| file.write_all_at(bytes, at as u64))?;
        lock(&slot.written).add(offset..offset + bytes.len());
        Ok(())
    }

    /// Runs `work` on the file while it is open.
    fn file<R>(&self, work: impl FnOnce(&File) -> std::io::Result<R>) -> Result<R> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        match &*state {
            State::Open(file) => work(file).map_err(|e| Error::io(&self.path, &e)),
            _ => Err(self.not_open()),
        }
    }

    /// All entries, the late ones of these lengths.
    fn entries(&self, late: &[LateEntry], lengths: &[usize]) -> Vec<Entry> {
        let mut entries: Vec<Entry> = self.fixed.iter().map(|s| s.entry.clone()).collect();
        let mut start = self.fixed_end();
        for (entry, &len) in late.iter().zip(lengths) {
            entries.push(Entry {
                name: entry.name.clone(),
                dtype: EntryDType::Known(DType::U8),
                shape: vec![len],
                range: start..start + len,
            });
            start += len;
        }
        entries
    }

    /// What comes before the data of these entries.
    fn header(&self, entries: Vec<Entry>) -> Result<Vec<u8>> {
        self.metadata
            .header(entries, self.data_start)
            .map_err(|message| invalid(&self.path, message))
    }

    fn fixed_end(&self) -> usize {
        self.fixed.last().map_or(0, |s| s.entry.range.end)
    }

    fn slot(&self, name: &str) -> Result<&Slot> {
        match self.by_name.get(name) {
            Some(&i) => Ok(&self.fixed[i]),
            None => Err(unknown_tensor(
                name,
                self.fixed.iter().map(|s| s.entry.name.as_str()),
            )),
        }
    }

    fn not_open(&self) -> Error {
        invalid(&self.path, "is finished already")
    }
}

/// Which bytes of a tensor were written. Counting would not do: a part may be
/// written twice when the worker that wrote it is restarted.
#[derive(Debug, Default)]
struct Coverage {
    /// Sorted, apart from each other, none empty.
    ranges: Vec<Range<usize>>,
}

impl Coverage {
    fn add(&mut self, mut part: Range<usize>) {
        if part.is_empty() {
            return;
        }
        let first = self.ranges.partition_point(|r| r.end < part.start);
        let last = self.ranges.partition_point(|r| r.start <= part.end);
        if let Some(touched) = self.ranges.get(first..last).filter(|t| !t.is_empty()) {
            part.start = part.start.min(touched[0].start);
            part.end = part.end.max(touched[touched.len() - 1].end);
        }
        self.ranges.splice(first..last, [part]);
    }

    fn bytes(&self) -> usize {
        self.ranges.iter().map(Range::len).sum()
    }
}

// A panic elsewhere leaves nothing half-done behind these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::Coverage;

    #[test]
    fn coverage_merges_parts_in_any_order() {
        let mut c = Coverage::default();
        for (part, bytes) in [
            (10..20, 10),
            (0..5, 15),
            (30..40, 25),
            (5..10, 30),
            (12..18, 30),
            (20..30, 40),
            (40..40, 40),
            (0..45, 45),
        ] {
            c.add(part.clone());
            assert_eq!(c.bytes(), bytes, "after {part:?}");
            assert!(c.ranges.windows(2).all(|w| w[0].end < w[1].start));
        }
        assert_eq!(c.ranges.len(), 1);
    }
}
