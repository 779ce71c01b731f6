//! The thread that owns the machine: nothing else may run, pause or end it. It carries out one command after another and,
//! while protected, ends an epoch whenever the pacer says so. What happens meanwhile, an output or a commit, is told by a bell.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, TryRecvError, bounded, select, unbounded};
use failover::status::OverloadStatus;
use failover::{RunPermit, failpoint};
use replication_proto::{Epoch, Standing};
use vmm::machine::{DirtyError, PauseError, RunError};
use vmm::{Machine, PausedVm, Throttle, Tracking};

use crate::bulk;
use crate::capture::hold::await_commit;
use crate::clock::Clock;
use crate::contention::Vcpus;
use crate::epoch::{Afterwards, CheckpointError, EpochParts, checkpoint};
use crate::link::Link;
use crate::pacer::{Look, Next as Pace, Pacer, Rules, Slow, Taken, Turn};
use crate::silent::SilentTaps;

/// What the runner tells its owner.
#[derive(Debug)]
pub enum RunnerEvent {
    /// The base, which this epoch ends, has been handed to the link.
    BaseSent(Epoch),
    /// The last checkpoint of a planned switchover has been handed to the link; the guest is stopped.
    FinalSent {
        /// Its epoch.
        epoch: Epoch,
        /// When the guest began to be stopped.
        since: Duration,
    },
    /// Link or backup cannot keep up with the guest, or can again.
    Overload(Turn),
    /// Protection cannot go on; the runner has left it.
    ProtectionFailed(CheckpointError),
    /// The machine itself failed.
    MachineFailed(String),
}

enum Command {
    Run { permit: RunPermit, done: Sender<Result<(), RunError>> },
    Resume { done: Sender<Result<(), RunError>> },
    Protect { link: Link, first: Epoch, standing: Standing },
    Final,
    Unprotect { done: Sender<Epoch> },
    Pause { done: Sender<Result<(), PauseError>> },
    Freeze { done: Sender<Result<(), PauseError>> },
    ShutDown,
}

/// A handle on the runner's thread.
pub struct Runner {
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
    last_epoch: Arc<AtomicU64>,
}

/// The runner's thread is gone; it only ever ends on [`Runner::shut_down`] or by a bug.
#[derive(Debug, thiserror::Error)]
#[error("the machine's thread has ended")]
pub struct RunnerGone;

impl Runner {
    /// Starts the thread. `last`: the epoch that the machine's state came from, 0 after a boot. `tell` is called on the thread.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(
        machine: Box<dyn Machine>,
        parts: EpochParts,
        last: Epoch,
        rules: Rules,
        clock: Clock,
        tell: impl Fn(RunnerEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let (commands, inbox) = unbounded();
        let last_epoch = Arc::new(AtomicU64::new(last.0));
        let state = RunnerThread {
            machine,
            parts,
            rules,
            clock,
            tell: Box::new(tell),
            commands: inbox,
            last,
            shown: Arc::clone(&last_epoch),
            permit: None,
            stopped: true,
            late: None,
        };
        let thread = std::thread::Builder::new().name("ft-epoch".into()).spawn(move || state.idle())?;
        Ok(Self { commands, thread: Some(thread), last_epoch })
    }

    /// Runs the guest for the first time in this process. The runner keeps the permit until the guest is frozen.
    ///
    /// # Errors
    /// See [`RunError`].
    pub fn run(&self, permit: RunPermit) -> Result<(), RunError> {
        self.ask(|done| Command::Run { permit, done }).unwrap_or_else(|gone| Err(RunError::Ended(gone.to_string())))
    }

    /// Lets a guest that a switchover had stopped run on, under the permit that it had.
    ///
    /// # Errors
    /// See [`RunError`].
    pub fn resume(&self) -> Result<(), RunError> {
        self.ask(|done| Command::Resume { done }).unwrap_or_else(|gone| Err(RunError::Ended(gone.to_string())))
    }

    /// Copies the base over `link` to a backup of this standing, then ends one epoch after another. `first` is the base's epoch.
    pub fn protect(&self, link: Link, first: Epoch, standing: Standing) {
        self.commands.send(Command::Protect { link, first, standing }).ok();
    }

