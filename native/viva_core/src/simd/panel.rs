//! Products of 8-bit activations with panels of packed weights.
//!
//! A panel holds 32 rows of a weight, group after group. A group is a header with a
//! scale a row, and lines of [`LINE`] bytes: four consecutive columns of every row, or
//! eight in half bytes, the first four in the low halves. Where groups share the units
//! of their scales, these come before the first of them. So one stream runs through a
//! panel, and a line meets the same four activations in all lanes.
//!
//! A weight is `scale · (step − zero) + low`, a step being a byte: the code itself
//! or what a table says of it. With activations `x = s · c` the products of a group
//! add up to `s · scale · Σc·(step − zero) + low · s·Σc`. The sum of integers is
//! exact and each group adds one fused term, in their order: the same bits on every
//! level.

// Indices say which register: loops over them are unrolled.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::dots::{BYTES, Dots, DotsOp};
use super::form::{Form, LINE, Low, Numbers, Units};
use super::memory::{asks_for_lines, prefetch};
use super::stats::absmax;
use super::{Isa, LANES, Op};
use crate::method::mse::ROUND;

/// Bytes from a line to the one that is asked for early, with one token and with a few.
const AHEAD_OF_ONE: usize = 1024;
const AHEAD_OF_FEW: usize = 2048;

/// Fours of columns from which on a group is long: that lines are met once by all rows
/// is worth more than results in registers.
pub const LONG: usize = 32;

/// How far ahead tiles of so many tokens ask for lines. With a few tokens, memory's own
/// prefetchers fall behind; with more, lines come from a cache. With one, lines follow
/// each other at the rate of memory, and who keeps more of them on their way depends on
/// the machine.
const fn ahead(tokens: usize) -> usize {
    match tokens {
        4..=8 => AHEAD_OF_FEW,
        _ => 0,
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
    /// What is read after it, to be asked for along the way: nothing where memory's own
    /// prefetchers see to it.
    pub next: &'a [u8],
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
        let long = self.form.quads >= LONG;
        match self.out.len() {
            1 if asks_for_lines() => self.tile::<I, 1, 1, 2, 1, 2, KIND, AHEAD_OF_ONE>(isa, 0, 0),
            1 => self.tile::<I, 1, 1, 2, 1, 2, KIND, 0>(isa, 0, 0),
            4 if wide => self.tile::<I, 4, 4, 2, 1, 2, KIND, { ahead(4) }>(isa, 0, 0),
            8 if wide && long => self.tile::<I, 8, 8, 2, 1, 1, KIND, { ahead(8) }>(isa, 0, 0),
            8 if wide => self.tile::<I, 8, 8, 1, 2, 1, KIND, { ahead(8) }>(isa, 0, 0),
            12 if wide && KIND == STEP => {
                self.tile::<I, 12, 12, 2, 1, 1, STEP, { ahead(12) }>(isa, 0, 0)
            }
            4 => self.apart::<I, 4, 4, KIND>(isa),
            8 => self.apart::<I, 8, 4, KIND>(isa),
            12 if KIND == STEP => self.apart::<I, 12, 4, STEP>(isa),
            _ => unreachable!("tiles are of 1, 4, 8 or, of long groups of whole steps, 12 tokens"),
        }
    }

    /// One vector of rows after the other, of `R` tokens at a time.
    #[inline(always)]
    fn apart<I: Dots, const T: usize, const R: usize, const KIND: u8>(self, isa: I) {
        for token in (0..T).step_by(R) {
            for vector in 0..2 {
                let part = Multiply {
                    out: &mut *self.out,
                    ..self
                };
                part.tile::<I, T, R, 1, 1, 1, KIND, { ahead(4) }>(isa, token, vector);
            }
        }
    }

    /// Of `T` tokens `R`, from that one on, and from that vector of rows on `V` at a
    /// time, `P` times for each group. Products are added up in `S` sums that take turns,
    /// for one addition waits for the last. Registers hold the results and the sums of
    /// one time; where groups are long the results may be elsewhere.
    #[inline(always)]
    fn tile<
        I: Dots,
        const T: usize,
        const R: usize,
        const V: usize,
        const P: usize,
        const S: usize,
        const KIND: u8,
        const AHEAD: usize,
    >(
        self,
        isa: I,
        token: usize,
        vector: usize,
    ) {
        let form = self.form;
        let table = isa.load_table(self.table.unwrap_or(&[0; 16]));
        let mut results = [[[isa.splat(0.0); V]; R]; P];
        let (x, _) = self.codes.as_chunks::<T>();
        let (numbers, _) = self.numbers.as_chunks::<T>();
        let shares = self.panel.chunks_exact(form.share());
        let mut next = self
            .next
            .chunks(self.next.len().div_ceil(form.groups).max(1));
        let x = x.chunks_exact(form.shared * form.quads);
        for ((share, x), numbers) in shares.zip(x).zip(numbers.chunks_exact(form.shared)) {
            let (units, groups) = share.split_at(form.units());
            let mut of = [form.load_units::<I, V>(isa, units, vector); P];
            if P == 2 {
                of[1] = form.load_units(isa, units, vector + V);
            }
            let groups = groups.chunks_exact(form.group());
            for ((group, x), numbers) in groups.zip(x.chunks_exact(form.quads)).zip(numbers) {
                let numbers = &numbers[token..token + R];
                if let Some(next) = next.next() {
                    prefetch(next.as_ptr(), next.len());
                }
                // Not a loop, for the results to stay in registers.
                let group = Group {
                    form,
                    table,
                    group,
                    x,
                    numbers,
                    token,
                };
                group.add_to::<V, S, KIND, AHEAD>(isa, of[0], vector, &mut results[0]);
                if P == 2 {
                    group.add_to::<V, S, KIND, AHEAD>(isa, of[1], vector + V, &mut results[1]);
                }
            }
        }
        let out = &mut self.out[token..token + R];
        for r in 0..R {
            for p in 0..P {
                for v in 0..V {
                    isa.store(results[p][r][v], &mut out[r][vector + p * V + v]);
                }
            }
        }
    }
}

