//! The backup's half of a data connection. Page data is passed on, never kept: what is held here is one frame and a bit per page.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::disk::{Comparable, DiskChange, PieceHashes, PiecesWanted, Standing, Verified};
use crate::error::{ApiMisuse, Incompatible, LinkError, Malformed, Misbehaved};
use crate::facts::Facts;
use crate::history::PageHistory;
use crate::ids::{Epoch, Generation, Identity, PageIndex};
use crate::limits::{
    MAX_BASE_PASSES, MAX_DISK_CHANGES_PER_EPOCH, MAX_DISKS, MAX_IN_FLIGHT, MAX_QUESTIONS, MAX_SECTIONS_PER_EPOCH,
};
use crate::message::{
    Accept, Channel, CheckpointKind, Difference, EndOfCheckpoint, Features, Goodbye, GoodbyeReason, Hello,
    NO_GENERATION, Refuse, RefuseCode, VersionRange,
};
use crate::negotiate::negotiate;
use crate::ram::{PageSet, RamLayout};
use crate::sender::pieces_exist;
use crate::wire::codec::wide;
use crate::wire::disk;
use crate::wire::frame::{Frame, FrameReader, FrameWriter};
use crate::wire::header::{Header, MessageType};
use crate::wire::zstd::Decoder;
use crate::wire::{messages, pages};

/// What a [`Receiver`] is and takes.
#[derive(Debug, Clone)]
pub struct ReceiverConfig {
    /// This process; its generation is the highest that it has ever seen.
    pub identity: Identity,
    /// The standby's memory.
    pub ram: RamLayout,
    /// Bytes of each of its disks.
    pub disks: Vec<u64>,
    /// What this side holds of an earlier life: said with the acceptance.
    pub standing: Standing,
    /// What must be equal on the primary's host.
    pub facts: Facts,
    /// How much one delta may hold.
    pub limits: ReceiverLimits,
}

/// How much one checkpoint may hold. More is answered with a refusal ([`RefuseCode::Overload`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceiverLimits {
    /// Most pages of one delta. (A base has as many as memory, and repeated ones.)
    pub max_epoch_pages: u64,
    /// Most bytes of one checkpoint's sections together, decoded.
    pub max_epoch_section_bytes: u64,
    /// Most bytes of one delta's changes of disks together.
    pub max_epoch_disk_bytes: u64,
}

/// What came from the primary, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReceiverEvent {
    /// The two sides fit together; the answer is queued.
    Opened {
        /// The primary's process.
        peer: Identity,
    },
    /// A checkpoint begins; one that had begun and not ended does not exist.
    Begin {
        /// Which.
        epoch: Epoch,
        /// What it holds.
        kind: CheckpointKind,
    },
    /// Pages of the checkpoint under way: all are memory, and none is twice in a delta.
    Pages {
        /// Which.
        indexes: Vec<PageIndex>,
        /// Their bytes one after the other, [`crate::limits::PAGE_BYTES`] each. They may share one piece of memory with the events
        /// around them: who keeps few of them for long copies them.
        bytes: Bytes,
    },
    /// A section of the checkpoint under way.
    Section {
        /// Whose state.
        kind: u16,
        /// Version of the encoding of `bytes`.
        version: u16,
        /// The state.
        bytes: Bytes,
    },
    /// A change of a disk, of the checkpoint under way: it lies in its disk.
    Disk(DiskChange),
    /// The primary asks, within a base, which of these pieces differ here: answer each with [`wanted`](Receiver::wanted), in order.
    Hashes(PieceHashes),
    /// The checkpoint under way is whole by its counts. Compare [`EndOfCheckpoint::digest`] with the digest of what is held
    /// ([`crate::EpochDigest`]) before committing; then [`ack`](Receiver::ack).
    End(EndOfCheckpoint),
    /// A frame reached the guest in this epoch; for [`crate::Sender::inbound`]'s purpose.
    Inbound {
        /// In which epoch, or a later one.
        epoch: Epoch,
        /// On which network device.
        nic: u8,
        /// The frame.
        frame: Bytes,
    },
    /// The primary ends the connection in order. What it sent and ended before may still be acked.
    Goodbye(Goodbye),
}

