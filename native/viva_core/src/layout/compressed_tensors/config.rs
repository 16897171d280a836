//! The `quantization_config` of compressed-tensors, as its version 0.20 writes
//! it of its preset schemes.

use serde_json::{Map, Value, json};

use super::{Kind, Modules, width};
use crate::format::{Granularity, Spec};

/// One scheme, and the classes or names of modules that it is for.
pub type Group<'a> = (Kind, &'a Spec, Vec<&'a str>);

/// The groups of modules under different specs.
pub fn groups<'a>(modules: &Modules<'a>) -> Vec<Group<'a>> {
    let mut groups: Vec<(&Spec, Vec<&str>)> = vec![(modules.spec, Vec::new())];
    for (module, spec) in modules.others {
        match groups.iter_mut().find(|(other, _)| *other == spec) {
            Some((_, targets)) => targets.push(module),
            None => groups.push((spec, vec![module])),
        }
    }
    // A name is nearer to a module than its class.
    groups[0].1 = vec!["Linear"];
    let of_kind = |(spec, targets)| Kind::of(spec).map(|kind| (kind, spec, targets));
    groups.into_iter().filter_map(of_kind).collect()
}

pub fn config(groups: &[Group], kept: &[String]) -> Value {
    let mut config_groups = Map::new();
    let mut formats = Vec::new();
    for (i, (kind, spec, targets)) in groups.iter().enumerate() {
        config_groups.insert(format!("group_{i}"), group(*kind, spec, targets));
        if !formats.contains(&kind.format()) {
            formats.push(kind.format());
        }
    }
    let format = match formats[..] {
        [only] => only,
        _ => "mixed-precision",
    };
    json!({
        "config_groups": config_groups,
        "format": format,
        "global_compression_ratio": null,
        "ignore": kept,
        "kv_cache_scheme": null,
        "moe_sparsity_config": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    })
}

/// One group of modules.
fn group(kind: Kind, spec: &Spec, targets: &[&str]) -> Value {
    let float = !matches!(kind, Kind::Int | Kind::Pack);
    let (strategy, group) = match spec.granularity {
        Granularity::Tensor => ("tensor", None),
        Granularity::Row => ("channel", None),
        Granularity::Block(n) if kind == Kind::Nvfp4 => ("tensor_group", Some(n)),
        Granularity::Block(n) => ("group", Some(n)),
    };
    let bits = match kind {
        Kind::Nvfp4 | Kind::Mxfp4 => 4,
        Kind::Pack => width(&spec.format).unwrap_or(8),
        Kind::Float | Kind::Int | Kind::Mxfp8 => 8,
    };
    let args = |bits: usize, strategy: &str, group: Option<usize>, symmetric: bool, dynamic| {
        json!({
            "dynamic": dynamic,
            "group_size": group,
            "num_bits": bits,
            "strategy": strategy,
            "symmetric": symmetric,
            "type": if float { "float" } else { "int" },
        })
    };
    let mut weights = args(bits, strategy, group, spec.symmetric, false);
    let scale_dtype = match kind {
        Kind::Nvfp4 => Some("torch.float8_e4m3fn"),
        Kind::Mxfp4 | Kind::Mxfp8 => Some("torch.uint8"),
        _ => None,
    };
    if let (Some(dtype), Value::Object(weights)) = (scale_dtype, &mut weights) {
        weights.insert("scale_dtype".into(), json!(dtype));
    }
    // Kernels for whole rows multiply 8 bits by 8 bits: activations are
    // rounded as they come.
    let activations = match (kind, spec.granularity) {
        (Kind::Int, _) | (Kind::Float, Granularity::Row | Granularity::Tensor) => {
            args(8, "token", None, true, true)
        }
        _ => Value::Null,
    };
    json!({
        "format": kind.format(),
        "input_activations": activations,
        "output_activations": null,
        "targets": targets,
        "weights": weights,
    })
}

/// The block of a 2-D block scheme, where the config names one.
pub fn block_structure(config: &Value) -> Option<(usize, usize)> {
    let groups = config
        .pointer("/quantization_config/config_groups")?
        .as_object()?;
    groups.values().find_map(|group| {
        let block = group.pointer("/weights/block_structure")?.as_array()?;
        let side = |i: usize| usize::try_from(block.get(i)?.as_u64()?).ok();
        Some((side(0)?, side(1)?)).filter(|&(h, w)| h > 0 && w > 0)
    })
}
