//! Integer codes with scales, whatever format spells them.
//!
//! value = (code − zero) · scale, or code · scale + bias. Between formats of
//! this family a value keeps its bits as long as the integer or the bias and the
//! scale keep theirs; where one form of zero turns into the other, products and
//! sums have to be exact in f32 as well.

use super::blocks::{self, Numbers};
use crate::error::Result;
use crate::format::{Granularity, Quantized, Scale, Spec, Zero};
use crate::formats::int;
use crate::simd::bits;
use crate::tensor::{DType, Tensor, narrow, widen};

/// What is taken from a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shift {
    /// Half of the range of codes.
    Half,
    /// An integer of each block.
    Integer,
    /// Nothing: each block has a bias, the value of code 0.
    Float,
}

/// How a spec of the family stores a block.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    pub width: usize,
    pub shift: Shift,
}

impl Form {
    /// The form of a spec, if it is of the family.
    pub fn of(spec: &Spec) -> Option<Form> {
        if spec.act_order {
            return None;
        }
        let (width, shift) = match int::width(&spec.format) {
            None => return blocks::form(&spec.format),
            Some(width) => match (spec.symmetric, spec.zero) {
                (true, _) => (width, Shift::Half),
                (false, Zero::Integer) => (width, Shift::Integer),
                (false, Zero::Float) => (width, Shift::Float),
            },
        };
        Some(Form { width, shift })
    }

    fn top(self) -> i32 {
        (1 << self.width) - 1
    }

    fn half(self) -> i32 {
        1 << (self.width - 1)
    }
}

/// The numbers of a quantized tensor of the family, its codes left where they are.
pub struct Affine {
    form: Form,
    /// Elements that share a scale; whole blocks fill a row.
    pub block: usize,
    scales: Vec<f32>,
    /// `None` where the bias of some block is no multiple of its scale.
    zeros: Option<Vec<u8>>,
    /// `None` where zeros are integers.
    biases: Option<Vec<f32>>,
    /// Whether `scales` are the numbers that decoding multiplies with.
    exact: bool,
}

/// Whether any product with 8 bits is exact in f32, and any sum of two of them.
fn is_coarse(scale: f32) -> bool {
    scale.to_bits() & 0xff == 0
}

/// A number as that dtype stores it.
fn stored(dtype: DType, v: f32) -> Result<f32> {
    let mut bytes = [0u8; 8];
    let bytes = &mut bytes[..dtype.size()];
    narrow(dtype, &[v], bytes)?;
    let mut back = [0f32];
    widen(dtype, bytes, &mut back);
    Ok(back[0])
}

impl Affine {
    /// The numbers of `q`, if its format is of the family.
    pub fn of(q: &Quantized) -> Result<Option<Affine>> {
        let (Some(form), Some(&columns)) = (Form::of(&q.spec), q.shape.last()) else {
            return Ok(None);
        };
        if q.is_empty() {
            return Ok(None);
        }
        let rows = q.len() / columns;
        let (mut scales, mut zeros, mut biases) = match int::width(&q.spec.format) {
            None => {
                let numbers = Numbers::of(&q.spec.format, q.part("blocks")?.bytes());
                let zeros = vec![form.half() as u8; numbers.scales.len()];
                (numbers.scales, Some(zeros), numbers.biases)
            }
            Some(width) => {
                let scales = q.part("scales")?.to_f32_vec();
                let mut zeros = vec![form.half() as u8; scales.len()];
                if form.shift == Shift::Integer {
                    bits::unpack(width, q.part("zero_points")?.bytes(), 0, &mut zeros);
                }
                let biases = match form.shift {
                    Shift::Float => Some(q.part("biases")?.to_f32_vec()),
                    _ => None,
                };
                (scales, Some(zeros), biases)
            }
        };
        if q.spec.granularity == Granularity::Tensor {
            scales = vec![scales[0]; rows];
            zeros = zeros.map(|z| vec![z[0]; rows]);
        }
        if let Some(biases) = &mut biases {
            zeros = scales
                .iter()
                .zip(&*biases)
                .map(|(&s, &b)| integer(form, s, b))
                .collect();
        }
        let absmax = q.spec.scale == Scale::Absmax;
        if absmax {
            scales.iter_mut().for_each(|s| *s /= 127.0);
        }
        Ok(Some(Affine {
            form,
            block: q.len() / scales.len(),
            scales,
            zeros,
            biases,
            exact: !absmax,
        }))
    }

