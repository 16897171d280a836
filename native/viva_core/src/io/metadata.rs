//! What a file says beside its tensors, and with it how its bytes are laid out.

use std::collections::BTreeMap;

use super::entry::Entry;
use super::{gguf, safetensors};

/// What a file says beside its tensors; its variant is the kind of the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Metadata {
    /// The strings under `__metadata__`; empty where there are none.
    Safetensors(BTreeMap<String, String>),
    Gguf(gguf::Metadata),
}

impl From<BTreeMap<String, String>> for Metadata {
    fn from(strings: BTreeMap<String, String>) -> Metadata {
        Metadata::Safetensors(strings)
    }
}

impl From<gguf::Metadata> for Metadata {
    fn from(metadata: gguf::Metadata) -> Metadata {
        Metadata::Gguf(metadata)
    }
}

impl Metadata {
    /// The strings of a safetensors file.
    pub fn strings(&self) -> Option<&BTreeMap<String, String>> {
        match self {
            Metadata::Safetensors(strings) => Some(strings),
            Metadata::Gguf(_) => None,
        }
    }

    /// The keys and values of a GGUF file.
    pub fn gguf(&self) -> Option<&gguf::Metadata> {
        match self {
            Metadata::Safetensors(_) => None,
            Metadata::Gguf(metadata) => Some(metadata),
        }
    }

    /// Bytes of which each tensor's offset is a multiple. Safetensors allows
    /// no gap between tensors: there the order of the tensors has to align them.
    pub(super) fn alignment(&self) -> Result<usize, String> {
        match self {
            Metadata::Safetensors(_) => Ok(1),
            Metadata::Gguf(metadata) => gguf::alignment(metadata),
        }
    }

    /// All bytes before the data of these entries, and never fewer than
    /// `at_least`, which an earlier header of the same file took.
    pub(super) fn header(&self, entries: Vec<Entry>, at_least: usize) -> Result<Vec<u8>, String> {
        match self {
            Metadata::Safetensors(strings) => safetensors::Header {
                metadata: strings.clone(),
                entries,
            }
            .bytes(at_least),
            // Every number in it has a fixed width.
            Metadata::Gguf(metadata) => gguf::Header {
                metadata: metadata.clone(),
                entries,
            }
            .bytes(),
        }
    }
}
