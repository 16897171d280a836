//! Products of 8-bit activations with panels of packed weights.
//!
//! A panel holds [`ROWS`] rows of a weight, group after group. A group is a header
//! with a scale a row, and lines of [`LINE`] bytes: four consecutive columns of
//! every row, or eight in half bytes, the first four in the low halves. So one
//! stream runs through a panel, and a line meets the same four activations in all
//! lanes.
//!
//! A weight is `scale · (step − zero) + low`, a step being a byte: the code itself
//! or what a table says of it. With activations `x = s · c` the products of a group
//! add up to `s · scale · Σc·(step − zero) + low · s·Σc`. The sum of integers is
//! exact and each group adds one fused term, in their order: the same bits on every
//! level.

// Indices say which register: loops over them are unrolled.
#![allow(clippy::needless_range_loop)]

use super::dots::{BYTES, Dots, DotsOp};
use super::memory::prefetch;
use super::stats::absmax;
use super::{Isa, LANES, Op};
use crate::method::mse::ROUND;

/// Rows of a panel.
pub const ROWS: usize = 2 * LANES;
/// Bytes of a line: four a row.
pub const LINE: usize = 2 * BYTES;
/// Bytes from a line to the one that is asked for early, as memory's own
/// prefetchers are late where a row of a matrix is short.
const AHEAD: usize = 2048;

/// How a scale is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scales {
    F16,
    F32,
}

/// What a group adds to its steps' values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Low {
    Nothing,
    /// `−scale · zero`, a byte for `zero` in the header.
    Zeros,
    /// A number stored as scales are.
    Biases,
}

/// How a panel lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Form {
    pub groups: usize,
    /// Fours of columns in a group: even.
    pub quads: usize,
    /// Two codes a byte.
    pub halves: bool,
    pub scales: Scales,
    pub low: Low,
}

impl Form {
    /// Bytes of one number for each row.
    pub fn numbers(&self) -> usize {
        match self.scales {
            Scales::F16 => 2 * ROWS,
            Scales::F32 => 4 * ROWS,
        }
    }

    /// Bytes of a group's header.
    pub fn header(&self) -> usize {
        let low = match self.low {
            Low::Nothing => 0,
            Low::Zeros => ROWS,
            Low::Biases => self.numbers(),
        };
        self.numbers() + low
    }

    /// Bytes of a group's lines.
    pub fn lines(&self) -> usize {
        self.quads * LINE / if self.halves { 2 } else { 1 }
    }

    /// Bytes of a group.
    pub fn group(&self) -> usize {
        self.header() + self.lines()
    }

    /// Bytes of a panel.
    pub fn panel(&self) -> usize {
        self.groups * self.group()
    }
}

/// What one group of one token's activations is multiplied by.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Number {
    pub scale: f32,
    /// scale · Σ codes.
    pub sum: f32,
    /// Σ codes.
    pub codes: i32,
    /// −zero · Σ codes: what sums of products begin with.
    pub start: i32,
}

/// `out[t] = x[t] · panelᵀ` for a tile of 1, 4, 8 or 12 tokens.
pub struct Multiply<'a> {
    pub form: &'a Form,
    /// The step of each code, where it is not the code.
    pub table: Option<&'a [u8; 16]>,
    pub panel: &'a [u8],
    /// `[groups, quads, tokens]` fours of codes.
    pub codes: &'a [[i8; 4]],
    /// `[groups, tokens]`.
    pub numbers: &'a [Number],
    /// One line a token.
    pub out: &'a mut [[[f32; LANES]; 2]],
}

/// What a byte of a line holds.
const STEP: u8 = 0;
const HALVES: u8 = 1;
const HALVES_OF_TABLE: u8 = 2;

impl DotsOp for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Dots>(self, isa: I) {
        match (self.form.halves, self.table.is_some()) {
            (false, _) => self.tiles::<I, STEP>(isa),
            (true, false) => self.tiles::<I, HALVES>(isa),
            (true, true) => self.tiles::<I, HALVES_OF_TABLE>(isa),
        }
    }
}

