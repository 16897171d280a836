//! Scales of columns, folded into the operation before them: what a layer's weights
//! are multiplied by, a norm or the rows of another weight are divided by, so that
//! the model computes what it did and no loader has to know of any scale.
//!
//! The models whose operations are known are data here: `ARCHITECTURES`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, RwLock};

use super::calibrated::{Calibrated, Scaling, quantize_scaled, shared_scales};
use crate::calibration::Recorded;
use crate::error::{Error, Result};
use crate::format::{INPUT_SCALE, Input, Quantized, Spec};
use crate::io::{Checkpoint, Entry, EntryDType};
use crate::ops::metrics::{self, Metrics};
use crate::ops::quantize::check_floats;
use crate::ops::{Cancel, output_error};
use crate::tensor::{DType, Tensor, narrow};
use crate::unit::Target;

/// What stands before some weights.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Before {
    /// A norm whose output they alone read.
    Norm,
    /// A weight of this many parts of as many rows as they have columns; they read
    /// what the last part gives, unchanged or multiplied by what does not depend
    /// on it.
    Rows(usize),
}

/// Modules that read one input, and the module that it comes from.
struct Rule {
    from: &'static str,
    before: Before,
    readers: &'static [&'static str],
}

const fn norm(from: &'static str, readers: &'static [&'static str]) -> Rule {
    Rule {
        from,
        before: Before::Norm,
        readers,
    }
}

const fn rows(from: &'static str, parts: usize, readers: &'static [&'static str]) -> Rule {
    Rule {
        from,
        before: Before::Rows(parts),
        readers,
    }
}

const LLAMA: &[Rule] = &[
    norm(
        "input_layernorm",
        &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ),
    rows("self_attn.v_proj", 1, &["self_attn.o_proj"]),
    norm(
        "post_attention_layernorm",
        &["mlp.gate_proj", "mlp.up_proj"],
    ),
    rows("mlp.up_proj", 1, &["mlp.down_proj"]),
];

/// As above, with one weight for queries, keys and values, and one for gate and up.
const PHI3: &[Rule] = &[
    norm("input_layernorm", &["self_attn.qkv_proj"]),
    rows("self_attn.qkv_proj", 3, &["self_attn.o_proj"]),
    norm("post_attention_layernorm", &["mlp.gate_up_proj"]),
    rows("mlp.gate_up_proj", 2, &["mlp.down_proj"]),
];

/// Its norms give to the residual stream too, and its activation is not linear:
/// only values remain.
const BERT: &[Rule] = &[rows("attention.self.value", 1, &["attention.output.dense"])];

/// By the `model_type` of their config. Gemma's norms multiply by 1 + w, and others
/// norm after a layer, so names alone do not tell.
const ARCHITECTURES: [(&[&str], &[Rule]); 3] = [
    (&["llama", "mistral", "qwen2", "qwen3"], LLAMA),
    (&["phi3"], PHI3),
    (&["bert", "roberta", "xlm-roberta", "camembert"], BERT),
];

/// Weights that share the scales of their columns, and the tensor that takes them.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// A norm, or a weight whose last rows make what the readers read.
    pub into: String,
    pub rows: bool,
    pub readers: Vec<String>,
}

/// The groups of a checkpoint of whose weights `quantized` are quantized, and the
/// weights that go without scales, with the reason.
#[derive(Debug, Default)]
pub struct Groups {
    pub groups: Vec<Group>,
    pub unscaled: Vec<(String, String)>,
}

/// Finds them by the model's config, names and shapes; there are none where the
/// method scales no columns.
pub fn groups(source: &Checkpoint, target: &Target, quantized: &[String]) -> Groups {
    let scaling = target.calibrated.map(|how| how.scaling);
    if matches!(scaling, None | Some(Scaling::None)) {
        return Groups::default();
    }
    let model_type = source.config().and_then(|c| c.get("model_type"));
    let model_type = model_type.and_then(|t| t.as_str());
    let known = ARCHITECTURES
        .iter()
        .find(|(types, _)| model_type.is_some_and(|t| types.contains(&t)));
    let Some((_, rules)) = known else {
        let why = match model_type {
            Some(name) => format!("what is before the layers of {name} is not known"),
            None => "no config.json says what is before it".into(),
        };
        return Groups {
            groups: Vec::new(),
            unscaled: quantized.iter().map(|n| (n.clone(), why.clone())).collect(),
        };
    };
    let known = Known {
        source,
        quantized: quantized.iter().map(String::as_str).collect(),
    };
    let mut found = Groups::default();
    for name in quantized {
        match known.group_of(name, rules) {
            // Told once, by its first reader.
            Ok(group) if group.readers[0] == *name => found.groups.push(group),
            Ok(_) => {}
            Err(why) => found.unscaled.push((name.clone(), why)),
        }
    }
    found
}

struct Known<'a> {
    source: &'a Checkpoint,
    quantized: BTreeSet<&'a str>,
}

