//! What the runner's thread does, in a simulated world: the pieces of a base, and the ends of epochs.

use std::sync::atomic::Ordering;
use std::time::Duration;

use failover::decide::LinkLoss;
use primary::bulk::{BaseCopy, BaseStep, hashes_of};
use primary::capture::precopy::Precopied;
use primary::disk::DiskStep;
use primary::epoch::{Afterwards, Captured, StagedCheckpoint, stage};
use primary::host::EPOCHS_IN_FLIGHT;
use primary::owner::course::Event as Told;
use primary::pacer::{Judged, Look, Next, Pacer, Reading, Taken, Turn};
use primary::protect::Session;
use replication_proto::Epoch;
use vmm::{Machine, PageNo};

use super::{Doing, OwnerPart, Phase, Taking};
use crate::world::Nanos;
use crate::world::env::{Env, Event};
use crate::world::process::Base;

/// How long the runner waits before it looks again whether there is room for a further checkpoint.
const ROOM_INTERVAL: Nanos = 1_000_000;

/// How often the pacer looks whether link and backup keep up.
const JUDGED_INTERVAL: Duration = Duration::from_millis(100);
/// How often it is looked whether a guest need wait for its commit no longer.
const HOLD_INTERVAL: Nanos = 5_000_000;

/// What a pause is said to have cost the guest: virtual time does not pass in one.
const PAUSE: Duration = Duration::from_micros(200);

/// What a kernel would know of the connection: where the applier is slow everything has arrived, else something is still here.
fn reading(base: &Base, env: &Env) -> Reading {
    let sent_bytes = base.metrics.raw_bytes.load(Ordering::Relaxed);
    let arrived = env.conditions.slow_applier || env.conditions.slow_disk;
    Reading { sent_bytes, unsent_bytes: usize::from(!arrived), ..Reading::default() }
}

impl OwnerPart {
    /// The runner's thread wakes: the next piece of the base, or the end of an epoch.
    pub fn runner(&mut self, session: Session, base: &mut Base, env: &mut Env) {
        let current = match &self.doing {
            Doing::Copying { session, .. } | Doing::Epochs { session, .. } => Some(*session),
            Doing::Nothing | Doing::Stopped | Doing::HandedOver => None,
        };
        if current != Some(session) || self.runner_at.is_none_or(|at| at > env.now) {
            return;
        }
        self.runner_at = None;
        base.set_clock(env.now);
        match &self.doing {
            Doing::Copying { .. } => self.copy_piece(base, env),
            _ => self.look(base, env),
        }
        base.flush(env);
    }

    fn has_room(&self) -> Option<bool> {
        let link = self.link.as_ref().filter(|link| !link.closed)?;
        Some(link.stream.in_flight() < EPOCHS_IN_FLIGHT)
    }

    /// The runner's thread wakes at `at`, if nothing wakes it before.
    fn wake_runner(&mut self, at: Nanos, session: Session, base: &Base, env: &mut Env) {
        if self.runner_at.is_none_or(|planned| at < planned || planned < env.now) {
            self.runner_at = Some(at.max(env.now));
            env.at(at, Event::Runner(base.who, session));
        }
    }

    /// The gate or the link rang: the runner's thread looks soon.
    pub(super) fn heed_bell(&mut self, base: &Base, env: &mut Env) {
        if let Doing::Epochs { session, .. } = &self.doing
            && base.gate.bell().heard().try_recv().is_ok()
        {
            let (session, at) = (*session, env.now + env.rng.range(5_000, 200_000));
            self.wake_runner(at, session, base, env);
        }
    }

