//! A directory that appears under its final name only when it is complete.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::{file_name, stays_inside};
use crate::error::{Error, Result};

/// An output directory that is being filled: a hidden sibling of the target,
/// on the same file system, renamed when it is complete and removed otherwise.
#[derive(Debug)]
pub struct OutputDir {
    target: PathBuf,
    /// Empty once there is nothing left to remove.
    partial: PathBuf,
    /// Whether the target was there, not empty, and is to be replaced.
    replaces: bool,
    /// Parents of the target that were missing, innermost first.
    made_parents: Vec<PathBuf>,
}

impl OutputDir {
    /// Makes the hidden directory beside `target`, and parents that are missing.
    ///
    /// A target that exists must be an empty directory, or `force` is true: it
    /// is then replaced as a whole by [`commit`](Self::commit), and untouched
    /// until then. A target that is, or is above, one of the `protected` paths
    /// (the source of the job), the current or the home directory is refused.
    ///
    /// # Errors
    /// [`Error::Io`] with code `eexist` when the target is there; with another
    /// code when its parent cannot be written; [`Error::InvalidOption`] for a
    /// target that must not be replaced.
    pub fn create(
        target: impl AsRef<Path>,
        force: bool,
        protected: &[PathBuf],
    ) -> Result<OutputDir> {
        let given = target.as_ref();
        let found = match fs::symlink_metadata(given) {
            Ok(_) => Some(fs::canonicalize(given).map_err(|e| Error::io(given, &e))?),
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io(given, &e)),
        };
        let mut replaces = false;
        let mut made_parents = Vec::new();
        let target = match found {
            Some(target) => {
                replaces = check_existing(&target, force, protected)?;
                target
            }
            None => make_parents(given, &mut made_parents)?,
        };
        let mut output = OutputDir {
            partial: PathBuf::new(),
            target,
            replaces,
            made_parents,
        };
        output.partial = make_sibling(&output.target, "partial")?;
        Ok(output)
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
    /// deletes the one that it replaces.
    ///
    /// # Errors
    /// [`Error::Io`]: when syncing failed, nothing is left; when only the
    /// renaming failed, the complete directory is kept and the message says
    /// where; when only the old directory could not be deleted, likewise.
    pub fn commit(mut self) -> Result<()> {
        sync_tree(&self.partial)?;
        // From here on all the work is done: nothing below may throw it away.
        let partial = std::mem::take(&mut self.partial);
        let kept = |e: io::Error, what: &str, at: &Path| {
            let mut error = Error::io(&self.target, &e);
            if let Error::Io { code, message, .. } = &mut error {
                if e.kind() == ErrorKind::DirectoryNotEmpty {
                    *code = "eexist".into();
                }
                *message = format!("{e}; {what} {}", at.display());
            }
            error
        };
        const OUTPUT: &str = "the complete output is kept as";
        let old = match self.replaces {
            true => replace(&self.target, &partial).map_err(|e| kept(e, OUTPUT, &partial))?,
            false => {
                fs::rename(&partial, &self.target).map_err(|e| kept(e, OUTPUT, &partial))?;
                None
            }
        };
        sync_parents(&self.target, self.made_parents.len())?;
        match old {
            None => Ok(()),
            Some(old) => fs::remove_dir_all(&old).map_err(|e| {
                kept(
                    e,
                    "it is replaced, but the directory that was there is still in",
                    &old,
                )
            }),
        }
    }

    /// Removes everything that was written; dropping does the same, silently.
    ///
    /// # Errors
    /// [`Error::Io`] when something cannot be removed.
    pub fn abort(mut self) -> Result<()> {
        self.remove()
    }

    fn remove(&mut self) -> Result<()> {
        let partial = std::mem::take(&mut self.partial);
        let removed = match partial.as_os_str().is_empty() {
            true => Ok(()),
            false => fs::remove_dir_all(&partial).map_err(|e| Error::io(&partial, &e)),
        };
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
        // Nobody is left to tell; `abort` is there for who wants to know.
        let _ = self.remove();
    }
}

/// Checks a target that is there; true when it has content to be replaced.
fn check_existing(target: &Path, force: bool, protected: &[PathBuf]) -> Result<bool> {
    let exists = |message: &str| Error::Io {
        path: target.display().to_string(),
        code: "eexist".into(),
        message: message.into(),
    };
    if !target.is_dir() {
        return Err(exists(
            "already exists and is not a directory; choose another directory",
        ));
    }
    if is_mount_point(target) {
        return Err(exists(
            "is where a file system is mounted, and cannot be replaced; choose a directory in it",
        ));
    }
    let mut content = fs::read_dir(target).map_err(|e| Error::io(target, &e))?;
    if content.next().is_none() {
        return Ok(false);
    }
    if !force {
        return Err(exists(
            "already exists and is not empty; use --force to replace it, or choose another \
             directory",
        ));
    }
    let own = [
        std::env::current_dir().ok(),
        std::env::var_os("HOME").map(PathBuf::from),
    ];
    for path in protected.iter().chain(own.iter().flatten()) {
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        if real.starts_with(target) {
            return Err(Error::option(
                "to",
                format!(
                    "{} holds {}, which replacing it would delete; choose another directory",
                    target.display(),
                    path.display()
                ),
            ));
        }
    }
    Ok(true)
}

