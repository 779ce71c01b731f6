//! The gate: the [`queue`](super::queue) behind a lock, with the way out attached.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use replication_proto::Epoch;

use super::bell::Bell;
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
    bell: Arc<Bell>,
    max_hold: Duration,
    /// Frames that were released in time and were too old when their turn to be written came.
    dropped_late: AtomicU64,
}

struct State {
    queue: OutputQueue,
    speakers: Speakers,
}

impl Gate {
    /// A silent gate: nothing leaves and nothing is kept until [`Gate::open`].
    pub fn new(limits: QueueLimits, world: Arc<dyn World>, clock: Clock, metrics: Arc<Metrics>) -> Arc<Self> {
        let max_hold = limits.max_hold;
        let state = Mutex::new(State { queue: OutputQueue::new(limits), speakers: Speakers::default() });
        let dropped_late = AtomicU64::new(0);
        let bell = Arc::default();
        Arc::new(Self { state, exit: Mutex::new(()), world, clock, metrics, bell, max_hold, dropped_late })
    }

    /// Tells when an output waits and, once somebody says so there, when commits arrive.
    pub fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    /// Fixes the outputs of the epoch that ends now. Only while the guest is paused. `None`: this side was fenced meanwhile.
    pub fn seal(&self, epoch: Epoch) -> Option<HeldFrames> {
        let mut state = self.lock();
        let outputs = state.queue.seal(epoch)?;
        let speakers = state.speakers.all();
        self.bell.sealed();
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

    /// The frames of `epoch`, the last one before a switchover, are the new owner's to send.
    pub fn keep(&self, epoch: Epoch) {
        self.lock().queue.keep(epoch);
    }

    /// Everything waits from now on, until an epoch that ends after this is committed: so one shall end.
    pub fn hold(&self) {
        let mut state = self.lock();
        state.queue.hold();
        self.bell.output_waits(self.clock.now());
    }

    /// Solo: everything leaves. The lock is kept while the held outputs are written, so that new ones cannot overtake them.
    pub fn open(&self) {
        let _exit = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.lock();
        let released = state.queue.open(self.clock.now());
        self.bell.sealed();
        self.write(released);
    }

    /// Whether the checkpoint of `epoch` covers everything that was ever let out (rule R5).
    pub fn covers_released(&self, epoch: Epoch) -> bool {
        self.lock().queue.covers_released(epoch)
    }

    /// This side does not own the guest: nothing leaves, nothing is kept.
    pub fn silence(&self) {
        let mut state = self.lock();
        state.queue.silence();
        self.bell.sealed();
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
        let late = self.dropped_late.load(Ordering::Relaxed);
        let mut counters = self.lock().queue.counters();
        counters.released = counters.released.saturating_sub(late);
        counters.dropped_late += late;
        counters
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
        let began = self.clock.now();
        for Released { output, held } in released {
            // This process may be stopped between two frames for any time; what it says afterwards must not be older than R8 allows.
            let held = held + self.clock.now().saturating_sub(began);
            if matches!(output, Output::Frame { .. }) && held > self.max_hold {
                self.dropped_late.fetch_add(1, Ordering::Relaxed);
                continue;
            }
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
        } else if state.queue.waits() {
            // Before the lock is let go: a seal in between would take the output and leave the word.
            self.bell.output_waits(now);
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

#[cfg(test)]
mod tests {
    use super::*;
    use failover::status::{Labels, NodeRole, StatusBoard};
    use replication_proto::Incarnation;
    use vmm::Outputs as _;

    const MAX_HOLD: Duration = Duration::from_millis(400);

    /// A LAN on which the process is stopped while it writes its first frame.
    #[derive(Default)]
    struct StoppedAtFirst(Mutex<Vec<u8>>);

    impl World for StoppedAtFirst {
        fn frame(&self, _nic: u8, frame: &[u8]) {
            let mut seen = self.0.lock().unwrap();
            if seen.is_empty() {
                std::thread::sleep(MAX_HOLD + Duration::from_millis(50));
            }
            seen.push(frame[0]);
        }

        fn console(&self, bytes: &[u8]) {
            self.0.lock().unwrap().extend_from_slice(bytes);
        }
    }

    /// R8 holds for each frame when it is written, not for all of them when they are released; console bytes are never dropped.
    #[test]
    fn frames_do_not_outlive_a_stop_in_the_middle_of_their_release() {
        let world = Arc::new(StoppedAtFirst::default());
        let limits = QueueLimits { bytes: 1_000, max_hold: MAX_HOLD };
        let labels = Labels {
            vm: "t".into(),
            vm_id: String::new(),
            machine: "model",
            node: "a".into(),
            peer: "b".into(),
            incarnation: Incarnation(1),
            pace: failover::config::EpochPace::Fixed(MAX_HOLD),
            output_limit: 0,
            insecure_link: false,
        };
        let metrics = Arc::new(Metrics::new(StatusBoard::new(&labels, NodeRole::Primary)));
        let gate = Gate::new(limits, Arc::clone(&world) as Arc<dyn World>, Clock::start(), metrics);
        gate.open();
        gate.hold();
        gate.frame(0, &[1]);
        gate.frame(0, &[2]);
        gate.console(&[3]);
        gate.seal(Epoch(1)).unwrap();
        gate.release_on_commit();
        gate.committed(Epoch(1));
        assert_eq!(*world.0.lock().unwrap(), [1, 3]);
        let QueueCounters { released, dropped_late, .. } = gate.counters();
        assert_eq!((released, dropped_late), (2, 1));
    }
}
