//! Dumps: they come back as they went, and what is no dump is an error.

mod support;

use std::collections::HashMap;
use std::sync::Arc;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use support::{Random, every_spec, f32_tensor, gaussian, int, make, name, quantized, yes};
use viva_core::format::Quantized;
use viva_core::ops::dequantize::{dequantize, dequantize_into};
use viva_core::ops::{Cancel, dump};
use viva_core::tensor::DType;
use viva_core::{Error, Result};

fn load(bytes: &[u8]) -> Result<Quantized> {
    dump::load(Arc::new(bytes.to_vec()))
}

/// Loads damaged bytes: an error, or a tensor that can be read.
fn load_or_refuse(bytes: &[u8]) -> bool {
    let Ok(q) = load(bytes) else {
        return false;
    };
    q.validate().unwrap();
    // What it claims to be is in the dump, so it cannot be much larger.
    assert!(
        q.len() <= 2 * bytes.len(),
        "{:?} of {} bytes",
        q.shape,
        bytes.len()
    );
    let values = dequantize(&q).unwrap();
    assert_eq!(values.len(), q.len());
    let mut out = vec![0u8; q.len() * q.dtype.size()];
    dequantize_into(&q, q.dtype, &mut out, &Cancel::new()).unwrap();
    true
}

#[test]
fn what_was_dumped_comes_back() {
    for shape in [
        vec![3, 64],
        vec![64],
        vec![2, 2, 96],
        vec![0, 32],
        vec![1, 32],
    ] {
        let n = shape.iter().product();
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            let x = support::float_tensor(dtype, &shape, &gaussian(n, 1));
            for spec in every_spec() {
                let q = quantized(&x, &spec);
                let bytes = dump::dump(&q).unwrap();
                let back = load(&bytes).unwrap();
                assert_eq!(
                    (&back.spec, &back.shape, back.dtype),
                    (&q.spec, &q.shape, q.dtype)
                );
                for ((a, x), (b, y)) in q.parts.iter().zip(&back.parts) {
                    assert_eq!((a, x.dtype(), x.shape()), (b, y.dtype(), y.shape()));
                    assert_eq!(x.bytes(), y.bytes());
                }
                assert_eq!(dump::dump(&back).unwrap(), bytes);
                let overhead = bytes.len() - q.nbytes();
                assert!(overhead < 1000, "{overhead} bytes of header");
            }
        }
    }
}

#[test]
fn a_dump_at_any_address_reads_the_same() {
    let x = f32_tensor(&[3, 64], &gaussian(192, 2));
    for spec in every_spec() {
        let q = quantized(&x, &spec);
        let bytes = dump::dump(&q).unwrap();
        let values = dequantize(&q).unwrap();
        for shift in 1..8 {
            // Memory that begins `shift` bytes past an aligned address.
            struct Shifted(Vec<u64>, usize, usize);
            impl AsRef<[u8]> for Shifted {
                fn as_ref(&self) -> &[u8] {
                    &bytemuck::cast_slice(&self.0)[self.1..self.1 + self.2]
                }
            }
            let mut words = vec![0u64; bytes.len() / 8 + 3];
            bytemuck::cast_slice_mut(&mut words)[shift..shift + bytes.len()]
                .copy_from_slice(&bytes);
            let q = dump::load(Arc::new(Shifted(words, shift, bytes.len()))).unwrap();
            let what = format_args!("{:?} shifted by {shift}", q.spec).to_string();
            support::same(&dequantize(&q).unwrap(), &values, format_args!("{what}"));
        }
    }
}

#[test]
fn a_dump_cut_anywhere_is_refused() {
    let x = f32_tensor(&[3, 32], &gaussian(96, 3));
    for spec in every_spec() {
        let bytes = dump::dump(&quantized(&x, &spec)).unwrap();
        for len in 0..bytes.len() {
            assert!(
                load(&bytes[..len]).is_err(),
                "{len} of {} {spec:?}",
                bytes.len()
            );
        }
        for more in [1, 7, 8] {
            let longer = [&bytes[..], &[0; 8][..more]].concat();
            assert!(load(&longer).is_err(), "{more} bytes more {spec:?}");
        }
    }
}

