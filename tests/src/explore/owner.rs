//! The side that runs the guest, modelled after `primary::owner`, `runner`, `link` and `output::queue`; the session's machine and the core are the
//! real ones. The guest speaks all the time.

use std::time::Duration;

use failover::arbiter::NodeRef;
use failover::decide::{FenceReason, GoodbyeReason, GuestEnd, Input, LinkLoss, StateName};
use failover::exit::ExitCode;
use primary::output::queue::Mode;
use primary::protect::{Protect, Session, Step as SessionStep};
use replication_proto::mutant::{Mutant, is};
use replication_proto::{Epoch, Generation};

use super::ghost::Image;
use super::mind::{Deed, small};
use super::setup::of_ref;
use super::turn::{Flow, Turn, Violation};
use super::world::{Beat, Down, Far, Shell, Up};

/// What the threads tell the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OwnerEvent {
    /// The backup accepted the greeting.
    Accepted,
    /// It refused, and knows this generation.
    Refused(u8),
    /// It acknowledged.
    Committed(u8),
    /// The connection is gone.
    Closed(LinkLoss),
    /// The last checkpoint of a switchover was sent.
    FinalSent(u8),
}

/// What the machine's thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Runner {
    /// No epochs end.
    Idle,
    /// The base is under way, which this epoch will end.
    Base(u8),
    /// One epoch after another.
    Epochs,
    /// No epochs end, but the link is kept.
    Kept,
}

/// The gate's mode, hashable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Gate {
    /// See [`Mode::Open`].
    Open,
    /// See [`Mode::Held`].
    Held,
    /// See [`Mode::OnCommit`].
    OnCommit,
    /// See [`Mode::Silent`].
    Silent,
}

impl From<Mode> for Gate {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Open => Self::Open,
            Mode::Held => Self::Held,
            Mode::OnCommit => Self::OnCommit,
            Mode::Silent => Self::Silent,
        }
    }
}

/// The side that runs the guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The generation of its permit.
    pub generation: u8,
    /// The real session machine.
    pub protect: Protect,
    /// The gate's mode.
    pub gate: Gate,
    /// The last epoch that was sealed.
    pub sealed: u8,
    /// The last epoch number that was used.
    pub last: u8,
    /// First epoch sealed since outputs are held.
    pub covering: Option<u8>,
    /// What the gate knows to be committed.
    pub committed: Option<u8>,
    /// The last epoch before a switchover: its outputs are the new owner's to say.
    pub kept: Option<u8>,
    /// All outputs of epochs through this one have left.
    pub released: u8,
    /// The machine's thread.
    pub runner: Runner,
    /// It was told to make the last checkpoint.
    pub last_asked: bool,
    /// The guest executes.
    pub runs: bool,
    /// The backup that greeted back.
    pub backup: Option<u8>,
    /// A goodbye is on its way.
    pub leaving: bool,
    /// Told by the threads and not yet handed to the core.
    pub events: Vec<OwnerEvent>,
}