    /// The runner's thread asks the pacer.
    fn look(&mut self, base: &mut Base, env: &mut Env) {
        let Doing::Epochs { session, pacer, judged, phase } = &mut self.doing else { return };
        let session = *session;
        match phase {
            Phase::Running => {}
            Phase::Precopied(_) => return self.end_epoch(Afterwards::RunsOn, base, env),
            Phase::Copying(..) => return self.copy_protected(session, base, env),
            Phase::Waiting(taking) if base.gate.bell().last_committed() < taking.epoch.0 => {
                return self.wake_runner(env.now + HOLD_INTERVAL, session, base, env);
            }
            Phase::Waiting(taking) => {
                let taking = *taking;
                self.let_run_on();
                return self.ran_on(taking, base, env);
            }
        }
        let now = base.local(env.now);
        pacer.committed(Epoch(base.gate.bell().last_committed()), now);
        if now.saturating_sub(*judged) >= JUDGED_INTERVAL {
            *judged = now;
            let judged = pacer.judge(&reading(base, env), now);
            if self.heed(judged, base, env) {
                return;
            }
        }
        let (Doing::Epochs { pacer, .. }, bell) = (&mut self.doing, base.gate.bell()) else { return };
        let asked = self.parts.disks.wants_checkpoint();
        let (waiting_since, outputs, ran) = (bell.waits_since(), bell.outputs(), Some(self.machine.ran()));
        let look = Look { now, waiting_since, outputs, ran, asked, full: false };
        match pacer.look(&look) {
            Next::End => self.begin_end(base, env),
            Next::Look(at) => {
                let waits = pacer.hoped_for(&look).is_some_and(|outputs| bell.ring_at(outputs));
                assert!(!waits, "nothing was said meanwhile");
                let at = base.world_time(at) + env.rng.range(0, 200_000);
                self.wake_runner(at.max(env.now + 1_000), session, base, env);
            }
        }
    }

    /// Does what the pacer says about an overload; true when protection ended.
    fn heed(&mut self, judged: Judged, base: &mut Base, env: &mut Env) -> bool {
        if let Some(turn) = judged.turn {
            env.note(|| format!("{}: {turn:?}", base.me));
            env.ghost.seen.overloads += u64::from(matches!(turn, Turn::Began(_)));
        }
        if let Some(throttle) = judged.throttle {
            env.ghost.seen.throttles += 1;
            self.machine.throttle(throttle).expect("the simulated guest can be slowed");
        }
        let Some((slow, lasted)) = judged.give_up else { return false };
        env.note(|| format!("{} gives protection up: the {} is too slow, for {lasted:?}", base.me, slow.word()));
        env.ghost.seen.dropped += 1;
        self.does(Doing::Nothing);
        self.parts.disks.end_log();
        // The news first, as the real runner tells it.
        self.inbox.push_back(Told::ProtectionFailed(LinkLoss::Overloaded));
        self.close_link(LinkLoss::Local, base, env);
        base.rouse(env);
        true
    }

    /// The epoch shall end: pages are copied before the pause, or it comes at once.
    fn begin_end(&mut self, base: &mut Base, env: &mut Env) {
        let copied = self.parts.capture.precopy(&mut self.machine, &self.parts.arena);
        let early = copied.expect("the simulated dirty log can be read");
        let Doing::Epochs { session, phase, .. } = &mut self.doing else { return };
        match early {
            Some(early) => {
                *phase = Phase::Precopied(early);
                let (session, at) = (*session, env.now + env.rng.range(5_000, 2_000_000));
                self.wake_runner(at, session, base, env);
            }
            None => self.end_epoch(Afterwards::RunsOn, base, env),
        }
    }

    fn wait_for_room(&mut self, session: Session, base: &Base, env: &mut Env) {
        self.wake_runner(env.now + ROOM_INTERVAL, session, base, env);
    }