/// One group's lines, and `R` of the `T` tokens that meet them.
struct Group<'a, I: Dots, const T: usize, const R: usize> {
    form: &'a Form,
    table: I::B,
    group: &'a [u8],
    x: &'a [[[i8; 4]; T]],
    numbers: &'a [Number],
    token: usize,
}

impl<I: Dots, const T: usize, const R: usize> Group<'_, I, T, R> {
    /// Adds what the group gives those vectors of rows.
    #[inline(always)]
    fn add_to<const V: usize, const S: usize, const KIND: u8, const AHEAD: usize>(
        &self,
        isa: I,
        units: Units<I::F, V>,
        vector: usize,
        results: &mut [[I::F; V]; R],
    ) {
        let (header, lines) = self.group.split_at(self.form.header());
        if AHEAD > 0 && vector == 0 {
            prefetch(header.as_ptr().wrapping_add(AHEAD), header.len());
        }
        let sums = self.sums::<V, S, KIND, AHEAD>(isa, lines, vector);
        let of = self.form.load_numbers(isa, units, header, vector);
        if self.form.low == Low::Nothing {
            add_up::<I, R, V, false>(isa, sums, of, self.numbers, results);
        } else {
            add_up::<I, R, V, true>(isa, sums, of, self.numbers, results);
        }
    }

    /// The sums of its products.
    #[inline(always)]
    fn sums<const V: usize, const S: usize, const KIND: u8, const AHEAD: usize>(
        &self,
        isa: I,
        lines: &[u8],
        vector: usize,
    ) -> [[I::U; V]; R] {
        let (lines, _) = lines.as_chunks::<LINE>();
        let mut sums = [[[isa.splat_u(0); V]; R]; S];
        for (sums, number) in sums[0].iter_mut().zip(self.numbers) {
            *sums = [isa.splat_u((number.start + I::LESS * number.codes) as u32); V];
        }
        let mut ahead = Ahead::<AHEAD>::of(lines, vector);
        if KIND == STEP {
            let (turns, rest) = lines.as_chunks::<S>();
            let (x, x_rest) = self.x.as_chunks::<S>();
            for (lines, x) in turns.iter().zip(x) {
                for s in 0..S {
                    let w = load_line::<I, V>(isa, &lines[s], vector);
                    ahead.ask();
                    add::<I, R, V>(isa, w, &x[s][self.token..], &mut sums[s]);
                    if V == 2 {
                        ahead.ask();
                    }
                }
            }
            for (line, x) in rest.iter().zip(x_rest) {
                let w = load_line::<I, V>(isa, line, vector);
                add::<I, R, V>(isa, w, &x[self.token..], &mut sums[0]);
            }
        } else {
            let (x, _) = self.x.as_chunks::<2>();
            // Two lines a turn, where there are as many: a turn costs as much as a product.
            let (turns, rest) = lines.as_chunks::<2>();
            let (x, x_rest) = x.as_chunks::<2>();
            for (lines, x) in turns.iter().zip(x) {
                for i in 0..2 {
                    let x = [&x[i][0][self.token..], &x[i][1][self.token..]];
                    let w = load_line::<I, V>(isa, &lines[i], vector);
                    add_halves::<I, R, V, S, KIND, AHEAD>(
                        isa, self.table, w, x, &mut ahead, &mut sums,
                    );
                }
            }
            for (line, x) in rest.iter().zip(x_rest) {
                let x = [&x[0][self.token..], &x[1][self.token..]];
                let w = load_line::<I, V>(isa, line, vector);
                add_halves::<I, R, V, S, KIND, AHEAD>(isa, self.table, w, x, &mut ahead, &mut sums);
            }
        }
        for s in 1..S {
            for r in 0..R {
                for v in 0..V {
                    sums[0][r][v] = isa.add_u(sums[0][r][v], sums[s][r][v]);
                }
            }
        }
        sums[0]
    }
}

