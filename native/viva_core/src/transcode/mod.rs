//! A quantized tensor in the terms of another layout.
//!
//! A conversion is lossless when both decode to the same f32, bit for bit, zeros
//! of both signs taken for equal: it is decoded and compared, never assumed.

mod affine;
mod blocks;

use self::affine::Affine;
use crate::error::Result;
use crate::format::{
    Decode, Format, Granularity, Method, OptionValue, Quantized, Scale, Spec, Zero, spec,
};
use crate::formats::sparse24::SPARSE24;
use crate::layout::Layout;
use crate::ops::metrics::{self, Metrics};
use crate::ops::quantize::{quantize, runs};
use crate::ops::{Cancel, dequantize, pool};
use crate::simd::sink::Out;
use crate::tensor::{Buffer, DType, Tensor};
use rayon::prelude::*;

/// Formats of the affine family, with few bits first.
const AFFINE: [&str; 11] = [
    "int2", "int3", "int4", "q4_0", "q4_1", "int5", "q5_0", "q5_1", "int6", "int8", "q8_0",
];

/// What codes are chosen anew in, few bits first: of each width the formats of
/// least error that some layout holds.
const ANEW: [&str; 13] = [
    "int2", "q2_k", "int3", "q3_k", "int4", "q4_k", "nf4", "int5", "q5_k", "int6", "q6_k", "int8",
    "q8_0",
];

/// Elements that share a scale where codes are chosen anew: the shortest block
/// that every layout of integers takes. A second quantization adds its error to
/// the first one's.
const SHORT: i64 = 32;

/// Blocks that layouts' kernels take.
const BLOCKS: [usize; 4] = [128, 64, 32, 16];

/// From here on codes are kept and scales rounded: no search comes nearer.
const NEAR_DB: f64 = 60.0;

/// Bits of a code, as the names of formats tell; most where a format has none.
fn width(format: &str) -> usize {
    if format == SPARSE24.name() {
        return 8;
    }
    format
        .bytes()
        .find(u8::is_ascii_digit)
        .map_or(8, |digit| usize::from(digit - b'0'))
}

/// Bytes of the tensor under that spec, or `None` where the layout cannot hold it.
fn size(layout: &dyn Layout, spec: &Spec, name: &str, q: &Quantized) -> Option<usize> {
    layout.check(spec).ok()?;
    let entries = layout.entries(spec, name, &q.shape, q.dtype).ok()?;
    entries.nbytes().ok()
}

/// The spec under which `layout` holds `q`: its own where it can, else the
/// smallest that has the same values, else one with the same codes and scales
/// rounded the least, else one to choose codes anew in. `None` where it can hold
/// no such tensor.
pub fn choose(q: &Quantized, layout: &dyn Layout, name: &str) -> Result<Option<Spec>> {
    if size(layout, &q.spec, name, q).is_some() {
        return Ok(Some(q.spec.clone()));
    }
    let affine = Affine::of(q)?;
    if let Some(affine) = &affine {
        let exact = smallest(q, affine, layout, name, |spec| affine.fits(spec, &q.shape))?;
        if exact.is_some() {
            return Ok(exact);
        }
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let near =
                |spec: &Spec| Ok(spec.scale_dtype == dtype && affine.nearly_fits(spec, &q.shape));
            let near = smallest(q, affine, layout, name, near)?;
            if near.is_some() {
                return Ok(near);
            }
        }
    }
    let width = affine.map_or_else(|| width(&q.spec.format), |a| a.width());
    Ok(anew(q, width, layout, name))
}

/// The smallest spec of the affine family that the layout holds and `fits`.
fn smallest(
    q: &Quantized,
    affine: &Affine,
    layout: &dyn Layout,
    name: &str,
    fits: impl Fn(&Spec) -> Result<bool>,
) -> Result<Option<Spec>> {
    let mut found: Option<(usize, Spec)> = None;
    for spec in affine_specs(q, affine)? {
        let Some(bytes) = size(layout, &spec, name, q) else {
            continue;
        };
        let is_smaller = found.as_ref().is_none_or(|(least, _)| bytes < *least);
        if is_smaller && fits(&spec)? {
            found = Some((bytes, spec));
        }
    }
    Ok(found.map(|(_, spec)| spec))
}