/// The backup's half of a data connection: no I/O, no clock.
///
/// * in: [`handle_bytes`](Self::handle_bytes), [`handle_eof`](Self::handle_eof);
/// * out: [`poll_event`](Self::poll_event) until `Ok(None)` after each of these: frames are checked and decoded there, one at a time, so
///   that small bytes never become much memory at once; [`poll_transmit`](Self::poll_transmit) until `None` after every other call;
/// * orders: [`ack`](Self::ack), [`refuse`](Self::refuse), [`goodbye`](Self::goodbye), [`raise_generation`](Self::raise_generation).
///
/// Any error is the end: the same error comes from every later call. A refusal that names it is queued; transmit it, then close.
#[derive(Debug)]
pub struct Receiver {
    reader: FrameReader,
    writer: FrameWriter,
    ram: RamLayout,
    disks: Vec<u64>,
    standing: Standing,
    facts: Facts,
    limits: ReceiverLimits,
    decoder: Option<Decoder>,
    history: Option<PageHistory>,
    peer: Option<Identity>,
    phase: Phase,
    /// Pages of the checkpoint under way.
    came: PageSet,
    /// The last checkpoint that ended.
    ended: Option<Epoch>,
    /// The last checkpoint acked; before the first ack, the one in front of the base.
    acked: Epoch,
    /// What was asked and not answered: of what, first piece, pieces.
    asked: VecDeque<(Comparable, u64, usize)>,
    /// We refused or said goodbye: nothing more is sent, and what still comes is not looked at.
    silent: bool,
    failure: Option<LinkError>,
}

#[derive(Debug)]
enum Phase {
    AwaitHello,
    Idle,
    Checkpoint(Checkpoint),
    /// The primary said goodbye.
    Ended,
}

#[derive(Debug)]
struct Checkpoint {
    epoch: Epoch,
    kind: CheckpointKind,
    pages: u64,
    sections: u32,
    section_bytes: u64,
    disk_changes: u64,
    disk_bytes: u64,
}

impl Receiver {
    /// A connection that waits for a hello.
    pub fn new(config: ReceiverConfig) -> Self {
        let ReceiverConfig { identity, ram, disks, standing, facts, limits } = config;
        assert!(disks.len() <= MAX_DISKS && standing.disks.len() == disks.len(), "a standing for each of few disks");
        Self {
            reader: FrameReader::default(),
            writer: FrameWriter::new(identity),
            came: PageSet::new(&ram),
            ram,
            disks,
            standing,
            facts,
            limits,
            decoder: None,
            history: None,
            peer: None,
            phase: Phase::AwaitHello,
            ended: None,
            acked: Epoch(0),
            asked: VecDeque::new(),
            silent: false,
            failure: None,
        }
    }

    /// The primary's process, once it is accepted.
    pub fn peer(&self) -> Option<&Identity> {
        self.peer.as_ref()
    }

    /// The highest generation known here.
    pub fn generation(&self) -> Generation {
        self.writer.identity().generation
    }

    /// Takes bytes from the connection, at most [`crate::limits::MAX_INPUT_BYTES`] at once, with all events of the last call taken.
    ///
    /// # Errors
    /// An earlier failure, or [`ApiMisuse::InputNotPolled`].
    pub fn handle_bytes(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        self.guarded(|this| if this.silent { Ok(()) } else { this.reader.push(bytes) })
    }

    /// The peer closed the connection.
    ///
    /// # Errors
    /// [`Malformed::Truncated`] if a frame was under way.
    pub fn handle_eof(&mut self) -> Result<(), LinkError> {
        self.guarded(|this| if this.reader.at_boundary() { Ok(()) } else { Err(Malformed::Truncated.into()) })
    }

    /// The next thing that came, or `None` until more bytes do.
    ///
    /// # Errors
    /// Whatever is wrong with it; the connection is over.
    pub fn poll_event(&mut self) -> Result<Option<ReceiverEvent>, LinkError> {
        self.guarded(|this| {
            if this.silent {
                return Ok(None);
            }
            let Self { reader, writer, peer, .. } = this;
            match reader.next(|header| vet(header, writer.identity(), peer.as_ref()))? {
                Some(frame) => this.handle_frame(frame).map(Some),
                None => Ok(None),
            }
        })
    }

