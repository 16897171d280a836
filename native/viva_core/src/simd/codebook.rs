//! 4-bit codes into a table of sixteen values.

use std::ops::Range;

use super::columns::turn;
use super::nibble::Order;
use super::runs;
use super::sink::Sink;
use super::stats::{absmax_each, stays_zero, together};
use super::{Isa, LANES, Op};
use crate::method::mse::{Best, BestEach, ROUND, squared_error, sum_each};

/// A table of values, and the thresholds between its neighbours.
#[derive(Clone, Debug)]
pub struct Codebook {
    /// Values in ascending order.
    sorted: [f32; 16],
    /// The midpoints, in f32, as a search tree: node i has the children 2i and
    /// 2i + 1. Four steps down from node 1 end at node 16 + rank.
    tree: [f32; 16],
    /// The code of each rank in `sorted`.
    code_of_rank: [u8; 16],
    cells: Option<Cells>,
}

/// Cells of one width with at most one threshold in each: two look-ups and one
/// comparison find the rank. Not every table has neighbours so far apart.
#[derive(Clone, Debug)]
struct Cells {
    /// cell(y) = the nearest integer of y · scale + offset, among 0 … 31, the offset
    /// being one too. It never falls where y rises, which is all that the search asks
    /// of it; no threshold is so near an edge that rounding could move it over.
    scale: f32,
    offset: f32,
    /// The threshold in each cell, or infinity.
    threshold: [f32; 32],
    /// How many thresholds lie in the cells before.
    below: [u32; 32],
    /// The values below and above the threshold.
    values: [[f32; 32]; 2],
}

impl Cells {
    fn new(sorted: &[f32; 16], threshold: [f32; 15]) -> Option<Cells> {
        let (low, high) = (sorted[0], sorted[15]);
        let scale = 30.0 / (high - low);
        let mut cells = Cells {
            scale,
            offset: -(low * scale).round(),
            threshold: [f32::INFINITY; 32],
            below: [0; 32],
            values: [[low; 32]; 2],
        };
        for (t, above) in threshold.into_iter().zip(1..) {
            let place = t * scale + cells.offset;
            let cell = place.round();
            if (place - cell).abs() > 0.499 {
                return None;
            }
            let cell = cell as usize;
            if cells.threshold[cell] != f32::INFINITY {
                return None;
            }
            cells.threshold[cell] = t;
            cells.below[cell + 1..].fill(above);
            let [values_below, values_above] = &mut cells.values;
            values_below[cell + 1..].fill(sorted[above as usize]);
            values_above[cell..].fill(sorted[above as usize]);
        }
        Some(cells)
    }
}

impl Codebook {
    /// The codebook of a table of values by code; a tie takes the lower value.
    pub fn new(table: &[f32; 16]) -> Codebook {
        Codebook::with_thresholds(table, |midpoint| midpoint)
    }

    /// The same, but a tie takes the higher value.
    pub fn with_ties_up(table: &[f32; 16]) -> Codebook {
        Codebook::with_thresholds(table, f32::next_down)
    }

    fn with_thresholds(table: &[f32; 16], threshold_of: impl Fn(f32) -> f32) -> Codebook {
        let mut code_of_rank: [u8; 16] = std::array::from_fn(|i| i as u8);
        // Stable, so that of fp4's two zeros the lower code comes first.
        code_of_rank.sort_by(|&a, &b| {
            let (a, b) = (table[usize::from(a)], table[usize::from(b)]);
            a.partial_cmp(&b).unwrap_or(std::cmp::Ordering::Equal)
        });
        let sorted = code_of_rank.map(|c| table[usize::from(c)]);
        let threshold = |above: usize| threshold_of((sorted[above - 1] + sorted[above]) / 2.0);
        let mut tree = [0f32; 16];
        for (node, t) in tree.iter_mut().enumerate().skip(1) {
            let depth = node.ilog2();
            // In order, the nodes of one depth lie evenly among the ranks.
            let width = 16 >> depth;
            let above = (node - (1 << depth)) * width + width / 2;
            *t = threshold(above);
        }
        Codebook {
            cells: Cells::new(&sorted, std::array::from_fn(|i| threshold(i + 1))),
            sorted,
            tree,
            code_of_rank,
        }
    }

    /// The code of y: that of the nearest value.
    /// The scalar definition of [`Encode`].
    pub fn code(&self, y: f32) -> u8 {
        let mut node = 1;
        while node < 16 {
            node = 2 * node + usize::from(y > self.tree[node]);
        }
        self.code_of_rank[node - 16]
    }
}

/// The codebook in registers.
#[derive(Clone, Copy)]
pub struct Search<I: Isa> {
    isa: I,
    sorted: I::F,
    way: Way<I>,
}

