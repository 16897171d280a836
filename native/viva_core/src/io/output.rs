//! A directory that appears under its final name only when it is complete.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::place::{
    check_existing, make_parents, replace, sibling, sync_directory, sync_parents, sync_tree,
};
use super::{ShardWriter, stays_inside};
use crate::error::{Error, Result};

/// The file in an unfinished output that says what of it is done. Where it is
/// tells how far an interrupted job came: it travels with the directory, and is
/// the last thing to go.
const MANIFEST: &str = ".manifest";

/// How long a lock is waited for.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What an earlier job left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    Nothing,
    /// An output with a manifest: the work in it can be gone on with.
    Unfinished,
    /// The output has its final name, and only cleaning up was interrupted.
    Published,
}

/// An output directory that is being filled: a hidden sibling of the target,
/// on the same file system, renamed when it is complete.
///
/// It is locked while this lives, so that two jobs never fill one directory, and
/// dropping it removes what no manifest vouches for: the work that is recorded
/// survives whatever ends the job.
#[derive(Debug)]
pub struct OutputDir {
    target: PathBuf,
    /// Empty once there is nothing left to remove.
    partial: PathBuf,
    /// Whether the target was there, not empty, and is to be replaced.
    replaces: bool,
    /// Parents of the target that were missing, innermost first.
    made_parents: Vec<PathBuf>,
    found: Found,
    lock: Arc<Lock>,
}

/// The open directory, which is locked while this lives.
#[derive(Debug)]
struct Lock {
    _directory: File,
    /// Held by who writes to the manifest.
    manifest: Mutex<()>,
}

/// Appends to the manifest of an output. The output stays locked while this lives: what
/// a job was writing when it ended is written before another goes on.
#[derive(Debug)]
pub struct Recorder {
    directory: PathBuf,
    lock: Arc<Lock>,
}

