//! The primary's half of a data connection.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use crate::digest::EpochDigest;
use crate::disk::{Comparable, DiskChange, PieceHashes, PiecesWanted, Standing, Verified, disk_pieces};
use crate::error::{ApiMisuse, LinkError, Malformed, Misbehaved};
use crate::facts::Facts;
use crate::history::PageHistory;
use crate::ids::{Epoch, Generation, Identity, PageIndex};
use crate::limits::{
    HEADER_BYTES, MAX_BASE_PASSES, MAX_DISK_CHANGES_PER_EPOCH, MAX_DISKS, MAX_IN_FLIGHT, MAX_INBOUND_BYTES,
    MAX_PIECES_PER_MESSAGE, MAX_QUESTIONS, MAX_SECTION_BYTES, MAX_SECTIONS_PER_EPOCH, PAGE_BYTES,
};
use crate::message::{
    Channel, CheckpointKind, EndOfCheckpoint, Features, Goodbye, GoodbyeReason, Hello, NO_GENERATION, Refuse,
    VersionRange,
};
use crate::mutant::{self, Mutant};
use crate::negotiate::Agreed;
use crate::ram::{PageSet, RamLayout};
use crate::wire::codec::wide;
use crate::wire::disk as wire_disk;
use crate::wire::frame::{Frame, FrameReader, FrameWriter};
use crate::wire::header::{Header, MessageType};
use crate::wire::messages;
use crate::wire::pages::{Part, Plan, messages_of};
use crate::wire::zstd::Encoder;

/// What a [`Sender`] is and may do.
#[derive(Debug, Clone)]
pub struct SenderConfig {
    /// This process. Its generation, at least 1, is the one that it runs the guest under.
    pub identity: Identity,
    /// The guest's memory.
    pub ram: RamLayout,
    /// Bytes of each of its disks.
    pub disks: Vec<u64>,
    /// What must be equal on the backup's host.
    pub facts: Facts,
    /// Most checkpoints begun and not acked, 1 to [`MAX_IN_FLIGHT`].
    pub max_in_flight: usize,
    /// Compress the pages of the base, and sections of a page or more, if the backup agrees.
    pub compress_base: bool,
    /// Send pages of deltas as patches of what went over the connection before, if the backup agrees.
    pub patches: bool,
}

/// What a [`Sender`] learnt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SenderEvent {
    /// The backup takes this guest on: the base may begin.
    Accepted {
        /// The backup's process.
        peer: Identity,
        /// What it holds of an earlier life.
        standing: Standing,
    },
    /// The backup refuses and closes.
    Refused {
        /// Why.
        refuse: Refuse,
        /// The highest generation that the backup knows.
        generation: Generation,
    },
    /// The backup holds this checkpoint, verified: **only this event is the licence to release the epoch's output.** One event for each
    /// epoch, in order.
    Committed {
        /// Which.
        epoch: Epoch,
    },
    /// The answer to one [`Sender::hashes`], in the order of these: pieces that the backup wants must follow.
    Wanted(PiecesWanted),
    /// Every change of a disk through this epoch is on stable storage at the backup.
    Durable {
        /// Which.
        epoch: Epoch,
    },
    /// The backup compared a part of its copy, as of the end of this epoch.
    Verified {
        /// Which.
        epoch: Epoch,
        /// What it found.
        found: Verified,
    },
    /// The backup ends the connection in order.
    Goodbye {
        /// Why.
        goodbye: Goodbye,
        /// The backup's generation.
        generation: Generation,
    },
}

