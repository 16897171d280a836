//! What tensors of the Llama family are called: `transformers`' names and
//! llama.cpp's.

/// Modules outside of the layers.
const OUTER: [(&str, &str); 3] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

/// Modules of layer n: `model.layers.n.…` and `blk.n.…`.
const INNER: [(&str, &str); 9] = [
    ("input_layernorm", "attn_norm"),
    (Q_PROJ, "attn_q"),
    (K_PROJ, "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

const Q_PROJ: &str = "self_attn.q_proj";
const K_PROJ: &str = "self_attn.k_proj";

/// Tables that old checkpoints keep though they follow from the configuration.
const DERIVED: &str = ".rotary_emb.inv_freq";

/// llama.cpp's name for a tensor that `transformers` calls so.
pub(super) fn to_gguf(name: &str) -> Option<String> {
    let (module, suffix) = split(name)?;
    if let Some((_, theirs)) = OUTER.iter().find(|(ours, _)| *ours == module) {
        return Some(format!("{theirs}.{suffix}"));
    }
    let (layer, inner) = layer(module, "model.layers.")?;
    let (_, theirs) = INNER.iter().find(|(ours, _)| *ours == inner)?;
    Some(format!("blk.{layer}.{theirs}.{suffix}"))
}

/// `transformers`' name for a tensor that llama.cpp calls so.
pub(super) fn from_gguf(name: &str) -> Option<String> {
    let (module, suffix) = split(name)?;
    if let Some((ours, _)) = OUTER.iter().find(|(_, theirs)| *theirs == module) {
        return Some(format!("{ours}.{suffix}"));
    }
    let (layer, inner) = layer(module, "blk.")?;
    let (ours, _) = INNER.iter().find(|(_, theirs)| *theirs == inner)?;
    Some(format!("model.layers.{layer}.{ours}.{suffix}"))
}

/// Whether a tensor of that name has no place in a GGUF file because the rest
/// of the file implies it.
pub(super) fn is_derived(name: &str) -> bool {
    name.ends_with(DERIVED)
}

/// A projection whose rows are turned by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rotated {
    Query,
    Key,
}

/// Whether `transformers`' name is that of such a projection.
pub(super) fn rotated(name: &str) -> Option<Rotated> {
    let (module, _) = split(name)?;
    match layer(module, "model.layers.")?.1 {
        Q_PROJ => Some(Rotated::Query),
        K_PROJ => Some(Rotated::Key),
        _ => None,
    }
}

fn split(name: &str) -> Option<(&str, &str)> {
    let (module, suffix) = name.rsplit_once('.')?;
    matches!(suffix, "weight" | "bias").then_some((module, suffix))
}

/// The number of a layer, in the only spelling that it has, and what follows.
fn layer<'a>(module: &'a str, prefix: &str) -> Option<(&'a str, &'a str)> {
    let (number, inner) = module.strip_prefix(prefix)?.split_once('.')?;
    let value: u32 = number.parse().ok()?;
    (value.to_string() == number).then_some((number, inner))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_translated_both_ways() {
        for (ours, theirs) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("lm_head.weight", "output.weight"),
            (
                "model.layers.0.self_attn.q_proj.weight",
                "blk.0.attn_q.weight",
            ),
            (
                "model.layers.17.self_attn.o_proj.bias",
                "blk.17.attn_output.bias",
            ),
            (
                "model.layers.3.mlp.down_proj.weight",
                "blk.3.ffn_down.weight",
            ),
            (
                "model.layers.3.post_attention_layernorm.weight",
                "blk.3.ffn_norm.weight",
            ),
        ] {
            assert_eq!(to_gguf(ours).as_deref(), Some(theirs));
            assert_eq!(from_gguf(theirs).as_deref(), Some(ours));
        }
        for (ours, theirs) in INNER {
            let (ours, theirs) = (
                format!("model.layers.5.{ours}.weight"),
                format!("blk.5.{theirs}.weight"),
            );
            assert_eq!(to_gguf(&ours), Some(theirs.clone()));
            assert_eq!(from_gguf(&theirs), Some(ours));
        }
    }

    #[test]
    fn other_names_have_no_translation() {
        for name in [
            "weight",
            "model.layers.0.self_attn.q_proj.scales",
            "model.layers.x.self_attn.q_proj.weight",
            "model.layers.00.self_attn.q_proj.weight",
            "model.layers.0.self_attn.weight",
            "transformer.h.0.attn.weight",
            "blk.0.attn_q.weight",
        ] {
            assert_eq!(to_gguf(name), None, "{name}");
        }
        assert_eq!(from_gguf("blk.0.attn_rot.weight"), None);
        assert_eq!(from_gguf("rope_freqs.weight"), None);
        assert!(is_derived("model.layers.0.self_attn.rotary_emb.inv_freq"));
    }

    #[test]
    fn queries_and_keys_are_rotated() {
        let layer = |inner| rotated(&format!("model.layers.2.{inner}"));
        assert_eq!(layer("self_attn.q_proj.weight"), Some(Rotated::Query));
        assert_eq!(layer("self_attn.k_proj.bias"), Some(Rotated::Key));
        assert_eq!(layer("self_attn.v_proj.weight"), None);
        assert_eq!(rotated("q_proj.weight"), None);
    }
}
