//! What the machine can do at best, on one thread and on as many as it has:
//! `cargo bench -p viva_core --bench limits`.

#[path = "../tests/support/mod.rs"]
mod support;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use support::timed;
use viva_core::ops::limits::{LIMITS, by_name};
use viva_core::ops::pool;
use viva_core::simd;

/// More than caches hold; less where a run only tests that it runs.
const PAST_CACHES: usize = 512 << 20;

fn main() {
    println!("level: {}", simd::level().name());
    divan::main();
}

/// Each limit that the level in force has, with each number of threads.
fn cases() -> Vec<(&'static str, usize)> {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    let threads: &[usize] = if all == 1 { &[1] } else { &[1, all] };
    let there = LIMITS
        .iter()
        .filter(|l| l.probe(&mut [0.0]).unwrap().is_some());
    there
        .flat_map(|l| threads.iter().map(|&t| (l.name, t)))
        .collect()
}

#[divan::bench(args = cases())]
fn limit(bencher: Bencher, (name, threads): (&str, usize)) {
    pool::configure(threads).unwrap();
    let limit = by_name(name).unwrap();
    let size = if timed() { PAST_CACHES } else { 1 << 16 };
    // Not zeros, which are pages that nothing backs.
    let mut memory = vec![1f32; size / 4];
    let work = limit.probe(&mut memory).unwrap().unwrap();
    let probe = || limit.probe(&mut memory).unwrap();
    match limit.unit {
        "B" => bencher.counter(BytesCount::new(work)).bench_local(probe),
        _ => bencher.counter(ItemsCount::new(work)).bench_local(probe),
    }
}
