//! Transposing matrices of small elements.

use rayon::prelude::*;

use super::pool;
use crate::error::Result;

/// Rows of the result that one task writes: its reads are this many neighbours.
const TILE: usize = 64;

/// The bytes of [columns, rows] from those of [rows, columns], N bytes an element.
pub fn transpose<const N: usize>(bytes: &[u8], rows: usize, columns: usize) -> Result<Vec<u8>> {
    let (elements, _) = bytes.as_chunks::<N>();
    let mut out = vec![0u8; elements.len() * N];
    if out.is_empty() {
        return Ok(out);
    }
    pool::run(|| {
        out.par_chunks_mut(TILE * rows * N)
            .enumerate()
            .for_each(|(i, out)| {
                let (out, _) = out.as_chunks_mut::<N>();
                let first = i * TILE;
                for row in 0..rows {
                    let from = &elements[row * columns + first..];
                    for (column, from) in from.iter().take(out.len() / rows).enumerate() {
                        out[column * rows + row] = *from;
                    }
                }
            });
        Ok(())
    })?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_become_rows() {
        for (rows, columns) in [(1, 1), (3, 5), (7, 64), (2, 129), (200, 65), (0, 3), (3, 0)] {
            let bytes: Vec<u8> = (0..rows * columns * 2)
                .map(|i| (i * 7 % 251) as u8)
                .collect();
            let out = transpose::<2>(&bytes, rows, columns).unwrap();
            for row in 0..rows {
                for column in 0..columns {
                    let (from, to) = (row * columns + column, column * rows + row);
                    assert_eq!(bytes[from * 2..from * 2 + 2], out[to * 2..to * 2 + 2]);
                }
            }
            assert_eq!(transpose::<2>(&out, columns, rows).unwrap(), bytes);
        }
    }
}
