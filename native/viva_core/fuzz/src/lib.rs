//! What both targets do with a file.

use std::cell::OnceCell;
use std::path::PathBuf;

use tempfile::TempDir;
use viva_core::content;
use viva_core::io::Checkpoint;

thread_local! {
    static DIRECTORY: OnceCell<TempDir> = const { OnceCell::new() };
}

fn path(name: &str) -> PathBuf {
    DIRECTORY.with(|dir| {
        let dir = dir.get_or_init(|| tempfile::tempdir().expect("a temporary directory"));
        dir.path().join(name)
    })
}

/// Opens `data` as a file of that name, and reads all that it has.
pub fn open(name: &str, data: &[u8]) {
    let path = path(name);
    std::fs::write(&path, data).expect("a file in the temporary directory");
    let Ok(checkpoint) = Checkpoint::open(&path) else {
        return;
    };
    let _ = content::contents(&checkpoint);
    for entry in checkpoint.entries() {
        let _ = content::read(&checkpoint, &entry.name);
    }
}
