//! GPTQ: integers in groups along the input, stored [in, out].
//!
//! `qweight` i32 [in · bits / 32, out], codes as one stream of bits down each
//! column; `qzeros` i32 [groups, out · bits / 32], zero points as one stream
//! along each row; `scales` f16 [groups, out]; `g_idx` i32 [in], the group of
//! each input.
//!
//! Format `gptq_v2` stores zero points as they are. Format `gptq`, also called
//! v1, stores them less one, taken from the 32-bit words that hold them: below a
//! zero point of 0 the next one up lends. Only of 3 bits, which cross words, is
//! each taken for itself. GPTQModel reads and writes them so.

use std::borrow::Cow;

use serde_json::{Value, json};

use super::{
    Entries, Found, Layout, Modules, Source, Spelled, compute_in_f16, expect, invalid, module,
    refuse, set_config,
};
use crate::error::Result;
use crate::format::{
    Granularity, Input, Method, OptionValue, Quantized, Scale, Spec, Values, Zero,
};
use crate::formats::int;
use crate::ops::transpose::transpose;
use crate::simd::bits;
use crate::tensor::{DType, Tensor};

pub struct Gptq {
    name: &'static str,
    about: &'static str,
    v1: bool,
}

pub static V1: Gptq = Gptq {
    name: "gptq",
    about: "GPTQ: integer groups of 2, 3, 4 and 8 bits, as GPTQModel, vLLM and transformers load them",
    v1: true,
};

pub static V2: Gptq = Gptq {
    name: "gptq_v2",
    about: "GPTQ with zero points stored as they are (checkpoint_format gptq_v2)",
    v1: false,
};

/// Bits of a code, for the formats that it holds.
fn width(spec: &Spec) -> Option<usize> {
    int::width(&spec.format).filter(|bits| matches!(bits, 2 | 3 | 4 | 8))
}

fn group(spec: &Spec, columns: usize) -> usize {
    match spec.granularity {
        Granularity::Block(n) => n,
        _ => columns,
    }
}

/// One in every field of a word.
fn ones(width: usize) -> u32 {
    (0..32 / width).fold(0, |word, i| word | 1 << (i * width))
}

/// Symmetric int8 has signed bytes, GPTQ the same plus 128.
fn offset_bytes(words: &mut [u8]) {
    words.iter_mut().for_each(|byte| *byte ^= 0x80);
}

impl Gptq {
    /// Zero points [out, groups], one a byte, as rows of words.
    fn pack_zeros(v1: bool, width: usize, zeros: &[u8], out: usize) -> Result<Vec<u8>> {
        let groups = zeros.len() / out.max(1);
        let mut zeros = transpose::<1>(zeros, out, groups)?;
        if v1 && width == 3 {
            zeros.iter_mut().for_each(|z| *z = z.wrapping_sub(1) & 7);
        }
        // A row of them ends with a word, so the rows are one stream.
        let mut packed = vec![0u8; bits::packed_len(width, zeros.len())];
        bits::pack(width, &zeros, &mut packed);
        if v1 && width != 3 {
            shift_words(&mut packed, ones(width).wrapping_neg());
        }
        Ok(packed)
    }

    fn unpack_zeros(
        v1: bool,
        width: usize,
        words: &[u8],
        out: usize,
        groups: usize,
    ) -> Result<Vec<u8>> {
        let mut packed = words.to_vec();
        if v1 && width != 3 {
            shift_words(&mut packed, ones(width));
        }
        let mut zeros = vec![0u8; out * groups];
        bits::unpack(width, &packed, 0, &mut zeros);
        if v1 && width == 3 {
            zeros.iter_mut().for_each(|z| *z = (*z + 1) & 7);
        }
        transpose::<1>(&zeros, groups, out)
    }
}

fn shift_words(words: &mut [u8], by: u32) {
    for word in words.as_chunks_mut::<4>().0 {
        *word = u32::from_le_bytes(*word).wrapping_add(by).to_le_bytes();
    }
}

impl Layout for Gptq {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn defaults(&self, format: &str) -> Vec<(String, OptionValue)> {
        match format {
            "int8" => vec![
                ("block_size".into(), OptionValue::Int(128)),
                ("scale_dtype".into(), OptionValue::Name("f16".into())),
            ],
            _ => Vec::new(),
        }
    }

    fn check(&self, spec: &Spec) -> Result<()> {
        if width(spec).is_none() {
            return Err(refuse(self, spec, "it holds int8, int4, int3 and int2"));
        }
        if spec.zero == Zero::Float {
            return Err(refuse(
                self,
                spec,
                "its zero points are integers; leave out zero_point and method hqq",
            ));
        }
        if spec.granularity == Granularity::Tensor
            || spec.scale != Scale::Step
            || spec.scale_dtype != DType::F16
        {
            return Err(refuse(
                self,
                spec,
                "it has f16 scales, one a group or row; leave out scale and scale_dtype, and give block_size a number or row",
            ));
        }
        Ok(())
    }

