//! How the weights of a tensor are spread, beside the values that codes give them.

use crate::error::Result;
use crate::format::{Granularity, Input, Quantized};
use crate::method::input;
use crate::tensor::Tensor;

/// Bins from −1 to 1, the middle one around zero.
pub const BINS: usize = 129;

/// Weights that are looked at: many for each bin, however large the tensor is.
const MOST: usize = 1 << 20;

/// Counts of weights, and of the values that they were given. Those of a block lie between
/// its least and its greatest value; around zero where the format is symmetric.
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
        let span = Span::of(y, q.spec.symmetric);
        for (x, y) in x.iter().zip(y) {
            found.weights[span.bin(*x)] += 1;
            found.values[span.bin(*y)] += 1;
        }
    }
    Ok(Some(found))
}

/// Where the values of a block lie.
struct Span {
    middle: f32,
    half: f32,
}

impl Span {
    fn of(values: &[f32], symmetric: bool) -> Span {
        let least = values.iter().copied().fold(f32::INFINITY, f32::min);
        let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if symmetric {
            let half = most.max(-least);
            Span { middle: 0.0, half }
        } else {
            let half = (most - least) / 2.0;
            let middle = least + half;
            Span { middle, half }
        }
    }

    /// The bin of a number; what is past the values of its block is in the last.
    fn bin(&self, value: f32) -> usize {
        let middle = (BINS / 2) as f32;
        let part = if self.half > 0.0 {
            (value - self.middle) / self.half
        } else {
            0.0
        };
        (middle + (part * middle).round()).clamp(0.0, 2.0 * middle) as usize
    }
}