impl Known<'_> {
    /// The group of a weight, or why it has none.
    fn group_of(&self, name: &str, rules: &[Rule]) -> std::result::Result<Group, String> {
        let rule = rules.iter().find_map(|rule| {
            let reader = |reader: &&&str| name.ends_with(&format!(".{reader}.weight"));
            let reader = rule.readers.iter().find(reader)?;
            let prefix = name.strip_suffix(&format!("{reader}.weight"))?;
            Some((rule, prefix))
        });
        let Some((rule, prefix)) = rule else {
            return Err("nothing before it can take its scales".into());
        };
        let full = |module: &str| format!("{prefix}{module}.weight");
        let group = Group {
            into: full(rule.from),
            rows: rule.before != Before::Norm,
            readers: rule.readers.iter().map(|r| full(r)).collect(),
        };
        let columns = |name: &str| self.shape(name).and_then(|s| s.get(1).copied());
        let k = columns(name);
        // Reasons name modules, not layers: they are the same in all of them.
        for (reader, full) in rule.readers.iter().zip(&group.readers) {
            if columns(full) != k {
                return Err(format!("{reader} should read the same, and does not"));
            }
            if !self.quantized.contains(full.as_str()) {
                return Err(format!("{reader}, which reads the same, is kept"));
            }
        }
        let from = rule.from;
        let Some(&[first, ..]) = self.shape(&group.into) else {
            return Err(format!("there is no {from}"));
        };
        let expected = match rule.before {
            Before::Norm => k,
            Before::Rows(parts) => k.map(|k| k * parts),
        };
        if Some(first) != expected {
            return Err(match rule.before {
                Before::Norm => format!("{from} has another length"),
                Before::Rows(_) => format!("several of its columns share a row of {from}"),
            });
        }
        if group.rows && !self.quantized.contains(group.into.as_str()) {
            return Err(format!("{from}, which would take its scales, is kept"));
        }
        match vectors(self.source, &group).iter().find(|v| !is_float(v)) {
            Some(other) => Err(format!("{from} is {}", other.dtype.name())),
            None => Ok(group),
        }
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.source.entry(name).ok().map(|e| &e.shape[..])
    }
}

/// Tensors of one dimension that are divided with `into`, its own first.
fn vectors<'a>(source: &'a Checkpoint, group: &Group) -> Vec<&'a Entry> {
    let bias = format!("{}.bias", module(&group.into));
    let own = (!group.rows).then_some(group.into.as_str());
    let names = own.into_iter().chain([bias.as_str()]);
    names.filter_map(|name| source.entry(name).ok()).collect()
}

fn is_float(entry: &Entry) -> bool {
    matches!(entry.dtype, EntryDType::Known(dtype) if dtype.is_float())
}

/// What folding makes of the tensors of a checkpoint.
#[derive(Default)]
struct Folds {
    /// Scales of the columns of weights.
    columns: BTreeMap<String, Arc<Vec<f32>>>,
    /// Divisors of the last rows of weights.
    rows: BTreeMap<String, Arc<Vec<f32>>>,
    /// Norms and biases, divided.
    vectors: BTreeMap<String, Tensor>,
}

