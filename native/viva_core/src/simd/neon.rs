//! NEON.
#![allow(unsafe_code)]

use core::arch::aarch64::*;
use core::arch::asm;
use std::arch::is_aarch64_feature_detected;

use super::Op;
use super::dots::{BYTES, Dots, DotsOp};
use super::token::{intrinsics, token};
use super::vector::{Isa, LANES};

/// Proof that the CPU has NEON, and what later ones added for dot products of bytes.
#[derive(Clone, Copy)]
pub struct NeonWith<const DOTS: u8>(());

const PRODUCTS: u8 = 0;
const SDOT: u8 = 1;
const USDOT: u8 = 2;

pub type Neon = NeonWith<PRODUCTS>;
pub type NeonDotprod = NeonWith<SDOT>;
pub type NeonI8mm = NeonWith<USDOT>;

token!(Neon, is_aarch64_feature_detected, "neon");
token!(NeonDotprod, is_aarch64_feature_detected, "neon", "dotprod");
token!(
    NeonI8mm,
    is_aarch64_feature_detected,
    "neon",
    "dotprod",
    "i8mm"
);

/// Sixteen lanes: element i of the vector is lane i mod 4 of register i / 4.
type Floats = [float32x4_t; 4];
type Ints = [uint32x4_t; 4];