impl Multiply<'_> {
    #[inline(always)]
    fn tiles<I: Dots, const KIND: u8>(self, isa: I) {
        let wide = I::ACCUMULATORS >= 24;
        match self.out.len() {
            1 => self.tile::<I, 1, 1, 2, 2, KIND>(isa, 0, 0),
            4 if wide => self.tile::<I, 4, 4, 2, 2, KIND>(isa, 0, 0),
            8 if wide => self.tile::<I, 8, 8, 2, 1, KIND>(isa, 0, 0),
            // Bytes only: with more tokens halves are taken apart beforehand.
            12 if wide && KIND == STEP => self.tile::<I, 12, 12, 2, 1, STEP>(isa, 0, 0),
            4 => self.narrow::<I, 4, KIND>(isa),
            8 => self.narrow::<I, 8, KIND>(isa),
            12 if KIND == STEP => self.narrow::<I, 12, STEP>(isa),
            _ => unreachable!("tiles are of 1, 4, 8 or, of whole steps, 12 tokens"),
        }
    }

    /// Where registers are few.
    #[inline(always)]
    fn narrow<I: Dots, const T: usize, const KIND: u8>(self, isa: I) {
        for token in (0..T).step_by(4) {
            for vector in 0..2 {
                let part = Multiply {
                    out: &mut *self.out,
                    ..self
                };
                part.tile::<I, T, 4, 1, 1, KIND>(isa, token, vector);
            }
        }
    }

    /// Of `T` tokens `R`, and `V` vectors of rows, in `S` sums each that take
    /// turns, for one addition waits for the last.
    #[inline(always)]
    fn tile<
        I: Dots,
        const T: usize,
        const R: usize,
        const V: usize,
        const S: usize,
        const KIND: u8,
    >(
        self,
        isa: I,
        token: usize,
        vector: usize,
    ) {
        let form = self.form;
        let table = isa.load_table(self.table.unwrap_or(&[0; 16]));
        let out = &mut self.out[token..token + R];
        for out in &mut *out {
            out[vector..vector + V].fill([0.0; LANES]);
        }
        let (x, _) = self.codes.as_chunks::<T>();
        let (numbers, _) = self.numbers.as_chunks::<T>();
        let groups = self.panel.chunks_exact(form.group());
        let x = x.chunks_exact(form.quads);
        for ((group, x), numbers) in groups.zip(x).zip(numbers) {
            let (header, lines) = group.split_at(form.header());
            let (lines, _) = lines.as_chunks::<LINE>();
            let numbers = &numbers[token..token + R];
            let mut sums = [[[isa.splat_u(0); V]; R]; S];
            for (sums, number) in sums[0].iter_mut().zip(numbers) {
                *sums = [isa.splat_u((number.start + I::LESS * number.codes) as u32); V];
            }
            if KIND == STEP {
                let (turns, rest) = lines.as_chunks::<S>();
                let (x, x_rest) = x.as_chunks::<S>();
                for (lines, x) in turns.iter().zip(x) {
                    for s in 0..S {
                        let w = load_line::<I, V>(isa, &lines[s][vector * BYTES..], R <= 8);
                        add::<I, R, V>(isa, w, &x[s][token..], &mut sums[s]);
                    }
                }
                for (line, x) in rest.iter().zip(x_rest) {
                    let w = load_line::<I, V>(isa, &line[vector * BYTES..], R <= 8);
                    add::<I, R, V>(isa, w, &x[token..], &mut sums[0]);
                }
            } else {
                let (x, _) = x.as_chunks::<2>();
                for (line, x) in lines.iter().zip(x) {
                    let w = load_line::<I, V>(isa, &line[vector * BYTES..], true);
                    let (mut low, mut high) = (w, w);
                    for v in 0..V {
                        low[v] = isa.low_halves(w[v]);
                        high[v] = isa.high_halves(w[v]);
                        if KIND == HALVES_OF_TABLE {
                            low[v] = isa.lookup_bytes(table, low[v]);
                            high[v] = isa.lookup_bytes(table, high[v]);
                        }
                    }
                    add::<I, R, V>(isa, low, &x[0][token..], &mut sums[0]);
                    add::<I, R, V>(isa, high, &x[1][token..], &mut sums[1 % S]);
                }
            }
            for s in 1..S {
                for r in 0..R {
                    for v in 0..V {
                        sums[0][r][v] = isa.add_u(sums[0][r][v], sums[s][r][v]);
                    }
                }
            }
            let header = Header {
                form,
                bytes: header,
                vector,
            };
            let scales = header.scales::<I, V>(isa);
            let lows = header.lows::<I, V>(isa, scales);
            // Two loops without a condition in them: only then are both unrolled, and
            // the sums stay in registers.
            for r in 0..R {
                let scale = isa.splat(numbers[r].scale);
                for v in 0..V {
                    let by = isa.mul(scales[v], scale);
                    let out = &mut out[r][vector + v];
                    isa.store(
                        isa.fused(by, isa.int_to_float(sums[0][r][v]), isa.load(out)),
                        out,
                    );
                }
            }
            if let Some(lows) = lows {
                for r in 0..R {
                    let sum = isa.splat(numbers[r].sum);
                    for v in 0..V {
                        let out = &mut out[r][vector + v];
                        isa.store(isa.fused(lows[v], sum, isa.load(out)), out);
                    }
                }
            }
        }
    }
}

