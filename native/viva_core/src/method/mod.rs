//! How codes and scales are chosen. Round-to-nearest lives with each format,
//! since it is the format's definition; searches that formats share live here.

pub mod affine;
pub mod awq;
pub mod calibrated;
pub mod candidates;
pub mod factor;
pub mod fold;
pub mod gptq;
pub mod gram;
pub mod hqq;
pub mod input;
pub mod mse;
pub mod sparsity;
mod stripe;
