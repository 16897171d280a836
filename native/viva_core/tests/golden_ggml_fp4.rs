//! mxfp4 and nvfp4 as ggml's blocks, at every ISA level. The fixture and what
//! its tensors mean: test/golden/make_ggml.py.

mod support;

use support::golden::Golden;
use support::{Digest, make, name, on_every_level, quantized, same};
use viva_core::content::{self, Read};
use viva_core::format::Quantized;
use viva_core::formats::ggml_types::GgmlType;
use viva_core::io::gguf::Metadata;
use viva_core::io::{Checkpoint, EntryDType, FixedEntry, ShardWriter};
use viva_core::layout::{self, Spelled};
use viva_core::tensor::DType;

const FORMATS: [&str; 2] = ["mxfp4", "nvfp4"];

const WEIGHT: &str = "blk.0.ffn_up.weight";
const SCALE: &str = "blk.0.ffn_up.scale";

fn spelled(q: &Quantized) -> Spelled<'_> {
    layout::layout("gguf").unwrap().spell(WEIGHT, q).unwrap()
}

/// Reads a weight of these blocks, with a scale beside it or without one.
fn read(
    format: &str,
    shape: &[usize],
    blocks: &[u8],
    scale: Option<f32>,
) -> viva_core::Result<Quantized> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut fixed = vec![FixedEntry {
        name: WEIGHT.into(),
        dtype: EntryDType::Ggml(GgmlType::by_name(format).unwrap()),
        shape: shape.to_vec(),
    }];
    fixed.extend(scale.map(|_| FixedEntry {
        name: SCALE.into(),
        dtype: DType::F32.into(),
        shape: vec![1],
    }));
    let writer = ShardWriter::create(&path, fixed, vec![], Metadata::default()).unwrap();
    writer.write(WEIGHT, blocks).unwrap();
    if let Some(scale) = scale {
        writer.write(SCALE, &scale.to_le_bytes()).unwrap();
    }
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    // A scale is a part of its weight, and counts to its size.
    let contents = content::contents(&checkpoint).unwrap();
    assert_eq!(contents.len(), 1);
    let tensors = 1 + usize::from(scale.is_some());
    assert_eq!(contents[0].tensors.len(), tensors);
    assert_eq!(contents[0].nbytes, blocks.len() + 4 * (tensors - 1));
    match content::read(&checkpoint, WEIGHT)? {
        Read::Quantized(q) => Ok(q),
        Read::Dense(t) => panic!("{t:?}"),
    }
}

#[test]
fn blocks_are_theirs() {
    on_every_level("blocks_are_theirs", |digest: &mut Digest| {
        let golden = Golden::open("ggml");
        for weight in ["gaussian", "viva-tiny", "edges"] {
            let x = golden.tensor(weight);
            let values = x.to_f32_vec();
            for format in FORMATS {
                let q = quantized(&x, &make(format, &[("scale", name("ggml"))]));
                let expected = golden.tensor(&format!("{weight}/{format}"));
                let written = spelled(&q);
                assert_eq!(written.len(), 1, "a scale of 1 is left out");
                let t = GgmlType::by_name(format).unwrap();
                let pairs = written[0].1.chunks(t.block_bytes);
                let pairs = pairs.zip(expected.bytes().chunks(t.block_bytes));
                for ((got, expected), x) in pairs.zip(values.chunks(t.block_len)) {
                    let most = x.iter().fold(0f32, |most, v| most.max(v.abs()));
                    // The exponent is negative there, and C does not say what
                    // becomes of it in a byte.
                    if format == "mxfp4" && most != 0.0 && most < 2f32.powi(-125) {
                        assert_eq!(got[0], 0);
                        continue;
                    }
                    assert_eq!(got, expected, "{weight} {format}: {x:?}");
                }
                let again = read(format, x.shape(), &written[0].1, None).unwrap();
                assert_eq!(again.spec, q.spec);
                digest.parts(&q);
            }
        }
    });
}

#[test]
fn values_are_theirs() {
    on_every_level("values_are_theirs", |digest: &mut Digest| {
        let golden = Golden::open("ggml");
        for format in FORMATS {
            let blocks = golden.tensor(&format!("random/{format}"));
            let q = read(format, &[2, 512], blocks.bytes(), None).unwrap();
            let values = support::dequantized(&q, DType::F32);
            // ggml has no negative zero.
            let unsigned: Vec<f32> = values.to_f32_vec().iter().map(|v| v + 0.0).collect();
            let expected = golden.floats(&format!("random/{format}/values"));
            same(&unsigned, &expected, format_args!("{format}"));
            // Nothing is lost on the way back.
            assert_eq!(spelled(&q)[0].1, blocks.bytes());
            digest.bytes(values.bytes());
        }
    });
}

#[test]
fn the_scale_of_a_weight_is_beside_it() {
    let golden = Golden::open("ggml");
    let x = golden.tensor("viva-tiny");
    let (spec, _) = layout::resolve("nvfp4", &[], Some("gguf")).unwrap();
    let q = quantized(&x, &spec);
    let global = q.part("global_scale").unwrap().to_f32_vec()[0];
    assert_eq!(global.to_bits() & 0x007f_ffff, 0, "a power of two");
    let written = spelled(&q);
    assert_eq!(written[1].0, SCALE);
    assert_eq!(written[1].1, (1.0 / global).to_le_bytes().as_slice());

    // The values are those of the blocks, times the scale.
    let blocks = read("nvfp4", x.shape(), &written[0].1, None).unwrap();
    let blocks = support::dequantized(&blocks, DType::F32).to_f32_vec();
    let scaled: Vec<f32> = blocks.iter().map(|v| v * (1.0 / global)).collect();
    let again = read("nvfp4", x.shape(), &written[0].1, Some(1.0 / global)).unwrap();
    assert_eq!(again.spec, spec);
    let values = support::dequantized(&again, DType::F32).to_f32_vec();
    same(&values, &scaled, format_args!("scaled"));
    same(
        &support::dequantized(&q, DType::F32).to_f32_vec(),
        &values,
        format_args!("read"),
    );
    assert_eq!(spelled(&again), written);

    let error = read("nvfp4", x.shape(), &written[0].1, Some(0.0)).unwrap_err();
    assert!(
        error.to_string().contains("not a positive number"),
        "{error}"
    );
}

#[test]
fn scales_that_are_no_numbers_are_refused() {
    for (format, len, bad) in [
        ("mxfp4", 17, 0xff),
        ("nvfp4", 36, 0x7f),
        ("nvfp4", 36, 0x80),
    ] {
        let columns = GgmlType::by_name(format).unwrap().block_len;
        let mut blocks = vec![0u8; len];
        assert!(read(format, &[1, columns], &blocks, None).is_ok());
        blocks[0] = bad;
        let error = read(format, &[1, columns], &blocks, None).unwrap_err();
        assert!(
            error.to_string().contains("scale 0 has the code"),
            "{error}"
        );
    }
    // Rows that the format could cut, and the blocks of a file cannot.
    let (spec, gguf) = layout::resolve("nvfp4", &[], Some("gguf")).unwrap();
    let error = gguf
        .entries(&spec, WEIGHT, &[2, 48], DType::F32)
        .unwrap_err();
    let expected = viva_core::Error::Indivisible { row: 48, block: 64 };
    assert_eq!(error, expected);
}
