//! A thread around an arbiter, so that the decision core never waits for one.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::{Arbiter, CasOutcome, Record, Revision};
use crate::decide::{Answer, ArbiterRequest, OpId};
use crate::failpoint;

/// Requests that may wait. The decision core has at most one outstanding.
const QUEUE: usize = 4;

/// What a request led to.
#[derive(Debug)]
pub struct Completed {
    /// The request.
    pub op: OpId,
    /// What the arbiter said.
    pub answer: Answer,
    /// How long it took.
    pub took: Duration,
}

impl Completed {
    /// Why this is no answer, if it is none.
    pub fn trouble(&self) -> Option<String> {
        match &self.answer {
            Answer::Read(Err(error)) => Some(error.to_string()),
            Answer::Cas(CasOutcome::Unknown(why)) => {
                Some(format!("nobody knows whether the record was written: {why}"))
            }
            Answer::Cas(CasOutcome::Failed(why)) => Some(format!("the record was not written: {why}")),
            Answer::Read(Ok(_)) | Answer::Cas(CasOutcome::Applied(_) | CasOutcome::Conflict) => None,
        }
    }
}

/// Handle to the thread; requests in, [`Completed`] out. The thread ends when the handle is dropped and the current request is done.
#[derive(Debug)]
pub struct ArbiterThread {
    requests: Sender<(OpId, ArbiterRequest)>,
    answers: Receiver<Completed>,
    place: Place,
}

/// What and where the arbiter is: more is known of it once it has answered.
type Place = Arc<Mutex<Arc<str>>>;

impl ArbiterThread {
    /// Starts the thread. `wake` is called after each answer was put in the channel; an event loop uses it to look there.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn spawn<A, W>(arbiter: A, wake: W) -> io::Result<Self>
    where
        A: Arbiter + 'static,
        W: Fn() + Send + 'static,
    {
        let (requests, inbox) = bounded(QUEUE);
        let (outbox, answers) = bounded(QUEUE);
        let place: Place = Arc::new(Mutex::new(arbiter.describe().into()));
        let told = Arc::clone(&place);
        thread::Builder::new().name("arbiter".into()).spawn(move || serve(arbiter, &inbox, &outbox, &told, wake))?;
        Ok(Self { requests, answers, place })
    }

    /// Hands a request to the thread.
    ///
    /// # Panics
    /// When more requests are outstanding than the decision core ever has, or the thread died of a panic.
    pub fn request(&self, op: OpId, request: ArbiterRequest) {
        self.requests.try_send((op, request)).expect("one request at a time, and a living arbiter thread");
    }

    /// Where the answers arrive.
    pub fn answers(&self) -> &Receiver<Completed> {
        &self.answers
    }

    /// What and where the arbiter is, as of its last answer.
    pub fn describe(&self) -> Arc<str> {
        Arc::clone(&self.place.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn serve<A: Arbiter>(
    mut arbiter: A,
    inbox: &Receiver<(OpId, ArbiterRequest)>,
    outbox: &Sender<Completed>,
    place: &Place,
    wake: impl Fn(),
) {
    for (op, request) in inbox {
        let started = Instant::now();
        let answer = match request {
            ArbiterRequest::Read => Answer::Read(arbiter.read()),
            ArbiterRequest::Cas { expected, record } => Answer::Cas(swap(&mut arbiter, expected, &record)),
        };
        let described = arbiter.describe();
        let mut told = place.lock().unwrap_or_else(PoisonError::into_inner);
        if **told != *described {
            *told = described.into();
        }
        drop(told);
        if outbox.send(Completed { op, answer, took: started.elapsed() }).is_err() {
            return;
        }
        wake();
    }
}

fn swap(arbiter: &mut impl Arbiter, expected: Option<Revision>, record: &Record) -> CasOutcome {
    failpoint!(cas_before(record.reason) => return CasOutcome::Failed("a failpoint says so".into()));
    let outcome = arbiter.compare_and_swap(expected, record);
    failpoint!(cas_after(record.reason) => return CasOutcome::Unknown("a failpoint says so".into()));
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbiter::FileArbiter;
    use crate::arbiter::contract::sample;

    #[test]
    fn answers_carry_the_number_of_their_request() {
        let directory = tempfile::tempdir().unwrap();
        let arbiter = FileArbiter::open(&directory.path().join("record.json")).unwrap();
        let (woken, wakes) = bounded(4);
        let thread = ArbiterThread::spawn(arbiter, move || woken.try_send(()).unwrap()).unwrap();
        assert!(thread.describe().starts_with("file "));
        thread.request(OpId(4), ArbiterRequest::Cas { expected: None, record: sample(1) });
        thread.request(OpId(9), ArbiterRequest::Read);
        let limit = Duration::from_secs(10);
        let first = thread.answers().recv_timeout(limit).unwrap();
        assert_eq!((first.op, first.answer), (OpId(4), Answer::Cas(CasOutcome::Applied(Revision(1)))));
        let second = thread.answers().recv_timeout(limit).unwrap();
        assert_eq!((second.op, second.trouble()), (OpId(9), None));
        assert!(matches!(second.answer, Answer::Read(Ok(Some(_)))));
        wakes.recv_timeout(limit).unwrap();
        std::fs::write(directory.path().join("record.json"), "{").unwrap();
        thread.request(OpId(10), ArbiterRequest::Cas { expected: None, record: sample(1) });
        let third = thread.answers().recv_timeout(limit).unwrap();
        assert!(third.trouble().is_some_and(|text| text.starts_with("the record was not written: ")), "{third:?}");
    }
}
