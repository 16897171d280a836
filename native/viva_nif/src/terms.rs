//! Terms of more than one NIF: options, dtypes, descriptions.

use rustler::{Atom, Decoder, Encoder, Env, NifResult, Term, TermType};
use viva_core::Error;
use viva_core::format::{OptionValue, Quantized};
use viva_core::tensor::{DType, Tensor};

use crate::resource::{QuantizedRef, QuantizedResource, Slot, TensorRef, TensorResource};

/// A name given as an atom or a string; any other term is kept as it prints,
/// to be refused by name.
pub struct Name(pub String);

impl<'a> Decoder<'a> for Name {
    fn decode(term: Term<'a>) -> NifResult<Name> {
        let name = term.atom_to_string().or_else(|_| term.decode());
        Ok(Name(name.unwrap_or_else(|_| format!("{term:?}"))))
    }
}

impl Name {
    pub fn dtype(&self) -> Result<DType, Error> {
        DType::from_name(&self.0)
    }
}

/// A keyword list of format options.
pub struct Options(pub Vec<(String, OptionValue)>);

impl<'a> Decoder<'a> for Options {
    fn decode(term: Term<'a>) -> NifResult<Options> {
        let pairs: Vec<(Name, Term)> = term.decode()?;
        let options = pairs.into_iter().map(|(name, value)| {
            let value = match value.get_type() {
                TermType::Atom => match value.decode::<bool>() {
                    Ok(v) => OptionValue::Bool(v),
                    Err(_) => OptionValue::Name(value.atom_to_string()?),
                },
                TermType::Integer => value
                    .decode()
                    .map_or(OptionValue::Name(format!("{value:?}")), OptionValue::Int),
                TermType::Float => OptionValue::Float(value.decode()?),
                TermType::Binary => OptionValue::Name(value.decode()?),
                _ => OptionValue::Name(format!("{value:?}")),
            };
            Ok((name.0, value))
        });
        options.collect::<NifResult<Vec<_>>>().map(Options)
    }
}

/// An atom of that name.
pub fn atom<'a>(env: Env<'a>, name: &str) -> Term<'a> {
    match Atom::from_str(env, name) {
        Ok(atom) => atom.encode(env),
        Err(_) => name.encode(env),
    }
}

/// A map with atom keys.
pub fn map<'a>(env: Env<'a>, pairs: &[(&str, Term<'a>)]) -> Term<'a> {
    let pairs: Vec<_> = pairs.iter().map(|(k, v)| (atom(env, k), *v)).collect();
    from_pairs(env, &pairs)
}

/// Only keys that are given twice make no map.
fn from_pairs<'a>(env: Env<'a>, pairs: &[(impl Encoder, Term<'a>)]) -> Term<'a> {
    Term::map_from_pairs(env, pairs).unwrap_or_else(|_| atom(env, "nil"))
}

/// A float, or the atom `infinity`, `neg_infinity` or `nan`.
pub fn number(env: Env, v: f64) -> Term {
    if v.is_nan() {
        atom(env, "nan")
    } else if v == f64::INFINITY {
        atom(env, "infinity")
    } else if v == f64::NEG_INFINITY {
        atom(env, "neg_infinity")
    } else {
        v.encode(env)
    }
}

pub fn options<'a>(env: Env<'a>, options: Vec<(&str, OptionValue)>) -> Term<'a> {
    let encode = |value| match value {
        OptionValue::Bool(v) => v.encode(env),
        OptionValue::Int(v) => v.encode(env),
        OptionValue::Float(v) => v.encode(env),
        OptionValue::Name(v) => atom(env, &v),
    };
    let pairs: Vec<_> = options.into_iter().map(|(k, v)| (k, encode(v))).collect();
    map(env, &pairs)
}

mod keys {
    rustler::atoms! { reference = "ref", dtype, shape }
}

/// `%{ref, dtype, shape}` of a tensor: what small operations return, whose keys are
/// not looked up each time.
pub fn tensor(env: Env, tensor: Tensor) -> Term {
    let dtype = atom(env, tensor.dtype().name());
    let shape = tensor.shape().encode(env);
    let resource = TensorRef::new(TensorResource(Slot::new(tensor)));
    let fields = [
        (keys::reference(), resource.encode(env)),
        (keys::dtype(), dtype),
        (keys::shape(), shape),
    ];
    from_pairs(env, &fields)
}

/// `%{ref, format, shape, dtype, options, nbytes, bits_per_weight}`.
pub fn quantized(env: Env, q: Quantized) -> Result<Term, Error> {
    let fields = [
        ("format", atom(env, &q.spec.format)),
        ("shape", q.shape.encode(env)),
        ("dtype", atom(env, q.dtype.name())),
        ("options", options(env, q.spec.format()?.options(&q.spec))),
        ("nbytes", q.nbytes().encode(env)),
        ("bits_per_weight", q.bits_per_weight().encode(env)),
    ];
    let resource = QuantizedRef::new(QuantizedResource(Slot::new(q)));
    let mut all = vec![("ref", resource.encode(env))];
    all.extend(fields);
    Ok(map(env, &all))
}
