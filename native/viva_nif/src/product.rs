//! Products. A call of a dirty NIF costs a process its place on a normal scheduler
//! and back: small products are done where the process is. Each product is two NIFs,
//! of which the one for small products answers nil where the other is to be asked.

use rustler::schedule::consume_timeslice;
use rustler::{Env, Term};
use viva_core::ops::{Cancel, int8, matmul};
use viva_core::tensor::DType;

use crate::error::Outcome;
use crate::resource::{PackedRef, QuantizedRef, TensorRef, tensor_from_binary};
use crate::terms::{self, Name};

/// The kind of scheduler that a NIF runs on.
enum Scheduler {
    Normal,
    Dirty,
}
use Scheduler::{Dirty, Normal};

/// Of the millisecond that a process has at a time, what the largest of the small
/// products takes.
const SLICE: f32 = 0.2;

/// A tensor of that shape that `fill` writes, over rows of k.
fn product<'a>(
    env: Env<'a>,
    on: Scheduler,
    (shape, k): (Vec<usize>, usize),
    dtype: DType,
    fill: impl FnOnce(&mut [u8]) -> viva_core::Result<()>,
) -> Outcome<Option<Term<'a>>> {
    if let Normal = on {
        let Some(part) = matmul::part_of_small(&shape, k) else {
            return Ok(None);
        };
        consume_timeslice(env, 1 + (100.0 * SLICE * part) as i32);
    }
    let y = tensor_from_binary(env, dtype, shape, fill)?;
    Ok(Some(terms::tensor(env, y)))
}

fn multiply<'a>(
    env: Env<'a>,
    on: Scheduler,
    x: TensorRef,
    q: QuantizedRef,
    dtype: Name,
    compute: Name,
) -> Outcome<Option<Term<'a>>> {
    let multiply = matmul::by_name(&compute.0)?;
    let (x, q, dtype) = (x.0.get()?, q.0.get()?, dtype.dtype()?);
    let shape = matmul::matmul_shape(&x, &q.shape)?;
    product(env, on, (shape, x.row_len()), dtype, |out| {
        multiply(&x, &q, dtype, out, &Cancel::new())
    })
}

fn multiply_packed<'a>(
    env: Env<'a>,
    on: Scheduler,
    x: TensorRef,
    packed: PackedRef,
    dtype: Name,
) -> Outcome<Option<Term<'a>>> {
    let (x, packed, dtype) = (x.0.get()?, packed.0.get()?, dtype.dtype()?);
    let shape = matmul::matmul_shape(&x, packed.shape())?;
    product(env, on, (shape, x.row_len()), dtype, |out| {
        int8::matmul_packed(&x, &packed, dtype, out, &Cancel::new())
    })
}

#[rustler::nif(name = "matmul", schedule = "DirtyCpu")]
fn matmul_nif<'a>(
    env: Env<'a>,
    x: TensorRef,
    q: QuantizedRef,
    dtype: Name,
    compute: Name,
) -> Outcome<Option<Term<'a>>> {
    multiply(env, Dirty, x, q, dtype, compute)
}

#[rustler::nif]
fn matmul_small<'a>(
    env: Env<'a>,
    x: TensorRef,
    q: QuantizedRef,
    dtype: Name,
    compute: Name,
) -> Outcome<Option<Term<'a>>> {
    multiply(env, Normal, x, q, dtype, compute)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn matmul_packed<'a>(
    env: Env<'a>,
    x: TensorRef,
    packed: PackedRef,
    dtype: Name,
) -> Outcome<Option<Term<'a>>> {
    multiply_packed(env, Dirty, x, packed, dtype)
}

#[rustler::nif]
fn matmul_packed_small<'a>(
    env: Env<'a>,
    x: TensorRef,
    packed: PackedRef,
    dtype: Name,
) -> Outcome<Option<Term<'a>>> {
    multiply_packed(env, Normal, x, packed, dtype)
}
