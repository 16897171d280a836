//! Dense tensors.

use rustler::{Atom, Binary, Encoder, Env, Term, TermType};
use viva_core::Error;
use viva_core::ops::{Cancel, cast, metrics, output_error, sparsity};
use viva_core::tensor::{Buffer, DType, Tensor, element_count, narrow, widen};

use crate::error::Outcome;
use crate::resource::{BinaryBytes, TensorRef, share_binary, tensor_from_binary};
use crate::terms::{self, Name};

#[rustler::nif]
fn tensor_from_binary_in_place<'a>(
    env: Env<'a>,
    binary: Binary<'a>,
    dtype: Name,
    shape: Vec<usize>,
) -> Outcome<Term<'a>> {
    let len = binary.len();
    let tensor = Tensor::new(dtype.dtype()?, shape, share_binary(binary)?, 0..len)?;
    Ok(terms::tensor(env, tensor))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn tensor_from_list<'a>(
    env: Env<'a>,
    list: Vec<Term<'a>>,
    dtype: Name,
    shape: Vec<usize>,
) -> Outcome<Term<'a>> {
    let dtype = dtype.dtype()?;
    let expected = element_count(&shape)?;
    if list.len() != expected {
        return Err(Error::SizeMismatch {
            what: format!("elements of a tensor of shape {shape:?}"),
            expected,
            actual: list.len(),
        }
        .into());
    }
    let mut buffer = Buffer::zeroed(expected * dtype.size());
    for (i, (term, out)) in list
        .iter()
        .zip(buffer.bytes_mut().chunks_exact_mut(dtype.size()))
        .enumerate()
    {
        element_from_term(*term, dtype, out).ok_or_else(|| Error::InvalidOption {
            option: format!("element {i}"),
            message: format!("{term:?} is no {}", dtype.name()),
        })?;
    }
    Ok(terms::tensor(
        env,
        Tensor::from_buffer(dtype, shape, buffer)?,
    ))
}

/// Writes one number; `None` where the dtype cannot hold it.
fn element_from_term(term: Term, dtype: DType, out: &mut [u8]) -> Option<()> {
    if dtype.is_float() {
        let v = match term.get_type() {
            TermType::Float => term.decode::<f64>().ok()?,
            TermType::Integer => term.decode::<i64>().ok()? as f64,
            TermType::Atom => match term.atom_to_string().ok()?.as_str() {
                "nan" => f64::NAN,
                "infinity" => f64::INFINITY,
                "neg_infinity" => f64::NEG_INFINITY,
                _ => return None,
            },
            _ => return None,
        };
        match dtype {
            DType::F64 => out.copy_from_slice(&v.to_le_bytes()),
            DType::F32 => out.copy_from_slice(&(v as f32).to_le_bytes()),
            DType::F16 => out.copy_from_slice(&half::f16::from_f64(v).to_le_bytes()),
            DType::BF16 => out.copy_from_slice(&half::bf16::from_f64(v).to_le_bytes()),
            // 8-bit floats, some of which have no infinity and no sign.
            _ => {
                narrow(dtype, &[v as f32], out).ok()?;
                let mut back = [0f32];
                widen(dtype, out, &mut back);
                if back[0].is_nan() != v.is_nan() || back[0].is_infinite() != v.is_infinite() {
                    return None;
                }
            }
        }
        return Some(());
    }
    // Decoding straight into a narrow type would cut the high bits off.
    let wide = || match (term.decode::<i64>(), term.decode::<u64>()) {
        (Ok(v), _) => Some(i128::from(v)),
        (_, Ok(v)) => Some(i128::from(v)),
        _ => None,
    };
    macro_rules! int {
        ($t:ty) => {
            out.copy_from_slice(&<$t>::try_from(wide()?).ok()?.to_le_bytes())
        };
    }
    match dtype {
        DType::I64 => int!(i64),
        DType::I32 => int!(i32),
        DType::I16 => int!(i16),
        DType::I8 => int!(i8),
        DType::U64 => int!(u64),
        DType::U32 => int!(u32),
        DType::U16 => int!(u16),
        DType::U8 => int!(u8),
        _ => out[0] = u8::from(term.decode::<bool>().ok()?),
    }
    Some(())
}

#[rustler::nif(schedule = "DirtyCpu")]
fn tensor_to_list<'a>(env: Env<'a>, tensor: TensorRef) -> Outcome<Term<'a>> {
    let tensor = tensor.0.get()?;
    let elements = tensor.bytes().chunks_exact(tensor.dtype().size());
    let terms: Vec<Term> = elements
        .map(|bytes| element_to_term(env, tensor.dtype(), bytes))
        .collect();
    Ok(terms.encode(env))
}

