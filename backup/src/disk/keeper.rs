//! The way to the thread that keeps the standby's disks.

use crossbeam::channel::Sender;
use replication_proto::{CheckpointKind, DiskChange, DiskChanges, PieceHashes, Point};

use crate::intake::Question;

/// What the thread is asked to do, in this order.
#[expect(dead_code, reason = "its thread comes with the journal")]
#[derive(Debug)]
pub(crate) enum Job {
    /// A base begins: the images may become a mixture until it is committed.
    BeginBase,
    /// A piece of a base that is not committed.
    Hollow(DiskChange),
    /// Which of these pieces differ from what the images hold now.
    Compare(Question, PieceHashes),
    /// The base is committed: the images are this state of the VM.
    CommitBase(Point, DiskChanges),
    /// An epoch is committed.
    Commit(Point, DiskChanges),
}

/// Hands what concerns disks to their thread. A machine without disks has none.
#[derive(Clone)]
pub struct DiskKeeper {
    jobs: Option<Sender<Job>>,
}

impl DiskKeeper {
    /// For a machine without disks.
    pub fn none() -> Self {
        Self { jobs: None }
    }

    #[expect(dead_code, reason = "its thread comes with the journal")]
    pub(crate) fn new(jobs: Sender<Job>) -> Self {
        Self { jobs: Some(jobs) }
    }

    /// A base begins.
    pub fn begin_base(&self) {
        self.send(Job::BeginBase);
    }

    /// A piece of a base that is not committed.
    pub fn apply_hollow(&self, change: DiskChange) {
        self.send(Job::Hollow(change));
    }

    /// Which of these pieces differ, after all that was handed over before.
    pub fn compare(&self, question: Question, ask: PieceHashes) {
        self.send(Job::Compare(question, ask));
    }

    /// A checkpoint is committed.
    pub fn apply(&self, point: Point, kind: CheckpointKind, changes: DiskChanges) {
        match kind {
            CheckpointKind::Base => self.send(Job::CommitBase(point, changes)),
            CheckpointKind::Delta if changes.is_empty() => {}
            CheckpointKind::Delta => self.send(Job::Commit(point, changes)),
        }
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            assert!(jobs.send(job).is_ok(), "the disks' thread ends only after its last sender");
        }
    }
}
