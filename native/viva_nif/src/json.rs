//! JSON values and terms.

use rustler::types::atom;
use rustler::types::map::MapIterator;
use rustler::{Atom, Binary, Encoder, Env, Term, TermType};
use serde_json::{Map, Number, Value};
use viva_core::Error;

use crate::error::Outcome;

/// What the keys of objects become. Atoms only for names of our own.
#[derive(Clone, Copy)]
pub enum Keys {
    Atoms,
    Strings,
}

pub fn to_term<'a>(env: Env<'a>, value: &Value, keys: Keys) -> Term<'a> {
    match value {
        Value::Null => atom::nil().encode(env),
        Value::Bool(v) => v.encode(env),
        Value::Number(n) => match (n.as_u64(), n.as_i64()) {
            (Some(v), _) => v.encode(env),
            (_, Some(v)) => v.encode(env),
            _ => n.as_f64().encode(env),
        },
        Value::String(v) => v.encode(env),
        Value::Array(items) => items
            .iter()
            .map(|v| to_term(env, v, keys))
            .collect::<Vec<_>>()
            .encode(env),
        Value::Object(map) => {
            let key = |k: &String| match (keys, Atom::from_str(env, k)) {
                (Keys::Atoms, Ok(atom)) => atom.encode(env),
                _ => k.encode(env),
            };
            let pairs: Vec<_> = map
                .iter()
                .map(|(k, v)| (key(k), to_term(env, v, keys)))
                .collect();
            Term::map_from_pairs(env, &pairs).unwrap_or_else(|_| atom::nil().encode(env))
        }
    }
}

fn invalid(term: Term) -> Error {
    Error::InvalidOption {
        option: "json".into(),
        message: format!("{term:?} has no JSON spelling"),
    }
}

pub fn from_term(term: Term) -> Result<Value, Error> {
    let bad = || invalid(term);
    Ok(match term.get_type() {
        TermType::Atom => match term.atom_to_string().map_err(|_| bad())?.as_str() {
            "nil" => Value::Null,
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            name => Value::String(name.into()),
        },
        TermType::Integer => match (term.decode::<i64>(), term.decode::<u64>()) {
            (Ok(v), _) => Value::from(v),
            (_, Ok(v)) => Value::from(v),
            _ => return Err(bad()),
        },
        TermType::Float => {
            let v = term.decode::<f64>().map_err(|_| bad())?;
            Value::Number(Number::from_f64(v).ok_or_else(bad)?)
        }
        TermType::Binary => Value::String(term.decode().map_err(|_| bad())?),
        TermType::List => Value::Array(
            term.decode::<Vec<Term>>()
                .map_err(|_| bad())?
                .into_iter()
                .map(from_term)
                .collect::<Result<_, _>>()?,
        ),
        TermType::Map => {
            let mut map = Map::new();
            for (key, value) in MapIterator::new(term).ok_or_else(bad)? {
                match from_term(key)? {
                    Value::String(key) => map.insert(key, from_term(value)?),
                    _ => return Err(invalid(key)),
                };
            }
            Value::Object(map)
        }
        _ => return Err(bad()),
    })
}

#[rustler::nif(schedule = "DirtyCpu")]
fn json_encode(term: Term, pretty: bool) -> Outcome<String> {
    let value = from_term(term)?;
    Ok(if pretty {
        format!("{value:#}")
    } else {
        value.to_string()
    })
}

#[rustler::nif(schedule = "DirtyCpu")]
fn json_decode<'a>(env: Env<'a>, text: Binary<'a>) -> Outcome<Term<'a>> {
    let value = serde_json::from_slice(&text).map_err(|e| Error::InvalidFile {
        path: "JSON".into(),
        message: e.to_string(),
    })?;
    Ok(to_term(env, &value, Keys::Strings))
}
