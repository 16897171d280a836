//! Loops over slices, sixteen elements at a time and what is left.
//!
//! They call what they are given in two places. A closure is compiled with a level's
//! instructions only where it is inlined, so callers mark theirs `#[inline(always)]`.

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

/// The code of each element, one a byte.
#[inline(always)]
pub fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [u8], code: impl Fn(I::F) -> I::U) {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let (outs, out_tail) = out.as_chunks_mut::<LANES>();
    for (x, out) in chunks.iter().zip(outs) {
        isa.store_u8(code(isa.load(x)), out);
    }
    if !tail.is_empty() {
        let mut lanes = [0u8; LANES];
        isa.store_u8(code(isa.load_part(tail, 0.0)), &mut lanes);
        out_tail.copy_from_slice(&lanes[..tail.len()]);
    }
}

/// The value of each code.
#[inline(always)]
pub fn decode<I: Isa>(isa: I, codes: &[u8], out: &mut [f32], value: impl Fn(&[u8; LANES]) -> I::F) {
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
