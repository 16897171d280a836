//! Times candle's quantized formats as a driver asks:
//!
//! ```text
//! candle_peer COLUMNS WEIGHT ACTIVATIONS
//! ```
//!
//! The files hold rows of f32; `RAYON_NUM_THREADS` is the number of threads.

#[path = "../../../../native/viva_core/examples/ops/requests.rs"]
mod requests;

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Module, Tensor};
use serde_json::{Value, json};

use requests::{
    CHECKED, Data, PAST_CACHES, Result, checked, copies, number, product, relative, serve, text,
    timed,
};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [columns, weight, activations] = &args[..] else {
        return Err("candle_peer COLUMNS WEIGHT ACTIVATIONS".into());
    };
    let mut candle = Candle {
        data: Data::read(columns, weight, activations)?,
        quantized: HashMap::new(),
    };
    serve(|request| candle.answer(request))
}

/// The data, and what earlier requests quantized of it.
struct Candle {
    data: Data,
    quantized: HashMap<(String, usize), Arc<QTensor>>,
}

impl Candle {
    fn answer(&mut self, request: &Value) -> Result<Value> {
        let name = text(request, "format")?;
        let dtype = match name {
            "q4_0" => GgmlDType::Q4_0,
            "q8_0" => GgmlDType::Q8_0,
            "q4_k" => GgmlDType::Q4K,
            "q6_k" => GgmlDType::Q6K,
            _ => return Err(format!("no format {name:?}").into()),
        };
        let (n, k) = (number(request, "rows")?, self.data.columns);
        match text(request, "op")? {
            "quantize" => {
                let w = self.rows(n)?;
                let seconds = timed(request, || QTensor::quantize(&w, dtype))?;
                let error = checked(request, || {
                    let back = QTensor::quantize(&w, dtype)?.dequantize(&Device::Cpu)?;
                    let (w, back) = (w.flatten_all()?, back.flatten_all()?);
                    Ok(relative(&w.to_vec1::<f32>()?, &back.to_vec1::<f32>()?))
                })?;
                Ok(json!({"seconds": seconds, "work": 4 * n * k, "unit": "B", "error": error}))
            }
            "dequantize" => {
                let q = self.quantized(name, dtype, n)?;
                let seconds = timed(request, || q.dequantize(&Device::Cpu))?;
                Ok(json!({"seconds": seconds, "work": 4 * n * k, "unit": "B"}))
            }
            "matmul" => {
                let q = self.quantized(name, dtype, n)?;
                self.matmul(request, &q)
            }
            other => Err(format!("no operation {other:?}").into()),
        }
    }

    fn matmul(&self, request: &Value, q: &QTensor) -> Result<Value> {
        let (n, k) = q.shape().dims2()?;
        let m = number(request, "m")?;
        let x = Tensor::from_slice(self.data.tokens(m)?, (m, k), &Device::Cpu)?;
        let bytes = q.storage_size_in_bytes();
        let copies = (0..copies(request, bytes, PAST_CACHES)).map(|_| {
            let data = Cow::Owned(q.data()?.into_owned());
            let storage = QStorage::from_data(data, &Device::Cpu, q.dtype())?;
            Ok(QMatMul::from_qtensor(QTensor::new(storage, (n, k))?)?)
        });
        let copies = copies.collect::<Result<Vec<_>>>()?;
        let mut turn = copies.iter().cycle();
        let mut multiply = || turn.next().map(|w| w.forward(&x)).transpose();
        let seconds = timed(request, &mut multiply)?;
        let error = checked(request, || {
            let rows = m.min(CHECKED);
            let w = q
                .dequantize(&Device::Cpu)?
                .flatten_all()?
                .to_vec1::<f32>()?;
            let exact = product(self.data.tokens(rows)?, &w, k);
            let y = multiply()?
                .ok_or("no weights")?
                .flatten_all()?
                .to_vec1::<f32>()?;
            Ok(relative(&exact, &y[..rows * n]))
        })?;
        let (work, unit) = match m {
            1 => (bytes, "B"),
            _ => (2 * m * n * k, "op"),
        };
        Ok(json!({"seconds": seconds, "work": work, "unit": unit, "error": error}))
    }

    fn rows(&self, n: usize) -> Result<Tensor> {
        let shape = (n, self.data.columns);
        Ok(Tensor::from_vec(self.data.rows(n), shape, &Device::Cpu)?)
    }

    fn quantized(&mut self, name: &str, dtype: GgmlDType, n: usize) -> Result<Arc<QTensor>> {
        let key = (name.to_string(), n);
        if !self.quantized.contains_key(&key) {
            let q = QTensor::quantize(&self.rows(n)?, dtype)?;
            self.quantized.insert(key.clone(), Arc::new(q));
        }
        Ok(Arc::clone(&self.quantized[&key]))
    }
}
