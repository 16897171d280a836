//! MLX, affine: integers in groups of 32, 64 or 128 with a float zero point.
//!
//! `weight` u32 [out, in · bits / 32], codes as one stream of bits along each
//! row; `scales` and `biases` [out, in / group] in one float dtype: value =
//! code · scale + bias. `config.json` says bits and group_size, under
//! `quantization`, for all modules and for those that differ.

use std::borrow::Cow;

use serde_json::{Value, json};

use super::{
    Entries, Found, Layout, Modules, Source, Spelled, invalid, module, refuse, set_config,
};
use crate::error::Result;
use crate::format::{
    Granularity, Input, Method, OptionValue, Quantized, Scale, Spec, Values, Zero,
};
use crate::formats::int;
use crate::tensor::{DType, Tensor};

pub struct Mlx;

const GROUPS: [usize; 3] = [32, 64, 128];

impl Layout for Mlx {
    fn name(&self) -> &'static str {
        "mlx"
    }

    fn about(&self) -> &'static str {
        "MLX affine: integer groups with float zero points, as mlx-lm loads them"
    }

    fn defaults(&self, format: &str) -> Vec<(String, OptionValue)> {
        match int::width(format) {
            Some(_) => vec![
                ("zero_point".into(), OptionValue::Name("float".into())),
                ("block_size".into(), OptionValue::Int(64)),
            ],
            None => Vec::new(),
        }
    }

    fn check(&self, spec: &Spec) -> Result<()> {
        if int::width(&spec.format).is_none() {
            return Err(refuse(self, spec, "it holds integers of 2 to 8 bits"));
        }
        if spec.symmetric || spec.zero != Zero::Float || spec.act_order {
            return Err(refuse(
                self,
                spec,
                "its zero points are floats; leave out symmetric, zero_point and act_order",
            ));
        }
        match spec.granularity {
            Granularity::Block(n) if GROUPS.contains(&n) => Ok(()),
            _ => Err(refuse(
                self,
                spec,
                "its kernels take block_size 32, 64 and 128",
            )),
        }
    }

    fn entries(&self, spec: &Spec, name: &str, shape: &[usize], _dtype: DType) -> Result<Entries> {
        let module = module(name)?;
        let (&[ref rest @ .., columns], Some(width), Granularity::Block(group)) =
            (shape, int::width(&spec.format), spec.granularity)
        else {
            return Err(refuse(self, spec, "its weights are matrices"));
        };
        spec.format()?.check_shape(spec, shape)?;
        let of = |last: usize| [rest, &[last]].concat();
        let mut entries = Entries::default();
        entries.fixed(name.into(), DType::U32, of(columns / 32 * width));
        for part in ["scales", "biases"] {
            entries.fixed(
                format!("{module}.{part}"),
                spec.scale_dtype,
                of(columns / group),
            );
        }
        Ok(entries)
    }

    fn bytes<'a>(&self, name: &str, q: &'a Quantized) -> Result<Spelled<'a>> {
        let module = module(name)?;
        let part = |name: &str| q.part(name).map(|part| Cow::Borrowed(part.bytes()));
        Ok(vec![
            (name.into(), part("codes")?),
            (format!("{module}.scales"), part("scales")?),
            (format!("{module}.biases"), part("biases")?),
        ])
    }

    fn holds_embeddings(&self) -> bool {
        true
    }

    fn rows_in_order(&self) -> bool {
        true
    }

    fn config(&self, modules: &Modules, config: &mut Value) {
        // A loader sees what was kept from the names of the tensors.
        let setting = |spec: &Spec| {
            json!({
                "group_size": spec.block_len(&[]),
                "bits": int::width(&spec.format),
                "mode": "affine",
            })
        };
        let mut value = setting(modules.spec);
        for (module, spec) in modules.others {
            value[module] = setting(spec);
        }
        if let Value::Object(map) = config {
            map.insert("quantization".into(), value.clone());
        }
        set_config(config, value);
    }

    fn find(&self, has: &dyn Fn(&str) -> bool, all: &[&str]) -> Vec<Found> {
        all.iter()
            .filter_map(|tensor| {
                let module = tensor.strip_suffix(".biases")?;
                let tensors = ["weight", "scales", "biases"].map(|s| format!("{module}.{s}"));
                tensors.iter().all(|t| has(t)).then(|| Found {
                    name: tensors[0].clone(),
                    layout: "mlx",
                    tensors: tensors.to_vec(),
                })
            })
            .collect()
    }

    fn describe(&self, name: &str, source: &Source) -> Result<(String, Vec<usize>)> {
        let (format, _, shape, _) = sizes(name, source)?;
        Ok((format.into(), shape))
    }

    fn read(&self, name: &str, source: &Source) -> Result<Quantized> {
        let (format, group, shape, weight) = sizes(name, source)?;
        let module = module(name)?;
        let scales = source.get(&format!("{module}.scales"))?;
        let biases = source.get(&format!("{module}.biases"))?;
        let spec = Spec {
            format: format.into(),
            method: Method::Rtn,
            granularity: Granularity::Block(group),
            symmetric: false,
            zero: Zero::Float,
            scale: Scale::Step,
            scale_dtype: scales.dtype(),
            double_quant: false,
            act_order: false,
            values: Values::Source,
            input: Input::default(),
        };
        if !matches!(scales.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(invalid(
                name,
                format!("scales are {}", scales.dtype().name()),
            ));
        }
        let declared = spec.format()?.parts(&spec, &shape)?;
        let flat = |t: Tensor| t.reshaped(vec![t.len()]);
        let q = Quantized {
            dtype: scales.dtype(),
            spec,
            shape,
            parts: vec![
                (
                    "codes",
                    weight.viewed(DType::U8, declared[0].shape.clone())?,
                ),
                ("scales", flat(scales)?),
                ("biases", flat(biases)?),
            ],
        };
        q.validate()?;
        Ok(q)
    }
}

/// The format, group size and shape of a weight, and its codes.
fn sizes(name: &str, source: &Source) -> Result<(&'static str, usize, Vec<usize>, Tensor)> {
    let all = &source.config["quantization"];
    let of_module = &all[module(name)?];
    let setting = |key: &str| of_module[key].as_u64().or(all[key].as_u64());
    let mode = |of: &Value| of["mode"].as_str().is_none_or(|mode| mode == "affine");
    let (Some(bits), Some(group)) = (setting("bits"), setting("group_size")) else {
        return Err(invalid(
            name,
            "its config.json has no quantization with bits and group_size; open the model's directory",
        ));
    };
    if !mode(if of_module.is_object() {
        of_module
    } else {
        all
    }) {
        return Err(invalid(name, "of MLX's modes affine is read"));
    }
    let (bits, group) = (bits as usize, group as usize);
    let weight = source.get(name)?;
    let (Some(format), DType::U32) = (int::name_of(bits), weight.dtype()) else {
        return Err(invalid(
            name,
            format!(
                "{bits} bits in {}: codes of 2 to 8 bits are in u32",
                weight.dtype().name()
            ),
        ));
    };
    let split = weight.shape().split_last();
    match split.map(|(&words, rest)| (words.saturating_mul(32), rest)) {
        Some((n, rest)) if n.is_multiple_of(bits) && GROUPS.contains(&group) => {
            let shape = [rest, &[n / bits]].concat();
            Ok((format, group, shape, weight))
        }
        _ => Err(invalid(
            name,
            format!(
                "{bits} bits in groups of {group} do not fill {:?} words",
                weight.shape()
            ),
        )),
    }
}
