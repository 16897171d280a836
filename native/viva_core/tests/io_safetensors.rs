//! Safetensors files that must be refused, each in plain words, and those that
//! must be read.

use std::path::PathBuf;

use safetensors::SafeTensors;
use tempfile::TempDir;
use viva_core::Error;
use viva_core::io::{EntryDType, TensorFile, mapped_bytes};
use viva_core::tensor::DType;

/// The bytes of a file with this header and this much data (0, 1, 2 …).
fn file(header: &str, data_len: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.extend((0..data_len).map(|i| i as u8));
    bytes
}

fn write(bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn open(bytes: &[u8]) -> viva_core::Result<TensorFile> {
    let (_dir, path) = write(bytes);
    TensorFile::open(path)
}

/// Opens what must be refused, and returns why.
fn refused(bytes: &[u8]) -> String {
    match open(bytes) {
        Err(Error::InvalidFile { path, message }) => {
            assert!(path.ends_with("model.safetensors"), "{path}");
            message
        }
        other => panic!("not refused: {other:?}"),
    }
}

#[track_caller]
fn assert_refused(bytes: &[u8], words: &str) {
    let message = refused(bytes);
    assert!(message.contains(words), "{message:?} lacks {words:?}");
}

#[test]
fn lying_lengths_are_refused() {
    assert_refused(b"", "only 0 bytes long");
    assert_refused(&[0; 7], "only 7 bytes long");
    assert_refused(
        &100u64.to_le_bytes(),
        "the header ends at byte 108, past the end of the file (8 bytes): the file is truncated",
    );
    assert_refused(
        &100_000_001u64.to_le_bytes(),
        "claims a header of 100000001 bytes; the most is 100000000",
    );
    assert_refused(&[0xff; 16], "the most is 100000000");
    assert_refused(&100_000_000u64.to_le_bytes(), "past the end of the file");
}

#[test]
fn a_huge_header_that_is_there_is_refused() {
    let (_dir, path) = write(b"");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &100_000_001u64.to_le_bytes(), 0).unwrap();
    file.set_len(200_000_000).unwrap();
    let error = TensorFile::open(&path).unwrap_err().to_string();
    assert!(error.contains("the most is 100000000"), "{error}");
}