#[derive(Clone, Copy)]
enum Way<I: Isa> {
    Tree {
        root: I::F,
        tree: I::F,
    },
    Cells {
        scale: I::F,
        offset: I::F,
        threshold: [I::F; 2],
        below: [I::F; 2],
        values: [[I::F; 2]; 2],
    },
}

impl<I: Isa> Search<I> {
    #[inline(always)]
    pub fn new(isa: I, book: &Codebook) -> Search<I> {
        let way = match &book.cells {
            None => Way::Tree {
                root: isa.splat(book.tree[1]),
                tree: isa.load(&book.tree),
            },
            Some(cells) => {
                let halves = |table: &[f32; 32]| {
                    let (halves, _) = table.as_chunks::<LANES>();
                    [isa.load(&halves[0]), isa.load(&halves[1])]
                };
                Way::Cells {
                    scale: isa.splat(cells.scale),
                    offset: isa.splat(cells.offset + ROUND),
                    threshold: halves(&cells.threshold),
                    below: halves(&cells.below.map(f32::from_bits)),
                    values: [halves(&cells.values[0]), halves(&cells.values[1])],
                }
            }
        };
        Search {
            isa,
            sorted: isa.load(&book.sorted),
            way,
        }
    }

    /// The rank of the nearest value.
    #[inline(always)]
    fn rank(self, y: I::F) -> I::U {
        let isa = self.isa;
        match self.way {
            Way::Tree { root, tree } => {
                let mut node = isa.descend(isa.splat_u(1), y, root);
                for _ in 0..3 {
                    node = isa.descend(node, y, isa.lookup(tree, node));
                }
                isa.sub_u(node, isa.splat_u(16))
            }
            Way::Cells {
                scale,
                offset,
                threshold,
                below,
                ..
            } => {
                let cell = cell(isa, y, (scale, offset));
                let below = isa.bits(isa.lookup_32(below, cell));
                isa.count(below, y, isa.lookup_32(threshold, cell))
            }
        }
    }

    /// The nearest value itself.
    #[inline(always)]
    pub fn value(self, y: I::F) -> I::F {
        let isa = self.isa;
        match self.way {
            Way::Tree { .. } => isa.lookup(self.sorted, self.rank(y)),
            Way::Cells {
                scale,
                offset,
                threshold,
                values: [below, above],
                ..
            } => {
                let cell = cell(isa, y, (scale, offset));
                let (below, above) = (isa.lookup_32(below, cell), isa.lookup_32(above, cell));
                isa.choose(y, isa.lookup_32(threshold, cell), above, below)
            }
        }
    }

    /// The absmax of least squared error; never worse than the block's own.
    #[inline(always)]
    fn mse(self, x: &[f32], most: f32) -> f32 {
        let isa = self.isa;
        if most < LEAST {
            return most;
        }
        let mut best = Best::none();
        for step in 0..24 {
            let inv = isa.splat(1.0 / (most * (1.08 - 0.42 * step as f32 / 23.0)));
            best.attempt(
                isa,
                x,
                0.0,
                #[inline(always)]
                |v| self.value(isa.mul(v, inv)),
            );
        }
        if best.scale < LEAST || !best.scale.is_finite() {
            return most;
        }
        if self.error(x, best.scale) < self.error(x, most) {
            best.scale
        } else {
            most
        }
    }

    /// The same of sixteen whole blocks, one a lane.
    #[inline(always)]
    fn mse_each(self, x: &[f32], block_len: usize, most: I::F) -> I::F {
        let isa = self.isa;
        let mut rows = [[0f32; LANES]; TURNED];
        let rows = &mut rows[..block_len];
        turn(isa, x, rows);
        let (least, one) = (isa.splat(LEAST), isa.splat(1.0));
        // Zeros have no scale: what is found for them is not taken.
        let any = isa.choose(least, most, one, most);
        let mut best = BestEach::none(isa);
        for step in 0..24 {
            let wider = isa.splat(1.08 - 0.42 * step as f32 / 23.0);
            let inv = isa.div(one, isa.mul(any, wider));
            best.attempt(
                rows,
                #[inline(always)]
                |v| self.value(isa.mul(v, inv)),
            );
        }
        let scale = isa.choose(least, best.scale, any, best.scale);
        let scale = isa.choose(isa.splat(f32::INFINITY), scale, scale, any);
        let (own, found) = (self.error_each(rows, any), self.error_each(rows, scale));
        let found = isa.choose(own, found, scale, any);
        isa.choose(least, most, most, found)
    }

    /// Σ(x − value)² under the scale of each lane.
    #[inline(always)]
    fn error_each(self, rows: &[[f32; LANES]], scale: I::F) -> I::F {
        let isa = self.isa;
        let inv = isa.div(isa.splat(1.0), scale);
        let [error] = sum_each(
            isa,
            rows,
            #[inline(always)]
            |v| {
                let e = isa.sub(v, isa.mul(self.value(isa.mul(v, inv)), scale));
                [isa.mul(e, e)]
            },
        );
        error
    }