#[test]
fn damaged_dumps_never_panic() {
    let mut random = Random(4);
    let (mut taken, mut refused) = (0, 0);
    let dumps: Vec<Vec<u8>> = every_spec()
        .iter()
        .flat_map(|spec| {
            [vec![3, 32], vec![0, 32]].map(|shape| {
                let n = shape.iter().product();
                dump::dump(&quantized(&f32_tensor(&shape, &gaussian(n, 5)), spec)).unwrap()
            })
        })
        .collect();
    for i in 0..20_000 {
        let mut bytes = dumps[i % dumps.len()].clone();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let digits: Vec<usize> = (8..header).filter(|&i| bytes[i].is_ascii_digit()).collect();
        let kind = random.below(4);
        for _ in 0..1 + random.below(3) {
            let anywhere = random.below(bytes.len());
            match kind {
                // Bytes that hold the structure, and those that hold numbers.
                0 => bytes[random.below(header)] = random.bits() as u8,
                1 if bytes.len() > header => {
                    let data = header + random.below(bytes.len() - header);
                    bytes[data] = random.bits() as u8;
                }
                // Shapes, offsets and blocks become others.
                2 => bytes[digits[random.below(digits.len())]] = b'0' + random.below(10) as u8,
                _ => bytes[random.below(header)] = bytes[anywhere],
            }
        }
        if load_or_refuse(&bytes) {
            taken += 1;
        } else {
            refused += 1;
        }
    }
    // Damage to codes cannot be seen; damage to structure must be.
    assert!(
        taken > 1000 && refused > 5000,
        "{taken} taken, {refused} refused"
    );
}

/// A dump whose head and parts were edited.
struct Forged {
    head: Value,
    parts: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)>,
}

const KEY: &str = "viva_tensor.quantized";

