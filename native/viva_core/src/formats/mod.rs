//! One file per format family. What stands here in scalar terms is the
//! definition; `simd/` compiles the same arithmetic for wider vectors.

pub mod codebook;
pub mod dynamic8;
pub mod dynamic_map;
pub mod fp8;
pub mod ggml_blocks;
mod ggml_steps;
pub mod ggml_types;
pub mod int;
pub mod iq4;
mod k_pack;
pub mod k_quants;
pub mod mx;
pub mod nvfp4;
pub mod q_blocks;
mod scaled;
pub mod sparse24;
