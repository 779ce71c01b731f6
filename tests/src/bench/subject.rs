//! The product's machine with the demo guest under a dirtying load, and one checkpoint of it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use failover::config::{CaptureStrategy, Precopy};
use failover::status::{Labels, NodeRole, StatusBoard};
use primary::capture::Capture;
use primary::clock::Clock;
use primary::disk::OwnerDisks;
use primary::epoch::{Afterwards, EpochParts, PauseParts, StagedCheckpoint, stage};
use primary::metrics::Metrics;
use primary::mirror::Mirror;
use primary::output::queue::QueueLimits;
use primary::output::{Gate, World};
use primary::staging::Arena;
use primary::verify::Verifier;
use replication_proto::{Epoch, Incarnation, PageIndex};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory};
use vmm::{
    FramePort, GuestRam, KvmMachine, Machine, MachineIo, PAGE_SIZE, PausedVm, SectionKind, SocketPort, Tracking,
};

use super::pulse::Pulse;
use super::{BenchError, host};
use crate::machine::client::say;
use crate::machine::demo_config;

/// Pages that the guest writes a second: as fast as a busy server, and less than what first writes after a checkpoint allow here.
pub(super) const RATE: u64 = 200_000;
/// Frames that may wait for the client that sets the load.
const FRAMES: usize = 256;
/// Limits like those of the default configuration.
const ARENA_BYTES: usize = 1 << 30;
const HELD_BYTES: usize = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(30);
const KV_PORT: u16 = 6379;
/// Epochs in which the guest's pulse is looked for, but for the first.
const PULSE_TRIES: u32 = 8;
/// Pages side by side that are a buffer.
const ROW: usize = 64;

/// A way out that leads nowhere, but for the client that sets the load.
struct Sink(Sender<Vec<u8>>);

impl World for Sink {
    fn frame(&self, _: u8, frame: &[u8]) {
        // Full once the client is gone: discarded.
        drop(self.0.try_send(frame.to_vec()));
    }

    fn console(&self, _: &[u8]) {}
}

/// One measured checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Where the time went.
    pub pause: PauseParts,
    /// From before the stop until another thread saw the guest compute again.
    pub seen: Duration,
    /// Pages that were really dirty, and staged; none when the guest had no processor in the epoch.
    pub pages: usize,
}

/// The machine and what a checkpoint of it needs.
pub struct Subject {
    machine: KvmMachine,
    parts: EpochParts,
    vcpus: u8,
    ended: u64,
    interval: Duration,
    /// Where the guest computes: a word of its RAM.
    pulse: Pulse,
}

impl Subject {
    /// Boots the demo guest and lets it dirty `pages` pages over and over.
    ///
    /// # Errors
    /// No KVM, no such image, a guest that does not answer.
    pub fn start(
        kernel: &Path,
        vcpus: u8,
        memory_bytes: u64,
        pages: u32,
        tracking: Tracking,
    ) -> Result<Self, BenchError> {
        let (frames, heard) = bounded(FRAMES);
        let (guest_end, host_end) = SocketPort::pair().map_err(host("a socket pair"))?;
        let clock = Clock::start();
        let metrics = Arc::new(Metrics::new(StatusBoard::new(&labels(), NodeRole::Primary)));
        let limits = QueueLimits { bytes: HELD_BYTES, max_hold: Duration::from_secs(1) };
        let gate = Gate::new(limits, Arc::new(Sink(frames)), clock, Arc::clone(&metrics));
        let config = demo_config(kernel.to_path_buf(), vcpus, memory_bytes);
        let ports: Vec<Arc<dyn FramePort>> = vec![Arc::new(guest_end)];
        let io = MachineIo { outputs: Arc::clone(&gate) as _, ports, disks: Vec::new(), console_input: None };
        let mut machine = KvmMachine::build(&config, io)?;
        machine.load()?;
        gate.open();
        machine.run()?;
        set_load(heard, host_end, pages)?;
        machine.track_dirty(tracking)?;
        gate.hold();
        let parts = EpochParts {
            gate,
            arena: Arena::new(ARENA_BYTES),
            mirror: Arc::new(Mirror::default()),
            metrics,
            ram_digest: false,
            tracking,
            base_share: 1.0,
            verifier: Arc::new(Verifier::new(Vec::new())),
            disks: Arc::new(OwnerDisks::none()),
            capture: Capture::new(CaptureStrategy::Postponed, Precopy::Never),
        };
        // Long enough for each page of the working set to be written once, whatever the guest's timer adds.
        let round = Duration::from_micros(u64::from(pages) * 1_000_000 / RATE);
        let interval = round + round / 4 + Duration::from_millis(2);
        let mut subject = Self { machine, parts, vcpus, ended: 0, interval, pulse: Pulse(0) };
        subject.pulse = subject.find_pulse()?;
        subject.parts.gate.release_on_commit();
        Ok(subject)
    }

