//! GGUF: ggml's file format, version 2 and 3, little-endian.
//!
//! ```text
//! "GGUF" | u32 version | u64 tensors | u64 pairs
//! pairs:   key, u32 type, value          (strings: u64 length, UTF-8)
//! tensors: name, u32 dimensions, u64 each (innermost first), u32 ggml type, u64 offset
//! padding to the alignment, then the data, each tensor padded to the alignment
//! ```
//!
//! Nothing in a file is believed before it was compared with the bytes that
//! are there, and what takes memory is a copy of bytes of the file, never an
//! allocation of a size that the file merely claims.

mod cursor;
mod header;
mod value;

pub(super) use header::{Header, alignment};
pub use value::{Array, Metadata, Value, ValueType};

/// Whether a file of that name is a GGUF file.
pub(super) fn is_name(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(".gguf")
}

/// The first bytes of every file.
const MAGIC: &[u8; 4] = b"GGUF";

/// The alignment where `general.alignment` says nothing, in bytes.
const ALIGNMENT: usize = 32;

/// The pair that says another alignment.
const ALIGNMENT_KEY: &str = "general.alignment";