/// What the layers of a checkpoint met, and the scales that were chosen from it.
pub struct Observed {
    recorded: Recorded,
    folds: RwLock<Folds>,
}

impl Observed {
    pub fn new(recorded: Recorded) -> Observed {
        Observed {
            recorded,
            folds: RwLock::default(),
        }
    }

    pub fn recorded(&self) -> &Recorded {
        &self.recorded
    }

    /// Chooses the scales of a group, or `None` where leaving the columns is best; a
    /// second time gives the same.
    ///
    /// # Errors
    /// Those of reading and of the search; `NonFinite` of any weight of the group.
    pub fn search(
        &self,
        source: &Checkpoint,
        target: &Target,
        group: &Group,
        cancel: &Cancel,
    ) -> Result<Option<Vec<f32>>> {
        let Some(how) = &target.calibrated else {
            return Ok(None);
        };
        // What is kept for its NaN cannot be divided.
        read(source, &group.into)?;
        for vector in vectors(source, group) {
            read(source, &vector.name)?;
        }
        let readers = group.readers.iter().map(|name| read(source, name));
        let readers = readers.collect::<Result<Vec<_>>>()?;
        let specs = readers
            .iter()
            .map(|w| {
                Ok(target
                    .spec_for(w.shape())?
                    .for_dtype(w.dtype())?
                    .into_owned())
            })
            .collect::<Result<Vec<_>>>()?;
        let weights: Vec<_> = readers.iter().zip(&specs).collect();
        let statistics = self.recorded.layer(module(&group.readers[0]))?;
        let scales = shared_scales(&weights, &statistics, how, cancel)?;
        for name in group.readers.iter().chain([&group.into]) {
            source.give_back(name)?;
        }
        Ok(scales)
    }

    /// Remembers the scales of a group, those that [`search`](Self::search) chose,
    /// here or elsewhere. Returns the kept tensors that they change.
    ///
    /// # Errors
    /// Those of reading; `NonFinite` of a vector that they divide.
    pub fn fold(
        &self,
        source: &Checkpoint,
        group: &Group,
        mut scales: Vec<f32>,
    ) -> Result<Vec<String>> {
        let columns = self.recorded.layer(module(&group.readers[0]))?.columns();
        if scales.len() != columns {
            return Err(Error::SizeMismatch {
                what: format!("scales of the columns of {}", group.readers[0]),
                expected: columns,
                actual: scales.len(),
            });
        }
        let mut divided = Vec::new();
        for entry in vectors(source, group) {
            let vector = read(source, &entry.name)?;
            if divided.is_empty() {
                settle(&vector, &mut scales)?;
            }
            divided.push((entry.name.clone(), divide(&vector, &scales)?));
        }
        let scales = Arc::new(scales);
        let mut folds = self.folds.write().unwrap_or_else(|e| e.into_inner());
        for reader in &group.readers {
            folds.columns.insert(reader.clone(), Arc::clone(&scales));
        }
        if group.rows {
            folds.rows.insert(group.into.clone(), scales);
        }
        let changed = divided.iter().map(|(name, _)| name.clone()).collect();
        folds.vectors.extend(divided);
        Ok(changed)
    }

    /// What is written in place of a kept tensor.
    pub fn vector(&self, name: &str) -> Option<Tensor> {
        let folds = self.folds.read().unwrap_or_else(|e| e.into_inner());
        folds.vectors.get(name).cloned()
    }