/// The primary's half of a data connection: no I/O, no clock.
///
/// * in: [`handle_bytes`](Self::handle_bytes), [`handle_eof`](Self::handle_eof);
/// * orders: [`begin`](Self::begin), [`pages`](Self::pages), [`section`](Self::section), [`end`](Self::end), [`goodbye`](Self::goodbye);
/// * out: [`poll_event`](Self::poll_event) and [`poll_transmit`](Self::poll_transmit), each until `None` after every call of the others.
///
/// What is queued is not bounded here: who gives orders waits while [`queued_bytes`](Self::queued_bytes) is over the own limit.
///
/// Any error is the end: the same error comes from every later call, and nothing more is transmitted.
#[derive(Debug)]
pub struct Sender {
    reader: FrameReader,
    writer: FrameWriter,
    ram: RamLayout,
    disks: Vec<u64>,
    max_in_flight: usize,
    compress_base: bool,
    features: Features,
    encoder: Option<Encoder>,
    history: Option<PageHistory>,
    events: VecDeque<SenderEvent>,
    peer: Option<Identity>,
    phase: Phase,
    /// Pages of the checkpoint under way.
    sent_pages: PageSet,
    /// Of the last checkpoint begun.
    begun: Option<Epoch>,
    /// The last checkpoint whose bytes have all been handed out: no honest ack is beyond it.
    handed_out: Epoch,
    /// The last checkpoint acked; before the first ack, the one in front of the base.
    committed: Epoch,
    /// What was asked and not answered: of what, first piece, pieces.
    asked: VecDeque<(Comparable, u64, usize)>,
    /// The last epoch that the backup has on stable storage.
    durable: Epoch,
    /// The backup said its last word.
    peer_ended: bool,
    failure: Option<LinkError>,
}

#[derive(Debug)]
enum Phase {
    AwaitAccept,
    Idle,
    Checkpoint(Box<Checkpoint>),
    /// We said goodbye; acks may still come.
    Ended,
}

#[derive(Debug)]
struct Checkpoint {
    epoch: Epoch,
    kind: CheckpointKind,
    pages: u64,
    sections: u32,
    disk_changes: u64,
    digest: EpochDigest,
}

impl Sender {
    /// A connection that starts with a hello.
    ///
    /// # Panics
    /// When `config` has generation 0 or `max_in_flight` is out of its bounds.
    pub fn new(config: SenderConfig) -> Self {
        let SenderConfig { identity, ram, disks, facts, max_in_flight, compress_base, patches } = config;
        assert!(disks.len() <= MAX_DISKS, "a machine has few disks");
        assert!(identity.generation > NO_GENERATION, "only who has the right to run sends a guest's state");
        assert!((1..=MAX_IN_FLIGHT).contains(&max_in_flight), "max_in_flight out of bounds");
        let unwanted = if patches { 0 } else { Features::PATCHES };
        let features = Features { offered: Features::OURS.offered & !unwanted, ..Features::OURS };
        let hello = Hello {
            channel: Channel::Data,
            versions: VersionRange::OURS,
            features,
            node: identity.node.clone(),
            ram: Some(ram.clone()),
            facts,
        };
        let mut writer = FrameWriter::new(identity);
        writer.frame(MessageType::Hello, Epoch(0), &messages::put_hello(&hello), &[]);
        Self {
            reader: FrameReader::default(),
            writer,
            sent_pages: PageSet::new(&ram),
            ram,
            disks,
            max_in_flight,
            compress_base,
            features,
            encoder: None,
            history: None,
            events: VecDeque::new(),
            peer: None,
            phase: Phase::AwaitAccept,
            begun: None,
            handed_out: Epoch(0),
            committed: Epoch(0),
            asked: VecDeque::new(),
            durable: Epoch(0),
            peer_ended: false,
            failure: None,
        }
    }

    /// The backup's process, once it accepted.
    pub fn peer(&self) -> Option<&Identity> {
        self.peer.as_ref()
    }

    /// Bytes queued and not yet taken by [`poll_transmit`](Self::poll_transmit).
    pub fn queued_bytes(&self) -> usize {
        self.writer.queued_bytes()
    }

    /// Checkpoints begun and not acked.
    pub fn in_flight(&self) -> usize {
        let begun = self.begun.map_or(0, |begun| begun.0 - self.committed.0);
        usize::try_from(begun).expect("at most MAX_IN_FLIGHT")
    }

    /// Whether [`begin`](Self::begin) is in order now.
    pub fn can_begin(&self) -> bool {
        let idle = matches!(self.phase, Phase::Idle);
        idle && !self.peer_ended && self.failure.is_none() && self.in_flight() < self.max_in_flight
    }

