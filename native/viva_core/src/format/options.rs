//! What users say about a format, on its way into a spec and back.

use super::{Granularity, Method, Scale, Values, Zero};
use crate::error::{Error, Result};

/// The value of one user option.
#[derive(Clone, Debug, PartialEq)]
pub enum OptionValue {
    Bool(bool),
    Int(i64),
    Float(f64),
    /// An atom or a string.
    Name(String),
}

impl std::fmt::Display for OptionValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            OptionValue::Bool(v) => write!(f, "{v}"),
            OptionValue::Int(v) => write!(f, "{v}"),
            OptionValue::Float(v) => write!(f, "{v}"),
            OptionValue::Name(v) => write!(f, "{v:?}"),
        }
    }
}

impl From<Method> for OptionValue {
    fn from(method: Method) -> OptionValue {
        OptionValue::Name(
            match method {
                Method::Rtn => "rtn",
                Method::Mse => "mse",
                Method::Hqq => "hqq",
            }
            .into(),
        )
    }
}

impl From<Granularity> for OptionValue {
    fn from(granularity: Granularity) -> OptionValue {
        match granularity {
            Granularity::Tensor => OptionValue::Name("tensor".into()),
            Granularity::Row => OptionValue::Name("row".into()),
            Granularity::Block(n) => OptionValue::Int(n as i64),
        }
    }
}

impl From<Zero> for OptionValue {
    fn from(zero: Zero) -> OptionValue {
        OptionValue::Name(
            match zero {
                Zero::Integer => "integer",
                Zero::Float => "float",
            }
            .into(),
        )
    }
}

impl From<Values> for OptionValue {
    fn from(values: Values) -> OptionValue {
        let name = Values::NAMES.iter().find(|(_, v)| *v == values);
        OptionValue::Name(name.map_or("source", |(name, _)| name).into())
    }
}

impl From<Scale> for OptionValue {
    fn from(scale: Scale) -> OptionValue {
        OptionValue::Name(
            match scale {
                Scale::Step => "step",
                Scale::Absmax => "absmax",
                Scale::Floor => "floor",
                Scale::Bump => "bump",
                Scale::Round => "round",
                Scale::Ggml => "ggml",
            }
            .into(),
        )
    }
}

/// User options on their way into a [`super::Spec`]; each is taken once, and what no
/// one took is reported by name.
#[derive(Clone, Debug, Default)]
pub struct Options {
    given: Vec<(String, OptionValue)>,
    known: Vec<&'static str>,
}

impl Options {
    pub fn new(given: Vec<(String, OptionValue)>) -> Options {
        Options {
            given,
            known: Vec::new(),
        }
    }

    /// Takes an option out; the last value wins, as in an Elixir keyword list's
    /// command-line origin.
    pub fn take(&mut self, name: &'static str) -> Option<OptionValue> {
        self.known.push(name);
        let mut found = None;
        self.given.retain(|(n, v)| {
            if n == name {
                found = Some(v.clone());
            }
            n != name
        });
        found
    }

    pub fn take_bool(&mut self, name: &'static str, default: bool) -> Result<bool> {
        match self.take(name) {
            None => Ok(default),
            Some(OptionValue::Bool(v)) => Ok(v),
            Some(v) => Err(Error::option(
                name,
                format!("expected true or false, got {v}"),
            )),
        }
    }

    /// One of the listed names.
    pub fn take_name<T: Copy>(
        &mut self,
        name: &'static str,
        choices: &[(&str, T)],
        default: T,
    ) -> Result<T> {
        let Some(value) = self.take(name) else {
            return Ok(default);
        };
        if let OptionValue::Name(given) = &value
            && let Some((_, v)) = choices.iter().find(|(n, _)| n == given)
        {
            return Ok(*v);
        }
        let names: Vec<&str> = choices.iter().map(|(n, _)| *n).collect();
        Err(Error::option(
            name,
            format!("expected one of {}, got {value}", names.join(", ")),
        ))
    }

    /// What nothing took.
    pub fn rest(self) -> Vec<(String, OptionValue)> {
        self.given
    }

    /// Fails on an option that nothing took.
    pub fn finish(self, format: &str) -> Result<()> {
        match self.given.first() {
            None => Ok(()),
            Some((name, _)) => Err(Error::option(
                name,
                format!(
                    "{format} has no such option; it takes {}",
                    self.known.join(", ")
                ),
            )),
        }
    }
}
