//! x[m, k] · q[n, k]ᵀ on one thread and on as many as the machine has:
//! `cargo bench -p viva_core --bench matmul`.
//!
//! One token is bound by memory, so it counts bytes of weights, and the weights
//! rotate over copies that no cache holds. Batches count operations, two for
//! each product. `limit` is the product's innermost kernel on operands in L1:
//! what batches could reach at best.

#[path = "../tests/support/mod.rs"]
mod support;

use std::sync::LazyLock;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use support::{f32_tensor, gaussian, make, timed};
use viva_core::format::Quantized;
use viva_core::ops::matmul::matmul_into;
use viva_core::ops::{Cancel, pool};
use viva_core::simd::product::{NARROW, Product, WIDE};
use viva_core::simd::{self, dispatch};
use viva_core::tensor::{DType, Tensor};

/// Rows and columns of the weights; fewer where a run only tests that it runs.
static SIDE: LazyLock<usize> = LazyLock::new(|| if timed() { 4096 } else { 256 });

/// Bytes that no cache holds.
const PAST_CACHES: usize = 512 << 20;

const FORMATS: [&str; 7] = ["int8", "int4", "nf4", "q4_0", "q8_0", "q4_k", "mxfp4"];

fn main() {
    println!("level: {}", simd::level().name());
    divan::main();
}

/// One, and all that the machine has.
fn threads() -> Vec<usize> {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    if all == 1 { vec![1] } else { vec![1, all] }
}

/// Each format, with each number of threads.
fn cases() -> Vec<(&'static str, usize)> {
    let with = |t: usize| FORMATS.map(|f| (f, t));
    threads().into_iter().flat_map(with).collect()
}

fn weights(format: &str) -> Quantized {
    static W: LazyLock<Tensor> =
        LazyLock::new(|| f32_tensor(&[*SIDE, *SIDE], &gaussian(*SIDE * *SIDE, 3)));
    support::quantized(&W, &make(format, &[]))
}

fn bench(bencher: Bencher, (format, threads): (&str, usize), m: usize) {
    pool::configure(threads).unwrap();
    let side = *SIDE;
    let q = weights(format);
    let bytes: usize = q.parts.iter().map(|(_, part)| part.bytes().len()).sum();
    let copies = match m {
        1 if timed() => PAST_CACHES / bytes,
        _ => 1,
    };
    let weights: Vec<Quantized> = (0..copies).map(|_| support::copied(&q)).collect();
    let x = f32_tensor(&[m, side], &gaussian(m * side, 4));
    let mut out = vec![0u8; m * side * 4];
    let mut turn = 0;
    let mut multiply = || {
        turn = (turn + 1) % copies;
        matmul_into(
            &x,
            &weights[turn],
            DType::F32.into(),
            &mut out,
            &Cancel::new(),
        )
        .unwrap();
    };
    if m == 1 {
        bencher
            .counter(BytesCount::new(bytes))
            .bench_local(multiply);
    } else {
        let operations = ItemsCount::new(2 * m * side * side);
        bencher.counter(operations).bench_local(&mut multiply);
    }
}

#[divan::bench(args = cases())]
fn tokens_1(bencher: Bencher, case: &(&str, usize)) {
    bench(bencher, *case, 1);
}

#[divan::bench(args = cases(), sample_count = 30)]
fn tokens_8(bencher: Bencher, case: &(&str, usize)) {
    bench(bencher, *case, 8);
}

#[divan::bench(args = cases(), sample_count = 20)]
fn tokens_32(bencher: Bencher, case: &(&str, usize)) {
    bench(bencher, *case, 32);
}

#[divan::bench(args = cases(), sample_count = 8)]
fn tokens_512(bencher: Bencher, case: &(&str, usize)) {
    bench(bencher, *case, 512);
}

/// Both operands in L1, one thread.
#[divan::bench(args = [256])]
fn limit(bencher: Bencher, depth: usize) {
    let (a, b) = (vec![0.5; NARROW * depth], vec![0.5; WIDE * depth]);
    let mut c = [0.0; NARROW * WIDE];
    bencher
        .counter(ItemsCount::new(2 * NARROW * WIDE * depth))
        .bench_local(|| {
            let (a, b, c) = (&a[..], &b[..], &mut c[..]);
            dispatch(Product { a, b, c });
        });
}
