//! What came of the decisions: for the next ones, and for the status.

use std::collections::VecDeque;
use std::time::Duration;

use failover::status::PacingStatus;

/// Epochs with outputs that a judgement looks back on.
const REMEMBERED: usize = 256;
/// Fewer say nothing about a 99th percentile.
const JUDGED_LEAST: usize = 32;
/// Rates are those of the last whole span of this length.
const SPAN: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub(super) struct Measured {
    /// Pause to commit: follows a rise within a few epochs and a fall within some tens, so that it is rather too long than too short.
    commit: Option<Duration>,
    /// What the first outputs of the last epochs waited in all.
    added: VecDeque<Duration>,
    span_began: Duration,
    epochs: u32,
    lost: Duration,
    /// Epochs a second, and the part of the guest's time lost, in the span before.
    rates: (f64, f64),
}

impl Measured {
    pub(super) fn new(now: Duration) -> Self {
        let (added, lost) = (VecDeque::with_capacity(REMEMBERED), Duration::ZERO);
        Self { commit: None, added, span_began: now, epochs: 0, lost, rates: (0.0, 0.0) }
    }

    /// How long a commit takes lately.
    pub(super) fn commit(&self) -> Duration {
        self.commit.unwrap_or_default()
    }

    pub(super) fn epochs_per_second(&self) -> f64 {
        self.rates.0
    }

    pub(super) fn time_passes(&mut self, now: Duration) {
        let span = now.saturating_sub(self.span_began);
        if span >= SPAN {
            let seconds = span.as_secs_f64();
            self.rates = (f64::from(self.epochs) / seconds, self.lost.as_secs_f64() / seconds);
            (self.span_began, self.epochs, self.lost) = (now, 0, Duration::ZERO);
        }
    }

    pub(super) fn ended(&mut self, lost: Duration, now: Duration) {
        self.epochs += 1;
        self.lost += lost;
        self.time_passes(now);
    }

    pub(super) fn committed(&mut self, took: Duration, added: Option<Duration>) {
        let before = self.commit.unwrap_or(took);
        self.commit = Some(if took > before { before + (took - before) / 4 } else { before - (before - took) / 16 });
        if let Some(added) = added {
            if self.added.len() == REMEMBERED {
                self.added.pop_front();
            }
            self.added.push_back(added);
        }
    }

    /// Nearest rank; zero for none.
    fn added_at(&self, per_cent: usize) -> Duration {
        let mut sorted: Vec<_> = self.added.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get((sorted.len() * per_cent).div_ceil(100).saturating_sub(1)).copied().unwrap_or_default()
    }

    pub(super) fn fill(&self, status: PacingStatus) -> PacingStatus {
        PacingStatus {
            epochs_per_second: self.rates.0,
            guest_lost_ratio: self.rates.1,
            commit_seconds: self.commit().as_secs_f64(),
            reply_added_p50_seconds: self.added_at(50).as_secs_f64(),
            reply_added_p99_seconds: self.added_at(99).as_secs_f64(),
            ..status
        }
    }

    /// Whether a latency is met, and why not.
    pub(super) fn judge_latency(&self, target: Duration) -> (Option<bool>, String) {
        if self.added.len() < JUDGED_LEAST {
            return (None, "epochs end when output waits".into());
        }
        let ms = |span: Duration| span.as_secs_f64() * 1e3;
        let met = self.added_at(99) <= target;
        let text = if met {
            "epochs end when output waits".into()
        } else if self.commit() >= target {
            let commit = ms(self.commit());
            format!("a commit alone takes {commit:.1} ms: no length of epochs can meet it; see pause, transfer and ack")
        } else {
            "commits vary too much for the rarest replies; see pause, transfer and ack".into()
        };
        (Some(met), text)
    }

    /// Whether an overhead is met, and why not.
    pub(super) fn judge_overhead(&self, target: f64, most_held: Duration) -> (Option<bool>, String) {
        // Rates are of a finite span, in which an epoch more or less counts.
        let met = self.rates.1 <= target * 1.1;
        let text = if met {
            "epochs end when output waits, as often as the overhead allows".into()
        } else {
            format!(
                "pauses are too long even for epochs of {} ms, and output is not held longer",
                most_held.as_millis()
            )
        };
        (Some(met), text)
    }
}
