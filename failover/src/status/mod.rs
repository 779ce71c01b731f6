//! The truth about one process, in one struct: what `ftctl status`, HTTP, metrics and the log show.
//!
//! PROTECTED and ARMED come from the decision core alone (G11); no shell sets them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

mod board;
mod capture;
mod overload;
mod pacing;
mod prom;
mod table;

pub use board::{Labels, StatusBoard, Timing};
pub use capture::CaptureStatus;
pub use overload::OverloadStatus;
pub use pacing::PacingStatus;

use crate::decide::StateName;
use crate::reason::ReasonCode;

/// Schema of the JSON form.
pub const SCHEMA: &str = "ft.status/1";

/// What a process is for at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeRole {
    /// Holds (or held last) the right to run.
    Primary,
    /// Waits.
    Backup,
}

impl NodeRole {
    /// The word as in JSON.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Backup => "backup",
        }
    }
}

/// The connection to the peer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// The data connection stands and is accepted.
    pub up: bool,
    /// Where to, or from.
    pub address: String,
    /// Round trip of a heartbeat, if measured.
    pub rtt_seconds: Option<f64>,
    /// Neither authenticated nor encrypted.
    pub insecure: bool,
    /// Why it is down; empty when up.
    pub text: String,
}

/// What is known of the peer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub node: String,
    /// How long ago it was heard; absent: never.
    pub seen_age_seconds: Option<f64>,
    /// How long ago it had a usable answer of the arbiter, as it said.
    pub arbiter_age_seconds: Option<f64>,
    /// Its last committed epoch, as far as known.
    pub epoch: u64,
}

/// The arbiter as this process sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ArbiterStatus {
    /// What and where.
    pub place: String,
    /// How long ago it gave a usable answer; absent: never.
    pub age_seconds: Option<f64>,
    /// How long a request has been outstanding; absent: none is.
    pub pending_seconds: Option<f64>,
    /// How long the last request took.
    pub last_request_seconds: Option<f64>,
}

/// The output gate.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputStatus {
    /// `held`, `open`, or `on_ack`.
    pub gate: String,
    /// Frames held now.
    pub held_frames: u64,
    /// Bytes held now.
    pub held_bytes: u64,
    /// Most bytes that may be held.
    pub limit_bytes: u64,
    /// Frames let out since the start.
    pub released_frames_total: u64,
    /// Frames dropped since the start (R8 and over-full queues).
    pub dropped_frames_total: u64,
}

/// A distribution of durations.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// Number of values.
    pub count: u64,
    /// Sum, in seconds.
    pub sum_seconds: f64,
    /// Median.
    pub p50_seconds: f64,
    /// 99th percentile.
    pub p99_seconds: f64,
    /// Largest.
    pub max_seconds: f64,
    /// Numbers of values up to each of [`Distribution::BOUNDS`] and above the one before; the last: above all.
    pub buckets: Vec<u64>,
}

impl Distribution {
    /// Upper bounds of the buckets, in seconds.
    pub const BOUNDS: [f64; 14] =
        [0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
}

/// Durations of the parts of the work.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// Guest paused for a checkpoint.
    pub pause: Distribution,
    /// Encoding and sending one.
    pub transfer: Distribution,
    /// From the last byte sent to the ack.
    pub ack: Distribution,
    /// Output held.
    pub output_hold: Distribution,
    /// From evidence to the guest running on this side.
    pub failover: Distribution,
}

/// Counters since the process started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Committed epochs.
    pub epochs_committed: u64,
    /// Epochs that were begun and not committed.
    pub epochs_aborted: u64,
    /// Dirty pages of all epochs.
    pub dirty_pages: u64,
    /// Bytes of pages and sections before encoding.
    pub replication_raw_bytes: u64,
    /// Bytes sent or received.
    pub replication_wire_bytes: u64,
    /// Guests activated here, by cause.
    pub failovers: BTreeMap<String, u64>,
    /// Times that this side was fenced.
    pub fenced: u64,
    /// Frames and connections refused, by code.
    pub protocol_errors: BTreeMap<String, u64>,
    /// Requests to the arbiter that failed or whose answer was lost.
    pub arbiter_errors: u64,
}

