//! NEON.
#![allow(unsafe_code)]

use core::arch::aarch64::*;
use core::arch::asm;
use std::arch::is_aarch64_feature_detected;

use super::Op;
use super::token::{intrinsics, token};
use super::vector::{Isa, LANES};

/// Proof that the CPU has NEON.
#[derive(Clone, Copy)]
pub struct Neon(());

token!(Neon, run_neon, "neon", is_aarch64_feature_detected, "neon");

/// Sixteen lanes: element i of the vector is lane i mod 4 of register i / 4.
type Floats = [float32x4_t; 4];
type Ints = [uint32x4_t; 4];

/// `f` of each register of both.
#[inline(always)]
fn both<A: Copy, B: Copy, C>(a: [A; 4], b: [B; 4], f: impl Fn(A, B) -> C) -> [C; 4] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Isa for Neon {
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
