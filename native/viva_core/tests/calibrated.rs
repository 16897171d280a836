//! Methods that see activations, against definitions in f64 and against
//! rounding to nearest.

mod support;

use support::observed::{activations, factor_of_inverse, output_error, statistics};
use support::{Digest, every_spec, f32_tensor, gaussian, int, make, name, on_every_level, yes};
use viva_core::calibration::{Calibration, SAMPLES, Statistics};
use viva_core::error::Error;
use viva_core::format::{Method, OptionValue, Quantized, Scale, Spec, Zero};
use viva_core::method::calibrated::{Calibrated, Scaling, quantize_calibrated, resolve};
use viva_core::method::candidates::DuoScaling;
use viva_core::method::gptq::{Gptq, Order};
use viva_core::ops::{Cancel, dump, matmul, quantize};
use viva_core::tensor::{DType, Tensor};

const PLAIN: Calibrated = Calibrated {
    rotate: false,
    scaling: Scaling::None,
    clip: false,
    gptq: None,
};

const GPTQ: Calibrated = Calibrated {
    gptq: Some(Gptq {
        damping: 0.01,
        order: Order::Activation,
        sparsity: None,
    }),
    ..PLAIN
};

const AWQ: Calibrated = Calibrated {
    scaling: Scaling::Awq(DuoScaling::Both),
    clip: true,
    ..PLAIN
};

fn calibrated(w: &Tensor, spec: &Spec, s: &Statistics, how: &Calibrated) -> Quantized {
    let q = quantize_calibrated(w, spec, s, how, &Cancel::new()).unwrap();
    q.validate().unwrap();
    q
}

/// The relative error of the layer's output.
fn error_of(x: &[f32], w: &[f32], q: &Quantized) -> f64 {
    let back = support::dequantized(q, DType::F32).to_f32_vec();
    output_error(x, w, &back, q.shape[1])
}

fn grids() -> Vec<Spec> {
    let fits = |spec: &Spec| {
        let name = spec.format.as_str();
        spec.scale != Scale::Absmax || ["nf4", "fp4"].contains(&name)
    };
    every_spec()
        .into_iter()
        .filter(fits)
        .filter(|s| {
            s.format.starts_with("int")
                || "nf4 fp4 nvfp4".contains(&s.format)
                || s.format.starts_with("fp8")
                || s.format.starts_with("mx")
        })
        .collect()
}

/// With uncorrelated columns there is nothing to make up for: every grid has to
/// give the bytes of its format's own rounding to nearest.
#[test]
fn without_correlation_gptq_is_rounding_to_nearest() {
    let (n, k) = (70, 96);
    let mut identity = vec![0f32; k * k];
    for i in 0..k {
        identity[i * k + i] = 1.0;
    }
    let s = statistics(&identity, k);
    let mut data = gaussian(n * k, 5);
    data[..k].fill(0.0);
    let w = f32_tensor(&[n, k], &data);
    for spec in grids() {
        // Where the codes of MLX's rule are of scales that it rounds later, ours
        // are of the stored ones.
        let mlx = spec.zero == Zero::Float && spec.method == Method::Rtn;
        if mlx || k % spec.block_len(&[n, k]) != 0 {
            continue;
        }
        let expected = support::quantized(&w, &spec);
        for order in [Order::Natural, Order::Activation] {
            let how = Calibrated {
                gptq: Some(Gptq {
                    damping: 0.01,
                    order,
                    sparsity: None,
                }),
                ..PLAIN
            };
            let got = calibrated(&w, &spec, &s, &how);
            if spec.method == Method::Mse {
                // More scales are tried there.
                let error = |q: &Quantized| {
                    let back = support::dequantized(q, DType::F32).to_f32_vec();
                    let errors = data.iter().zip(back).map(|(x, y)| f64::from(x - y));
                    errors.map(|e| e * e).sum::<f64>()
                };
                let (ours, its) = (error(&got), error(&expected));
                assert!(
                    ours <= its * (1.0 + 1e-6),
                    "{spec:?}, {order:?}: {ours} {its}"
                );
                continue;
            }
            for ((part, a), (_, b)) in expected.parts.iter().zip(&got.parts) {
                let pairs = a.bytes().iter().zip(b.bytes());
                let differ = pairs.filter(|(a, b)| a != b).count();
                assert_eq!(differ, 0, "bytes of {part} of {spec:?}, {order:?}");
            }
        }
    }
}

