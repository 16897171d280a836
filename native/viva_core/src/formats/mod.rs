//! One file per format family. What stands here in scalar terms is the
//! definition; `simd/` compiles the same arithmetic for wider vectors.

pub mod codebook;
pub mod dynamic_map;
pub mod ggml_types;
pub mod int;
