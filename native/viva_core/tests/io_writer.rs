//! Writing shards and output directories: from many threads, on full disks,
//! over what is there, and only as a whole.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use viva_core::Error;
use viva_core::io::{EntryDType, FixedEntry, Found, LateEntry, OutputDir, ShardWriter, TensorFile};
use viva_core::tensor::DType;

fn fixed(name: &str, dtype: impl Into<EntryDType>, shape: &[usize]) -> FixedEntry {
    FixedEntry {
        name: name.into(),
        dtype: dtype.into(),
        shape: shape.to_vec(),
    }
}

fn late(name: &str, max_len: usize) -> LateEntry {
    LateEntry {
        name: name.into(),
        max_len,
    }
}

fn metadata() -> BTreeMap<String, String> {
    [("format", "pt"), ("note", "\"ü\" \\")]
        .map(|(k, v)| (k.into(), v.into()))
        .into()
}

#[test]
fn what_many_threads_write_in_any_order_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let dtypes = [DType::U8, DType::F32, DType::BF16, DType::I64, DType::Bool];
    let entries: Vec<FixedEntry> = (0..40)
        .map(|i| fixed(&format!("t{i}"), dtypes[i % 5], &[i, 1001]))
        .chain([
            fixed("scalar", DType::F64, &[]),
            fixed("f4", Dtype::F4, &[6]),
            fixed("c64", Dtype::C64, &[3]),
        ])
        .collect();
    let content = |name: &str, len: usize| -> Vec<u8> {
        let seed = name.bytes().map(usize::from).sum::<usize>();
        (0..len).map(|i| (i * 31 + seed) as u8).collect()
    };
    let writer = ShardWriter::create(
        &path,
        entries.clone(),
        vec![late("state", 1_000_000), late("empty", 10), late("full", 3)],
        metadata(),
    )
    .unwrap();
    assert_eq!(writer.path(), path);

    // Parts of 1000 bytes, last part first, several tensors at once.
    entries.par_iter().rev().for_each(|e| {
        let bytes = content(&e.name, e.dtype.nbytes(&e.shape).unwrap());
        let parts: Vec<_> = bytes.chunks(1000).enumerate().collect();
        parts.into_par_iter().rev().for_each(|(i, part)| {
            writer.write_at(&e.name, i * 1000, part).unwrap();
        });
    });
    writer.write_late("full", b"xyz").unwrap();
    writer.write_late("empty", b"").unwrap();
    writer.write_late("state", b"first try, replaced").unwrap();
    writer
        .write_late("state", br#"{"quant_type":"nf4"}"#)
        .unwrap();
    let written = writer.finish().unwrap();
    assert_eq!(written.file, "model.safetensors");
    assert_eq!(
        written.file_bytes as u64,
        fs::metadata(&path).unwrap().len()
    );
    assert_eq!(written.tensors.len(), 46);

    let bytes = fs::read(&path).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    let ours = TensorFile::open(&path).unwrap();
    assert_eq!(ours.metadata().strings(), Some(&metadata()));
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(header_len % 8, 0);
    for entry in ours.entries() {
        let align = entry.dtype.block().1.div_ceil(8);
        assert_eq!(entry.range.start % align, 0, "{}", entry.name);
    }
    for e in &entries {
        let expected = content(&e.name, e.dtype.nbytes(&e.shape).unwrap());
        assert_eq!(ours.bytes(&e.name).unwrap(), expected, "{}", e.name);
        let view = theirs.tensor(&e.name).unwrap();
        assert_eq!((view.data(), view.shape()), (&expected[..], &e.shape[..]));
        assert_eq!(ours.entry(&e.name).unwrap().dtype, e.dtype);
    }
    assert_eq!(ours.bytes("state").unwrap(), br#"{"quant_type":"nf4"}"#);
    assert_eq!(ours.bytes("full").unwrap(), b"xyz");
    assert_eq!(ours.entry("empty").unwrap().shape, [0]);
    let order: Vec<(String, usize)> = (ours.entries().iter())
        .map(|e| (e.name.clone(), e.nbytes()))
        .collect();
    assert_eq!(written.tensors, order);
}

#[test]
fn the_same_plan_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, flip: bool| {
        let path = dir.path().join(name);
        let entries = vec![fixed("a", DType::U8, &[3]), fixed("b", DType::F32, &[2])];
        let writer = ShardWriter::create(&path, entries, vec![late("c", 9)], metadata()).unwrap();
        let mut order = ["a", "b"];
        if flip {
            order.reverse();
        }
        for name in order {
            let len = if name == "a" { 3 } else { 8 };
            writer.write(name, &vec![7; len]).unwrap();
        }
        writer.write_late("c", b"12345").unwrap();
        writer.finish().unwrap();
        fs::read(path).unwrap()
    };
    assert_eq!(write("x", false), write("y", true));
}