/// The numbers of a group's rows, from one vector on.
struct Header<'a> {
    form: &'a Form,
    bytes: &'a [u8],
    vector: usize,
}

impl Header<'_> {
    #[inline(always)]
    fn numbers<I: Dots, const V: usize>(&self, isa: I, bytes: &[u8]) -> [I::F; V] {
        let mut numbers = [isa.splat(0.0); V];
        match self.form.scales {
            Scales::F16 => {
                let halves = &bytes.as_chunks().0[self.vector..self.vector + V];
                for v in 0..V {
                    numbers[v] = isa.load_f16(&halves[v]);
                }
            }
            Scales::F32 => {
                let words = &bytes.as_chunks().0[self.vector..self.vector + V];
                for v in 0..V {
                    numbers[v] = isa.floats(isa.load_u32(&words[v]));
                }
            }
        }
        numbers
    }

    #[inline(always)]
    fn scales<I: Dots, const V: usize>(&self, isa: I) -> [I::F; V] {
        self.numbers(isa, &self.bytes[..self.form.numbers()])
    }

    /// What is added to the values of steps.
    #[inline(always)]
    fn lows<I: Dots, const V: usize>(&self, isa: I, scales: [I::F; V]) -> Option<[I::F; V]> {
        let bytes = &self.bytes[self.form.numbers()..];
        match self.form.low {
            Low::Nothing => None,
            Low::Zeros => {
                let mut lows = scales;
                let zeros = &bytes.as_chunks().0[self.vector..self.vector + V];
                for v in 0..V {
                    let zeros = isa.int_to_float(isa.load_u8(&zeros[v]));
                    lows[v] = isa.sub(isa.splat(0.0), isa.mul(scales[v], zeros));
                }
                Some(lows)
            }
            Low::Biases => Some(self.numbers(isa, bytes)),
        }
    }
}

/// The vectors of a line, and those that come later asked for.
#[inline(always)]
fn load_line<I: Dots, const V: usize>(isa: I, line: &[u8], early: bool) -> [I::B; V] {
    let vectors = &line.as_chunks::<BYTES>().0[..V];
    let mut w = [isa.load_bytes(&vectors[0]); V];
    for v in 0..V {
        w[v] = isa.load_bytes(&vectors[v]);
        if early {
            prefetch(vectors[v].as_ptr().wrapping_add(AHEAD), BYTES);
        }
    }
    w
}