    /// The next piece of the base: disks until few blocks are left, memory, and what is left of the disks.
    fn copy_piece(&mut self, base: &mut Base, env: &mut Env) {
        let Doing::Copying { session, first, memory, disks, few } = &mut self.doing else { return };
        let (session, first) = (*session, *first);
        let Some(link) = self.link.as_mut().filter(|link| !link.closed && link.session == session) else {
            return self.fail("no link", base, env);
        };
        if let Some(disks) = disks.as_mut().filter(|_| memory.is_none() || *few) {
            if let Some(failure) = self.parts.disks.take_failure() {
                return self.fail(&failure.to_string(), base, env);
            }
            let Ok(step) = disks.next_step(&*self.parts.disks, *few) else {
                return self.fail("an image cannot be read", base, env);
            };
            let sent = match step {
                DiskStep::Ask(ask) => link.stream.hashes(&ask),
                DiskStep::Send(pieces) => pieces.iter().try_for_each(|piece| link.stream.disk_piece(piece)),
                DiskStep::Await => Ok(()),
                DiskStep::Few => {
                    let copy = BaseCopy::begin(&mut self.machine, self.parts.tracking, link.standing.warm_memory);
                    *memory = Some(copy.expect("the simulated dirty log can be switched on"));
                    Ok(())
                }
                DiskStep::End => {
                    self.parts.disks.cover(first);
                    return self.end_base(session, first, base, env);
                }
            };
            return self.sent_piece(sent.is_ok(), base, env);
        }
        let Some(copy) = memory else { return };
        if let Some(disks) = disks {
            disks.note_changes(&*self.parts.disks);
        }
        let step = copy.next_step(&mut self.machine).expect("the simulated dirty log can be read");
        let stage = |pages: &[PageNo]| base.arena.stage_pages(self.machine.ram(), pages).expect("pages of RAM");
        let sent = match step {
            BaseStep::Ask(pages) => link.stream.hashes(&hashes_of(&stage(&pages))),
            BaseStep::Send(pages) => link.stream.pages(&stage(&pages)),
            BaseStep::Await => Ok(()),
            BaseStep::End if disks.is_some() => {
                *few = true;
                Ok(())
            }
            BaseStep::End => return self.end_base(session, first, base, env),
        };
        self.sent_piece(sent.is_ok(), base, env);
    }

    fn sent_piece(&mut self, well: bool, base: &mut Base, env: &mut Env) {
        if !well {
            return self.fail("the stream is over", base, env);
        }
        self.transmit(env);
        self.schedule(base, env);
    }

    /// What is left goes with the checkpoint that ends the base.
    fn end_base(&mut self, session: Session, first: Epoch, base: &mut Base, env: &mut Env) {
        let Some((captured, waits)) = self.take(first, None, Afterwards::RunsOn, base, env) else {
            return self.fail("no checkpoint", base, env);
        };
        // The commit of a base is not waited for. A guest that has ended meanwhile cannot be resumed.
        if waits && self.machine.run().is_err() {
            return self.fail("the guest has ended", base, env);
        }
        let checkpoint = self.finished(captured, base, env);
        env.ghost.base_sealed(base.who, first.0);
        let Some(link) = &mut self.link else { return };
        let sent = link.stream.end(checkpoint);
        self.running_epoch = first.next();
        let now = base.local(env.now);
        let pacer = Box::new(Pacer::new(base.rules, EPOCHS_IN_FLIGHT, first, now));
        self.doing = Doing::Epochs { session, pacer, judged: now, phase: Phase::Running };
        self.sent_piece(sent.is_ok(), base, env);
    }

    pub(super) fn schedule(&mut self, base: &Base, env: &mut Env) {
        match &self.doing {
            Doing::Copying { session, .. } => {
                let (session, at) = (*session, env.now + env.rng.range(100_000, 2_000_000));
                self.wake_runner(at, session, base, env);
            }
            // It asks the pacer as soon as it can.
            Doing::Epochs { session, .. } => {
                let (session, at) = (*session, env.now + env.rng.range(1_000, 20_000));
                self.wake_runner(at, session, base, env);
            }
            Doing::Nothing | Doing::Stopped | Doing::HandedOver => {}
        }
    }

    /// The real checkpoint, steps 2 to 7, and whether the guest waits for its commit.
    fn take(
        &mut self,
        epoch: Epoch,
        early: Option<Precopied>,
        afterwards: Afterwards,
        base: &Base,
        env: &mut Env,
    ) -> Option<(Captured, bool)> {
        if let Some(failure) = self.parts.disks.take_failure() {
            env.note(|| format!("{}: {failure}", base.me));
            return None;
        }
        let (captured, pause) = stage(&mut self.machine, &self.parts, early, epoch, afterwards).ok()?;
        let waits = pause.waits();
        pause.keep_waiting();
        env.ghost.sealed(base.who, epoch.0, &mut self.machine);
        Some((captured, waits))
    }

    /// What is left of a checkpoint is copied.
    fn finished(&self, captured: Captured, base: &Base, env: &mut Env) -> StagedCheckpoint {
        let staged = captured.finish(&self.parts).expect("pages of RAM");
        let (bytes, _) = base.gate.held();
        if bytes > 1 << 20 || base.arena.in_flight() > 64 << 20 {
            env.ghost.broken("G7", format!("{bytes} bytes held, {} staged", base.arena.in_flight()));
        }
        staged
    }