impl OutputDir {
    /// Makes the hidden directory beside `target`, and parents that are missing,
    /// or takes over the one that an earlier job left: see [`found`](Self::found).
    ///
    /// A target that exists must be an empty directory, or `force` is true: it
    /// is then replaced as a whole by [`commit`](Self::commit), and untouched
    /// until then. A target that is, or is above, one of the `protected` paths
    /// (the source of the job), the current or the home directory is refused.
    ///
    /// # Errors
    /// [`Error::Io`] with code `eexist` when the target is there, `ebusy` when
    /// another job is filling it, with another code when its parent cannot be
    /// written; [`Error::InvalidOption`] for a target that must not be replaced.
    pub fn open(target: impl AsRef<Path>, force: bool, protected: &[PathBuf]) -> Result<OutputDir> {
        let given = target.as_ref();
        let there = match fs::symlink_metadata(given) {
            Ok(_) => Some(fs::canonicalize(given).map_err(|e| Error::io(given, &e))?),
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io(given, &e)),
        };
        let published = there.as_ref().filter(|t| t.join(MANIFEST).is_file());
        if let Some(target) = published {
            return Ok(OutputDir {
                lock: lock(target, target)?.ok_or_else(|| busy(target))?,
                target: target.clone(),
                partial: target.clone(),
                replaces: false,
                made_parents: Vec::new(),
                found: Found::Published,
            });
        }
        let mut replaces = false;
        let mut made_parents = Vec::new();
        let target = match there {
            Some(target) => {
                replaces = check_existing(&target, force, protected)?;
                target
            }
            None => make_parents(given, &mut made_parents)?,
        };
        let partial = sibling(&target, "partial");
        let lock = loop {
            match fs::create_dir(&partial) {
                Ok(()) => sync_parents(&target, made_parents.len())?,
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io(target.parent().unwrap_or(&target), &e)),
            }
            // None: its owner gave it another name, or removed it, in between.
            if let Some(lock) = lock(&partial, &target)? {
                break lock;
            }
        };
        let mut output = OutputDir {
            target,
            partial,
            replaces,
            made_parents,
            found: Found::Unfinished,
            lock,
        };
        if !output.manifest().is_file() {
            output.clear()?;
        }
        Ok(output)
    }

    /// The same, without what an earlier job left.
    ///
    /// # Errors
    /// Those of [`open`](Self::open).
    pub fn create(
        target: impl AsRef<Path>,
        force: bool,
        protected: &[PathBuf],
    ) -> Result<OutputDir> {
        let mut output = OutputDir::open(&target, force, protected)?;
        if output.found == Found::Published {
            output.commit()?;
            output = OutputDir::open(&target, force, protected)?;
        }
        output.clear()?;
        Ok(output)
    }

    /// The manifest of an unfinished or just published output of that target.
    pub fn manifest_of(target: impl AsRef<Path>) -> Option<PathBuf> {
        let target = target.as_ref();
        let target = fs::canonicalize(target)
            .or_else(|_| std::path::absolute(target))
            .ok()?;
        let places = [target.clone(), sibling(&target, "partial")];
        places
            .map(|p| p.join(MANIFEST))
            .into_iter()
            .find(|m| m.is_file())
    }

    /// Whether a job is writing in that directory now.
    pub fn is_locked(directory: impl AsRef<Path>) -> bool {
        let shared = File::open(directory).map(|d| d.try_lock_shared());
        matches!(shared, Ok(Err(TryLockError::WouldBlock)))
    }

    /// Removes everything in it; of a published output there is nothing to remove.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn clear(&mut self) -> Result<()> {
        let io = |e| Error::io(&self.partial, &e);
        // What speaks for the rest goes first.
        let manifest = self.manifest();
        if manifest.exists() {
            fs::remove_file(&manifest).map_err(io)?;
            sync_directory(&self.partial)?;
        }
        for item in fs::read_dir(&self.partial).map_err(io)? {
            let path = item.map_err(io)?.path();
            match path.is_dir() && !path.is_symlink() {
                true => fs::remove_dir_all(&path),
                false => fs::remove_file(&path),
            }
            .map_err(|e| Error::io(&path, &e))?;
        }
        self.found = Found::Nothing;
        Ok(())
    }

    /// What was there when it was opened.
    pub fn found(&self) -> Found {
        self.found
    }

    /// What appends to the manifest.
    pub fn recorder(&self) -> Recorder {
        Recorder {
            directory: self.partial.clone(),
            lock: Arc::clone(&self.lock),
        }
    }

    /// The file that says what is done: see [`Recorder`].
    pub fn manifest(&self) -> PathBuf {
        self.partial.join(MANIFEST)
    }

    /// The hidden directory, to write files into.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// The directory that it will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Copies a file to a path relative to the directory.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::InvalidOption`] for a path that leads outside.
    pub fn carry(&self, file: &Path, relative: impl AsRef<Path>) -> Result<()> {
        let to = self.place(relative.as_ref())?;
        // Not `fs::copy`, which takes over a read-only mode: the file could
        // then not be replaced by `write_file`.
        let mut from = File::open(file).map_err(|e| Error::io(file, &e))?;
        let copied = File::create(&to).and_then(|mut to| io::copy(&mut from, &mut to));
        copied.map(|_| ()).map_err(|e| Error::io(&to, &e))
    }

    /// Writes a file at a path relative to the directory; it replaces one that
    /// was written or carried there before.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::InvalidOption`] for a path that leads outside.
    pub fn write_file(&self, relative: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
        let to = self.place(relative.as_ref())?;
        let written = File::create(&to).and_then(|mut f| f.write_all(bytes));
        written.map_err(|e| Error::io(&to, &e))
    }

    /// Syncs every file and directory, gives the directory its final name, and
    /// deletes the one that it replaces and, at last, the manifest.
    ///
    /// # Errors
    /// [`Error::Io`]: before the renaming, everything is kept under the hidden
    /// name, with its manifest; when only the old directory could not be deleted,
    /// the message says where it is.
    pub fn commit(mut self) -> Result<()> {
        if self.found != Found::Published {
            sync_tree(&self.partial)?;
        }
        // From here on all the work is done: nothing below may throw it away.
        let partial = std::mem::take(&mut self.partial);
        if self.found != Found::Published {
            self.rename(&partial)?;
        }
        sync_parents(&self.target, self.made_parents.len())?;
        // Where nothing is replaced, another job may have begun under that name.
        let replaced = self.replaces || self.found == Found::Published;
        for what in ["partial", "replaced"].iter().filter(|_| replaced) {
            let old = sibling(&self.target, what);
            match fs::remove_dir_all(&old) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(self.kept(
                        &e,
                        "it is replaced, but the directory that was there is still in",
                        &old,
                    ));
                }
                _ => {}
            }
        }
        match fs::remove_file(self.target.join(MANIFEST)) {
            Ok(()) => sync_directory(&self.target),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::io(&self.target, &e)),
        }
    }

    fn rename(&self, partial: &Path) -> Result<()> {
        match self.replaces {
            true => replace(&self.target, partial),
            false => fs::rename(partial, &self.target),
        }
        .map_err(|e| self.kept(&e, "the complete output is kept as", partial))
    }

    fn kept(&self, e: &io::Error, what: &str, at: &Path) -> Error {
        let mut error = Error::io(&self.target, e);
        if let Error::Io { code, message, .. } = &mut error {
            if e.kind() == ErrorKind::DirectoryNotEmpty {
                *code = "eexist".into();
            }
            *message = format!("{e}; {what} {}", at.display());
        }
        error
    }

    /// Removes everything that was written, recorded or not.
    ///
    /// # Errors
    /// [`Error::Io`] when something cannot be removed.
    pub fn abort(mut self) -> Result<()> {
        match self.found {
            Found::Published => Ok(()),
            _ => self.clear().and_then(|()| self.remove()),
        }
    }

    fn remove(&mut self) -> Result<()> {
        let partial = std::mem::take(&mut self.partial);
        let removed = fs::remove_dir_all(&partial).map_err(|e| Error::io(&partial, &e));
        // Only empty ones go: the output may be there, or what others wrote.
        for parent in std::mem::take(&mut self.made_parents) {
            if fs::remove_dir(parent).is_err() {
                break;
            }
        }
        removed
    }

    fn place(&self, relative: &Path) -> Result<PathBuf> {
        if !stays_inside(relative) {
            return Err(Error::option(
                "relative",
                format!("{relative:?} leads out of the output directory"),
            ));
        }
        let path = self.partial.join(relative);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|e| Error::io(parent, &e))?;
        }
        Ok(path)
    }
}

