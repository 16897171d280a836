//! AWQ: columns that meet large activations are scaled up before they are
//! rounded, and outliers of a block are clipped where that helps its output (Lin
//! et al., "AWQ", 2023).

use rayon::prelude::*;

use super::candidates::{DuoScaling, candidates};
use super::factor::Factor;
use super::gptq::{self, Gptq};
use super::gram::Gram;
use super::input;
use crate::error::Result;
use crate::format::{Extremes, Granularity, Spec};
use crate::ops::quantize::round_trip;
use crate::ops::{Cancel, pool};
use crate::simd::product::{NARROW, Product, WIDE};
use crate::simd::{Isa, LANES, Op, dispatch};
use crate::tensor::Tensor;

/// Ratios of clipping that are tried, in steps of 1/20 down from 1.
const CLIPS: usize = 10;

/// Blocks that are searched for clipping: the cost grows with their length.
const LONGEST_CLIPPED: usize = 512;

/// Rows whose error is computed together.
const STRIPE: usize = 4 * NARROW;

/// Sums of tokens that estimate what all of them would say.
const SKETCHED: usize = 2 * WIDE;

/// Elements of the inner dimension that are multiplied at once, from L2.
const DEPTH: usize = 512;

/// Activations `[tokens, k]`, transposed into panels of tokens.
pub struct Tokens {
    k: usize,
    panels: Vec<Vec<f32>>,
}

impl Tokens {
    pub fn new(x: &[f32], k: usize) -> Tokens {
        let panels = x
            .par_chunks(WIDE * k)
            .map(|x| {
                let mut panel = vec![0f32; k * WIDE];
                for (lane, row) in x.chunks_exact(k).enumerate() {
                    for (line, &v) in panel.chunks_exact_mut(WIDE).zip(row) {
                        line[lane] = v;
                    }
                }
                panel
            })
            .collect();
        Tokens { k, panels }
    }

    /// Σ(d·xᵀ)² over rows d of a stripe and all tokens; `d` is in panels of
    /// [`NARROW`] rows.
    fn output_error(&self, d: &[f32]) -> f64 {
        let k = self.k;
        let mut sum = 0.0;
        let mut sums = [0f32; STRIPE * WIDE];
        for tokens in &self.panels {
            sums.fill(0.0);
            for at in (0..k).step_by(DEPTH) {
                let end = (at + DEPTH).min(k);
                let b = &tokens[at * WIDE..end * WIDE];
                for (d, c) in d
                    .chunks_exact(k * NARROW)
                    .zip(sums.chunks_exact_mut(NARROW * WIDE))
                {
                    let a = &d[at * NARROW..end * NARROW];
                    dispatch(Product { a, b, c });
                }
            }
            sum += sums
                .iter()
                .map(|&y| f64::from(y) * f64::from(y))
                .sum::<f64>();
        }
        sum
    }
}

