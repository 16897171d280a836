//! Sets of vectors: what their codes stand for, what a search finds in them.

use std::path::Path;

use viva_core::Error;
use viva_core::io::{Checkpoint, TensorFile};
use viva_core::ops::{Cancel, pool};
use viva_core::tensor::{DType, Tensor};
use viva_core::vectors::{Codes, Metric, Piece, Settings, Stored, Terms, Writer};

const CODES: [&str; 3] = ["int8", "int4", "binary"];

struct Random(u64);

impl Random {
    /// About normally distributed.
    fn next(&mut self) -> f32 {
        let mut sum = 0.0;
        for _ in 0..6 {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            sum += (self.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        }
        sum * 2f32.sqrt()
    }
}

/// Vectors around some directions, all of them a little to one side, of all lengths.
fn clustered(n: usize, d: usize) -> Vec<f32> {
    let mut random = Random(7);
    let centers: Vec<f32> = (0..20 * d).map(|_| random.next()).collect();
    let aside: Vec<f32> = (0..d).map(|_| random.next()).collect();
    let mut x = Vec::new();
    for i in 0..n {
        let length = 1.0 + (i % 5) as f32;
        let center = &centers[(i % 20) * d..][..d];
        x.extend((0..d).map(|c| length * (center[c] + 0.4 * aside[c] + 0.9 * random.next())));
    }
    x
}

fn tensor(x: &[f32], d: usize) -> Tensor {
    Tensor::from_slice(DType::F32, &[x.len() / d, d], x).unwrap()
}

fn settings(codes: &str, rescore: Option<&str>) -> Settings {
    Settings::resolve(codes, rescore, "cosine", true).unwrap()
}

fn create(dir: &Path, settings: Settings, x: &Tensor) -> Writer {
    let ids: Vec<u64> = (0..x.shape()[0] as u64).collect();
    Writer::create(dir, settings, (x, &ids), 50, None).unwrap()
}

/// Writes all vectors, in pieces of that many.
fn write(dir: &Path, settings: Settings, x: &Tensor, each: usize) -> (Writer, Vec<(usize, Piece)>) {
    let writer = create(dir, settings, x);
    let n = x.shape()[0];
    let pieces = (0..n).step_by(each).map(|first| {
        let rows = x.rows(first..n.min(first + each)).unwrap();
        (first, writer.write(first, &rows, &Cancel::new()).unwrap())
    });
    let pieces = pieces.collect();
    writer.finish(n).unwrap();
    (writer, pieces)
}

fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|item| {
            let path = item.unwrap().path();
            (
                path.file_name().unwrap().to_string_lossy().into_owned(),
                std::fs::read(path).unwrap(),
            )
        })
        .collect();
    files.sort();
    files
}

fn exact(x: &[f32], d: usize, query: usize, metric: Metric) -> Vec<(f32, u64)> {
    let row = |i: usize| &x[i * d..(i + 1) * d];
    let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let length = |a: &[f32]| {
        if metric == Metric::Cosine {
            dot(a, a).sqrt()
        } else {
            1.0
        }
    };
    let mut scores: Vec<(f32, u64)> = (0..x.len() / d)
        .map(|i| {
            (
                dot(row(query), row(i)) / length(row(query)) / length(row(i)),
                i as u64,
            )
        })
        .collect();
    scores.sort_by(|a, b| b.0.total_cmp(&a.0));
    scores
}

#[test]
fn codes_and_scales_stand_for_the_vectors() {
    let d = 48;
    let x = clustered(100, d);
    let t = tensor(&x, d);
    for codes in CODES {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), settings(codes, None), &t, 33);
        let set = Checkpoint::open(dir.path()).unwrap();
        let mean = set.tensor("mean").unwrap().to_f32_vec();
        let stored = set.tensor("codes").unwrap();
        for (i, x) in x.chunks_exact(d).enumerate() {
            let length = x.iter().map(|v| f64::from(v * v)).sum::<f64>().sqrt();
            let unit: Vec<f64> = x.iter().map(|&v| f64::from(v) / length).collect();
            let centered: Vec<f64> = unit
                .iter()
                .zip(&mean)
                .map(|(x, &m)| x - f64::from(m))
                .collect();
            let row = &stored.bytes()[i * stored.row_len()..][..stored.row_len()];
            let codes: Vec<f64> = match codes {
                "int8" => row.iter().map(|&c| f64::from(c as i8)).collect(),
                "int4" => row
                    .iter()
                    .flat_map(|c| [c & 15, c >> 4])
                    .map(|c| f64::from(c) - 8.0)
                    .collect(),
                _ => {
                    for (c, x) in centered.iter().enumerate() {
                        let bit = row[c / 8] >> (7 - c % 8) & 1;
                        assert!(x.abs() < 1e-6 || (bit == 1) == (*x > 0.0));
                    }
                    continue;
                }
            };
            let scale = f64::from(set.tensor("scale").unwrap().to_f32_vec()[i]);
            let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
            let squares = dot(&centered, &centered);
            let product = scale * dot(&codes, &centered) / squares;
            assert!(
                (product - 1.0).abs() < 1e-5,
                "{i}: {product} {codes:?} {scale} {centered:?}"
            );
            let error: f64 = codes
                .iter()
                .zip(&centered)
                .map(|(c, x)| (c * scale - x).powi(2))
                .sum();
            let most = if set.tensor("codes").unwrap().dtype() == DType::I8 {
                1e-4
            } else {
                2e-2
            };
            assert!(error / squares < most, "{error} of {squares}");
        }
    }
}

