//! Where the threads of a process put what they know, and where everybody reads it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use jiff::Timestamp;
use replication_proto::{Incarnation, NodeName};

use super::{
    ArbiterStatus, CaptureStatus, Counters, Distribution, LinkStatus, NodeRole, OutputStatus, OverloadStatus,
    PacingStatus, PeerStatus, SCHEMA, Status, Timings,
};
use crate::config::{EpochPace, MachineKind, PairConfig};
use crate::decide::{Gate, StateName, View};
use crate::reason::ReasonCode;

/// Longest duration that a distribution tells apart from longer ones, in microseconds.
const LONGEST_MICROS: u64 = 60_000_000;
/// An event loop that gives no sign of life for this long does not know whether a takeover would be granted. The loops wake ten times a second.
const ARMED_FOR: Duration = Duration::from_secs(1);
/// Decimal digits that a percentile is exact to.
const DIGITS: u8 = 2;

/// What a duration belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timing {
    /// Guest paused for a checkpoint.
    Pause,
    /// Encoding and sending one.
    Transfer,
    /// From the last byte sent to the ack.
    Ack,
    /// Output held.
    OutputHold,
    /// From evidence to the guest running on this side.
    Failover,
}

/// What does not change in the life of a process.
#[derive(Debug, Clone)]
pub struct Labels {
    /// Name of the VM.
    pub vm: String,
    /// UUID of the VM.
    pub vm_id: String,
    /// `kvm` or `model`.
    pub machine: &'static str,
    /// This node.
    pub node: String,
    /// The other node.
    pub peer: String,
    /// Random id of this process.
    pub incarnation: Incarnation,
    /// When epochs end.
    pub pace: EpochPace,
    /// Limit of held output, in bytes.
    pub output_limit: u64,
    /// The link is neither authenticated nor encrypted, and not loopback.
    pub insecure_link: bool,
}

impl Labels {
    /// From the configuration.
    ///
    /// # Panics
    /// When `me` is none of its nodes.
    pub fn new(config: &PairConfig, me: &NodeName, incarnation: Incarnation) -> Self {
        let (peer, _) = config.peer_of(me).expect("a node of this configuration");
        Self {
            vm: config.vm.name.to_string(),
            vm_id: config.vm.id.to_string(),
            machine: match config.vm.machine {
                MachineKind::Kvm => "kvm",
                MachineKind::Model => "model",
            },
            node: me.to_string(),
            peer: peer.to_string(),
            incarnation,
            pace: config.epoch.pace,
            output_limit: config.limits.output,
            insecure_link: config.link.insecure_lab,
        }
    }
}

#[derive(Debug)]
struct Inner {
    status: Status,
    histograms: [Histogram<u64>; 5],
    sums: [Duration; 5],
    alive: Instant,
    state_since: Instant,
    /// When the guest began to run unprotected, if it does.
    unprotected_since: Option<Instant>,
    unprotected_before: Duration,
    last_commit: Option<Instant>,
    /// When the core was last asked: ages grow from there.
    applied: Instant,
    ending: bool,
}

/// Shared by all threads of a process. Updates are short; nothing is rendered under the lock.
#[derive(Debug, Clone)]
pub struct StatusBoard(Arc<Mutex<Inner>>);

