//! Keeping vCPUs from running for a part of their time. While a guest is slowed, a thread gets each vCPU out of the guest when its slice of running is over; it
//! then rests on its own thread. A stop ends a rest at once, and finds the exits of a resting vCPU completed: it costs the pause less than a running one. What
//! was left of the rest follows the pause, so that short epochs do not undo it.
//!
//! Without a throttle there is no thread, and a vCPU looks at one atomic before it enters the guest.

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::throttle::Throttle;

/// Nobody is to be got out of the guest.
const NEVER: u64 = u64::MAX;
/// A slice that ends this much too early has ended: another kick would cost more.
const NEARLY: Duration = Duration::from_micros(50);

/// What the vCPUs of a machine and whoever slows them share.
pub(super) struct Slowing {
    percent: AtomicU8,
    began: Instant,
    /// When each vCPU is to be got out of the guest, in microseconds since `began`.
    due: Vec<AtomicU64>,
    /// Who does it.
    thread: Mutex<Option<Thread>>,
}

impl Slowing {
    pub(super) fn new(vcpus: usize) -> Self {
        let due = (0..vcpus).map(|_| AtomicU64::new(NEVER)).collect();
        Self { percent: AtomicU8::new(0), began: Instant::now(), due, thread: Mutex::default() }
    }

    pub(super) fn is_on(&self) -> bool {
        self.percent.load(Ordering::SeqCst) != 0
    }

    fn throttle(&self) -> Throttle {
        Throttle::percent(self.percent.load(Ordering::SeqCst))
    }

    fn micros(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.began).as_micros()).unwrap_or(NEVER - 1)
    }

    fn waker(&self) -> std::sync::MutexGuard<'_, Option<Thread>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A vCPU enters the guest and is to be got out of it at `at`.
    fn get_out_at(&self, vcpu: u8, at: Instant) {
        if let Some(due) = self.due.get(usize::from(vcpu)) {
            due.store(self.micros(at), Ordering::SeqCst);
            // Nobody yet: the thread looks at all of these after it has made itself known.
            if let Some(thread) = &*self.waker() {
                thread.unpark();
            }
        }
    }

    /// Gets vCPUs out of the guest, each when its slice is over, until the throttle is lifted.
    fn slow_down(&self, kick: &impl Fn(usize)) {
        *self.waker() = Some(std::thread::current());
        (0..self.due.len()).for_each(kick);
        while self.is_on() {
            let now = self.micros(Instant::now());
            let mut next = NEVER;
            for (vcpu, due) in self.due.iter().enumerate() {
                let at = due.load(Ordering::SeqCst);
                if at > now {
                    next = next.min(at);
                } else if due.compare_exchange(at, NEVER, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                    kick(vcpu);
                }
            }
            match next {
                NEVER => std::thread::park(),
                at => std::thread::park_timeout(Duration::from_micros(at - now)),
            }
        }
        *self.waker() = None;
    }
}

/// Where a vCPU is between running and resting.
#[derive(Debug, Default)]
pub(super) struct Rhythm {
    /// When its slice of running began.
    runs_since: Option<Instant>,
    /// Until when it rests.
    rests_until: Option<Instant>,
}

impl Rhythm {
    /// Called while there is a throttle, whenever the vCPU is about to enter the guest: rests if its slice is over, for as long as it `may_rest`. Whoever makes
    /// that false unparks the thread then.
    pub(super) fn keep(&mut self, vcpu: u8, slowing: &Slowing, may_rest: impl Fn() -> bool) {
        let throttle = slowing.throttle();
        let (run, now) = (throttle.run(), Instant::now());
        match self.runs_since {
            Some(since) if now - since + NEARLY < run => return slowing.get_out_at(vcpu, since + run),
            Some(since) => {
                (self.runs_since, self.rests_until) = (None, Some(now + throttle.rest_after(now - since)));
            }
            None => {}
        }
        let mut now = now;
        while let Some(left) = self.rests_until.and_then(|until| until.checked_duration_since(now)) {
            if left.is_zero() || !slowing.is_on() {
                break;
            }
            if !may_rest() {
                return;
            }
            std::thread::park_timeout(left);
            now = Instant::now();
        }
        (self.runs_since, self.rests_until) = (Some(now), None);
        slowing.get_out_at(vcpu, now + run);
    }
}

