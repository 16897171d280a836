//! Codes as compressed-tensors packs them: every row is one stream of bits,
//! least first, that ends with a whole 32-bit word. Ours are the same stream
//! without the ends of rows.

use std::borrow::Cow;

/// Words of one row.
pub fn words(width: usize, columns: usize) -> usize {
    (columns * width).div_ceil(32)
}

/// Eight bits of a stream from any bit on, zeros past its end.
fn bits(stream: &[u8], bit: usize) -> u8 {
    let byte = |i: usize| u16::from(stream.get(i).copied().unwrap_or(0));
    ((byte(bit / 8) | byte(bit / 8 + 1) << 8) >> (bit % 8)) as u8
}

/// Adds the low `n` bits of a byte to a stream, which has zeros there.
fn put(stream: &mut [u8], bit: usize, value: u8, n: usize) {
    let value = (u16::from(value) & ((1 << n) - 1)) << (bit % 8);
    stream[bit / 8] |= value as u8;
    if value > 0xff {
        stream[bit / 8 + 1] |= (value >> 8) as u8;
    }
}

/// Copies `n` bits.
fn copy(from: &[u8], start: usize, to: &mut [u8], at: usize, n: usize) {
    for done in (0..n).step_by(8) {
        let some = (n - done).min(8);
        put(to, at + done, bits(from, start + done), some);
    }
}

/// Codes [rows, columns], one stream, to words row by row.
pub fn rows(width: usize, rows: usize, columns: usize, stream: &[u8]) -> Cow<'_, [u8]> {
    let (bits, row_bits) = (width * columns, 32 * words(width, columns));
    if bits == row_bits {
        return Cow::Borrowed(stream);
    }
    let mut out = vec![0u8; rows * row_bits / 8];
    for row in 0..rows {
        copy(stream, row * bits, &mut out, row * row_bits, bits);
    }
    Cow::Owned(out)
}

/// The way back.
pub fn stream(width: usize, rows: usize, columns: usize, words_of: &[u8]) -> Cow<'_, [u8]> {
    let (bits, row_bits) = (width * columns, 32 * words(width, columns));
    if bits == row_bits {
        return Cow::Borrowed(words_of);
    }
    let mut out = vec![0u8; (rows * bits).div_ceil(8)];
    for row in 0..rows {
        copy(words_of, row * row_bits, &mut out, row * bits, bits);
    }
    Cow::Owned(out)
}

/// Zero points [rows, groups], one stream, to words along the rows.
pub fn zeros(width: usize, rows: usize, groups: usize, stream: &[u8]) -> Vec<u8> {
    let mut out = vec![0u8; 4 * words(width, rows) * groups];
    for_each_bit(width, rows, groups, |at, in_words| {
        put(&mut out, in_words, bits(stream, at), 1);
    });
    out
}

/// The way back.
pub fn unpack_zeros(width: usize, rows: usize, groups: usize, packed: &[u8]) -> Vec<u8> {
    let mut out = vec![0u8; (rows * groups * width).div_ceil(8)];
    for_each_bit(width, rows, groups, |at, in_words| {
        put(&mut out, at, bits(packed, in_words), 1);
    });
    out
}

/// Where each bit of the zero points lies in the stream and in the words: bit
/// by bit, since a zero point may end in the next word of its group, which is
/// elsewhere. They are few.
fn for_each_bit(width: usize, rows: usize, groups: usize, mut f: impl FnMut(usize, usize)) {
    for row in 0..rows {
        for group in 0..groups {
            for bit in 0..width {
                let along = row * width + bit;
                let in_words = (along / 32 * groups + group) * 32 + along % 32;
                f((row * groups + group) * width + bit, in_words);
            }
        }
    }
}
