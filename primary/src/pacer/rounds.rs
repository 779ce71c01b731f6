//! Rounds: a client that waits for an answer says its next word when it has it. So a commit that lets out the answers of ten clients is soon followed by
//! ten new outputs, and an epoch that ends at the first of them leaves nine for the next one: every client then waits for two commits instead of one. The
//! epoch after a commit therefore waits for as many outputs as that commit let out, for a small part of a commit's time, and unlearns to where they do
//! not come.

use std::time::Duration;

/// Outputs are waited for during this part of a commit's time.
const PART: u32 = 4;
/// After so many disappointments in a row, the wait is left out for 2 to their power of rounds, at most.
const MOST_DISAPPOINTMENTS: u32 = 8;

#[derive(Clone, Copy, Debug)]
struct Hope {
    outputs: u32,
    until: Duration,
    /// An output waited for it.
    waited: bool,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Rounds {
    /// Outputs that commits let out since the last look.
    released: u32,
    hope: Option<Hope>,
    disappointments: u32,
    left_out: u32,
}

impl Rounds {
    /// A commit let out so many outputs.
    pub(super) fn released(&mut self, outputs: u32) {
        self.released = self.released.saturating_add(outputs);
    }

    /// So many outputs of the running epoch wait, and `in_flight` checkpoints are on their way, whose commits take `commit`.
    pub(super) fn look(&mut self, waiting: u32, in_flight: usize, commit: Duration, now: Duration) {
        let released = std::mem::take(&mut self.released);
        if released > 0 {
            let hopes = in_flight == 0 && self.left_out == 0;
            self.left_out = self.left_out.saturating_sub(1);
            let outputs = waiting.saturating_add(released);
            self.hope = hopes.then(|| Hope { outputs, until: now + commit / PART, waited: false });
        }
        if let Some(hope) = &mut self.hope {
            hope.waited |= waiting > 0 && waiting < hope.outputs && now < hope.until;
        }
    }

    /// Until when the outputs that wait shall wait for others.
    pub(super) fn holds(&self, waiting: u32) -> Option<Duration> {
        self.hope.filter(|hope| waiting < hope.outputs).map(|hope| hope.until)
    }

    /// With how many outputs the wait is over.
    pub(super) fn hoped_for(&self, waiting: u32, now: Duration) -> Option<u32> {
        self.hope.filter(|hope| (1..hope.outputs).contains(&waiting) && now < hope.until).map(|hope| hope.outputs)
    }

    /// The epoch ended with so many outputs.
    pub(super) fn ended(&mut self, waiting: u32) {
        let Some(hope) = self.hope.take().filter(|hope| hope.waited) else { return };
        if waiting >= hope.outputs {
            self.disappointments = 0;
        } else {
            self.disappointments = (self.disappointments + 1).min(MOST_DISAPPOINTMENTS);
            self.left_out = 1 << self.disappointments;
        }
    }
}