/// The algorithm as the paper has it, in f64: the Cholesky factor of the inverse,
/// columns in order, groups of the weights as they are when reached.
fn textbook(w: &[f32], x: &[f32], k: usize, group: usize, spec: &Spec) -> Vec<f64> {
    let u = factor_of_inverse(x, k);
    let mut out = Vec::new();
    for row in w.chunks_exact(k) {
        let mut w: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
        let mut fit = (0.0, 0.0);
        for j in 0..k {
            if j % group == 0 {
                let now: Vec<f32> = w[j..j + group].iter().map(|&v| v as f32).collect();
                let q = support::quantized(&f32_tensor(&[1, group], &now), spec);
                let scale = q.part("scales").unwrap().to_f32_vec()[0];
                let zero = q.part("zero_points").unwrap().bytes()[0] & 15;
                fit = (f64::from(scale), f64::from(zero));
            }
            let steps = (w[j] / fit.0).round_ties_even();
            let value = steps.clamp(-fit.1, 15.0 - fit.1) * fit.0;
            let error = (w[j] - value) / u[j][j];
            for i in j + 1..k {
                w[i] -= error * u[j][i];
            }
            out.push(value);
        }
    }
    out
}

#[test]
fn gptq_is_what_the_paper_says() {
    let (n, k, group) = (37, 64, 16);
    let x = activations(200, k, 7);
    let w = gaussian(n * k, 8);
    let spec = make("int4", &[("block_size", int(group as i64))]);
    let how = Calibrated {
        gptq: Some(Gptq {
            damping: 0.01,
            order: Order::Natural,
            sparsity: None,
        }),
        ..PLAIN
    };
    let q = calibrated(&f32_tensor(&[n, k], &w), &spec, &statistics(&x, k), &how);
    let got = support::dequantized(&q, DType::F32).to_f32_vec();
    let expected = textbook(&w, &x, k, group, &spec);
    // One code of a row that falls the other way changes those after it.
    let rows = got.chunks_exact(k).zip(expected.chunks_exact(k));
    let differ = rows
        .filter(|(a, b)| {
            a.iter()
                .zip(*b)
                .any(|(a, b)| (f64::from(*a) - b).abs() > 1e-4)
        })
        .count();
    assert!(differ <= 1, "{differ} of {n} rows differ");
}

#[test]
fn activations_make_every_grid_better() {
    let (n, k) = (64, 256);
    let (seen, unseen) = (activations(512, k, 11), activations(256, k, 12));
    let data = gaussian(n * k, 13);
    let w = f32_tensor(&[n, k], &data);
    let s = statistics(&seen, k);
    let mse = |n| [("block_size", int(n)), ("method", name("mse"))];
    for spec in [
        make("int8", &[]),
        make("int4", &[]),
        make("int4", &mse(64)),
        make("int3", &[("act_order", yes(true))]),
        make("int2", &mse(32)),
        make("nf4", &[]),
        make("nf4", &[("double_quant", yes(true))]),
        make("fp8_e4m3", &[]),
        make("mxfp4", &[]),
        make("nvfp4", &[]),
    ] {
        let error = |how| error_of(&unseen, &data, &calibrated(&w, &spec, &s, how));
        let (rtn, gptq, awq) = (error(&PLAIN), error(&GPTQ), error(&AWQ));
        let both = error(&Calibrated {
            scaling: Scaling::Awq(DuoScaling::Both),
            ..GPTQ
        });
        println!(
            "{}: rtn {rtn:.5} awq {awq:.5} gptq {gptq:.5} both {both:.5}",
            spec.format
        );
        assert!(gptq < 0.93 * rtn, "{spec:?}: gptq {gptq}, rtn {rtn}");
        assert!(
            both < 0.95 * rtn,
            "{spec:?}: awq and gptq {both}, rtn {rtn}"
        );
        assert!(awq < 1.001 * rtn, "{spec:?}: awq {awq}, rtn {rtn}");
    }
}

