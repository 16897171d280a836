//! The nearest of all that were looked at, for each of some queries.

use std::cmp::Ordering;
use std::ops::Range;

use rayon::prelude::*;

use crate::error::Result;
use crate::ops::{Cancel, pool};
use crate::simd::dispatch;
use crate::simd::dot::DotRows;
use crate::tensor::Tensor;

/// A vector's number, and its score: the higher, the nearer.
pub type Found = (u64, f32);

/// For each query the best that were seen, in order. What they are depends on no order
/// in which others were looked at.
#[derive(Clone, Debug, PartialEq)]
pub struct Nearest {
    most: usize,
    lists: Vec<Vec<Found>>,
}

fn order(a: &Found, b: &Found) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Puts what was found into a list of so many.
pub(super) fn put(list: &mut Vec<Found>, most: usize, found: Found) {
    let full = list.len() == most;
    if full && list.last().is_none_or(|last| order(&found, last).is_ge()) {
        return;
    }
    let at = list.partition_point(|other| order(other, &found).is_lt());
    if full {
        list.pop();
    }
    list.insert(at, found);
}

impl Nearest {
    /// Nothing found for so many queries, of which the `most` nearest will be kept.
    pub fn new(queries: usize, most: usize) -> Nearest {
        Nearest {
            most,
            lists: vec![Vec::new(); queries],
        }
    }

    /// For each query the nearest, the best first.
    pub fn lists(&self) -> &[Vec<Found>] {
        &self.lists
    }

    pub(super) fn lists_mut(&mut self) -> &mut [Vec<Found>] {
        &mut self.lists
    }

    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// Takes in what was found elsewhere.
    pub fn merge(&mut self, other: &Nearest) {
        for (list, others) in self.lists.iter_mut().zip(&other.lists) {
            others.iter().for_each(|&found| put(list, self.most, found));
        }
    }

    /// The lists as bytes, to be kept.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for list in &self.lists {
            bytes.extend((list.len() as u32).to_le_bytes());
            for (id, score) in list {
                bytes.extend(id.to_le_bytes());
                bytes.extend(score.to_le_bytes());
            }
        }
        bytes
    }

    /// Takes in what was kept; bytes that are not of as many queries change nothing.
    pub fn merge_bytes(&mut self, mut bytes: &[u8]) {
        let mut other = Nearest::new(0, self.most);
        while let Some((count, rest)) = bytes.split_first_chunk::<4>() {
            let Some((found, rest)) =
                rest.split_at_checked(u32::from_le_bytes(*count) as usize * 12)
            else {
                return;
            };
            let pairs = found.as_chunks::<12>().0.iter().map(|pair| {
                let (id, score) = pair.split_at(8);
                let id = u64::from_le_bytes(id.try_into().unwrap_or_default());
                (id, f32::from_le_bytes(score.try_into().unwrap_or_default()))
            });
            other.lists.push(pairs.collect());
            bytes = rest;
        }
        if other.lists.len() == self.lists.len() {
            self.merge(&other);
        }
    }

    /// Looks at all of some prepared vectors, the first of which has that number. A
    /// query does not find itself.
    ///
    /// # Errors
    /// `Cancelled`.
    pub(super) fn look(
        &mut self,
        queries: &Queries,
        x: &Tensor,
        first: usize,
        cancel: &Cancel,
    ) -> Result<()> {
        /// Rows that one task scores: they stay in a cache with their scores.
        const ROWS: usize = 256;
        let (d, n, q) = (x.row_len(), x.shape()[0], queries.ids.len());
        if q == 0 {
            return Ok(());
        }
        let blocks = (0..n.div_ceil(ROWS)).into_par_iter();
        let look = |block: usize| -> Result<Nearest> {
            cancel.check()?;
            let rows: Range<usize> = block * ROWS..n.min((block + 1) * ROWS);
            let mut scratch = Vec::new();
            let w = x.f32_chunk(rows.start * d..rows.end * d, &mut scratch);
            let mut scores = vec![0f32; rows.len() * q];
            let x = &queries.values;
            dispatch(DotRows {
                k: d,
                x,
                w,
                out: &mut scores,
            });
            let mut found = Nearest::new(q, self.most);
            for (row, scores) in rows.zip(scores.chunks_exact(q)) {
                let id = (first + row) as u64;
                for ((list, &score), own) in found.lists.iter_mut().zip(scores).zip(&queries.ids) {
                    if id != *own {
                        put(list, self.most, (id, score));
                    }
                }
            }
            Ok(found)
        };
        let found = pool::run(|| blocks.map(look).collect::<Result<Vec<_>>>())?;
        found.iter().for_each(|found| self.merge(found));
        Ok(())
    }
}

/// Vectors of a set that are looked for in it.
#[derive(Debug)]
pub struct Queries {
    /// Their numbers.
    pub ids: Vec<u64>,
    /// Prepared, one after the other.
    pub values: Vec<f32>,
}

impl Queries {
    /// Some of a prepared sample whose vectors have these numbers: one, chosen by chance
    /// but always the same, of each of as many stretches of it.
    pub fn of(sample: &Tensor, ids: &[u64], most: usize) -> Queries {
        let (d, n) = (sample.row_len(), ids.len());
        let count = most.min(n);
        let values = sample.to_f32_vec();
        let mut queries = Queries {
            ids: Vec::new(),
            values: Vec::new(),
        };
        for i in 0..count {
            let row = jittered(i, count, n);
            queries.ids.push(ids[row]);
            queries.values.extend(&values[row * d..(row + 1) * d]);
        }
        queries
    }
}

/// A number within stretch `i` of `count` that make up `0..n`.
pub(crate) fn jittered(i: usize, count: usize, n: usize) -> usize {
    let (start, end) = (at(i, count, n), at(i + 1, count, n));
    // A step of splitmix64.
    let mut z = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    start + ((z ^ (z >> 31)) % (end - start).max(1) as u64) as usize
}

fn at(i: usize, count: usize, n: usize) -> usize {
    (i as u128 * n as u128 / count as u128) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_kept_in_whatever_order_they_come() {
        let all: Vec<Found> = (0..50u64).map(|i| (i, ((i * 37) % 23) as f32)).collect();
        let mut expected = all.clone();
        expected.sort_by(order);
        expected.truncate(7);
        let mut forth = Nearest::new(1, 7);
        let mut back = Nearest::new(1, 7);
        all.iter().for_each(|&f| put(&mut forth.lists[0], 7, f));
        let mut half = Nearest::new(1, 7);
        all[..25]
            .iter()
            .rev()
            .for_each(|&f| put(&mut half.lists[0], 7, f));
        back.merge_bytes(&half.to_bytes());
        let mut half = Nearest::new(1, 7);
        all[25..]
            .iter()
            .rev()
            .for_each(|&f| put(&mut half.lists[0], 7, f));
        back.merge_bytes(&half.to_bytes());
        assert_eq!(forth.lists, [expected]);
        assert_eq!(back, forth);
        // Torn, or of other queries.
        back.merge_bytes(&half.to_bytes()[..9]);
        back.merge_bytes(&Nearest::new(2, 7).to_bytes());
        assert_eq!(back, forth);
    }

    #[test]
    fn stretches_are_met_once_each() {
        for (count, n) in [(1, 1), (3, 3), (7, 100), (200, 16384)] {
            let rows: Vec<usize> = (0..count).map(|i| jittered(i, count, n)).collect();
            assert!(rows.windows(2).all(|w| w[0] < w[1]), "{rows:?}");
            assert!(rows[count - 1] < n);
        }
    }
}
