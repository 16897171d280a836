//! Every format against plain loops written from its definition, bit for bit,
//! at every ISA level: codes, scales, zero points and decoded values.

mod support;

use half::{bf16, f16};
use support::{Digest, Random, gaussian, int, make, name, on_every_level, quantized, same, yes};
use viva_core::format::{Granularity, OptionValue, Quantized, Scale, Spec, Zero};
use viva_core::formats::codebook::{FP4, NF4};
use viva_core::formats::dynamic_map::DYNAMIC_MAP;
use viva_core::tensor::{DType, Tensor};

/// What a quantized tensor has to be, one code an element.
#[derive(Default)]
struct Expected {
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
    biases: Vec<f32>,
    values: Vec<f32>,
}

fn stored(dtype: DType, v: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(v).to_f32(),
        DType::BF16 => bf16::from_f32(v).to_f32(),
        DType::F64 => f64::from(v) as f32,
        _ => v,
    }
}

fn least(x: &[f32]) -> f32 {
    let mut least = 0.0;
    for &v in x {
        if v < least {
            least = v;
        }
    }
    least
}

fn greatest(x: &[f32]) -> f32 {
    let mut greatest = 0.0;
    for &v in x {
        if v > greatest {
            greatest = v;
        }
    }
    greatest
}

fn largest(x: &[f32]) -> f32 {
    let mut largest = 0.0;
    for &v in x {
        if v.abs() > largest {
            largest = v.abs();
        }
    }
    largest
}

/// One block of an integer format; `source` is what the scale is taken from.
fn int_block(out: &mut Expected, bits: u32, spec: &Spec, source: &[f32], x: &[f32]) {
    let top = 2f32.powi(bits as i32) - 1.0;
    if spec.zero == Zero::Float {
        return line_block(out, top, spec, x);
    }
    if spec.scale == Scale::Absmax {
        // LLM.int8(): f16 first, times 127/absmax in two roundings.
        let most = stored(DType::F16, largest(source));
        for &v in x {
            let factor = (1.0 / most) * 127.0;
            let q = if most == 0.0 {
                0.0
            } else {
                (stored(DType::F16, v) * factor).round_ties_even()
            };
            // A code is an integer: it has no negative zero.
            let q = q as i8;
            out.codes.push(q as u8);
            out.values
                .push(f32::from(q) * most * f32::from_bits(0x3c01_0204));
        }
        out.scales.push(most);
        return;
    }
    if spec.symmetric {
        let (lo, hi, offset, divisor) = if bits == 8 {
            (-127.0, 127.0, 0, 127.0)
        } else {
            let half = 1 << (bits - 1);
            (-(half as f32), (half - 1) as f32, half, top / 2.0)
        };
        let scale = stored(spec.scale_dtype, largest(source) / divisor);
        for &v in x {
            let q = match scale {
                0.0 => 0.0,
                _ => (v / scale).round_ties_even().clamp(lo, hi),
            };
            out.codes.push((q as i32 + offset) as u8);
            out.values.push(q as i32 as f32 * scale);
        }
        out.scales.push(scale);
        return;
    }
    let (low, high) = (least(source), greatest(source));
    // In halves, since the range of finite values need not be finite.
    let scale = stored(spec.scale_dtype, (high / 2.0 - low / 2.0) / (top / 2.0));
    let zero = match scale {
        0.0 => 0.0,
        _ => (-low / scale).round_ties_even().clamp(0.0, top),
    };
    for &v in x {
        let code = match scale {
            0.0 => 0.0,
            _ => ((v / scale).round_ties_even() + zero).clamp(0.0, top),
        };
        out.codes.push(code as u8);
        out.values.push((code as i32 - zero as i32) as f32 * scale);
    }
    out.scales.push(scale);
    out.zeros.push(zero as u8);
}