/// Adds products with four activations of each token.
#[inline(always)]
fn add<I: Dots, const R: usize, const V: usize>(
    isa: I,
    w: [I::B; V],
    x: &[[i8; 4]],
    sums: &mut [[I::U; V]; R],
) {
    let x = &x[..R];
    for r in 0..R {
        for v in 0..V {
            sums[r][v] = isa.dot(sums[r][v], w[v], x[r]);
        }
    }
}

/// A panel of half bytes as one of whole steps.
pub struct Expand<'a> {
    pub form: &'a Form,
    pub table: Option<&'a [u8; 16]>,
    pub panel: &'a [u8],
    pub out: &'a mut [u8],
}

impl DotsOp for Expand<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Dots>(self, isa: I) {
        let whole = Form {
            halves: false,
            ..*self.form
        };
        let table = self.table.map(|table| isa.load_table(table));
        let groups = self.panel.chunks_exact(self.form.group());
        for (group, out) in groups.zip(self.out.chunks_exact_mut(whole.group())) {
            let (header, lines) = group.split_at(self.form.header());
            let (out_header, out) = out.split_at_mut(header.len());
            out_header.copy_from_slice(header);
            let (out, _) = out.as_chunks_mut::<{ 2 * LINE }>();
            for (line, out) in lines.as_chunks::<LINE>().0.iter().zip(out) {
                let (low, high) = out.split_at_mut(LINE);
                let (low, _) = low.as_chunks_mut::<BYTES>();
                let (high, _) = high.as_chunks_mut::<BYTES>();
                for ((w, low), high) in line.as_chunks().0.iter().zip(low).zip(high) {
                    let w = isa.load_bytes(w);
                    let mut halves = [isa.low_halves(w), isa.high_halves(w)];
                    if let Some(table) = table {
                        halves = [
                            isa.lookup_bytes(table, halves[0]),
                            isa.lookup_bytes(table, halves[1]),
                        ];
                    }
                    isa.store_bytes(halves[0], low);
                    isa.store_bytes(halves[1], high);
                }
            }
        }
    }
}

/// Rounds activations to −127…127 steps, as signed bytes: the length of a step, and
/// the sum of all codes. A NaN or infinity makes the step NaN.
pub struct RoundToBytes<'a> {
    pub x: &'a [f32],
    pub out: &'a mut [u8],
}

impl Op for RoundToBytes<'_> {
    type Output = (f32, i32);

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> (f32, i32) {
        let scale = absmax(isa, self.x) / 127.0;
        if !scale.is_finite() || scale == 0.0 {
            self.out.fill(0);
            return (if scale == 0.0 { 0.0 } else { f32::NAN }, 0);
        }
        let by = isa.splat(scale);
        let (low, high) = (isa.splat(-127.0), isa.splat(127.0));
        let round = isa.splat(ROUND);
        let less = isa.splat_u(ROUND.to_bits());
        let mut sum = isa.splat_u(0);
        let (chunks, tail) = self.x.as_chunks::<LANES>();
        let (outs, out_tail) = self.out.as_chunks_mut::<LANES>();
        for (x, out) in chunks.iter().zip(outs) {
            let steps = isa.min(isa.max(isa.div(isa.load(x), by), low), high);
            let codes = isa.sub_u(isa.bits(isa.add(steps, round)), less);
            sum = isa.add_u(sum, codes);
            isa.store_u8(codes, out);
        }
        if !tail.is_empty() {
            let x = isa.load_part(tail, 0.0);
            let steps = isa.min(isa.max(isa.div(x, by), low), high);
            let codes = isa.sub_u(isa.bits(isa.add(steps, round)), less);
            sum = isa.add_u(sum, codes);
            let mut lanes = [0u8; LANES];
            isa.store_u8(codes, &mut lanes);
            out_tail.copy_from_slice(&lanes[..tail.len()]);
        }
        let mut lanes = [0u32; LANES];
        isa.store_u(sum, &mut lanes);
        (
            scale,
            lanes
                .into_iter()
                .fold(0i32, |sum, v| sum.wrapping_add(v as i32)),
        )
    }
}
