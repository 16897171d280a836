//! What the machine can do at best: kernels that do one thing and nothing else,
//! for benchmarks to divide by. Each says how much it did, or `None` where the
//! level in force lacks the instruction.
#![allow(unsafe_code)]

use std::hint::black_box;

use super::{Isa, LANES, Op, dispatch};
#[cfg(target_arch = "x86_64")]
use super::{Level, level};

/// Streams that a read walks side by side: prefetchers keep more lines in flight
/// with several than with one.
const STREAMS: usize = 4;
/// Sums that do not wait for each other: more than the latency of any of these
/// instructions times how many of it start in a cycle.
const CHAINS: usize = 12;
/// As many of 256 bits, in pairs, as sixteen registers hold.
const FEW_CHAINS: usize = 4;

/// Reads memory; bytes read.
pub fn read(memory: &[f32]) -> usize {
    dispatch(Read(memory));
    size_of_val(memory)
}

/// Writes memory as any store does, which reads each line first; bytes written.
pub fn write(memory: &mut [f32]) -> usize {
    dispatch(Write(memory));
    size_of_val(memory)
}

/// Writes memory past the caches; bytes written.
pub fn write_past_caches(memory: &mut [f32]) -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx2 {
        // The level in force is one that the machine has.
        let lines = x86::write_past_caches(super::Avx2::detect()?, memory);
        return Some(lines * 64);
    }
    let _ = memory;
    None
}

/// Multiplies and adds f32; operations done.
pub fn fma(rounds: usize) -> usize {
    dispatch(Fma(rounds))
}

/// Multiplies and adds pairs of bf16 into f32; operations done.
pub fn dot_bf16(rounds: usize) -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx512 && is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the CPU has the instructions.
        black_box(unsafe { x86::dot_bf16(rounds) });
        return Some(rounds * CHAINS * LANES * 2 * 2);
    }
    let _ = rounds;
    None
}

/// Multiplies and adds fours of 8-bit integers into 32 bits; operations done.
pub fn dot_int8(rounds: usize) -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx512Amx {
        // A round of tiles takes as long as some fifty of vectors.
        return super::tiles::dot_int8(rounds / 64);
    }
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx512 && is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the CPU has the instructions.
        black_box(unsafe { x86::dot_int8(rounds) });
        return Some(rounds * CHAINS * LANES * 4 * 2);
    }
    let _ = rounds;
    None
}

struct Read<'a>(&'a [f32]);

impl Op for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (lines, _) = self.0.as_chunks::<LANES>();
        let each = lines.len() / STREAMS;
        let streams: [&[[f32; LANES]]; STREAMS] =
            std::array::from_fn(|s| &lines[s * each..(s + 1) * each]);
        let mut sums = [isa.splat_u(0); STREAMS];
        for i in 0..each {
            for (sum, stream) in sums.iter_mut().zip(streams) {
                *sum = isa.add_u(*sum, isa.bits(isa.load(&stream[i])));
            }
        }
        for line in &lines[STREAMS * each..] {
            sums[0] = isa.add_u(sums[0], isa.bits(isa.load(line)));
        }
        let mut lanes = [0; LANES];
        for sum in sums {
            isa.store_u(sum, &mut lanes);
            black_box(&lanes);
        }
    }
}

struct Write<'a>(&'a mut [f32]);

impl Op for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (lines, tail) = self.0.as_chunks_mut::<LANES>();
        // Not what a call to memset can write, which streams on its own account.
        let v = isa.splat(black_box(1.0));
        for line in lines {
            isa.store(v, line);
        }
        isa.store_part(v, tail);
    }
}

struct Fma(usize);

impl Op for Fma {
    type Output = usize;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> usize {
        if I::ACCUMULATORS >= CHAINS {
            multiply_add::<I, CHAINS>(isa, self.0)
        } else {
            multiply_add::<I, FEW_CHAINS>(isa, self.0)
        }
    }
}

#[inline(always)]
fn multiply_add<I: Isa, const N: usize>(isa: I, rounds: usize) -> usize {
    // The sums differ: chains that are alike would become one.
    let mut sums: [I::F; N] = std::array::from_fn(|i| isa.splat(i as f32));
    let (a, b) = (isa.splat(black_box(0.5)), isa.splat(black_box(1.0)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = isa.mul_add(*sum, a, b);
        }
    }
    black_box(sums.map(|sum| isa.sum(sum)));
    rounds * N * LANES * 2
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::*;

    use super::{CHAINS, black_box};
    use crate::simd::Avx2;

    /// Whole lines between the ends; how many they are.
    pub fn write_past_caches(_token: Avx2, memory: &mut [f32]) -> usize {
        // SAFETY: eight f32 of any bits are a vector.
        let (_, vectors, _) = unsafe { memory.align_to_mut::<__m256>() };
        let (lines, _) = vectors.as_chunks_mut::<2>();
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { stream(lines) };
        lines.len()
    }

    #[target_feature(enable = "avx2")]
    fn stream(lines: &mut [[__m256; 2]]) {
        let v = _mm256_set1_ps(black_box(1.0));
        for line in lines {
            let [low, high] = line;
            // SAFETY: both are aligned and writable; the fence below comes before
            // anything that reads them.
            unsafe {
                _mm256_stream_ps((low as *mut __m256).cast(), v);
                _mm256_stream_ps((high as *mut __m256).cast(), v);
            }
        }
        _mm_sfence();
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn dot_bf16(rounds: usize) -> [__m512; CHAINS] {
        let mut sums = std::array::from_fn(|i| _mm512_set1_ps(i as f32));
        let ones = black_box(_mm512_set1_epi32(0x3f80_3f80));
        // SAFETY: both are 512 bits.
        let ones: __m512bh = unsafe { std::mem::transmute(ones) };
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, ones, ones);
            }
        }
        sums
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn dot_int8(rounds: usize) -> [__m512i; CHAINS] {
        let mut sums = std::array::from_fn(|i| _mm512_set1_epi32(i as i32));
        let ones = black_box(_mm512_set1_epi8(1));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, ones, ones);
            }
        }
        sums
    }
}
