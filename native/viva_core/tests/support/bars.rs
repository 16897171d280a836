//! The quality that every format must reach: one file for these tests and for
//! `mix viva.bench quality`.

use std::collections::BTreeMap;

use serde::Deserialize;
use viva_core::format::{OptionValue, Spec, spec};

#[derive(Deserialize)]
pub struct Bars {
    pub sqnr: Vec<Sqnr>,
    pub mean_error: Vec<MeanError>,
    pub ggml_error: Vec<GgmlError>,
}

/// Least SQNR on N(0, 1) and most bits per weight, scales included.
#[derive(Deserialize)]
pub struct Sqnr {
    #[serde(flatten)]
    pub recipe: Recipe,
    pub sqnr_db: f64,
    pub bits_per_weight: f64,
}

/// Mean |error| on N(0, 1), as bitsandbytes' own tests state it.
#[derive(Deserialize)]
pub struct MeanError {
    #[serde(flatten)]
    pub recipe: Recipe,
    pub mean_error: f64,
}

/// The bound of ggml's test-quantize-fns.
#[derive(Deserialize)]
pub struct GgmlError {
    #[serde(flatten)]
    pub recipe: Recipe,
    pub error: f64,
}

#[derive(Debug, Deserialize)]
pub struct Recipe {
    pub format: String,
    pub options: BTreeMap<String, Choice>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Choice {
    Bool(bool),
    Int(i64),
    Name(String),
}

impl From<Choice> for OptionValue {
    fn from(choice: Choice) -> OptionValue {
        match choice {
            Choice::Bool(v) => OptionValue::Bool(v),
            Choice::Int(v) => OptionValue::Int(v),
            Choice::Name(v) => OptionValue::Name(v),
        }
    }
}

impl Recipe {
    pub fn spec(&self) -> Spec {
        self.spec_with(Vec::new())
    }

    pub fn spec_with(&self, mut options: Vec<(String, OptionValue)>) -> Spec {
        let own = self.options.iter();
        options.extend(own.map(|(k, v)| (k.clone(), v.clone().into())));
        spec(&self.format, options).unwrap()
    }
}

pub fn bars() -> Bars {
    serde_json::from_str(include_str!("../../../../bench/quality_bars.json")).unwrap()
}
