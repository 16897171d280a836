//! How a program that is timed beside others talks to what drives it: requests
//! and answers are JSON objects, one a line. `bench/peers/README.md` lists them.

use std::error::Error;
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Bytes that no cache holds.
pub const PAST_CACHES: usize = 256 << 20;
/// Rows of a product that are held to sums in f64.
pub const CHECKED: usize = 8;

/// Answers the requests on standard input; what fails is an answer too.
pub fn serve(mut answer: impl FnMut(&Value) -> Result<Value>) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let answer = match answer(&serde_json::from_str(&line?)?) {
            Ok(answer) => answer,
            Err(error) => json!({"absent": error.to_string()}),
        };
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

pub fn text<'a>(request: &'a Value, key: &str) -> Result<&'a str> {
    request[key]
        .as_str()
        .ok_or_else(|| format!("{key} is missing").into())
}

pub fn number(request: &Value, key: &str) -> Result<usize> {
    let n = request[key]
        .as_u64()
        .ok_or_else(|| format!("{key} is missing"))?;
    Ok(n.try_into()?)
}

/// The median over calls that take as long as asked for together; the first, which
/// finds its memory untouched, does not count unless it takes ten times that long.
pub fn timed<T, E: Error + 'static>(
    request: &Value,
    mut call: impl FnMut() -> std::result::Result<T, E>,
) -> Result<f64> {
    let budget = Duration::from_secs_f64(request["budget"].as_f64().unwrap_or(0.0));
    let mut once = || -> Result<Duration> {
        let start = Instant::now();
        call()?;
        Ok(start.elapsed())
    };
    let first = once()?;
    if first >= 10 * budget {
        return Ok(first.as_secs_f64());
    }
    let mut took = Vec::new();
    while took.iter().sum::<Duration>() < budget {
        took.push(once()?);
    }
    took.sort();
    Ok(took[took.len() / 2].as_secs_f64())
}

/// Measured where the request asks for it: it takes longer than what is timed.
pub fn checked(request: &Value, measure: impl FnOnce() -> Result<f64>) -> Result<Option<f64>> {
    match request["error"].as_bool() {
        Some(true) => Ok(Some(measure()?)),
        _ => Ok(None),
    }
}

/// x · wᵀ in f64.
pub fn product(x: &[f32], w: &[f32], k: usize) -> Vec<f64> {
    let row = |x: &[f32]| {
        let dot = |w: &[f32]| {
            x.iter()
                .zip(w)
                .map(|(&x, &w)| f64::from(x) * f64::from(w))
                .sum()
        };
        w.chunks_exact(k).map(dot).collect::<Vec<f64>>()
    };
    x.chunks_exact(k).flat_map(row).collect()
}

/// ‖approximate − exact‖ / ‖exact‖.
pub fn relative<T: Copy + Into<f64>>(exact: &[T], approximate: &[f32]) -> f64 {
    let (mut off, mut all) = (0.0, 0.0);
    for (&exact, &value) in exact.iter().zip(approximate) {
        let exact: f64 = exact.into();
        off += (f64::from(value) - exact).powi(2);
        all += exact.powi(2);
    }
    (off / all).sqrt()
}

/// What requests are about.
pub struct Data {
    pub columns: usize,
    pub weight: Vec<f32>,
    pub activations: Vec<f32>,
}

impl Data {
    /// From files of rows of f32.
    pub fn read(columns: &str, weight: &str, activations: &str) -> Result<Data> {
        Ok(Data {
            columns: columns.parse()?,
            weight: read(weight)?,
            activations: read(activations)?,
        })
    }

    /// As many rows of the weight as asked for, over and over.
    pub fn rows(&self, n: usize) -> Vec<f32> {
        let weight = self.weight.iter().copied().cycle();
        weight.take(n * self.columns).collect()
    }

    /// The activations of so many tokens.
    pub fn tokens(&self, m: usize) -> Result<&[f32]> {
        let x = self.activations.get(..m * self.columns);
        x.ok_or_else(|| "more rows than activations".into())
    }
}

fn read(path: &str) -> Result<Vec<f32>> {
    let bytes = std::fs::read(path)?;
    let (values, _) = bytes.as_chunks::<4>();
    Ok(values.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

/// Copies of weights of so many bytes that calls rotate over: as many as no cache
/// holds, unless the request says how many.
pub fn copies(request: &Value, nbytes: usize, past_caches: usize) -> usize {
    match request["copies"].as_u64() {
        Some(n) => n as usize,
        None => past_caches.div_ceil(nbytes),
    }
}
