//! Operations on tensors: they know shapes and ranges, call formats and
//! kernels on slices, and run in parallel on the one pool.

pub mod batch;
pub mod cast;
pub mod dequantize;
pub mod dump;
pub mod epilogue;
pub mod histogram;
pub mod int8;
pub mod limits;
pub mod llm_int8;
pub mod matmul;
pub mod metrics;
pub mod output_error;
pub mod packed;
pub mod pool;
pub mod quantize;
pub mod sparsity;
pub mod transpose;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// A flag that asks a running operation to stop. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    pub fn new() -> Cancel {
        Cancel::default()
    }

    /// Asks every operation that polls this flag to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// `Err(Cancelled)` once someone asked. Operations poll it every chunk, and
    /// it is where they let others run: a kernel that preempts lazily leaves a
    /// BEAM scheduler that woke up waiting for the next tick, up to 10 ms away,
    /// unless the running thread enters the kernel by itself.
    pub fn check(&self) -> Result<()> {
        yield_in_turn();
        if self.0.load(Ordering::Relaxed) {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }
}

/// Yields where the thread has not done so for a while: a chunk of memory-bound
/// work takes hardly longer than the system call.
fn yield_in_turn() {
    const WHILE: Duration = Duration::from_micros(50);
    thread_local! {
        static LAST: Cell<Option<Instant>> = const { Cell::new(None) };
    }
    let now = Instant::now();
    LAST.with(|last| {
        if last.get().is_none_or(|then| now - then >= WHILE) {
            std::thread::yield_now();
            last.set(Some(now));
        }
    });
}

/// Elements that one task works on: small enough for the L2 cache together
/// with its results, large enough that a task costs nothing.
pub(crate) const CHUNK: usize = 16 * 1024;
