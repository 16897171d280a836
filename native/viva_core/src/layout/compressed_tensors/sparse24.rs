//! compressed-tensors' `sparse-24-bitmask`, alone or of codes that
//! `int-quantized` and `float-quantized` made. Its version 0.14 was the last that
//! wrote and read it; vLLM's releases of that time read it too.
//!
//! | tensor | what |
//! |---|---|
//! | `compressed` | [out, in/2]: the floats, i8 or F8_E4M3 that stay |
//! | `bitmask` | u8 [out, ⌈in/8⌉] |
//! | `shape` | i64 [2, 1]: out, in |
//! | `weight_scale` | [out, 1] or [1], of i8 and F8_E4M3 |

use std::borrow::Cow;

use serde_json::{Value, json};

use super::{Kind, config, model_dtype, optional};
use crate::error::Result;
use crate::format::{Format, Granularity, Quantized, Spec, Values};
use crate::formats::sparse24::{SPARSE24, floats, mask_len};
use crate::layout::{Entries, Source, Spelled, expect, invalid, module};
use crate::tensor::DType;

const SUFFIXES: [&str; 4] = ["compressed", "bitmask", "shape", "weight_scale"];

pub fn holds(spec: &Spec) -> bool {
    spec.format == SPARSE24.name()
}

pub fn entries(spec: &Spec, module: &str, [out, columns]: [usize; 2]) -> Result<Entries> {
    let parts = SPARSE24.parts(spec, &[out, columns])?;
    let mut entries = Entries::default();
    let mut add = |suffix: &str, dtype, shape| {
        entries.fixed(format!("{module}.{suffix}"), dtype, shape);
    };
    add("compressed", parts[0].dtype, vec![out, columns / 2]);
    add("bitmask", DType::U8, vec![out, mask_len(columns)]);
    add("shape", DType::I64, vec![2, 1]);
    if parts.len() > 2 {
        let shape = match spec.granularity {
            Granularity::Tensor => vec![1],
            _ => vec![out, 1],
        };
        add("weight_scale", parts[1].dtype, shape);
    }
    Ok(entries)
}

pub fn spell<'a>(module: &str, q: &'a Quantized) -> Result<Spelled<'a>> {
    let shape = [q.shape[0] as i64, q.shape[1] as i64].map(i64::to_le_bytes);
    let mut bytes = vec![
        Cow::Borrowed(q.parts[0].1.bytes()),
        Cow::Borrowed(q.part("bitmask")?.bytes()),
        Cow::Owned(shape.concat()),
    ];
    if let Ok(scales) = q.part("scales") {
        bytes.push(Cow::Borrowed(scales.bytes()));
    }
    let names = SUFFIXES.map(|suffix| format!("{module}.{suffix}"));
    Ok(names.into_iter().zip(bytes).collect())
}

/// What a model says whose linear layers are all so, as version 0.14 reads it.
pub fn quantization_config(spec: &Spec, kept: &[String]) -> Value {
    let mut made = match spec.values {
        Values::Int8 => config::config(&[(Kind::Int, spec, vec!["Linear"])], kept),
        Values::Fp8E4m3 => config::config(&[(Kind::Float, spec, vec!["Linear"])], kept),
        _ => json!({"quant_method": "compressed-tensors", "transform_config": {}}),
    };
    if let Value::Object(map) = &mut made {
        map.remove("moe_sparsity_config");
        map.insert("version".into(), json!("0.14.0.1"));
        map.insert(
            "sparsity_config".into(),
            json!({
                "format": "sparse-24-bitmask",
                "global_sparsity": 0.5,
                "ignore": kept,
                "registry_requires_subclass": false,
                "sparsity_structure": "2:4",
                "targets": ["Linear"],
            }),
        );
    }
    made
}

