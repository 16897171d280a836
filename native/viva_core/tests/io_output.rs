//! Output directories: over what is there, and only as a whole.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use viva_core::Error;
use viva_core::io::{FixedEntry, Found, OutputDir, ShardWriter};
use viva_core::tensor::DType;

/// Everything in a directory, hidden files too, sorted.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn code(result: viva_core::Result<impl Sized>) -> String {
    match result {
        Err(Error::Io { code, .. }) => code,
        Err(Error::InvalidOption { option, .. }) => option,
        Err(other) => panic!("{other}"),
        Ok(_) => "ok".into(),
    }
}

#[test]
fn a_directory_appears_when_it_is_complete() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("some/where/out");
    let source = home.path().join("source.txt");
    fs::write(&source, "carried").unwrap();
    fs::set_permissions(&source, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();

    let output = OutputDir::create(&target, false, &[]).unwrap();
    let real = home.path().canonicalize().unwrap();
    assert_eq!(output.target(), real.join("some/where/out"));
    assert!(output.path().starts_with(real.join("some/where")));
    let hidden = names(&real.join("some/where"));
    assert_eq!(hidden, [".out.partial"]);

    output.carry(&source, "1_Pooling/config.json").unwrap();
    output.carry(&source, "config.json").unwrap();
    output.write_file("config.json", b"edited").unwrap();
    for outside in ["", "..", "../x", "/x", "a/../../x", "."] {
        assert_eq!(
            code(output.write_file(outside, b"")),
            "relative",
            "{outside:?}"
        );
    }
    assert_eq!(code(output.carry(&real.join("none"), "x")), "enoent");
    assert!(!target.exists());
    output.commit().unwrap();

    assert_eq!(names(&real.join("some/where")), ["out"]);
    assert_eq!(names(&target), ["1_Pooling", "config.json"]);
    assert_eq!(fs::read(target.join("config.json")).unwrap(), b"edited");
    assert_eq!(
        fs::read(target.join("1_Pooling/config.json")).unwrap(),
        b"carried"
    );
}

#[test]
fn an_abandoned_directory_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("a/b/out");
    let output = OutputDir::create(&target, false, &[]).unwrap();
    output.write_file("x/y", b"z").unwrap();
    output.abort().unwrap();
    assert_eq!(names(home.path()), [""; 0]);

    drop(OutputDir::create(&target, false, &[]).unwrap());
    assert_eq!(names(home.path()), [""; 0]);

    // What others put into a parent that was made stays.
    let output = OutputDir::create(&target, false, &[]).unwrap();
    fs::write(home.path().join("a/theirs"), "").unwrap();
    output.abort().unwrap();
    assert_eq!(names(&home.path().join("a")), ["theirs"]);
}

