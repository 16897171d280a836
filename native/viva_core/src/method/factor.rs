//! The triangular factor that GPTQ works with.
//!
//! With H = R · Rᵀ, R upper triangular, the output error of a row's error e is
//! ‖e·R‖², and its j-th term Σ_{i≤j} e_i R_ij knows only columns up to j. So
//! columns are rounded in order, each to w_j + Σ_{i<j} e_i R_ij / R_jj: the nearest
//! plane of Babai, equal to GPTQ's update (Chen et al., "The Geometry of LLM
//! Quantization", 2025) with neither an inverse nor its Cholesky factor.
//!
//! R is a Cholesky factor with both orders reversed: H' = Uᵀ · U of the reversed
//! H' gives R_ij = U of (k−1−j, k−1−i).

use rayon::prelude::*;

use super::gram::Gram;
use crate::error::{Error, Result};
use crate::ops::Cancel;
use crate::simd::dispatch;
use crate::simd::product::{NARROW, Product, Spread, WIDE};

/// Rows that are factored together.
const BLOCK: usize = 2 * WIDE;

/// Rows that are multiplied at once, from L1.
const STEP: usize = 128;

/// How often the damping grows tenfold before a matrix is given up.
const RETRIES: i32 = 6;

/// R for columns taken in `order`, in panels of [`NARROW`] columns as
/// [`Product`] reads them, and 1/R_jj.
pub struct Factor {
    pub order: Vec<u32>,
    /// Where in `order` each column is.
    pub place: Vec<u32>,
    pub panels: Vec<Vec<f32>>,
    pub inverse_diagonal: Vec<f32>,
    /// What was added to the diagonal, as a part of its mean.
    pub damping: f32,
}

impl Factor {
    /// Factors H + damping · mean(diagonal) · I. Where that is not positive
    /// definite in f32, the damping grows tenfold, up to six times. Call
    /// it inside the pool.
    ///
    /// # Errors
    /// `SingularHessian`, `Cancelled`.
    pub fn new(gram: &Gram, order: Vec<u32>, damping: f32, cancel: &Cancel) -> Result<Factor> {
        let k = gram.columns();
        let sum: f64 = gram.diagonal().map(f64::from).sum();
        let mean = (sum / k.max(1) as f64) as f32;
        for retry in 0..=RETRIES {
            let damping = damping * 10f32.powi(retry);
            // A column that no activation reached has any weight at no cost: with
            // a diagonal of its own it is rounded to nearest.
            let mut upper = Upper::reversed(gram, &order, |d| match d > 0.0 {
                true => d + damping * mean,
                false => mean.max(f32::MIN_POSITIVE),
            });
            if upper.factor(cancel)? {
                let mut place = vec![0; k];
                for (at, &column) in order.iter().enumerate() {
                    place[column as usize] = at as u32;
                }
                return Ok(Factor {
                    panels: upper.panels_of_r(),
                    inverse_diagonal: (0..k)
                        .map(|j| 1.0 / upper.at(k - 1 - j, k - 1 - j))
                        .collect(),
                    order,
                    place,
                    damping,
                });
            }
        }
        Err(Error::SingularHessian {
            damping: damping * 10f32.powi(RETRIES),
        })
    }

    pub fn columns(&self) -> usize {
        self.order.len()
    }

    /// The factor where columns of the input are divided by s, and its damping too:
    /// diag(1/s) · R.
    pub fn scaled(&self, s: &[f32]) -> Factor {
        let s: Vec<f32> = self.order.iter().map(|&c| s[c as usize]).collect();
        let panels = self.panels.par_iter().map(|panel| {
            let mut panel = panel.clone();
            for (row, s) in panel.chunks_exact_mut(NARROW).zip(&s) {
                row.iter_mut().for_each(|r| *r /= s);
            }
            panel
        });
        let inverse = self.inverse_diagonal.iter().zip(&s);
        Factor {
            panels: panels.collect(),
            inverse_diagonal: inverse.map(|(inverse, s)| inverse * s).collect(),
            order: self.order.clone(),
            place: self.place.clone(),
            damping: self.damping,
        }
    }

    /// Row t of the panel that holds column j, and the column's place in it.
    pub fn at(&self, t: usize, j: usize) -> f32 {
        self.panels[j / NARROW][t * NARROW + j % NARROW]
    }
}

/// An upper triangle in panels of [`WIDE`] columns, each down to its last row.
struct Upper {
    columns: usize,
    panels: Vec<Vec<f32>>,
}

