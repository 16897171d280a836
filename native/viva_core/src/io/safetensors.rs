//! Safetensors: a length, a header that is one JSON object, then the data.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use safetensors::SafeTensors;
use safetensors::tensor::TensorInfo;
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Error as _, Serialize, SerializeMap, Serializer};

use super::entry::{Entry, EntryDType};

/// Bytes of the length that comes before the header.
const LENGTH_BYTES: usize = 8;

/// The longest header that any reader takes, in bytes.
const MAX_HEADER: usize = 100_000_000;

/// The one name that is no tensor's.
pub(super) const METADATA: &str = "__metadata__";

/// The header's contents.
pub(super) struct Header {
    pub metadata: BTreeMap<String, String>,
    /// In the order in which they are written; sorted by offset after `read`.
    pub entries: Vec<Entry>,
}

impl Header {
    /// Reads and checks the header of a whole file. Returns it with the offset
    /// in bytes at which the data starts, or says what is wrong with the file.
    pub fn read(file: &[u8]) -> Result<(Header, usize), String> {
        let (json, data_start) = header_bytes(file)?;
        let json = std::str::from_utf8(json)
            .map_err(|e| format!("the header is not UTF-8 text: byte {}", e.valid_up_to()))?;
        let mut header: Header = serde_json::from_str(json)
            .map_err(|e| format!("the header is not the JSON object that it should be: {e}"))?;
        // Zero-size tensors share an offset with the next one: end decides.
        header.entries.sort_by_key(|e| (e.range.start, e.range.end));
        header.check_layout(file.len() - data_start)?;
        // The reference has the last word: what it refuses, no other program
        // could load either.
        SafeTensors::read_metadata(file)
            .map_err(|e| format!("the safetensors library refuses it: {e}"))?;
        Ok((header, data_start))
    }

    /// The length and the header, padded to a multiple of eight bytes and to
    /// `at_least` as many.
    pub fn bytes(&self, at_least: usize) -> Result<Vec<u8>, String> {
        let mut out = vec![0; LENGTH_BYTES];
        serde_json::to_writer(&mut out, self).map_err(|e| e.to_string())?;
        out.resize(out.len().next_multiple_of(8).max(at_least), b' ');
        let length = out.len() - LENGTH_BYTES;
        if length > MAX_HEADER {
            return Err(format!(
                "{} tensors need a header of {length} bytes, and {MAX_HEADER} is the most; choose \
                 a smaller max_shard_size",
                self.entries.len()
            ));
        }
        out[..LENGTH_BYTES].copy_from_slice(&(length as u64).to_le_bytes());
        Ok(out)
    }

    /// Checks that the tensors have their sizes and fill the data exactly.
    fn check_layout(&self, data_len: usize) -> Result<(), String> {
        let mut filled = 0;
        let mut before = "";
        for entry in &self.entries {
            let (name, start, end) = (&entry.name, entry.range.start, entry.range.end);
            if end < start {
                return Err(format!(
                    "tensor {name:?} ends at byte {end}, before its start at byte {start}"
                ));
            }
            if start < filled {
                return Err(format!(
                    "tensors {before:?} and {name:?} overlap: the first ends at byte {filled} \
                     of the data, the second starts at byte {start}"
                ));
            }
            if start > filled {
                return Err(format!(
                    "a gap before tensor {name:?}: bytes {filled} to {start} of the data belong \
                     to no tensor"
                ));
            }
            let size = entry
                .dtype
                .nbytes(&entry.shape)
                .map_err(|e| format!("tensor {name:?}: {e}"))?;
            if size != end - start {
                return Err(format!(
                    "tensor {name:?} of dtype {} and shape {:?} takes {size} bytes, but its \
                     offsets {start} to {end} give it {}",
                    entry.dtype.name(),
                    entry.shape,
                    end - start
                ));
            }
            filled = end;
            before = name;
        }
        if filled > data_len {
            return Err(format!(
                "the tensors take {filled} bytes, but only {data_len} follow the header: the \
                 file is truncated"
            ));
        }
        if filled < data_len {
            return Err(format!(
                "{} trailing bytes after the last tensor belong to no tensor",
                data_len - filled
            ));
        }
        Ok(())
    }
}

/// The header's bytes, and where they end.
fn header_bytes(file: &[u8]) -> Result<(&[u8], usize), String> {
    const LOOK_ALIKES: [(&[u8], &str); 3] = [
        (
            b"version https://git-lfs",
            "is a Git LFS pointer, not the weights themselves: fetch them with `git lfs pull`",
        ),
        (
            b"GGUF",
            "is a GGUF file, not a safetensors file: its name has to end in .gguf",
        ),
        (
            b"PK\x03\x04",
            "is a zip archive (a PyTorch pickle?), not a safetensors file",
        ),
    ];
    if let Some((_, what)) = LOOK_ALIKES.iter().find(|(m, _)| file.starts_with(m)) {
        return Err((*what).into());
    }
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!(
            "only {} bytes long: a safetensors file starts with {LENGTH_BYTES} bytes that give \
             the length of its header",
            file.len()
        ));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER as u64 {
        return Err(format!(
            "claims a header of {length} bytes; the most is {MAX_HEADER}: it is damaged, or no \
             safetensors file"
        ));
    }
    let end = LENGTH_BYTES + length as usize;
    match rest.get(..length as usize) {
        Some(json) => Ok((json, end)),
        None => Err(format!(
            "the header ends at byte {end}, past the end of the file ({} bytes): the file is \
             truncated",
            file.len()
        )),
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    // By hand, because a derived map keeps the last of two equal names and
    // says nothing.
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut metadata: Option<BTreeMap<String, String>> = None;
        let mut entries = Vec::new();
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(de::Error::custom(format!("two tensors are named {name:?}")));
            }
            if name == METADATA {
                metadata = map.next_value()?;
                continue;
            }
            let info: TensorInfo = map
                .next_value()
                .map_err(|e| de::Error::custom(format!("tensor {name:?}: {e}")))?;
            entries.push(Entry {
                name,
                dtype: EntryDType::from(info.dtype),
                shape: info.shape,
                range: info.data_offsets.0..info.data_offsets.1,
            });
        }
        Ok(Header {
            metadata: metadata.unwrap_or_default(),
            entries,
        })
    }
}

impl Serialize for Header {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry(METADATA, &self.metadata)?;
        }
        for entry in &self.entries {
            let dtype = entry.dtype.in_safetensors().ok_or_else(|| {
                S::Error::custom(format!(
                    "cannot hold tensor {:?}: safetensors has no {} dtype",
                    entry.name,
                    entry.dtype.name()
                ))
            })?;
            let info = TensorInfo {
                dtype,
                shape: entry.shape.clone(),
                data_offsets: (entry.range.start, entry.range.end),
            };
            map.serialize_entry(&entry.name, &info)?;
        }
        map.end()
    }
}
