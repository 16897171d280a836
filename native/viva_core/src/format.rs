//! What a format is, and the one registry of all formats.
//!
//! A format cuts a tensor into blocks and turns each into codes and scales. Its
//! scalar code is its definition: every kernel gives the same bits. Operations
//! know formats only through the two traits here.

mod options;

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::formats;
use crate::formats::ggml_blocks::Blocks;
use crate::formats::{iq4, k_quants, q_blocks};
use crate::simd::sink::Out;
use crate::steps::Steps;
use crate::tensor::{DType, Tensor};

pub use options::{OptionValue, Options};

/// How codes and scales are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Round to nearest: scales from the extremes of each block.
    Rtn,
    /// Scales (and zero points) searched for the lowest squared error.
    Mse,
    /// Half-quadratic: a float zero point of least error in the norm p = 0.7.
    Hqq,
}

/// Which elements share one scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    Tensor,
    Row,
    Block(usize),
}

/// Elements of the largest block that formats take: far past any use, and far
/// from where counting its bits would overflow.
pub const MAX_BLOCK: i64 = 1 << 30;

/// What a stored scale means, and how it follows from the largest magnitude
/// of its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// The distance of two codes: value = code · scale.
    Step,
    /// The largest magnitude, as LLM.int8() stores it: value = code · scale · (1/127),
    /// codes chosen from the weights rounded to f16.
    Absmax,
    /// A power of two: the greatest that leaves the largest magnitude in the
    /// top binade of the elements, as the OCP's specification says.
    Floor,
    /// The same, doubled where the largest magnitude would be past the largest
    /// element by rounding too, as compressed-tensors does.
    Bump,
    /// The power of two nearest, by its exponent, to the largest magnitude over
    /// the largest element, as MLX does.
    Round,
    /// As ggml's quantizers of mxfp4 and nvfp4 choose it, with codes that take
    /// the value nearer to zero of two as near.
    Ggml,
}

/// What shifts the codes of an asymmetric integer format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Zero {
    /// The code of zero: value = (code − zero) · scale.
    #[default]
    Integer,
    /// The value of code 0, in the dtype of the scales: value = code · scale + bias.
    Float,
}

/// What a sparse format keeps its weights as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Values {
    /// Floats of the dtype that is quantized.
    #[default]
    Source,
    F32,
    F16,
    Bf16,
    Int8,
    Fp8E4m3,
}

impl Values {
    /// What users call them.
    pub const NAMES: [(&'static str, Values); 6] = [
        ("source", Values::Source),
        ("f32", Values::F32),
        ("f16", Values::F16),
        ("bf16", Values::Bf16),
        ("int8", Values::Int8),
        ("fp8_e4m3", Values::Fp8E4m3),
    ];
}
/// What is done to activations before they meet the codes, which stand for
/// weights that had the inverse done to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// A Hadamard rotation comes first.
    pub rotated: bool,
    /// Each column is multiplied by its element of the part `input_scale`.
    pub scaled: bool,
}

/// The part that [`Input::scaled`] adds to those of the format.
pub const INPUT_SCALE: &str = "input_scale";

/// A format with every choice made: what [`Format::resolve`] returns, what a
/// quantized tensor carries, and what is written into a dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    pub format: String,
    pub method: Method,
    pub granularity: Granularity,
    pub symmetric: bool,
    #[serde(default)]
    pub zero: Zero,
    pub scale: Scale,
    pub scale_dtype: DType,
    pub double_quant: bool,
    /// The elements of a row are given to its blocks by an index, in the order
    /// in which GPTQ took them, instead of one after the other.
    #[serde(default)]
    pub act_order: bool,
    #[serde(default)]
    pub values: Values,
    pub input: Input,
}

impl Spec {
    /// The registry's entry for this spec.
    pub fn format(&self) -> Result<&'static dyn Format> {
        format(&self.format)
    }

    /// The spec with the choices that follow the dtype of a tensor.
    pub fn for_dtype(&self, dtype: DType) -> Result<Cow<'_, Spec>> {
        Ok(match self.format()?.spec_for(self, dtype) {
            Some(spec) => Cow::Owned(spec),
            None => Cow::Borrowed(self),
        })
    }

    /// The parts of a quantized tensor of this shape: those of the format, and
    /// what its input asks for.
    pub fn parts(&self, shape: &[usize]) -> Result<Vec<Part>> {
        let mut parts = self.format()?.parts(self, shape)?;
        if self.input.scaled {
            parts.push(Part {
                name: INPUT_SCALE,
                dtype: DType::F32,
                shape: vec![shape.last().copied().unwrap_or(1)],
                block_bits: 0,
            });
        }
        Ok(parts)
    }

    /// Elements that share one scale in a tensor of this shape. Blocks lie in
    /// row-major order; `Tensor` granularity is encoded row by row.
    pub fn block_len(&self, shape: &[usize]) -> usize {
        match self.granularity {
            // The rows of an empty tensor may be of any length.
            Granularity::Tensor | Granularity::Row if shape.contains(&0) => 0,
            Granularity::Tensor | Granularity::Row => shape.last().copied().unwrap_or(1),
            Granularity::Block(n) => n,
        }
    }
}