/// `f` of each register of both.
#[inline(always)]
fn both<A: Copy, B: Copy, C>(a: [A; 4], b: [B; 4], f: impl Fn(A, B) -> C) -> [C; 4] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl<const DOTS: u8> Isa for NeonWith<DOTS> {
    type F = Floats;
    type U = Ints;
    const ACCUMULATORS: usize = 6;
    const FUSES: bool = true;

    intrinsics! {
        fn splat(self, v: f32) -> Floats { [vdupq_n_f32(v); 4] }
        fn load(self, x: &[f32; LANES]) -> Floats {
            let x = x.as_ptr();
            [vld1q_f32(x), vld1q_f32(x.add(4)), vld1q_f32(x.add(8)), vld1q_f32(x.add(12))]
        }
        fn store(self, v: Floats, out: &mut [f32; LANES]) {
            for (v, out) in v.into_iter().zip(out.as_chunks_mut::<4>().0) {
                vst1q_f32(out.as_mut_ptr(), v)
            }
        }
        fn add(self, a: Floats, b: Floats) -> Floats { both(a, b, |a, b| vaddq_f32(a, b)) }
        fn sub(self, a: Floats, b: Floats) -> Floats { both(a, b, |a, b| vsubq_f32(a, b)) }
        fn mul(self, a: Floats, b: Floats) -> Floats { both(a, b, |a, b| vmulq_f32(a, b)) }
        fn div(self, a: Floats, b: Floats) -> Floats { both(a, b, |a, b| vdivq_f32(a, b)) }
        fn mul_add(self, a: Floats, b: Floats, c: Floats) -> Floats {
            std::array::from_fn(|i| vfmaq_f32(c[i], a[i], b[i]))
        }
        fn fused(self, a: Floats, b: Floats, c: Floats) -> Floats {
            std::array::from_fn(|i| vfmaq_f32(c[i], a[i], b[i]))
        }
        // fmin and fmax order the two zeros, which the other levels do not.
        fn min(self, a: Floats, b: Floats) -> Floats {
            both(a, b, |a, b| vbslq_f32(vcltq_f32(a, b), a, b))
        }
        fn max(self, a: Floats, b: Floats) -> Floats {
            both(a, b, |a, b| vbslq_f32(vcgtq_f32(a, b), a, b))
        }
        fn choose(self, a: Floats, b: Floats, yes: Floats, no: Floats) -> Floats {
            std::array::from_fn(|i| vbslq_f32(vcgtq_f32(a[i], b[i]), yes[i], no[i]))
        }
        fn round_f16(self, v: Floats) -> Floats {
            v.map(|mut v| {
                // The intrinsics of f16 need a later Rust.
                asm!(
                    "fcvtn {v:v}.4h, {v:v}.4s",
                    "fcvtl {v:v}.4s, {v:v}.4h",
                    v = inout(vreg) v,
                    options(pure, nomem, nostack, preserves_flags)
                );
                v
            })
        }
        fn int_to_float(self, v: Ints) -> Floats { v.map(|v| vcvtq_f32_s32(vreinterpretq_s32_u32(v))) }
        fn float_to_int(self, v: Floats) -> Ints { v.map(|v| vreinterpretq_u32_s32(vcvtq_s32_f32(v))) }
        fn lookup(self, table: Floats, index: Ints) -> Floats {
            let [a, b, c, d] = table.map(|v| vreinterpretq_u8_f32(v));
            let bytes = uint8x16x4_t(a, b, c, d);
            // Element i is bytes 4i to 4i + 3.
            index.map(|i| {
                let places = vmlaq_u32(vdupq_n_u32(0x0302_0100), i, vdupq_n_u32(0x0404_0404));
                vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(places)))
            })
        }
        fn splat_u(self, v: u32) -> Ints { [vdupq_n_u32(v); 4] }
        fn bits(self, v: Floats) -> Ints { v.map(|v| vreinterpretq_u32_f32(v)) }
        fn floats(self, v: Ints) -> Floats { v.map(|v| vreinterpretq_f32_u32(v)) }
        fn and(self, a: Ints, b: Ints) -> Ints { both(a, b, |a, b| vandq_u32(a, b)) }
        fn add_u(self, a: Ints, b: Ints) -> Ints { both(a, b, |a, b| vaddq_u32(a, b)) }
        fn sub_u(self, a: Ints, b: Ints) -> Ints { both(a, b, |a, b| vsubq_u32(a, b)) }
        fn max_u(self, a: Ints, b: Ints) -> Ints { both(a, b, |a, b| vmaxq_u32(a, b)) }
        fn descend(self, index: Ints, a: Floats, b: Floats) -> Ints {
            // All bits of a lane that is above are -1.
            std::array::from_fn(|i| vsubq_u32(vaddq_u32(index[i], index[i]), vcgtq_f32(a[i], b[i])))
        }
        fn load_u8(self, x: &[u8; LANES]) -> Ints {
            let x = vld1q_u8(x.as_ptr());
            let (low, high) = (vmovl_u8(vget_low_u8(x)), vmovl_high_u8(x));
            [
                vmovl_u16(vget_low_u16(low)),
                vmovl_high_u16(low),
                vmovl_u16(vget_low_u16(high)),
                vmovl_high_u16(high),
            ]
        }
        fn load_i8(self, x: &[u8; LANES]) -> Ints {
            let x = vld1q_s8(x.as_ptr().cast());
            let (low, high) = (vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
            [
                vmovl_s16(vget_low_s16(low)),
                vmovl_high_s16(low),
                vmovl_s16(vget_low_s16(high)),
                vmovl_high_s16(high),
            ]
            .map(|v| vreinterpretq_u32_s32(v))
        }
        fn store_u8(self, v: Ints, out: &mut [u8; LANES]) {
            // Twice the even ones: the low halves, then their low bytes.
            let [a, b, c, d] = v.map(|v| vreinterpretq_u16_u32(v));
            let (low, high) = (vuzp1q_u16(a, b), vuzp1q_u16(c, d));
            let bytes = vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
            vst1q_u8(out.as_mut_ptr(), bytes)
        }
        fn store_u(self, v: Ints, out: &mut [u32; LANES]) {
            for (v, out) in v.into_iter().zip(out.as_chunks_mut::<4>().0) {
                vst1q_u32(out.as_mut_ptr(), v)
            }
        }
        fn transpose(self, v: [Floats; LANES]) -> [Floats; LANES] {
            let mut out = v;
            // Sixteen squares of four; those beside the diagonal change places.
            for from in 0..4 {
                for to in 0..4 {
                    let [r0, r1, r2, r3] = [0, 1, 2, 3].map(|e| v[4 * from + e][to]);
                    // Columns 0 and 2, and 1 and 3, of two rows at a time.
                    let (a, b) = (vtrn1q_f32(r0, r1), vtrn2q_f32(r0, r1));
                    let (c, d) = (vtrn1q_f32(r2, r3), vtrn2q_f32(r2, r3));
                    let [a, b, c, d] = [a, b, c, d].map(|v| vreinterpretq_f64_f32(v));
                    let columns = [vtrn1q_f64(a, c), vtrn1q_f64(b, d), vtrn2q_f64(a, c), vtrn2q_f64(b, d)];
                    for (e, column) in columns.into_iter().enumerate() {
                        out[4 * to + e][from] = vreinterpretq_f32_f64(column);
                    }
                }
            }
            out
        }
    }
}

