//! The signed dynamic map of bitsandbytes, and double quantization: scales in 8
//! bits through it (Dettmers, "8-Bit Approximations for Parallelism in Deep
//! Learning", 2015), bit for bit as its CPU library does it.
//!
//! The map's 256 values have an exponent and a fraction that share seven bits,
//! so that both 1 and 5.5e-7 have a neighbour.

use std::sync::LazyLock;

use crate::simd::dispatch;
use crate::simd::stats::Absmax;

/// Scales that share one nested absmax.
pub const BLOCK: usize = 256;

/// The values, ascending: 127 negative, zero, 127 positive and 1.
pub static DYNAMIC_MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut values = Vec::with_capacity(256);
    for exponent in 0..7 {
        // Means of neighbouring boundaries that cut [0.1, 1] into 2^exponent,
        // fused as torch.linspace computes them.
        let n = 1usize << exponent;
        let step = (1.0f32 - 0.1) / n as f32;
        let boundary = |i: usize| {
            if i < n.div_ceil(2) {
                step.mul_add(i as f32, 0.1)
            } else {
                (-step).mul_add((n - i) as f32, 1.0)
            }
        };
        let power = 10f64.powi(exponent - 6) as f32;
        for i in 0..n {
            let mean = (boundary(i) + boundary(i + 1)) / 2.0;
            values.push(power * mean);
            values.push(-(power * mean));
        }
    }
    values.push(0.0);
    values.push(1.0);
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|i| values[i])
});

/// Codes on the grid of 65,536 points to which bitsandbytes rounds first.
static CODE_OF_POINT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let map = &*DYNAMIC_MAP;
    let mut below = 0;
    (0..=65535u32)
        .map(|j| {
            let value = -1.0 + (2 * j) as f32 / 65535.0;
            while below < 255 && 0.5 * (map[below] + map[below + 1]) < value {
                below += 1;
            }
            below as u8
        })
        .collect()
});

/// Scales in 8 bits: `scale = map[code] · absmax + offset`, absmax that of its block.
pub struct Nested {
    pub codes: Vec<u8>,
    pub absmax: Vec<f32>,
    pub offset: f32,
}

/// Codes of one block: the nearest of the values `map[code] · absmax`.
pub fn encode(x: &[f32], absmax: f32, codes: &mut [u8]) {
    if absmax == 0.0 {
        // As bitsandbytes does it: the value is a zero all the same.
        codes.fill(0);
        return;
    }
    let points = &*CODE_OF_POINT;
    let inv = 1.0 / absmax;
    for (code, &v) in codes.iter_mut().zip(x) {
        let v = (v * inv).clamp(-1.0, 1.0);
        *code = points[((v + 1.0) * 0.5 * 65535.0 + 0.5) as usize];
    }
}

/// Takes the mean off the scales and quantizes the rest.
pub fn double_quantize(scales: &[f32]) -> Nested {
    let offset = torch_sum(scales) / scales.len().max(1) as f32;
    let mut codes = vec![0u8; scales.len()];
    let absmax = scales
        .chunks(BLOCK)
        .zip(codes.chunks_mut(BLOCK))
        .map(|(block, codes)| {
            let rest: Vec<f32> = block.iter().map(|s| s - offset).collect();
            let absmax = dispatch(Absmax(&rest));
            encode(&rest, absmax, codes);
            absmax
        })
        .collect();
    Nested {
        codes,
        absmax,
        offset,
    }
}

/// The sum of f32 in the order in which torch adds on one thread: eight lanes,
/// four accumulators of each, and cascades of them, so that rounding errors
/// grow with the logarithm of the length.
fn torch_sum(a: &[f32]) -> f32 {
    const ROWS: usize = 4;
    const LEVELS: usize = 4;
    let lanes = if a.len() < 8 { 1 } else { 8 };
    let width = ROWS * lanes;
    let vectors = a.len() / lanes;
    let rows = vectors / ROWS;
    let power = (rows.max(1).next_power_of_two().ilog2() as usize / LEVELS).max(4);
    let step = 1 << power;
    let mut sums = vec![[0f32; ROWS * 8]; LEVELS];
    let add_row = |sum: &mut [f32; ROWS * 8], i: usize| {
        for (s, v) in sum.iter_mut().zip(&a[i * width..(i + 1) * width]) {
            *s += v;
        }
    };
    let mut i = 0;
    while i + step <= rows {
        for _ in 0..step {
            add_row(&mut sums[0], i);
            i += 1;
        }
        for level in 1..LEVELS {
            let lower = std::mem::replace(&mut sums[level - 1], [0.0; ROWS * 8]);
            for (s, v) in sums[level].iter_mut().zip(lower) {
                *s += v;
            }
            if i & ((step - 1) << (level * power)) != 0 {
                break;
            }
        }
    }
    while i < rows {
        add_row(&mut sums[0], i);
        i += 1;
    }
    let (first, rest) = sums.split_at_mut(1);
    let total = &mut first[0];
    for level in rest {
        for (s, v) in total.iter_mut().zip(level.iter()) {
            *s += v;
        }
    }
    for vector in rows * ROWS..vectors {
        for (s, v) in total.iter_mut().zip(&a[vector * lanes..][..lanes]) {
            *s += v;
        }
    }
    for row in 1..ROWS {
        for lane in 0..lanes {
            total[lane] += total[row * lanes + lane];
        }
    }
    let mut sum = 0f32;
    for v in &a[vectors * lanes..] {
        sum += v;
    }
    for v in &total[..lanes] {
        sum += v;
    }
    sum
}
