//! Our errors under `method: hqq` against those of the hqq package. The fixture
//! and what its tensors mean: test/golden/make_hqq.py.

mod support;

use support::golden::Golden;
use support::{int, make, name, on_every_level, quantized};
use viva_core::ops::dequantize::dequantize;

#[test]
fn errors_are_no_larger_than_theirs() {
    on_every_level("errors_are_no_larger_than_theirs", |digest| {
        let golden = Golden::open("hqq");
        for weight in ["normal", "heavy"] {
            let x = golden.tensor(weight);
            let values = x.to_f32_vec();
            for bits in [2, 3, 4, 5, 6, 8] {
                let options = [("method", name("hqq")), ("block_size", int(64))];
                let q = quantized(&x, &make(&format!("int{bits}"), &options));
                digest.parts(&q);
                let (mut squares, mut magnitudes) = (0f64, 0f64);
                for (x, y) in values.iter().zip(dequantize(&q).unwrap()) {
                    let e = f64::from(x - y);
                    squares += e * e;
                    magnitudes += e.abs();
                }
                let theirs = |sum: &str| {
                    let sum = golden.floats(&format!("{weight}/b{bits}/{sum}"));
                    f64::from(sum[0])
                };
                let squares = squares / theirs("squared_error");
                let magnitudes = magnitudes / theirs("absolute_error");
                println!("{weight} {bits}: {squares:.4} of theirs squared, {magnitudes:.4}");
                // The square is what a block keeps its best by, the magnitude
                // follows. Where both end at one zero point, f16 rounds theirs
                // and our bias differently.
                assert!(squares <= 1.0001, "{weight} {bits}: {squares}");
                assert!(magnitudes <= 1.01, "{weight} {bits}: {magnitudes}");
            }
        }
    });
}
