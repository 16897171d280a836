//! Two 4-bit codes a byte.

use super::{Isa, Op, dispatch};

/// Which element of a pair lies in the low four bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    LowFirst,
    HighFirst,
}

/// Packs one code a byte into two codes a byte. An odd last code stands alone
/// with a zero beside it.
pub fn pack(order: Order, codes: &[u8], out: &mut [u8]) {
    dispatch(Pack { order, codes, out });
}

struct Pack<'a> {
    order: Order,
    codes: &'a [u8],
    out: &'a mut [u8],
}

impl Op for Pack<'_> {
    type Output = ();

    // Bytes in, bytes out: the compiler's own vectors do.
    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        pack_bytes(self.order, self.codes, self.out);
    }
}

#[inline(always)]
fn pack_bytes(order: Order, codes: &[u8], out: &mut [u8]) {
    let (pairs, tail) = codes.as_chunks::<2>();
    // As 16-bit numbers, which narrow in one instruction for many.
    let words = pairs.iter().map(|&pair| u16::from_le_bytes(pair));
    match order {
        Order::LowFirst => {
            for (o, w) in out.iter_mut().zip(words) {
                *o = (w | w >> 4) as u8;
            }
        }
        Order::HighFirst => {
            for (o, w) in out.iter_mut().zip(words) {
                *o = (w << 4 | w >> 8) as u8;
            }
        }
    }
    if let [last] = tail {
        out[pairs.len()] = match order {
            Order::LowFirst => *last,
            Order::HighFirst => last << 4,
        };
    }
}

/// The code of element `i`.
#[inline(always)]
pub fn get(order: Order, packed: &[u8], i: usize) -> u8 {
    let byte = packed[i / 2];
    let high = (i % 2 == 1) == (order == Order::LowFirst);
    if high { byte >> 4 } else { byte & 15 }
}

/// Unpacks elements `start .. start + out.len()` to one code a byte.
#[inline(always)]
pub fn unpack(order: Order, packed: &[u8], start: usize, out: &mut [u8]) {
    if out.is_empty() {
        return;
    }
    // A start in the middle of a byte is brought to a byte's edge first.
    let head = start % 2;
    if head == 1 {
        out[0] = get(order, packed, start);
    }
    let first = (start + head) / 2;
    let (pairs, tail) = out[head..].as_chunks_mut::<2>();
    let bytes = &packed[first..first + pairs.len()];
    match order {
        Order::LowFirst => {
            for (pair, byte) in pairs.iter_mut().zip(bytes) {
                *pair = [byte & 15, byte >> 4];
            }
        }
        Order::HighFirst => {
            for (pair, byte) in pairs.iter_mut().zip(bytes) {
                *pair = [byte >> 4, byte & 15];
            }
        }
    }
    let done = first + pairs.len();
    if let [last] = tail {
        *last = get(order, packed, done * 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_and_unpacks_every_window() {
        let codes: Vec<u8> = (0..37).map(|i| (i * 7 % 16) as u8).collect();
        for order in [Order::LowFirst, Order::HighFirst] {
            for n in 0..codes.len() {
                let mut packed = vec![0; n.div_ceil(2)];
                pack(order, &codes[..n], &mut packed);
                for start in 0..n {
                    for end in start..=n {
                        let mut out = vec![0xff; end - start];
                        unpack(order, &packed, start, &mut out);
                        assert_eq!(out, &codes[start..end], "{order:?} {start}..{end} of {n}");
                    }
                }
            }
        }
        let mut one = [0];
        pack(Order::LowFirst, &[3, 9], &mut one);
        assert_eq!(one, [0x93]);
        pack(Order::HighFirst, &[3, 9], &mut one);
        assert_eq!(one, [0x39]);
    }
}