    pub fn width(&self) -> usize {
        self.form.width
    }

    /// Whether `spec` holds the same values, told without a look at the codes.
    pub fn fits(&self, spec: &Spec, shape: &[usize]) -> Result<bool> {
        let Some(form) = self.cut(spec, shape) else {
            return Ok(false);
        };
        if !self.exact || spec.scale != Scale::Step || !self.are_stored(spec, &self.scales)? {
            return Ok(false);
        }
        match (form.shift, self.biases(form)) {
            (Shift::Float, None) => Ok(false),
            (Shift::Float, Some(biases)) => {
                let is_exact = self.biases.is_some() || self.scales.iter().all(|&s| is_coarse(s));
                Ok(is_exact && self.are_stored(spec, &biases)?)
            }
            _ => Ok(self.takes_codes(form)),
        }
    }

    /// Whether `spec` holds the same codes, its scales rounded perhaps.
    pub fn nearly_fits(&self, spec: &Spec, shape: &[usize]) -> bool {
        self.cut(spec, shape)
            .is_some_and(|form| self.takes_codes(form))
    }

    /// Whether any code has a place in `form`.
    fn takes_codes(&self, form: Form) -> bool {
        let top = self.form.top();
        let all = |fits: &dyn Fn(i32) -> bool| {
            let zeros = self.zeros.as_ref();
            zeros.is_some_and(|zeros| zeros.iter().all(|&z| fits(i32::from(z))))
        };
        match form.shift {
            Shift::Float => form.width >= self.form.width,
            Shift::Integer => form.width >= self.form.width && all(&|z| z <= form.top()),
            Shift::Half => all(&|z| z <= form.half() && top - z < form.half()),
        }
    }

    /// The form of `spec`, if its blocks are cut from these.
    fn cut(&self, spec: &Spec, shape: &[usize]) -> Option<Form> {
        let form = Form::of(spec)?;
        let block = spec.block_len(shape);
        let cut = spec.granularity != Granularity::Tensor
            && block > 0
            && self.block.is_multiple_of(block);
        cut.then_some(form)
    }

