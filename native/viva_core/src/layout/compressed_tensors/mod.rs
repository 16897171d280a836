//! compressed-tensors, which llm-compressor writes and vLLM and transformers
//! load.
//!
//! | its format | of ours | tensors |
//! |---|---|---|
//! | float-quantized | fp8_e4m3 | `weight` F8_E4M3; `weight_scale` |
//! | int-quantized | int8, symmetric, a row or tensor | `weight` i8; `weight_scale` |
//! | pack-quantized | other integers | `weight_packed` i32 [out, ⌈in·bits/32⌉]; `weight_scale`; `weight_shape` i64 [2]; `weight_zero_point` i32 [⌈out·bits/32⌉, groups] |
//! | nvfp4-pack-quantized | nvfp4 | `weight_packed` u8 [out, in/2]; `weight_scale` F8_E4M3 [out, in/16]; `weight_global_scale` f32 [1] |
//! | mxfp4-pack-quantized | mxfp4 | `weight_packed` u8 [out, in/2]; `weight_scale` u8 [out, in/32] |
//! | mxfp8-quantized | mxfp8 | `weight` F8_E4M3; `weight_scale` u8 [out, in/32] |
//! | sparse-24-bitmask | sparse24 | those of `sparse24` |
//!
//! `weight_scale` is [1], [out, 1] or [out, groups]. Integers are stored without
//! their offset where they have a byte of their own, and with it where they are
//! packed. Scales of 2-D blocks are read too: each row gets a copy of them.

mod config;
mod pack;
mod sparse24;

use std::borrow::Cow;

use serde_json::{Value, json};

use super::{
    Entries, Found, Layout, Modules, Source, Spelled, expect, invalid, model_dtype, module, refuse,
    set_config,
};
use crate::error::{Error, Result};
use crate::format::{
    self, Granularity, Input, Method, OptionValue, Quantized, Scale, Spec, Values, Zero,
};
use crate::formats::{mx, nvfp4};
use crate::tensor::{DType, Tensor};

pub struct CompressedTensors;

/// Its formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Float,
    Int,
    Pack,
    Nvfp4,
    Mxfp4,
    Mxfp8,
}

impl Kind {
    /// What holds the spec, if anything does.
    fn of(spec: &Spec) -> Option<Kind> {
        let plain = spec.scale == Scale::Step && spec.zero == Zero::Integer && !spec.act_order;
        match spec.format.as_str() {
            "fp8_e4m3" => Some(Kind::Float),
            "nvfp4" => Some(Kind::Nvfp4),
            "mxfp4" => Some(Kind::Mxfp4),
            "mxfp8" => Some(Kind::Mxfp8),
            "int8" if plain && spec.symmetric => match spec.granularity {
                Granularity::Row | Granularity::Tensor => Some(Kind::Int),
                Granularity::Block(_) => Some(Kind::Pack),
            },
            name if plain && width(name).is_some() => Some(Kind::Pack),
            _ => None,
        }
    }

    fn format(self) -> &'static str {
        match self {
            Kind::Float => "float-quantized",
            Kind::Int => "int-quantized",
            Kind::Pack => "pack-quantized",
            Kind::Nvfp4 => "nvfp4-pack-quantized",
            Kind::Mxfp4 => "mxfp4-pack-quantized",
            Kind::Mxfp8 => "mxfp8-quantized",
        }
    }

    /// The suffix of the tensor of codes.
    fn codes(self) -> &'static str {
        match self {
            Kind::Float | Kind::Int | Kind::Mxfp8 => "weight",
            Kind::Pack | Kind::Nvfp4 | Kind::Mxfp4 => "weight_packed",
        }
    }
}

/// Every suffix that a quantized weight may have.
const SUFFIXES: [&str; 6] = [
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_global_scale",
];

/// Bits of the codes of an integer format.
fn width(format: &str) -> Option<usize> {
    format.strip_prefix("int")?.parse().ok()
}

/// Scales a row has; `None` where the tensor has one.
fn groups(spec: &Spec, columns: usize) -> Option<usize> {
    match spec.granularity {
        Granularity::Tensor => None,
        Granularity::Row => Some(1),
        Granularity::Block(n) => Some(columns / n.max(1)),
    }
}

/// Moves bytes between the ranges of i8 and u8.
fn shifted(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|b| b ^ 0x80).collect()
}

