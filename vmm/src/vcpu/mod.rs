//! vCPUs: one thread each, and the rendezvous at which they stop.
//!
//! ```text
//!            run                      stop: flag, signal
//!  Paused ────────► Running ──────────────────────────────► completes exits until EINTR,
//!    ▲                 │                                    waits for the other vCPUs,
//!    │                 │ guest ends                         reads its own state
//!    │                 ▼                                          │
//!    │              Finished                                      │
//!    └────────────────────────────────────────────────────────────┘
//! ```
//!
//! A stop takes one wake-up of each vCPU's thread, which also reads the vCPU's state, and one of the thread that stops.

mod crew;
mod exit;
pub(crate) mod kick;
mod slice;
mod throttle;
mod wait;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use kvm_bindings::{CpuId, Msrs};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::signal::Killable;

use crate::devices::Devices;
use crate::machine::{CaptureError, MachineEvent, PauseError, RestoreError};
use crate::section::{Section, SectionKind};
use crate::state::codec::Saved;
use crate::state::vcpu::{VcpuStateV1, msr_buffer};
use crate::throttle::Throttle;
use crew::Crew;
use exit::After;
use kick::{ImmediateExit, kick_signal};
use throttle::{Rhythm, Slower, Slowing};
use wait::{Waits, wait_a_moment};

/// How long a thread looks at a flag before it sleeps, where it can have a processor of its own. A pause is shorter than this, and a processor that fell
/// asleep takes a good part of a pause to wake up.
const SPIN: Duration = Duration::from_millis(1);
/// With so many pieces of work to share it pays to wake threads that sleep.
const PIECES_WAKE: usize = 32;
/// No exit takes this long on a host that works.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// A vCPU that no thread runs yet.
pub(crate) struct Vcpu {
    pub(crate) index: u8,
    pub(crate) fd: VcpuFd,
    tsc_khz: u32,
    msrs: Msrs,
}

impl Vcpu {
    pub(crate) fn new(vm: &VmFd, index: u8, cpuid: &CpuId) -> Result<Self, vmm_sys_util::errno::Error> {
        let fd = vm.create_vcpu(u64::from(index))?;
        fd.set_cpuid2(cpuid)?;
        // A host with an unstable TSC has no frequency to name.
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        Ok(Self { index, fd, tsc_khz, msrs: msr_buffer(&[]) })
    }

    /// Sets which MSRs are its state.
    pub(crate) fn set_msr_list(&mut self, list: &[u32]) {
        self.msrs = msr_buffer(list);
    }

    pub(crate) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Reads the state, encoded.
    pub(crate) fn capture(&mut self) -> Result<Section, CaptureError> {
        let state = VcpuStateV1::capture(&mut self.fd, self.tsc_khz, &mut self.msrs)?;
        Ok(state.to_section(SectionKind::vcpu(self.index)))
    }

    pub(crate) fn restore(&self, state: &VcpuStateV1) -> Result<(), RestoreError> {
        state.restore(&self.fd, self.tsc_khz)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Run,
    Stop,
    End,
}

impl Order {
    fn from_u8(v: u8) -> Self {
        match v {
            0 => Self::Run,
            1 => Self::Stop,
            _ => Self::End,
        }
    }

