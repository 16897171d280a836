//! The formats of scaled small floats against plain loops written from their
//! definitions, bit for bit, at every ISA level and for blocks of any size.

mod support;

use half::{bf16, f16};
use support::{Digest, Random, gaussian, int, make, name, on_every_level, quantized, same};
use viva_core::format::{Granularity, Quantized, Scale, Spec};
use viva_core::small_float::{E2M1_VALUES, E4M3_VALUES, E5M2_VALUES};
use viva_core::tensor::DType;

/// Elements of a format, by the magnitudes of their codes in ascending order.
fn magnitudes(format: &str) -> Vec<f32> {
    let finite = |values: &[f32]| {
        let positive = values[..values.len() / 2].iter().copied();
        positive.filter(|v| v.is_finite()).collect()
    };
    match format {
        "fp8_e4m3" | "mxfp8" => finite(&E4M3_VALUES),
        "fp8_e5m2" | "mxfp8_e5m2" => finite(&E5M2_VALUES),
        _ => finite(&E2M1_VALUES),
    }
}

/// The code of the nearest magnitude, of two as near that of lower rank.
fn nearest_by(magnitudes: &[f32], v: f32, rank: impl Fn(usize) -> usize) -> usize {
    let v = f64::from(v.abs());
    let distance = |i: usize| (f64::from(magnitudes[i]) - v).abs();
    (0..magnitudes.len())
        .min_by(|&a, &b| {
            let by_distance = distance(a).partial_cmp(&distance(b)).unwrap();
            by_distance.then(rank(a).cmp(&rank(b)))
        })
        .unwrap()
}

/// The code of the nearest magnitude, an even code of two as near.
fn nearest(magnitudes: &[f32], v: f32) -> usize {
    nearest_by(magnitudes, v, |code| code % 2)
}

fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |most, v| v.abs().max(most))
}

/// 2^floor(log2 v), from repeated halving; zero of zero.
fn binade(v: f32) -> f64 {
    if v == 0.0 {
        return 0.0;
    }
    let (v, mut power) = (f64::from(v), 1f64);
    while power > v {
        power /= 2.0;
    }
    while power * 2.0 <= v {
        power *= 2.0;
    }
    power
}

/// The scale of a block, as the element is divided by it.
fn scale(spec: &Spec, magnitudes: &[f32], x: &[f32], whole: &[f32]) -> f32 {
    let most = largest(x);
    let top = *magnitudes.last().unwrap();
    match spec.format.as_str() {
        // ggml rounds half up, and nothing to the first codes of a top binade
        // that it leaves to the largest value.
        "nvfp4" if spec.scale == Scale::Ggml => {
            let scales = magnitudes_of_scales();
            let code = match most / 6.0 {
                v if v < 2f32.powi(-6) => ((f64::from(v) * 512.0 + 0.5) as usize).min(7),
                v => nearest_by(&scales, v, |code| scales.len() - code),
            };
            scales[if code < 0x78 { code } else { 0x7e }]
        }
        "nvfp4" => {
            let global = 1.0 / largest(whole).max(f32::MIN_POSITIVE) * 2688.0;
            let global = if global.is_finite() { global } else { 1.0 };
            let global = match spec.scale {
                Scale::Floor => binade(global) as f32,
                _ => global,
            };
            let scales = magnitudes_of_scales();
            let code = nearest(&scales, global * (most / 6.0));
            (if code == 0 { 0.125 } else { scales[code] }) / global
        }
        name if name.starts_with("mx") => {
            let least = 2f64.powi(-127);
            if most == 0.0 {
                return least as f32;
            }
            let power = match spec.scale {
                Scale::Bump if f64::from(most) >= 1.75 * binade(most) => 2.0 * binade(most),
                Scale::Round => {
                    let ratio = most / top;
                    let up = f64::from(ratio) > binade(ratio) * std::f64::consts::SQRT_2;
                    return (binade(ratio) * if up { 2.0 } else { 1.0 }).max(least) as f32;
                }
                _ => binade(most),
            };
            (power / binade(top)).max(least) as f32
        }
        _ => match spec.scale_dtype {
            DType::F16 => f16::from_f32(most / top).to_f32(),
            DType::BF16 => bf16::from_f32(most / top).to_f32(),
            _ => most / top,
        },
    }
}

fn magnitudes_of_scales() -> Vec<f32> {
    magnitudes("fp8_e4m3")
}