    /// Ends the running epoch with a checkpoint after which the guest stays stopped.
    pub fn final_checkpoint(&self) {
        self.commands.send(Command::Final).ok();
    }

    /// Leaves protection: when this returns, no epoch will be sealed any more. The link must have been closed before, so that the runner is
    /// not waiting for it. Returns the last epoch used.
    ///
    /// # Errors
    /// [`RunnerGone`].
    pub fn unprotect(&self) -> Result<Epoch, RunnerGone> {
        self.ask(|done| Command::Unprotect { done })
    }

    /// Stops the guest; it may be resumed. A link to the backup stays open, but no epoch is sealed any more.
    ///
    /// # Errors
    /// See [`PauseError`].
    pub fn pause(&self) -> Result<(), PauseError> {
        self.ask(|done| Command::Pause { done }).unwrap_or_else(|gone| Err(PauseError::Ended(gone.to_string())))
    }

    /// Stops the guest for good and keeps its memory (a fenced side). The permit is given up.
    ///
    /// # Errors
    /// See [`PauseError`].
    pub fn freeze(&self) -> Result<(), PauseError> {
        self.ask(|done| Command::Freeze { done }).unwrap_or_else(|gone| Err(PauseError::Ended(gone.to_string())))
    }

    /// The last epoch that was sealed, or begun to be.
    pub fn last_epoch(&self) -> Epoch {
        Epoch(self.last_epoch.load(Ordering::Relaxed))
    }

    /// Ends the machine and the thread.
    pub fn shut_down(mut self) {
        self.commands.send(Command::ShutDown).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, RunnerGone> {
        let (done, answer) = bounded(1);
        self.commands.send(command(done)).map_err(|_| RunnerGone)?;
        answer.recv().map_err(|_| RunnerGone)
    }
}

struct RunnerThread {
    machine: Box<dyn Machine>,
    parts: EpochParts,
    rules: Rules,
    clock: Clock,
    tell: Box<dyn Fn(RunnerEvent) + Send>,
    commands: Receiver<Command>,
    /// Last epoch sealed; numbers go on over sessions and are never used twice.
    last: Epoch,
    /// The same, for the status.
    shown: Arc<AtomicU64>,
    /// The right to run, while this side has it.
    permit: Option<RunPermit>,
    /// The guest does not run: not started yet, frozen, or stopped by the last checkpoint of a switchover.
    stopped: bool,
    /// Hears the frames that arrive after the last checkpoint of a switchover: they are told to the backup, as those before.
    late: Option<SilentTaps>,
}

/// How often the pacer looks whether link and backup keep up, and its figures are shown.
const SHOWN_INTERVAL: Duration = Duration::from_millis(100);

/// What ended the wait for the end of an epoch.
enum Woken {
    /// It shall end.
    Due,
    /// An order came.
    Ordered(Command),
    /// Nobody gives orders any more.
    Gone,
    /// Link or backup could not keep up for too long.
    Overloaded(Slow, Duration),
}

/// What became of a protected stretch.
enum Next {
    Idle,
    ShutDown,
}

impl RunnerThread {
    /// The guest runs unprotected, or not at all.
    fn idle(mut self) {
        while let Ok(command) = self.commands.recv() {
            let next = match command {
                Command::Protect { link, first, standing } => self.protect(&link, first, &standing),
                other => self.carry_out(other),
            };
            if matches!(next, Next::ShutDown) {
                break;
            }
        }
        self.machine.shut_down();
    }

    /// Commands that need no link.
    fn carry_out(&mut self, command: Command) -> Next {
        match command {
            Command::Run { permit, done } => {
                self.permit = Some(permit);
                drop(done.send(self.run()));
            }
            Command::Resume { done } => drop(done.send(self.run())),
            Command::Pause { done } => drop(done.send(self.stop())),
            Command::Freeze { done } => {
                self.permit = None;
                drop(done.send(self.stop()));
            }
            Command::Unprotect { done } => drop(done.send(self.last)),
            Command::Protect { .. } | Command::Final => {
                log::warn!("a protection command came too late for its link and is ignored");
            }
            Command::ShutDown => return Next::ShutDown,
        }
        Next::Idle
    }