#[test]
fn a_search_finds_what_is_near() {
    let d = 64;
    let x = clustered(3000, d);
    let t = tensor(&x, d);
    for (codes, alone, again) in [
        ("int8", 0.97, 0.999),
        ("int4", 0.82, 0.97),
        ("binary", 0.35, 0.85),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (writer, _) = write(dir.path(), settings(codes, None), &t, 1000);
        let recall = writer.recall(10, &Cancel::new()).unwrap().unwrap();
        assert_eq!(
            (recall.queries, recall.nearest, recall.candidates),
            (50, 10, 100)
        );
        let rescored = recall.rescored.unwrap();
        assert!(
            recall.codes > alone && recall.codes < 0.999,
            "{codes}: {recall:?}"
        );
        assert!(
            rescored > again && rescored > recall.codes,
            "{codes}: {recall:?}"
        );
        assert_eq!(recall.hamming.is_some(), codes == "binary");
        if let Some(hamming) = recall.hamming {
            assert!(
                hamming < recall.codes,
                "queries of more bits find more: {recall:?}"
            );
            assert!(recall.hamming_rescored.unwrap() > hamming);
        }
        // Nobody is nearer than a vector to itself, and scores are cosines.
        let stored = Stored::open(dir.path()).unwrap();
        let terms = Terms {
            most: 5,
            candidates: 50,
            hamming: false,
            but: None,
        };
        let found = stored
            .search(&t.rows(17..20).unwrap(), &terms, &Cancel::new())
            .unwrap();
        for (query, list) in found.lists().iter().enumerate() {
            assert_eq!(list.len(), 5);
            assert_eq!(list[0].0, 17 + query as u64);
            let cosines = exact(&x, d, 17 + query, Metric::Cosine);
            for (id, score) in list {
                let cosine = cosines.iter().find(|(_, i)| i == id).unwrap().0;
                assert!((score - cosine).abs() < 0.02, "{codes}: {score} {cosine}");
            }
        }
    }
}

#[test]
fn products_of_vectors_of_all_lengths() {
    let d = 32;
    let x = clustered(2000, d);
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings::resolve("int8", Some("none"), "dot", false).unwrap();
    write(dir.path(), settings, &tensor(&x, d), 512);
    let stored = Stored::open(dir.path()).unwrap();
    let terms = Terms {
        most: 10,
        candidates: 0,
        hamming: false,
        but: None,
    };
    let found = stored
        .search(&tensor(&x, d).rows(0..8).unwrap(), &terms, &Cancel::new())
        .unwrap();
    for (query, list) in found.lists().iter().enumerate() {
        let best = &exact(&x, d, query, Metric::Dot)[..10];
        let hits = list
            .iter()
            .filter(|(id, _)| best.iter().any(|(_, b)| b == id))
            .count();
        assert!(hits >= 9, "query {query} finds {hits}");
        assert!((list[0].1 / best[0].0 - 1.0).abs() < 0.02);
    }
}

#[test]
fn the_bytes_are_the_same_however_they_are_cut() {
    let d = 50;
    let t = tensor(&clustered(300, d), d);
    for codes in CODES {
        let mut made = Vec::new();
        for (each, threads) in [(300, 1), (7, 2), (128, 3)] {
            pool::configure(threads).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let (writer, _) = write(dir.path(), settings(codes, Some("f16")), &t, each);
            made.push((
                files(dir.path()),
                writer.recall(10, &Cancel::new()).unwrap(),
            ));
        }
        assert_eq!(made[0], made[1]);
        assert_eq!(made[0], made[2]);
    }
}

