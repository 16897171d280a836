//! What becomes of vectors.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::simd::signs;
use crate::tensor::DType;

/// What a search looks at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    Int8,
    Int4,
    Binary,
}

/// What the best of them are scored by again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rescore {
    Nothing,
    Int8,
    F16,
}

/// What near means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Directions: vectors are brought to length one first.
    Cosine,
    Dot,
}

const CODES: [(&str, Codes); 3] = [
    ("int8", Codes::Int8),
    ("int4", Codes::Int4),
    ("binary", Codes::Binary),
];
const RESCORE: [(&str, Rescore); 3] = [
    ("none", Rescore::Nothing),
    ("int8", Rescore::Int8),
    ("f16", Rescore::F16),
];
const METRIC: [(&str, Metric); 2] = [("cosine", Metric::Cosine), ("dot", Metric::Dot)];

/// Everything that decides what is written of a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    pub codes: Codes,
    pub rescore: Rescore,
    pub metric: Metric,
    /// Whether the mean is taken from every vector.
    pub center: bool,
}

fn by_name<T: Copy>(option: &str, known: &[(&str, T)], name: &str) -> Result<T> {
    let found = known.iter().find(|(n, _)| *n == name);
    found.map(|(_, v)| *v).ok_or_else(|| {
        let known: Vec<&str> = known.iter().map(|(n, _)| *n).collect();
        Error::option(option, format!("expected {}, got {name}", known.join(", ")))
    })
}

fn name_of<T: PartialEq>(known: &[(&'static str, T)], value: T) -> &'static str {
    let found = known.iter().find(|(_, v)| *v == value);
    found.map_or("", |(n, _)| n)
}

impl Settings {
    /// From what a user says; without `rescore`, what suits the codes.
    ///
    /// # Errors
    /// `InvalidOption` for names that are none.
    pub fn resolve(
        codes: &str,
        rescore: Option<&str>,
        metric: &str,
        center: bool,
    ) -> Result<Settings> {
        let codes = by_name("codes", &CODES, codes)?;
        let rescore = match (rescore, codes) {
            (Some(name), _) => by_name("rescore", &RESCORE, name)?,
            (None, Codes::Int8) => Rescore::F16,
            (None, _) => Rescore::Int8,
        };
        Ok(Settings {
            codes,
            rescore,
            metric: by_name("metric", &METRIC, metric)?,
            center,
        })
    }

    /// Their names: of the codes, of what is scored again, and of the metric.
    pub fn names(&self) -> [&'static str; 3] {
        [
            name_of(&CODES, self.codes),
            name_of(&RESCORE, self.rescore),
            name_of(&METRIC, self.metric),
        ]
    }

    /// What every file of a set says of it.
    pub(super) fn metadata(&self, dimension: usize) -> BTreeMap<String, String> {
        let [codes, rescore, metric] = self.names();
        [
            ("codes", codes),
            ("rescore", rescore),
            ("metric", metric),
            ("center", if self.center { "true" } else { "false" }),
            ("dimension", &dimension.to_string()),
        ]
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .into()
    }

    /// The settings and the dimension that a file says.
    pub(super) fn from_metadata(metadata: &BTreeMap<String, String>) -> Option<(Settings, usize)> {
        let get = |key: &str| metadata.get(key).map(String::as_str);
        let center = get("center")? == "true";
        let settings = Settings::resolve(get("codes")?, get("rescore"), get("metric")?, center);
        Some((settings.ok()?, get("dimension")?.parse().ok()?))
    }

    /// Checks that vectors of that many elements can be encoded so.
    ///
    /// # Errors
    /// `InvalidOption`.
    pub fn check_dimension(&self, dimension: usize) -> Result<()> {
        let odd = self.codes == Codes::Int4 && dimension % 2 == 1;
        let message = match dimension {
            0 => "vectors have at least one element".into(),
            // Sums of products of codes have to fit in 32 bits.
            d if d > 1 << 16 => format!("{d} is too many; 65536 are the most"),
            d if odd => format!("int4 codes lie two in a byte, and {d} is odd; choose int8"),
            _ => return Ok(()),
        };
        Err(Error::option("dimension", message))
    }

    /// The tensors with something for each vector: name, dtype, and shape of that.
    pub(super) fn tensors(&self, d: usize) -> Vec<(&'static str, DType, Vec<usize>)> {
        let mut tensors = match self.codes {
            Codes::Int8 => vec![("codes", DType::I8, vec![d])],
            Codes::Int4 => vec![("codes", DType::U8, vec![d / 2])],
            Codes::Binary => vec![("codes", DType::U8, vec![signs::packed_len(d)])],
        };
        if self.codes != Codes::Binary {
            tensors.push(("scale", DType::F32, vec![]));
        }
        match self.rescore {
            Rescore::Nothing => {}
            Rescore::F16 => tensors.push(("rescore", DType::F16, vec![d])),
            Rescore::Int8 => {
                tensors.push(("rescore", DType::I8, vec![d]));
                tensors.push(("rescore_scale", DType::F32, vec![]));
            }
        }
        tensors
    }
}
