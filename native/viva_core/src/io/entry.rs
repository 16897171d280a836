//! One named tensor of a file, as its header declares it.

use std::ops::Range;

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::formats::ggml_types::GgmlType;
use crate::tensor::{DType, element_count};

/// Element type of an entry: one that tensors can have, one of ggml's blocks,
/// or one that is only carried through as bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryDType {
    Known(DType),
    /// Never one that has a [`DType`], when made by `From`.
    Other(Dtype),
    /// A block format of ggml: such an entry is a quantized tensor by itself.
    /// Never one that has a [`DType`], when made by `From`.
    Ggml(&'static GgmlType),
}

impl From<Dtype> for EntryDType {
    fn from(dtype: Dtype) -> EntryDType {
        let known = DType::ALL
            .into_iter()
            .find(|d| EntryDType::Known(*d).in_safetensors() == Some(dtype));
        known.map_or(EntryDType::Other(dtype), EntryDType::Known)
    }
}

impl From<&'static GgmlType> for EntryDType {
    fn from(ggml: &'static GgmlType) -> EntryDType {
        let known = DType::ALL.into_iter().find(|d| d.name() == ggml.name);
        known.map_or(EntryDType::Ggml(ggml), EntryDType::Known)
    }
}

impl From<DType> for EntryDType {
    fn from(dtype: DType) -> EntryDType {
        EntryDType::Known(dtype)
    }
}

impl EntryDType {
    /// The dtype as the safetensors crate spells it, where it can.
    pub(super) fn in_safetensors(self) -> Option<Dtype> {
        Some(match self {
            EntryDType::Ggml(_) => return None,
            EntryDType::Other(dtype) => dtype,
            EntryDType::Known(dtype) => match dtype {
                DType::F64 => Dtype::F64,
                DType::F32 => Dtype::F32,
                DType::F16 => Dtype::F16,
                DType::BF16 => Dtype::BF16,
                DType::F8E4M3 => Dtype::F8_E4M3,
                DType::F8E5M2 => Dtype::F8_E5M2,
                DType::F8E8M0 => Dtype::F8_E8M0,
                DType::I64 => Dtype::I64,
                DType::I32 => Dtype::I32,
                DType::I16 => Dtype::I16,
                DType::I8 => Dtype::I8,
                DType::U64 => Dtype::U64,
                DType::U32 => Dtype::U32,
                DType::U16 => Dtype::U16,
                DType::U8 => Dtype::U8,
                DType::Bool => Dtype::BOOL,
            },
        })
    }

    /// The type as ggml has it, where it does.
    pub(super) fn ggml(self) -> Option<&'static GgmlType> {
        match self {
            EntryDType::Known(dtype) => GgmlType::by_name(dtype.name()),
            EntryDType::Ggml(ggml) => Some(ggml),
            EntryDType::Other(_) => None,
        }
    }

    /// The name in lower case, as users read it: `f32`, `c64`, `q4_1` …
    pub fn name(self) -> String {
        match self {
            EntryDType::Known(dtype) => dtype.name().into(),
            EntryDType::Other(dtype) => dtype.to_string().to_lowercase(),
            EntryDType::Ggml(ggml) => ggml.name.into(),
        }
    }

    /// Elements that are stored as one, and the bits that they take.
    pub fn block(self) -> (usize, usize) {
        match self {
            EntryDType::Known(dtype) => (1, dtype.size() * 8),
            EntryDType::Other(dtype) => (1, dtype.bitsize()),
            EntryDType::Ggml(ggml) => (ggml.block_len, ggml.block_bytes * 8),
        }
    }

    /// Bytes of a tensor of this shape.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`]; [`Error::Indivisible`] when blocks do not fill
    /// the rows; [`Error::SizeMismatch`] when elements of less than a byte do
    /// not fill whole bytes.
    pub fn nbytes(self, shape: &[usize]) -> Result<usize> {
        let (block, bits) = self.block();
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(block) {
            return Err(Error::Indivisible { row, block });
        }
        let bits = (element_count(shape)? / block)
            .checked_mul(bits)
            .ok_or_else(|| Error::ShapeOverflow {
                shape: shape.to_vec(),
            })?;
        if !bits.is_multiple_of(8) {
            return Err(Error::SizeMismatch {
                what: format!(
                    "bits of a {} tensor of shape {shape:?}, in whole bytes",
                    self.name()
                ),
                expected: bits.next_multiple_of(8),
                actual: bits,
            });
        }
        Ok(bits / 8)
    }
}