    /// Takes bytes from the connection, at most [`crate::limits::MAX_INPUT_BYTES`] at once.
    ///
    /// # Errors
    /// Whatever is wrong with them; the connection is over.
    pub fn handle_bytes(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        self.guarded(|this| {
            this.reader.push(bytes)?;
            loop {
                let Self { reader, writer, peer, .. } = this;
                let Some(frame) = reader.next(|header| vet(header, writer.identity(), peer.as_ref()))? else {
                    return Ok(());
                };
                this.handle_frame(frame)?;
            }
        })
    }

    /// The peer closed the connection.
    ///
    /// # Errors
    /// [`Malformed::Truncated`] if a frame was under way.
    pub fn handle_eof(&mut self) -> Result<(), LinkError> {
        self.guarded(|this| if this.reader.at_boundary() { Ok(()) } else { Err(Malformed::Truncated.into()) })
    }

    /// The next thing learnt.
    pub fn poll_event(&mut self) -> Option<SenderEvent> {
        self.events.pop_front()
    }

    /// The next bytes to send, in this order and all of them.
    pub fn poll_transmit(&mut self) -> Option<Bytes> {
        let (bytes, ends) = self.writer.poll()?;
        if let Some(epoch) = ends {
            assert!(epoch > self.handed_out, "checkpoints leave in order");
            self.handed_out = epoch;
        }
        Some(bytes)
    }

    /// Begins a checkpoint. The first of a connection is the base, of any epoch from 1; the others are deltas of the epoch that follows.
    ///
    /// # Errors
    /// [`ApiMisuse`] if [`can_begin`](Self::can_begin) is false, or epoch or kind is another one.
    pub fn begin(&mut self, epoch: Epoch, kind: CheckpointKind) -> Result<(), LinkError> {
        self.guarded(|this| {
            if !this.can_begin() {
                return Err(ApiMisuse::State {
                    needs: "an accepted connection between two checkpoints, and room in flight",
                }
                .into());
            }
            let (due, due_kind) = match this.begun {
                None => (epoch, CheckpointKind::Base),
                Some(begun) => (begun.next(), CheckpointKind::Delta),
            };
            if epoch != due || kind != due_kind || epoch == Epoch(0) || epoch >= Epoch::END {
                return Err(ApiMisuse::Epoch { found: epoch }.into());
            }
            if this.begun.is_none() {
                this.committed = Epoch(epoch.0 - 1);
            }
            this.begun = Some(epoch);
            this.sent_pages.clear();
            let digest = EpochDigest::new(epoch, kind);
            let checkpoint = Checkpoint { epoch, kind, pages: 0, sections: 0, disk_changes: 0, digest };
            this.phase = Phase::Checkpoint(Box::new(checkpoint));
            this.writer.frame(MessageType::Begin, epoch, &messages::put_begin(kind), &[]);
            Ok(())
        })
    }

    /// Adds pages to the checkpoint; `bytes` holds `indexes.len()` pages one after the other and is copied.
    ///
    /// # Errors
    /// [`ApiMisuse`] outside of a checkpoint, for a page that is not memory or is in this delta already, and when the sizes do not fit.
    pub fn pages(&mut self, indexes: &[PageIndex], bytes: &[u8]) -> Result<(), LinkError> {
        self.guarded(|this| {
            this.admit_pages(indexes, bytes.len())?;
            for (indexes, bytes) in messages_of(indexes, bytes) {
                let Some((epoch, plan)) = this.plan_pages(indexes, bytes)? else { continue };
                let parts = plan.body();
                let body: usize = parts.iter().map(|part| part.of(bytes).len()).sum();
                let mut frame = BytesMut::with_capacity(HEADER_BYTES + plan.head_bytes() + body);
                frame.resize(HEADER_BYTES, 0);
                plan.put_head(&mut frame, false);
                parts.iter().for_each(|part| frame.extend_from_slice(part.of(bytes)));
                this.writer.frame_in_place(MessageType::Pages, epoch, frame);
            }
            Ok(())
        })
    }

