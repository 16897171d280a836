//! How panels of packed weights lie in memory, and the numbers in them.

// Indices say which register: loops over them are unrolled.
#![allow(clippy::needless_range_loop)]

use super::LANES;
use super::dots::{BYTES, Dots};

/// Rows of a panel.
pub const ROWS: usize = 2 * LANES;
/// Bytes of a line: four a row.
pub const LINE: usize = 2 * BYTES;
/// Bytes of one unit for each row.
pub const UNITS: usize = 2 * ROWS;

/// How a scale is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scales {
    F16,
    F32,
    /// A byte: how many of the units, in f16, that groups share.
    Multiples,
}

/// What a group adds to its steps' values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Low {
    Nothing,
    /// `−scale · zero`, a byte for `zero` in the header.
    Zeros,
    /// A number stored as scales are.
    Biases,
}

/// How a panel lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Form {
    pub groups: usize,
    /// Groups that share units; all of them where there are none.
    pub shared: usize,
    /// Fours of columns in a group: even.
    pub quads: usize,
    /// Two codes a byte.
    pub halves: bool,
    pub scales: Scales,
    pub low: Low,
}

impl Form {
    /// Bytes of one number for each row.
    pub fn numbers(&self) -> usize {
        match self.scales {
            Scales::F16 => 2 * ROWS,
            Scales::F32 => 4 * ROWS,
            Scales::Multiples => ROWS,
        }
    }

    /// Bytes of units.
    pub fn units(&self) -> usize {
        match (self.scales, self.low) {
            (Scales::Multiples, Low::Biases) => 2 * UNITS,
            (Scales::Multiples, _) => UNITS,
            _ => 0,
        }
    }

    /// Bytes of a group's header.
    pub fn header(&self) -> usize {
        let low = match self.low {
            Low::Nothing => 0,
            Low::Zeros => ROWS,
            Low::Biases => self.numbers(),
        };
        self.numbers() + low
    }

    /// Bytes of a group's lines.
    pub fn lines(&self) -> usize {
        self.quads * LINE / if self.halves { 2 } else { 1 }
    }

    /// Bytes of a group.
    pub fn group(&self) -> usize {
        self.header() + self.lines()
    }

    /// Bytes of units and the groups that share them.
    pub fn share(&self) -> usize {
        self.units() + self.shared * self.group()
    }

    /// Bytes of a panel.
    pub fn panel(&self) -> usize {
        self.groups / self.shared * self.share()
    }

    /// How the panel lies when every tile of tokens finds it ready to be multiplied:
    /// a byte a step, and scales and biases that nothing has to be done with.
    pub fn apart(&self) -> Form {
        Form {
            shared: self.groups.max(1),
            halves: false,
            scales: Scales::F32,
            low: match self.low {
                Low::Nothing => Low::Nothing,
                Low::Zeros | Low::Biases => Low::Biases,
            },
            ..*self
        }
    }

    /// Where the units of a group begin in a panel, and where it begins itself.
    pub fn at(&self, group: usize) -> (usize, usize) {
        let units = group / self.shared * self.share();
        let before = group % self.shared * self.group();
        (units, units + self.units() + before)
    }
}

/// The units of some groups, from one vector of rows on.
#[derive(Clone, Copy)]
pub(super) struct Units<F, const V: usize> {
    scales: [F; V],
    lows: [F; V],
}

/// What a group's sums are multiplied by, and what is added.
pub(super) struct Numbers<F, const V: usize> {
    pub scales: [F; V],
    /// Zeros where there are none.
    pub lows: [F; V],
}

impl Form {
    /// Reads the units of a share.
    #[inline(always)]
    pub(super) fn load_units<I: Dots, const V: usize>(
        &self,
        isa: I,
        units: &[u8],
        vector: usize,
    ) -> Units<I::F, V> {
        let mut read = Units {
            scales: [isa.splat(0.0); V],
            lows: [isa.splat(0.0); V],
        };
        if self.scales == Scales::Multiples {
            read.scales = halves(isa, units, vector);
            if self.low == Low::Biases {
                read.lows = halves(isa, &units[UNITS..], vector);
            }
        }
        read
    }

    /// Reads a header.
    #[inline(always)]
    pub(super) fn load_numbers<I: Dots, const V: usize>(
        &self,
        isa: I,
        units: Units<I::F, V>,
        header: &[u8],
        vector: usize,
    ) -> Numbers<I::F, V> {
        let (scales, lows) = header.split_at(self.numbers());
        let scales = self.read(isa, units.scales, scales, vector);
        let lows = match self.low {
            Low::Nothing => [isa.splat(0.0); V],
            Low::Zeros => {
                let mut negative = scales;
                let zeros = &lows.as_chunks().0[vector..vector + V];
                for v in 0..V {
                    let zeros = isa.int_to_float(isa.load_u8(&zeros[v]));
                    negative[v] = isa.sub(isa.splat(0.0), isa.mul(scales[v], zeros));
                }
                negative
            }
            Low::Biases => self.read(isa, units.lows, lows, vector),
        };
        Numbers { scales, lows }
    }

    #[inline(always)]
    fn read<I: Dots, const V: usize>(
        &self,
        isa: I,
        units: [I::F; V],
        bytes: &[u8],
        vector: usize,
    ) -> [I::F; V] {
        let mut numbers = units;
        match self.scales {
            Scales::F16 => return halves(isa, bytes, vector),
            Scales::F32 => {
                let words = &bytes.as_chunks().0[vector..vector + V];
                for v in 0..V {
                    numbers[v] = isa.floats(isa.load_u32(&words[v]));
                }
            }
            Scales::Multiples => {
                let multiples = &bytes.as_chunks().0[vector..vector + V];
                for v in 0..V {
                    let multiples = isa.int_to_float(isa.load_i8(&multiples[v]));
                    numbers[v] = isa.mul(units[v], multiples);
                }
            }
        }
        numbers
    }
}

#[inline(always)]
fn halves<I: Dots, const V: usize>(isa: I, bytes: &[u8], vector: usize) -> [I::F; V] {
    let mut numbers = [isa.splat(0.0); V];
    let halves = &bytes.as_chunks().0[vector..vector + V];
    for v in 0..V {
        numbers[v] = isa.load_f16(&halves[v]);
    }
    numbers
}
