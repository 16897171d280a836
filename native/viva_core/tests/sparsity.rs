//! 2:4 sparsity by what the model sees, against its papers in f64, alone and in one
//! pass with the rounding of what stays.

mod support;

use support::observed::{activations, factor_of_inverse, output_error, statistics};
use support::{
    Digest, every_spec, f32_tensor, float_tensor, gaussian, int, make, name, on_every_level, yes,
};
use viva_core::calibration::Statistics;
use viva_core::error::{Error, Result};
use viva_core::format::{Quantized, Scale, Spec, Values, Zero};
use viva_core::method::calibrated::{Calibrated, Scaling, quantize_calibrated};
use viva_core::method::candidates::DuoScaling;
use viva_core::method::gptq::{Gptq, Order};
use viva_core::method::sparsity::{Sparsify, Sparsity, resolve, sparsify_into};
use viva_core::ops::Cancel;
use viva_core::tensor::{DType, Tensor};

const ALL: [Sparsity; 3] = Sparsity::ALL;

fn sparsified(w: &Tensor, sparsity: Sparsity, s: &Statistics) -> Result<Tensor> {
    let how = Sparsify {
        sparsity,
        damping: 0.01,
    };
    let mut bytes = vec![0xffu8; w.bytes().len()];
    sparsify_into(w, &how, s, &mut bytes, &Cancel::new())?;
    Tensor::from_slice(w.dtype(), w.shape(), &bytes)
}

fn gptq(sparsity: Option<Sparsity>) -> Calibrated {
    Calibrated {
        rotate: false,
        scaling: Scaling::None,
        clip: false,
        gptq: Some(Gptq {
            damping: 0.01,
            order: Order::Natural,
            sparsity,
        }),
    }
}

fn joint(w: &Tensor, spec: &Spec, s: &Statistics, sparsity: Sparsity) -> Quantized {
    let how = gptq(Some(sparsity));
    let q = quantize_calibrated(w, spec, s, &how, &Cancel::new()).unwrap();
    q.validate().unwrap();
    q
}

fn values(q: &Quantized) -> Vec<f32> {
    support::dequantized(q, DType::F32).to_f32_vec()
}

fn assert_two_of_four(values: &[f32], what: impl std::fmt::Debug) {
    for (i, group) in values.chunks(4).enumerate() {
        let zeros = group.iter().filter(|v| **v == 0.0).count();
        assert!(zeros >= 2, "group {i} of {what:?}: {group:?}");
    }
}

/// SparseGPT on columns `from .. to` of one row as its paper has it: at every
/// fourth column the two of least w²/u² are given up, and all errors taken off the
/// columns after them. What stays becomes `round(column, weight)`.
fn textbook(
    w: &mut [f64],
    u: &[Vec<f64>],
    (from, to): (usize, usize),
    round: impl Fn(usize, f64) -> f64,
) {
    let mut pruned = [false; 4];
    for j in from..to {
        if j % 4 == 0 {
            let saliency = |i: usize| (w[j + i] / u[j + i][j + i]).powi(2);
            let mut order = [0, 1, 2, 3];
            order.sort_by(|&a, &b| saliency(a).total_cmp(&saliency(b)));
            pruned = std::array::from_fn(|i| order[..2].contains(&i));
        }
        let value = match pruned[j % 4] {
            true => 0.0,
            false => round(j, w[j]),
        };
        let error = (w[j] - value) / u[j][j];
        for i in j + 1..w.len() {
            w[i] -= error * u[j][i];
        }
        w[j] = value;
    }
}

/// A weight that falls the other way changes those after it: of one row at most.
fn assert_rows_agree(got: &[f32], expected: &[f64], k: usize) {
    let rows = got.chunks_exact(k).zip(expected.chunks_exact(k));
    let near = |(a, b): (&f32, &f64)| (f64::from(*a) - b).abs() < 2e-4;
    let differ = rows.filter(|(a, b)| !a.iter().zip(*b).all(near)).count();
    assert!(differ <= 1, "{differ} rows differ");
}

