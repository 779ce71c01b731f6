//! The event file: one JSON line for everything that an operator, the demo or a test wants to know the time of.
//!
//! `state_dir/events.jsonl`. `mono_us` is CLOCK_MONOTONIC, which all processes of one host share; `wall` is for people.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use failover::failpoint;
use replication_proto::{Epoch, Generation};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// The file is moved aside (to `events.jsonl.1`) when it is this large.
const EVENTS_BYTES_MAX: u64 = 16 << 20;

/// One thing that happened.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event<'a> {
    /// The process started.
    Started {
        /// Its incarnation.
        incarnation: String,
    },
    /// The decision core changed its state.
    State {
        /// From.
        from: &'a str,
        /// To.
        to: &'a str,
        /// Why.
        reason: &'a str,
        /// Generation in force.
        generation: Generation,
        /// Last epoch committed.
        epoch: Epoch,
    },
    /// The peer has been silent for longer than it may be, or its connection was closed.
    PeerQuiet {
        /// When it was last heard, CLOCK_MONOTONIC.
        last_heard_us: u64,
    },
    /// The arbiter granted a right: to take over, to go on alone, to rely on the backup.
    Granted {
        /// Generation of the right.
        generation: Generation,
        /// What for.
        right: &'a str,
    },
    /// A standby runs.
    Activated {
        /// From the grant until the guest ran.
        activate_us: u64,
        /// The epoch that it goes on from.
        epoch: Epoch,
        /// Frames of that epoch that were sent again.
        resent: usize,
        /// Frames to the guest that were delivered: to its former owner after that epoch, or heard here.
        delivered: usize,
        /// Digest of all of RAM, when the checkpoint carried one and it was the same.
        #[serde(skip_serializing_if = "Option::is_none")]
        ram_digest: Option<String>,
    },
    /// The owner has stopped the guest for a switchover; its last checkpoint is on its way.
    Stopped {
        /// That checkpoint's epoch.
        epoch: Epoch,
    },
    /// Link or backup cannot keep up with the guest.
    OverloadBegan {
        /// `link` or `backup`.
        slow: &'a str,
        /// What is done about it.
        policy: &'a str,
    },
    /// They can again, or protection ended.
    OverloadEnded {
        /// How long it lasted.
        seconds: f64,
    },
    /// The guest ended by itself.
    GuestEnded {
        /// How.
        how: &'a str,
    },
    /// Something that a person must look at.
    Alarm {
        /// Code.
        reason: &'a str,
        /// Details.
        text: &'a str,
    },
}

#[derive(Serialize)]
struct Line<'a> {
    mono_us: u64,
    wall_ms: u64,
    node: &'a str,
    #[serde(flatten)]
    event: &'a Event<'a>,
}

/// The event file of one process.
pub struct EventFile {
    file: Mutex<File>,
    node: String,
}

impl EventFile {
    /// Opens `events.jsonl` in `state_dir` for appending.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(state_dir: &Path, node: &str) -> io::Result<Self> {
        let path = state_dir.join("events.jsonl");
        if std::fs::metadata(&path).is_ok_and(|m| m.len() > EVENTS_BYTES_MAX) {
            std::fs::rename(&path, state_dir.join("events.jsonl.1"))?;
        }
        let file = File::options().create(true).append(true).open(path)?;
        Ok(Self { file: Mutex::new(file), node: node.to_owned() })
    }

    /// Writes one line. A full disk costs the line, never the guest.
    pub fn write(&self, event: &Event<'_>) {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let wall_ms = u64::try_from(wall.as_millis()).unwrap_or(u64::MAX);
        let line = Line { mono_us: monotonic_us(), wall_ms, node: &self.node, event };
        match serde_json::to_vec(&line) {
            Ok(mut bytes) => {
                log::info!("{}", String::from_utf8_lossy(&bytes));
                bytes.push(b'\n');
                failpoint!(EventsWrite => return log::warn!("an event was not written: a failpoint says so"));
                let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
                if let Err(error) = file.write_all(&bytes) {
                    log::warn!("an event was not written: {error}");
                }
                failpoint!(EventsWritten);
            }
            Err(error) => log::warn!("an event was not written: {error}"),
        }
    }
}

/// CLOCK_MONOTONIC in microseconds.
pub fn monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000
}