impl Upper {
    /// H in reversed order, its diagonal passed through `diagonal`.
    fn reversed(gram: &Gram, order: &[u32], diagonal: impl Fn(f32) -> f32 + Sync) -> Upper {
        let k = gram.columns();
        let source = |a: usize| order[k - 1 - a] as usize;
        let panels = (0..k.div_ceil(WIDE))
            .into_par_iter()
            .map_init(
                || vec![0f32; k],
                |column, p| {
                    let rows = (p + 1) * WIDE;
                    let mut panel = vec![0f32; rows * WIDE];
                    for (lane, j) in (p * WIDE..rows).enumerate() {
                        // Past the last column: an identity, which changes nothing.
                        let pivot = &mut panel[j * WIDE + lane];
                        if j >= k {
                            *pivot = 1.0;
                            continue;
                        }
                        *pivot = diagonal(gram.at(source(j), source(j)));
                        gram.read_column(source(j), column);
                        for (t, row) in panel.chunks_exact_mut(WIDE).take(j).enumerate() {
                            row[lane] = column[source(t)];
                        }
                    }
                    panel
                },
            )
            .collect();
        Upper { columns: k, panels }
    }

    fn at(&self, i: usize, j: usize) -> f32 {
        self.panels[j / WIDE][i * WIDE + j % WIDE]
    }

    /// U of Uᵀ · U in place, a block of rows after the other; false where the
    /// matrix is not positive definite.
    fn factor(&mut self, cancel: &Cancel) -> Result<bool> {
        let padded = self.panels.len() * WIDE;
        for first in (0..padded).step_by(BLOCK) {
            let last = (first + BLOCK).min(padded);
            let left = self.negated(first, last);
            let (own, right) = self.panels[first / WIDE..].split_at_mut((last - first) / WIDE);
            own.par_iter_mut()
                .for_each(|panel| subtract(&left, first, panel));
            let Some(block) = factor_block(first, own) else {
                return Ok(false);
            };
            let block = Square::new(&block, last - first);
            right.par_iter_mut().try_for_each(|panel| {
                cancel.check()?;
                subtract(&left, first, panel);
                let rows = &mut panel[first * WIDE..last * WIDE];
                block.solve(rows);
                Ok(())
            })?;
        }
        Ok(true)
    }

    /// −U for columns `first .. last` and the rows above them.
    fn negated(&self, first: usize, last: usize) -> Vec<Vec<f32>> {
        (first / NARROW..last / NARROW)
            .into_par_iter()
            .map(|p| {
                let (panel, lane) = (&self.panels[p * NARROW / WIDE], p * NARROW % WIDE);
                let mut out = vec![0f32; first * NARROW];
                let rows = panel.chunks_exact(WIDE);
                for (out, row) in out.chunks_exact_mut(NARROW).zip(rows) {
                    for (out, u) in out.iter_mut().zip(&row[lane..]) {
                        *out = -u;
                    }
                }
                out
            })
            .collect()
    }

    /// R in panels of [`NARROW`] columns, each down to its last row.
    fn panels_of_r(&self) -> Vec<Vec<f32>> {
        let k = self.columns;
        (0..k.div_ceil(NARROW))
            .into_par_iter()
            .map(|p| {
                let rows = ((p + 1) * NARROW).min(k);
                let mut panel = vec![0f32; rows * NARROW];
                for j in p * NARROW..rows {
                    // A row of U from its end, through the panels that hold it.
                    let row = (k - 1 - j) * WIDE;
                    let mut t = 0;
                    for panel_of_u in self.panels[(k - 1 - j) / WIDE..].iter().rev() {
                        let end = (k - t - 1) % WIDE + 1;
                        for u in panel_of_u[row..row + end].iter().rev().take(j + 1 - t) {
                            panel[t * NARROW + j % NARROW] = *u;
                            t += 1;
                        }
                    }
                }
                panel
            })
            .collect()
    }
}

/// Takes what the rows above contribute off rows `first ..` of a panel.
fn subtract(left: &[Vec<f32>], first: usize, panel: &mut [f32]) {
    let (above, rows) = panel.split_at_mut(first * WIDE);
    for (from, b) in (0..first).step_by(STEP).zip(above.chunks(STEP * WIDE)) {
        let to = first.min(from + STEP);
        for (a, c) in left.iter().zip(rows.chunks_exact_mut(NARROW * WIDE)) {
            let a = &a[from * NARROW..to * NARROW];
            dispatch(Product { a, b, c });
        }
    }
}

