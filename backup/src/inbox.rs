//! The incomplete epoch: what has arrived of a checkpoint and is not committed. The standby never sees any of it. Pure.

use bytes::Bytes;
use replication_proto::{CheckpointDigest, EpochDigest};
use replication_proto::{CheckpointKind, DiskChange, DiskContent};
use replication_proto::{Epoch, PageIndex};
use vmm::{Section, SectionKind};

/// Smaller batches are copied. Their bytes are a part of what the link read at once, all of which they would keep alive: a peer that
/// puts single pages between other frames would make the inbox hold many times what it counts.
const SHARED_BYTES_MIN: usize = 128 << 10;

/// Pages as they arrived in one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBatch {
    /// Which pages.
    pub indexes: Vec<PageIndex>,
    /// Their bytes, one page after another.
    pub bytes: Bytes,
}

/// A checkpoint that has not ended.
pub struct Incomplete {
    epoch: Epoch,
    kind: CheckpointKind,
    batches: Vec<PageBatch>,
    sections: Vec<Section>,
    disk: Vec<DiskChange>,
    pages: u64,
    disk_changes: u64,
    kept_bytes: usize,
    digest: EpochDigest,
}

/// Where an arriving piece of a checkpoint goes.
#[derive(Debug, PartialEq, Eq)]
pub enum Destination<T> {
    /// Kept until the commit.
    Kept,
    /// Into the standby's memory or disk at once: it is hollow until the base is committed.
    Hollow(T),
}

/// Why an arriving piece was refused. The connection ends; what was committed stays.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InboxError {
    /// A piece of a checkpoint that was not begun, or a beginning inside one.
    #[error("{0} arrived out of order")]
    OutOfOrder(&'static str),
    /// More than the inbox may hold.
    #[error("epoch {epoch} is larger than the inbox limit of {limit} bytes")]
    TooLarge {
        /// The epoch.
        epoch: Epoch,
        /// `limits.inbox`.
        limit: usize,
    },
}

/// Collects one checkpoint at a time.
pub struct Inbox {
    current: Option<Incomplete>,
    limit: usize,
}

impl Inbox {
    /// An empty inbox that holds at most `limit` bytes of an incomplete epoch.
    pub fn new(limit: usize) -> Self {
        Self { current: None, limit }
    }

    /// A checkpoint begins.
    ///
    /// # Errors
    /// One is under way already.
    pub fn begin(&mut self, epoch: Epoch, kind: CheckpointKind) -> Result<(), InboxError> {
        if self.current.is_some() {
            return Err(InboxError::OutOfOrder("the beginning of a checkpoint"));
        }
        self.current = Some(Incomplete {
            epoch,
            kind,
            batches: Vec::new(),
            sections: Vec::new(),
            disk: Vec::new(),
            pages: 0,
            disk_changes: 0,
            kept_bytes: 0,
            digest: EpochDigest::new(epoch, kind),
        });
        Ok(())
    }

    /// Pages arrived, decoded.
    ///
    /// # Errors
    /// No checkpoint is under way, or it is too large.
    pub fn pages(&mut self, batch: PageBatch) -> Result<Destination<PageBatch>, InboxError> {
        let limit = self.limit;
        let current = self.current.as_mut().ok_or(InboxError::OutOfOrder("pages"))?;
        current.digest.pages(&batch.indexes, &batch.bytes);
        current.pages += u64::try_from(batch.indexes.len()).unwrap_or(u64::MAX);
        match current.kind {
            CheckpointKind::Base => Ok(Destination::Hollow(batch)),
            CheckpointKind::Delta => {
                current.keep(batch.bytes.len(), limit)?;
                let PageBatch { indexes, bytes } = batch;
                let bytes = if bytes.len() < SHARED_BYTES_MIN { Bytes::copy_from_slice(&bytes) } else { bytes };
                current.batches.push(PageBatch { indexes, bytes });
                Ok(Destination::Kept)
            }
        }
    }

    /// A change of a disk arrived.
    ///
    /// # Errors
    /// No checkpoint is under way, or it is too large.
    pub fn disk(&mut self, change: DiskChange) -> Result<Destination<DiskChange>, InboxError> {
        let limit = self.limit;
        let current = self.current.as_mut().ok_or(InboxError::OutOfOrder("a change of a disk"))?;
        current.digest.disk(&change);
        current.disk_changes += 1;
        match current.kind {
            CheckpointKind::Base => Ok(Destination::Hollow(change)),
            CheckpointKind::Delta => {
                current.keep(change.weight(), limit)?;
                current.disk.push(owned(change));
                Ok(Destination::Kept)
            }
        }
    }

    /// A section arrived.
    ///
    /// # Errors
    /// No checkpoint is under way, or it is too large.
    pub fn section(&mut self, kind: u16, version: u16, bytes: &[u8]) -> Result<(), InboxError> {
        let limit = self.limit;
        let current = self.current.as_mut().ok_or(InboxError::OutOfOrder("a section"))?;
        current.digest.section(kind, version, bytes);
        current.keep(bytes.len(), limit)?;
        current.sections.push(Section { kind: SectionKind(kind), version, bytes: bytes.to_vec() });
        Ok(())
    }

    /// The checkpoint has ended; whether it is whole is the commit's question.
    ///
    /// # Errors
    /// No checkpoint is under way.
    pub fn take(&mut self) -> Result<Incomplete, InboxError> {
        self.current.take().ok_or(InboxError::OutOfOrder("the end of a checkpoint"))
    }

    /// Forgets what is incomplete. True when there was something.
    pub fn drop_incomplete(&mut self) -> bool {
        self.current.take().is_some()
    }
}

impl Incomplete {
    fn keep(&mut self, bytes: usize, limit: usize) -> Result<(), InboxError> {
        self.kept_bytes = self.kept_bytes.saturating_add(bytes);
        if self.kept_bytes > limit {
            return Err(InboxError::TooLarge { epoch: self.epoch, limit });
        }
        Ok(())
    }

    /// Which epoch it ends.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Base or delta.
    pub fn kind(&self) -> CheckpointKind {
        self.kind
    }

    /// Pages that arrived.
    pub fn page_count(&self) -> u64 {
        self.pages
    }

    /// Sections that arrived.
    pub fn section_count(&self) -> usize {
        self.sections.len()
    }

    /// Changes of disks that arrived.
    pub fn disk_change_count(&self) -> u64 {
        self.disk_changes
    }

    /// Takes it apart: digest of what arrived, and what was kept of it.
    pub fn into_parts(self) -> (CheckpointDigest, Parts) {
        let Self { epoch: _, kind: _, batches, sections, disk, pages: _, disk_changes: _, kept_bytes: _, digest } =
            self;
        (digest.finish(), Parts { batches, sections, disk })
    }
}

/// What was kept of a checkpoint.
#[derive(Debug)]
pub struct Parts {
    /// Pages; none of a base.
    pub batches: Vec<PageBatch>,
    /// The machine's state.
    pub sections: Vec<Section>,
    /// Changes of disks; none of a base.
    pub disk: Vec<DiskChange>,
}

/// The same change, which keeps nothing alive but its own bytes.
fn owned(change: DiskChange) -> DiskChange {
    match change.content {
        DiskContent::Bytes(bytes) if bytes.len() < SHARED_BYTES_MIN => {
            DiskChange { content: DiskContent::Bytes(Bytes::copy_from_slice(&bytes)), ..change }
        }
        content => DiskChange { content, ..change },
    }
}