    /// Σ(x − value)² under a scale.
    #[inline(always)]
    fn error(self, x: &[f32], scale: f32) -> f32 {
        let isa = self.isa;
        let (inv, scale) = (isa.splat(1.0 / scale), isa.splat(scale));
        squared_error(
            isa,
            x,
            #[inline(always)]
            |v| isa.mul(self.value(isa.mul(v, inv)), scale),
        )
    }

    /// Ranks of `x`, from `ratio(x)` = x / absmax. (bitsandbytes clamps the
    /// ratio to ±1 first; every threshold lies inside, so that changes none.) `ahead` as
    /// [`runs::encode`] takes it.
    #[inline(always)]
    pub fn ranks(self, x: &[f32], ahead: usize, out: &mut [u8], ratio: impl Fn(I::F) -> I::F) {
        let isa = self.isa;
        runs::encode(
            isa,
            x,
            ahead,
            out,
            #[inline(always)]
            |x| self.rank(ratio(x)),
        );
    }
}

/// The cell of y in the low bits. The offset has ROUND in it, whose sum with n has
/// those of n.
#[inline(always)]
fn cell<I: Isa>(isa: I, y: I::F, (scale, offset): (I::F, I::F)) -> I::U {
    let cell = isa.mul_add(y, scale, offset);
    let (first, last) = (isa.splat(ROUND), isa.splat(ROUND + 31.0));
    isa.bits(isa.min(isa.max(cell, first), last))
}

/// Elements of the longest blocks that are searched sixteen at a time.
const TURNED: usize = 256;

/// The least absmax that bitsandbytes divides by.
pub const LEAST: f32 = 1e-38;

const IDENTITY: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// Encodes whole blocks, one code a byte.
pub struct Encode<'a> {
    pub book: &'a Codebook,
    /// Search the scales instead of taking each block's absmax.
    pub search: bool,
    pub block_len: usize,
    pub x: &'a [f32],
    pub codes: &'a mut [u8],
    pub absmax: &'a mut [f32],
}

impl Op for Encode<'_> {
    /// Whether all elements are numbers.
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> bool {
        let search = Search::new(isa, self.book);
        let group = together(self.block_len);
        let span = group.saturating_mul(self.block_len);
        let groups = self.x.chunks(span).zip(self.codes.chunks_mut(span));
        let mut finite = isa.splat(0.0);
        for ((x, out), scales) in groups.zip(self.absmax.chunks_mut(group)) {
            let mut most = absmax_each(isa, x, self.block_len, &mut finite);
            let searched = self.search
                && self.block_len <= TURNED
                && self.block_len.is_multiple_of(LANES)
                && x.len() == LANES * self.block_len;
            if searched {
                most = search.mse_each(x, self.block_len, most);
            }
            let divisor = isa.max(most, isa.splat(LEAST));
            let (mut absmax, mut inverse) = ([0f32; LANES], [0f32; LANES]);
            isa.store(most, &mut absmax);
            isa.store(isa.div(isa.splat(1.0), divisor), &mut inverse);
            let blocks = x.chunks(self.block_len).zip(out.chunks_mut(self.block_len));
            for ((i, (x, out)), scale) in blocks.enumerate().zip(scales) {
                *scale = absmax[i];
                let mut inv = inverse[i];
                if self.search && !searched {
                    *scale = search.mse(x, absmax[i]);
                    inv = 1.0 / if *scale > LEAST { *scale } else { LEAST };
                }
                if x.len() == self.block_len {
                    let inv = isa.splat(inv);
                    search.ranks(
                        x,
                        span,
                        out,
                        #[inline(always)]
                        |v| isa.mul(v, inv),
                    );
                } else {
                    // bitsandbytes divides in a short last block, and stores the
                    // divisor that it used.
                    *scale = if *scale > LEAST { *scale } else { LEAST };
                    let divisor = isa.splat(*scale);
                    search.ranks(
                        x,
                        span,
                        out,
                        #[inline(always)]
                        |v| isa.div(v, divisor),
                    );
                }
            }
        }
        if self.book.code_of_rank != IDENTITY {
            for code in self.codes {
                *code = self.book.code_of_rank[usize::from(*code & 15)];
            }
        }
        stays_zero(isa, finite)
    }
}

/// Values of codes, two a byte: `table[code] · scale`.
#[inline(always)]
pub fn decode_run<I: Isa>(
    isa: I,
    table: &[f32; 16],
    packed: (Order, &[u8]),
    range: Range<usize>,
    scale: f32,
    out: &mut impl Sink<I>,
) {
    let table = isa.load(table);
    let scale = isa.splat(scale);
    runs::decode_halves(
        isa,
        packed,
        range,
        out,
        #[inline(always)]
        |codes| isa.mul(isa.lookup(table, codes), scale),
    );
}
