//! x · qᵀ in integers: activations are rounded to 8 bits, group by group.
//!
//! What `compute: :int8` promises: each group of a token's activations, those that
//! meet one block of weights, is rounded to −127…127 steps of its largest magnitude
//! over 127; products with the weights' steps and their sums are exact, and sums of
//! groups are f32, in their order, rounded to the result's dtype once. Weights are
//! taken as they are where a format is made of integers; nf4's and fp4's values are
//! rounded to 1/127 of their block's largest. The same bits on every level, for
//! every number of threads and whatever other rows come along. A token that holds a
//! NaN or an infinity gives NaN.

use std::ops::Range;

use rayon::prelude::*;

use super::batch::Blocks;
use super::matmul::{activations, check};
use super::packed::{Packed, Plan, Scratch};
use super::{Cancel, pool};
use crate::error::Result;
use crate::format::Quantized;
use crate::simd::LANES;
use crate::simd::dispatch;
use crate::simd::dots;
use crate::simd::panel::{Expand, Form, Multiply, Number, ROWS, RoundToBytes};
use crate::steps::Steps;
use crate::tensor::{DType, Tensor, narrow};

/// What users call this arithmetic.
pub const NAME: &str = "int8";

/// Tokens from which on halves are taken apart once for all tiles.
const APART: usize = 17;
/// Tokens from which on each task takes some of them, with all weights.
const BY_TOKENS: usize = 96;
/// Tokens of such a task, for their codes to stay in L2.
const TOKENS: usize = 144;
/// Bytes of panels that a task multiplies with one token, before it lets others run.
const STRETCH: usize = 1 << 19;
/// Products that one thread is done with before others would have begun.
const SMALL: usize = 1 << 20;

/// Where panels come from.
enum Panels<'a> {
    Packed(&'a [u8]),
    Steps(&'a dyn Steps),
}

/// Computes `x · qᵀ` into `out`, rounded once to `dtype`; weights are packed as they
/// are met.
///
/// # Errors
/// `InvalidOption` where q's format is none of integers, and what
/// [`super::matmul::matmul_into`] returns.
pub fn matmul_into(
    x: &Tensor,
    q: &Quantized,
    dtype: DType,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    check(x, q, dtype, out)?;
    let decoder = q.spec.format()?.decoder(q)?;
    let (plan, steps) = Plan::of(q, &*decoder, "compute", (q.shape[0], q.shape[1]))?;
    multiply(x, q, &plan, &Panels::Steps(steps), dtype, out, cancel)
}

/// The same with weights that were packed before.
///
/// # Errors
/// What [`super::matmul::matmul_into`] returns.
pub fn matmul_packed(
    x: &Tensor,
    packed: &Packed,
    dtype: DType,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    check(x, &packed.of, dtype, out)?;
    let panels = Panels::Packed(packed.panels.bytes());
    multiply(x, &packed.of, &packed.plan, &panels, dtype, out, cancel)
}

fn multiply(
    x: &Tensor,
    q: &Quantized,
    plan: &Plan,
    panels: &Panels,
    dtype: DType,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    let mut widened = Vec::new();
    let Some(x) = activations(x, q, out, &mut widened)? else {
        return Ok(());
    };
    let m = x.len() / plan.k;
    let job = Job { x, plan, panels };
    if m * plan.n * plan.k <= SMALL {
        return job.at_once(dtype, out);
    }
    pool::run(|| match m {
        BY_TOKENS.. => job.by_tokens(dtype, out, cancel),
        _ => job.by_rows(cancel)?.write(dtype, out),
    })
}

struct Job<'a> {
    x: &'a [f32],
    plan: &'a Plan,
    panels: &'a Panels<'a>,
}