    /// Like [`pages`](Self::pages), but without copying: what [`poll_transmit`](Self::poll_transmit) gives out are parts of `bytes`.
    ///
    /// # Errors
    /// As for [`pages`](Self::pages).
    pub fn pages_shared(&mut self, indexes: &[PageIndex], bytes: &Bytes) -> Result<(), LinkError> {
        self.guarded(|this| {
            this.admit_pages(indexes, bytes.len())?;
            for (indexes, part) in messages_of(indexes, bytes) {
                let Some((epoch, plan)) = this.plan_pages(indexes, part)? else { continue };
                let mut head = Vec::with_capacity(plan.head_bytes());
                plan.put_head(&mut head, false);
                let part = bytes.slice_ref(part);
                let shared = |piece| match piece {
                    Part::Pages(range) => part.slice(range),
                    Part::Patches(patches) => patches,
                };
                let body: Vec<Bytes> = plan.body().into_iter().map(shared).collect();
                this.writer.frame(MessageType::Pages, epoch, &head, &body);
            }
            Ok(())
        })
    }

    /// Adds a section, which is copied. A kind may come several times; what that means is for those who know the kind.
    ///
    /// # Errors
    /// [`ApiMisuse`] outside of a checkpoint, over [`MAX_SECTION_BYTES`] or over [`MAX_SECTIONS_PER_EPOCH`].
    pub fn section(&mut self, kind: u16, version: u16, bytes: &[u8]) -> Result<(), LinkError> {
        self.guarded(|this| {
            if bytes.len() > MAX_SECTION_BYTES {
                return Err(ApiMisuse::Size.into());
            }
            let compress = this.may_compress();
            let (checkpoint, _) = this.open_checkpoint()?;
            if checkpoint.sections == MAX_SECTIONS_PER_EPOCH {
                return Err(ApiMisuse::TooManySections.into());
            }
            checkpoint.sections += 1;
            checkpoint.digest.section(kind, version, bytes);
            let epoch = checkpoint.epoch;
            let encoder = if compress { this.encoder.as_mut() } else { None };
            let (head, encoded) = messages::put_section(kind, version, bytes, encoder);
            let body = encoded.map_or_else(|| Bytes::copy_from_slice(bytes), Bytes::from);
            this.writer.frame(MessageType::Section, epoch, &head, &[body]);
            Ok(())
        })
    }

    /// Adds a change of a disk. In a base: a piece that differs there, or a change since; the later counts.
    ///
    /// # Errors
    /// [`ApiMisuse`] outside of a checkpoint, for a change that is outside of its disk or over the bounds, and for too many in a delta.
    pub fn disk_change(&mut self, change: &DiskChange) -> Result<(), LinkError> {
        self.guarded(|this| {
            if !this.disks.get(usize::from(change.disk)).is_some_and(|bytes| change.fits(*bytes)) {
                return Err(ApiMisuse::Size.into());
            }
            let (checkpoint, compress) = this.open_checkpoint()?;
            checkpoint.disk_changes += 1;
            let many = checkpoint.disk_changes > u64::from(MAX_DISK_CHANGES_PER_EPOCH);
            if many && checkpoint.kind == CheckpointKind::Delta {
                return Err(ApiMisuse::Size.into());
            }
            checkpoint.digest.disk(change);
            let epoch = checkpoint.epoch;
            let encoder = if compress { this.encoder.as_mut() } else { None };
            let (head, body) = wire_disk::put_change(change, encoder);
            this.writer.frame(MessageType::DiskChange, epoch, &head, body.as_slice());
            Ok(())
        })
    }

    /// Asks which pieces differ there, within a base. Pages that turn out to be equal count as sent.
    ///
    /// # Errors
    /// [`ApiMisuse`] outside of a base, for pieces that do not exist, and for none or too many at once.
    pub fn hashes(&mut self, ask: &PieceHashes) -> Result<(), LinkError> {
        self.guarded(|this| {
            let count = ask.hashes.len();
            if this.asked.len() >= MAX_QUESTIONS {
                return Err(ApiMisuse::State { needs: "fewer questions without an answer" }.into());
            }
            if count > MAX_PIECES_PER_MESSAGE || !pieces_exist(&this.ram, &this.disks, ask.of, ask.first, count) {
                return Err(ApiMisuse::Size.into());
            }
            let (checkpoint, _) = this.open_checkpoint()?;
            if checkpoint.kind != CheckpointKind::Base {
                return Err(ApiMisuse::State { needs: "a base under way" }.into());
            }
            let epoch = checkpoint.epoch;
            this.asked.push_back((ask.of, ask.first, count));
            this.writer.frame(MessageType::Hashes, epoch, &wire_disk::put_hashes(ask), &[]);
            Ok(())
        })
    }