/// Adds a group's sums to the results. No condition in these loops: only then are they
/// unrolled, and sums and results stay in registers.
#[inline(always)]
fn add_up<I: Dots, const R: usize, const V: usize, const LOWS: bool>(
    isa: I,
    sums: [[I::U; V]; R],
    of: Numbers<I::F, V>,
    numbers: &[Number],
    results: &mut [[I::F; V]; R],
) {
    for r in 0..R {
        let (scale, codes) = (isa.splat(numbers[r].scale), isa.splat(numbers[r].sum));
        for v in 0..V {
            let by = isa.mul(of.scales[v], scale);
            let mut sum = isa.fused(by, isa.int_to_float(sums[r][v]), results[r][v]);
            if LOWS {
                sum = isa.fused(of.lows[v], codes, sum);
            }
            results[r][v] = sum;
        }
    }
}

/// Lines that come `AHEAD` bytes later, asked for half a line at a time: one after the
/// other as they lie, by those who meet one half of all lines first too, and never two at
/// once. Memory answers requests that are spread out sooner.
struct Ahead<const AHEAD: usize>(*const u8);

impl<const AHEAD: usize> Ahead<AHEAD> {
    #[inline(always)]
    fn of(lines: &[[u8; LINE]], vector: usize) -> Ahead<AHEAD> {
        Ahead((lines.as_ptr().cast::<u8>()).wrapping_add(AHEAD + vector * lines.len() * BYTES))
    }

    #[inline(always)]
    fn ask(&mut self) {
        if AHEAD > 0 {
            prefetch(self.0, BYTES);
            self.0 = self.0.wrapping_add(BYTES);
        }
    }
}

/// The vectors of a line from that one on.
#[inline(always)]
fn load_line<I: Dots, const V: usize>(isa: I, line: &[u8; LINE], vector: usize) -> [I::B; V] {
    let (vectors, _) = line.as_chunks::<BYTES>();
    let mut w = [isa.load_bytes(&vectors[vector]); V];
    for v in 1..V {
        w[v] = isa.load_bytes(&vectors[vector + v]);
    }
    w
}

/// Adds products with eight activations of each token.
#[inline(always)]
fn add_halves<
    I: Dots,
    const R: usize,
    const V: usize,
    const S: usize,
    const KIND: u8,
    const AHEAD: usize,
