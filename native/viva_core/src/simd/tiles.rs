//! Products of 8-bit activations with panels of packed weights, in tile registers.
//!
//! AMX multiplies a tile of activations, sixteen tokens by 64 codes, with one of weights
//! and adds the 16 · 16 · 64 products to a tile of sums. What a line of a panel has of
//! sixteen rows is a row of such a tile of weights as it lies. Two tiles of tokens and
//! two of rows make four of sums, and all eight registers; where there are no more than
//! sixteen tokens, one tile of them does. The sums are exact, and what becomes of them is
//! as in [`super::panel`]: the same bits.

use super::LANES;
use super::form::{Form, Scales};
use super::panel::Number;

#[cfg(target_arch = "x86_64")]
pub use amx::{Amx, dot_int8};

/// Tokens that are multiplied together at most.
pub const TOKENS: usize = 32;
/// Fours of columns that a tile has room for.
const QUADS: usize = 16;

/// Whether the level in force has tiles, and groups of panels fill them. Panels have to
/// be of whole steps under ready scales, as [`Form::apart`] makes them.
pub fn fit(form: &Form) -> bool {
    let whole = form.quads >= QUADS && form.quads.is_multiple_of(QUADS);
    let filled = whole || form.quads == QUADS / 2;
    filled && !form.halves && form.scales != Scales::Multiples && has_tiles()
}

/// Puts the fours of codes of one of so many tokens among those of its group, where
/// [`Multiply`] finds them: tile after tile.
pub fn put(fours: &[[i8; 4]], (token, tokens): (usize, usize), group: &mut [[i8; 4]]) {
    let quads = fours.len().min(QUADS);
    let tiles = group.chunks_exact_mut(tokens * quads);
    for (fours, tile) in fours.chunks_exact(quads).zip(tiles) {
        tile[token * quads..][..quads].copy_from_slice(fours);
    }
}

/// `out[t] = x[t] · panelᵀ` for 16 or 32 tokens.
pub struct Multiply<'a> {
    /// One that [`fit`]s.
    pub form: &'a Form,
    pub panel: &'a [u8],
    /// Fours of codes as they were [`put`], group after group.
    pub codes: &'a [[i8; 4]],
    /// `[groups, tokens]`.
    pub numbers: &'a [Number],
    /// One line a token.
    pub out: &'a mut [[[f32; LANES]; 2]],
}