impl Job<'_> {
    /// The tiles of those tokens.
    fn tiles(&self, tokens: Range<usize>) -> Vec<Tile> {
        let apart = self.is_apart(tokens.len());
        let mut tiles = Vec::new();
        let mut first = tokens.start;
        while first < tokens.end {
            let width = match tokens.end - first {
                1 => 1,
                2..=4 => 4,
                9.. if apart || !self.plan.form.halves => 12,
                _ => 8,
            };
            let rows = first..tokens.end.min(first + width);
            tiles.push(Tile::new(self.x, self.plan, rows, width));
            first += width;
        }
        tiles
    }

    /// Whether halves are taken apart for all tiles of so many tokens.
    fn is_apart(&self, tokens: usize) -> bool {
        self.plan.form.halves && tokens >= APART
    }

    /// On the calling thread.
    fn at_once(&self, dtype: DType, out: &mut [u8]) -> Result<()> {
        let m = self.x.len() / self.plan.k;
        let tiles = self.tiles(0..m);
        let mut blocks = Blocks::zeroed(self.plan.n, padded(&tiles));
        let mut room = Room::default();
        for (i, sums) in blocks.chunks_mut().enumerate() {
            self.panel(i, m, &mut room).times(&tiles, sums);
        }
        blocks.write_at_once(dtype, out)
    }

    /// Each task takes some panels, and all tokens.
    fn by_rows(&self, cancel: &Cancel) -> Result<Blocks> {
        let m = self.x.len() / self.plan.k;
        let tiles = self.tiles(0..m);
        let padded = padded(&tiles);
        let mut blocks = Blocks::zeroed(self.plan.n, padded);
        let each = (STRETCH / (self.plan.form.panel() * m)).max(1);
        blocks.par_chunks_mut(each).enumerate().try_for_each_init(
            Room::default,
            |room, (task, stretch)| {
                cancel.check()?;
                for (i, sums) in stretch.chunks_exact_mut(ROWS * padded).enumerate() {
                    self.panel(task * each + i, m, room).times(&tiles, sums);
                }
                Ok(())
            },
        )?;
        Ok(blocks)
    }

    /// Each task takes some tokens, and all panels: results go where they belong.
    fn by_tokens(&self, dtype: DType, out: &mut [u8], cancel: &Cancel) -> Result<()> {
        let n = self.plan.n;
        let (m, threads) = (self.x.len() / self.plan.k, pool::threads()?);
        // As many tasks for each thread, all nearly as long.
        let turns = m.div_ceil(threads * TOKENS);
        let tokens = m.div_ceil(threads * turns).next_multiple_of(12);
        let row = n * dtype.size();
        out.par_chunks_mut(tokens * row)
            .enumerate()
            .try_for_each_init(Room::default, |room, (task, out)| {
                let first = task * tokens;
                let tiles = self.tiles(first..first + out.len() / row);
                let mut sums = vec![0f32; ROWS * 12];
                for i in 0..n.div_ceil(ROWS) {
                    cancel.check()?;
                    let rows = i * ROWS..n.min((i + 1) * ROWS);
                    let panel = self.panel(i, tokens, room);
                    for tile in &tiles {
                        let sums = &mut sums[..ROWS * tile.width];
                        panel.times(std::slice::from_ref(tile), sums);
                        for (token, sums) in tile.tokens.clone().zip(sums.chunks_exact(ROWS)) {
                            let at = (token - first) * row + rows.start * dtype.size();
                            let out = &mut out[at..][..rows.len() * dtype.size()];
                            narrow(dtype, &sums[..rows.len()], out)?;
                        }
                    }
                }
                Ok(())
            })
    }

    /// One panel, as so many tokens want it.
    fn panel<'b>(&'b self, index: usize, tokens: usize, room: &'b mut Room) -> Panel<'b> {
        let plan = self.plan;
        let len = plan.form.panel();
        let bytes = match self.panels {
            Panels::Packed(panels) => &panels[index * len..(index + 1) * len],
            Panels::Steps(steps) => {
                room.packed.clear();
                room.packed.resize(len, 0);
                plan.fill(*steps, index, &mut room.packed, &mut room.row);
                &room.packed
            }
        };
        let table = plan.steps.table.as_ref();
        if !self.is_apart(tokens) {
            return Panel {
                form: plan.form,
                table,
                bytes,
            };
        }
        let form = Form {
            halves: false,
            ..plan.form
        };
        room.expanded.resize(form.panel(), 0);
        dots::dispatch(Expand {
            form: &plan.form,
            table,
            panel: bytes,
            out: &mut room.expanded,
        });
        Panel {
            form,
            table: None,
            bytes: &room.expanded,
        }
    }
}

/// Where a thread puts panels that are not ready.
#[derive(Default)]
struct Room {
    packed: Vec<u8>,
    expanded: Vec<u8>,
    row: Scratch,
}

struct Panel<'a> {
    form: Form,
    table: Option<&'a [u8; 16]>,
    bytes: &'a [u8],
}

impl Panel<'_> {
    /// The panel's products with all tiles, one line of sums a token.
    fn times(&self, tiles: &[Tile], mut sums: &mut [f32]) {
        for tile in tiles {
            let (out, rest) = sums.split_at_mut(ROWS * tile.width);
            let (out, _) = out.as_chunks_mut::<LANES>();
            dots::dispatch(Multiply {
                form: &self.form,
                table: self.table,
                panel: self.bytes,
                codes: &tile.codes,
                numbers: &tile.numbers,
                out: out.as_chunks_mut().0,
            });
            sums = rest;
        }
    }
}

/// Tokens of all tiles, with those that fill them.
fn padded(tiles: &[Tile]) -> usize {
    tiles.iter().map(|tile| tile.width).sum()
}

/// Some tokens in 8 bits.
struct Tile {
    tokens: Range<usize>,
    /// Tokens with those that fill the tile.
    width: usize,
    codes: Vec<[i8; 4]>,
    numbers: Vec<Number>,
}

impl Tile {
    fn new(x: &[f32], plan: &Plan, tokens: Range<usize>, width: usize) -> Tile {
        let Form { groups, quads, .. } = plan.form;
        let mut codes = vec![[0i8; 4]; groups * quads * width];
        let mut numbers = vec![Number::default(); groups * width];
        let mut rounded = vec![0u8; 4 * quads];
        for (t, token) in tokens.clone().enumerate() {
            let row = &x[token * plan.k..(token + 1) * plan.k];
            for group in 0..groups {
                let x = &row[plan.columns(group)];
                let (scale, sum) = dispatch(RoundToBytes {
                    x,
                    out: &mut rounded[..x.len()],
                });
                numbers[group * width + t] = Number {
                    scale,
                    sum: scale * sum as f32,
                    codes: sum,
                    start: -i32::from(plan.steps.zero) * sum,
                };
                rounded[x.len()..].fill(0);
                let codes = &mut codes[group * quads * width..][..quads * width];
                let lines = codes.chunks_exact_mut(width);
                for (line, four) in lines.zip(rounded.as_chunks::<4>().0) {
                    line[t] = four.map(|code| code as i8);
                }
            }
        }
        Tile {
            tokens,
            width,
            codes,
            numbers,
        }
    }
}