/// A quantized tensor: its spec, and the named parts that hold codes and scales.
#[derive(Clone, Debug)]
pub struct Quantized {
    pub spec: Spec,
    pub shape: Vec<usize>,
    /// The dtype it was quantized from, and the default when it is dequantized.
    pub dtype: DType,
    pub parts: Vec<(&'static str, Tensor)>,
}

impl Quantized {
    /// The part of that name. Formats ask only for parts that they declared.
    pub fn part(&self, name: &str) -> Result<&Tensor> {
        self.parts
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, t)| t)
            .ok_or_else(|| Error::InvalidDump {
                message: format!("part {name:?} is missing"),
            })
    }

    /// Bytes of all parts.
    pub fn nbytes(&self) -> usize {
        self.parts.iter().map(|(_, t)| t.bytes().len()).sum()
    }

    /// Number of elements that it stands for.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bits of codes, scales and zero points together, per element.
    pub fn bits_per_weight(&self) -> f64 {
        self.nbytes() as f64 * 8.0 / self.len().max(1) as f64
    }

    /// Checks every part against what the format declares for this shape, so
    /// that decoding can never read out of bounds.
    pub fn validate(&self) -> Result<()> {
        let format = self.spec.format()?;
        format.check_shape(&self.spec, &self.shape)?;
        let declared = self.spec.parts(&self.shape)?;
        for part in &declared {
            let tensor = self.part(part.name)?;
            if tensor.dtype() != part.dtype || tensor.shape() != part.shape {
                return Err(Error::ShapeMismatch {
                    what: format!("part {:?} of {}", part.name, self.spec.format),
                    expected: part.shape.clone(),
                    actual: tensor.shape().to_vec(),
                });
            }
        }
        if declared.len() != self.parts.len() {
            return Err(Error::InvalidDump {
                message: format!("{} parts where {} belong", self.parts.len(), declared.len()),
            });
        }
        format.check_parts(self)
    }
}

/// One part of a quantized tensor, as its format declares it.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub name: &'static str,
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// Bits of this part that one block fills; 0 for a part that belongs to
    /// the whole tensor.
    pub block_bits: usize,
}

/// What some formats must know of the whole tensor before its first block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Extremes {
    pub min: f32,
    pub max: f32,
}

impl Extremes {
    pub fn absmax(self) -> f32 {
        self.max.abs().max(self.min.abs())
    }
}

/// What encoders say of an element that is no number; what and where is counted
/// over the whole tensor.
pub const NOT_FINITE: Error = Error::NonFinite {
    nan: 0,
    inf: 0,
    first: 0,
};

/// A way to store numbers. Implementations live in `formats/`.
pub trait Format: Send + Sync {
    /// The name by which users ask for it.
    fn name(&self) -> &'static str;

    /// One line for a list of formats.
    fn about(&self) -> &'static str;

    /// Fixes every choice from what the user gave, or says what to change.
    fn resolve(&self, options: &mut Options) -> Result<Spec>;

    /// The spec as the options that would give it again.
    fn options(&self, spec: &Spec) -> Vec<(&'static str, OptionValue)>;

    /// The spec for tensors of this dtype, where it is another one.
    fn spec_for(&self, _spec: &Spec, _dtype: DType) -> Option<Spec> {
        None
    }

    /// Whether a tensor of this shape can be cut as the spec says.
    fn check_shape(&self, spec: &Spec, shape: &[usize]) -> Result<()>;

    /// The parts that a quantized tensor of this shape ends up with.
    fn parts(&self, spec: &Spec, shape: &[usize]) -> Result<Vec<Part>>;

    /// The parts that `encode` fills, where they differ from the final ones.
    fn working_parts(&self, spec: &Spec, shape: &[usize]) -> Result<Vec<Part>> {
        self.parts(spec, shape)
    }

    /// Whether `encode` needs the extremes of the whole tensor.
    fn needs_extremes(&self, _spec: &Spec) -> bool {
        false
    }

    /// Whether `encode` fails by itself where an element is no number: scales tell.
    fn sees_non_finite(&self, _spec: &Spec) -> bool {
        false
    }

    /// Encodes whole blocks (the tensor's last may be short). `parts` are this
    /// chunk's pieces of the working parts, in their order, zeroed; parts of
    /// the whole tensor are empty here.
    fn encode(
        &self,
        spec: &Spec,
        block_len: usize,
        extremes: Option<Extremes>,
        x: &[f32],
        parts: &mut [&mut [u8]],
    ) -> Result<()>;

    /// Turns the working parts into the final ones.
    fn finish(
        &self,
        _spec: &Spec,
        _extremes: Option<Extremes>,
        working: Vec<(&'static str, Tensor)>,
    ) -> Result<Vec<(&'static str, Tensor)>> {
        Ok(working)
    }

    /// Checks the numbers of parts that decoding uses as positions.
    fn check_parts(&self, _q: &Quantized) -> Result<()> {
        Ok(())
    }

    /// The format as a grid, for methods that choose codes one column after the
    /// other.
    ///
    /// # Errors
    /// `InvalidOption` where codes and scales are not independent enough.
    fn grid<'a>(
        &'a self,
        spec: &'a Spec,
        _extremes: Option<Extremes>,
    ) -> Result<Box<dyn Grid + 'a>> {
        Err(Error::option(
            "method",
            format!(
                "gptq rounds to integers, nf4, fp4, fp8, mxfp4, mxfp8, nvfp4 and sparse24, not {}",
                spec.format
            ),
        ))
    }

