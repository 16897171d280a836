//! What is done to activations before they meet the codes: a rotation, and a
//! scale for each column. Weights have the inverse done to them first, so that
//! products stay what they were.

use crate::error::Result;
use crate::format::{Decode, INPUT_SCALE, Quantized};
use crate::simd::sink::Out;

/// Columns that are rotated together: the greatest power of two that divides k.
fn span(k: usize) -> usize {
    1 << k.trailing_zeros()
}

/// Rotates rows of k by Hadamard matrices, 1/√span · ±1, each its own inverse:
/// what is large in one column spreads over all of a span (Ashkboos et al.,
/// "QuaRot", 2024).
pub fn rotate(x: &mut [f32], k: usize) {
    let span = span(k);
    let norm = 1.0 / (span as f32).sqrt();
    for x in x.chunks_exact_mut(span) {
        let mut half = 1;
        while half < span {
            for pair in x.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        for v in x {
            *v *= norm;
        }
    }
}

/// Multiplies the columns of rows of k.
pub fn scale(x: &mut [f32], by: &[f32]) {
    for row in x.chunks_exact_mut(by.len()) {
        for (v, by) in row.iter_mut().zip(by) {
            *v *= by;
        }
    }
}

/// The weight that a quantized tensor stands for, its input's part included.
pub fn decoder<'a>(q: &'a Quantized) -> Result<Box<dyn Decode + 'a>> {
    let codes = q.spec.format()?.decoder(q)?;
    let input = q.spec.input;
    if !(input.rotated || input.scaled) {
        return Ok(codes);
    }
    Ok(Box::new(Decoder {
        codes,
        k: q.shape.last().copied().unwrap_or(1).max(1),
        rotated: input.rotated,
        scale: scale_of(q)?,
    }))
}

/// The factors of a scaled input.
fn scale_of(q: &Quantized) -> Result<Option<Vec<f32>>> {
    match q.spec.input.scaled {
        true => Ok(Some(q.part(INPUT_SCALE)?.to_f32_vec())),
        false => Ok(None),
    }
}

/// Does to rows of activations what the codes ask for.
pub fn prepare(q: &Quantized, x: &mut [f32]) -> Result<()> {
    if q.spec.input.rotated {
        rotate(x, q.shape.last().copied().unwrap_or(1));
    }
    if let Some(by) = scale_of(q)? {
        scale(x, &by);
    }
    Ok(())
}

struct Decoder<'a> {
    codes: Box<dyn Decode + 'a>,
    k: usize,
    rotated: bool,
    scale: Option<Vec<f32>>,
}

impl Decode for Decoder<'_> {
    fn decode_into(&self, start: usize, out: Out) {
        let out = out.values;
        // Whole rows, since a rotation mixes them.
        let first = start / self.k;
        let last = (start + out.len()).div_ceil(self.k);
        let mut rows = vec![0f32; (last - first) * self.k];
        self.codes.decode(first * self.k, &mut rows);
        if let Some(by) = &self.scale {
            scale(&mut rows, by);
        }
        if self.rotated {
            rotate(&mut rows, self.k);
        }
        let skip = start - first * self.k;
        out.copy_from_slice(&rows[skip..skip + out.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_is_its_own_inverse_and_keeps_lengths() {
        for k in [1, 7, 8, 96, 384, 1000] {
            let x: Vec<f32> = (0..2 * k).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
            let mut y = x.clone();
            rotate(&mut y, k);
            let length = |x: &[f32]| x.iter().map(|v| v * v).sum::<f32>();
            assert!((length(&y) / length(&x) - 1.0).abs() < 1e-5);
            rotate(&mut y, k);
            for (x, y) in x.iter().zip(&y) {
                assert!((x - y).abs() < 1e-4, "{k}: {x} {y}");
            }
        }
    }
}
