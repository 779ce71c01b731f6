//! The demo's client: numbered keys over one TCP connection, each acknowledgement recorded, everything read back at the end.

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::netns::NetNs;
use super::resp::{Connection, Reply};
use super::rng::mix;
use super::{Error, Result, clock};

/// Reads that are under way at once when everything is read back.
const READ_WINDOW: usize = 64;

/// How the client behaves.
#[derive(Clone, Copy, Debug)]
pub struct WriterConfig {
    /// What the values are made from.
    pub seed: u64,
    /// Writes that may wait for their answer at once, each sent as a segment of its own.
    pub window: usize,
    /// Pause between an answer and the next write: how hard the client works.
    pub pace: Duration,
    /// How long the guest may be silent before the connection counts as lost.
    pub patience: Duration,
}

impl Default for WriterConfig {
    fn default() -> Self {
        Self { seed: 1, window: 4, pace: Duration::ZERO, patience: Duration::from_secs(20) }
    }
}

/// One acknowledged write.
#[derive(Clone, Copy, Debug)]
pub struct Ack {
    /// The key's number.
    pub n: u64,
    /// When the write was sent, microseconds of [`clock::mono_us`].
    pub sent_us: u64,
    /// When its answer had been read.
    pub at_us: u64,
}

/// What reading everything back found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadBack {
    /// Keys asked for and answered.
    pub checked: u64,
    /// Acknowledged and not there.
    pub lost: u64,
    /// There with another value.
    pub wrong: u64,
    /// Why it could not be finished.
    pub error: Option<String>,
}

impl ReadBack {
    /// Whether all of `acked` writes were there with their values.
    #[must_use]
    pub fn complete(&self, acked: usize) -> bool {
        *self == Self { checked: u64::try_from(acked).unwrap_or(u64::MAX), ..Self::default() }
    }
}

/// What a client saw.
#[derive(Debug)]
pub struct WriterReport {
    /// Acknowledged writes, in order.
    pub acks: Vec<Ack>,
    /// Why the connection did not survive.
    pub connection_error: Option<String>,
    /// Everything read back over the connection that did the writing.
    pub same: ReadBack,
    /// Everything read back over a new connection.
    pub fresh: ReadBack,
}

impl WriterReport {
    /// Whether one connection lived from the first write to the last read.
    #[must_use]
    pub fn connection_survived(&self) -> bool {
        self.connection_error.is_none() && self.same.error.is_none()
    }

    /// Acknowledged writes that either check missed; what could not be asked counts as lost.
    #[must_use]
    pub fn lost(&self) -> u64 {
        let acked = u64::try_from(self.acks.len()).unwrap_or(u64::MAX);
        let fresh = self.fresh.lost + acked.saturating_sub(self.fresh.checked);
        fresh.max(self.same.lost)
    }

    /// Values that differ in either check.
    #[must_use]
    pub fn wrong(&self) -> u64 {
        self.same.wrong.max(self.fresh.wrong)
    }

    /// The longest time without an answer that ended after `since_us`: its begin and end in microseconds.
    #[must_use]
    pub fn longest_silence(&self, since_us: u64) -> Option<(u64, u64)> {
        let pairs = self.acks.windows(2).map(|pair| (pair[0].at_us, pair[1].at_us));
        pairs.filter(|&(_, end)| end >= since_us).max_by_key(|(begin, end)| end - begin)
    }

    /// The first answer at or after a time.
    #[must_use]
    pub fn first_reply(&self, since_us: u64) -> Option<u64> {
        self.acks.iter().map(|ack| ack.at_us).find(|&at| at >= since_us)
    }
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    ended: AtomicBool,
    acked: AtomicU64,
    last_reply_us: AtomicU64,
}

/// A client at work on a thread of its own.
pub struct Writer {
    shared: Arc<Shared>,
    config: WriterConfig,
    thread: JoinHandle<Work>,
    handle: TcpStream,
}

struct Work {
    connection: Connection,
    acks: Vec<Ack>,
    error: Option<String>,
}

