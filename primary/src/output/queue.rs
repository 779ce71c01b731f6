//! Which outputs wait for which epoch, and when they may leave. Pure: time is an argument, nothing is written here.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use replication_proto::Epoch;

/// One thing that the guest said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// An Ethernet frame on a network device.
    Frame {
        /// Which device.
        nic: u8,
        /// The frame, without any virtio header.
        bytes: Bytes,
    },
    /// Bytes written to the serial console.
    Console(Bytes),
}

impl Output {
    fn len(&self) -> usize {
        match self {
            Self::Frame { bytes, .. } | Self::Console(bytes) => bytes.len(),
        }
    }
}

/// Who may speak, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Solo: outputs leave at once.
    Open,
    /// Everything waits; acknowledgements are noted but release nothing. Entered on silence, and before the commit that makes a
    /// backup the one in sync.
    Held,
    /// Protected: what belongs to a committed epoch leaves, the rest waits.
    OnCommit,
    /// Fenced, or not yet activated: nothing leaves and nothing is kept.
    Silent,
}

/// Bounds of the queue.
#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    /// Most bytes held; further frames are dropped, as a full network card would.
    pub bytes: usize,
    /// Frames held longer than this are dropped instead of released (rule R8). Console bytes never are.
    pub max_hold: Duration,
}

/// Counters of the queue, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Outputs that left, at once or after their commit.
    pub released: u64,
    /// Frames dropped because they were held too long.
    pub dropped_late: u64,
    /// Frames dropped because the queue was full.
    pub dropped_full: u64,
    /// Outputs discarded because this side does not own the guest.
    pub discarded: u64,
}

#[derive(Clone, Debug)]
struct Held {
    since: Duration,
    output: Output,
}

/// An output that may leave now, and how long it was held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Released {
    /// What leaves.
    pub output: Output,
    /// For how long it waited.
    pub held: Duration,
}

/// The queue of held outputs.
#[derive(Clone, Debug)]
pub struct OutputQueue {
    mode: Mode,
    limits: QueueLimits,
    /// Outputs of the epoch that is running.
    current: Vec<Held>,
    /// Outputs of sealed epochs, in order.
    sealed: VecDeque<(Epoch, Vec<Held>)>,
    last_sealed: Option<Epoch>,
    /// First epoch sealed since outputs are held: its checkpoint covers everything that was ever let out.
    covering: Option<Epoch>,
    committed: Option<Epoch>,
    /// From this epoch on a commit releases no frames.
    kept_from: Option<Epoch>,
    /// Frames of committed epochs that were not released for that reason.
    kept: Vec<Held>,
    held_bytes: usize,
    held_count: usize,
    counters: QueueCounters,
}

impl OutputQueue {
    /// A queue that says nothing and keeps nothing until it is opened.
    pub fn new(limits: QueueLimits) -> Self {
        Self {
            mode: Mode::Silent,
            limits,
            current: Vec::new(),
            sealed: VecDeque::new(),
            last_sealed: None,
            covering: None,
            committed: None,
            kept_from: None,
            kept: Vec::new(),
            held_bytes: 0,
            held_count: 0,
            counters: QueueCounters::default(),
        }
    }

    /// The mode in force.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Bytes and outputs that wait.
    pub fn held(&self) -> (usize, usize) {
        (self.held_bytes, self.held_count)
    }

    /// Whether an output waits for the end of the running epoch.
    pub fn waits(&self) -> bool {
        !self.current.is_empty()
    }

    /// What happened so far.
    pub fn counters(&self) -> QueueCounters {
        self.counters
    }

