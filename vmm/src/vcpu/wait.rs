//! How a vCPU's thread and whoever stops it wait for each other. On processors of their own they look again and again, giving the processor up in between
//! in case the other one was put on the same: waking one that sleeps takes longer than a small checkpoint. Where a third party computes on these
//! processors, giving one up costs a tick of the scheduler, four milliseconds, whatever that party's weight; then they sleep instead, because who is
//! woken goes first.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A processor that was given up and did not come back within this time is shared with somebody.
const SHARED: Duration = Duration::from_millis(1);
/// For how long that is believed at first: everybody's processor is away for a moment now and then. Twice as long each time that it turns out to be true
/// still, at most [`BELIEVED_MOST`].
const BELIEVED: Duration = Duration::from_millis(50);
/// Who is shared still finds out so soon when it is tried again.
const STILL: Duration = Duration::from_millis(20);
const BELIEVED_MOST: Duration = Duration::from_secs(4);
/// For how long a thread looks even then, without giving the processor up, at first and after it had something to do: as long as a small checkpoint takes
/// from one such moment to the next.
const GLANCE: Duration = Duration::from_micros(60);
/// A look that takes so long was work.
const WORK: Duration = Duration::from_micros(5);

/// What the threads of one machine know of their processors.
#[derive(Debug)]
pub(super) struct Waits {
    epoch: Instant,
    /// Until when processors count as shared, in nanoseconds since `epoch`.
    shared_until: AtomicU64,
    /// For how long that was believed last, in nanoseconds.
    believed: AtomicU64,
}

impl Default for Waits {
    fn default() -> Self {
        Self { epoch: Instant::now(), shared_until: AtomicU64::new(0), believed: AtomicU64::new(0) }
    }
}

impl Waits {
    /// Looks at `done` for a while, `spin` at most, then sleeps until somebody unparks this thread; false when `deadline` passes first.
    pub(super) fn wait_until(&self, spin: Duration, deadline: Option<Instant>, done: impl Fn() -> bool) -> bool {
        self.looks(spin, &done) || sleeps(deadline, &done)
    }

    fn looks(&self, spin: Duration, done: &impl Fn() -> bool) -> bool {
        let began = Instant::now();
        let (mut now, mut glances_since) = (began, began);
        while now - began < spin {
            if done() {
                return true;
            }
            let looked = Instant::now();
            if looked - now >= WORK {
                // There was something to do, so things are moving.
                glances_since = looked;
            }
            now = looked;
            if self.are_shared(now) {
                if now - glances_since >= GLANCE {
                    return false;
                }
                std::hint::spin_loop();
                continue;
            }
            std::thread::yield_now();
            let back = Instant::now();
            if back - now >= SHARED {
                self.note_shared(back);
            }
            (now, glances_since) = (back, back);
        }
        false
    }

    fn are_shared(&self, now: Instant) -> bool {
        self.nanos(now) < self.shared_until.load(Ordering::Relaxed)
    }

    fn note_shared(&self, now: Instant) {
        let (now, until) = (self.nanos(now), self.shared_until.load(Ordering::Relaxed));
        if now < until {
            return;
        }
        // Threads that find out at the same moment may each double it, which does no harm.
        let before = Duration::from_nanos(self.believed.load(Ordering::Relaxed));
        let still = before > Duration::ZERO && Duration::from_nanos(now - until) < STILL;
        let believed = if still { (before * 2).min(BELIEVED_MOST) } else { BELIEVED };
        let nanos = u64::try_from(believed.as_nanos()).unwrap_or(u64::MAX);
        self.believed.store(nanos, Ordering::Relaxed);
        self.shared_until.fetch_max(now.saturating_add(nanos), Ordering::Relaxed);
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Waits for what another thread that runs does next. It is on a processor of its own or soon will be.
pub(super) fn wait_a_moment(done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        if began.elapsed() < GLANCE { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
}

fn sleeps(deadline: Option<Instant>, done: &impl Fn() -> bool) -> bool {
    while !done() {
        match deadline {
            None => std::thread::park(),
            Some(at) => match at.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => std::thread::park_timeout(left),
                _ => return done(),
            },
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn a_processor_that_does_not_come_back_is_shared_for_a_while() {
        let waits = Waits::default();
        let now = Instant::now();
        assert!(!waits.are_shared(now));
        let (mut at, mut believed) = (now, BELIEVED);
        for _ in 0..10 {
            waits.note_shared(at);
            assert!(waits.are_shared(at + believed / 2) && !waits.are_shared(at + believed));
            // It is still true when it is tried again.
            (at, believed) = (at + believed + STILL / 2, (believed * 2).min(BELIEVED_MOST));
        }
        let later = at + 2 * BELIEVED_MOST;
        waits.note_shared(later);
        assert!(waits.are_shared(later + BELIEVED / 2) && !waits.are_shared(later + BELIEVED), "once in a while");
    }

    #[test]
    fn who_sleeps_is_woken_and_a_deadline_ends_every_wait() {
        for shared in [false, true] {
            let waits = Waits::default();
            if shared {
                waits.note_shared(Instant::now());
            }
            let (done, looked) = (Arc::new(AtomicBool::new(false)), Cell::new(0));
            let (waker, waiter) = (Arc::clone(&done), std::thread::current());
            let thread = std::thread::spawn(move || {
                std::thread::park_timeout(Duration::from_millis(20));
                waker.store(true, Ordering::SeqCst);
                waiter.unpark();
            });
            let looks = || {
                looked.set(looked.get() + 1);
                done.load(Ordering::SeqCst)
            };
            assert!(waits.wait_until(Duration::from_millis(1), None, looks));
            thread.join().unwrap();
            let deadline = Instant::now() + Duration::from_millis(5);
            assert!(!waits.wait_until(Duration::from_millis(1), Some(deadline), || false));
            assert!(Instant::now() >= deadline && looked.get() > 1);
        }
    }
}
