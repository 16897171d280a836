//! The library itself: version, threads, memory, cancel flags.

use rustler::{Atom, Encoder, Env, Term};
use viva_core::ops::pool;
use viva_core::{io, simd, tensor};

use crate::error::Outcome;
use crate::resource::{CancelRef, CancelResource};
use crate::terms;

#[rustler::nif]
fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Sets the size of the pool and checks what the environment asks for.
#[rustler::nif(schedule = "DirtyCpu")]
fn configure(threads: usize) -> Outcome<usize> {
    simd::configure()?;
    pool::configure(threads)?;
    Ok(threads)
}

#[rustler::nif]
fn cpu(env: Env) -> Outcome<Term> {
    let atoms = |levels: Vec<simd::Level>| -> Vec<Term> {
        levels.iter().map(|l| terms::atom(env, l.name())).collect()
    };
    Ok(terms::map(
        env,
        &[
            ("arch", std::env::consts::ARCH.encode(env)),
            ("isa", terms::atom(env, simd::level().name())),
            ("available", atoms(simd::levels()).encode(env)),
            ("threads", pool::threads()?.encode(env)),
        ],
    ))
}

#[rustler::nif]
fn memory_info(env: Env) -> Term {
    terms::map(
        env,
        &[
            ("native_bytes", tensor::live_bytes().encode(env)),
            ("mapped_bytes", io::mapped_bytes().encode(env)),
        ],
    )
}

#[rustler::nif]
fn cancel_flag() -> CancelRef {
    CancelRef::new(CancelResource::default())
}

#[rustler::nif]
fn cancel(flag: CancelRef) -> Atom {
    flag.cancel();
    rustler::types::atom::ok()
}
