//! AVX2 and AVX-512.
#![allow(unsafe_code)]

use core::arch::x86_64::*;

use super::Op;
use super::bf16::{Pairs, PairsOp};
use super::dots::{BYTES, Dots, DotsOp, word};
use super::nibble::Order;
use super::token::{intrinsics, token};
use super::vector::{Isa, LANES, Line};

/// Proof that the CPU has AVX2 and what came with it, and the dot products of bytes
/// that later ones added.
#[derive(Clone, Copy)]
pub struct Avx2With<const VNNI: bool>(());

pub type Avx2 = Avx2With<false>;
pub type Avx2Vnni = Avx2With<true>;

/// Proof that the CPU has the AVX-512 of its first servers, and what later ones
/// added: dot products of bytes, and of pairs of bf16.
#[derive(Clone, Copy)]
pub struct Avx512With<const VNNI: bool, const BF16: bool>(());

pub type Avx512 = Avx512With<false, false>;
pub type Avx512Vnni = Avx512With<true, false>;
pub type Avx512Bf16 = Avx512With<true, true>;

token!(Avx2, is_x86_feature_detected, "avx2", "fma", "f16c", "bmi2");
token!(
    Avx2Vnni,
    is_x86_feature_detected,
    "avx2",
    "fma",
    "f16c",
    "bmi2",
    "avxvnni"
);
token!(
    Avx512,
    is_x86_feature_detected,
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx2",
    "fma",
    "f16c",
    "bmi2"
);
token!(
    Avx512Vnni,
    is_x86_feature_detected,
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512vnni",
    "avx2",
    "fma",
    "f16c",
    "bmi2"
);
token!(
    Avx512Bf16,
    is_x86_feature_detected,
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512vnni",
    "avx512bf16",
    "avx2",
    "fma",
    "f16c",
    "bmi2"
);

impl Avx512Bf16 {
    /// Runs a kernel of pairs compiled for this level.
    #[inline(always)]
    pub fn dispatch_pairs<O: PairsOp>(self, op: O) -> O::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,bmi2")]
        fn run<O: PairsOp>(token: Avx512Bf16, op: O) -> O::Output {
            op.run(token)
        }
        // SAFETY: as for `dispatch`.
        unsafe { run(self, op) }
    }
}

