//! How codes and scales are chosen. Round-to-nearest lives with each format,
//! since it is the format's definition; searches that formats share live here.

pub mod affine;
pub mod hqq;
pub mod mse;
