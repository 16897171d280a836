//! 2:4 structured sparsity: of every four weights of a row the two of greatest
//! magnitude, and where they were.
//!
//! | part | what |
//! |---|---|
//! | `values`, or `codes` and `scales` | [rows, columns/2]: the weights that stay, row after row, as floats or as `int8` or `fp8_e4m3` hold them |
//! | `bitmask` | u8 [rows, ⌈columns/8⌉]: bit c mod 8 of byte ⌊c/8⌋ says that column c stays |
//!
//! That is compressed-tensors' `sparse-24-bitmask`, byte for byte; a row of an
//! odd number of groups ends with four zero bits. A group's four bits are as
//! many as the two indices of two bits that CUTLASS and cuSPARSELt keep of it
//! (`torch.sparse.SparseSemiStructuredTensor`), the lower index in the low bits:
//!
//! | bitmask | 0011 | 0101 | 0110 | 1001 | 1010 | 1100 |
//! |---|---|---|---|---|---|---|
//! | indices | 0100 | 1000 | 1001 | 1100 | 1101 | 1110 |
//!
//! An f32 takes the room of two halves there, and so counts as two weights.
//!
//! Weights are chosen before they are rounded. Where rounding makes zeros of
//! those that stay, the choice is made again among what is left, as
//! compressed-tensors makes it of pruned and quantized weights: it moves zeros
//! only, and a tensor that has two zeros in every group keeps all its numbers.

mod grid;

use super::{fp8, int};
use crate::error::{Error, Result};
use crate::format::{
    Decode, Extremes, Format, Granularity, Grid, Input, Method, OptionValue, Options, Part,
    Quantized, Scale, Spec, Values, Zero,
};
use crate::simd::int::Scaled;
use crate::simd::runs;
use crate::simd::sink::{Out, Stored};
use crate::simd::sparsity::{GROUP, PLACES, Pick, expand, mask, pick};
use crate::simd::{Isa, Op, dispatch, small_float};
use crate::small_float::E4M3;
use crate::tensor::{DType, Tensor, element_count, narrow, widen};

/// The format.
pub struct Sparse24;

pub static SPARSE24: Sparse24 = Sparse24;

/// What holds the weights that stay.
enum Kept {
    Floats(DType),
    Quantized(&'static dyn Format),
}

impl Kept {
    fn of(values: Values) -> Kept {
        match values {
            Values::F32 => Kept::Floats(DType::F32),
            Values::F16 => Kept::Floats(DType::F16),
            Values::Source | Values::Bf16 => Kept::Floats(DType::BF16),
            Values::Int8 => Kept::Quantized(&int::INT8),
            Values::Fp8E4m3 => Kept::Quantized(&fp8::FP8_E4M3),
        }
    }
}

/// What the format of the kept weights is told.
fn inner(spec: &Spec, format: &dyn Format) -> Spec {
    Spec {
        format: format.name().into(),
        values: Values::Source,
        ..spec.clone()
    }
}

/// The spec of floats that are stored as they are.
pub fn floats(values: Values) -> Spec {
    Spec {
        format: SPARSE24.name().into(),
        method: Method::Rtn,
        granularity: Granularity::Row,
        symmetric: true,
        zero: Zero::Integer,
        scale: Scale::Step,
        scale_dtype: DType::F32,
        double_quant: false,
        act_order: false,
        input: Input::default(),
        values,
    }
}

/// Bytes of a row's bitmask.
pub fn mask_len(columns: usize) -> usize {
    columns.div_ceil(2 * GROUP)
}

fn halved(shape: &[usize]) -> Vec<usize> {
    let mut shape = shape.to_vec();
    if let Some(last) = shape.last_mut() {
        *last /= 2;
    }
    shape
}

impl Format for Sparse24 {
    fn name(&self) -> &'static str {
        "sparse24"
    }