    /// The guest said something. Whatever may leave at once is returned; the rest is kept.
    pub fn push(&mut self, output: Output, now: Duration) -> Option<Output> {
        match self.mode {
            Mode::Open => {
                self.counters.released += 1;
                Some(output)
            }
            Mode::Silent => {
                self.counters.discarded += 1;
                None
            }
            Mode::Held | Mode::OnCommit => {
                let is_frame = matches!(output, Output::Frame { .. });
                if is_frame && self.held_bytes + output.len() > self.limits.bytes {
                    self.counters.dropped_full += 1;
                    return None;
                }
                self.held_bytes += output.len();
                self.held_count += 1;
                self.current.push(Held { since: now, output });
                None
            }
        }
    }

    /// The epoch ends here: outputs so far belong to it, later ones to the next. Called once for each epoch, while the guest is
    /// paused. Returns the outputs, which travel with the epoch: none while they leave at once. `None` when this side was fenced
    /// meanwhile.
    pub fn seal(&mut self, epoch: Epoch) -> Option<Vec<Output>> {
        if self.mode == Mode::Silent {
            return None;
        }
        if self.mode != Mode::Open && self.covering.is_none() {
            self.covering = Some(epoch);
        }
        assert!(self.last_sealed.is_none_or(|last| epoch > last), "epoch {epoch} sealed after {:?}", self.last_sealed);
        self.last_sealed = Some(epoch);
        let outputs = std::mem::take(&mut self.current);
        let travelling = outputs.iter().map(|h| h.output.clone()).collect();
        self.sealed.push_back((epoch, outputs));
        Some(travelling)
    }

    /// The frames of `epoch` and later ones do not leave on commit: the side that takes the guest over says them, after it has announced itself. They wait
    /// for [`Self::open`], in case it does not. Console bytes leave as ever: nobody says them again.
    pub fn keep(&mut self, epoch: Epoch) {
        self.kept_from = Some(epoch);
    }

    /// The backup holds every epoch up to this one. In [`Mode::OnCommit`] their outputs are returned, in order.
    pub fn committed(&mut self, epoch: Epoch, now: Duration) -> Vec<Released> {
        self.committed = Some(self.committed.map_or(epoch, |c| c.max(epoch)));
        if self.mode == Mode::OnCommit { self.release_committed(now) } else { Vec::new() }
    }

    /// From now on a commit releases (the record names the backup). Returns what is committed already.
    pub fn release_on_commit(&mut self, now: Duration) -> Vec<Released> {
        assert_ne!(self.mode, Mode::Open, "outputs must be held before commits can be trusted (rule R5)");
        assert_ne!(self.mode, Mode::Silent, "a side that does not own the guest releases nothing");
        self.mode = Mode::OnCommit;
        // Protection begins anew: no switchover is under way, however late its last checkpoint was taken. What it kept is this side's to say.
        self.kept_from = None;
        let kept = std::mem::take(&mut self.kept);
        let mut released = self.release(kept, now);
        released.extend(self.release_committed(now));
        released
    }

    /// From now on everything waits.
    pub fn hold(&mut self) {
        self.mode = Mode::Held;
        self.covering = None;
    }

    /// Whether the checkpoint that ends `epoch` was taken after outputs began to be held, and so covers everything let out (rule R5).
    pub fn covers_released(&self, epoch: Epoch) -> bool {
        self.covering.is_some_and(|first| epoch >= first)
    }

    /// Solo: everything that waits leaves, in order, and so does all that follows. Only after the record says so (rule R3).
    pub fn open(&mut self, now: Duration) -> Vec<Released> {
        self.mode = Mode::Open;
        let mut waiting = std::mem::take(&mut self.kept);
        waiting.extend(self.sealed.drain(..).flat_map(|(_, held)| held));
        waiting.append(&mut self.current);
        self.covering = None;
        self.committed = None;
        self.kept_from = None;
        self.release(waiting, now)
    }

    /// This side lost the guest: whatever waits belongs to a lineage that ended.
    pub fn silence(&mut self) {
        self.mode = Mode::Silent;
        self.counters.discarded += u64::try_from(self.held_count).unwrap_or(u64::MAX);
        self.sealed.clear();
        self.current.clear();
        self.kept.clear();
        self.held_bytes = 0;
        self.held_count = 0;
    }

