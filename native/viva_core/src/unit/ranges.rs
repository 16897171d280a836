//! Huge tensors, of which a unit does a range of rows: what is in memory at a time, and
//! what is done again when it is lost, do not grow with the tensor.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::format::{Granularity, Input, Method, Spec};
use crate::io::{Checkpoint, EntryDType, FixedEntry, ShardWriter};
use crate::ops::metrics::Seen;
use crate::ops::{Cancel, pool, quantize};
use crate::tensor::{DType, Tensor};

use super::parts::{WINDOW, source_part_hash};
use super::{Done, PartWriter, Target};

/// A range begins at a multiple of so many rows, whatever packs codes of several.
const ROWS: usize = 256;

/// How the rows of one tensor are taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ranges {
    /// Rows of each range but the last.
    pub rows: usize,
    /// Bytes of the source and of the output that are there at once.
    pub bytes: usize,
}

impl Ranges {
    /// `None` where the tensor is not huge, or where it has to be seen at once: a part
    /// of it depends on all rows, or the layout does not put them one after the other.
    ///
    /// # Errors
    /// Those of the layout's entries.
    pub fn of(
        target: &Target,
        name: &str,
        dtype: DType,
        shape: &[usize],
    ) -> Result<Option<Ranges>> {
        Ranges::of_at_most(WINDOW, target, name, dtype, shape)
    }

    fn of_at_most(
        most: usize,
        target: &Target,
        name: &str,
        dtype: DType,
        shape: &[usize],
    ) -> Result<Option<Ranges>> {
        let &[rows, columns] = shape else {
            return Ok(None);
        };
        let row = columns * dtype.size();
        let spec = target.spec_for(shape)?.for_dtype(dtype)?.into_owned();
        let step = step(columns, spec.block_len(shape));
        let at_once = (most / row.max(1)) / step * step;
        let huge = at_once > 0 && rows > 2 * at_once;
        if !huge || target.calibrated.is_some() || !target.layout.rows_in_order() {
            return Ok(None);
        }
        if !rows_apart(&spec, shape)? {
            return Ok(None);
        }
        let known = EntryDType::Known(dtype);
        let all = target.entries(name, known, shape)?;
        for range in [at_once, rows % at_once] {
            if range == 0 {
                continue;
            }
            let some = target.entries(name, known, &[range, columns])?;
            for (all, some) in all.fixed.iter().zip(&some.fixed) {
                let (all, some) = (nbytes(all)?, nbytes(some)?);
                if all != some && all * range != some * rows {
                    return Ok(None);
                }
            }
        }
        let bytes = at_once * (row + all.nbytes()?.div_ceil(rows));
        Ok(Some(Ranges {
            rows: at_once,
            bytes,
        }))
    }
}

/// Quantizes a range of the rows that [`Ranges`] tell of, and writes what becomes of it to
/// its places: the same bytes as when the tensor is done at once. What all rows share is
/// written with the first of them.
pub fn quantize_rows_into(
    source: &Checkpoint,
    name: &str,
    rows: Range<usize>,
    target: &Target,
    shard: &ShardWriter,
    cancel: &Cancel,
) -> Result<Done> {
    source.check_unchanged(name)?;
    let tensor = source.tensor(name)?;
    let spec = target.spec_for(tensor.shape())?;
    let entries = target.entries(name, EntryDType::Known(tensor.dtype()), tensor.shape())?;
    let x = tensor.rows(rows.clone())?;
    let part = bytes_of(&tensor, &rows);
    pool::run(|| {
        let mut q = quantize::quantize(&x, &spec, cancel)
            .map_err(|e| in_tensor(e, rows.start * tensor.row_len()))?;
        let seen = Seen::of(&x, &q, cancel)?;
        let bits_per_weight = q.bits_per_weight();
        let source_hash = source_part_hash(source, name, part.clone())?;
        // The source is done with: its pages go before the output's arrive.
        source.give_back_part(name, part.clone())?;
        if !entries.late.is_empty() {
            // What is said of the whole tensor says its shape.
            q.shape = tensor.shape().to_vec();
        }
        let mut out = PartWriter::new(shard, cancel);
        for (written, bytes) in target.layout.spell(name, &q)? {
            let Some(entry) = entries.fixed.iter().find(|e| e.name == written) else {
                out.write_late(&written, &bytes)?;
                continue;
            };
            let all = nbytes(entry)?;
            let shared = all == bytes.len();
            if !shared || rows.start == 0 {
                let mut stream = out.stream_at(&written, all * rows.start / tensor.shape()[0]);
                stream.write(&bytes)?;
                out.end(stream);
            }
        }
        Ok(Done {
            input_bytes: part.len(),
            output_bytes: out.bytes(),
            elements: x.len(),
            bits_per_weight: Some(bits_per_weight),
            metrics: Some(seen.metrics()),
            seen: Some(seen),
            output_error: None,
            source_hash,
            parts: out.into_parts(),
        })
    })
}

