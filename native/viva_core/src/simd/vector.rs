//! The vector of a kernel: sixteen lanes, however wide the registers are.
//!
//! A level is a token that implements [`Isa`]. Every level has the same sixteen
//! logical lanes, so element i of a slice always meets lane i mod 16 and sums
//! are the same bits everywhere; only [`Isa::mul_add`] may round differently.

/// Lanes of every vector.
pub const LANES: usize = 16;

/// The operations that kernels need, on sixteen lanes of f32 or u32.
pub trait Isa: Copy {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen u32.
    type U: Copy;
    /// Vectors that fit into registers beside a few operands.
    const ACCUMULATORS: usize;
    /// Whether [`Isa::fused`] is one instruction.
    const FUSES: bool;

    fn splat(self, v: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, v: Self::F, out: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, fused where the level has the instruction: only for sums
    /// that state a tolerance.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// a · b + c, rounded once on every level: for sums that decide which bytes
    /// are written. Slow where the level lacks the instruction.
    fn fused(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// a < b ? a : b. Neither is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// a > b ? a : b. Neither is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// a > b ? yes : no; no where either is NaN.
    fn choose(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;
    /// Rounds to the nearest f16, ties to even, and back.
    fn round_f16(self, v: Self::F) -> Self::F;
    /// Signed integers to floats.
    fn int_to_float(self, v: Self::U) -> Self::F;
    /// Whole numbers below 2³¹ to signed integers.
    fn float_to_int(self, v: Self::F) -> Self::U;
    /// `table[index]` a lane; indices are below 16.
    fn lookup(self, table: Self::F, index: Self::U) -> Self::F;

    fn splat_u(self, v: u32) -> Self::U;
    /// The bits of each lane.
    fn bits(self, v: Self::F) -> Self::U;
    /// The floats of those bits.
    fn floats(self, v: Self::U) -> Self::F;
    fn and(self, a: Self::U, b: Self::U) -> Self::U;
    fn add_u(self, a: Self::U, b: Self::U) -> Self::U;
    fn sub_u(self, a: Self::U, b: Self::U) -> Self::U;
    fn max_u(self, a: Self::U, b: Self::U) -> Self::U;
    /// 2 · index + (a > b): one step of a binary search in all lanes.
    fn descend(self, index: Self::U, a: Self::F, b: Self::F) -> Self::U;
    fn load_u8(self, x: &[u8; LANES]) -> Self::U;
    fn load_i8(self, x: &[u8; LANES]) -> Self::U;
    /// The low byte of each lane.
    fn store_u8(self, v: Self::U, out: &mut [u8; LANES]);
    fn store_u(self, v: Self::U, out: &mut [u32; LANES]);

    /// The upper half of each lane, as a number.
    #[inline(always)]
    fn upper_half(self, v: Self::U) -> Self::U {
        let mut lanes = [0; LANES];
        self.store_u(v, &mut lanes);
        self.bits(self.load(&lanes.map(|v| f32::from_bits(v >> 16))))
    }

    /// index + (a > b).
    #[inline(always)]
    fn count(self, index: Self::U, a: Self::F, b: Self::F) -> Self::U {
        self.add_u(index, self.descend(self.splat_u(0), a, b))
    }

    /// `table[index]` a lane, by the low five bits of the index.
    #[inline(always)]
    fn lookup_32(self, table: [Self::F; 2], index: Self::U) -> Self::F {
        let half = self.int_to_float(self.and(index, self.splat_u(16)));
        let within = self.and(index, self.splat_u(15));
        let [low, high] = table.map(|t| self.lookup(t, within));
        self.choose(half, self.splat(8.0), high, low)
    }

    /// Lane j of vector i in lane i of vector j.
    #[inline(always)]
    fn transpose(self, v: [Self::F; LANES]) -> [Self::F; LANES] {
        let mut rows = [[0f32; LANES]; LANES];
        for (v, row) in v.into_iter().zip(&mut rows) {
            self.store(v, row);
        }
        std::array::from_fn(|j| self.load(&rows.map(|row| row[j])))
    }

    /// The lanes added in a fixed tree.
    #[inline(always)]
    fn sum(self, v: Self::F) -> f32 {
        let mut lanes = [0f32; LANES];
        self.store(v, &mut lanes);
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    /// Up to sixteen elements, `fill` in the lanes past them.
    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> Self::F {
        let mut lanes = [fill; LANES];
        lanes[..x.len()].copy_from_slice(x);
        self.load(&lanes)
    }

    /// The first lanes, as many as `out` holds.
    #[inline(always)]
    fn store_part(self, v: Self::F, out: &mut [f32]) {
        let mut lanes = [0f32; LANES];
        self.store(v, &mut lanes);
        out.copy_from_slice(&lanes[..out.len()]);
    }
}

/// No assumption beyond the target's baseline.
#[derive(Clone, Copy)]
pub struct Portable;

#[inline(always)]
fn each<A: Copy, B: Copy, C>(a: [A; LANES], b: [B; LANES], f: impl Fn(A, B) -> C) -> [C; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Isa for Portable {
    type F = [f32; LANES];
    type U = [u32; LANES];
    const ACCUMULATORS: usize = 4;
    const FUSES: bool = cfg!(target_arch = "aarch64");

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        [v; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        *out = v;
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // aarch64 has the instruction in its baseline; x86-64 would call libm.
        if cfg!(target_arch = "aarch64") {
            std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
        } else {
            self.add(self.mul(a, b), c)
        }
    }
    #[inline(always)]
    fn fused(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn choose(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F {
        std::array::from_fn(|i| if a[i] > b[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn round_f16(self, v: Self::F) -> Self::F {
        v.map(round_f16)
    }
    #[inline(always)]
    fn int_to_float(self, v: Self::U) -> Self::F {
        v.map(|v| v as i32 as f32)
    }
    #[inline(always)]
    fn float_to_int(self, v: Self::F) -> Self::U {
        v.map(|v| v as i32 as u32)
    }
    #[inline(always)]
    fn lookup(self, table: Self::F, index: Self::U) -> Self::F {
        index.map(|i| table[i as usize & 15])
    }
    #[inline(always)]
    fn splat_u(self, v: u32) -> Self::U {
        [v; LANES]
    }
    #[inline(always)]
    fn bits(self, v: Self::F) -> Self::U {
        v.map(f32::to_bits)
    }
    #[inline(always)]
    fn floats(self, v: Self::U) -> Self::F {
        v.map(f32::from_bits)
    }
    #[inline(always)]
    fn and(self, a: Self::U, b: Self::U) -> Self::U {
        each(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn add_u(self, a: Self::U, b: Self::U) -> Self::U {
        each(a, b, u32::wrapping_add)
    }
    #[inline(always)]
    fn sub_u(self, a: Self::U, b: Self::U) -> Self::U {
        each(a, b, u32::wrapping_sub)
    }
    #[inline(always)]
    fn max_u(self, a: Self::U, b: Self::U) -> Self::U {
        each(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn descend(self, index: Self::U, a: Self::F, b: Self::F) -> Self::U {
        std::array::from_fn(|i| 2 * index[i] + u32::from(a[i] > b[i]))
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::U {
        x.map(u32::from)
    }
    #[inline(always)]
    fn load_i8(self, x: &[u8; LANES]) -> Self::U {
        x.map(|v| i32::from(v as i8) as u32)
    }
    #[inline(always)]
    fn store_u8(self, v: Self::U, out: &mut [u8; LANES]) {
        *out = v.map(|v| v as u8);
    }
    #[inline(always)]
    fn store_u(self, v: Self::U, out: &mut [u32; LANES]) {
        *out = v;
    }
}

/// Rounds to the nearest f16, ties to even, in f32 arithmetic.
#[inline(always)]
pub fn round_f16(v: f32) -> f32 {
    let bits = v.to_bits();
    let sign = bits & 0x8000_0000;
    let mag = bits & 0x7fff_ffff;
    let rounded = if mag >= 0x477f_f000 {
        0x7f80_0000
    } else if mag < 0x3880_0000 {
        // Below 2⁻¹⁴ f16 counts in steps of 2⁻²⁴, the spacing of f32 at 0.5.
        ((f32::from_bits(mag) + 0.5) - 0.5).to_bits()
    } else {
        // 13 mantissa bits go; the even neighbour takes a tie.
        (mag + 0xfff + ((mag >> 13) & 1)) & !0x1fff
    };
    f32::from_bits(rounded | sign)
}