    /// The guest runs protected: base, then one checkpoint after another, until a command or a failure ends it.
    fn protect(&mut self, link: &Link, first: Epoch, standing: &Standing) -> Next {
        assert!(first > self.last, "epoch {first} begins a base after {}", self.last);
        self.use_epoch(first);
        let commands = self.commands.clone();
        let mut interrupted = || !commands.is_empty();
        let sent = bulk::send_base(&mut *self.machine, &self.parts, link, (first, standing), &mut interrupted);
        let next = match sent {
            Ok(()) => {
                (self.tell)(RunnerEvent::BaseSent(first));
                link.epoch_begins(first.next());
                self.parts.mirror.attach(link.clone());
                let mut pacer = Pacer::new(self.rules, link.epochs_in_flight_most(), first, self.clock.now());
                let next = self.epochs(link, &mut pacer);
                self.parts.mirror.detach();
                self.relieve(&pacer);
                next
            }
            Err(error) => self.failed(link, error),
        };
        self.parts.disks.end_log();
        if let Err(DirtyError { call, source }) = self.machine.track_dirty(Tracking::Off) {
            log::warn!("the dirty log stays on: {call}: {source}");
        }
        next
    }

    fn epochs(&mut self, link: &Link, pacer: &mut Pacer) -> Next {
        let vcpus = if pacer.wants_ran() { Vcpus::find() } else { Vcpus::default() };
        let mut shown_at = None;
        loop {
            let afterwards = match self.await_end(link, pacer, &vcpus, &mut shown_at) {
                Woken::Due => Afterwards::RunsOn,
                Woken::Ordered(Command::Final) => Afterwards::StaysStopped,
                Woken::Ordered(Command::Pause { done }) => {
                    drop(done.send(self.stop()));
                    return self.stopped_with_link(link);
                }
                Woken::Ordered(command) => {
                    link.close();
                    return self.carry_out(command);
                }
                Woken::Gone => return Next::ShutDown,
                Woken::Overloaded(slow, lasted) => {
                    return self.failed(link, CheckpointError::Overloaded { slow, lasted });
                }
            };
            let since = self.clock.now();
            let bell = Arc::clone(self.parts.gate.bell());
            let (waited_since, outputs) = (bell.waits_since(), bell.outputs());
            let epoch = self.last.next();
            self.use_epoch(epoch);
            link.epoch_begins(epoch.next());
            let mut commit = |epoch| await_commit(epoch, &bell, &self.commands, || link.is_open());
            let pause = match checkpoint(&mut *self.machine, &self.parts, link, (epoch, afterwards), &mut commit) {
                Ok(pause) => pause.whole,
                // The guest ended by itself and its machine says so. The backup must not see the link go before the record says *stopped*.
                Err(CheckpointError::Pause(PauseError::Ended(_))) => return self.stopped_with_link(link),
                Err(error) => return self.failed(link, error),
            };
            if afterwards == Afterwards::StaysStopped {
                self.stopped = true;
                self.late = SilentTaps::listen(self.parts.mirror.ports())
                    .inspect_err(|error| log::warn!("frames that come too late are left to retransmission: {error}"))
                    .ok();
                (self.tell)(RunnerEvent::FinalSent { epoch, since });
                return self.stopped_with_link(link);
            }
            let now = self.clock.now();
            // What was waited for before the pause is not the pause.
            let began = now.saturating_sub(pause).max(since);
            pacer.ended(&Taken { epoch, began, pause, waited_since, outputs, ran: vcpus.ran() }, now);
        }
    }

