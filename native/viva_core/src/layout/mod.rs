//! How a quantized tensor is spelled as named tensors in a file, so that the
//! programs that made a layout load what we write. The project invents none.

mod awq;
mod bitsandbytes;
mod compressed_tensors;
pub mod gguf;
mod gptq;
mod mlx;

use std::borrow::Cow;

use serde_json::{Value, json};

use self::gguf::RowOrder;
use crate::error::{Error, Result};
use crate::format::{Input, OptionValue, Quantized, Spec, spec};
use crate::io::{Checkpoint, Entry, EntryDType, FixedEntry, LateEntry, Metadata};
use crate::tensor::{DType, Tensor};

/// What one quantized tensor adds to a file.
#[derive(Debug, Default)]
pub struct Entries {
    /// Tensors whose size follows from the shape.
    pub fixed: Vec<FixedEntry>,
    /// Small ones whose size follows from the values.
    pub late: Vec<LateEntry>,
}

impl Entries {
    fn fixed(&mut self, name: String, dtype: DType, shape: Vec<usize>) {
        self.fixed.push(FixedEntry {
            name,
            dtype: EntryDType::Known(dtype),
            shape,
        });
    }

    /// Bytes of all of them, late ones at their greatest.
    pub fn nbytes(&self) -> Result<usize> {
        let fixed = self
            .fixed
            .iter()
            .map(|e| e.dtype.nbytes(&e.shape))
            .sum::<Result<usize>>()?;
        Ok(fixed + self.late.iter().map(|e| e.max_len).sum::<usize>())
    }
}

/// The bytes of one named tensor, in the order of [`Entries`]: fixed, then late.
pub type Spelled<'a> = Vec<(String, Cow<'a, [u8]>)>;

/// A quantized tensor found in a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The name of the weight that it stands for: `….weight`.
    pub name: String,
    pub layout: &'static str,
    /// The tensors of the file that spell it.
    pub tensors: Vec<String>,
}

/// The checkpoint that a layout reads from.
pub struct Source<'a> {
    tensor: &'a dyn Fn(&str) -> Result<Tensor>,
    /// The model's `config.json`; null where there is none.
    pub config: &'a Value,
}

impl<'a> Source<'a> {
    pub fn new(tensor: &'a dyn Fn(&str) -> Result<Tensor>, config: &'a Value) -> Source<'a> {
        Source { tensor, config }
    }

    /// The tensor of that name, as the file holds it.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        (self.tensor)(name)
    }
}

/// What was done with the modules of a model, for its config.
pub struct Modules<'a> {
    /// The spec of most weights.
    pub spec: &'a Spec,
    /// Modules whose weight has another one.
    pub others: &'a [(String, Spec)],
    /// Modules with linear weights that were not quantized.
    pub kept: &'a [String],
}

impl<'a> Modules<'a> {
    /// All modules but `kept` under one spec.
    pub fn all(spec: &'a Spec, kept: &'a [String]) -> Modules<'a> {
        Modules {
            spec,
            others: &[],
            kept,
        }
    }
}

/// A way to spell quantized tensors.
pub trait Layout: Send + Sync {
    /// The name by which users ask for it.
    fn name(&self) -> &'static str;

    /// One line for a list of layouts.
    fn about(&self) -> &'static str;

    /// Format options that the layout needs, where the user chose none.
    fn defaults(&self, format: &str) -> Vec<(String, OptionValue)>;

    /// Whether it can hold this spec at all.
    fn check(&self, spec: &Spec) -> Result<()>;

    /// What a tensor of this name, shape and dtype adds to a file, or why it
    /// cannot be held.
    fn entries(&self, spec: &Spec, name: &str, shape: &[usize], dtype: DType) -> Result<Entries>;