    /// On a busy host the guest may not have run in an epoch, and then its pages are not those where it computes: another one is looked at.
    fn find_pulse(&mut self) -> Result<Pulse, BenchError> {
        let mut tries = 0..PULSE_TRIES;
        loop {
            let (staged, _) = self.end_epoch()?;
            let words = |page: &PageIndex| (page.0 * 4096..(page.0 + 1) * 4096).step_by(8);
            let places: Vec<u64> = scattered(&staged.pages.indexes).iter().flat_map(words).collect();
            self.retire(staged);
            let ram = self.machine.ram();
            match Pulse::find(&places, |place| word(ram, place)) {
                Err(_) if tries.next().is_some() => {}
                found => return found,
            }
        }
    }

    /// Lets the guest run for an epoch and ends it with a checkpoint, through the product's own path.
    ///
    /// # Errors
    /// A checkpoint that failed, or that is not one: sections missing, pages not staged; a guest that does not run on.
    pub fn checkpoint(&mut self) -> Result<Sample, BenchError> {
        let (staged, pause) = self.end_epoch()?;
        let before = self.pulse_in(&staged);
        let ram = self.machine.ram();
        while before == Some(word(ram, self.pulse.0)) {
            if staged.resumed.elapsed() > PATIENCE {
                return Err(BenchError::Wrong("the guest does not run on after a checkpoint".into()));
            }
            // On a busy host the vCPU's thread may wait for this very processor.
            std::thread::yield_now();
        }
        let seen = pause.whole + (Instant::now() - staged.resumed);
        self.check(&staged)?;
        // A guest that computed nothing had no processor: nothing of it was measured.
        let pages = before.map_or(0, |_| staged.pages.len());
        self.retire(staged);
        Ok(Sample { pause, seen, pages })
    }

    fn end_epoch(&mut self) -> Result<(StagedCheckpoint, PauseParts), BenchError> {
        // An epoch is an interval of time.
        std::thread::sleep(self.interval);
        self.ended += 1;
        let epoch = Epoch(self.ended);
        let early = self.parts.capture.precopy(&mut self.machine, &self.parts.arena)?;
        let (captured, pause) = stage(&mut self.machine, &self.parts, early, epoch, Afterwards::RunsOn)?;
        let pause = pause.end()?;
        Ok((captured.finish(&self.parts)?, pause))
    }

    fn retire(&self, staged: StagedCheckpoint) {
        staged.dirty.retire();
        self.parts.gate.committed(staged.epoch);
    }

    /// What the guest had computed when it was stopped, as it was staged; `None` when it computed nothing in the epoch.
    fn pulse_in(&self, staged: &StagedCheckpoint) -> Option<u64> {
        let (page, offset) = (PageIndex(self.pulse.0 / 4096), usize::try_from(self.pulse.0 % 4096).unwrap_or(0));
        let at = staged.pages.indexes.binary_search(&page).ok()?;
        staged.pages.bytes().get(at * PAGE_SIZE + offset..)?.first_chunk().copied().map(u64::from_le_bytes)
    }

