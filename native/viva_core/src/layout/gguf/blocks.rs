//! Quantized tensors as ggml's blocks.
//!
//! Most of ggml's formats are blocks in memory too, and stand in a file as they
//! are. mxfp4 and nvfp4 keep codes and scales apart; in a file they are
//!
//! | | elements | scales | codes |
//! |---|---|---|---|
//! | mxfp4 | 32 | 1 | 16 bytes: byte i has element i in its low half, i + 16 in its high one |
//! | nvfp4 | 64 | 4 | four times 8 bytes: element i, and i + 8 |
//!
//! and what all scales of an nvfp4 weight are multiplied with is a tensor beside
//! it, `….scale`: the inverse of our global scale. ggml's table has twice our
//! elements and takes half of each scale, which comes to the same values. Two
//! things differ: a negative zero is a positive one there, and the codes of E4M3
//! and E8M0 that are no positive number have some value there; they are refused.

use std::borrow::Cow;

use super::{BLOCKS, in_file, invalid};
use crate::error::{Error, Result};
use crate::format::{Format, OptionValue, Quantized, Scale, Spec};
use crate::formats::ggml_types::GgmlType;
use crate::io::{Checkpoint, Entry};
use crate::small_float::e8m0;
use crate::tensor::{DType, Tensor};

const WEIGHT: &str = ".weight";
const SCALE: &str = ".scale";

/// How codes that stand apart from their scales lie in blocks.
struct Apart {
    format: &'static str,
    /// Scales of a block.
    scales: usize,
    /// Elements under one scale.
    run: usize,
    scale_dtype: DType,
    /// The greatest code of a scale that is a number.
    most: u8,
}

const APART: [Apart; 2] = [
    Apart {
        format: "mxfp4",
        scales: 1,
        run: 32,
        scale_dtype: DType::F8E8M0,
        most: e8m0::NAN - 1,
    },
    Apart {
        format: "nvfp4",
        scales: 4,
        run: 16,
        scale_dtype: DType::F8E4M3,
        most: 0x7e,
    },
];

fn apart(format: &str) -> Option<&'static Apart> {
    APART.iter().find(|a| a.format == format)
}

impl Apart {
    fn code_bytes(&self) -> usize {
        self.scales * self.run / 2
    }

    fn block_bytes(&self) -> usize {
        self.scales + self.code_bytes()
    }

    fn join(&self, codes: &[u8], scales: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(codes.len() + scales.len());
        let blocks = codes.chunks(self.code_bytes());
        for (codes, scales) in blocks.zip(scales.chunks(self.scales)) {
            out.extend_from_slice(scales);
            for pairs in codes.chunks(self.run / 2) {
                let (low, high) = pairs.split_at(pairs.len() / 2);
                for (low, high) in low.iter().zip(high) {
                    out.push((low & 15) | (high << 4));
                    out.push((low >> 4) | (high & 0xf0));
                }
            }
        }
        out
    }

    fn split(&self, blocks: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let n = blocks.len() / self.block_bytes();
        let mut scales = Vec::with_capacity(n * self.scales);
        let mut codes = Vec::with_capacity(n * self.code_bytes());
        for block in blocks.chunks_exact(self.block_bytes()) {
            let (own, halves) = block.split_at(self.scales);
            scales.extend_from_slice(own);
            for halves in halves.chunks(self.run / 2) {
                let (pairs, _) = halves.as_chunks::<2>();
                codes.extend(pairs.iter().map(|[a, b]| (a & 15) | (b << 4)));
                codes.extend(pairs.iter().map(|[a, b]| (a >> 4) | (b & 0xf0)));
            }
        }
        (codes, scales)
    }
}

/// ggml's type of a format that can stand in a file.
pub(super) fn block_type(spec: &Spec) -> Option<&'static GgmlType> {
    let ggml = GgmlType::by_name(&spec.format)?;
    if apart(&spec.format).is_some() {
        return Some(ggml);
    }
    let parts = spec.format().ok()?.parts(spec, &[ggml.block_len]).ok()?;
    matches!(&parts[..], [part] if part.name == BLOCKS).then_some(ggml)
}

/// Format options where a user chose none: ggml's own rule for mxfp4, and for
/// nvfp4 a global scale that llama.cpp can multiply with instead of dividing by
/// it. Without one, as ggml quantizes, most scales of a trained model would be
/// subnormal numbers.
pub(super) fn defaults(format: &str) -> Vec<(String, OptionValue)> {
    let rule = match format {
        "mxfp4" => Scale::Ggml,
        "nvfp4" => Scale::Floor,
        _ => return Vec::new(),
    };
    vec![("scale".into(), rule.into())]
}

/// The tensor beside a weight that multiplies it, if it has one.
pub(super) fn scale_name(spec: &Spec, weight: &str) -> Option<String> {
    let module = weight.strip_suffix(WEIGHT)?;
    let has_one = spec.format == "nvfp4" && spec.scale != Scale::Ggml;
    has_one.then(|| format!("{module}{SCALE}"))
}

/// The quantized weight whose scale this entry is.
pub fn scaled_weight<'a>(source: &'a Checkpoint, entry: &Entry) -> Option<&'a Entry> {
    source.gguf_metadata()?;
    let module = entry.name.strip_suffix(SCALE)?;
    let weight = source.entry(&format!("{module}{WEIGHT}")).ok()?;
    (weight.dtype.name() == "nvfp4").then_some(weight)
}

/// The scale beside a weight, where it has one.
pub fn weight_scale<'a>(source: &'a Checkpoint, weight: &Entry) -> Option<&'a Entry> {
    // First, since looking for what is not there looks for what it may be instead.
    source.gguf_metadata()?;
    let module = weight.name.strip_suffix(WEIGHT)?;
    let scale = source.entry(&format!("{module}{SCALE}")).ok()?;
    scaled_weight(source, scale).map(|_| scale)
}

