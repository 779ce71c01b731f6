//! **The story of a commit**, steps 12 and 13 of ARCHITECTURE.md's table: verify, commit, acknowledge. Pure; nothing else may acknowledge.
//!
//! A checkpoint is *committed* when it is whole, verified and held in RAM: the standby could run from it with no further
//! input. Applying it to the standby's memory may follow the acknowledgement and is finished before activation.

use std::collections::VecDeque;

use replication_proto::mutant::{self, Mutant};
use replication_proto::{CheckpointKind, DiskChanges, EndOfCheckpoint, Epoch};
use vmm::Section;

use crate::inbox::{Incomplete, PageBatch, Parts};

/// A checkpoint that is committed and not yet applied.
#[derive(Debug)]
pub struct Committed {
    /// The epoch that it ended.
    pub epoch: Epoch,
    /// Pages to apply; those of a base were applied while the standby was hollow.
    pub pages: Vec<PageBatch>,
    /// The whole machine state at the end of the epoch.
    pub sections: Vec<Section>,
    /// Changes of disks; those of a base were applied while the standby was hollow.
    pub disk: DiskChanges,
    /// Base or delta.
    pub kind: CheckpointKind,
}

impl Committed {
    /// Bytes of pages that wait to be applied.
    pub fn page_bytes(&self) -> usize {
        self.pages.iter().map(|batch| batch.bytes.len()).sum()
    }

    /// Bytes of pages and of changes of disks that wait to be applied.
    pub fn bytes(&self) -> usize {
        self.page_bytes() + self.disk.weight()
    }
}

/// What the standby could run from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    /// Nothing: no base was committed yet, or a new one is being written over the old.
    Hollow,
    /// The whole state at the end of this epoch.
    Whole(Epoch),
}

/// Why a checkpoint was not committed. The connection ends; what was committed before stays.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// The end names another epoch than the beginning.
    #[error("the end of epoch {end} closes epoch {begun}")]
    OtherEpoch {
        /// As begun.
        begun: Epoch,
        /// As ended.
        end: Epoch,
    },
    /// The epoch does not follow the last committed one.
    #[error("epoch {got} does not follow {last:?}")]
    NotConsecutive {
        /// As received.
        got: Epoch,
        /// What the standby holds.
        last: Holding,
    },
    /// Something is missing or too much.
    #[error("epoch {epoch}: {what}: {got} arrived, the end announces {announced}")]
    Count {
        /// The epoch.
        epoch: Epoch,
        /// Pages or sections.
        what: &'static str,
        /// As counted.
        got: u64,
        /// As announced.
        announced: u64,
    },
    /// The content differs from what the primary staged.
    #[error("epoch {epoch}: the digest differs from the primary's")]
    Digest {
        /// The epoch.
        epoch: Epoch,
    },
    /// The standby is being activated: it commits nothing any more.
    #[error("the standby is being activated")]
    Closed,
}

/// What is committed, what is applied, and which acknowledgements are due.
#[derive(Debug)]
pub struct Commits {
    holding: Holding,
    closed: bool,
    backlog_bytes: usize,
    backlog_limit: usize,
    unacked: VecDeque<Unacked>,
    /// Every change of a disk up to this epoch, of those that follow the last base, is on stable storage.
    durable: Epoch,
}

/// A committed epoch whose acknowledgement has not left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unacked {
    epoch: Epoch,
    /// The guest may have been told in it that its changes are on stable storage: so they must be, here too, first.
    needs_stable: bool,
}

impl Commits {
    /// A hollow standby. Acknowledgements are withheld while more than `backlog_limit` bytes of committed pages wait to be applied,
    /// which bounds both memory and the time that an activation takes.
    pub fn new(backlog_limit: usize) -> Self {
        Self {
            holding: Holding::Hollow,
            closed: false,
            backlog_bytes: 0,
            backlog_limit,
            unacked: VecDeque::new(),
            durable: Epoch(0),
        }
    }

    /// What the standby could run from now.
    pub fn holding(&self) -> Holding {
        self.holding
    }

    /// Bytes committed and not applied.
    pub fn backlog_bytes(&self) -> usize {
        self.backlog_bytes
    }

    /// A base begins: it is written straight into the standby's memory, which is hollow until the base is committed.
    ///
    /// What was on stable storage says nothing of it: the epochs of a guest that was booted anew are numbered from 1 again.
    pub fn begin_base(&mut self) {
        self.holding = Holding::Hollow;
        self.unacked.clear();
        self.durable = Epoch(0);
    }

