//! What the machine can do at best, on all threads of the pool: what benchmarks
//! divide by. Probed in the same run as what is divided, for memory's rate
//! changes from one minute to the next where machines are shared.

use rayon::prelude::*;

use super::pool;
use crate::error::{Error, Result};
use crate::simd::limits;

/// Some 2 ms.
const ROUNDS: usize = 1 << 20;

/// Something of which the machine can do so much and not more.
pub struct Limit {
    pub name: &'static str,
    /// `B` or `op`.
    pub unit: &'static str,
    /// Done once on one thread, with some of the memory.
    probe: fn(&mut [f32]) -> Option<usize>,
}

/// All limits. Those of memory are those of the caches where the memory fits.
pub const LIMITS: [Limit; 6] = [
    Limit {
        name: "read",
        unit: "B",
        probe: |memory| Some(limits::read(memory)),
    },
    Limit {
        name: "write",
        unit: "B",
        probe: |memory| Some(limits::write(memory)),
    },
    Limit {
        name: "write_past_caches",
        unit: "B",
        probe: limits::write_past_caches,
    },
    Limit {
        name: "fma_f32",
        unit: "op",
        probe: |_| Some(limits::fma(ROUNDS)),
    },
    Limit {
        name: "dot_bf16",
        unit: "op",
        probe: |_| limits::dot_bf16(ROUNDS),
    },
    Limit {
        name: "dot_int8",
        unit: "op",
        probe: |_| limits::dot_int8(ROUNDS),
    },
];

/// The limit of that name.
///
/// # Errors
/// `InvalidOption`.
pub fn by_name(name: &str) -> Result<&'static Limit> {
    LIMITS.iter().find(|l| l.name == name).ok_or_else(|| {
        let names = LIMITS.each_ref().map(|l| l.name).join(", ");
        Error::option("limit", format!("expected one of {names}, got {name}"))
    })
}

impl Limit {
    /// Does it once on every thread, each with its piece of `memory`: how much of
    /// the unit was done, or `None` where the level in force lacks the instruction.
    ///
    /// # Errors
    /// Those of the pool.
    pub fn probe(&self, memory: &mut [f32]) -> Result<Option<usize>> {
        let piece = memory.len().div_ceil(pool::threads()?).max(1);
        pool::run(|| Ok(memory.par_chunks_mut(piece).map(self.probe).sum()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_does_something_or_says_that_it_cannot() {
        let mut memory = vec![0f32; 1 << 12];
        for limit in &LIMITS {
            let portable = ["read", "write", "fma_f32"].contains(&limit.name);
            match limit.probe(&mut memory).unwrap() {
                Some(work) => assert!(work > 0, "{}", limit.name),
                None => assert!(!portable, "{}", limit.name),
            }
        }
        assert!(by_name("read").is_ok());
        assert!(by_name("reads").is_err());
    }

    #[test]
    fn writes_reach_every_element_but_the_ends() {
        for (write, kept) in [("write", 0), ("write_past_caches", 32)] {
            for n in [0, 1, 15, 16, 17, 100, 1000] {
                let mut memory = vec![0f32; n];
                let work = by_name(write).unwrap().probe(&mut memory[..]).unwrap();
                let written = memory.iter().filter(|&&v| v == 1.0).count();
                // Nothing to cut is nothing done, not an instruction lacked.
                if let Some(work) = work {
                    assert_eq!(work, written * 4);
                    let threads = pool::threads().unwrap();
                    assert!(written + kept * threads >= n, "{write} of {n}: {written}");
                }
            }
        }
    }
}
