//! Searches for the scales of sixteen short blocks at once, one block a lane.
//!
//! Sums run over the elements of a block in their order, as a plain loop adds
//! them, so lanes cost no bit of what ggml computes; its own comments call these
//! searches `make_qkx2_quants`, `make_qx_quants` and `make_q3_quants`.

use super::codebook::Search;
use super::{Isa, LANES};
use crate::method::mse::ROUND;

/// Magnitudes below which ggml takes a block for all zeros.
pub const LEAST: f32 = 1e-15;

/// Turns sixteen blocks of as many elements as there are rows, a multiple of sixteen:
/// a row gets one element of each.
#[inline(always)]
pub fn turn<I: Isa>(isa: I, x: &[f32], rows: &mut [[f32; LANES]]) {
    let (vectors, _) = x.as_chunks::<LANES>();
    let each = rows.len() / LANES;
    for (i, rows) in rows.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let mut square = [isa.splat(0.0); LANES];
        for (v, block) in square.iter_mut().zip(vectors.chunks_exact(each)) {
            *v = isa.load(&block[i]);
        }
        for (v, row) in isa.transpose(square).into_iter().zip(rows) {
            isa.store(v, row);
        }
    }
}

/// Sixteen blocks of N elements, turned so that a row holds one element of each.
pub struct Columns<const N: usize>(pub [[f32; LANES]; N]);

impl<const N: usize> Columns<N> {
    /// Up to sixteen consecutive blocks; lanes past them are zeros.
    #[inline(always)]
    pub fn of<I: Isa>(isa: I, x: &[f32]) -> Columns<N> {
        let mut columns = [[0f32; LANES]; N];
        if x.len() == LANES * N && N.is_multiple_of(LANES) {
            turn(isa, x, &mut columns);
            return Columns(columns);
        }
        for (lane, block) in x.as_chunks::<N>().0.iter().enumerate().take(LANES) {
            for (row, &v) in columns.iter_mut().zip(block) {
                row[lane] = v;
            }
        }
        Columns(columns)
    }

    /// f of every element.
    #[inline(always)]
    pub fn map<I: Isa>(&self, isa: I, f: impl Fn(I::F) -> I::F) -> Columns<N> {
        let mut out = [[0f32; LANES]; N];
        for (row, out) in self.0.iter().zip(&mut out) {
            isa.store(f(isa.load(row)), out);
        }
        Columns(out)
    }

    /// The same weight for all.
    #[inline(always)]
    pub fn ones() -> Columns<N> {
        Columns([[1.0; LANES]; N])
    }

    /// √(Σx² / N) of each lane.
    #[inline(always)]
    pub fn root_mean_square<I: Isa>(&self, isa: I) -> I::F {
        let mut sums = isa.splat(0.0);
        for row in &self.0 {
            let v = isa.load(row);
            sums = isa.add(sums, isa.mul(v, v));
        }
        let mut roots = [0f32; LANES];
        isa.store(isa.div(sums, isa.splat(N as f32)), &mut roots);
        for root in &mut roots {
            *root = root.sqrt();
        }
        isa.load(&roots)
    }
}

/// What a search found for each lane: value = code · scale + low.
pub struct Found<const N: usize> {
    pub scale: [f32; LANES],
    pub low: [f32; LANES],
    codes: [[u8; LANES]; N],
}

impl<const N: usize> Found<N> {
    /// The codes that the search gave one lane. A format takes them where its
    /// stored scale is zero, and else chooses anew.
    pub fn codes(&self, lane: usize) -> [u8; N] {
        self.codes.map(|row| row[lane])
    }
}

#[inline(always)]
fn lanes<I: Isa>(isa: I, v: I::F) -> [f32; LANES] {
    let mut out = [0f32; LANES];
    isa.store(v, &mut out);
    out
}