/// Switches a machine's throttle, and has the thread that carries it out.
pub(super) struct Slower {
    slowing: Arc<Slowing>,
    thread: Option<JoinHandle<()>>,
}

impl Slower {
    pub(super) fn new(slowing: Arc<Slowing>) -> Self {
        Self { slowing, thread: None }
    }

    /// Slows the guest from now on. `kick` gets one vCPU out of the guest, if it runs. When the throttle is lifted, no call of `kick` is under way any more; the
    /// caller unparks those who rest.
    pub(super) fn set(&mut self, throttle: Throttle, kick: impl Fn(usize) + Send + 'static) -> io::Result<()> {
        self.slowing.percent.store(throttle.as_percent(), Ordering::SeqCst);
        match (&self.thread, throttle.is_none()) {
            (Some(_), true) => self.end(),
            (None, false) => {
                let slowing = Arc::clone(&self.slowing);
                let thread = std::thread::Builder::new().name("ft-throttle".into());
                match thread.spawn(move || slowing.slow_down(&kick)) {
                    Ok(thread) => self.thread = Some(thread),
                    Err(error) => {
                        self.slowing.percent.store(0, Ordering::SeqCst);
                        return Err(error);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn end(&mut self) {
        self.slowing.percent.store(0, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                log::error!("the throttle's thread panicked");
            }
        }
    }
}

impl Drop for Slower {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    #[test]
    fn a_rest_takes_its_time_and_ends_at_once_when_it_may_not_go_on() {
        let slowing = Slowing::new(1);
        slowing.percent.store(99, Ordering::SeqCst);
        let run = Throttle::MOST.run();
        let rest = Throttle::MOST.rest_after(run);
        let mut rhythm = Rhythm { runs_since: Some(Instant::now()), ..Rhythm::default() };
        while rhythm.runs_since.is_some_and(|since| since.elapsed() < run) {
            std::hint::spin_loop();
        }
        let began = Instant::now();
        rhythm.keep(0, &slowing, || true);
        assert!(began.elapsed() >= rest - NEARLY, "{:?}", began.elapsed());
        assert!(rhythm.runs_since.is_some() && slowing.due[0].load(Ordering::SeqCst) != NEVER);

        // A stop comes while it rests: the rest is left, and goes on afterwards.
        let stop = Arc::new(AtomicBool::new(false));
        let resting = Rhythm { runs_since: None, rests_until: Some(Instant::now() + Duration::from_secs(60)) };
        let (slowing, seen) = (Arc::new(slowing), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut rhythm = resting;
            rhythm.keep(0, &slowing, || !seen.load(Ordering::SeqCst));
            rhythm
        });
        stop.store(true, Ordering::SeqCst);
        thread.thread().unpark();
        assert!(thread.join().expect("it ends").rests_until.is_some());
    }

    #[test]
    fn vcpus_are_got_out_when_their_slices_end_and_left_alone_when_the_throttle_is_lifted() {
        let slowing = Arc::new(Slowing::new(2));
        let kicks = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let mut slower = Slower::new(Arc::clone(&slowing));
        let kicked = Arc::clone(&kicks);
        let kick = move |vcpu: usize| {
            kicked[vcpu].fetch_add(1, Ordering::SeqCst);
        };
        slower.set(Throttle::percent(50), kick).expect("a thread");
        let wait = |vcpu: usize, count: usize| {
            while kicks[vcpu].load(Ordering::SeqCst) < count {
                std::thread::yield_now();
            }
        };
        // Whoever ran before is got out once, to find its rhythm.
        (wait(0, 1), wait(1, 1));
        slowing.get_out_at(1, Instant::now() + Duration::from_millis(1));
        wait(1, 2);
        assert_eq!(kicks[0].load(Ordering::SeqCst), 1);
        slowing.get_out_at(0, Instant::now() + Duration::from_secs(60));
        slower.set(Throttle::NONE, |_| {}).expect("no thread is needed");
        assert!(!slowing.is_on() && slower.thread.is_none());
        assert_eq!(kicks[0].load(Ordering::SeqCst), 1);
    }
}