#[test]
fn an_empty_file_is_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("empty.safetensors");
    let writer = ShardWriter::create(&path, vec![], vec![], BTreeMap::new()).unwrap();
    assert_eq!(writer.finish().unwrap().file_bytes, 16);
    assert!(TensorFile::open(&path).unwrap().entries().is_empty());
}

#[test]
fn wrong_sizes_and_names_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let create = |entries, late| ShardWriter::create(&path, entries, late, BTreeMap::new());
    for (entries, lates) in [
        (
            vec![fixed("a", DType::U8, &[1]), fixed("a", DType::U8, &[1])],
            vec![],
        ),
        (vec![fixed("a", DType::U8, &[1])], vec![late("a", 1)]),
        (vec![fixed("__metadata__", DType::U8, &[1])], vec![]),
    ] {
        assert!(matches!(
            create(entries, lates),
            Err(Error::InvalidFile { message, .. }) if message.contains("two tensors named")
        ));
    }
    for (entries, lates) in [
        (vec![fixed("a", DType::U8, &[usize::MAX, 2])], vec![]),
        (
            vec![fixed("a", DType::F64, &[usize::MAX / 16]); 1],
            vec![late("b", usize::MAX)],
        ),
    ] {
        assert!(matches!(
            create(entries, lates),
            Err(Error::ShapeOverflow { .. })
        ));
    }
    assert!(!path.exists(), "nothing was made");

    let writer = create(vec![fixed("a", DType::F32, &[4])], vec![late("b", 4)]).unwrap();
    let size = |r: viva_core::Result<()>| matches!(r, Err(Error::SizeMismatch { .. }));
    assert!(size(writer.write("a", &[0; 15])));
    assert!(size(writer.write("a", &[0; 17])));
    assert!(size(writer.write_at("a", 1, &[0; 16])));
    assert!(size(writer.write_at("a", usize::MAX, &[0; 16])));
    assert!(size(writer.write_late("b", &[0; 5])));
    assert!(matches!(
        writer.write("b", &[]),
        Err(Error::UnknownTensor { .. })
    ));
    assert!(matches!(
        writer.write_late("a", &[]),
        Err(Error::UnknownTensor { .. })
    ));
}

#[test]
fn an_unfinished_file_cannot_be_finished() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let entries = vec![
        fixed("a", DType::U8, &[100]),
        fixed("none", DType::U8, &[0]),
    ];
    let writer = ShardWriter::create(&path, entries, vec![late("b", 4)], BTreeMap::new()).unwrap();
    let why = || writer.finish().unwrap_err().to_string();
    assert!(why().contains("0 of the 100 bytes of tensor \"a\""));
    writer.write_at("a", 0, &[1; 60]).unwrap();
    // A part written twice counts once.
    writer.write_at("a", 20, &[1; 40]).unwrap();
    assert!(why().contains("60 of the 100 bytes"));
    assert!(
        TensorFile::open(&path).is_err(),
        "not valid before its time"
    );
    writer.write_at("a", 60, &[2; 40]).unwrap();
    assert!(why().contains("late tensor \"b\" is not written"));
    writer.write_late("b", b"ok").unwrap();
    let written = writer.finish().unwrap();

    // A worker that is started anew finishes the same file once more.
    assert_eq!(writer.finish().unwrap(), written);
    assert!(writer.write("a", &[0; 100]).is_err());
    assert_eq!(TensorFile::open(&path).unwrap().bytes("b").unwrap(), b"ok");
}

/// A directory on a file system in memory, and bytes that it cannot hold.
fn small_disk() -> Option<(tempfile::TempDir, usize)> {
    const TMPFS: i64 = 0x0102_1994;
    let shm = Path::new("/dev/shm");
    let stat = rustix::fs::statfs(shm).ok()?;
    // Elsewhere asking for too much may really fill the disk for a while.
    if stat.f_type != TMPFS || stat.f_blocks == 0 {
        return None;
    }
    let total = stat.f_blocks as usize * stat.f_bsize as usize;
    Some((tempfile::tempdir_in(shm).ok()?, total + (1 << 20)))
}

#[test]
fn a_full_disk_is_found_out_before_the_work() {
    let Some((dir, too_much)) = small_disk() else {
        eprintln!("NOT TESTED: a full disk, because /dev/shm is no tmpfs with a size");
        return;
    };
    let output = OutputDir::create(dir.path().join("out"), false, &[]).unwrap();
    let path = output.path().join("model.safetensors");
    let entries = vec![fixed("a", DType::U8, &[too_much])];
    match ShardWriter::create(&path, entries, vec![], BTreeMap::new()) {
        Err(Error::Io { code, path, .. }) => {
            assert_eq!(code, "enospc");
            assert!(path.ends_with("model.safetensors"));
        }
        other => panic!("{other:?}"),
    }
    drop(output);
    assert_eq!(names(dir.path()), [""; 0]);
}

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
    let entries = || vec![fixed("x", DType::U8, &[3])];
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
    shard.accept("x").unwrap();
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
