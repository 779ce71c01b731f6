//! Reading a log: the superblock, then each record that checks.

use alloc::vec::Vec;

use super::format::{BadSuperblock, HEADER, Header, Kind, MAX_BODY, SECTOR, Superblock, body_sum};
use crate::resp::OutOfMemory;

/// Bytes that are read at once.
const READ: usize = 128 << 10;

/// A disk that could not do what it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoFailed;

/// A disk that is read at the start, before anything else goes on.
pub trait Blocks {
    /// Its size in sectors.
    fn sectors(&self) -> u64;
    /// Reads whole sectors that lie on the disk.
    ///
    /// # Errors
    /// The disk says so.
    fn read(&mut self, sector: u64, into: &mut [u8]) -> Result<(), IoFailed>;
}

/// Why there is no log to go on with. Nothing has been written to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenError {
    /// The disk cannot be read.
    Io,
    /// The disk has fewer than [`super::MIN_DISK`] sectors.
    TooSmall,
    /// The disk holds something that is not a log.
    Foreign,
    /// The log was written by a later version.
    Version,
    /// The superblock does not check.
    Damaged,
    /// The disk is smaller than when the log was made.
    Shrunk,
    /// So many records must be there, and only so many are.
    Missing {
        /// Records that the superblock vouches for.
        required: u64,
        /// Records that check.
        found: u64,
    },
    /// A record was not accepted by whoever replays it.
    Refused {
        /// Its number, from 1.
        sequence: u64,
    },
    /// Memory ran out.
    OutOfMemory,
}

impl core::fmt::Display for OpenError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Io => f.write_str("the disk cannot be read"),
            Self::TooSmall => f.write_str("the disk is smaller than 1 MiB"),
            Self::Foreign => {
                f.write_str("the disk holds something that is not a log; its first sector is not all zeros")
            }
            Self::Version => f.write_str("the log was written by a later version"),
            Self::Damaged => f.write_str("the log's first sector is damaged"),
            Self::Shrunk => f.write_str("the disk is smaller than when its log was made"),
            Self::Missing { required, found } => write!(f, "the log is damaged: {found} of {required} records check"),
            Self::Refused { sequence } => write!(f, "record {sequence} of the log cannot be carried out"),
            Self::OutOfMemory => f.write_str("what the log holds does not fit in memory"),
        }
    }
}

impl From<IoFailed> for OpenError {
    fn from(_: IoFailed) -> Self {
        Self::Io
    }
}

impl From<OutOfMemory> for OpenError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// One record, as it is replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// What the body is.
    pub kind: Kind,
    /// Milliseconds of the store's clock when it was written.
    pub time: u64,
    /// The body.
    pub body: &'a [u8],
    /// Whether the superblock vouches for it: written by a compaction, or while it went on. What such records are about may be
    /// incomplete before the last of them.
    pub vouched: bool,
}

/// Why a record is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplayError {
    /// It makes no sense.
    Refused,
    /// Memory ran out.
    OutOfMemory,
}

/// Where the log ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tail {
    /// Records that check.
    pub(crate) records: u64,
    /// Sectors that they take, from the start of the half.
    pub(crate) sectors: u64,
    /// The latest time in a record.
    pub(crate) time: u64,
}

/// The superblock of a disk; `None` if the disk is new.
pub(crate) fn read_superblock(disk: &mut dyn Blocks) -> Result<Option<Superblock>, OpenError> {
    let mut sector = [0; SECTOR];
    if disk.sectors() < super::MIN_DISK {
        return Err(OpenError::TooSmall);
    }
    disk.read(0, &mut sector)?;
    match Superblock::decode(&sector) {
        Ok(block) if block.geometry.end() > disk.sectors() => Err(OpenError::Shrunk),
        Ok(block) => Ok(Some(block)),
        Err(BadSuperblock::Blank) => Ok(None),
        Err(BadSuperblock::Foreign) => Err(OpenError::Foreign),
        Err(BadSuperblock::Version) => Err(OpenError::Version),
        Err(BadSuperblock::Damaged) => Err(OpenError::Damaged),
    }
}

/// The bytes of one half, read piece by piece.
struct Reader<'a> {
    disk: &'a mut dyn Blocks,
    start: u64,
    capacity: usize,
    /// A part of the half, and where it begins.
    window: Vec<u8>,
    window_at: usize,
}

