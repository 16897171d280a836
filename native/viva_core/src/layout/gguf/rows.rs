//! The order of the rows of query and key projections.
//!
//! Rotary embeddings turn pairs of rows of a head. `transformers` pairs row i
//! with row i + d/2 of a head of d rows; llama.cpp's llama pairs 2i with 2i + 1.

use crate::error::Result;
use crate::tensor::{Buffer, Tensor};

/// Which row of one spelling each row of the other is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowOrder {
    /// Rows of one head: an even number.
    head: usize,
    /// From llama.cpp's order to `transformers`'.
    back: bool,
}

impl RowOrder {
    /// From `transformers`' order to llama.cpp's, `rows` rows in `heads` heads;
    /// or says why they cannot be put in order.
    pub(super) fn new(rows: usize, heads: usize) -> std::result::Result<RowOrder, String> {
        if heads == 0 || !rows.is_multiple_of(2 * heads) {
            return Err(format!(
                "{rows} rows are not {heads} heads of an even number of rows each"
            ));
        }
        Ok(RowOrder {
            head: rows / heads,
            back: false,
        })
    }

    /// The order that undoes this one.
    pub fn undone(self) -> RowOrder {
        RowOrder {
            back: !self.back,
            ..self
        }
    }

    /// The row that becomes row `row`.
    pub fn source(self, row: usize) -> usize {
        let (start, i) = (row / self.head * self.head, row % self.head);
        let half = self.head / 2;
        start
            + match self.back {
                false => i % 2 * half + i / 2,
                true => i % half * 2 + i / half,
            }
    }

    /// Puts rows of `row_bytes` bytes in order.
    pub fn apply(self, bytes: &[u8], row_bytes: usize) -> Buffer {
        let mut out = Buffer::zeroed(bytes.len());
        if row_bytes > 0 {
            let rows = out.bytes_mut().chunks_exact_mut(row_bytes);
            for (row, to) in rows.enumerate() {
                let at = self.source(row) * row_bytes;
                to.copy_from_slice(&bytes[at..at + row_bytes]);
            }
        }
        out
    }

    /// Puts the rows of a tensor in order.
    pub fn tensor(self, tensor: &Tensor) -> Result<Tensor> {
        self.parts_of_rows(tensor, tensor.shape().first().copied().unwrap_or(1))
    }

    /// Puts what `rows` rows have each, in whole bytes, in order.
    pub(super) fn parts_of_rows(self, tensor: &Tensor, rows: usize) -> Result<Tensor> {
        let buffer = self.apply(tensor.bytes(), tensor.bytes().len() / rows.max(1));
        Tensor::from_buffer(tensor.dtype(), tensor.shape().to_vec(), buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_of_halves_become_pairs_of_neighbours() {
        let order = RowOrder::new(12, 2).unwrap();
        let rows: Vec<u8> = (0..12).collect();
        let ordered = order.apply(&rows, 1);
        assert_eq!(ordered.as_ref(), [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        assert_eq!(order.undone().apply(ordered.as_ref(), 1).as_ref(), rows);
        let pairs: Vec<u8> = (0..24).collect();
        assert_eq!(&order.apply(&pairs, 2).as_ref()[..6], [0, 1, 6, 7, 2, 3]);
    }

    #[test]
    fn rows_that_are_no_heads_are_refused() {
        for (rows, heads) in [(12, 0), (12, 5), (12, 12), (0, 0)] {
            assert!(RowOrder::new(rows, heads).is_err(), "{rows} {heads}");
        }
    }
}