impl Turn<'_> {
    /// The guest runs, under a permit.
    pub(super) fn become_owner(&mut self, image: Image, rest: &[Deed]) -> Result<Flow, Violation> {
        let Image { generation, epoch } = image;
        let owner = Owner {
            generation,
            protect: Protect::new(Duration::ZERO, Epoch(u64::from(epoch))),
            gate: if epoch == 0 { Gate::Silent } else { Gate::Held },
            sealed: epoch,
            last: epoch,
            covering: None,
            committed: None,
            kept: None,
            released: epoch,
            runner: Runner::Idle,
            last_asked: false,
            runs: true,
            backup: None,
            leaving: false,
            events: Vec::new(),
        };
        self.process().shell = Shell::Owner(owner);
        self.carry_out_owner(rest)
    }

    // ---- the gate ----------------------------------------------------------------------------------------------------------------

    fn release(&mut self, epoch: u8) -> Result<(), Violation> {
        let generation = self.owner().generation;
        self.world.ghost.release(Image { generation, epoch })
    }

    fn release_through(&mut self, epoch: u8) -> Result<(), Violation> {
        for leaving in self.owner().released + 1..=epoch {
            self.release(leaving)?;
        }
        let owner = self.owner();
        owner.released = owner.released.max(epoch);
        Ok(())
    }

    fn open(&mut self) -> Result<(), Violation> {
        let owner = self.owner();
        (owner.gate, owner.covering, owner.committed, owner.kept) = (Gate::Open, None, None, None);
        let sealed = owner.sealed;
        self.release_through(sealed)?;
        // What the running epoch says leaves at once.
        self.release(sealed + 1)
    }

    fn hold(&mut self) {
        let owner = self.owner();
        (owner.gate, owner.covering) = (Gate::Held, None);
    }

    fn trust(&mut self, backup: &NodeRef) -> Result<(), Violation> {
        let (_, life) = of_ref(backup);
        let owner = self.owner();
        if matches!(owner.gate, Gate::Open | Gate::Silent) {
            return Err(format!("R5: commits are trusted while the gate is {:?}", owner.gate));
        }
        if owner.backup.is_some_and(|connected| connected != life) {
            return Err("G1: the backup that is connected is not the one whose commits count".to_owned());
        }
        owner.gate = Gate::OnCommit;
        self.release_committed()
    }

    fn release_committed(&mut self) -> Result<(), Violation> {
        let at = self.at;
        let owner = self.owner();
        let most = owner.kept.map_or(owner.sealed, |kept| kept - 1);
        let Some(through) = owner.committed.map(|committed| committed.min(most)) else { return Ok(()) };
        if through <= owner.released || owner.gate != Gate::OnCommit {
            return Ok(());
        }
        let held = owner.backup.and_then(|life| self.world.ghost.committed(1 - at, life));
        if held.is_none_or(|held| held.epoch < through) {
            return Err(format!("G1: outputs of epoch {through} leave, the backup committed {held:?}"));
        }
        self.release_through(through)
    }

    fn seal(&mut self, epoch: u8) -> Result<(), Violation> {
        let owner = self.owner();
        assert!(epoch > owner.sealed && owner.gate != Gate::Silent, "sealed once, and not by a fenced side");
        (owner.sealed, owner.last) = (epoch, epoch);
        if owner.gate != Gate::Open {
            owner.covering = owner.covering.or(Some(epoch));
            return Ok(());
        }
        self.release_through(epoch)?;
        self.release(epoch + 1)
    }

    // ---- the machine's thread ----------------------------------------------------------------------------------------------------

    fn mine(&self) -> Option<usize> {
        self.world.connections.iter().position(|c| c.from == self.at && c.near)
    }

    fn send(&mut self, message: Down) {
        if let Some(index) = self.mine()
            && self.world.connections[index].far != Far::Closed
        {
            self.world.connections[index].down.push(message);
        }
    }

    /// The base has been copied; or an epoch ends.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn end_epoch(&mut self) -> Result<(), Violation> {
        match self.owner().runner {
            Runner::Base(first) => {
                self.seal(first)?;
                self.owner().runner = Runner::Epochs;
                self.send(Down::Base(first));
            }
            Runner::Epochs => {
                let epoch = self.owner().last + 1;
                self.seal(epoch)?;
                self.send(Down::Epoch(epoch, false));
            }
            other => panic!("no epoch ends in {other:?}"),
        }
        Ok(())
    }

    /// The last checkpoint of a switchover, if it was asked for and can still be made.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn last_checkpoint(&mut self) -> Result<(), Violation> {
        if std::mem::take(&mut self.owner().last_asked) && self.owner().runner == Runner::Epochs {
            let last = self.owner().last + 1;
            self.owner().kept = Some(last);
            self.end_epoch()?;
            let owner = self.owner();
            (owner.runner, owner.runs) = (Runner::Kept, false);
            owner.events.push(OwnerEvent::FinalSent(owner.sealed));
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Violation> {
        self.last_checkpoint()?;
        self.owner().runs = false;
        match self.owner().runner {
            Runner::Epochs => self.owner().runner = Runner::Kept,
            // A base that is interrupted is given up, and with it its link.
            Runner::Base(_) => self.runner_closes(),
            Runner::Kept | Runner::Idle => {}
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Violation> {
        self.last_checkpoint()?;
        if self.owner().runner != Runner::Idle {
            // Any command but a pause ends the stretch of epochs.
            self.runner_closes();
        }
        self.owner().runs = true;
        Ok(())
    }

    fn runner_closes(&mut self) {
        self.owner().runner = Runner::Idle;
        if let Some(index) = self.mine() {
            self.world.connections[index].near = false;
            self.owner().events.push(OwnerEvent::Closed(LinkLoss::Local));
        }
    }

    // ---- the link's thread -------------------------------------------------------------------------------------------------------

    /// Acknowledgements release before anybody else hears of them.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn take_up(&mut self, index: usize) -> Result<(), Violation> {
        let ours = self.world.connections[index].generation;
        match self.world.connections[index].up.remove(0) {
            Up::Accept(generation) if generation == ours => {
                let backup = self.world.connections[index].listener;
                // The loop remembers it when it hears of it; what the backup acknowledges comes later.
                self.owner().backup = Some(backup);
                self.owner().events.push(OwnerEvent::Accepted);
            }
            Up::Accept(_) => {
                self.world.connections[index].near = false;
                self.owner().events.push(OwnerEvent::Closed(LinkLoss::Local));
            }
            Up::Refuse(generation) => self.owner().events.push(OwnerEvent::Refused(generation)),
            Up::Ack(epoch) => {
                let owner = self.owner();
                owner.committed = Some(owner.committed.map_or(epoch, |known| known.max(epoch)));
                owner.events.push(OwnerEvent::Committed(epoch));
                self.release_committed()?;
            }
        }
        self.told_owner()
    }

    /// The link's thread notices that its connection is over, or closes it after a goodbye.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn near_end_lost(&mut self, index: usize) -> Result<(), Violation> {
        self.world.connections[index].near = false;
        self.owner().events.push(OwnerEvent::Closed(LinkLoss::PeerClosed));
        self.told_owner()
    }

    // ---- the loop ----------------------------------------------------------------------------------------------------------------

    /// Without lag the core hears at once what the threads saw.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn told_owner(&mut self) -> Result<(), Violation> {
        if self.setup.lag {
            return Ok(());
        }
        while matches!(self.node.process.as_ref().map(|p| &p.shell), Some(Shell::Owner(o)) if !o.events.is_empty()) {
            if self.owner_event()? == Flow::Left {
                break;
            }
        }
        Ok(())
    }

    /// One round of `Owner::step` with one input: the input, then time.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn owner_round(&mut self, inputs: Vec<Input>) -> Result<Flow, Violation> {
        for input in inputs.into_iter().chain([Input::Tick]) {
            if self.decide(input)? == Flow::Left {
                return Ok(Flow::Left);
            }
        }
        Ok(Flow::GoOn)
    }

    /// The loop takes the first event that waits.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn owner_event(&mut self) -> Result<Flow, Violation> {
        let event = self.owner().events.remove(0);
        self.note(|| format!("  event {event:?}"));
        let session = self.owner().protect.session();
        let flow = match (event, session) {
            (OwnerEvent::FinalSent(epoch), _) => {
                let step = self.owner().protect.final_sent(Epoch(u64::from(epoch)));
                self.take_all(step)?
            }
            (_, None) => Flow::GoOn,
            (OwnerEvent::Accepted, Some(session)) => {
                let Some(life) = self.owner().backup else { return Ok(Flow::GoOn) };
                if self.decide(Input::PeerHeard { peer: self.peer(life), report: None })? == Flow::Left {
                    return Ok(Flow::Left);
                }
                let backup = self.peer(life);
                let step = self.owner().protect.accepted(session, backup);
                self.take_all(step)?
            }
            (OwnerEvent::Refused(generation), Some(session)) => {
                match self.decide(Input::HigherGenerationSeen(Generation(u64::from(generation))))? {
                    Flow::GoOn => self.lost(session, LinkLoss::Local)?,
                    Flow::Left => Flow::Left,
                }
            }
            (OwnerEvent::Committed(epoch), Some(session)) => self.on_committed(session, epoch)?,
            (OwnerEvent::Closed(loss), Some(_)) if self.owner().leaving => match self.drop_backup()? {
                Flow::GoOn => self.decide(Input::LinkLost(loss))?,
                Flow::Left => Flow::Left,
            },
            (OwnerEvent::Closed(loss), Some(session)) => self.lost(session, loss)?,
        };
        if flow == Flow::Left { Ok(flow) } else { self.owner_round(Vec::new()) }
    }

    fn on_committed(&mut self, session: Session, epoch: u8) -> Result<Flow, Violation> {
        if let Some(life) = self.owner().backup
            && self.decide(Input::PeerHeard { peer: self.peer(life), report: None })? == Flow::Left
        {
            return Ok(Flow::Left);
        }
        let owner = self.owner();
        let covers = owner.covering.is_some_and(|first| epoch >= first);
        let steps = owner.protect.committed(session, Epoch(u64::from(epoch)), covers);
        self.take_all(steps)
    }

    /// A heartbeat of the peer.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn owner_hears(&mut self, beat: Beat) -> Result<Flow, Violation> {
        let inputs = self.inputs_of_beat(beat);
        self.owner_round(inputs)
    }

    /// The heartbeat connection broke, or the loop closes the session on its own account.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn session_lost(&mut self, loss: LinkLoss) -> Result<(), Violation> {
        let session = self.owner().protect.session().expect("a session is lost");
        if self.lost(session, loss)? == Flow::GoOn {
            self.owner_round(Vec::new())?;
            self.told_owner()?;
        }
        Ok(())
    }

    fn lost(&mut self, session: Session, loss: LinkLoss) -> Result<Flow, Violation> {
        if is(Mutant::GateOpensOnLinkLoss) {
            self.open()?;
        }
        let steps = self.owner().protect.lost(session, loss, Duration::ZERO);
        self.take_all(steps)
    }

    fn drop_backup(&mut self) -> Result<Flow, Violation> {
        let step = self.owner().protect.drop_backup(Duration::ZERO);
        self.take_all(step)
    }

    /// The guest ended by itself; its machine's thread seals nothing any more.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn guest_ended(&mut self, end: GuestEnd) -> Result<(), Violation> {
        let owner = self.owner();
        owner.runs = false;
        match owner.runner {
            Runner::Epochs => owner.runner = Runner::Kept,
            Runner::Base(_) => self.runner_closes(),
            Runner::Kept | Runner::Idle => {}
        }
        if self.owner_round(vec![Input::GuestEnded(end)])? == Flow::GoOn {
            self.told_owner()?;
        }
        Ok(())
    }

    // ---- carrying out ------------------------------------------------------------------------------------------------------------

    fn take_all(&mut self, steps: impl IntoIterator<Item = SessionStep>) -> Result<Flow, Violation> {
        for step in steps {
            let flow = match step {
                SessionStep::Dial(_) => panic!("dialling is a step of its own"),
                SessionStep::SendBase { session: _, first } => {
                    let first = small(first.0);
                    let owner = self.owner();
                    if first <= owner.last {
                        return Err(format!("epoch {first} is used twice"));
                    }
                    if owner.runs {
                        (owner.last, owner.runner) = (first, Runner::Base(first));
                        self.send(Down::Begin);
                    }
                    Flow::GoOn
                }
                SessionStep::Close(_) => {
                    self.close();
                    Flow::GoOn
                }
                SessionStep::Decide(input) => self.decide(input)?,
            };
            if flow == Flow::Left {
                return Ok(flow);
            }
        }
        Ok(Flow::GoOn)
    }

    fn close(&mut self) {
        if let Some(index) = self.mine() {
            self.world.connections[index].near = false;
        }
        let owner = self.owner();
        (owner.runner, owner.backup, owner.leaving, owner.last_asked) = (Runner::Idle, None, false, false);
        // What the threads of this session still have to tell belongs to a session that is over.
        owner.events.retain(|event| matches!(event, OwnerEvent::FinalSent(_)));
        let last = Epoch(u64::from(owner.last));
        owner.protect.epoch_used(last);
        owner.protect.forget_past_sessions();
    }

    /// Carries out what the core of an owner answered.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn carry_out_owner(&mut self, deeds: &[Deed]) -> Result<Flow, Violation> {
        for deed in deeds {
            let Some(deed) = self.carry_out_common(deed.clone()) else { continue };
            if self.carry_out_one(deed)? == Flow::Left {
                return Ok(Flow::Left);
            }
        }
        Ok(Flow::GoOn)
    }

    fn carry_out_one(&mut self, deed: Deed) -> Result<Flow, Violation> {
        match deed {
            Deed::StartBase(backup) => {
                let step = self.owner().protect.start_base(&backup);
                return self.take_all(step);
            }
            Deed::DropBackup => return self.drop_backup(),
            Deed::HoldOutput => {
                self.hold();
                self.owner().protect.outputs_held();
            }
            Deed::OpenOutput => self.open()?,
            Deed::TrustAcks(backup) => self.trust(&backup)?,
            Deed::PauseGuest => self.pause()?,
            Deed::ResumeGuest => self.resume()?,
            Deed::Fence(reason) => self.fence(reason),
            Deed::ResumeFenced(generation) => self.resume_fenced(generation)?,
            Deed::BeginSwitchover => self.owner().last_asked = true,
            Deed::SayGoodbye(reason) => self.say_goodbye(reason),
            Deed::Rejoin => return self.rejoin(),
            Deed::Exit(code) => return Ok(self.end_owner(code)),
            other => return Err(format!("not for a side that runs the guest: {other:?}")),
        }
        Ok(Flow::GoOn)
    }

    fn fence(&mut self, reason: FenceReason) {
        self.owner().gate = Gate::Silent;
        // What reaches a side that handed the guest over is passed on, until the new owner closes the connection.
        if reason != FenceReason::HandedOver && self.owner().protect.drop_backup(Duration::ZERO).is_some() {
            self.close();
        }
        self.owner().runs = false;
    }

    fn resume_fenced(&mut self, generation: u8) -> Result<(), Violation> {
        self.world.ghost.permit(generation)?;
        let owner = self.owner();
        let image = Image { generation: owner.generation, epoch: owner.sealed + 1 };
        (owner.generation, owner.runs) = (generation, true);
        self.world.ghost.activate(generation, image)
    }

    fn say_goodbye(&mut self, reason: GoodbyeReason) {
        if self.mine().is_some() {
            self.send(Down::Goodbye(reason));
            self.owner().leaving = true;
        }
    }

    fn end_owner(&mut self, code: ExitCode) -> Flow {
        if self.process().core.view.state == StateName::Ended
            && matches!(code, ExitCode::Ok)
            && !self.world.ghost.forced
        {
            self.world.ghost.stopped = true;
        }
        self.exit(code)
    }
}
