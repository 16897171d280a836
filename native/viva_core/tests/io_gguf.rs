//! GGUF files: what is read, what is refused, what is written.

use std::path::PathBuf;

use tempfile::TempDir;
use viva_core::Error;
use viva_core::io::gguf::{Array, Metadata, Value, ValueType};
use viva_core::io::{Checkpoint, EntryDType, FixedEntry, LateEntry, ShardWriter, TensorFile};
use viva_core::tensor::DType;

/// A file put together by hand, number by number.
#[derive(Clone)]
struct Built {
    version: u32,
    tensors: u64,
    pairs: u64,
    body: Vec<u8>,
}

impl Built {
    fn new() -> Built {
        Built {
            version: 3,
            tensors: 0,
            pairs: 0,
            body: Vec::new(),
        }
    }

    fn string(mut self, text: &[u8]) -> Built {
        self.body.extend((text.len() as u64).to_le_bytes());
        self.body.extend_from_slice(text);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Built {
        self.body.extend_from_slice(bytes);
        self
    }

    fn u32(self, v: u32) -> Built {
        self.bytes(&v.to_le_bytes())
    }

    fn u64(self, v: u64) -> Built {
        self.bytes(&v.to_le_bytes())
    }

    fn pair(mut self, key: &str, kind: u32, value: &[u8]) -> Built {
        self.pairs += 1;
        self.string(key.as_bytes()).u32(kind).bytes(value)
    }

    fn tensor(mut self, name: &str, dims: &[u64], ggml: u32, offset: u64) -> Built {
        self.tensors += 1;
        let mut built = self.string(name.as_bytes()).u32(dims.len() as u32);
        for &d in dims {
            built = built.u64(d);
        }
        built.u32(ggml).u64(offset)
    }

    fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensors.to_le_bytes());
        out.extend(self.pairs.to_le_bytes());
        out.extend_from_slice(&self.body);
        out
    }

    /// With `len` bytes of data, counting up.
    fn file(&self, len: usize) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend((0..len).map(|i| i as u8));
        out
    }
}