#[test]
fn sparsegpt_is_what_the_paper_says() {
    for (n, k) in [(37, 64), (3, 100)] {
        let x = activations(200, k, 7);
        let w = gaussian(n * k, 8);
        let u = factor_of_inverse(&x, k);
        let mut expected: Vec<f64> = w.iter().map(|&v| f64::from(v)).collect();
        for row in expected.chunks_exact_mut(k) {
            textbook(row, &u, (0, k), |_, w| w);
        }
        let t = f32_tensor(&[n, k], &w);
        let got = sparsified(&t, Sparsity::Sparsegpt, &statistics(&x, k)).unwrap();
        assert_rows_agree(&got.to_f32_vec(), &expected, k);
    }
}

#[test]
fn one_pass_prunes_and_rounds_as_the_paper_says() {
    let (n, k) = (37, 80);
    let x = activations(200, k, 9);
    let w = gaussian(n * k, 10);
    let u = factor_of_inverse(&x, k);
    // Blocks of 20 have scales of the weights as they were; those of 16 of what
    // they have become, without rounding, when the block is reached.
    for group in [20, 16] {
        let spec = make("int4", &[("block_size", int(group as i64))]);
        let mut expected: Vec<f64> = w.iter().map(|&v| f64::from(v)).collect();
        for row in expected.chunks_exact_mut(k) {
            let original = row.to_vec();
            for at in (0..k).step_by(group) {
                let mut seen = match group {
                    20 => original.clone(),
                    _ => row.to_vec(),
                };
                if group == 16 {
                    textbook(&mut seen, &u, (at, at + group), |_, w| w);
                }
                let seen: Vec<f32> = seen[at..at + group].iter().map(|&v| v as f32).collect();
                let q = support::quantized(&f32_tensor(&[1, group], &seen), &spec);
                let scale = f64::from(q.part("scales").unwrap().to_f32_vec()[0]);
                let zero = f64::from(q.part("zero_points").unwrap().bytes()[0] & 15);
                textbook(row, &u, (at, at + group), |_, w| {
                    (w / scale).round_ties_even().clamp(-zero, 15.0 - zero) * scale
                });
            }
        }
        let t = f32_tensor(&[n, k], &w);
        let q = joint(&t, &spec, &statistics(&x, k), Sparsity::Sparsegpt);
        assert_rows_agree(&values(&q), &expected, k);
    }
}

#[test]
fn wanda_is_what_the_paper_says() {
    let (n, k) = (19, 72);
    let x = activations(50, k, 11);
    let w = gaussian(n * k, 12);
    let norms: Vec<f64> = (0..k)
        .map(|j| {
            let column = x.iter().skip(j).step_by(k);
            column.map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
        })
        .collect();
    let mut expected = w.clone();
    for (g, group) in expected.chunks_exact_mut(4).enumerate() {
        let score = |i: usize| f64::from(w[4 * g + i].abs()) * norms[(4 * g + i) % k];
        let mut order = [0, 1, 2, 3];
        order.sort_by(|&a, &b| score(a).total_cmp(&score(b)));
        order[..2].iter().for_each(|&i| group[i] = 0.0);
    }
    let s = statistics(&x, k);
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let t = float_tensor(dtype, &[n, k], &w);
        let got = sparsified(&t, Sparsity::Wanda, &s).unwrap().to_f32_vec();
        for ((got, x), expected) in got.iter().zip(t.to_f32_vec()).zip(&expected) {
            assert_eq!(*got, if *expected == 0.0 { 0.0 } else { x });
        }
        let got = sparsified(&t, Sparsity::Magnitude, &s).unwrap();
        let kept = sparsified(&t, Sparsity::Wanda, &s).unwrap();
        assert_two_of_four(&got.to_f32_vec(), dtype);
        assert!(got.to_f32_vec() != kept.to_f32_vec());
    }
}

