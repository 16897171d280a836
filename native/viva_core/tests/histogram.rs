//! How weights are spread, beside the values of codes.

mod support;

use support::{every_spec, f32_tensor, gaussian, int, make, quantized, yes};
use viva_core::Error;
use viva_core::formats::codebook::NF4;
use viva_core::ops::histogram::{self, BINS};

fn bin(part: f32) -> usize {
    let middle = (BINS / 2) as f32;
    (middle + part * middle).round() as usize
}

#[test]
fn a_codebook_is_seen_where_its_values_are() {
    let x = f32_tensor(&[64, 256], &gaussian(64 * 256, 1));
    let q = quantized(&x, &make("nf4", &[]));
    let found = histogram::quantized(&x, &q).unwrap().unwrap();
    let used: Vec<usize> = (0..BINS).filter(|&i| found.values[i] > 0).collect();
    let mut table: Vec<usize> = NF4.table.iter().map(|&v| bin(v)).collect();
    table.sort_unstable();
    assert_eq!(used, table);
    // Of each block the largest weight is at an end, and is its own value.
    let ends = |counts: &[u64]| counts[0] + counts[BINS - 1];
    assert!(ends(&found.weights) >= 64 * 256 / 64);
    assert!(ends(&found.values) >= ends(&found.weights));
    // Normal weights are close to zero more often than far from it.
    assert!(found.weights[bin(0.1)] > 2 * found.weights[bin(0.8)]);
}

#[test]
fn integers_with_a_zero_point_are_evenly_apart() {
    let x: Vec<f32> = gaussian(64 * 128, 4).iter().map(|v| v + 0.5).collect();
    let x = f32_tensor(&[64, 128], &x);
    let q = quantized(&x, &make("int3", &[("block_size", int(128))]));
    let found = histogram::quantized(&x, &q).unwrap().unwrap();
    // A rounded zero point leaves a few blocks without one of their ends.
    let even = (0..8).map(|code| found.values[bin(code as f32 / 3.5 - 1.0)]);
    assert!(even.clone().all(|count| count > 0));
    assert!(even.sum::<u64>() > 64 * 128 * 9 / 10);
}

#[test]
fn every_weight_is_counted_twice_or_none_is() {
    let x = f32_tensor(&[8, 512], &gaussian(8 * 512, 2));
    for spec in every_spec() {
        let q = quantized(&x, &spec);
        if let Some(found) = histogram::quantized(&x, &q).unwrap() {
            for counts in [&found.weights, &found.values] {
                assert_eq!(counts.len(), BINS, "{spec:?}");
                assert_eq!(counts.iter().sum::<u64>(), 8 * 512, "{spec:?}");
            }
        }
    }
}

#[test]
fn a_large_tensor_is_looked_at_in_part_and_zeros_are_zeros() {
    let mut x = vec![0.0; 1100 * 1000];
    x[0] = 1.0;
    let x = f32_tensor(&[1100, 1000], &x);
    let q = quantized(&x, &make("int8", &[("block_size", int(100))]));
    let found = histogram::quantized(&x, &q).unwrap().unwrap();
    let counted: u64 = found.weights.iter().sum();
    assert!(counted > 1_000_000 && counted < 1_100_000 && counted.is_multiple_of(100));
    assert_eq!(found.weights[bin(0.0)], counted - 1);
    assert_eq!(found.weights, found.values);
    let empty = f32_tensor(&[0, 64], &[]);
    let q = quantized(&empty, &make("nf4", &[]));
    let found = histogram::quantized(&empty, &q).unwrap().unwrap();
    assert_eq!(found.weights, vec![0; BINS]);
}

#[test]
fn what_is_no_run_of_weights_has_none() {
    let x = f32_tensor(&[4, 64], &gaussian(256, 3));
    let mut q = quantized(&x, &make("nf4", &[("double_quant", yes(true))]));
    assert!(histogram::quantized(&x, &q).unwrap().is_some());
    q.spec.input.rotated = true;
    assert!(histogram::quantized(&x, &q).unwrap().is_none());
    let other = f32_tensor(&[64, 4], &gaussian(256, 3));
    assert!(matches!(
        histogram::quantized(&other, &q),
        Err(Error::ShapeMismatch { .. })
    ));
}