/// The nearest integer, ties to even, clamped. NaN gives the least.
#[inline(always)]
fn round_clamped<I: Isa>(isa: I, v: I::F, lo: I::F, hi: I::F) -> I::F {
    let round = isa.splat(ROUND);
    let v = isa.min(isa.max(v, lo), hi);
    isa.sub(isa.add(v, round), round)
}

/// Codes as bytes; negative ones wrap.
#[inline(always)]
fn byte_codes<I: Isa, const N: usize>(
    isa: I,
    x: &Columns<N>,
    code: impl Fn(I::F) -> I::F,
) -> [[u8; LANES]; N] {
    let mut codes = [[0u8; LANES]; N];
    for (x, out) in x.0.iter().zip(&mut codes) {
        // The low bits of ROUND + n are those of n.
        let code = isa.add(code(isa.load(x)), isa.splat(ROUND));
        isa.store_u8(isa.bits(code), out);
    }
    codes
}

/// Codes 0…top above a least value, and the inverse scales that are tried:
/// (from + step · i + top) / (max − min) for i = 0…tries.
pub struct Affine {
    pub top: f32,
    pub from: f32,
    pub step: f32,
    pub tries: u32,
    /// Compare sums of |error| rather than of squares.
    pub absolute: bool,
    /// The least value may not be above zero.
    pub low_at_most_zero: bool,
}

impl Affine {
    /// Σ w · error of those codes.
    #[inline(always)]
    fn error<I: Isa, const N: usize>(
        &self,
        isa: I,
        x: &Columns<N>,
        weights: &Columns<N>,
        (scale, low): (I::F, I::F),
        codes: &[I::F; N],
    ) -> I::F {
        let mut sum = isa.splat(0.0);
        for ((x, w), &code) in x.0.iter().zip(&weights.0).zip(codes) {
            let e = isa.sub(isa.add(isa.mul(scale, code), low), isa.load(x));
            let e = if self.absolute {
                isa.abs(e)
            } else {
                isa.mul(e, e)
            };
            sum = isa.add(sum, isa.mul(isa.load(w), e));
        }
        sum
    }

    /// For the codes of each inverse scale, the scale and least value of least
    /// weighted squared error; of those, the best pair.
    #[inline(always)]
    pub fn search<I: Isa, const N: usize>(
        &self,
        isa: I,
        x: &Columns<N>,
        weights: &Columns<N>,
    ) -> Found<N> {
        let zero = isa.splat(0.0);
        let top = isa.splat(self.top);
        let mut low = isa.load(&x.0[0]);
        let mut high = low;
        let (mut sum_w, mut sum_x) = (zero, zero);
        for (x, w) in x.0.iter().zip(&weights.0) {
            let (x, w) = (isa.load(x), isa.load(w));
            low = isa.min(x, low);
            high = isa.max(x, high);
            sum_w = isa.add(sum_w, w);
            sum_x = isa.add(sum_x, isa.mul(w, x));
        }
        if self.low_at_most_zero {
            low = isa.min(low, zero);
        }
        let range = isa.sub(high, low);
        let mut codes = [zero; N];
        let mut best = Fit {
            scale: isa.div(isa.splat(1.0), isa.div(top, range)),
            low,
            coded: (over(isa, self.top, range), low),
        };
        for (x, c) in x.0.iter().zip(&mut codes) {
            *c = above(isa, best.coded.0, low, isa.load(x), top);
        }
        let mut best_error = self.error(isa, x, weights, (best.scale, low), &codes);
        for i in 0..=self.tries {
            // The codes of a try lie above the least value of the best so far.
            let coded_low = best.low;
            let numerator = self.from + self.step * i as f32 + self.top;
            let inverse = over(isa, numerator, isa.sub(high, coded_low));
            let (mut sum_l, mut sum_l2, mut sum_xl) = (zero, zero, zero);
            for ((x, w), c) in x.0.iter().zip(&weights.0).zip(&mut codes) {
                let x = isa.load(x);
                *c = above(isa, inverse, coded_low, x, top);
                let wl = isa.mul(isa.load(w), *c);
                sum_l = isa.add(sum_l, wl);
                sum_l2 = isa.add(sum_l2, isa.mul(wl, *c));
                sum_xl = isa.add(sum_xl, isa.mul(wl, x));
            }
            let det = cross(isa, (sum_w, sum_l2), (sum_l, sum_l));
            let mut scale = isa.div(cross(isa, (sum_w, sum_xl), (sum_x, sum_l)), det);
            let mut low = isa.div(cross(isa, (sum_l2, sum_x), (sum_l, sum_xl)), det);
            if self.low_at_most_zero {
                scale = isa.choose(low, zero, isa.div(sum_xl, sum_l2), scale);
                low = isa.choose(low, zero, zero, low);
            }
            let e = self.error(isa, x, weights, (scale, low), &codes);
            let e = isa.choose(det, zero, e, isa.splat(f32::INFINITY));
            best = Fit {
                scale: isa.choose(best_error, e, scale, best.scale),
                low: isa.choose(best_error, e, low, best.low),
                coded: (
                    isa.choose(best_error, e, inverse, best.coded.0),
                    isa.choose(best_error, e, coded_low, best.coded.1),
                ),
            };
            best_error = isa.choose(best_error, e, e, best_error);
        }
        let (inverse, coded_low) = best.coded;
        Found {
            scale: lanes(isa, isa.choose(high, low, best.scale, zero)),
            low: lanes(isa, isa.choose(high, low, best.low, low)),
            codes: byte_codes(
                isa,
                x,
                #[inline(always)]
                |x| above(isa, inverse, coded_low, x, top),
            ),
        }
    }
}

