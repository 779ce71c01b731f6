//! What a side that runs the guest measures about itself. Durations go to the status board; counters are kept here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use failover::status::{CaptureStatus, Counters, OverloadStatus, PacingStatus, Status, StatusBoard, Timing};
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
    base: Mutex<Option<Base>>,
    pacing: Mutex<Option<PacingStatus>>,
    overload: Mutex<OverloadStatus>,
    capture: Mutex<CaptureStatus>,
}

/// A base that is being copied.
#[derive(Debug)]
struct Base {
    began: Instant,
    total_bytes: u64,
    left_bytes: u64,
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
            base: Mutex::default(),
            pacing: Mutex::default(),
            overload: Mutex::default(),
            capture: Mutex::default(),
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

    /// So many pages of the base are still to be copied. The first time that this is said of a base, that is all of it.
    pub fn base_left(&self, pages: usize) {
        let left_bytes = u64::try_from(pages.saturating_mul(vmm::PAGE_SIZE)).unwrap_or(u64::MAX);
        let mut base = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        let base = base.get_or_insert_with(|| Base { began: Instant::now(), total_bytes: left_bytes, left_bytes });
        // Later rounds copy again what the guest wrote meanwhile: the first one is what takes time.
        base.left_bytes = left_bytes.min(base.left_bytes);
    }

    /// No base is being copied any more.
    pub fn base_ended(&self) {
        *self.base.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Writes into a status how far the base is.
    pub fn fill_resync(&self, status: &mut Status) {
        let base = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        (status.resync_total_bytes, status.resync_remaining_bytes) =
            base.as_ref().map_or((0, 0), |base| (base.total_bytes, base.left_bytes));
        status.resync_left_seconds = base.as_ref().and_then(|base| {
            let done = base.total_bytes.checked_sub(base.left_bytes).filter(|done| *done > 0)?;
            // Whole MiB are exact in a double, and enough for an estimate.
            let mib = |bytes: u64| u32::try_from(bytes >> 20).map_or(f64::INFINITY, f64::from);
            (done >= 1 << 20).then(|| base.began.elapsed().as_secs_f64() * mib(base.left_bytes) / mib(done))
        });
    }

    /// How it goes with epochs.
    pub fn paced(&self, pacing: PacingStatus) {
        *self.pacing.lock().unwrap_or_else(PoisonError::into_inner) = Some(pacing);
    }

    /// Writes into a status how it goes with epochs, if there were any.
    pub fn fill_pacing(&self, status: &mut Status) {
        if let Some(pacing) = &*self.pacing.lock().unwrap_or_else(PoisonError::into_inner) {
            status.pacing = pacing.clone();
        }
    }

    /// Whether link and backup keep up. Overloads are counted here.
    pub fn pressed(&self, now: OverloadStatus) {
        let mut shown = self.overload.lock().unwrap_or_else(PoisonError::into_inner);
        let count = shown.count + u64::from(now.overloaded && !shown.overloaded);
        *shown = OverloadStatus { count, ..now };
    }

    /// Writes into a status whether they do.
    pub fn fill_overload(&self, status: &mut Status) {
        status.overload = self.overload.lock().unwrap_or_else(PoisonError::into_inner).clone();
    }

    /// How pages come out of the guest.
    pub fn captured(&self, capture: CaptureStatus) {
        *self.capture.lock().unwrap_or_else(PoisonError::into_inner) = capture;
    }

    /// Writes into a status how pages come out of the guest.
    pub fn fill_capture(&self, status: &mut Status) {
        status.capture.clone_from(&self.capture.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Writes the counters into a status.
    pub fn fill(&self, counters: &mut Counters) {
        counters.epochs_aborted = self.epochs_aborted.load(Ordering::Relaxed);
        counters.dirty_pages = self.last_dirty_pages.load(Ordering::Relaxed);
        counters.replication_raw_bytes = self.raw_bytes.load(Ordering::Relaxed);
        counters.replication_wire_bytes = self.wire_bytes.load(Ordering::Relaxed);
    }
}
