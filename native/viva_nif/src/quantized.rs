//! Quantized tensors.

use rustler::{Atom, Binary, Encoder, Env, OwnedBinary, Term};
use viva_core::ops::metrics::DB_PER_BIT;
use viva_core::ops::{
    Cancel, dequantize, dump, histogram, metrics, output_error, packed, quantize,
};
use viva_core::{format, layout};

use crate::error::Outcome;
use crate::resource::{
    PackedRef, PackedResource, QuantizedRef, Slot, TensorRef, share_binary, tensor_from_binary,
};
use crate::tensor::metrics_map;
use crate::terms::{self, Name, Options};

#[rustler::nif(name = "quantize", schedule = "DirtyCpu")]
fn quantize_nif<'a>(
    env: Env<'a>,
    tensor: TensorRef,
    name: Name,
    options: Options,
) -> Outcome<Term<'a>> {
    let spec = format::spec(&name.0, options.0)?;
    let q = quantize::quantize(&*tensor.0.get()?, &spec, &Cancel::new())?;
    Ok(terms::quantized(env, q)?)
}

#[rustler::nif(name = "dequantize", schedule = "DirtyCpu")]
fn dequantize_nif<'a>(env: Env<'a>, q: QuantizedRef, dtype: Name) -> Outcome<Term<'a>> {
    let q = q.0.get()?;
    let dtype = dtype.dtype()?;
    let tensor = tensor_from_binary(env, dtype, q.shape.clone(), |out| {
        dequantize::dequantize_into(&q, dtype, out, &Cancel::new())
    })?;
    Ok(terms::tensor(env, tensor))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn prepack<'a>(env: Env<'a>, q: QuantizedRef) -> Outcome<Term<'a>> {
    let packed = packed::pack(&*q.0.get()?, &Cancel::new())?;
    let fields = [
        ("format", terms::atom(env, packed.format())),
        ("shape", packed.shape().encode(env)),
        ("dtype", terms::atom(env, packed.dtype().name())),
        ("nbytes", packed.nbytes().encode(env)),
    ];
    let resource = PackedRef::new(PackedResource(Slot::new(packed)));
    let mut all = vec![("ref", resource.encode(env))];
    all.extend(fields);
    Ok(terms::map(env, &all))
}

#[rustler::nif]
fn packed_release(packed: PackedRef) -> Atom {
    packed.0.release();
    rustler::types::atom::ok()
}

#[rustler::nif(schedule = "DirtyCpu")]
fn quantized_metrics<'a>(env: Env<'a>, x: TensorRef, q: QuantizedRef) -> Outcome<Term<'a>> {
    let q = q.0.get()?;
    let m = metrics::quantized(&*x.0.get()?, &q, &Cancel::new())?;
    let bits = q.bits_per_weight();
    let more = [
        ("bits_per_weight", bits.encode(env)),
        (
            "bound_distance_db",
            terms::number(env, DB_PER_BIT * bits - m.sqnr_db),
        ),
    ];
    Ok(metrics_map(env, &m, &more))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn quantized_histogram<'a>(env: Env<'a>, x: TensorRef, q: QuantizedRef) -> Outcome<Term<'a>> {
    let found = histogram::quantized(&*x.0.get()?, &*q.0.get()?)?;
    let counts = |h: histogram::Histogram| {
        let fields = [
            ("weights", h.weights.encode(env)),
            ("values", h.values.encode(env)),
        ];
        terms::map(env, &fields)
    };
    Ok(found.map(counts).encode(env))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn quantized_output_error<'a>(
    env: Env<'a>,
    w: TensorRef,
    q: QuantizedRef,
    x: TensorRef,
) -> Outcome<Term<'a>> {
    let (w, q, x) = (w.0.get()?, q.0.get()?, x.0.get()?);
    let error = output_error::quantized(&w, &q, &x, &Cancel::new())?;
    Ok(terms::number(env, error))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn quantized_dump<'a>(env: Env<'a>, q: QuantizedRef) -> Outcome<Binary<'a>> {
    let bytes = dump::dump(&*q.0.get()?)?;
    Ok(OwnedBinary::from_slice(&bytes).release(env))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn quantized_load<'a>(env: Env<'a>, binary: Binary<'a>) -> Outcome<Term<'a>> {
    let q = dump::load(share_binary(binary)?)?;
    Ok(terms::quantized(env, q)?)
}

#[rustler::nif]
fn quantized_release(q: QuantizedRef) -> Atom {
    q.0.release();
    rustler::types::atom::ok()
}

#[rustler::nif]
fn formats(env: Env) -> Vec<Term> {
    format::FORMATS
        .iter()
        .map(|f| {
            terms::map(
                env,
                &[
                    ("name", terms::atom(env, f.name())),
                    ("about", f.about().encode(env)),
                ],
            )
        })
        .collect()
}

#[rustler::nif]
fn layouts(env: Env) -> Vec<Term> {
    layout::LAYOUTS
        .iter()
        .map(|l| {
            terms::map(
                env,
                &[
                    ("name", terms::atom(env, l.name())),
                    ("about", l.about().encode(env)),
                ],
            )
        })
        .collect()
}
