//! The file that a shard is written to, by one machine or by several.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Where the file of a shard is, and which one it has to be where another writer made it.
#[derive(Clone, Debug)]
pub struct ShardFile {
    pub(super) path: PathBuf,
    joined: Option<String>,
}

impl<P: AsRef<Path>> From<P> for ShardFile {
    fn from(path: P) -> ShardFile {
        ShardFile {
            path: path.as_ref().to_path_buf(),
            joined: None,
        }
    }
}

impl ShardFile {
    /// The file of a writer elsewhere, by its [`mark`](super::ShardWriter::mark).
    pub fn joined(path: impl AsRef<Path>, mark: String) -> ShardFile {
        ShardFile {
            joined: Some(mark),
            ..ShardFile::from(path)
        }
    }

    /// Makes the file and reserves its disk space, or opens one that is there. One that
    /// was joined is neither made nor changed in length: its job may be over.
    pub(super) fn open(&self, len: u64) -> Result<File> {
        let Some(mark) = &self.joined else {
            return open_file(&self.path, len);
        };
        let io = |e| Error::io(&self.path, &e);
        let file = (OpenOptions::new().read(true).write(true))
            .open(&self.path)
            .map_err(io)?;
        match mark_of(&file).map_err(io)? == *mark {
            true => Ok(file),
            false => Err(Error::Io {
                path: self.path.display().to_string(),
                code: "estale".into(),
                message: "is not the file that the job made".into(),
            }),
        }
    }
}

/// What tells a file from any other that ever had its name: its number and when it was
/// made, where the file system knows.
pub(super) fn mark_of(file: &File) -> std::io::Result<String> {
    let metadata = file.metadata()?;
    let made = (metadata.created().ok()).and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    let made = made.map_or(0, |t| t.as_nanos());
    Ok(format!("{} {made}", metadata.ino()))
}

/// Opens a file, whatever it holds, with `len` bytes reserved on the disk, if any are to be.
pub(super) fn open_file(path: &Path, len: u64) -> Result<File> {
    let io = |e: std::io::Error| Error::io(path, &e);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(io)?;
    if len == 0 {
        return Ok(file);
    }
    let reserved = loop {
        match fallocate(&file, FallocateFlags::empty(), 0, len) {
            Err(Errno::INTR) => continue,
            other => break other,
        }
    };
    match reserved {
        Ok(()) => Ok(file),
        // A file system that cannot reserve space: a full disk shows later.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(len).map_err(io).map(|()| file),
        Err(e) => Err(io(e.into())),
    }
}
