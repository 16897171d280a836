//! ggml's blocks of 32 integers taken apart and put together.

use super::affine::{Form, Shift};
use crate::formats::ggml_types::GgmlType;
use crate::tensor::{DType, widen};

/// Elements of a block.
const LEN: usize = 32;

/// Where the codes of a block are: after `d`, after `d` and `m`, and after the
/// fifth bits too.
struct Plan {
    width: usize,
    has_bias: bool,
}

fn plan(format: &str) -> Option<Plan> {
    let (width, has_bias) = match format {
        "q4_0" => (4, false),
        "q4_1" => (4, true),
        "q5_0" => (5, false),
        "q5_1" => (5, true),
        "q8_0" => (8, false),
        _ => return None,
    };
    Some(Plan { width, has_bias })
}

/// The form of a format of such blocks.
pub fn form(format: &str) -> Option<Form> {
    plan(format).map(|plan| Form {
        width: plan.width,
        shift: match plan.has_bias {
            true => Shift::Float,
            false => Shift::Half,
        },
    })
}

/// The blocks of `bytes`; none for any other format.
fn blocks<'a>(format: &str, bytes: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    let size = GgmlType::by_name(format).map_or(1, |t| t.block_bytes);
    bytes.chunks_exact(size)
}

/// Scales, and least values where there are some.
pub struct Numbers {
    pub scales: Vec<f32>,
    pub biases: Option<Vec<f32>>,
}

impl Numbers {
    pub fn of(format: &str, bytes: &[u8]) -> Numbers {
        let at = |start: usize| {
            let halves: Vec<u8> = blocks(format, bytes)
                .flat_map(|b| [b[start], b[start + 1]])
                .collect();
            let mut numbers = vec![0f32; halves.len() / 2];
            widen(DType::F16, &halves, &mut numbers);
            numbers
        };
        let has_bias = plan(format).is_some_and(|plan| plan.has_bias);
        Numbers {
            scales: at(0),
            biases: has_bias.then(|| at(2)),
        }
    }
}

/// The codes, one a byte, all of them from 0 up.
pub fn codes(format: &str, bytes: &[u8]) -> Vec<u8> {
    let Some(Plan { width, has_bias }) = plan(format) else {
        return Vec::new();
    };
    let start = if has_bias { 4 } else { 2 };
    let mut codes = Vec::with_capacity(bytes.len() * 2);
    for block in blocks(format, bytes) {
        let rest = &block[start..];
        if width == 8 {
            codes.extend(rest.iter().map(|c| c ^ 0x80));
            continue;
        }
        let (fifth, nibbles) = rest.split_at(if width == 5 { 4 } else { 0 });
        let fifth = |i: usize| {
            fifth
                .get(i / 8)
                .map_or(0, |byte| (byte >> (i % 8) & 1) << 4)
        };
        let half = LEN / 2;
        codes.extend((0..half).map(|i| nibbles[i] & 15 | fifth(i)));
        codes.extend((0..half).map(|i| nibbles[i] >> 4 | fifth(i + half)));
    }
    codes
}

/// The bytes of blocks with these codes, and scales and biases in f16.
pub fn joined(format: &str, codes: &[u8], scales: &[u8], biases: Option<&[u8]>) -> Vec<u8> {
    let Some(Plan { width, .. }) = plan(format) else {
        return Vec::new();
    };
    let mut bytes = Vec::with_capacity(codes.len() + 2 * scales.len());
    for (i, codes) in codes.chunks_exact(LEN).enumerate() {
        bytes.extend_from_slice(&scales[2 * i..2 * i + 2]);
        if let Some(biases) = biases {
            bytes.extend_from_slice(&biases[2 * i..2 * i + 2]);
        }
        if width == 8 {
            bytes.extend(codes.iter().map(|c| c ^ 0x80));
            continue;
        }
        if width == 5 {
            let fifth = |bits: u32, (i, code): (usize, &u8)| bits | u32::from(code >> 4) << i;
            let bits = codes.iter().enumerate().fold(0, fifth);
            bytes.extend_from_slice(&bits.to_le_bytes());
        }
        let (low, high) = codes.split_at(LEN / 2);
        bytes.extend(low.iter().zip(high).map(|(l, h)| l & 15 | h << 4));
    }
    bytes
}