/// Adds to each lane of a register the dot product of its four bytes. The intrinsics
/// need a later Rust, and an assembler asks for the extension that an instruction
/// belongs to, whatever the function around is compiled with.
macro_rules! dot_products {
    ($extension:literal, $instruction:literal, $sum:ident, $w:ident, $x:ident) => {{
        let mut sum = $sum;
        asm!(
            concat!(".arch_extension ", $extension),
            concat!($instruction, " {sum:v}.4s, {w:v}.16b, {x:v}.16b"),
            sum = inout(vreg) sum,
            w = in(vreg) $w,
            x = in(vreg) $x,
            options(pure, nomem, nostack, preserves_flags)
        );
        sum
    }};
}

/// Sixty-four bytes.
type Bytes = [uint8x16_t; 4];

impl<const DOTS: u8> Dots for NeonWith<DOTS> {
    type B = Bytes;
    const LESS: i32 = if DOTS == SDOT { 128 } else { 0 };

    intrinsics! {
        fn load_bytes(self, x: &[u8; BYTES]) -> Bytes {
            let x = x.as_ptr();
            [vld1q_u8(x), vld1q_u8(x.add(16)), vld1q_u8(x.add(32)), vld1q_u8(x.add(48))]
        }
        fn store_bytes(self, v: Bytes, out: &mut [u8; BYTES]) {
            for (v, out) in v.into_iter().zip(out.as_chunks_mut::<16>().0) {
                vst1q_u8(out.as_mut_ptr(), v)
            }
        }
        fn load_u32(self, x: &[u8; BYTES]) -> Ints {
            let (fours, _) = x.as_chunks::<16>();
            std::array::from_fn(|i| vreinterpretq_u32_u8(vld1q_u8(fours[i].as_ptr())))
        }
        fn load_f16(self, x: &[u8; 2 * LANES]) -> Floats {
            let (fours, _) = x.as_chunks::<8>();
            std::array::from_fn(|i| {
                let half = vld1_u8(fours[i].as_ptr());
                let v;
                // The intrinsics of f16 need a later Rust.
                asm!(
                    "fcvtl {v:v}.4s, {half:v}.4h",
                    v = lateout(vreg) v,
                    half = in(vreg) half,
                    options(pure, nomem, nostack, preserves_flags)
                );
                v
            })
        }
        fn low_halves(self, v: Bytes) -> Bytes { v.map(|v| vandq_u8(v, vdupq_n_u8(15))) }
        fn high_halves(self, v: Bytes) -> Bytes { v.map(|v| vshrq_n_u8::<4>(v)) }
        fn load_table(self, table: &[u8; 16]) -> Bytes { [vld1q_u8(table.as_ptr()); 4] }
        fn lookup_bytes(self, table: Bytes, index: Bytes) -> Bytes {
            index.map(|index| vqtbl1q_u8(table[0], index))
        }
        fn dot(self, sum: Ints, w: Bytes, x: [i8; 4]) -> Ints {
            let x = vdupq_n_u32(u32::from_le_bytes(x.map(|x| x as u8)));
            match DOTS {
                USDOT => both(sum, w, |sum, w| dot_products!("i8mm", "usdot", sum, w, x)),
                SDOT => both(sum, w, |sum, w| {
                    // Less 128, as a signed byte.
                    let w = veorq_u8(w, vdupq_n_u8(128));
                    dot_products!("dotprod", "sdot", sum, w, x)
                }),
                // Even and odd bytes by themselves: 255 · −128 is within sixteen
                // bits, a sum of two is not.
                _ => {
                    let x = vreinterpretq_s16_u32(x);
                    let x_even = vshrq_n_s16::<8>(vshlq_n_s16::<8>(x));
                    let x_odd = vshrq_n_s16::<8>(x);
                    both(sum, w, |sum, w| {
                        let w = vreinterpretq_u16_u8(w);
                        let even = vreinterpretq_s16_u16(vandq_u16(w, vdupq_n_u16(255)));
                        let odd = vreinterpretq_s16_u16(vshrq_n_u16::<8>(w));
                        let sum = vreinterpretq_s32_u32(sum);
                        let sum = vpadalq_s16(sum, vmulq_s16(even, x_even));
                        vreinterpretq_u32_s32(vpadalq_s16(sum, vmulq_s16(odd, x_odd)))
                    })
                }
            }
        }
        fn prefetch(self, at: *const u8) {
            asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(readonly, nostack, preserves_flags))
        }
    }
}