/// One named tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub name: String,
    pub dtype: EntryDType,
    pub shape: Vec<usize>,
    /// Its bytes, counted from the start of the file's data (not of the file).
    pub range: Range<usize>,
}

impl Entry {
    /// Length in bytes.
    pub fn nbytes(&self) -> usize {
        self.range.len()
    }
}

/// The error for a name that is not among `names`, with the most similar one.
pub(crate) fn unknown_tensor<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Error {
    // A third of the name may be wrong before a guess is no longer of use.
    let limit = name.chars().count().div_ceil(3);
    let nearest = names
        .filter(|n| n.len().abs_diff(name.len()) <= limit)
        .map(|n| (edit_distance(name, n), n))
        .filter(|(d, _)| *d <= limit)
        .min();
    Error::UnknownTensor {
        name: name.into(),
        hint: nearest.map_or(String::new(), |(_, n)| format!("; did you mean {n:?}?")),
    }
}

/// Characters to insert, delete or replace to turn `a` into `b`.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::ggml_types::GGML_TYPES;

    #[test]
    fn every_dtype_has_its_spelling_and_size() {
        for dtype in DType::ALL {
            let entry = EntryDType::from(dtype);
            assert_eq!(entry.name(), dtype.name());
            assert_eq!(entry.block(), (1, dtype.size() * 8));
            assert_eq!(entry.in_safetensors().map(EntryDType::from), Some(entry));
        }
        let f4 = EntryDType::from(Dtype::F4);
        assert_eq!((f4.name().as_str(), f4.block()), ("f4", (1, 4)));
        for ggml in &GGML_TYPES {
            let entry = EntryDType::from(ggml);
            assert_eq!(entry.ggml(), Some(ggml));
            assert_eq!(entry.name(), ggml.name);
            assert_eq!(entry.block(), (ggml.block_len, ggml.block_bytes * 8));
            assert_eq!(matches!(entry, EntryDType::Known(_)), ggml.block_len == 1);
        }
    }

    #[test]
    fn sizes_in_bytes() {
        let f4 = EntryDType::Other(Dtype::F4);
        assert_eq!(f4.nbytes(&[3, 2]), Ok(3));
        assert!(matches!(f4.nbytes(&[3]), Err(Error::SizeMismatch { .. })));
        let q4_1 = EntryDType::Ggml(GgmlType::by_name("q4_1").unwrap());
        assert_eq!(q4_1.nbytes(&[3, 64]), Ok(120));
        assert!(matches!(
            q4_1.nbytes(&[4, 24]),
            Err(Error::Indivisible { row: 24, block: 32 })
        ));
        let c64 = EntryDType::Other(Dtype::C64);
        assert_eq!(c64.nbytes(&[]), Ok(8));
        assert!(matches!(
            c64.nbytes(&[usize::MAX / 32]),
            Err(Error::ShapeOverflow { .. })
        ));
    }

    #[test]
    fn the_nearest_name_is_suggested() {
        let names = ["layers.0.mlp.up.weight", "lm_head.weight"];
        let hint = |name| unknown_tensor(name, names.into_iter()).to_string();
        assert!(hint("lm_haed.weight").ends_with("; did you mean \"lm_head.weight\"?"));
        assert_eq!(hint("zzz"), "no tensor named \"zzz\"");
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "ab"), 2);
    }
}
