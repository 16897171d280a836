//! The numeric core of viva_tensor.

#![deny(unsafe_code)]

pub mod error;
pub mod format;
pub mod formats;
pub mod method;
pub mod ops;
pub mod simd;
pub mod tensor;

pub use error::{Error, Result};