    /// Verifies a checkpoint that has ended, and commits it.
    ///
    /// # Errors
    /// See [`CommitError`]; nothing has changed then.
    pub fn commit(&mut self, arrived: Incomplete, end: &EndOfCheckpoint) -> Result<Committed, CommitError> {
        let epoch = arrived.epoch();
        if self.closed {
            return Err(CommitError::Closed);
        }
        // 12a. It ends what was begun, and follows what is committed.
        if end.epoch != epoch {
            return Err(CommitError::OtherEpoch { begun: epoch, end: end.epoch });
        }
        self.check_consecutive(&arrived)?;
        // 12b. Nothing is missing and nothing too much.
        let counts = [
            ("pages", arrived.page_count(), end.pages),
            ("sections", u64::try_from(arrived.section_count()).unwrap_or(u64::MAX), u64::from(end.sections)),
            ("changes of disks", arrived.disk_change_count(), end.disk_changes),
        ];
        for (what, got, announced) in counts {
            if got != announced {
                return Err(CommitError::Count { epoch, what, got, announced });
            }
        }
        // 12c. It is what the primary staged.
        let kind = arrived.kind();
        let (digest, Parts { batches: pages, sections, disk }) = arrived.into_parts();
        if digest != end.digest {
            return Err(CommitError::Digest { epoch });
        }
        // 13. Committed: from here on the standby could run from it.
        let disk = DiskChanges { changes: disk, flushed: end.flushed };
        let committed = Committed { epoch, pages, sections, disk, kind };
        self.holding = Holding::Whole(epoch);
        self.backlog_bytes += committed.bytes();
        self.unacked.push_back(Unacked { epoch, needs_stable: end.flushed });
        Ok(committed)
    }

    /// Every change of a disk up to `epoch`, which follows the last base or is it, is on stable storage.
    pub fn durable(&mut self, epoch: Epoch) {
        self.durable = self.durable.max(epoch);
    }

    /// What was committed cannot be kept: there is nothing to run from any more.
    pub fn spoilt(&mut self) {
        self.holding = Holding::Hollow;
        self.unacked.clear();
    }

    /// Pages or changes of disks of a committed checkpoint have been applied.
    pub fn applied(&mut self, bytes: usize) {
        assert!(bytes <= self.backlog_bytes, "more was applied than committed");
        self.backlog_bytes -= bytes;
    }

    /// The acknowledgements that are due now, in order.
    pub fn acks_due(&mut self) -> Vec<Epoch> {
        if self.closed || self.backlog_bytes > self.backlog_limit {
            return Vec::new();
        }
        let durable = self.durable;
        let due = |unacked: &&Unacked| {
            !unacked.needs_stable || unacked.epoch <= durable || mutant::is(Mutant::AckBeforeStable)
        };
        let count = self.unacked.iter().take_while(due).count();
        self.unacked.drain(..count).map(|unacked| unacked.epoch).collect()
    }

    /// The connection is gone: acknowledgements that were withheld are owed to nobody.
    pub fn connection_lost(&mut self) {
        self.unacked.clear();
    }

    /// The standby is about to run: nothing is committed or acknowledged from here on (rule R2).
    pub fn close(&mut self) -> Holding {
        self.closed = true;
        self.unacked.clear();
        self.holding
    }