/// A float zero point as mlx finds it, in a block of its own.
fn line_block(out: &mut Expected, top: f32, spec: &Spec, x: &[f32]) {
    let (mut low, mut high) = (x[0], x[0]);
    for &v in x {
        low = if v < low { v } else { low };
        high = if v > high { v } else { high };
    }
    let step = ((high - low) / top).max(1e-7);
    let (mut scale, edge) = match low.abs() > high.abs() {
        true => (step, low),
        false => (-step, high),
    };
    let mut bias = 0.0;
    let steps = (edge / scale).round_ties_even();
    if steps != 0.0 {
        (scale, bias) = (edge / steps, edge);
    }
    let (by, from) = (
        stored(spec.scale_dtype, scale),
        stored(spec.scale_dtype, bias),
    );
    for &v in x {
        let code = ((v - bias) / scale).round_ties_even().clamp(0.0, top);
        out.codes.push(code as u8);
        out.values.push(code as u8 as f32 * by + from);
    }
    out.scales.push(by);
    out.biases.push(from);
}

/// The table's codes in ascending order of value, the midpoints between them.
fn ranks(table: &[f32; 16]) -> (Vec<u8>, Vec<f32>) {
    let mut codes: Vec<u8> = (0..16).collect();
    codes.sort_by(|&a, &b| {
        let key = |c: u8| table[usize::from(c)];
        key(a).partial_cmp(&key(b)).unwrap().then(a.cmp(&b))
    });
    let midpoints = (0..15)
        .map(|i| (table[usize::from(codes[i])] + table[usize::from(codes[i + 1])]) / 2.0)
        .collect();
    (codes, midpoints)
}

fn table_block(out: &mut Expected, table: &[f32; 16], block: usize, x: &[f32]) {
    let (codes, midpoints) = ranks(table);
    let most = largest(x);
    let divisor = if most > 1e-38 { most } else { 1e-38 };
    let full = x.len() == block;
    let absmax = if full { most } else { divisor };
    for &v in x {
        let t = if full {
            v * (1.0 / divisor)
        } else {
            v / divisor
        };
        let t = t.clamp(-1.0, 1.0);
        let rank = midpoints.iter().filter(|&&m| m < t).count();
        out.codes.push(codes[rank]);
        out.values.push(table[usize::from(codes[rank])] * absmax);
    }
    out.scales.push(absmax);
}

fn expected(spec: &Spec, shape: &[usize], x: &[f32]) -> Expected {
    let mut out = Expected::default();
    let row = shape.last().copied().unwrap_or(1);
    let table = match spec.format.as_str() {
        "nf4" => Some(&NF4.table),
        "fp4" => Some(&FP4.table),
        _ => None,
    };
    let bits = width(spec);
    match (spec.granularity, table) {
        (Granularity::Block(n), Some(table)) => {
            x.chunks(n).for_each(|x| table_block(&mut out, table, n, x));
        }
        (Granularity::Block(n), None) => {
            x.chunks(n)
                .for_each(|b| int_block(&mut out, bits, spec, b, b));
        }
        (Granularity::Row, _) => {
            x.chunks(row)
                .for_each(|r| int_block(&mut out, bits, spec, r, r));
        }
        (Granularity::Tensor, _) => int_block(&mut out, bits, spec, x, x),
    }
    out
}

/// Bits of a code.
fn width(spec: &Spec) -> u32 {
    match spec.format.strip_prefix("int") {
        Some(bits) => bits.parse().unwrap(),
        None => 4,
    }
}

/// Codes as the format packs them.
fn packed(spec: &Spec, codes: &[u8]) -> Vec<u8> {
    if !spec.format.starts_with("int") {
        // An odd last code is paired with that of zero.
        let padding = if spec.format == "nf4" { 7 } else { 0 };
        return codes
            .chunks(2)
            .map(|pair| pair[0] << 4 | pair.get(1).copied().unwrap_or(padding))
            .collect();
    }
    let bits = width(spec) as usize;
    let mut stream = vec![0u8; (codes.len() * bits).div_ceil(8)];
    for (i, code) in codes.iter().enumerate() {
        for bit in (0..bits).filter(|b| code >> b & 1 == 1) {
            stream[(i * bits + bit) / 8] |= 1 << ((i * bits + bit) % 8);
        }
    }
    stream
}

