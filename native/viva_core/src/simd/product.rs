//! Products aᵀ · b of panels: what Gram matrices, their factors and the methods
//! that use them are made of.
//!
//! A panel holds some columns of a matrix, row after row, so that a product reads
//! memory in order. Every element of a result is one chain of fused multiply-adds
//! in the order of the rows: the same bits on every level and for every cut.

// Indices say which register: loops over them are unrolled.
#![allow(clippy::needless_range_loop)]

use super::bf16::{Pairs, PairsOp};
use super::{Isa, LANES, Op};

/// Columns of the left operand's panels.
pub const NARROW: usize = 8;
/// Columns of the right operand's panels, and of results.
pub const WIDE: usize = 32;

/// c += aᵀ · b for `a` of `[depth, NARROW]`, `b` of `[depth, WIDE]` and `c` of
/// `[NARROW, WIDE]`. As an [`Op`] of numbers, as a [`PairsOp`] of words that hold
/// pairs of bf16.
pub struct Product<'a> {
    pub a: &'a [f32],
    pub b: &'a [f32],
    pub c: &'a mut [f32],
}

impl Op for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        self.tiles::<I, Numbers>(isa);
    }
}

impl PairsOp for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Pairs>(self, isa: I) {
        self.tiles::<I, Words>(isa);
    }
}

/// How an element of each operand becomes part of a sum.
trait Term<I: Isa> {
    fn add(isa: I, a: I::F, b: I::F, sum: I::F) -> I::F;
}

struct Numbers;

impl<I: Isa> Term<I> for Numbers {
    #[inline(always)]
    fn add(isa: I, a: I::F, b: I::F, sum: I::F) -> I::F {
        isa.fused(a, b, sum)
    }
}

struct Words;

impl<I: Pairs> Term<I> for Words {
    #[inline(always)]
    fn add(isa: I, a: I::F, b: I::F, sum: I::F) -> I::F {
        isa.dot_pairs(a, b, sum)
    }
}

impl Product<'_> {
    #[inline(always)]
    fn tiles<I: Isa, T: Term<I>>(self, isa: I) {
        let (a, _) = self.a.as_chunks::<NARROW>();
        let (b, _) = self.b.as_chunks::<WIDE>();
        let (c, _) = self.c.as_chunks_mut::<WIDE>();
        if I::ACCUMULATORS >= 2 * NARROW {
            tile::<I, T, NARROW, 2>(isa, a, b, c, 0, 0);
        } else {
            for row in [0, NARROW / 2] {
                for vector in [0, 1] {
                    tile::<I, T, { NARROW / 2 }, 1>(isa, a, b, c, row, vector);
                }
            }
        }
    }
}

/// `R` rows and `V` vectors of the result, in registers over the whole depth.
#[inline(always)]
fn tile<I: Isa, T: Term<I>, const R: usize, const V: usize>(
    isa: I,
    a: &[[f32; NARROW]],
    b: &[[f32; WIDE]],
    c: &mut [[f32; WIDE]],
    row: usize,
    vector: usize,
) {
    let c = &mut c[row..row + R];
    let mut sums = [[isa.splat(0.0); V]; R];
    for r in 0..R {
        for v in 0..V {
            sums[r][v] = isa.load(&c[r].as_chunks().0[vector + v]);
        }
    }
    for (a, b) in a.iter().zip(b) {
        let (b, _) = b.as_chunks::<LANES>();
        let b: [I::F; V] = std::array::from_fn(|v| isa.load(&b[vector + v]));
        for (sums, &a) in sums.iter_mut().zip(&a[row..]) {
            let a = isa.splat(a);
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = T::add(isa, a, b, *sum);
            }
        }
    }
    for r in 0..R {
        for v in 0..V {
            isa.store(sums[r][v], &mut c[r].as_chunks_mut().0[vector + v]);
        }
    }
}

/// y += a · x for lines of y, each with an `a` of its own.
pub struct Spread<'a> {
    pub a: &'a [f32],
    /// One line of [`WIDE`].
    pub x: &'a [f32],
    pub y: &'a mut [f32],
}

impl Op for Spread<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (x, _) = self.x.as_chunks::<LANES>();
        let (y, _) = self.y.as_chunks_mut::<WIDE>();
        for (&a, y) in self.a.iter().zip(y) {
            let a = isa.splat(a);
            let (y, _) = y.as_chunks_mut::<LANES>();
            for (x, y) in x.iter().zip(y) {
                isa.store(isa.fused(a, isa.load(x), isa.load(y)), y);
            }
        }
    }
}

/// Columns `at .. at + W` of a row-major matrix as a panel; zeros past its last.
pub fn pack<const W: usize>(x: &[f32], columns: usize, at: usize, panel: &mut [f32]) {
    let width = W.min(columns - at);
    let (panel, _) = panel.as_chunks_mut::<W>();
    for (row, out) in x.chunks_exact(columns).zip(panel) {
        out[..width].copy_from_slice(&row[at..at + width]);
        out[width..].fill(0.0);
    }
}

/// Rows as columns of a panel: element t of row j becomes element `at + j` of
/// line t.
pub struct Transpose<'a> {
    /// [`LANES`] rows, `stride` apart; a stride is a multiple of [`LANES`], and
    /// no less than the panel's lines.
    pub rows: &'a [f32],
    pub stride: usize,
    pub at: usize,
    /// Lines of [`WIDE`].
    pub panel: &'a mut [f32],
}