/// The tree of [`Isa::sum`].
#[inline]
#[target_feature(enable = "avx2")]
fn sum_of_halves(low: __m256, high: __m256) -> f32 {
    let eight = _mm256_add_ps(low, high);
    let four = _mm_add_ps(
        _mm256_castps256_ps128(eight),
        _mm256_extractf128_ps::<1>(eight),
    );
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// Codes of four bits, one a byte.
#[inline]
#[target_feature(enable = "avx2")]
fn halves(x: &[u8; LANES / 2], order: Order) -> __m128i {
    let x = _mm_cvtsi64_si128(i64::from_le_bytes(*x));
    let low = _mm_and_si128(x, _mm_set1_epi8(15));
    let high = _mm_and_si128(_mm_srli_epi16::<4>(x), _mm_set1_epi8(15));
    match order {
        Order::LowFirst => _mm_unpacklo_epi8(low, high),
        Order::HighFirst => _mm_unpacklo_epi8(high, low),
    }
}

impl<const VNNI: bool, const BF16: bool> Isa for Avx512With<VNNI, BF16> {
    type F = __m512;
    type U = __m512i;
    const ACCUMULATORS: usize = 24;
    const FUSES: bool = true;
    const STREAMS: bool = true;

    intrinsics! {
        fn splat(self, v: f32) -> __m512 { _mm512_set1_ps(v) }
        fn load(self, x: &[f32; LANES]) -> __m512 { _mm512_loadu_ps(x.as_ptr()) }
        fn store(self, v: __m512, out: &mut [f32; LANES]) { _mm512_storeu_ps(out.as_mut_ptr(), v) }
        fn stream(self, v: __m512, out: &mut Line) { _mm512_stream_ps(out.0.as_mut_ptr(), v) }
        fn add(self, a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sub(self, a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        fn mul(self, a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn div(self, a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn fused(self, a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn min(self, a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
        fn max(self, a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        fn choose(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), no, yes)
        }
        fn round_f16(self, v: __m512) -> __m512 {
            _mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v))
        }
        fn widen(self, half: [u8; 2]) -> f32 {
            _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes(half)))))
        }
        fn int_to_float(self, v: __m512i) -> __m512 { _mm512_cvtepi32_ps(v) }
        fn truncate(self, v: __m512) -> __m512i { _mm512_cvttps_epi32(v) }
        fn lookup(self, table: __m512, index: __m512i) -> __m512 { _mm512_permutexvar_ps(index, table) }
        fn splat_u(self, v: u32) -> __m512i { _mm512_set1_epi32(v as i32) }
        fn bits(self, v: __m512) -> __m512i { _mm512_castps_si512(v) }
        fn floats(self, v: __m512i) -> __m512 { _mm512_castsi512_ps(v) }
        fn and(self, a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
        fn shift_left(self, v: __m512i, by: u32) -> __m512i {
            _mm512_sllv_epi32(v, _mm512_set1_epi32(by as i32))
        }
        fn add_u(self, a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
        fn sub_u(self, a: __m512i, b: __m512i) -> __m512i { _mm512_sub_epi32(a, b) }
        fn max_u(self, a: __m512i, b: __m512i) -> __m512i { _mm512_max_epu32(a, b) }
        fn descend(self, index: __m512i, a: __m512, b: __m512) -> __m512i {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b);
            let doubled = _mm512_add_epi32(index, index);
            _mm512_mask_sub_epi32(doubled, above, doubled, _mm512_set1_epi32(-1))
        }
        fn load_u8(self, x: &[u8; LANES]) -> __m512i { _mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast())) }
        fn load_u4(self, x: &[u8; LANES / 2], order: Order) -> __m512i {
            _mm512_cvtepu8_epi32(halves(x, order))
        }
        fn load_i8(self, x: &[u8; LANES]) -> __m512i { _mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast())) }
        fn store_u8(self, v: __m512i, out: &mut [u8; LANES]) {
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(v))
        }
        fn store_u(self, v: __m512i, out: &mut [u32; LANES]) { _mm512_storeu_si512(out.as_mut_ptr().cast(), v) }
        fn upper_half(self, v: __m512i) -> __m512i { _mm512_srli_epi32::<16>(v) }
        fn sum(self, v: __m512) -> f32 {
            sum_of_halves(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v))
        }
        fn count(self, index: __m512i, a: __m512, b: __m512) -> __m512i {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b);
            _mm512_mask_sub_epi32(index, above, index, _mm512_set1_epi32(-1))
        }
        fn lookup_32(self, table: [__m512; 2], index: __m512i) -> __m512 {
            _mm512_permutex2var_ps(table[0], index, table[1])
        }
        fn transpose(self, v: [__m512; LANES]) -> [__m512; LANES] {
            // Squares of four lanes first: lane group l of fours[q][e] is column
            // 4l + e of rows 4q to 4q + 3.
            let mut fours = [[v[0]; 4]; 4];
            for (q, fours) in fours.iter_mut().enumerate() {
                let [r0, r1, r2, r3] = [v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]];
                let a = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1));
                let b = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
                let c = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3));
                let d = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
                *fours = [
                    _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(a, c)),
                    _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(b, d)),
                ];
            }
            // Then the square of lane groups, even ones (0x88) and odd ones (0xdd).
            let mut out = v;
            for e in 0..4 {
                let [a, b, c, d] = [fours[0][e], fours[1][e], fours[2][e], fours[3][e]];
                let (low, high) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d));
                out[e] = _mm512_shuffle_f32x4::<0x88>(low, high);
                out[8 + e] = _mm512_shuffle_f32x4::<0xdd>(low, high);
                let (low, high) = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d));
                out[4 + e] = _mm512_shuffle_f32x4::<0x88>(low, high);
                out[12 + e] = _mm512_shuffle_f32x4::<0xdd>(low, high);
            }
            out
        }
    }
}

/// An expression of each of the two registers of the vectors that it names. What is in
/// a closure may be left a function by itself, without the level's instructions.
macro_rules! each {
    ($($v:ident),+ => $of:expr) => {
        [
            { $(let $v = $v[0];)+ $of },
            { $(let $v = $v[1];)+ $of },
        ]
    };
}