impl Writer {
    /// Connects from `ns` and begins to write.
    pub fn start(ns: &NetNs, config: WriterConfig) -> Result<Self> {
        let connection = Connection::open(ns, config.patience)?;
        let handle = connection.handle().map_err(Error::io("cannot clone a connection"))?;
        let shared = Arc::new(Shared::default());
        let thread = thread::Builder::new()
            .name("writer".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || work(connection, config, &shared)
            })
            .map_err(Error::io("cannot start a thread"))?;
        Ok(Self { shared, config, thread, handle })
    }

    /// Writes acknowledged so far.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.shared.acked.load(Ordering::Acquire)
    }

    /// When the last answer came, microseconds; 0 before the first.
    #[must_use]
    pub fn last_reply_us(&self) -> u64 {
        self.shared.last_reply_us.load(Ordering::Acquire)
    }

    /// Waits until answers have come for `after` since a takeover, at most for `patience`.
    ///
    /// # Errors
    /// They did not come in time, or the connection failed.
    pub fn works_on(&self, activated_us: u64, after: Duration, patience: Duration) -> Result<()> {
        let enough = activated_us + u64::try_from(after.as_micros()).expect("seconds");
        let deadline = Instant::now() + patience;
        while self.last_reply_us() < enough {
            if !self.is_writing() || Instant::now() >= deadline {
                return Err(Error::Timeout {
                    what: "the client's connection to work on".into(),
                    waited: patience,
                    detail: format!("{} writes acknowledged", self.acked()),
                });
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Whether it still writes; false once its connection has failed.
    #[must_use]
    pub fn is_writing(&self) -> bool {
        !self.shared.ended.load(Ordering::Acquire)
    }

    /// Ends the connection at once. Returns what was acknowledged until then.
    ///
    /// # Panics
    /// If the client's thread panicked.
    #[must_use]
    pub fn abandon(self) -> Vec<Ack> {
        self.shared.stop.store(true, Ordering::Release);
        // An error means that it has ended already.
        self.handle.shutdown(Shutdown::Both).ok();
        self.thread.join().expect("the writer does not panic").acks
    }

    /// Stops writing, waits for the outstanding answers and reads everything back, twice.
    ///
    /// # Panics
    /// If the client's thread panicked.
    #[must_use]
    pub fn finish(self, ns: &NetNs) -> WriterReport {
        self.shared.stop.store(true, Ordering::Release);
        let Work { mut connection, acks, error } = self.thread.join().expect("the writer does not panic");
        let same = match &error {
            None => read_back(&mut connection, self.config.seed, &acks),
            Some(error) => ReadBack { error: Some(error.clone()), ..ReadBack::default() },
        };
        let fresh = match Connection::open(ns, self.config.patience) {
            Ok(mut connection) => read_back(&mut connection, self.config.seed, &acks),
            Err(e) => ReadBack { error: Some(e.to_string()), ..ReadBack::default() },
        };
        WriterReport { acks, connection_error: error, same, fresh }
    }
}

fn work(mut connection: Connection, config: WriterConfig, shared: &Shared) -> Work {
    let mut acks = Vec::new();
    let error = write_until_stopped(&mut connection, config, shared, &mut acks).err().map(|e| describe(&e));
    shared.ended.store(true, Ordering::Release);
    Work { connection, acks, error }
}

fn write_until_stopped(
    connection: &mut Connection,
    config: WriterConfig,
    shared: &Shared,
    acks: &mut Vec<Ack>,
) -> io::Result<()> {
    let mut waiting = VecDeque::new();
    let mut next = 0;
    loop {
        while waiting.len() < config.window && !shared.stop.load(Ordering::Acquire) {
            waiting.push_back((next, clock::mono_us()));
            connection.send(&["SET", &key(next), &value(config.seed, next)])?;
            next += 1;
        }
        let Some((n, sent_us)) = waiting.pop_front() else {
            return Ok(());
        };
        match connection.receive()? {
            Reply::Simple(ok) if ok == "OK" => {}
            other => return Err(io::Error::other(format!("SET {} answered {other:?}", key(n)))),
        }
        let at_us = clock::mono_us();
        acks.push(Ack { n, sent_us, at_us });
        shared.last_reply_us.store(at_us, Ordering::Release);
        shared.acked.fetch_add(1, Ordering::AcqRel);
        if !config.pace.is_zero() {
            thread::sleep(config.pace);
        }
    }
}

/// Asks for every acknowledged key.
/// Asks for every acknowledged key.
pub fn read_back(connection: &mut Connection, seed: u64, acks: &[Ack]) -> ReadBack {
    let mut found = ReadBack::default();
    let mut compare = |connection: &mut Connection, n: u64| {
        match connection.receive()? {
            Reply::Bulk(None) => found.lost += 1,
            Reply::Bulk(Some(bytes)) if bytes == value(seed, n).as_bytes() => {}
            Reply::Bulk(Some(_)) => found.wrong += 1,
            other => return Err(io::Error::other(format!("GET {} answered {other:?}", key(n)))),
        }
        found.checked += 1;
        Ok(())
    };
    let mut ask_all = || {
        let mut waiting = VecDeque::new();
        for ack in acks {
            connection.send(&["GET", &key(ack.n)])?;
            waiting.push_back(ack.n);
            if waiting.len() == READ_WINDOW {
                compare(connection, waiting.pop_front().expect("the window is not empty"))?;
            }
        }
        waiting.into_iter().try_for_each(|n| compare(connection, n))
    };
    let result = ask_all();
    found.error = result.err().map(|e| describe(&e));
    found
}

fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock => "the guest did not answer any more".to_owned(),
        _ => error.to_string(),
    }
}

