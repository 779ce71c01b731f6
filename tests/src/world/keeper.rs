//! The disks of the side that waits, in a simulated world: the real turn of their thread, and in place of its channel this.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use backup::disk::keeper::{answer, news_of, standing};
use backup::disk::{Command, Retire, SinkError, SinkEvent, Turn, Worker};
use backup::intake::{News, Question};
use primary::disk::recover::Recoverable;
use primary::disk::{DirtyMap, DiskChange, DiskChanges, Journal, Point};
use replication_proto::{CheckpointKind, DiskStanding, PieceHashes};

enum Task {
    Obey(Command),
    Look(Question, PieceHashes),
}

/// What the disks' thread says.
pub enum Told {
    /// To whoever watches: the synchronisation is on stable storage, and the image holds exactly this point.
    Based(Point),
    /// To the connection.
    News(News),
}

/// See the module.
pub struct Keeper {
    turn: Turn,
    maps: Vec<Arc<DirtyMap>>,
    queue: VecDeque<Task>,
}

impl Keeper {
    /// Takes what recovery left. Over `limit` bytes the journal starts anew.
    pub fn new(disks: Vec<Recoverable>, journal: Journal, limit: u64) -> Self {
        let maps = disks.iter().map(|disk| Arc::clone(&disk.map)).collect();
        Self { turn: Turn::new(Worker::new(disks, journal, limit)), maps, queue: VecDeque::new() }
    }

    /// What the images hold, as it is said in a greeting.
    pub fn standing(&self) -> Vec<DiskStanding> {
        standing(&self.maps)
    }

    /// The peer is silent, or its connection is gone.
    pub fn hurry(&mut self) {
        self.queue.push_back(Task::Obey(Command::Hurry));
    }

    /// A base begins.
    pub fn begin_base(&mut self) {
        self.queue.push_back(Task::Obey(Command::Hollow));
    }

    /// A piece of a base that is not committed.
    pub fn apply_hollow(&mut self, change: DiskChange) {
        self.queue.push_back(Task::Obey(Command::Put(change)));
    }

    /// Which of these pieces differ.
    pub fn compare(&mut self, question: Question, ask: PieceHashes) {
        self.queue.push_back(Task::Look(question, ask));
    }

    /// A checkpoint is committed.
    pub fn apply(&mut self, point: Point, kind: CheckpointKind, changes: DiskChanges) {
        self.queue.push_back(Task::Obey(Command::committed(point, kind, changes)));
    }

    /// How long its thread sleeps now; `None`: until it is told something.
    pub fn patience(&self, now: Duration) -> Option<Duration> {
        if self.queue.is_empty() { self.turn.patience(now) } else { Some(Duration::ZERO) }
    }

    /// The thread's next command and next step.
    pub fn turn(&mut self, now: Duration, told: &mut Vec<Told>) {
        let task = self.queue.pop_front();
        if let Some(Task::Look(question, ask)) = &task
            && let Some(images) = self.turn.images()
        {
            told.push(Told::News(answer(images, *question, ask)));
        }
        let mut tell = |event| {
            if let SinkEvent::Based(point) = event {
                told.push(Told::Based(point));
            }
            told.extend(news_of(event).map(Told::News));
        };
        if let Some(Task::Obey(command)) = task {
            self.turn.obey(command, now, &mut tell);
        }
        self.turn.step(now, &mut tell);
    }

    /// The standby is going to run: what was said is carried out, and everything that is committed goes into the image.
    ///
    /// # Errors
    /// It must not run.
    pub fn finish(mut self, now: Duration) -> Result<Retire, SinkError> {
        self.settle(now);
        self.turn.finish()
    }

    /// The guest is going to be booted anew.
    ///
    /// # Errors
    /// It must not be.
    pub fn finish_for_boot(mut self, now: Duration) -> Result<Option<Retire>, SinkError> {
        self.settle(now);
        self.turn.finish_for_boot()
    }

    fn settle(&mut self, now: Duration) {
        let mut told = Vec::new();
        while !self.queue.is_empty() {
            self.turn(now, &mut told);
        }
    }
}