impl<const VNNI: bool> Isa for Avx2With<VNNI> {
    type F = [__m256; 2];
    type U = [__m256i; 2];
    const ACCUMULATORS: usize = 6;
    const FUSES: bool = true;
    const STREAMS: bool = true;

    intrinsics! {
        fn splat(self, v: f32) -> [__m256; 2] { [_mm256_set1_ps(v); 2] }
        fn load(self, x: &[f32; LANES]) -> [__m256; 2] {
            [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))]
        }
        fn store(self, v: [__m256; 2], out: &mut [f32; LANES]) {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1])
        }
        fn stream(self, v: [__m256; 2], out: &mut Line) {
            _mm256_stream_ps(out.0.as_mut_ptr(), v[0]);
            _mm256_stream_ps(out.0.as_mut_ptr().add(8), v[1])
        }
        fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            each!(a, b => _mm256_add_ps(a, b))
        }
        fn sub(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            each!(a, b => _mm256_sub_ps(a, b))
        }
        fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            each!(a, b => _mm256_mul_ps(a, b))
        }
        fn div(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            each!(a, b => _mm256_div_ps(a, b))
        }
        fn mul_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
            each!(a, b, c => _mm256_fmadd_ps(a, b, c))
        }
        fn fused(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
            each!(a, b, c => _mm256_fmadd_ps(a, b, c))
        }
        fn min(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            each!(a, b => _mm256_min_ps(a, b))
        }
        fn max(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            each!(a, b => _mm256_max_ps(a, b))
        }
        fn choose(
            self,
            a: [__m256; 2],
            b: [__m256; 2],
            yes: [__m256; 2],
            no: [__m256; 2]
        ) -> [__m256; 2] {
            each!(a, b, yes, no => _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_GT_OQ>(a, b)))
        }
        fn round_f16(self, v: [__m256; 2]) -> [__m256; 2] {
            each!(v => _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)))
        }
        fn widen(self, half: [u8; 2]) -> f32 {
            _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes(half)))))
        }
        fn int_to_float(self, v: [__m256i; 2]) -> [__m256; 2] { each!(v => _mm256_cvtepi32_ps(v)) }
        fn truncate(self, v: [__m256; 2]) -> [__m256i; 2] { each!(v => _mm256_cvttps_epi32(v)) }
        fn lookup(self, table: [__m256; 2], index: [__m256i; 2]) -> [__m256; 2] {
            each!(index => {
                let low = _mm256_permutevar8x32_ps(table[0], index);
                let high = _mm256_permutevar8x32_ps(table[1], index);
                // Bit 3 of the index, moved to the sign, picks the half.
                let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                _mm256_blendv_ps(low, high, upper)
            })
        }
        fn splat_u(self, v: u32) -> [__m256i; 2] { [_mm256_set1_epi32(v as i32); 2] }
        fn bits(self, v: [__m256; 2]) -> [__m256i; 2] { each!(v => _mm256_castps_si256(v)) }
        fn floats(self, v: [__m256i; 2]) -> [__m256; 2] { each!(v => _mm256_castsi256_ps(v)) }
        fn and(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
            each!(a, b => _mm256_and_si256(a, b))
        }
        fn shift_left(self, v: [__m256i; 2], by: u32) -> [__m256i; 2] {
            each!(v => _mm256_sllv_epi32(v, _mm256_set1_epi32(by as i32)))
        }
        fn add_u(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
            each!(a, b => _mm256_add_epi32(a, b))
        }
        fn sub_u(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
            each!(a, b => _mm256_sub_epi32(a, b))
        }
        fn max_u(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
            each!(a, b => _mm256_max_epu32(a, b))
        }
        fn descend(self, index: [__m256i; 2], a: [__m256; 2], b: [__m256; 2]) -> [__m256i; 2] {
            each!(index, a, b => {
                let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b));
                _mm256_sub_epi32(_mm256_add_epi32(index, index), above)
            })
        }
        fn load_u8(self, x: &[u8; LANES]) -> [__m256i; 2] {
            [
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(x.as_ptr().cast())),
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(x.as_ptr().add(8).cast())),
            ]
        }
        fn load_u4(self, x: &[u8; LANES / 2], order: Order) -> [__m256i; 2] {
            let codes = halves(x, order);
            [_mm256_cvtepu8_epi32(codes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(codes))]
        }
        fn load_i8(self, x: &[u8; LANES]) -> [__m256i; 2] {
            [
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(x.as_ptr().cast())),
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(x.as_ptr().add(8).cast())),
            ]
        }
        fn store_u8(self, v: [__m256i; 2], out: &mut [u8; LANES]) {
            // The low byte of each lane, then the lanes back into order.
            let low = _mm256_set1_epi32(0xff);
            let words = _mm256_packus_epi32(_mm256_and_si256(v[0], low), _mm256_and_si256(v[1], low));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes)
        }
        fn store_u(self, v: [__m256i; 2], out: &mut [u32; LANES]) {
            _mm256_storeu_si256(out.as_mut_ptr().cast(), v[0]);
            _mm256_storeu_si256(out.as_mut_ptr().add(8).cast(), v[1])
        }
        fn upper_half(self, v: [__m256i; 2]) -> [__m256i; 2] { each!(v => _mm256_srli_epi32::<16>(v)) }
        fn sum(self, v: [__m256; 2]) -> f32 { sum_of_halves(v[0], v[1]) }
        fn count(self, index: [__m256i; 2], a: [__m256; 2], b: [__m256; 2]) -> [__m256i; 2] {
            each!(index, a, b => {
                let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b));
                _mm256_sub_epi32(index, above)
            })
        }
        fn lookup_32(self, table: [[__m256; 2]; 2], index: [__m256i; 2]) -> [__m256; 2] {
            each!(index => {
                // Bits 3 and 4 of the index, moved to the sign, pick the quarter.
                let odd = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<27>(index));
                let [low, high] = each!(table => {
                    let [even, odds] = each!(table => _mm256_permutevar8x32_ps(table, index));
                    _mm256_blendv_ps(even, odds, odd)
                });
                _mm256_blendv_ps(low, high, upper)
            })
        }
        fn transpose(self, v: [[__m256; 2]; LANES]) -> [[__m256; 2]; LANES] {
            let mut out = v;
            // Four squares of eight; the two beside the diagonal change places.
            for (from, to) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                // Squares of four lanes: half h of fours[q][e] is column 4h + e of
                // rows 4q to 4q + 3.
                let mut fours = [[v[0][0]; 4]; 2];
                for (q, fours) in fours.iter_mut().enumerate() {
                    let row = 8 * from + 4 * q;
                    let [r0, r1, r2, r3] = [v[row][to], v[row + 1][to], v[row + 2][to], v[row + 3][to]];
                    let (a, b) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
                    let (c, d) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
                    *fours = [
                        _mm256_shuffle_ps::<0x44>(a, c),
                        _mm256_shuffle_ps::<0xee>(a, c),
                        _mm256_shuffle_ps::<0x44>(b, d),
                        _mm256_shuffle_ps::<0xee>(b, d),
                    ];
                }
                for e in 0..4 {
                    let (top, bottom) = (fours[0][e], fours[1][e]);
                    out[8 * to + e][from] = _mm256_permute2f128_ps::<0x20>(top, bottom);
                    out[8 * to + 4 + e][from] = _mm256_permute2f128_ps::<0x31>(top, bottom);
                }
            }
            out
        }
    }
}

