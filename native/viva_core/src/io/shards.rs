//! How a checkpoint is cut into files, and the index that names them.

use std::collections::BTreeMap;

use serde::Serialize;

/// What one finished shard holds.
#[derive(Clone, Debug, PartialEq)]
pub struct WrittenShard {
    /// File name, without a directory.
    pub file: String,
    /// Length of the file in bytes.
    pub file_bytes: usize,
    /// Every tensor's name and length in bytes, in file order.
    pub tensors: Vec<(String, usize)>,
}

/// Cuts entries of these sizes (bytes) into shards of at most `max_shard_size`
/// bytes, in order. An entry over that gets a shard of its own. There is always
/// at least one shard.
pub fn plan_shards(sizes: &[usize], max_shard_size: usize) -> Vec<Vec<usize>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0usize;
    for (i, &size) in sizes.iter().enumerate() {
        let last = shards.len() - 1;
        if !shards[last].is_empty() && filled.saturating_add(size) > max_shard_size {
            shards.push(vec![i]);
            filled = size;
        } else {
            shards[last].push(i);
            filled = filled.saturating_add(size);
        }
    }
    shards
}

/// The file name of shard `index` (from 0) of `count`, as model loaders expect.
pub fn shard_name(index: usize, count: usize) -> String {
    match count {
        1 => "model.safetensors".into(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    }
}

/// The text of `model.safetensors.index.json`.
pub fn index_json(shards: &[WrittenShard]) -> String {
    #[derive(Serialize)]
    struct Metadata {
        total_size: usize,
    }
    #[derive(Serialize)]
    struct Index<'a> {
        metadata: Metadata,
        weight_map: BTreeMap<&'a str, &'a str>,
    }
    let tensors = || {
        (shards.iter()).flat_map(|s| {
            s.tensors
                .iter()
                .map(|(n, b)| (n.as_str(), s.file.as_str(), b))
        })
    };
    let index = Index {
        metadata: Metadata {
            total_size: tensors().map(|(_, _, bytes)| bytes).sum(),
        },
        weight_map: tensors().map(|(name, file, _)| (name, file)).collect(),
    };
    // `:#` indents as the programs that read and diff these files do.
    format!("{:#}\n", serde_json::json!(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_filled_in_order() {
        assert_eq!(
            plan_shards(&[4, 4, 3, 20, 1, 1], 8),
            [vec![0, 1], vec![2], vec![3], vec![4, 5]]
        );
        assert_eq!(plan_shards(&[], 8), [Vec::<usize>::new()]);
        assert_eq!(plan_shards(&[9], 8), [vec![0]]);
        assert_eq!(
            plan_shards(&[0, 8, 0, usize::MAX], 8),
            [vec![0, 1, 2], vec![3]]
        );
    }

    #[test]
    fn names_and_index_are_those_of_model_loaders() {
        assert_eq!(shard_name(0, 1), "model.safetensors");
        assert_eq!(shard_name(1, 12), "model-00002-of-00012.safetensors");
        let shard = |file: &str, tensors: &[(&str, usize)]| WrittenShard {
            file: file.into(),
            file_bytes: 0,
            tensors: tensors.iter().map(|(n, b)| (n.to_string(), *b)).collect(),
        };
        let text = index_json(&[shard("x1", &[("b", 3), ("c", 4)]), shard("x2", &[("a", 5)])]);
        assert!(text.starts_with("{\n  \"metadata\": {\n    \"total_size\": 12\n  },"));
        let (a, b) = (text.find("\"a\": \"x2\""), text.find("\"b\": \"x1\""));
        assert!(a.unwrap() < b.unwrap(), "sorted by name");
    }
}
