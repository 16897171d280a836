//! Statistics of activations, and methods that use them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use rustler::{Atom, Encoder, Env, Term};
use viva_core::Error;
use viva_core::calibration::{Calibration, Recorded, Statistics};
use viva_core::method::fold::{self, Group, Observed};
use viva_core::method::{calibrated, sparsity};
use viva_core::ops::Cancel;

use crate::error::Outcome;
use crate::record::Bytes;
use crate::resource::{
    CalibrationRef, CalibrationResource, CancelRef, CheckpointRef, ObservedRef, ObservedResource,
    TargetRef, TensorRef, tensor_from_binary,
};
use crate::terms::{self, Name, Options};

fn resource(calibration: Calibration) -> CalibrationRef {
    CalibrationRef::new(CalibrationResource(Mutex::new(calibration)))
}

/// Held for as long as one batch is added, never while one is summed up.
fn lock(calibration: &CalibrationRef) -> MutexGuard<'_, Calibration> {
    calibration.0.lock().unwrap_or_else(|e| e.into_inner())
}

#[rustler::nif]
fn calibration_new(samples: usize) -> CalibrationRef {
    resource(Calibration::new(samples))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn calibration_add(calibration: CalibrationRef, layer: String, x: TensorRef) -> Outcome<Atom> {
    let samples = lock(&calibration).samples();
    let batch = Statistics::of(&*x.0.get()?, samples, &Cancel::new())?;
    lock(&calibration).add(&layer, batch)?;
    Ok(rustler::types::atom::ok())
}

#[rustler::nif(schedule = "DirtyCpu")]
fn calibration_merge(calibration: CalibrationRef, other: CalibrationRef) -> Outcome<Atom> {
    // A copy, so that two that merge into each other do not wait for each other.
    let other = lock(&other).clone();
    lock(&calibration).merge(&other)?;
    Ok(rustler::types::atom::ok())
}

#[rustler::nif(schedule = "DirtyIo")]
fn calibration_save(calibration: CalibrationRef, path: String) -> Outcome<Atom> {
    let calibration = lock(&calibration).clone();
    calibration.save(Path::new(&path))?;
    Ok(rustler::types::atom::ok())
}

#[rustler::nif(schedule = "DirtyIo")]
fn calibration_load(path: String) -> Outcome<CalibrationRef> {
    Ok(resource(Calibration::load(Path::new(&path))?))
}

#[rustler::nif]
fn calibration_layers<'a>(env: Env<'a>, calibration: CalibrationRef) -> Vec<Term<'a>> {
    lock(&calibration)
        .layers()
        .map(|(name, s)| {
            terms::map(
                env,
                &[
                    ("name", name.encode(env)),
                    ("columns", s.columns().encode(env)),
                    ("tokens", s.tokens().encode(env)),
                ],
            )
        })
        .collect()
}

/// What a job looks at: a copy of a calibration as it is now, or a file of one.
#[rustler::nif(schedule = "DirtyIo")]
fn observed_copy(calibration: CalibrationRef) -> ObservedRef {
    let recorded = Recorded::Memory(lock(&calibration).clone());
    ObservedRef::new(ObservedResource(Observed::new(recorded)))
}

#[rustler::nif(schedule = "DirtyIo")]
fn observed_open(path: String) -> Outcome<ObservedRef> {
    let recorded = Recorded::open(Path::new(&path))?;
    Ok(ObservedRef::new(ObservedResource(Observed::new(recorded))))
}

/// `%{layer => %{columns, tokens}}`.
#[rustler::nif(schedule = "DirtyIo")]
fn observed_layers<'a>(env: Env<'a>, observed: ObservedRef) -> Outcome<HashMap<String, Term<'a>>> {
    let recorded = observed.0.recorded();
    let layers = recorded.layers().into_iter().map(|(name, columns)| {
        let tokens = recorded.tokens(name)?;
        let fields = [
            ("columns", columns.encode(env)),
            ("tokens", tokens.encode(env)),
        ];
        Ok((name.to_string(), terms::map(env, &fields)))
    });
    Ok(layers.collect::<Result<_, viva_core::Error>>()?)
}