    fn release_committed(&mut self, now: Duration) -> Vec<Released> {
        let Some(committed) = self.committed else { return Vec::new() };
        let mut leaving = Vec::new();
        while let Some((epoch, _)) = self.sealed.front() {
            if *epoch > committed {
                break;
            }
            let Some((epoch, held)) = self.sealed.pop_front() else { break };
            if self.kept_from.is_none_or(|from| epoch < from) {
                leaving.extend(held);
                continue;
            }
            let (frames, console): (Vec<Held>, Vec<Held>) =
                held.into_iter().partition(|held| matches!(held.output, Output::Frame { .. }));
            self.kept.extend(frames);
            leaving.extend(console);
        }
        self.release(leaving, now)
    }

    fn release(&mut self, leaving: Vec<Held>, now: Duration) -> Vec<Released> {
        let mut released = Vec::with_capacity(leaving.len());
        for Held { since, output } in leaving {
            self.held_bytes -= output.len();
            self.held_count -= 1;
            let held = now.saturating_sub(since);
            if matches!(output, Output::Frame { .. }) && held > self.limits.max_hold {
                self.counters.dropped_late += 1;
            } else {
                self.counters.released += 1;
                released.push(Released { output, held });
            }
        }
        released
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn queue() -> OutputQueue {
        OutputQueue::new(QueueLimits { bytes: 1000, max_hold: 1000 * MS })
    }

    fn frame(tag: u8) -> Output {
        Output::Frame { nic: 0, bytes: Bytes::from(vec![tag; 10]) }
    }

    fn tags(released: &[Released]) -> Vec<u8> {
        released
            .iter()
            .map(|r| match &r.output {
                Output::Frame { bytes, .. } | Output::Console(bytes) => bytes[0],
            })
            .collect()
    }

    /// Before a switchover: the new owner says the last epoch's frames; nobody says console bytes again.
    #[test]
    fn frames_of_the_last_epoch_are_kept_for_the_new_owner() {
        let sealed = || {
            let mut queue = queue();
            queue.hold();
            queue.push(frame(1), Duration::ZERO);
            queue.seal(Epoch(1)).unwrap();
            queue.push(frame(2), Duration::ZERO);
            queue.push(Output::Console(Bytes::from_static(b"c")), Duration::ZERO);
            queue.release_on_commit(Duration::ZERO);
            queue.keep(Epoch(2));
            assert_eq!(queue.seal(Epoch(2)).unwrap().len(), 2, "they travel");
            let left = queue.committed(Epoch(2), MS);
            let left: Vec<Output> = left.into_iter().map(|released| released.output).collect();
            assert_eq!(left, [frame(1), Output::Console(Bytes::from_static(b"c"))]);
            assert_eq!(queue.held().1, 1);
            queue
        };
        let mut moved = sealed();
        moved.silence();
        assert_eq!((moved.held(), moved.counters().discarded), ((0, 0), 1));
        // The backup did not take it: it is said here after all, and later epochs are as ever.
        let mut stayed = sealed();
        stayed.hold();
        stayed.push(frame(3), MS);
        let left: Vec<Output> = stayed.open(2 * MS).into_iter().map(|released| released.output).collect();
        assert_eq!((left, stayed.held()), (vec![frame(2), frame(3)], (0, 0)));
        // Found by the simulator (seed 50): the last checkpoint was taken after the switchover had been given up, and no frame ever left again.
        stayed.keep(Epoch(3));
        stayed.hold();
        stayed.push(frame(4), MS);
        stayed.seal(Epoch(3)).unwrap();
        stayed.release_on_commit(MS);
        assert_eq!(stayed.committed(Epoch(3), MS).len(), 1);
    }

    #[test]
    fn solo_output_leaves_at_once() {
        let mut q = queue();
        q.open(MS);
        assert_eq!(q.push(frame(1), MS), Some(frame(1)));
        assert_eq!(q.held(), (0, 0));
    }

    #[test]
    fn nothing_leaves_before_its_commit_and_then_in_order() {
        let mut q = queue();
        q.open(MS);
        q.hold();
        assert!(q.release_on_commit(MS).is_empty());
        q.push(frame(1), MS);
        assert_eq!(q.seal(Epoch(1)), Some(vec![frame(1)]));
        q.push(frame(2), MS);
        q.seal(Epoch(2));
        q.push(frame(3), MS);
        assert_eq!(tags(&q.committed(Epoch(1), 2 * MS)), [1]);
        assert_eq!(tags(&q.committed(Epoch(2), 2 * MS)), [2]);
        assert_eq!(q.held(), (10, 1));
    }

    #[test]
    fn commits_before_the_record_names_the_backup_release_nothing() {
        let mut q = queue();
        q.open(MS);
        q.hold();
        q.push(frame(1), MS);
        q.seal(Epoch(5));
        assert!(q.committed(Epoch(5), MS).is_empty());
        assert_eq!(tags(&q.release_on_commit(MS)), [1]);
    }

    #[test]
    fn silence_of_the_backup_holds_and_solo_releases_everything_in_order() {
        let mut q = queue();
        q.open(MS);
        q.hold();
        q.release_on_commit(MS);
        q.push(frame(1), MS);
        q.seal(Epoch(1));
        q.push(frame(2), MS);
        q.hold();
        assert!(q.committed(Epoch(1), MS).is_empty());
        assert_eq!(tags(&q.open(MS)), [1, 2]);
        assert_eq!(q.held(), (0, 0));
    }

    #[test]
    fn late_frames_are_dropped_and_late_console_bytes_are_not() {
        let mut q = queue();
        q.open(MS);
        q.hold();
        q.push(frame(1), MS);
        q.push(Output::Console(Bytes::from_static(b"\x02")), MS);
        assert_eq!(tags(&q.open(2000 * MS)), [2]);
        assert_eq!(q.counters().dropped_late, 1);
    }

    #[test]
    fn a_full_queue_drops_frames_and_keeps_console_bytes() {
        let mut q = queue();
        q.open(MS);
        q.hold();
        for _ in 0..200 {
            q.push(frame(1), MS);
        }
        q.push(Output::Console(Bytes::from_static(b"\x02")), MS);
        assert_eq!(q.counters().dropped_full, 100);
        assert_eq!(q.held(), (1001, 101));
    }

    #[test]
    fn a_fenced_side_says_nothing_any_more() {
        let mut q = queue();
        q.open(MS);
        q.hold();
        q.push(frame(1), MS);
        q.seal(Epoch(1));
        q.silence();
        assert_eq!(q.push(frame(2), MS), None);
        assert_eq!(q.seal(Epoch(2)), None);
        assert!(q.committed(Epoch(1), MS).is_empty());
        assert_eq!(q.counters().discarded, 2);
    }

    #[test]
    fn an_epoch_covers_what_was_released_only_if_it_was_sealed_while_outputs_were_held() {
        let mut q = queue();
        q.open(MS);
        q.push(frame(1), MS);
        assert_eq!(q.seal(Epoch(1)), Some(vec![]));
        assert!(!q.covers_released(Epoch(1)));
        q.hold();
        q.push(frame(2), MS);
        assert!(!q.covers_released(Epoch(1)));
        q.seal(Epoch(2));
        assert!(!q.covers_released(Epoch(1)) && q.covers_released(Epoch(2)));
        q.hold();
        assert!(!q.covers_released(Epoch(2)));
    }

    #[test]
    #[should_panic(expected = "rule R5")]
    fn commits_cannot_be_trusted_while_output_is_open() {
        let mut q = queue();
        q.open(MS);
        q.release_on_commit(MS);
    }
}