    /// Ends the checkpoint and tells what it held. `flushed`: the guest may have been told that changes of its disks are on stable storage.
    ///
    /// # Errors
    /// [`ApiMisuse`] outside of a checkpoint, or if a base lacks pages or answers.
    pub fn end(&mut self, flushed: bool) -> Result<EndOfCheckpoint, LinkError> {
        self.guarded(|this| {
            let missing = this.ram.pages() - this.sent_pages.len();
            if !this.asked.is_empty() {
                return Err(ApiMisuse::State { needs: "answers to all that was asked" }.into());
            }
            let (checkpoint, _) = this.open_checkpoint()?;
            let Checkpoint { epoch, kind, pages, sections, disk_changes, ref digest } = *checkpoint;
            if kind == CheckpointKind::Base && missing > 0 {
                return Err(ApiMisuse::BaseIncomplete { missing }.into());
            }
            let end = EndOfCheckpoint { epoch, kind, pages, sections, disk_changes, flushed, digest: digest.finish() };
            this.writer.frame(MessageType::End, epoch, &messages::put_end(&end), &[]);
            this.phase = Phase::Idle;
            Ok(end)
        })
    }

    /// Tells the backup of a frame that reached the guest in `epoch`. It is no part of a checkpoint: if this epoch is never committed, the
    /// new owner delivers the frame again, and its sender need not wait for a retransmission timeout. At any time after the acceptance, and after a
    /// goodbye, too: frames still reach a side that has handed the guest over.
    ///
    /// # Errors
    /// [`ApiMisuse`] before the acceptance, and for a frame that is empty or over [`MAX_INBOUND_BYTES`].
    pub fn inbound(&mut self, epoch: Epoch, nic: u8, frame: &[u8]) -> Result<(), LinkError> {
        self.guarded(|this| {
            if this.peer.is_none() {
                return Err(ApiMisuse::State { needs: "an accepted connection" }.into());
            }
            if frame.is_empty() || frame.len() > MAX_INBOUND_BYTES {
                return Err(ApiMisuse::Size.into());
            }
            let head = messages::put_inbound(nic);
            this.writer.frame(MessageType::Inbound, epoch, &head, &[Bytes::copy_from_slice(frame)]);
            Ok(())
        })
    }

    /// Says the last word. A checkpoint under way is given up; acks of those before it may still come.
    ///
    /// # Errors
    /// [`ApiMisuse`] if it was said before.
    pub fn goodbye(&mut self, reason: GoodbyeReason, text: &str) -> Result<(), LinkError> {
        self.guarded(|this| {
            if matches!(this.phase, Phase::Ended) {
                return Err(ApiMisuse::State { needs: "a connection without a goodbye" }.into());
            }
            this.phase = Phase::Ended;
            let goodbye = Goodbye::new(reason, text);
            this.writer.frame(MessageType::Goodbye, Epoch(0), &messages::put_goodbye(&goodbye), &[]);
            Ok(())
        })
    }

