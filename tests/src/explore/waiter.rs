//! The side that waits, modelled after `backup::wait` and `backup::link`: the link's thread commits and acknowledges, the loop carries events to
//! the real core.

use failover::decide::{GoodbyeReason, Input, LinkLoss};
use replication_proto::mutant::{Mutant, is};
use replication_proto::{Epoch, Generation};

use super::ghost::Image;
use super::mind::Deed;
use super::turn::{Flow, Turn, Violation};
use super::world::{Connection, Down, Far, Shell, Up};

/// What the link tells the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WaiterEvent {
    /// A compatible owner is connected; its life and generation.
    Opened(u8, u8),
    /// It begins a base.
    BaseBegun(u8),
    /// The base is committed.
    BaseCommitted(u8, u8),
    /// A further epoch is committed.
    Committed(u8, u8),
    /// It takes its leave.
    Goodbye(u8, GoodbyeReason),
    /// The connection is gone.
    Closed(LinkLoss),
}

/// The side that waits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Waiter {
    /// What the standby could run from; none: it is hollow.
    pub holding: Option<Image>,
    /// A base is under way.
    pub in_base: bool,
    /// The highest generation that the link's thread knows.
    pub generation: u8,
    /// Told by the link and not yet handed to the core.
    pub events: Vec<WaiterEvent>,
}

