//! AWQ GEMM: int4 in groups along the input, stored [in, out].
//!
//! `qweight` i32 [in, out/8], `qzeros` i32 [in/g, out/8], `scales` f16
//! [in/g, out]. Nibble i of a word is output column `8c + [0,2,4,6,1,3,5,7][i]`.

use std::borrow::Cow;

use rayon::prelude::*;
use serde_json::{Value, json};

use super::{
    Entries, Found, Layout, Modules, Source, Spelled, compute_in_f16, expect, invalid, module,
    refuse, set_config,
};
use crate::error::Result;
use crate::format::{
    Granularity, Input, Method, OptionValue, Quantized, Scale, Spec, Values, Zero,
};
use crate::ops::pool;
use crate::ops::transpose::transpose;
use crate::simd::nibble::{self, Order};
use crate::tensor::{Buffer, DType, Tensor};

pub struct Awq;

/// Output column of each nibble of a word, from its low end.
const COLUMN: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Input rows that one task rearranges.
const ROWS: usize = 64;

impl Awq {
    fn group(spec: &Spec, columns: usize) -> usize {
        match spec.granularity {
            Granularity::Block(n) => n,
            _ => columns,
        }
    }
}

impl Layout for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn about(&self) -> &'static str {
        "AWQ GEMM: int4 groups with zero points, as vLLM and transformers load them"
    }

    fn defaults(&self, _format: &str) -> Vec<(String, OptionValue)> {
        Vec::new()
    }

    fn check(&self, spec: &Spec) -> Result<()> {
        if spec.format != "int4" {
            return Err(refuse(self, spec, "it holds int4"));
        }
        if spec.zero == Zero::Float || spec.act_order {
            return Err(refuse(
                self,
                spec,
                "its zero points are integers and its groups in order; leave out zero_point, act_order and method hqq",
            ));
        }
        if spec.granularity == Granularity::Tensor || spec.scale_dtype != DType::F16 {
            return Err(refuse(
                self,
                spec,
                "it has f16 scales, one a group or row; leave out scale_dtype, and give block_size a number or row",
            ));
        }
        Ok(())
    }

    fn entries(&self, spec: &Spec, name: &str, shape: &[usize], _dtype: DType) -> Result<Entries> {
        let module = module(name)?;
        let &[out, columns] = shape else {
            return Err(refuse(self, spec, "its weights are matrices"));
        };
        spec.format()?.check_shape(spec, shape)?;
        if !out.is_multiple_of(8) {
            return Err(refuse(
                self,
                spec,
                format!("it packs 8 rows in a word, and 8 does not divide {out}"),
            ));
        }
        let groups = columns / Awq::group(spec, columns).max(1);
        let mut entries = Entries::default();
        let mut add = |suffix, dtype, shape| {
            entries.fixed(format!("{module}.{suffix}"), dtype, shape);
        };
        add("qweight", DType::I32, vec![columns, out / 8]);
        add("qzeros", DType::I32, vec![groups, out / 8]);
        add("scales", DType::F16, vec![groups, out]);
        Ok(entries)
    }

    fn bytes<'a>(&self, name: &str, q: &'a Quantized) -> Result<Spelled<'a>> {
        let module = module(name)?;
        let (out, columns) = (q.shape[0], q.shape[1]);
        let groups = columns / Awq::group(&q.spec, columns).max(1);
        let codes = q.part("codes")?.bytes();
        let qweight = pack_words(out, columns, |row, range, into| {
            nibble::unpack(Order::LowFirst, codes, row * columns + range.start, into);
        })?;
        let zeros = match q.spec.symmetric {
            // Symmetric codes are stored plus eight: a zero point of eight.
            true => None,
            false => Some(q.part("zero_points")?.bytes()),
        };
        let qzeros = pack_words(out, groups, |row, range, into| match zeros {
            None => into.fill(8),
            Some(zeros) => {
                nibble::unpack(Order::LowFirst, zeros, row * groups + range.start, into);
            }
        })?;
        let scales = transpose::<2>(q.part("scales")?.bytes(), out, groups)?;
        Ok(vec![
            (format!("{module}.qweight"), Cow::Owned(qweight)),
            (format!("{module}.qzeros"), Cow::Owned(qzeros)),
            (format!("{module}.scales"), Cow::Owned(scales)),
        ])
    }

    fn one_for_all(&self) -> bool {
        true
    }

    fn config(&self, modules: &Modules, config: &mut Value) {
        let kept = modules.kept;
        let group = match modules.spec.granularity {
            Granularity::Block(n) => json!(n),
            _ => json!(-1),
        };
        let kept = if kept.is_empty() {
            Value::Null
        } else {
            json!(kept)
        };
        compute_in_f16(config);
        set_config(
            config,
            json!({
                "quant_method": "awq",
                "bits": 4,
                "group_size": group,
                "zero_point": true,
                "version": "gemm",
                "modules_to_not_convert": kept,
            }),
        );
    }

    fn find(&self, has: &dyn Fn(&str) -> bool, all: &[&str]) -> Vec<Found> {
        all.iter()
            .filter_map(|tensor| {
                let module = tensor.strip_suffix(".qweight")?;
                // GPTQ has the same names and a g_idx.
                if has(&format!("{module}.g_idx")) {
                    return None;
                }
                let tensors = ["qweight", "qzeros", "scales"].map(|s| format!("{module}.{s}"));
                tensors.iter().all(|t| has(t)).then(|| Found {
                    name: format!("{module}.weight"),
                    layout: "awq",
                    tensors: tensors.to_vec(),
                })
            })
            .collect()
    }

    fn describe(&self, name: &str, source: &Source) -> Result<(String, Vec<usize>)> {
        // The header tells; reading would rearrange every code.
        match source.get(&format!("{}.qweight", module(name)?))?.shape() {
            &[columns, words] => Ok(("int4".into(), vec![words * 8, columns])),
            _ => Err(invalid(name, "qweight is a matrix")),
        }
    }

    fn read(&self, name: &str, source: &Source) -> Result<Quantized> {
        let module = module(name)?;
        let part = |suffix: &str| source.get(&format!("{module}.{suffix}"));
        let qweight = part("qweight")?;
        let qzeros = part("qzeros")?;
        let (&[columns, words], &[groups, _]) = (qweight.shape(), qzeros.shape()) else {
            return Err(invalid(name, "qweight and qzeros are matrices"));
        };
        let out = words * 8;
        if groups == 0 || !columns.is_multiple_of(groups) {
            return Err(invalid(
                name,
                format!("{groups} groups do not divide {columns} rows of qweight"),
            ));
        }
        let qweight = expect(qweight, name, DType::I32, &[columns, words])?;
        let qzeros = expect(qzeros, name, DType::I32, &[groups, words])?;
        let scales = expect(part("scales")?, name, DType::F16, &[groups, out])?;
        let spec = Spec {
            format: "int4".into(),
            method: Method::Rtn,
            granularity: Granularity::Block(columns / groups),
            symmetric: false,
            zero: Zero::Integer,
            scale: Scale::Step,
            scale_dtype: DType::F16,
            double_quant: false,
            act_order: false,
            values: Values::Source,
            input: Input::default(),
        };
        let codes = unpack_words(out, columns, qweight.bytes())?;
        let zeros = unpack_words(out, groups, qzeros.bytes())?;
        let scales = transpose::<2>(scales.bytes(), groups, out)?;
        let bytes = |dtype: DType, bytes: Vec<u8>| {
            let n = bytes.len() / dtype.size();
            Tensor::from_slice(dtype, &[n], &bytes)
        };
        let q = Quantized {
            spec,
            shape: vec![out, columns],
            dtype: DType::F16,
            parts: vec![
                ("codes", bytes(DType::U8, codes)?),
                ("scales", bytes(DType::F16, scales)?),
                ("zero_points", bytes(DType::U8, zeros)?),
            ],
        };
        q.validate()?;
        Ok(q)
    }
}