    fn guarded<T>(&mut self, step: impl FnOnce(&mut Self) -> Result<T, LinkError>) -> Result<T, LinkError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let result = step(self);
        if let Err(failure) = &result {
            self.failure = Some(failure.clone());
            self.writer.discard();
        }
        result
    }

    fn handle_frame(&mut self, Frame { header, payload }: Frame) -> Result<(), LinkError> {
        if self.peer_ended {
            return Err(Misbehaved::AfterEnd.into());
        }
        let generation = header.generation;
        match header.message {
            MessageType::Refuse => {
                let refuse = messages::refuse(&payload)?;
                self.peer_ended = true;
                self.writer.discard();
                self.events.push_back(SenderEvent::Refused { refuse, generation });
            }
            MessageType::Goodbye => {
                let goodbye = messages::goodbye(&payload)?;
                self.peer_ended = true;
                self.events.push_back(SenderEvent::Goodbye { goodbye, generation });
            }
            MessageType::Accept if self.peer.is_none() => self.handle_accept(&header, &payload)?,
            MessageType::Ack if self.peer.is_some() => self.handle_ack(header.epoch)?,
            MessageType::Wanted if self.peer.is_some() => self.handle_wanted(&payload)?,
            MessageType::Durable if self.peer.is_some() => {
                let epoch = header.epoch;
                if epoch <= self.durable || epoch > self.handed_out {
                    return Err(Misbehaved::AckNotInFlight { epoch }.into());
                }
                self.durable = epoch;
                self.events.push_back(SenderEvent::Durable { epoch });
            }
            MessageType::Verified if self.peer.is_some() && header.epoch <= self.handed_out => {
                let found = wire_disk::verified(&payload)?;
                self.events.push_back(SenderEvent::Verified { epoch: header.epoch, found });
            }
            other => {
                let waiting_for = if self.peer.is_none() { "Accept" } else { "Ack" };
                return Err(Misbehaved::Unexpected { message: other.name(), waiting_for }.into());
            }
        }
        Ok(())
    }

    fn handle_accept(&mut self, header: &Header, payload: &[u8]) -> Result<(), LinkError> {
        let accept = messages::accept(payload)?;
        let VersionRange { min, max } = VersionRange::OURS;
        let Features { offered, required } = self.features;
        let fits = (min..=max).contains(&accept.version)
            && accept.features & !offered == 0
            && required & !accept.features == 0
            && accept.node != self.writer.identity().node;
        if !fits {
            return Err(Misbehaved::NotOffered.into());
        }
        let agreed = Agreed { version: accept.version, features: accept.features };
        if self.compress_base && agreed.has(Features::ZSTD) {
            self.encoder = Some(Encoder::new());
        }
        self.history = agreed.has(Features::PATCHES).then(|| PageHistory::new(&self.ram));
        let Header { vm, generation, incarnation, .. } = *header;
        let standing = accept.standing;
        if standing.disks.len() != self.disks.len() {
            return Err(Misbehaved::NotOffered.into());
        }
        let peer = Identity { vm, node: accept.node, generation, incarnation };
        self.peer = Some(peer.clone());
        if matches!(self.phase, Phase::AwaitAccept) {
            self.phase = Phase::Idle;
        }
        self.events.push_back(SenderEvent::Accepted { peer, standing });
        Ok(())
    }

    /// An ack of an epoch is one of all before it, too.
    fn handle_ack(&mut self, epoch: Epoch) -> Result<(), LinkError> {
        if epoch <= self.committed || epoch > self.handed_out {
            return Err(Misbehaved::AckNotInFlight { epoch }.into());
        }
        while self.committed < epoch {
            self.committed = self.committed.next();
            self.events.push_back(SenderEvent::Committed { epoch: self.committed });
        }
        Ok(())
    }

    /// Answers come in the order of the questions, and whole.
    fn handle_wanted(&mut self, payload: &[u8]) -> Result<(), LinkError> {
        let answer = wire_disk::wanted(payload)?;
        if self.asked.pop_front() != Some((answer.of, answer.first, answer.wanted.len())) {
            return Err(Misbehaved::Unexpected { message: "Wanted", waiting_for: "an answer that is due" }.into());
        }
        if answer.of == Comparable::Memory {
            for (page, _) in (answer.first..).zip(&answer.wanted).filter(|(_, wanted)| !**wanted) {
                let position = self.ram.position(PageIndex(page)).expect("only existing pages are asked for");
                self.sent_pages.insert(position);
            }
        }
        self.events.push_back(SenderEvent::Wanted(answer));
        Ok(())
    }

    fn may_compress(&self) -> bool {
        self.encoder.is_some()
    }

    /// The checkpoint under way, and whether its pages are compressed.
    fn open_checkpoint(&mut self) -> Result<(&mut Checkpoint, bool), LinkError> {
        let may_compress = self.may_compress();
        match &mut self.phase {
            Phase::Checkpoint(checkpoint) => {
                let compress = may_compress && checkpoint.kind == CheckpointKind::Base;
                Ok((checkpoint, compress))
            }
            _ => Err(ApiMisuse::State { needs: "a checkpoint under way" }.into()),
        }
    }

    fn admit_pages(&mut self, indexes: &[PageIndex], bytes: usize) -> Result<(), LinkError> {
        if indexes.len().checked_mul(PAGE_BYTES) != Some(bytes) {
            return Err(ApiMisuse::Size.into());
        }
        let most = self.ram.pages() * MAX_BASE_PASSES;
        let (checkpoint, _) = self.open_checkpoint()?;
        checkpoint.pages += indexes.len() as u64;
        if checkpoint.pages > most {
            return Err(ApiMisuse::Size.into());
        }
        let may_repeat = checkpoint.kind == CheckpointKind::Base;
        for &page in indexes {
            let position = self.ram.position(page).ok_or(ApiMisuse::Page { page })?;
            if !self.sent_pages.insert(position) && !may_repeat {
                return Err(ApiMisuse::Page { page }.into());
            }
        }
        Ok(())
    }

    /// How one message's pages are sent; `None` if they have been, compressed.
    fn plan_pages(&mut self, indexes: &[PageIndex], bytes: &[u8]) -> Result<Option<(Epoch, Plan)>, LinkError> {
        let (checkpoint, compress) = self.open_checkpoint()?;
        checkpoint.digest.pages(indexes, bytes);
        let (epoch, kind) = (checkpoint.epoch, checkpoint.kind);
        let history = if kind == CheckpointKind::Delta { self.history.as_mut() } else { None };
        let plan = Plan::new(indexes, bytes, history);
        Ok(if compress && self.compressed_pages(epoch, &plan, bytes) { None } else { Some((epoch, plan)) })
    }

    /// Sends pages compressed, if that saves something.
    fn compressed_pages(&mut self, epoch: Epoch, plan: &Plan, bytes: &[u8]) -> bool {
        let Some(encoder) = &mut self.encoder else { return false };
        let encoded = match &plan.body()[..] {
            [] => return false,
            [part] => encoder.encode(part.of(bytes)),
            parts => encoder.encode(&parts.iter().map(|part| part.of(bytes)).collect::<Vec<_>>().concat()),
        };
        let Some(encoded) = encoded else { return false };
        let mut head = Vec::with_capacity(plan.head_bytes());
        plan.put_head(&mut head, true);
        self.writer.frame(MessageType::Pages, epoch, &head, &[encoded.into()]);
        true
    }
}