    fn about(&self) -> &'static str {
        "2:4 sparsity: two of every four weights, as floats, int8 or fp8, and a bit a weight"
    }

    fn resolve(&self, options: &mut Options) -> Result<Spec> {
        let methods = [("rtn", Method::Rtn), ("mse", Method::Mse)];
        let values = options.take_name("values", &Values::NAMES, Values::Source)?;
        let method = options.take_name("method", &methods, Method::Rtn)?;
        let Kept::Quantized(format) = Kept::of(values) else {
            // Floats have no scale to search: either method finds them exact.
            return Ok(Spec {
                method,
                ..floats(values)
            });
        };
        let block_size = match options.take("block_size") {
            None => OptionValue::Name("row".into()),
            Some(OptionValue::Name(n)) if n == "row" || n == "tensor" => OptionValue::Name(n),
            Some(v) => {
                return Err(Error::option(
                    "block_size",
                    format!("expected row or tensor, got {v}"),
                ));
            }
        };
        let mut given = vec![
            ("method".into(), method.into()),
            ("block_size".into(), block_size),
        ];
        let scale_dtype = options.take("scale_dtype");
        given.extend(scale_dtype.map(|v| ("scale_dtype".into(), v)));
        Ok(Spec {
            format: self.name().into(),
            values,
            ..format.resolve(&mut Options::new(given))?
        })
    }

    fn options(&self, spec: &Spec) -> Vec<(&'static str, OptionValue)> {
        let mut options = vec![
            ("values", spec.values.into()),
            ("method", spec.method.into()),
        ];
        if let Kept::Quantized(_) = Kept::of(spec.values) {
            let dtype = OptionValue::Name(spec.scale_dtype.name().into());
            options.push(("block_size", spec.granularity.into()));
            options.push(("scale_dtype", dtype));
        }
        options
    }

    /// Values of the source's own dtype lose nothing.
    fn spec_for(&self, spec: &Spec, dtype: DType) -> Option<Spec> {
        let values = match (spec.values, dtype) {
            (Values::Source, DType::F32 | DType::F64) => Values::F32,
            (Values::Source, DType::F16) => Values::F16,
            // It holds every 8-bit float too.
            (Values::Source, _) => Values::Bf16,
            _ => return None,
        };
        Some(Spec {
            values,
            ..spec.clone()
        })
    }

    fn check_shape(&self, _spec: &Spec, shape: &[usize]) -> Result<()> {
        match shape.last().copied().unwrap_or(1) {
            row if row % GROUP != 0 => Err(Error::Indivisible { row, block: GROUP }),
            _ => Ok(()),
        }
    }

    fn parts(&self, spec: &Spec, shape: &[usize]) -> Result<Vec<Part>> {
        let n = element_count(shape)?;
        let row = shape.last().copied().unwrap_or(1);
        let mut parts = match Kept::of(spec.values) {
            Kept::Quantized(format) => format.parts(&inner(spec, format), &halved(shape))?,
            Kept::Floats(dtype) => vec![Part {
                name: "values",
                dtype,
                shape: halved(shape),
                block_bits: 8 * dtype.size() * spec.block_len(shape) / 2,
            }],
        };
        parts.push(Part {
            name: "bitmask",
            dtype: DType::U8,
            shape: vec![n.checked_div(row).unwrap_or(0), mask_len(row)],
            block_bits: 8 * mask_len(spec.block_len(shape)),
        });
        Ok(parts)
    }

    fn needs_extremes(&self, spec: &Spec) -> bool {
        spec.granularity == Granularity::Tensor
    }

    fn encode(
        &self,
        spec: &Spec,
        block_len: usize,
        extremes: Option<Extremes>,
        x: &[f32],
        parts: &mut [&mut [u8]],
    ) -> Result<()> {
        let Some((bitmask, parts)) = parts.split_last_mut() else {
            return Ok(());
        };
        let mut masks = vec![0u8; x.len() / GROUP];
        dispatch(Pick {
            scores: x,
            masks: &mut masks,
        });
        let (groups, _) = x.as_chunks::<GROUP>();
        let mut kept = Vec::with_capacity(x.len() / 2);
        for (group, &mask) in groups.iter().zip(&masks) {
            let (first, second) = PLACES[usize::from(mask)];
            kept.extend([group[first], group[second]]);
        }
        match Kept::of(spec.values) {
            Kept::Floats(dtype) => {
                narrow(dtype, &kept, parts[0])?;
                finite(spec, dtype, &kept, parts[0])?;
                match dtype {
                    DType::F32 => settle(&mut masks, parts[0], |b| {
                        (u32::from_le_bytes(b) & 0x7fff_ffff) as i32
                    }),
                    _ => settle(&mut masks, parts[0], |b| {
                        i32::from(u16::from_le_bytes(b) & 0x7fff)
                    }),
                }
            }
            Kept::Quantized(format) => {
                // The greatest magnitudes stay, so the extremes are those of
                // what is kept.
                format.encode(&inner(spec, format), block_len / 2, extremes, &kept, parts)?;
                settle(&mut masks, parts[0], size_of);
            }
        }
        pack(&masks, block_len, bitmask);
        Ok(())
    }

    fn finish(
        &self,
        spec: &Spec,
        extremes: Option<Extremes>,
        mut working: Vec<(&'static str, Tensor)>,
    ) -> Result<Vec<(&'static str, Tensor)>> {
        if let Kept::Quantized(format) = Kept::of(spec.values) {
            let bitmask = working.pop();
            working = format.finish(&inner(spec, format), extremes, working)?;
            working.extend(bitmask);
        }
        Ok(working)
    }

    fn check_parts(&self, q: &Quantized) -> Result<()> {
        let bitmask = q.part("bitmask")?.bytes();
        let row = q.shape.last().copied().unwrap_or(1);
        let rows = bitmask.chunks(mask_len(row).max(1));
        for (r, bits) in rows.enumerate() {
            let wrong = (0..2 * bits.len()).find(|&i| {
                let bits = if i < row / GROUP { 2 } else { 0 };
                mask(bits_of(r, bitmask, row), i).count_ones() != bits
            });
            if let Some(group) = wrong {
                return Err(Error::InvalidDump {
                    message: format!("bitmask of row {r}: group {group} does not keep two of four"),
                });
            }
        }
        Ok(())
    }

    fn grid<'a>(
        &'a self,
        spec: &'a Spec,
        extremes: Option<Extremes>,
    ) -> Result<Box<dyn Grid + 'a>> {
        Ok(Box::new(grid::SparseGrid::new(spec, extremes)?))
    }

    fn decoder<'a>(&'a self, q: &'a Quantized) -> Result<Box<dyn Decode + 'a>> {
        let (codes, scales) = match Kept::of(q.spec.values) {
            Kept::Floats(_) => (q.part("values")?, None),
            Kept::Quantized(_) => (q.part("codes")?, Some(q.part("scales")?)),
        };
        Ok(Box::new(Decoder {
            row: q.shape.last().copied().unwrap_or(1),
            codes,
            scales,
            shared: q.spec.granularity == Granularity::Tensor,
            bitmask: q.part("bitmask")?.bytes(),
        }))
    }
}

