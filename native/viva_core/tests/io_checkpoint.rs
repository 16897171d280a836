//! Checkpoints: files, sharded directories, model directories, and what is
//! wrong with some of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use viva_core::Error;
use viva_core::io::{Checkpoint, FixedEntry, ShardWriter, WrittenShard, index_json};
use viva_core::tensor::DType;

/// Writes a safetensors file of f32 vectors: name and values.
fn shard(path: &Path, tensors: &[(&str, &[f32])]) -> WrittenShard {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let entries = tensors.iter().map(|(name, values)| FixedEntry {
        name: name.to_string(),
        dtype: DType::F32.into(),
        shape: vec![values.len()],
    });
    let writer = ShardWriter::create(path, entries.collect(), Vec::new(), BTreeMap::new()).unwrap();
    for (name, values) in tensors {
        writer.write(name, bytemuck::cast_slice(values)).unwrap();
    }
    writer.finish().unwrap()
}

fn directory(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

#[track_caller]
fn assert_invalid(path: &Path, words: &str) {
    match Checkpoint::open(path) {
        Err(Error::InvalidFile { message, .. }) => {
            assert!(message.contains(words), "{message:?} lacks {words:?}");
        }
        other => panic!("not refused: {other:?}"),
    }
}

fn sharded() -> TempDir {
    let dir = directory(&[("config.json", r#"{"model_type":"tiny"}"#)]);
    let second = shard(
        &dir.path().join("b.safetensors"),
        &[("z", &[5.0]), ("a", &[6.0])],
    );
    let first = shard(
        &dir.path().join("a.safetensors"),
        &[("m", &[1.0, 2.0, 3.0])],
    );
    let index = index_json(&[first, second]);
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    dir
}

#[test]
fn a_file_is_a_checkpoint() {
    let dir = directory(&[("config.json", "{}")]);
    let path = dir.path().join("weights.safetensors");
    shard(&path, &[("x", &[1.0, 2.0]), ("y", &[3.0])]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.path(), path);
    assert_eq!((checkpoint.len(), checkpoint.total_bytes()), (2, 12));
    assert_eq!(checkpoint.tensor("x").unwrap().to_f32_vec(), [1.0, 2.0]);
    assert_eq!(checkpoint.bytes("y").unwrap(), 3.0f32.to_le_bytes());
    assert_eq!(checkpoint.config(), None);
    assert_eq!(checkpoint.companions().unwrap(), []);
    checkpoint.give_back("x").unwrap();
    checkpoint.check_unchanged("x").unwrap();
}

#[test]
fn a_sharded_directory_is_read_in_file_order() {
    let dir = sharded();
    let index = dir.path().join("model.safetensors.index.json");
    for path in [dir.path(), &index] {
        let checkpoint = Checkpoint::open(path).unwrap();
        let names: Vec<&str> = checkpoint.entries().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["m", "z", "a"]);
        assert_eq!(checkpoint.path(), dir.path());
        assert_eq!(checkpoint.tensor("a").unwrap().to_f32_vec(), [6.0]);
        assert_eq!(checkpoint.entry("m").unwrap().shape, [3]);
        assert_eq!(checkpoint.config().unwrap()["model_type"], "tiny");
        assert_eq!(checkpoint.shards().len(), 2);
        assert_eq!(checkpoint.protected_paths().len(), 3);
        assert!(matches!(
            checkpoint.tensor("n"),
            Err(Error::UnknownTensor { hint, .. }) if hint.contains("did you mean")
        ));
    }
}

#[test]
fn shards_and_index_must_agree() {
    let index = |dir: &TempDir, text: &str| {
        std::fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
    };
    let dir = sharded();
    let map = r#""m":"a.safetensors","z":"b.safetensors","a":"b.safetensors""#;
    for (text, words) in [
        ("{", "is not valid JSON"),
        ("{}", "missing field `weight_map`"),
        (r#"{"weight_map":{"m":3}}"#, "expected a string"),
        (r#"{"weight_map":{}}"#, "names no tensor at all"),
        (
            &format!(r#"{{"weight_map":{{{map},"n":"c.safetensors"}}}}"#),
            "names the shard \"c.safetensors\", which is missing",
        ),
        (
            &format!(r#"{{"weight_map":{{{map},"n":"b.safetensors"}}}}"#),
            "says that \"b.safetensors\" holds tensor \"n\", but it does not",
        ),
        (
            r#"{"weight_map":{"m":"b.safetensors","z":"a.safetensors"}}"#,
            "holds tensor \"m\", but it does not (\"a.safetensors\" does)",
        ),
        (
            r#"{"weight_map":{"m":"../a.safetensors"}}"#,
            "outside of its directory",
        ),
        (
            r#"{"weight_map":{"m":"x/../../a.safetensors"}}"#,
            "outside of its directory",
        ),
        (
            r#"{"weight_map":{"m":"/a.safetensors"}}"#,
            "outside of its directory",
        ),
        (r#"{"weight_map":{"m":""}}"#, "outside of its directory"),
    ] {
        index(&dir, text);
        assert_invalid(dir.path(), words);
    }

    // A tensor that the index forgot is not lost.
    index(
        &dir,
        r#"{"weight_map":{"m":"a.safetensors","z":"b.safetensors"}}"#,
    );
    assert_eq!(Checkpoint::open(dir.path()).unwrap().len(), 3);

    // One in two shards is in the way, whatever the index says.
    shard(
        &dir.path().join("d.safetensors"),
        &[("m", &[9.0]), ("n", &[1.0])],
    );
    index(
        &dir,
        &format!(r#"{{"weight_map":{{{map},"n":"d.safetensors"}}}}"#),
    );
    assert_invalid(dir.path(), "tensor \"m\" is also in a.safetensors");

    // A damaged shard is named.
    std::fs::write(dir.path().join("b.safetensors"), [0; 3]).unwrap();
    index(&dir, &format!(r#"{{"weight_map":{{{map}}}}}"#));
    match Checkpoint::open(dir.path()) {
        Err(Error::InvalidFile { path, .. }) => assert!(path.ends_with("b.safetensors")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn directories_without_an_index() {
    let dir = directory(&[]);
    assert_invalid(dir.path(), "holds no .safetensors file");

    for other in ["pytorch_model.bin", "model.onnx", "weights.h5"] {
        let dir = directory(&[(other, "x"), ("config.json", "{}")]);
        assert_invalid(dir.path(), other);
        assert_invalid(dir.path(), "convert the model to safetensors");
        assert_invalid(&dir.path().join(other), "which cannot be read");
    }

    shard(&dir.path().join("one.safetensors"), &[("x", &[1.0])]);
    assert_eq!(Checkpoint::open(dir.path()).unwrap().len(), 1);
    shard(&dir.path().join("two.safetensors"), &[("x", &[1.0])]);
    assert_invalid(dir.path(), "2 files of weights and no index");
    shard(&dir.path().join("model.safetensors"), &[("y", &[1.0])]);
    assert!(Checkpoint::open(dir.path()).unwrap().entry("y").is_ok());

    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert_invalid(dir.path(), "is not valid JSON");

    let dir = directory(&[
        ("x.safetensors.index.json", "{}"),
        ("y.safetensors.index.json", "{}"),
    ]);
    assert_invalid(dir.path(), "several indexes: x.safetensors.index.json, y.");
    assert!(matches!(
        Checkpoint::open(dir.path().join("none")),
        Err(Error::Io { code, .. }) if code == "enoent"
    ));
}

#[test]
fn companions_are_the_files_that_a_copy_needs() {
    let dir = directory(&[
        ("config.json", "{}"),
        ("generation_config.json", "{}"),
        ("tokenizer.json", "{}"),
        ("tokenizer.model", "x"),
        ("chat_template.jinja", "x"),
        ("vocab.txt", "x"),
        ("merges.txt", "x"),
        ("README.md", "x"),
        ("LICENSE", "x"),
        (
            "modules.json",
            r#"[{"path":""},{"path":"1_Pooling"},{"path":"2_Dense"}]"#,
        ),
        ("1_Pooling/config.json", "{}"),
        ("2_Dense/config.json", "{}"),
        ("2_Dense/model.safetensors", "x"),
        ("assets/deep/icon.txt", "x"),
        // Left out:
        (".gitattributes", "x"),
        (".cache/x.json", "x"),
        ("pytorch_model.bin", "x"),
        ("pytorch_model.bin.index.json", "{}"),
        ("training_args.BIN", "x"),
        ("tf_model.h5", "x"),
        ("onnx/model.onnx", "x"),
        ("onnx/config.json", "{}"),
        ("original/params.json", "{}"),
        ("original/deep/consolidated.pth", "x"),
    ]);
    shard(&dir.path().join("model.safetensors"), &[("x", &[1.0])]);
    let elsewhere = directory(&[("blob", "linked"), ("folder/x.txt", "x")]);
    for (to, from) in [
        ("blob", "special_tokens_map.json"),
        ("folder", "linked_folder"),
    ] {
        std::os::unix::fs::symlink(elsewhere.path().join(to), dir.path().join(from)).unwrap();
    }

    let companions = Checkpoint::open(dir.path()).unwrap().companions().unwrap();
    let found: Vec<String> = (companions.iter())
        .map(|c| c.relative.display().to_string())
        .collect();
    assert_eq!(
        found,
        [
            "1_Pooling/config.json",
            "2_Dense/config.json",
            "2_Dense/model.safetensors",
            "LICENSE",
            "README.md",
            "assets/deep/icon.txt",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "merges.txt",
            "modules.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer.model",
            "vocab.txt",
        ]
    );
    for companion in companions {
        assert_eq!(companion.file, dir.path().join(&companion.relative));
    }
}

#[test]
fn a_download_cache_of_links_is_a_model_directory() {
    let blobs = directory(&[("config", r#"{"a":1}"#)]);
    let weights = blobs.path().join("weights");
    shard(&weights, &[("x", &[1.0])]);
    let snapshot = tempfile::tempdir().unwrap();
    let link = |blob: &str, name: &str| {
        std::os::unix::fs::symlink(blobs.path().join(blob), snapshot.path().join(name)).unwrap();
    };
    link("weights", "model.safetensors");
    link("config", "config.json");
    let checkpoint = Checkpoint::open(snapshot.path()).unwrap();
    assert_eq!(checkpoint.len(), 1);
    assert_eq!(checkpoint.config().unwrap()["a"], 1);
    assert_eq!(checkpoint.companions().unwrap().len(), 1);
    let real: Vec<PathBuf> = (checkpoint.protected_paths().iter())
        .map(|p| p.canonicalize().unwrap())
        .collect();
    assert!(real.contains(&weights.canonicalize().unwrap()));

    link("gone", "vocab.txt");
    assert!(matches!(
        Checkpoint::open(snapshot.path()).unwrap().companions(),
        Err(Error::Io { path, code, .. }) if path.ends_with("vocab.txt") && code == "enoent"
    ));
}
