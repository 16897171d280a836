//! ggml's iq4_nl and iq4_xs: 4-bit codes into a table of sixteen integers.
//!
//! | format | block | value |
//! |---|---|---|
//! | iq4_nl | 32 | table\[code\] · d |
//! | iq4_xs | 256 | table\[code\] · d · (l − 32), a 6-bit l for 32 elements |

use std::sync::LazyLock;

use bytemuck::{Pod, Zeroable};

use super::ggml_blocks::{
    Block, Halves, blocks_of, nearest, pack_halves, sixteens, type_of, unpack_halves, widened,
};
use super::ggml_types::GgmlType;
use crate::simd::codebook::{Codebook, Search};
use crate::simd::columns::{self, Columns};
use crate::simd::sink::Sink;
use crate::simd::{Isa, LANES};

/// The value of each code.
pub const TABLE: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

static BOOK: LazyLock<Codebook> = LazyLock::new(|| Codebook::with_ties_up(&TABLE));

/// ggml weights errors by x² and tries the largest element at −134 … −120.
#[inline(always)]
fn rtn_scales<I: Isa>(isa: I, search: Search<I>, x: &[f32]) -> [f32; LANES] {
    let x = Columns::<32>::of(isa, x);
    let numerators = (-7..=7).map(|i| (i - 127) as f32);
    columns::table(
        isa,
        &x,
        &x.map(
            isa,
            #[inline(always)]
            |v| isa.mul(v, v),
        ),
        search,
        numerators,
    )
}

/// Equal weights, and the largest element at either end of the table.
#[inline(always)]
fn mse_scales<I: Isa>(isa: I, search: Search<I>, x: &[f32]) -> [f32; LANES] {
    let x = Columns::<32>::of(isa, x);
    let numerators = (0..32).flat_map(|i| [2 * i - 140, 126 - 2 * i]);
    let numerators = numerators.map(|n| n as f32);
    columns::table(isa, &x, &Columns::ones(), search, numerators)
}

/// The codes of x / d.
#[inline(always)]
fn codes<I: Isa>(isa: I, search: Search<I>, x: &[f32; 32], d: f32) -> [u8; 32] {
    let inverse = isa.splat(if d == 0.0 { 0.0 } else { 1.0 / d });
    let mut codes = [0u8; 32];
    search.ranks(
        x,
        0,
        &mut codes,
        #[inline(always)]
        |v| isa.mul(inverse, v),
    );
    codes
}

#[inline(always)]
fn decode_32<I: Isa>(isa: I, packed: &[u8; 16], d: f32, out: &mut impl Sink<I>) {
    let (table, d) = (isa.load(&TABLE), isa.splat(d));
    for codes in unpack_halves(packed) {
        out.push(isa.mul(d, isa.lookup(table, isa.load_u8(&codes))));
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Iq4Nl {
    pub(super) d: [u8; 2],
    pub(super) codes: [u8; 16],
}

impl Block for Iq4Nl {
    const TYPE: &'static GgmlType = type_of::<Iq4Nl>("iq4_nl");
    const ABOUT: &'static str = "ggml: 4-bit codes into a table, 4.5 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Iq4Nl], scales: &mut Halves) {
        let search = Search::new(isa, &BOOK);
        for (x, out) in sixteens(x, out) {
            let found = rtn_scales(isa, search, x);
            for ((x, block), d) in blocks_of(x, out).zip(found) {
                block.d = scales.store(d);
                block.codes = pack_halves(&codes(isa, search, x, d));
            }
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Iq4Nl], scales: &mut Halves) {
        let search = Search::new(isa, &BOOK);
        for (x, out) in sixteens(x, out) {
            let found = mse_scales(isa, search, x);
            for ((x, block), d) in blocks_of(x, out).zip(found) {
                block.d = scales.store(d);
                block.codes = pack_halves(&codes(isa, search, x, widened(block.d)));
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut impl Sink<I>) {
        decode_32(isa, &self.codes, isa.widen(self.d), out);
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Iq4Xs {
    pub(super) d: [u8; 2],
    /// Two high bits of each l, the first in the lowest.
    pub(super) scales_high: [u8; 2],
    /// Four low bits of each l, the first in the low half.
    pub(super) scales_low: [u8; 4],
    pub(super) codes: [u8; 128],
}

impl Iq4Xs {
    /// Scales of 32 elements each, as multiples of the largest over −32.
    #[inline(always)]
    fn fill<I: Isa>(
        &mut self,
        isa: I,
        search: Search<I>,
        x: &[f32; 256],
        found: &[f32],
        scales: &mut Halves,
        // What codes are divided by, from d and what is stored of it.
        divisor: impl Fn(f32, f32) -> f32,
    ) {
        scales.check(found);
        let mut largest = 0f32;
        for &scale in found {
            if scale.abs() > largest.abs() {
                largest = scale;
            }
        }
        let d = -largest / 32.0;
        self.d = scales.store(d);
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        let d = divisor(d, widened(self.d));
        let mut high = 0u16;
        let blocks = x
            .as_chunks::<32>()
            .0
            .iter()
            .zip(self.codes.as_chunks_mut().0);
        for (i, ((x, packed), scale)) in blocks.zip(found).enumerate() {
            let l = nearest(inverse * scale).clamp(-32, 31);
            *packed = pack_halves(&codes(isa, search, x, d * l as f32));
            let l = (l + 32) as u8;
            self.scales_low[i / 2] |= (l & 15) << (4 * (i % 2));
            high |= u16::from(l >> 4) << (2 * i);
        }
        self.scales_high = high.to_le_bytes();
    }

    /// What d is multiplied with for each 32 elements.
    #[inline(always)]
    pub(super) fn multiples(&self) -> [i32; 8] {
        let high = u16::from_le_bytes(self.scales_high);
        std::array::from_fn(|i| {
            let low = self.scales_low[i / 2] >> (4 * (i % 2)) & 15;
            (i32::from(low) | i32::from(high >> (2 * i) & 3) << 4) - 32
        })
    }
}

impl Block for Iq4Xs {
    const TYPE: &'static GgmlType = type_of::<Iq4Xs>("iq4_xs");
    const ABOUT: &'static str = "ggml: 4-bit codes into a table, 4.25 bits a weight";

    #[inline(always)]
    fn encode<I: Isa>(isa: I, x: &[f32], out: &mut [Iq4Xs], scales: &mut Halves) {
        let search = Search::new(isa, &BOOK);
        for (x, out) in x.chunks(512).zip(out.chunks_mut(2)) {
            let found = rtn_scales(isa, search, x);
            for ((x, block), found) in blocks_of(x, out).zip(found.chunks(8)) {
                block.fill(isa, search, x, found, scales, |d, _| d);
            }
        }
    }

    #[inline(always)]
    fn search<I: Isa>(isa: I, x: &[f32], out: &mut [Iq4Xs], scales: &mut Halves) {
        let search = Search::new(isa, &BOOK);
        for (x, out) in x.chunks(512).zip(out.chunks_mut(2)) {
            let found = mse_scales(isa, search, x);
            for ((x, block), found) in blocks_of(x, out).zip(found.chunks(8)) {
                block.fill(isa, search, x, found, scales, |_, stored| stored);
            }
        }
    }

    #[inline(always)]
    fn decode<I: Isa>(&self, isa: I, out: &mut impl Sink<I>) {
        let d = isa.widen(self.d);
        let packed = self.codes.as_chunks().0;
        for (packed, l) in packed.iter().zip(self.multiples()) {
            decode_32(isa, packed, d * l as f32, out);
        }
    }
}