    /// Waits until the epoch shall end, or an order comes.
    fn await_end(&mut self, link: &Link, pacer: &mut Pacer, vcpus: &Vcpus, shown_at: &mut Option<Duration>) -> Woken {
        let bell = Arc::clone(self.parts.gate.bell());
        loop {
            match self.commands.try_recv() {
                Ok(command) => return Woken::Ordered(command),
                Err(TryRecvError::Disconnected) => return Woken::Gone,
                Err(TryRecvError::Empty) => {}
            }
            let now = self.clock.now();
            pacer.committed(Epoch(bell.last_committed()), now);
            if shown_at.is_none_or(|at| now.saturating_sub(at) >= SHOWN_INTERVAL) {
                *shown_at = Some(now);
                self.parts.metrics.paced(pacer.status());
                self.parts.metrics.captured(self.parts.capture.status());
                if let Some((slow, lasted)) = self.judge(link, pacer, now) {
                    return Woken::Overloaded(slow, lasted);
                }
            }
            let asked = self.parts.verifier.wants_epochs() || self.parts.disks.wants_checkpoint();
            let full = !self.parts.arena.wait_for_room(Duration::ZERO);
            let (waiting_since, outputs) = (bell.waits_since(), bell.outputs());
            let look = Look { now, waiting_since, outputs, ran: vcpus.ran(), asked, full };
            let until = match pacer.look(&look) {
                Pace::End => return Woken::Due,
                Pace::Look(at) => self.clock.instant(at.max(now)),
            };
            if pacer.hoped_for(&look).is_some_and(|outputs| bell.ring_at(outputs)) {
                continue;
            }
            select! {
                recv(self.commands) -> command => return command.map_or(Woken::Gone, Woken::Ordered),
                recv(bell.heard()) -> _ => {}
                default(until.saturating_duration_since(std::time::Instant::now())) => {}
            }
        }
    }

    /// Looks whether link and backup keep up, and does what the pacer says about it. `Some`: protection is to end.
    fn judge(&mut self, link: &Link, pacer: &mut Pacer, now: Duration) -> Option<(Slow, Duration)> {
        let judged = pacer.judge(&link.reading(&self.parts.arena), now);
        if let Some(throttle) = judged.throttle {
            self.throttle(throttle);
        }
        if let Some(turn) = judged.turn {
            (self.tell)(RunnerEvent::Overload(turn));
        }
        self.parts.metrics.pressed(pacer.overload_status(now));
        judged.give_up
    }

    /// Protection ends: whatever could not keep up is no matter any more.
    fn relieve(&mut self, pacer: &Pacer) {
        self.throttle(Throttle::NONE);
        if let Some((_, since)) = pacer.overloaded() {
            (self.tell)(RunnerEvent::Overload(Turn::Ended(self.clock.now().saturating_sub(since))));
        }
        self.parts.metrics.pressed(OverloadStatus::configured(self.rules.overload.policy));
    }

    fn throttle(&mut self, throttle: Throttle) {
        if let Err(error) = self.machine.throttle(throttle) {
            log::error!("{error}: {}", error.0);
        }
    }

    /// The guest is stopped and nothing is sealed any more; the link stays until a command needs it no longer.
    fn stopped_with_link(&mut self, link: &Link) -> Next {
        loop {
            match self.commands.recv() {
                Ok(Command::Pause { done }) => drop(done.send(self.stop())),
                // What still arrives here goes on to whoever runs the guest now.
                Ok(Command::Freeze { done }) => {
                    self.permit = None;
                    drop(done.send(self.stop()));
                }
                Ok(command) => {
                    link.close();
                    return self.carry_out(command);
                }
                Err(_) => return Next::ShutDown,
            }
        }
    }

    fn failed(&mut self, link: &Link, error: CheckpointError) -> Next {
        // The news first: what it means is not to be judged from a link that closed.
        (self.tell)(match error {
            CheckpointError::Resume(e) => RunnerEvent::MachineFailed(e.to_string()),
            CheckpointError::Pause(e) => RunnerEvent::MachineFailed(e.to_string()),
            other => RunnerEvent::ProtectionFailed(other),
        });
        link.close();
        Next::Idle
    }

    fn use_epoch(&mut self, epoch: Epoch) {
        self.last = epoch;
        self.shown.store(epoch.0, Ordering::Relaxed);
    }

    /// The only place that lets guest code run, and only on the strength of a permit.
    fn run(&mut self) -> Result<(), RunError> {
        let Some(permit) = &self.permit else {
            return Err(RunError::Ended("this side has no permit to run the guest".into()));
        };
        log::info!("the guest runs under generation {}", permit.generation());
        if let Some(late) = self.late.take() {
            // A switchover that was given up: what was heard meanwhile is left to retransmission.
            late.stop();
        }
        failpoint!(PermitRun => return Err(RunError::Ended("a failpoint says so".into())));
        self.machine.run()?;
        failpoint!(PermitRunning);
        self.stopped = false;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), PauseError> {
        if !self.stopped {
            PausedVm::pause(&mut *self.machine)?.stay_stopped();
            self.stopped = true;
        }
        Ok(())
    }
}
