//! The one thread pool.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, RwLock};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::Cancel;
use crate::error::{Error, Result};

static POOL: LazyLock<RwLock<Option<Arc<ThreadPool>>>> = LazyLock::new(|| RwLock::new(None));
/// Calls that the pool's threads are for at this moment.
static CALLS: AtomicUsize = AtomicUsize::new(0);

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

/// One of the calls that are counted.
struct Call;

impl Call {
    fn begin() -> Call {
        CALLS.fetch_add(1, Ordering::Relaxed);
        Call
    }

    /// None where there are others.
    fn begin_alone() -> Option<Call> {
        let first = CALLS.compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed);
        first.is_ok().then_some(Call)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        CALLS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Runs `f` inside the pool; rayon's iterators in it use the pool's threads.
pub fn run<R: Send>(f: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    let _call = Call::begin();
    pool()?.install(f)
}

/// Who works on the chunks of an operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Threads {
    /// Those of the pool.
    Pool,
    /// Where the pool is idle the calling one, which begins at once, and all of the
    /// pool's but one, as they wake up: what takes a millisecond would wait for a good
    /// part of it until they did. Else those of the pool, lest calls be more than cores.
    CallerToo,
    /// The calling one alone: it is done before others would have begun.
    Caller,
}

impl Threads {
    /// Runs `f` where these are, or the first of them.
    pub fn run<R: Send>(self, f: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        match self {
            Threads::Pool => run(f),
            Threads::CallerToo => match Call::begin_alone() {
                Some(_call) => f(),
                None => run(f),
            },
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
            Threads::Caller => {
                let mut room = room();
                let mut chunks = out.chunks_mut(size).enumerate();
                chunks.try_for_each(|(i, chunk)| work(&mut room, i, chunk))
            }
            Threads::CallerToo if rayon::current_thread_index().is_none() => {
                share(out, size, cancel, room, work)
            }
            _ => {
                out.par_chunks_mut(size)
                    .enumerate()
                    .try_for_each_init(room, |room, (i, chunk)| {
                        cancel.check()?;
                        work(room, i, chunk)
                    })
            }
        }
    }
}

/// The calling thread takes chunk after chunk, and so do those of the pool but one.
fn share<T: Send, S>(
    out: &mut [T],
    size: usize,
    cancel: &Cancel,
    room: impl Fn() -> S + Sync + Send,
    work: impl Fn(&mut S, usize, &mut [T]) -> Result<()> + Sync + Send,
) -> Result<()> {
    let pool = pool()?;
    let chunks = out.chunks_mut(size);
    let others = pool
        .current_num_threads()
        .min(chunks.len())
        .saturating_sub(1);
    let chunks = Mutex::new(chunks.enumerate());
    let failed = Mutex::new(None);
    // What panicked with a lock in its hands stops all of them.
    let next = || chunks.lock().ok()?.next();
    let take = || {
        let mut room = room();
        while let Some((i, chunk)) = next() {
            if let Err(error) = cancel.check().and_then(|()| work(&mut room, i, chunk)) {
                *failed.lock().unwrap_or_else(|e| e.into_inner()) = Some(error);
                // Nobody takes another.
                if let Ok(mut chunks) = chunks.lock() {
                    chunks.by_ref().for_each(drop);
                }
            }
        }
    };
    pool.in_place_scope(|scope| {
        for _ in 0..others {
            scope.spawn(|_| take());
        }
        take();
    });
    match failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers each chunk, and says who was asked for a room.
    fn number(out: &mut [u8], size: usize, cancel: &Cancel, most: usize) -> Result<()> {
        let work = |_: &mut (), i: usize, chunk: &mut [u8]| {
            chunk.fill(1 + i as u8);
            match i <= most {
                true => Ok(()),
                false => Err(Error::option("chunk", i.to_string())),
            }
        };
        let threads = Threads::CallerToo;
        threads.run(|| threads.chunks(out, size, cancel, || (), work))
    }

    #[test]
    fn each_chunk_is_done_once_whoever_does_it() {
        let cancel = Cancel::new();
        for len in [0, 1, 7, 100] {
            let expected: Vec<u8> = (0..len).map(|i| 1 + (i / 3) as u8).collect();
            let mut out = vec![0; len];
            number(&mut out, 3, &cancel, usize::MAX).unwrap();
            assert_eq!(out, expected);
            // The pool is not idle here.
            let mut out = vec![0; len];
            run(|| number(&mut out, 3, &cancel, usize::MAX)).unwrap();
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn an_error_ends_the_work() {
        let mut out = [0u8; 255];
        let error = number(&mut out, 1, &Cancel::new(), 9).unwrap_err();
        assert!(error.to_string().contains("chunk"), "{error}");
        // Which chunks were done before is up to the threads.
        assert!(out.contains(&0));
        let cancel = Cancel::new();
        cancel.cancel();
        out.fill(0);
        assert!(matches!(
            number(&mut out, 1, &cancel, 9),
            Err(Error::Cancelled)
        ));
        assert_eq!(out, [0; 255]);
    }
}