    /// The next bytes to send, in this order and all of them.
    pub fn poll_transmit(&mut self) -> Option<Bytes> {
        self.writer.poll().map(|(bytes, _)| bytes)
    }

    /// Tells the primary that `epoch` is committed here: verified, and ready to be run from. **The primary then releases its output.**
    ///
    /// # Errors
    /// [`ApiMisuse`] unless `epoch` ended and is the first that is not acked.
    pub fn ack(&mut self, epoch: Epoch) -> Result<(), LinkError> {
        self.guarded(|this| {
            if this.silent {
                return Err(ApiMisuse::State { needs: "a connection that was not ended by this side" }.into());
            }
            if this.ended.is_none_or(|ended| epoch > ended) || epoch != this.acked.next() {
                return Err(ApiMisuse::Epoch { found: epoch }.into());
            }
            this.acked = epoch;
            this.writer.frame(MessageType::Ack, epoch, &[], &[]);
            Ok(())
        })
    }

    /// Answers what was asked first and not answered: which of the pieces are wanted. Pages that are not wanted are here. After a goodbye nobody waits for
    /// it, and nothing is said.
    ///
    /// # Errors
    /// [`ApiMisuse`] if something else is due.
    pub fn wanted(&mut self, answer: &PiecesWanted) -> Result<(), LinkError> {
        self.guarded(|this| {
            if this.silent || this.asked.pop_front() != Some((answer.of, answer.first, answer.wanted.len())) {
                return Err(ApiMisuse::State { needs: "the question that is answered, first of all" }.into());
            }
            // A checkpoint ends only when all is answered; a goodbye may come at any time.
            let Phase::Checkpoint(Checkpoint { epoch, .. }) = this.phase else { return Ok(()) };
            if answer.of == Comparable::Memory {
                for (page, _) in (answer.first..).zip(&answer.wanted).filter(|(_, wanted)| !**wanted) {
                    let position = this.ram.position(PageIndex(page)).expect("questions are checked when they come");
                    this.came.insert(position);
                }
            }
            this.writer.frame(MessageType::Wanted, epoch, &disk::put_wanted(answer), &[]);
            Ok(())
        })
    }

    /// Tells the primary that every change of a disk through `epoch` is on stable storage here.
    ///
    /// # Errors
    /// [`ApiMisuse`] after this side ended the connection.
    pub fn durable(&mut self, epoch: Epoch) -> Result<(), LinkError> {
        self.tell(MessageType::Durable, epoch, &[])
    }

    /// Tells the primary what a comparison as of the end of `epoch` found.
    ///
    /// # Errors
    /// [`ApiMisuse`] after this side ended the connection.
    pub fn verified(&mut self, epoch: Epoch, found: &Verified) -> Result<(), LinkError> {
        self.tell(MessageType::Verified, epoch, &disk::put_verified(found))
    }

    fn tell(&mut self, message: MessageType, epoch: Epoch, payload: &[u8]) -> Result<(), LinkError> {
        self.guarded(|this| {
            if this.silent || this.peer.is_none() {
                return Err(ApiMisuse::State { needs: "a connection that was not ended by this side" }.into());
            }
            this.writer.frame(message, epoch, payload, &[]);
            Ok(())
        })
    }

    /// Refuses the primary: the last word of this side. Transmit it, then close.
    ///
    /// # Errors
    /// [`ApiMisuse`] if this side ended the connection before.
    pub fn refuse(&mut self, code: RefuseCode, text: &str) -> Result<(), LinkError> {
        let refuse = Refuse::new(code, text, Vec::new());
        self.last_word(MessageType::Refuse, &messages::put_refuse(&refuse))
    }

    /// Ends the connection in order. Transmit it, then close.
    ///
    /// # Errors
    /// [`ApiMisuse`] if this side ended the connection before.
    pub fn goodbye(&mut self, reason: GoodbyeReason, text: &str) -> Result<(), LinkError> {
        let goodbye = Goodbye::new(reason, text);
        self.last_word(MessageType::Goodbye, &messages::put_goodbye(&goodbye))
    }

