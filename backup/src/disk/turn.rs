//! What the disks' thread does: it carries out commands in order, and between them what the flow orders. No thread of its own, no channel, no
//! clock: [`super::sink`] is the thread around it, and the simulator and the explorer put their own time around it.

use std::sync::Arc;
use std::time::Duration;

use primary::disk::{DiskChange, DiskChanges, Point};
use replication_proto::CheckpointKind;
use vmm::disk::Disk;

use super::worker::{Retire, SinkError, Worker};

/// What it is told to do.
#[derive(Debug)]
pub enum Command {
    /// A synchronisation begins ([`Worker::hollow`]).
    Hollow,
    /// While hollow: a change ([`Worker::put`]).
    Put(DiskChange),
    /// The synchronisation is committed ([`Worker::based`]); [`SinkEvent::Based`] answers.
    Based(Point),
    /// An epoch is committed, with or without changes of disks ([`Worker::commit`]).
    Commit(Point, DiskChanges),
    /// The peer is silent ([`Worker::hurry`]).
    Hurry,
}

impl Command {
    /// What a committed checkpoint is to the disks.
    ///
    /// # Panics
    /// When a base comes with changes: those were put while hollow ([`crate::inbox::Inbox::disk`]).
    pub fn committed(point: Point, kind: CheckpointKind, changes: DiskChanges) -> Self {
        match kind {
            CheckpointKind::Base => {
                assert!(changes.changes.is_empty(), "an inbox keeps no change of a base");
                Self::Based(point)
            }
            CheckpointKind::Delta => Self::Commit(point, changes),
        }
    }
}

/// What the disks' thread says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SinkEvent {
    /// The synchronisation is on stable storage: the images hold exactly this point.
    Based(Point),
    /// Something went on.
    Progress {
        /// Through this epoch everything may be acknowledged, as far as disks are concerned.
        ackable: Point,
        /// What a power cut now would leave.
        durable: Point,
        /// Bytes of changes that have been applied since the last event: the backlog is less by these.
        applied: usize,
    },
    /// Nothing more is acknowledged until the next synchronisation.
    Failed {
        /// Which file, and what the host said.
        why: String,
        /// A committed change is lost: the standby is hollow.
        lost: bool,
    },
}

/// See the module. What comes of it is told to `tell`, in order; `now` is the time since any fixed moment.
pub struct Turn {
    worker: Worker,
    failed: bool,
    said: Option<(Point, Point)>,
}

impl Turn {
    /// With these disks; hollow until [`Command::Based`].
    pub fn new(worker: Worker) -> Self {
        Self { worker, failed: false, said: None }
    }

    /// Carries out a command. After a failure none is carried out until the next synchronisation begins, but what is committed meanwhile is kept where the
    /// disks still hold all that was committed before: the standby's memory has it, and both may have to run.
    pub fn obey(&mut self, command: Command, now: Duration, tell: &mut impl FnMut(SinkEvent)) {
        let outcome = match command {
            Command::Hollow => self.hollow(tell),
            Command::Commit(point, changes) if self.failed && self.worker.takes_commits() => {
                self.worker.commit(point, changes, now);
                Ok(())
            }
            // The answer to everything until then was a failure.
            Command::Commit(_, changes) if self.failed => {
                self.progress(changes.weight(), tell);
                Ok(())
            }
            _ if self.failed => Ok(()),
            Command::Put(change) => self.worker.put(&change),
            Command::Based(point) => self.worker.based(point).map(|()| tell(SinkEvent::Based(point))),
            Command::Commit(point, changes) => {
                self.worker.commit(point, changes, now);
                self.progress(0, tell);
                Ok(())
            }
            Command::Hurry => {
                self.worker.hurry();
                Ok(())
            }
        };
        self.conclude(outcome, tell);
    }

    /// A new synchronisation begins anew, whatever failed before.
    fn hollow(&mut self, tell: &mut impl FnMut(SinkEvent)) -> Result<(), SinkError> {
        self.said = None;
        let waiting = self.worker.waiting_bytes();
        let begun = self.worker.hollow();
        // They count in the backlog until somebody says that they do not wait any more.
        let drained = waiting - self.worker.waiting_bytes();
        if drained > 0 {
            self.progress(drained, tell);
        }
        begun?;
        self.failed = false;
        Ok(())
    }

    /// Does what the flow orders next, if anything is due.
    pub fn step(&mut self, now: Duration, tell: &mut impl FnMut(SinkEvent)) {
        self.step_once(now, tell);
    }

    /// Whether something was due and done.
    fn step_once(&mut self, now: Duration, tell: &mut impl FnMut(SinkEvent)) -> bool {
        if self.failed {
            return false;
        }
        match self.worker.step(now) {
            Ok(Some(applied)) => {
                self.progress(applied, tell);
                true
            }
            Ok(None) => false,
            Err(error) => {
                self.conclude(Err(error), tell);
                false
            }
        }
    }

    /// Everything that is committed goes into the images now.
    pub fn drain(&mut self, tell: &mut impl FnMut(SinkEvent)) {
        if !self.failed {
            self.worker.hurry();
        }
        while self.step_once(Duration::MAX, tell) {}
    }

    /// How long there is nothing to do but to wait for a command; `None`: for ever.
    pub fn patience(&self, now: Duration) -> Option<Duration> {
        let flow = self.worker.flow();
        match (self.failed, flow.next(now)) {
            (true, _) => None,
            (false, Some(_)) => Some(Duration::ZERO),
            (false, None) => flow.deadline().map(|at| at.saturating_sub(now)),
        }
    }

    /// The images as they are; `None` from a failure to the next synchronisation.
    pub fn images(&self) -> Option<&[Arc<dyn Disk>]> {
        (!self.failed).then(|| self.worker.images())
    }

    /// The standby is going to run ([`Worker::finish`]).
    ///
    /// # Errors
    /// See [`SinkError`]: it must not run.
    pub fn finish(self) -> Result<Retire, SinkError> {
        self.worker.finish()
    }

    /// The guest is going to be booted anew ([`Worker::finish_for_boot`]).
    ///
    /// # Errors
    /// See [`SinkError`]: it must not run.
    pub fn finish_for_boot(self) -> Result<Option<Retire>, SinkError> {
        self.worker.finish_for_boot()
    }

    fn progress(&mut self, applied: usize, tell: &mut impl FnMut(SinkEvent)) {
        let flow = self.worker.flow();
        let now = (Point { epoch: flow.ackable(), ..flow.committed() }, flow.durable());
        if applied > 0 || self.said != Some(now) {
            self.said = Some(now);
            let (ackable, durable) = now;
            tell(SinkEvent::Progress { ackable, durable, applied });
        }
    }

    fn conclude(&mut self, outcome: Result<(), SinkError>, tell: &mut impl FnMut(SinkEvent)) {
        if let Err(error) = outcome {
            log::warn!("{error}");
            self.failed = true;
            tell(SinkEvent::Failed { why: error.to_string(), lost: self.worker.is_lost() });
        }
    }
}

#[cfg(test)]
#[path = "turn_tests.rs"]
pub mod tests;
