//! Rows of one bit for each element, the first in the highest bit of the first byte, as
//! `numpy.packbits` and Postgres' `bit` have them.

use super::{Isa, Op};

/// Bits of a query's elements.
pub const PLANES: usize = 4;

/// Bytes of a row of `n` elements.
pub const fn packed_len(n: usize) -> usize {
    n.div_ceil(8)
}

/// A bit for each element: whether it is greater than zero. Bits past the last are zero.
pub fn pack(x: &[f32], out: &mut [u8]) {
    for (eight, out) in x.chunks(8).zip(out) {
        let bits = eight.iter().enumerate();
        *out = bits.fold(0, |byte, (i, &x)| byte | u8::from(x > 0.0) << (7 - i));
    }
}

/// What rows of bits are searched for: scores are higher for those that come nearer.
pub struct Query {
    /// Each of them as long as a row, in words; the last is filled up with zeros.
    planes: Vec<u64>,
    words: usize,
    /// What a bit of the lowest plane weighs, what any set bit does, and what all scores
    /// begin with.
    step: f32,
    low: f32,
    start: f32,
}

impl Query {
    /// The sum of x's elements, each with the sign that a row has for it. They are rounded
    /// to sixteen steps between the least and the greatest.
    pub fn sums(x: &[f32]) -> Query {
        let low = x.iter().copied().fold(f32::INFINITY, f32::min);
        let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let steps = (1 << PLANES) - 1;
        let step = (high - low) / steps as f32;
        let code = |x: f32| match step > 0.0 {
            true => ((x - low) / step).round_ties_even() as u32,
            false => 0,
        };
        let codes: Vec<u32> = x.iter().map(|&x| code(x)).collect();
        let bit = |plane: usize| -> Vec<f32> {
            codes.iter().map(|c| ((c >> plane) & 1) as f32).collect()
        };
        let mut planes = Vec::new();
        for plane in 0..PLANES {
            planes.extend(words_of(&bit(plane)));
        }
        let sum: f32 = codes.iter().map(|&c| low + step * c as f32).sum();
        Query {
            words: planes.len() / PLANES,
            planes,
            // A set bit counts twice, for what it adds and what it no longer takes away.
            step: 2.0 * step,
            low: 2.0 * low,
            start: -sum,
        }
    }

    /// Minus the number of bits in which a row differs from x's signs.
    pub fn hamming(x: &[f32]) -> Query {
        let planes = words_of(x);
        let set: u32 = planes.iter().map(|w| w.count_ones()).sum();
        Query {
            words: planes.len(),
            planes,
            // differing = set + those of the row − 2 · those of both
            step: 2.0,
            low: -1.0,
            start: -(set as f32),
        }
    }
}

fn words_of(x: &[f32]) -> Vec<u64> {
    let mut bytes = vec![0; packed_len(x.len()).next_multiple_of(8)];
    pack(x, &mut bytes);
    bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|w| u64::from_le_bytes(*w))
        .collect()
}

/// The score of each row.
pub struct Scores<'a> {
    pub query: &'a Query,
    pub rows: &'a [u8],
    /// Bytes of a row.
    pub row: usize,
    pub out: &'a mut [f32],
}

impl Op for Scores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        match self.query.planes.len() == self.query.words {
            true => scores::<1>(self),
            false => scores::<PLANES>(self),
        }
    }
}

#[inline(always)]
fn scores<const P: usize>(op: Scores<'_>) {
    let Scores {
        query,
        rows,
        row,
        out,
    } = op;
    let planes: [&[u64]; P] =
        std::array::from_fn(|p| &query.planes[p * query.words..(p + 1) * query.words]);
    for (bits, out) in rows.chunks_exact(row).zip(out) {
        let (words, tail) = bits.as_chunks::<8>();
        let mut set = 0;
        let mut both = [0; P];
        let mut add = |i: usize, word: u64| {
            set += word.count_ones();
            for (both, plane) in both.iter_mut().zip(planes) {
                *both += (word & plane[i]).count_ones();
            }
        };
        for (i, word) in words.iter().enumerate() {
            add(i, u64::from_le_bytes(*word));
        }
        if !tail.is_empty() {
            let mut word = [0; 8];
            word[..tail.len()].copy_from_slice(tail);
            add(words.len(), u64::from_le_bytes(word));
        }
        let weighed = both.iter().enumerate().map(|(p, &n)| n << p).sum::<u32>();
        *out = query.start + query.low * set as f32 + query.step * weighed as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{dispatch_at, levels};

    #[test]
    fn bits_are_those_of_numpy() {
        let mut out = [0; 2];
        pack(&[1.0, 0.0, -1.0, 2.0, 1e-30, -0.0, 1.0, 1.0, 5.0], &mut out);
        assert_eq!(out, [0b1001_1011, 0b1000_0000]);
    }

    #[test]
    fn every_level_counts_as_the_definition_does() {
        for n in [1, 7, 8, 63, 64, 65, 129, 384] {
            let noise = |i: usize| (i as f32 * 12.9898).sin() * 43.0 % 1.0;
            let x: Vec<f32> = (0..n).map(|i| noise(i + n)).collect();
            let rows: Vec<Vec<f32>> = (0..9)
                .map(|r| (0..n).map(|i| noise(i * 7 + r)).collect())
                .collect();
            let row = packed_len(n);
            let mut packed = vec![0; 9 * row];
            for (x, out) in rows.iter().zip(packed.chunks_exact_mut(row)) {
                pack(x, out);
            }
            let signs = |r: &[f32]| {
                r.iter()
                    .map(|&v| if v > 0.0 { 1.0 } else { -1.0 })
                    .collect::<Vec<f32>>()
            };
            let (low, high) = x
                .iter()
                .fold((f32::MAX, f32::MIN), |(l, h), &v| (l.min(v), h.max(v)));
            let step = (high - low) / 15.0;
            for level in levels() {
                for hamming in [true, false] {
                    let query = if hamming {
                        Query::hamming(&x)
                    } else {
                        Query::sums(&x)
                    };
                    let mut out = vec![0.0; 9];
                    dispatch_at(
                        level,
                        Scores {
                            query: &query,
                            rows: &packed,
                            row,
                            out: &mut out,
                        },
                    );
                    for (r, got) in rows.iter().zip(out) {
                        let pairs = x.iter().zip(signs(r));
                        let expected: f32 = match hamming {
                            true => {
                                -(pairs.filter(|(x, s)| (**x > 0.0) != (*s > 0.0)).count() as f32)
                            }
                            false => pairs
                                .map(|(x, s)| {
                                    let code = if step > 0.0 {
                                        ((x - low) / step).round_ties_even()
                                    } else {
                                        0.0
                                    };
                                    s * (low + step * code)
                                })
                                .sum(),
                        };
                        assert!(
                            (got - expected).abs() <= 1e-4 * n as f32,
                            "{level:?}, {n}: {got} {expected}"
                        );
                    }
                }
            }
        }
    }
}