    /// The bytes of those entries, of codes that stand for the weight itself.
    fn bytes<'a>(&self, name: &str, q: &'a Quantized) -> Result<Spelled<'a>>;

    /// The bytes of those entries.
    ///
    /// # Errors
    /// `LayoutMismatch` where the input has to be rotated or scaled first: loaders
    /// would not do it, and compute something else without a word.
    fn spell<'a>(&self, name: &str, q: &'a Quantized) -> Result<Spelled<'a>> {
        let what = match q.spec.input {
            Input { rotated: true, .. } => ROTATED,
            Input { scaled: true, .. } => "scaled",
            _ => return self.bytes(name, q),
        };
        Err(no_place_for(self.name(), &q.spec, what))
    }

    /// The `quantization_config` of a model directory.
    fn config(&self, modules: &Modules, config: &mut Value);

    /// Whether its config has one format and one block size for all modules.
    fn one_for_all(&self) -> bool {
        false
    }

    /// Whether what it writes of some rows of a weight follows, in each tensor that it
    /// writes, what it writes of the rows before; tensors that do not depend on the
    /// codes aside.
    fn rows_in_order(&self) -> bool {
        false
    }

    /// Whether programs that load it take quantized embeddings and output heads.
    fn holds_embeddings(&self) -> bool {
        false
    }

    /// Other files that say the same, from the config that [`Layout::config`] made.
    fn companions(&self, _config: &Value) -> Vec<(&'static str, Value)> {
        Vec::new()
    }

    /// The quantized tensors among these names.
    fn find(&self, names: &dyn Fn(&str) -> bool, all: &[&str]) -> Vec<Found>;

    /// The format and shape of one of them.
    fn describe(&self, name: &str, source: &Source) -> Result<(String, Vec<usize>)> {
        let q = self.read(name, source)?;
        Ok((q.spec.format, q.shape))
    }

    /// Whether programs that load it leave floats in the dtypes that they are in,
    /// and so cannot compute with several.
    fn leaves_floats(&self) -> bool {
        false
    }

    /// What will be read where that is not what is written, bit for bit.
    fn read_back(&self, _q: &Quantized) -> Result<Option<Quantized>> {
        Ok(None)
    }

    /// Reads one of them back.
    fn read(&self, name: &str, source: &Source) -> Result<Quantized>;

    /// What a tensor of this shape is quantized with: another spec than the
    /// one asked for where the layout has a rule for shapes that it does not fit.
    fn spec_for<'a>(&self, spec: &'a Spec, _shape: &[usize]) -> Result<Cow<'a, Spec>> {
        Ok(Cow::Borrowed(spec))
    }

    /// What there is to know of a layout that is a file format of its own.
    fn whole_file(&self) -> Option<&dyn WholeFile> {
        None
    }
}

/// A layout that is a file format of its own: one file holds a whole model, and
/// names, order of rows and metadata of kept tensors too are as it spells them.
pub trait WholeFile {
    /// The name of that file.
    fn file_name(&self) -> &'static str;

    /// What the file says of the model, or what about the source has no
    /// spelling; `spec` is that of most weights.
    fn metadata(&self, source: &Checkpoint, spec: Option<&Spec>) -> Result<Metadata>;

    /// How a tensor that is not quantized is stored; `None` for one that the
    /// rest of the file implies.
    fn kept(&self, source: &Checkpoint, entry: &Entry) -> Result<Option<FixedEntry>>;

    /// The order in which it has the rows of a tensor, where it is another.
    fn row_order(&self, source: &Checkpoint, entry: &Entry) -> Result<Option<RowOrder>>;

    /// Tensors that it wants and the source says otherwise.
    fn more(&self, source: &Checkpoint) -> Result<Vec<(FixedEntry, Vec<u8>)>>;
}

/// Every layout, in the order in which they are shown to users.
pub static LAYOUTS: &[&dyn Layout] = &[
    &bitsandbytes::Bitsandbytes,
    &awq::Awq,
    &compressed_tensors::CompressedTensors,
    &gptq::V1,
    &gptq::V2,
    &mlx::Mlx,
    &gguf::Gguf,
];

/// The layout of that name, which may have underscores as Elixir's atoms do.
pub fn layout(name: &str) -> Result<&'static dyn Layout> {
    let spelled = name.replace('_', "-");
    LAYOUTS
        .iter()
        .copied()
        .find(|l| l.name().replace('_', "-") == spelled)
        .ok_or_else(|| Error::UnknownLayout {
            name: name.into(),
            known: names(),
        })
}

fn names() -> String {
    LAYOUTS
        .iter()
        .map(|l| l.name())
        .collect::<Vec<_>>()
        .join(", ")
}

