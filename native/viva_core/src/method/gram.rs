//! The Gram matrix XᵀX of activations: what the output error of a layer depends
//! on. For an error E = W − Ŵ, ‖E·Xᵀ‖² = tr(E · XᵀX · Eᵀ).

use rayon::prelude::*;

use super::input;
use crate::error::Result;
use crate::ops::Cancel;
use crate::simd::dispatch;
use crate::simd::product::{NARROW, Product, WIDE, pack};

/// Rows of activations that one pass takes: their panels stay in the L1 cache.
const PASS: usize = 256;

/// A symmetric matrix. Panels of [`WIDE`] columns, of which rows up to their
/// own last column are kept: the upper triangle, a little stepped.
#[derive(Clone, Debug)]
pub struct Gram {
    columns: usize,
    panels: Vec<Vec<f32>>,
}

impl Gram {
    pub fn zeroed(columns: usize) -> Gram {
        let panels = (0..columns.div_ceil(WIDE))
            .map(|p| vec![0f32; (p + 1) * WIDE * WIDE])
            .collect();
        Gram { columns, panels }
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The element in row i and column j.
    pub fn at(&self, i: usize, j: usize) -> f32 {
        let (i, j) = (i.min(j), i.max(j));
        self.panels[j / WIDE][i * WIDE + j % WIDE]
    }

    /// Writes column j, from its first row to its last.
    pub fn read_column(&self, j: usize, out: &mut [f32]) {
        let own = j / WIDE;
        // From the diagonal on it is a row.
        for (p, out) in (own..).zip(out[own * WIDE..].chunks_mut(WIDE)) {
            out.copy_from_slice(&self.panels[p][j * WIDE..][..out.len()]);
        }
        for (out, row) in out[..j].iter_mut().zip(self.panels[own].chunks_exact(WIDE)) {
            *out = row[j % WIDE];
        }
    }

    pub fn diagonal(&self) -> impl Iterator<Item = f32> {
        (0..self.columns).map(|i| self.at(i, i))
    }

    /// Adds XᵀX for rows X of `columns` elements. Call it inside the pool.
    ///
    /// # Errors
    /// `Cancelled`.
    pub fn add(&mut self, x: &[f32], cancel: &Cancel) -> Result<()> {
        for x in x.chunks(PASS * self.columns.max(1)) {
            self.add_pass(x, cancel)?;
        }
        Ok(())
    }

    fn add_pass(&mut self, x: &[f32], cancel: &Cancel) -> Result<()> {
        let columns = self.columns;
        let depth = x.len() / columns;
        // As many panels as the stepped triangle has rows of.
        let padded = columns.div_ceil(WIDE) * WIDE;
        let mut narrow = vec![0f32; padded * depth];
        narrow
            .par_chunks_mut(depth * NARROW)
            .enumerate()
            .take(columns.div_ceil(NARROW))
            .for_each(|(p, panel)| pack::<NARROW>(x, columns, p * NARROW, panel));
        // Later panels are longer: handed out first, they end together.
        self.panels
            .par_iter_mut()
            .enumerate()
            .rev()
            .try_for_each_init(
                || vec![0f32; depth * WIDE],
                |b, (p, panel)| {
                    cancel.check()?;
                    pack::<WIDE>(x, columns, p * WIDE, b);
                    let rows = panel.chunks_exact_mut(NARROW * WIDE);
                    for (a, c) in narrow.chunks_exact(depth * NARROW).zip(rows) {
                        dispatch(Product { a, b, c });
                    }
                    Ok(())
                },
            )
    }

    /// Adds another Gram matrix of as many columns.
    pub fn merge(&mut self, other: &Gram) {
        for (mine, theirs) in self.panels.iter_mut().zip(&other.panels) {
            for (mine, theirs) in mine.iter_mut().zip(theirs) {
                *mine += theirs;
            }
        }
    }

    /// H · G · Hᵀ for the rotation of [`input::rotate`]: the Gram matrix of
    /// rotated activations. Call it inside the pool.
    ///
    /// # Errors
    /// `Cancelled`.
    pub fn rotated(&self, cancel: &Cancel) -> Result<Gram> {
        let k = self.columns;
        let mut square: Vec<f32> = Vec::with_capacity(k * k);
        square.extend((0..k * k).map(|at| self.at(at / k, at % k)));
        // Once along the rows, and once along what were the columns.
        for _ in 0..2 {
            square.par_chunks_mut(k).try_for_each(|row| {
                cancel.check()?;
                input::rotate(row, k);
                Ok(())
            })?;
            let rows = std::mem::take(&mut square);
            square.extend((0..k * k).map(|at| rows[at % k * k + at / k]));
        }
        Ok(Gram::from_square(&square, k))
    }

    /// The upper triangle of a symmetric matrix, given row after row.
    pub fn from_square(square: &[f32], columns: usize) -> Gram {
        let mut gram = Gram::zeroed(columns);
        for (p, panel) in gram.panels.iter_mut().enumerate() {
            for (i, row) in panel.chunks_exact_mut(WIDE).take(columns).enumerate() {
                for (j, g) in (p * WIDE..columns).zip(row) {
                    *g = square[i * columns + j];
                }
            }
        }
        gram
    }

    /// diag(s) · G · diag(s): the Gram matrix of activations times s.
    pub fn scaled(&self, s: &[f32]) -> Gram {
        let mut scaled = self.clone();
        for (p, panel) in scaled.panels.iter_mut().enumerate() {
            for (i, row) in panel.chunks_exact_mut(WIDE).enumerate() {
                for (lane, g) in row.iter_mut().enumerate() {
                    let j = p * WIDE + lane;
                    if i < self.columns && j < self.columns {
                        *g *= s[i] * s[j];
                    }
                }
            }
        }
        scaled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_products_of_columns() {
        let value = |i: usize| ((i * 7919 % 2003) as f32 - 1001.0) / 617.0;
        for (rows, columns) in [(1, 1), (3, 31), (300, 33), (257, 72)] {
            let x: Vec<f32> = (0..rows * columns).map(value).collect();
            let mut gram = Gram::zeroed(columns);
            gram.add(&x, &Cancel::new()).unwrap();
            for i in 0..columns {
                for j in 0..columns {
                    let exact: f64 = (0..rows)
                        .map(|t| f64::from(x[t * columns + i]) * f64::from(x[t * columns + j]))
                        .sum();
                    let got = f64::from(gram.at(i, j));
                    let scale = rows as f64;
                    assert!((got - exact).abs() < 1e-6 * scale, "{i},{j}: {got} {exact}");
                }
            }
        }
    }
}