impl Pairs for Avx512Bf16 {
    intrinsics! {
        fn pair(self, first: __m512, second: __m512) -> __m512 {
            // The second operand fills the low half.
            std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(second, first))
        }
        fn dot_pairs(self, a: __m512, b: __m512, sum: __m512) -> __m512 {
            let a = std::mem::transmute::<__m512, __m512bh>(a);
            let b = std::mem::transmute::<__m512, __m512bh>(b);
            _mm512_dpbf16_ps(sum, a, b)
        }
    }
}

impl<const VNNI: bool, const BF16: bool> Dots for Avx512With<VNNI, BF16> {
    type B = __m512i;

    intrinsics! {
        fn load_bytes(self, x: &[u8; BYTES]) -> __m512i { _mm512_loadu_si512(x.as_ptr().cast()) }
        fn store_bytes(self, v: __m512i, out: &mut [u8; BYTES]) {
            _mm512_storeu_si512(out.as_mut_ptr().cast(), v)
        }
        fn load_u32(self, x: &[u8; BYTES]) -> __m512i { _mm512_loadu_si512(x.as_ptr().cast()) }
        fn load_f16(self, x: &[u8; 2 * LANES]) -> __m512 {
            _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast()))
        }
        fn low_halves(self, v: __m512i) -> __m512i { _mm512_and_si512(v, _mm512_set1_epi8(15)) }
        fn high_halves(self, v: __m512i) -> __m512i {
            _mm512_and_si512(_mm512_srli_epi16::<4>(v), _mm512_set1_epi8(15))
        }
        fn load_table(self, table: &[u8; 16]) -> __m512i {
            _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()))
        }
        fn lookup_bytes(self, table: __m512i, index: __m512i) -> __m512i {
            _mm512_shuffle_epi8(table, index)
        }
        fn dot(self, sum: __m512i, w: __m512i, x: [i8; 4]) -> __m512i {
            let x = _mm512_set1_epi32(word(x) as i32);
            if VNNI {
                return _mm512_dpbusd_epi32(sum, w, x);
            }
            // Even and odd bytes by themselves: sums of two products in sixteen
            // bits would saturate.
            let even = _mm512_and_si512(w, _mm512_set1_epi16(255));
            let odd = _mm512_srli_epi16::<8>(w);
            let x_even = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x));
            let x_odd = _mm512_srai_epi16::<8>(x);
            let sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, x_even));
            _mm512_add_epi32(sum, _mm512_madd_epi16(odd, x_odd))
        }
    }
}

