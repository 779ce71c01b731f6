//! What a side that runs the guest measures about itself. Durations go to the status board; counters are kept here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use failover::status::{Counters, StatusBoard, Timing};
use replication_proto::Epoch;

use crate::epoch::PauseParts;

/// Counters of a side, and the way to its status board.
#[derive(Debug)]
pub struct Metrics {
    board: StatusBoard,
    /// Checkpoints that were begun and given up.
    pub epochs_aborted: AtomicU64,
    /// Bytes of pages handed to the encoder, the base included.
    pub raw_bytes: AtomicU64,
    /// Bytes on the wire.
    pub wire_bytes: AtomicU64,
    /// Pages in the last checkpoint.
    last_dirty_pages: AtomicU64,
}

impl Metrics {
    /// Nothing measured yet.
    pub fn new(board: StatusBoard) -> Self {
        Self {
            board,
            epochs_aborted: AtomicU64::new(0),
            raw_bytes: AtomicU64::new(0),
            wire_bytes: AtomicU64::new(0),
            last_dirty_pages: AtomicU64::new(0),
        }
    }

    /// An output left after waiting this long.
    pub fn output_held(&self, held: Duration) {
        self.board.observe(Timing::OutputHold, held);
    }

    /// A pause ended. The parts go to the log at trace level: the benchmark binary measures them properly.
    pub fn paused(&self, pause: &PauseParts, pages: usize) {
        self.board.observe(Timing::Pause, pause.whole);
        log::trace!("{pause:?}, {pages} pages");
        self.last_dirty_pages.store(u64::try_from(pages).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// A checkpoint was handed to the socket this long after its pause ended.
    pub fn transferred(&self, after: Duration) {
        self.board.observe(Timing::Transfer, after);
    }

    /// A checkpoint was committed this long after it was handed to the socket.
    pub fn committed(&self, epoch: Epoch, after: Duration) {
        self.board.observe(Timing::Ack, after);
        self.board.committed(epoch.0);
    }

    /// A takeover lasted this long, from the evidence to the guest running.
    pub fn took_over(&self, took: Duration) {
        self.board.observe(Timing::Failover, took);
    }

    /// Writes the counters into a status.
    pub fn fill(&self, counters: &mut Counters) {
        counters.epochs_aborted = self.epochs_aborted.load(Ordering::Relaxed);
        counters.dirty_pages = self.last_dirty_pages.load(Ordering::Relaxed);
        counters.replication_raw_bytes = self.raw_bytes.load(Ordering::Relaxed);
        counters.replication_wire_bytes = self.wire_bytes.load(Ordering::Relaxed);
    }
}
