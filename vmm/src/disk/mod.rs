//! What a block device does its work on.
//!
//! [`Disk`] is what the device calls; [`DiskImage`] is the plain one, a raw image on a [`Storage`]. Who replicates a machine puts
//! a [`Disk`] of its own around an image.

mod image;
#[cfg(any(test, fuzzing))]
pub(crate) mod memory;
mod storage;

use std::fmt;
use std::io;

pub use image::{DiskImage, ImageError};
pub use storage::{FileStorage, Storage};

/// The unit of offsets and lengths: a disk is a whole number of these.
pub const SECTOR_BYTES: u64 = 512;

/// A range of bytes of a disk; both numbers are multiples of [`SECTOR_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl ByteRange {
    /// One past the last byte; at most `u64::MAX`, where no disk ends.
    pub fn end(self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Whether some byte is in both. An empty range overlaps nothing.
    pub fn overlaps(self, other: Self) -> bool {
        self.len > 0 && other.len > 0 && self.offset < other.end() && other.offset < self.end()
    }
}

/// What a virtio-blk device does its work on. Called on the disk's worker threads, several at a time; may block. Requests that overlap,
/// one of them a change, never run at the same time, and a caller never asks for bytes beyond [`Disk::bytes`].
pub trait Disk: Send + Sync {
    /// Size in bytes, a multiple of [`SECTOR_BYTES`]. Never changes.
    fn bytes(&self) -> u64;

    /// True when every change fails. Never changes.
    fn is_read_only(&self) -> bool;

    /// Reads exactly `into.len()` bytes from `offset`.
    ///
    /// # Errors
    /// The host's; `into` may then hold anything.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Called before every change of `range`, while the machine may be stopped and captured at any time: what must be durable before the
    /// change begins. May take long (it may sync a file). The change may come much later, in pieces, or (when the guest resets the device
    /// or the machine ends) never.
    ///
    /// # Errors
    /// The host's; the change is then not begun.
    fn announce(&self, range: ByteRange) -> io::Result<()>;

    /// Changes bytes. Never runs while the machine is stopped; when it returns, the change is in the disk (the page cache will do) and
    /// recorded.
    ///
    /// # Errors
    /// `WouldBlock` when the announcement is not valid any more (the disk has meanwhile forgotten it): nothing was changed, and the caller
    /// announces what is left and tries again. Otherwise the host's; the bytes may then be old, new or a mixture.
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()>;

    /// Makes `range` read as zeroes, as [`Disk::write`] would; `may_unmap` lets the host give the space back.
    ///
    /// # Errors
    /// As [`Disk::write`].
    fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> io::Result<()>;

    /// The guest has no use for what is in `range`. Afterwards the range reads as zeroes: both sides of a pair must be equal.
    ///
    /// # Errors
    /// As [`Disk::write`].
    fn discard(&self, range: ByteRange) -> io::Result<()>;

    /// When this returns, all changes that were complete when it was called are on stable storage. May take long; runs while the machine
    /// may be stopped.
    ///
    /// # Errors
    /// The host's; nothing is then known of what is on stable storage, and no later flush may succeed: the host may have dropped what it
    /// could not write.
    fn flush(&self) -> io::Result<()>;
}

/// What a guest reads as a disk's serial number (`/dev/disk/by-id/virtio-…`): the disk's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DiskSerial([u8; 20]);

impl DiskSerial {
    /// From a name of 1 to 20 letters, digits, `-`, `_` or `.`; `None` when it is something else.
    pub fn new(name: &str) -> Option<Self> {
        let fits = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        let mut serial = [0; 20];
        serial.get_mut(..name.len()).filter(|_| fits)?.copy_from_slice(name.as_bytes());
        Some(Self(serial))
    }

    /// As the guest reads it: padded with zeroes.
    pub fn bytes(&self) -> &[u8; 20] {
        &self.0
    }
}

impl fmt::Display for DiskSerial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take_while(|b| **b != 0).try_for_each(|b| write!(f, "{}", char::from(*b)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_overlap_where_they_share_a_byte() {
        let range = |offset, len| ByteRange { offset, len };
        assert!(range(512, 1024).overlaps(range(1024, 512)));
        assert!(!range(512, 512).overlaps(range(1024, 512)));
        assert!(!range(512, 0).overlaps(range(0, 4096)));
        assert!(range(u64::MAX - 511, 512).overlaps(range(0, u64::MAX)));
    }

    #[test]
    fn serials_are_short_plain_names() {
        assert_eq!(&DiskSerial::new("data-1").unwrap().bytes()[..7], b"data-1\0");
        assert_eq!(DiskSerial::new("data-1").unwrap().to_string(), "data-1");
        assert!(DiskSerial::new("exactly-twenty-chars").is_some());
        for name in ["", "exactly-twenty-chars1", "a b", "ä", "a/b"] {
            assert_eq!(DiskSerial::new(name), None, "{name}");
        }
    }
}
