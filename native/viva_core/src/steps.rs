//! Quantized weights as integers of a byte: what products of integers are made of.
//!
//! value = scale · (step − zero) + low, a step being a code or what a table says of
//! it. Scales and lows belong to blocks, zero to the whole tensor. Neighbouring blocks
//! may have theirs as multiples of units that they share.

/// What a block adds to the values of its steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lows {
    Nothing,
    /// −scale · zero point, a whole number from 0 to 255.
    ZeroPoints,
    /// Any number.
    Biases,
}

/// How a format's weights are steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepForm {
    /// Elements that share a scale; `usize::MAX` where the whole tensor does.
    pub block: usize,
    /// Codes are below 16.
    pub halves: bool,
    /// The step of each code of four bits, where it is not the code.
    pub table: Option<[u8; 16]>,
    /// What is taken from steps.
    pub zero: u8,
    pub lows: Lows,
    /// Blocks that share units: 1 where there are none.
    pub shared: usize,
}

/// A quantized matrix that can be read as steps, row by row.
pub trait Steps: Sync {
    fn form(&self) -> StepForm;

    /// The codes of a row, one a byte.
    fn codes(&self, row: usize, out: &mut [u8]);

    /// The scales of a row's blocks, and their zero points or biases; `lows` is left
    /// alone where there are none. Where blocks share units, how many of them: whole
    /// numbers from −128 to 127.
    fn numbers(&self, row: usize, scales: &mut [f32], lows: &mut [f32]);

    /// The units of a row's scales and biases, which f16 holds as they are; left alone
    /// where there are none.
    fn units(&self, _row: usize, _scales: &mut [f32], _lows: &mut [f32]) {}
}

/// The steps that come nearest to sixteen values between −1 and 1: 128 and 127
/// times the value, so that a scale is divided by 127.
pub fn nearest_steps(table: &[f32; 16]) -> [u8; 16] {
    table.map(|v| (128.0 + (v * 127.0).round_ties_even()) as u8)
}
