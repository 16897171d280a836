//! Damaged files: seeded changes to whole ones, and what opening them may take.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use viva_core::content;
use viva_core::io::{Checkpoint, TensorFile};

use crate::support::Random;

/// The system's allocator, which counts the bytes that each thread holds.
pub struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that is ending has no counters any more.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: every call goes to the system's allocator as it came; the counters
// are plain cells that allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as for this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as for this function.
        unsafe { System.dealloc(at, layout) }
    }
}

/// The most bytes that this thread held at once while `work` ran, over what it
/// held before.
fn peak(work: impl FnOnce()) -> usize {
    let before = LIVE.get();
    PEAK.set(before);
    work();
    (PEAK.get() - before) as usize
}

/// Memory that opening any file may take, however small it is.
const SLACK: usize = 64 << 10;

/// Time that opening any of these files may take.
const LONGEST: Duration = Duration::from_secs(5);

/// How many files to damage: VIVA_TENSOR_MUTATIONS, or a few thousand.
fn how_many() -> usize {
    match std::env::var("VIVA_TENSOR_MUTATIONS") {
        Ok(n) => n.parse().expect("VIVA_TENSOR_MUTATIONS is a number"),
        Err(_) => 4000,
    }
}

/// Damages the seeds one way after the other and opens what comes out: nothing
/// may panic, take long, or take more than twice the file's size. Every number
/// between is the same on every machine; the case is named when it fails.
pub fn open_damaged(name: &str, seeds: &[Vec<u8>]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    for seed in seeds {
        std::fs::write(&path, seed).unwrap();
        assert!(look_at_everything(&path), "a seed is no valid file");
    }
    let mut opened = 0;
    for case in 0..how_many() {
        let mut random = Random(case as u64);
        let file = damaged(seeds, &mut random);
        // A file system may flush what is written over an older file.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, &file).unwrap();
        let start = Instant::now();
        let mut valid = false;
        let mut held = 0;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            held = peak(|| valid = look_at_everything(&path));
        }));
        if let Err(panic) = outcome {
            eprintln!("case {case} panicked");
            resume_unwind(panic);
        }
        assert!(
            start.elapsed() < LONGEST,
            "case {case} took {:?}",
            start.elapsed()
        );
        let allowed = 2 * file.len() + SLACK;
        assert!(
            held <= allowed,
            "case {case} held {held} bytes, and {allowed} are allowed"
        );
        opened += usize::from(valid);
    }
    println!("{opened} of {} damaged files are still valid", how_many());
}

/// Opens a file and reads all that it has; whether it is valid.
fn look_at_everything(path: &Path) -> bool {
    let Ok(file) = TensorFile::open(path) else {
        return false;
    };
    for entry in file.entries() {
        assert_eq!(file.bytes(&entry.name).unwrap().len(), entry.nbytes());
    }
    for (_, value) in file.metadata().gguf().into_iter().flat_map(|m| m.iter()) {
        if let Some(array) = value.as_array() {
            assert_eq!(array.iter().count(), array.len());
        }
    }
    let checkpoint = Checkpoint::open(path).unwrap();
    let _ = content::contents(&checkpoint);
    for entry in checkpoint.entries() {
        let _ = content::read(&checkpoint, &entry.name);
    }
    for projection in ["q_proj.weight", "k_proj.weight", "q_proj.bias"] {
        let name = format!("model.layers.0.self_attn.{projection}");
        let _ = content::read(&checkpoint, &name);
    }
    true
}

/// Numbers that are lengths, counts and offsets at their edges.
const EDGES: [u64; 12] = [
    0,
    1,
    31,
    32,
    255,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 60,
    1 << 63,
    u64::MAX - 31,
    u64::MAX,
];

fn damaged(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut file = seeds[random.below(seeds.len())].clone();
    for _ in 0..1 + random.below(4) {
        let len = file.len();
        if len == 0 {
            break;
        }
        // Mostly at the start, where the header is.
        let reach = [64, 256, 4096, len][random.below(4)].min(len);
        let at = random.below(reach);
        let end = (at + 1 + random.below(64)).min(len);
        match random.below(9) {
            0 => file[at] ^= 1 << random.below(8),
            1 => file[at] = random.bits() as u8,
            2 => {
                let edge = EDGES[random.below(EDGES.len())].to_le_bytes();
                let width = [1, 2, 4, 8][random.below(4)].min(len - at);
                file[at..at + width].copy_from_slice(&edge[..width]);
            }
            3 => file.truncate(random.below(len + 1)),
            4 => drop(file.drain(at..end)),
            5 => {
                let piece = file[at..end].to_vec();
                let to = random.below(reach);
                file.splice(to..to, piece);
            }
            6 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                let piece = other[from..(from + end - at).min(other.len())].to_vec();
                file.splice(at..at, piece);
            }
            7 => {
                let other = random.below(reach);
                file.swap(at, other);
            }
            _ => {
                let step = random.below(17) as u8;
                file[at] = file[at].wrapping_add(step).wrapping_sub(8);
            }
        }
    }
    file
}