#[test]
fn the_more_a_method_sees_the_better_it_is() {
    let (n, k) = (64, 256);
    let (seen, unseen) = (activations(512, k, 13), activations(256, k, 14));
    let data = gaussian(n * k, 15);
    let w = f32_tensor(&[n, k], &data);
    let s = statistics(&seen, k);
    let [magnitude, wanda, sparsegpt] = ALL.map(|sparsity| {
        let sparse = sparsified(&w, sparsity, &s).unwrap().to_f32_vec();
        let error = output_error(&unseen, &data, &sparse, k);
        println!("{sparsity:?} {error:.5}");
        error
    });
    assert!(sparsegpt < 0.95 * wanda && wanda < 0.95 * magnitude);
    for spec in [
        make("int8", &[]),
        make("int4", &[]),
        make("int3", &[]),
        make("int4", &[("symmetric", yes(true)), ("method", name("mse"))]),
        make("nf4", &[]),
        make("fp8_e4m3", &[]),
        make("nvfp4", &[]),
    ] {
        let error = |q: Quantized| output_error(&unseen, &data, &values(&q), k);
        let [magnitude, wanda, sparsegpt] =
            ALL.map(|sparsity| error(joint(&w, &spec, &s, sparsity)));
        let sparse = sparsified(&w, Sparsity::Sparsegpt, &s).unwrap();
        let after = error(support::quantized(&sparse, &spec));
        println!(
            "{}: magnitude {magnitude:.5} wanda {wanda:.5} sparsegpt {sparsegpt:.5}, rounded after {after:.5}",
            spec.format
        );
        // Each makes up for what it does here, so that less is between them.
        assert!(sparsegpt < 1.01 * wanda && wanda < magnitude, "{spec:?}");
        // Where rounding costs little beside what went there is little to win.
        assert!(sparsegpt < 1.015 * after, "{spec:?}");
    }
}

#[test]
fn zeros_of_every_grid_are_zeros() {
    let (n, k) = (40, 96);
    let s = statistics(&activations(150, k, 16), k);
    let mut data = gaussian(n * k, 17);
    data[..k].fill(0.0);
    // A row whose weights are all of one sign has no zero inside its range.
    data[k..2 * k].iter_mut().for_each(|v| *v = 3.0 + v.abs());
    let w = f32_tensor(&[n, k], &data);
    let sparse = sparsified(&w, Sparsity::Wanda, &s).unwrap();
    let zeros = sparse.to_f32_vec();
    let (mut grids, mut integers) = (0, 0);
    for spec in every_spec() {
        let absmax_rule = spec.scale == Scale::Absmax;
        if spec.format.starts_with("int") && spec.zero == Zero::Integer {
            let back = values(&support::quantized(&sparse, &spec));
            let kept = back.iter().zip(&zeros).all(|(b, z)| *z != 0.0 || *b == 0.0);
            assert!(kept, "{spec:?}");
            integers += 1;
        }
        for sparsity in ALL {
            let how = gptq(Some(sparsity));
            let q = quantize_calibrated(&w, &spec, &s, &how, &Cancel::new());
            let gridless = ["q", "iq", "dynamic8"]
                .iter()
                .any(|p| spec.format.starts_with(p));
            match q {
                Ok(q) => {
                    q.validate().unwrap();
                    assert_two_of_four(&values(&q), (&spec, sparsity));
                    grids += 1;
                }
                Err(Error::InvalidOption { option, .. }) if spec.zero == Zero::Float => {
                    assert_eq!(option, "zero_point");
                }
                Err(Error::Indivisible { .. }) => {
                    assert!(k % spec.block_len(&[n, k]) != 0, "{spec:?}");
                }
                Err(Error::InvalidOption { option, .. }) if spec.format == "sparse24" => {
                    assert!(
                        option == "values"
                            && ![Values::Int8, Values::Fp8E4m3].contains(&spec.values)
                    );
                }
                Err(error) => assert!(gridless || absmax_rule, "{spec:?}: {error}"),
            }
        }
    }
    println!("{grids} grids, {integers} of integers");
    assert!(grids >= 60 && integers >= 15);
}

/// What is stored half is what is stored whole: the same scales and the same codes.
#[test]
fn one_pass_into_sparse24_keeps_what_the_values_format_finds() {
    let (n, k) = (70, 100);
    let s = statistics(&activations(150, k, 32), k);
    let w = f32_tensor(&[n, k], &gaussian(n * k, 33));
    for format in ["int8", "fp8_e4m3"] {
        for block in ["row", "tensor"] {
            let block = ("block_size", name(block));
            let dense = make(format, std::slice::from_ref(&block));
            let half = make("sparse24", &[("values", name(format)), block]);
            let q = joint(&w, &half, &s, Sparsity::Sparsegpt);
            let expected = values(&joint(&w, &dense, &s, Sparsity::Sparsegpt));
            assert_eq!(values(&q), expected, "{half:?}");
            let refused = quantize_calibrated(&w, &half, &s, &gptq(None), &Cancel::new());
            assert!(matches!(
                refused,
                Err(Error::InvalidOption { option, .. }) if option == "sparsity"
            ));
        }
    }
}

