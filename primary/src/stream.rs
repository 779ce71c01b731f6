//! The primary's half of the data connection without its socket: checkpoints in, bytes out; bytes in, commits out. It keeps what must be kept
//! until the backup has it, and lets outputs go when it does (steps 8, 9 and 14 to 16 of ARCHITECTURE.md's table). The
//! link's thread and the simulator drive it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use failover::failpoint;
use replication_proto::mutant::{self, Mutant};
use replication_proto::{
    CheckpointKind, DiskChange, Epoch, Generation, GoodbyeReason, Identity, LinkError, PieceHashes, PiecesWanted,
    Refuse, Sender, SenderConfig, SenderEvent, Standing, Verified,
};
use vmm::DirtySet;

use crate::epoch::StagedCheckpoint;
use crate::metrics::Metrics;
use crate::output::Gate;
use crate::staging::StagedPages;

/// What came of the backup's bytes.
#[derive(Debug)]
pub enum StreamEvent {
    /// The backup is compatible and waits for the base.
    Accepted(Identity, Standing),
    /// The backup refused protection, and said why.
    Refused {
        /// Why.
        refuse: Refuse,
        /// The highest generation that the backup knows.
        generation: Generation,
    },
    /// The backup holds every epoch up to this one. Outputs have been released already, where commits are trusted.
    Committed(Epoch),
    /// The answer to a question about pieces: those that the backup wants must be sent.
    Wanted(PiecesWanted),
    /// The backup has every change of a disk up to this epoch on stable storage.
    Durable(Epoch),
    /// What the backup found when it compared a part of its copy as of the end of this epoch.
    Verified(Epoch, Verified),
    /// Bytes arrived: the peer lives.
    Heard,
    /// The backup said goodbye.
    Goodbye(GoodbyeReason),
}

/// A checkpoint on its way: what must be kept until the backup has it.
struct InFlight {
    epoch: Epoch,
    /// Dropped un-retired, it gives its pages back to the ledger.
    dirty: DirtySet,
    resumed: Instant,
    /// When its last byte went to the socket.
    sent: Option<Instant>,
}

/// One data connection's worth of stream.
pub struct Stream {
    protocol: Sender,
    in_flight: VecDeque<InFlight>,
    gate: Arc<Gate>,
    metrics: Arc<Metrics>,
}

impl Stream {
    /// A connection that begins with a greeting.
    pub fn new(config: SenderConfig, gate: Arc<Gate>, metrics: Arc<Metrics>) -> Self {
        Self { protocol: Sender::new(config), in_flight: VecDeque::new(), gate, metrics }
    }

    /// Takes bytes from the connection. What they mean is carried out here, as far as it concerns outputs and dirty sets, and told to `tell`.
    ///
    /// # Errors
    /// The backup broke the protocol; the connection is over.
    pub fn handle_bytes(&mut self, bytes: &[u8], mut tell: impl FnMut(StreamEvent)) -> Result<(), LinkError> {
        self.protocol.handle_bytes(bytes)?;
        tell(StreamEvent::Heard);
        while let Some(event) = self.protocol.poll_event() {
            tell(self.on_event(event));
        }
        Ok(())
    }

    fn on_event(&mut self, event: SenderEvent) -> StreamEvent {
        match event {
            SenderEvent::Accepted { peer, standing } => StreamEvent::Accepted(peer, standing),
            SenderEvent::Refused { refuse, generation } => StreamEvent::Refused { refuse, generation },
            SenderEvent::Committed { epoch } => {
                self.on_commit(epoch);
                StreamEvent::Committed(epoch)
            }
            SenderEvent::Wanted(answer) => StreamEvent::Wanted(answer),
            SenderEvent::Durable { epoch } => StreamEvent::Durable(epoch),
            SenderEvent::Verified { epoch, found } => StreamEvent::Verified(epoch, found),
            SenderEvent::Goodbye { goodbye, generation: _ } => StreamEvent::Goodbye(goodbye.reason),
        }
    }

    /// Steps 14 to 16: the acknowledgement arrived, outputs through `epoch` leave, its dirty set is retired.
    fn on_commit(&mut self, epoch: Epoch) {
        failpoint!(AckReceived => return);
        self.gate.committed(epoch);
        failpoint!(AckReleased);
        while self.in_flight.front().is_some_and(|first| first.epoch <= epoch) {
            if let Some(done) = self.in_flight.pop_front() {
                done.dirty.retire();
                self.metrics.committed(done.epoch, done.sent.unwrap_or(done.resumed).elapsed());
            }
        }
        failpoint!(AckRetired);
    }