/// Words [columns, out/8] from codes [out, columns]. `unpack` writes a range of
/// one row, a code a byte.
fn pack_words(
    out: usize,
    columns: usize,
    unpack: impl Fn(usize, std::ops::Range<usize>, &mut [u8]) + Sync,
) -> Result<Vec<u8>> {
    let words = out / 8;
    let mut packed = vec![0u8; columns * words * 4];
    if packed.is_empty() {
        return Ok(packed);
    }
    pool::run(|| {
        packed
            .par_chunks_mut(ROWS * words * 4)
            .enumerate()
            .for_each(|(i, chunk)| {
                let start = i * ROWS;
                let n = chunk.len() / (words * 4);
                let mut codes = [[0u8; ROWS]; 8];
                for word in 0..words {
                    for (column, codes) in COLUMN.into_iter().zip(&mut codes) {
                        unpack(word * 8 + column, start..start + n, &mut codes[..n]);
                    }
                    for row in 0..n {
                        let mut packed = 0u32;
                        for (i, codes) in codes.iter().enumerate() {
                            packed |= u32::from(codes[row]) << (4 * i);
                        }
                        let at = (row * words + word) * 4;
                        chunk[at..at + 4].copy_from_slice(&packed.to_le_bytes());
                    }
                }
            });
        Ok(())
    })?;
    Ok(packed)
}

/// Codes [out, columns], two a byte with the first in the low bits, from words
/// [columns, out/8].
fn unpack_words(out: usize, columns: usize, words: &[u8]) -> Result<Vec<u8>> {
    let per_row = out / 8;
    let mut codes = Buffer::zeroed(out * columns);
    for column in 0..columns {
        for word in 0..per_row {
            let at = (column * per_row + word) * 4;
            for (i, row) in COLUMN.into_iter().enumerate() {
                let nibble = (words[at + i / 2] >> (4 * (i % 2))) & 15;
                codes.bytes_mut()[(word * 8 + row) * columns + column] = nibble;
            }
        }
    }
    let mut packed = vec![0u8; (out * columns).div_ceil(2)];
    nibble::pack(Order::LowFirst, codes.as_ref(), &mut packed);
    Ok(packed)
}