impl CompressedTensors {
    fn kind(&self, spec: &Spec) -> Result<Kind> {
        Kind::of(spec).ok_or_else(|| {
            refuse(
                self,
                spec,
                "it holds fp8_e4m3, mxfp8, mxfp4, nvfp4, sparse24 and integers with scales in steps and integer zero points",
            )
        })
    }
}

impl Layout for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn about(&self) -> &'static str {
        "fp8, MX, NVFP4 and integers, as vLLM and transformers load them; 2:4 sparsity"
    }

    /// Scales in 16 bits, since transformers rounds them to the model's dtype
    /// when it loads them; and packed integers without zero points, which it
    /// cannot load (compressed-tensors 0.20 gives their parameter a shape that
    /// is not packed).
    fn defaults(&self, format: &str) -> Vec<(String, OptionValue)> {
        let scale_dtype = ("scale_dtype".into(), OptionValue::Name("bf16".into()));
        match format {
            "mxfp4" | "mxfp8" => vec![("scale".into(), OptionValue::Name("bump".into()))],
            "fp8_e4m3" => vec![scale_dtype],
            _ if width(format).is_some() => {
                vec![scale_dtype, ("symmetric".into(), OptionValue::Bool(true))]
            }
            _ => Vec::new(),
        }
    }

    fn check(&self, spec: &Spec) -> Result<()> {
        match sparse24::holds(spec) {
            true => Ok(()),
            false => self.kind(spec).map(drop),
        }
    }

    fn entries(&self, spec: &Spec, name: &str, shape: &[usize], dtype: DType) -> Result<Entries> {
        self.check(spec)?;
        let module = module(name)?;
        let &[out, columns] = shape else {
            return Err(refuse(self, spec, "its weights are matrices"));
        };
        spec.format()?.check_shape(spec, shape)?;
        if sparse24::holds(spec) {
            return sparse24::entries(&*spec.for_dtype(dtype)?, module, [out, columns]);
        }
        let kind = self.kind(spec)?;
        let groups = groups(spec, columns);
        let bits = width(&spec.format).unwrap_or(8);
        let (dtype, last) = match kind {
            Kind::Float | Kind::Mxfp8 => (DType::F8E4M3, columns),
            Kind::Int => (DType::I8, columns),
            Kind::Pack => (DType::I32, pack::words(bits, columns)),
            Kind::Nvfp4 | Kind::Mxfp4 => (DType::U8, columns / 2),
        };
        let scale_dtype = match kind {
            Kind::Mxfp4 | Kind::Mxfp8 => DType::U8,
            _ => spec.scale_dtype,
        };
        let mut entries = Entries::default();
        let mut add = |suffix: &str, dtype, shape| {
            entries.fixed(format!("{module}.{suffix}"), dtype, shape);
        };
        add(kind.codes(), dtype, vec![out, last]);
        let scales = groups.map_or(vec![1], |groups| vec![out, groups]);
        add("weight_scale", scale_dtype, scales);
        if kind == Kind::Nvfp4 {
            add("weight_global_scale", DType::F32, vec![1]);
        }
        if kind == Kind::Pack {
            add("weight_shape", DType::I64, vec![2]);
            if !spec.symmetric {
                match groups {
                    None => add("weight_zero_point", DType::I8, vec![1]),
                    Some(groups) => {
                        let shape = vec![pack::words(bits, out), groups];
                        add("weight_zero_point", DType::I32, shape);
                    }
                }
            }
        }
        Ok(entries)
    }

    fn bytes<'a>(&self, name: &str, q: &'a Quantized) -> Result<Spelled<'a>> {
        let module = module(name)?;
        if sparse24::holds(&q.spec) {
            return sparse24::spell(module, q);
        }
        let kind = self.kind(&q.spec)?;
        let named = |suffix: &str| format!("{module}.{suffix}");
        let (out, columns) = (q.shape[0], q.shape[1]);
        let bits = width(&q.spec.format).unwrap_or(8);
        let codes = q.part("codes")?;
        let codes = match (kind, codes.dtype()) {
            (Kind::Pack, DType::I8) => {
                let unsigned = shifted(codes.bytes());
                Cow::Owned(pack::rows(bits, out, columns, &unsigned).into_owned())
            }
            (Kind::Pack, _) => pack::rows(bits, out, columns, codes.bytes()),
            _ => Cow::Borrowed(codes.bytes()),
        };
        let mut spelled = vec![
            (named(kind.codes()), codes),
            (
                named("weight_scale"),
                Cow::Borrowed(q.part("scales")?.bytes()),
            ),
        ];
        if kind == Kind::Nvfp4 {
            let global = q.part("global_scale")?.bytes();
            spelled.push((named("weight_global_scale"), Cow::Borrowed(global)));
        }
        if kind == Kind::Pack {
            let shape = [out as i64, columns as i64].map(i64::to_le_bytes);
            spelled.push((named("weight_shape"), Cow::Owned(shape.concat())));
            if !q.spec.symmetric {
                let zeros = q.part("zero_points")?.bytes();
                let zeros = match groups(&q.spec, columns) {
                    // One byte, without the offset of the packed ones.
                    None => vec![zeros[0].wrapping_sub(1 << (bits - 1))],
                    Some(groups) => pack::zeros(bits, out, groups, zeros),
                };
                spelled.push((named("weight_zero_point"), Cow::Owned(zeros)));
            }
        }
        Ok(spelled)
    }

    fn config(&self, modules: &Modules, config: &mut Value) {
        if sparse24::holds(modules.spec) {
            let quantized = sparse24::quantization_config(modules.spec, modules.kept);
            return set_config(config, quantized);
        }
        let Some(kind) = Kind::of(modules.spec) else {
            return;
        };
        if let (Kind::Nvfp4 | Kind::Mxfp4 | Kind::Mxfp8, Value::Object(map)) = (kind, &mut *config)
        {
            // These it decompresses to bf16, whatever the model computes in.
            map.insert("dtype".into(), json!("bfloat16"));
            if let Some(dtype) = map.get_mut("torch_dtype") {
                *dtype = json!("bfloat16");
            }
        }
        set_config(
            config,
            config::config(&config::groups(modules), modules.kept),
        );
    }

    fn find(&self, has: &dyn Fn(&str) -> bool, all: &[&str]) -> Vec<Found> {
        all.iter()
            .filter_map(|tensor| {
                if let Some(module) = sparse24::module_of(tensor, has) {
                    return Some(Found {
                        name: format!("{module}.weight"),
                        layout: "compressed-tensors",
                        tensors: sparse24::tensors(module, has),
                    });
                }
                let module = tensor.strip_suffix(".weight_scale")?;
                let with = |suffix: &str| format!("{module}.{suffix}");
                (has(&with("weight")) || has(&with("weight_packed"))).then(|| Found {
                    name: with("weight"),
                    layout: "compressed-tensors",
                    tensors: SUFFIXES.map(with).into_iter().filter(|t| has(t)).collect(),
                })
            })
            .collect()
    }

    fn describe(&self, name: &str, source: &Source) -> Result<(String, Vec<usize>)> {
        if let Some(q) = sparse24::read(name, source)? {
            return Ok((q.spec.format, q.shape));
        }
        let stored = Stored::open(name, source)?;
        Ok((stored.format()?.into(), stored.shape()?.to_vec()))
    }

    fn read(&self, name: &str, source: &Source) -> Result<Quantized> {
        let q = match sparse24::read(name, source)? {
            Some(q) => q,
            None => Stored::open(name, source)?.read(source.config)?,
        };
        q.validate()?;
        Ok(q)
    }
}

