//! Is the peer gone? Collects the evidence of one process's life; `now` is an argument.
//!
//! Evidence only ever starts a contest for the arbiter's record; it never decides one. A wrong suspicion costs availability, not safety.

use std::time::Duration;

use replication_proto::Incarnation;

use crate::decide::explore::Shift;

/// Why the peer is believed to be gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Evidence {
    /// Nothing heard for the whole timer.
    Silent,
    /// Its kernel closed the connection, and the grace is over.
    Closed,
    /// Another process runs on its host under its name.
    Replaced,
    /// It said goodbye.
    Left,
}

/// Watches one incarnation of the peer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Detector {
    watched: Option<Incarnation>,
    /// The one watched before: frames of it that arrive late mean nothing.
    former: Option<Incarnation>,
    last_heard: Duration,
    closed_at: Option<Duration>,
    /// The closed connection was the stream itself: frames on another one do not bring it back.
    stream_lost: bool,
    certain: Option<Evidence>,
}

impl Detector {
    /// Starts to watch `incarnation`, heard at `now`. Evidence about another one is dropped.
    pub fn watch(&mut self, incarnation: Incarnation, now: Duration) {
        if self.watched != Some(incarnation) {
            self.former = self.watched;
        }
        self.watched = Some(incarnation);
        self.last_heard = now;
        self.closed_at = None;
        self.stream_lost = false;
        self.certain = None;
    }

    /// Stops watching.
    pub fn forget(&mut self) {
        if self.watched.is_some() {
            self.former = self.watched;
        }
        self.watched = None;
        self.closed_at = None;
        self.stream_lost = false;
        self.certain = None;
    }

    /// Who is watched.
    pub fn watched(&self) -> Option<Incarnation> {
        self.watched
    }

    /// A verified frame of the peer's host arrived. Says whether it came from the watched process.
    pub fn heard(&mut self, incarnation: Incarnation, now: Duration) -> bool {
        if self.watched == Some(incarnation) {
            self.last_heard = now;
            if !self.stream_lost {
                // A closed connection was followed by a frame on another one: it lives.
                self.closed_at = None;
            }
            return true;
        }
        if self.watched.is_some() && self.former != Some(incarnation) {
            self.certain = Some(Evidence::Replaced);
        }
        false
    }

    /// The peer's kernel closed a connection.
    pub fn closed(&mut self, now: Duration) {
        if self.watched.is_some() && self.closed_at.is_none() {
            self.closed_at = Some(now);
        }
    }

    /// The stream to or from the peer is gone for good: evidence after the grace, whatever else is heard.
    pub fn stream_lost(&mut self, now: Duration) {
        self.closed(now);
        self.stream_lost = self.watched.is_some();
    }

    /// The watched process said that it leaves.
    pub fn left(&mut self, incarnation: Incarnation) {
        if self.watched == Some(incarnation) {
            self.certain = Some(Evidence::Left);
        }
    }

    /// When the watched process was last heard.
    pub fn last_heard(&self) -> Option<Duration> {
        self.watched.map(|_| self.last_heard)
    }

    /// What speaks for its death at `now`, given how long silence and a closed connection may last.
    pub fn evidence(&self, now: Duration, silence: Duration, grace: Duration) -> Option<Evidence> {
        self.watched?;
        if self.certain.is_some() {
            return self.certain;
        }
        if self.closed_at.is_some_and(|closed| now >= closed.saturating_add(grace)) {
            return Some(Evidence::Closed);
        }
        (now >= self.last_heard.saturating_add(silence)).then_some(Evidence::Silent)
    }

    /// See [`crate::decide::Core::canonicalise`].
    pub(crate) fn canonicalise(&mut self, shift: Shift, silence: Duration, grace: Duration) {
        // Without anybody to watch, and once the end is certain, it does not matter any more when something was heard.
        let reach = if self.watched.is_some() && self.certain.is_none() { silence } else { Duration::ZERO };
        self.last_heard = shift.past(self.last_heard, reach);
        self.closed_at = self.closed_at.map(|at| shift.past(at, grace));
    }

    /// When evidence may appear if nothing is heard.
    pub fn deadline(&self, silence: Duration, grace: Duration) -> Option<Duration> {
        self.watched?;
        let silent = self.last_heard.saturating_add(silence);
        Some(self.closed_at.map_or(silent, |closed| silent.min(closed.saturating_add(grace))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE: Duration = Duration::from_millis(150);
    const GRACE: Duration = Duration::from_millis(20);

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn silence_counts_from_the_last_frame_and_one_lost_heartbeat_is_none() {
        let mut detector = Detector::default();
        assert_eq!(detector.evidence(ms(10_000), SILENCE, GRACE), None, "nobody is watched");
        detector.watch(Incarnation(1), ms(0));
        assert!(detector.heard(Incarnation(1), ms(100)));
        assert_eq!(detector.evidence(ms(249), SILENCE, GRACE), None);
        assert_eq!(detector.evidence(ms(250), SILENCE, GRACE), Some(Evidence::Silent));
        assert_eq!(detector.deadline(SILENCE, GRACE), Some(ms(250)));
    }

    #[test]
    fn a_closed_connection_counts_after_the_grace_unless_the_peer_is_heard_again() {
        let mut detector = Detector::default();
        detector.watch(Incarnation(1), ms(0));
        detector.closed(ms(5));
        assert_eq!(detector.deadline(SILENCE, GRACE), Some(ms(25)));
        assert_eq!(detector.evidence(ms(24), SILENCE, GRACE), None);
        assert_eq!(detector.evidence(ms(25), SILENCE, GRACE), Some(Evidence::Closed));
        detector.heard(Incarnation(1), ms(26));
        assert_eq!(detector.evidence(ms(27), SILENCE, GRACE), None);
    }

    #[test]
    fn another_incarnation_proves_the_death_of_the_watched_one_but_late_frames_of_a_former_one_do_not() {
        let mut detector = Detector::default();
        detector.watch(Incarnation(1), ms(0));
        assert!(!detector.heard(Incarnation(2), ms(1)));
        assert_eq!(detector.evidence(ms(1), SILENCE, GRACE), Some(Evidence::Replaced));
        detector.watch(Incarnation(2), ms(2));
        assert!(!detector.heard(Incarnation(1), ms(3)));
        assert_eq!(detector.evidence(ms(3), SILENCE, GRACE), None);
    }
}
