//! Methods on one 4096 × 4096 layer with 512 tokens of activations:
//! `cargo bench -p viva_core --bench methods`.

#[path = "../tests/support/mod.rs"]
mod support;

use std::sync::LazyLock;

use divan::Bencher;
use support::{f32_tensor, gaussian, timed};
use viva_core::format::{OptionValue, Spec, spec};
use viva_core::method::awq;
use viva_core::method::candidates::DuoScaling;
use viva_core::method::gptq::{self, Gptq};
use viva_core::method::gram::Gram;
use viva_core::ops::{Cancel, pool, quantize};
use viva_core::tensor::Tensor;

/// Rows and columns; fewer where a run only tests that it runs.
static SIDE: LazyLock<usize> = LazyLock::new(|| if timed() { 4096 } else { 256 });
const TOKENS: usize = 512;

fn main() {
    divan::main();
}

fn layer() -> Tensor {
    let side = *SIDE;
    f32_tensor(&[side, side], &gaussian(side * side, 1))
}

/// Channels of different strength, correlated as those of a model are.
fn activations() -> Vec<f32> {
    let k = *SIDE;
    let mut x = gaussian(TOKENS * k, 2);
    for row in x.chunks_exact_mut(k) {
        for i in 1..k {
            row[i] += 0.5 * row[i - 1];
        }
        for (i, v) in row.iter_mut().enumerate() {
            *v *= 1.0 + 4.0 / (1.0 + (i * 7919 % k) as f32 / 16.0);
        }
    }
    x
}

fn gram_of(x: &[f32]) -> Gram {
    let mut gram = Gram::zeroed(*SIDE);
    pool::run(|| gram.add(x, &Cancel::new())).unwrap();
    gram
}

fn int4() -> Spec {
    spec("int4", Vec::new()).unwrap()
}

#[divan::bench(sample_count = 5, sample_size = 1)]
fn gram(bencher: Bencher) {
    let x = activations();
    bencher.bench_local(|| gram_of(&x));
}

/// The search for the scale of columns, on all tokens.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn awq_scale_int4(bencher: Bencher) {
    let (w, x, spec) = (layer(), activations(), int4());
    let mut mean = vec![0f32; *SIDE];
    for row in x.chunks_exact(*SIDE) {
        for (mean, v) in mean.iter_mut().zip(row) {
            *mean += v.abs() / TOKENS as f32;
        }
    }
    bencher.bench_local(|| {
        awq::search(
            &[(&w, &spec)],
            &x,
            &mean,
            DuoScaling::default(),
            &Cancel::new(),
        )
        .unwrap()
    });
}

/// The search for the clipping of blocks, in every row.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn awq_clip_int4(bencher: Bencher) {
    let (w, gram, spec) = (layer().to_f32_vec(), gram_of(&activations()), int4());
    bencher.bench_local(|| {
        let mut w = w.clone();
        awq::clip(&mut w, *SIDE, &spec, &gram, &Cancel::new()).unwrap();
        w
    });
}

/// A float zero point for groups of 64.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn hqq_int4(bencher: Bencher) {
    let options = [
        ("method", OptionValue::Name("hqq".into())),
        ("block_size", OptionValue::Int(64)),
    ];
    let options = options.map(|(name, value)| (name.to_string(), value));
    let (w, spec) = (layer(), spec("int4", options.to_vec()).unwrap());
    bencher.bench_local(|| quantize::quantize(&w, &spec, &Cancel::new()).unwrap());
}

/// Gram matrix, factor and columns.
#[divan::bench(sample_count = 5, sample_size = 1)]
fn gptq_int4(bencher: Bencher) {
    let (w, x, spec) = (layer(), activations(), int4());
    bencher.bench_local(|| {
        gptq::quantize(&w, &spec, &gram_of(&x), &Gptq::default(), &Cancel::new()).unwrap()
    });
}
