//! The thread that has the disks while this side waits: [`Turn`] behind a channel, and a clock.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use primary::disk::recover::Recoverable;
use primary::disk::{DirtyMap, Journal};
use primary::link::receive_within;
use vmm::disk::Disk;

use super::turn::{Command, SinkEvent, Turn};
use super::worker::{Retire, SinkError, Worker};

/// Commands that wait before whoever sends them waits too.
const WAITING_MAX: usize = 64;

/// Something that reads the images.
type Look = Box<dyn FnOnce(&[Arc<dyn Disk>]) + Send>;

enum Task {
    Obey(Command),
    Look(Look),
    LookWhole(Look),
    Settle(Sender<()>),
    Finish(Sender<Result<Retire, SinkError>>),
    FinishForBoot(Sender<Result<Option<Retire>, SinkError>>),
}

/// See the module. It ends when this is dropped.
pub struct DiskSink {
    tell: Option<Sender<Task>>,
    thread: Option<JoinHandle<()>>,
    images: Vec<Arc<dyn Disk>>,
    maps: Vec<Arc<DirtyMap>>,
}

impl DiskSink {
    /// Takes images, maps and journal as [`primary::disk::recover`] left them; hollow until [`Command::Based`]. Over `limit` bytes the journal
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
        let turn = Turn::new(Worker::new(disks, journal, limit));
        let thread = std::thread::Builder::new().name("disk-sink".into()).spawn(move || run(turn, &commands, tell))?;
        Ok(Self { tell: Some(send), thread: Some(thread), images, maps })
    }

    fn send(&self, task: Task) {
        if let Some(tell) = &self.tell {
            // The thread ends by a defect of ours only; whoever waits for its answer notices.
            tell.send(task).ok();
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

    /// Orders something; whoever orders too much waits. What comes of it is told.
    pub fn order(&self, command: Command) {
        self.send(Task::Obey(command));
    }

    /// [`Command::Hurry`], without waiting.
    pub fn hurry(&self) {
        if let Some(tell) = &self.tell {
            // It never waits: who calls decides who runs. A thread with so much to do has no leisure.
            tell.try_send(Task::Obey(Command::Hurry)).ok();
        }
    }

    /// Looks at the images as they are, after everything that was said before is carried out, but for what the flow orders later.
    pub fn look(&self, work: impl FnOnce(&[Arc<dyn Disk>]) + Send + 'static) {
        self.send(Task::Look(Box::new(work)));
    }

    /// Looks at the images once everything that was committed before is in them.
    pub fn look_whole(&self, work: impl FnOnce(&[Arc<dyn Disk>]) + Send + 'static) {
        self.send(Task::LookWhole(Box::new(work)));
    }

    /// Waits until everything that was said before is carried out, but for what the flow orders later.
    pub fn settle(&self) {
        let (tell, told) = bounded(1);
        self.send(Task::Settle(tell));
        told.recv().ok();
    }

    /// The guest is going to be booted anew ([`Worker::finish_for_boot`]). Waits for it.
    ///
    /// # Errors
    /// See [`SinkError`]: it must not run.
    pub fn finish_for_boot(self) -> Result<Option<Retire>, SinkError> {
        let (tell, told) = bounded(1);
        self.send(Task::FinishForBoot(tell));
        told.recv().unwrap_or(Err(SinkError::Unusable))
    }

    /// The standby is going to run ([`Worker::finish`]). Waits for it.
    ///
    /// # Errors
    /// See [`SinkError`]: it must not run.
    pub fn finish(self) -> Result<Retire, SinkError> {
        let (tell, told) = bounded(1);
        self.send(Task::Finish(tell));
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

fn run(mut turn: Turn, tasks: &Receiver<Task>, mut tell: impl FnMut(SinkEvent)) {
    const IDLE: Duration = Duration::from_secs(3600);
    let begun = Instant::now();
    loop {
        match receive_within(tasks, turn.patience(begun.elapsed()).unwrap_or(IDLE)) {
            Ok(Task::Obey(command)) => turn.obey(command, begun.elapsed(), &mut tell),
            Ok(Task::Look(work)) => {
                turn.images().map(work);
            }
            Ok(Task::LookWhole(work)) => {
                turn.drain(&mut tell);
                turn.images().map(work);
            }
            Ok(Task::Settle(answer)) => drop(answer.send(())),
            Ok(Task::Finish(answer)) => return drop(answer.send(turn.finish())),
            Ok(Task::FinishForBoot(answer)) => return drop(answer.send(turn.finish_for_boot())),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        turn.step(begun.elapsed(), &mut tell);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, RecvTimeoutError};

    use crate::disk::testing::{Fault, LossyStorage};
    use crate::disk::turn::tests::{Files, LIMIT, byte, change, files, point};
    use primary::disk::DiskChanges;

    use super::*;

    struct Rig {
        disk: Arc<LossyStorage>,
        sink: DiskSink,
        told: mpsc::Receiver<SinkEvent>,
    }

    fn rig() -> Rig {
        let Files { disk, journal: _, disks, opened } = files();
        let (tell, told) = mpsc::channel();
        let sink = DiskSink::start(disks, opened, LIMIT, move |event| drop(tell.send(event))).unwrap();
        Rig { disk, sink, told }
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
    }

    #[test]
    fn a_base_epochs_and_an_activation() {
        let rig = rig();
        rig.sink.order(Command::Hollow);
        rig.sink.order(Command::Put(change(1, false).changes[0].clone()));
        rig.sink.settle();
        assert_eq!(
            (byte(&rig.disk), rig.sink.maps()[0].dirty().count()),
            (1, 0),
            "nothing is known, so no bit is needed"
        );
        rig.sink.order(Command::Based(point(3)));
        assert_eq!(rig.until(|_| true), SinkEvent::Based(point(3)));
        rig.sink.order(Command::Hollow);
        rig.sink.order(Command::Put(change(1, false).changes[0].clone()));
        rig.sink.settle();
        assert_eq!(rig.sink.maps()[0].dirty().count(), 2);
        rig.sink.order(Command::Based(point(4)));
        assert_eq!(rig.until(|_| true), SinkEvent::Based(point(4)));
        rig.sink.order(Command::Commit(point(5), change(2, false)));
        let quick = rig.until(|_| true);
        assert_eq!(quick, SinkEvent::Progress { ackable: point(5), durable: point(4), applied: 0 });
        rig.sink.order(Command::Commit(point(6), change(3, true)));
        rig.sink.order(Command::Commit(point(7), DiskChanges::default()));
        let flushed = rig.until(|e| matches!(e, SinkEvent::Progress { ackable, .. } if *ackable == point(7)));
        assert!(matches!(flushed, SinkEvent::Progress { durable, .. } if durable == point(6)), "{flushed:?}");
        rig.until(|event| matches!(event, SinkEvent::Progress { applied, .. } if *applied > 0));
        rig.sink.order(Command::Commit(point(8), change(4, false)));
        rig.sink.hurry();
        let maps = rig.sink.maps().to_vec();
        let disk = Arc::clone(&rig.disk);
        let retire = rig.sink.finish().unwrap();
        assert_eq!(retire.point(), point(8));
        assert_eq!((byte(&disk), maps[0].base()), (4, Some(point(4))));
        retire.run().unwrap();
        assert_eq!((maps[0].base(), maps[0].dirty().count()), (Some(point(8)), 0));
    }

    #[test]
    fn nobody_looks_at_images_after_a_failure() {
        let rig = rig();
        rig.sink.order(Command::Based(point(9)));
        rig.sink.settle();
        rig.disk.set_fault(Some(Fault::WriteError));
        rig.sink.order(Command::Commit(point(10), change(7, false)));
        let (look, looked) = mpsc::channel();
        let whole = look.clone();
        rig.sink.look_whole(move |_| whole.send("whole").unwrap());
        rig.sink.look(move |_| look.send("as they are").unwrap());
        rig.until(|event| matches!(event, SinkEvent::Failed { lost: true, .. }));
        assert!(looked.recv().is_err(), "both were dropped");
        assert!(rig.sink.finish().is_err(), "it is hollow");
    }
}