/// A hash of the rows that such a range is made from.
pub fn source_rows_hash(source: &Checkpoint, name: &str, rows: Range<usize>) -> Result<[u8; 16]> {
    source_part_hash(source, name, bytes_of(&source.tensor(name)?, &rows))
}

/// An error of elements that come `before` others of their tensor.
fn in_tensor(e: Error, before: usize) -> Error {
    match e {
        Error::NonFinite { nan, inf, first } => Error::NonFinite {
            nan,
            inf,
            first: first + before as u64,
        },
        other => other,
    }
}

fn bytes_of(tensor: &Tensor, rows: &Range<usize>) -> Range<usize> {
    let row = tensor.row_len() * tensor.dtype().size();
    rows.start * row..rows.end * row
}

fn nbytes(entry: &FixedEntry) -> Result<usize> {
    entry.dtype.nbytes(&entry.shape)
}

/// Rows after which blocks and what packs rows both begin anew.
fn step(columns: usize, block: usize) -> usize {
    let block = block.max(1);
    let rows = block / gcd(block, columns.max(1));
    ROWS / gcd(ROWS, rows) * rows
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Whether what becomes of a row depends on no other.
fn rows_apart(spec: &Spec, shape: &[usize]) -> Result<bool> {
    let blocks = spec.granularity != Granularity::Tensor
        && !spec.double_quant
        && !spec.act_order
        && matches!(spec.method, Method::Rtn | Method::Mse)
        && spec.input == Input::default();
    Ok(blocks && spec.parts(shape)?.iter().all(|p| p.block_bits > 0))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::format::OptionValue;
    use crate::unit::{Planned, create_shard, quantize_into, verify};

    const ROWS: usize = 2 * 1024 + 300;
    const COLUMNS: usize = 96 * 4;

    fn source(dir: &Path) -> Checkpoint {
        let values: Vec<u8> = (0..ROWS * COLUMNS)
            .map(|i| ((i * 7919 % 10_007) as f32 - 5000.0) * 1e-3)
            .flat_map(f32::to_le_bytes)
            .collect();
        let path = dir.join("model.safetensors");
        let view = safetensors::tensor::TensorView::new(
            safetensors::Dtype::F32,
            vec![ROWS, COLUMNS],
            &values,
        );
        let tensors = [("a.weight", view.unwrap())];
        safetensors::serialize_to_file(tensors, None, &path).unwrap();
        Checkpoint::open(&path).unwrap()
    }

    fn shard(path: &Path, source: &Checkpoint, name: &str, target: &Target) -> ShardWriter {
        let planned = vec![Planned {
            name: name.into(),
            quantize: true,
        }];
        create_shard(path, source, Some(target), planned, BTreeMap::new()).unwrap()
    }

    /// The file when the tensor is done at once and by ranges, the last one first, is the
    /// same; the second is known again range by range.
    fn same_bytes(dir: &Path, source: &Checkpoint, name: &str, target: &Target, most: usize) {
        let what = &target.spec.format;
        let tensor = source.tensor(name).unwrap();
        let ranges = Ranges::of_at_most(most, target, name, tensor.dtype(), tensor.shape());
        let ranges = ranges
            .unwrap()
            .unwrap_or_else(|| panic!("{what}: not apart"));
        assert!(ranges.bytes < 2 * most);
        let cancel = Cancel::new();

        let whole = shard(&dir.join("whole"), source, name, target);
        let seen = quantize_into(source, name, target, None, &whole, &cancel).unwrap();
        whole.finish().unwrap();

        let rows = tensor.shape()[0];
        let starts: Vec<usize> = (0..rows).step_by(ranges.rows).collect();
        let range = |first: usize| first..(first + ranges.rows).min(rows);
        let apart = shard(&dir.join("apart"), source, name, target);
        let done: Vec<Done> = (starts.iter().rev())
            .map(|&first| {
                assert!(apart.finish().is_err(), "{what}: not all is there");
                let rows = range(first);
                quantize_rows_into(source, name, rows, target, &apart, &cancel).unwrap()
            })
            .collect();
        apart.finish().unwrap();
        let bytes = |file| std::fs::read(dir.join(file)).unwrap();
        assert!(bytes("whole") == bytes("apart"), "{what}");
        for (done, &first) in done.iter().rev().zip(&starts) {
            let hash = source_rows_hash(source, name, range(first)).unwrap();
            assert_eq!(done.source_hash, hash);
        }

        let sum = |of: fn(&Done) -> usize| done.iter().map(of).sum::<usize>();
        assert_eq!(sum(|d| d.input_bytes), seen.input_bytes);
        assert_eq!(sum(|d| d.elements), seen.elements);
        let together = (done.iter())
            .map(|d| Seen::from_numbers(d.seen.unwrap().to_numbers()))
            .fold(Seen::default(), Seen::and)
            .metrics();
        let close = |a: f64, b: f64| assert!((a - b).abs() <= 1e-12 * b.abs(), "{what}: {a} {b}");
        let metrics = seen.metrics.unwrap();
        close(together.mse, metrics.mse);
        close(together.sqnr_db, metrics.sqnr_db);
        close(together.cosine, metrics.cosine);
        assert_eq!(together.max_error, metrics.max_error);

        let again = shard(&dir.join("apart"), source, name, target);
        for done in &done {
            assert!(again.finish().is_err());
            assert!(verify(&again, &done.parts, &cancel).unwrap(), "{what}");
        }
        again.finish().unwrap();
        let other = shard(&dir.join("apart"), source, name, target);
        let part = done
            .iter()
            .flat_map(|d| &d.parts)
            .find(|p| p.range.start > 0);
        let part = part.unwrap();
        other
            .write_at(&part.name, part.range.start, &[1, 2, 3, 4])
            .unwrap();
        assert!(!verify(&other, std::slice::from_ref(part), &cancel).unwrap());
    }

    #[test]
    fn ranges_of_rows_make_the_bytes_of_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let source = source(dir.path());
        let mse = vec![("method".into(), OptionValue::Name("mse".into()))];
        let single = vec![("double_quant".into(), OptionValue::Bool(false))];
        for (format, layout, options) in [
            ("int8", "bitsandbytes", vec![]),
            ("nf4", "bitsandbytes", single.clone()),
            ("fp4", "bitsandbytes", single),
            ("int4", "mlx", vec![]),
            ("int4", "mlx", mse),
        ] {
            let target = Target::resolve(format, options, Some(layout)).unwrap();
            same_bytes(dir.path(), &source, "a.weight", &target, 1 << 20);
        }
    }

    #[test]
    fn so_they_do_in_a_gguf_file() {
        let dir = tempfile::tempdir().unwrap();
        let model = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../examples/models/viva-tiny"
        );
        let source = Checkpoint::open(model).unwrap();
        for format in ["q8_0", "q4_0", "q4_k", "q6_k"] {
            let target = Target::resolve(format, vec![], Some("gguf")).unwrap();
            let name = "model.embed_tokens.weight";
            same_bytes(dir.path(), &source, name, &target, 1 << 17);
        }
    }

    #[test]
    fn what_depends_on_all_rows_is_seen_at_once() {
        let double = vec![("double_quant".into(), OptionValue::Bool(true))];
        for (format, options, layout) in [
            ("nf4", double, Some("bitsandbytes")),
            ("nvfp4", vec![], None),
            ("int4", vec![], Some("awq")),
            ("int4", vec![], Some("gptq")),
        ] {
            let target = Target::resolve(format, options, layout).unwrap();
            let shape = [4096, 1024];
            let ranges = Ranges::of_at_most(1 << 20, &target, "a.weight", DType::F32, &shape);
            assert_eq!(ranges.unwrap(), None, "{format}");
        }
        let target = Target::resolve("int8", vec![], None).unwrap();
        let of = |shape: &[usize]| {
            Ranges::of_at_most(1 << 20, &target, "a.weight", DType::F32, shape).unwrap()
        };
        assert_eq!(of(&[256, 1024]), None, "small enough");
        assert_eq!(of(&[4096]), None, "no rows");
        assert_eq!(of(&[4096, 1 << 20]), None, "a range would be too large");
    }
}