    /// A decoder over a validated quantized tensor.
    fn decoder<'a>(&'a self, q: &'a Quantized) -> Result<Box<dyn Decode + 'a>>;
}

/// A format whose codes are rounded one by one under scales chosen before.
pub trait Grid: Sync {
    /// Scale and zero point of whole blocks, as they will be stored; formats
    /// without a zero point leave it.
    fn fit(&self, x: &[f32], block_len: usize, scales: &mut [f32], zeros: &mut [f32])
    -> Result<()>;

    /// Codes and their values, each element under a scale and zero point of its
    /// own.
    fn round(&self, x: &[f32], scales: &[f32], zeros: &[f32], codes: &mut [u8], values: &mut [f32]);

    /// The bytes of the working parts, in their order, from one code a byte and
    /// the scales and zero points of all blocks; [`Format::finish`] has the rest.
    fn store(&self, codes: &[u8], scales: &[f32], zeros: &[f32]) -> Result<Vec<Vec<u8>>>;

    /// Whether two of every four codes have to be zeros.
    fn two_of_four(&self) -> bool {
        false
    }
}

/// Reads elements back.
pub trait Decode: Sync {
    /// Writes elements `start .. start + out.values.len()`, in row-major order.
    fn decode_into(&self, start: usize, out: Out);

    /// The same where they are soon read.
    fn decode(&self, start: usize, out: &mut [f32]) {
        self.decode_into(start, Out::near(out));
    }

    /// The same as integers under scales, where the format is that or nearly so.
    fn steps(&self) -> Option<&dyn Steps> {
        None
    }
}

/// Every format, in the order in which they are shown to users.
pub static FORMATS: &[&dyn Format] = &[
    &formats::int::INT8,
    &formats::int::INT6,
    &formats::int::INT5,
    &formats::int::INT4,
    &formats::int::INT3,
    &formats::int::INT2,
    &formats::codebook::NF4,
    &formats::codebook::FP4,
    &formats::dynamic8::DYNAMIC8,
    &formats::fp8::FP8_E4M3,
    &formats::fp8::FP8_E5M2,
    &formats::mx::MXFP8,
    &formats::mx::MXFP8_E5M2,
    &formats::mx::MXFP4,
    &formats::nvfp4::NVFP4,
    &formats::sparse24::SPARSE24,
    Blocks::<q_blocks::Q8_0>::FORMAT,
    Blocks::<q_blocks::Q5_1>::FORMAT,
    Blocks::<q_blocks::Q5_0>::FORMAT,
    Blocks::<q_blocks::Q4_1>::FORMAT,
    Blocks::<q_blocks::Q4_0>::FORMAT,
    Blocks::<k_quants::Q6K>::FORMAT,
    Blocks::<k_quants::Q5K>::FORMAT,
    Blocks::<k_quants::Q4K>::FORMAT,
    Blocks::<k_quants::Q3K>::FORMAT,
    Blocks::<k_quants::Q2K>::FORMAT,
    Blocks::<iq4::Iq4Nl>::FORMAT,
    Blocks::<iq4::Iq4Xs>::FORMAT,
];

/// The format of that name.
pub fn format(name: &str) -> Result<&'static dyn Format> {
    FORMATS
        .iter()
        .copied()
        .find(|f| f.name() == name)
        .ok_or_else(|| Error::UnknownFormat {
            name: name.into(),
            known: FORMATS
                .iter()
                .map(|f| f.name())
                .collect::<Vec<_>>()
                .join(", "),
        })
}

/// Resolves a format's name and options into a [`Spec`].
pub fn spec(name: &str, options: Vec<(String, OptionValue)>) -> Result<Spec> {
    let mut options = Options::new(options);
    let spec = format(name)?.resolve(&mut options)?;
    options.finish(name)?;
    Ok(spec)
}