    /// Quantizes a weight by what its layer met, with what was folded into it, and
    /// measures it, and its layer's output on the rows that were kept, against what
    /// it stands for.
    ///
    /// # Errors
    /// Those of the methods; `UnknownTensor` of a layer that is not recorded.
    pub fn quantize(
        &self,
        name: &str,
        w: &Tensor,
        spec: &Spec,
        how: &Calibrated,
        cancel: &Cancel,
    ) -> Result<(Quantized, Metrics, Option<f64>)> {
        let (rows, columns) = {
            let folds = self.folds.read().unwrap_or_else(|e| e.into_inner());
            (
                folds.rows.get(name).cloned(),
                folds.columns.get(name).cloned(),
            )
        };
        let spec = spec.for_dtype(w.dtype())?;
        let divided;
        let weight = match &rows {
            None => w,
            Some(by) => {
                divided = divide_rows(w, by)?;
                &divided
            }
        };
        let module = module(name);
        let how = Calibrated {
            clip: how.clip && !MULTIPLIED.iter().any(|m| module.ends_with(m)),
            ..*how
        };
        let statistics = self.recorded.layer(module)?;
        let columns = columns.as_ref().map(|s| &s[..]);
        let mut q = quantize_scaled(weight, &spec, &statistics, &how, columns, cancel)?;
        let metrics = metrics::quantized(weight, &q, cancel)?;
        let rows = statistics.samples();
        let error = match rows.is_empty() {
            true => None,
            false => {
                let k = statistics.columns();
                let rows = Tensor::from_slice(DType::F32, &[rows.len() / k, k], &rows)?;
                Some(output_error::quantized(weight, &q, &rows, cancel)?)
            }
        };
        // What is before the weight does from now on what its input asked for.
        q.spec.input = Input::default();
        q.parts.retain(|(part, _)| *part != INPUT_SCALE);
        q.dtype = w.dtype();
        Ok((q, metrics, error))
    }
}

/// Queries and keys, whose outputs are multiplied with each other: AWQ does not
/// clip them.
const MULTIPLIED: [&str; 4] = ["q_proj", "k_proj", "query", "key"];

/// The layer of a weight, as it is recorded.
pub fn module(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// The last elements of a vector, which scales belong to, and those before.
fn split(vector: &Tensor, scales: &[f32]) -> Result<(Vec<f32>, Vec<f32>)> {
    let mut values = vector.to_f32_vec();
    if values.len() < scales.len() {
        return Err(Error::ShapeMismatch {
            what: "a vector that scales are folded into".into(),
            expected: vec![scales.len()],
            actual: vector.shape().to_vec(),
        });
    }
    let last = values.split_off(values.len() - scales.len());
    Ok((values, last))
}

/// A tensor of the group, all of it finite.
fn read(source: &Checkpoint, name: &str) -> Result<Tensor> {
    source.check_unchanged(name)?;
    let tensor = source.tensor(name)?;
    check_floats(&tensor)?;
    Ok(tensor)
}

/// Turns scales into those that the divided vector has once it is rounded to its
/// dtype, so that no error is left in it.
fn settle(vector: &Tensor, scales: &mut [f32]) -> Result<()> {
    let (_, before) = split(vector, scales)?;
    let divided = divide(vector, scales)?;
    let (_, after) = split(&divided, scales)?;
    for ((s, before), after) in scales.iter_mut().zip(before).zip(after) {
        let settled = before / after;
        match settled.is_normal() && settled > 0.0 {
            true => *s = settled,
            // Any scale of nothing is right; too little or too much to hold is not.
            false if before != 0.0 => *s = 1.0,
            false => {}
        }
    }
    Ok(())
}

/// The vector with its last elements divided, in its own dtype.
fn divide(vector: &Tensor, scales: &[f32]) -> Result<Tensor> {
    let (mut values, mut last) = split(vector, scales)?;
    for (v, s) in last.iter_mut().zip(scales) {
        *v /= s;
    }
    values.extend(last);
    let mut bytes = vec![0u8; values.len() * vector.dtype().size()];
    narrow(vector.dtype(), &values, &mut bytes)?;
    Tensor::from_slice(vector.dtype(), vector.shape(), &bytes)
}

/// The weight with its last rows divided, in f32.
fn divide_rows(w: &Tensor, by: &[f32]) -> Result<Tensor> {
    let mut values = w.to_f32_vec();
    let k = w.row_len();
    let first = values.len().saturating_sub(by.len() * k);
    for (row, by) in values[first..].chunks_exact_mut(k).zip(by) {
        row.iter_mut().for_each(|v| *v /= by);
    }
    Tensor::from_slice(DType::F32, w.shape(), &values)
}