/// The code of x above a least value.
#[inline(always)]
fn above<I: Isa>(isa: I, inverse: I::F, low: I::F, x: I::F, top: I::F) -> I::F {
    round_clamped(isa, isa.mul(inverse, isa.sub(x, low)), isa.splat(0.0), top)
}

/// The quotient; of a range of subnormals, which has no finite inverse, zero.
#[inline(always)]
fn over<I: Isa>(isa: I, numerator: f32, range: I::F) -> I::F {
    let inverse = isa.div(isa.splat(numerator), range);
    isa.choose(isa.splat(f32::INFINITY), inverse, inverse, isa.splat(0.0))
}

/// a · b − c · d.
#[inline(always)]
fn cross<I: Isa>(isa: I, (a, b): (I::F, I::F), (c, d): (I::F, I::F)) -> I::F {
    isa.sub(isa.mul(a, b), isa.mul(c, d))
}

/// Scale and least value, and the inverse and least value that gave the codes.
struct Fit<F> {
    scale: F,
    low: F,
    coded: (F, F),
}

/// The element of largest magnitude, the first of several, and its magnitude.
#[inline(always)]
fn largest<I: Isa, const N: usize>(isa: I, x: &Columns<N>) -> (I::F, I::F) {
    let mut most = isa.splat(0.0);
    let mut signed = most;
    for x in &x.0 {
        let x = isa.load(x);
        let magnitude = isa.abs(x);
        signed = isa.choose(magnitude, most, x, signed);
        most = isa.choose(magnitude, most, magnitude, most);
    }
    (signed, most)
}

/// The best of several codings of one block, by (Σwxv)² / Σwv², which is what
/// their best scales take off Σwx².
#[derive(Clone, Copy)]
struct Best<I: Isa> {
    isa: I,
    scale: I::F,
    inverse: I::F,
    score: I::F,
}

impl<I: Isa> Best<I> {
    #[inline(always)]
    fn sums<const N: usize>(
        isa: I,
        x: &Columns<N>,
        weights: &Columns<N>,
        value: impl Fn(I::F) -> I::F,
        weight_first: bool,
    ) -> (I::F, I::F) {
        let (mut xv, mut vv) = (isa.splat(0.0), isa.splat(0.0));
        for (x, w) in x.0.iter().zip(&weights.0) {
            let (x, w) = (isa.load(x), isa.load(w));
            let v = value(x);
            let wv = isa.mul(w, v);
            let product = if weight_first {
                isa.mul(isa.mul(w, x), v)
            } else {
                isa.mul(wv, x)
            };
            xv = isa.add(xv, product);
            vv = isa.add(vv, isa.mul(wv, v));
        }
        (xv, vv)
    }