#[test]
fn another_writer_goes_on_with_what_is_as_it_was() {
    let d = 16;
    let t = tensor(&clustered(100, d), d);
    let cancel = Cancel::new();
    let dir = tempfile::tempdir().unwrap();
    let (first, pieces) = write(dir.path(), settings("int4", None), &t, 40);
    let whole = files(dir.path());
    let recall = first.recall(10, &cancel).unwrap();
    drop(first);

    // One piece is damaged, and the end is lost.
    let path = dir.path().join("rescore.safetensors");
    let mut damaged = std::fs::read(&path).unwrap();
    let at = damaged.len() - 100 * d + 50 * d;
    damaged[at] ^= 1;
    std::fs::write(&path, &damaged[..damaged.len() - 15 * d]).unwrap();
    let again = create(dir.path(), settings("int4", None), &t);
    let mut same = Vec::new();
    for (first, piece) in &pieces {
        let rows = 40.min(100 - first);
        same.push(again.verify(*first, rows, piece, &cancel).unwrap());
        if !same[same.len() - 1] {
            let rows = t.rows(*first..first + rows).unwrap();
            assert_eq!(again.write(*first, &rows, &cancel).unwrap(), *piece);
        }
    }
    assert_eq!(same, [true, false, false]);
    again.finish(100).unwrap();
    assert_eq!(files(dir.path()), whole);
    assert_eq!(again.recall(10, &cancel).unwrap(), recall);
}

#[test]
fn vectors_of_zeros_and_few_vectors() {
    let d = 8;
    for codes in CODES {
        for n in [1, 3] {
            let mut x = clustered(n, d);
            x[..d].fill(0.0);
            let dir = tempfile::tempdir().unwrap();
            let (writer, _) = write(dir.path(), settings(codes, None), &tensor(&x, d), 2);
            let recall = writer.recall(10, &Cancel::new()).unwrap();
            assert_eq!(recall.map(|r| r.rescored), (n > 1).then_some(Some(1.0)));
            let stored = Stored::open(dir.path()).unwrap();
            let terms = Terms {
                most: 10,
                candidates: 100,
                hamming: false,
                but: None,
            };
            let found = stored
                .search(&tensor(&x, d), &terms, &Cancel::new())
                .unwrap();
            assert!(
                found
                    .lists()
                    .iter()
                    .all(|l| l.len() == n && l.iter().all(|f| f.1.is_finite()))
            );
        }
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ids: Vec<u64> = (0..10).collect();
    let sample = |d: usize| tensor(&clustered(10, d), d);
    let create = |codes: &str, x: &Tensor| {
        Writer::create(dir.path(), settings(codes, None), (x, &ids), 5, None)
    };
    let error = create("int4", &sample(7)).unwrap_err().to_string();
    assert!(error.contains("7 is odd"), "{error}");
    let mut bad = clustered(10, 4);
    bad[23] = f32::NAN;
    let writer = create("int8", &sample(4)).unwrap();
    let error = writer
        .write(0, &tensor(&bad, 4), &Cancel::new())
        .unwrap_err();
    assert_eq!(
        error,
        Error::NonFinite {
            nan: 1,
            inf: 0,
            first: 23
        }
    );
    let error = writer.write(0, &sample(5), &Cancel::new()).unwrap_err();
    assert!(matches!(error, Error::ShapeMismatch { .. }));
    for (names, option) in [
        (("int2", None, "cosine"), "codes"),
        (("int8", Some("f8"), "cosine"), "rescore"),
        (("int8", None, "l2"), "metric"),
    ] {
        let error = Settings::resolve(names.0, names.1, names.2, true).unwrap_err();
        assert!(
            matches!(&error, Error::InvalidOption { option: o, .. } if o == option),
            "{error}"
        );
    }
    let large = tensor(&[1e6, 2.0], 2);
    let dot = Settings::resolve("int8", Some("f16"), "dot", false).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let writer = Writer::create(dir.path(), dot, (&large, &[0]), 0, None).unwrap();
    let error = writer
        .write(0, &large, &Cancel::new())
        .unwrap_err()
        .to_string();
    assert!(error.contains("f16 cannot hold 1000000"), "{error}");

    // Any other file, and a set whose files do not belong together.
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), settings("int8", None), &sample(4), 10);
    let codes = dir.path().join("codes.safetensors");
    assert!(Stored::open(&codes).is_err());
    assert_eq!(
        Stored::open(dir.path()).unwrap().settings.codes,
        Codes::Int8
    );
    let other = tempfile::tempdir().unwrap();
    write(
        other.path(),
        settings("int8", None),
        &tensor(&clustered(9, 4), 4),
        10,
    );
    std::fs::copy(
        other.path().join("rescore.safetensors"),
        dir.path().join("rescore.safetensors"),
    )
    .unwrap();
    let error = Stored::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("rescore of another shape"), "{error}");
    assert!(TensorFile::open(codes).unwrap().entry("codes").is_ok());
}
