//! What the gate and the link tell whoever ends epochs: an output waits, a commit arrived. Nobody waits for the bell: telling it is one atomic
//! store and a push into a channel of one, and the pause has nothing to do with it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};

/// No output waits.
const NONE: u64 = u64::MAX;

/// See the module.
#[derive(Debug)]
pub struct Bell {
    ring: Sender<()>,
    heard: Receiver<()>,
    /// When the first output of the running epoch was said, in nanoseconds of the process's clock.
    waits_since: AtomicU64,
    /// How many wait.
    outputs: AtomicU32,
    /// It rings for the first, and for this one.
    rings_at: AtomicU32,
    committed: AtomicU64,
}

impl Default for Bell {
    fn default() -> Self {
        let (ring, heard) = bounded(1);
        let (outputs, rings_at) = (AtomicU32::new(0), AtomicU32::new(0));
        Self { ring, heard, waits_since: AtomicU64::new(NONE), outputs, rings_at, committed: AtomicU64::new(0) }
    }
}

impl Bell {
    /// Rings when it was told something. One ring may stand for many.
    pub fn heard(&self) -> &Receiver<()> {
        &self.heard
    }

    /// Since when the first output of the running epoch waits.
    pub fn waits_since(&self) -> Option<Duration> {
        let since = self.waits_since.load(Ordering::Acquire);
        (since != NONE).then(|| Duration::from_nanos(since))
    }

    /// How many outputs of the running epoch wait.
    pub fn outputs(&self) -> u32 {
        self.outputs.load(Ordering::Acquire)
    }

    /// Rings when so many wait, too. True if so many wait already: then it may not ring.
    pub fn ring_at(&self, outputs: u32) -> bool {
        self.rings_at.store(outputs, Ordering::SeqCst);
        self.outputs.load(Ordering::SeqCst) >= outputs
    }

    /// An output waits, or whoever holds outputs wants an epoch to end.
    pub(super) fn output_waits(&self, now: Duration) {
        let now = u64::try_from(now.as_nanos()).unwrap_or(NONE - 1);
        let first = self.waits_since.compare_exchange(NONE, now, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let outputs = self.outputs.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        if first || outputs == self.rings_at.load(Ordering::SeqCst) {
            self.ring();
        }
    }

    /// The epoch was sealed: what comes waits anew. Only while the guest is paused.
    pub(super) fn sealed(&self) {
        self.outputs.store(0, Ordering::SeqCst);
        self.waits_since.store(NONE, Ordering::Release);
    }

    /// The backup has committed, and outputs through this epoch have left. Numbers only grow.
    pub fn committed(&self, epoch: u64) {
        self.committed.fetch_max(epoch, Ordering::AcqRel);
        self.ring();
    }

    /// The last epoch that was told to be committed.
    pub fn last_committed(&self) -> u64 {
        self.committed.load(Ordering::Acquire)
    }

    fn ring(&self) {
        // Full: it rings already.
        self.ring.try_send(()).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rings_once_for_the_first_output_of_an_epoch_and_for_commits() {
        let bell = Bell::default();
        assert_eq!((bell.waits_since(), bell.heard().try_recv().is_ok()), (None, false));
        bell.output_waits(Duration::from_millis(3));
        bell.output_waits(Duration::from_millis(4));
        assert_eq!(bell.waits_since(), Some(Duration::from_millis(3)));
        assert_eq!((bell.heard().try_recv().is_ok(), bell.heard().try_recv().is_ok()), (true, false));
        assert_eq!((bell.outputs(), bell.ring_at(2), bell.ring_at(4)), (2, true, false));
        bell.output_waits(Duration::from_millis(5));
        assert!(bell.heard().try_recv().is_err());
        bell.output_waits(Duration::from_millis(6));
        assert!(bell.heard().try_recv().is_ok(), "the fourth was asked for");
        bell.sealed();
        assert_eq!((bell.waits_since(), bell.outputs()), (None, 0));
        bell.committed(7);
        bell.committed(6);
        assert_eq!((bell.last_committed(), bell.heard().try_recv().is_ok()), (7, true));
    }
}