/// Factors the square on the diagonal, rows `first ..` of its panels. Returns it
/// row after row, or `None` at a pivot that is not positive.
fn factor_block(first: usize, panels: &mut [Vec<f32>]) -> Option<Vec<f32>> {
    let n = panels.len() * WIDE;
    let place = |i: usize, j: usize| (j / WIDE, (first + i) * WIDE + j % WIDE);
    let mut u = vec![0f64; n * n];
    for i in 0..n {
        for j in i..n {
            let (panel, at) = place(i, j);
            u[i * n + j] = f64::from(panels[panel][at]);
        }
    }
    for i in 0..n {
        let (above, row) = u.split_at_mut(i * n);
        for above in above.chunks_exact(n) {
            for j in i..n {
                row[j] -= above[i] * above[j];
            }
        }
        let pivot = row[i].sqrt();
        if !(pivot.is_normal() && row[i] > 0.0) {
            return None;
        }
        for v in &mut row[i..n] {
            *v /= pivot;
        }
    }
    let block: Vec<f32> = u.iter().map(|&v| v as f32).collect();
    for i in 0..n {
        for j in 0..n {
            let (panel, at) = place(i, j);
            // Rows of an earlier panel end above its later blocks.
            if let Some(out) = panels[panel].get_mut(at) {
                *out = block[i * n + j];
            }
        }
    }
    Some(block)
}

/// A factored square on the diagonal: −U in panels of [`NARROW`] columns, and its
/// pivots.
struct Square {
    panels: Vec<Vec<f32>>,
    pivots: Vec<f32>,
}

impl Square {
    fn new(block: &[f32], n: usize) -> Square {
        let negated = |at| {
            let rows = block.chunks_exact(n);
            rows.flat_map(|row: &[f32]| row[at..at + NARROW].iter().map(|u| -u))
                .collect()
        };
        Square {
            panels: (0..n).step_by(NARROW).map(negated).collect(),
            pivots: (0..n).map(|i| block[i * n + i]).collect(),
        }
    }

    /// Rows of U right of the square: U_square⁻ᵀ · rows.
    fn solve(&self, rows: &mut [f32]) {
        for (p, a) in self.panels.iter().enumerate() {
            let (above, rest) = rows.split_at_mut(p * NARROW * WIDE);
            let c = &mut rest[..NARROW * WIDE];
            dispatch(Product {
                a: &a[..p * NARROW * NARROW],
                b: above,
                c,
            });
            for i in 0..NARROW {
                let (x, y) = c[i * WIDE..].split_at_mut(WIDE);
                let at = p * NARROW + i;
                for v in &mut *x {
                    *v /= self.pivots[at];
                }
                let a = &a[at * NARROW..][i + 1..NARROW];
                dispatch(Spread { a, x, y });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(i: usize) -> f32 {
        let mut z = (i as u64)
            .wrapping_add(1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }

    #[test]
    fn r_times_its_transpose_is_the_damped_matrix() {
        for k in [1, 7, 32, 65, 130] {
            let x: Vec<f32> = (0..2 * k * k).map(value).collect();
            let mut gram = Gram::zeroed(k);
            gram.add(&x, &Cancel::new()).unwrap();
            let order: Vec<u32> = (0..k as u32).rev().collect();
            let factor = Factor::new(&gram, order.clone(), 0.01, &Cancel::new()).unwrap();
            let mean: f32 = gram.diagonal().sum::<f32>() / k as f32;
            for i in 0..k {
                for j in i..k {
                    let product: f32 = (j..k).map(|t| factor.at(i, t) * factor.at(j, t)).sum();
                    let mut h = gram.at(order[i] as usize, order[j] as usize);
                    if i == j {
                        h += 0.01 * mean;
                    }
                    assert!(
                        (product - h).abs() < 1e-4 * mean,
                        "{k}: {i},{j}: {product} {h}"
                    );
                }
            }
        }
    }

    #[test]
    fn damping_grows_until_it_suffices() {
        // Two equal columns, and one of zeros, without damping.
        let x: Vec<f32> = (0..30).flat_map(|t| [value(t), value(t), 0.0]).collect();
        let mut gram = Gram::zeroed(3);
        gram.add(&x, &Cancel::new()).unwrap();
        let factor = Factor::new(&gram, vec![0, 1, 2], 1e-9, &Cancel::new()).unwrap();
        assert!(factor.damping > 1e-9);
        assert_eq!(factor.at(0, 2), 0.0);
    }
}
