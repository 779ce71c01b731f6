//! Several clients that count: a lost, repeated or invented increment shows.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::netns::NetNs;
use super::resp::{Connection, Reply};
use super::{Error, Result};

/// Clients at work, each on a connection and a thread of its own.
pub struct Counters {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<(Connection, io::Result<Counted>)>>,
}

/// What one client was told.
struct Counted {
    own: i64,
    shared: Vec<i64>,
}

/// What all clients were told together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CountersReport {
    /// Acknowledged increments.
    pub acked: u64,
    /// Everything that was not as it must be, in words.
    pub violations: Vec<String>,
}

impl Counters {
    /// Connects `clients` times from `ns` and begins. Each client increments a counter of its own, which nobody else touches, and
    /// one that all share.
    pub fn start(ns: &NetNs, clients: usize, patience: Duration) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for id in 0..clients {
            let connection = Connection::open(ns, patience)?;
            let stop = Arc::clone(&stop);
            let thread = thread::Builder::new()
                .name(format!("counter-{id}"))
                .spawn(move || count(connection, id, &stop))
                .map_err(Error::io("cannot start a thread"))?;
            threads.push(thread);
        }
        Ok(Self { stop, threads })
    }

    /// Stops, and compares what was told with what the guest holds now.
    ///
    /// # Panics
    /// If a client's thread panicked.
    #[must_use]
    pub fn finish(self) -> CountersReport {
        self.stop.store(true, Ordering::Release);
        let mut report = CountersReport { acked: 0, violations: Vec::new() };
        let mut shared = HashSet::new();
        let mut asker = None;
        for (id, thread) in self.threads.into_iter().enumerate() {
            let (connection, counted) = thread.join().expect("a counting client does not panic");
            match counted {
                Ok(counted) => {
                    asker = Some(connection);
                    report.acked += u64::try_from(counted.own).unwrap_or(0) + counted.shared.len() as u64;
                    for number in counted.shared {
                        if !shared.insert(number) {
                            report.violations.push(format!("two increments of the shared counter answered {number}"));
                        }
                    }
                }
                Err(e) => report.violations.push(format!("client {id}: {e}")),
            }
        }
        let Some(mut connection) = asker else {
            report.violations.push("no client survived".into());
            return report;
        };
        match (connection.call(&["GET", "shared"]), shared.len()) {
            (Ok(Reply::Bulk(Some(bytes))), told) if bytes == told.to_string().as_bytes() => {}
            (Ok(Reply::Bulk(None)), 0) => {}
            (found, told) => report.violations.push(format!("{told} shared increments told, the guest has {found:?}")),
        }
        report
    }
}

fn count(mut connection: Connection, id: usize, stop: &AtomicBool) -> (Connection, io::Result<Counted>) {
    let mut counted = Counted { own: 0, shared: Vec::new() };
    let own = format!("counter:{id}");
    let mut increment = |key: &str| match connection.call(&["INCR", key])? {
        Reply::Integer(number) => Ok(number),
        other => Err(io::Error::other(format!("INCR {key} answered {other:?}"))),
    };
    let mut run = || {
        while !stop.load(Ordering::Acquire) {
            let number = increment(&own)?;
            if number != counted.own + 1 {
                return Err(io::Error::other(format!("INCR {own} answered {number} after {}", counted.own)));
            }
            counted.own = number;
            counted.shared.push(increment("shared")?);
        }
        Ok(())
    };
    let result = run();
    (connection, result.map(|()| counted))
}
