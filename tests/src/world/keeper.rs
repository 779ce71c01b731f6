//! The disks of the side that waits, in a simulated world: the real worker, and in place of its thread this.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use backup::disk::keeper::compare;
use backup::disk::{Retire, SinkError, Worker};
use backup::intake::Question;
use primary::disk::recover::Recoverable;
use primary::disk::{DirtyMap, DiskChange, DiskChanges, Journal, Point};
use replication_proto::limits::MAX_DIRTY_BYTES;
use replication_proto::{CheckpointKind, DiskStanding, PieceHashes, PiecesWanted};

enum Command {
    Hollow,
    Put(DiskChange),
    Based(Point, usize),
    Commit(Point, DiskChanges),
    Look(Question, PieceHashes),
}

/// What the disks' thread says.
pub enum News {
    /// The synchronisation is on stable storage: the image holds exactly this point.
    Based(Point),
    /// So many committed bytes are in the image.
    Applied(usize),
    /// The answer to a question.
    Compared(Question, PiecesWanted),
    /// What may be acknowledged, and what a power cut leaves.
    Stable(Point, Point),
    /// Nothing more is acknowledged; whether something committed is lost.
    Failed(String, bool),
}

/// See the module. It does what `backup::disk::sink` and `backup::disk::keeper` do, in the same order.
pub struct Keeper {
    worker: Worker,
    maps: Vec<Arc<DirtyMap>>,
    queue: VecDeque<Command>,
    failed: bool,
    said: Option<(Point, Point)>,
}

impl Keeper {
    /// Takes what recovery left. Over `limit` bytes the journal starts anew.
    pub fn new(disks: Vec<Recoverable>, journal: Journal, limit: u64) -> Self {
        let maps = disks.iter().map(|disk| Arc::clone(&disk.map)).collect();
        let worker = Worker::new(disks, journal, limit);
        Self { worker, maps, queue: VecDeque::new(), failed: false, said: None }
    }

    /// What the images hold, as it is said in a greeting.
    pub fn standing(&self) -> Vec<DiskStanding> {
        let standing = |map: &Arc<DirtyMap>| DiskStanding {
            base: map.base(),
            was_owner: map.has_run(),
            dirty: map.dirty().encode_within(MAX_DIRTY_BYTES).into(),
        };
        self.maps.iter().map(standing).collect()
    }

    /// A base begins.
    pub fn begin_base(&mut self) {
        self.queue.push_back(Command::Hollow);
    }

    /// A piece of a base that is not committed.
    pub fn apply_hollow(&mut self, change: DiskChange) {
        self.queue.push_back(Command::Put(change));
    }

    /// Which of these pieces differ.
    pub fn compare(&mut self, question: Question, ask: PieceHashes) {
        self.queue.push_back(Command::Look(question, ask));
    }

    /// A checkpoint is committed.
    pub fn apply(&mut self, point: Point, kind: CheckpointKind, changes: DiskChanges) {
        match kind {
            CheckpointKind::Base => {
                let weight = changes.weight();
                self.queue.extend(changes.changes.into_iter().map(Command::Put));
                self.queue.push_back(Command::Based(point, weight));
            }
            CheckpointKind::Delta => self.queue.push_back(Command::Commit(point, changes)),
        }
    }

    /// How long its thread sleeps now; `None`: until it is told something.
    pub fn patience(&self, now: Duration) -> Option<Duration> {
        if !self.queue.is_empty() || (!self.failed && self.worker.flow().next(now).is_some()) {
            return Some(Duration::ZERO);
        }
        let deadline = self.worker.flow().deadline().filter(|_| !self.failed);
        deadline.map(|at| at.saturating_sub(now))
    }

    /// The thread's next command and next step.
    pub fn turn(&mut self, now: Duration, news: &mut Vec<News>) {
        let command = self.queue.pop_front();
        let outcome = command.map_or(Ok(()), |command| self.obey(command, now, news));
        let outcome = outcome.and_then(|()| self.step(now, news));
        if let Err(error) = outcome {
            self.failed = true;
            news.push(News::Failed(error.to_string(), self.worker.is_lost()));
        }
    }

    fn obey(&mut self, command: Command, now: Duration, news: &mut Vec<News>) -> Result<(), SinkError> {
        match command {
            Command::Hollow => {
                self.said = None;
                let waiting = self.worker.waiting_bytes();
                let begun = self.worker.hollow();
                news.push(News::Applied(waiting - self.worker.waiting_bytes()));
                begun?;
                self.failed = false;
            }
            Command::Commit(_, changes) if self.failed => news.push(News::Applied(changes.weight())),
            Command::Based(_, weight) if self.failed => {
                news.push(News::Applied(weight));
            }
            _ if self.failed => {}
            Command::Put(change) => self.worker.put(&change)?,
            Command::Based(point, weight) => {
                news.push(News::Applied(weight));
                self.worker.based(point)?;
                news.push(News::Based(point));
                news.push(News::Stable(point, point));
            }
            Command::Commit(point, changes) => {
                self.worker.commit(point, changes, now);
                self.progress(0, news);
            }
            Command::Look(question, ask) => news.push(match compare(self.worker.images(), &ask) {
                Ok(answer) => News::Compared(question, answer),
                Err(error) => News::Failed(format!("an image cannot be read: {error}"), false),
            }),
        }
        Ok(())
    }

    fn step(&mut self, now: Duration, news: &mut Vec<News>) -> Result<(), SinkError> {
        if !self.failed
            && let Some(applied) = self.worker.step(now)?
        {
            self.progress(applied, news);
        }
        Ok(())
    }

    fn progress(&mut self, applied: usize, news: &mut Vec<News>) {
        let flow = self.worker.flow();
        let now = (Point { epoch: flow.ackable(), ..flow.committed() }, flow.durable());
        if applied > 0 || self.said != Some(now) {
            self.said = Some(now);
            news.push(News::Applied(applied));
            news.push(News::Stable(now.0, now.1));
        }
    }

    /// The standby is going to run: what was said is carried out, and everything that is committed goes into the image.
    ///
    /// # Errors
    /// It must not run.
    pub fn finish(mut self, now: Duration) -> Result<Retire, SinkError> {
        self.settle(now);
        self.worker.finish()
    }

    /// The guest is going to be booted anew.
    ///
    /// # Errors
    /// It must not be.
    pub fn finish_for_boot(mut self, now: Duration) -> Result<Option<Retire>, SinkError> {
        self.settle(now);
        self.worker.finish_for_boot()
    }

    fn settle(&mut self, now: Duration) {
        let mut news = Vec::new();
        while !self.queue.is_empty() {
            self.turn(now, &mut news);
        }
    }
}
