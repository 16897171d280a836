//! What memory is told beforehand.
#![allow(unsafe_code)]

/// Asks for so many bytes from there on, to be read soon; they may lie anywhere. Memory's
/// own prefetchers stop at the end of each page, and where reading pauses.
#[inline(always)]
pub fn prefetch<T>(at: *const T, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        let line = at.cast::<i8>().wrapping_add(line);
        // SAFETY: part of the baseline, and it reads nothing.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(line);
        }
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        unsafe {
            core::arch::asm!("prfm pldl1keep, [{line}]", line = in(reg) line, options(readonly, nostack, preserves_flags));
        }
        let _ = line;
    }
}

/// Whether one stream is read sooner when its lines are asked for early: on Intel's
/// servers by a third, on AMD's it takes longer.
pub fn asks_for_lines() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::sync::OnceLock;
        static INTEL: OnceLock<bool> = OnceLock::new();
        *INTEL.get_or_init(|| {
            // SAFETY: part of the baseline.
            #[allow(unused_unsafe)]
            let vendor = unsafe { core::arch::x86_64::__cpuid(0) };
            vendor.ebx.to_le_bytes() == *b"Genu"
        })
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Waits until what was streamed past the caches is there for all to see.
#[inline(always)]
pub fn streamed() {
    // SAFETY: part of the baseline, and it touches no memory itself.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        core::arch::x86_64::_mm_sfence();
    }
}

/// Asks for pages of 2 MiB where those bytes have room for them: filling them in costs a
/// fault for each, and reading and writing fewer look-ups of addresses. A system that has
/// none refuses, and no harm done.
pub fn use_huge_pages(bytes: &mut [u8]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 2 << 20;
        let head = bytes.as_ptr().align_offset(PAGE).min(bytes.len());
        let pages = (bytes.len() - head) / PAGE * PAGE;
        if pages > 0 {
            let start = bytes[head..].as_mut_ptr();
            // SAFETY: advice about memory that is borrowed for writing; its contents stay.
            unsafe { libc::madvise(start.cast(), pages, libc::MADV_HUGEPAGE) };
        }
    }
    let _ = bytes;
}
