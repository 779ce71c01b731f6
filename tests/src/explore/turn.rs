//! One step of one process: what it changes of the world, and what both shells have in common (`primary::host`).

use std::sync::Arc;
use std::time::Duration;

use failover::arbiter::NodeRef;
use failover::decide::{ArbiterRequest, Core, Input, PeerReport, Role};
use failover::exit::ExitCode;
use replication_proto::Generation;

use super::ghost::Image;
use super::mind::{Deed, Memory, Mind, small};
use super::owner::Owner;
use super::setup::{NOW, Setup, node_ref};
use super::waiter::Waiter;
use super::world::{Beat, Errand, Far, Node, Printed, Process, Shell, World, Zombie};

/// Why a step must not have happened.
pub type Violation = String;

/// What became of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// It goes on.
    GoOn,
    /// It is gone, or has become something else: what else was to be done in this step is not done.
    Left,
}

/// One step of one process.
pub struct Turn<'a> {
    /// Bounds and faults.
    pub setup: &'a Setup,
    /// The world; the acting node's entry in it is out of date.
    pub world: World,
    /// Whose turn it is.
    pub at: usize,
    /// The acting node.
    pub node: Node,
    /// What cores answered before.
    memory: &'a mut Memory,
    /// The next input comes at the moment when the core's next timer runs out.
    pub late: bool,
    /// What happened in it, if somebody wants to read it.
    pub log: Option<Vec<String>>,
}

impl<'a> Turn<'a> {
    /// `at` does something.
    pub fn new(setup: &'a Setup, memory: &'a mut Memory, world: &World, at: usize, logging: bool) -> Self {
        let node = world.nodes[at].value.as_ref().clone();
        Self { setup, world: world.clone(), at, node, memory, late: false, log: logging.then(Vec::new) }
    }

    /// The world after it, and what happened in it.
    pub fn end(mut self) -> (World, Vec<String>) {
        self.world.nodes[self.at] = Printed::new(self.node);
        (self.world, self.log.unwrap_or_default())
    }