    /// Runs `during` with the guest stopped, so that it takes no processor time.
    ///
    /// # Errors
    /// Those of `during`, and a guest that cannot be stopped or resumed.
    pub fn while_stopped<T>(&mut self, during: impl FnOnce() -> Result<T, BenchError>) -> Result<T, BenchError> {
        let paused = PausedVm::pause(&mut self.machine)?;
        let result = during();
        paused.resume()?;
        result
    }

    fn check(&self, staged: &StagedCheckpoint) -> Result<(), BenchError> {
        let StagedCheckpoint { pages, dirty, sections, .. } = staged;
        let wanted = (0..self.vcpus).map(SectionKind::vcpu);
        let mut wanted = wanted.chain([SectionKind::IRQCHIP, SectionKind::CLOCK]);
        if let Some(kind) = wanted.find(|kind| !sections.iter().any(|s| s.kind == *kind && !s.bytes.is_empty())) {
            return Err(BenchError::Wrong(format!("a checkpoint without section {kind:?}")));
        }
        let (staged, dirty) = (pages.len(), dirty.len());
        if staged != dirty || pages.bytes().len() != dirty * PAGE_SIZE {
            return Err(BenchError::Wrong(format!("{dirty} pages were dirty and {staged} were staged")));
        }
        Ok(())
    }
}

/// Pages that are no part of a long row: the load's buffer is one, and where the guest computes is not in it. All of them if nothing else is left.
fn scattered(pages: &[PageIndex]) -> Vec<PageIndex> {
    let rows = pages.chunk_by(|one, next| one.0 + 1 == next.0);
    let short: Vec<PageIndex> = rows.filter(|row| row.len() < ROW).flatten().copied().collect();
    if short.is_empty() { pages.to_vec() } else { short }
}

/// A word of guest RAM, which the guest may be writing.
///
/// # Panics
/// If there is none at this address: it comes from a page of a checkpoint.
fn word(ram: &GuestRam, address: u64) -> u64 {
    let slice = ram.tracked().get_slice(GuestAddress(address), 8).expect("a page of a checkpoint is RAM");
    slice.get_atomic_ref::<AtomicU64>(0).expect("a word of a page is aligned").load(Ordering::Relaxed)
}

/// The guest computes whenever it does not dirty pages: a pause finds its vCPU running, as the floor's does. One that sleeps has to be woken by the host
/// first, which says nothing about the pause: a guest with nothing to do is not disturbed.
fn set_load(heard: Receiver<Vec<u8>>, to_guest: SocketPort, pages: u32) -> Result<(), BenchError> {
    let commands = ["FT.WORK 1", &format!("FT.DIRTY {RATE} {pages}")];
    let answers = say(heard, Arc::new(to_guest), KV_PORT, &commands, PATIENCE).map_err(BenchError::Wrong)?;
    match commands.iter().zip(&answers).find(|(_, answer)| *answer != "+OK") {
        Some((command, answer)) => Err(BenchError::Wrong(format!("{command}: {answer}"))),
        None => Ok(()),
    }
}

/// Nobody looks at this process's status; the gate and the metrics want one.
fn labels() -> Labels {
    Labels {
        vm: "bench".into(),
        vm_id: "bench".into(),
        machine: "kvm",
        node: "a".into(),
        peer: "b".into(),
        incarnation: Incarnation(1),
        pace: failover::config::EpochPace::Fixed(Duration::from_millis(25)),
        output_limit: 64 << 20,
        insecure_link: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_left_out() {
        let pages = |numbers: &[u64]| numbers.iter().map(|&number| PageIndex(number)).collect::<Vec<_>>();
        let buffer = 100..100 + u64::try_from(ROW).unwrap();
        let all: Vec<u64> = [1, 2, 7].into_iter().chain(buffer.clone()).chain([900]).collect();
        assert_eq!(scattered(&pages(&all)), pages(&[1, 2, 7, 900]));
        let only: Vec<u64> = buffer.collect();
        assert_eq!(scattered(&pages(&only)), pages(&only));
    }
}