/// What is tried is judged by the output, so that trying more costs nothing of it.
#[test]
fn of_both_scalings_of_columns_the_better_one_is_taken() {
    let (n, k) = (48, 256);
    let x = activations(200, k, 14);
    let s = statistics(&x, k);
    let mut data = gaussian(n * k, 15);
    let strengths: Vec<f32> = gaussian(k, 16).iter().map(|v| v.exp()).collect();
    let spec = make("int4", &[]);
    let errors = |data: &[f32]| {
        [DuoScaling::No, DuoScaling::Yes, DuoScaling::Both].map(|duo| {
            let how = Calibrated {
                scaling: Scaling::Awq(duo),
                ..PLAIN
            };
            error_of(
                &x,
                data,
                &calibrated(&f32_tensor(&[n, k], data), &spec, &s, &how),
            )
        })
    };
    let mut won = [0; 2];
    for _ in 0..2 {
        let [alone, duo, both] = errors(&data);
        assert!(
            both <= alone.min(duo) * (1.0 + 1e-5),
            "{alone} {duo} {both}"
        );
        won[usize::from(duo < alone)] += 1;
        // Columns of weights that differ are what duo scaling is for.
        for row in data.chunks_exact_mut(k) {
            row.iter_mut().zip(&strengths).for_each(|(w, s)| *w *= s);
        }
    }
    println!("{won:?}");
}

#[test]
fn the_scalings_of_columns_are_an_option() {
    let boolean = OptionValue::Bool;
    for (given, expected) in [
        (boolean(false), DuoScaling::No),
        (boolean(true), DuoScaling::Yes),
        (name("both"), DuoScaling::Both),
    ] {
        for method in ["awq", "awq_gptq"] {
            let options = [("method", name(method)), ("duo_scaling", given.clone())];
            let options = options.map(|(name, value)| (name.to_string(), value));
            let (_, how) = resolve("int4", options.to_vec()).unwrap();
            assert_eq!(how.scaling, Scaling::Awq(expected));
            assert!(how.options().contains(&("duo_scaling", given.clone())));
        }
    }
    for (method, given) in [("awq", name("none")), ("gptq", boolean(true))] {
        let options = [("method", name(method)), ("duo_scaling", given)];
        let options = options.map(|(name, value)| (name.to_string(), value));
        assert!(matches!(
            resolve("int4", options.to_vec()),
            Err(Error::InvalidOption { option, .. }) if option == "duo_scaling"
        ));
    }
}

#[test]
fn results_are_the_same_on_every_level_and_thread_count() {
    on_every_level(
        "results_are_the_same_on_every_level_and_thread_count",
        |digest: &mut Digest| {
            let (n, k) = (70, 96);
            let s = statistics(&activations(130, k, 17), k);
            let w = f32_tensor(&[n, k], &gaussian(n * k, 18));
            for spec in [
                make("int4", &[("block_size", int(32))]),
                make("int3", &[("block_size", int(32)), ("act_order", yes(true))]),
                make("nf4", &[("block_size", int(32))]),
                make("nvfp4", &[("method", name("mse"))]),
            ] {
                for (rotate, scaling) in [
                    (false, Scaling::None),
                    (false, Scaling::Awq(DuoScaling::No)),
                    (false, Scaling::Awq(DuoScaling::Yes)),
                    (true, Scaling::Awq(DuoScaling::Both)),
                    (false, Scaling::Smooth),
                ] {
                    for how in [GPTQ, AWQ] {
                        let how = Calibrated {
                            rotate,
                            scaling,
                            ..how
                        };
                        digest.parts(&calibrated(&w, &spec, &s, &how));
                    }
                }
            }
        },
    );
}

