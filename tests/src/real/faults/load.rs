//! Clients that never stop asking: several connections from several places on the guest LAN. Everything they ask is written down.
//!
//! Keys live for an *era*: a few seconds, after which new keys take their place, so that the history of each stays short enough to be checked.
//! In a *quiet* time nobody writes, and every answer is known beforehand.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::history::{Answer, Operation, Outcome, Recorder, Request};
use crate::real::netns::NetNs;
use crate::real::network::Network;
use crate::real::resp::Connection;
use crate::real::rng::Rng;
use crate::real::{Error, MachineKind, Result, clock};

/// Connections.
pub(super) const CLIENTS: usize = 6;
/// Namespaces from which they come.
const PLACES: u8 = 2;
/// Last byte of the first place's address.
const FIRST_ADDRESS: u8 = 20;
/// How long a client waits for one answer: longer than any fault with all that TCP's retransmission timer makes of it.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Shortest time between two requests of one client, so that an unprotected guest does not answer more than can be checked.
const PACE: (Duration, Duration) = (Duration::from_millis(3), Duration::from_millis(12));
/// Keys of each kind in one era.
const KEYS: [(Sort, u64); 4] = [(Sort::Register, 10), (Sort::Text, 4), (Sort::Counter, 2), (Sort::List, 2)];

/// What a key is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Register,
    Text,
    Counter,
    List,
}

/// A quiet time: what the guest holds.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Its own digest of all keys and values; not asked for while it is not known.
    pub(super) digest: Option<Arc<str>>,
    /// Some keys with what `GET` must answer.
    pub(super) values: Vec<(String, Answer)>,
}

#[derive(Clone, Debug)]
enum Mode {
    Write { era: u64 },
    Quiet { number: u64, known: Arc<Known> },
}

impl Mode {
    fn number(&self) -> u64 {
        match self {
            Self::Write { era } => *era,
            Self::Quiet { number, .. } => *number,
        }
    }
}

struct Shared {
    machine: MachineKind,
    recorder: Recorder,
    mode: Mutex<Mode>,
    /// Of each client: the mode in which its last answered request was asked, and when it was answered.
    at_mode: Vec<AtomicU64>,
    answered_us: Vec<AtomicU64>,
    answers: Mutex<Vec<(usize, u64)>>,
    complaints: Mutex<Vec<String>>,
    lost: AtomicU64,
    digests: AtomicU64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The clients at work. Dropping ends them.
pub(super) struct Load {
    shared: Arc<Shared>,
    handles: Vec<TcpStream>,
    stop: Option<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
    _places: Vec<NetNs>,
}

impl Load {
    /// Connects all clients and begins with the keys of `era`.
    pub(super) fn start(network: &Network, machine: MachineKind, seed: u64, era: u64) -> Result<Self> {
        let places: Vec<NetNs> = (0..PLACES).map(|n| network.add_client(FIRST_ADDRESS + n)).collect::<Result<_>>()?;
        let zeros = || (0..CLIENTS).map(|_| AtomicU64::new(0)).collect();
        let shared = Arc::new(Shared {
            machine,
            recorder: Recorder::default(),
            mode: Mutex::new(Mode::Write { era }),
            at_mode: zeros(),
            answered_us: zeros(),
            answers: Mutex::default(),
            complaints: Mutex::default(),
            lost: AtomicU64::new(0),
            digests: AtomicU64::new(0),
        });
        let (stop, stopped) = bounded(0);
        let mut load = Self { shared, handles: Vec::new(), stop: Some(stop), threads: Vec::new(), _places: Vec::new() };
        for (id, place) in (0..CLIENTS).zip(places.iter().cycle()) {
            let connection = Connection::open(place, PATIENCE)?;
            load.handles.push(connection.handle().map_err(Error::io("cannot duplicate a connection"))?);
            let mut client = Client {
                id,
                connection,
                shared: Arc::clone(&load.shared),
                stopped: stopped.clone(),
                rng: Rng::new(seed ^ (id as u64 + 1)),
                asked: 0,
                own: 0,
                uptime: 0,
            };
            let thread = thread::Builder::new()
                .name(format!("client-{id}"))
                .spawn(move || client.run())
                .map_err(Error::io("cannot start a thread"))?;
            load.threads.push(thread);
        }
        load._places = places;
        Ok(load)
    }

    /// From now on clients write to the keys of `era`.
    pub(super) fn write(&self, era: u64) {
        *locked(&self.shared.mode) = Mode::Write { era };
    }

    /// From now on clients only read, and compare. `number` must be new, as that of an era.
    pub(super) fn quiet(&self, number: u64, known: Known) {
        *locked(&self.shared.mode) = Mode::Quiet { number, known: Arc::new(known) };
    }

    /// Whether each client has had an answer to something that it asked in the present mode: everything from before has ended.
    #[must_use]
    pub(super) fn has_turned(&self) -> bool {
        let number = locked(&self.shared.mode).number();
        self.shared.at_mode.iter().all(|at| at.load(Ordering::Acquire) == number)
    }

