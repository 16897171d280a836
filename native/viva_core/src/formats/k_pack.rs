//! How ggml's K formats lay out 256 codes of a few bits, and the scales of q4_k and q5_k.

/// Two bits of 256 codes, from bit `shift`: of every 128 elements byte i holds
/// i, i + 32, i + 64 and i + 96.
#[inline(always)]
pub(super) fn pack_quarters(codes: &[u8; 256], shift: u32) -> [u8; 64] {
    let mut out = [0u8; 64];
    for (codes, out) in codes
        .as_chunks::<128>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<32>().0)
    {
        for (i, out) in out.iter_mut().enumerate() {
            let bits = |quarter: usize| (codes[i + 32 * quarter] >> shift & 3) << (2 * quarter);
            *out = bits(0) | bits(1) | bits(2) | bits(3);
        }
    }
    out
}

#[inline(always)]
pub(super) fn unpack_quarters(packed: &[u8; 64], shift: u32) -> [u8; 256] {
    let mut codes = [0u8; 256];
    for (packed, codes) in packed
        .as_chunks::<32>()
        .0
        .iter()
        .zip(codes.as_chunks_mut::<128>().0)
    {
        for (quarter, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (code, byte) in codes.iter_mut().zip(packed) {
                *code = (byte >> (2 * quarter) & 3) << shift;
            }
        }
    }
    codes
}

/// The same of the sixteen elements from 16 · `i` on, in their order.
#[inline(always)]
pub(super) fn quarter_sixteen(packed: &[u8; 64], i: usize) -> [u8; 16] {
    let quarter = i / 2 % 4;
    sixteen(packed, i / 8 * 2 + i % 2).map(|byte| byte >> (2 * quarter) & 3)
}

/// One bit of 256 codes: byte i holds that of elements i, i + 32 …
#[inline(always)]
pub(super) fn pack_bits(codes: &[u8; 256], shift: u32) -> [u8; 32] {
    std::array::from_fn(|i| {
        let bit = |group: usize| (codes[i + 32 * group] >> shift & 1) << group;
        (0..8).map(bit).fold(0, |byte, bit| byte | bit)
    })
}

#[inline(always)]
pub(super) fn add_bits(codes: &mut [u8; 256], packed: &[u8; 32], shift: u32) {
    for (group, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for (code, byte) in codes.iter_mut().zip(packed) {
            *code |= (byte >> group & 1) << shift;
        }
    }
}

/// The same of the sixteen elements from 16 · `i` on.
#[inline(always)]
pub(super) fn bit_sixteen(packed: &[u8; 32], i: usize) -> [u8; 16] {
    sixteen(packed, i % 2).map(|byte| byte >> (i / 2) & 1)
}

/// Four low bits: of every `2 · RUN` elements byte i holds i and i + RUN.
#[inline(always)]
pub(super) fn pack_low<const RUN: usize>(codes: &[u8; 256]) -> [u8; 128] {
    let mut out = [0u8; 128];
    for (codes, out) in codes
        .chunks_exact(2 * RUN)
        .zip(out.as_chunks_mut::<RUN>().0)
    {
        let (low, high) = codes.split_at(RUN);
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            *out = low & 15 | high << 4;
        }
    }
    out
}

#[inline(always)]
pub(super) fn unpack_low<const RUN: usize>(packed: &[u8; 128]) -> [u8; 256] {
    let mut codes = [0u8; 256];
    for (packed, codes) in packed
        .as_chunks::<RUN>()
        .0
        .iter()
        .zip(codes.chunks_exact_mut(2 * RUN))
    {
        // Two loops: one that writes both halves is not vectorized.
        let (low, high) = codes.split_at_mut(RUN);
        for (code, byte) in low.iter_mut().zip(packed) {
            *code = byte & 15;
        }
        for (code, byte) in high.iter_mut().zip(packed) {
            *code = byte >> 4;
        }
    }
    codes
}

/// The same of the sixteen elements from 16 · `i` on.
#[inline(always)]
pub(super) fn low_sixteen<const RUN: usize>(packed: &[u8; 128], i: usize) -> [u8; 16] {
    let each = RUN / 16;
    let (run, high) = (i / (2 * each), i / each % 2);
    sixteen(packed, run * each + i % each).map(|byte| byte >> (4 * high) & 15)
}

/// Bytes from 16 · `i` on.
#[inline(always)]
fn sixteen(bytes: &[u8], i: usize) -> [u8; 16] {
    bytes.as_chunks().0[i]
}

/// The bits of both.
#[inline(always)]
pub(super) fn either(a: [u8; 16], b: [u8; 16]) -> [u8; 16] {
    std::array::from_fn(|i| a[i] | b[i])
}

/// 6-bit scales and 6-bit minima of eight sub-blocks in twelve bytes.
#[inline(always)]
pub(super) fn pack_pairs(l: [u8; 8], k: [u8; 8]) -> [u8; 12] {
    std::array::from_fn(|i| match i {
        0..4 => l[i] | l[i + 4] >> 4 << 6,
        4..8 => k[i - 4] | k[i] >> 4 << 6,
        _ => l[i - 4] & 15 | (k[i - 4] & 15) << 4,
    })
}

/// All l, then all k.
#[inline(always)]
pub(super) fn unpack_pairs(packed: &[u8; 12]) -> [u8; 16] {
    // Four at a time, a byte each.
    let (words, _) = packed.as_chunks::<4>();
    let [a, b, c] = [words[0], words[1], words[2]].map(u32::from_le_bytes);
    let six = |v: u32| (v & 0x3f3f_3f3f).to_le_bytes();
    let four_and_two =
        |low: u32, high: u32| (low & 0x0f0f_0f0f | (high >> 6 & 0x0303_0303) << 4).to_le_bytes();
    let fours = [six(a), four_and_two(c, a), six(b), four_and_two(c >> 4, b)];
    let mut pairs = [0u8; 16];
    pairs.copy_from_slice(fours.as_flattened());
    pairs
}
