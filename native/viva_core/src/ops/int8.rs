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
use super::epilogue::Epilogue;
use super::matmul::{activations, check};
use super::packed::{Packed, Plan, Scratch};
use super::pool::Threads;
use super::{Cancel, pool};
use crate::error::Result;
use crate::format::Quantized;
use crate::simd::dots;
use crate::simd::form::{Form, ROWS, Scales};
use crate::simd::panel::{Expand, LONG, Multiply, Number, RoundToBytes};
use crate::simd::tiles;
use crate::simd::{LANES, Line, dispatch};
use crate::steps::Steps;
use crate::tensor::Tensor;

/// What users call this arithmetic.
pub const NAME: &str = "int8";

/// Tokens from which on codes and scales are made ready once for all tiles.
const APART: usize = 17;
/// Tokens from which on each task takes some of them, with all weights.
const BY_TOKENS: usize = 96;
/// Tokens of such a task, for their codes to stay in L2.
const TOKENS: usize = 144;
/// The same where tiles multiply: CPUs that have them have twice the L2, and panels are
/// read so much sooner that memory would be waited for.
const TOKENS_OF_TILES: usize = 256;
/// Bytes of panels that a task multiplies with one token, before it lets others run.
const STRETCH: usize = 1 << 19;

/// Where panels come from.
pub(super) enum Panels<'a> {
    Packed(&'a [u8]),
    Steps(&'a dyn Steps),
}

/// Computes `x · qᵀ` into `out`; weights are packed as they
/// are met.
///
/// # Errors
/// `InvalidOption` where q's format is none of integers, and what
/// [`super::matmul::matmul_into`] returns.
pub fn matmul_into(
    x: &Tensor,
    q: &Quantized,
    epilogue: Epilogue,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    check(x, q, &epilogue, out)?;
    let decoder = q.spec.format()?.decoder(q)?;
    let (plan, steps) = Plan::of(q, &*decoder, "compute", (q.shape[0], q.shape[1]))?;
    multiply(x, q, &plan, &Panels::Steps(steps), &epilogue, out, cancel)
}

/// The same with weights that were packed before.
///
/// # Errors
/// What [`super::matmul::matmul_into`] returns.
pub fn matmul_packed(
    x: &Tensor,
    packed: &Packed,
    epilogue: Epilogue,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    check(x, &packed.of, &epilogue, out)?;
    let panels = Panels::Packed(packed.panels.bytes());
    multiply(x, &packed.of, &packed.plan, &panels, &epilogue, out, cancel)
}

fn multiply(
    x: &Tensor,
    q: &Quantized,
    plan: &Plan,
    panels: &Panels,
    epilogue: &Epilogue,
    out: &mut [u8],
    cancel: &Cancel,
) -> Result<()> {
    let mut widened = Vec::new();
    let Some(x) = activations(x, q, &mut widened)? else {
        return epilogue.write_zeros(plan.n, out);
    };
    let m = x.len() / plan.k;
    let x = &ByGroup { x, k: plan.k };
    let job = Job { x, m, plan, panels };
    let threads = Threads::for_products(m, (plan.n, plan.k));
    threads.run(|| match (m, panels) {
        // Where panels are made on the way, once for all tokens.
        (BY_TOKENS.., Panels::Packed(_)) if threads == Threads::Pool => {
            job.by_tokens(epilogue, out, cancel)
        }
        _ => job
            .by_rows(threads, cancel)?
            .write(epilogue, out, threads, cancel),
    })
}

/// Rows of x in 8 bits.
pub(super) trait Codes: Sync {
    /// Writes the codes of a row, signed bytes. Each group of columns has as many bytes of
    /// `out`, of which it fills the first, and in `steps` how long its step is and what its
    /// codes add up to.
    fn write(&self, row: usize, groups: &[Range<usize>], out: &mut [u8], steps: &mut [(f32, i32)]);
}

/// Each group rounded by its own largest magnitude.
struct ByGroup<'a> {
    x: &'a [f32],
    k: usize,
}

impl Codes for ByGroup<'_> {
    fn write(&self, row: usize, groups: &[Range<usize>], out: &mut [u8], steps: &mut [(f32, i32)]) {
        let x = &self.x[row * self.k..(row + 1) * self.k];
        dispatch(RoundToBytes {
            x,
            groups,
            out,
            steps,
        });
    }
}

