//! What the pair measures about itself.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use vmm::PauseTimings;

/// p50, p99 and the largest of a distribution, and how many samples it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Number of samples.
    pub count: u64,
    /// Median.
    pub p50: Duration,
    /// 99th percentile.
    pub p99: Duration,
    /// Largest.
    pub max: Duration,
}

/// A distribution of durations, in microseconds, three significant digits.
#[derive(Debug)]
pub struct Distribution {
    histogram: Mutex<Histogram<u64>>,
}

/// Longest duration told apart; longer ones count as this.
const LONGEST_US: u64 = 600_000_000;

impl Default for Distribution {
    fn default() -> Self {
        let histogram = Histogram::new_with_max(LONGEST_US, 3).expect("bounds of a histogram are constants");
        Self { histogram: Mutex::new(histogram) }
    }
}

impl Distribution {
    /// Adds a sample.
    pub fn record(&self, sample: Duration) {
        let us = u64::try_from(sample.as_micros()).unwrap_or(LONGEST_US);
        self.histogram.lock().unwrap_or_else(PoisonError::into_inner).saturating_record(us);
    }

    /// The figures so far.
    pub fn summary(&self) -> Summary {
        let h = self.histogram.lock().unwrap_or_else(PoisonError::into_inner);
        let at = |q| Duration::from_micros(h.value_at_quantile(q));
        Summary { count: h.len(), p50: at(0.5), p99: at(0.99), max: Duration::from_micros(h.max()) }
    }
}

/// Counters and distributions of a side that runs the guest.
#[derive(Debug, Default)]
pub struct Metrics {
    /// From the start of a pause until the guest runs again.
    pub pause: Distribution,
    /// Parking devices and stopping vCPUs.
    pub pause_stop: Distribution,
    /// Reading vCPU and device state.
    pub pause_capture: Distribution,
    /// Reading the dirty log.
    pub pause_dirty: Distribution,
    /// Copying pages out.
    pub pause_stage: Distribution,
    /// From the end of a pause until the backup's acknowledgement.
    pub commit: Distribution,
    /// How long outputs waited.
    pub hold: Distribution,
    /// Checkpoints committed.
    pub epochs_committed: AtomicU64,
    /// Checkpoints that were begun and given up.
    pub epochs_aborted: AtomicU64,
    /// Pages sent, the base included.
    pub pages_sent: AtomicU64,
    /// Bytes on the wire.
    pub bytes_sent: AtomicU64,
    /// Pages in the last checkpoint.
    pub last_dirty_pages: AtomicU64,
    /// Connections that ended with a protocol error.
    pub protocol_errors: AtomicU64,
}

impl Metrics {
    /// An output left after waiting this long.
    pub fn output_held(&self, held: Duration) {
        self.hold.record(held);
    }

    /// A pause ended.
    pub fn paused(&self, whole: Duration, parts: PauseTimings, stage: Duration, pages: usize) {
        self.pause.record(whole);
        self.pause_stop.record(parts.stop.quiesce + parts.stop.kick);
        self.pause_capture.record(parts.capture);
        self.pause_dirty.record(parts.dirty);
        self.pause_stage.record(stage);
        self.last_dirty_pages.store(u64::try_from(pages).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// A checkpoint was committed this long after its pause ended.
    pub fn committed(&self, after: Duration) {
        self.commit.record(after);
        self.epochs_committed.fetch_add(1, Ordering::Relaxed);
    }
}
