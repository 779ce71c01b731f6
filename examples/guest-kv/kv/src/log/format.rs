//! The bytes of the log on its disk.
//!
//! Sector 0 is the superblock; two halves of equal size follow from [`FIRST`] on. A half holds records back to back, padded with zeros
//! to a sector wherever a batch ended, or followed by the torn rest of a batch that was given up. All numbers are little-endian.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Bytes of a sector: the unit of all addresses, and what a disk writes in one piece or not at all.
pub const SECTOR: usize = 512;
/// The first sector of the first half.
const FIRST: u64 = 8;
/// Sectors of the smallest disk that takes a log.
pub const MIN_DISK: u64 = 2048;
/// Bytes of a record before its body.
pub(crate) const HEADER: usize = 48;
/// Most bytes in the body of a record.
pub const MAX_BODY: usize = 96 << 20;

const MAGIC: [u8; 8] = *b"FTKVLOG\n";
const VERSION: u32 = 1;
/// Where the superblock's checksum lies; what is before it is covered.
const SUM_AT: usize = 56;

/// What the body of a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A command, as RESP.
    Command,
    /// All that one key stands for (`Store::state_of`).
    State,
}

/// What precedes a record's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) length: u32,
    /// From 1 in each half, with no gap.
    pub(crate) sequence: u64,
    /// See [`Superblock::generation`].
    pub(crate) generation: u64,
    /// Milliseconds of the store's clock.
    pub(crate) time: u64,
    pub(crate) body_sum: u64,
}

/// A little-endian number at `at`; the callers' buffers are long enough.
fn number(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at + 8).and_then(|field| field.try_into().ok());
    field.map_or(0, u64::from_le_bytes)
}

impl Header {
    pub(crate) fn encode(&self, salt: u64) -> [u8; HEADER] {
        let Self { kind, length, sequence, generation, time, body_sum } = *self;
        let mut bytes = [0; HEADER];
        // Never zero: what begins with a zero is padding.
        bytes[0] = match kind {
            Kind::Command => 1,
            Kind::State => 2,
        };
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        for (at, field) in [(8, sequence), (16, generation), (24, time), (32, body_sum)] {
            bytes[at..at + 8].copy_from_slice(&field.to_le_bytes());
        }
        let sum = xxh3_64_with_seed(&bytes[..40], salt);
        bytes[40..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// `None` if this is no header of the log with this salt.
    pub(crate) fn decode(bytes: &[u8; HEADER], salt: u64) -> Option<Self> {
        let kind = match bytes[..4] {
            [1, 0, 0, 0] => Kind::Command,
            [2, 0, 0, 0] => Kind::State,
            _ => return None,
        };
        if number(bytes, 40) != xxh3_64_with_seed(&bytes[..40], salt) {
            return None;
        }
        let length = u32::try_from(number(bytes, 4) & u64::from(u32::MAX)).ok()?;
        let [sequence, generation, time, body_sum] = [8, 16, 24, 32].map(|at| number(bytes, at));
        Some(Self { kind, length, sequence, generation, time, body_sum })
    }
}

pub(crate) fn body_sum(body: &[u8], salt: u64) -> u64 {
    xxh3_64_with_seed(body, salt)
}

/// Where things are on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    pub(crate) half_sectors: u64,
}

impl Geometry {
    /// For a new log on a disk of so many sectors: it takes the first half of the disk. `None` if the disk is too small.
    #[must_use]
    pub fn of_disk(sectors: u64) -> Option<Self> {
        if sectors < MIN_DISK {
            return None;
        }
        Some(Self { half_sectors: ((sectors / 2 - FIRST) / 2) & !7 })
    }

    pub(crate) fn start(self, half: u8) -> u64 {
        FIRST + u64::from(half) * self.half_sectors
    }

    /// The first sector behind the log.
    #[must_use]
    pub fn end(self) -> u64 {
        FIRST + 2 * self.half_sectors
    }

