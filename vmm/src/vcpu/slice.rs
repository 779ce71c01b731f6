//! A vCPU's turn on a processor that it shares. The scheduler gives each thread slices of some milliseconds, and who is woken waits for the end of another's
//! unless its own slices are shorter: a guest that runs on after a pause of 0.1 ms, or has an interrupt to handle, must not wait for that.
#![expect(unsafe_code, reason = "sched_setattr has no safe wrapper")]

use std::time::Duration;

/// The shortest that Linux takes (EEVDF, 6.12 and later; kernels before ignore it).
const SLICE: Duration = Duration::from_micros(100);

/// The calling thread takes short turns from now on, as many as its weight allows. It needs no privilege; where the kernel refuses, nothing changes.
pub(crate) fn take_short_turns() {
    let size = size_of::<libc::sched_attr>();
    let mut attr = libc::sched_attr {
        size: 0,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel writes at most `size` bytes into `attr`, which has them; 0 is the calling thread, and there are no flags.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) };
    if got != 0 || attr.sched_policy != libc::SCHED_OTHER.unsigned_abs() {
        // Who gave this process another policy knows better.
        return;
    }
    attr.sched_runtime = u64::try_from(SLICE.as_nanos()).unwrap_or(u64::MAX);
    // SAFETY: the kernel reads `attr.size` bytes of `attr`, as the call before left it; 0 is the calling thread, and there are no flags.
    if unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) } != 0 {
        log::debug!("vCPUs keep ordinary slices: {}", std::io::Error::last_os_error());
    }
}
