//! Times one method on a weight and activations from files:
//!
//! ```text
//! methods METHOD COLUMNS THREADS WEIGHT ACTIVATIONS DEQUANTIZED
//! ```
//!
//! METHOD is `gptq`, `awq`, `clip` or `hqq`, the files hold rows of f32. Prints
//! the seconds that the method took, reading and writing apart, and writes what
//! the weight became. `bench/peers/methods.py` runs it beside other programs.

use std::error::Error;
use std::time::Instant;

use viva_core::format::{OptionValue, Quantized, spec};
use viva_core::method::awq;
use viva_core::method::candidates::DuoScaling;
use viva_core::method::gptq::{self, Gptq, Order};
use viva_core::method::gram::Gram;
use viva_core::method::input::scale;
use viva_core::ops::dequantize::dequantize;
use viva_core::ops::{Cancel, pool, quantize};
use viva_core::tensor::{DType, Tensor};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [method, columns, threads, weight, activations, out] = &args[..] else {
        return Err("methods METHOD COLUMNS THREADS WEIGHT ACTIVATIONS DEQUANTIZED".into());
    };
    let k: usize = columns.parse()?;
    pool::configure(threads.parse()?)?;
    let (w, x) = (read(weight)?, read(activations)?);
    let w = Tensor::from_slice(DType::F32, &[w.len() / k, k], &w)?;
    let cancel = Cancel::new();
    let options = match method.as_str() {
        "hqq" => vec![
            ("method".to_string(), OptionValue::Name("hqq".into())),
            ("block_size".to_string(), OptionValue::Int(64)),
        ],
        _ => Vec::new(),
    };
    let spec = spec("int4", options)?;
    let quantized = |w: &Tensor| quantize::quantize(w, &spec, &cancel);
    let (seconds, values) = match method.as_str() {
        "gptq" => {
            // As the peer does it.
            let options = Gptq {
                damping: 0.01,
                order: Order::Activation,
                sparsity: None,
            };
            let (seconds, q) = timed(|| -> Result<Quantized> {
                let gram = gram(&x, k, &cancel)?;
                Ok(gptq::quantize(&w, &spec, &gram, &options, &cancel)?)
            })?;
            (seconds, dequantize(&q)?)
        }
        "awq" => {
            let mut mean = vec![0f32; k];
            let tokens = (x.len() / k) as f32;
            for row in x.chunks_exact(k) {
                for (mean, x) in mean.iter_mut().zip(row) {
                    *mean += x.abs() / tokens;
                }
            }
            let (seconds, s) = timed(|| {
                Ok(awq::search(
                    &[(&w, &spec)],
                    &x,
                    &mean,
                    DuoScaling::default(),
                    &cancel,
                )?)
            })?;
            let s = s.unwrap_or_else(|| vec![1.0; k]);
            let back: Vec<f32> = s.iter().map(|s| 1.0 / s).collect();
            let mut scaled = w.to_f32_vec();
            scale(&mut scaled, &s);
            let scaled = Tensor::from_slice(DType::F32, w.shape(), &scaled)?;
            let mut values = dequantize(&quantized(&scaled)?)?;
            scale(&mut values, &back);
            (seconds, values)
        }
        "clip" => {
            let mut clipped = w.to_f32_vec();
            let (seconds, ()) = timed(|| {
                let gram = gram(&x, k, &cancel)?;
                Ok(awq::clip(&mut clipped, k, &spec, &gram, &cancel)?)
            })?;
            let clipped = Tensor::from_slice(DType::F32, w.shape(), &clipped)?;
            (seconds, dequantize(&quantized(&clipped)?)?)
        }
        "hqq" => {
            let (seconds, q) = timed(|| Ok(quantized(&w)?))?;
            (seconds, dequantize(&q)?)
        }
        _ => return Err(format!("no method {method:?}; there are gptq, awq, clip and hqq").into()),
    };
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    std::fs::write(out, bytes)?;
    println!("{seconds:.6}");
    Ok(())
}

fn timed<T>(run: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let start = Instant::now();
    let value = run()?;
    Ok((start.elapsed().as_secs_f64(), value))
}

fn gram(x: &[f32], k: usize, cancel: &Cancel) -> Result<Gram> {
    let mut gram = Gram::zeroed(k);
    pool::run(|| gram.add(x, cancel))?;
    Ok(gram)
}

fn read(path: &str) -> Result<Vec<f32>> {
    let bytes = std::fs::read(path)?;
    let (values, _) = bytes.as_chunks::<4>();
    Ok(values.iter().map(|b| f32::from_le_bytes(*b)).collect())
}