    fn check_consecutive(&self, arrived: &Incomplete) -> Result<(), CommitError> {
        let follows = match (arrived.kind(), self.holding) {
            (CheckpointKind::Base, Holding::Hollow) => true,
            (CheckpointKind::Delta, Holding::Whole(last)) => last.checked_next() == Some(arrived.epoch()),
            (CheckpointKind::Base, Holding::Whole(_)) | (CheckpointKind::Delta, Holding::Hollow) => false,
        };
        if follows { Ok(()) } else { Err(CommitError::NotConsecutive { got: arrived.epoch(), last: self.holding }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inbox::Inbox;
    use replication_proto::EpochDigest;
    use replication_proto::PageIndex;

    fn batch(page: u64, fill: u8) -> PageBatch {
        PageBatch { indexes: vec![PageIndex(page)], bytes: vec![fill; 4096].into() }
    }

    fn end(epoch: u64, kind: CheckpointKind, batches: &[PageBatch]) -> EndOfCheckpoint {
        let mut digest = EpochDigest::new(Epoch(epoch), kind);
        for b in batches {
            digest.pages(&b.indexes, &b.bytes);
        }
        let pages = u64::try_from(batches.len()).unwrap();
        let (epoch, digest) = (Epoch(epoch), digest.finish());
        EndOfCheckpoint { epoch, kind, pages, sections: 0, disk_changes: 0, flushed: false, digest }
    }

    fn arrive(epoch: u64, kind: CheckpointKind, batches: &[PageBatch]) -> Incomplete {
        let mut inbox = Inbox::new(1 << 20);
        inbox.begin(Epoch(epoch), kind).unwrap();
        for b in batches {
            inbox.pages(b.clone()).unwrap();
        }
        inbox.take().unwrap()
    }

    fn with_base(epoch: u64) -> Commits {
        let mut commits = Commits::new(4096);
        commits.begin_base();
        let b = [batch(1, 1)];
        commits.commit(arrive(epoch, CheckpointKind::Base, &b), &end(epoch, CheckpointKind::Base, &b)).unwrap();
        assert_eq!(commits.acks_due(), [Epoch(epoch)]);
        commits
    }

    #[test]
    fn deltas_follow_the_base_one_by_one() {
        let mut commits = with_base(7);
        let b = [batch(1, 2)];
        let got = commits.commit(arrive(8, CheckpointKind::Delta, &b), &end(8, CheckpointKind::Delta, &b)).unwrap();
        assert_eq!((got.epoch, got.bytes()), (Epoch(8), 4096));
        assert_eq!(commits.acks_due(), [Epoch(8)]);
        let skipped = commits.commit(arrive(10, CheckpointKind::Delta, &b), &end(10, CheckpointKind::Delta, &b));
        assert!(matches!(skipped, Err(CommitError::NotConsecutive { .. })));
        assert_eq!(commits.holding(), Holding::Whole(Epoch(8)));
    }

    #[test]
    fn a_hollow_standby_takes_no_delta() {
        let mut commits = Commits::new(4096);
        let b = [batch(1, 2)];
        let early = commits.commit(arrive(1, CheckpointKind::Delta, &b), &end(1, CheckpointKind::Delta, &b));
        assert!(matches!(early, Err(CommitError::NotConsecutive { .. })));
        assert!(commits.acks_due().is_empty());
    }

    #[test]
    fn wrong_content_or_count_commits_nothing() {
        let mut commits = with_base(1);
        let (sent, arrived) = ([batch(1, 2)], [batch(1, 3)]);
        let wrong = commits.commit(arrive(2, CheckpointKind::Delta, &arrived), &end(2, CheckpointKind::Delta, &sent));
        assert!(matches!(wrong, Err(CommitError::Digest { epoch: Epoch(2) })));
        let short = commits.commit(arrive(2, CheckpointKind::Delta, &[]), &end(2, CheckpointKind::Delta, &sent));
        assert!(matches!(short, Err(CommitError::Count { what: "pages", got: 0, announced: 1, .. })));
        assert_eq!(commits.holding(), Holding::Whole(Epoch(1)));
        assert!(commits.acks_due().is_empty());
    }

    #[test]
    fn acknowledgements_wait_while_the_backlog_is_over_its_limit() {
        let mut commits = with_base(1);
        let b = [batch(1, 2), batch(2, 2)];
        commits.commit(arrive(2, CheckpointKind::Delta, &b), &end(2, CheckpointKind::Delta, &b)).unwrap();
        assert!(commits.acks_due().is_empty());
        commits.applied(8192);
        assert_eq!(commits.acks_due(), [Epoch(2)]);
    }

    #[test]
    fn an_epoch_with_a_flush_is_acknowledged_only_when_it_is_on_stable_storage_and_holds_up_those_behind_it() {
        let mut commits = with_base(1);
        let flush = EndOfCheckpoint { flushed: true, ..end(2, CheckpointKind::Delta, &[]) };
        assert!(commits.commit(arrive(2, CheckpointKind::Delta, &[]), &flush).unwrap().disk.flushed);
        commits.commit(arrive(3, CheckpointKind::Delta, &[]), &end(3, CheckpointKind::Delta, &[])).unwrap();
        assert_eq!((commits.acks_due(), commits.holding()), (vec![], Holding::Whole(Epoch(3))));
        commits.durable(Epoch(1));
        assert!(commits.acks_due().is_empty());
        commits.durable(Epoch(2));
        assert_eq!(commits.acks_due(), [Epoch(2), Epoch(3)]);
    }

    #[test]
    fn what_was_stable_before_a_base_says_nothing_of_the_epochs_of_a_guest_that_was_booted_anew() {
        let mut commits = with_base(900);
        commits.durable(Epoch(900));
        commits.begin_base();
        let base = EndOfCheckpoint { flushed: true, ..end(1, CheckpointKind::Base, &[]) };
        commits.commit(arrive(1, CheckpointKind::Base, &[]), &base).unwrap();
        assert!(commits.acks_due().is_empty());
        commits.durable(Epoch(1));
        assert_eq!(commits.acks_due(), [Epoch(1)]);
    }

    #[test]
    fn a_standby_whose_disk_failed_is_hollow() {
        let mut commits = with_base(3);
        commits.spoilt();
        assert_eq!(commits.holding(), Holding::Hollow);
    }

    #[test]
    fn a_new_base_makes_the_standby_hollow_until_it_is_committed() {
        let mut commits = with_base(3);
        commits.begin_base();
        assert_eq!(commits.holding(), Holding::Hollow);
    }

    #[test]
    fn an_activating_standby_commits_and_acknowledges_nothing() {
        let mut commits = with_base(3);
        let b = [batch(1, 2)];
        assert_eq!(commits.close(), Holding::Whole(Epoch(3)));
        let late = commits.commit(arrive(4, CheckpointKind::Delta, &b), &end(4, CheckpointKind::Delta, &b));
        assert!(matches!(late, Err(CommitError::Closed)));
        assert!(commits.acks_due().is_empty());
    }
}