    fn are_stored(&self, spec: &Spec, numbers: &[f32]) -> Result<bool> {
        for &v in numbers {
            if stored(spec.scale_dtype, v)? != v {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The value of code 0 in each block.
    fn biases(&self, form: Form) -> Option<Vec<f32>> {
        if form.width < self.form.width {
            return None;
        }
        if let Some(biases) = &self.biases {
            return Some(biases.clone());
        }
        let pairs = self.zeros.as_ref()?.iter().zip(&self.scales);
        Some(pairs.map(|(&z, &s)| -(f32::from(z) * s)).collect())
    }

    /// The same codes under another spec, scales and biases rounded to its
    /// dtype; `None` where it has no room for them.
    pub fn renamed(&self, q: &Quantized, spec: &Spec) -> Result<Option<Quantized>> {
        let Some(form) = self.cut(spec, &q.shape) else {
            return Ok(None);
        };
        let Some(codes) = self.codes(q, form)? else {
            return Ok(None);
        };
        let by = match spec.scale {
            Scale::Absmax => 127.0,
            _ => 1.0,
        };
        let repeat = self.block / spec.block_len(&q.shape);
        let scales: Vec<f32> = self.scales.iter().map(|s| s * by).collect();
        let Some(scales) = rounded(spec.scale_dtype, &scales, repeat)? else {
            return Ok(None);
        };
        let biases = match (form.shift, self.biases(form)) {
            (Shift::Float, None) => return Ok(None),
            (Shift::Float, Some(biases)) => match rounded(spec.scale_dtype, &biases, repeat)? {
                None => return Ok(None),
                biases => biases,
            },
            _ => None,
        };
        let zeros = match (form.shift, &self.zeros) {
            (Shift::Integer, Some(zeros)) => Some(repeated(zeros, repeat)),
            _ => None,
        };
        let declared = spec.format()?.parts(spec, &q.shape)?;
        let bytes: Vec<Vec<u8>> = match int::width(&spec.format) {
            None => vec![blocks::joined(
                &spec.format,
                &codes,
                &scales,
                biases.as_deref(),
            )],
            Some(8) => vec![match form.shift {
                Shift::Half => codes.iter().map(|c| c ^ 0x80).collect(),
                _ => codes,
            }],
            Some(width) => vec![packed(width, &codes)],
        };
        let mut bytes = bytes;
        if int::width(&spec.format).is_some() {
            bytes.push(scales);
            bytes.extend(zeros.map(|zeros| packed(form.width, &zeros)));
            bytes.extend(biases);
        }
        let parts = declared.iter().zip(&bytes);
        let parts = parts
            .map(|(part, b)| Ok((part.name, Tensor::from_slice(part.dtype, &part.shape, b)?)))
            .collect::<Result<Vec<_>>>()?;
        let renamed = Quantized {
            spec: spec.clone(),
            shape: q.shape.clone(),
            dtype: q.dtype,
            parts,
        };
        renamed.validate()?;
        Ok(Some(renamed))
    }

    /// A code a byte, as `form` counts them; `None` where one is out of range.
    fn codes(&self, q: &Quantized, form: Form) -> Result<Option<Vec<u8>>> {
        let mut codes = match int::width(&q.spec.format) {
            None => blocks::codes(&q.spec.format, q.part("blocks")?.bytes()),
            Some(8) => q.part("codes")?.bytes().to_vec(),
            Some(width) => {
                let mut codes = vec![0u8; q.len()];
                bits::unpack(width, q.part("codes")?.bytes(), 0, &mut codes);
                codes
            }
        };
        if q.part("codes")
            .is_ok_and(|codes| codes.dtype() == DType::I8)
        {
            codes.iter_mut().for_each(|c| *c ^= 0x80);
        }
        let Some(zeros) = &self.zeros else {
            return Ok((form.shift == Shift::Float).then_some(codes));
        };
        match form.shift {
            Shift::Float => Ok((form.width >= self.form.width).then_some(codes)),
            Shift::Integer => {
                let zeros_fit = zeros.iter().all(|&z| i32::from(z) <= form.top());
                let fit = form.width >= self.form.width && zeros_fit;
                Ok(fit.then_some(codes))
            }
            Shift::Half => {
                for (block, &zero) in codes.chunks_mut(self.block).zip(zeros) {
                    let add = form.half() - i32::from(zero);
                    for code in block {
                        let moved = i32::from(*code) + add;
                        if !(0..=form.top()).contains(&moved) {
                            return Ok(None);
                        }
                        *code = moved as u8;
                    }
                }
                Ok(Some(codes))
            }
        }
    }
}

/// The integer zero that stands for a bias, if one does, exactly.
fn integer(form: Form, scale: f32, bias: f32) -> Option<u8> {
    if scale == 0.0 {
        return (bias == 0.0).then_some(form.half() as u8);
    }
    let zero = (-bias / scale).round();
    let is_exact = is_coarse(scale) && (0.0..=255.0).contains(&zero) && zero * scale == -bias;
    is_exact.then_some(zero as u8)
}

fn repeated<T: Copy>(items: &[T], times: usize) -> Vec<T> {
    items
        .iter()
        .flat_map(|&v| std::iter::repeat_n(v, times))
        .collect()
}

/// The bytes of numbers in that dtype, each `times` times; `None` where one
/// overflows it.
fn rounded(dtype: DType, numbers: &[f32], times: usize) -> Result<Option<Vec<u8>>> {
    let numbers = repeated(numbers, times);
    let mut bytes = vec![0u8; numbers.len() * dtype.size()];
    narrow(dtype, &numbers, &mut bytes)?;
    let mut back = vec![0f32; numbers.len()];
    widen(dtype, &bytes, &mut back);
    Ok(back.iter().all(|v| v.is_finite()).then_some(bytes))
}

fn packed(width: usize, codes: &[u8]) -> Vec<u8> {
    let mut packed = vec![0u8; bits::packed_len(width, codes.len())];
    bits::pack(width, codes, &mut packed);
    packed
}