fn check(spec: &Spec, shape: &[usize], x: &[f32], random: &mut Random, digest: &mut Digest) {
    let what = format!("{shape:?} {spec:?}");
    let tensor = support::f32_tensor(shape, x);
    let q: Quantized = quantized(&tensor, spec);
    let magnitudes = magnitudes(&spec.format);
    let block = match spec.granularity {
        Granularity::Tensor => x.len(),
        Granularity::Row => shape[1],
        Granularity::Block(n) => n,
    };
    let mut expected = Vec::with_capacity(x.len());
    for part in x.chunks(block) {
        let scale = scale(spec, &magnitudes, part, x);
        for &v in part {
            let code = match scale {
                0.0 => 0,
                _ if spec.scale == Scale::Ggml => nearest_by(&magnitudes, v / scale, |code| code),
                _ => nearest(&magnitudes, v / scale),
            };
            // A negative zero is stored as a zero; ggml never stores one.
            let zero = scale == 0.0 || (spec.scale == Scale::Ggml && code == 0);
            let sign = if v < 0.0 && !zero { -1.0 } else { 1.0 };
            expected.push(magnitudes[code] * sign * scale);
        }
    }
    let decoder = q.spec.format().unwrap().decoder(&q).unwrap();
    let n = x.len();
    for round in 0..8 {
        let start = if round == 0 { 0 } else { random.below(n + 1) };
        let end = if round == 0 {
            n
        } else {
            start + random.below(n - start + 1)
        };
        same(
            &support::decoded(&*decoder, start..end),
            &expected[start..end],
            format_args!("{start}..{end} of {what}"),
        );
    }
    digest.parts(&q);
}

fn specs(block: i64) -> Vec<Spec> {
    let mut specs = Vec::new();
    for format in ["fp8_e4m3", "fp8_e5m2"] {
        for block_size in [name("row"), name("tensor"), int(block)] {
            for dtype in ["f32", "f16", "bf16"] {
                let options = [
                    ("block_size", block_size.clone()),
                    ("scale_dtype", name(dtype)),
                ];
                specs.push(make(format, &options));
            }
        }
    }
    specs
}

fn mx_specs() -> Vec<Spec> {
    let mut specs = Vec::new();
    for rule in ["step", "floor", "ggml"] {
        specs.push(make("nvfp4", &[("scale", name(rule))]));
    }
    specs.push(make("mxfp4", &[("scale", name("ggml"))]));
    for format in ["mxfp8", "mxfp8_e5m2", "mxfp4"] {
        for rule in ["floor", "bump", "round"] {
            specs.push(make(format, &[("scale", name(rule))]));
        }
    }
    specs
}

fn kinds(n: usize, seed: u64) -> Vec<Vec<f32>> {
    let g = gaussian(n, seed);
    let mut random = Random(seed);
    let ties = [
        0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 448.0, 464.0, 0.0, -0.0,
    ];
    let signs = [1.0, -1.0];
    vec![
        g.clone(),
        g.iter().map(|v| v * v * v * 1e-3).collect(),
        (0..n)
            .map(|i| g[i] * if i / 32 % 2 == 0 { 0.0 } else { 1.0 })
            .collect(),
        (0..n)
            .map(|_| ties[random.below(ties.len())] * signs[random.below(2)])
            .collect(),
        g.iter().map(|v| v * 1e-42).collect(),
        (0..n)
            .map(|i| g[i] * 2f32.powi(i as i32 % 40 - 20))
            .collect(),
    ]
}

#[test]
fn fp8_of_every_size() {
    on_every_level("fp8_of_every_size", |digest| {
        let mut random = Random(1);
        for block in [2, 3, 15, 16, 17, 33, 64] {
            let shape = [3, 2 * block as usize];
            for x in kinds(6 * block as usize, block as u64) {
                // Where f16 has no scale so small, or none so large, is tested
                // elsewhere.
                for spec in specs(block) {
                    check(&spec, &shape, &x, &mut random, digest);
                }
            }
        }
    });
}

#[test]
fn mx_and_nvfp4_of_many_blocks() {
    on_every_level("mx_and_nvfp4_of_many_blocks", |digest| {
        let mut random = Random(2);
        for shape in [[1, 32], [3, 96], [5, 1024]] {
            for x in kinds(shape[0] * shape[1], shape[1] as u64) {
                for spec in mx_specs() {
                    check(&spec, &shape, &x, &mut random, digest);
                }
            }
        }
    });
}