/// The whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// [`SCHEMA`].
    pub schema: String,
    /// Name of the VM.
    pub vm: String,
    /// Its UUID.
    pub vm_id: String,
    /// What runs it: `kvm` or `model`.
    pub machine: String,
    /// This node.
    pub node: String,
    /// What it is for at the moment.
    pub role: NodeRole,
    /// Its state.
    pub state: StateName,
    /// Every output that leaves is covered by a committed backup.
    pub protected: bool,
    /// A takeover now would be granted.
    pub armed: bool,
    /// Why the state is what it is.
    pub reason: ReasonCode,
    /// The same in a sentence.
    pub reason_text: String,
    /// What a person does next; empty when there is nothing to do.
    pub next_step: String,
    /// Number of the right to run.
    pub generation: u64,
    /// Last epoch ended (primary) or committed (backup).
    pub epoch: u64,
    /// When epochs end, and how that goes.
    #[serde(default)]
    pub pacing: PacingStatus,
    /// Whether link and backup keep up with the guest.
    #[serde(default)]
    pub overload: OverloadStatus,
    /// How pages come out of the guest.
    #[serde(default)]
    pub capture: CaptureStatus,
    /// Epochs that are not committed yet.
    pub lag_epochs: u64,
    /// Age of the newest committed epoch.
    pub lag_seconds: Option<f64>,
    /// Since when this state holds, RFC 3339.
    pub since: String,
    /// For how long.
    pub state_seconds: f64,
    /// For how long the guest ran unprotected, since the process started.
    pub unprotected_seconds_total: f64,
    /// For how long it has been running unprotected, if it does.
    pub unprotected_seconds: Option<f64>,
    /// No base is begun for so long: protection is paused, or was lost too often.
    pub protects_in_seconds: Option<f64>,
    /// Bytes of the base that are still to be copied.
    pub resync_remaining_bytes: u64,
    /// Bytes of the base in all; 0 while none is copied.
    pub resync_total_bytes: u64,
    /// About how long the rest of it takes.
    pub resync_left_seconds: Option<f64>,
    /// The link.
    pub link: LinkStatus,
    /// The peer.
    pub peer: PeerStatus,
    /// The arbiter.
    pub arbiter: ArbiterStatus,
    /// The gate.
    pub output: OutputStatus,
    /// Durations.
    pub timings: Timings,
    /// Counters.
    pub counters: Counters,
    /// What else a person should know.
    pub warnings: Vec<String>,
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Random id of this process's life.
    pub incarnation: String,
}

impl Status {
    /// One word for the whole: `PROTECTED`, `DEGRADED`, `STANDBY`, `FENCED`, `DOWN`.
    pub fn headline(&self) -> &'static str {
        match self.state {
            _ if self.protected => "PROTECTED",
            StateName::Fenced => "FENCED",
            StateName::Standby | StateName::InSync | StateName::TakingOver => "STANDBY",
            state if state.runs() => "DEGRADED",
            _ => "DOWN",
        }
    }

    /// Whether this side can do what it is for: serve as the primary, or take over as the backup.
    pub fn ready(&self) -> bool {
        match self.role {
            NodeRole::Primary => self.state.runs(),
            NodeRole::Backup => self.armed,
        }
    }

    /// The JSON form, on one line.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("string keys and finite numbers")
    }

    /// The Prometheus (OpenMetrics) form.
    pub fn to_prometheus(&self) -> String {
        prom::render(self)
    }

    /// The form for people, some lines.
    pub fn to_table(&self) -> String {
        table::render(self)
    }

    /// One line for the log.
    pub fn to_line(&self) -> String {
        format!(
            "{} vm={} node={} role={} state={} generation={} epoch={} armed={} reason={}",
            self.headline(),
            self.vm,
            self.node,
            self.role.word(),
            self.state.word(),
            self.generation,
            self.epoch,
            self.armed,
            self.reason.code()
        )
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod tests_support;
