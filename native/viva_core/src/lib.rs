//! The numeric core of viva_tensor: quantization formats, kernels, checkpoint
//! files. It knows nothing of the BEAM and can be used on its own.
//!
//! # Vocabulary
//!
//! A **format** says how numbers are stored (`int8`, `nf4` …): **codes**, and
//! for every **block** a **scale** and perhaps a **zero point**. A **method**
//! says how they are chosen (`rtn`, `mse`, `hqq`). A **layout** says how a quantized
//! tensor is spelled as named tensors in a file (`bitsandbytes`, `awq`).
//!
//! # Data flow
//!
//! ```text
//! io ──▶ tensor ──▶ ops ──▶ format (formats/*) ──▶ simd
//!  ▲                 │ Quantized
//!  └──── layout ◀────┘
//! ```
//!
//! `ops` know shapes and cut work into ranges; a format knows the meaning of
//! codes; a kernel in `simd` sees slices only.
//!
//! # Adding a format
//!
//! 1. One file in `formats/` with its scalar definition, implementing
//!    [`format::Format`].
//! 2. One line in [`format::FORMATS`].
//! 3. The layout that spells it, in `layout/`.
//! 4. A golden fixture made by the format's reference program.

#![deny(unsafe_code)]

pub mod calibration;
pub mod content;
pub mod convert;
pub mod error;
pub mod format;
pub mod formats;
pub mod io;
pub mod layout;
pub mod method;
pub mod ops;
pub mod simd;
pub mod small_float;
pub mod steps;
pub mod tensor;
pub mod transcode;
pub mod unit;
pub mod vectors;

pub use error::{Error, Result};