#[test]
fn a_scaled_and_rotated_input_gives_the_product_of_the_weight_it_stands_for() {
    let (n, k, m) = (48, 192, 5);
    let s = statistics(&activations(64, k, 19), k);
    let w = f32_tensor(&[n, k], &gaussian(n * k, 20));
    let spec = make("int8", &[]);
    let how = Calibrated {
        rotate: true,
        scaling: Scaling::Smooth,
        ..PLAIN
    };
    let q = calibrated(&w, &spec, &s, &how);
    assert!(q.spec.input.rotated && q.spec.input.scaled);
    let x = f32_tensor(&[m, k], &activations(m, k, 21));
    let mut out = vec![0u8; m * n * 4];
    matmul::matmul_into(&x, &q, DType::F32.into(), &mut out, &Cancel::new()).unwrap();
    let y = Tensor::from_slice(DType::F32, &[m, n], &out)
        .unwrap()
        .to_f32_vec();
    let back = support::dequantized(&q, DType::F32).to_f32_vec();
    let x = x.to_f32_vec();
    for (i, y) in y.iter().enumerate() {
        let (x, w) = (&x[i / n * k..][..k], &back[i % n * k..][..k]);
        let terms = x.iter().zip(w).map(|(x, w)| f64::from(x * w));
        let size: f64 = terms.clone().map(f64::abs).sum();
        assert!((f64::from(*y) - terms.sum::<f64>()).abs() < 1e-5 * size);
    }
    // What a dump carries is the same, input's part included.
    let loaded = dump::load(std::sync::Arc::new(dump::dump(&q).unwrap())).unwrap();
    assert_eq!(loaded.spec, q.spec);
    support::same(
        &support::dequantized(&loaded, DType::F32).to_f32_vec(),
        &back,
        format_args!("a loaded dump"),
    );
}

#[test]
fn little_or_odd_data_is_at_least_rounding_to_nearest() {
    let (n, k) = (32, 64);
    let data = gaussian(n * k, 23);
    let w = f32_tensor(&[n, k], &data);
    let spec = make("int4", &[("block_size", int(32))]);
    let mut dead = activations(100, k, 24);
    dead.chunks_exact_mut(k).for_each(|row| row[3..9].fill(0.0));
    let one = activations(1, k, 25);
    let few = activations(10, k, 26);
    let same: Vec<f32> = one.iter().copied().cycle().take(50 * k).collect();
    for x in [&dead, &one, &few, &same, &vec![0f32; 3 * k]] {
        let s = statistics(x, k);
        let plain = error_of(x, &data, &calibrated(&w, &spec, &s, &PLAIN));
        for how in [GPTQ, AWQ] {
            let error = error_of(x, &data, &calibrated(&w, &spec, &s, &how));
            // NaN where there is no output to compare.
            let worse = error > plain || error.is_nan() != plain.is_nan();
            assert!(!worse, "{how:?}: {error} {plain}");
        }
    }
}

#[test]
fn what_cannot_be_done_is_said() {
    let k = 64;
    let w = f32_tensor(&[8, k], &gaussian(8 * k, 27));
    let s = statistics(&activations(10, k, 28), k);
    let refused = |w: &Tensor, spec: &Spec, s: &Statistics, how| {
        quantize_calibrated(w, spec, s, how, &Cancel::new()).unwrap_err()
    };
    let int4 = make("int4", &[("block_size", int(32))]);
    let narrow = f32_tensor(&[8, 32], &gaussian(8 * 32, 29));
    assert!(matches!(
        refused(&narrow, &int4, &s, &GPTQ),
        Error::ShapeMismatch { .. }
    ));
    assert!(matches!(
        refused(&w, &make("q4_0", &[]), &s, &GPTQ),
        Error::InvalidOption { .. }
    ));
    assert!(matches!(
        refused(&w, &make("int8", &[("scale", name("absmax"))]), &s, &GPTQ),
        Error::InvalidOption { .. }
    ));
    assert!(matches!(
        refused(&w, &int4, &Statistics::new(k, 4), &AWQ),
        Error::InvalidOption { .. }
    ));
    let mut poisoned = gaussian(8 * k, 30);
    poisoned[100] = f32::NAN;
    assert!(matches!(
        refused(&f32_tensor(&[8, k], &poisoned), &int4, &s, &GPTQ),
        Error::NonFinite { nan: 1, .. }
    ));
    let x = f32_tensor(&[8, k], &poisoned);
    assert!(matches!(
        Statistics::of(&x, SAMPLES, &Cancel::new()),
        Err(Error::NonFinite { first: 100, .. })
    ));
    let cancelled = Cancel::new();
    cancelled.cancel();
    assert!(matches!(
        quantize_calibrated(&w, &int4, &s, &GPTQ, &cancelled),
        Err(Error::Cancelled)
    ));
    quantize::quantize(&w, &int4, &Cancel::new()).unwrap();
}

