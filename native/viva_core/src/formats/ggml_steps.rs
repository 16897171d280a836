//! ggml's blocks as integers of a byte, for products of integers.

use super::ggml_blocks::{Block, unpack_halves, widened};
use super::iq4::{self, Iq4Nl, Iq4Xs};
use super::k_pack::{add_bits, unpack_low, unpack_pairs, unpack_quarters};
use super::k_quants::{Pairs, Q2K, Q3K, Q4K, Q5K, Q6K};
use super::q_blocks::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, add_fifth};
use crate::steps::{Lows, StepForm};

/// A block that can be read as steps.
pub trait StepBlock {
    const FORM: StepForm;

    /// The codes, in their order.
    fn codes(&self, out: &mut [u8]);

    /// Scales and biases of the sub-blocks, in units where these share them.
    fn numbers(&self, scales: &mut [f32], lows: &mut [f32]);

    /// The units of scales and biases.
    fn units(&self) -> [f32; 2] {
        [1.0; 2]
    }
}

const fn form(block: usize, halves: bool, zero: u8, lows: Lows) -> StepForm {
    StepForm {
        block,
        halves,
        table: None,
        zero,
        lows,
        shared: 1,
    }
}

/// Sub-blocks of 256 weights, whose scales are whole numbers.
const fn in_units(form: StepForm) -> StepForm {
    StepForm {
        shared: 256 / form.block,
        ..form
    }
}

/// Two runs of sixteen.
fn put(out: &mut [u8], halves: [[u8; 16]; 2]) {
    out.copy_from_slice(halves.as_flattened());
}

impl StepBlock for Q8_0 {
    const FORM: StepForm = form(32, false, 128, Lows::Nothing);

    fn codes(&self, out: &mut [u8]) {
        for (out, code) in out.iter_mut().zip(self.codes) {
            *out = code ^ 128;
        }
    }

    fn numbers(&self, scales: &mut [f32], _lows: &mut [f32]) {
        scales[0] = widened(self.d);
    }
}

impl StepBlock for Q4_0 {
    const FORM: StepForm = form(32, true, 8, Lows::Nothing);

    fn codes(&self, out: &mut [u8]) {
        put(out, unpack_halves(&self.codes));
    }

    fn numbers(&self, scales: &mut [f32], _lows: &mut [f32]) {
        scales[0] = widened(self.d);
    }
}

impl StepBlock for Q5_0 {
    const FORM: StepForm = form(32, false, 16, Lows::Nothing);

    fn codes(&self, out: &mut [u8]) {
        put(out, add_fifth(unpack_halves(&self.codes), self.high));
    }

    fn numbers(&self, scales: &mut [f32], _lows: &mut [f32]) {
        scales[0] = widened(self.d);
    }
}

impl StepBlock for Q4_1 {
    const FORM: StepForm = form(32, true, 0, Lows::Biases);

    fn codes(&self, out: &mut [u8]) {
        put(out, unpack_halves(&self.codes));
    }

    fn numbers(&self, scales: &mut [f32], lows: &mut [f32]) {
        (scales[0], lows[0]) = (widened(self.d), widened(self.m));
    }
}

impl StepBlock for Q5_1 {
    const FORM: StepForm = form(32, false, 0, Lows::Biases);

    fn codes(&self, out: &mut [u8]) {
        put(out, add_fifth(unpack_halves(&self.codes), self.high));
    }

    fn numbers(&self, scales: &mut [f32], lows: &mut [f32]) {
        (scales[0], lows[0]) = (widened(self.d), widened(self.m));
    }
}

impl StepBlock for Q6K {
    const FORM: StepForm = in_units(form(16, false, 32, Lows::Nothing));

    fn codes(&self, out: &mut [u8]) {
        out.copy_from_slice(&unpack_low::<64>(&self.low));
        for (code, high) in out.iter_mut().zip(unpack_quarters(&self.high, 4)) {
            *code |= high;
        }
    }

    fn numbers(&self, scales: &mut [f32], _lows: &mut [f32]) {
        for (scale, l) in scales.iter_mut().zip(self.scales) {
            *scale = f32::from(l as i8);
        }
    }

    fn units(&self) -> [f32; 2] {
        [widened(self.d), 1.0]
    }
}

/// Scales and minima of eight sub-blocks.
fn pairs(pairs: &Pairs, scales: &mut [f32], lows: &mut [f32]) {
    let integers = unpack_pairs(&pairs.packed).map(f32::from);
    scales.copy_from_slice(&integers[..8]);
    lows.copy_from_slice(&integers[8..]);
}

/// Minima are taken from the values of steps.
fn units(d: [u8; 2], m: [u8; 2]) -> [f32; 2] {
    [widened(d), -widened(m)]
}

impl StepBlock for Q5K {
    const FORM: StepForm = in_units(form(32, false, 0, Lows::Biases));