    /// A higher generation became known elsewhere (a takeover, the arbiter's record): the primary's right is over, and so is this
    /// connection if it has one; it returns the error of that.
    ///
    /// # Errors
    /// [`LinkError::StaleGeneration`] as told; [`ApiMisuse::GenerationFell`] if `generation` is lower than what is known.
    pub fn raise_generation(&mut self, generation: Generation) -> Result<(), LinkError> {
        self.guarded(|this| {
            let known = this.generation();
            if generation < known {
                return Err(ApiMisuse::GenerationFell.into());
            }
            this.writer.set_generation(generation);
            match &this.peer {
                Some(peer) if generation > peer.generation => {
                    Err(LinkError::StaleGeneration { ours: generation, theirs: peer.generation })
                }
                _ => Ok(()),
            }
        })
    }

    fn last_word(&mut self, message: MessageType, payload: &[u8]) -> Result<(), LinkError> {
        self.guarded(|this| {
            if this.silent {
                return Err(ApiMisuse::State { needs: "a connection that was not ended by this side" }.into());
            }
            this.silent = true;
            this.writer.frame(message, Epoch(0), payload, &[]);
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
            // Noise from who knows whom is not answered.
            let stranger = self.peer.is_none() && matches!(failure, LinkError::Malformed(_));
            if !self.silent && !stranger {
                self.silent = true;
                self.writer.frame(MessageType::Refuse, Epoch(0), &messages::put_refuse(&failure.refusal()), &[]);
            }
        }
        result
    }

    fn handle_frame(&mut self, Frame { header, payload }: Frame) -> Result<ReceiverEvent, LinkError> {
        let message = header.message;
        let unexpected = |waiting_for| Misbehaved::Unexpected { message: message.name(), waiting_for }.into();
        match (&mut self.phase, message) {
            // Frames still reach a side that has handed the guest over.
            (Phase::Ended, message) if message != MessageType::Inbound => Err(Misbehaved::AfterEnd.into()),
            (Phase::AwaitHello, MessageType::Hello) => self.handle_hello(&header, &payload),
            (Phase::AwaitHello, _) => Err(unexpected("Hello")),
            (_, MessageType::Goodbye) => {
                let goodbye = messages::goodbye(&payload)?;
                self.phase = Phase::Ended;
                Ok(ReceiverEvent::Goodbye(goodbye))
            }
            (_, MessageType::Inbound) => {
                let (nic, frame) = messages::inbound(&payload)?;
                Ok(ReceiverEvent::Inbound { epoch: header.epoch, nic, frame })
            }
            (Phase::Idle, MessageType::Begin) => self.handle_begin(header.epoch, &payload),
            (Phase::Idle, _) => Err(unexpected("Begin")),
            (
                Phase::Checkpoint(checkpoint),
                MessageType::Pages
                | MessageType::Section
                | MessageType::DiskChange
                | MessageType::Hashes
                | MessageType::End,
            ) => {
                let (expected, found) = (checkpoint.epoch, header.epoch);
                if found != expected {
                    return Err(Misbehaved::Epoch { expected, found }.into());
                }
                match message {
                    MessageType::Pages => self.handle_pages(&payload),
                    MessageType::Section => self.handle_section(&payload),
                    MessageType::DiskChange => self.handle_disk_change(&payload),
                    MessageType::Hashes => self.handle_hashes(&payload),
                    _ => self.handle_end(&payload),
                }
            }
            (Phase::Checkpoint(_) | Phase::Ended, _) => Err(unexpected("a part of the checkpoint, or its End")),
        }
    }

    fn handle_hello(&mut self, header: &Header, payload: &[u8]) -> Result<ReceiverEvent, LinkError> {
        let theirs = messages::hello(payload)?;
        let Header { vm, generation, incarnation, .. } = *header;
        let peer = Identity { vm, node: theirs.node.clone(), generation, incarnation };
        let ours = Hello {
            channel: Channel::Data,
            versions: VersionRange::OURS,
            features: Features::OURS,
            node: self.writer.identity().node.clone(),
            ram: Some(self.ram.clone()),
            facts: self.facts.clone(),
        };
        let agreed = negotiate((self.writer.identity(), &ours), (&peer, &theirs)).map_err(LinkError::Incompatible)?;
        // From here on the primary's generation is the highest known, and the answer carries it.
        self.writer.set_generation(generation);
        self.decoder = agreed.has(Features::ZSTD).then(Decoder::new);
        self.history = agreed.has(Features::PATCHES).then(|| PageHistory::new(&self.ram));
        let standing = self.standing.clone();
        let accept = Accept { version: agreed.version, features: agreed.features, node: ours.node, standing };
        self.writer.frame(MessageType::Accept, Epoch(0), &messages::put_accept(&accept), &[]);
        self.peer = Some(peer.clone());
        self.phase = Phase::Idle;
        Ok(ReceiverEvent::Opened { peer })
    }

    fn handle_begin(&mut self, epoch: Epoch, payload: &[u8]) -> Result<ReceiverEvent, LinkError> {
        let kind = messages::begin(payload)?;
        if epoch >= Epoch::END {
            return Err(Misbehaved::BadEpoch { found: epoch }.into());
        }
        match self.ended {
            None if kind == CheckpointKind::Base => self.acked = Epoch(epoch.0 - 1),
            Some(ended) if kind == CheckpointKind::Delta => {
                if epoch != ended.next() {
                    return Err(Misbehaved::Epoch { expected: ended.next(), found: epoch }.into());
                }
                if ended.0 - self.acked.0 >= wide(MAX_IN_FLIGHT) {
                    return Err(Misbehaved::TooManyInFlight.into());
                }
            }
            _ => return Err(Misbehaved::Kind.into()),
        }
        self.came.clear();
        self.phase = Phase::Checkpoint(Checkpoint {
            epoch,
            kind,
            pages: 0,
            sections: 0,
            section_bytes: 0,
            disk_changes: 0,
            disk_bytes: 0,
        });
        Ok(ReceiverEvent::Begin { epoch, kind })
    }

    fn handle_pages(&mut self, payload: &Bytes) -> Result<ReceiverEvent, LinkError> {
        let base = self.phase.checkpoint().kind == CheckpointKind::Base;
        let history = if base { None } else { self.history.as_mut() };
        let pages::PagesFrame { indexes, bytes } = pages::pages(payload, self.decoder.as_mut(), history)?;
        let (most_base, most_delta) = (self.ram.pages() * MAX_BASE_PASSES, self.limits.max_epoch_pages);
        let checkpoint = self.phase.checkpoint();
        checkpoint.pages += wide(indexes.len());
        if checkpoint.pages > if base { most_base } else { most_delta } {
            return Err(Misbehaved::EpochTooLarge { what: "pages" }.into());
        }
        for &page in &indexes {
            let position = self.ram.position(page).ok_or(Misbehaved::PageOutside { page })?;
            if !self.came.insert(position) && !base {
                return Err(Misbehaved::PageTwice { page }.into());
            }
        }
        Ok(ReceiverEvent::Pages { indexes, bytes })
    }

    fn handle_section(&mut self, payload: &Bytes) -> Result<ReceiverEvent, LinkError> {
        let messages::SectionFrame { kind, version, bytes } = messages::section(payload, self.decoder.as_mut())?;
        let most_bytes = self.limits.max_epoch_section_bytes;
        let checkpoint = self.phase.checkpoint();
        checkpoint.sections += 1;
        checkpoint.section_bytes += wide(bytes.len());
        if checkpoint.sections > MAX_SECTIONS_PER_EPOCH {
            return Err(Misbehaved::EpochTooLarge { what: "sections" }.into());
        }
        if checkpoint.section_bytes > most_bytes {
            return Err(Misbehaved::EpochTooLarge { what: "bytes of sections" }.into());
        }
        Ok(ReceiverEvent::Section { kind, version, bytes })
    }

    fn handle_disk_change(&mut self, payload: &Bytes) -> Result<ReceiverEvent, LinkError> {
        let change = disk::change(payload, self.decoder.as_mut())?;
        let Some(_) = self.disks.get(usize::from(change.disk)).filter(|bytes| change.fits(**bytes)) else {
            return Err(Misbehaved::DiskOutside { disk: change.disk, offset: change.offset }.into());
        };
        let most = self.limits.max_epoch_disk_bytes;
        let checkpoint = self.phase.checkpoint();
        checkpoint.disk_changes += 1;
        if checkpoint.kind == CheckpointKind::Delta {
            checkpoint.disk_bytes += wide(change.weight());
            let many = checkpoint.disk_changes > u64::from(MAX_DISK_CHANGES_PER_EPOCH);
            if many || checkpoint.disk_bytes > most {
                return Err(Misbehaved::EpochTooLarge { what: "changes of disks" }.into());
            }
        }
        Ok(ReceiverEvent::Disk(change))
    }

    fn handle_hashes(&mut self, payload: &Bytes) -> Result<ReceiverEvent, LinkError> {
        let ask = disk::hashes(payload)?;
        let count = ask.hashes.len();
        if self.phase.checkpoint().kind != CheckpointKind::Base {
            return Err(Misbehaved::Unexpected { message: "Hashes", waiting_for: "a part of a delta" }.into());
        }
        if !pieces_exist(&self.ram, &self.disks, ask.of, ask.first, count) {
            return Err(Malformed::Value { field: "pieces" }.into());
        }
        if self.asked.len() >= MAX_QUESTIONS {
            return Err(Misbehaved::TooManyInFlight.into());
        }
        self.asked.push_back((ask.of, ask.first, count));
        Ok(ReceiverEvent::Hashes(ask))
    }

    fn handle_end(&mut self, payload: &[u8]) -> Result<ReceiverEvent, LinkError> {
        let missing = self.ram.pages() - self.came.len();
        let &mut Checkpoint { epoch, kind, pages, sections, section_bytes: _, disk_changes, disk_bytes: _ } =
            self.phase.checkpoint();
        let end = messages::end(payload, epoch, kind)?;
        if end.pages != pages {
            return Err(Misbehaved::WrongCount { what: "pages" }.into());
        }
        if end.sections != sections {
            return Err(Misbehaved::WrongCount { what: "sections" }.into());
        }
        if end.disk_changes != disk_changes {
            return Err(Misbehaved::WrongCount { what: "changes of disks" }.into());
        }
        if kind == CheckpointKind::Base && missing > 0 {
            return Err(Misbehaved::BaseIncomplete { missing }.into());
        }
        if !self.asked.is_empty() {
            return Err(Misbehaved::Unexpected { message: "End", waiting_for: "our answers to be taken" }.into());
        }
        self.ended = Some(epoch);
        self.phase = Phase::Idle;
        Ok(ReceiverEvent::End(end))
    }
}

impl Phase {
    fn checkpoint(&mut self) -> &mut Checkpoint {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint,
            other => panic!("no checkpoint under way in {other:?}: dispatch by phase is broken"),
        }
    }
}

