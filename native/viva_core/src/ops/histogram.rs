//! How the weights of a tensor are spread, beside the values that codes give them.

use crate::error::Result;
use crate::format::{Granularity, Input, Quantized};
use crate::method::input;
use crate::tensor::Tensor;

/// Bins from −1 to 1, the middle one around zero.
pub const BINS: usize = 129;

/// Weights that are looked at: many for each bin, however large the tensor is.
const MOST: usize = 1 << 20;

/// Counts of weights, and of the values that they were given, each divided by the
/// largest magnitude of the weights that share its scale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    pub weights: Vec<u64>,
    pub values: Vec<u64>,
}

/// The histogram of whole blocks from the start of a tensor. `None` where codes do not
/// stand for the weights themselves, or blocks are not runs of a row.
pub fn quantized(x: &Tensor, q: &Quantized) -> Result<Option<Histogram>> {
    super::metrics::same_shape(x, &q.shape)?;
    if q.spec.input != Input::default() || q.spec.act_order {
        return Ok(None);
    }
    let block = match q.spec.granularity {
        Granularity::Tensor => x.len(),
        _ => q.spec.block_len(&q.shape),
    };
    let whole = MOST - MOST % block.clamp(1, MOST);
    let count = x.len().min(whole);
    let mut scratch = Vec::new();
    let x = x.f32_chunk(0..count, &mut scratch);
    let mut y = vec![0.0; count];
    input::decoder(q)?.decode(0, &mut y);
    let mut found = Histogram {
        weights: vec![0; BINS],
        values: vec![0; BINS],
    };
    for (x, y) in x.chunks(block.max(1)).zip(y.chunks(block.max(1))) {
        let largest = x.iter().fold(0f32, |most, v| most.max(v.abs()));
        for (x, y) in x.iter().zip(y) {
            found.weights[bin(*x, largest)] += 1;
            found.values[bin(*y, largest)] += 1;
        }
    }
    Ok(Some(found))
}

/// The bin of a number; what is past the largest is in the last.
fn bin(value: f32, largest: f32) -> usize {
    let middle = (BINS / 2) as f32;
    let part = if largest > 0.0 { value / largest } else { 0.0 };
    (middle + (part * middle).round()).clamp(0.0, 2.0 * middle) as usize
}
