//! Our blocks against those of ggml, at every ISA level. The fixture and what
//! its tensors mean: test/golden/make_ggml.py.

mod support;

use safetensors::SafeTensors;
use support::{Digest, block_formats, make, on_every_level, quantized, same};
use viva_core::format::Quantized;
use viva_core::formats::ggml_types::GgmlType;
use viva_core::tensor::{DType, Tensor};

const FIXTURE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../test/golden/ggml.safetensors"
);

fn tensor(golden: &SafeTensors, name: &str) -> Tensor {
    let view = golden.tensor(name).unwrap();
    let dtype = match view.dtype() {
        safetensors::Dtype::F32 => DType::F32,
        safetensors::Dtype::U8 => DType::U8,
        other => panic!("{name}: {other:?}"),
    };
    Tensor::from_slice(dtype, view.shape(), view.data()).unwrap()
}

#[test]
fn blocks_are_theirs() {
    on_every_level("blocks_are_theirs", |digest: &mut Digest| {
        let bytes = std::fs::read(FIXTURE).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let mut wrong = Vec::new();
        for weight in ["gaussian", "viva-tiny", "edges"] {
            let x = tensor(&golden, weight);
            for format in block_formats() {
                let q = quantized(&x, &make(format, &[]));
                let expected = tensor(&golden, &format!("{weight}/{format}"));
                let got = q.part("blocks").unwrap();
                assert_eq!(got.shape(), expected.shape(), "{weight} {format}");
                let t = GgmlType::by_name(format).unwrap();
                let pairs = got.bytes().chunks(t.block_bytes);
                let pairs = pairs.zip(expected.bytes().chunks(t.block_bytes));
                for (i, (got, expected)) in pairs.enumerate() {
                    if got != expected {
                        let row = i * t.block_len / x.row_len();
                        wrong.push(format!(
                            "{weight} {format} block {i}, row {row}:\n{got:?}\n{expected:?}"
                        ));
                    }
                }
                digest.parts(&q);
            }
        }
        assert!(
            wrong.is_empty(),
            "{} wrong:\n{}",
            wrong.len(),
            wrong.join("\n")
        );
    });
}

#[test]
fn values_are_theirs() {
    on_every_level("values_are_theirs", |digest: &mut Digest| {
        let bytes = std::fs::read(FIXTURE).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        for format in block_formats() {
            let expected = tensor(&golden, &format!("random/{format}/values")).to_f32_vec();
            let q = Quantized {
                spec: make(format, &[]),
                shape: vec![2, 512],
                dtype: DType::F32,
                parts: vec![("blocks", tensor(&golden, &format!("random/{format}")))],
            };
            q.validate().unwrap();
            let values = support::dequantized(&q, DType::F32);
            same(&values.to_f32_vec(), &expected, format_args!("{format}"));
            // Windows that begin and end inside blocks.
            let decoder = q.spec.format().unwrap().decoder(&q).unwrap();
            for (start, end) in [
                (0, 1),
                (31, 33),
                (5, 300),
                (255, 257),
                (256, 512),
                (700, 1024),
            ] {
                same(
                    &support::decoded(&*decoder, start..end),
                    &expected[start..end],
                    format_args!("{start}..{end} of {format}"),
                );
            }
            digest.bytes(values.bytes());
        }
    });
}