pub(super) struct Job<'a> {
    pub x: &'a dyn Codes,
    /// Rows of x.
    pub m: usize,
    pub plan: &'a Plan,
    pub panels: &'a Panels<'a>,
}

impl Job<'_> {
    /// How panels are multiplied with so many tokens.
    fn form(&self, tokens: usize) -> Form {
        match self.is_apart(tokens) {
            true => self.plan.form.apart(),
            false => self.plan.form,
        }
    }

    /// Tokens of a tile at most, where there are so many.
    fn widest(&self, tokens: usize) -> usize {
        let form = self.form(tokens);
        match form.quads >= LONG && !form.halves {
            _ if tiles::fit(&form) => tiles::TOKENS,
            true => 12,
            false => 8,
        }
    }

    /// The tiles of those tokens.
    fn tiles(&self, tokens: Range<usize>) -> Vec<Tile> {
        let widest = self.widest(tokens.len());
        let fit = widest == tiles::TOKENS;
        let mut tiles = Vec::new();
        let mut first = tokens.start;
        while first < tokens.end {
            let width = match tokens.end - first {
                1 => 1,
                2..=4 => 4,
                5..=8 => 8,
                9..=16 if fit => 16,
                _ => widest,
            };
            let rows = first..tokens.end.min(first + width);
            let registers = fit && width > 8;
            tiles.push(Tile::new(self.x, self.plan, rows, (width, registers)));
            first += width;
        }
        tiles
    }

    /// Whether codes and scales are made ready for all tiles of so many tokens.
    fn is_apart(&self, tokens: usize) -> bool {
        let form = &self.plan.form;
        (form.halves || form.scales == Scales::Multiples) && tokens >= APART
    }

    /// Each task takes some panels, and all tokens.
    pub fn by_rows(&self, threads: Threads, cancel: &Cancel) -> Result<Blocks> {
        let tiles = self.tiles(0..self.m);
        let mut blocks = Blocks::zeroed(self.plan.n, padded(&tiles));
        let each = (STRETCH / (self.plan.form.panel() * self.m)).max(1);
        let times = |room: &mut Room, i: usize, sums: &mut [f32]| {
            self.panel(i, self.m, room).times(&tiles, sums);
        };
        blocks.each(each, threads, cancel, Room::default, times)?;
        Ok(blocks)
    }

    /// Each task takes some tokens, and all panels: results go where they belong.
    fn by_tokens(&self, epilogue: &Epilogue, out: &mut [u8], cancel: &Cancel) -> Result<()> {
        let n = self.plan.n;
        let (m, threads) = (self.m, pool::threads()?);
        let widest = self.widest(TOKENS);
        let most = match widest {
            tiles::TOKENS => TOKENS_OF_TILES,
            _ => TOKENS,
        };
        // As many tasks for each thread, all nearly as long.
        let turns = m.div_ceil(threads * most);
        let tokens = m.div_ceil(threads * turns).next_multiple_of(widest);
        let size = epilogue.dtype.size();
        let row = n * size;
        out.par_chunks_mut(tokens * row)
            .enumerate()
            .try_for_each_init(Room::default, |room, (task, out)| {
                let first = task * tokens;
                let tiles = self.tiles(first..first + out.len() / row);
                let mut sums = vec![0f32; ROWS * tiles::TOKENS];
                for i in 0..n.div_ceil(ROWS) {
                    cancel.check()?;
                    let rows = i * ROWS..n.min((i + 1) * ROWS);
                    let mut panel = self.panel(i, tokens, room);
                    for tile in &tiles {
                        let sums = &mut sums[..ROWS * tile.width];
                        panel.times(std::slice::from_ref(tile), sums);
                        panel.next = &[];
                        let tokens = tile.tokens.clone();
                        for (token, sums) in tokens.zip(sums.chunks_exact_mut(ROWS)) {
                            let at = (token - first) * row + rows.start * size;
                            let out = &mut out[at..][..rows.len() * size];
                            let sums = &mut sums[..rows.len()];
                            epilogue.write((token, rows.start), sums, out)?;
                        }
                    }
                }
                Ok(())
            })
    }

    /// One panel, as so many tokens want it.
    fn panel<'b>(&'b self, index: usize, tokens: usize, room: &'b mut Room) -> Panel<'b> {
        let plan = self.plan;
        let form = self.form(tokens);
        let len = plan.form.panel();
        let bytes = match self.panels {
            Panels::Packed(panels) => &panels[index * len..(index + 1) * len],
            Panels::Steps(steps) => {
                room.packed.clear();
                room.packed.resize(len / size_of::<u32>(), 0);
                let packed = bytemuck::cast_slice_mut(&mut room.packed);
                plan.fill(*steps, index, packed, &mut room.row);
                packed
            }
        };
        let table = plan.steps.table.as_ref();
        if !self.is_apart(tokens) {
            return Panel {
                form,
                table,
                bytes,
                next: &[],
            };
        }
        let lines = form.panel() / size_of::<Line>();
        room.expanded.resize(lines, Line([0.0; LANES]));
        dots::dispatch(Expand {
            form: &plan.form,
            table,
            panel: bytes,
            out: bytemuck::cast_slice_mut(&mut room.expanded),
        });
        Panel {
            form,
            table: None,
            bytes: bytemuck::cast_slice(&room.expanded),
            next: match self.panels {
                Panels::Packed(panels) => {
                    &panels[(index + 1) * len..panels.len().min((index + 2) * len)]
                }
                Panels::Steps(_) => &[],
            },
        }
    }
}