    /// When the client that has waited longest had its last answer, microseconds.
    #[must_use]
    pub(super) fn oldest_answer_us(&self) -> u64 {
        self.shared.answered_us.iter().map(|at| at.load(Ordering::Acquire)).min().unwrap_or(0)
    }

    /// Operations that have ended since the last call.
    #[must_use]
    pub(super) fn take_operations(&self) -> Vec<Operation> {
        self.shared.recorder.take()
    }

    /// Who was answered when since the last call, microseconds, ascending.
    #[must_use]
    pub(super) fn take_answers(&self) -> Vec<(usize, u64)> {
        let mut answers = std::mem::take(&mut *locked(&self.shared.answers));
        answers.sort_unstable_by_key(|(_, at_us)| *at_us);
        answers
    }

    /// Whether clients write at present.
    #[must_use]
    pub(super) fn is_writing(&self) -> bool {
        matches!(*locked(&self.shared.mode), Mode::Write { .. })
    }

    /// What was not as it must be, since the last call.
    #[must_use]
    pub(super) fn take_complaints(&self) -> Vec<String> {
        std::mem::take(&mut *locked(&self.shared.complaints))
    }

    /// Connections that were lost so far.
    #[must_use]
    pub(super) fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Acquire)
    }

    /// Digests of the guest that were compared so far.
    #[must_use]
    pub(super) fn digests(&self) -> u64 {
        self.shared.digests.load(Ordering::Acquire)
    }

    /// Ends all clients: what they were waiting for has an unknown outcome.
    pub(super) fn stop(&mut self) {
        self.stop = None;
        for handle in &self.handles {
            // Fails when the connection is gone already.
            let _gone = handle.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            // A client that panicked has been seen on standard error; its history ends there.
            let _panicked = thread.join();
        }
    }

    /// Adds an operation that somebody else did.
    pub(super) fn record(&self, operation: Operation) {
        self.shared.recorder.record(operation);
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Client {
    id: usize,
    connection: Connection,
    shared: Arc<Shared>,
    stopped: Receiver<()>,
    rng: Rng,
    asked: u64,
    own: i64,
    uptime: i64,
}

impl Client {
    fn run(&mut self) {
        loop {
            let pace = self.rng.duration(PACE.0, PACE.1);
            if self.stopped.recv_timeout(pace) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            let mode = locked(&self.shared.mode).clone();
            self.asked += 1;
            let asked = match &mode {
                Mode::Write { era } => self.write(*era),
                Mode::Quiet { known, .. } => self.compare(known),
            };
            if let Err(e) = asked {
                // At the end connections are shut down on purpose.
                if self.stopped.try_recv() != Err(crossbeam::channel::TryRecvError::Disconnected) {
                    self.shared.lost.fetch_add(1, Ordering::AcqRel);
                    self.complain(format!("lost its connection: {e}"));
                }
                return;
            }
            let now = clock::mono_us();
            locked(&self.shared.answers).push((self.id, now));
            self.shared.answered_us[self.id].store(now, Ordering::Release);
            self.shared.at_mode[self.id].store(mode.number(), Ordering::Release);
        }
    }

    fn complain(&self, what: String) {
        locked(&self.shared.complaints).push(format!("client {}: {what}", self.id));
    }

    fn ask(&mut self, words: &[&str]) -> std::io::Result<Option<Answer>> {
        let reply = self.connection.call(words)?;
        Ok(match Answer::try_from(reply) {
            Ok(answer) => Some(answer),
            Err(what) => {
                self.complain(format!("{words:?} answered {what}"));
                None
            }
        })
    }

    fn write(&mut self, era: u64) -> std::io::Result<()> {
        match self.rng.range(0, 20) {
            0 => self.count(),
            1 => self.look_at_the_clock(),
            _ => self.operate(era),
        }
    }

    fn operate(&mut self, era: u64) -> std::io::Result<()> {
        let (key, request) = draw(&mut self.rng, self.shared.machine, era, self.id, self.asked);
        let called_us = clock::mono_us();
        let mut operation = Operation { client: self.id, key, request, called_us, outcome: Outcome::Unknown };
        let reply = self.connection.call(&operation.request.words(&operation.key));
        let at_us = clock::mono_us();
        let ended = match reply.map(Answer::try_from) {
            Ok(Ok(answer)) => {
                operation.outcome = Outcome::Answered { at_us, answer };
                Ok(())
            }
            Ok(Err(what)) => {
                self.complain(format!("{:?} on {} answered {what}", operation.request, operation.key));
                Ok(())
            }
            Err(e) => Err(e),
        };
        self.shared.recorder.record(operation);
        ended
    }

    /// A counter that nobody else touches, over the whole life of the pair.
    fn count(&mut self) -> std::io::Result<()> {
        let key = format!("own:{}", self.id);
        let answer = self.ask(&["INCR", &key])?;
        self.own += 1;
        if answer != Some(Answer::Number(self.own)) {
            self.complain(format!("INCR {key} answered {answer:?}, not {}", self.own));
        }
        Ok(())
    }

    /// The guest's clock never goes back.
    fn look_at_the_clock(&mut self) -> std::io::Result<()> {
        match self.ask(&["FT.UPTIME"])? {
            Some(Answer::Number(now)) if now >= self.uptime => self.uptime = now,
            other => self.complain(format!("FT.UPTIME answered {other:?} after {}", self.uptime)),
        }
        Ok(())
    }

    fn compare(&mut self, known: &Known) -> std::io::Result<()> {
        let digest = known.digest.as_ref().filter(|_| self.id < 2 || known.values.is_empty());
        if let Some(digest) = digest {
            let answer = self.ask(&["FT.DIGEST"])?;
            self.shared.digests.fetch_add(1, Ordering::AcqRel);
            if answer != Some(Answer::Text(Arc::clone(digest))) {
                self.complain(format!("FT.DIGEST answered {answer:?}, and it was {digest} before"));
            }
            return Ok(());
        }
        if known.values.is_empty() {
            return self.look_at_the_clock();
        }
        let at = usize::try_from(self.rng.range(0, known.values.len() as u64)).unwrap_or(0);
        let (key, value) = &known.values[at];
        let answer = self.ask(&["GET", key])?;
        if answer.as_ref() != Some(value) {
            self.complain(format!("GET {key} answered {answer:?}, and nobody wrote since it was {value:?}"));
        }
        Ok(())
    }
}

/// Draws a key of an era and something to do with it.
fn draw(rng: &mut Rng, machine: MachineKind, era: u64, client: usize, asked: u64) -> (String, Request) {
    let total: u64 = KEYS.iter().map(|(_, count)| count).sum();
    let mut at = rng.range(0, total);
    let mut sort = Sort::Register;
    for (candidate, count) in KEYS {
        sort = candidate;
        if at < count {
            break;
        }
        at -= count;
    }
    let value = || format!("{client}.{asked}.").into();
    let request = match (sort, rng.range(0, 10)) {
        (Sort::Register, 0..4) | (Sort::Text, 0..3) | (Sort::Counter, 0..3) => Request::Get,
        (Sort::Register, 4..7) => Request::Set(value()),
        (Sort::Register, 7) => Request::SetNew(value()),
        (Sort::Register, 8) if machine == MachineKind::Kvm => Request::Swap(value()),
        (Sort::Register, _) => Request::Delete,
        (Sort::Text, _) => Request::Append(value()),
        (Sort::Counter, _) => Request::Increment,
        (Sort::List, 0..4) => Request::Range,
        (Sort::List, _) => Request::Push(value()),
    };
    (key(era, sort, at), request)
}

fn key(era: u64, sort: Sort, number: u64) -> String {
    let letter = match sort {
        Sort::Register => 'r',
        Sort::Text => 't',
        Sort::Counter => 'c',
        Sort::List => 'l',
    };
    format!("e{era}:{letter}{number}")
}

/// The longest time without an answer to anybody, and to any one client, that ended after `since_us`; microseconds.
#[must_use]
pub(super) fn gaps(answers: &[(usize, u64)], since_us: u64) -> (u64, u64) {
    let longest = |times: Vec<u64>| {
        let pairs = times.windows(2).filter(|pair| pair[1] >= since_us);
        pairs.map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
    };
    let all = longest(answers.iter().map(|(_, at)| *at).collect());
    let one = |id: usize| longest(answers.iter().filter(|(client, _)| *client == id).map(|(_, at)| *at).collect());
    (all, (0..CLIENTS).map(one).max().unwrap_or(0))
}

/// The reading request that fits a key.
#[must_use]
pub(super) fn reading(key: &str) -> Request {
    if key.contains(":l") { Request::Range } else { Request::Get }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_of_all_and_of_one() {
        let answers = [(0, 10), (1, 500), (0, 600), (1, 700), (0, 900), (1, 1_000)];
        assert_eq!(gaps(&answers, 550), (200, 590));
        assert_eq!(gaps(&answers, 1_001), (0, 0));
    }

    #[test]
    fn requests_fit_their_keys_and_all_occur() {
        let mut rng = Rng::new(3);
        let drawn: Vec<_> = (0..5_000).map(|n| draw(&mut rng, MachineKind::Kvm, 7, 1, n)).collect();
        for (key, request) in &drawn {
            let fits = match request {
                Request::Get => !key.contains(":l"),
                Request::Set(_) | Request::SetNew(_) | Request::Swap(_) | Request::Delete => key.contains(":r"),
                Request::Append(_) => key.contains(":t"),
                Request::Increment => key.contains(":c"),
                Request::Push(_) | Request::Range => key.contains(":l"),
            };
            assert!(fits, "{request:?} on {key}");
        }
        let keys: std::collections::BTreeSet<_> = drawn.iter().map(|(key, _)| key).collect();
        assert_eq!(keys.len(), 18);
        assert!(drawn.iter().any(|(_, request)| matches!(request, Request::Swap(_))));
        let model = (0..5_000).map(|n| draw(&mut rng, MachineKind::Model, 7, 1, n).1);
        assert!(model.into_iter().all(|request| !matches!(request, Request::Swap(_))));
    }
}