/// Sums of tokens under random signs, and then each column as large as in `x`:
/// the output error on them is an estimate of that on all, its expectation the
/// same (Charikar et al., "Finding Frequent Items in Data Streams", 2002).
fn sketch(x: &[f32], k: usize) -> Vec<f32> {
    let mut sums = vec![0f32; SKETCHED * k];
    let (mut before, mut after) = (vec![0f64; k], vec![0f64; k]);
    for (t, row) in x.chunks_exact(k).enumerate() {
        let hash = (t as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let hash = (hash ^ (hash >> 32)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let sign = if hash >> 63 == 0 { 1.0 } else { -1.0 };
        let sum = &mut sums[t % SKETCHED * k..][..k];
        for ((sum, before), x) in sum.iter_mut().zip(&mut before).zip(row) {
            *sum += sign * x;
            *before += f64::from(x * x);
        }
    }
    for row in sums.chunks_exact(k) {
        for (after, x) in after.iter_mut().zip(row) {
            *after += f64::from(x * x);
        }
    }
    let ratios = before.iter().zip(&after);
    let norms: Vec<f32> = ratios
        .map(|(before, after)| match after.is_normal() {
            true => (before / after).sqrt() as f32,
            false => 1.0,
        })
        .collect();
    input::scale(&mut sums, &norms);
    sums
}

/// A weight, and what it is quantized with.
pub type Weight<'a> = (&'a Tensor, &'a Spec);

/// The scale of each column under which rounding to nearest costs least of the
/// output of all `weights` together, which read the same input, and `None` where none is better
/// than leaving them. `x` are activations, `mean` the mean magnitude of each of
/// their columns.
///
/// Where tokens are many, a sketch of them says which scales come close to the
/// best; only those are judged by all tokens.
///
/// # Errors
/// Those of quantizing; `Cancelled`.
pub fn search(
    weights: &[Weight],
    x: &[f32],
    mean: &[f32],
    duo: DuoScaling,
    cancel: &Cancel,
) -> Result<Option<Vec<f32>>> {
    pool::run(|| {
        let k = mean.len();
        let plain = |spec: &Spec| Spec {
            // Scales of scales hardly change which weights suffer.
            double_quant: false,
            ..spec.clone()
        };
        let specs: Vec<Spec> = weights.iter().map(|(_, spec)| plain(spec)).collect();
        let points = candidates(weights, mean, duo, 1);
        let total = |tokens: &Tokens, point: usize| {
            let pairs = weights.iter().zip(&specs);
            let losses = pairs.map(|((w, _), spec)| loss(w, spec, tokens, &points[point], cancel));
            losses.sum::<Result<f64>>()
        };
        let mut close: Vec<usize> = (0..points.len()).collect();
        if x.len() / k >= 4 * SKETCHED {
            let tokens = Tokens::new(&sketch(x, k), k);
            let estimates: Vec<f64> = close
                .iter()
                .map(|&point| total(&tokens, point))
                .collect::<Result<_>>()?;
            let least = estimates.iter().copied().fold(f64::INFINITY, f64::min);
            // Four times the error of an estimate from rows that are independent.
            let rows: usize = weights.iter().map(|(w, _)| w.len() / k).sum();
            let error = (2.0 / (SKETCHED * rows.max(1)) as f64).sqrt();
            close.retain(|&point| estimates[point] <= least * (1.0 + 4.0 * error));
        }
        let tokens = Tokens::new(x, k);
        let mut best = (f64::INFINITY, 0);
        for point in close {
            let loss = total(&tokens, point)?;
            if loss < best.0 {
                best = (loss, point);
            }
        }
        Ok((best.1 > 0).then(|| points[best.1].clone()))
    })
}

/// The same where GPTQ rounds, by what that costs. Every other exponent is tried:
/// each takes longer, and neighbours hardly differ.
///
/// # Errors
/// Those of [`gptq::quantize()`].
pub fn search_with_gptq(
    weights: &[Weight],
    gram: &Gram,
    mean: &[f32],
    duo: DuoScaling,
    options: &Gptq,
    cancel: &Cancel,
) -> Result<Option<Vec<f32>>> {
    pool::run(|| {
        let order = gptq::order_of(gram, options.order);
        let factor = Factor::new(gram, order, options.damping, cancel)?;
        let mut best = (f64::INFINITY, None);
        let points = candidates(weights, mean, duo, 2);
        for (point, s) in points.into_iter().enumerate() {
            let costs = weights.iter();
            let costs = costs.map(|(w, spec)| gptq::cost(w, spec, &factor, &s, options, cancel));
            let cost = costs.sum::<Result<f64>>()?;
            if cost < best.0 {
                best = (cost, (point > 0).then_some(s));
            }
        }
        Ok(best.1)
    })
}

/// The error of the layer's output when columns are scaled by s.
fn loss(w: &Tensor, spec: &Spec, tokens: &Tokens, s: &[f32], cancel: &Cancel) -> Result<f64> {
    let k = w.row_len();
    let extremes = match spec.format()?.needs_extremes(spec) {
        true => Some(scaled_extremes(w, s)),
        false => None,
    };
    let stripes = (w.len() / k).div_ceil(STRIPE);
    let losses = (0..stripes)
        .into_par_iter()
        .map_init(Scratch::default, |scratch, stripe| {
            cancel.check()?;
            let first = stripe * STRIPE * k;
            let end = w.len().min(first + STRIPE * k);
            let rows = w.f32_chunk(first..end, &mut scratch.wide);
            scratch.d.resize(STRIPE * k, 0.0);
            scratch.d[rows.len().next_multiple_of(NARROW * k).min(STRIPE * k)..].fill(0.0);
            // Few rows at once: they stay in the L2 cache.
            let panels = scratch.d.chunks_exact_mut(NARROW * k);
            for (rows, panel) in rows.chunks(NARROW * k).zip(panels) {
                scratch.scaled.clear();
                scratch.scaled.extend_from_slice(rows);
                input::scale(&mut scratch.scaled, s);
                round_trip(spec, extremes, k, &scratch.scaled, &mut scratch.rounded)?;
                dispatch(Errors {
                    w: rows,
                    rounded: &scratch.rounded,
                    s,
                    panel,
                });
            }
            Ok(tokens.output_error(&scratch.d))
        })
        .collect::<Result<Vec<f64>>>()?;
    // In the order of the stripes: not that in which threads end.
    Ok(losses.iter().sum())
}

/// w − rounded / s of up to [`NARROW`] rows as a panel, zeros for rows past them.
struct Errors<'a> {
    w: &'a [f32],
    rounded: &'a [f32],
    s: &'a [f32],
    panel: &'a mut [f32],
}

impl Op for Errors<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let k = self.s.len();
        let (lines, _) = self.panel.as_chunks_mut::<NARROW>();
        for (at, lines) in (0..k).step_by(LANES).zip(lines.chunks_mut(LANES)) {
            let end = at + lines.len();
            let vector = |x: &[f32]| match x[at..end].first_chunk() {
                Some(x) => isa.load(x),
                None => isa.load_part(&x[at..end], 1.0),
            };
            let s = vector(self.s);
            let mut errors = [isa.splat(0.0); LANES];
            let rows = self.w.chunks_exact(k).zip(self.rounded.chunks_exact(k));
            for ((w, rounded), e) in rows.zip(&mut errors[..NARROW]) {
                *e = isa.sub(vector(w), isa.div(vector(rounded), s));
            }
            for (e, line) in isa.transpose(errors).into_iter().zip(lines) {
                isa.store_part(e, line);
            }
        }
    }
}

