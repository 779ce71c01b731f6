//! What the allocator does with memory that was freed. Checkpoints come and go a thousand times a second; glibc would give the pages of each back to the
//! kernel and have them zeroed again for the next one, which cost a tenth of a small checkpoint's time.
#![allow(unsafe_code, reason = "mallopt has no safe wrapper")]

/// Free memory at the end of a heap that is kept, in bytes.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 64 << 20;
/// Smaller allocations never get a mapping of their own: the largest value that glibc takes.
#[cfg(target_env = "gnu")]
const OWN_MAPPING: libc::c_int = 32 << 20;

/// Freed memory stays with this process, up to a bound. Once, before the process does anything large.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    for (what, bytes) in [(libc::M_TRIM_THRESHOLD, KEPT), (libc::M_MMAP_THRESHOLD, OWN_MAPPING)] {
        // SAFETY: sets a parameter of the allocator, which takes its own lock for it; no pointer is involved.
        if unsafe { libc::mallopt(what, bytes) } == 0 {
            log::debug!("the allocator does not take parameter {what} = {bytes}: checkpoints cost a little more");
        }
    }
}