impl Drop for OutputDir {
    fn drop(&mut self) {
        let gone = self.partial.as_os_str().is_empty();
        if !gone && !self.manifest().exists() {
            // Nobody is left to tell; `abort` is there for who wants to know.
            let _ = self.remove();
        }
    }
}

impl Recorder {
    /// Makes what these shards hold durable, and then that the manifest says so: writes
    /// `records` into it, `at` bytes after its start.
    ///
    /// # Errors
    /// [`Error::Io`]. Doing it again with the same bytes does no harm.
    pub fn record(&self, shards: &[&ShardWriter], at: u64, records: &[u8]) -> Result<()> {
        for shard in shards {
            shard.sync()?;
        }
        // Their names, before the manifest speaks of them.
        if !shards.iter().all(|s| s.is_named()) {
            sync_directory(&self.directory)?;
            shards.iter().for_each(|s| s.set_named());
        }
        let path = self.directory.join(MANIFEST);
        let io = |e| Error::io(&path, &e);
        // The call of a worker that was killed may come after that of its successor, and
        // after what was appended then: it finds its records there.
        let _writing = (self.lock.manifest.lock()).unwrap_or_else(PoisonError::into_inner);
        let file = (OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false))
        .open(&path)
        .map_err(io)?;
        let mut there = vec![0; records.len()];
        if file.read_exact_at(&mut there, at).is_err() || there != records {
            file.set_len(at).map_err(io)?;
            file.write_all_at(records, at).map_err(io)?;
        }
        file.sync_data().map_err(io)?;
        match at {
            0 => sync_directory(&self.directory),
            _ => Ok(()),
        }
    }
}

/// The length of a file, and what tells whether anything was done to it since:
/// another file in its place, a write, even one that put the old time back.
///
/// # Errors
/// [`Error::Io`].
pub fn file_identity(path: impl AsRef<Path>) -> Result<(u64, String)> {
    let path = path.as_ref();
    let m = fs::metadata(path).map_err(|e| Error::io(path, &e))?;
    let identity = format!(
        "{}:{} {}.{:09} {}.{:09}",
        m.dev(),
        m.ino(),
        m.mtime(),
        m.mtime_nsec(),
        m.ctime(),
        m.ctime_nsec()
    );
    Ok((m.len(), identity))
}

/// Locks a directory, unless `path` names another one by then. The lock goes with
/// the file, however the process ends.
fn lock(path: &Path, target: &Path) -> Result<Option<Arc<Lock>>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|e| Error::io(path, &e))?,
    };
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => break,
            // A job that was killed may be writing its last record.
            Err(TryLockError::WouldBlock) if begun.elapsed() < LAST_WORDS => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(TryLockError::WouldBlock) => return Err(busy(target)),
            // Some network file systems have no locks.
            Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => break,
            Err(TryLockError::Error(e)) => return Err(Error::io(path, &e)),
        }
    }
    let identity = |m: fs::Metadata| (m.dev(), m.ino());
    let locked = file.metadata().map(identity);
    let named = fs::metadata(path).map(identity);
    let same = matches!((locked, named), (Ok(a), Ok(b)) if a == b);
    Ok(same.then(|| {
        Arc::new(Lock {
            _directory: file,
            manifest: Mutex::default(),
        })
    }))
}

fn busy(target: &Path) -> Error {
    Error::Io {
        path: target.display().to_string(),
        code: "ebusy".into(),
        message: "another job is writing it; wait for its end, or choose another directory".into(),
    }
}