    /// The first coding, taken whatever it is worth.
    #[inline(always)]
    fn first(isa: I, inverse: I::F, (xv, vv): (I::F, I::F)) -> Best<I> {
        let zero = isa.splat(0.0);
        let scale = isa.choose(vv, zero, isa.div(xv, vv), zero);
        Best {
            isa,
            scale,
            inverse,
            score: isa.mul(scale, xv),
        }
    }

    #[inline(always)]
    fn next(&mut self, inverse: I::F, (xv, vv): (I::F, I::F)) {
        let isa = self.isa;
        let zero = isa.splat(0.0);
        let scale = isa.div(xv, vv);
        let score = isa.mul(scale, xv);
        let (old, new) = (isa.mul(self.score, vv), isa.mul(xv, xv));
        // Nothing beats itself.
        let new = isa.choose(vv, zero, new, old);
        self.scale = isa.choose(new, old, scale, self.scale);
        self.inverse = isa.choose(new, old, inverse, self.inverse);
        self.score = isa.choose(new, old, score, self.score);
    }
}

/// v, but nothing in lanes that ggml takes for all zeros.
#[inline(always)]
fn keep<I: Isa>(isa: I, most: I::F, v: I::F) -> I::F {
    isa.choose(isa.splat(LEAST), most, isa.splat(0.0), v)
}

/// Codes −half…half − 1 about zero. Each numerator over the largest element is
/// an inverse scale that is tried.
#[inline(always)]
pub fn symmetric<I: Isa, const N: usize>(
    isa: I,
    x: &Columns<N>,
    weights: &Columns<N>,
    half: f32,
    numerators: impl IntoIterator<Item = f32>,
) -> Found<N> {
    let zero = isa.splat(0.0);
    let (lo, hi) = (isa.splat(-half), isa.splat(half - 1.0));
    let (signed, most) = largest(isa, x);
    let mut best: Option<Best<I>> = None;
    for numerator in numerators {
        let inverse = isa.div(isa.splat(numerator), signed);
        let sums = Best::sums(
            isa,
            x,
            weights,
            #[inline(always)]
            |x| round_clamped(isa, isa.mul(inverse, x), lo, hi),
            true,
        );
        match &mut best {
            None => best = Some(Best::first(isa, inverse, sums)),
            Some(best) => best.next(inverse, sums),
        }
    }
    let (scale, inverse) = best.map_or((zero, zero), |b| (b.scale, b.inverse));
    Found {
        scale: lanes(isa, keep(isa, most, scale)),
        low: [0.0; LANES],
        codes: byte_codes(
            isa,
            x,
            #[inline(always)]
            |x| {
                let code = round_clamped(isa, isa.mul(inverse, x), lo, hi);
                keep(isa, most, isa.add(code, isa.splat(half)))
            },
        ),
    }
}

/// Scales for the values of a table. The search begins at max / 127; each
/// numerator over the largest element is an inverse scale that is tried next.
#[inline(always)]
pub fn table<I: Isa, const N: usize>(
    isa: I,
    x: &Columns<N>,
    weights: &Columns<N>,
    search: Search<I>,
    numerators: impl IntoIterator<Item = f32>,
) -> [f32; LANES] {
    let (signed, most) = largest(isa, x);
    let first = isa.div(isa.splat(1.0), isa.div(signed, isa.splat(127.0)));
    let mut best: Option<Best<I>> = None;
    for numerator in std::iter::once(None).chain(numerators.into_iter().map(Some)) {
        let inverse = match numerator {
            None => first,
            Some(numerator) => isa.div(isa.splat(numerator), signed),
        };
        let sums = Best::sums(
            isa,
            x,
            weights,
            #[inline(always)]
            |x| search.value(isa.mul(inverse, x)),
            false,
        );
        match &mut best {
            None => best = Some(Best::first(isa, inverse, sums)),
            Some(best) => best.next(inverse, sums),
        }
    }
    let scale = best.map_or(isa.splat(0.0), |best| best.scale);
    lanes(isa, keep(isa, most, scale))
}