/// Where a thread puts panels that are not ready.
#[derive(Default)]
struct Room {
    /// Words, for panels begin at one.
    packed: Vec<u32>,
    expanded: Vec<Line>,
    row: Scratch,
}

struct Panel<'a> {
    form: Form,
    table: Option<&'a [u8; 16]>,
    bytes: &'a [u8],
    /// What will be taken apart after it.
    next: &'a [u8],
}

impl Panel<'_> {
    /// The panel's products with all tiles, one line of sums a token.
    fn times(&self, tiles: &[Tile], mut sums: &mut [f32]) {
        let mut next = self.next;
        for tile in tiles {
            let (out, rest) = sums.split_at_mut(ROWS * tile.width);
            let (out, _) = out.as_chunks_mut::<LANES>();
            let (out, _) = out.as_chunks_mut();
            let codes = bytemuck::cast_slice(&tile.codes);
            if tile.registers {
                tiles::multiply(tiles::Multiply {
                    form: &self.form,
                    panel: self.bytes,
                    codes,
                    numbers: &tile.numbers,
                    out,
                });
            } else {
                dots::dispatch(Multiply {
                    form: &self.form,
                    table: self.table,
                    panel: self.bytes,
                    next: std::mem::take(&mut next),
                    codes,
                    numbers: &tile.numbers,
                    out,
                });
            }
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
    /// Whether tile registers multiply it.
    registers: bool,
    /// Fours of codes, from the beginning of a line on.
    codes: Vec<Line>,
    numbers: Vec<Number>,
}

impl Tile {
    fn new(
        x: &dyn Codes,
        plan: &Plan,
        tokens: Range<usize>,
        (width, registers): (usize, bool),
    ) -> Tile {
        let Form { groups, quads, .. } = plan.form;
        let mut lines = Line::zeroed(groups * quads * width);
        let codes: &mut [[i8; 4]] = bytemuck::cast_slice_mut(&mut lines);
        let mut numbers = vec![Number::default(); groups * width];
        let columns: Vec<Range<usize>> = (0..groups).map(|g| plan.columns(g)).collect();
        // What fills up groups stays zero.
        let mut rounded = vec![0u8; groups * 4 * quads];
        let mut steps = vec![(0.0, 0); groups];
        for (t, token) in tokens.clone().enumerate() {
            x.write(token, &columns, &mut rounded, &mut steps);
            let of_token = (rounded.chunks_exact(4 * quads)).zip(&steps);
            let of_group = codes
                .chunks_exact_mut(quads * width)
                .zip(numbers.chunks_exact_mut(width));
            for ((rounded, &(scale, sum)), (codes, numbers)) in of_token.zip(of_group) {
                numbers[t] = Number {
                    scale,
                    sum: scale * sum as f32,
                    codes: sum,
                    start: -i32::from(plan.steps.zero) * sum,
                };
                let rounded = bytemuck::cast_slice(rounded);
                if registers {
                    tiles::put(rounded, (t, width), codes);
                } else {
                    for (line, four) in codes.chunks_exact_mut(width).zip(rounded) {
                        line[t] = *four;
                    }
                }
            }
        }
        Tile {
            tokens,
            width,
            registers,
            codes: lines,
            numbers,
        }
    }
}