#[derive(Default)]
struct Scratch {
    wide: Vec<f32>,
    scaled: Vec<f32>,
    rounded: Vec<f32>,
    d: Vec<f32>,
}

fn scaled_extremes(w: &Tensor, s: &[f32]) -> Extremes {
    let mut scratch = Vec::new();
    let mut extremes = Extremes { min: 0.0, max: 0.0 };
    for row in 0..w.len() / s.len() {
        let row = w.f32_chunk(row * s.len()..(row + 1) * s.len(), &mut scratch);
        for (w, s) in row.iter().zip(s) {
            extremes.min = extremes.min.min(w * s);
            extremes.max = extremes.max.max(w * s);
        }
    }
    extremes
}

/// Clips `w`, rows of k, block by block to the ratio of its largest magnitude
/// at which rounding costs least of the output. Formats without blocks, and
/// blocks of more than 512, stay as they are.
///
/// # Errors
/// Those of quantizing; `Cancelled`.
pub fn clip(w: &mut [f32], k: usize, spec: &Spec, gram: &Gram, cancel: &Cancel) -> Result<()> {
    let block = match spec.granularity {
        Granularity::Block(block) if block <= LONGEST_CLIPPED && k.is_multiple_of(block) => block,
        _ => return Ok(()),
    };
    let spec = Spec {
        double_quant: false,
        ..spec.clone()
    };
    let extremes = match spec.format()?.needs_extremes(&spec) {
        true => Some(Extremes {
            min: w.iter().copied().fold(0.0, f32::min),
            max: w.iter().copied().fold(0.0, f32::max),
        }),
        false => None,
    };
    pool::run(|| {
        let blocks: Vec<Vec<f32>> = (0..k / block)
            .into_par_iter()
            .map(|b| square(gram, b * block, block))
            .collect();
        w.par_chunks_mut(STRIPE * k).try_for_each(|rows| {
            cancel.check()?;
            clip_stripe(rows, k, block, &spec, extremes, &blocks)
        })
    })
}

/// A square on the diagonal of a Gram matrix, in panels.
fn square(gram: &Gram, first: usize, n: usize) -> Vec<f32> {
    let mut panels = vec![0f32; n.next_multiple_of(WIDE) * n];
    for (p, panel) in panels.chunks_exact_mut(n * WIDE).enumerate() {
        for (i, line) in panel.chunks_exact_mut(WIDE).enumerate() {
            for (j, g) in (p * WIDE..n).zip(line) {
                *g = gram.at(first + i, first + j);
            }
        }
    }
    panels
}

fn clip_stripe(
    rows: &mut [f32],
    k: usize,
    block: usize,
    spec: &Spec,
    extremes: Option<Extremes>,
    blocks: &[Vec<f32>],
) -> Result<()> {
    let absmax: Vec<f32> = rows
        .chunks_exact(block)
        .map(|b| b.iter().fold(0f32, |m, v| m.max(v.abs())))
        .collect();
    let clipped = |rows: &[f32], limit: &dyn Fn(usize) -> f32| -> Vec<f32> {
        let mut out = rows.to_vec();
        for (b, block) in out.chunks_exact_mut(block).enumerate() {
            let limit = limit(b);
            block.iter_mut().for_each(|v| *v = v.clamp(-limit, limit));
        }
        out
    };
    let mut best = vec![(f64::INFINITY, 1.0f32); absmax.len()];
    let mut rounded = Vec::new();
    for step in 0..CLIPS {
        let ratio = 1.0 - step as f32 / 20.0;
        let candidate = clipped(rows, &|b| absmax[b] * ratio);
        round_trip(spec, extremes, k, &candidate, &mut rounded)?;
        for (b, best) in best.iter_mut().enumerate() {
            let at = b * block;
            let e = rows[at..at + block].iter().zip(&rounded[at..]);
            let e: Vec<f32> = e.map(|(w, r)| w - r).collect();
            let error = quadratic(&e, &blocks[b % (k / block)]);
            if error < best.0 {
                *best = (error, ratio);
            }
        }
    }
    let out = clipped(rows, &|b| absmax[b] * best[b].1);
    rows.copy_from_slice(&out);
    Ok(())
}