    pub(super) fn end_epoch(&mut self, afterwards: Afterwards, base: &mut Base, env: &mut Env) {
        let Doing::Epochs { session, .. } = &self.doing else { return };
        let session = *session;
        match self.has_room() {
            None => return self.fail("no link", base, env),
            Some(false) if afterwards == Afterwards::RunsOn => {
                env.ghost.broken("G7", "the pacer ends an epoch without room for its checkpoint".into());
                return self.wait_for_room(session, base, env);
            }
            Some(_) => {}
        }
        if self.stopped {
            // The guest ended by itself; its link stays until the record says so.
            self.does(Doing::Stopped);
            return;
        }
        let bell = base.gate.bell();
        let (waited_since, outputs) = (bell.waits_since(), bell.outputs());
        let epoch = self.last.next();
        self.last = epoch;
        self.running_epoch = epoch.next();
        let Doing::Epochs { phase, .. } = &mut self.doing else { return };
        let early = match std::mem::replace(phase, Phase::Running) {
            Phase::Precopied(early) => Some(early),
            _ => None,
        };
        let Some((captured, waits)) = self.take(epoch, early, afterwards, base, env) else {
            return self.fail("no checkpoint", base, env);
        };
        let taking = Taking { epoch, began: base.local(env.now), waited_since, outputs, afterwards, waits };
        if self.machine.watch().is_watching() {
            if let Doing::Epochs { phase, .. } = &mut self.doing {
                *phase = Phase::Copying(captured, taking);
            }
            return self.copies_on(session, base, env);
        }
        self.send(captured, taking, base, env);
    }

    fn copies_on(&mut self, session: Session, base: &Base, env: &mut Env) {
        let at = env.now + env.rng.range(1_000, 300_000);
        self.wake_runner(at, session, base, env);
    }

    /// The copier's next step; at the end the checkpoint is sent.
    fn copy_protected(&mut self, session: Session, base: &mut Base, env: &mut Env) {
        let most = usize::try_from(env.rng.range(1, 12)).expect("few pages");
        if self.machine.watch().step(self.machine.ram(), most) {
            return self.copies_on(session, base, env);
        }
        self.finish_copying(base, env);
    }

    /// What is protected is copied now, and sent.
    pub(super) fn finish_copying(&mut self, base: &mut Base, env: &mut Env) {
        let Doing::Epochs { phase, .. } = &mut self.doing else { return };
        match std::mem::replace(phase, Phase::Running) {
            Phase::Copying(captured, taking) => self.send(captured, taking, base, env),
            other => *phase = other,
        }
    }

    fn send(&mut self, captured: Captured, taking: Taking, base: &mut Base, env: &mut Env) {
        let checkpoint = self.finished(captured, base, env);
        if let Doing::Epochs { phase, .. } = &mut self.doing
            && taking.waits
        {
            *phase = Phase::Waiting(taking);
        }
        let link = self.link.as_mut().filter(|link| !link.closed);
        if !matches!(link.map(|link| link.stream.checkpoint(checkpoint)), Some(Ok(()))) {
            return self.fail("the stream is over", base, env);
        }
        self.transmit(env);
        if taking.afterwards == Afterwards::StaysStopped {
            self.stopped = true;
            self.does(Doing::HandedOver);
            self.inbox.push_back(Told::FinalSent(taking.epoch));
            return base.rouse(env);
        }
        if let Doing::Epochs { session, phase: Phase::Waiting(_), .. } = &self.doing {
            let session = *session;
            return self.wake_runner(env.now + HOLD_INTERVAL, session, base, env);
        }
        self.ran_on(taking, base, env);
    }

    /// The guest runs on after a checkpoint.
    fn ran_on(&mut self, taking: Taking, base: &Base, env: &mut Env) {
        let Taking { epoch, began, waited_since, outputs, waits, .. } = taking;
        if let Doing::Epochs { pacer, .. } = &mut self.doing {
            let (now, ran) = (base.local(env.now), Some(self.machine.ran()));
            let pause = if waits { (now - began).max(PAUSE) } else { PAUSE };
            pacer.ended(&Taken { epoch, began, pause, waited_since, outputs, ran }, now);
        }
        self.schedule(base, env);
    }
}