    /// Writes a line for the reader of a trace.
    pub fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(text());
        }
    }

    /// The acting process.
    pub fn process(&mut self) -> &mut Process {
        self.node.process.as_mut().expect("a process acts")
    }

    /// The acting process, as an owner.
    pub fn owner(&mut self) -> &mut Owner {
        match &mut self.process().shell {
            Shell::Owner(owner) => owner,
            _ => panic!("an owner acts"),
        }
    }

    /// The acting process, as one that waits.
    pub fn waiter(&mut self) -> &mut Waiter {
        match &mut self.process().shell {
            Shell::Waiter(waiter) => waiter,
            _ => panic!("a standby acts"),
        }
    }

    /// The generation that the acting process names in its frames.
    pub fn generation(&mut self) -> u8 {
        small(self.process().core.view.generation.0)
    }

    /// The process at the other end.
    pub fn peer(&self, life: u8) -> NodeRef {
        node_ref(1 - self.at, life)
    }

    /// Hands an input to the real core.
    pub fn ask_core(&mut self, input: Input) -> Arc<Vec<Deed>> {
        let late = std::mem::take(&mut self.late);
        self.note(|| format!("  input {input:?}"));
        let mind = self.process().core.clone();
        let (mind, deeds) = self.memory.ask(&mind, input, late);
        self.process().core = mind;
        for deed in deeds.iter() {
            self.note(|| format!("    action {deed:?}"));
        }
        deeds
    }

    /// What one heartbeat means, in the order in which both shells tell it.
    pub fn inputs_of_beat(&self, beat: Beat) -> Vec<Input> {
        let report = PeerReport { arbiter_age: Some(Duration::ZERO), protected: beat.protected, asks: beat.asks };
        vec![
            Input::HigherGenerationSeen(Generation(u64::from(beat.generation))),
            Input::PeerHeard { peer: self.peer(beat.life), report: Some(report) },
        ]
    }

    /// A process of the acting node begins.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn start(&mut self, role: Role) -> Result<(), Violation> {
        self.node.lives += 1;
        let life = self.node.lives;
        let core = Mind::new(Core::new(self.setup.core(self.at, life, role, self.node.persisted)), NOW);
        let shell = if role == Role::Backup { Shell::Waiter(Waiter::default()) } else { Shell::Starting };
        self.node.process = Some(Process { life, role, core, errand: Errand::None, wrote: false, shell });
        self.decide(Input::Started).map(drop)
    }

    /// What both shells carry out in the same way; hands back what they do not.
    pub fn carry_out_common(&mut self, deed: Deed) -> Option<Deed> {
        match deed {
            Deed::Arbiter(request) => {
                let process = self.process();
                process.wrote |= matches!(*request, ArbiterRequest::Cas { .. });
                assert_eq!(process.errand, Errand::None, "one request at a time");
                process.errand = Errand::Asked(request);
            }
            Deed::Persist(generation) => self.node.persisted = self.node.persisted.max(generation),
            Deed::Say(_) => {}
            other => return Some(other),
        }
        None
    }

    /// Hands an input over and carries the answer out.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn decide(&mut self, input: Input) -> Result<Flow, Violation> {
        let stays = match &input {
            Input::HigherGenerationSeen(generation) => {
                let view = &self.process().core.view;
                view.owner && *generation > view.generation
            }
            _ => false,
        };
        let deeds = self.ask_core(input);
        if stays && self.process().core.view.owner {
            return Err("G10: an owner heard of a higher generation and goes on".to_owned());
        }
        match self.process().shell {
            Shell::Starting => self.carry_out_start(&deeds),
            Shell::Waiter(_) => self.carry_out_waiter(&deeds),
            Shell::Owner(_) => self.carry_out_owner(&deeds),
        }
    }

    /// `primary::start`.
    fn carry_out_start(&mut self, deeds: &[Deed]) -> Result<Flow, Violation> {
        for (index, deed) in deeds.iter().enumerate() {
            match self.carry_out_common(deed.clone()) {
                None => {}
                Some(Deed::Boot(generation)) => return self.boot(generation, &deeds[index + 1..]),
                Some(Deed::OfferAsBackup) => return self.become_backup(),
                // Nobody is connected yet.
                Some(Deed::SayGoodbye(_)) => {}
                Some(Deed::Exit(code)) => return Ok(self.exit(code)),
                Some(other) => return Err(format!("not for a starting process: {other:?}")),
            }
        }
        Ok(Flow::GoOn)
    }

    /// A program that may not boot becomes the other program, which reads the record itself. A life that wrote nothing has left no trace of itself,
    /// so the new one gets its number.
    fn become_backup(&mut self) -> Result<Flow, Violation> {
        let process = self.process();
        let (wrote, role) = (process.wrote, process.role);
        if wrote {
            if self.node.lives >= self.setup.lives[self.at] {
                return Ok(self.exit(ExitCode::Failure));
            }
            self.exit(ExitCode::Ok);
        } else {
            self.node.lives -= 1;
        }
        self.node.lives += 1;
        let life = self.node.lives;
        let core = Mind::new(Core::new(self.setup.core(self.at, life, role, self.node.persisted)), NOW);
        let shell = Shell::Waiter(Waiter::default());
        self.node.process = Some(Process { life, role, core, errand: Errand::None, wrote: false, shell });
        self.decide(Input::Started)
    }

    /// A fenced side drops its guest and becomes the program that waits.
    pub(super) fn rejoin(&mut self) -> Result<Flow, Violation> {
        let node = node_ref(self.at, 0).node;
        let elsewhere = self.world.register.as_ref().is_some_and(|stored| stored.record.owner.node != node);
        if !elsewhere && !self.world.ghost.forced {
            return Err("G12: a side drops a guest that nobody else owns".to_owned());
        }
        self.become_backup()
    }

    /// The guest boots under a permit.
    pub(super) fn boot(&mut self, generation: u8, rest: &[Deed]) -> Result<Flow, Violation> {
        self.world.ghost.permit(generation)?;
        self.world.ghost.boot(generation);
        self.become_owner(Image { generation, epoch: 0 }, rest)
    }

    /// The process ends. Its kernel closes its connections.
    pub fn exit(&mut self, code: ExitCode) -> Flow {
        self.note(|| format!("    exit {code:?}"));
        self.die();
        Flow::Left
    }

    /// The process is no more.
    pub fn die(&mut self) {
        let Some(process) = self.node.process.take() else { return };
        if let Errand::Asked(request) = process.errand
            && let ArbiterRequest::Cas { expected, record } = request.as_ref()
            && self.world.zombies.len() < self.setup.zombies
        {
            self.world.zombies.push(Zombie { expected: *expected, record: record.clone() });
        }
        for connection in &mut self.world.connections {
            if connection.from == self.at {
                connection.near = false;
            } else {
                connection.far = Far::Closed;
            }
        }
    }
}
