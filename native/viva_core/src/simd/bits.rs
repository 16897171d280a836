//! Codes of any width below a byte as one stream of bits, least first: element
//! i lies in bits `width · i ..` of the bytes read as one little-endian number.
//! Four bits of it are [`nibble`]'s low-first order.

use super::nibble::{self, Order};
use super::{Isa, Op, dispatch};

/// Bytes that `n` codes take.
pub fn packed_len(width: usize, n: usize) -> usize {
    (n * width).div_ceil(8)
}

/// Packs one code a byte into the stream; bits past the last code are zero.
pub fn pack(width: usize, codes: &[u8], out: &mut [u8]) {
    match width {
        4 => nibble::pack(Order::LowFirst, codes, out),
        8 => out.copy_from_slice(codes),
        _ => dispatch(Pack { width, codes, out }),
    }
}

struct Pack<'a> {
    width: usize,
    codes: &'a [u8],
    out: &'a mut [u8],
}

impl Op for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let Pack { width, codes, out } = self;
        match width {
            2 => pack_width::<2>(codes, out),
            3 => pack_width::<3>(codes, out),
            5 => pack_width::<5>(codes, out),
            _ => pack_width::<6>(codes, out),
        }
    }
}

/// Eight codes fill W bytes.
#[inline(always)]
fn pack_width<const W: usize>(codes: &[u8], out: &mut [u8]) {
    let word = |codes: &[u8]| {
        let each = codes.iter().enumerate();
        each.fold(0u64, |w, (i, &c)| w | u64::from(c) << (W * i))
    };
    let (eights, tail) = codes.as_chunks::<8>();
    let (whole, rest) = out.split_at_mut(eights.len() * W);
    for (eight, out) in eights.iter().zip(whole.chunks_exact_mut(W)) {
        out.copy_from_slice(&word(eight).to_le_bytes()[..W]);
    }
    if !tail.is_empty() {
        rest.copy_from_slice(&word(tail).to_le_bytes()[..rest.len()]);
    }
}

/// The code of element `i`.
#[inline(always)]
pub fn get(width: usize, packed: &[u8], i: usize) -> u8 {
    let bit = i * width;
    let low = u16::from(packed[bit / 8]);
    // The last code may end with the last byte.
    let high = u16::from(packed.get(bit / 8 + 1).copied().unwrap_or(0));
    let mask = (1u16 << width) - 1;
    (((low | high << 8) >> (bit % 8)) & mask) as u8
}

/// Unpacks elements `start .. start + out.len()` to one code a byte.
#[inline(always)]
pub fn unpack(width: usize, packed: &[u8], start: usize, out: &mut [u8]) {
    match width {
        2 => unpack_width::<2>(packed, start, out),
        3 => unpack_width::<3>(packed, start, out),
        4 => nibble::unpack(Order::LowFirst, packed, start, out),
        5 => unpack_width::<5>(packed, start, out),
        6 => unpack_width::<6>(packed, start, out),
        _ => out.copy_from_slice(&packed[start..start + out.len()]),
    }
}

#[inline(always)]
fn unpack_width<const W: usize>(packed: &[u8], start: usize, out: &mut [u8]) {
    // Eight codes begin on a byte; a start among them is brought there first.
    let head = (start.next_multiple_of(8) - start).min(out.len());
    let (first, rest) = out.split_at_mut(head);
    for (i, code) in first.iter_mut().enumerate() {
        *code = get(W, packed, start + i);
    }
    let at = start + head;
    let (eights, tail) = rest.as_chunks_mut::<8>();
    let done = at + eights.len() * 8;
    let words = packed[at / 8 * W..].chunks_exact(W);
    for (eight, bytes) in eights.iter_mut().zip(words) {
        let mut word = [0u8; 8];
        word[..W].copy_from_slice(bytes);
        let word = u64::from_le_bytes(word);
        *eight = std::array::from_fn(|i| (word >> (W * i)) as u8 & ((1 << W) - 1));
    }
    for (i, code) in tail.iter_mut().enumerate() {
        *code = get(W, packed, done + i);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_and_unpacks_every_window() {
        for width in [2, 3, 4, 5, 6, 8] {
            let codes: Vec<u8> = (0..41u32)
                .map(|i| (i.wrapping_mul(0x9e37_79b1) >> 16) as u8 & (0xff >> (8 - width)))
                .collect();
            for n in 0..codes.len() {
                let mut packed = vec![0xff; packed_len(width, n)];
                pack(width, &codes[..n], &mut packed);
                for (i, &code) in codes[..n].iter().enumerate() {
                    assert_eq!(get(width, &packed, i), code, "{i} of {n}, {width} bits");
                }
                for start in 0..n {
                    for end in start..=n {
                        let mut out = vec![0xff; end - start];
                        unpack(width, &packed, start, &mut out);
                        assert_eq!(out, &codes[start..end], "{start}..{end} of {n}, {width}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_stream_is_one_little_endian_number() {
        let codes: Vec<u8> = (0..16).map(|i| i % 8).collect();
        let mut packed = [0; 6];
        pack(3, &codes, &mut packed);
        // 7654 3210 in octal, twice.
        assert_eq!(packed, [0x88, 0xc6, 0xfa, 0x88, 0xc6, 0xfa]);
    }
}