/// Whether the level in force has tiles.
fn has_tiles() -> bool {
    #[cfg(target_arch = "x86_64")]
    return super::level() == super::Level::Avx512Amx && Amx::detect().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Multiplies with a panel that [`fit`]s.
pub fn multiply(op: Multiply) {
    #[cfg(target_arch = "x86_64")]
    if let Some(token) = Amx::detect() {
        return token.dispatch(op);
    }
    unreachable!("no panel of {} groups fits without tiles", op.form.groups);
}

#[cfg(target_arch = "x86_64")]
mod amx {
    #![allow(unsafe_code)]

    use core::arch::asm;
    use core::arch::x86_64::__cpuid_count;
    use std::sync::OnceLock;

    use super::{Multiply, QUADS, TOKENS};
    use crate::simd::dots::{BYTES, Dots, DotsOp};
    use crate::simd::form::{Form, LINE, Low};
    use crate::simd::panel::Number;
    use crate::simd::{Avx512Vnni, LANES};

    /// Tokens of a tile.
    const ROWS: usize = TOKENS / 2;

    /// Proof that the CPU has AMX with products of bytes beside AVX-512, and that the
    /// system lets this process use it.
    #[derive(Clone, Copy)]
    pub struct Amx(Avx512Vnni);

    impl Amx {
        pub fn detect() -> Option<Amx> {
            static GRANTED: OnceLock<bool> = OnceLock::new();
            let granted = *GRANTED.get_or_init(|| has_instructions() && is_granted());
            Avx512Vnni::detect().filter(|_| granted).map(Amx)
        }

        /// Runs a kernel of tiles, whose vectors are those of AVX-512.
        #[inline(always)]
        pub fn dispatch<O: DotsOp>(self, op: O) -> O::Output {
            self.0.dispatch_dots(op)
        }
    }

    /// AMX-TILE and AMX-INT8.
    fn has_instructions() -> bool {
        // SAFETY: every CPU with AVX-512, which is looked for too, has this leaf.
        #[allow(unused_unsafe)]
        let features = unsafe { __cpuid_count(7, 0) }.edx;
        Avx512Vnni::detect().is_some() && features >> 24 & 0b11 == 0b11
    }

    /// Asks for the registers' 8 KiB in what the system saves of each thread: on Linux a
    /// process has to, once.
    #[cfg(target_os = "linux")]
    fn is_granted() -> bool {
        const REQUEST: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        // SAFETY: it changes nothing but what threads may use from now on.
        unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
    }

    #[cfg(not(target_os = "linux"))]
    fn is_granted() -> bool {
        false
    }

    /// What the registers hold, as `ldtilecfg` reads it.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// One group's sums: of each token those of a panel's rows.
    #[repr(C, align(64))]
    struct Sums([[[u8; BYTES]; 2]; TOKENS]);

    impl DotsOp for Multiply<'_> {
        type Output = ();

        #[inline(always)]
        fn run<I: Dots>(self, isa: I) {
            if self.form.low == Low::Nothing {
                self.groups::<I, false>(isa);
            } else {
                self.groups::<I, true>(isa);
            }
        }
    }

    impl Multiply<'_> {
        /// While tiles multiply one group, vectors take care of the sums of the one before.
        #[inline(always)]
        fn groups<I: Dots, const LOWS: bool>(self, isa: I) {
            let form = self.form;
            let tokens = self.out.len();
            let Some(tiles) = Tiles::configure(form.quads.min(QUADS), tokens) else {
                unreachable!("no panel fits where there are no tiles");
            };
            self.out.fill([[0.0; LANES]; 2]);
            let mut sums = [const { Sums([[[0; BYTES]; 2]; TOKENS]) }; 2];
            let groups = self.panel.chunks_exact(form.group());
            let codes = self.codes.chunks_exact(form.quads * tokens);
            let numbers = self.numbers.chunks_exact(tokens);
            let mut before: Option<(&[u8], &[Number])> = None;
            for (i, ((group, codes), numbers)) in groups.zip(codes).zip(numbers).enumerate() {
                let (header, lines) = group.split_at(form.header());
                let [even, odd] = &mut sums;
                let (now, last) = if i % 2 == 0 { (even, odd) } else { (odd, even) };
                tiles.multiply(codes, lines, now);
                if let Some((header, numbers)) = before {
                    add_up::<I, LOWS>(isa, (form, header), last, numbers, self.out);
                }
                before = Some((header, numbers));
            }
            if let Some((header, numbers)) = before {
                let last = &sums[(form.groups - 1) % 2];
                add_up::<I, LOWS>(isa, (form, header), last, numbers, self.out);
            }
        }
    }

    /// Adds a group's sums to the results, as panels without tiles do.
    #[inline(always)]
    fn add_up<I: Dots, const LOWS: bool>(
        isa: I,
        (form, header): (&Form, &[u8]),
        sums: &Sums,
        numbers: &[Number],
        out: &mut [[[f32; LANES]; 2]],
    ) {
        let none = form.load_units::<I, 2>(isa, &[], 0);
        let of = form.load_numbers(isa, none, header, 0);
        for ((sums, number), out) in sums.0.iter().zip(numbers).zip(out) {
            let (scale, codes) = (isa.splat(number.scale), isa.splat(number.sum));
            let start = isa.splat_u(number.start as u32);
            for v in 0..2 {
                let sum = isa.int_to_float(isa.add_u(isa.load_u32(&sums[v]), start));
                let by = isa.mul(of.scales[v], scale);
                let mut result = isa.fused(by, sum, isa.load(&out[v]));
                if LOWS {
                    result = isa.fused(of.lows[v], codes, result);
                }
                isa.store(result, &mut out[v]);
            }
        }
    }

    /// Multiplies tiles and does nothing else, for benchmarks to divide by; operations done.
    pub fn dot_int8(rounds: usize) -> Option<usize> {
        const SUMS: usize = 4;
        let tiles = Tiles::configure(QUADS, TOKENS).filter(|_| rounds > 0)?;
        tiles.repeat(rounds);
        Some(rounds * SUMS * LANES * LANES * BYTES * 2)
    }

    /// Asks for every fourth of the lines 4 KiB ahead: those between, memory's own
    /// prefetchers fetch.
    macro_rules! ask_ahead {
        () => {
            "prefetcht0 [{w} + 4096]
             prefetcht0 [{w} + 4352]
             prefetcht0 [{w} + 4608]
             prefetcht0 [{w} + 4864]
             prefetcht0 [{w} + 5120]
             prefetcht0 [{w} + 5376]
             prefetcht0 [{w} + 5632]
             prefetcht0 [{w} + 5888]"
        };
    }

    /// The tile registers of this thread, configured: 0 to 3 for sums, 4 and 5 for
    /// activations, 6 and 7 for weights. The compiler knows of none of them.
    struct Tiles {
        /// Fours of columns of a tile.
        quads: usize,
        tokens: usize,
    }

    impl Tiles {
        fn configure(quads: usize, tokens: usize) -> Option<Tiles> {
            Amx::detect()?;
            let mut config = Config {
                palette: 1,
                start_row: 0,
                reserved: [0; 14],
                row_bytes: [0; 16],
                rows: [0; 16],
            };
            for register in 0..8 {
                let (rows, bytes) = match register {
                    0..4 => (ROWS, 64),
                    4..6 => (ROWS, 4 * quads),
                    _ => (quads, 64),
                };
                config.rows[register] = rows as u8;
                config.row_bytes[register] = bytes as u16;
            }
            // SAFETY: the CPU has AMX, the system grants it, and no tile is larger than
            // sixteen rows of 64 bytes, as quads are at most sixteen.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
            Some(Tiles { quads, tokens })
        }

        /// The sums of a group's products.
        #[inline(always)]
        fn multiply(&self, codes: &[[i8; 4]], lines: &[u8], sums: &mut Sums) {
            let steps = lines.len() / (self.quads * LINE);
            assert!(steps > 0 && codes.len() >= steps * self.quads * self.tokens);
            // SAFETY: the registers are configured while this lives. Each step reads
            // `quads` lines and as many fours of every token's codes, which are there
            // for all steps; stores fill the sums of as many tokens.
            unsafe {
                match self.tokens > ROWS {
                    true => self.two(steps, codes.as_ptr(), lines.as_ptr(), sums),
                    false => self.one(steps, codes.as_ptr(), lines.as_ptr(), sums),
                }
            }
        }

        /// With one tile of tokens.
        #[inline(always)]
        unsafe fn one(&self, steps: usize, x: *const [i8; 4], w: *const u8, sums: &mut Sums) {
            let row = 4 * self.quads;
            // SAFETY: as in `multiply`.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "2:",
                    ask_ahead!(),
                    "tileloadd tmm4, [{x} + {row}*1]",
                    "tileloadd tmm6, [{w} + {line}*1]",
                    "tdpbsud tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{w} + {line}*1 + 64]",
                    "tdpbsud tmm1, tmm4, tmm7",
                    "add {x}, {x_step}",
                    "add {w}, {w_step}",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{out} + {line}*1], tmm0",
                    "tilestored [{out} + {line}*1 + 64], tmm1",
                    x = inout(reg) x => _,
                    w = inout(reg) w => _,
                    steps = inout(reg) steps => _,
                    out = in(reg) sums.0.as_mut_ptr(),
                    row = in(reg) row,
                    line = in(reg) LINE,
                    x_step = in(reg) row * self.tokens,
                    w_step = in(reg) self.quads * LINE,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }

        /// With two.
        #[inline(always)]
        unsafe fn two(&self, steps: usize, x: *const [i8; 4], w: *const u8, sums: &mut Sums) {
            let row = 4 * self.quads;
            // SAFETY: as in `multiply`.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    ask_ahead!(),
                    "tileloadd tmm4, [{x} + {row}*1]",
                    "tileloadd tmm6, [{w} + {line}*1]",
                    "tdpbsud tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{w} + {line}*1 + 64]",
                    "tdpbsud tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{x2} + {row}*1]",
                    "tdpbsud tmm2, tmm5, tmm6",
                    "tdpbsud tmm3, tmm5, tmm7",
                    "add {x}, {x_step}",
                    "add {x2}, {x_step}",
                    "add {w}, {w_step}",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{out} + {line}*1], tmm0",
                    "tilestored [{out} + {line}*1 + 64], tmm1",
                    "tilestored [{out2} + {line}*1], tmm2",
                    "tilestored [{out2} + {line}*1 + 64], tmm3",
                    x = inout(reg) x => _,
                    x2 = inout(reg) x.add(ROWS * self.quads) => _,
                    w = inout(reg) w => _,
                    steps = inout(reg) steps => _,
                    out = in(reg) sums.0.as_mut_ptr(),
                    out2 = in(reg) sums.0[ROWS..].as_mut_ptr(),
                    row = in(reg) row,
                    line = in(reg) LINE,
                    x_step = in(reg) row * TOKENS,
                    w_step = in(reg) self.quads * LINE,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    }

    impl Tiles {
        /// Adds to all sums so often what the registers happen to hold.
        fn repeat(&self, rounds: usize) {
            assert!(rounds > 0);
            // SAFETY: the registers are configured while this lives, and no memory is
            // touched.
            unsafe {
                asm!(
                    "2:",
                    "tdpbsud tmm0, tmm4, tmm6",
                    "tdpbsud tmm1, tmm4, tmm7",
                    "tdpbsud tmm2, tmm5, tmm6",
                    "tdpbsud tmm3, tmm5, tmm7",
                    "dec {rounds}",
                    "jnz 2b",
                    rounds = inout(reg) rounds => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    options(nomem, nostack),
                );
            }
        }
    }

    impl Drop for Tiles {
        /// Threads without tiles in use are switched sooner.
        fn drop(&mut self) {
            // SAFETY: as in `configure`.
            unsafe { asm!("tilerelease", options(nomem, nostack)) };
        }
    }
}