#[test]
fn what_is_there_is_not_touched_without_force() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("out");
    fs::create_dir(&target).unwrap();
    let output = OutputDir::create(&target, false, &[]).unwrap();
    output.write_file("a", b"1").unwrap();
    output.commit().unwrap();
    assert_eq!(names(&target), ["a"], "an empty directory is filled");

    match OutputDir::create(&target, false, &[]) {
        Err(Error::Io { code, message, .. }) => {
            assert_eq!(code, "eexist");
            assert!(message.contains("use --force"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    let file = home.path().join("file");
    fs::write(&file, "x").unwrap();
    for force in [false, true] {
        assert_eq!(code(OutputDir::create(&file, force, &[])), "eexist");
        assert!(["enotdir", "eexist"].contains(&&*code(OutputDir::create(
            file.join("x"),
            force,
            &[]
        ))));
    }
    assert_eq!(names(home.path()), ["file", "out"]);
}

#[test]
fn whoever_comes_second_is_told_so() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("out");
    let first = OutputDir::create(&target, false, &[]).unwrap();
    first.write_file("a", b"1").unwrap();
    assert_eq!(code(OutputDir::create(&target, true, &[])), "ebusy");
    first.commit().unwrap();
    assert_eq!(names(&target), ["a"]);
    assert_eq!(names(home.path()), ["out"]);

    // A target that someone else filled meanwhile is not overwritten.
    let target = home.path().join("other");
    let late = OutputDir::create(&target, false, &[]).unwrap();
    late.write_file("b", b"2").unwrap();
    fs::create_dir(&target).unwrap();
    fs::write(target.join("theirs"), "").unwrap();
    let hidden = late.path().to_path_buf();
    late.recorder().record(&[], 0, b"all done").unwrap();
    let error = late.commit().unwrap_err();
    assert!(
        error.to_string().contains(&hidden.display().to_string()),
        "{error}"
    );
    assert_eq!(code(Err::<(), _>(error)), "eexist");
    assert_eq!(names(&target), ["theirs"]);
    assert_eq!(
        names(&hidden),
        [".manifest", "b"],
        "the complete output is kept"
    );
}

#[test]
fn what_is_recorded_outlives_whoever_wrote_it() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("a/out");
    let open = || OutputDir::open(&target, false, &[]).unwrap();
    let entries = || {
        vec![FixedEntry {
            name: "x".into(),
            dtype: DType::U8.into(),
            shape: vec![3],
        }]
    };
    let create = |output: &OutputDir| {
        let path = output.path().join("shard-0");
        ShardWriter::create(path, entries(), vec![], BTreeMap::new()).unwrap()
    };
    let first = open();
    assert_eq!(first.found(), Found::Nothing);
    assert!(OutputDir::is_locked(first.path()));
    assert_eq!(OutputDir::manifest_of(&target), None);
    let shard = create(&first);
    shard.write("x", b"abc").unwrap();
    first.recorder().record(&[&shard], 0, b"one, torn").unwrap();
    first.recorder().record(&[&shard], 5, b"two").unwrap();
    // Late, of a worker that was killed: what came after it stays.
    first.recorder().record(&[], 0, b"one, ").unwrap();
    let path = first.path().to_path_buf();
    let recorder = first.recorder();
    drop((shard, first));
    // Who is still recording keeps others out.
    assert!(OutputDir::is_locked(&path));
    assert_eq!(code(OutputDir::open(&target, false, &[])), "ebusy");
    drop(recorder);
    assert!(!OutputDir::is_locked(&path));
    assert_eq!(
        OutputDir::manifest_of(&target),
        Some(path.join(".manifest"))
    );

    let second = open();
    assert_eq!(second.found(), Found::Unfinished);
    assert_eq!(fs::read(second.manifest()).unwrap(), b"one, two");
    let shard = create(&second);
    let mut read = [0; 3];
    shard.read_at("x", 0, &mut read).unwrap();
    assert_eq!(&read, b"abc");
    shard.accept("x", 0..usize::MAX).unwrap();
    shard.finish().unwrap();
    shard.sync().unwrap();
    second.commit().unwrap();
    assert_eq!(names(&target), ["shard-0"]);

    // Without a word on what is done, nothing is kept.
    let other = home.path().join("b/out");
    let output = OutputDir::create(&other, false, &[]).unwrap();
    fs::write(output.path().join("shard-0"), "abc").unwrap();
    drop(output);
    assert_eq!(names(home.path()), ["a"]);

    // Nor is it where that was asked for.
    let output = OutputDir::create(&other, false, &[]).unwrap();
    output.recorder().record(&[], 0, b"one").unwrap();
    drop(output);
    let output = OutputDir::create(&other, false, &[]).unwrap();
    assert_eq!(output.found(), Found::Nothing);
    assert_eq!(names(output.path()), [""; 0]);
    output.recorder().record(&[], 0, b"one").unwrap();
    output.abort().unwrap();
    assert_eq!(names(&home.path().join("b")), [""; 0]);
}

#[test]
fn cleaning_up_is_gone_on_with() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("out");
    let interrupted = || {
        // Renamed, and then nothing more.
        fs::create_dir_all(&target).unwrap();
        fs::write(target.join("model"), "complete").unwrap();
        fs::write(target.join(".manifest"), "all").unwrap();
        fs::create_dir_all(home.path().join(".out.partial")).unwrap();
        fs::write(home.path().join(".out.partial/model"), "replaced").unwrap();
    };
    interrupted();
    let output = OutputDir::open(&target, false, &[]).unwrap();
    assert_eq!(output.found(), Found::Published);
    assert_eq!(output.path(), target.canonicalize().unwrap());
    drop(output);
    assert_eq!(names(&target), [".manifest", "model"]);
    let output = OutputDir::open(&target, false, &[]).unwrap();
    output.commit().unwrap();
    assert_eq!(names(&target), ["model"]);
    assert_eq!(names(home.path()), ["out"]);

    interrupted();
    assert_eq!(code(OutputDir::create(&target, false, &[])), "eexist");
    assert_eq!(names(&target), ["model"]);
    assert_eq!(names(home.path()), ["out"]);
}