/// By what codes are compared. Of 8-bit floats too it takes the bits for integers,
/// whose least is a negative zero.
fn size_of([code]: [u8; 1]) -> i32 {
    i32::from((code as i8).wrapping_abs())
}

/// The bitmask of whole rows, from one mask a byte.
fn pack(masks: &[u8], row: usize, bitmask: &mut [u8]) {
    let rows = masks.chunks(row / GROUP);
    for (masks, row) in rows.zip(bitmask.chunks_mut(mask_len(row))) {
        for (pair, byte) in masks.chunks(2).zip(row) {
            *byte = pair[0] | pair.get(1).copied().unwrap_or(0) << 4;
        }
    }
}

/// The bitmask of one row.
fn bits_of(r: usize, bitmask: &[u8], row: usize) -> &[u8] {
    let len = mask_len(row);
    &bitmask[r * len..(r + 1) * len]
}

/// A number that overflowed its dtype would be infinite.
fn finite(spec: &Spec, dtype: DType, kept: &[f32], stored: &[u8]) -> Result<()> {
    let mut back = vec![0f32; kept.len()];
    widen(dtype, stored, &mut back);
    match back.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::option(
            "values",
            format!(
                "{} cannot hold {}; choose {}f32",
                OptionValue::from(spec.values),
                kept[at],
                if dtype == DType::F16 { "bf16 or " } else { "" },
            ),
        )),
    }
}