impl Op for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (rows, _) = self.rows.as_chunks::<LANES>();
        let (lines, _) = self.panel.as_chunks_mut::<WIDE>();
        let step = self.stride / LANES;
        for (t, lines) in lines.chunks_mut(LANES).enumerate() {
            let square = std::array::from_fn(|j| isa.load(&rows[j * step + t]));
            for (v, line) in isa.transpose(square).into_iter().zip(lines) {
                let (line, _) = line[self.at..].as_chunks_mut::<LANES>();
                isa.store(v, &mut line[0]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::bf16 as pairs;
    use crate::simd::{dispatch_at, levels};
    use half::bf16;

    #[test]
    fn every_element_is_one_chain_of_fused_multiply_adds() {
        for depth in [0, 1, 2, 7, 64] {
            let value = |i: usize| ((i * 7919 % 2003) as f32 - 1001.0) / 617.0;
            let a: Vec<f32> = (0..depth * NARROW).map(value).collect();
            let b: Vec<f32> = (0..depth * WIDE).map(|i| value(i + 5)).collect();
            let start: Vec<f32> = (0..NARROW * WIDE).map(|i| value(i + 11)).collect();
            let mut expected = start.clone();
            for (i, c) in expected.iter_mut().enumerate() {
                for t in 0..depth {
                    *c = a[t * NARROW + i / WIDE].mul_add(b[t * WIDE + i % WIDE], *c);
                }
            }
            for level in levels() {
                let mut c = start.clone();
                let (a, b) = (&a[..], &b[..]);
                dispatch_at(level, Product { a, b, c: &mut c });
                assert_eq!(c, expected, "{level:?}");
            }
        }
    }

    /// Small whole numbers, whose sums are exact in every order.
    #[test]
    fn pairs_are_two_terms_of_a_sum() {
        let words = |n: usize, first: usize| {
            let mut words = vec![0f32; n];
            let halves: &mut [bf16] = bytemuck::cast_slice_mut(&mut words);
            for (i, half) in halves.iter_mut().enumerate() {
                *half = bf16::from_f32(((i + first) * 7919 % 33) as f32 - 16.0);
            }
            words
        };
        let halves = |word: f32| bytemuck::cast::<f32, [bf16; 2]>(word).map(bf16::to_f32);
        for depth in [0, 1, 3, 64] {
            let (a, b) = (words(depth * NARROW, 0), words(depth * WIDE, 5));
            let mut expected = [1f32; NARROW * WIDE];
            for (i, c) in expected.iter_mut().enumerate() {
                for t in 0..depth {
                    let a = halves(a[t * NARROW + i / WIDE]);
                    let b = halves(b[t * WIDE + i % WIDE]);
                    *c += a[0] * b[0] + a[1] * b[1];
                }
            }
            for level in levels() {
                let mut c = [1f32; NARROW * WIDE];
                let (a, b) = (&a[..], &b[..]);
                pairs::dispatch_at(level, Product { a, b, c: &mut c });
                assert_eq!(c, expected, "{level:?}");
            }
        }
    }

    #[test]
    fn spreading_is_fused_and_stops_at_the_last_line() {
        let x: Vec<f32> = (0..WIDE).map(|i| i as f32 / 7.0).collect();
        let y: Vec<f32> = (0..3 * WIDE).map(|i| 1.0 / (i + 1) as f32).collect();
        let a = [0.3f32, -0.7, 1.1];
        for lines in 0..=3 {
            let y = &y[..lines * WIDE];
            let fused = |i: usize| a[i / WIDE].mul_add(x[i % WIDE], y[i]);
            let expected: Vec<f32> = (0..y.len()).map(fused).collect();
            for level in levels() {
                let mut out = y.to_vec();
                let (a, x, y) = (&a[..], &x[..], &mut out[..]);
                dispatch_at(level, Spread { a, x, y });
                assert_eq!(out, expected, "{level:?}");
            }
        }
    }

    #[test]
    fn rows_become_columns() {
        let stride = 3 * LANES;
        let rows: Vec<f32> = (0..LANES * stride).map(|i| i as f32).collect();
        for (depth, at) in [(1, 0), (15, 16), (16, 0), (17, 16), (48, 0)] {
            let mut expected = vec![-1.0; depth * WIDE];
            for t in 0..depth {
                for j in 0..LANES {
                    expected[t * WIDE + at + j] = rows[j * stride + t];
                }
            }
            for level in levels() {
                let mut panel = vec![-1.0; depth * WIDE];
                let transpose = Transpose {
                    rows: &rows,
                    stride,
                    at,
                    panel: &mut panel,
                };
                dispatch_at(level, transpose);
                assert_eq!(panel, expected, "{level:?}");
            }
        }
    }

    #[test]
    fn packing_pads_with_zeros() {
        let x: Vec<f32> = (0..20).map(|i| i as f32).collect();
        let mut panel = vec![9.0; 2 * NARROW];
        pack::<NARROW>(&x, 10, 8, &mut panel);
        assert_eq!(panel[..3], [8.0, 9.0, 0.0]);
        assert_eq!(panel[NARROW..NARROW + 3], [18.0, 19.0, 0.0]);
    }
}
