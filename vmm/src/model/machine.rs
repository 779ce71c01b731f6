//! The machine around the program: one vCPU thread, stopped exactly between two steps.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, unbounded};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};

use super::disks::Announcement;
use super::options::{BadWord, ProgramOptions};
use super::program::{End, ModelProgram, ProgramError, Step};
use crate::config::{ClockPolicy, Fact, MachineConfig, MachineIo, check_disks};
use crate::dirty::{DirtyLedger, DirtySet};
use crate::disk::Disk;
use crate::hot::{KeptLog, Tracking};
use crate::machine::{
    BootError, CaptureError, DirtyError, Machine, MachineEvent, PauseError, RestoreError, RunError, StopTimings,
    ThrottleError,
};
use crate::memory::{GuestRam, RamError};
use crate::outputs::{FramePort, Outputs};
use crate::pause::Stopped;
use crate::section::{Section, SectionKind};
use crate::throttle::Throttle;

/// Most frames in one step, so that a flood cannot delay a stop.
const BATCH: usize = 64;
/// Longest frame that is taken in whole. A longer one than the interface's MTU allows is cut, and then fails its checksums.
const FRAME: usize = 16 << 10;
/// A step takes microseconds. A thread that does not come out in this time never will.
const STUCK: Duration = Duration::from_secs(5);
/// The machine's RAM and program have no address for more.
const MAX_VCPUS: u8 = 2;
const BELL: Token = Token(usize::MAX);

/// Why a model machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum ModelBuildError {
    /// The parts list cannot be built.
    #[error("the machine's configuration is wrong: {0}")]
    Config(String),
    /// The command line has a word that makes no sense.
    #[error(transparent)]
    CommandLine(#[from] BadWord),
    /// The program does not fit the machine.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// Guest RAM could not be had.
    #[error("no memory for the guest")]
    Memory(#[from] RamError),
    /// The host refused something.
    #[error("the host refused {call}")]
    Host {
        /// The call.
        call: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// How far a machine has come.
#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// Built; there is nothing to run.
    Hollow,
    /// Loaded or restored, never ran.
    Ready,
    Running,
    Stopped,
    Ended(String),
}

/// What the machine wants of its thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Stop,
    Run,
    End,
}

#[derive(Debug)]
struct Control {
    wanted: Wanted,
    /// The thread is between two steps and makes no other; it may be announcing a change of a disk.
    parked: bool,
    /// The thread has ended.
    gone: bool,
    /// The guest ended by itself.
    ended: Option<String>,
    /// How much the guest is slowed.
    throttle: Throttle,
}

/// What the machine and its thread share.
struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
    program: Mutex<ModelProgram>,
}

impl Shared {
    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn program(&self) -> MutexGuard<'_, ModelProgram> {
        self.program.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, wanted: Wanted) {
        self.control().wanted = wanted;
        self.changed.notify_all();
    }
}

/// A machine without KVM.
pub struct ModelMachine {
    facts: Vec<Fact>,
    ram: Arc<GuestRam>,
    ledger: Arc<DirtyLedger>,
    shared: Arc<Shared>,
    /// With the machine until the first run, with the thread from then on.
    vcpu: Option<Vcpu>,
    thread: Option<JoinHandle<()>>,
    waker: Arc<Waker>,
    phase: Phase,
    events: Receiver<MachineEvent>,
    log: KeptLog,
    /// Nobody reads it; held so that whoever types finds an open pipe.
    _console_input: Option<OwnedFd>,
}

impl ModelMachine {
    /// Builds a machine whose program is told what [`MachineConfig::cmdline`] says. The kernel and the initrd are ignored.
    pub fn build(config: &MachineConfig, io: MachineIo) -> Result<Self, ModelBuildError> {
        Self::with_options(config, io, &ProgramOptions::parse(&config.cmdline)?)
    }