fn check_parts(q: &Quantized, e: &Expected, what: &str) {
    let codes = packed(&q.spec, &e.codes);
    assert!(q.part("codes").unwrap().bytes() == codes, "codes of {what}");
    let scales = if q.spec.format.ends_with("fp4") || q.spec.format == "nf4" {
        "absmax"
    } else {
        "scales"
    };
    let scales = q.part(scales).unwrap();
    assert_eq!(scales.dtype(), q.spec.scale_dtype, "{what}");
    same(
        &scales.to_f32_vec(),
        &e.scales,
        format_args!("scales of {what}"),
    );
    if q.spec.zero == Zero::Float {
        let biases = q.part("biases").unwrap();
        assert_eq!(biases.dtype(), q.spec.scale_dtype, "{what}");
        same(
            &biases.to_f32_vec(),
            &e.biases,
            format_args!("biases of {what}"),
        );
    } else if !q.spec.symmetric {
        let zeros = packed(&q.spec, &e.zeros);
        assert_eq!(
            q.part("zero_points").unwrap().bytes(),
            zeros,
            "zeros of {what}"
        );
    }
}

/// The whole, and windows that begin and end anywhere.
fn check_values(q: &Quantized, values: &[f32], random: &mut Random, what: &str) {
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
        let got = support::dequantized(q, dtype);
        let expected: Vec<f32> = values.iter().map(|&v| stored(dtype, v)).collect();
        same(
            &got.to_f32_vec(),
            &expected,
            format_args!("{dtype:?} values of {what}"),
        );
    }
    let decoder = q.spec.format().unwrap().decoder(q).unwrap();
    let n = values.len();
    let window = |start: usize, end: usize| {
        same(
            &support::decoded(&*decoder, start..end),
            &values[start..end],
            format_args!("{start}..{end} of {what}"),
        );
    };
    if n <= 20 {
        (0..n).for_each(|start| (start..=n).for_each(|end| window(start, end)));
    } else {
        for _ in 0..12 {
            let start = random.below(n + 1);
            window(start, start + random.below(n - start + 1));
        }
    }
}

fn check(spec: &Spec, x: &Tensor, what: &str, random: &mut Random, digest: &mut Digest) {
    let what = format!("{what} {:?} {x:?} {spec:?}", x.dtype());
    let e = expected(spec, x.shape(), &x.to_f32_vec());
    let q = quantized(x, spec);
    assert_eq!(
        (q.shape.as_slice(), q.dtype),
        (x.shape(), x.dtype()),
        "{what}"
    );
    check_parts(&q, &e, &what);
    check_values(&q, &e.values, random, &what);
    digest.parts(&q);
}

/// Values of a kind that has a way to go wrong.
fn kinds(n: usize, seed: u64) -> Vec<(&'static str, Vec<f32>)> {
    let g = gaussian(n, seed);
    let mut random = Random(seed);
    let mut draw =
        |from: &[f32]| -> Vec<f32> { (0..n).map(|_| from[random.below(from.len())]).collect() };
    // One element sets the scale, the others lie between two codes.
    let mut halves = draw(&[0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 4.5, 5.5, 6.5, -6.5]);
    halves[n / 2] = [127.0, 7.5, 8.0, 255.0][seed as usize % 4];
    let between: Vec<f32> = [&NF4.table, &FP4.table]
        .into_iter()
        .flat_map(|table| ranks(table).1)
        .flat_map(|m| [m, m.next_up(), m.next_down()])
        .collect();
    let mut thresholds = draw(&between);
    thresholds[n / 3] = 1.0;
    vec![
        ("zeros", draw(&[0.0, -0.0])),
        ("halves", halves),
        ("thresholds", thresholds),
        ("positive", g.iter().map(|v| v.abs() + 0.01).collect()),
        ("negative", g.iter().map(|v| -v.abs() - 0.01).collect()),
        ("subnormal", g.iter().map(|v| v * 1e-39).collect()),
        ("tiny", g.iter().map(|v| v * 1e-30).collect()),
        ("some zeros", draw(&[0.0, -0.0, 1.0, -0.3, 1e-42, -7e-8])),
        (
            "wide",
            (0..n)
                .map(|i| g[i] * 10f32.powi(i as i32 % 9 - 5))
                .collect(),
        ),
        ("gaussian", g),
    ]
}