/// Chooses again in groups where a stored number is zero: what is dropped is
/// zero there too. The key of zero is none above it.
fn settle<const N: usize>(masks: &mut [u8], codes: &mut [u8], key: impl Fn([u8; N]) -> i32) {
    let (pairs, _) = codes.as_chunks_mut::<N>().0.as_chunks_mut::<2>();
    for (mask, pair) in masks.iter_mut().zip(pairs) {
        if pair.iter().all(|code| key(*code) > 0) {
            continue;
        }
        let (first, second) = PLACES[usize::from(*mask)];
        let mut group = [[0u8; N]; GROUP];
        (group[first], group[second]) = (pair[0], pair[1]);
        *mask = pick(group.map(&key));
        let (first, second) = PLACES[usize::from(*mask)];
        *pair = [group[first], group[second]];
    }
}

struct Decoder<'a> {
    row: usize,
    codes: &'a Tensor,
    /// Of quantized values: one a row, or one shared by all.
    scales: Option<&'a Tensor>,
    shared: bool,
    bitmask: &'a [u8],
}

impl Decode for Decoder<'_> {
    fn decode_into(&self, start: usize, out: Out) {
        let out = out.values;
        let first = start / GROUP * GROUP;
        let end = (start + out.len()).next_multiple_of(GROUP);
        if out.is_empty() {
            return;
        }
        if end - first == out.len() {
            return dispatch(DecodeRows {
                decoder: self,
                start,
                out,
            });
        }
        let mut whole = vec![0f32; end - first];
        dispatch(DecodeRows {
            decoder: self,
            start: first,
            out: &mut whole,
        });
        out.copy_from_slice(&whole[start - first..][..out.len()]);
    }
}

/// Whole groups.
struct DecodeRows<'a, 'b> {
    decoder: &'a Decoder<'b>,
    start: usize,
    out: &'a mut [f32],
}

impl Op for DecodeRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Decoder {
            row,
            codes,
            scales,
            shared,
            bitmask,
        } = *self.decoder;
        let dtype = codes.dtype();
        let mut scratch = Vec::new();
        let mut kept = [0f32; 128];
        let (mut at, mut out) = (self.start, self.out);
        while !out.is_empty() {
            let (r, column) = (at / row, at % row);
            let n = (row - column).min(out.len()).min(2 * kept.len());
            let (run, rest) = out.split_at_mut(n);
            let kept = &mut kept[..n / 2];
            let bytes = &codes.bytes()[at / 2 * dtype.size()..][..n / 2 * dtype.size()];
            match scales {
                None => widen(dtype, bytes, kept),
                Some(scales) => {
                    let of = if shared { 0 } else { r };
                    let scale = scales.f32_chunk(of..of + 1, &mut scratch)[0];
                    let kept = &mut Stored::new(isa, kept);
                    let line = Scaled {
                        zero: 0,
                        scale,
                        factor: 1.0,
                    };
                    match dtype {
                        DType::I8 => runs::decode(
                            bytes,
                            kept,
                            #[inline(always)]
                            |codes| line.values(isa, isa.load_i8(codes)),
                        ),
                        _ => small_float::decode_run(isa, E4M3, bytes, scale, kept),
                    }
                }
            }
            expand(isa, kept, bits_of(r, bitmask, row), column / GROUP, run);
            out = rest;
            at += n;
        }
    }
}
