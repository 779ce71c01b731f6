//! Time since the process started, as the pure cores want it.

use std::time::{Duration, Instant};

/// Tells the time since the process started. The cores take this as `now`; only shells own a clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    /// A clock that reads zero now.
    pub fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Time since the start.
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// The instant at which this clock reads `at`.
    pub fn instant(&self, at: Duration) -> Instant {
        self.start + at
    }
}