fn write(bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn open(bytes: &[u8]) -> viva_core::Result<TensorFile> {
    let (_dir, path) = write(bytes);
    TensorFile::open(path)
}

#[track_caller]
fn assert_refused(bytes: &[u8], words: &str) {
    match open(bytes) {
        Err(Error::InvalidFile { path, message }) => {
            assert!(path.ends_with("model.gguf"), "{path}");
            assert!(message.contains(words), "{message:?} lacks {words:?}");
        }
        other => panic!("not refused: {other:?}"),
    }
}

/// One pair of every type, and arrays.
fn every_value() -> Metadata {
    let nested = Array::new(
        ValueType::Array,
        [
            Array::strings(["a", ""]).into(),
            Array::new(ValueType::U16, [Value::U16(7)]).unwrap().into(),
        ],
    );
    let mut metadata = Metadata::default();
    metadata.set("u8", 255u8);
    metadata.set("i8", -128i8);
    metadata.set("u16", 65535u16);
    metadata.set("i16", i16::MIN);
    metadata.set("u32", u32::MAX);
    metadata.set("i32", i32::MIN);
    metadata.set("f32", 0.1f32);
    metadata.set("bool", true);
    metadata.set("string", "ü");
    metadata.set("u64", u64::MAX);
    metadata.set("i64", i64::MIN);
    metadata.set("f64", 0.1f64);
    metadata.set("empty", Array::strings([]));
    metadata.set(
        "bools",
        Array::new(ValueType::Bool, [true.into(), false.into()]).unwrap(),
    );
    metadata.set("nested", nested.unwrap());
    metadata
}

#[test]
fn a_file_is_read_in_place() {
    let built = Built::new()
        .pair("general.name", 8, b"\x02\0\0\0\0\0\0\0hi")
        .tensor("a", &[3, 2], 0, 0)
        .tensor("b.weight", &[64, 2], 3, 32)
        .tensor("scalar", &[], 1, 128)
        .tensor("empty", &[0, 4], 30, 160)
        .tensor("i", &[2], 26, 160);
    for version in [2, 3] {
        let built = Built {
            version,
            ..built.clone()
        };
        let bytes = built.file(168);
        let file = open(&bytes).unwrap();
        assert_eq!(file.file_bytes(), bytes.len());
        let metadata = file.metadata().gguf().unwrap();
        assert_eq!(metadata.get("general.name").unwrap().as_str(), Some("hi"));
        assert_eq!(metadata.len(), 1);

        let data = bytes.len() - 168;
        let a = file.tensor("a").unwrap();
        // Rows come last in the file and first in a shape.
        assert_eq!((a.dtype(), a.shape()), (DType::F32, &[2, 3][..]));
        assert_eq!(a.bytes(), &bytes[data..data + 24]);
        let b = file.entry("b.weight").unwrap();
        assert_eq!(
            (b.dtype.name().as_str(), &b.shape[..]),
            ("q4_1", &[2, 64][..])
        );
        assert_eq!(
            file.bytes("b.weight").unwrap(),
            &bytes[data + 32..data + 112]
        );
        assert_eq!(file.byte_tensor("b.weight").unwrap().shape(), [80]);
        assert!(matches!(
            file.tensor("b.weight"),
            Err(Error::UnsupportedDtype { dtype, .. }) if dtype == "q4_1"
        ));
        assert_eq!(file.tensor("scalar").unwrap().shape(), [0usize; 0]);
        assert_eq!(file.tensor("empty").unwrap().shape(), [4, 0]);
        assert_eq!(file.tensor("i").unwrap().dtype(), DType::I32);
    }
}

#[test]
fn the_padding_at_the_end_may_be_missing() {
    let built = Built::new().tensor("a", &[3], 0, 0);
    assert!(open(&built.file(32)).is_ok());
    assert!(open(&built.file(12)).is_ok());
    assert_refused(&built.file(11), "take 12 bytes, but only 11 follow");
    assert_refused(&built.header(), "truncated");
    assert!(open(&Built::new().header()).unwrap().entries().is_empty());
}

#[test]
fn alignment_is_the_files_own() {
    let aligned = |alignment: u32| {
        Built::new()
            .pair("general.alignment", 4, &alignment.to_le_bytes())
            .tensor("a", &[1], 0, 0)
            .tensor("b", &[1], 0, u64::from(alignment))
    };
    let file = |alignment: usize| {
        let mut bytes = aligned(alignment as u32).header();
        bytes.resize(bytes.len().next_multiple_of(alignment), 0);
        bytes.resize(bytes.len() + alignment, 1);
        bytes.extend([2; 4]);
        bytes
    };
    for alignment in [4, 8, 64, 4096] {
        let read = open(&file(alignment)).unwrap();
        assert_eq!(read.bytes("b").unwrap(), [2; 4], "{alignment}");
    }
    assert_refused(&aligned(0).file(64), "has to be a power of two");
    assert_refused(&aligned(24).file(64), "has to be a power of two");
    assert_refused(&aligned(1 << 31).file(64), "truncated");
    let wide = Built::new().pair("general.alignment", 10, &32u64.to_le_bytes());
    assert_refused(&wide.file(0), "power of two of type u32, not U64(32)");
}

#[test]
fn what_is_no_gguf_file_is_refused() {
    assert_refused(b"", "does not start with the letters GGUF");
    assert_refused(b"GGUG....", "does not start with the letters GGUF");
    assert_refused(b"GGUF", "the version at byte 4 takes 4 bytes");
    let version = |version| Built {
        version,
        ..Built::new()
    };
    assert_refused(&version(1).file(0), "of version 1");
    assert_refused(&version(4).file(0), "unknown version 4");
    assert_refused(&version(3u32.swap_bytes()).file(0), "big-endian");
}

#[test]
fn parts_of_a_split_model_are_refused() {
    let part = |count: u16| {
        Built::new()
            .pair("split.no", 2, &2u16.to_le_bytes())
            .pair("split.count", 2, &count.to_le_bytes())
            .file(0)
    };
    assert_refused(&part(3), "is part 3 of a model in 3 GGUF files; merge them");
    for whole in [0, 1] {
        assert!(open(&part(whole)).is_ok());
    }
}

#[test]
fn counts_and_lengths_are_compared_with_the_file() {
    let file = |tensors, pairs, body: &[u8]| {
        Built {
            tensors,
            pairs,
            body: body.to_vec(),
            version: 3,
        }
        .header()
    };
    assert_refused(
        &file(u64::MAX, 0, &[0; 48]),
        "the number of tensors: 18446744073709551615",
    );
    assert_refused(
        &file(3, 0, &[0; 48]),
        "but what is left of the file has room for 2",
    );
    assert_refused(&file(0, u64::MAX, &[0; 26]), "the number of metadata pairs");
    assert_refused(&file(0, 3, &[0; 26]), "room for 2 at most");

    let array = |item: u32, len: u64| {
        let body = [&item.to_le_bytes()[..], &len.to_le_bytes()].concat();
        Built::new().pair("k", 9, &body).file(64)
    };
    for (item, len) in [
        (0, 200),
        (6, 1 << 62),
        (8, 50),
        (9, u64::MAX / 12),
        (12, u64::MAX),
    ] {
        assert_refused(&array(item, len), "the length of the value of \"k\"");
    }
    assert_refused(&array(13, 0), "unknown type 13");
    let pair = |kind: u32, value: &[u8]| Built::new().pair("k", kind, value).header();
    assert_refused(&pair(99, b""), "the value of \"k\" has the unknown type 99");
    assert_refused(
        &pair(8, &u64::MAX.to_le_bytes()),
        "takes 18446744073709551615 bytes",
    );
    assert_refused(&pair(8, b"\x01\0\0\0\0\0\0\0\xff"), "is not UTF-8");
    assert_refused(&pair(7, b"\x02"), "is a bool of value 2");
    assert_refused(
        &pair(4, b"\x02"),
        "takes 4 bytes, but the file ends 1 bytes later",
    );
    assert_refused(
        &Built::new().pair("", 0, b"x").header(),
        "key 0 of the metadata is empty",
    );
    let twice = Built::new().pair("k", 0, b"x").pair("k", 0, b"x");
    assert_refused(&twice.header(), "the key \"k\" twice");
}

#[test]
fn arrays_are_not_nested_without_end() {
    let nested = |depth: usize| {
        let mut value = Vec::new();
        for _ in 1..depth {
            value.extend(9u32.to_le_bytes());
            value.extend(1u64.to_le_bytes());
        }
        value.extend(0u32.to_le_bytes());
        value.extend(1u64.to_le_bytes());
        value.push(5);
        Built::new().pair("k", 9, &value).header()
    };
    let file = open(&nested(8)).unwrap();
    let mut value = file.metadata().gguf().unwrap().get("k").unwrap().clone();
    for _ in 0..8 {
        let inner = value.as_array().unwrap().iter().next();
        value = inner.unwrap();
    }
    assert_eq!(value, Value::U8(5));
    assert_refused(&nested(9), "9 deep");
    assert_refused(&nested(200_000), "9 deep");
}

#[test]
fn lying_tensors_are_refused() {
    let one = |dims: &[u64], ggml, offset| Built::new().tensor("t", dims, ggml, offset).file(4096);
    assert_refused(&one(&[1, 1, 1, 1, 1], 0, 0), "has 5 dimensions");
    assert_refused(
        &one(&[1], 4, 0),
        "ggml's type 4, q4_2, which files no longer",
    );
    assert_refused(&one(&[1], 31, 0), "q4_0_4_4");
    assert_refused(&one(&[1], 43, 0), "unknown ggml type 43");
    assert_refused(&one(&[1], u32::MAX, 0), "unknown ggml type 4294967295");
    assert_refused(&one(&[33], 8, 0), "cannot be cut into blocks of 32");
    assert_refused(&one(&[128, 2], 12, 0), "cannot be cut into blocks of 256");
    assert_refused(&one(&[], 8, 0), "cannot be cut into blocks of 32");
    assert_refused(
        &one(&[u64::MAX, 2], 0, 0),
        "more elements than this machine can address",
    );
    assert_refused(&one(&[1 << 60, 2], 0, 0), "more elements");
    assert_refused(&one(&[1 << 58], 0, 0), "truncated");
    assert_refused(&one(&[2000], 0, 0), "take 8000 bytes, but only 4096 follow");
    assert_refused(&one(&[1], 0, 32), "starts at byte 32 of the data, where 0");
    assert_refused(&one(&[1], 0, 4), "starts at byte 4");

    let two = |offset| {
        Built::new()
            .tensor("a", &[9], 0, 0)
            .tensor("b", &[1], 0, offset)
            .file(128)
    };
    assert!(open(&two(64)).is_ok());
    for offset in [0, 32, 36, 96, u64::MAX] {
        assert_refused(&two(offset), "where 64 was to be expected");
    }
    let twice = Built::new().tensor("a", &[], 0, 0).tensor("a", &[], 0, 32);
    assert_refused(&twice.file(64), "two tensors are named \"a\"");
    let many = Built::new()
        .tensor("a", &[1 << 58], 0, 0)
        .tensor("b", &[1 << 58], 0, 1 << 60)
        .tensor("c", &[1 << 58], 0, 1 << 61);
    assert_refused(&many.file(64), "truncated");
}

#[test]
fn every_cut_is_refused() {
    let metadata = every_value();
    let (_dir, path) = written(&metadata, &[("a", "f32", &[2, 3]), ("b", "q8_0", &[2, 32])]);
    let whole = std::fs::read(&path).unwrap();
    let needed = whole.len() - (32 - 68 % 32);
    for len in 0..needed {
        assert!(open(&whole[..len]).is_err(), "{len} of {}", whole.len());
    }
    assert!(open(&whole[..needed]).is_ok());
}

fn entry(name: &str, dtype: &str, shape: &[usize]) -> FixedEntry {
    let ggml = viva_core::formats::ggml_types::GgmlType::by_name(dtype).unwrap();
    FixedEntry {
        name: name.into(),
        dtype: EntryDType::from(ggml),
        shape: shape.to_vec(),
    }
}

fn content(i: usize, len: usize) -> Vec<u8> {
    (0..len).map(|j| (i * 50 + j) as u8 | 1).collect()
}

/// Writes a file with these tensors, the last one first.
fn written(metadata: &Metadata, tensors: &[(&str, &str, &[usize])]) -> (TempDir, PathBuf) {
    let (dir, path) = write(b"");
    std::fs::remove_file(&path).unwrap();
    let entries = tensors.iter().map(|(n, d, s)| entry(n, d, s)).collect();
    let writer = ShardWriter::create(&path, entries, vec![], metadata.clone()).unwrap();
    for (i, (name, dtype, shape)) in tensors.iter().enumerate().rev() {
        let nbytes = entry(name, dtype, shape).dtype.nbytes(shape).unwrap();
        let content = content(i, nbytes);
        let half = nbytes / 2;
        writer.write_at(name, half, &content[half..]).unwrap();
        writer.write_at(name, 0, &content[..half]).unwrap();
    }
    let done = writer.finish().unwrap();
    assert_eq!(done.file, "model.gguf");
    assert_eq!(
        done.file_bytes as u64,
        std::fs::metadata(&path).unwrap().len()
    );
    (dir, path)
}

#[test]
fn what_is_written_is_read_again() {
    let tensors: [(&str, &str, &[usize]); 6] = [
        ("a", "bf16", &[3]),
        ("b", "q4_k", &[2, 256]),
        ("scalar", "f64", &[]),
        ("empty", "f32", &[0, 7]),
        ("four", "i8", &[2, 3, 5, 7]),
        ("last", "q6_k", &[1, 512]),
    ];
    let mut metadata = every_value();
    for alignment in [32, 8, 256] {
        if alignment != 32 {
            metadata.set("general.alignment", alignment as u32);
        }
        let (_dir, path) = written(&metadata, &tensors);
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.metadata().gguf(), Some(&metadata));
        let names: Vec<&str> = file.entries().iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, tensors.map(|(n, _, _)| n));
        for (i, (name, dtype, shape)) in tensors.iter().enumerate() {
            let read = file.entry(name).unwrap();
            assert_eq!(
                (read.dtype.name().as_str(), &read.shape[..]),
                (*dtype, *shape)
            );
            assert_eq!(read.range.start % alignment, 0);
            assert_eq!(file.bytes(name).unwrap(), content(i, read.nbytes()));
        }
        assert_eq!(file.file_bytes() % alignment, 0);
    }
}

