//! Floats of eight and four bits against those of ml_dtypes. The fixture and
//! what its tensors mean: test/golden/make_small_floats.py.

mod support;

use safetensors::SafeTensors;
use viva_core::small_float::{E2M1, E4M3, E5M2, e8m0};
use viva_core::tensor::{DType, narrow, widen};

const FIXTURE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../test/golden/small_floats.safetensors"
);

/// Values, inputs and codes of one dtype.
fn golden(name: &str) -> (Vec<f32>, Vec<f32>, Vec<u8>) {
    let bytes = std::fs::read(FIXTURE).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let bytes = |part: &str| {
        let view = file.tensor(&format!("{name}/{part}")).unwrap();
        view.data().to_vec()
    };
    let floats = |part: &str| {
        let bytes = bytes(part);
        let mut out = vec![0f32; bytes.len() / 4];
        widen(DType::F32, &bytes, &mut out);
        out
    };
    (floats("values"), floats("inputs"), bytes("codes"))
}

fn same_number(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

fn check(name: &str, max: f32, encode: impl Fn(f32) -> u8, decode: impl Fn(u8) -> f32) {
    let (values, inputs, codes) = golden(name);
    for (code, &value) in values.iter().enumerate() {
        let got = decode(code as u8);
        assert!(same_number(got, value), "{name} {code:#x}: {got} {value}");
    }
    assert!(inputs.len() > 3 * values.len() / 2 && inputs.len() == codes.len());
    let top = encode(max);
    let sign = encode(-max) & !top;
    for (&x, &code) in inputs.iter().zip(&codes) {
        let got = encode(x);
        let theirs = decode(code);
        let expected = if x.is_finite() && !theirs.is_finite() && x.abs() > max {
            // Where they overflow, ours saturates.
            top | if x < 0.0 { sign } else { 0 }
        } else if theirs.is_nan() || x.is_nan() {
            // What e2m1 has no code for is no number's.
            assert!(decode(got).is_nan() || !x.is_finite() || x == 0.0);
            continue;
        } else {
            code
        };
        assert_eq!(got, expected, "{name}: {x:e}");
    }
}

#[test]
fn codes_and_values_are_those_of_ml_dtypes() {
    check("f8_e4m3", 448.0, |x| E4M3.encode(x), |c| E4M3.decode(c));
    check("f8_e5m2", 57344.0, |x| E5M2.encode(x), |c| E5M2.decode(c));
    check("e2m1", 6.0, |x| E2M1.encode(x), |c| E2M1.decode(c));
    let most = f32::from_bits(254 << 23);
    // The one dtype without a sign: negative numbers are NaN.
    let encode = |x: f32| match x {
        x if x < 0.0 => e8m0::NAN,
        x => e8m0::encode(x),
    };
    assert!([-1.0, -1e-45, f32::NEG_INFINITY].map(e8m0::encode) == [e8m0::NAN; 3]);
    check("f8_e8m0", most, encode, e8m0::decode);
}

#[test]
fn values_without_a_number_keep_to_the_rules() {
    let inf = f32::INFINITY;
    assert_eq!([inf, -inf].map(|x| E4M3.encode(x)), [0x7e, 0xfe]);
    assert_eq!([inf, -inf].map(|x| E5M2.encode(x)), [0x7c, 0xfc]);
    assert_eq!([inf, -inf].map(|x| E2M1.encode(x)), [7, 15]);
    assert_eq!(E4M3.encode(f32::NAN), 0x7f);
    assert!(E5M2.decode(E5M2.encode(f32::NAN)).is_nan());
    assert_eq!([0.0, -0.0].map(e8m0::encode), [0, 0]);
    assert_eq!([3e38, inf, f32::NAN].map(e8m0::encode), [254, 255, 255]);
    assert_eq!((E4M3.max(), E5M2.max(), E2M1.max()), (448.0, 57344.0, 6.0));
}

/// Every f16 through the dtypes of tensors: one way to round, whoever asks.
#[test]
fn tensors_round_as_their_codes() {
    let x: Vec<f32> = (0..=u16::MAX)
        .map(|b| half::f16::from_bits(b).to_f32())
        .collect();
    for (dtype, encode) in [
        (DType::F8E4M3, (|x| E4M3.encode(x)) as fn(f32) -> u8),
        (DType::F8E5M2, |x| E5M2.encode(x)),
        (DType::F8E8M0, e8m0::encode),
    ] {
        let mut codes = vec![0u8; x.len()];
        narrow(dtype, &x, &mut codes).unwrap();
        assert!(codes.iter().zip(&x).all(|(&c, &x)| c == encode(x)));
        let mut values = vec![0f32; x.len()];
        widen(dtype, &codes, &mut values);
        let mut again = vec![0u8; x.len()];
        narrow(dtype, &values, &mut again).unwrap();
        let differ = codes.iter().zip(&again).filter(|(a, b)| a != b).count();
        // The NaN of E5M2 has three codes.
        assert_eq!(differ, 0, "{dtype:?}");
    }
}
