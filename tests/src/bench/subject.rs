//! The product's machine with the demo guest under a dirtying load, and one checkpoint of it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

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
use replication_proto::{Epoch, Incarnation};
use vmm::{FramePort, KvmMachine, Machine, MachineIo, PAGE_SIZE, PausedVm, SectionKind, SocketPort, Tracking};

use super::{BenchError, host};
use crate::machine::client::say;
use crate::machine::demo_config;

/// Pages that the guest writes a second: as fast as a busy server, and less than what first writes after a checkpoint allow here.
const RATE: u64 = 200_000;
/// Frames that may wait for the client that sets the load.
const FRAMES: usize = 256;
/// Limits like those of the default configuration.
const ARENA_BYTES: usize = 1 << 30;
const HELD_BYTES: usize = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(30);
const KV_PORT: u16 = 6379;

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
    /// Pages that were really dirty, and staged.
    pub pages: usize,
}

/// The machine and what a checkpoint of it needs.
pub struct Subject {
    machine: KvmMachine,
    parts: EpochParts,
    vcpus: u8,
    ended: u64,
    interval: Duration,
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
        let mut subject =
            Self { machine, parts, vcpus, ended: 0, interval: round + round / 4 + Duration::from_millis(2) };
        subject.checkpoint()?;
        subject.parts.gate.release_on_commit();
        Ok(subject)
    }

    /// Lets the guest run for an epoch and ends it with a checkpoint, through the product's own path.
    ///
    /// # Errors
    /// A checkpoint that failed, or that is not one: sections missing, pages not staged.
    pub fn checkpoint(&mut self) -> Result<Sample, BenchError> {
        // An epoch is an interval of time.
        std::thread::sleep(self.interval);
        self.ended += 1;
        let epoch = Epoch(self.ended);
        let early = self.parts.capture.precopy(&mut self.machine, &self.parts.arena)?;
        let (captured, pause) = stage(&mut self.machine, &self.parts, early, epoch, Afterwards::RunsOn)?;
        let pause = pause.end()?;
        let staged = captured.finish(&self.parts)?;
        self.check(&staged)?;
        let StagedCheckpoint { pages, dirty, .. } = staged;
        let pages = pages.len();
        dirty.retire();
        self.parts.gate.committed(epoch);
        Ok(Sample { pause, pages })
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

fn set_load(heard: Receiver<Vec<u8>>, to_guest: SocketPort, pages: u32) -> Result<(), BenchError> {
    let command = format!("FT.DIRTY {RATE} {pages}");
    let answer = say(heard, Arc::new(to_guest), KV_PORT, &command, PATIENCE).map_err(BenchError::Wrong)?;
    if answer == "+OK" { Ok(()) } else { Err(BenchError::Wrong(format!("{command}: {answer}"))) }
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
