//! NEON.
#![allow(unsafe_code)]

use core::arch::aarch64::*;
use core::arch::asm;
use std::arch::is_aarch64_feature_detected;

use super::Op;
use super::dots::{BYTES, Dots, DotsOp, word};
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

/// An expression of each of the four registers of the vectors that it names. What is
/// in a closure may be left a function by itself, and its vectors go through memory.
macro_rules! each {
    ($($v:ident),+ => $of:expr) => {
        [
            { $(let $v = $v[0];)+ $of },
            { $(let $v = $v[1];)+ $of },
            { $(let $v = $v[2];)+ $of },
            { $(let $v = $v[3];)+ $of },
        ]
    };
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
            let out = out.as_mut_ptr();
            vst1q_f32(out, v[0]);
            vst1q_f32(out.add(4), v[1]);
            vst1q_f32(out.add(8), v[2]);
            vst1q_f32(out.add(12), v[3])
        }
        fn add(self, a: Floats, b: Floats) -> Floats { each!(a, b => vaddq_f32(a, b)) }
        fn sub(self, a: Floats, b: Floats) -> Floats { each!(a, b => vsubq_f32(a, b)) }
        fn mul(self, a: Floats, b: Floats) -> Floats { each!(a, b => vmulq_f32(a, b)) }
        fn div(self, a: Floats, b: Floats) -> Floats { each!(a, b => vdivq_f32(a, b)) }
        fn mul_add(self, a: Floats, b: Floats, c: Floats) -> Floats {
            each!(a, b, c => vfmaq_f32(c, a, b))
        }
        fn fused(self, a: Floats, b: Floats, c: Floats) -> Floats {
            each!(a, b, c => vfmaq_f32(c, a, b))
        }
        // fmin and fmax order the two zeros, which the other levels do not.
        fn min(self, a: Floats, b: Floats) -> Floats {
            each!(a, b => vbslq_f32(vcltq_f32(a, b), a, b))
        }
        fn max(self, a: Floats, b: Floats) -> Floats {
            each!(a, b => vbslq_f32(vcgtq_f32(a, b), a, b))
        }
        fn choose(self, a: Floats, b: Floats, yes: Floats, no: Floats) -> Floats {
            each!(a, b, yes, no => vbslq_f32(vcgtq_f32(a, b), yes, no))
        }
        fn round_f16(self, v: Floats) -> Floats {
            each!(v => {
                let mut v = v;
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
        fn int_to_float(self, v: Ints) -> Floats { each!(v => vcvtq_f32_s32(vreinterpretq_s32_u32(v))) }
        fn truncate(self, v: Floats) -> Ints { each!(v => vreinterpretq_u32_s32(vcvtq_s32_f32(v))) }
        fn lookup(self, table: Floats, index: Ints) -> Floats {
            let [a, b, c, d] = each!(table => vreinterpretq_u8_f32(table));
            let bytes = uint8x16x4_t(a, b, c, d);
            // Element i is bytes 4i to 4i + 3.
            each!(index => {
                let places = vmlaq_u32(vdupq_n_u32(0x0302_0100), index, vdupq_n_u32(0x0404_0404));
                vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(places)))
            })
        }
        fn splat_u(self, v: u32) -> Ints { [vdupq_n_u32(v); 4] }
        fn bits(self, v: Floats) -> Ints { each!(v => vreinterpretq_u32_f32(v)) }
        fn floats(self, v: Ints) -> Floats { each!(v => vreinterpretq_f32_u32(v)) }
        fn and(self, a: Ints, b: Ints) -> Ints { each!(a, b => vandq_u32(a, b)) }
        fn shift_left(self, v: Ints, by: u32) -> Ints {
            let by = vdupq_n_s32(by as i32);
            each!(v => vshlq_u32(v, by))
        }
        fn add_u(self, a: Ints, b: Ints) -> Ints { each!(a, b => vaddq_u32(a, b)) }
        fn sub_u(self, a: Ints, b: Ints) -> Ints { each!(a, b => vsubq_u32(a, b)) }
        fn max_u(self, a: Ints, b: Ints) -> Ints { each!(a, b => vmaxq_u32(a, b)) }
        fn descend(self, index: Ints, a: Floats, b: Floats) -> Ints {
            // All bits of a lane that is above are -1.
            each!(index, a, b => vsubq_u32(vaddq_u32(index, index), vcgtq_f32(a, b)))
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
            let v = [
                vmovl_s16(vget_low_s16(low)),
                vmovl_high_s16(low),
                vmovl_s16(vget_low_s16(high)),
                vmovl_high_s16(high),
            ];
            each!(v => vreinterpretq_u32_s32(v))
        }
        fn store_u8(self, v: Ints, out: &mut [u8; LANES]) {
            // Twice the even ones: the low halves, then their low bytes.
            let [a, b, c, d] = each!(v => vreinterpretq_u16_u32(v));
            let (low, high) = (vuzp1q_u16(a, b), vuzp1q_u16(c, d));
            let bytes = vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
            vst1q_u8(out.as_mut_ptr(), bytes)
        }
        fn store_u(self, v: Ints, out: &mut [u32; LANES]) {
            let out = out.as_mut_ptr();
            vst1q_u32(out, v[0]);
            vst1q_u32(out.add(4), v[1]);
            vst1q_u32(out.add(8), v[2]);
            vst1q_u32(out.add(12), v[3])
        }
        fn upper_half(self, v: Ints) -> Ints { each!(v => vshrq_n_u32::<16>(v)) }
        fn transpose(self, v: [Floats; LANES]) -> [Floats; LANES] {
            let mut out = v;
            // Sixteen squares of four; those beside the diagonal change places.
            for from in 0..4 {
                for to in 0..4 {
                    let row = 4 * from;
                    let (r0, r1) = (v[row][to], v[row + 1][to]);
                    let (r2, r3) = (v[row + 2][to], v[row + 3][to]);
                    // Columns 0 and 2, and 1 and 3, of two rows at a time.
                    let pairs = [
                        vtrn1q_f32(r0, r1),
                        vtrn2q_f32(r0, r1),
                        vtrn1q_f32(r2, r3),
                        vtrn2q_f32(r2, r3),
                    ];
                    let [a, b, c, d] = each!(pairs => vreinterpretq_f64_f32(pairs));
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
            let out = out.as_mut_ptr();
            vst1q_u8(out, v[0]);
            vst1q_u8(out.add(16), v[1]);
            vst1q_u8(out.add(32), v[2]);
            vst1q_u8(out.add(48), v[3])
        }
        fn load_u32(self, x: &[u8; BYTES]) -> Ints {
            let x = x.as_ptr();
            let v = [vld1q_u8(x), vld1q_u8(x.add(16)), vld1q_u8(x.add(32)), vld1q_u8(x.add(48))];
            each!(v => vreinterpretq_u32_u8(v))
        }
        fn load_f16(self, x: &[u8; 2 * LANES]) -> Floats {
            let x = x.as_ptr();
            let v = [vld1_u8(x), vld1_u8(x.add(8)), vld1_u8(x.add(16)), vld1_u8(x.add(24))];
            each!(v => {
                let wide: float32x4_t;
                // The intrinsics of f16 need a later Rust.
                asm!(
                    "fcvtl {wide:v}.4s, {v:v}.4h",
                    wide = lateout(vreg) wide,
                    v = in(vreg) v,
                    options(pure, nomem, nostack, preserves_flags)
                );
                wide
            })
        }
        fn low_halves(self, v: Bytes) -> Bytes { each!(v => vandq_u8(v, vdupq_n_u8(15))) }
        fn high_halves(self, v: Bytes) -> Bytes { each!(v => vshrq_n_u8::<4>(v)) }
        fn load_table(self, table: &[u8; 16]) -> Bytes { [vld1q_u8(table.as_ptr()); 4] }
        fn lookup_bytes(self, table: Bytes, index: Bytes) -> Bytes {
            each!(table, index => vqtbl1q_u8(table, index))
        }
        fn dot(self, sum: Ints, w: Bytes, x: [i8; 4]) -> Ints {
            let x = vdupq_n_u32(word(x));
            match DOTS {
                USDOT => each!(sum, w => dot_products!("i8mm", "usdot", sum, w, x)),
                SDOT => each!(sum, w => {
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
                    each!(sum, w => {
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
    }
}