/// Each frame is of our VM and of no lower generation than any known; after the hello, of the process and generation of the hello.
fn vet(header: &Header, ours: &Identity, peer: Option<&Identity>) -> Result<(), LinkError> {
    let (known, found) = (ours.generation, header.generation);
    let Some(peer) = peer else {
        if header.message != MessageType::Hello {
            return Err(Misbehaved::Unexpected { message: header.message.name(), waiting_for: "Hello" }.into());
        }
        if header.vm != ours.vm {
            let differences = vec![Difference::new("vm", &ours.vm.to_string(), &header.vm.to_string())];
            return Err(LinkError::Incompatible(Incompatible { code: RefuseCode::OtherVm, differences }));
        }
        if found == NO_GENERATION {
            return Err(Misbehaved::NoGeneration.into());
        }
        if found < known {
            return Err(LinkError::StaleGeneration { ours: known, theirs: found });
        }
        return Ok(());
    };
    if header.vm != ours.vm {
        return Err(Misbehaved::OtherVm.into());
    }
    if header.incarnation != peer.incarnation {
        return Err(Misbehaved::OtherIncarnation.into());
    }
    if found < known {
        return Err(LinkError::StaleGeneration { ours: known, theirs: found });
    }
    if found > known {
        return Err(Misbehaved::GenerationChanged { expected: known, found }.into());
    }
    Ok(())
}