    /// Builds a machine whose program is told `options` in place of the command line.
    pub fn with_options(
        config: &MachineConfig,
        io: MachineIo,
        options: &ProgramOptions,
    ) -> Result<Self, ModelBuildError> {
        check(config, &io)?;
        let host = |call| move |source| ModelBuildError::Host { call, source };
        let ram = Arc::new(GuestRam::new(config.memory_bytes)?);
        let mac = config.nics.first().map_or([0x52, 0x54, 0, 0, 0, 1], |nic| nic.mac);
        let MachineIo { outputs, ports, disks, console_input } = io;
        let program = ModelProgram::new(Arc::clone(&ram), mac, options)?.with_disks(disks.clone())?;
        let control =
            Control { wanted: Wanted::Stop, parked: false, gone: false, ended: None, throttle: Throttle::NONE };
        let (control, program) = (Mutex::new(control), Mutex::new(program));
        let shared = Arc::new(Shared { control, changed: Condvar::new(), program });

        let poll = Poll::new().map_err(host("epoll_create"))?;
        let waker = Arc::new(Waker::new(poll.registry(), BELL).map_err(host("eventfd"))?);
        for (token, port) in ports.iter().enumerate() {
            let fd = port.as_fd().as_raw_fd();
            poll.registry()
                .register(&mut SourceFd(&fd), Token(token), Interest::READABLE)
                .map_err(host("epoll_ctl for a network device"))?;
        }
        let (events_in, events) = unbounded();
        let vcpu = Vcpu {
            shared: Arc::clone(&shared),
            outputs,
            ports,
            disks,
            announced: Vec::new(),
            waiting: VecDeque::new(),
            poll,
            events: events_in,
            buffer: vec![0; FRAME],
            runs_since: Instant::now(),
            rests_until: None,
        };
        Ok(Self {
            facts: facts(config, options),
            ledger: DirtyLedger::new(),
            ram,
            shared,
            vcpu: Some(vcpu),
            thread: None,
            waker,
            phase: Phase::Hollow,
            events,
            log: KeptLog::default(),
            _console_input: console_input,
        })
    }

    fn assert_never_ran(&self) {
        assert!(self.vcpu.is_some(), "state can only be put into a machine that never ran");
    }
}

fn check(config: &MachineConfig, io: &MachineIo) -> Result<(), ModelBuildError> {
    if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
        let vcpus = config.vcpus;
        return Err(ModelBuildError::Config(format!("{vcpus} vCPUs, this machine has 1 to {MAX_VCPUS}")));
    }
    if io.ports.len() != config.nics.len() {
        let (ports, nics) = (io.ports.len(), config.nics.len());
        return Err(ModelBuildError::Config(format!("{ports} frame ports for {nics} network devices")));
    }
    check_disks(config, io).map_err(ModelBuildError::Config)?;
    match config.nics.iter().find(|nic| nic.mac[0] & 1 != 0 || nic.mac == [0; 6]) {
        Some(nic) => Err(ModelBuildError::Config(format!("{:02x?} is not the address of one station", nic.mac))),
        None => Ok(()),
    }
}

