//! Products. A call of a dirty NIF costs a process its place on a normal scheduler
//! and back: small products are done where the process is. Each product is two NIFs,
//! of which the one for small products answers nil where the other is to be asked.

use std::sync::Arc;

use rustler::schedule::consume_timeslice;
use rustler::{Env, NifTuple, Term};
use viva_core::ops::epilogue::Epilogue;
use viva_core::ops::{Cancel, int8, matmul};
use viva_core::tensor::{DType, Tensor};

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
/// products takes where weights are packed as they are met, without vectors.
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

/// What becomes of the sums: the dtype, a bias and a residual.
#[derive(NifTuple)]
#[rustler(decode)]
struct Given(Name, Option<TensorRef>, Option<TensorRef>);

/// The same while a product is computed.
struct Held {
    dtype: DType,
    bias: Option<Arc<Tensor>>,
    residual: Option<Arc<Tensor>>,
}

impl Given {
    fn hold(&self) -> Outcome<Held> {
        let get = |tensor: &Option<TensorRef>| tensor.as_ref().map(|t| t.0.get()).transpose();
        Ok(Held {
            dtype: self.0.dtype()?,
            bias: get(&self.1)?,
            residual: get(&self.2)?,
        })
    }
}

impl Held {
    fn epilogue(&self) -> Epilogue<'_> {
        Epilogue {
            dtype: self.dtype,
            bias: self.bias.as_deref(),
            residual: self.residual.as_deref(),
        }
    }
}

fn multiply<'a>(
    env: Env<'a>,
    on: Scheduler,
    x: TensorRef,
    q: QuantizedRef,
    epilogue: Given,
    compute: Name,
) -> Outcome<Option<Term<'a>>> {
    let multiply = matmul::by_name(&compute.0)?;
    let (x, q, held) = (x.0.get()?, q.0.get()?, epilogue.hold()?);
    let shape = matmul::matmul_shape(&x, &q.shape)?;
    product(env, on, (shape, x.row_len()), held.dtype, |out| {
        multiply(&x, &q, held.epilogue(), out, &Cancel::new())
    })
}

fn multiply_packed<'a>(
    env: Env<'a>,
    on: Scheduler,
    x: TensorRef,
    packed: PackedRef,
    epilogue: Given,
) -> Outcome<Option<Term<'a>>> {
    let (x, packed, held) = (x.0.get()?, packed.0.get()?, epilogue.hold()?);
    let shape = matmul::matmul_shape(&x, packed.shape())?;
    product(env, on, (shape, x.row_len()), held.dtype, |out| {
        int8::matmul_packed(&x, &packed, held.epilogue(), out, &Cancel::new())
    })
}

#[rustler::nif(name = "matmul", schedule = "DirtyCpu")]
fn matmul_nif<'a>(
    env: Env<'a>,
    x: TensorRef,
    q: QuantizedRef,
    epilogue: Given,
    compute: Name,
) -> Outcome<Option<Term<'a>>> {
    multiply(env, Dirty, x, q, epilogue, compute)
}

#[rustler::nif]
fn matmul_small<'a>(
    env: Env<'a>,
    x: TensorRef,
    q: QuantizedRef,
    epilogue: Given,
    compute: Name,
) -> Outcome<Option<Term<'a>>> {
    multiply(env, Normal, x, q, epilogue, compute)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn matmul_packed<'a>(
    env: Env<'a>,
    x: TensorRef,
    packed: PackedRef,
    epilogue: Given,
) -> Outcome<Option<Term<'a>>> {
    multiply_packed(env, Dirty, x, packed, epilogue)
}

#[rustler::nif]
fn matmul_packed_small<'a>(
    env: Env<'a>,
    x: TensorRef,
    packed: PackedRef,
    epilogue: Given,
) -> Outcome<Option<Term<'a>>> {
    multiply_packed(env, Normal, x, packed, epilogue)
}
