//! Dot products of f32 rows. Sums of f32 in more than one order: results may
//! differ between levels within the tolerance that the tests state.

use super::{Isa, LANES, Op};

/// Rows of the second operand that one pass over the first serves.
pub const ROWS: usize = 4;

/// out[j · m + i] = x row i · w row j, for the m rows of x and all rows of w.
pub struct DotRows<'a> {
    pub k: usize,
    pub x: &'a [f32],
    pub w: &'a [f32],
    pub out: &'a mut [f32],
}

impl Op for DotRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let k = self.k;
        let m = self.x.len() / k;
        let groups = self.w.chunks(k * ROWS).zip(self.out.chunks_mut(m * ROWS));
        for (group, out) in groups {
            for (i, x) in self.x.chunks_exact(k).enumerate() {
                if group.len() == k * ROWS {
                    let w: [&[f32]; ROWS] = std::array::from_fn(|j| &group[j * k..(j + 1) * k]);
                    for (j, dot) in dot_rows(isa, x, w).into_iter().enumerate() {
                        out[j * m + i] = dot;
                    }
                } else {
                    for (j, w) in group.chunks_exact(k).enumerate() {
                        out[j * m + i] = dot_rows(isa, x, [w])[0];
                    }
                }
            }
        }
    }
}

/// out\[i\] = x row i · w, of 8-bit integers: exact, for rows of up to 2¹⁷.
pub struct DotInts<'a> {
    pub x: &'a [i8],
    pub w: &'a [i8],
    pub out: &'a mut [i32],
}

impl Op for DotInts<'_> {
    type Output = ();

    // Products of sign-extended bytes: the compiler's own vectors do.
    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        for (x, out) in self.x.chunks_exact(self.w.len()).zip(self.out) {
            let products = x.iter().zip(self.w);
            *out = products.fold(0, |sum: i32, (&x, &w)| {
                sum.wrapping_add(i32::from(i16::from(x) * i16::from(w)))
            });
        }
    }
}

/// One row of x against R rows of w, element i in lane i mod 16.
#[inline(always)]
fn dot_rows<I: Isa, const R: usize>(isa: I, x: &[f32], w: [&[f32]; R]) -> [f32; R] {
    let mut sums = [isa.splat(0.0); R];
    let (chunks, x_tail) = x.as_chunks::<LANES>();
    let rows = w.map(|w| w.as_chunks::<LANES>().0);
    for (c, x) in chunks.iter().enumerate() {
        let x = isa.load(x);
        for (sum, w) in sums.iter_mut().zip(rows) {
            *sum = isa.mul_add(x, isa.load(&w[c]), *sum);
        }
    }
    if !x_tail.is_empty() {
        let done = chunks.len() * LANES;
        let x = isa.load_part(x_tail, 0.0);
        for (sum, w) in sums.iter_mut().zip(w) {
            *sum = isa.mul_add(x, isa.load_part(&w[done..], 0.0), *sum);
        }
    }
    sums.map(|sum| isa.sum(sum))
}