/// The tensors of one weight, as a file holds them.
struct Stored<'a> {
    name: &'a str,
    codes: Tensor,
    packed: bool,
    scales: Tensor,
    zeros: Option<Tensor>,
    shape: Option<Tensor>,
    global: Option<Tensor>,
}

fn optional(source: &Source, name: &str) -> Result<Option<Tensor>> {
    match source.get(name) {
        Ok(tensor) => Ok(Some(tensor)),
        Err(Error::UnknownTensor { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

impl<'a> Stored<'a> {
    fn open(name: &'a str, source: &Source) -> Result<Stored<'a>> {
        let module = module(name)?;
        let part = |suffix: &str| optional(source, &format!("{module}.{suffix}"));
        let packed = part("weight_packed")?;
        if part("weight_g_idx")?.is_some() {
            return Err(invalid(
                name,
                "its groups follow a weight_g_idx, which compressed-tensors gave up; save it again without",
            ));
        }
        Ok(Stored {
            name,
            packed: packed.is_some(),
            codes: match packed {
                Some(codes) => codes,
                None => source.get(name)?,
            },
            scales: source.get(&format!("{module}.weight_scale"))?,
            zeros: part("weight_zero_point")?,
            shape: part("weight_shape")?,
            global: part("weight_global_scale")?,
        })
    }

    fn bad(&self, message: impl std::fmt::Display) -> Error {
        invalid(self.name, message)
    }

    fn shape(&self) -> Result<[usize; 2]> {
        let &[out, last] = self.codes.shape() else {
            return Err(self.bad("its weight is a matrix"));
        };
        match (self.packed, self.codes.dtype(), &self.shape) {
            (false, ..) => Ok([out, last]),
            (true, DType::U8, _) => Ok([out, 2 * last]),
            (true, _, Some(shape)) => {
                let shape = shape.clone();
                let shape = expect(shape, self.name, DType::I64, &[2])?;
                let (sizes, _) = shape.bytes().as_chunks::<8>();
                let size = |i: usize| usize::try_from(i64::from_le_bytes(sizes[i])).ok();
                match (size(0), size(1)) {
                    (Some(rows), Some(columns)) if rows == out => Ok([out, columns]),
                    _ => Err(self.bad("its weight_shape is of another weight")),
                }
            }
            (true, _, None) => Err(self.bad("has no weight_shape")),
        }
    }

    /// Bits of packed integers: those that fill the words of a row.
    fn bits(&self) -> Result<usize> {
        let [_, columns] = self.shape()?;
        let words = self.codes.shape()[1];
        let fills = |bits: &usize| columns < 1 << 40 && pack::words(*bits, columns) == words;
        (2..=8)
            .find(fills)
            .ok_or_else(|| self.bad(format!("{words} words hold no row of {columns} integers")))
    }

    fn format(&self) -> Result<&'static str> {
        let exponents = matches!(self.scales.dtype(), DType::U8 | DType::F8E8M0);
        let name = match (self.codes.dtype(), self.packed) {
            (DType::I32, true) => &format!("int{}", self.bits()?),
            (DType::U8, true) if exponents => "mxfp4",
            (DType::U8, true) => "nvfp4",
            (DType::I8, false) => "int8",
            (DType::F8E4M3, false) if exponents => "mxfp8",
            (DType::F8E4M3, false) => "fp8_e4m3",
            (DType::F8E5M2, false) => "fp8_e5m2",
            (dtype, _) => return Err(self.bad(format!("no codes are {}", dtype.name()))),
        };
        Ok(format::format(name)?.name())
    }

    /// The scales, and which elements share one.
    fn scales(&self, config: &Value) -> Result<(Granularity, Tensor)> {
        let [out, columns] = self.shape()?;
        let scales = &self.scales;
        let flat = || scales.reshaped(vec![scales.len()]);
        let granularity = match *scales.shape() {
            [] | [1] => Granularity::Tensor,
            [rows] if rows == out => Granularity::Row,
            [rows, 1] if rows == out => Granularity::Row,
            [rows, groups] if rows == out && groups > 0 && columns.is_multiple_of(groups) => {
                Granularity::Block(columns / groups)
            }
            [tall, wide] => return self.block_scales(tall, wide, config),
            _ => return Err(self.bad(format!("scales of shape {:?}", scales.shape()))),
        };
        Ok((granularity, flat()?))
    }

    /// The scales of 2-D blocks, a copy for each row. Blocks that end amid a row
    /// are cut into what divides both.
    fn block_scales(
        &self,
        tall: usize,
        wide: usize,
        config: &Value,
    ) -> Result<(Granularity, Tensor)> {
        let [out, columns] = self.shape()?;
        let fits =
            |&(h, w): &(usize, usize)| out.div_ceil(h) == tall && columns.div_ceil(w) == wide;
        let exact = (
            out.checked_div(tall).unwrap_or(0).max(1),
            columns.checked_div(wide).unwrap_or(0).max(1),
        );
        let (height, width) = [
            config::block_structure(config),
            Some((128, 128)),
            Some(exact),
        ]
        .into_iter()
        .flatten()
        .find(fits)
        .ok_or_else(|| {
            self.bad(format!(
                "scales of shape {:?} for a weight [{out}, {columns}]",
                self.scales.shape()
            ))
        })?;
        let block = greatest_common_divisor(width, columns);
        let size = self.scales.dtype().size();
        let bytes = self.scales.bytes();
        let mut copied = Vec::with_capacity(out * (columns / block) * size);
        for row in 0..out {
            for column in (0..columns).step_by(block) {
                let at = (row / height * wide + column / width) * size;
                copied.extend_from_slice(&bytes[at..at + size]);
            }
        }
        let dtype = self.scales.dtype();
        let scales = Tensor::from_slice(dtype, &[copied.len() / size], &copied)?;
        Ok((Granularity::Block(block), scales))
    }

    fn read(&self, config: &Value) -> Result<Quantized> {
        let format = self.format()?;
        let shape = self.shape()?;
        let [out, columns] = shape;
        let (granularity, scales) = self.scales(config)?;
        let is_mx = format.starts_with("mx");
        let stored = scales.dtype();
        let (granularity, scale_dtype, known) = match format {
            "nvfp4" => (
                Granularity::Block(nvfp4::BLOCK),
                stored,
                stored == DType::F8E4M3,
            ),
            _ if is_mx => (Granularity::Block(mx::BLOCK), DType::F8E8M0, true),
            _ => (
                granularity,
                stored,
                matches!(stored, DType::F32 | DType::F16 | DType::BF16),
            ),
        };
        if !known {
            return Err(self.bad(format!("scales of dtype {}", stored.name())));
        }
        let spec = Spec {
            format: format.into(),
            method: Method::Rtn,
            granularity,
            symmetric: self.zeros.is_none() || width(format).is_none(),
            zero: Zero::Integer,
            scale: if is_mx { Scale::Bump } else { Scale::Step },
            scale_dtype,
            double_quant: false,
            act_order: false,
            values: Values::Source,
            input: Input::default(),
        };
        let scales = if is_mx {
            Tensor::from_slice(DType::F8E8M0, scales.shape(), scales.bytes())?
        } else {
            scales
        };
        let bits = width(format).unwrap_or(8);
        let unsigned = |bytes: &[u8]| Tensor::from_slice(DType::U8, &[bytes.len()], bytes);
        let codes = match (self.packed, format) {
            (true, "mxfp4" | "nvfp4") => self.codes.reshaped(vec![self.codes.len()])?,
            (true, _) => {
                let packed = [out, pack::words(bits, columns)];
                let codes = expect(self.codes.clone(), self.name, DType::I32, &packed)?;
                let stream = pack::stream(bits, out, columns, codes.bytes());
                match (bits, spec.symmetric) {
                    (8, true) => Tensor::from_slice(DType::I8, &shape, &shifted(&stream))?,
                    (8, false) => Tensor::from_slice(DType::U8, &shape, &stream)?,
                    _ => unsigned(&stream)?,
                }
            }
            (false, "int8") if !spec.symmetric => {
                Tensor::from_slice(DType::U8, &shape, &shifted(self.codes.bytes()))?
            }
            (false, _) => self.codes.clone(),
        };
        let mut parts = vec![("codes", codes), ("scales", scales)];
        if let (false, Some(zeros)) = (spec.symmetric, &self.zeros) {
            let groups = groups(&spec, columns);
            let zeros = match (zeros.dtype(), groups) {
                (DType::I32, Some(groups)) => {
                    let shape = [pack::words(bits, out), groups];
                    let zeros = expect(zeros.clone(), self.name, DType::I32, &shape)?;
                    pack::unpack_zeros(bits, out, groups, zeros.bytes())
                }
                // One byte each, without the offset.
                (DType::I8, None) if zeros.len() == 1 => {
                    vec![zeros.bytes()[0].wrapping_add(1 << (bits - 1))]
                }
                (DType::I8, Some(_)) if bits == 8 => shifted(zeros.bytes()),
                (dtype, _) => {
                    return Err(self.bad(format!("zero points of dtype {}", dtype.name())));
                }
            };
            parts.push(("zero_points", unsigned(&zeros)?));
        }
        if format == "nvfp4" {
            let global = self.global.clone();
            let global = global.ok_or_else(|| self.bad("has no weight_global_scale"))?;
            parts.push(("global_scale", global.reshaped(vec![global.len()])?));
        }
        let dtype = match spec.scale_dtype {
            DType::F8E4M3 | DType::F8E8M0 => DType::BF16,
            scales => model_dtype(config).unwrap_or(scales),
        };
        Ok(Quantized {
            spec,
            shape: shape.to_vec(),
            dtype,
            parts,
        })
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 {
        a
    } else {
        greatest_common_divisor(b, a % b)
    }
}
