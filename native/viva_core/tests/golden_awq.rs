//! Our packing against that of gptqmodel, at every ISA level. The fixture and
//! what its tensors mean: test/golden/make_awq.py.

mod support;

use serde_json::json;
use support::golden::Golden;
use support::{dequantized, on_every_level};
use viva_core::layout::{Source, layout};
use viva_core::tensor::{DType, Tensor};

#[test]
fn values_and_words_are_theirs_both_ways() {
    on_every_level("values_and_words_are_theirs_both_ways", |digest| {
        let golden = Golden::open("awq");
        let awq = layout("awq").unwrap();
        let cases = golden.cases("qweight");
        assert_eq!(cases.len(), 4);
        for case in &cases {
            let tensor = |name: &str| -> viva_core::Result<Tensor> {
                let part = name.strip_prefix("m.").unwrap_or(name);
                Ok(golden.tensor(&format!("{case}/{part}")))
            };
            let config = json!({});
            let q = awq.read("m.weight", &Source::new(&tensor, &config));
            let q = q.unwrap();
            let values = dequantized(&q, DType::F16);
            let expected = golden.tensor(&format!("{case}/dequantized"));
            assert_eq!(values.shape(), expected.shape());
            assert!(values.bytes() == expected.bytes(), "values of {case}");
            digest.bytes(values.bytes());
            // And back to the bytes of the file.
            awq.check(&q.spec).unwrap();
            let entries = awq.entries(&q.spec, "m.weight", &q.shape, q.dtype);
            let entries = entries.unwrap().fixed;
            let spelled = awq.spell("m.weight", &q).unwrap();
            assert_eq!(spelled.len(), entries.len());
            for ((name, bytes), entry) in spelled.iter().zip(&entries) {
                let part = name.strip_prefix("m.").unwrap();
                let expected = golden.tensor(&format!("{case}/{part}"));
                assert_eq!(*name, entry.name);
                assert_eq!(entry.shape, expected.shape(), "{case} {part}");
                assert!(bytes[..] == *expected.bytes(), "{case} {part}");
            }
        }
    });
}
