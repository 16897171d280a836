//! Writing shards: from many threads, in any order, on full disks.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use viva_core::Error;
use viva_core::io::{EntryDType, FixedEntry, LateEntry, OutputDir, ShardWriter, TensorFile};
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
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
