//! Loops over slices, sixteen elements at a time and what is left.
//!
//! They call what they are given in two places. A closure is compiled with a level's
//! instructions only where it is inlined, so callers mark theirs `#[inline(always)]`.

use std::ops::Range;

use super::memory::prefetch;
use super::nibble::{self, Order};
use super::sink::Sink;
use super::{Isa, LANES};

/// Calls `step` with all elements, zeros past the end.
#[inline(always)]
pub fn each<I: Isa>(isa: I, x: &[f32], mut step: impl FnMut(I::F)) {
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        step(isa.load(chunk));
    }
    if !tail.is_empty() {
        step(isa.load_part(tail, 0.0));
    }
}

/// The same where zeros would count: `step` also gets ones in the lanes that hold
/// elements and zeros in the others.
#[inline(always)]
pub fn each_and_ones<I: Isa>(isa: I, x: &[f32], mut step: impl FnMut(I::F, I::F)) {
    let one = isa.splat(1.0);
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        step(isa.load(chunk), one);
    }
    if !tail.is_empty() {
        let ones = [1.0; LANES];
        step(
            isa.load_part(tail, 0.0),
            isa.load_part(&ones[..tail.len()], 0.0),
        );
    }
}

/// The code of each element, one a byte; along the way asks for what lies so many elements
/// after each, for memory not to wait while codes are made.
#[inline(always)]
pub fn encode<I: Isa>(
    isa: I,
    x: &[f32],
    ahead: usize,
    out: &mut [u8],
    code: impl Fn(I::F) -> I::U,
) {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let (outs, out_tail) = out.as_chunks_mut::<LANES>();
    for (x, out) in chunks.iter().zip(outs) {
        prefetch(x.as_ptr().wrapping_add(ahead), size_of_val(x));
        isa.store_u8(code(isa.load(x)), out);
    }
    if !tail.is_empty() {
        let mut lanes = [0u8; LANES];
        isa.store_u8(code(isa.load_part(tail, 0.0)), &mut lanes);
        out_tail.copy_from_slice(&lanes[..tail.len()]);
    }
}

/// The parts of a range that lie in one block each.
pub struct OfBlocks {
    rest: Range<usize>,
    block_len: usize,
    /// Where the next block begins.
    edge: usize,
}

impl OfBlocks {
    #[inline(always)]
    pub fn new(range: Range<usize>, block_len: usize) -> OfBlocks {
        let block = range.start / block_len;
        OfBlocks {
            rest: range,
            block_len,
            edge: (block + 1).saturating_mul(block_len),
        }
    }
}

impl Iterator for OfBlocks {
    type Item = Range<usize>;

    #[inline(always)]
    fn next(&mut self) -> Option<Range<usize>> {
        if self.rest.is_empty() {
            return None;
        }
        let run = self.rest.start..self.edge.min(self.rest.end);
        self.rest.start = run.end;
        self.edge = self.edge.saturating_add(self.block_len);
        Some(run)
    }
}

/// The value of each code of four bits in that range.
#[inline(always)]
pub fn decode_halves<I: Isa>(
    isa: I,
    (order, packed): (Order, &[u8]),
    range: Range<usize>,
    out: &mut impl Sink<I>,
    value: impl Fn(I::U) -> I::F,
) {
    let Range { mut start, end } = range;
    // A start in the middle of a byte is brought to a byte's edge first.
    if start % 2 == 1 && start < end {
        let code = nibble::get(order, packed, start);
        out.push_part(value(isa.splat_u(u32::from(code))), 1);
        start += 1;
    }
    let (chunks, tail) = packed[start / 2..end.div_ceil(2)].as_chunks();
    let whole = (end - start) / LANES;
    for codes in &chunks[..whole] {
        out.push(value(isa.load_u4(codes, order)));
    }
    let n = (end - start) % LANES;
    if n > 0 {
        // A code short of sixteen takes as many bytes.
        let rest = chunks.get(whole).map_or(tail, |chunk| chunk);
        let mut codes = [0; LANES / 2];
        codes[..rest.len()].copy_from_slice(rest);
        out.push_part(value(isa.load_u4(&codes, order)), n);
    }
}

/// The value of each code.
#[inline(always)]
pub fn decode<I: Isa>(codes: &[u8], out: &mut impl Sink<I>, value: impl Fn(&[u8; LANES]) -> I::F) {
    let (chunks, tail) = codes.as_chunks::<LANES>();
    for codes in chunks {
        out.push(value(codes));
    }
    if !tail.is_empty() {
        let mut lanes = [0u8; LANES];
        lanes[..tail.len()].copy_from_slice(tail);
        out.push_part(value(&lanes), tail.len());
    }
}
