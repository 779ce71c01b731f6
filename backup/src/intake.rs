//! The backup's half of the data connection without its socket: bytes in, committed checkpoints and acknowledgements out (steps 10 to 13
//! of ARCHITECTURE.md's table). Pure. The link's thread and the simulator drive it.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;
use failover::failpoint;
use replication_proto::mutant::{self, Mutant};
use replication_proto::{
    CheckpointKind, DiskChange, DiskStanding, Epoch, Generation, Goodbye, Identity, LinkError, PieceHashes,
    PiecesWanted, Point, Receiver, ReceiverConfig, ReceiverEvent, RefuseCode, Verified,
};

use crate::commit::{CommitError, Commits, Committed, Holding};
use crate::inbound::Inbound;
use crate::inbox::{Destination, Inbox, InboxError, PageBatch};

/// What came of the primary's bytes, in order.
#[derive(Debug)]
pub enum IntakeEvent {
    /// A compatible primary is connected.
    Opened(Identity),
    /// It begins a base: the standby is hollow.
    BaseBegun(Identity),
    /// The base is committed.
    BaseCommitted(Identity, Epoch),
    /// A further epoch is committed.
    Committed(Epoch),
    /// Bytes of the primary arrived.
    Heard(Identity),
    /// The primary leaves on purpose.
    Goodbye(Identity, Goodbye),
    /// The data connection is gone.
    Closed(LinkEnd),
    /// What was committed is lost with a disk, and why: there is nothing to run from any more.
    Spoilt(String),
    /// For the applier: pages of a base that is not committed.
    ApplyHollow(PageBatch),
    /// For the disks: a piece of a base that is not committed.
    ApplyHollowDisk(DiskChange),
    /// For the applier or the disks: which of these pieces differ here, after all that was told before; the answer is [`News::Compared`].
    Compare(Question, PieceHashes),
    /// For the applier and the disks: a committed checkpoint, and what state of the VM it is.
    Apply(Committed, Point),
}

/// Number of a question of the primary's; what belongs to a connection that is over is ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Question(pub u64);

/// What those who carry out commits tell the connection.
#[derive(Debug)]
pub enum News {
    /// So many committed bytes are in the standby's memory or disks: acknowledgements may be due.
    Applied(usize),
    /// The answer to a question of the primary's.
    Compared(Question, PiecesWanted),
    /// As far as disks are concerned, epochs up to one may be acknowledged, and up to another a power cut leaves them.
    Stable {
        /// May be acknowledged.
        ackable: Point,
        /// On stable storage.
        durable: Point,
    },
    /// A comparison of both sides as of the end of this epoch is done.
    Verified(Epoch, Verified),
    /// What the next primary is to be told of this side's disks.
    Standing(Vec<DiskStanding>),
    /// A disk failed.
    DiskFailed {
        /// Which file, and what the host said.
        why: String,
        /// A committed change is lost.
        lost: bool,
    },
}

