//! Time since the process started, as the pure cores want it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Tells the time since the process started. The cores take this as `now`; only shells own a clock.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    Real(Instant),
    /// Nanoseconds, set by somebody else.
    Simulated(Arc<AtomicU64>),
}

impl Clock {
    /// A clock that reads zero now.
    pub fn start() -> Self {
        Self(Source::Real(Instant::now()))
    }

    /// A clock that reads what `nanoseconds` says: for simulations.
    pub fn simulated(nanoseconds: Arc<AtomicU64>) -> Self {
        Self(Source::Simulated(nanoseconds))
    }

    /// Time since the start.
    pub fn now(&self) -> Duration {
        match &self.0 {
            Source::Real(start) => start.elapsed(),
            Source::Simulated(nanoseconds) => Duration::from_nanos(nanoseconds.load(Ordering::Relaxed)),
        }
    }

    /// The instant at which this clock reads `at`.
    ///
    /// # Panics
    /// On a simulated clock: nothing in a simulation waits for an instant.
    pub fn instant(&self, at: Duration) -> Instant {
        match &self.0 {
            Source::Real(start) => *start + at,
            Source::Simulated(_) => panic!("nothing waits by a simulated clock"),
        }
    }
}