#[test]
fn values_are_read_as_numbers_and_text() {
    let metadata = every_value();
    let get = |key| metadata.get(key).unwrap();
    assert_eq!(get("u8").as_u64(), Some(255));
    assert_eq!(get("i8").as_u64(), None);
    assert_eq!(get("u64").as_u64(), Some(u64::MAX));
    assert_eq!(get("f32").as_f64(), Some(f64::from(0.1f32)));
    assert_eq!(get("i32").as_f64(), Some(f64::from(i32::MIN)));
    assert_eq!(get("u16").as_f64(), Some(65535.0));
    assert_eq!(get("string").as_f64(), None);
    assert_eq!(get("bool").as_bool(), Some(true));
    assert_eq!(get("bools").as_array().unwrap().iter().count(), 2);
    let nested: Vec<Value> = get("nested").as_array().unwrap().iter().collect();
    let texts: Vec<Value> = nested[0].as_array().unwrap().iter().collect();
    assert_eq!(texts, ["a".into(), "".into()]);
    assert!(Array::new(ValueType::U8, [1u8.into(), 2u16.into()]).is_none());
    assert_eq!(get("empty").as_array().unwrap().item(), ValueType::String);
}

#[test]
fn what_a_file_cannot_hold_is_refused_before_it_is_made() {
    let (_dir, path) = write(b"");
    std::fs::remove_file(&path).unwrap();
    let refused = |entry: FixedEntry, words: &str| {
        let error = ShardWriter::create(&path, vec![entry], vec![], Metadata::default());
        let error = error.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert!(!path.exists());
    };
    refused(
        entry(&"n".repeat(64), "f32", &[1]),
        "has 64 bytes, and 63 is the most",
    );
    refused(
        entry("t", "f32", &[1; 5]),
        "has 5 dimensions, and 4 is the most",
    );
    refused(entry("t", "q8_0", &[16]), "cannot be cut into blocks of 32");
    let u8s = FixedEntry {
        dtype: DType::U8.into(),
        ..entry("t", "i8", &[1])
    };
    refused(u8s, "ggml has no u8 type");
    let late = vec![LateEntry {
        name: "late".into(),
        max_len: 4,
    }];
    let error = ShardWriter::create(&path, vec![], late, Metadata::default()).unwrap_err();
    assert!(
        error.to_string().contains("whose length is not known"),
        "{error}"
    );

    let safetensors = path.with_extension("safetensors");
    let strings = std::collections::BTreeMap::new();
    let blocks = vec![entry("t", "q8_0", &[32])];
    let error = ShardWriter::create(&safetensors, blocks, vec![], strings).unwrap_err();
    assert!(
        error.to_string().contains("safetensors has no q8_0 dtype"),
        "{error}"
    );
}

#[test]
fn checkpoints_are_gguf_files_and_directories_with_one() {
    let (dir, path) = written(&every_value(), &[("a", "f32", &[2])]);
    for at in [dir.path(), &path] {
        let checkpoint = Checkpoint::open(at).unwrap();
        assert_eq!(checkpoint.tensor("a").unwrap().shape(), [2]);
        assert_eq!(checkpoint.shards().len(), 1);
    }
    // Its name tells a file's kind, and its first bytes that the name is wrong.
    let renamed = dir.path().join("b.safetensors");
    std::fs::copy(&path, &renamed).unwrap();
    let error = TensorFile::open(&renamed).unwrap_err().to_string();
    assert!(error.contains("its name has to end in .gguf"), "{error}");
    std::fs::rename(&renamed, dir.path().join("B.GGUF")).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("2 files of weights"), "{error}");
}
