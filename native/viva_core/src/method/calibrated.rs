//! Quantizing one weight by what its activations show.

use super::awq::{self, Weight};
use super::candidates::DuoScaling;
use super::gptq::{self, Gptq, Order};
use super::input;
use super::sparsity::Sparsity;
use crate::calibration::Statistics;
use crate::error::{Error, Result};
use crate::format::{INPUT_SCALE, Input, Method, OptionValue, Options, Quantized, Spec, spec};
use crate::ops::quantize::{check_floats, quantize};
use crate::ops::{Cancel, pool};
use crate::tensor::{DType, Tensor};

/// How columns are scaled before they are rounded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    None,
    /// What costs least of the output, among powers of mean magnitudes.
    Awq(DuoScaling),
    /// max|x|^α / max|w|^(1−α), with α = 1/2: activations and weights share what
    /// makes both hard to round (Xiao et al., "SmoothQuant", 2022).
    Smooth,
}

/// What is done to a weight, in this order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Calibrated {
    /// Rotate the input first.
    pub rotate: bool,
    pub scaling: Scaling,
    /// Clip blocks where that costs less of the output.
    pub clip: bool,
    /// Round column by column; otherwise by the spec's own method.
    pub gptq: Option<Gptq>,
}

/// The names of methods that see activations.
pub const METHODS: [&str; 5] = ["awq", "gptq", "awq_gptq", "smoothquant", "rotate"];

/// Takes a method that sees activations, with its own options, out of those of a
/// user: what it is, where `method` names one of [`METHODS`], and the options of
/// the format. `scales` is then the format's own method, by which scales are
/// chosen.
///
/// # Errors
/// `InvalidOption`.
pub fn take(given: Vec<(String, OptionValue)>) -> Result<(Option<Calibrated>, Given)> {
    let named = given.iter().rev().find(|(name, _)| name == "method");
    let method = match named {
        Some((_, OptionValue::Name(name))) => METHODS.into_iter().find(|m| m == name),
        _ => None,
    };
    let Some(method) = method else {
        return Ok((None, given));
    };
    let mut options = Options::new(given);
    options.take("method");
    let gptq = match method.ends_with("gptq") {
        false => None,
        true => {
            let kinds = Sparsity::ALL.map(|sparsity| (sparsity.name(), Some(sparsity)));
            let sparsity = options.take_name("sparsity", &kinds, None)?;
            let defaults = Gptq::default();
            let order = match sparsity {
                Some(_) => Order::Natural,
                None => defaults.order,
            };
            Some(Gptq {
                damping: take_damping(&mut options, defaults.damping)?,
                order: options.take_name("order", &ORDERS, order)?,
                sparsity,
            })
        }
    };
    let how = Calibrated {
        rotate: options.take_bool("rotate", method == "rotate")?,
        scaling: match method {
            "awq" | "awq_gptq" => Scaling::Awq(take_duo_scaling(&mut options)?),
            "smoothquant" => Scaling::Smooth,
            _ => Scaling::None,
        },
        // GPTQ makes up for what clipping would give.
        clip: method == "awq" && options.take_bool("clip", true)?,
        gptq,
    };
    let mut rest = options.rest();
    for (name, _) in &mut rest {
        if name == "scales" {
            *name = "method".into();
        }
    }
    // There scales are tried out on the output, at little cost.
    if gptq.is_some() && !rest.iter().any(|(name, _)| name == "method") {
        rest.push(("method".into(), Method::Mse.into()));
    }
    Ok((Some(how), rest))
}

/// Options as a user gave them.
type Given = Vec<(String, OptionValue)>;

/// A format's spec, and what is done to a weight before, from a user's options.
///
/// # Errors
/// `InvalidOption`, and those of [`spec`].
pub fn resolve(format: &str, given: Given) -> Result<(Spec, Calibrated)> {
    match take(given)? {
        (Some(how), rest) => Ok((spec(format, rest)?, how)),
        (None, _) => Err(Error::option(
            "method",
            format!("expected one of {}", METHODS.join(", ")),
        )),
    }
}

const ORDERS: [(&str, Order); 2] = [
    ("activation", Order::Activation),
    ("natural", Order::Natural),
];