/// Every spec of the family with blocks cut from those of `affine`; of equal
/// ones those nearest to what `q` has come first.
fn affine_specs(q: &Quantized, affine: &Affine) -> Result<Vec<Spec>> {
    let cut = |n: &usize| *n < affine.block && affine.block.is_multiple_of(*n);
    let mut blocks = vec![affine.block];
    blocks.extend(BLOCKS.into_iter().filter(cut));
    let mut granularities: Vec<Granularity> = blocks.into_iter().map(Granularity::Block).collect();
    if q.shape.last() == Some(&affine.block) {
        granularities.push(Granularity::Row);
    }
    let mut dtypes = vec![DType::F16, DType::BF16, DType::F32];
    dtypes.sort_by_key(|d| *d != q.spec.scale_dtype);
    let mut specs = Vec::new();
    for format in AFFINE {
        let plain = spec(format, Vec::new())?;
        if affine::Form::of(&plain).is_none() || format.starts_with('q') {
            specs.push(plain);
            continue;
        }
        for (symmetric, zero) in [
            (true, Zero::Integer),
            (false, Zero::Integer),
            (false, Zero::Float),
        ] {
            for &granularity in &granularities {
                for &scale_dtype in &dtypes {
                    specs.push(Spec {
                        granularity,
                        symmetric,
                        zero,
                        scale_dtype,
                        scale: Scale::Step,
                        method: Method::Rtn,
                        ..plain.clone()
                    });
                }
            }
        }
    }
    Ok(specs)
}

/// The format of as many bits, or the next that the layout holds, with the
/// method of least error that needs no data.
fn anew(q: &Quantized, bits: usize, layout: &dyn Layout, name: &str) -> Option<Spec> {
    let method = ("method", OptionValue::Name("mse".into()));
    let short = ("block_size", OptionValue::Int(SHORT));
    let held = |format: &str| {
        let tries = match format.starts_with("int") {
            true => [
                vec![method.clone(), short.clone()],
                vec![method.clone()],
                vec![],
            ],
            false => [vec![method.clone()], vec![], vec![]],
        };
        tries.into_iter().find_map(|options| {
            let mut all = layout.defaults(format);
            all.extend(options.into_iter().map(|(k, v)| (k.to_string(), v)));
            let spec = spec(format, all).ok()?;
            layout.check(&spec).ok()?;
            let spec = layout.spec_for(&spec, &q.shape).ok()?.into_owned();
            size(layout, &spec, name, q).map(|_| spec)
        })
    };
    let enough = |format: &&&str| width(format) >= bits;
    let wide = ANEW.iter().filter(enough).find_map(|format| held(format));
    wide.or_else(|| ANEW.iter().rev().find_map(|format| held(format)))
}

/// What came of the values.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// Values that are others now.
    pub changed: usize,
    /// The error, where there is one.
    pub metrics: Option<Metrics>,
}

impl Change {
    pub const NONE: Change = Change {
        changed: 0,
        metrics: None,
    };

    pub fn is_lossless(&self) -> bool {
        self.changed == 0
    }
}

