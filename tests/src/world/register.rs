//! The arbiter of a simulated world: one record, compared and swapped; requests that are lost, answered late or not at all.

use failover::arbiter::{ArbiterError, CasOutcome, Record, Revision, Versioned};
use failover::decide::{Answer, ArbiterRequest};

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Done and answered.
    Served,
    /// Never done; the answer is that nobody can be reached.
    Refused,
    /// Never done, never answered.
    Lost,
    /// Done, never answered.
    AnswerLost,
    /// Done after the asker gave up waiting.
    Late,
}

/// The record and its past.
#[derive(Debug, Default)]
pub struct Register {
    stored: Option<Versioned>,
    /// Earlier contents, for somebody who restores a backup of it.
    past: Vec<Versioned>,
    /// Whether it was ever restored.
    pub rolled_back: bool,
}

impl Register {
    /// What is stored.
    pub fn stored(&self) -> Option<&Versioned> {
        self.stored.as_ref()
    }

    /// The record that is stored.
    pub fn record(&self) -> Option<&Record> {
        self.stored.as_ref().map(|v| &v.record)
    }

    /// Does what is asked. A swap that took place is returned with the answer.
    pub fn serve(&mut self, request: &ArbiterRequest) -> (Answer, Option<Record>) {
        match request {
            ArbiterRequest::Read => (Answer::Read(Ok(self.stored.clone())), None),
            ArbiterRequest::Cas { expected, record } => {
                if *expected != self.stored.as_ref().map(|v| v.revision) {
                    return (Answer::Cas(CasOutcome::Conflict), None);
                }
                let revision = Revision(expected.map_or(1, |r| r.0 + 1));
                self.past.extend(self.stored.take());
                self.stored = Some(Versioned { revision, record: record.clone() });
                (Answer::Cas(CasOutcome::Applied(revision)), Some(record.clone()))
            }
        }
    }

    /// The answer of an arbiter that could not be reached: for sure, or perhaps after all.
    pub fn silence(request: &ArbiterRequest, for_sure: bool) -> Answer {
        let error = ArbiterError::Unreachable("no answer".into());
        match request {
            ArbiterRequest::Read => Answer::Read(Err(error)),
            ArbiterRequest::Cas { .. } if for_sure => Answer::Cas(CasOutcome::Failed("nobody there".into())),
            ArbiterRequest::Cas { .. } => Answer::Cas(CasOutcome::Unknown("no answer".into())),
        }
    }

    /// Somebody restores an earlier content. False when there is none.
    pub fn roll_back(&mut self, steps: usize) -> bool {
        let keep = self.past.len().saturating_sub(steps.max(1));
        let Some(old) = self.past.get(keep).cloned() else { return false };
        self.past.truncate(keep);
        self.stored = Some(old);
        self.rolled_back = true;
        true
    }

    /// Somebody writes what is none of this pair's business.
    pub fn usurp(&mut self, record: Record) {
        let revision = Revision(self.stored.as_ref().map_or(1, |v| v.revision.0 + 1));
        self.past.extend(self.stored.take());
        self.stored = Some(Versioned { revision, record });
    }
}