impl Reader<'_> {
    /// Copies bytes of the half; false if it has no so many.
    fn copy(&mut self, mut at: usize, mut into: &mut [u8]) -> Result<bool, OpenError> {
        if at.checked_add(into.len()).is_none_or(|end| end > self.capacity) {
            return Ok(false);
        }
        while !into.is_empty() {
            let there = at.checked_sub(self.window_at).and_then(|skip| self.window.get(skip..)).unwrap_or_default();
            if there.is_empty() {
                self.fill(at)?;
                continue;
            }
            let count = there.len().min(into.len());
            into[..count].copy_from_slice(&there[..count]);
            at += count;
            into = &mut into[count..];
        }
        Ok(true)
    }

    fn fill(&mut self, at: usize) -> Result<(), OpenError> {
        let at = at - at % SECTOR;
        let length = READ.min(self.capacity - at);
        self.window.clear();
        self.window.try_reserve_exact(length).map_err(|_| OutOfMemory)?;
        self.window.resize(length, 0);
        self.window_at = at;
        self.disk.read(self.start + (at / SECTOR) as u64, &mut self.window)?;
        Ok(())
    }

    /// Whether a batch ended at `at`: only zeros follow in its sector.
    fn padding(&mut self, at: usize) -> Result<bool, OpenError> {
        let mut rest = [0; SECTOR];
        let rest = &mut rest[..at.next_multiple_of(SECTOR) - at];
        Ok(self.copy(at, rest)? && rest.iter().all(|byte| *byte == 0))
    }
}

/// What the next record must be like.
struct Expected {
    salt: u64,
    sequence: u64,
    generations: core::ops::RangeInclusive<u64>,
}

impl Reader<'_> {
    /// The record at `at`, its body read into `body`; `None` if it does not check.
    fn record(&mut self, at: usize, expected: &Expected, body: &mut Vec<u8>) -> Result<Option<Header>, OpenError> {
        let mut bytes = [0; HEADER];
        if !self.copy(at, &mut bytes)? {
            return Ok(None);
        }
        let Some(header) = Header::decode(&bytes, expected.salt) else { return Ok(None) };
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        let follows = header.sequence == expected.sequence && expected.generations.contains(&header.generation);
        if !follows || length > MAX_BODY.min(self.capacity) {
            return Ok(None);
        }
        body.clear();
        body.try_reserve(length).map_err(|_| OutOfMemory)?;
        body.resize(length, 0);
        let whole = self.copy(at + HEADER, body)? && body_sum(body, expected.salt) == header.body_sum;
        Ok(whole.then_some(header))
    }

    /// The record that follows on what ends at `at`, and where it is.
    fn next(
        &mut self,
        at: usize,
        mut expected: Expected,
        body: &mut Vec<u8>,
    ) -> Result<Option<(usize, Header)>, OpenError> {
        let aligned = at.next_multiple_of(SECTOR);
        if at < aligned && !self.padding(at)? {
            if let Some(header) = self.record(at, &expected, body)? {
                return Ok(Some((at, header)));
            }
            // A torn record, perhaps, which was given up at a later start: what was written then begins a sector.
            expected.generations = expected.generations.start() + 1..=*expected.generations.end();
        }
        Ok(self.record(aligned, &expected, body)?.map(|header| (aligned, header)))
    }
}

/// Hands each record of the superblock's half to `replay`, in order, up to the first that does not check.
pub(crate) fn replay(
    disk: &mut dyn Blocks,
    block: &Superblock,
    mut replay: impl FnMut(Record<'_>) -> Result<(), ReplayError>,
) -> Result<Tail, OpenError> {
    let capacity = usize::try_from(block.geometry.capacity()).map_err(|_| OpenError::OutOfMemory)?;
    let mut reader =
        Reader { disk, start: block.geometry.start(block.half), capacity, window: Vec::new(), window_at: 0 };
    let mut tail = Tail { records: 0, sectors: 0, time: 0 };
    let (mut at, mut generation, mut body) = (0, block.base_generation, Vec::new());
    loop {
        let generations = generation..=block.generation;
        let expected = Expected { salt: block.salt, sequence: tail.records + 1, generations };
        let Some((found, header)) = reader.next(at, expected, &mut body)? else { break };
        let vouched = header.sequence <= block.required;
        let record = Record { kind: header.kind, time: header.time, body: &body, vouched };
        replay(record).map_err(|error| match error {
            ReplayError::Refused => OpenError::Refused { sequence: header.sequence },
            ReplayError::OutOfMemory => OpenError::OutOfMemory,
        })?;
        at = found + HEADER + body.len();
        generation = header.generation;
        tail.records = header.sequence;
        tail.time = tail.time.max(header.time);
    }
    if tail.records < block.required {
        return Err(OpenError::Missing { required: block.required, found: tail.records });
    }
    tail.sectors = at.div_ceil(SECTOR) as u64;
    Ok(tail)
}