/// `q` under another spec: with its codes where they mean the same or nearly so,
/// or else chosen anew from its values.
///
/// # Errors
/// `NonFinite` where values to choose codes for are not finite, `Cancelled`.
pub fn transcode(q: &Quantized, spec: &Spec, cancel: &Cancel) -> Result<(Quantized, Change)> {
    if q.spec == *spec {
        return Ok((q.clone(), Change::NONE));
    }
    let renamed = match Affine::of(q)? {
        Some(affine) => affine.renamed(q, spec)?,
        None => None,
    };
    if let Some(renamed) = &renamed
        && changed(q, renamed, cancel)? == 0
    {
        return Ok((renamed.clone(), Change::NONE));
    }
    let values = dequantized(q, DType::F32, cancel)?;
    let measured = |made: Quantized| {
        let metrics = metrics::quantized(&values, &made, cancel)?;
        Ok((made, metrics))
    };
    let renamed = renamed.map(measured).transpose()?;
    let best = match renamed {
        Some(near) if near.1.sqnr_db >= NEAR_DB => near,
        other => {
            let made = quantize(&values, spec, cancel).and_then(measured);
            match (other, made) {
                (None, made) => made?,
                (Some(kept), Ok(made)) if kept.1.sqnr_db < made.1.sqnr_db => made,
                (Some(kept), _) => kept,
            }
        }
    };
    let (mut made, metrics) = best;
    made.dtype = q.dtype;
    let change = Change {
        changed: changed(q, &made, cancel)?,
        metrics: Some(metrics),
    };
    Ok((made, change))
}

/// What became of the values of `q` in `made`.
pub fn difference(q: &Quantized, made: &Quantized, cancel: &Cancel) -> Result<Change> {
    let changed = changed(q, made, cancel)?;
    let metrics = match changed {
        0 => None,
        _ => {
            let values = dequantized(q, DType::F32, cancel)?;
            Some(metrics::quantized(&values, made, cancel)?)
        }
    };
    Ok(Change { changed, metrics })
}

/// The values of `q` in that dtype.
pub fn dequantized(q: &Quantized, dtype: DType, cancel: &Cancel) -> Result<Tensor> {
    let mut buffer = Buffer::zeroed(dequantize::dequantized_len(q, dtype));
    dequantize::dequantize_into(q, dtype, buffer.bytes_mut(), cancel)?;
    Tensor::from_buffer(dtype, q.shape.clone(), buffer)
}

/// How many elements decode to another value.
fn changed(a: &Quantized, b: &Quantized, cancel: &Cancel) -> Result<usize> {
    let (a, n) = (a.spec.format()?.decoder(a)?, a.len());
    let b = b.spec.format()?.decoder(b)?;
    count(n, &*a, &*b, cancel)
}

/// How the values of a dense tensor changed from those of `from`.
pub fn change(from: &dyn Decode, to: &Tensor, cancel: &Cancel) -> Result<Change> {
    let changed = count(to.len(), from, &Dense(to), cancel)?;
    let metrics = match changed {
        0 => None,
        _ => {
            let mut values = Buffer::zeroed(to.len() * 4);
            let all: &mut [f32] = bytemuck::cast_slice_mut(values.bytes_mut());
            from.decode(0, all);
            let values = Tensor::from_buffer(DType::F32, to.shape().to_vec(), values)?;
            Some(metrics::dense(&values, to, cancel)?)
        }
    };
    Ok(Change { changed, metrics })
}

/// A dense tensor, read as a quantized one is.
pub struct Dense<'a>(pub &'a Tensor);

impl Decode for Dense<'_> {
    fn decode_into(&self, start: usize, out: Out) {
        let out = out.values;
        let mut scratch = Vec::new();
        out.copy_from_slice(self.0.f32_chunk(start..start + out.len(), &mut scratch));
    }
}

fn count(n: usize, a: &dyn Decode, b: &dyn Decode, cancel: &Cancel) -> Result<usize> {
    pool::run(|| {
        runs(n)
            .map_init(
                || (Vec::new(), Vec::new()),
                |(x, y), range| {
                    cancel.check()?;
                    x.resize(range.len(), 0f32);
                    y.resize(range.len(), 0f32);
                    a.decode(range.start, x);
                    b.decode(range.start, y);
                    let same = |(x, y): &(&f32, &f32)| x == y || (x.is_nan() && y.is_nan());
                    Ok(x.iter().zip(y.iter()).filter(|pair| !same(pair)).count())
                },
            )
            .try_reduce(|| 0, |a, b| Ok(a + b))
    })
}