impl StatusBoard {
    /// A board of a process that is starting.
    pub fn new(labels: &Labels, role: NodeRole) -> Self {
        let now = Instant::now();
        let reason = ReasonCode::Starting;
        let warnings = if labels.insecure_link {
            vec!["the replication link is neither authenticated nor encrypted (insecure_lab = true)".to_owned()]
        } else {
            vec![]
        };
        let status = Status {
            schema: SCHEMA.into(),
            vm: labels.vm.clone(),
            vm_id: labels.vm_id.clone(),
            machine: labels.machine.into(),
            node: labels.node.clone(),
            role,
            state: StateName::Starting,
            protected: false,
            armed: false,
            reason,
            reason_text: reason.text().into(),
            next_step: reason.next_step().into(),
            generation: 0,
            epoch: 0,
            pacing: PacingStatus::configured(labels.pace),
            overload: OverloadStatus::default(),
            capture: CaptureStatus::default(),
            lag_epochs: 0,
            lag_seconds: None,
            since: stamp(),
            state_seconds: 0.0,
            unprotected_seconds_total: 0.0,
            unprotected_seconds: None,
            protects_in_seconds: None,
            resync_remaining_bytes: 0,
            resync_total_bytes: 0,
            resync_left_seconds: None,
            link: LinkStatus { insecure: labels.insecure_link, ..LinkStatus::default() },
            peer: PeerStatus { node: labels.peer.clone(), ..PeerStatus::default() },
            arbiter: ArbiterStatus::default(),
            output: OutputStatus { gate: "held".into(), limit_bytes: labels.output_limit, ..OutputStatus::default() },
            timings: Timings::default(),
            counters: Counters::default(),
            warnings,
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            incarnation: labels.incarnation.to_string(),
        };
        let histogram =
            || Histogram::new_with_bounds(1, LONGEST_MICROS, DIGITS).expect("constant bounds that the library accepts");
        Self(Arc::new(Mutex::new(Inner {
            status,
            histograms: std::array::from_fn(|_| histogram()),
            sums: [Duration::ZERO; 5],
            alive: now,
            state_since: now,
            unprotected_since: None,
            unprotected_before: Duration::ZERO,
            last_commit: None,
            applied: now,
            ending: false,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A thread that panicked in an update left at worst a stale number behind.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what the decision core says. Called by the core's event loop after each input and now and then; it also proves that the loop
    /// lives ([`Self::idle_for`]).
    pub fn apply(&self, view: &View) {
        let mut inner = self.lock();
        let now = Instant::now();
        inner.alive = now;
        inner.applied = now;
        let before = inner.status.state;
        let unprotected = view.state.runs() && !view.protected;
        match (unprotected, inner.unprotected_since) {
            (true, None) => inner.unprotected_since = Some(now),
            (false, Some(since)) => {
                inner.unprotected_before += now - since;
                inner.unprotected_since = None;
            }
            _ => {}
        }
        if view.state != before {
            inner.state_since = now;
            inner.status.since = stamp();
            if view.state == StateName::Fenced {
                inner.status.counters.fenced += 1;
            }
        }
        fill(&mut inner.status, view);
    }

    /// Changes whatever a shell knows better than the core: link, epoch, held output, counters.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock().status);
    }

    /// Records a duration.
    pub fn observe(&self, timing: Timing, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).clamp(1, LONGEST_MICROS);
        let mut inner = self.lock();
        let at = index(timing);
        inner.histograms[at].saturating_record(micros);
        inner.sums[at] = inner.sums[at].saturating_add(took);
    }

    /// An epoch was committed.
    pub fn committed(&self, epoch: u64) {
        let mut inner = self.lock();
        inner.last_commit = Some(Instant::now());
        inner.status.counters.epochs_committed += 1;
        if inner.status.role == NodeRole::Primary {
            inner.status.peer.epoch = epoch;
        } else {
            inner.status.epoch = epoch;
        }
    }

    /// The process is about to end: probes fail from now on.
    pub fn ending(&self) {
        self.lock().ending = true;
    }

    /// Whether [`Self::ending`] was called.
    pub fn is_ending(&self) -> bool {
        self.lock().ending
    }

    /// For how long the event loop gave no sign of life.
    pub fn idle_for(&self) -> Duration {
        self.lock().alive.elapsed()
    }

    /// The status as of now.
    pub fn snapshot(&self) -> Status {
        let inner = self.lock();
        let now = Instant::now();
        let mut status = inner.status.clone();
        grow_old(&mut status, now - inner.applied);
        status.state_seconds = (now - inner.state_since).as_secs_f64();
        let running = inner.unprotected_since.map_or(Duration::ZERO, |since| now - since);
        status.unprotected_seconds = inner.unprotected_since.map(|since| (now - since).as_secs_f64());
        status.unprotected_seconds_total = (inner.unprotected_before + running).as_secs_f64();
        status.lag_seconds = inner.last_commit.map(|at| (now - at).as_secs_f64());
        let histograms = inner.histograms.clone();
        let sums = inner.sums;
        drop(inner);
        let of = |timing| distribution(&histograms[index(timing)], sums[index(timing)]);
        status.timings = Timings {
            pause: of(Timing::Pause),
            transfer: of(Timing::Transfer),
            ack: of(Timing::Ack),
            output_hold: of(Timing::OutputHold),
            failover: of(Timing::Failover),
        };
        status
    }
}

const fn index(timing: Timing) -> usize {
    match timing {
        Timing::Pause => 0,
        Timing::Transfer => 1,
        Timing::Ack => 2,
        Timing::OutputHold => 3,
        Timing::Failover => 4,
    }
}

fn stamp() -> String {
    let now = Timestamp::now();
    now.round(jiff::Unit::Millisecond).unwrap_or(now).to_string()
}

fn fill(status: &mut Status, view: &View) {
    let seconds = |age: Option<Duration>| age.map(|age| age.as_secs_f64());
    if view.owner {
        status.role = NodeRole::Primary;
    } else if matches!(view.state, StateName::Standby | StateName::InSync | StateName::TakingOver) {
        status.role = NodeRole::Backup;
    }
    status.state = view.state;
    status.protected = view.protected;
    status.armed = view.armed;
    let reason = view.alarm.unwrap_or(view.reason);
    status.reason = reason;
    status.reason_text = reason.text().into();
    status.next_step = reason.next_step().into();
    status.generation = view.generation.0;
    status.arbiter.age_seconds = seconds(view.arbiter_age);
    status.arbiter.pending_seconds = seconds(view.arbiter_pending);
    status.protects_in_seconds = seconds(view.protects_in);
    status.peer.seen_age_seconds = seconds(view.partner_age);
    status.peer.arbiter_age_seconds = seconds(view.partner_arbiter_age);
    status.output.gate = match view.gate {
        Gate::Held => "held",
        Gate::Open => "open",
        Gate::OnAck(_) => "on_ack",
    }
    .into();
    if let Some(epoch) = view.committed {
        status.epoch = epoch.0;
    }
}

/// What was true `ago`, as far as it may be said now.
fn grow_old(status: &mut Status, ago: Duration) {
    for age in [
        &mut status.arbiter.age_seconds,
        &mut status.arbiter.pending_seconds,
        &mut status.peer.seen_age_seconds,
        &mut status.peer.arbiter_age_seconds,
    ] {
        age.iter_mut().for_each(|age| *age += ago.as_secs_f64());
    }
    status.armed &= ago < ARMED_FOR;
}

fn micros_as_seconds(micros: u64) -> f64 {
    Duration::from_micros(micros).as_secs_f64()
}

fn distribution(histogram: &Histogram<u64>, sum: Duration) -> Distribution {
    let mut buckets = vec![0; Distribution::BOUNDS.len() + 1];
    for value in histogram.iter_recorded() {
        let seconds = micros_as_seconds(value.value_iterated_to());
        let at = Distribution::BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(Distribution::BOUNDS.len());
        buckets[at] += value.count_at_value();
    }
    let at = |quantile: f64| {
        if histogram.is_empty() { 0.0 } else { micros_as_seconds(histogram.value_at_quantile(quantile)) }
    };
    Distribution {
        count: histogram.len(),
        sum_seconds: sum.as_secs_f64(),
        p50_seconds: at(0.5),
        p99_seconds: at(0.99),
        max_seconds: at(1.0),
        buckets,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests_support::{board, view};

    #[test]
    fn an_event_loop_that_stands_still_is_not_armed() {
        let board = board();
        board.apply(&View { armed: true, protected: true, ..view(StateName::Protected) });
        let mut status = board.snapshot();
        grow_old(&mut status, ARMED_FOR / 2);
        assert!(status.armed && status.protected);
        grow_old(&mut status, ARMED_FOR);
        assert!(!status.armed && status.protected, "output is gated as before");
    }
}