#[test]
fn force_replaces_as_a_whole_and_only_at_the_end() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("out");
    fs::create_dir_all(target.join("old")).unwrap();
    fs::write(target.join("old/file"), "x").unwrap();

    let output = OutputDir::create(&target, true, &[]).unwrap();
    output.write_file("new", b"1").unwrap();
    assert_eq!(names(&target), ["old"]);
    output.abort().unwrap();
    assert_eq!(names(home.path()), ["out"]);
    assert_eq!(names(&target), ["old"]);

    let output = OutputDir::create(&target, true, &[]).unwrap();
    output.write_file("new", b"1").unwrap();
    output.commit().unwrap();
    assert_eq!(names(home.path()), ["out"]);
    assert_eq!(names(&target), ["new"]);

    // Through a link the directory itself is replaced; the link stays.
    let link = home.path().join("link");
    std::os::unix::fs::symlink(&target, &link).unwrap();
    let output = OutputDir::create(&link, true, &[]).unwrap();
    output.write_file("newer", b"1").unwrap();
    output.commit().unwrap();
    assert!(link.is_symlink());
    assert_eq!(names(&target), ["newer"]);

    // A target that went away meanwhile.
    let output = OutputDir::create(&target, true, &[]).unwrap();
    output.write_file("last", b"1").unwrap();
    fs::remove_dir_all(&target).unwrap();
    output.commit().unwrap();
    assert_eq!(names(&target), ["last"]);
}

#[test]
fn readers_see_one_complete_version_at_any_time() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("out");
    let commit = |version: usize| {
        let output = OutputDir::create(&target, true, &[]).unwrap();
        output
            .write_file("version", version.to_string().as_bytes())
            .unwrap();
        output.commit().unwrap();
    };
    commit(0);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                assert!(target.is_dir(), "the target was gone for a moment");
            }
        });
        (1..30).for_each(commit);
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(fs::read(target.join("version")).unwrap(), b"29");
    assert_eq!(names(home.path()), ["out"]);
}

#[test]
fn force_never_deletes_the_source_or_where_one_stands() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("models/m");
    fs::create_dir_all(&model).unwrap();
    let weights = model.join("model.safetensors");
    fs::write(&weights, "x").unwrap();
    let link = home.path().join("link.safetensors");
    std::os::unix::fs::symlink(&weights, &link).unwrap();
    for (target, protected) in [
        (model.clone(), &model),
        (home.path().join("models"), &model),
        (model.clone(), &weights),
        (model.clone(), &link),
    ] {
        let refused = OutputDir::create(&target, true, &[PathBuf::from(protected)]);
        assert_eq!(code(refused), "to", "{target:?} {protected:?}");
    }
    // The current directory and those above it; some may be mount points,
    // which are refused before.
    for above in std::env::current_dir().unwrap().ancestors() {
        let refused = code(OutputDir::create(above, true, &[]));
        assert!(
            ["to", "eexist"].contains(&&*refused),
            "{above:?}: {refused}"
        );
    }
    // Beside and below the source is fine.
    let below = OutputDir::create(model.join("nf4"), true, &[model]).unwrap();
    below.abort().unwrap();
    assert!(weights.exists());
}

#[test]
fn a_parent_that_cannot_be_written_is_found_out_at_once() {
    if rustix::process::geteuid().is_root() {
        // Root may write anywhere but where there is nothing to write to.
        let refused = code(OutputDir::create("/proc/viva_tensor_out", false, &[]));
        assert!(
            ["enoent", "eacces", "eperm", "eio"].contains(&&*refused),
            "{refused}"
        );
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let closed = |mode| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(home.path(), mode).unwrap();
    };
    closed(0o555);
    assert_eq!(
        code(OutputDir::create(home.path().join("out"), false, &[])),
        "eacces"
    );
    closed(0o755);
}
