//! ISA levels: detection, tokens, dispatch.
//!
//! A kernel is a struct that implements [`Op`] with one body, generic over the
//! sixteen-lane vectors of an [`Isa`]. The body is compiled once per level,
//! inside a function with that level's target features; [`dispatch`] picks the
//! compiled copy once per call. A token such as [`Avx2`] can only be built where
//! the CPU has the instructions, which is the whole safety argument.

pub mod affine;
pub mod bf16;
pub mod bits;
pub mod codebook;
pub mod columns;
pub mod dot;
pub mod dots;
pub mod form;
pub mod int;
pub mod limits;
pub mod memory;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod nibble;
pub mod outliers;
pub mod panel;
pub mod product;
pub mod runs;
pub mod signs;
pub mod sink;
pub mod small_float;
pub mod sparsity;
pub mod stats;
pub mod tiles;
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
mod token;
pub mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
pub use neon::{Neon, NeonDotprod, NeonI8mm};
pub use vector::{Isa, LANES, Line, Portable};
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx2Vnni, Avx512, Avx512Bf16, Avx512Vnni};

use std::sync::atomic::{AtomicU8, Ordering};

use crate::error::{Error, Result};

/// What kernels may use, from least to most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Portable,
    Neon,
    /// NEON with dot products of bytes, signed ones.
    NeonDotprod,
    /// NEON with dot products of unsigned bytes with signed ones.
    NeonI8mm,
    Avx2,
    /// AVX2 with dot products of bytes.
    Avx2Vnni,
    Avx512,
    /// AVX-512 with dot products of bytes.
    Avx512Vnni,
    /// And with those of pairs of bf16.
    Avx512Bf16,
    /// And with tiles of bytes.
    Avx512Amx,
}

impl Level {
    const ALL: [Level; 10] = [
        Level::Portable,
        Level::Neon,
        Level::NeonDotprod,
        Level::NeonI8mm,
        Level::Avx2,
        Level::Avx2Vnni,
        Level::Avx512,
        Level::Avx512Vnni,
        Level::Avx512Bf16,
        Level::Avx512Amx,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Neon => "neon",
            Level::NeonDotprod => "neon_dotprod",
            Level::NeonI8mm => "neon_i8mm",
            Level::Avx2 => "avx2",
            Level::Avx2Vnni => "avx2_vnni",
            Level::Avx512 => "avx512",
            Level::Avx512Vnni => "avx512_vnni",
            Level::Avx512Bf16 => "avx512_bf16",
            Level::Avx512Amx => "avx512_amx",
        }
    }
}

/// A kernel: its inputs and outputs, and one body for all levels.
///
/// Bodies are `#[inline(always)]`, and so is every function they call in their
/// loops: only then are they compiled with the level's target features.
pub trait Op {
    type Output;
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// The levels that this machine has, lowest first.
pub fn levels() -> Vec<Level> {
    let has = |level: &Level| match level {
        Level::Portable => true,
        #[cfg(target_arch = "aarch64")]
        Level::Neon => Neon::detect().is_some(),
        #[cfg(target_arch = "aarch64")]
        Level::NeonDotprod => NeonDotprod::detect().is_some(),
        #[cfg(target_arch = "aarch64")]
        Level::NeonI8mm => NeonI8mm::detect().is_some(),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => Avx2::detect().is_some(),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2Vnni => Avx2Vnni::detect().is_some(),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => Avx512::detect().is_some(),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Vnni => Avx512Vnni::detect().is_some(),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 => Avx512Bf16::detect().is_some(),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Amx => Avx512Bf16::detect().is_some() && tiles::Amx::detect().is_some(),
        // A level of another architecture.
        _ => false,
    };
    Level::ALL.into_iter().filter(has).collect()
}

const UNSET: u8 = u8::MAX;
static LEVEL: AtomicU8 = AtomicU8::new(UNSET);

/// The level that [`dispatch`] uses: what `VIVA_TENSOR_ISA` forces, or the
/// machine's highest. A name that the machine lacks is an error.
pub fn configure() -> Result<Level> {
    let levels = levels();
    let highest = *levels.last().unwrap_or(&Level::Portable);
    let level = match std::env::var("VIVA_TENSOR_ISA") {
        Err(_) => highest,
        Ok(name) if name.is_empty() => highest,
        Ok(name) => *levels.iter().find(|l| l.name() == name).ok_or_else(|| {
            let have: Vec<&str> = levels.iter().map(|l| l.name()).collect();
            Error::option(
                "VIVA_TENSOR_ISA",
                format!("this machine has {}, not {name:?}", have.join(", ")),
            )
        })?,
    };
    LEVEL.store(level as u8, Ordering::Relaxed);
    Ok(level)
}

/// The level in force.
pub fn level() -> Level {
    let stored = LEVEL.load(Ordering::Relaxed);
    match Level::ALL.into_iter().find(|&l| l as u8 == stored) {
        Some(level) => level,
        // An unusable VIVA_TENSOR_ISA is reported where `configure` is called
        // at start; arithmetic is the same on every level.
        None => configure().unwrap_or(Level::Portable),
    }
}

/// Runs a kernel at the level in force.
#[inline]
pub fn dispatch<O: Op>(op: O) -> O::Output {
    dispatch_at(level(), op)
}

/// Runs a kernel at `level`, or at the baseline where the machine lacks it.
#[inline]
pub fn dispatch_at<O: Op>(level: Level, op: O) -> O::Output {
    match level {
        #[cfg(target_arch = "aarch64")]
        Level::Neon | Level::NeonDotprod | Level::NeonI8mm => {
            if let Some(token) = Neon::detect() {
                return token.dispatch(op);
            }
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Vnni | Level::Avx512Bf16 | Level::Avx512Amx => {
            if let Some(token) = Avx512::detect() {
                return token.dispatch(op);
            }
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx2Vnni => {
            if let Some(token) = Avx2::detect() {
                return token.dispatch(op);
            }
        }
        _ => {}
    }
    op.run(Portable)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Name;

    impl Op for Name {
        type Output = &'static str;

        #[inline(always)]
        fn run<I: Isa>(self, _isa: I) -> &'static str {
            std::any::type_name::<I>()
        }
    }

    #[test]
    fn no_level_but_the_portable_one_runs_portable_code() {
        let portable = dispatch_at(Level::Portable, Name);
        for level in levels() {
            let ran = dispatch_at(level, Name);
            assert_eq!(
                ran == portable,
                level == Level::Portable,
                "{level:?}: {ran}"
            );
        }
        assert_eq!(
            levels().contains(&Level::Neon),
            cfg!(target_arch = "aarch64")
        );
    }
}