impl Calibrated {
    /// The options that give it again, beside those of the format.
    pub fn options(&self) -> Vec<(&'static str, OptionValue)> {
        let name = |name: &str| OptionValue::Name(name.into());
        let method = match (self.scaling, self.gptq.is_some()) {
            (Scaling::Awq(_), false) => "awq",
            (Scaling::Awq(_), true) => "awq_gptq",
            (Scaling::Smooth, _) => "smoothquant",
            (Scaling::None, true) => "gptq",
            (Scaling::None, false) => "rotate",
        };
        let mut options = vec![("method", name(method))];
        if let Some(gptq) = &self.gptq {
            // As it prints: 0.01, not the f64 next to that f32.
            let damping = gptq.damping.to_string().parse().unwrap_or(0.0);
            options.push(("damping", OptionValue::Float(damping)));
            let order = ORDERS.iter().find(|(_, order)| *order == gptq.order);
            options.extend(order.map(|(order, _)| ("order", name(order))));
            let sparsity = gptq.sparsity.map(|s| ("sparsity", name(s.name())));
            options.extend(sparsity);
        }
        if let Scaling::Awq(duo) = self.scaling {
            options.push((
                "duo_scaling",
                match duo {
                    DuoScaling::No => OptionValue::Bool(false),
                    DuoScaling::Yes => OptionValue::Bool(true),
                    DuoScaling::Both => name("both"),
                },
            ));
        }
        if method == "awq" {
            options.push(("clip", OptionValue::Bool(self.clip)));
        }
        if self.rotate {
            options.push(("rotate", OptionValue::Bool(true)));
        }
        options
    }
}

fn take_duo_scaling(options: &mut Options) -> Result<DuoScaling> {
    match options.take("duo_scaling") {
        None => Ok(DuoScaling::default()),
        Some(OptionValue::Bool(false)) => Ok(DuoScaling::No),
        Some(OptionValue::Bool(true)) => Ok(DuoScaling::Yes),
        Some(OptionValue::Name(both)) if both == "both" => Ok(DuoScaling::Both),
        Some(v) => Err(Error::option(
            "duo_scaling",
            format!("expected true, false or both, got {v}"),
        )),
    }
}

pub(super) fn take_damping(options: &mut Options, default: f32) -> Result<f32> {
    match options.take("damping") {
        None => Ok(default),
        Some(OptionValue::Float(v)) if v > 0.0 && v <= 1.0 => Ok(v as f32),
        Some(v) => Err(Error::option(
            "damping",
            format!("expected a part of the mean of the diagonal, over 0.0 up to 1.0, got {v}"),
        )),
    }
}

/// Quantizes `w` for inputs like those that `statistics` saw.
///
/// # Errors
/// `ShapeMismatch` unless w is a matrix whose rows have as many columns as the
/// statistics, and those of the methods.
pub fn quantize_calibrated(
    w: &Tensor,
    spec: &Spec,
    statistics: &Statistics,
    how: &Calibrated,
    cancel: &Cancel,
) -> Result<Quantized> {
    check(w, statistics)?;
    check_floats(w)?;
    let spec = &*spec.for_dtype(w.dtype())?;
    if w.is_empty() {
        return quantize(w, spec, cancel);
    }
    spec.format()?.check_shape(spec, w.shape())?;
    let mut weights = w.to_f32_vec();
    let mut seen = Seen::of(statistics);
    if how.rotate {
        input::rotate(&mut weights, seen.columns);
        seen.rotate(cancel)?;
    }
    let scales = match how.scaling {
        Scaling::None => None,
        _ => {
            let w = Tensor::from_slice(DType::F32, w.shape(), &weights)?;
            seen.scales(&[(&w, spec)], how, cancel)?
        }
    };
    finish(w, weights, spec, seen, how, scales.as_deref(), cancel)
}

/// The same with the scales of columns that were chosen before, if any.
///
/// # Errors
/// Those of [`quantize_calibrated`]; `InvalidOption` of a rotation.
pub fn quantize_scaled(
    w: &Tensor,
    spec: &Spec,
    statistics: &Statistics,
    how: &Calibrated,
    scales: Option<&[f32]>,
    cancel: &Cancel,
) -> Result<Quantized> {
    check(w, statistics)?;
    check_floats(w)?;
    if how.rotate {
        return Err(Error::option(
            "rotate",
            "scales are chosen after a rotation",
        ));
    }
    let spec = &*spec.for_dtype(w.dtype())?;
    if w.is_empty() {
        return quantize(w, spec, cancel);
    }
    spec.format()?.check_shape(spec, w.shape())?;
    let seen = Seen::of(statistics);
    finish(w, w.to_f32_vec(), spec, seen, how, scales, cancel)
}

/// The scales of columns that weights which read one input share; `None` where it
/// is best to leave them.
///
/// # Errors
/// `ShapeMismatch` unless the rows of all have as many columns as the statistics,
/// and those of the search.
pub fn shared_scales(
    weights: &[Weight],
    statistics: &Statistics,
    how: &Calibrated,
    cancel: &Cancel,
) -> Result<Option<Vec<f32>>> {
    for (w, _) in weights {
        check(w, statistics)?;
        check_floats(w)?;
    }
    Seen::of(statistics).scales(weights, how, cancel)
}