impl Turn<'_> {
    /// Carries out what the core of a waiting side answered.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn carry_out_waiter(&mut self, deeds: &[Deed]) -> Result<Flow, Violation> {
        for (index, deed) in deeds.iter().enumerate() {
            match self.carry_out_common(deed.clone()) {
                None => {}
                Some(Deed::Activate(generation)) => return self.activate(generation, &deeds[index + 1..]),
                Some(Deed::Boot(generation)) => return self.boot(generation, &deeds[index + 1..]),
                Some(
                    Deed::OfferAsBackup | Deed::AskPeer | Deed::HoldOutput | Deed::DropBackup | Deed::SayGoodbye(_),
                ) => {}
                Some(Deed::Exit(code)) => return Ok(self.exit(code)),
                Some(other) => return Err(format!("not for a side that waits: {other:?}")),
            }
        }
        self.raise_generation();
        Ok(Flow::GoOn)
    }

    fn raise_generation(&mut self) {
        let known = self.generation();
        let waiter = self.waiter();
        waiter.generation = waiter.generation.max(known);
    }

    fn activate(&mut self, generation: u8, rest: &[Deed]) -> Result<Flow, Violation> {
        self.world.ghost.permit(generation)?;
        let Some(image) = self.waiter().holding else {
            return Err("G3: a hollow standby is activated".to_owned());
        };
        self.note(|| format!("    goes on from {image:?}"));
        if !is(Mutant::AckAfterPromotion) {
            self.close_far_ends();
        }
        self.world.ghost.activate(generation, image)?;
        self.become_owner(Image { generation, epoch: image.epoch }, rest)
    }

    fn close_far_ends(&mut self) {
        let at = self.at;
        self.world.connections.iter_mut().filter(|c| c.from != at).for_each(|c| c.far = Far::Closed);
    }

    /// The loop takes an event: one round of `Waiter::step`.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn waiter_round(&mut self, inputs: Vec<Input>) -> Result<Flow, Violation> {
        for input in inputs.into_iter().chain([Input::Tick]) {
            let flow = self.decide(input)?;
            if flow == Flow::Left || !matches!(self.process().shell, Shell::Waiter(_)) {
                return Ok(flow);
            }
        }
        Ok(Flow::GoOn)
    }

    /// The loop takes the first event that waits.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn waiter_event(&mut self) -> Result<Flow, Violation> {
        let event = self.waiter().events.remove(0);
        let heard = |life: u8| Input::PeerHeard { peer: self.peer(life), report: None };
        let inputs = match event {
            WaiterEvent::Opened(life, generation) => {
                vec![Input::HigherGenerationSeen(Generation(u64::from(generation))), heard(life)]
            }
            WaiterEvent::BaseBegun(life) => vec![Input::BaseBegun { owner: self.peer(life) }, heard(life)],
            WaiterEvent::BaseCommitted(life, epoch) => {
                let epoch = Epoch(u64::from(epoch));
                vec![Input::BaseCommitted { peer: self.peer(life), epoch }, heard(life)]
            }
            WaiterEvent::Committed(life, epoch) => {
                vec![Input::Committed { epoch: Epoch(u64::from(epoch)) }, heard(life)]
            }
            WaiterEvent::Goodbye(life, reason) => {
                vec![Input::PeerGoodbye { peer: self.peer(life), reason }, heard(life)]
            }
            WaiterEvent::Closed(loss) => vec![Input::LinkLost(loss)],
        };
        self.waiter_round(inputs)
    }

    /// Without lag the core hears at once what the link saw.
    fn told(&mut self) -> Result<(), Violation> {
        if self.setup.lag {
            return Ok(());
        }
        while matches!(self.node.process.as_ref().map(|p| &p.shell), Some(Shell::Waiter(w)) if !w.events.is_empty()) {
            if self.waiter_event()? == Flow::Left {
                break;
            }
        }
        Ok(())
    }

    /// The link's thread takes on a connection, or refuses it.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn accept(&mut self, index: usize) -> Result<(), Violation> {
        let caller = self.world.connections[index].clone();
        let known = self.waiter().generation;
        let current = self.world.connections.iter().position(|c| c.from == caller.from && c.far == Far::Open);
        let busy = current.is_some_and(|current| {
            let current = &self.world.connections[current];
            caller.generation < current.generation
                || (caller.generation == current.generation && caller.life != current.life)
        });
        if busy {
            self.answer(index, Up::Refuse(known));
            self.world.connections[index].far = Far::Closed;
            return Ok(());
        }
        if let Some(current) = current {
            self.end_far(current, LinkLoss::Local);
        }
        if caller.generation < known {
            self.answer(index, Up::Refuse(known));
            self.end_far(index, LinkLoss::Local);
        } else {
            self.waiter().generation = caller.generation;
            self.world.connections[index].far = Far::Open;
            self.answer(index, Up::Accept(caller.generation));
            self.waiter().events.push(WaiterEvent::Opened(caller.life, caller.generation));
        }
        self.told()
    }

    fn answer(&mut self, index: usize, up: Up) {
        let connection = &mut self.world.connections[index];
        if connection.near {
            connection.up.push(up);
        }
    }

    fn end_far(&mut self, index: usize, loss: LinkLoss) {
        self.world.connections[index].far = Far::Closed;
        let waiter = self.waiter();
        waiter.in_base = false;
        waiter.events.push(WaiterEvent::Closed(loss));
    }

    /// The link's thread notices that its connection is over.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn far_end_lost(&mut self, index: usize) -> Result<(), Violation> {
        self.end_far(index, LinkLoss::PeerClosed);
        self.told()
    }

    /// The link's thread takes the next message of its connection.
    ///
    /// # Errors
    /// See [`Violation`].
    pub fn take_down(&mut self, index: usize) -> Result<(), Violation> {
        let Connection { life, generation, .. } = self.world.connections[index].clone();
        if !matches!(self.process().shell, Shell::Waiter(_)) {
            return self.take_after_promotion(index);
        }
        let known = self.waiter().generation;
        if known > generation {
            // G10: the right of the owner is over.
            self.answer(index, Up::Refuse(known));
            self.end_far(index, LinkLoss::Local);
            return self.told();
        }
        if let Down::Epoch(epoch, false) = self.world.connections[index].down[0]
            && is(Mutant::AckBeforeCommit)
        {
            self.world.connections[index].down[0] = Down::Epoch(epoch, true);
            self.answer(index, Up::Ack(epoch));
            return Ok(());
        }
        match self.world.connections[index].down.remove(0) {
            Down::Begin => {
                let waiter = self.waiter();
                (waiter.holding, waiter.in_base) = (None, true);
                waiter.events.push(WaiterEvent::BaseBegun(life));
            }
            Down::Base(epoch) => {
                let waiter = self.waiter();
                if !waiter.in_base {
                    return Err("the end of a base that was not begun".to_owned());
                }
                waiter.in_base = false;
                waiter.events.push(WaiterEvent::BaseCommitted(life, epoch));
                self.commit(index, Image { generation, epoch }, false);
            }
            Down::Epoch(epoch, acked) => {
                let held = self.waiter().holding;
                if held != Some(Image { generation, epoch: epoch - 1 }) {
                    return Err(format!("G5: epoch {epoch} of generation {generation} follows {held:?}"));
                }
                self.waiter().events.push(WaiterEvent::Committed(life, epoch));
                self.commit(index, Image { generation, epoch }, acked);
            }
            Down::Goodbye(reason) => self.waiter().events.push(WaiterEvent::Goodbye(life, reason)),
        }
        self.told()
    }

    /// Committed, then acknowledged.
    fn commit(&mut self, index: usize, image: Image, acked: bool) {
        self.waiter().holding = Some(image);
        let (at, life) = (self.at, self.process().life);
        self.world.ghost.commit(at, life, image);
        if !acked {
            self.answer(index, Up::Ack(image.epoch));
        }
    }

    /// With a broken rule only: the link's thread lives on beside the machine that runs.
    fn take_after_promotion(&mut self, index: usize) -> Result<(), Violation> {
        assert!(is(Mutant::AckAfterPromotion), "an activation ends the link's thread");
        if let Down::Base(epoch) | Down::Epoch(epoch, _) = self.world.connections[index].down.remove(0) {
            self.answer(index, Up::Ack(epoch));
        }
        Ok(())
    }
}