#[test]
fn kept_rows_do_not_depend_on_how_batches_are_cut() {
    let k = 16;
    let x = activations(300, k, 31);
    let of = |x: &[f32]| {
        let x = f32_tensor(&[x.len() / k, k], x);
        Statistics::of(&x, 40, &Cancel::new()).unwrap()
    };
    let whole = of(&x);
    let mut parts: Vec<Statistics> = x.chunks(70 * k).map(of).collect();
    let mut merged = parts.pop().unwrap();
    for part in &parts {
        merged.merge(part).unwrap();
    }
    assert_eq!(merged.tokens(), 300);
    assert_eq!(merged.samples(), whole.samples());
    assert_eq!(merged.samples().len(), 40 * k);
    assert_eq!(merged.max_abs(), whole.max_abs());
    for (a, b) in merged.mean_abs().iter().zip(whole.mean_abs()) {
        assert!((a - b).abs() < 1e-6 * b);
    }
}

#[test]
fn a_saved_calibration_is_read_back_whole_and_a_wrong_one_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("statistics.safetensors");
    let mut calibration = Calibration::new(20);
    for (name, k) in [("a.q_proj", 40), ("a.down_proj", 72)] {
        for seed in 0..2 {
            let x = f32_tensor(&[50, k], &activations(50, k, 40 + seed));
            let batch = Statistics::of(&x, 20, &Cancel::new()).unwrap();
            calibration.add(name, batch).unwrap();
        }
    }
    calibration.save(&path).unwrap();
    let loaded = Calibration::load(&path).unwrap();
    let names: Vec<&str> = loaded.layers().map(|(name, _)| name).collect();
    assert_eq!(names, ["a.down_proj", "a.q_proj"]);
    for (name, s) in calibration.layers() {
        let read = loaded.layer(name).unwrap();
        assert_eq!(read.tokens(), 100);
        assert_eq!(read.mean_abs(), s.mean_abs());
        assert_eq!(read.max_abs(), s.max_abs());
        assert_eq!(read.samples(), s.samples());
        for i in 0..s.columns() {
            for j in 0..s.columns() {
                assert_eq!(read.gram().at(i, j), s.gram().at(i, j));
            }
        }
    }
    // Saving again gives the same bytes, and leaves nothing beside them.
    let bytes = std::fs::read(&path).unwrap();
    loaded.save(&path).unwrap();
    assert!(std::fs::read(&path).unwrap() == bytes);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);

    assert!(matches!(
        loaded.layer("a.q_prog"),
        Err(Error::UnknownTensor { hint, .. }) if hint.contains("a.q_proj")
    ));
    let x = f32_tensor(&[5, 41], &activations(5, 41, 45));
    let batch = Statistics::of(&x, 20, &Cancel::new()).unwrap();
    let mut other = loaded.clone();
    assert!(matches!(
        other.add("a.q_proj", batch),
        Err(Error::ShapeMismatch { .. })
    ));
    for (from, to) in [
        ("a.q_proj.gram", "a.q_proj.gran"),
        ("F64", "I64"),
        ("[72]", "[8]"),
    ] {
        let text = String::from_utf8_lossy(&bytes[..2000]).into_owned();
        let at = text.find(from).unwrap_or_else(|| panic!("{from}"));
        let mut wrong = bytes.clone();
        // A shorter word is filled up with the header's own white space.
        let filled = format!("{to:<width$}", width = from.len());
        wrong[at..at + from.len()].copy_from_slice(filled.as_bytes());
        std::fs::write(&path, wrong).unwrap();
        let error = Calibration::load(&path);
        let same_layers = |c: &Calibration| c.layers().count() == 2;
        assert!(!error.as_ref().is_ok_and(same_layers), "{from}: {error:?}");
    }
}
