//! Where an output comes to lie: what may be there before it, and how it takes the
//! place of that.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::file_name;
use crate::error::{Error, Result};

/// Checks a target that is there; true when it has content to be replaced.
pub(super) fn check_existing(target: &Path, force: bool, protected: &[PathBuf]) -> Result<bool> {
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
pub(super) fn make_parents(given: &Path, made: &mut Vec<PathBuf>) -> Result<PathBuf> {
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

/// The hidden name beside `target` of what is on its way to it or from it.
pub(super) fn sibling(target: &Path, what: &str) -> PathBuf {
    target.with_file_name(format!(".{}.{what}", file_name(target)))
}

/// Puts `partial` in the place of `target`, and leaves the old one under a hidden
/// name.
pub(super) fn replace(target: &Path, partial: &Path) -> io::Result<()> {
    match renameat_with(CWD, partial, CWD, target, RenameFlags::EXCHANGE) {
        // Both names changed hands in one step.
        Ok(()) => Ok(()),
        // The old one is gone by itself.
        Err(Errno::NOENT) => fs::rename(partial, target),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            replace_in_two_steps(target, partial)
        }
        Err(e) => Err(e.into()),
    }
}

/// The same for file systems that cannot exchange names: for a moment the old
/// directory is there only under its hidden name.
fn replace_in_two_steps(target: &Path, partial: &Path) -> io::Result<()> {
    let aside = sibling(target, "replaced");
    fs::rename(target, &aside)?;
    if let Err(e) = fs::rename(partial, target) {
        fs::rename(&aside, target)?;
        return Err(e);
    }
    Ok(())
}

/// How many files are synced at a time: a disk makes them durable together.
const SYNCED_AT_ONCE: usize = 16;

/// Syncs all files below a directory, and then the directories themselves.
pub(super) fn sync_tree(directory: &Path) -> Result<()> {
    let (mut files, mut directories) = (Vec::new(), vec![directory.to_path_buf()]);
    let mut listed = 0;
    while let Some(directory) = directories.get(listed).cloned() {
        let io = |e| Error::io(&directory, &e);
        for item in fs::read_dir(&directory).map_err(io)? {
            let path = item.map_err(io)?.path();
            match path.is_dir() {
                true => directories.push(path),
                false => files.push(path),
            }
        }
        listed += 1;
    }
    sync_all(&files)?;
    // The innermost first.
    directories.iter().rev().try_for_each(|d| sync_directory(d))
}

fn sync_all(files: &[PathBuf]) -> Result<()> {
    let sync = |path: &PathBuf| {
        let file = OpenOptions::new().read(true).open(path);
        file.and_then(|f| f.sync_all())
            .map_err(|e| Error::io(path, &e))
    };
    // Threads that wait for a disk, and so none of those that compute.
    std::thread::scope(|scope| {
        let shares = files.chunks(files.len().div_ceil(SYNCED_AT_ONCE).max(1));
        let threads: Vec<_> = shares
            .map(|share| scope.spawn(move || share.iter().try_for_each(sync)))
            .collect();
        let ends = threads.into_iter().map(|t| t.join().expect("no panic"));
        ends.collect::<Vec<_>>().into_iter().collect()
    })
}

/// Syncs the directory that holds `target`, and those that hold `made` more.
pub(super) fn sync_parents(target: &Path, made: usize) -> Result<()> {
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
        replace_in_two_steps(&target, &partial).unwrap();
        let aside = sibling(&target, "replaced");
        assert_eq!(fs::read_to_string(target.join("f")).unwrap(), "complete");
        assert_eq!(fs::read_to_string(aside.join("f")).unwrap(), "old");

        // What is to come in is not there: what was there comes back.
        assert!(replace_in_two_steps(&target, &partial).is_err());
        assert_eq!(fs::read_to_string(target.join("f")).unwrap(), "complete");
    }
}