/// `{into, into_rows?, readers}`.
type GroupTerm = (String, bool, Vec<String>);

/// `{name, reason}`.
type UnscaledTerm = (String, String);

/// The groups of weights whose columns share scales, and the weights that have
/// none.
#[rustler::nif(schedule = "DirtyCpu")]
fn fold_groups(
    source: CheckpointRef,
    target: TargetRef,
    quantized: Vec<String>,
) -> Outcome<(Vec<GroupTerm>, Vec<UnscaledTerm>)> {
    let found = fold::groups(&*source.0.get()?, &target.0, &quantized);
    let groups = found.groups.into_iter();
    let groups = groups.map(|g| (g.into, g.rows, g.readers)).collect();
    Ok((groups, found.unscaled))
}

fn group((into, rows, readers): GroupTerm) -> Group {
    Group {
        into,
        rows,
        readers,
    }
}

/// The scales of a group, f32 in little-endian order, or nil where none are better.
#[rustler::nif(schedule = "DirtyCpu")]
fn fold_search(
    observed: ObservedRef,
    source: CheckpointRef,
    target: TargetRef,
    term: GroupTerm,
    cancel: CancelRef,
) -> Outcome<Option<Bytes>> {
    let source = source.0.get()?;
    let scales = (observed.0).search(&source, &target.0, &group(term), &*cancel.enter()?)?;
    let bytes = |s: Vec<f32>| s.into_iter().flat_map(f32::to_le_bytes).collect();
    Ok(scales.map(|s| Bytes(bytes(s))))
}

/// Uses the scales that a search gave: the kept tensors that they change.
#[rustler::nif(schedule = "DirtyIo")]
fn fold_use(
    observed: ObservedRef,
    source: CheckpointRef,
    term: GroupTerm,
    scales: Bytes,
) -> Outcome<Vec<String>> {
    let (scales, rest) = scales.0.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(Error::InvalidOption {
            option: "scales".into(),
            message: "expected whole numbers of 4 bytes".into(),
        }
        .into());
    }
    let scales = scales.iter().map(|&b| f32::from_le_bytes(b)).collect();
    Ok(observed.0.fold(&*source.0.get()?, &group(term), scales)?)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn calibration_samples<'a>(
    env: Env<'a>,
    calibration: CalibrationRef,
    layer: String,
) -> Outcome<Term<'a>> {
    let statistics = lock(&calibration).layer(&layer)?;
    Ok(terms::tensor(env, statistics.rows()?))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn quantize_calibrated<'a>(
    env: Env<'a>,
    tensor: TensorRef,
    format: Name,
    options: Options,
    calibration: CalibrationRef,
    layer: String,
) -> Outcome<Term<'a>> {
    let (spec, how) = calibrated::resolve(&format.0, options.0)?;
    let statistics = lock(&calibration).layer(&layer)?;
    let tensor = tensor.0.get()?;
    let q = calibrated::quantize_calibrated(&tensor, &spec, &statistics, &how, &Cancel::new())?;
    Ok(terms::quantized(env, q)?)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn sparsify_calibrated<'a>(
    env: Env<'a>,
    tensor: TensorRef,
    options: Options,
    calibration: CalibrationRef,
    layer: String,
) -> Outcome<Term<'a>> {
    let how = sparsity::resolve(options.0)?;
    let statistics = lock(&calibration).layer(&layer)?;
    let w = tensor.0.get()?;
    let result = tensor_from_binary(env, w.dtype(), w.shape().to_vec(), |out| {
        sparsity::sparsify_into(&w, &how, &statistics, out, &Cancel::new())
    })?;
    Ok(terms::tensor(env, result))
}