fn element_to_term<'a>(env: Env<'a>, dtype: DType, bytes: &[u8]) -> Term<'a> {
    macro_rules! read {
        ($t:ty, $n:literal) => {{
            let mut le = [0u8; $n];
            le.copy_from_slice(bytes);
            <$t>::from_le_bytes(le)
        }};
    }
    match dtype {
        DType::F64 => terms::number(env, read!(f64, 8)),
        DType::F32 => terms::number(env, f64::from(read!(f32, 4))),
        DType::F16 => terms::number(env, read!(half::f16, 2).to_f64()),
        DType::BF16 => terms::number(env, read!(half::bf16, 2).to_f64()),
        DType::F8E4M3 | DType::F8E5M2 | DType::F8E8M0 => {
            let mut value = [0f32];
            widen(dtype, bytes, &mut value);
            terms::number(env, f64::from(value[0]))
        }
        DType::I64 => read!(i64, 8).encode(env),
        DType::I32 => read!(i32, 4).encode(env),
        DType::I16 => read!(i16, 2).encode(env),
        DType::I8 => read!(i8, 1).encode(env),
        DType::U64 => read!(u64, 8).encode(env),
        DType::U32 => read!(u32, 4).encode(env),
        DType::U16 => read!(u16, 2).encode(env),
        DType::U8 => read!(u8, 1).encode(env),
        DType::Bool => (bytes[0] != 0).encode(env),
    }
}

/// The binary that a tensor lies in, or a copy where it lies in none.
#[rustler::nif(schedule = "DirtyCpu")]
fn tensor_to_binary<'a>(env: Env<'a>, tensor: TensorRef) -> Outcome<Binary<'a>> {
    let tensor = tensor.0.get()?;
    if let Some((binary, range)) = tensor.held_by::<BinaryBytes>() {
        return Ok(binary.part(env, range)?);
    }
    let mut out = rustler::OwnedBinary::new(tensor.bytes().len());
    out.as_mut_slice().copy_from_slice(tensor.bytes());
    Ok(out.release(env))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn tensor_cast<'a>(env: Env<'a>, tensor: TensorRef, dtype: Name) -> Outcome<Term<'a>> {
    let tensor = tensor.0.get()?;
    let dtype = dtype.dtype()?;
    let result = tensor_from_binary(env, dtype, tensor.shape().to_vec(), |out| {
        cast::cast_into(&tensor, dtype, out, &Cancel::new())
    })?;
    Ok(terms::tensor(env, result))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn tensor_sparsify<'a>(env: Env<'a>, x: TensorRef, scores: TensorRef) -> Outcome<Term<'a>> {
    let (x, scores) = (x.0.get()?, scores.0.get()?);
    let result = tensor_from_binary(env, x.dtype(), x.shape().to_vec(), |out| {
        sparsity::sparsify_into(&x, &scores, out, &Cancel::new())
    })?;
    Ok(terms::tensor(env, result))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn tensor_metrics<'a>(env: Env<'a>, x: TensorRef, y: TensorRef) -> Outcome<Term<'a>> {
    let metrics = metrics::dense(&*x.0.get()?, &*y.0.get()?, &Cancel::new())?;
    Ok(metrics_map(env, &metrics, &[]))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn tensor_output_error<'a>(
    env: Env<'a>,
    w: TensorRef,
    y: TensorRef,
    x: TensorRef,
) -> Outcome<Term<'a>> {
    let (w, y, x) = (w.0.get()?, y.0.get()?, x.0.get()?);
    let error = output_error::dense(&w, &y, &x, &Cancel::new())?;
    Ok(terms::number(env, error))
}

/// Metrics, and what else belongs beside them.
pub fn metrics_map<'a>(
    env: Env<'a>,
    m: &metrics::Metrics,
    more: &[(&'static str, Term<'a>)],
) -> Term<'a> {
    let mut fields = vec![
        ("mse", terms::number(env, m.mse)),
        ("sqnr_db", terms::number(env, m.sqnr_db)),
        ("psnr_db", terms::number(env, m.psnr_db)),
        ("cosine", terms::number(env, m.cosine)),
        ("mean_error", terms::number(env, m.mean_error)),
        ("max_error", terms::number(env, m.max_error)),
    ];
    fields.extend_from_slice(more);
    terms::map(env, &fields)
}

#[rustler::nif]
fn tensor_release(tensor: TensorRef) -> Atom {
    tensor.0.release();
    rustler::types::atom::ok()
}
