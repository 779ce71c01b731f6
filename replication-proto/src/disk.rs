//! What travels of disks: changes with their epoch, hashes of pieces to find what differs, and what a backup's images hold when it greets.

use bytes::Bytes;

use crate::ids::Point;
use crate::limits::{DISK_PIECE_BYTES, MAX_DISK_CHANGE_BYTES, MAX_DISK_ZERO_BYTES, SECTOR_BYTES};

/// One change of a disk, in the order in which the guest made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskChange {
    /// Which disk, counted from 0.
    pub disk: u8,
    /// First byte changed, a multiple of 512.
    pub offset: u64,
    /// What was put there.
    pub content: DiskContent,
}

/// What a change puts into a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskContent {
    /// These bytes, a multiple of 512 and at most [`MAX_DISK_CHANGE_BYTES`].
    Bytes(Bytes),
    /// So many bytes of zero: a multiple of 512 and at most [`MAX_DISK_ZERO_BYTES`].
    Zeros(u64),
}

impl DiskChange {
    /// Bytes of the disk that it changes.
    pub fn len(&self) -> u64 {
        match &self.content {
            DiskContent::Bytes(bytes) => crate::wire::codec::wide(bytes.len()),
            DiskContent::Zeros(len) => *len,
        }
    }

    /// True when it changes nothing, which no valid change does.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that it takes in memory and on the wire, about.
    pub fn weight(&self) -> usize {
        let data = match &self.content {
            DiskContent::Bytes(bytes) => bytes.len(),
            DiskContent::Zeros(_) => 0,
        };
        data + 32
    }

    /// Whether it lies in a disk of `disk_bytes` and keeps the bounds of one message.
    pub fn fits(&self, disk_bytes: u64) -> bool {
        let most = match &self.content {
            DiskContent::Bytes(_) => crate::wire::codec::wide(MAX_DISK_CHANGE_BYTES),
            DiskContent::Zeros(_) => MAX_DISK_ZERO_BYTES,
        };
        let len = self.len();
        let whole = self.offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES);
        whole && len > 0 && len <= most && self.offset.checked_add(len).is_some_and(|end| end <= disk_bytes)
    }
}

/// The changes of one epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskChanges {
    /// In the order in which the guest made them.
    pub changes: Vec<DiskChange>,
    /// The guest may have been told in this epoch that its changes are on stable storage.
    pub flushed: bool,
}

impl DiskChanges {
    /// True when there is nothing to do for it.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && !self.flushed
    }

    /// Bytes that they take in memory, about.
    pub fn weight(&self) -> usize {
        self.changes.iter().map(DiskChange::weight).sum()
    }
}

/// Something whose content is compared by hash before it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Comparable {
    /// Pages of memory; pieces are numbered by page index.
    Memory,
    /// A disk; pieces of [`DISK_PIECE_BYTES`] are numbered from its beginning, the last may be short.
    Disk(u8),
}

/// Hashes (xxh3, 128 bits) of consecutive pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceHashes {
    /// Of what.
    pub of: Comparable,
    /// Number of the first piece.
    pub first: u64,
    /// One for each piece, at most [`crate::limits::MAX_PIECES_PER_MESSAGE`].
    pub hashes: Vec<u128>,
}

/// The answer to [`PieceHashes`]: which of the pieces differ there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PiecesWanted {
    /// Of what.
    pub of: Comparable,
    /// Number of the first piece.
    pub first: u64,
    /// One for each piece that was asked for: true if it is wanted.
    pub wanted: Vec<bool>,
}

/// The hash of one piece: content decides, not where it came from.
pub fn piece_hash(bytes: &[u8]) -> u128 {
    xxhash_rust::xxh3::xxh3_128(bytes)
}

/// Pieces of a disk of `bytes`.
pub fn disk_pieces(bytes: u64) -> u64 {
    bytes.div_ceil(DISK_PIECE_BYTES)
}

/// What a backup holds of an earlier life, said with its acceptance. Nothing is trusted for safety: it only saves bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// Its memory holds an older checkpoint: comparing may save sending.
    pub warm_memory: bool,
    /// One for each disk.
    pub disks: Vec<DiskStanding>,
}

/// What one of a backup's images holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskStanding {
    /// The image is that of this point, but for `dirty`. `None`: nothing is known.
    pub base: Option<Point>,
    /// It ran the guest after `base`, and `dirty` is what it changed since.
    pub was_owner: bool,
    /// Blocks that may differ from `base`, in the encoding of whoever keeps such sets; at most [`crate::limits::MAX_DIRTY_BYTES`].
    pub dirty: Bytes,
}

/// What a backup found when it compared a part of its copy with the primary's digest of it, both as of the end of one epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Pieces that were compared.
    pub compared: u64,
    /// The first pieces that differ, at most [`crate::limits::MAX_VERIFY_FINDINGS`].
    pub differing: Vec<(Comparable, u64)>,
}
