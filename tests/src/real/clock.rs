//! The clock that all processes of one host share.

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC` in microseconds: the same figure that the daemons write into their event logs.
#[must_use]
pub fn mono_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).expect("the monotonic clock starts at zero");
    let nanos = u64::try_from(now.tv_nsec).expect("a normalised timespec");
    seconds * 1_000_000 + nanos / 1_000
}