/// The module whose weight a tensor of this name belongs to.
pub fn module_of<'a>(tensor: &'a str, has: &dyn Fn(&str) -> bool) -> Option<&'a str> {
    let module = tensor.strip_suffix(".bitmask")?;
    let with = |suffix: &str| has(&format!("{module}.{suffix}"));
    (with("compressed") && with("shape")).then_some(module)
}

pub fn tensors(module: &str, has: &dyn Fn(&str) -> bool) -> Vec<String> {
    let names = SUFFIXES.map(|suffix| format!("{module}.{suffix}"));
    names.into_iter().filter(|name| has(name)).collect()
}

/// Reads a weight, yet to be validated; `None` where it has no bitmask.
pub fn read(name: &str, source: &Source) -> Result<Option<Quantized>> {
    let module = module(name)?;
    let Some(bitmask) = optional(source, &format!("{module}.bitmask"))? else {
        return Ok(None);
    };
    let part = |suffix: &str| source.get(&format!("{module}.{suffix}"));
    let shape = part("shape")?;
    let shape = shape.reshaped(vec![shape.len()])?;
    let shape = expect(shape, &format!("{module}.shape"), DType::I64, &[2])?;
    let (sizes, _) = shape.bytes().as_chunks::<8>();
    let size = |i: usize| usize::try_from(i64::from_le_bytes(sizes[i])).ok();
    let compressed = part("compressed")?;
    let shape = match (size(0), size(1), compressed.shape()) {
        // Only then does a row of theirs begin with a group of its own.
        (Some(out), Some(columns), &[rows, half])
            if rows == out && half.checked_mul(2) == Some(columns) && columns % 4 == 0 =>
        {
            [out, columns]
        }
        (out, columns, compressed) => {
            return Err(invalid(
                name,
                format!(
                    "its {compressed:?} weights are no half of [{}, {}] in groups of four",
                    out.unwrap_or(0),
                    columns.unwrap_or(0)
                ),
            ));
        }
    };
    let scales = optional(source, &format!("{module}.weight_scale"))?;
    if optional(source, &format!("{module}.weight_zero_point"))?.is_some() {
        return Err(invalid(
            name,
            "has zero points, under which its zeros are none; save it symmetric",
        ));
    }
    let values = match (compressed.dtype(), &scales) {
        (DType::F32, None) => Values::F32,
        (DType::F16, None) => Values::F16,
        (DType::BF16, None) => Values::Bf16,
        (DType::I8, Some(_)) => Values::Int8,
        (DType::F8E4M3, Some(_)) => Values::Fp8E4m3,
        (dtype, scales) => {
            let with = if scales.is_some() { "with" } else { "without" };
            return Err(invalid(
                name,
                format!("its weights are {} {with} a weight_scale", dtype.name()),
            ));
        }
    };
    let rows = [shape[0], mask_len(shape[1])];
    let bitmask = expect(bitmask, &format!("{module}.bitmask"), DType::U8, &rows)?;
    let mut spec = floats(values);
    let mut dtype = compressed.dtype();
    let mut parts = vec![("values", compressed)];
    if let Some(scales) = scales {
        spec.scale_dtype = scales.dtype();
        spec.granularity = match *scales.shape() {
            [] | [1] => Granularity::Tensor,
            [rows] | [rows, 1] if rows == shape[0] => Granularity::Row,
            ref other => return Err(invalid(name, format!("scales of shape {other:?}"))),
        };
        if !matches!(spec.scale_dtype, DType::F32 | DType::F16 | DType::BF16) {
            let dtype = spec.scale_dtype.name();
            return Err(invalid(name, format!("scales of dtype {dtype}")));
        }
        dtype = model_dtype(source.config).unwrap_or(spec.scale_dtype);
        parts[0].0 = "codes";
        parts.push(("scales", scales.reshaped(vec![scales.len()])?));
    }
    parts.push(("bitmask", bitmask));
    Ok(Some(Quantized {
        spec,
        shape: shape.to_vec(),
        dtype,
        parts,
    }))
}
