//! What clients asked for and what they were told, and whether one guest that never failed could have told it.
//!
//! A history is linearizable when each operation can be given a moment between its call and its answer at which it took effect. That holds for
//! a whole store exactly when it holds for each key by itself, so keys are checked one by one. The search is that of Wing, Gong and
//! Lowe, by the crate `todc-utils`; a test compares it with the try of all orders.

mod check;
mod model;

pub use check::{Violation, check_key, violations};
pub use model::{Answer, Request, Value};

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

/// How an operation ended for its client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was answered.
    Answered {
        /// When the answer had been read, microseconds of one clock for all clients.
        at_us: u64,
        /// With what.
        answer: Answer,
    },
    /// The connection failed first: it may have taken effect, may yet, or never will.
    Unknown,
}

/// One operation of one client on one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Who.
    pub client: usize,
    /// On what.
    pub key: String,
    /// What was asked for.
    pub request: Request,
    /// When, just before it was sent, microseconds.
    pub called_us: u64,
    /// What came of it.
    pub outcome: Outcome,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>12} ", self.called_us)?;
        match &self.outcome {
            Outcome::Answered { at_us, .. } => write!(f, "{at_us:>12}")?,
            Outcome::Unknown => write!(f, "{:>12}", "-")?,
        }
        write!(f, "  client {:<2} {:?} {}", self.client, self.request, self.key)?;
        match &self.outcome {
            Outcome::Answered { answer, .. } => write!(f, " -> {answer:?}"),
            Outcome::Unknown => write!(f, " -> unknown"),
        }
    }
}

/// Where clients write down what they do. Shared by all of them.
#[derive(Default)]
pub struct Recorder {
    operations: Mutex<Vec<Operation>>,
}

impl Recorder {
    /// Adds an operation that has ended.
    pub fn record(&self, operation: Operation) {
        self.operations.lock().unwrap_or_else(PoisonError::into_inner).push(operation);
    }

    /// Takes everything that is there out.
    pub fn take(&self) -> Vec<Operation> {
        std::mem::take(&mut self.operations.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Operations by key.
#[must_use]
pub fn by_key(operations: Vec<Operation>) -> BTreeMap<String, Vec<Operation>> {
    let mut keys: BTreeMap<String, Vec<Operation>> = BTreeMap::new();
    for operation in operations {
        keys.entry(operation.key.clone()).or_default().push(operation);
    }
    keys
}
