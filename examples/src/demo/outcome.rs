//! What came of one run.

use std::time::Duration;

use tests::real::client::WriterReport;
use tests::real::pause::{ArbiterPause, longest_gap};
use tests::real::status::Points;

use super::args::{Arbiter, Kill, Machine};
use super::run::WORK_AFTER;

/// What the new owner did so that nobody waits for a retransmission.
#[derive(Clone, Copy)]
pub(super) struct Frames {
    /// What the guest had said in the last committed epoch, said once more.
    pub(super) resent: u64,
    /// What was said to it after that epoch.
    pub(super) delivered: u64,
}

/// Everything that one run found.
pub(super) struct Outcome {
    pub(super) machine: Machine,
    pub(super) kill: Kill,
    pub(super) arbiter: Arbiter,
    pub(super) seed: u64,
    /// What was seen while the arbiter was stopped, if it was.
    pub(super) pause: Option<ArbiterPause>,
    pub(super) before: Before,
    pub(super) acked_at_kill: u64,
    pub(super) moments: Moments,
    /// Duration of the activation alone, as the backup measured it, in microseconds.
    pub(super) activation_us: Option<u64>,
    pub(super) frames: Option<Frames>,
    /// Generation of the survivor.
    pub(super) generation: Option<u64>,
    /// Begin and end of the longest time without an answer, from the kill on.
    pub(super) silence_us: Option<(u64, u64)>,
    pub(super) report: WriterReport,
    /// Where logs are, when the run did not pass.
    pub(super) files: Option<String>,
}

/// What the primary said about itself just before it was killed.
pub(super) struct Before {
    pub(super) epochs: Option<u64>,
    pub(super) pause_us: Option<Points>,
    pub(super) hold_ms: Option<Points>,
}

/// When things happened, `CLOCK_MONOTONIC` in microseconds.
#[derive(Clone, Copy)]
pub(super) struct Moments {
    pub(super) protected_us: u64,
    pub(super) killed_us: u64,
    /// When the kernel had taken the process apart; its connections close some time before.
    pub(super) gone_us: Option<u64>,
    pub(super) detected_us: u64,
    pub(super) granted_us: u64,
    pub(super) activated_us: u64,
    pub(super) first_reply_us: Option<u64>,
}

/// The gap and its parts, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Parts {
    /// From the kill until the backup noticed.
    pub(super) detect: f64,
    /// Until the arbiter had granted the right to run.
    pub(super) arbitrate: f64,
    /// Until the guest ran again.
    pub(super) activate: f64,
    /// Until the client had an answer; NaN when there was none.
    pub(super) first_reply: f64,
    /// The longest time without an answer that the client saw; NaN when answers did not come back.
    pub(super) gap: f64,
}

impl Parts {
    /// The parts by name, in the order in which they happen.
    pub(super) fn named(self) -> [(&'static str, f64); 5] {
        [
            ("detect", self.detect),
            ("arbitrate", self.arbitrate),
            ("activate", self.activate),
            ("first_reply", self.first_reply),
            ("gap", self.gap),
        ]
    }
}

/// Milliseconds from one moment to a later one; negative when it was earlier.
pub(super) fn ms_between(from_us: u64, to_us: u64) -> f64 {
    // Moments of one boot, far below 2^52 us: exact.
    (to_us as f64 - from_us as f64) / 1_000.0
}

impl Outcome {
    /// Splits the gap.
    pub(super) fn parts(&self) -> Parts {
        let Moments { protected_us: _, killed_us, gone_us: _, detected_us, granted_us, activated_us, first_reply_us } =
            self.moments;
        Parts {
            detect: ms_between(killed_us, detected_us),
            arbitrate: ms_between(detected_us, granted_us),
            activate: ms_between(granted_us, activated_us),
            first_reply: first_reply_us.map_or(f64::NAN, |at| ms_between(activated_us, at)),
            gap: self.silence_us.map_or(f64::NAN, |(begin, end)| ms_between(begin, end)),
        }
    }

    /// Whether the connection lived, worked for long enough after the takeover, and was read back over.
    pub(super) fn connection_survived(&self) -> bool {
        let worked_us = match (self.moments.first_reply_us, self.report.acks.last()) {
            (Some(first), Some(last)) => last.at_us.saturating_sub(first),
            _ => 0,
        };
        // The wait ends when the last answer is that late, give or take the poll that looked at it.
        let enough = WORK_AFTER.as_micros().saturating_sub(100_000);
        self.report.connection_survived() && u128::from(worked_us) >= enough
    }

    /// The longest time without an answer before the arbiter was stopped, to compare with.
    pub(super) fn gap_before(&self, pause: &ArbiterPause) -> Duration {
        longest_gap(&self.report.acks, 0, pause.from_us)
    }

    /// Whether nobody but the status noticed the arbiter's pause. Somebody who waited for it would have waited for most of it.
    fn pause_passed(&self) -> bool {
        self.pause
            .as_ref()
            .is_none_or(|pause| pause.as_promised() && pause.longest_gap(&self.report.acks) < pause.length() / 2)
    }

    /// Whether nothing was lost and nothing is wrong.
    pub(super) fn passed(&self) -> bool {
        let acked = self.report.acks.len();
        self.pause_passed()
            && self.connection_survived()
            && acked > 0
            && self.report.same.complete(acked)
            && self.report.fresh.complete(acked)
    }
}
