//! What comes before the data: the metadata, and what tensors there are.

use std::collections::HashSet;

use super::cursor::Cursor;
use super::value::{Metadata, Value};
use super::{ALIGNMENT, ALIGNMENT_KEY, MAGIC};
use crate::formats::ggml_types::GgmlType;
use crate::io::entry::{Entry, EntryDType};

/// Bytes of the longest name that ggml gives a tensor.
const MAX_NAME: usize = 63;

/// Dimensions that ggml's tensors have at most.
const MAX_DIMENSIONS: u32 = 4;

/// Bytes of the shortest key with its value: a length, a type, one byte.
const LEAST_PAIR: usize = 13;

/// Bytes of the shortest description of a tensor: an empty name, no dimension.
const LEAST_TENSOR: usize = 24;

pub(in crate::io) struct Header {
    pub metadata: Metadata,
    /// In the order of their bytes.
    pub entries: Vec<Entry>,
}

impl Header {
    /// Reads and checks the header of a whole file. Returns it with the offset
    /// in bytes at which the data starts, or says what is wrong with the file.
    pub fn read(file: &[u8]) -> Result<(Header, usize), String> {
        let mut cursor = Cursor::new(file);
        if cursor.take(4, "the magic number").ok() != Some(MAGIC) {
            return Err("is not a GGUF file: it does not start with the letters GGUF".into());
        }
        match cursor.u32("the version")? {
            2 | 3 => {}
            1 => return Err("is a GGUF file of version 1; convert it to version 3 first".into()),
            version if version & 0xffff == 0 => {
                return Err("is a big-endian GGUF file; convert it to little-endian first".into());
            }
            version => return Err(format!("is a GGUF file of the unknown version {version}")),
        }
        let tensors = cursor.count(LEAST_TENSOR, "the number of tensors")?;
        let pairs = cursor.count(LEAST_PAIR, "the number of metadata pairs")?;
        let metadata = Metadata::read(&mut cursor, pairs)?;
        check_whole(&metadata)?;
        let alignment = alignment(&metadata)?;
        let mut seen = HashSet::new();
        let mut entries = Vec::new();
        let mut end = 0;
        for i in 0..tensors {
            let entry = read_entry(&mut cursor, i, end, &mut seen)?;
            end = padded(entry.range.end, alignment).ok_or_else(|| too_large(&entry.name))?;
            entries.push(entry);
        }
        let data_start = match tensors {
            // Nothing has to be aligned, and nothing is.
            0 => file.len(),
            _ => padded(cursor.at(), alignment).unwrap_or(usize::MAX),
        };
        // The padding after the last tensor may be missing.
        let filled = entries.last().map_or(0, |e: &Entry| e.range.end);
        let data_len = file.len().saturating_sub(data_start);
        if data_start > file.len() || filled > data_len {
            return Err(format!(
                "the tensors take {filled} bytes, but only {data_len} follow the header: the \
                 file is truncated"
            ));
        }
        Ok((Header { metadata, entries }, data_start))
    }

    /// The bytes of the header, padded to where the data starts. The tensors
    /// are in the order of the data, each at a multiple of the alignment.
    pub fn bytes(&self) -> Result<Vec<u8>, String> {
        let alignment = alignment(&self.metadata)?;
        let mut out = MAGIC.to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        self.metadata.write(&mut out);
        for entry in &self.entries {
            let name = &entry.name;
            if name.len() > MAX_NAME {
                return Err(format!(
                    "cannot hold tensor {name:?}: its name has {} bytes, and {MAX_NAME} is the most",
                    name.len()
                ));
            }
            if entry.shape.len() > MAX_DIMENSIONS as usize {
                return Err(format!(
                    "cannot hold tensor {name:?}: it has {} dimensions, and {MAX_DIMENSIONS} is \
                     the most",
                    entry.shape.len()
                ));
            }
            let Some(ggml) = entry.dtype.ggml() else {
                return Err(format!(
                    "cannot hold tensor {name:?}: ggml has no {} type",
                    entry.dtype.name()
                ));
            };
            out.extend((name.len() as u64).to_le_bytes());
            out.extend_from_slice(name.as_bytes());
            out.extend((entry.shape.len() as u32).to_le_bytes());
            for &dimension in entry.shape.iter().rev() {
                out.extend((dimension as u64).to_le_bytes());
            }
            out.extend(ggml.id.to_le_bytes());
            out.extend((entry.range.start as u64).to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(alignment), 0);
        Ok(out)
    }
}

/// Refuses one of several files that are a model together.
fn check_whole(metadata: &Metadata) -> Result<(), String> {
    let number = |key: &str| metadata.get(key).and_then(Value::as_u64);
    match number("split.count") {
        Some(count) if count > 1 => Err(format!(
            "is part {} of a model in {count} GGUF files; merge them first: llama-gguf-split \
             --merge FIRST_PART OUT.gguf",
            number("split.no").unwrap_or(0).saturating_add(1)
        )),
        _ => Ok(()),
    }
}

/// The alignment of the data in bytes: a power of two.
pub(in crate::io) fn alignment(metadata: &Metadata) -> Result<usize, String> {
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(ALIGNMENT),
        Some(Value::U32(v)) if v.is_power_of_two() => Ok(*v as usize),
        Some(other) => Err(format!(
            "{ALIGNMENT_KEY} has to be a power of two of type u32, not {other:?}"
        )),
    }
}

/// The next multiple of the alignment, as far as there is one.
fn padded(offset: usize, alignment: usize) -> Option<usize> {
    offset.checked_next_multiple_of(alignment)
}

/// Reads one tensor's description; its bytes have to start at `expected`.
fn read_entry<'a>(
    cursor: &mut Cursor<'a>,
    index: u64,
    expected: usize,
    seen: &mut HashSet<&'a str>,
) -> Result<Entry, String> {
    let name = cursor.string(&format!("the name of tensor {index}"))?;
    if !seen.insert(name) {
        return Err(format!("two tensors are named {name:?}"));
    }
    let what = format!("the description of tensor {name:?}");
    let dimensions = cursor.u32(&what)?;
    if dimensions > MAX_DIMENSIONS {
        return Err(format!(
            "tensor {name:?} has {dimensions} dimensions; the most is {MAX_DIMENSIONS}"
        ));
    }
    // ggml counts dimensions from the innermost.
    let mut shape = vec![0; dimensions as usize];
    for dimension in shape.iter_mut().rev() {
        *dimension = usize::try_from(cursor.u64(&what)?).map_err(|_| too_large(name))?;
    }
    let id = cursor.u32(&what)?;
    let ggml = GgmlType::by_id(id).ok_or_else(|| match GgmlType::name_not_in_files(id) {
        Some(kind) => format!(
            "tensor {name:?} has ggml's type {id}, {kind}, which files no longer hold: quantize \
             the model again"
        ),
        None => format!("tensor {name:?} has the unknown ggml type {id}"),
    })?;
    let dtype = EntryDType::from(ggml);
    let nbytes = dtype
        .nbytes(&shape)
        .map_err(|e| format!("tensor {name:?}: {e}"))?;
    let offset = cursor.u64(&what)?;
    if offset != expected as u64 {
        return Err(format!(
            "tensor {name:?} starts at byte {offset} of the data, where {expected} was to be \
             expected after the tensor before it"
        ));
    }
    let end = expected
        .checked_add(nbytes)
        .ok_or_else(|| too_large(name))?;
    Ok(Entry {
        name: name.into(),
        dtype,
        shape,
        range: expected..end,
    })
}

fn too_large(name: &str) -> String {
    format!("tensor {name:?} is larger than this machine can address")
}