/// Makes the missing parents of a target; returns its full path.
fn make_parents(given: &Path, made: &mut Vec<PathBuf>) -> Result<PathBuf> {
    let absolute = std::path::absolute(given).map_err(|e| Error::io(given, &e))?;
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        return Err(Error::option(
            "to",
            format!("{given:?} does not name a directory"),
        ));
    };
    let missing = parent.ancestors().take_while(|p| !p.exists());
    made.extend(missing.map(PathBuf::from));
    fs::create_dir_all(parent).map_err(|e| Error::io(parent, &e))?;
    let parent = fs::canonicalize(parent).map_err(|e| Error::io(parent, &e))?;
    Ok(parent.join(name))
}

/// Makes a hidden directory beside `target`, with a name of its own.
fn make_sibling(target: &Path, what: &str) -> Result<PathBuf> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    loop {
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!(".{}.{what}-{}-{n}", file_name(target), std::process::id());
        let path = target.with_file_name(name);
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            // Left by a process that was killed and had the same id.
            Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
            Err(e) => return Err(Error::io(target.parent().unwrap_or(target), &e)),
        }
    }
}

/// Puts `partial` in the place of `target`. Returns where the old one is now.
fn replace(target: &Path, partial: &Path) -> io::Result<Option<PathBuf>> {
    match renameat_with(CWD, partial, CWD, target, RenameFlags::EXCHANGE) {
        // Both names changed hands in one step.
        Ok(()) => Ok(Some(partial.into())),
        // The old one is gone by itself.
        Err(Errno::NOENT) => fs::rename(partial, target).map(|()| None),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            replace_in_two_steps(target, partial).map(Some)
        }
        Err(e) => Err(e.into()),
    }
}

/// The same for file systems that cannot exchange names: for a moment the old
/// directory is there only under the name that is returned.
fn replace_in_two_steps(target: &Path, partial: &Path) -> io::Result<PathBuf> {
    let aside = make_sibling(target, "replaced").map_err(|e| io::Error::other(e.to_string()))?;
    fs::rename(target, &aside)?;
    if let Err(e) = fs::rename(partial, target) {
        fs::rename(&aside, target)?;
        return Err(e);
    }
    Ok(aside)
}

/// Syncs all files below a directory, and the directories themselves.
fn sync_tree(directory: &Path) -> Result<()> {
    let io = |e| Error::io(directory, &e);
    for item in fs::read_dir(directory).map_err(io)? {
        let path = item.map_err(io)?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            let file = OpenOptions::new().read(true).open(&path);
            file.and_then(|f| f.sync_all())
                .map_err(|e| Error::io(&path, &e))?;
        }
    }
    sync_directory(directory)
}

/// Syncs the directory that holds `target`, and those that hold `made` more.
fn sync_parents(target: &Path, made: usize) -> Result<()> {
    let mut parents = target.ancestors().skip(1).take(made + 1);
    parents.try_for_each(sync_directory)
}

pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    match File::open(path).and_then(|f| f.sync_all()) {
        // Some network file systems sync directories by themselves only.
        Err(e) if e.kind() == ErrorKind::InvalidInput => Ok(()),
        other => other.map_err(|e| Error::io(path, &e)),
    }
}

/// Whether a file system is mounted there: it could be filled, not renamed.
fn is_mount_point(path: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{AtFlags, StatxAttributes, StatxFlags, statx};
        let stat = statx(CWD, path, AtFlags::empty(), StatxFlags::empty());
        stat.is_ok_and(|s| s.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
    }
    #[cfg(not(target_os = "linux"))]
    {
        use std::os::unix::fs::MetadataExt;
        let device = |p: &Path| fs::metadata(p).map(|m| m.dev()).ok();
        path.parent()
            .is_none_or(|parent| device(path) != device(parent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_steps_replace_and_put_back() {
        let home = tempfile::tempdir().unwrap();
        let (target, partial) = (home.path().join("out"), home.path().join("partial"));
        for (dir, text) in [(&target, "old"), (&partial, "complete")] {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("f"), text).unwrap();
        }
        let aside = replace_in_two_steps(&target, &partial).unwrap();
        assert_eq!(fs::read_to_string(target.join("f")).unwrap(), "complete");
        assert_eq!(fs::read_to_string(aside.join("f")).unwrap(), "old");

        // What is to come in is not there: what was there comes back.
        assert!(replace_in_two_steps(&target, &partial).is_err());
        assert_eq!(fs::read_to_string(target.join("f")).unwrap(), "complete");
    }
}