impl<const VNNI: bool> Dots for Avx2With<VNNI> {
    type B = [__m256i; 2];

    intrinsics! {
        fn load_bytes(self, x: &[u8; BYTES]) -> [__m256i; 2] {
            [
                _mm256_loadu_si256(x.as_ptr().cast()),
                _mm256_loadu_si256(x.as_ptr().add(BYTES / 2).cast()),
            ]
        }
        fn store_bytes(self, v: [__m256i; 2], out: &mut [u8; BYTES]) {
            _mm256_storeu_si256(out.as_mut_ptr().cast(), v[0]);
            _mm256_storeu_si256(out.as_mut_ptr().add(BYTES / 2).cast(), v[1])
        }
        fn load_u32(self, x: &[u8; BYTES]) -> [__m256i; 2] {
            [
                _mm256_loadu_si256(x.as_ptr().cast()),
                _mm256_loadu_si256(x.as_ptr().add(BYTES / 2).cast()),
            ]
        }
        fn load_f16(self, x: &[u8; 2 * LANES]) -> [__m256; 2] {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(LANES).cast())),
            ]
        }
        fn low_halves(self, v: [__m256i; 2]) -> [__m256i; 2] {
            each!(v => _mm256_and_si256(v, _mm256_set1_epi8(15)))
        }
        fn high_halves(self, v: [__m256i; 2]) -> [__m256i; 2] {
            each!(v => _mm256_and_si256(_mm256_srli_epi16::<4>(v), _mm256_set1_epi8(15)))
        }
        fn load_table(self, table: &[u8; 16]) -> [__m256i; 2] {
            [_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())); 2]
        }
        fn lookup_bytes(self, table: [__m256i; 2], index: [__m256i; 2]) -> [__m256i; 2] {
            each!(table, index => _mm256_shuffle_epi8(table, index))
        }
        fn dot(self, sum: [__m256i; 2], w: [__m256i; 2], x: [i8; 4]) -> [__m256i; 2] {
            let x = _mm256_set1_epi32(word(x) as i32);
            if VNNI {
                return each!(sum, w => _mm256_dpbusd_avx_epi32(sum, w, x));
            }
            // As AVX-512 does it without an instruction for it.
            let x_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
            let x_odd = _mm256_srai_epi16::<8>(x);
            each!(sum, w => {
                let even = _mm256_and_si256(w, _mm256_set1_epi16(255));
                let odd = _mm256_srli_epi16::<8>(w);
                let sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, x_even));
                _mm256_add_epi32(sum, _mm256_madd_epi16(odd, x_odd))
            })
        }
    }
}
