//! Errors as terms: `{kind, details, message}`.

use rustler::{Atom, Encoder, Env, Term};
use serde_json::Value;

use crate::json;

/// An error of the core on its way to Elixir.
pub struct Failure(pub viva_core::Error);

/// What a NIF returns: `{:ok, value}` or `{:error, {kind, details, message}}`.
pub type Outcome<T> = Result<T, Failure>;

impl From<viva_core::Error> for Failure {
    fn from(error: viva_core::Error) -> Failure {
        Failure(error)
    }
}

impl Encoder for Failure {
    fn encode<'a>(&self, env: Env<'a>) -> Term<'a> {
        let (kind, details) = match serde_json::to_value(&self.0) {
            Ok(Value::Object(mut map)) => (map.remove("kind"), Value::Object(map)),
            _ => (None, Value::Null),
        };
        let kind = kind.as_ref().and_then(Value::as_str).unwrap_or("unknown");
        let kind = Atom::from_str(env, kind).map(|a| a.to_term(env));
        let details = json::to_term(env, &details, json::Keys::Atoms);
        (kind.ok(), details, self.0.to_string()).encode(env)
    }
}
