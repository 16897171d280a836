//! Times operations as a driver asks, so that it can interleave them with those
//! of other programs:
//!
//! ```text
//! ops THREADS COLUMNS WEIGHT ACTIVATIONS
//! ```
//!
//! The files hold rows of f32. Reads one JSON object a line from standard input
//! and answers each with one: `bench/peers/README.md` says which. The program
//! `bench/peers/ops.py` drives it.

#[path = "../../tests/support/mod.rs"]
mod support;

mod requests;

use std::collections::HashMap;

use serde_json::{Value, json};

use viva_core::format::{OptionValue, Quantized, Spec, spec};
use viva_core::ops::dequantize::{dequantize, dequantize_into, dequantized_len};
use viva_core::ops::packed::pack;
use viva_core::ops::quantize::quantize;
use viva_core::ops::{Cancel, int8, limits, matmul, pool};
use viva_core::simd::memory::use_huge_pages;
use viva_core::tensor::{DType, Tensor};

use requests::{
    CHECKED, Data, PAST_CACHES, Result, checked, copies, number, product, relative, serve, text,
    timed,
};

/// Multiplies with one copy of the weights.
type Multiply<'a> = Box<dyn Fn(&mut [u8]) -> viva_core::error::Result<()> + 'a>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [threads, columns, weight, activations] = &args[..] else {
        return Err("ops THREADS COLUMNS WEIGHT ACTIVATIONS".into());
    };
    pool::configure(threads.parse()?)?;
    let mut ops = Ops::of(Data::read(columns, weight, activations)?, PAST_CACHES);
    serve(|request| ops.answer(request))
}

/// The data, and what earlier requests quantized of it.
struct Ops {
    data: Data,
    past_caches: usize,
    quantized: HashMap<String, Quantized>,
}

impl Ops {
    fn of(data: Data, past_caches: usize) -> Ops {
        Ops {
            data,
            past_caches,
            quantized: HashMap::new(),
        }
    }

    fn answer(&mut self, request: &Value) -> Result<Value> {
        match text(request, "op")? {
            "limit" => self.limit(request),
            "quantize" => self.quantize(request),
            "dequantize" => self.dequantize(request),
            "matmul" => self.matmul(request),
            other => Err(format!("no operation {other:?}").into()),
        }
    }

    fn limit(&self, request: &Value) -> Result<Value> {
        let limit = limits::by_name(text(request, "name")?)?;
        let mut memory = vec![0f32; self.past_caches / size_of::<f32>()];
        // As operations have for what is large.
        use_huge_pages(bytemuck::cast_slice_mut(&mut memory));
        memory.fill(1.0);
        let Some(work) = limit.probe(&mut memory)? else {
            return Err("the instruction set in force has no such instruction".into());
        };
        let seconds = timed(request, || limit.probe(&mut memory).map(drop))?;
        Ok(json!({"seconds": seconds, "work": work, "unit": limit.unit}))
    }

    fn quantize(&mut self, request: &Value) -> Result<Value> {
        let (spec, w) = (spec_of(request)?, self.rows(request)?);
        let cancel = Cancel::new();
        let seconds = timed(request, || quantize(&w, &spec, &cancel).map(drop))?;
        let q = quantize(&w, &spec, &cancel)?;
        let error = checked(request, || Ok(relative(&w.to_f32_vec(), &dequantize(&q)?)))?;
        Ok(json!({"seconds": seconds, "work": w.bytes().len(), "unit": "B", "error": error}))
    }

    fn dequantize(&mut self, request: &Value) -> Result<Value> {
        let q = self.quantized(request)?;
        let cancel = Cancel::new();
        let mut out = vec![0u8; dequantized_len(&q, DType::F32)];
        let seconds = timed(request, || {
            dequantize_into(&q, DType::F32, &mut out, &cancel)
        })?;
        Ok(json!({"seconds": seconds, "work": out.len(), "unit": "B"}))
    }

    fn matmul(&mut self, request: &Value) -> Result<Value> {
        let q = self.quantized(request)?;
        let compute = text(request, "compute")?;
        let multiply = matmul::by_name(compute)?;
        let packed = request["packed"].as_bool().unwrap_or(false);
        if packed && compute != int8::NAME {
            return Err(format!("no packed weights for {compute}").into());
        }
        let (n, k) = (q.shape[0], q.shape[1]);
        let m = number(request, "m")?;
        let x = &Tensor::from_slice(DType::F32, &[m, k], self.data.tokens(m)?)?;
        let cancel = &Cancel::new();
        let copy = |_| -> Result<Multiply> {
            if packed {
                let w = pack(&q, cancel)?;
                return Ok(Box::new(move |y| {
                    int8::matmul_packed(x, &w, DType::F32.into(), y, cancel)
                }));
            }
            let w = support::copied(&q);
            Ok(Box::new(move |y| {
                multiply(x, &w, DType::F32.into(), y, cancel)
            }))
        };
        let copies = 0..copies(request, q.nbytes(), self.past_caches);
        let copies = copies.map(copy).collect::<Result<Vec<_>>>()?;
        let mut y = vec![0f32; m * n];
        let mut turn = copies.iter().cycle();
        let seconds = timed(request, || {
            turn.next().map_or(Ok(()), |multiply| {
                multiply(bytemuck::cast_slice_mut(&mut y))
            })
        })?;
        let error = checked(request, || {
            let checked = m.min(CHECKED);
            let exact = product(self.data.tokens(checked)?, &dequantize(&q)?, k);
            Ok(relative(&exact, &y[..checked * n]))
        })?;
        // One row is bound by memory, several by arithmetic.
        let (work, unit) = match m {
            1 => (q.nbytes(), "B"),
            _ => (2 * m * n * k, "op"),
        };
        Ok(json!({"seconds": seconds, "work": work, "unit": unit, "error": error}))
    }