    fn to_u8(self) -> u8 {
        match self {
            Self::Run => 0,
            Self::Stop => 1,
            Self::End => 2,
        }
    }
}

/// What all vCPU threads of a machine share.
struct Rendezvous {
    vcpus: usize,
    /// For whoever stops the vCPUs.
    spin: Duration,
    waits: Waits,
    /// What stopped threads help with.
    crew: Crew,
    order: AtomicU8,
    /// Counts the orders to run, so that a run that is followed by a stop at once is not missed.
    runs: AtomicU64,
    /// vCPUs that completed their exits in this stop.
    drained: AtomicUsize,
    /// vCPUs that read their state and wait.
    parked: AtomicUsize,
    /// The machine ended by itself, or a stop failed: nobody enters the guest again.
    ended: AtomicBool,
    why: Mutex<Option<String>>,
    /// Who waits for the stop.
    stopper: Mutex<Option<Thread>>,
    /// What each vCPU read in this stop.
    states: Vec<Mutex<Option<Captured>>>,
    events: Sender<MachineEvent>,
    slowing: Arc<Slowing>,
}

/// A vCPU's section, and how long reading it took.
type Captured = (Result<Section, CaptureError>, Duration);

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Rendezvous {
    fn order(&self) -> Order {
        Order::from_u8(self.order.load(Ordering::SeqCst))
    }

    fn give(&self, order: Order) {
        self.order.store(order.to_u8(), Ordering::SeqCst);
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Ends the machine; true for the first who does.
    fn end(&self, why: String) -> bool {
        let mut known = lock(&self.why);
        let first = known.is_none();
        known.get_or_insert(why);
        drop(known);
        self.ended.store(true, Ordering::SeqCst);
        self.wake_stopper();
        first
    }

    fn wake_stopper(&self) {
        if let Some(thread) = &*lock(&self.stopper) {
            thread.unpark();
        }
    }

    fn why_ended(&self) -> String {
        lock(&self.why).clone().unwrap_or_else(|| "for no known reason".into())
    }
}

/// The same error once more.
fn again(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

/// How long the last of `threads` threads that wait for each other may spin on this host.
fn spin(threads: usize) -> Duration {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    if processors >= threads { SPIN } else { Duration::ZERO }
}

/// The running vCPU threads of a machine.
pub(crate) struct VcpuThreads {
    shared: Arc<Rendezvous>,
    threads: Vec<Arc<VcpuThread>>,
    slower: Slower,
}

struct VcpuThread {
    immediate_exit: ImmediateExit,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl VcpuThread {
    /// Gets the vCPU out of the guest, or keeps it from entering.
    fn kick(&self) {
        self.immediate_exit.set(true);
        if let Some(thread) = &*lock(&self.thread)
            && let Err(error) = thread.kill(kick_signal())
        {
            log::debug!("a vCPU thread is gone: {error}");
        }
    }

    fn unpark(&self) {
        if let Some(thread) = &*lock(&self.thread) {
            thread.thread().unpark();
        }
    }
}

impl VcpuThreads {
    /// Starts a thread for each vCPU. They wait, stopped, until [`VcpuThreads::run`].
    pub(crate) fn start(vcpus: Vec<Vcpu>, devices: &Arc<Devices>, events: Sender<MachineEvent>) -> io::Result<Self> {
        let shared = Arc::new(Rendezvous {
            vcpus: vcpus.len(),
            spin: spin(vcpus.len() + 1),
            waits: Waits::default(),
            crew: Crew::default(),
            order: AtomicU8::new(Order::Stop.to_u8()),
            runs: AtomicU64::new(0),
            drained: AtomicUsize::new(0),
            parked: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
            why: Mutex::new(None),
            stopper: Mutex::new(None),
            states: vcpus.iter().map(|_| Mutex::new(None)).collect(),
            events,
            slowing: Arc::new(Slowing::new(vcpus.len())),
        });
        let slower = Slower::new(Arc::clone(&shared.slowing));
        let mut all = Self { shared, threads: Vec::new(), slower };
        for vcpu in vcpus {
            let immediate_exit = ImmediateExit::of(&vcpu.fd)?;
            let (shared, devices) = (Arc::clone(&all.shared), Arc::clone(devices));
            let own_flag = ImmediateExit::of(&vcpu.fd)?;
            let name = format!("vcpu{}", vcpu.index);
            // Beside the first so many vCPUs, whoever stopped them has a processor, too.
            let spin = spin(usize::from(vcpu.index) + 2);
            let runner = Runner { vcpu, shared, devices, immediate_exit: own_flag, spin, rhythm: Rhythm::default() };
            let thread = std::thread::Builder::new().name(name).spawn(move || {
                slice::take_short_turns();
                runner.live();
            })?;
            all.threads.push(Arc::new(VcpuThread { immediate_exit, thread: Mutex::new(Some(thread)) }));
        }
        Ok(all)
    }

    /// Lets all vCPUs enter the guest.
    pub(crate) fn run(&self) -> Result<(), String> {
        if self.shared.has_ended() {
            return Err(self.shared.why_ended());
        }
        self.shared.drained.store(0, Ordering::SeqCst);
        self.shared.parked.store(0, Ordering::SeqCst);
        self.shared.states.iter().for_each(|slot| *lock(slot) = None);
        self.shared.give(Order::Run);
        self.shared.runs.fetch_add(1, Ordering::SeqCst);
        self.unpark_all();
        Ok(())
    }

    /// Gets every vCPU out of the guest with its last exit completed and its state read.
    pub(crate) fn stop(&self) -> Result<(), PauseError> {
        *lock(&self.shared.stopper) = Some(std::thread::current());
        self.shared.give(Order::Stop);
        self.kick_all();
        if self.shared.slowing.is_on() {
            // Whoever rests gets up.
            self.unpark_all();
        }
        let deadline = Instant::now() + STOP_PATIENCE;
        let shared = &*self.shared;
        let all_parked = || shared.parked.load(Ordering::SeqCst) == shared.vcpus || shared.has_ended();
        let in_time = shared.waits.wait_until(shared.spin, Some(deadline), all_parked);
        *lock(&shared.stopper) = None;
        if shared.has_ended() {
            return Err(PauseError::Ended(shared.why_ended()));
        }
        if !in_time {
            let stuck = shared.states.iter().position(|s| lock(s).is_none()).unwrap_or(0);
            let vcpu = u8::try_from(stuck).unwrap_or(u8::MAX);
            shared.end(format!("vCPU {vcpu} did not stop"));
            return Err(PauseError::Stuck { vcpu, waited: STOP_PATIENCE });
        }
        Ok(())
    }

    /// What each vCPU read in this stop, in order.
    pub(crate) fn sections(&self) -> impl Iterator<Item = Result<Section, CaptureError>> + '_ {
        self.shared.states.iter().map(|slot| match &*lock(slot) {
            Some((Ok(section), _)) => Ok(section.clone()),
            Some((Err(CaptureError::Host { what, source }), _)) => {
                Err(CaptureError::Host { what: what.clone(), source: again(source) })
            }
            None => panic!("a stopped vCPU has read its state"),
        })
    }

    /// Does all pieces of `work`, with the help of the stopped vCPUs' threads.
    pub(crate) fn share(&self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        if pieces >= PIECES_WAKE {
            self.unpark_all();
        }
        self.shared.crew.share(pieces, work);
    }

    /// How long the slowest vCPU took to read its state in this stop.
    pub(crate) fn state_time(&self) -> Duration {
        self.shared
            .states
            .iter()
            .filter_map(|slot| lock(slot).as_ref().map(|(_, took)| *took))
            .max()
            .unwrap_or_default()
    }

    /// Slows the vCPUs from now on.
    pub(crate) fn throttle(&mut self, throttle: Throttle) -> io::Result<()> {
        let (shared, threads) = (Arc::clone(&self.shared), self.threads.clone());
        let set = self.slower.set(throttle, move |vcpu| {
            // Who is stopped finds its rhythm again when it runs on.
            if shared.order() == Order::Run
                && let Some(thread) = threads.get(vcpu)
            {
                thread.kick();
            }
        });
        self.unpark_all();
        set
    }

    /// Ends the threads and waits for their end.
    pub(crate) fn end(&mut self) {
        self.slower.end();
        self.shared.end("it was shut down".into());
        self.shared.give(Order::End);
        self.kick_all();
        self.unpark_all();
        for t in &self.threads {
            let thread = lock(&t.thread).take();
            if thread.is_some_and(|thread| thread.join().is_err()) {
                log::error!("a vCPU thread panicked");
            }
        }
    }

    fn kick_all(&self) {
        self.threads.iter().for_each(|thread| thread.kick());
    }

    fn unpark_all(&self) {
        self.threads.iter().for_each(|thread| thread.unpark());
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.end();
    }
}

/// The inside of a vCPU thread.
struct Runner {
    vcpu: Vcpu,
    shared: Arc<Rendezvous>,
    devices: Arc<Devices>,
    immediate_exit: ImmediateExit,
    spin: Duration,
    rhythm: Rhythm,
}

impl Runner {
    fn live(mut self) {
        let mut runs = 0;
        loop {
            // Paused: waits for the order to run or to end, and helps with what there is to do.
            self.shared.waits.wait_until(self.spin, None, || {
                self.shared.crew.help();
                self.shared.runs.load(Ordering::SeqCst) != runs || self.shared.order() == Order::End
            });
            runs = self.shared.runs.load(Ordering::SeqCst);
            if self.shared.order() == Order::End {
                return;
            }
            // Running. The flag is cleared before the order is looked at again: who stops gives the order first and sets the flag
            // then, so either the order is seen here or the flag stays set.
            self.immediate_exit.set(false);
            let mut drained = false;
            while self.shared.order() == Order::Run {
                if self.shared.slowing.is_on() && !self.rest() {
                    break;
                }
                match self.step() {
                    Ok(interrupted) => drained = interrupted,
                    Err(event) => return self.finish(event),
                }
                if drained {
                    // It may be there for a rest only. The order is looked at after this, as at the beginning of a run.
                    self.immediate_exit.set(false);
                }
            }
            if self.shared.order() == Order::End {
                return;
            }
            if let Err(event) = self.stop(drained) {
                return self.finish(event);
            }
        }
    }

    /// Rests if it is time to; false when the vCPU is to stop.
    fn rest(&mut self) -> bool {
        let shared = &*self.shared;
        self.rhythm.keep(self.vcpu.index, &shared.slowing, || shared.order() == Order::Run);
        shared.order() == Order::Run
    }

    /// Enters the guest once and carries out the exit; true when KVM_RUN was interrupted instead.
    fn step(&mut self) -> Result<bool, MachineEvent> {
        let index = self.vcpu.index;
        let crashed = |reason| MachineEvent::Crashed { vcpu: index, reason };
        let after = match self.vcpu.fd.run() {
            // When the machine has ended, what another vCPU would still say must not get out.
            Ok(_) if self.shared.has_ended() => return Err(crashed("another vCPU ended the machine".into())),
            Ok(exit) => exit::handle(index, exit, &self.devices),
            Err(error) if error.errno() == libc::EINTR => return Ok(true),
            // A vCPU that waits for its start-up signal got one.
            Err(error) if error.errno() == libc::EAGAIN => After::GoOn,
            Err(error) => return Err(crashed(format!("KVM_RUN: {error}"))),
        };
        match after {
            After::GoOn => Ok(false),
            After::End(event) => Err(event),
            After::Stuck => exit::help_out(&mut self.vcpu.fd, &self.devices).map_err(crashed).map(|()| false),
        }
    }

    /// Completes exits unless KVM_RUN was interrupted last (`drained`), which leaves none; meets the others, reads the state.
    fn stop(&mut self, mut drained: bool) -> Result<(), MachineEvent> {
        self.immediate_exit.set(true);
        while !drained {
            drained = self.step()?;
        }
        self.shared.drained.fetch_add(1, Ordering::SeqCst);
        // The exit that another vCPU still completes may raise an interrupt in this one's LAPIC.
        let all_drained = || self.shared.drained.load(Ordering::SeqCst) == self.shared.vcpus;
        wait_a_moment(|| all_drained() || self.shared.has_ended());
        let began = Instant::now();
        let section = self.vcpu.capture();
        if let Some(slot) = self.shared.states.get(usize::from(self.vcpu.index)) {
            *lock(slot) = Some((section, began.elapsed()));
        }
        if self.shared.parked.fetch_add(1, Ordering::SeqCst) + 1 == self.shared.vcpus {
            self.shared.wake_stopper();
        }
        Ok(())
    }

    fn finish(&self, event: MachineEvent) {
        let why = match &event {
            MachineEvent::PoweredOff => "the guest switched itself off".to_owned(),
            MachineEvent::Reset => "the guest asked for a reset".to_owned(),
            MachineEvent::Crashed { vcpu, reason } => format!("vCPU {vcpu} crashed: {reason}"),
        };
        // Nobody may listen any more.
        if self.shared.end(why) && self.shared.events.send(event).is_err() {
            log::debug!("the end of the machine was of no interest");
        }
    }
}
