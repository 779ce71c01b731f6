//! The gate: the [`queue`](super::queue) behind a lock, with the way out attached.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use replication_proto::Epoch;

use super::held::HeldFrames;
use super::queue::{Mode, Output, OutputQueue, QueueCounters, QueueLimits, Released};
use super::speakers::{Speaker, Speakers};
use super::world::World;
use crate::clock::Clock;
use crate::metrics::Metrics;

/// Everything that the guest says passes here. Implements the machine's [`vmm::Outputs`].
pub struct Gate {
    state: Mutex<State>,
    /// Held by whoever is letting outputs out, so that two threads cannot overtake each other between taking from the queue and writing.
    exit: Mutex<()>,
    world: Arc<dyn World>,
    clock: Clock,
    metrics: Arc<Metrics>,
}

struct State {
    queue: OutputQueue,
    speakers: Speakers,
}

impl Gate {
    /// A silent gate: nothing leaves and nothing is kept until [`Gate::open`].
    pub fn new(limits: QueueLimits, world: Arc<dyn World>, clock: Clock, metrics: Arc<Metrics>) -> Arc<Self> {
        let state = Mutex::new(State { queue: OutputQueue::new(limits), speakers: Speakers::default() });
        Arc::new(Self { state, exit: Mutex::new(()), world, clock, metrics })
    }

    /// Fixes the outputs of the epoch that ends now. Only while the guest is paused. `None`: this side was fenced meanwhile.
    pub fn seal(&self, epoch: Epoch) -> Option<HeldFrames> {
        let mut state = self.lock();
        let outputs = state.queue.seal(epoch)?;
        let speakers = state.speakers.all();
        drop(state);
        Some(HeldFrames::of(&outputs, speakers))
    }

    /// The backup acknowledged every epoch up to this one.
    pub fn committed(&self, epoch: Epoch) {
        self.let_out(|queue, now| queue.committed(epoch, now));
    }

    /// The record names the backup: commits release from now on.
    pub fn release_on_commit(&self) {
        self.let_out(OutputQueue::release_on_commit);
    }

    /// Everything waits from now on.
    pub fn hold(&self) {
        self.lock().queue.hold();
    }

    /// Solo: everything leaves. The lock is kept while the held outputs are written, so that new ones cannot overtake them.
    pub fn open(&self) {
        let _exit = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.lock();
        let released = state.queue.open(self.clock.now());
        self.write(released);
    }

    /// Whether the checkpoint of `epoch` covers everything that was ever let out (rule R5).
    pub fn covers_released(&self, epoch: Epoch) -> bool {
        self.lock().queue.covers_released(epoch)
    }

    /// This side does not own the guest: nothing leaves, nothing is kept.
    pub fn silence(&self) {
        self.lock().queue.silence();
    }

    /// The mode in force.
    pub fn mode(&self) -> Mode {
        self.lock().queue.mode()
    }

    /// `(bytes, outputs)` that wait.
    pub fn held(&self) -> (usize, usize) {
        self.lock().queue.held()
    }

    /// Counters since the start.
    pub fn counters(&self) -> QueueCounters {
        self.lock().queue.counters()
    }

    /// The addresses that the guest is known to speak from.
    pub fn speakers(&self) -> Vec<Speaker> {
        self.lock().speakers.all()
    }

    /// Takes over what the other side knew of the guest's addresses.
    pub fn adopt_speakers(&self, speakers: Vec<Speaker>) {
        self.lock().speakers = Speakers::from_seen(speakers);
    }

    /// Writes a frame that is not the guest's own output of now: an announcement, or a frame of the last committed epoch that is sent
    /// again. Only a side that owns the guest may.
    pub fn send_for_guest(&self, nic: u8, frame: &[u8]) {
        if self.mode() != Mode::Silent {
            self.world.frame(nic, frame);
        }
    }

    fn let_out(&self, step: impl FnOnce(&mut OutputQueue, Duration) -> Vec<Released>) {
        let _exit = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        let released = step(&mut self.lock().queue, self.clock.now());
        self.write(released);
    }

    fn write(&self, released: Vec<Released>) {
        for Released { output, held } in released {
            self.metrics.output_held(held);
            self.send(&output);
        }
    }

    fn send(&self, output: &Output) {
        match output {
            Output::Frame { nic, bytes } => self.world.frame(*nic, bytes),
            Output::Console(bytes) => self.world.console(bytes),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, output: Output) {
        let now = self.clock.now();
        let mut state = self.lock();
        if let Output::Frame { nic, bytes } = &output {
            state.speakers.look(*nic, bytes);
        }
        // Solo: written under the lock, so that two vCPUs, or a vCPU and `open`, keep their order.
        if let Some(output) = state.queue.push(output, now) {
            self.send(&output);
        }
    }
}

impl vmm::Outputs for Gate {
    fn frame(&self, nic: u8, frame: &[u8]) {
        self.push(Output::Frame { nic, bytes: Bytes::copy_from_slice(frame) });
    }

    fn console(&self, bytes: &[u8]) {
        self.push(Output::Console(Bytes::copy_from_slice(bytes)));
    }
}
