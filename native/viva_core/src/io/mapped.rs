//! A whole file mapped into memory, read-only.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::{Mmap, UncheckedAdvice};

use super::invalid;
use crate::error::{Error, Result};

static MAPPED_BYTES: AtomicUsize = AtomicUsize::new(0);

/// Bytes that one call gives back.
const WINDOW: usize = 4 << 20;
/// Of the smallest pages.
const PAGE: usize = 4096;

/// Bytes of files that are mapped now, resident or not.
pub fn mapped_bytes() -> usize {
    MAPPED_BYTES.load(Ordering::Relaxed)
}

/// A whole file mapped read-only. Its bytes are read from the disk when they
/// are touched, and stay resident until [`Mapped::give_back`] or drop.
#[derive(Debug)]
pub struct Mapped {
    path: PathBuf,
    file: File,
    /// `None` for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

impl Mapped {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened or mapped, [`Error::InvalidFile`]
    /// when it is no regular file.
    pub fn open(path: &Path) -> Result<Mapped> {
        let io = |e| Error::io(path, &e);
        // Asked of the path first: opening a pipe would wait for its writer.
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err(invalid(path, "is not a regular file"));
        }
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let map = match len {
            0 => None,
            _ => Some(map_file(&file).map_err(io)?),
        };
        let mapped = Mapped {
            path: path.into(),
            file,
            map,
        };
        MAPPED_BYTES.fetch_add(mapped.len(), Ordering::Relaxed);
        Ok(mapped)
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.map.as_ref().map_or(0, |m| m.len())
    }

    /// Whether the file is empty.
    pub fn is_empty(&self) -> bool {
        self.map.is_none()
    }

    /// Drops the resident pages that hold the bytes of `range`, so that they no
    /// longer count as this process's memory. They are read again when touched:
    /// neighbours on the first and last page lose nothing but time. A range
    /// past the end is cut short.
    #[allow(unsafe_code)]
    pub fn give_back(&self, range: Range<usize>) {
        let Some(map) = &self.map else { return };
        // What follows may still need the page in which this ends, and gives it back.
        let end = match range.end < map.len() {
            true => range.end / PAGE * PAGE,
            false => map.len(),
        };
        if range.start >= end {
            return;
        }
        // Window by window: other threads wait for a long call to end.
        for start in (range.start..end).step_by(WINDOW) {
            let len = WINDOW.min(end - start);
            // SAFETY: DONTNEED forgets changes only in private or anonymous
            // memory; this is a shared mapping of a file that is never written
            // through it, so every later read finds the same bytes again.
            let advised =
                unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, len) };
            // Advice only: where the kernel refuses, the pages just stay.
            debug_assert!(advised.is_ok(), "madvise: {advised:?}");
        }
    }

    /// Checks that the file is as long as it was when it was mapped. Reading
    /// pages that were cut off since would kill the process with SIGBUS.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] when the length differs.
    pub fn check_unchanged(&self) -> Result<()> {
        let now = self
            .file
            .metadata()
            .map_err(|e| Error::io(&self.path, &e))?
            .len();
        if now == self.len() as u64 {
            return Ok(());
        }
        Err(invalid(
            &self.path,
            format!(
                "changed while it was read: it had {} bytes when it was opened and has {now} now; \
                 start again when no other program writes to it",
                self.len()
            ),
        ))
    }
}

#[allow(unsafe_code)]
fn map_file(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the mapping is read-only, and every type read from it takes any
    // bit pattern. Another process may still change the file: its bytes are
    // then garbage in the output, and truncation is looked for by
    // `check_unchanged` before a tensor is read.
    unsafe { Mmap::map(file) }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        MAPPED_BYTES.fetch_sub(self.len(), Ordering::Relaxed);
    }
}