#[test]
fn headers_that_are_no_json_object_are_refused() {
    let mut not_utf8 = file(r#"{"a": 1}"#, 0);
    not_utf8[10] = 0xff;
    assert_refused(&not_utf8, "not UTF-8 text: byte 2");
    for header in ["", "hello", "[1, 2]", "7", "null", "{\"a\":", "{} {}"] {
        assert_refused(&file(header, 0), "not the JSON object that it should be");
    }
    let deep = "[".repeat(100_000);
    assert_refused(&file(&format!("{{\"a\": {deep}"), 0), "JSON object");
}

#[test]
fn tensors_that_are_no_tensors_are_refused() {
    for (header, words) in [
        (r#"{"a": 3}"#, "tensor \"a\": invalid type"),
        (
            r#"{"a": {"dtype":"F32","shape":[1]}}"#,
            "missing field `data_offsets`",
        ),
        (
            r#"{"a": {"dtype":"F7","shape":[1],"data_offsets":[0,4]}}"#,
            "unknown variant `F7`",
        ),
        (
            r#"{"a": {"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
            "invalid value: integer `-1`",
        ),
        (
            r#"{"a": {"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}"#,
            "floating point",
        ),
        (
            r#"{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551616]}}"#,
            "tensor \"a\"",
        ),
        (r#"{"__metadata__": {"a": 1}}"#, "expected a string"),
        (r#"{"__metadata__": "text"}"#, "expected a map"),
    ] {
        assert_refused(&file(header, 4), words);
    }
}

/// A header of F32 vectors: name, length, offsets.
fn vectors(tensors: &[(&str, usize, usize, usize)]) -> String {
    let tensors = tensors.iter().map(|(name, len, start, end)| {
        format!(r#""{name}":{{"dtype":"F32","shape":[{len}],"data_offsets":[{start},{end}]}}"#)
    });
    format!("{{{}}}", tensors.collect::<Vec<_>>().join(","))
}

#[test]
fn layouts_with_holes_and_overlaps_are_refused() {
    for (tensors, data, words) in [
        (
            &[("a", 2, 0, 8), ("b", 2, 4, 12)][..],
            12,
            "tensors \"a\" and \"b\" overlap: the first ends at byte 8 of the data, the second \
             starts at byte 4",
        ),
        (&[("a", 2, 0, 8), ("b", 2, 0, 8)], 8, "overlap"),
        (
            &[("a", 1, 0, 4), ("b", 1, 8, 12)],
            12,
            "a gap before tensor \"b\": bytes 4 to 8",
        ),
        (
            &[("a", 1, 4, 8)],
            8,
            "a gap before tensor \"a\": bytes 0 to 4",
        ),
        (&[("a", 1, 0, 4)], 7, "3 trailing bytes"),
        (&[], 1, "1 trailing bytes"),
        (
            &[("a", 4, 0, 16)],
            12,
            "the tensors take 16 bytes, but only 12 follow the header: the file is truncated",
        ),
        (
            &[("a", 1, 4, 0)],
            4,
            "ends at byte 0, before its start at byte 4",
        ),
        (
            &[("a", 3, 0, 8)],
            8,
            "of dtype f32 and shape [3] takes 12 bytes, but its offsets 0 to 8 give it 8",
        ),
        (&[("a", 1, 0, 8)], 8, "takes 4 bytes"),
    ] {
        let bytes = file(&vectors(tensors), data);
        assert_refused(&bytes, words);
        assert!(
            SafeTensors::read_metadata(&bytes).is_err(),
            "the library agrees"
        );
    }
}

#[test]
fn sizes_that_overflow_are_refused() {
    for shape in [
        "4294967296,4294967296",
        "18446744073709551615,2",
        "2305843009213693952",
        "1152921504606846975",
        "4611686018427387904,4,0",
    ] {
        let header = format!(r#"{{"a":{{"dtype":"F64","shape":[{shape}],"data_offsets":[0,0]}}}}"#);
        let message = refused(&file(&header, 0));
        assert!(
            ["more elements", "takes", "overflow"]
                .iter()
                .any(|w| message.contains(w)),
            "{message}"
        );
    }
    // Sizes that are right one by one, and wrap around together: the end
    // of the last, plus the header, is past the largest integer.
    let step = (1usize << 60) - 1;
    let mut tensors: Vec<String> = (0..16)
        .map(|i| {
            format!(
                r#""t{i:02}":{{"dtype":"U8","shape":[{step}],"data_offsets":[{},{}]}}"#,
                i * step,
                (i + 1) * step
            )
        })
        .collect();
    tensors.push(format!(
        r#""t16":{{"dtype":"U8","shape":[15],"data_offsets":[{},{}]}}"#,
        16 * step,
        usize::MAX
    ));
    assert_refused(&file(&format!("{{{}}}", tensors.join(",")), 0), "truncated");
}

#[test]
fn elements_under_a_byte_must_fill_bytes() {
    let header = |shape, end| {
        format!(r#"{{"a":{{"dtype":"F4","shape":[{shape}],"data_offsets":[0,{end}]}}}}"#)
    };
    assert_refused(
        &file(&header(3, 2), 2),
        "in whole bytes: expected 16, got 12",
    );
    let read = open(&file(&header(4, 2), 2)).unwrap();
    assert_eq!(read.entries()[0].dtype.name(), "f4");
    assert_eq!(read.bytes("a").unwrap(), [0, 1]);
}

#[test]
fn two_tensors_of_one_name_are_refused() {
    let header = vectors(&[("a", 1, 0, 4), ("b", 1, 4, 8), ("a", 1, 0, 4)]);
    assert_refused(&file(&header, 8), "two tensors are named \"a\"");
    assert_refused(
        &file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0),
        "__metadata__",
    );
}

#[test]
fn files_of_other_kinds_are_named() {
    assert_refused(
        b"version https://git-lfs.github.com/spec/v1\noid sha",
        "git lfs pull",
    );
    assert_refused(b"GGUF\x03\0\0\0\0\0\0\0", "is a GGUF file");
    assert_refused(b"PK\x03\x04aaaaaaaaaa", "zip archive");
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        TensorFile::open(dir.path()),
        Err(Error::InvalidFile { message, .. }) if message == "is not a regular file"
    ));
    assert!(matches!(
        TensorFile::open(dir.path().join("none")),
        Err(Error::Io { code, .. }) if code == "enoent"
    ));
}

#[test]
fn what_must_be_read_is_read() {
    let scalar = r#"{"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
    let read = open(&file(scalar, 4)).unwrap();
    assert_eq!(read.entries()[0].shape, [] as [usize; 0]);
    assert_eq!(read.tensor("s").unwrap().bytes(), [0, 1, 2, 3]);

    let empties = r#"{"z":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},
        "y":{"dtype":"I64","shape":[3,0,18446744073709551615],"data_offsets":[0,0]},
        "a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
    let read = open(&file(empties, 4)).unwrap();
    let names: Vec<&str> = read.entries().iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names, ["y", "a", "z"], "in file order");
    assert!(read.tensor("y").unwrap().is_empty());
    assert_eq!(read.tensor("z").unwrap().shape(), [0]);

    let spaces = format!(" \n\t{scalar}   \n");
    assert!(open(&file(&spaces, 4)).is_ok());
    assert!(open(&file("{}", 0)).unwrap().entries().is_empty());

    let metadata = r#"{"__metadata__":{"format":"pt","ü":"\u00fc"}}"#;
    let read = open(&file(metadata, 0)).unwrap();
    assert_eq!(read.metadata().strings().unwrap()["format"], "pt");
    assert_eq!(read.metadata().strings().unwrap()["ü"], "ü");
    assert!(
        open(&file(r#"{"__metadata__":null}"#, 0))
            .unwrap()
            .metadata()
            .strings()
            .unwrap()
            .is_empty()
    );
}

#[test]
fn every_dtype_is_read_or_passed_through() {
    for (name, size) in [
        ("F64", 8),
        ("F32", 4),
        ("F16", 2),
        ("BF16", 2),
        ("I64", 8),
        ("I32", 4),
        ("I16", 2),
        ("I8", 1),
        ("U64", 8),
        ("U32", 4),
        ("U16", 2),
        ("U8", 1),
        ("F8_E4M3", 1),
        ("F8_E5M2", 1),
        ("F8_E8M0", 1),
        ("BOOL", 1),
    ] {
        let n = 2 * size;
        let header = format!(r#"{{"a":{{"dtype":"{name}","shape":[2],"data_offsets":[0,{n}]}}}}"#);
        let read = open(&file(&header, n)).unwrap();
        let dtype = DType::from_name(&name.to_lowercase()).unwrap();
        assert_eq!(read.entries()[0].dtype, EntryDType::Known(dtype));
        assert_eq!(read.tensor("a").unwrap().dtype(), dtype);
    }
    let header = r#"{"a":{"dtype":"C64","shape":[2],"data_offsets":[0,16]}}"#;
    let read = open(&file(header, 16)).unwrap();
    assert_eq!(read.entries()[0].dtype.name(), "c64");
    assert_eq!(read.bytes("a").unwrap().len(), 16);
    assert!(matches!(
        read.tensor("a"),
        Err(Error::UnsupportedDtype { dtype, .. }) if dtype == "c64"
    ));
}

#[test]
fn unknown_names_bring_a_similar_one() {
    let read = open(&file(&vectors(&[("lm_head.weight", 1, 0, 4)]), 4)).unwrap();
    assert_eq!(
        read.tensor("lm_head.weigth").unwrap_err().to_string(),
        "no tensor named \"lm_head.weigth\"; did you mean \"lm_head.weight\"?"
    );
    assert!(read.bytes("x").is_err() && read.give_back("x").is_err());
}

/// Resident bytes of mapped files in this process.
#[cfg(target_os = "linux")]
fn resident_file_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("RssFile:")).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<usize>()
        .unwrap()
        * 1024
}

#[test]
#[cfg(target_os = "linux")]
fn pages_are_given_back_and_read_again() {
    let n = 64 << 20;
    let header = format!(
        r#"{{"a":{{"dtype":"U8","shape":[{n}],"data_offsets":[0,{n}]}},
            "b":{{"dtype":"U8","shape":[1],"data_offsets":[{n},{}]}}}}"#,
        n + 1
    );
    let (_dir, path) = write(&file(&header, n + 1));
    let read = TensorFile::open(&path).unwrap();
    let sum = || {
        read.bytes("a")
            .unwrap()
            .iter()
            .map(|&b| u64::from(b))
            .sum::<u64>()
    };
    let before = sum();
    let full = resident_file_bytes();
    read.give_back("a").unwrap();
    // Other tests of this file touch next to nothing beside this one.
    assert!(full - resident_file_bytes() > n - (8 << 20));
    assert_eq!(sum(), before);
}

#[test]
fn mapped_bytes_are_counted_while_a_tensor_needs_them() {
    // Sparse, and far over what the tests beside this one map.
    let n = 8usize << 30;
    let header = format!(r#"{{"a":{{"dtype":"U8","shape":[{n}],"data_offsets":[0,{n}]}}}}"#);
    let (_dir, path) = write(&file(&header, 0));
    let bytes = (8 + header.len() + n) as u64;
    let sparse = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    sparse.set_len(bytes).unwrap();
    let read = TensorFile::open(&path).unwrap();
    assert_eq!(read.file_bytes() as u64, bytes);
    let tensor = read.tensor("a").unwrap();
    drop(read);
    assert!(mapped_bytes() > n, "the tensor keeps its file mapped");
    assert_eq!(tensor.bytes()[n - 1], 0);
    drop(tensor);
    assert!(mapped_bytes() < n);
}

#[test]
fn a_file_that_is_cut_while_it_is_open_is_found_out() {
    let (_dir, path) = write(&file(&vectors(&[("a", 1000, 0, 4000)]), 4000));
    let read = TensorFile::open(&path).unwrap();
    read.check_unchanged().unwrap();
    let writer = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    writer.set_len(1000).unwrap();
    assert!(matches!(
        read.check_unchanged(),
        Err(Error::InvalidFile { message, .. }) if message.contains("has 1000 now")
    ));
}
