//! Errors of outputs against their definition, and rows of activations that stand
//! for a calibration.

mod support;

use std::collections::BTreeMap;

use support::{f32_tensor, gaussian, make, on_every_level, quantized};
use viva_core::calibration::{Calibration, SAMPLES, Statistics};
use viva_core::error::Error;
use viva_core::io::{EntryDType, FixedEntry, ShardWriter};
use viva_core::ops::{Cancel, output_error};
use viva_core::tensor::{DType, Tensor};

fn matrix(rows: usize, columns: usize, seed: u64) -> Tensor {
    f32_tensor(&[rows, columns], &gaussian(rows * columns, seed))
}

/// ‖X·Wᵀ − X·Yᵀ‖ / ‖X·Wᵀ‖, each product as it is written down.
fn defined(w: &Tensor, y: &Tensor, x: &Tensor) -> f64 {
    let k = w.row_len();
    let [w, y, x] = [w, y, x].map(Tensor::to_f32_vec);
    let (mut output, mut error) = (0f64, 0f64);
    for x in x.chunks(k) {
        for (w, y) in w.chunks(k).zip(y.chunks(k)) {
            let dot = |w: &[f32]| -> f64 {
                let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                products.sum()
            };
            output += dot(w).powi(2);
            error += (dot(w) - dot(y)).powi(2);
        }
    }
    (error / output).sqrt()
}

#[test]
fn an_output_error_is_what_its_definition_says() {
    on_every_level("an_output_error_is_what_its_definition_says", |digest| {
        for (n, k, m) in [(1, 2, 1), (9, 34, 5), (24, 64, 17), (3, 200, 40)] {
            let (w, x) = (matrix(n, k, 1), matrix(m, k, 2));
            let q = quantized(&w, &make("int8", &[]));
            let y = support::dequantized(&q, DType::F32);
            let error = output_error::quantized(&w, &q, &x, &Cancel::new()).unwrap();
            let dense = output_error::dense(&w, &y, &x, &Cancel::new()).unwrap();
            assert_eq!(error.to_bits(), dense.to_bits());
            let defined = defined(&w, &y, &x);
            assert!(
                (error - defined).abs() <= 1e-9 * defined,
                "{error} {defined}"
            );
            digest.bytes(&error.to_le_bytes());
        }
    });
}

#[test]
fn what_has_no_output_error_is_refused() {
    let measure = |w: &Tensor, x: &Tensor| output_error::dense(w, w, x, &Cancel::new());
    let w = matrix(2, 8, 3);
    assert_eq!(measure(&w, &matrix(4, 8, 4)).unwrap(), 0.0);
    assert!(
        measure(&w, &f32_tensor(&[1, 8], &[0.0; 8]))
            .unwrap()
            .is_nan()
    );
    let wrong = measure(&w, &matrix(4, 4, 4));
    assert!(matches!(wrong, Err(Error::ShapeMismatch { .. })));
    let wrong = measure(&f32_tensor(&[8], &[1.0; 8]), &matrix(4, 8, 4));
    assert!(matches!(wrong, Err(Error::ShapeMismatch { .. })));
    let wrong = measure(&w, &f32_tensor(&[1, 8], &[f32::NAN; 8]));
    assert!(matches!(wrong, Err(Error::NonFinite { .. })));
    let stop = Cancel::new();
    stop.cancel();
    let stopped = output_error::dense(&w, &w, &matrix(4, 8, 4), &stop);
    assert!(matches!(stopped, Err(Error::Cancelled)));
}

#[test]
fn rows_alone_are_read_as_a_calibration_of_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("rows.safetensors");
    let (k, name) = (40, "a.q_proj.samples");
    let x = matrix(60, k, 5);
    let entry = FixedEntry {
        name: name.into(),
        dtype: EntryDType::Known(DType::F32),
        shape: vec![60, k],
    };
    let file = ShardWriter::create(&path, vec![entry], Vec::new(), BTreeMap::new()).unwrap();
    file.write(name, x.bytes()).unwrap();
    file.finish().unwrap();

    let loaded = Calibration::load(&path).unwrap();
    let read = loaded.layer("a.q_proj").unwrap();
    let direct = Statistics::of(&x, SAMPLES, &Cancel::new()).unwrap();
    assert_eq!(read.tokens(), 60);
    assert_eq!(read.samples(), direct.samples());
    assert_eq!(read.mean_abs(), direct.mean_abs());
    assert_eq!(read.gram().at(3, 7), direct.gram().at(3, 7));
}