pub(super) fn key(n: u64) -> String {
    format!("k:{n}")
}

/// The value of a key: 17 to 216 characters that depend on the seed and the number throughout.
pub(super) fn value(seed: u64, n: u64) -> String {
    let hash = mix(seed ^ mix(n));
    let len = 17 + usize::try_from(hash % 200).expect("a small number");
    let mut text = String::with_capacity(len + 16);
    let mut word = hash;
    while text.len() < len {
        text.push_str(&format!("{word:016x}"));
        word = mix(word);
    }
    text.truncate(len);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(times: &[u64]) -> WriterReport {
        let acks = times.iter().zip(0..).map(|(&at_us, n)| Ack { n, sent_us: at_us - 1, at_us }).collect();
        WriterReport { acks, connection_error: None, same: ReadBack::default(), fresh: ReadBack::default() }
    }

    /// The silence that counts is the one around the kill, not a longer one before it.
    #[test]
    fn silence_and_first_reply() {
        let report = report(&[10, 1_000, 1_010, 1_300, 1_310]);
        assert_eq!(report.longest_silence(1_005), Some((1_010, 1_300)));
        assert_eq!(report.longest_silence(0), Some((10, 1_000)));
        assert_eq!(report.longest_silence(2_000), None);
        assert_eq!(report.first_reply(1_011), Some(1_300));
        assert_eq!(report.first_reply(1_311), None);
    }

    /// What was never asked for counts as lost.
    #[test]
    fn unchecked_is_lost() {
        let mut report = report(&[1, 2, 3]);
        report.same = ReadBack { checked: 3, ..ReadBack::default() };
        report.fresh = ReadBack { checked: 1, lost: 1, error: Some("gone".into()), ..ReadBack::default() };
        assert!(report.same.complete(3) && !report.fresh.complete(3));
        assert_eq!((report.lost(), report.wrong()), (3, 0));
    }

    #[test]
    fn values_depend_on_seed_and_number() {
        assert_eq!(value(1, 2), value(1, 2));
        assert_ne!(value(1, 2), value(2, 2));
        assert_ne!(value(1, 2), value(1, 3));
        assert!((0..1_000).all(|n| (17..217).contains(&value(7, n).len())));
    }
}