    /// Bytes of records that fit.
    #[must_use]
    pub fn capacity(self) -> u64 {
        self.half_sectors * SECTOR as u64
    }
}

/// The one sector that says where the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) geometry: Geometry,
    /// 0 or 1: the half that counts.
    pub(crate) half: u8,
    /// Grows at each start and each compaction, and is durable before the first record that carries it: so nothing that was written and
    /// given up earlier is ever taken for the continuation of what was written later.
    pub(crate) generation: u64,
    /// The generation in which this half was begun: older records in it are left-overs.
    pub(crate) base_generation: u64,
    /// Records that this half had when it began to count; with fewer, the log is damaged.
    pub(crate) required: u64,
    /// Chosen at random when the log is made: clients, who choose what is in the records, cannot forge a checksum.
    pub(crate) salt: u64,
}

/// Why a superblock is not to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BadSuperblock {
    /// All zeros: a new disk.
    Blank,
    /// Something else has been written there.
    Foreign,
    /// A log of a later version.
    Version,
    /// A log whose superblock does not check.
    Damaged,
}

impl Superblock {
    pub(crate) fn encode(&self) -> [u8; SECTOR] {
        let Self { geometry, half, generation, base_generation, required, salt } = *self;
        let mut bytes = [0; SECTOR];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12] = half;
        for (at, field) in
            [(16, geometry.half_sectors), (24, generation), (32, base_generation), (40, required), (48, salt)]
        {
            bytes[at..at + 8].copy_from_slice(&field.to_le_bytes());
        }
        let sum = xxh3_64_with_seed(&bytes[..SUM_AT], 0);
        bytes[SUM_AT..SUM_AT + 8].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; SECTOR]) -> Result<Self, BadSuperblock> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Err(BadSuperblock::Blank);
        }
        if bytes[..8] != MAGIC {
            return Err(BadSuperblock::Foreign);
        }
        if bytes[8..12] != VERSION.to_le_bytes() {
            return Err(BadSuperblock::Version);
        }
        let [half_sectors, generation, base_generation, required, salt] =
            [16, 24, 32, 40, 48].map(|at| number(bytes, at));
        let sound = number(bytes, SUM_AT) == xxh3_64_with_seed(&bytes[..SUM_AT], 0)
            && bytes[12] < 2
            && bytes[13..16] == [0; 3]
            && (1..1 << 40).contains(&half_sectors)
            && base_generation <= generation
            && generation < u64::MAX / 2;
        if !sound {
            return Err(BadSuperblock::Damaged);
        }
        let geometry = Geometry { half_sectors };
        Ok(Self { geometry, half: bytes[12], generation, base_generation, required, salt })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_superblocks_are_read_back_and_no_changed_bit_is_missed() {
        let header = Header { kind: Kind::State, length: 7, sequence: 1, generation: 2, time: 3, body_sum: 4 };
        let bytes = header.encode(9);
        assert_eq!(Header::decode(&bytes, 9), Some(header));
        assert_eq!(Header::decode(&bytes, 8), None);
        let geometry = Geometry::of_disk(MIN_DISK).unwrap();
        let block = Superblock { geometry, half: 1, generation: 5, base_generation: 4, required: 3, salt: 2 };
        let sector = block.encode();
        assert_eq!(Superblock::decode(&sector), Ok(block));
        for bit in 0..8 * HEADER {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Header::decode(&bytes, 9), None, "bit {bit}");
        }
        for bit in 0..8 * (SUM_AT + 8) {
            let mut sector = sector;
            sector[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&sector).is_err(), "bit {bit}");
        }
        assert_eq!(Superblock::decode(&[0; SECTOR]), Err(BadSuperblock::Blank));
        assert_eq!(Superblock::decode(&[1; SECTOR]), Err(BadSuperblock::Foreign));
    }

    #[test]
    fn the_log_takes_the_first_half_at_most() {
        assert_eq!(Geometry::of_disk(MIN_DISK - 1), None);
        for sectors in [MIN_DISK, MIN_DISK + 1, 131_072, 1 << 33] {
            let geometry = Geometry::of_disk(sectors).unwrap();
            assert!(geometry.end() <= sectors / 2 && geometry.end() + 16 > sectors / 2, "{sectors}");
            assert!(geometry.start(1).is_multiple_of(8) && geometry.start(1) + geometry.half_sectors == geometry.end());
        }
    }
}
