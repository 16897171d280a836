//! 4-bit codes into a table of sixteen values.

use super::stats::absmax;
use super::{Isa, LANES, Op};
use crate::method::mse::{Best, squared_error};

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
        let mut tree = [0f32; 16];
        for (node, threshold) in tree.iter_mut().enumerate().skip(1) {
            let depth = node.ilog2();
            // In order, the nodes of one depth lie evenly among the ranks.
            let width = 16 >> depth;
            let above = (node - (1 << depth)) * width + width / 2;
            *threshold = threshold_of((sorted[above - 1] + sorted[above]) / 2.0);
        }
        Codebook {
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
    root: I::F,
    tree: I::F,
    sorted: I::F,
}

impl<I: Isa> Search<I> {
    #[inline(always)]
    pub fn new(isa: I, book: &Codebook) -> Search<I> {
        Search {
            isa,
            root: isa.splat(book.tree[1]),
            tree: isa.load(&book.tree),
            sorted: isa.load(&book.sorted),
        }
    }

    /// 16 + the rank of the nearest value.
    #[inline(always)]
    fn leaf(self, y: I::F) -> I::U {
        let isa = self.isa;
        let mut node = isa.descend(isa.splat_u(1), y, self.root);
        for _ in 0..3 {
            node = isa.descend(node, y, isa.lookup(self.tree, node));
        }
        node
    }

    #[inline(always)]
    fn rank(self, y: I::F) -> I::U {
        self.isa.sub_u(self.leaf(y), self.isa.splat_u(16))
    }

    /// The nearest value itself.
    #[inline(always)]
    pub fn value(self, y: I::F) -> I::F {
        self.isa.lookup(self.sorted, self.rank(y))
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
            best.attempt(isa, x, 0.0, |v| self.value(isa.mul(v, inv)));
        }
        if best.scale < LEAST || !best.scale.is_finite() {
            return most;
        }
        let error = |scale: f32| {
            let inv = isa.splat(1.0 / scale);
            let scale = isa.splat(scale);
            squared_error(isa, x, |v| isa.mul(self.value(isa.mul(v, inv)), scale))
        };
        if error(best.scale) < error(most) {
            best.scale
        } else {
            most
        }
    }

    /// Ranks of `x`, from `ratio(x)` = x / absmax. (bitsandbytes clamps the
    /// ratio to ±1 first; every threshold lies inside, so that changes none.)
    #[inline(always)]
    pub fn ranks(self, x: &[f32], out: &mut [u8], ratio: impl Fn(I::F) -> I::F) {
        let isa = self.isa;
        let (chunks, tail) = x.as_chunks::<LANES>();
        let (outs, out_tail) = out.as_chunks_mut::<LANES>();
        for (x, out) in chunks.iter().zip(outs) {
            isa.store_u8(self.rank(ratio(isa.load(x))), out);
        }
        if !tail.is_empty() {
            let mut lanes = [0u8; LANES];
            isa.store_u8(self.rank(ratio(isa.load_part(tail, 0.0))), &mut lanes);
            out_tail.copy_from_slice(&lanes[..tail.len()]);
        }
    }
}

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
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let search = Search::new(isa, self.book);
        let blocks = self
            .x
            .chunks(self.block_len)
            .zip(self.codes.chunks_mut(self.block_len));
        for ((x, out), scale) in blocks.zip(self.absmax) {
            let most = absmax(isa, x);
            *scale = if self.search {
                search.mse(x, most)
            } else {
                most
            };
            let divisor = if *scale > LEAST { *scale } else { LEAST };
            if x.len() == self.block_len {
                let inv = isa.splat(1.0 / divisor);
                search.ranks(x, out, |v| isa.mul(v, inv));
            } else {
                // bitsandbytes divides in a short last block, and stores the
                // divisor that it used.
                *scale = divisor;
                let divisor = isa.splat(divisor);
                search.ranks(x, out, |v| isa.div(v, divisor));
            }
        }
        if self.book.code_of_rank != IDENTITY {
            for code in self.codes {
                *code = self.book.code_of_rank[usize::from(*code & 15)];
            }
        }
    }
}

/// Values of consecutive codes, one a byte: `table[code] · scale`.
#[inline(always)]
pub fn decode_run<I: Isa>(isa: I, table: &[f32; 16], codes: &[u8], scale: f32, out: &mut [f32]) {
    let table = isa.load(table);
    let scale = isa.splat(scale);
    let value = |codes| isa.mul(isa.lookup(table, isa.load_u8(codes)), scale);
    let (chunks, tail) = codes.as_chunks::<LANES>();
    let (outs, out_tail) = out.as_chunks_mut::<LANES>();
    for (codes, out) in chunks.iter().zip(outs) {
        isa.store(value(codes), out);
    }
    if !tail.is_empty() {
        let mut lanes = [0u8; LANES];
        lanes[..tail.len()].copy_from_slice(tail);
        isa.store_part(value(&lanes), out_tail);
    }
}
