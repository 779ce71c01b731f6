//! The digest that ends a checkpoint. Both ends compute it over what they hold *decoded*, in the order sent: the sender over what it was
//! given, the backup over what it is about to commit. It finds faults of ours and of the hardware between; it is no defence against a
//! forger (the link's authentication is).

use core::fmt;

use xxhash_rust::xxh3::Xxh3;

use crate::disk::{DiskChange, DiskContent};
use crate::ids::{Epoch, PageIndex};
use crate::limits::PAGE_BYTES;
use crate::message::CheckpointKind;
use crate::wire::codec::wide;

const TAG_PAGE: u8 = 1;
const TAG_SECTION: u8 = 2;
const TAG_DISK_BYTES: u8 = 3;
const TAG_DISK_ZEROS: u8 = 4;

/// XXH3-128 of one checkpoint's contents.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CheckpointDigest(pub u128);

impl fmt::Display for CheckpointDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for CheckpointDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CheckpointDigest({self})")
    }
}

/// Digest under way: pages and sections are added in the order sent.
#[derive(Clone)]
pub struct EpochDigest(Xxh3);

impl EpochDigest {
    /// A digest of a checkpoint that has nothing yet.
    pub fn new(epoch: Epoch, kind: CheckpointKind) -> Self {
        let mut hash = Xxh3::new();
        hash.update(&epoch.0.to_le_bytes());
        hash.update(&[kind.code()]);
        Self(hash)
    }

    /// Adds pages: `bytes` holds `indexes.len()` pages one after the other.
    ///
    /// # Panics
    /// When `bytes` is not that long.
    pub fn pages(&mut self, indexes: &[PageIndex], bytes: &[u8]) {
        assert_eq!(bytes.len(), indexes.len() * PAGE_BYTES, "one page of bytes for each index");
        for (index, page) in indexes.iter().zip(bytes.chunks_exact(PAGE_BYTES)) {
            let mut head = [TAG_PAGE; 9];
            head[1..].copy_from_slice(&index.0.to_le_bytes());
            self.0.update(&head);
            self.0.update(page);
        }
    }

    /// Adds a section.
    pub fn section(&mut self, kind: u16, version: u16, bytes: &[u8]) {
        let mut head = [TAG_SECTION; 13];
        head[1..3].copy_from_slice(&kind.to_le_bytes());
        head[3..5].copy_from_slice(&version.to_le_bytes());
        head[5..].copy_from_slice(&wide(bytes.len()).to_le_bytes());
        self.0.update(&head);
        self.0.update(bytes);
    }

    /// One change of a disk.
    pub fn disk(&mut self, change: &DiskChange) {
        let DiskChange { disk, offset, content } = change;
        let tag = if matches!(content, DiskContent::Bytes(_)) { TAG_DISK_BYTES } else { TAG_DISK_ZEROS };
        let mut head = [tag; 18];
        head[1] = *disk;
        head[2..10].copy_from_slice(&offset.to_le_bytes());
        head[10..].copy_from_slice(&change.len().to_le_bytes());
        self.0.update(&head);
        if let DiskContent::Bytes(bytes) = content {
            self.0.update(bytes);
        }
    }

    /// The digest of what was added so far.
    pub fn finish(&self) -> CheckpointDigest {
        CheckpointDigest(self.0.digest128())
    }
}

impl fmt::Debug for EpochDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EpochDigest({} so far)", self.finish())
    }
}
