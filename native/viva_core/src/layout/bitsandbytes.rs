//! bitsandbytes: 4-bit blocks (nf4, fp4) and LLM.int8().
//!
//! | format | tensors |
//! |---|---|
//! | 4-bit | `weight` u8 [⌈n/2⌉, 1]; `weight.absmax` f32 `[blocks]`, u8 when nested; `weight.quant_map` f32 `[16]`; nested: `weight.nested_absmax` f32, `weight.nested_quant_map` f32 `[256]`; `weight.quant_state.bitsandbytes__nf4` u8: JSON |
//! | int8 | `weight` i8 [out, in]; `SCB` f32 `[out]`; `weight_format` u8 scalar 0 |

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Entries, Found, Layout, Modules, Source, Spelled, expect, invalid, module, refuse, set_config,
};
use crate::error::{Error, Result};
use crate::format::{
    Granularity, Input, Method, OptionValue, Quantized, Scale, Spec, Values, Zero,
};
use crate::formats::codebook;
use crate::formats::dynamic_map::{self, DYNAMIC_MAP};
use crate::io::LateEntry;
use crate::tensor::{DType, Tensor};

pub struct Bitsandbytes;

/// Longest JSON of a quant state: names, numbers and a shape, with room.
const STATE_LEN: usize = 512;

/// Block sizes that its kernels take.
const BLOCKS: std::ops::RangeInclusive<usize> = 32..=4096;

fn is_4bit(spec: &Spec) -> bool {
    matches!(spec.format.as_str(), "nf4" | "fp4")
}

fn table(quant_type: &str) -> Option<&'static [f32; 16]> {
    match quant_type {
        "nf4" => Some(&codebook::NF4.table),
        "fp4" => Some(&codebook::FP4.table),
        _ => None,
    }
}

fn torch_name(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("float32"),
        DType::F16 => Some("float16"),
        DType::BF16 => Some("bfloat16"),
        _ => None,
    }
}

