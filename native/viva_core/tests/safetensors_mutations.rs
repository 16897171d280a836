//! Damaged safetensors files are refused, or read as what they say.

#[path = "support/mutation.rs"]
mod mutation;
mod support;

use std::collections::BTreeMap;

use viva_core::io::{FixedEntry, ShardWriter};
use viva_core::layout::{self, LAYOUTS};
use viva_core::tensor::DType;

use support::{f32_tensor, gaussian, quantized};

#[global_allocator]
static ALLOCATOR: mutation::Counting = mutation::Counting;

/// Files of tensors of every dtype, and of a weight in every layout that is
/// spelled in safetensors.
fn seeds() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seed.safetensors");
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let create = |fixed, late| ShardWriter::create(&path, fixed, late, metadata.clone()).unwrap();
    let finished = |writer: ShardWriter| {
        writer.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        bytes
    };
    let dense = DType::ALL.map(|dtype| FixedEntry {
        name: format!("{}.weight", dtype.name()),
        dtype: dtype.into(),
        shape: vec![2, 3],
    });
    let writer = create(dense.to_vec(), vec![]);
    for entry in dense {
        writer
            .write(
                &entry.name,
                &[1; 48][..entry.dtype.nbytes(&[2, 3]).unwrap()],
            )
            .unwrap();
    }
    let mut seeds = vec![finished(writer)];

    let x = f32_tensor(&[8, 256], &gaussian(2048, 5));
    for format in viva_core::format::FORMATS {
        for target in LAYOUTS.iter().filter(|l| l.whole_file().is_none()) {
            let Ok((spec, target)) = layout::resolve(format.name(), &[], Some(target.name()))
            else {
                continue;
            };
            let name = "model.proj.weight";
            let q = quantized(&x, &spec);
            let Ok(entries) = target.entries(&spec, name, &q.shape, DType::F32) else {
                continue;
            };
            let late: Vec<String> = entries.late.iter().map(|l| l.name.clone()).collect();
            let writer = create(entries.fixed, entries.late);
            for (part, bytes) in target.spell(name, &q).unwrap() {
                match late.contains(&part) {
                    true => writer.write_late(&part, &bytes).unwrap(),
                    false => writer.write(&part, &bytes).unwrap(),
                }
            }
            seeds.push(finished(writer));
        }
    }
    assert!(seeds.len() > 4);
    seeds
}

#[test]
fn damaged_files_do_no_harm() {
    mutation::open_damaged("damaged.safetensors", &seeds());
}
