//! Huge tensors, one range of rows after the other: what is in memory at a time does
//! not grow with the tensor.

use crate::error::Result;
use crate::format::{Granularity, Input, Method, Spec};
use crate::io::{Checkpoint, EntryDType, FixedEntry, ShardWriter};
use crate::ops::metrics::{RUN, Seen};
use crate::ops::{Cancel, quantize};
use crate::tensor::{DType, Tensor};

use super::parts::{Stream, WINDOW};
use super::{Done, PartWriter, Target, source_hash};

/// A range begins at a multiple of so many rows, whatever packs codes of several.
const ROWS: usize = 256;

/// How the rows of one tensor are taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ranges {
    rows: usize,
    at_once: usize,
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
            rows,
            at_once,
            bytes,
        }))
    }

    /// What [`quantize_into`](super::quantize_into) does, to the same bytes.
    pub(super) fn quantize_into(
        &self,
        source: &Checkpoint,
        name: &str,
        target: &Target,
        tensor: &Tensor,
        shard: &ShardWriter,
        cancel: &Cancel,
    ) -> Result<Done> {
        let spec = target.spec_for(tensor.shape())?;
        let row = tensor.row_len() * tensor.dtype().size();
        let entries = target.entries(name, EntryDType::Known(tensor.dtype()), tensor.shape())?;
        let mut out = PartWriter::new(shard, cancel);
        let mut streams: Vec<(Stream, usize)> = (entries.fixed.iter())
            .map(|e| Ok((out.stream(&e.name), nbytes(e)?)))
            .collect::<Result<_>>()?;
        let mut late = Vec::new();
        let (mut seen, mut bits) = (Seen::default(), 0.0);
        for first in (0..self.rows).step_by(self.at_once) {
            let last = (first + self.at_once).min(self.rows);
            let x = tensor.rows(first..last)?;
            let mut q = quantize::quantize(&x, &spec, cancel)?;
            seen.add(&x, &q, cancel)?;
            bits += q.nbytes() as f64 * 8.0;
            source.give_back_part(name, first * row..last * row)?;
            if !entries.late.is_empty() {
                // What is said of the whole tensor says its shape.
                q.shape = tensor.shape().to_vec();
            }
            late.clear();
            for (part, bytes) in target.layout.spell(name, &q)? {
                match streams.iter_mut().find(|(s, _)| s.name() == part) {
                    // Of a part that all rows share the first one is as good as any.
                    Some((_, all)) if *all == bytes.len() && first > 0 => {}
                    Some((stream, _)) => stream.write(&bytes)?,
                    None => late.push((part, bytes.into_owned())),
                }
            }
        }
        for (stream, _) in streams {
            out.end(stream);
        }
        for (part, bytes) in late {
            out.write_late(&part, &bytes)?;
        }
        Ok(Done {
            input_bytes: tensor.bytes().len(),
            output_bytes: out.bytes(),
            elements: tensor.len(),
            bits_per_weight: Some(bits / tensor.len() as f64),
            metrics: Some(seen.metrics()),
            output_error: None,
            source_hash: source_hash(source, [name])?,
            parts: out.into_parts(),
        })
    }
}

fn nbytes(entry: &FixedEntry) -> Result<usize> {
    entry.dtype.nbytes(&entry.shape)
}

/// Rows after which blocks, runs of the metrics and what packs rows all begin anew.
fn step(columns: usize, block: usize) -> usize {
    let rows_of = |elements: usize| elements / gcd(elements.max(1), columns.max(1));
    [rows_of(RUN), rows_of(block.max(1))]
        .into_iter()
        .fold(ROWS, |a, b| a / gcd(a, b.max(1)) * b.max(1))
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

    use super::*;
    use crate::format::OptionValue;
    use crate::unit::{Planned, create_shard, quantize_into};

    const ROWS: usize = 2 * 1024 + 300;
    const COLUMNS: usize = 96 * 4;

    fn source(dir: &std::path::Path) -> Checkpoint {
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

    fn written(
        path: &std::path::Path,
        source: &Checkpoint,
        name: &str,
        target: &Target,
        ranges: Option<Ranges>,
    ) -> (Vec<u8>, Done) {
        let planned = vec![Planned {
            name: name.into(),
            quantize: true,
        }];
        let shard = create_shard(path, source, Some(target), planned, BTreeMap::new()).unwrap();
        let cancel = Cancel::new();
        let done = match ranges {
            None => quantize_into(source, name, target, None, &shard, &cancel),
            Some(ranges) => {
                let tensor = source.tensor(name).unwrap();
                ranges.quantize_into(source, name, target, &tensor, &shard, &cancel)
            }
        };
        let done = done.unwrap();
        shard.finish().unwrap();
        (std::fs::read(path).unwrap(), done)
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
            let shape = [ROWS, COLUMNS];
            let of = |most| Ranges::of_at_most(most, &target, "a.weight", DType::F32, &shape);
            let ranges = of(1 << 20).unwrap();
            let ranges = ranges.unwrap_or_else(|| panic!("{format} in {layout}: not apart"));
            assert!(ranges.at_once < ROWS && !ROWS.is_multiple_of(ranges.at_once));
            assert!(ranges.bytes < 2 << 20);
            let (whole, seen) = written(
                &dir.path().join("whole"),
                &source,
                "a.weight",
                &target,
                None,
            );
            let (apart, done) = written(
                &dir.path().join("apart"),
                &source,
                "a.weight",
                &target,
                Some(ranges),
            );
            assert!(whole == apart, "{format} in {layout}");
            assert_eq!(done.metrics, seen.metrics);
            assert_eq!(done.bits_per_weight, seen.bits_per_weight);
            assert_eq!(done.source_hash, seen.source_hash);
            let by_name = |mut parts: Vec<crate::unit::Part>| {
                parts.sort_by(|a, b| a.name.cmp(&b.name));
                parts
            };
            assert_eq!(by_name(done.parts), by_name(seen.parts));
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
        let name = "model.embed_tokens.weight";
        for format in ["q8_0", "q4_0", "q4_k", "q6_k"] {
            let target = Target::resolve(format, vec![], Some("gguf")).unwrap();
            let tensor = source.tensor(name).unwrap();
            let ranges = Ranges::of_at_most(1 << 17, &target, name, tensor.dtype(), tensor.shape());
            let ranges = ranges
                .unwrap()
                .unwrap_or_else(|| panic!("{format}: not apart"));
            let (whole, seen) = written(&dir.path().join("whole"), &source, name, &target, None);
            let (apart, done) = written(
                &dir.path().join("apart"),
                &source,
                name,
                &target,
                Some(ranges),
            );
            assert!(whole == apart, "{format}");
            assert_eq!((done.metrics, done.parts), (seen.metrics, seen.parts));
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
