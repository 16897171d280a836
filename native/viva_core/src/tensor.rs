//! Dense tensors: a dtype, a shape, and bytes that live anywhere.
//!
//! Storage is either memory of ours, which is counted, or any shared bytes: a
//! BEAM binary, a mapped file region. Nothing is copied on the way in.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use half::slice::HalfFloatSliceExt;
use memmap2::MmapMut;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::simd::bf16::{Narrow, Widen};
use crate::simd::dispatch;
use crate::simd::memory::use_huge_pages;
use crate::small_float::{E4M3, E4M3_VALUES, E5M2, E5M2_VALUES, e8m0};

#[cfg(target_endian = "big")]
compile_error!("checkpoint files are little-endian, and so is every reader here");

/// Element type of a dense tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    /// 4 bits of exponent and 3 of mantissa, without infinities.
    #[serde(rename = "f8_e4m3")]
    F8E4M3,
    /// 5 bits of exponent and 2 of mantissa.
    #[serde(rename = "f8_e5m2")]
    F8E5M2,
    /// Powers of two: the scales of the MX formats.
    #[serde(rename = "f8_e8m0")]
    F8E8M0,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
}

impl DType {
    /// Every dtype, in the order in which they are shown to users.
    pub const ALL: [DType; 16] = [
        DType::F64,
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::F8E4M3,
        DType::F8E5M2,
        DType::F8E8M0,
        DType::I64,
        DType::I32,
        DType::I16,
        DType::I8,
        DType::U64,
        DType::U32,
        DType::U16,
        DType::U8,
        DType::Bool,
    ];

    /// The name in lower case, as users write it.
    pub fn name(self) -> &'static str {
        match self {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::F8E4M3 => "f8_e4m3",
            DType::F8E5M2 => "f8_e5m2",
            DType::F8E8M0 => "f8_e8m0",
            DType::I64 => "i64",
            DType::I32 => "i32",
            DType::I16 => "i16",
            DType::I8 => "i8",
            DType::U64 => "u64",
            DType::U32 => "u32",
            DType::U16 => "u16",
            DType::U8 => "u8",
            DType::Bool => "bool",
        }
    }

    /// The dtype of that name, or an error that lists the known ones.
    pub fn from_name(name: &str) -> Result<DType> {
        DType::ALL
            .into_iter()
            .find(|d| d.name() == name)
            .ok_or_else(|| Error::UnknownDtype {
                name: name.into(),
                known: DType::ALL.map(DType::name).join(", "),
            })
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 | DType::U64 => 8,
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::F16 | DType::BF16 | DType::I16 | DType::U16 => 2,
            DType::F8E4M3 | DType::F8E5M2 | DType::F8E8M0 => 1,
            DType::I8 | DType::U8 | DType::Bool => 1,
        }
    }

    /// Whether the elements are floating-point numbers, which are then taken
    /// as they stand: a scale that a file keeps beside 8-bit floats is not
    /// applied.
    pub fn is_float(self) -> bool {
        matches!(
            self,
            DType::F64
                | DType::F32
                | DType::F16
                | DType::BF16
                | DType::F8E4M3
                | DType::F8E5M2
                | DType::F8E8M0
        )
    }
}

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);

/// Bytes of native memory that live buffers hold now.
pub fn live_bytes() -> usize {
    LIVE_BYTES.load(Ordering::Relaxed)
}

/// From this size on a buffer is pages of its own, which go back to the system
/// the moment it is dropped; an allocator may keep them for a next time that
/// never comes, and a job promises a bound.
const PAGES: usize = 1 << 20;

#[derive(Debug)]
enum Memory {
    Words(Vec<u64>),
    Pages(MmapMut),
}

/// Zeroed memory, aligned for every dtype and counted while it lives.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    len: usize,
}

impl Buffer {
    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Buffer {
        LIVE_BYTES.fetch_add(len, Ordering::Relaxed);
        let pages = (len >= PAGES).then(|| MmapMut::map_anon(len));
        let memory = match pages {
            Some(Ok(mut pages)) => {
                use_huge_pages(&mut pages);
                Memory::Pages(pages)
            }
            _ => Memory::Words(vec![0; len.div_ceil(8)]),
        };
        Buffer { memory, len }
    }

    /// The bytes, to be filled in.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Words(words) => &mut bytemuck::cast_slice_mut(words)[..self.len],
            Memory::Pages(pages) => pages,
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        match &self.memory {
            Memory::Words(words) => &bytemuck::cast_slice(words)[..self.len],
            Memory::Pages(pages) => pages,
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        LIVE_BYTES.fetch_sub(self.len, Ordering::Relaxed);
    }
}

/// What holds bytes, wherever they live.
pub trait Storage: AsRef<[u8]> + Any + Send + Sync {}

impl<T: AsRef<[u8]> + Any + Send + Sync> Storage for T {}

/// Bytes that several tensors may share.
pub type SharedBytes = Arc<dyn Storage>;

