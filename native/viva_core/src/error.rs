//! The one error type of the crate.
//!
//! Every variant says what was wrong and carries the values a caller needs to
//! put it right. `Serialize` gives the same fields to other languages: the tag
//! `kind` names the variant in snake case, the rest are its fields.

use serde::Serialize;

/// Everything that can go wrong in this crate.
#[derive(Debug, Clone, PartialEq, Serialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Error {
    /// A name that no format carries.
    #[error("unknown format {name:?}; choose one of {known}")]
    UnknownFormat { name: String, known: String },

    /// A name that no layout carries.
    #[error("unknown layout {name:?}; choose one of {known}")]
    UnknownLayout { name: String, known: String },

    /// A name that no dtype carries.
    #[error("unknown dtype {name:?}; choose one of {known}")]
    UnknownDtype { name: String, known: String },

    /// An option that is misspelled, out of range, or has no meaning here.
    #[error("option {option}: {message}")]
    InvalidOption { option: String, message: String },

    /// Two shapes that had to agree.
    #[error("{what}: expected shape {expected:?}, got {actual:?}")]
    ShapeMismatch {
        what: String,
        expected: Vec<usize>,
        actual: Vec<usize>,
    },

    /// The wrong number of bytes or elements for a shape.
    #[error("{what}: expected {expected}, got {actual}")]
    SizeMismatch {
        what: String,
        expected: usize,
        actual: usize,
    },

    /// A shape whose element count or byte count overflows the address space.
    #[error("shape {shape:?} has more elements than this machine can address")]
    ShapeOverflow { shape: Vec<usize> },

    /// A dtype that the operation does not take.
    #[error("{op} does not take {dtype} tensors; cast to f32, f16, bf16 or f64 first")]
    UnsupportedDtype { op: String, dtype: String },

    /// Rows that the block size does not divide.
    #[error(
        "rows of {row} elements cannot be cut into blocks of {block}; choose a block_size that divides {row}, or a format whose blocks do"
    )]
    Indivisible { row: usize, block: usize },

    /// NaN or infinity in data that has to be finite.
    #[error(
        "{nan} NaN and {inf} infinite values, the first at element {first}; repair the tensor, or keep it unquantized"
    )]
    NonFinite { nan: u64, inf: u64, first: u64 },

    /// A scale that its dtype cannot hold.
    #[error(
        "a block needs the scale {scale}, which {dtype} cannot hold; choose scale_dtype f32, and scale step rather than absmax"
    )]
    ScaleOverflow { scale: f32, dtype: String },

    /// Activations whose Gram matrix no damping makes invertible.
    #[error(
        "the Gram matrix of the activations is singular even with a damping of {damping}; record more, and more varied, activations"
    )]
    SingularHessian { damping: f32 },

    /// A tensor or quantized weight that was released.
    #[error("the tensor was released; make it again before use")]
    Released,

    /// A format that a layout cannot spell.
    #[error("layout {layout} cannot hold {format}: {message}")]
    LayoutMismatch {
        layout: String,
        format: String,
        message: String,
    },

    /// A file that is not what it claims to be.
    #[error("{path}: {message}")]
    InvalidFile { path: String, message: String },

    /// A dumped quantized tensor that does not decode.
    #[error("not a dumped quantized tensor: {message}")]
    InvalidDump { message: String },

    /// A tensor name that a checkpoint does not hold.
    #[error("no tensor named {name:?}{hint}")]
    UnknownTensor { name: String, hint: String },

    /// A failed system call, with the path it was about.
    #[error("{path}: {message}")]
    Io {
        path: String,
        /// The POSIX name where it has one: `enospc`, `eacces`, `enoent` …
        code: String,
        message: String,
    },

    /// The caller asked for the call to stop.
    #[error("cancelled")]
    Cancelled,
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Wraps a system error with the path it concerns.
    pub fn io(path: &std::path::Path, error: &std::io::Error) -> Error {
        use std::io::ErrorKind::*;
        let code = match error.kind() {
            NotFound => "enoent",
            PermissionDenied => "eacces",
            AlreadyExists => "eexist",
            StorageFull => "enospc",
            QuotaExceeded => "edquot",
            ReadOnlyFilesystem => "erofs",
            IsADirectory => "eisdir",
            NotADirectory => "enotdir",
            FileTooLarge => "efbig",
            UnexpectedEof => "eof",
            _ => "eio",
        };
        Error::Io {
            path: path.display().to_string(),
            code: code.into(),
            message: error.to_string(),
        }
    }

    pub(crate) fn option(option: &str, message: impl Into<String>) -> Error {
        Error::InvalidOption {
            option: option.into(),
            message: message.into(),
        }
    }
}
