//! Checks histories beside the run, on a thread of its own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, bounded, unbounded};

use crate::history::{Operation, Outcome, by_key, violations};
use crate::real::{Error, Result};

/// What was checked.
#[derive(Clone, Debug, Default)]
pub(super) struct Checked {
    /// Keys, each with a history of its own.
    pub(super) keys: u64,
    /// Operations that were answered.
    pub(super) answered: u64,
    /// Operations of which nobody knows whether they took effect.
    pub(super) unknown: u64,
    /// Most operations on one key.
    pub(super) longest: u64,
    /// Longest time that one batch of keys took.
    pub(super) slowest: Duration,
    /// Histories that are not linearizable, in words, with the batch that they belong to.
    pub(super) violations: Vec<(u64, String)>,
}

struct Batch {
    number: u64,
    keys: BTreeMap<String, Vec<Operation>>,
}

/// A checker at work.
pub(super) struct Checker {
    batches: Sender<Batch>,
    checked: Arc<Mutex<Checked>>,
    thread: JoinHandle<()>,
    ended: crossbeam::channel::Receiver<()>,
}

impl Checker {
    /// Begins with nothing to do.
    pub(super) fn start() -> Result<Self> {
        let (batches, queue) = unbounded::<Batch>();
        let checked = Arc::new(Mutex::new(Checked::default()));
        let (end, ended) = bounded::<()>(0);
        let work = {
            let checked = Arc::clone(&checked);
            move || {
                for batch in queue {
                    check(&batch, &checked);
                }
                drop(end);
            }
        };
        let thread =
            thread::Builder::new().name("checker".into()).spawn(work).map_err(Error::io("cannot start a thread"))?;
        Ok(Self { batches, checked, thread, ended })
    }

    /// Hands over all operations on keys that nobody uses any more. `number` is told with what is found.
    pub(super) fn check(&self, number: u64, operations: Vec<Operation>) {
        let batch = Batch { number, keys: by_key(operations) };
        assert!(self.batches.send(batch).is_ok(), "the checker runs until it is finished");
    }

    /// What was checked so far.
    #[must_use]
    pub(super) fn so_far(&self) -> Checked {
        self.checked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until everything is checked. An error when the search does not end in time: then nothing is known.
    ///
    /// # Panics
    /// If the checking thread panicked.
    pub(super) fn finish(self, limit: Duration) -> Result<Checked> {
        let Self { batches, checked, thread, ended } = self;
        drop(batches);
        if ended.recv_timeout(limit) == Err(crossbeam::channel::RecvTimeoutError::Timeout) {
            let keys = checked.lock().unwrap_or_else(PoisonError::into_inner).keys;
            return Err(Error::Timeout {
                what: "the check of all histories".into(),
                waited: limit,
                detail: format!("{keys} keys are checked"),
            });
        }
        thread.join().expect("the checker does not panic");
        let checked = checked.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(checked.clone())
    }
}

fn check(batch: &Batch, checked: &Mutex<Checked>) {
    let began = Instant::now();
    let found = violations(&batch.keys);
    let took = began.elapsed();
    let mut checked = checked.lock().unwrap_or_else(PoisonError::into_inner);
    for operations in batch.keys.values() {
        let unknown = operations.iter().filter(|operation| operation.outcome == Outcome::Unknown).count() as u64;
        let all = operations.len() as u64;
        checked.unknown += unknown;
        checked.answered += all - unknown;
        checked.longest = checked.longest.max(all);
    }
    checked.keys += batch.keys.len() as u64;
    checked.slowest = checked.slowest.max(took);
    checked.violations.extend(found.into_iter().map(|violation| (batch.number, violation.to_string())));
}
