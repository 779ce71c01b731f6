//! How long it has been quiet. Time is a [`Duration`] since the process started, and never runs backwards.

use core::time::Duration;

/// Watches for silence longer than a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Liveness {
    limit: Duration,
    heard: Duration,
}

impl Liveness {
    /// A watch that counts silence from `now`.
    pub const fn new(limit: Duration, now: Duration) -> Self {
        Self { limit, heard: now }
    }

    /// Something was heard. An earlier `now` than before changes nothing.
    pub fn heard(&mut self, now: Duration) {
        self.heard = self.heard.max(now);
    }

    /// How long it has been quiet.
    pub fn quiet_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.heard)
    }

    /// Whether it has been quiet for the limit or longer.
    pub fn is_silent(&self, now: Duration) -> bool {
        self.quiet_for(now) >= self.limit
    }

    /// When the limit is reached if nothing more is heard.
    pub fn deadline(&self) -> Duration {
        self.heard.saturating_add(self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Corpus row 22: time that runs backwards, and the end of time.
    #[test]
    fn silence_is_counted_from_the_latest_sound() {
        let ms = Duration::from_millis;
        let mut liveness = Liveness::new(ms(300), ms(1000));
        assert!(!liveness.is_silent(ms(1299)) && liveness.is_silent(ms(1300)));
        liveness.heard(ms(1200));
        liveness.heard(ms(1100));
        assert_eq!(liveness.deadline(), ms(1500));
        assert_eq!(liveness.quiet_for(ms(1100)), Duration::ZERO);
        liveness.heard(Duration::MAX);
        assert_eq!(liveness.deadline(), Duration::MAX);
        assert!(!liveness.is_silent(Duration::MAX));
    }
}