impl Layout for Bitsandbytes {
    fn name(&self) -> &'static str {
        "bitsandbytes"
    }

    fn about(&self) -> &'static str {
        "4-bit nf4 and fp4, and LLM.int8(), as transformers loads them"
    }

    fn defaults(&self, format: &str) -> Vec<(String, OptionValue)> {
        match format {
            "int8" => vec![("scale".into(), OptionValue::Name("absmax".into()))],
            _ => Vec::new(),
        }
    }

    fn check(&self, spec: &Spec) -> Result<()> {
        match (spec.format.as_str(), spec.granularity) {
            ("nf4" | "fp4", Granularity::Block(n)) if BLOCKS.contains(&n) => Ok(()),
            ("nf4" | "fp4", _) => Err(refuse(
                self,
                spec,
                "its kernels take block_size 32, 64, 128, … 4096",
            )),
            ("int8", Granularity::Row) if spec.scale == Scale::Absmax => Ok(()),
            ("int8", _) => Err(refuse(
                self,
                spec,
                "LLM.int8() is symmetric with one absmax a row; leave out block_size, symmetric, scale and method",
            )),
            _ => Err(refuse(self, spec, "it holds nf4, fp4 and int8")),
        }
    }

    fn entries(&self, spec: &Spec, name: &str, shape: &[usize], dtype: DType) -> Result<Entries> {
        let parts = spec.format()?.parts(spec, shape)?;
        let mut entries = Entries::default();
        if !is_4bit(spec) {
            if shape.len() != 2 {
                return Err(refuse(self, spec, "LLM.int8() weights are matrices"));
            }
            let module = module(name)?;
            entries.fixed(name.into(), DType::I8, shape.to_vec());
            entries.fixed(format!("{module}.SCB"), DType::F32, parts[1].shape.clone());
            entries.fixed(format!("{module}.weight_format"), DType::U8, vec![]);
            return Ok(entries);
        }
        if torch_name(dtype).is_none() {
            return Err(refuse(
                self,
                spec,
                format!(
                    "its quant state knows no {}; cast to f32 first",
                    dtype.name()
                ),
            ));
        }
        entries.fixed(name.into(), DType::U8, vec![parts[0].shape[0], 1]);
        entries.fixed(
            format!("{name}.absmax"),
            parts[1].dtype,
            parts[1].shape.clone(),
        );
        entries.fixed(format!("{name}.quant_map"), DType::F32, vec![16]);
        if spec.double_quant {
            let nested = parts[2].shape.clone();
            entries.fixed(format!("{name}.nested_absmax"), DType::F32, nested);
            entries.fixed(format!("{name}.nested_quant_map"), DType::F32, vec![256]);
        }
        entries.late.push(LateEntry {
            name: format!("{name}.quant_state.bitsandbytes__{}", spec.format),
            max_len: STATE_LEN,
        });
        Ok(entries)
    }

    fn bytes<'a>(&self, name: &str, q: &'a Quantized) -> Result<Spelled<'a>> {
        let codes = Cow::Borrowed(q.part("codes")?.bytes());
        if !is_4bit(&q.spec) {
            let module = module(name)?;
            return Ok(vec![
                (name.into(), codes),
                (
                    format!("{module}.SCB"),
                    Cow::Borrowed(q.part("scales")?.bytes()),
                ),
                (format!("{module}.weight_format"), Cow::Owned(vec![0])),
            ]);
        }
        let table = table(&q.spec.format).map_or(&[][..], |t| t);
        let mut spelled: Spelled<'a> = vec![
            (name.into(), codes),
            (
                format!("{name}.absmax"),
                Cow::Borrowed(q.part("absmax")?.bytes()),
            ),
            (
                format!("{name}.quant_map"),
                Cow::Owned(bytemuck::cast_slice(table).to_vec()),
            ),
        ];
        if q.spec.double_quant {
            spelled.push((
                format!("{name}.nested_absmax"),
                Cow::Borrowed(q.part("nested_absmax")?.bytes()),
            ));
            spelled.push((
                format!("{name}.nested_quant_map"),
                Cow::Owned(bytemuck::cast_slice(&*DYNAMIC_MAP).to_vec()),
            ));
        }
        spelled.push((
            format!("{name}.quant_state.bitsandbytes__{}", q.spec.format),
            Cow::Owned(quant_state(q)?.into_bytes()),
        ));
        Ok(spelled)
    }

    fn one_for_all(&self) -> bool {
        true
    }

    fn leaves_floats(&self) -> bool {
        true
    }

    fn rows_in_order(&self) -> bool {
        true
    }

    fn config(&self, modules: &Modules, config: &mut Value) {
        let Modules { spec, kept, .. } = modules;
        let four = is_4bit(spec);
        // An explicit list replaces the loader's default, which keeps lm_head.
        let mut skip: Vec<&str> = kept.iter().map(String::as_str).collect();
        if !skip.contains(&"lm_head") {
            skip.push("lm_head");
        }
        skip.sort_unstable();
        let value = json!({
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": !four,
            "_load_in_4bit": four,
            "_load_in_8bit": !four,
            "bnb_4bit_quant_type": if four { spec.format.as_str() } else { "fp4" },
            "bnb_4bit_use_double_quant": spec.double_quant,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_skip_modules": skip,
        });
        set_config(config, value);
    }

    fn find(&self, has: &dyn Fn(&str) -> bool, all: &[&str]) -> Vec<Found> {
        let found = |name: &str, suffixes: &[String]| Found {
            name: name.into(),
            layout: "bitsandbytes",
            tensors: suffixes.iter().filter(|n| has(n)).cloned().collect(),
        };
        all.iter()
            .filter_map(|tensor| {
                if let Some((name, _)) = tensor.split_once(".quant_state.bitsandbytes__") {
                    let with = |suffix: &str| format!("{name}.{suffix}");
                    return Some(found(
                        name,
                        &[
                            name.to_string(),
                            with("absmax"),
                            with("quant_map"),
                            with("nested_absmax"),
                            with("nested_quant_map"),
                            tensor.to_string(),
                        ],
                    ));
                }
                let module = tensor.strip_suffix(".SCB")?;
                let name = format!("{module}.weight");
                has(&name).then(|| {
                    found(
                        &name,
                        &[
                            name.clone(),
                            tensor.to_string(),
                            format!("{module}.weight_format"),
                        ],
                    )
                })
            })
            .collect()
    }

    fn read(&self, name: &str, source: &Source) -> Result<Quantized> {
        for quant_type in ["nf4", "fp4"] {
            match source.get(&format!("{name}.quant_state.bitsandbytes__{quant_type}")) {
                Ok(state) => return read_4bit(name, quant_type, &state, source),
                Err(Error::UnknownTensor { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        read_int8(name, source)
    }
}

/// The JSON of a quant state, byte for byte as Python's `json.dumps` writes it.
fn quant_state(q: &Quantized) -> Result<String> {
    let Granularity::Block(block) = q.spec.granularity else {
        return Err(invalid("quant_state", "4-bit formats have blocks"));
    };
    let dtype = torch_name(q.dtype).unwrap_or("float32");
    let shape: Vec<String> = q.shape.iter().map(usize::to_string).collect();
    let nested = if q.spec.double_quant {
        let offset = q.part("nested_offset")?.to_f32_vec()[0];
        format!(
            ", \"nested_blocksize\": {}, \"nested_dtype\": \"float32\", \"nested_offset\": {}",
            dynamic_map::BLOCK,
            python_float(f64::from(offset))
        )
    } else {
        String::new()
    };
    Ok(format!(
        "{{\"quant_type\": \"{}\", \"blocksize\": {block}, \"dtype\": \"{dtype}\", \"shape\": [{}]{nested}}}",
        q.spec.format,
        shape.join(", ")
    ))
}

/// A finite number as Python's `repr` writes it: the shortest digits, with an
/// exponent of two digits or more outside 1e-4 … 1e16.
fn python_float(v: f64) -> String {
    let positional = v == 0.0 || (1e-4..1e16).contains(&v.abs());
    let shortest = if positional {
        format!("{v:?}")
    } else {
        format!("{v:e}")
    };
    // Of two shortest numbers that are equally near, Rust takes the larger one and
    // Python the even one, as rounding to that many digits does.
    let (number, _) = shortest.split_once('e').unwrap_or((&shortest, ""));
    let decimals = number.split_once('.').map_or(0, |(_, d)| d.len());
    let rounded = if positional {
        format!("{v:.decimals$}")
    } else {
        format!("{v:.decimals$e}")
    };
    let text = if rounded.parse() == Ok(v) {
        rounded
    } else {
        shortest
    };
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(rest) => ('-', rest),
                None => ('+', exponent),
            };
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

#[derive(Deserialize)]
struct QuantState {
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
}

fn read_4bit(name: &str, quant_type: &str, state: &Tensor, source: &Source) -> Result<Quantized> {
    let bad = |message: String| invalid(&format!("{name}.quant_state"), message);
    let state: QuantState =
        serde_json::from_slice(state.bytes()).map_err(|e| bad(e.to_string()))?;
    let dtype = match state.dtype.as_str() {
        "float32" => DType::F32,
        "float16" => DType::F16,
        "bfloat16" => DType::BF16,
        other => return Err(bad(format!("dtype {other:?}"))),
    };
    if !state.blocksize.is_power_of_two() || state.blocksize < 2 {
        return Err(bad(format!("blocksize {}", state.blocksize)));
    }
    let double_quant = state.nested_offset.is_some();
    if double_quant && state.nested_blocksize != Some(dynamic_map::BLOCK) {
        return Err(bad(format!(
            "nested_blocksize {:?}",
            state.nested_blocksize
        )));
    }
    let spec = Spec {
        format: quant_type.into(),
        method: Method::Rtn,
        granularity: Granularity::Block(state.blocksize),
        symmetric: true,
        zero: Zero::Integer,
        scale: Scale::Absmax,
        scale_dtype: DType::F32,
        double_quant,
        act_order: false,
        values: Values::Source,
        input: Input::default(),
    };
    same_map(
        name,
        "quant_map",
        table(quant_type).map_or(&[][..], |t| t),
        source,
    )?;
    let parts = spec.format()?.parts(&spec, &state.shape)?;
    let codes = source.get(name)?.reshaped(parts[0].shape.clone())?;
    let mut read = vec![
        ("codes", expect(codes, name, DType::U8, &parts[0].shape)?),
        ("absmax", source.get(&format!("{name}.absmax"))?),
    ];
    if let Some(offset) = state.nested_offset {
        same_map(name, "nested_quant_map", &*DYNAMIC_MAP, source)?;
        read.push((
            "nested_absmax",
            source.get(&format!("{name}.nested_absmax"))?,
        ));
        let offset = Tensor::from_slice(DType::F32, &[1], &[offset as f32])?;
        read.push(("nested_offset", offset));
    }
    let q = Quantized {
        spec,
        shape: state.shape,
        dtype,
        parts: read,
    };
    q.validate()?;
    Ok(q)
}

fn same_map(name: &str, suffix: &str, expected: &[f32], source: &Source) -> Result<()> {
    let name = format!("{name}.{suffix}");
    let map = expect(source.get(&name)?, &name, DType::F32, &[expected.len()])?;
    // == and not bits: the two zeros of fp4 may differ in sign.
    if map.to_f32_vec() != expected {
        return Err(invalid(&name, "is not the table of its quant type"));
    }
    Ok(())
}

fn read_int8(name: &str, source: &Source) -> Result<Quantized> {
    let module = module(name)?;
    let codes = source.get(name)?;
    let (&[rows, _], DType::I8) = (codes.shape(), codes.dtype()) else {
        return Err(invalid(name, "LLM.int8() weights are i8 matrices"));
    };
    match source.get(&format!("{module}.weight_format")) {
        Ok(format) if format.bytes().iter().any(|&b| b != 0) => {
            return Err(invalid(
                name,
                "its weight_format is a GPU's tiled order; save it again in row order",
            ));
        }
        Ok(_) | Err(Error::UnknownTensor { .. }) => {}
        Err(e) => return Err(e),
    }
    let scales = expect(
        source.get(&format!("{module}.SCB"))?,
        name,
        DType::F32,
        &[rows],
    )?;
    let q = Quantized {
        spec: Spec {
            format: "int8".into(),
            method: Method::Rtn,
            granularity: Granularity::Row,
            symmetric: true,
            zero: Zero::Integer,
            scale: Scale::Absmax,
            scale_dtype: DType::F32,
            double_quant: false,
            act_order: false,
            values: Values::Source,
            input: Input::default(),
        },
        shape: codes.shape().to_vec(),
        // bitsandbytes keeps no dtype: it computes in 16 bits.
        dtype: DType::F16,
        parts: vec![("codes", codes), ("scales", scales)],
    };
    q.validate()?;
    Ok(q)
}

#[cfg(test)]
mod tests {
    use super::python_float;

    #[test]
    fn floats_are_spelled_as_python_spells_them() {
        for (v, text) in [
            (0.11706781387329102, "0.11706781387329102"),
            // 0.111743927001953125: as near to the one that ends in 3.
            (0.11174392700195312, "0.11174392700195312"),
            (0.0, "0.0"),
            (2.0, "2.0"),
            (-0.5, "-0.5"),
            (0.0001, "0.0001"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (-2.25e-10, "-2.25e-10"),
            (1e16, "1e+16"),
            (1234567.0, "1234567.0"),
            (1.2e120, "1.2e+120"),
        ] {
            assert_eq!(python_float(v), text);
        }
    }
}