/// Why a data connection ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkEnd {
    /// The primary's kernel closed it.
    #[error("closed by the primary")]
    EndOfFile,
    /// The network failed.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    /// The primary broke the protocol.
    #[error("protocol: {0}")]
    Protocol(#[from] LinkError),
    /// A checkpoint was not what it claims to be.
    #[error("{0}")]
    Commit(#[from] CommitError),
    /// A checkpoint does not fit.
    #[error("{0}")]
    Inbox(#[from] InboxError),
    /// A disk of this side failed.
    #[error("disk: {0}")]
    Disk(String),
    /// A primary of a higher generation took its place.
    #[error("displaced by a connection of a higher generation")]
    Displaced,
}

/// The connection of the moment.
struct Connection {
    protocol: Receiver,
    peer: Option<Identity>,
    stable: Stable,
    /// Questions that are not answered, in order, and answers that came before those in front of them.
    questions: VecDeque<(Question, Option<PiecesWanted>)>,
}

/// What of a connection's epochs is on stable storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stable {
    /// The epoch of its base, once that has begun.
    base: Option<Epoch>,
    /// The last epoch that its primary was told of.
    told: Option<Epoch>,
}

impl Stable {
    /// A base begins, which this epoch will end.
    pub fn base_begun(&mut self, epoch: Epoch) {
        self.base = Some(epoch);
    }

    /// Whether this epoch is the base or follows it.
    pub fn includes(&self, epoch: Epoch) -> bool {
        self.base.is_some_and(|base| epoch >= base)
    }

    /// The last epoch that the primary was told of.
    pub fn told(&self) -> Option<Epoch> {
        self.told
    }

    /// As far as disks are concerned, epochs up to `ackable` may be acknowledged, and a power cut leaves those up to `durable`. Hands back what the
    /// primary is to be told. What the disks' thread says of another generation than the primary's comes late: its epochs are not those that this
    /// connection numbers.
    pub fn hear(
        &mut self,
        generation: Generation,
        (ackable, durable): (Point, Point),
        commits: &mut Commits,
    ) -> Option<Epoch> {
        if ackable.generation == generation {
            commits.durable(ackable.epoch);
        }
        let news = self.includes(durable.epoch) && self.told.is_none_or(|told| durable.epoch > told);
        if durable.generation != generation || !news {
            return None;
        }
        self.told = Some(durable.epoch);
        self.told
    }
}

/// Collects, verifies, commits and acknowledges.
pub struct Intake {
    config: ReceiverConfig,
    inbox: Inbox,
    inbound: Inbound,
    commits: Commits,
    connection: Option<Connection>,
    /// The standby is about to run.
    sealed: bool,
    next_question: Question,
    events: VecDeque<IntakeEvent>,
    /// What is still to be said on a connection that ended.
    last_words: VecDeque<Bytes>,
}

impl Intake {
    /// A hollow standby that nobody is connected to.
    pub fn new(config: ReceiverConfig, inbox: Inbox, commits: Commits) -> Self {
        Self {
            config,
            inbox,
            inbound: Inbound::default(),
            commits,
            connection: None,
            sealed: false,
            next_question: Question(0),
            events: VecDeque::new(),
            last_words: VecDeque::new(),
        }
    }

    /// What the standby could run from now.
    pub fn holding(&self) -> Holding {
        self.commits.holding()
    }

    /// Whether a data connection stands.
    pub fn is_connected(&self) -> bool {
        self.connection.is_some()
    }

    /// Whether a data connection of `peer` would be taken on. While one is in use, only a higher generation of this VM may displace it, or the
    /// same process coming again.
    pub fn admits(&self, peer: &Identity) -> bool {
        self.connection.as_ref().and_then(|current| current.peer.as_ref()).is_none_or(|current| {
            let displaces = peer.generation > current.generation
                || (peer.generation == current.generation && peer.incarnation == current.incarnation);
            displaces && peer.vm == current.vm
        })
    }

    /// What a stranger is told that is not admitted.
    pub fn turn_away(&self) -> Vec<Bytes> {
        let mut protocol = Receiver::new(self.config.clone());
        // It has said nothing yet that could make a refusal fail.
        protocol.refuse(RefuseCode::Busy, "another primary is connected").ok();
        std::iter::from_fn(|| protocol.poll_transmit()).collect()
    }

    /// Takes a connection on, of whose bytes none were handled; one that stands is displaced.
    pub fn open(&mut self) {
        if self.connection.is_some() {
            self.end(LinkEnd::Displaced);
        }
        self.last_words.clear();
        let protocol = Receiver::new(self.config.clone());
        self.connection =
            Some(Connection { protocol, peer: None, stable: Stable::default(), questions: VecDeque::new() });
    }

    /// What the next primary is told of the disks.
    fn set_standing(&mut self, disks: Vec<DiskStanding>) {
        self.config.standing.disks = disks;
    }

    /// Takes bytes of the connection.
    ///
    /// # Errors
    /// The connection is over; say [`Intake::end`].
    pub fn handle_bytes(&mut self, bytes: &[u8]) -> Result<(), LinkEnd> {
        if let Some(connection) = &mut self.connection {
            connection.protocol.handle_bytes(bytes)?;
        }
        while let Some(connection) = &mut self.connection {
            let Some(event) = connection.protocol.poll_event()? else { break };
            if self.sealed && !matches!(event, ReceiverEvent::Inbound { .. } | ReceiverEvent::Goodbye(_)) {
                return Err(LinkEnd::Displaced);
            }
            self.on_event(event)?;
        }
        if let Some(peer) = self.connection.as_ref().and_then(|c| c.peer.clone()) {
            self.events.push_back(IntakeEvent::Heard(peer));
        }
        self.acknowledge()
    }

    /// The primary's kernel closed the connection.
    ///
    /// # Errors
    /// Always: the connection is over.
    pub fn handle_eof(&mut self) -> Result<(), LinkEnd> {
        if let Some(connection) = &mut self.connection {
            connection.protocol.handle_eof()?;
        }
        Err(LinkEnd::EndOfFile)
    }

    /// A higher generation became known: primaries of lower ones are refused, the present one too.
    ///
    /// # Errors
    /// The connection is over.
    pub fn raise_generation(&mut self, generation: Generation) -> Result<(), LinkEnd> {
        if generation > self.config.identity.generation {
            self.config.identity.generation = generation;
        }
        if let Some(connection) = &mut self.connection
            && generation > connection.protocol.generation()
        {
            connection.protocol.raise_generation(generation)?;
        }
        Ok(())
    }

    /// Those who carry out commits say something.
    ///
    /// # Errors
    /// The connection is over.
    pub fn hear(&mut self, news: News) -> Result<(), LinkEnd> {
        match news {
            News::Applied(bytes) => self.applied(bytes),
            News::Compared(question, answer) => self.compared(question, answer),
            News::Stable { ackable, durable } => self.stable(ackable, durable),
            News::Verified(epoch, found) => self.verified(epoch, &found),
            News::Standing(disks) => {
                self.set_standing(disks);
                Ok(())
            }
            News::DiskFailed { why, lost } => self.disk_failed(why, lost),
        }
    }

    /// The applier put this many committed bytes into the standby's memory: acknowledgements may be due.
    ///
    /// # Errors
    /// The connection is over.
    fn applied(&mut self, bytes: usize) -> Result<(), LinkEnd> {
        self.commits.applied(bytes);
        self.acknowledge()
    }

    /// The answer to a question. Answers leave in the order of the questions.
    ///
    /// # Errors
    /// The connection is over.
    fn compared(&mut self, question: Question, answer: PiecesWanted) -> Result<(), LinkEnd> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let Some((_, waiting)) = connection.questions.iter_mut().find(|(asked, _)| *asked == question) else {
            return Ok(());
        };
        *waiting = Some(answer);
        while let Some((_, Some(answer))) = connection.questions.front() {
            connection.protocol.wanted(answer)?;
            connection.questions.pop_front();
        }
        Ok(())
    }

    /// See [`Stable::hear`].
    ///
    /// # Errors
    /// The connection is over.
    fn stable(&mut self, ackable: Point, durable: Point) -> Result<(), LinkEnd> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let Some(generation) = connection.peer.as_ref().map(|peer| peer.generation) else { return Ok(()) };
        if let Some(epoch) = connection.stable.hear(generation, (ackable, durable), &mut self.commits) {
            connection.protocol.durable(epoch)?;
        }
        self.acknowledge()
    }

    /// A comparison of both sides as of the end of `epoch` is done.
    ///
    /// # Errors
    /// The connection is over.
    fn verified(&mut self, epoch: Epoch, found: &Verified) -> Result<(), LinkEnd> {
        match &mut self.connection {
            Some(connection) if connection.stable.includes(epoch) => Ok(connection.protocol.verified(epoch, found)?),
            _ => Ok(()),
        }
    }

    /// A disk failed: nothing more is committed until the next base. `lost`: what is committed cannot be kept, either.
    ///
    /// # Errors
    /// Always: the connection, if there is one, is over.
    fn disk_failed(&mut self, why: String, lost: bool) -> Result<(), LinkEnd> {
        if lost {
            self.commits.spoilt();
            self.events.push_back(IntakeEvent::Spoilt(why.clone()));
        }
        if self.connection.is_some() { Err(LinkEnd::Disk(why)) } else { Ok(()) }
    }

    /// The next bytes to send, in this order and all of them; after [`Intake::end`], the last words on the connection that ended.
    pub fn poll_transmit(&mut self) -> Option<Bytes> {
        match &mut self.connection {
            Some(connection) => connection.protocol.poll_transmit(),
            None => self.last_words.pop_front(),
        }
    }

    /// What came of it all, in order.
    pub fn poll_event(&mut self) -> Option<IntakeEvent> {
        self.events.pop_front()
    }

    /// The connection is over: the incomplete epoch is dropped, what is committed stays.
    pub fn end(&mut self, end: LinkEnd) {
        let refusal = match &end {
            LinkEnd::Commit(error) => Some((RefuseCode::Misbehaved, error.to_string())),
            LinkEnd::Inbox(error) => Some((RefuseCode::Overload, error.to_string())),
            LinkEnd::Disk(why) => Some((RefuseCode::Disk, why.clone())),
            _ => None,
        };
        self.inbox.drop_incomplete();
        self.commits.connection_lost();
        if let Some(mut connection) = self.connection.take() {
            if let Some((code, text)) = refusal {
                connection.protocol.refuse(code, &text).ok();
            }
            self.last_words = std::iter::from_fn(|| connection.protocol.poll_transmit()).collect();
        }
        self.events.push_back(IntakeEvent::Closed(end));
    }

    /// The standby is about to run: nothing is committed or acknowledged from here on (rule R2), and the incomplete epoch is dropped. Of what the primary
    /// still says, only inbound frames count.
    pub fn seal(&mut self) -> Holding {
        let holding = self.commits.close();
        self.inbox.drop_incomplete();
        self.sealed = true;
        holding
    }

    /// The end of all connections. Hands over the frames that reached the guest after the last commit.
    pub fn close(mut self) -> (Holding, Inbound) {
        let holding = self.seal();
        (holding, self.inbound)
    }

    fn on_event(&mut self, event: ReceiverEvent) -> Result<(), LinkEnd> {
        let peer = self.connection.as_ref().and_then(|c| c.peer.clone());
        match (event, peer) {
            (ReceiverEvent::Opened { peer }, _) => {
                self.config.identity.generation = self.config.identity.generation.max(peer.generation);
                if let Some(connection) = &mut self.connection {
                    connection.peer = Some(peer.clone());
                }
                self.events.push_back(IntakeEvent::Opened(peer));
            }
            (ReceiverEvent::Begin { epoch, kind }, Some(peer)) => {
                failpoint!(RecvBegin => return Err(failpoint::injected().into()));
                self.inbox.begin(epoch, kind)?;
                if kind == CheckpointKind::Base {
                    // From here on memory holds something that may be worth comparing with.
                    self.config.standing.warm_memory = true;
                    if let Some(connection) = &mut self.connection {
                        connection.stable.base_begun(epoch);
                    }
                    self.commits.begin_base();
                    self.inbound.clear();
                    self.events.push_back(IntakeEvent::BaseBegun(peer));
                }
            }
            (ReceiverEvent::Pages { indexes, bytes }, _) => {
                failpoint!(RecvPages => return Err(failpoint::injected().into()));
                let batch = PageBatch { indexes, bytes };
                if mutant::is(Mutant::DeltaIntoStandby) {
                    self.events.push_back(IntakeEvent::ApplyHollow(batch.clone()));
                }
                if let Destination::Hollow(batch) = self.inbox.pages(batch)? {
                    self.events.push_back(IntakeEvent::ApplyHollow(batch));
                }
            }
            (ReceiverEvent::Disk(change), _) => self.on_disk(change)?,
            (ReceiverEvent::Hashes(ask), _) => self.on_question(ask),
            (ReceiverEvent::Section { kind, version, bytes }, _) => self.inbox.section(kind, version, &bytes)?,
            (ReceiverEvent::End(end), Some(peer)) => {
                if mutant::is(Mutant::AckBeforeCommit)
                    && let Some(connection) = &mut self.connection
                {
                    connection.protocol.ack(end.epoch)?;
                }
                failpoint!(RecvEnd => return Err(failpoint::injected().into()));
                let committed = self.commits.commit(self.inbox.take()?, &end)?;
                failpoint!(Committed);
                self.inbound.committed(end.epoch);
                let point = Point { generation: peer.generation, epoch: end.epoch };
                self.events.push_back(IntakeEvent::Apply(committed, point));
                self.events.push_back(match end.kind {
                    CheckpointKind::Base => IntakeEvent::BaseCommitted(peer, end.epoch),
                    CheckpointKind::Delta => IntakeEvent::Committed(end.epoch),
                });
            }
            (ReceiverEvent::Inbound { epoch, nic, frame }, _) => {
                failpoint!(InboundKept => return Ok(()));
                self.inbound.keep(epoch, nic, &frame);
            }
            (ReceiverEvent::Goodbye(goodbye), Some(peer)) => {
                self.events.push_back(IntakeEvent::Goodbye(peer, goodbye));
            }
            (other, None) => unreachable!("the receiver opens first: {other:?}"),
        }
        Ok(())
    }

    fn on_question(&mut self, ask: PieceHashes) {
        let question = self.next_question;
        self.next_question = Question(question.0 + 1);
        if let Some(connection) = &mut self.connection {
            connection.questions.push_back((question, None));
        }
        self.events.push_back(IntakeEvent::Compare(question, ask));
    }

    fn on_disk(&mut self, change: DiskChange) -> Result<(), LinkEnd> {
        if let Destination::Hollow(change) = self.inbox.disk(change)? {
            self.events.push_back(IntakeEvent::ApplyHollowDisk(change));
        }
        Ok(())
    }

    fn acknowledge(&mut self) -> Result<(), LinkEnd> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        for epoch in self.commits.acks_due() {
            failpoint!(AckSend => return Err(failpoint::injected().into()));
            if !mutant::is(Mutant::AckBeforeCommit) {
                connection.protocol.ack(epoch)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replication_proto::{
        Facts, Incarnation, NodeName, PageIndex, PageRange, RamLayout, ReceiverLimits, Sender, SenderConfig, VmId,
    };

    fn identity(node: &str, vm: u128, generation: u64, incarnation: u128) -> Identity {
        let node = NodeName::new(node).unwrap();
        Identity { vm: VmId(vm), node, generation: Generation(generation), incarnation: Incarnation(incarnation) }
    }

    fn ram() -> RamLayout {
        RamLayout::new(vec![PageRange { first: PageIndex(0), pages: 4 }]).unwrap()
    }

    /// A standby that a primary of VM 1, generation 5, is connected to.
    fn connected() -> Intake {
        let limits = ReceiverLimits { max_epoch_pages: 4, max_epoch_section_bytes: 4096, max_epoch_disk_bytes: 0 };
        let config = ReceiverConfig {
            identity: identity("b", 1, 0, 20),
            ram: ram(),
            disks: Vec::new(),
            standing: replication_proto::Standing::default(),
            facts: Facts::new(),
            limits,
        };
        let mut intake = Intake::new(config, Inbox::new(1 << 20), Commits::new(1 << 20));
        let sender = SenderConfig {
            identity: identity("a", 1, 5, 10),
            ram: ram(),
            disks: Vec::new(),
            facts: Facts::new(),
            max_in_flight: 1,
            compress_base: false,
            patches: false,
        };
        let mut sender = Sender::new(sender);
        intake.open();
        while let Some(bytes) = sender.poll_transmit() {
            intake.handle_bytes(&bytes).unwrap();
        }
        intake
    }

    /// What the disks' thread says may come late: of another generation, or of what was before the base of this connection.
    #[test]
    fn what_is_stable_is_told_once_and_of_this_connection_s_epochs_only() {
        let point = |generation, epoch| Point { generation: Generation(generation), epoch: Epoch(epoch) };
        let (mut stable, mut commits) = (Stable::default(), Commits::new(1 << 20));
        let mut hear = |stable: &mut Stable, generation, epoch| {
            let point = point(generation, epoch);
            stable.hear(Generation(5), (point, point), &mut commits)
        };
        assert_eq!(hear(&mut stable, 5, 6), None, "no base has begun");
        stable.base_begun(Epoch(7));
        assert_eq!(hear(&mut stable, 5, 6), None, "before the base");
        assert_eq!(hear(&mut stable, 4, 8), None, "somebody else's epoch");
        assert_eq!(hear(&mut stable, 5, 8), Some(Epoch(8)));
        assert_eq!((hear(&mut stable, 5, 8), hear(&mut stable, 5, 7)), (None, None), "it is known");
        assert_eq!(stable.told(), Some(Epoch(8)));
    }

    /// Bad-input corpus, row 17: who may take the place of a connection that is in use.
    #[test]
    fn only_a_higher_generation_of_this_vm_or_the_same_process_displaces_a_connection() {
        let intake = connected();
        assert!(intake.is_connected());
        assert!(intake.admits(&identity("a", 1, 5, 10)), "the same process, again");
        assert!(intake.admits(&identity("a", 1, 6, 11)), "a higher generation");
        assert!(!intake.admits(&identity("a", 1, 5, 11)), "another process of this generation");
        assert!(!intake.admits(&identity("a", 1, 4, 10)), "an old generation");
        // A pair that is misconfigured to call here must not cost this one its protection at every attempt.
        assert!(!intake.admits(&identity("a", 2, 9, 10)), "another VM of a higher generation");
    }
}