#[test]
fn scaled_columns_are_sparse_too() {
    let (n, k) = (32, 128);
    let s = statistics(&activations(200, k, 18), k);
    let w = f32_tensor(&[n, k], &gaussian(n * k, 19));
    let how = Calibrated {
        scaling: Scaling::Awq(DuoScaling::Both),
        ..gptq(Some(Sparsity::Sparsegpt))
    };
    let spec = make("int4", &[]);
    let q = quantize_calibrated(&w, &spec, &s, &how, &Cancel::new()).unwrap();
    assert!(q.spec.input.scaled);
    assert_two_of_four(&values(&q), "awq_gptq");
}

#[test]
fn what_stays_is_a_number_of_the_tensor_s_dtype() {
    let (n, k) = (33, 64);
    let s = statistics(&activations(150, k, 20), k);
    let data = gaussian(n * k, 21);
    for dtype in [DType::F16, DType::BF16, DType::F8E4M3, DType::F64] {
        let w = float_tensor(dtype, &[n, k], &data);
        let got = sparsified(&w, Sparsity::Sparsegpt, &s).unwrap();
        assert_eq!(got.dtype(), dtype);
        assert_two_of_four(&got.to_f32_vec(), dtype);
        // It loses nothing where a format stores what it finds.
        let stored = support::quantized(&got, &make("sparse24", &[]));
        assert_eq!(
            support::dequantized(&stored, dtype).to_f32_vec(),
            got.to_f32_vec()
        );
    }
    // Two columns that are nearly one: a weight that goes is added to its twin.
    let twins: Vec<f32> = gaussian(100, 22).iter().flat_map(|&v| [v; 4]).collect();
    let large = float_tensor(DType::F16, &[1, 4], &[60000.0; 4]);
    let refused = sparsified(&large, Sparsity::Sparsegpt, &statistics(&twins, 4));
    assert!(matches!(
        refused,
        Err(Error::InvalidOption { message, .. }) if message.contains("cast the tensor to f32")
    ));
}

#[test]
fn results_are_the_same_on_every_level() {
    on_every_level(
        "results_are_the_same_on_every_level",
        |digest: &mut Digest| {
            let (n, k) = (70, 100);
            let s = statistics(&activations(130, k, 23), k);
            let data = gaussian(n * k, 24);
            for dtype in [DType::F32, DType::BF16] {
                let w = float_tensor(dtype, &[n, k], &data);
                for sparsity in ALL {
                    digest.bytes(sparsified(&w, sparsity, &s).unwrap().bytes());
                    for spec in [
                        make("int4", &[("block_size", int(20))]),
                        make("int8", &[("method", name("mse"))]),
                    ] {
                        digest.parts(&joint(&w, &spec, &s, sparsity));
                    }
                }
            }
        },
    );
}

