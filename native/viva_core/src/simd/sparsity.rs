//! 2:4 sparsity: which two of four weights stay, and four weights from the two.
//!
//! A group's mask is four bits, bit j for its weight j, two of them set.

use super::{Isa, LANES, Op};

/// Weights of one group.
pub const GROUP: usize = 4;

/// The mask of the two greatest of four keys. Of equals the later ones stay;
/// but after a first weight that is greater than all others it is the last but
/// one of the equals: the order in which C++'s `nth_element`, and so
/// `torch.topk` on a CPU, leaves four numbers.
#[inline(always)]
pub fn pick([a, b, c, d]: [i32; GROUP]) -> u8 {
    let over = |later: i32, earlier: i32| u8::from(later >= earlier);
    let (ba, ca, da) = (over(b, a), over(c, a), over(d, a));
    let (cb, db, dc) = (over(c, b), over(d, b), over(d, c));
    // How many stand before each.
    let ranks = [
        ba + ca + da,
        1 - ba + cb + db,
        2 - ca - cb + dc,
        3 - da - db - dc,
    ];
    let bit = |i: usize| u8::from(ranks[i] < 2) << i;
    let mask = bit(0) | bit(1) | bit(2) | bit(3);
    let second = |i: usize| ranks[0] == 0 && ranks[i] == 1;
    if second(3) && c == d {
        0b0101
    } else if second(3) && b == d || second(2) && b == c {
        0b0011
    } else {
        mask
    }
}

/// The weights of a mask, the lower first. Only masks of two bits have them.
pub const PLACES: [(usize, usize); 16] = {
    let mut places = [(0, 0); 16];
    let mut second = 1;
    while second < GROUP {
        let mut first = 0;
        while first < second {
            places[1 << first | 1 << second] = (first, second);
            first += 1;
        }
        second += 1;
    }
    places
};

/// The mask of each group by the magnitudes of `scores`, one a byte.
pub struct Pick<'a> {
    pub scores: &'a [f32],
    pub masks: &'a mut [u8],
}

impl Op for Pick<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let (groups, _) = self.scores.as_chunks::<GROUP>();
        for (group, mask) in groups.iter().zip(self.masks) {
            // Magnitudes of floats order like their bits.
            *mask = pick(group.map(|v| (v.to_bits() & 0x7fff_ffff) as i32));
        }
    }
}

/// The mask of group `i` of a row, which starts on a byte.
#[inline(always)]
pub fn mask(row: &[u8], i: usize) -> u8 {
    row[i / 2] >> (4 * (i % 2)) & 0xf
}

/// For each mask, where its lanes are in a vector that begins with the group's
/// two weights; 8 and past it there are zeros.
const SOURCES: [u32; 16] = {
    let mut sources = [0x0808_0808u32; 16];
    let mut mask = 0;
    while mask < 16 {
        let (first, second) = PLACES[mask];
        if second > 0 {
            sources[mask] &= !(0xff << (8 * first)) & !(0xff << (8 * second));
            sources[mask] |= 1 << (8 * second);
        }
        mask += 1;
    }
    sources
};

/// The weights of whole groups of a row, from group `first` on: those that
/// stay, and zeros.
#[inline(always)]
pub fn expand<I: Isa>(isa: I, kept: &[f32], row: &[u8], first: usize, out: &mut [f32]) {
    const GROUPS: usize = LANES / GROUP;
    let runs = out.chunks_mut(LANES).zip(kept.chunks(LANES / 2));
    for (i, (out, kept)) in runs.enumerate() {
        let mut sources = [0u8; LANES];
        let groups = sources.as_chunks_mut::<GROUP>().0.iter_mut();
        for (g, source) in groups.take(out.len() / GROUP).enumerate() {
            let mask = mask(row, first + i * GROUPS + g);
            // Each group's pair lies two lanes after the one before.
            let lanes = SOURCES[usize::from(mask)] + 0x0202_0202 * g as u32;
            *source = lanes.to_le_bytes();
        }
        let weights = isa.lookup(isa.load_part(kept, 0.0), isa.load_u8(&sources));
        match <&mut [f32; LANES]>::try_from(&mut *out) {
            Ok(out) => isa.store(weights, out),
            Err(_) => isa.store_part(weights, out),
        }
    }
}