/// e · G · eᵀ, G in panels.
fn quadratic(e: &[f32], panels: &[f32]) -> f64 {
    let n = e.len();
    // One row of the product's left panel is e; the others are nothing.
    let mut a = vec![0f32; n * NARROW];
    for (line, &e) in a.chunks_exact_mut(NARROW).zip(e) {
        line[0] = e;
    }
    let mut sum = 0.0;
    for (p, b) in panels.chunks_exact(n * WIDE).enumerate() {
        let mut c = [0f32; NARROW * WIDE];
        dispatch(Product {
            a: &a,
            b,
            c: &mut c,
        });
        let terms = e[p * WIDE..].iter().zip(&c);
        sum += terms
            .map(|(&e, &y)| f64::from(e) * f64::from(y))
            .sum::<f64>();
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    /// The search with every point judged by all tokens.
    fn exhaustive(w: &Tensor, spec: &Spec, x: &[f32], mean: &[f32]) -> Option<Vec<f32>> {
        let tokens = Tokens::new(x, w.row_len());
        let points = candidates(&[(w, spec)], mean, DuoScaling::Both, 1);
        let points = points
            .into_iter()
            .map(|s| (loss(w, spec, &tokens, &s, &Cancel::new()).unwrap(), s));
        let (at, (_, s)) = points
            .enumerate()
            .min_by(|(_, a), (_, b)| a.0.total_cmp(&b.0))?;
        (at > 0).then_some(s)
    }

    #[test]
    fn a_sketch_does_not_change_what_is_found() {
        let (n, k, tokens) = (70, 256, 300);
        let mut state = 1u64;
        let mut value = || {
            let draw = |_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
            };
            (0..4).map(draw).sum::<f32>()
        };
        // Columns of other strengths and more alike from case to case, up to a few
        // that outweigh all others.
        for (alike, outliers) in [(0.0, 1.0), (0.5, 4.0), (0.9, 20.0), (0.2, 300.0)] {
            let w: Vec<f32> = (0..n * k).map(|_| value()).collect();
            let w = Tensor::from_slice(DType::F32, &[n, k], &w).unwrap();
            let strengths: Vec<f32> = (0..k).map(|_| (3.0 * value()).exp()).collect();
            let mut x = Vec::new();
            for _ in 0..tokens {
                let shared = value();
                for (j, strength) in strengths.iter().enumerate() {
                    let v = alike * shared + (1.0 - alike) * value();
                    let strength = strength * if j % 50 == 7 { outliers } else { 1.0 };
                    x.push(v * strength);
                }
            }
            let column = |j| x.iter().skip(j).step_by(k);
            let mean: Vec<f32> = (0..k)
                .map(|j| column(j).map(|v| v.abs()).sum::<f32>() / tokens as f32)
                .collect();
            for format in ["int4", "int3", "nf4"] {
                let spec = crate::format::spec(format, Vec::new()).unwrap();
                let found =
                    search(&[(&w, &spec)], &x, &mean, DuoScaling::Both, &Cancel::new()).unwrap();
                assert_eq!(
                    found,
                    exhaustive(&w, &spec, &x, &mean),
                    "{format}, {outliers}"
                );
            }
        }
    }

    #[test]
    fn a_quadratic_form_reads_every_panel() {
        let n = 40;
        let value = |i: usize| ((i * 7919 % 203) as f32 - 101.0) / 61.0;
        let x: Vec<f32> = (0..n * 50).map(value).collect();
        let mut gram = Gram::zeroed(n);
        gram.add(&x, &Cancel::new()).unwrap();
        let e: Vec<f32> = (0..n).map(|i| value(i + 3)).collect();
        let exact: f64 = x
            .chunks_exact(n)
            .map(|x| {
                let y: f64 = x.iter().zip(&e).map(|(x, e)| f64::from(x * e)).sum();
                y * y
            })
            .sum();
        let got = quadratic(&e, &square(&gram, 0, n));
        assert!((got / exact - 1.0).abs() < 1e-4, "{got} {exact}");
    }
}