    /// The next bytes to send, in this order and all of them.
    pub fn poll_transmit(&mut self) -> Option<Bytes> {
        self.protocol.poll_transmit()
    }

    /// Bytes that are encoded and not yet asked for.
    pub fn queued_bytes(&self) -> usize {
        self.protocol.queued_bytes()
    }

    /// Checkpoints sent, or to be sent, that the backup has not acknowledged.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The connection has taken everything: checkpoints that were encoded are on their way.
    pub fn note_sent(&mut self) {
        let now = Instant::now();
        for checkpoint in self.in_flight.iter_mut().filter(|c| c.sent.is_none()) {
            checkpoint.sent = Some(now);
            self.metrics.transferred(now - checkpoint.resumed);
            failpoint!(Sent);
        }
    }

    /// Begins the base: all of RAM, as of `epoch` once it is ended.
    ///
    /// # Errors
    /// The connection is not in a state for it.
    pub fn begin_base(&mut self, epoch: Epoch) -> Result<(), LinkError> {
        self.protocol.begin(epoch, CheckpointKind::Base)
    }

    /// Sends pages of the checkpoint under way.
    ///
    /// # Errors
    /// The connection is not in a state for it.
    pub fn pages(&mut self, pages: &StagedPages) -> Result<(), LinkError> {
        failpoint!(SendPages);
        self.protocol.pages(&pages.indexes, pages.bytes())?;
        self.metrics.raw_bytes.fetch_add(u64::try_from(pages.bytes().len()).unwrap_or(0), Ordering::Relaxed);
        Ok(())
    }

    /// Asks, within the base, which pieces differ at the backup.
    ///
    /// # Errors
    /// The connection is not in a state for it.
    pub fn hashes(&mut self, ask: &PieceHashes) -> Result<(), LinkError> {
        self.protocol.hashes(ask)
    }

    /// Sends a piece of a disk within the base.
    ///
    /// # Errors
    /// The connection is not in a state for it.
    pub fn disk_piece(&mut self, piece: &DiskChange) -> Result<(), LinkError> {
        self.protocol.disk_change(piece)
    }

    /// Sends a whole checkpoint.
    ///
    /// # Errors
    /// The connection is not in a state for it; its dirty set has gone back to the ledger, or will when the stream is dropped.
    pub fn checkpoint(&mut self, checkpoint: StagedCheckpoint) -> Result<(), LinkError> {
        self.protocol.begin(checkpoint.epoch, CheckpointKind::Delta)?;
        self.end(checkpoint)
    }

    /// Sends what is left of the checkpoint under way: the end of the base.
    ///
    /// # Errors
    /// As [`Stream::checkpoint`].
    pub fn end(&mut self, checkpoint: StagedCheckpoint) -> Result<(), LinkError> {
        let StagedCheckpoint { epoch, pages, sections, disk, dirty, resumed } = checkpoint;
        if mutant::is(Mutant::RetireOnSend) {
            dirty.retire();
        } else {
            self.in_flight.push_back(InFlight { epoch, dirty, resumed, sent: None });
        }
        self.pages(&pages)?;
        for change in &disk.changes {
            self.protocol.disk_change(change)?;
        }
        for section in &sections {
            self.protocol.section(section.kind.0, section.version, &section.bytes)?;
        }
        failpoint!(SendEnd);
        self.protocol.end(disk.flushed)?;
        Ok(())
    }

    /// Tells the backup of an inbound frame.
    ///
    /// # Errors
    /// The connection is over.
    pub fn inbound(&mut self, epoch: Epoch, nic: u8, frame: &[u8]) -> Result<(), LinkError> {
        self.protocol.inbound(epoch, nic, frame)
    }

    /// Ends the stream in order.
    ///
    /// # Errors
    /// The connection is over.
    pub fn goodbye(&mut self, reason: GoodbyeReason, text: &str) -> Result<(), LinkError> {
        self.protocol.goodbye(reason, text)
    }

    /// The connection is gone: every set that was not acknowledged goes back to the ledger. Returns how many checkpoints are given up.
    pub fn give_up(&mut self) -> usize {
        let given_up = self.in_flight.len();
        self.metrics.epochs_aborted.fetch_add(u64::try_from(given_up).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.in_flight.clear();
        given_up
    }
}