fn int_specs(block_size: OptionValue) -> Vec<Spec> {
    let mut specs = Vec::new();
    let kinds = [(true, "integer"), (false, "integer"), (false, "float")];
    for format in ["int8", "int6", "int5", "int4", "int3", "int2"] {
        for (symmetric, zero) in kinds {
            // One bias for a whole tensor is none that MLX knows.
            if zero == "float" && block_size == name("tensor") {
                continue;
            }
            for dtype in ["f32", "f16", "bf16"] {
                let options = [
                    ("block_size", block_size.clone()),
                    ("symmetric", yes(symmetric)),
                    ("zero_point", name(zero)),
                    ("scale_dtype", name(dtype)),
                ];
                specs.push(make(format, &options));
            }
        }
    }
    let absmax = [
        ("block_size", block_size),
        ("scale", name("absmax")),
        ("scale_dtype", name("f32")),
    ];
    specs.push(make("int8", &absmax));
    specs
}

fn table_specs(blocks: &[i64]) -> Vec<Spec> {
    ["nf4", "fp4"]
        .into_iter()
        .flat_map(|f| {
            blocks
                .iter()
                .map(move |&b| make(f, &[("block_size", int(b))]))
        })
        .collect()
}

#[test]
fn rows_of_every_length() {
    on_every_level("rows_of_every_length", |digest| {
        let mut random = Random(1);
        let specs: Vec<Spec> = [name("row"), name("tensor")]
            .into_iter()
            .flat_map(int_specs)
            .chain(table_specs(&[2, 16, 64]))
            .collect();
        for row in (1..=70).chain([100, 129]) {
            for rows in [1, 3] {
                let shape = [rows, row];
                for (kind, x) in kinds(rows * row, (row + rows) as u64) {
                    let x = support::f32_tensor(&shape, &x);
                    for spec in &specs {
                        check(spec, &x, kind, &mut random, digest);
                    }
                }
            }
        }
    });
}

#[test]
fn blocks_of_every_size() {
    on_every_level("blocks_of_every_size", |digest| {
        let mut random = Random(2);
        for block in [2, 6, 16, 18, 32, 64, 130] {
            let mut specs = int_specs(int(block));
            if block & (block - 1) == 0 {
                specs.extend(table_specs(&[block]));
            }
            let shape = [3, 2 * block as usize];
            for (kind, x) in kinds(6 * block as usize, block as u64) {
                let x = support::f32_tensor(&shape, &x);
                for spec in &specs {
                    check(spec, &x, kind, &mut random, digest);
                }
            }
        }
    });
}

#[test]
fn shapes_other_than_matrices() {
    on_every_level("shapes_other_than_matrices", |digest| {
        let mut random = Random(3);
        for shape in [vec![], vec![1], vec![33], vec![2, 3, 5], vec![1, 1, 2, 17]] {
            let n = shape.iter().product();
            for (kind, x) in kinds(n, n as u64) {
                let x = support::f32_tensor(&shape, &x);
                for spec in int_specs(name("row")).iter().chain(&table_specs(&[64])) {
                    check(spec, &x, kind, &mut random, digest);
                }
            }
        }
    });
}

#[test]
fn every_source_dtype_at_any_address() {
    on_every_level("every_source_dtype_at_any_address", |digest| {
        let mut random = Random(4);
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            for (kind, x) in kinds(5 * 66, 4) {
                let shape = [5, 66];
                let aligned = support::float_tensor(dtype, &shape, &x);
                let unaligned = support::unaligned_tensor(dtype, &shape, &x);
                for spec in int_specs(name("row")).iter().chain(&table_specs(&[64])) {
                    check(spec, &aligned, kind, &mut random, digest);
                    check(spec, &unaligned, kind, &mut random, digest);
                }
            }
        }
    });
}