    fn entries(&self, spec: &Spec, name: &str, shape: &[usize], _dtype: DType) -> Result<Entries> {
        let module = module(name)?;
        let (&[out, columns], Some(width)) = (shape, width(spec)) else {
            return Err(refuse(self, spec, "its weights are matrices"));
        };
        spec.format()?.check_shape(spec, shape)?;
        if !out.is_multiple_of(32) || !columns.is_multiple_of(32) {
            return Err(refuse(
                self,
                spec,
                format!(
                    "it packs 32 rows and columns at a time, which do not divide {out} × {columns}"
                ),
            ));
        }
        let groups = columns / group(spec, columns).max(1);
        let mut entries = Entries::default();
        let mut add = |suffix, dtype, shape| {
            entries.fixed(format!("{module}.{suffix}"), dtype, shape);
        };
        add("qweight", DType::I32, vec![columns / 32 * width, out]);
        add("qzeros", DType::I32, vec![groups, out / 32 * width]);
        add("scales", DType::F16, vec![groups, out]);
        add("g_idx", DType::I32, vec![columns]);
        Ok(entries)
    }

    fn bytes<'a>(&self, name: &str, q: &'a Quantized) -> Result<Spelled<'a>> {
        let module = module(name)?;
        let (&[out, columns], Some(width)) = (q.shape.as_slice(), width(&q.spec)) else {
            return Err(refuse(self, &q.spec, "its weights are matrices"));
        };
        let group = group(&q.spec, columns).max(1);
        let groups = columns / group;
        let codes = q.part("codes")?.bytes();
        // A row's codes end with a word, so they are a matrix of words.
        let mut qweight = transpose::<4>(codes, out, columns / 32 * width)?;
        if width == 8 && q.spec.symmetric {
            offset_bytes(&mut qweight);
        }
        let mut zeros = vec![1 << (width - 1); out * groups];
        if !q.spec.symmetric {
            bits::unpack(width, q.part("zero_points")?.bytes(), 0, &mut zeros);
        }
        let g_idx = match q.spec.act_order {
            true => Cow::Borrowed(q.part("group_index")?.bytes()),
            false => Cow::Owned(
                (0..columns)
                    .flat_map(|c| ((c / group) as i32).to_le_bytes())
                    .collect(),
            ),
        };
        let scales = transpose::<2>(q.part("scales")?.bytes(), out, groups)?;
        let zeros = Gptq::pack_zeros(self.v1, width, &zeros, out)?;
        Ok(vec![
            (format!("{module}.qweight"), Cow::Owned(qweight)),
            (format!("{module}.qzeros"), Cow::Owned(zeros)),
            (format!("{module}.scales"), Cow::Owned(scales)),
            (format!("{module}.g_idx"), g_idx),
        ])
    }

    fn config(&self, modules: &Modules, config: &mut Value) {
        let Modules { spec, others, kept } = modules;
        let group = |spec: &Spec| match spec.granularity {
            Granularity::Block(n) => json!(n),
            _ => json!(-1),
        };
        let mut value = json!({
            "bits": width(spec),
            "group_size": group(spec),
            "desc_act": spec.act_order,
            "sym": spec.symmetric,
            "lm_head": false,
            "method": "gptq",
            "quant_method": "gptq",
            "format": self.name,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "meta": {"quantizer": [concat!("viva_tensor:", env!("CARGO_PKG_VERSION"))]},
        });
        // Patterns of modules that a loader must not expect to be quantized, or
        // quantized otherwise.
        let pattern = |sign, module: &str| format!("{sign}:^{}$", module.replace('.', "\\."));
        let mut dynamic: serde_json::Map<String, Value> = kept
            .iter()
            .filter(|module| *module != "lm_head")
            .map(|module| (pattern('-', module), json!({})))
            .collect();
        dynamic.extend(others.iter().map(|(module, spec)| {
            let own = json!({
                "bits": width(spec),
                "group_size": group(spec),
                "desc_act": spec.act_order,
                "sym": spec.symmetric,
            });
            (pattern('+', module), own)
        }));
        if !dynamic.is_empty() {
            value["dynamic"] = Value::Object(dynamic);
        }
        compute_in_f16(config);
        set_config(config, value);
    }

    fn companions(&self, config: &Value) -> Vec<(&'static str, Value)> {
        vec![(
            "quantize_config.json",
            config["quantization_config"].clone(),
        )]
    }

    fn find(&self, has: &dyn Fn(&str) -> bool, all: &[&str]) -> Vec<Found> {
        if !self.v1 {
            // The names of both are the same; one of them reads both.
            return Vec::new();
        }
        all.iter()
            .filter_map(|tensor| {
                let module = tensor.strip_suffix(".g_idx")?;
                let tensors =
                    ["qweight", "qzeros", "scales", "g_idx"].map(|s| format!("{module}.{s}"));
                tensors.iter().all(|t| has(t)).then(|| Found {
                    name: format!("{module}.weight"),
                    layout: self.name,
                    tensors: tensors.to_vec(),
                })
            })
            .collect()
    }

    fn describe(&self, name: &str, source: &Source) -> Result<(String, Vec<usize>)> {
        // The header tells; reading would rearrange every code.
        let Sizes {
            format,
            out,
            columns,
            ..
        } = Sizes::of(name, source)?;
        Ok((format.into(), vec![out, columns]))
    }

    fn read(&self, name: &str, source: &Source) -> Result<Quantized> {
        let Sizes {
            format,
            width,
            out,
            columns,
            qweight,
            g_idx,
        } = Sizes::of(name, source)?;
        let module = module(name)?;
        let part = |suffix: &str| source.get(&format!("{module}.{suffix}"));
        let qzeros = part("qzeros")?;
        let groups = qzeros.shape().first().copied().unwrap_or(0);
        if groups == 0 || !columns.is_multiple_of(groups) {
            return Err(invalid(
                name,
                format!("{groups} groups do not divide {columns} inputs"),
            ));
        }
        let group = columns / groups;
        let qzeros = expect(qzeros, name, DType::I32, &[groups, out / 32 * width])?;
        let scales = expect(part("scales")?, name, DType::F16, &[groups, out])?;
        let v1 = stores_zeros_less_one(name, source.config)?;
        let zeros = Gptq::unpack_zeros(v1, width, qzeros.bytes(), out, groups)?;
        let symmetric = zeros.iter().all(|&z| z == 1 << (width - 1));
        let mut codes = transpose::<4>(qweight.bytes(), columns / 32 * width, out)?;
        if width == 8 && symmetric {
            offset_bytes(&mut codes);
        }
        let index = g_idx.bytes().as_chunks::<4>().0.iter();
        let in_order = index
            .enumerate()
            .all(|(c, g)| u32::from_le_bytes(*g) as usize == c / group);
        let spec = Spec {
            format: format.into(),
            method: Method::Rtn,
            granularity: Granularity::Block(group),
            symmetric,
            zero: Zero::Integer,
            scale: Scale::Step,
            scale_dtype: DType::F16,
            double_quant: false,
            act_order: !in_order,
            values: Values::Source,
            input: Input::default(),
        };
        let declared = spec.format()?.parts(&spec, &[out, columns])?;
        let made = |i: usize, bytes: &[u8]| {
            Tensor::from_slice(declared[i].dtype, &declared[i].shape, bytes)
        };
        let scales = transpose::<2>(scales.bytes(), groups, out)?;
        let mut parts = vec![("codes", made(0, &codes)?), ("scales", made(1, &scales)?)];
        if !symmetric {
            let mut packed = vec![0u8; bits::packed_len(width, zeros.len())];
            bits::pack(width, &zeros, &mut packed);
            parts.push(("zero_points", made(2, &packed)?));
        }
        if !in_order {
            parts.push(("group_index", g_idx));
        }
        let q = Quantized {
            spec,
            shape: vec![out, columns],
            dtype: DType::F16,
            parts,
        };
        q.validate()?;
        Ok(q)
    }
}