    fn codes(&self, out: &mut [u8]) {
        let mut codes = unpack_low::<32>(&self.low);
        add_bits(&mut codes, &self.high, 4);
        out.copy_from_slice(&codes);
    }

    fn numbers(&self, scales: &mut [f32], lows: &mut [f32]) {
        pairs(&self.scales, scales, lows);
    }

    fn units(&self) -> [f32; 2] {
        units(self.scales.d, self.scales.m)
    }
}

impl StepBlock for Q4K {
    const FORM: StepForm = in_units(form(32, true, 0, Lows::Biases));

    fn codes(&self, out: &mut [u8]) {
        out.copy_from_slice(&unpack_low::<32>(&self.codes));
    }

    fn numbers(&self, scales: &mut [f32], lows: &mut [f32]) {
        pairs(&self.scales, scales, lows);
    }

    fn units(&self) -> [f32; 2] {
        units(self.scales.d, self.scales.m)
    }
}

impl StepBlock for Q3K {
    const FORM: StepForm = in_units(form(16, true, 4, Lows::Nothing));

    fn codes(&self, out: &mut [u8]) {
        let mut codes = unpack_quarters(&self.low, 0);
        add_bits(&mut codes, &self.high, 2);
        out.copy_from_slice(&codes);
    }

    fn numbers(&self, scales: &mut [f32], _lows: &mut [f32]) {
        for (scale, l) in scales.iter_mut().zip(self.multiples()) {
            *scale = l as f32;
        }
    }

    fn units(&self) -> [f32; 2] {
        [widened(self.d), 1.0]
    }
}

impl StepBlock for Q2K {
    const FORM: StepForm = in_units(form(16, true, 0, Lows::Biases));

    fn codes(&self, out: &mut [u8]) {
        out.copy_from_slice(&unpack_quarters(&self.codes, 0));
    }

    fn numbers(&self, scales: &mut [f32], lows: &mut [f32]) {
        for (i, pair) in self.scales.into_iter().enumerate() {
            (scales[i], lows[i]) = (f32::from(pair & 15), f32::from(pair >> 4));
        }
    }

    fn units(&self) -> [f32; 2] {
        units(self.d, self.m)
    }
}

/// A table of integers from −127 to 113.
const fn of_table(block: usize) -> StepForm {
    let mut table = [0u8; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = (iq4::TABLE[i] as i32 + 128) as u8;
        i += 1;
    }
    StepForm {
        block,
        halves: true,
        table: Some(table),
        zero: 128,
        lows: Lows::Nothing,
        shared: 1,
    }
}

impl StepBlock for Iq4Nl {
    const FORM: StepForm = of_table(32);

    fn codes(&self, out: &mut [u8]) {
        put(out, unpack_halves(&self.codes));
    }

    fn numbers(&self, scales: &mut [f32], _lows: &mut [f32]) {
        scales[0] = widened(self.d);
    }
}

impl StepBlock for Iq4Xs {
    const FORM: StepForm = in_units(of_table(32));

    fn codes(&self, out: &mut [u8]) {
        let packed = self.codes.as_chunks().0;
        for (out, packed) in out.chunks_exact_mut(32).zip(packed) {
            put(out, unpack_halves(packed));
        }
    }

    fn numbers(&self, scales: &mut [f32], _lows: &mut [f32]) {
        for (scale, l) in scales.iter_mut().zip(self.multiples()) {
            *scale = l as f32;
        }
    }

    fn units(&self) -> [f32; 2] {
        [widened(self.d), 1.0]
    }
}

/// Rows of blocks.
pub(super) struct Rows<'a, B>(pub &'a [B]);

impl<B: Block> Rows<'_, B> {
    /// The blocks of a row of so many elements.
    fn row(&self, row: usize, len: usize) -> &[B] {
        let blocks = len / B::TYPE.block_len;
        &self.0[row * blocks..(row + 1) * blocks]
    }

    pub fn codes(&self, row: usize, out: &mut [u8]) {
        let blocks = self.row(row, out.len());
        for (block, out) in blocks.iter().zip(out.chunks_exact_mut(B::TYPE.block_len)) {
            block.codes(out);
        }
    }

    pub fn numbers(&self, row: usize, scales: &mut [f32], lows: &mut [f32]) {
        let each = B::TYPE.block_len / B::FORM.block;
        let blocks = self.row(row, scales.len() * B::FORM.block);
        let numbers = scales
            .chunks_exact_mut(each)
            .zip(lows.chunks_exact_mut(each));
        for (block, (scales, lows)) in blocks.iter().zip(numbers) {
            block.numbers(scales, lows);
        }
    }

    pub fn units(&self, row: usize, scales: &mut [f32], lows: &mut [f32]) {
        let blocks = self.row(row, scales.len() * B::TYPE.block_len);
        for ((block, scale), low) in blocks.iter().zip(scales).zip(lows) {
            [*scale, *low] = block.units();
        }
    }
}