/// A dense, row-major tensor. Cloning shares the bytes.
#[derive(Clone)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    storage: SharedBytes,
    range: Range<usize>,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({}{:?})", self.dtype.name(), self.shape)
    }
}

/// The number of elements of a shape, multiplied from its first dimension on,
/// or an error when that overflows. What follows a zero may be of any size.
pub fn element_count(shape: &[usize]) -> Result<usize> {
    shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .filter(|&n| n <= isize::MAX as usize / 8)
        .ok_or_else(|| Error::ShapeOverflow {
            shape: shape.to_vec(),
        })
}

impl Tensor {
    /// A tensor over `range` of shared bytes, which must be exactly its size.
    pub fn new(
        dtype: DType,
        shape: Vec<usize>,
        storage: SharedBytes,
        range: Range<usize>,
    ) -> Result<Tensor> {
        let expected = element_count(&shape)? * dtype.size();
        let actual = range.end.saturating_sub(range.start);
        if range.start > range.end || range.end > (*storage).as_ref().len() || actual != expected {
            return Err(Error::SizeMismatch {
                what: format!("bytes of a {} tensor of shape {shape:?}", dtype.name()),
                expected,
                actual,
            });
        }
        Ok(Tensor {
            dtype,
            shape,
            storage,
            range,
        })
    }

    /// A tensor that owns its buffer.
    pub fn from_buffer(dtype: DType, shape: Vec<usize>, buffer: Buffer) -> Result<Tensor> {
        let len = buffer.len;
        Tensor::new(dtype, shape, Arc::new(buffer), 0..len)
    }

    /// A tensor with a copy of these elements (or of these bytes).
    pub fn from_slice<T: bytemuck::NoUninit>(
        dtype: DType,
        shape: &[usize],
        data: &[T],
    ) -> Result<Tensor> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let mut buffer = Buffer::zeroed(bytes.len());
        buffer.bytes_mut().copy_from_slice(bytes);
        Tensor::from_buffer(dtype, shape.to_vec(), buffer)
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        (self.range.end - self.range.start) / self.dtype.size()
    }

    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Elements of one row: the last dimension, or 1 for a scalar.
    pub fn row_len(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    pub fn bytes(&self) -> &[u8] {
        &(*self.storage).as_ref()[self.range.clone()]
    }

    /// What holds the bytes, if it is a `T`, and where in it they are.
    pub fn held_by<T: Storage>(&self) -> Option<(&T, Range<usize>)> {
        let storage: &dyn Any = &*self.storage;
        Some((storage.downcast_ref()?, self.range.clone()))
    }

    /// The same bytes under another shape of the same size.
    pub fn reshaped(&self, shape: Vec<usize>) -> Result<Tensor> {
        self.viewed(self.dtype, shape)
    }

    /// The same bytes under another dtype and shape of the same size.
    pub fn viewed(&self, dtype: DType, shape: Vec<usize>) -> Result<Tensor> {
        Tensor::new(dtype, shape, Arc::clone(&self.storage), self.range.clone())
    }

    /// Those rows of a matrix, in place.
    ///
    /// # Errors
    /// `SizeMismatch` where it has fewer.
    pub fn rows(&self, rows: Range<usize>) -> Result<Tensor> {
        let row = self.row_len() * self.dtype.size();
        let range = self.range.start + rows.start * row..self.range.start + rows.end * row;
        if range.end > self.range.end {
            return Err(Error::SizeMismatch {
                what: format!("rows of a matrix of shape {:?}, at most", self.shape),
                expected: self.shape.first().copied().unwrap_or(0),
                actual: rows.end,
            });
        }
        let shape = vec![rows.len(), self.row_len()];
        Tensor::new(self.dtype, shape, Arc::clone(&self.storage), range)
    }

    /// Elements in place, when their dtype and alignment allow it.
    pub fn as_slice<T: bytemuck::AnyBitPattern>(&self) -> Option<&[T]> {
        bytemuck::try_cast_slice(self.bytes()).ok()
    }

    /// Elements `range` as f32: in place for aligned f32, else converted into
    /// `scratch`. Integers and f64 are rounded to the nearest f32.
    pub fn f32_chunk<'a>(&'a self, range: Range<usize>, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        let size = self.dtype.size();
        let bytes = &self.bytes()[range.start * size..range.end * size];
        if self.dtype == DType::F32
            && let Ok(slice) = bytemuck::try_cast_slice(bytes)
        {
            return slice;
        }
        scratch.resize(range.len(), 0.0);
        widen(self.dtype, bytes, scratch);
        scratch
    }

    /// All elements as f32.
    pub fn to_f32_vec(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        widen(self.dtype, self.bytes(), &mut out);
        out
    }
}

