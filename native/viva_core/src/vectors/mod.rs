//! Embedding vectors as codes: what a search by similarity keeps in memory, and what it
//! scores the best of again.
//!
//! ```text
//! vectors ──▶ encode ──▶ writer ──▶ a directory of safetensors files ──▶ search
//!                          └── nearest: what an exact search finds, to measure against
//! ```
//!
//! A set of vectors is a few tensors, each in a file of its own, with an index that
//! names them as that of a sharded checkpoint does:
//!
//! | tensor | | |
//! |---|---|---|
//! | `codes` | i8 `[n, d]` | int8: −127 … 127 |
//! | | u8 `[n, d/2]` | int4: 0 … 15, which stand for −8 … 7, the first of two in the low half |
//! | | u8 `[n, ⌈d/8⌉]` | binary: 1 for what is greater than zero, the first in the highest bit |
//! | `scale` | f32 `[n]` | of int8 and int4: vector = mean + scale · code |
//! | `mean` | f32 `[d]` | taken from every vector before it is encoded; where they are centered |
//! | `rescore` | i8 `[n, d]` or f16 `[n, d]` | int8 codes again, or the vectors |
//! | `rescore_scale` | f32 `[n]` | of int8 codes |
//!
//! A scale is not that of the least error but the one with which a vector's codes,
//! multiplied with the vector itself, give its squared length: what is small is not
//! shrunk any more, and vectors of more and less error rank alike.

mod encode;
mod nearest;
mod search;
mod settings;
mod writer;

pub use encode::{Encoder, prepared};
pub use nearest::Nearest;
pub(crate) use nearest::jittered;
pub use search::{Recall, Stored, Terms};
pub use settings::{Codes, Metric, Rescore, Settings};
pub use writer::{Piece, Writer, source_hash};