    /// As many rows as asked for, as a tensor.
    fn rows(&self, request: &Value) -> Result<Tensor> {
        let n = number(request, "rows")?;
        let dtype = DType::from_name(text(request, "dtype")?)?;
        let shape = [n, self.data.columns];
        Ok(support::float_tensor(dtype, &shape, &self.data.rows(n)))
    }

    fn quantized(&mut self, request: &Value) -> Result<Quantized> {
        let key = ["format", "options", "rows", "dtype"].map(|k| request[k].to_string());
        let key = key.join(" ");
        if !self.quantized.contains_key(&key) {
            let q = quantize(&self.rows(request)?, &spec_of(request)?, &Cancel::new())?;
            self.quantized.insert(key.clone(), q);
        }
        Ok(self.quantized[&key].clone())
    }
}

fn spec_of(request: &Value) -> Result<Spec> {
    let options = request["options"].as_object().into_iter().flatten();
    let options = options.map(|(name, value)| {
        let value = match value {
            Value::Bool(v) => OptionValue::Bool(*v),
            Value::String(v) => OptionValue::Name(v.clone()),
            v => OptionValue::Int(v.as_i64().ok_or_else(|| format!("{name}: {v}"))?),
        };
        Ok((name.clone(), value))
    });
    let options = options.collect::<Result<Vec<_>>>()?;
    Ok(spec(text(request, "format")?, options)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ops() -> Ops {
        let (n, k) = (64, 256);
        let data = Data {
            columns: k,
            weight: support::gaussian(n * k, 1),
            activations: support::gaussian(9 * k, 2),
        };
        Ops::of(data, 1 << 16)
    }

    #[test]
    fn every_operation_answers() {
        let mut ops = ops();
        for request in [
            json!({"op": "limit", "name": "read"}),
            json!({"op": "quantize", "format": "nf4", "dtype": "bf16", "rows": 64}),
            json!({"op": "dequantize", "format": "q4_k", "dtype": "f32", "rows": 128}),
            json!({"op": "matmul", "format": "int4", "options": {"block_size": 32},
                "compute": "f32", "dtype": "f32", "rows": 64, "m": 1}),
            json!({"op": "matmul", "format": "int8", "compute": "llm_int8", "dtype": "f32",
                "rows": 64, "m": 9}),
            json!({"op": "matmul", "format": "q4_k", "compute": "int8", "packed": true,
                "dtype": "f32", "rows": 64, "m": 2, "copies": 1}),
        ] {
            let answer = ops.answer(&request).unwrap();
            assert!(
                answer["seconds"].as_f64().unwrap() > 0.0,
                "{request}: {answer}"
            );
            assert!(answer["work"].as_u64().unwrap() > 0, "{request}: {answer}");
        }
    }

    #[test]
    fn errors_are_those_of_the_codes_and_of_the_product() {
        let mut ops = ops();
        let mut ask = |op: &str, compute: &str, packed: bool| {
            let request = json!({"op": op, "format": "int8", "compute": compute, "dtype": "f32",
                "packed": packed, "rows": 64, "m": 9, "error": true});
            ops.answer(&request).unwrap()["error"].as_f64().unwrap()
        };
        let codes = ask("quantize", "", false);
        assert!((1e-3..0.02).contains(&codes), "{codes}");
        let f32 = ask("matmul", "f32", false);
        assert!((1e-9..1e-6).contains(&f32), "{f32}");
        for compute in ["llm_int8", "int8"] {
            let int8 = ask("matmul", compute, false);
            assert!((1e-3..0.02).contains(&int8), "{compute}: {int8}");
        }
        assert_eq!(ask("matmul", "int8", true), ask("matmul", "int8", false));
    }

    #[test]
    fn what_it_cannot_do_is_an_error() {
        for request in [
            json!({"op": "divide"}),
            json!({"op": "limit", "name": "reads"}),
            json!({"op": "matmul", "format": "int9", "rows": 1, "dtype": "f32"}),
            json!({"op": "quantize", "format": "nf4", "dtype": "f32"}),
            json!({"op": "matmul", "format": "int8", "compute": "f32", "packed": true,
                "dtype": "f32", "rows": 64, "m": 1}),
        ] {
            assert!(ops().answer(&request).is_err(), "{request}");
        }
    }
}