/// What the other host must share. The load, the beacon and the seed are state, and go with the registers.
fn facts(config: &MachineConfig, options: &ProgramOptions) -> Vec<Fact> {
    let fact = |name: &str, value: String| Fact { name: name.into(), value };
    let [a, b, c, d] = options.ip;
    let mut facts = vec![
        fact("machine", "model/1".into()),
        fact("ram.bytes", config.memory_bytes.to_string()),
        fact("vcpus", config.vcpus.to_string()),
        fact("program.address", format!("{a}.{b}.{c}.{d}:{}", options.port)),
    ];
    for (slot, nic) in config.nics.iter().enumerate() {
        let [a, b, c, d, e, f] = nic.mac;
        let mac = format!("net {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        facts.push(fact(&format!("device.net.{slot}"), mac));
    }
    for (number, disk) in config.disks.iter().enumerate() {
        facts.push(fact(&format!("device.blk.{number}"), disk.fact()));
    }
    facts
}

impl Machine for ModelMachine {
    fn facts(&self) -> Vec<Fact> {
        self.facts.clone()
    }

    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    fn ledger(&self) -> &Arc<DirtyLedger> {
        &self.ledger
    }

    fn load(&mut self) -> Result<(), BootError> {
        self.assert_never_ran();
        self.shared.program().boot();
        self.phase = Phase::Ready;
        Ok(())
    }

    fn restore(&mut self, sections: &[Section], clock: ClockPolicy) -> Result<(), RestoreError> {
        // Guest time is one number, and the thread counts on from it.
        let ClockPolicy::ResumeFromCheckpoint = clock;
        self.assert_never_ran();
        match sections {
            [] => return Err(RestoreError::Missing(SectionKind::MODEL)),
            [section] => self.shared.program().restore(section)?,
            [first, second, ..] if first.kind == SectionKind::MODEL => {
                return Err(RestoreError::Unexpected(second.kind));
            }
            [first, ..] => return Err(RestoreError::Unexpected(first.kind)),
        }
        self.phase = Phase::Ready;
        Ok(())
    }

    fn queue_inbound(&mut self, nic: u8, frames: Vec<Vec<u8>>) {
        let vcpu = self.vcpu.as_mut().expect("frames are queued on a machine that never ran");
        assert!(usize::from(nic) < vcpu.ports.len(), "a network device of this machine");
        if nic == 0 {
            vcpu.waiting.extend(frames);
        }
    }

    fn run(&mut self) -> Result<(), RunError> {
        match &self.phase {
            Phase::Hollow => return Err(RunError::Hollow),
            Phase::Ended(why) => return Err(RunError::Ended(why.clone())),
            Phase::Running => return Ok(()),
            Phase::Ready | Phase::Stopped => {}
        }
        if let Some(vcpu) = self.vcpu.take() {
            let thread = std::thread::Builder::new().name("vcpu0".into()).spawn(move || vcpu.main())?;
            self.thread = Some(thread);
        }
        self.shared.want(Wanted::Run);
        self.phase = Phase::Running;
        Ok(())
    }

    fn track_dirty(&mut self, tracking: Tracking) -> Result<(), DirtyError> {
        // The bitmap of tracked RAM is always kept; what is switched is whether anybody may ask for it.
        if tracking != Tracking::Off {
            drop(self.ram.take_own_writes());
            self.ledger.clear();
        }
        self.log.begin(tracking);
        Ok(())
    }

    fn take_dirty(&mut self) -> Result<DirtySet, DirtyError> {
        assert!(self.log.is_on(), "dirty pages can only be taken while they are tracked");
        Ok(self.ledger.take(self.log.take(self.ram.take_own_writes())))
    }

    fn share_work(&self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..pieces).for_each(work);
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<(), ThrottleError> {
        self.shared.control().throttle = throttle;
        self.shared.changed.notify_all();
        Ok(())
    }

    fn take_cold_dirty(&mut self) -> Result<DirtySet, DirtyError> {
        assert!(self.log.is_on(), "dirty pages can only be taken while they are tracked");
        Ok(self.ledger.take(self.log.take_cold(self.ram.take_own_writes())))
    }

    fn events(&self) -> Receiver<MachineEvent> {
        self.events.clone()
    }

    fn stop(&mut self, _: &Stopped) -> Result<StopTimings, PauseError> {
        match &self.phase {
            Phase::Running => {}
            Phase::Ended(why) => return Err(PauseError::Ended(why.clone())),
            Phase::Hollow | Phase::Ready | Phase::Stopped => return Ok(StopTimings::default()),
        }
        let began = Instant::now();
        self.shared.want(Wanted::Stop);
        if let Err(error) = self.waker.wake() {
            log::error!("cannot wake the vCPU thread: {error}");
        }
        let control = self.shared.control();
        let still_running = |c: &mut Control| !c.parked && c.ended.is_none();
        let waited = self.shared.changed.wait_timeout_while(control, STUCK, still_running);
        let (control, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = control.ended.clone() {
            self.phase = Phase::Ended(why.clone());
            return Err(PauseError::Ended(why));
        }
        if timeout.timed_out() {
            let error = PauseError::Stuck { vcpu: 0, waited: STUCK };
            self.phase = Phase::Ended(error.to_string());
            return Err(error);
        }
        self.phase = Phase::Stopped;
        Ok(StopTimings { quiesce: Duration::ZERO, kick: began.elapsed(), vcpu_state: Duration::ZERO })
    }

    fn capture(&mut self, _: &Stopped) -> Result<Vec<Section>, CaptureError> {
        Ok(vec![self.shared.program().capture()])
    }

    fn shut_down(&mut self) {
        self.vcpu = None;
        if let Some(thread) = self.thread.take() {
            self.shared.want(Wanted::End);
            if let Err(error) = self.waker.wake() {
                log::error!("cannot wake the vCPU thread: {error}");
            }
            let still_there = |c: &mut Control| !c.gone && !thread.is_finished();
            drop(self.shared.changed.wait_timeout_while(self.shared.control(), STUCK, still_there));
            if !self.shared.control().gone && !thread.is_finished() {
                log::error!("the vCPU thread waits for a disk and is left behind");
            } else if thread.join().is_err() {
                log::error!("the vCPU thread panicked");
            }
        }
        if !matches!(self.phase, Phase::Ended(_)) {
            self.phase = Phase::Ended("it was shut down".into());
        }
    }
}

impl Drop for ModelMachine {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// The vCPU: runs the program against the host's clock and ports.
struct Vcpu {
    shared: Arc<Shared>,
    outputs: Arc<dyn Outputs>,
    ports: Vec<Arc<dyn FramePort>>,
    disks: Vec<Arc<dyn Disk>>,
    /// What was announced since the last step.
    announced: Vec<(Announcement, io::Result<()>)>,
    /// Frames from before the first run.
    waiting: VecDeque<Vec<u8>>,
    poll: Poll,
    events: Sender<MachineEvent>,
    buffer: Vec<u8>,
    /// When it last got up from a rest, being slowed.
    runs_since: Instant,
    /// Until when it rests.
    rests_until: Option<Instant>,
}

impl Vcpu {
    fn main(mut self) {
        let end = match self.run() {
            Ok(None) => None,
            Ok(Some(end)) => Some(end),
            Err(error) => Some(End::Crashed(format!("the host's poll failed: {error}"))),
        };
        if let Some(end) = end {
            let (event, why) = match end {
                End::PoweredOff => (MachineEvent::PoweredOff, "the guest switched itself off".to_owned()),
                End::Crashed(reason) => (MachineEvent::Crashed { vcpu: 0, reason: reason.clone() }, reason),
            };
            self.shared.control().ended = Some(why);
            self.shared.changed.notify_all();
            // Nobody listens when the machine is being dropped.
            drop(self.events.send(event));
        }
        self.shared.control().gone = true;
        self.shared.changed.notify_all();
    }

    /// Runs until the machine ends (`None`) or the guest does.
    fn run(&mut self) -> io::Result<Option<End>> {
        let mut polled = Events::with_capacity(16);
        while self.wait_for_leave() {
            let (host, guest) = (Instant::now(), self.shared.program().now());
            let guest_now = || guest.saturating_add(nanoseconds(host.elapsed()));
            let announce = loop {
                if !self.rest(guest_now) {
                    break Vec::new();
                }
                let more = self.take_frames();
                let step = self.step(guest_now());
                if step.end.is_some() {
                    return Ok(step.end);
                }
                if !step.announce.is_empty() || self.shared.control().wanted != Wanted::Run {
                    break step.announce;
                }
                let timeout = match step.wake_at {
                    _ if more || !self.waiting.is_empty() => Some(Duration::ZERO),
                    Some(at) => Some(Duration::from_nanos(at.saturating_sub(guest_now()))),
                    None => None,
                };
                match self.poll.poll(&mut polled, timeout) {
                    Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                    _ => {}
                }
                if self.shared.control().wanted != Wanted::Run {
                    break Vec::new();
                }
            };
            // Time that passed while the program slept has passed: a checkpoint every few milliseconds must not stop its clock.
            self.shared.program().pass_time(guest_now());
            self.announce(announce);
        }
        Ok(None)
    }

    /// One step, and out with what it brought.
    fn step(&mut self, now: u64) -> Step {
        let inbound: Vec<_> = self.waiting.drain(..self.waiting.len().min(BATCH)).collect();
        let step = {
            let mut program = self.shared.program();
            for (what, result) in self.announced.drain(..) {
                program.announced(what, &result);
            }
            program.step(now, &inbound)
        };
        for frame in &step.frames {
            if !self.ports.is_empty() {
                self.outputs.frame(0, frame);
            }
        }
        if !step.console.is_empty() {
            self.outputs.console(&step.console);
        }
        step
    }

    /// Announces changes of disks, which may take long: parked, so that no stop waits for it. The program hears of it when it runs on.
    fn announce(&mut self, wanted: Vec<Announcement>) {
        if wanted.is_empty() {
            return;
        }
        self.shared.control().parked = true;
        self.shared.changed.notify_all();
        for what in wanted {
            if let Some(disk) = self.disks.get(usize::from(what.disk)) {
                self.announced.push((what, disk.announce(what.range)));
            }
        }
    }

    /// Rests if the guest is slowed and has run for as long as it may at a time. False when a stop ended the rest, what is left of which comes after it.
    fn rest(&mut self, guest_now: impl Fn() -> u64) -> bool {
        let control = self.shared.control();
        let throttle = control.throttle;
        let ran = self.runs_since.elapsed();
        if throttle.is_none() || (self.rests_until.is_none() && ran < throttle.run()) {
            return true;
        }
        let began = Instant::now();
        let until = *self.rests_until.get_or_insert(began + throttle.rest_after(ran));
        let goes_on = |c: &mut Control| c.wanted == Wanted::Run && c.throttle == throttle;
        let waited = self.shared.changed.wait_timeout_while(control, until.saturating_duration_since(began), goes_on);
        let (control, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let stopped = control.wanted != Wanted::Run;
        drop(control);
        let now = Instant::now();
        if !stopped || now >= until {
            (self.runs_since, self.rests_until) = (now, None);
        }
        let mut program = self.shared.program();
        program.pass_time(guest_now());
        program.stood_still(nanoseconds(now - began));
        !stopped
    }

    /// Parks while the machine is stopped; false when it ends.
    fn wait_for_leave(&self) -> bool {
        let mut control = self.shared.control();
        control.parked = true;
        self.shared.changed.notify_all();
        while control.wanted == Wanted::Stop {
            control = self.shared.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        control.parked = false;
        control.wanted == Wanted::Run
    }

    /// Takes in what waits at the ports, at most a batch; true when there may be more. The program lives on device 0; what
    /// arrives on another is taken and dropped, as by a guest without a driver.
    fn take_frames(&mut self) -> bool {
        let mut more = false;
        for (nic, port) in self.ports.iter().enumerate() {
            let mut room = BATCH;
            loop {
                if room == 0 || self.waiting.len() >= BATCH {
                    more = true;
                    break;
                }
                match port.receive(&mut self.buffer) {
                    Ok(Some(length)) if nic == 0 => {
                        self.waiting.extend(self.buffer.get(..length).map(<[u8]>::to_vec));
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => {
                        log::debug!("network device {nic}: {error}");
                        break;
                    }
                }
                room -= 1;
            }
        }
        more
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
