//! The thread that has the disks while this side waits. Commands are carried out in order; between them, what the flow orders.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use primary::disk::recover::Recoverable;
use primary::disk::{DirtyMap, DiskChange, DiskChanges, Journal, Point};
use primary::link::receive_within;
use vmm::disk::Disk;

use super::worker::{Retire, SinkError, Worker};

/// Commands that wait before whoever sends them waits too.
const WAITING_MAX: usize = 64;

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

/// Something that reads the images.
type Look = Box<dyn FnOnce(&[Arc<dyn Disk>]) + Send>;

enum Command {
    Hollow,
    Put(DiskChange),
    Based(Point),
    Commit(Point, DiskChanges),
    Hurry,
    Look(Look),
    LookWhole(Look),
    Settle(Sender<()>),
    Finish(Sender<Result<Retire, SinkError>>),
    FinishForBoot(Sender<Result<Option<Retire>, SinkError>>),
}

/// See the module. It ends when this is dropped.
pub struct DiskSink {
    tell: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
    images: Vec<Arc<dyn Disk>>,
    maps: Vec<Arc<DirtyMap>>,
}

impl DiskSink {
    /// Takes images, maps and journal as [`primary::disk::recover`] left them; hollow until [`Self::based`]. Over `limit` bytes the journal
    /// starts anew. `tell` is called on the sink's thread.
    ///
    /// # Errors
    /// The thread does not start.
    pub fn start(
        disks: Vec<Recoverable>,
        journal: Journal,
        limit: u64,
        tell: impl FnMut(SinkEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let images = disks.iter().map(|disk| Arc::clone(&disk.image)).collect();
        let maps = disks.iter().map(|disk| Arc::clone(&disk.map)).collect();
        let (send, commands) = bounded(WAITING_MAX);
        let turn =
            Turn { worker: Worker::new(disks, journal, limit), tell, failed: false, said: None, begun: Instant::now() };
        let thread = std::thread::Builder::new().name("disk-sink".into()).spawn(move || turn.run(&commands))?;
        Ok(Self { tell: Some(send), thread: Some(thread), images, maps })
    }

    fn send(&self, command: Command) {
        if let Some(tell) = &self.tell {
            // The thread ends by a defect of ours only; whoever waits for its answer notices.
            tell.send(command).ok();
        }
    }

    /// The images, for reading; [`Self::settle`] before.
    pub fn images(&self) -> &[Arc<dyn Disk>] {
        &self.images
    }

    /// The maps: what the images hold, to be said in a greeting.
    pub fn maps(&self) -> &[Arc<DirtyMap>] {
        &self.maps
    }

    /// A synchronisation begins ([`Worker::hollow`]).
    pub fn hollow(&self) {
        self.send(Command::Hollow);
    }

    /// While hollow: a change ([`Worker::put`]).
    pub fn put(&self, change: DiskChange) {
        self.send(Command::Put(change));
    }

    /// The synchronisation is committed ([`Worker::based`]); [`SinkEvent::Based`] answers.
    pub fn based(&self, point: Point) {
        self.send(Command::Based(point));
    }

    /// An epoch is committed, with or without changes of disks ([`Worker::commit`]).
    pub fn commit(&self, point: Point, changes: DiskChanges) {
        self.send(Command::Commit(point, changes));
    }

    /// The peer is silent ([`Worker::hurry`]).
    pub fn hurry(&self) {
        if let Some(tell) = &self.tell {
            // It never waits: who calls decides who runs. A thread with so much to do has no leisure.
            tell.try_send(Command::Hurry).ok();
        }
    }

    /// Looks at the images as they are, after everything that was said before is carried out, but for what the flow orders later.
    pub fn look(&self, work: impl FnOnce(&[Arc<dyn Disk>]) + Send + 'static) {
        self.send(Command::Look(Box::new(work)));
    }

    /// Looks at the images once everything that was committed before is in them.
    pub fn look_whole(&self, work: impl FnOnce(&[Arc<dyn Disk>]) + Send + 'static) {
        self.send(Command::LookWhole(Box::new(work)));
    }

    /// Waits until everything that was said before is carried out, but for what the flow orders later.
    pub fn settle(&self) {
        let (tell, told) = bounded(1);
        self.send(Command::Settle(tell));
        told.recv().ok();
    }

    /// The guest is going to be booted anew ([`Worker::finish_for_boot`]). Waits for it.
    ///
    /// # Errors
    /// See [`SinkError`]: it must not run.
    pub fn finish_for_boot(self) -> Result<Option<Retire>, SinkError> {
        let (tell, told) = bounded(1);
        self.send(Command::FinishForBoot(tell));
        told.recv().unwrap_or(Err(SinkError::Unusable))
    }

    /// The standby is going to run ([`Worker::finish`]). Waits for it.
    ///
    /// # Errors
    /// See [`SinkError`]: it must not run.
    pub fn finish(self) -> Result<Retire, SinkError> {
        let (tell, told) = bounded(1);
        self.send(Command::Finish(tell));
        told.recv().unwrap_or(Err(SinkError::Unusable))
    }
}

impl Drop for DiskSink {
    fn drop(&mut self) {
        self.tell = None;
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

struct Turn<T> {
    worker: Worker,
    tell: T,
    failed: bool,
    said: Option<(Point, Point)>,
    begun: Instant,
}

impl<T: FnMut(SinkEvent)> Turn<T> {
    fn run(mut self, commands: &Receiver<Command>) {
        loop {
            let command = match receive_within(commands, self.patience()) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let outcome = match command {
                Some(Command::Finish(answer)) => {
                    answer.send(self.worker.finish()).ok();
                    return;
                }
                Some(Command::FinishForBoot(answer)) => {
                    answer.send(self.worker.finish_for_boot()).ok();
                    return;
                }
                Some(Command::Settle(answer)) => {
                    answer.send(()).ok();
                    Ok(())
                }
                Some(command) => self.obey(command),
                None => Ok(()),
            };
            let outcome = outcome.and_then(|()| self.step());
            if let Err(error) = outcome {
                self.fail(&error);
            }
        }
    }

    /// Until when there is nothing to do.
    fn patience(&self) -> Duration {
        const IDLE: Duration = Duration::from_secs(3600);
        let now = self.begun.elapsed();
        match (self.failed, self.worker.flow().next(now), self.worker.flow().deadline()) {
            (true, ..) | (false, None, None) => IDLE,
            (false, Some(_), _) => Duration::ZERO,
            (false, None, Some(at)) => at.saturating_sub(now),
        }
    }

    fn obey(&mut self, command: Command) -> Result<(), SinkError> {
        let now = self.begun.elapsed();
        match command {
            // A new synchronisation begins anew, whatever failed before.
            Command::Hollow => {
                self.said = None;
                let waiting = self.worker.waiting_bytes();
                let begun = self.worker.hollow();
                // They count in the backlog until somebody says that they do not wait any more.
                let drained = waiting - self.worker.waiting_bytes();
                if drained > 0 {
                    self.progress(drained);
                }
                begun?;
                self.failed = false;
            }
            // The answer to everything until then was a failure.
            Command::Commit(_, changes) if self.failed => self.progress(changes.weight()),
            _ if self.failed => {}
            Command::Put(change) => self.worker.put(&change)?,
            Command::Based(point) => {
                self.worker.based(point)?;
                (self.tell)(SinkEvent::Based(point));
            }
            Command::Commit(point, changes) => {
                self.worker.commit(point, changes, now);
                self.progress(0);
            }
            Command::Hurry => self.worker.hurry(),
            Command::Look(work) => work(self.worker.images()),
            Command::LookWhole(work) => {
                self.worker.hurry();
                while self.worker.flow().next(Duration::MAX).is_some() {
                    match self.worker.step(Duration::MAX)? {
                        Some(applied) => self.progress(applied),
                        None => break,
                    }
                }
                work(self.worker.images());
            }
            Command::Settle(_) | Command::Finish(_) | Command::FinishForBoot(_) => unreachable!("answered by the loop"),
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), SinkError> {
        if self.failed {
            return Ok(());
        }
        if let Some(applied) = self.worker.step(self.begun.elapsed())? {
            self.progress(applied);
        }
        Ok(())
    }

    fn progress(&mut self, applied: usize) {
        let flow = self.worker.flow();
        let now = (Point { epoch: flow.ackable(), ..flow.committed() }, flow.durable());
        if applied > 0 || self.said != Some(now) {
            self.said = Some(now);
            let (ackable, durable) = now;
            (self.tell)(SinkEvent::Progress { ackable, durable, applied });
        }
    }

    fn fail(&mut self, error: &SinkError) {
        log::warn!("{error}");
        self.failed = true;
        (self.tell)(SinkEvent::Failed { why: error.to_string(), lost: self.worker.is_lost() });
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::mpsc::{self, RecvTimeoutError};

    use crate::disk::testing::{Fault, LossyStorage, Power};
    use primary::disk::{DiskContent, DiskIdentity, Epoch, Generation, recover};
    use replication_proto::{Incarnation, VmId};
    use vmm::disk::{DiskImage, Storage};

    use super::*;

    struct Rig {
        disk: Arc<LossyStorage>,
        journal: Arc<LossyStorage>,
        sink: DiskSink,
        told: mpsc::Receiver<SinkEvent>,
    }

    fn rig() -> Rig {
        let power = Power::new(1);
        let (disk, map, journal) = (power.storage(1 << 20, false), power.storage(0, false), power.storage(0, false));
        let storage: Arc<dyn Storage> = Arc::clone(&disk) as _;
        let image: Arc<dyn Disk> = Arc::new(DiskImage::over(storage, Path::new("a.img"), None, false).unwrap());
        let identity = DiskIdentity { vm: VmId(7), name: "data".into(), bytes: 1 << 20 };
        let map = DirtyMap::open_or_create(map, Arc::clone(&image), identity, Incarnation(1)).unwrap();
        let disks = vec![Recoverable { image, map: Arc::new(map) }];
        let file = PathBuf::from("journal");
        let mut opened = Journal::open_or_create(Arc::clone(&journal) as _, file, VmId(7), 5).unwrap();
        recover(&disks, &mut opened, 1 << 20).unwrap();
        let (tell, told) = mpsc::channel();
        let sink = DiskSink::start(disks, opened, 1 << 20, move |event| drop(tell.send(event))).unwrap();
        Rig { disk, journal, sink, told }
    }

    fn point(epoch: u64) -> Point {
        Point { generation: Generation(1), epoch: Epoch(epoch) }
    }

    fn change(fill: u8, flushed: bool) -> DiskChanges {
        let content = DiskContent::Bytes(vec![fill; 512].into());
        DiskChanges { changes: vec![DiskChange { disk: 0, offset: 1024, content }], flushed }
    }

    impl Rig {
        /// Events until one that `is` accepts.
        fn until(&self, is: impl Fn(&SinkEvent) -> bool) -> SinkEvent {
            loop {
                match self.told.recv_timeout(Duration::from_secs(30)) {
                    Ok(event) if is(&event) => return event,
                    Ok(_) => {}
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => panic!("it never said so"),
                }
            }
        }

        fn byte(&self) -> u8 {
            let mut byte = [9];
            self.disk.read_at(1024, &mut byte).unwrap();
            byte[0]
        }
    }

    #[test]
    fn a_base_epochs_and_an_activation() {
        let rig = rig();
        rig.sink.hollow();
        rig.sink.put(change(1, false).changes[0].clone());
        rig.sink.settle();
        assert_eq!((rig.byte(), rig.sink.maps()[0].dirty().count()), (1, 0), "nothing is known, so no bit is needed");
        rig.sink.based(point(3));
        assert_eq!(rig.until(|_| true), SinkEvent::Based(point(3)));
        rig.sink.hollow();
        rig.sink.put(change(1, false).changes[0].clone());
        rig.sink.settle();
        assert_eq!(rig.sink.maps()[0].dirty().count(), 2);
        rig.sink.based(point(4));
        assert_eq!(rig.until(|_| true), SinkEvent::Based(point(4)));
        rig.sink.commit(point(5), change(2, false));
        let quick = rig.until(|_| true);
        assert_eq!(quick, SinkEvent::Progress { ackable: point(5), durable: point(4), applied: 0 });
        rig.sink.commit(point(6), change(3, true));
        rig.sink.commit(point(7), DiskChanges::default());
        let flushed = rig.until(|e| matches!(e, SinkEvent::Progress { ackable, .. } if *ackable == point(7)));
        assert!(matches!(flushed, SinkEvent::Progress { durable, .. } if durable == point(6)), "{flushed:?}");
        rig.until(|event| matches!(event, SinkEvent::Progress { applied, .. } if *applied > 0));
        rig.sink.commit(point(8), change(4, false));
        rig.sink.hurry();
        let maps = rig.sink.maps().to_vec();
        let disk = Arc::clone(&rig.disk);
        let retire = rig.sink.finish().unwrap();
        assert_eq!(retire.point(), point(8));
        let mut byte = [0];
        disk.read_at(1024, &mut byte).unwrap();
        assert_eq!((byte, maps[0].base()), ([4], Some(point(4))));
        retire.run().unwrap();
        assert_eq!((maps[0].base(), maps[0].dirty().count()), (Some(point(8)), 0));
    }

    #[test]
    fn a_failure_is_told_once_and_a_new_synchronisation_begins_anew() {
        let rig = rig();
        rig.sink.based(point(4));
        rig.sink.settle();
        rig.journal.set_fault(Some(Fault::Full));
        rig.sink.commit(point(5), change(1, true));
        let SinkEvent::Failed { why, lost } = rig.until(|event| matches!(event, SinkEvent::Failed { .. })) else {
            panic!()
        };
        assert!(why.contains("the journal journal: it cannot be written: No space left") && !lost, "{why}");
        rig.sink.commit(point(6), change(2, true));
        rig.sink.settle();
        rig.journal.set_fault(None);
        rig.sink.hollow();
        rig.sink.based(point(9));
        // Nothing between: what came after the failure was not looked at.
        assert_eq!(rig.until(|event| !matches!(event, SinkEvent::Progress { .. })), SinkEvent::Based(point(9)));
        rig.disk.set_fault(Some(Fault::WriteError));
        rig.sink.commit(point(10), change(7, true));
        let SinkEvent::Failed { why, lost } = rig.until(|event| matches!(event, SinkEvent::Failed { .. })) else {
            panic!()
        };
        assert!(why.starts_with("disk 0: a committed change cannot be applied") && lost, "{why}");
        let maps = rig.sink.maps().to_vec();
        assert!(rig.sink.finish().is_err(), "it is hollow");
        assert_eq!(maps[0].base(), Some(point(9)));
    }

    #[test]
    fn what_a_synchronisation_drains_does_not_wait_any_more() {
        let rig = rig();
        rig.sink.based(point(1));
        rig.sink.commit(point(2), change(1, false));
        rig.sink.hollow();
        let weight = change(1, false).weight();
        let event = rig.until(|event| matches!(event, SinkEvent::Progress { applied, .. } if *applied > 0));
        assert!(matches!(event, SinkEvent::Progress { applied, .. } if applied == weight), "{event:?}");
        rig.sink.settle();
        assert_eq!(rig.byte(), 1);
    }

    #[test]
    fn a_lost_change_makes_the_maps_know_nothing_when_it_goes_on() {
        let rig = rig();
        rig.sink.based(point(1));
        rig.sink.settle();
        rig.disk.set_fault(Some(Fault::WriteError));
        rig.sink.commit(point(2), change(1, true));
        rig.until(|event| matches!(event, SinkEvent::Failed { lost: true, .. }));
        rig.disk.set_fault(None);
        rig.sink.hollow();
        rig.sink.settle();
        assert_eq!(rig.sink.maps()[0].base(), None);
        rig.sink.based(point(7));
        rig.until(|event| *event == SinkEvent::Based(point(7)));
    }
}