>(
    isa: I,
    table: I::B,
    w: [I::B; V],
    x: [&[[i8; 4]]; 2],
    ahead: &mut Ahead<AHEAD>,
    sums: &mut [[[I::U; V]; R]; S],
) {
    let (mut low, mut high) = (w, w);
    for v in 0..V {
        low[v] = isa.low_halves(w[v]);
        high[v] = isa.high_halves(w[v]);
        if KIND == HALVES_OF_TABLE {
            low[v] = isa.lookup_bytes(table, low[v]);
            high[v] = isa.lookup_bytes(table, high[v]);
        }
    }
    ahead.ask();
    // With one token the next line comes too soon for there to be time between the two.
    if V == 2 && R == 1 {
        ahead.ask();
    }
    add::<I, R, V>(isa, low, x[0], &mut sums[0]);
    if V == 2 && R > 1 {
        ahead.ask();
    }
    add::<I, R, V>(isa, high, x[1], &mut sums[1 % S]);
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

/// A panel as one of whole steps under ready scales and biases, as [`Form::apart`]
/// says.
pub struct Expand<'a> {
    pub form: &'a Form,
    pub table: Option<&'a [u8; 16]>,
    pub panel: &'a [u8],
    pub out: &'a mut [f32],
}

impl DotsOp for Expand<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Dots>(self, isa: I) {
        let (form, apart) = (self.form, self.form.apart());
        let table = self.table.map(|table| isa.load_table(table));
        let mut outs = self.out.chunks_exact_mut(apart.group() / size_of::<f32>());
        for share in self.panel.chunks_exact(form.share()) {
            let (units, groups) = share.split_at(form.units());
            let units = form.load_units::<I, 2>(isa, units, 0);
            for (group, out) in groups.chunks_exact(form.group()).zip(&mut outs) {
                let (header, lines) = group.split_at(form.header());
                let numbers = form.load_numbers(isa, units, header, 0);
                let (header, out) = out.split_at_mut(apart.header() / size_of::<f32>());
                let (header, _) = header.as_chunks_mut();
                for v in 0..2 {
                    isa.store(numbers.scales[v], &mut header[v]);
                    if form.low != Low::Nothing {
                        isa.store(numbers.lows[v], &mut header[2 + v]);
                    }
                }
                let out: &mut [u8] = bytemuck::cast_slice_mut(out);
                if form.halves {
                    take_apart(isa, table, lines, out);
                } else {
                    out.copy_from_slice(lines);
                }
            }
        }
    }
}

/// Lines of half bytes as twice as many of steps.
#[inline(always)]
fn take_apart<I: Dots>(isa: I, table: Option<I::B>, lines: &[u8], out: &mut [u8]) {
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

/// Rounds each group of a row of activations to −127…127 steps, as signed bytes: the
/// length of a step, and the sum of the group's codes. A NaN or infinity makes the step
/// NaN.
pub struct RoundToBytes<'a> {
    pub x: &'a [f32],
    /// The columns of each group.
    pub groups: &'a [Range<usize>],
    /// As many bytes for each group, of which the first are written.
    pub out: &'a mut [u8],
    pub steps: &'a mut [(f32, i32)],
}

impl Op for RoundToBytes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let outs = self
            .out
            .chunks_exact_mut(self.out.len() / self.groups.len());
        for ((columns, out), steps) in self.groups.iter().zip(outs).zip(self.steps) {
            let out = &mut out[..columns.len()];
            *steps = round_group(isa, &self.x[columns.clone()], out);
        }
    }
}

#[inline(always)]
fn round_group<I: Isa>(isa: I, x: &[f32], out: &mut [u8]) -> (f32, i32) {
    let scale = absmax(isa, x) / 127.0;
    if !scale.is_finite() || scale == 0.0 {
        out.fill(0);
        return (if scale == 0.0 { 0.0 } else { f32::NAN }, 0);
    }
    let by = isa.splat(scale);
    let (low, high) = (isa.splat(-127.0), isa.splat(127.0));
    let round = isa.splat(ROUND);
    let less = isa.splat_u(ROUND.to_bits());
    let mut sum = isa.splat_u(0);
    let (chunks, tail) = x.as_chunks::<LANES>();
    let (outs, out_tail) = out.as_chunks_mut::<LANES>();
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