/// Whether these pieces exist; there is at least one.
pub(crate) fn pieces_exist(ram: &RamLayout, disks: &[u64], of: Comparable, first: u64, count: usize) -> bool {
    let Some(last) = first.checked_add(wide(count)).and_then(|end| end.checked_sub(1)).filter(|last| *last >= first)
    else {
        return false;
    };
    match of {
        Comparable::Memory => (first..=last).all(|page| ram.contains(PageIndex(page))),
        Comparable::Disk(disk) => disks.get(usize::from(disk)).is_some_and(|bytes| last < disk_pieces(*bytes)),
    }
}

/// Each frame of a backup is of our VM and, once accepted, of the process that accepted and of our generation. A higher generation means
/// that our right to run is over; a refusal or goodbye that carries one is still read, for it says why.
fn vet(header: &Header, ours: &Identity, peer: Option<&Identity>) -> Result<(), LinkError> {
    if header.vm != ours.vm {
        return Err(Misbehaved::OtherVm.into());
    }
    let other = peer.is_some_and(|peer| header.incarnation != peer.incarnation);
    let other = other && !mutant::is(Mutant::AckOfAnyIncarnation);
    if other || header.incarnation == ours.incarnation {
        return Err(Misbehaved::OtherIncarnation.into());
    }
    if matches!(header.message, MessageType::Refuse | MessageType::Goodbye)
        || mutant::is(Mutant::AckGenerationUnchecked)
    {
        return Ok(());
    }
    let (expected, found) = (ours.generation, header.generation);
    if found > expected {
        return Err(LinkError::StaleGeneration { ours: expected, theirs: found });
    }
    if found < expected {
        return Err(Misbehaved::GenerationChanged { expected, found }.into());
    }
    Ok(())
}