/// A spec and the layout to store it in: the named one, or the first that can
/// hold the format.
pub fn resolve(
    format: &str,
    options: &[(String, OptionValue)],
    name: Option<&str>,
) -> Result<(Spec, &'static dyn Layout)> {
    let with_defaults = |l: &dyn Layout| {
        // The last value of an option wins: the user's.
        let mut all = l.defaults(format);
        all.extend_from_slice(options);
        spec(format, all)
    };
    if let Some(name) = name {
        let layout = layout(name)?;
        let spec = with_defaults(layout)?;
        layout.check(&spec)?;
        return Ok((spec, layout));
    }
    // What no layout can help is the format's to say.
    spec(format, options.to_vec())?;
    let mut refusal = None;
    for layout in LAYOUTS {
        // The options of a user may contradict what one layout asks for.
        match with_defaults(*layout).and_then(|spec| layout.check(&spec).map(|()| spec)) {
            Ok(spec) => return Ok((spec, *layout)),
            Err(e) => refusal = refusal.or(Some(e)),
        }
    }
    Err(refusal.unwrap_or_else(|| Error::UnknownLayout {
        name: String::new(),
        known: names(),
    }))
}

/// Every quantized tensor among these names, whatever its layout.
pub fn find(all: &[&str]) -> Vec<Found> {
    let set: std::collections::HashSet<&str> = all.iter().copied().collect();
    LAYOUTS
        .iter()
        .flat_map(|l| l.find(&|name| set.contains(name), all))
        .collect()
}

fn refuse(layout: &dyn Layout, spec: &Spec, message: impl Into<String>) -> Error {
    Error::LayoutMismatch {
        layout: layout.name().into(),
        format: spec.format.clone(),
        message: message.into(),
    }
}

/// What [`no_place_for`] says of a weight for rotated inputs.
pub const ROTATED: &str = "rotated";

/// The error of a layout whose loaders know no such inputs.
pub fn no_place_for(layout: &str, spec: &Spec, what: &str) -> Error {
    Error::LayoutMismatch {
        layout: layout.into(),
        format: spec.format.clone(),
        message: format!(
            "programs that load it know no {what} inputs; quantize single weights so, \
             with VivaTensor.quantize, or choose another method"
        ),
    }
}

fn invalid(name: &str, message: impl std::fmt::Display) -> Error {
    Error::InvalidFile {
        path: name.into(),
        message: message.to_string(),
    }
}

/// A tensor that must have this dtype and shape.
fn expect(tensor: Tensor, name: &str, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    if tensor.dtype() != dtype {
        return Err(invalid(
            name,
            format!("is {}, not {}", tensor.dtype().name(), dtype.name()),
        ));
    }
    if tensor.shape() != shape {
        return Err(Error::ShapeMismatch {
            what: name.into(),
            expected: shape.to_vec(),
            actual: tensor.shape().to_vec(),
        });
    }
    Ok(tensor)
}

/// The module of a weight: its name without `.weight`.
fn module(name: &str) -> Result<&str> {
    name.strip_suffix(".weight").ok_or_else(|| {
        invalid(
            name,
            "only tensors named ….weight have a quantized spelling",
        )
    })
}

/// The dtype in which the model computes, where its config tells.
pub fn model_dtype(config: &Value) -> Option<DType> {
    let name = config.get("dtype").or_else(|| config.get("torch_dtype"))?;
    match name.as_str()? {
        "float32" => Some(DType::F32),
        "float16" => Some(DType::F16),
        "bfloat16" => Some(DType::BF16),
        _ => None,
    }
}

/// For layouts whose kernels compute in f16, whatever the model was trained in.
/// Told nothing, loaders take the dtype of the first tensor.
fn compute_in_f16(config: &mut Value) {
    if let Value::Object(map) = config {
        map.insert("dtype".into(), json!("float16"));
        if let Some(dtype) = map.get_mut("torch_dtype") {
            *dtype = json!("float16");
        }
    }
}

/// Puts `value` under `quantization_config`.
fn set_config(config: &mut Value, value: Value) {
    if let Value::Object(map) = config {
        map.insert("quantization_config".into(), value);
    }
}