/// Converts little-endian `bytes` of `dtype`, of any alignment, to f32.
pub fn widen(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    macro_rules! each {
        ($t:ty, $n:literal, $f:expr) => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<$n>().0) {
                *o = $f(<$t>::from_le_bytes(*b));
            }
        };
    }
    match dtype {
        DType::F32 => each!(f32, 4, |v| v),
        DType::F16 => match bytemuck::try_cast_slice::<u8, f16>(bytes) {
            Ok(slice) => slice.convert_to_f32_slice(out),
            Err(_) => each!(f16, 2, f16::to_f32),
        },
        DType::BF16 => dispatch(Widen {
            x: bytes.as_chunks().0,
            out,
        }),
        DType::F64 => each!(f64, 8, |v| v as f32),
        DType::F8E4M3 => each!(u8, 1, |v| E4M3_VALUES[usize::from(v)]),
        DType::F8E5M2 => each!(u8, 1, |v| E5M2_VALUES[usize::from(v)]),
        DType::F8E8M0 => each!(u8, 1, e8m0::decode),
        DType::I64 => each!(i64, 8, |v| v as f32),
        DType::I32 => each!(i32, 4, |v| v as f32),
        DType::I16 => each!(i16, 2, f32::from),
        DType::I8 => each!(i8, 1, f32::from),
        DType::U64 => each!(u64, 8, |v| v as f32),
        DType::U32 => each!(u32, 4, |v| v as f32),
        DType::U16 => each!(u16, 2, f32::from),
        DType::U8 => each!(u8, 1, f32::from),
        DType::Bool => each!(u8, 1, |v| if v == 0 { 0.0 } else { 1.0 }),
    }
}

/// Rounds f32 values to a float `dtype` (to nearest even) and stores them. Past
/// the range f16 and bf16 become infinite; 8-bit floats saturate.
pub fn narrow(dtype: DType, x: &[f32], out: &mut [u8]) -> Result<()> {
    macro_rules! each {
        ($n:literal, $f:expr) => {
            for (o, &v) in out.as_chunks_mut::<$n>().0.iter_mut().zip(x) {
                *o = $f(v).to_le_bytes();
            }
        };
    }
    match dtype {
        DType::F32 => each!(4, |v: f32| v),
        DType::F64 => each!(8, f64::from),
        DType::F16 => match bytemuck::try_cast_slice_mut::<u8, f16>(out) {
            Ok(slice) => slice.convert_from_f32_slice(x),
            Err(_) => each!(2, f16::from_f32),
        },
        DType::BF16 => dispatch(Narrow {
            x,
            out: out.as_chunks_mut().0,
        }),
        DType::F8E4M3 => each!(1, |v| E4M3.encode(v)),
        DType::F8E5M2 => each!(1, |v| E5M2.encode(v)),
        DType::F8E8M0 => each!(1, e8m0::encode),
        other => {
            return Err(Error::UnsupportedDtype {
                op: "a floating-point result".into(),
                dtype: other.name().into(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn what_holds_the_bytes_is_found_by_its_type() {
        let bytes = Arc::new(vec![7u8; 16]);
        let tensor = Tensor::new(DType::U8, vec![2, 4], bytes, 4..12).unwrap();
        let row = tensor.rows(1..2).unwrap();
        let (held, range) = row.held_by::<Vec<u8>>().unwrap();
        assert_eq!((held.len(), range), (16, 8..12));
        assert!(tensor.held_by::<Buffer>().is_none());
    }

    #[test]
    fn sizes_are_checked_and_overflow_is_an_error() {
        assert!(Tensor::from_slice(DType::F32, &[2, 2], &[0f32; 4]).is_ok());
        assert!(matches!(
            Tensor::from_slice(DType::F32, &[2, 2], &[0f32; 3]),
            Err(Error::SizeMismatch { .. })
        ));
        for shape in [vec![usize::MAX, 2], vec![1 << 40, 1 << 40, 0]] {
            assert!(matches!(
                element_count(&shape),
                Err(Error::ShapeOverflow { .. })
            ));
        }
        assert_eq!(element_count(&[usize::MAX, 0, 5]), Ok(0));
        assert_eq!(element_count(&[3, 0, usize::MAX, 2]), Ok(0));
        assert_eq!(element_count(&[]), Ok(1));
    }

    #[test]
    fn chunks_widen_from_any_dtype_and_alignment() {
        let values = [1.5f32, -2.0, 0.0, 65504.0, 3.0];
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let mut bytes = vec![0u8; values.len() * dtype.size() + 1];
            narrow(dtype, &values, &mut bytes[1..]).unwrap();
            let n = bytes.len();
            let t = Tensor::new(dtype, vec![values.len()], Arc::new(bytes), 1..n).unwrap();
            let mut scratch = Vec::new();
            let got = t.f32_chunk(1..5, &mut scratch);
            let expected: Vec<f32> = match dtype {
                DType::BF16 => values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect(),
                _ => values.to_vec(),
            };
            assert_eq!(got, &expected[1..], "{}", dtype.name());
        }
    }

    #[test]
    fn buffers_are_counted_while_they_live() {
        // Other tests run beside this one: look for a jump far over their size.
        let big = 1 << 33;
        let buffer = Buffer::zeroed(big);
        assert!(live_bytes() >= big);
        drop(buffer);
        assert!(live_bytes() < big);
    }
}
