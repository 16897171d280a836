//! Quantize, dequantize and compare, on one thread, from and to f32 and bf16:
//! `cargo bench -p viva_core --bench quantize [-- FORMAT...]`.
//!
//! Each figure is GB/s of the dense side and, in brackets, its ratio to a limit
//! of memory that was probed between the same rounds: what one thread reads, for
//! quantizing and comparing, and what it writes (past the caches, where the level
//! can), for dequantizing. Both are the best of their rounds, which others who
//! share the machine disturb least.

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Instant;

use support::{float_tensor, gaussian, make, name, quantized, yes};
use viva_core::format::{FORMATS, Spec};
use viva_core::ops::limits::{self, Limit};
use viva_core::ops::{Cancel, dequantize, metrics, pool, quantize};
use viva_core::simd;
use viva_core::tensor::{DType, Tensor};

/// Columns, and rows where it is timed: more than caches hold.
const SIDE: usize = 4096;
const ROUNDS: usize = 15;

/// The formats as they are by default, and what else has a kernel of its own.
fn specs() -> Vec<(String, Spec)> {
    let plain = FORMATS
        .iter()
        .map(|f| (f.name().into(), make(f.name(), &[])));
    let variant =
        |format: &str, what: &str, option| (format!("{format} {what}"), make(format, &[option]));
    let mse = |format| variant(format, "mse", ("method", name("mse")));
    let mut specs: Vec<_> = plain.collect();
    specs.extend([
        variant("int8", "absmax", ("scale", name("absmax"))),
        variant("int4", "symmetric", ("symmetric", yes(true))),
        variant("int4", "float zero", ("zero_point", name("float"))),
        mse("int4"),
        variant("nf4", "double", ("double_quant", yes(true))),
        mse("nf4"),
        mse("q4_0"),
        mse("q4_k"),
    ]);
    specs
}

/// The seconds that `f` takes.
fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn least(seconds: Vec<f64>) -> f64 {
    seconds.into_iter().fold(f64::INFINITY, f64::min)
}

/// Something that is timed, the bytes it goes through, and the limit that it is
/// compared with.
struct Case<'a> {
    run: Box<dyn FnMut() + 'a>,
    bytes: usize,
    limit: &'a Limit,
}

/// GB/s and the ratio to the limit, of each case in turn.
fn measure(cases: &mut [Case], memory: &mut [f32], rounds: usize) -> Vec<(f64, f64)> {
    let mut times = vec![(Vec::new(), Vec::new()); cases.len()];
    for _ in 0..rounds {
        for (case, (own, limit)) in cases.iter_mut().zip(&mut times) {
            limit.push(seconds(|| {
                case.limit.probe(memory).unwrap();
            }));
            own.push(seconds(&mut case.run));
        }
    }
    let rates = cases.iter().zip(times).map(|(case, (own, limit))| {
        let rate = case.bytes as f64 / least(own) / 1e9;
        let most = size_of_val(memory) as f64 / least(limit) / 1e9;
        (rate, rate / most)
    });
    rates.collect()
}

fn line(label: &str, spec: &Spec, dense: &[Tensor], memory: &mut [f32], rounds: usize) {
    let read = limits::by_name("read").unwrap();
    let past_caches = limits::by_name("write_past_caches").unwrap();
    let write = match past_caches.probe(memory).unwrap() {
        Some(_) => past_caches,
        // The level in force cannot.
        None => limits::by_name("write").unwrap(),
    };
    let q = quantized(&dense[0], spec);
    let mut outs: Vec<_> = dense.iter().map(|x| vec![0u8; x.bytes().len()]).collect();
    let mut cases: Vec<Case> = Vec::new();
    for x in dense {
        cases.push(Case {
            run: Box::new(|| drop(quantize::quantize(x, spec, &Cancel::new()).unwrap())),
            bytes: x.bytes().len(),
            limit: read,
        });
    }
    for (x, out) in dense.iter().zip(&mut outs) {
        cases.push(Case {
            bytes: out.len(),
            run: Box::new(|| {
                dequantize::dequantize_into(&q, x.dtype(), out, &Cancel::new()).unwrap();
            }),
            limit: write,
        });
    }
    cases.push(Case {
        run: Box::new(|| {
            metrics::quantized(&dense[0], &q, &Cancel::new()).unwrap();
        }),
        bytes: dense[0].bytes().len(),
        limit: read,
    });
    print!("{label:16}");
    for (rate, ratio) in measure(&mut cases, memory, rounds) {
        print!(" {rate:7.2} ({ratio:4.2})");
    }
    println!();
}

fn main() {
    pool::configure(1).expect("a pool of one thread");
    let args: Vec<String> = std::env::args().skip(1).collect();
    let wanted: Vec<&String> = args.iter().filter(|a| !a.starts_with("--")).collect();
    // As cargo asks benchmarks to be.
    let timed = args.iter().any(|a| a == "--bench") && !args.iter().any(|a| a == "--test");
    let (rows, rounds) = if timed { (SIDE, ROUNDS) } else { (2, 1) };
    let values = gaussian(rows * SIDE, 3);
    let dense = [DType::F32, DType::BF16].map(|d| float_tensor(d, &[rows, SIDE], &values));
    let mut memory = values;
    println!("level {}, {rows} × {SIDE}", simd::level().name());
    println!(
        "{:16} {:>14} {:>14} {:>14} {:>14} {:>14}",
        "", "quantize f32", "bf16", "dequantize f32", "bf16", "metrics f32"
    );
    for (label, spec) in specs() {
        if wanted.is_empty() || wanted.iter().any(|w| label.starts_with(w.as_str())) {
            line(&label, &spec, &dense, &mut memory, rounds);
        }
    }
}
