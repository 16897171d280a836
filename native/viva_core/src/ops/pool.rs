//! The one thread pool.

use std::sync::{Arc, LazyLock, RwLock};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::Cancel;
use crate::error::{Error, Result};

static POOL: LazyLock<RwLock<Option<Arc<ThreadPool>>>> = LazyLock::new(|| RwLock::new(None));

fn build(threads: usize) -> Result<Arc<ThreadPool>> {
    ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("viva_tensor_{i}"))
        .start_handler(|_| yield_to_schedulers())
        .build()
        .map(Arc::new)
        .map_err(|e| Error::option("threads", e.to_string()))
}

/// Number crunching gives way to the BEAM's schedulers, so that normal
/// processes stay responsive while every core is busy.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn yield_to_schedulers() {
    /// The kernel's `struct sched_attr`, in its first version.
    #[repr(C)]
    struct SchedAttr {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: libc::SCHED_OTHER as u32,
        flags: 0,
        // A scheduler that finds nothing to do spins for a while and yields as it
        // spins. At 15 it gets the core back from a pool thread in time to see
        // its timers within 10 ms (`bench/large_checkpoint.exs`); at 10 it does
        // not always, and at 19 a busy machine would starve the pool.
        nice: 15,
        priority: 0,
        // A slice of 0.1 ms: Linux 6.12 and later let a thread run its slice
        // before one that woke up, and the usual slice is 3 ms. Earlier ones
        // ignore it.
        runtime: 100_000,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the structure is that of the system call and outlives it; thread
    // 0 is the calling one. A refusal costs latency, not correctness.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
}

/// Elsewhere a priority would be that of the whole process.
#[cfg(not(target_os = "linux"))]
fn yield_to_schedulers() {}

/// Sets the number of threads that all operations share from now on. Calls
/// already running finish on the pool that they began on.
pub fn configure(threads: usize) -> Result<()> {
    if threads == 0 || threads > 1024 {
        return Err(Error::option(
            "threads",
            format!("expected 1 to 1024 threads, got {threads}"),
        ));
    }
    let pool = build(threads)?;
    *POOL.write().unwrap_or_else(|e| e.into_inner()) = Some(pool);
    Ok(())
}

fn pool() -> Result<Arc<ThreadPool>> {
    if let Some(pool) = &*POOL.read().unwrap_or_else(|e| e.into_inner()) {
        return Ok(Arc::clone(pool));
    }
    let mut slot = POOL.write().unwrap_or_else(|e| e.into_inner());
    if let Some(pool) = &*slot {
        return Ok(Arc::clone(pool));
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = build(threads)?;
    *slot = Some(Arc::clone(&pool));
    Ok(pool)
}

/// Threads of the pool.
pub fn threads() -> Result<usize> {
    Ok(pool()?.current_num_threads())
}

/// Runs `f` inside the pool; rayon's iterators in it use the pool's threads.
pub fn run<R: Send>(f: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    pool()?.install(f)
}

/// Who works on the chunks of an operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Threads {
    /// Those of the pool.
    Pool,
    /// The calling one alone: it is done before others would have begun.
    Caller,
}

impl Threads {
    /// Runs `f` where these are.
    pub fn run<R: Send>(self, f: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        match self {
            Threads::Pool => run(f),
            Threads::Caller => f(),
        }
    }

    /// Calls `work` with the index and the elements of every chunk, and with what
    /// `room` makes once for many of them. Call it inside [`Threads::run`].
    ///
    /// # Errors
    /// Those of `work`; `Cancelled`, which the caller alone is too quick for.
    pub fn chunks<T: Send, S>(
        self,
        out: &mut [T],
        size: usize,
        cancel: &Cancel,
        room: impl Fn() -> S + Sync + Send,
        work: impl Fn(&mut S, usize, &mut [T]) -> Result<()> + Sync + Send,
    ) -> Result<()> {
        match self {
            Threads::Pool => {
                out.par_chunks_mut(size)
                    .enumerate()
                    .try_for_each_init(room, |room, (i, chunk)| {
                        cancel.check()?;
                        work(room, i, chunk)
                    })
            }
            Threads::Caller => {
                let mut room = room();
                let mut chunks = out.chunks_mut(size).enumerate();
                chunks.try_for_each(|(i, chunk)| work(&mut room, i, chunk))
            }
        }
    }
}