#[test]
fn magnitudes_that_f32_scales_hold() {
    on_every_level("magnitudes_that_f32_scales_hold", |digest| {
        let mut random = Random(5);
        let g = gaussian(3 * 64, 5);
        for factor in [1e-44, 1e-38, 1e20, 1e30, 4e37] {
            let x: Vec<f32> = g.iter().map(|v| v * factor).collect();
            let x = support::f32_tensor(&[3, 64], &x);
            let wide = |s: &Spec| s.scale_dtype == DType::F32 && s.scale == Scale::Step;
            let ints = int_specs(name("row")).into_iter().filter(wide);
            for spec in ints.chain(table_specs(&[32, 128])) {
                check(&spec, &x, "scaled", &mut random, digest);
            }
        }
    });
}

/// Tensors that several tasks share, with rows and blocks that no byte ends.
#[test]
fn tensors_of_many_chunks() {
    on_every_level("tensors_of_many_chunks", |digest| {
        let mut random = Random(6);
        for shape in [[3, 20_001], [301, 129], [40_000, 1], [2, 16_384]] {
            let n = shape[0] * shape[1];
            let x = support::f32_tensor(&shape, &gaussian(n, 6));
            let specs = [name("row"), name("tensor")]
                .into_iter()
                .flat_map(int_specs);
            for spec in specs.chain(table_specs(&[2, 64, 4096, 32_768])) {
                check(&spec, &x, "chunks", &mut random, digest);
            }
        }
    });
}

/// Nested codes and values, given the offset (which the golden fixture fixes).
#[test]
fn double_quantized_scales() {
    on_every_level("double_quantized_scales", |digest| {
        let map = &*DYNAMIC_MAP;
        let mut random = Random(7);
        for (format, n) in [
            ("nf4", 7),
            ("nf4", 64 * 300 + 9),
            ("fp4", 64 * 256),
            ("fp4", 1),
        ] {
            let plain = make(format, &[]);
            let spec = make(format, &[("double_quant", yes(true))]);
            let mut x = gaussian(n, n as u64);
            x.iter_mut().skip(64).take(64).for_each(|v| *v = 0.0);
            let t = support::f32_tensor(&[n], &x);
            let e = expected(&plain, &[n], &x);
            let q = quantized(&t, &spec);
            let offset = q.part("nested_offset").unwrap().to_f32_vec()[0];
            let mean = e.scales.iter().map(|&s| f64::from(s)).sum::<f64>() / e.scales.len() as f64;
            assert!((f64::from(offset) - mean).abs() <= 1e-6 * mean);
            let (mut codes, mut nested, mut absmax) = (Vec::new(), Vec::new(), Vec::new());
            for block in e.scales.chunks(256) {
                let d: Vec<f32> = block.iter().map(|s| s - offset).collect();
                let most = largest(&d);
                nested.push(most);
                for d in d {
                    let code = if most == 0.0 {
                        0
                    } else {
                        let v = (d * (1.0 / most)).clamp(-1.0, 1.0);
                        let point = ((v + 1.0) * 0.5 * 65535.0 + 0.5).trunc();
                        let point = -1.0 + 2.0 * point / 65535.0;
                        (0..255)
                            .filter(|&i| 0.5 * (map[i] + map[i + 1]) < point)
                            .count()
                    };
                    codes.push(code as u8);
                    absmax.push(map[code] * most + offset);
                }
            }
            assert_eq!(q.part("absmax").unwrap().bytes(), codes);
            let part = q.part("nested_absmax").unwrap().to_f32_vec();
            same(&part, &nested, format_args!("nested absmax of {format}"));
            let table = if format == "nf4" {
                &NF4.table
            } else {
                &FP4.table
            };
            let values: Vec<f32> = (0..n)
                .map(|i| table[usize::from(e.codes[i])] * absmax[i / 64])
                .collect();
            check_values(&q, &values, &mut random, format);
            digest.parts(&q);
        }
    });
}
