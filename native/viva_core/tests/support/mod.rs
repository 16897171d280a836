//! What several test files need: seeded Gaussian data and specs from names.

use viva_core::format::{OptionValue, Quantized, Spec, spec};
use viva_core::ops::metrics::Metrics;
use viva_core::ops::{Cancel, metrics, quantize};
use viva_core::tensor::{DType, Tensor};

/// `n` draws of N(0, 1), the same on every machine (SplitMix64, Box–Muller).
pub fn gaussian(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut out = Vec::with_capacity(n + 1);
    while out.len() < n {
        let r = (-2.0 * (1.0 - uniform()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * uniform()).sin_cos();
        out.push((r * cos) as f32);
        out.push((r * sin) as f32);
    }
    out.truncate(n);
    out
}

pub fn name(v: &str) -> OptionValue {
    OptionValue::Name(v.into())
}

pub fn int(v: i64) -> OptionValue {
    OptionValue::Int(v)
}

pub fn yes(v: bool) -> OptionValue {
    OptionValue::Bool(v)
}

pub fn make(format: &str, options: &[(&str, OptionValue)]) -> Spec {
    let options = options
        .iter()
        .map(|(n, v)| (n.to_string(), v.clone()))
        .collect();
    spec(format, options).unwrap()
}

pub fn f32_tensor(shape: &[usize], data: &[f32]) -> Tensor {
    Tensor::from_slice(DType::F32, shape, data).unwrap()
}

pub fn quantized(x: &Tensor, spec: &Spec) -> Quantized {
    let q = quantize::quantize(x, spec, &Cancel::new()).unwrap();
    q.validate().unwrap();
    q
}

pub fn measure(x: &Tensor, spec: &Spec) -> (Metrics, f64) {
    let q = quantized(x, spec);
    let m = metrics::quantized(x, &q, &Cancel::new()).unwrap();
    (m, q.bits_per_weight())
}