/// What comes after scales are chosen; `weights` are those of `w`, rotated.
fn finish(
    w: &Tensor,
    mut weights: Vec<f32>,
    spec: &Spec,
    mut seen: Seen,
    how: &Calibrated,
    scales: Option<&[f32]>,
    cancel: &Cancel,
) -> Result<Quantized> {
    let k = seen.columns;
    // What activations are multiplied by, and weights divided by.
    let factors: Option<Vec<f32>> = scales.map(|s| s.iter().map(|s| 1.0 / s).collect());
    if let Some(factors) = &factors {
        let back: Vec<f32> = factors.iter().map(|f| 1.0 / f).collect();
        input::scale(&mut weights, &back);
        seen.scale(factors);
    }
    if how.clip {
        awq::clip(&mut weights, k, spec, &seen.gram, cancel)?;
    }
    let prepared = Tensor::from_slice(DType::F32, w.shape(), &weights)?;
    let mut q = match &how.gptq {
        Some(options) => gptq::quantize(&prepared, spec, &seen.gram, options, cancel)?,
        None => quantize(&prepared, spec, cancel)?,
    };
    q.dtype = w.dtype();
    q.spec.input = Input {
        rotated: how.rotate,
        scaled: factors.is_some(),
    };
    if let Some(factors) = factors {
        let part = Tensor::from_slice(DType::F32, &[k], &factors)?;
        q.parts.push((INPUT_SCALE, part));
    }
    Ok(q)
}

/// That what was seen is what `w` meets.
pub(super) fn check(w: &Tensor, statistics: &Statistics) -> Result<()> {
    let k = statistics.columns();
    if w.shape().len() != 2 || w.row_len() != k {
        return Err(Error::ShapeMismatch {
            what: "a weight [n, k] for activations of k columns".into(),
            expected: vec![w.len() / w.row_len().max(1), k],
            actual: w.shape().to_vec(),
        });
    }
    match statistics.tokens() {
        0 => Err(Error::option(
            "activations",
            "there are none; record at least one row",
        )),
        _ => Ok(()),
    }
}

/// What was seen, as the codes will see it.
struct Seen {
    columns: usize,
    mean_abs: Vec<f32>,
    max_abs: Vec<f32>,
    gram: super::gram::Gram,
    samples: Vec<f32>,
}

impl Seen {
    fn of(statistics: &Statistics) -> Seen {
        Seen {
            columns: statistics.columns(),
            mean_abs: statistics.mean_abs(),
            max_abs: statistics.max_abs().to_vec(),
            gram: statistics.gram().clone(),
            samples: statistics.samples(),
        }
    }

    fn scales(
        &self,
        weights: &[Weight],
        how: &Calibrated,
        cancel: &Cancel,
    ) -> Result<Option<Vec<f32>>> {
        let mean = &self.mean_abs;
        match (how.scaling, &how.gptq) {
            (Scaling::None, _) => Ok(None),
            (Scaling::Awq(duo), None) => awq::search(weights, &self.samples, mean, duo, cancel),
            (Scaling::Awq(duo), Some(options)) => {
                awq::search_with_gptq(weights, &self.gram, mean, duo, options, cancel)
            }
            (Scaling::Smooth, _) => Ok(Some(smooth(weights, &self.max_abs))),
        }
    }

    fn rotate(&mut self, cancel: &Cancel) -> Result<()> {
        let k = self.columns;
        input::rotate(&mut self.samples, k);
        self.gram = pool::run(|| self.gram.rotated(cancel))?;
        // Means and maxima do not rotate: those of the kept rows stand for all.
        let tokens = (self.samples.len() / k).max(1) as f32;
        self.mean_abs = vec![0.0; k];
        self.max_abs = vec![0.0; k];
        for row in self.samples.chunks_exact(k) {
            let columns = self.mean_abs.iter_mut().zip(&mut self.max_abs);
            for ((mean, most), v) in columns.zip(row) {
                *mean += v.abs() / tokens;
                *most = most.max(v.abs());
            }
        }
        Ok(())
    }

    fn scale(&mut self, factors: &[f32]) {
        input::scale(&mut self.samples, factors);
        input::scale(&mut self.mean_abs, factors);
        input::scale(&mut self.max_abs, factors);
        self.gram = self.gram.scaled(factors);
    }
}

fn smooth(weights: &[Weight], max_abs: &[f32]) -> Vec<f32> {
    let k = max_abs.len();
    let mut most = vec![0f32; k];
    let mut scratch = Vec::new();
    for (w, _) in weights {
        for first in (0..w.len()).step_by(k) {
            let row = w.f32_chunk(first..first + k, &mut scratch);
            for (most, w) in most.iter_mut().zip(row) {
                *most = most.max(w.abs());
            }
        }
    }
    max_abs
        .iter()
        .zip(most)
        .map(|(x, w)| match x.sqrt() / w.sqrt() {
            // A column of zeros on either side is as good in any scale.
            s if s.is_normal() => s.max(1e-5),
            _ => 1.0,
        })
        .collect()
}
