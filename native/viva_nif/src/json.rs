//! JSON and terms: read and spelled as they come, since a report may have a million rows.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fmt;

use rustler::types::atom;
use rustler::types::map::MapIterator;
use rustler::{Atom, Binary, Encoder, Env, Term, TermType};
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Error as _, Serialize, Serializer};
use serde_json::Value;
use viva_core::Error;

use crate::error::Outcome;

/// What the keys of objects become. Atoms only for names of our own.
#[derive(Clone, Copy)]
pub enum Keys {
    Atoms,
    Strings,
}

pub fn to_term<'a>(env: Env<'a>, value: &Value, keys: Keys) -> Term<'a> {
    let term = Reader::new(env, keys).deserialize(value);
    term.unwrap_or_else(|_| atom::nil().encode(env))
}

/// Makes terms of what is read. The objects of a list have the same keys, which are made
/// once.
struct Reader<'a> {
    env: Env<'a>,
    keys: Keys,
    made: RefCell<HashMap<String, Term<'a>>>,
}

impl<'a> Reader<'a> {
    fn new(env: Env<'a>, keys: Keys) -> Reader<'a> {
        Reader {
            env,
            keys,
            made: RefCell::default(),
        }
    }

    fn key(&self, key: &str) -> Term<'a> {
        if let Some(&term) = self.made.borrow().get(key) {
            return term;
        }
        let term = match (self.keys, Atom::from_str(self.env, key)) {
            (Keys::Atoms, Ok(atom)) => atom.encode(self.env),
            _ => key.encode(self.env),
        };
        self.made.borrow_mut().insert(key.into(), term);
        term
    }
}

impl<'a, 'de> DeserializeSeed<'de> for &Reader<'a> {
    type Value = Term<'a>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Term<'a>, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'a, 'de> Visitor<'de> for &Reader<'a> {
    type Value = Term<'a>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Term<'a>, E> {
        Ok(atom::nil().encode(self.env))
    }

    fn visit_bool<E>(self, v: bool) -> Result<Term<'a>, E> {
        Ok(v.encode(self.env))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Term<'a>, E> {
        Ok(v.encode(self.env))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Term<'a>, E> {
        Ok(v.encode(self.env))
    }

    fn visit_f64<E>(self, v: f64) -> Result<Term<'a>, E> {
        Ok(v.encode(self.env))
    }

    fn visit_str<E>(self, v: &str) -> Result<Term<'a>, E> {
        Ok(v.encode(self.env))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Term<'a>, A::Error> {
        let mut terms = Vec::new();
        while let Some(term) = items.next_element_seed(self)? {
            terms.push(term);
        }
        Ok(terms.encode(self.env))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Term<'a>, A::Error> {
        // Of a key that is there twice the last counts.
        let mut map: BTreeMap<String, Term> = BTreeMap::new();
        while let Some(key) = entries.next_key()? {
            map.insert(key, entries.next_value_seed(self)?);
        }
        let pairs: Vec<_> = map.iter().map(|(k, v)| (self.key(k), *v)).collect();
        Ok(Term::map_from_pairs(self.env, &pairs).unwrap_or(atom::nil().encode(self.env)))
    }
}

/// A term as JSON: atoms are strings but for `nil`, `true` and `false`; keys are in order.
struct Spelled<'a>(Term<'a>);

impl Serialize for Spelled<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let term = self.0;
        let bad = |_| unspelled::<S>(term);
        match term.get_type() {
            TermType::Atom => match term.atom_to_string().map_err(bad)?.as_str() {
                "nil" => to.serialize_unit(),
                "true" => to.serialize_bool(true),
                "false" => to.serialize_bool(false),
                name => to.serialize_str(name),
            },
            TermType::Integer => match term.decode::<i64>() {
                Ok(v) => to.serialize_i64(v),
                Err(_) => to.serialize_u64(term.decode().map_err(bad)?),
            },
            TermType::Float => to.serialize_f64(term.decode().map_err(bad)?),
            TermType::Binary => to.serialize_str(term.decode().map_err(bad)?),
            TermType::List => {
                let items = term.decode::<Vec<Term>>().map_err(bad)?;
                to.collect_seq(items.into_iter().map(Spelled))
            }
            TermType::Map => {
                let entries = MapIterator::new(term).ok_or(rustler::Error::BadArg);
                let mut sorted = BTreeMap::new();
                for (key, value) in entries.map_err(bad)? {
                    let name = match key.get_type() {
                        TermType::Atom => key.atom_to_string(),
                        _ => key.decode(),
                    };
                    sorted.insert(name.map_err(|_| unspelled::<S>(key))?, Spelled(value));
                }
                to.collect_map(sorted)
            }
            _ => Err(bad(rustler::Error::BadArg)),
        }
    }
}

fn unspelled<S: Serializer>(term: Term) -> S::Error {
    S::Error::custom(format!("{term:?} has no JSON spelling"))
}

#[rustler::nif(schedule = "DirtyCpu")]
fn json_encode(term: Term, pretty: bool) -> Outcome<String> {
    let spell = match pretty {
        true => serde_json::to_string_pretty,
        false => serde_json::to_string,
    };
    Ok(spell(&Spelled(term)).map_err(|e| Error::InvalidOption {
        option: "json".into(),
        message: e.to_string(),
    })?)
}

#[rustler::nif(schedule = "DirtyCpu")]
fn json_decode<'a>(env: Env<'a>, text: Binary<'a>) -> Outcome<Term<'a>> {
    let mut text = serde_json::Deserializer::from_slice(&text);
    let term = Reader::new(env, Keys::Strings).deserialize(&mut text);
    let whole = term.and_then(|term| text.end().map(|()| term));
    Ok(whole.map_err(|e| Error::InvalidFile {
        path: "JSON".into(),
        message: e.to_string(),
    })?)
}