/// What the shapes of qweight and g_idx tell.
struct Sizes {
    format: &'static str,
    width: usize,
    out: usize,
    columns: usize,
    qweight: Tensor,
    g_idx: Tensor,
}

impl Sizes {
    fn of(name: &str, source: &Source) -> Result<Sizes> {
        let module = module(name)?;
        let qweight = source.get(&format!("{module}.qweight"))?;
        let g_idx = source.get(&format!("{module}.g_idx"))?;
        let (&[words, out], &[columns]) = (qweight.shape(), g_idx.shape()) else {
            return Err(invalid(name, "qweight is a matrix and g_idx a vector"));
        };
        let width = words.saturating_mul(32) / columns.max(1);
        let format = match width {
            2 | 3 | 4 | 8 => int::name_of(width),
            _ => None,
        };
        let Some(format) = format else {
            return Err(invalid(
                name,
                format!("{words} words for {columns} inputs are no codes of 2, 3, 4 or 8 bits"),
            ));
        };
        if !out.is_multiple_of(32) || !columns.is_multiple_of(32) {
            return Err(invalid(
                name,
                format!("32 does not divide {out} × {columns}"),
            ));
        }
        Ok(Sizes {
            format,
            width,
            out,
            columns,
            qweight: expect(qweight, name, DType::I32, &[columns / 32 * width, out])?,
            g_idx: expect(g_idx, name, DType::I32, &[columns])?,
        })
    }
}

/// Which of the two the model's config names; v1 where it names none, as the
/// files from before there were two.
fn stores_zeros_less_one(name: &str, config: &Value) -> Result<bool> {
    let quantization = &config["quantization_config"];
    let named = [&quantization["checkpoint_format"], &quantization["format"]];
    match named.into_iter().find_map(Value::as_str) {
        None | Some("gptq") => Ok(true),
        Some("gptq_v2") => Ok(false),
        Some(other) => Err(invalid(
            name,
            format!("its checkpoint_format is {other:?}; gptq and gptq_v2 are read"),
        )),
    }
}