#[test]
fn little_or_odd_data_is_at_least_as_good_as_magnitude() {
    let (n, k) = (32, 64);
    let data = gaussian(n * k, 25);
    let w = f32_tensor(&[n, k], &data);
    let mut dead = activations(100, k, 26);
    // All of a group, three, and one.
    dead.chunks_exact_mut(k).for_each(|row| {
        row[4..8].fill(0.0);
        row[13..16].fill(0.0);
        row[21] = 0.0;
    });
    let s = statistics(&dead, k);
    let kept = sparsified(&w, Sparsity::Sparsegpt, &s)
        .unwrap()
        .to_f32_vec();
    let wanda = sparsified(&w, Sparsity::Wanda, &s).unwrap().to_f32_vec();
    for (kept, wanda) in kept.chunks_exact(k).zip(wanda.chunks_exact(k)) {
        for kept in [kept, wanda] {
            assert!(kept[12] != 0.0 && kept[21] == 0.0);
        }
    }
    let one = activations(1, k, 27);
    let few = activations(10, k, 28);
    let same: Vec<f32> = one.iter().copied().cycle().take(50 * k).collect();
    for (i, x) in [&dead, &one, &few, &same].into_iter().enumerate() {
        let s = statistics(x, k);
        let [magnitude, wanda, sparsegpt] = ALL.map(|sparsity| {
            let sparse = sparsified(&w, sparsity, &s).unwrap().to_f32_vec();
            assert_two_of_four(&sparse, sparsity);
            output_error(x, &data, &sparse, k)
        });
        println!("{i}: magnitude {magnitude:.5} wanda {wanda:.5} sparsegpt {sparsegpt:.5}");
        assert!(sparsegpt < wanda && wanda < magnitude, "{i}");
    }
    // Nothing was ever seen but zeros: any choice is as good.
    let s = statistics(&vec![0f32; 3 * k], k);
    for sparsity in ALL {
        let sparse = sparsified(&w, sparsity, &s).unwrap().to_f32_vec();
        assert_two_of_four(&sparse, sparsity);
        let kept = sparse.iter().zip(&data).filter(|(s, w)| s == w);
        assert_eq!(kept.count(), n * k / 2);
    }
}

#[test]
fn what_cannot_be_done_is_said() {
    let k = 64;
    let data = gaussian(8 * k, 29);
    let w = f32_tensor(&[8, k], &data);
    let s = statistics(&activations(10, k, 30), k);
    for sparsity in ALL {
        let refused = |w: &Tensor, s: &Statistics| sparsified(w, sparsity, s).unwrap_err();
        let narrow = f32_tensor(&[16, 32], &data);
        assert!(matches!(refused(&narrow, &s), Error::ShapeMismatch { .. }));
        assert!(matches!(
            refused(&w, &Statistics::new(k, 4)),
            Error::InvalidOption { option, .. } if option == "activations"
        ));
        let odd = f32_tensor(&[8, 30], &data[..240]);
        let seen = statistics(&activations(10, 30, 31), 30);
        let short = Error::Indivisible { row: 30, block: 4 };
        assert_eq!(refused(&odd, &seen), short);
        let how = gptq(Some(sparsity));
        let spec = make("int4", &[("block_size", int(10))]);
        let refused = quantize_calibrated(&odd, &spec, &seen, &how, &Cancel::new());
        assert_eq!(refused.unwrap_err(), short);
        let mut poisoned = data.clone();
        poisoned[100] = f32::NAN;
        let poisoned = f32_tensor(&[8, k], &poisoned);
        assert!(matches!(
            sparsified(&poisoned, sparsity, &s),
            Err(Error::NonFinite {
                nan: 1,
                first: 100,
                ..
            })
        ));
        let powers = Tensor::from_slice(DType::F8E8M0, &[8, k], &[1u8; 8 * 64]).unwrap();
        assert!(matches!(
            sparsified(&powers, sparsity, &s),
            Err(Error::UnsupportedDtype { .. })
        ));
        let none = f32_tensor(&[0, k], &[]);
        assert!(sparsified(&none, sparsity, &s).unwrap().is_empty());
        let cancelled = Cancel::new();
        cancelled.cancel();
        let how = Sparsify {
            sparsity,
            damping: 0.01,
        };
        let mut out = vec![0u8; w.bytes().len()];
        let stopped = sparsify_into(&w, &how, &s, &mut out, &cancelled);
        assert_eq!(stopped, Err(Error::Cancelled));
    }
    let mut how = gptq(Some(Sparsity::Wanda));
    how.gptq.as_mut().unwrap().order = Order::Activation;
    assert!(matches!(
        quantize_calibrated(&w, &make("int8", &[]), &s, &how, &Cancel::new()),
        Err(Error::InvalidOption { option, .. }) if option == "order"
    ));
    for (given, wrong) in [
        (("method", name("obs")), "method"),
        (("scores", int(1)), "scores"),
        (("damping", int(1)), "damping"),
    ] {
        let refused = resolve(vec![(given.0.into(), given.1)]);
        assert!(matches!(refused, Err(Error::InvalidOption { option, .. }) if option == wrong));
    }
}
