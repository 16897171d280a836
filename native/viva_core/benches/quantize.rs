//! Quantize and dequantize, GB/s of the f32 side, on one thread:
//! `cargo bench -p viva_core --bench quantize`.

#[path = "../tests/support/mod.rs"]
mod support;

use divan::Bencher;
use divan::counter::BytesCount;
use support::{f32_tensor, gaussian, make, yes};
use viva_core::format::Spec;
use viva_core::ops::{Cancel, dequantize, pool, quantize};
use viva_core::simd;
use viva_core::tensor::{DType, Tensor};

const ROWS: usize = 4096;
const COLUMNS: usize = 4096;

fn main() {
    pool::configure(1).expect("a pool of one thread");
    println!("level: {}", simd::level().name());
    divan::main();
}

fn matrix() -> Tensor {
    f32_tensor(&[ROWS, COLUMNS], &gaussian(ROWS * COLUMNS, 3))
}

fn spec(name: &str) -> Spec {
    match name.strip_suffix("_absmax") {
        Some("int8") => make("int8", &[("scale", support::name("absmax"))]),
        _ => match name.strip_suffix("_dq") {
            Some(format) => make(format, &[("double_quant", yes(true))]),
            None => make(name, &[]),
        },
    }
}

const FORMATS: [&str; 14] = [
    "int8",
    "int8_absmax",
    "int4",
    "nf4",
    "nf4_dq",
    "fp4",
    "q8_0",
    "q4_0",
    "q4_1",
    "q6_k",
    "q4_k",
    "q3_k",
    "q2_k",
    "iq4_nl",
];

#[divan::bench(args = FORMATS)]
fn quantize_f32(bencher: Bencher, format: &str) {
    let (x, spec) = (matrix(), spec(format));
    bencher
        .counter(BytesCount::new(ROWS * COLUMNS * 4))
        .bench_local(|| quantize::quantize(&x, &spec, &Cancel::new()).unwrap());
}

#[divan::bench(args = FORMATS)]
fn dequantize_f32(bencher: Bencher, format: &str) {
    let q = support::quantized(&matrix(), &spec(format));
    let mut out = vec![0u8; ROWS * COLUMNS * 4];
    bencher
        .counter(BytesCount::new(ROWS * COLUMNS * 4))
        .bench_local(|| {
            dequantize::dequantize_into(&q, DType::F32, &mut out, &Cancel::new()).unwrap()
        });
}