/// The tensors that spell a quantized weight.
pub(super) fn spell<'a>(name: &str, q: &'a Quantized) -> Result<super::Spelled<'a>> {
    let name = in_file(name)?;
    let Some(apart) = apart(&q.spec.format) else {
        return Ok(vec![(name, Cow::Borrowed(q.part(BLOCKS)?.bytes()))]);
    };
    let blocks = apart.join(q.part("codes")?.bytes(), q.part("scales")?.bytes());
    let scale = scale_name(&q.spec, &name);
    let mut spelled = vec![(name, Cow::Owned(blocks))];
    if let Some(scale) = scale {
        let global = q.part("global_scale")?.to_f32_vec()[0];
        spelled.push((scale, Cow::Owned((1.0 / global).to_le_bytes().to_vec())));
    }
    Ok(spelled)
}

/// A global scale that is no power of two changes by being inverted twice.
pub(super) fn read_back(q: &Quantized) -> Result<Option<Quantized>> {
    if scale_name(&q.spec, WEIGHT).is_none() {
        return Ok(None);
    }
    let mut back = q.clone();
    for (name, part) in &mut back.parts {
        if *name == "global_scale" {
            let twice = 1.0 / (1.0 / part.to_f32_vec()[0]);
            *part = Tensor::from_slice(DType::F32, part.shape(), &[twice])?;
        }
    }
    Ok(Some(back))
}

/// The quantized tensor that an entry of ggml's blocks is.
pub fn quantized(source: &Checkpoint, entry: &Entry, ggml: &GgmlType) -> Result<Quantized> {
    if crate::format::format(ggml.name).is_err() {
        let message = format!(
            "is of ggml's type {}, which can be listed here but not decoded: take the model in \
             another, such as q8_0 or q4_k",
            ggml.name
        );
        return Err(invalid(&entry.name, message));
    }
    let mut spec = crate::format::spec(ggml.name, defaults(ggml.name))?;
    if weight_scale(source, entry).is_none() && ggml.name == "nvfp4" {
        spec.scale = Scale::Ggml;
    }
    let format = spec.format()?;
    let parts = match apart(ggml.name) {
        Some(apart) => parts_apart(apart, source, entry, format, &spec)?,
        None => {
            let parts = format.parts(&spec, &entry.shape)?;
            let [part] = &parts[..] else {
                let message = format!("{} is not stored in blocks here", ggml.name);
                return Err(invalid(&entry.name, message));
            };
            let bytes = source.byte_tensor(&entry.name)?;
            vec![(part.name, bytes.reshaped(part.shape.clone())?)]
        }
    };
    let q = Quantized {
        parts,
        spec,
        shape: entry.shape.clone(),
        // ggml computes with it in f32.
        dtype: DType::F32,
    };
    q.validate()?;
    Ok(q)
}

type Parts = Vec<(&'static str, Tensor)>;

fn parts_apart(
    apart: &Apart,
    source: &Checkpoint,
    entry: &Entry,
    format: &dyn Format,
    spec: &Spec,
) -> Result<Parts> {
    let (codes, scales) = apart.split(source.bytes(&entry.name)?);
    if let Some(block) = scales.iter().position(|&code| code > apart.most) {
        let message = format!(
            "scale {block} has the code {:#04x}, which is no positive number in {}: the file is \
             damaged",
            scales[block],
            apart.scale_dtype.name()
        );
        return Err(invalid(&entry.name, message));
    }
    let mut parts = Parts::new();
    for part in format.parts(spec, &entry.shape)? {
        let tensor = match part.name {
            "codes" => Tensor::from_slice(part.dtype, &part.shape, &codes)?,
            "scales" => Tensor::from_slice(part.dtype, &part.shape, &scales)?,
            _ => Tensor::from_slice(part.dtype, &part.shape, &[global_scale(source, entry)?])?,
        };
        parts.push((part.name, tensor));
    }
    Ok(parts)
}

/// The inverse of the scale beside a weight; 1 where there is none.
fn global_scale(source: &Checkpoint, weight: &Entry) -> Result<f32> {
    let Some(entry) = weight_scale(source, weight) else {
        return Ok(1.0);
    };
    match source.tensor(&entry.name)?.to_f32_vec()[..] {
        [scale] if scale > 0.0 && scale.is_finite() => Ok(1.0 / scale),
        [scale] => Err(invalid(
            &entry.name,
            format!(
                "the scale of {} is {scale}, not a positive number",
                weight.name
            ),
        )),
        _ => Err(Error::ShapeMismatch {
            what: entry.name.clone(),
            expected: vec![1],
            actual: entry.shape.clone(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_hold_halves_and_come_apart_again() {
        for apart in &APART {
            let ggml = GgmlType::by_name(apart.format).unwrap();
            assert_eq!(ggml.block_len, apart.scales * apart.run);
            assert_eq!(ggml.block_bytes, apart.block_bytes());
            let codes: Vec<u8> = (0..2 * apart.code_bytes()).map(|i| (i * 7) as u8).collect();
            let scales: Vec<u8> = (0..2 * apart.scales).map(|i| i as u8).collect();
            let blocks = apart.join(&codes, &scales);
            assert_eq!(blocks.len(), 2 * ggml.block_bytes);
            assert_eq!(blocks[..apart.scales], scales[..apart.scales]);
            let element = |i: usize| codes[i / 2] >> (4 * (i % 2)) & 15;
            for i in 0..apart.run / 2 {
                let both = element(i) | (element(i + apart.run / 2) << 4);
                assert_eq!(blocks[apart.scales + i], both);
            }
            assert_eq!(apart.split(&blocks), (codes, scales));
        }
    }
}