/// The nearest integer within bounds. Quotients have none: ggml takes the low bits of
/// what is too large.
#[inline(always)]
pub fn nearest<I: Isa>(isa: I, v: I::F, lo: I::F, hi: I::F) -> I::F {
    let bits = isa.bits(isa.add(v, isa.splat(ROUND)));
    let low = isa.and(bits, isa.splat_u(0x007f_ffff));
    let v = isa.int_to_float(isa.sub_u(low, isa.splat_u(0x0040_0000)));
    isa.min(isa.max(v, lo), hi)
}

/// Codes −half…half − 1 about zero, weighted by x²: from the largest element's
/// scale, each code in turn moves to where it lowers the error.
#[inline(always)]
pub fn descent<I: Isa, const N: usize>(isa: I, x: &Columns<N>, half: f32) -> Found<N> {
    let zero = isa.splat(0.0);
    let (lo, hi) = (isa.splat(-half), isa.splat(half - 1.0));
    let (signed, most) = largest(isa, x);
    // The quotients have no bound: ggml takes the low bits of what is too large.
    let inverse = isa.div(lo, signed);
    let mut codes = [zero; N];
    let (mut xl, mut ll) = (zero, zero);
    for (x, code) in x.0.iter().zip(&mut codes) {
        let x = isa.load(x);
        *code = nearest(isa, isa.mul(inverse, x), lo, hi);
        let w = isa.mul(x, x);
        xl = isa.add(xl, isa.mul(isa.mul(w, x), *code));
        ll = isa.add(ll, isa.mul(isa.mul(w, *code), *code));
    }
    for _ in 0..5 {
        for (x, code) in x.0.iter().zip(&mut codes) {
            let x = isa.load(x);
            let w = isa.mul(x, x);
            let wx = isa.mul(w, x);
            let other_xl = isa.sub(xl, isa.mul(wx, *code));
            let other_ll = isa.sub(ll, isa.mul(isa.mul(w, *code), *code));
            let moved = nearest(isa, isa.div(isa.mul(x, other_ll), other_xl), lo, hi);
            let new_xl = isa.add(other_xl, isa.mul(wx, moved));
            let new_ll = isa.add(other_ll, isa.mul(isa.mul(w, moved), moved));
            let new = isa.mul(isa.mul(new_xl, new_xl), ll);
            let old = isa.mul(isa.mul(xl, xl), new_ll);
            // All four at once: better, a positive sum, a code that moved, a
            // positive sum without it.
            let mut gain = isa.choose(new, old, isa.splat(1.0), zero);
            gain = isa.choose(new_ll, zero, gain, zero);
            gain = isa.choose(isa.abs(isa.sub(moved, *code)), zero, gain, zero);
            gain = isa.choose(other_xl, zero, gain, zero);
            *code = isa.choose(gain, zero, moved, *code);
            xl = isa.choose(gain, zero, new_xl, xl);
            ll = isa.choose(gain, zero, new_ll, ll);
        }
    }
    let mut bytes = [[0u8; LANES]; N];
    for (&code, out) in codes.iter().zip(&mut bytes) {
        let raw = keep(isa, most, isa.add(code, isa.splat(half)));
        isa.store_u8(isa.bits(isa.add(raw, isa.splat(ROUND))), out);
    }
    Found {
        scale: lanes(
            isa,
            keep(isa, most, isa.choose(ll, zero, isa.div(xl, ll), zero)),
        ),
        low: [0.0; LANES],
        codes: bytes,
    }
}