impl Forged {
    fn of(q: &Quantized) -> Forged {
        let bytes = dump::dump(q).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let head = &metadata.metadata().as_ref().unwrap()[KEY];
        let views = SafeTensors::deserialize(&bytes).unwrap();
        Forged {
            head: serde_json::from_str(head).unwrap(),
            parts: views
                .tensors()
                .into_iter()
                .map(|(n, v)| (n, v.dtype(), v.shape().to_vec(), v.data().to_vec()))
                .collect(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let views = self.parts.iter().map(|(name, dtype, shape, data)| {
            (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        let metadata = HashMap::from([(KEY.to_string(), self.head.to_string())]);
        safetensors::serialize(views, Some(metadata)).unwrap()
    }

    fn part(&mut self, name: &str) -> &mut (String, safetensors::Dtype, Vec<usize>, Vec<u8>) {
        self.parts.iter_mut().find(|p| p.0 == name).unwrap()
    }
}

fn refused(what: &str, original: &Quantized, forge: impl FnOnce(&mut Forged)) {
    let mut forged = Forged::of(original);
    assert!(load(&forged.bytes()).is_ok());
    forge(&mut forged);
    let error = load(&forged.bytes()).expect_err(what);
    assert!(!error.to_string().is_empty());
}

#[test]
fn a_head_that_lies_is_refused() {
    let x = f32_tensor(&[4, 64], &gaussian(256, 6));
    let int4 = quantized(&x, &make("int4", &[("block_size", int(32))]));
    let int8 = quantized(&x, &make("int8", &[]));
    let nf4 = quantized(&x, &make("nf4", &[("double_quant", yes(true))]));
    for q in [&int4, &int8, &nf4] {
        let set = |path: &str, value: Value| {
            refused(&format!("{path} = {value} in {:?}", q.spec), q, |f| {
                *f.head.pointer_mut(path).unwrap() = value;
            });
        };
        for block in [
            0u64,
            1,
            3,
            16,
            128,
            1 << 31,
            1 << 61,
            1 << 62,
            1 << 63,
            u64::MAX,
        ] {
            set("/spec/granularity", json!({"block": block}));
        }
        set("/spec/granularity", json!({"block": -64}));
        set("/spec/granularity", json!("column"));
        set("/spec/granularity", json!(null));
        for format in ["int5", "", "fp8_e4m3"] {
            set("/spec/format", json!(format));
        }
        for dtype in ["f64", "i64", "u8", "bool", "f8"] {
            set("/spec/scale_dtype", json!(dtype));
        }
        set("/spec/method", json!("awq"));
        set("/spec/symmetric", json!(1));
        set("/spec/symmetric", json!(!q.spec.symmetric));
        set("/spec/double_quant", json!(!q.spec.double_quant));
        for dtype in ["i32", "u8", "F32", "bool"] {
            set("/dtype", json!(dtype));
        }
        for shape in [
            json!([]),
            json!([0]),
            json!([4, 65]),
            json!([8, 64]),
            json!([1u64 << 63, 64]),
            json!([u64::MAX, u64::MAX, 0]),
            json!([0, u64::MAX]),
            json!([1u64 << 58]),
            json!([-4, 64]),
            json!([4.5, 64]),
            json!("4x64"),
        ] {
            set("/shape", shape);
        }
        set("", json!({}));
        set("", json!([]));
        set("", json!("spec"));
    }
    refused("rows of int4 as a spec of nf4", &int4, |f| {
        f.head["spec"]["format"] = json!("nf4");
    });
    refused("nf4 with one scale a row", &nf4, |f| {
        f.head["spec"]["granularity"] = json!("row");
    });
    refused("absmax in steps", &nf4, |f| {
        f.head["spec"]["scale"] = json!("step")
    });
    refused("int4 under LLM.int8()'s rule", &int4, |f| {
        f.head["spec"]["scale"] = json!("absmax");
    });
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let x = f32_tensor(&[4, 64], &gaussian(256, 7));
    let symmetric = [("symmetric", yes(false)), ("scale_dtype", name("f16"))];
    let originals = [
        quantized(&x, &make("int8", &symmetric)),
        quantized(&x, &make("int4", &[("block_size", int(16))])),
        quantized(&x, &make("fp4", &[("double_quant", yes(true))])),
    ];
    for q in &originals {
        for (part, tensor) in &q.parts {
            let what = |how: &str| format!("{part} {how} in {:?}", q.spec);
            refused(&what("missing"), q, |f| f.parts.retain(|p| p.0 != *part));
            refused(&what("renamed"), q, |f| f.part(part).0 = "other".into());
            refused(&what("twice"), q, |f| {
                let mut copy = f.part(part).clone();
                copy.0 = "another".into();
                f.parts.push(copy);
            });
            refused(&what("flattened"), q, |f| f.part(part).2.push(1));
            refused(&what("shorter"), q, |f| {
                let p = f.part(part);
                let rows = p.2[0];
                p.2[0] -= 1;
                p.3.truncate(p.3.len() / rows * (rows - 1));
            });
            refused(&what("of another dtype"), q, |f| {
                let p = f.part(part);
                p.1 = match tensor.dtype() {
                    DType::F32 => safetensors::Dtype::I32,
                    DType::F16 => safetensors::Dtype::BF16,
                    DType::U8 => safetensors::Dtype::I8,
                    _ => safetensors::Dtype::U8,
                };
            });
        }
    }
}

#[test]
fn other_files_are_refused() {
    let text = b"not a dump at all".to_vec();
    let mut endless = u64::MAX.to_le_bytes().to_vec();
    endless.extend_from_slice(b"{}");
    let plain = safetensors::serialize(
        [(
            "w",
            TensorView::new(safetensors::Dtype::U8, vec![2], &[1, 2]).unwrap(),
        )],
        None,
    )
    .unwrap();
    for bytes in [vec![], vec![0; 8], text, endless, plain] {
        assert!(matches!(load(&bytes), Err(Error::InvalidDump { .. })));
    }
}
