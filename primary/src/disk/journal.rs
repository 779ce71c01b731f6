//! The journal: a write-ahead file of committed epochs, one for each VM and node. What is synced in it is applied to the images afterwards; so
//! images and journal together always hold exactly the state at the end of some epoch.
//!
//! Header: two slots, written in turn, as in [`super::header`]. Records follow from byte 8192, each at a multiple of 4096 so that
//! writing one never touches a sector of another. A record is bound to the journal's *salt*, which is new whenever the journal starts
//! anew, and to the record before it: what an earlier life left behind further on is never taken for the next record.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use replication_proto::VmId;
use vmm::disk::Storage;
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_128};

use super::{DiskChange, DiskContent, Epoch, Generation, MAX_DISK_CHANGE_BYTES, Point};

/// Where the records begin.
const RECORDS_AT: u64 = 8192;
const SLOTS: [u64; 2] = [0, 4096];
const ALIGN: u64 = 4096;
const HEADER_BYTES: usize = 512;
const MAGIC: [u8; 8] = *b"FTJOURN\0";
const VERSION: u32 = 1;
const RECORD_MAGIC: u32 = 0x524A_5446;
const HEAD_BYTES: usize = 80;
const CHANGE_BYTES: usize = 24;
/// Bytes read or written at once.
const PIECE_BYTES: usize = 1 << 20;
const KIND_BYTES: u8 = 0;
const KIND_ZEROS: u8 = 1;

/// Changes of disks of one committed epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The state that they lead to.
    pub point: Point,
    /// The guest was told that they are on stable storage.
    pub flushed: bool,
    /// In the order in which they were made.
    pub changes: Vec<DiskChange>,
}

impl Record {
    /// Bytes that it takes in memory, about.
    pub fn weight(&self) -> usize {
        self.changes.iter().map(DiskChange::weight).sum()
    }
}

/// Why the journal cannot be used, or failed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// It belongs to another VM.
    #[error("the journal {file} belongs to VM {found}, not to {expected}")]
    Foreign {
        /// The file.
        file: PathBuf,
        /// As found.
        found: VmId,
        /// As configured.
        expected: VmId,
    },
    /// Neither a journal nor the beginning of one, or it says what cannot be.
    #[error("{file} is no journal, or damaged: {what}")]
    Corrupt {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Written by another version of this program.
    #[error("the journal {file} has version {found}, this program knows version 1")]
    Version {
        /// The file.
        file: PathBuf,
        /// As found.
        found: u32,
    },
    /// The host failed.
    #[error("the journal {file}: {what}: {source}")]
    Io {
        /// The file.
        file: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// It failed before: nothing is known of what is on stable storage.
    #[error("the journal {file} failed before")]
    Failed {
        /// The file.
        file: PathBuf,
    },
}

/// What the journal held when it was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Whole records.
    pub records: u64,
    /// The state that the last of them leads to.
    pub last: Option<Point>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    vm: VmId,
    origin: u64,
    sequence: u64,
}

enum Slot {
    Blank,
    Whole(Header),
    Version(u32),
    Torn,
}

impl Header {
    /// New for each sequence number.
    fn salt(self) -> u64 {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.origin.to_le_bytes());
        bytes[8..].copy_from_slice(&self.sequence.to_le_bytes());
        xxh3_64(&bytes)
    }

    fn encode(self) -> [u8; HEADER_BYTES] {
        let Self { vm, origin, sequence } = self;
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[16..32].copy_from_slice(&vm.0.to_le_bytes());
        out[32..40].copy_from_slice(&origin.to_le_bytes());
        out[40..48].copy_from_slice(&sequence.to_le_bytes());
        let sum = xxh3_128(&out[..496]).to_le_bytes();
        out[496..].copy_from_slice(&sum);
        out
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Slot {
        if bytes.iter().all(|byte| *byte == 0) {
            return Slot::Blank;
        }
        if xxh3_128(&bytes[..496]).to_le_bytes() != bytes[496..] {
            return Slot::Torn;
        }
        let version = u32::from_le_bytes(part(bytes, 8));
        if bytes[..8] != MAGIC || version != VERSION {
            return if bytes[..8] == MAGIC { Slot::Version(version) } else { Slot::Torn };
        }
        let [origin, sequence] = [32, 40].map(|at| u64::from_le_bytes(part(bytes, at)));
        Slot::Whole(Self { vm: VmId(u128::from_le_bytes(part(bytes, 16))), origin, sequence })
    }
}

/// `N` bytes from `at`; zeroes beyond the end.
fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|part| part.try_into().ok()).unwrap_or([0; N])
}

#[derive(Clone, Copy, Debug)]
struct RecordHead {
    flushed: bool,
    salt: u64,
    chain: u64,
    point: Point,
    changes: u32,
    length: u64,
    body_sum: u128,
}

impl RecordHead {
    /// The bytes, and what binds the next record to this one.
    fn encode(&self) -> ([u8; HEAD_BYTES], u64) {
        let Self { flushed, salt, chain, point, changes, length, body_sum } = self;
        let mut out = [0; HEAD_BYTES];
        out[..4].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
        out[4..8].copy_from_slice(&u32::from(*flushed).to_le_bytes());
        for (number, at) in [*salt, *chain, point.generation.0, point.epoch.0].iter().zip((8..).step_by(8)) {
            out[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        out[40..44].copy_from_slice(&changes.to_le_bytes());
        out[48..56].copy_from_slice(&length.to_le_bytes());
        out[56..72].copy_from_slice(&body_sum.to_le_bytes());
        let sum = xxh3_64(&out[..72]);
        out[72..].copy_from_slice(&sum.to_le_bytes());
        (out, sum)
    }

    fn decode(bytes: &[u8; HEAD_BYTES]) -> Option<(Self, u64)> {
        let sum = xxh3_64(&bytes[..72]);
        if u64::from_le_bytes(part(bytes, 72)) != sum || u32::from_le_bytes(part(bytes, 0)) != RECORD_MAGIC {
            return None;
        }
        let [salt, chain, generation, epoch, length] =
            [8, 16, 24, 32, 48].map(|at| u64::from_le_bytes(part(bytes, at)));
        let head = Self {
            flushed: u32::from_le_bytes(part(bytes, 4)) == 1,
            salt,
            chain,
            point: Point { generation: Generation(generation), epoch: Epoch(epoch) },
            changes: u32::from_le_bytes(part(bytes, 40)),
            length,
            body_sum: u128::from_le_bytes(part(bytes, 56)),
        };
        Some((head, sum))
    }
}

/// The bytes of a change but for its data.
fn change_head(change: &DiskChange) -> [u8; CHANGE_BYTES] {
    let DiskChange { disk, offset, content } = change;
    let (kind, length) = match content {
        DiskContent::Bytes(bytes) => (KIND_BYTES, u64::try_from(bytes.len()).unwrap_or(u64::MAX)),
        DiskContent::Zeros(length) => (KIND_ZEROS, *length),
    };
    let mut out = [0; CHANGE_BYTES];
    out[0] = *disk;
    out[1] = kind;
    out[8..16].copy_from_slice(&offset.to_le_bytes());
    out[16..].copy_from_slice(&length.to_le_bytes());
    out
}

/// The journal's file, see the module. What is in it must have been read ([`Self::replay`]) and applied before it starts anew and takes records.
pub struct Journal {
    storage: Arc<dyn Storage>,
    file: PathBuf,
    header: Header,
    /// Where the next record goes.
    end: u64,
    chain: u64,
    /// Started anew in this life: only then may records be added. What lies behind the last whole record is of unknown age.
    open: bool,
    failed: bool,
}

impl Journal {
    /// Opens the journal of `vm`, or makes one in an empty file. `origin` is a random number, for a journal that is made.
    ///
    /// # Errors
    /// See [`JournalError`]; the file is as it was.
    pub fn open_or_create(
        storage: Arc<dyn Storage>,
        file: PathBuf,
        vm: VmId,
        origin: u64,
    ) -> Result<Self, JournalError> {
        let header = match find(&*storage, &file, vm)? {
            Some(header) => header,
            None => create(&*storage, vm, origin).map_err(|source| JournalError::Io {
                file: file.clone(),
                what: "it cannot be made",
                source,
            })?,
        };
        Ok(Self { storage, file, header, end: RECORDS_AT, chain: header.salt(), open: false, failed: false })
    }

    /// Bytes of records in it.
    pub fn bytes(&self) -> u64 {
        self.end - RECORDS_AT
    }

    /// The file's name.
    pub fn file(&self) -> &PathBuf {
        &self.file
    }

    fn io(&self, what: &'static str) -> impl Fn(io::Error) -> JournalError {
        let file = self.file.clone();
        move |source| JournalError::Io { file: file.clone(), what, source }
    }

    fn corrupt(&self, what: impl Into<String>) -> JournalError {
        JournalError::Corrupt { file: self.file.clone(), what: what.into() }
    }

    /// Reads all whole records and hands their changes to `apply`, in order, in pieces of at most [`MAX_DISK_CHANGE_BYTES`]; stops at the
    /// first that is not whole. Memory is bounded whatever is in the file. Afterwards [`Self::restart`] is due.
    ///
    /// # Errors
    /// Of the host, of `apply`, or a record that is whole and cannot be.
    pub fn replay(
        &mut self,
        mut apply: impl FnMut(Point, &DiskChange) -> Result<(), JournalError>,
    ) -> Result<Replayed, JournalError> {
        let mut replayed = Replayed::default();
        let length = self.storage.len().map_err(self.io("its length is unknown"))?;
        (self.end, self.chain) = (RECORDS_AT, self.header.salt());
        while let Some((head, chain)) = self.whole_record(length)? {
            self.changes(&head, &mut apply)?;
            replayed = Replayed { records: replayed.records + 1, last: Some(head.point) };
            self.step(&head, chain);
        }
        Ok(replayed)
    }

    fn step(&mut self, head: &RecordHead, chain: u64) {
        let size = u64::try_from(HEAD_BYTES).unwrap_or(0) + head.length;
        self.end += size.next_multiple_of(ALIGN);
        self.chain = chain;
    }

    /// The record at `end`, if it is there, whole, and the one that follows.
    fn whole_record(&self, file_len: u64) -> Result<Option<(RecordHead, u64)>, JournalError> {
        let head_len = u64::try_from(HEAD_BYTES).unwrap_or(0);
        let Some(room) = file_len.checked_sub(self.end.saturating_add(head_len)) else { return Ok(None) };
        let mut bytes = [0; HEAD_BYTES];
        self.storage.read_at(self.end, &mut bytes).map_err(self.io("it cannot be read"))?;
        let Some((head, chain)) = RecordHead::decode(&bytes) else { return Ok(None) };
        if head.salt != self.header.salt() || head.chain != self.chain || head.length > room {
            return Ok(None);
        }
        let (mut sum, mut at, mut left) = (Xxh3::new(), self.end + head_len, head.length);
        let mut piece = vec![0; usize::try_from(left).unwrap_or(usize::MAX).min(PIECE_BYTES)];
        while left > 0 {
            let now = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
            let (read, _) = piece.split_at_mut(now);
            self.storage.read_at(at, read).map_err(self.io("it cannot be read"))?;
            sum.update(read);
            let now = u64::try_from(now).unwrap_or(left);
            (at, left) = (at + now, left - now);
        }
        Ok((sum.digest128() == head.body_sum).then_some((head, chain)))
    }

    /// The changes of a whole record.
    fn changes(
        &self,
        head: &RecordHead,
        apply: &mut impl FnMut(Point, &DiskChange) -> Result<(), JournalError>,
    ) -> Result<(), JournalError> {
        let mut at = self.end + u64::try_from(HEAD_BYTES).unwrap_or(0);
        let end = at + head.length;
        for number in 0..head.changes {
            let wrong = |what: &str| self.corrupt(format!("change {number} of epoch {}: {what}", head.point.epoch));
            let mut bytes = [0; CHANGE_BYTES];
            let data = at + u64::try_from(CHANGE_BYTES).unwrap_or(0);
            if data > end {
                return Err(wrong("cut off"));
            }
            self.storage.read_at(at, &mut bytes).map_err(self.io("it cannot be read"))?;
            let [offset, length] = [8, 16].map(|at| u64::from_le_bytes(part(&bytes, at)));
            let disk = bytes[0];
            if offset.checked_add(length).is_none() {
                return Err(wrong("beyond every disk"));
            }
            at = match bytes[1] {
                KIND_ZEROS => {
                    apply(head.point, &DiskChange { disk, offset, content: DiskContent::Zeros(length) })?;
                    data
                }
                KIND_BYTES if length <= end - data => {
                    self.data(head.point, (disk, offset, length), data, apply)?;
                    data + length
                }
                KIND_BYTES => return Err(wrong("cut off")),
                _ => return Err(wrong("of an unknown kind")),
            };
        }
        if at == end { Ok(()) } else { Err(self.corrupt(format!("bytes left over in epoch {}", head.point.epoch))) }
    }

    fn data(
        &self,
        point: Point,
        (disk, offset, length): (u8, u64, u64),
        data: u64,
        apply: &mut impl FnMut(Point, &DiskChange) -> Result<(), JournalError>,
    ) -> Result<(), JournalError> {
        let mut done = 0;
        while done < length {
            let now = usize::try_from(length - done).unwrap_or(usize::MAX).min(MAX_DISK_CHANGE_BYTES);
            let mut piece = vec![0; now];
            self.storage.read_at(data + done, &mut piece).map_err(self.io("it cannot be read"))?;
            let change = DiskChange { disk, offset: offset + done, content: DiskContent::Bytes(Bytes::from(piece)) };
            apply(point, &change)?;
            done += u64::try_from(now).unwrap_or(length);
        }
        Ok(())
    }

    /// Adds a record; it is on stable storage after the next [`Self::sync`].
    ///
    /// # Errors
    /// The host's; the journal takes nothing more then, since what is on stable storage is unknown.
    ///
    /// # Panics
    /// When the journal was not started anew in this life.
    pub fn append(&mut self, record: &Record) -> Result<(), JournalError> {
        assert!(self.open, "read, applied and started anew before it takes records");
        self.working()?;
        let Record { point, flushed, changes } = record;
        let mut sum = Xxh3::new();
        let mut length = 0;
        let mut parts = |part: &[u8]| {
            sum.update(part);
            length += u64::try_from(part.len()).unwrap_or(0);
        };
        for change in changes {
            parts(&change_head(change));
            if let DiskContent::Bytes(bytes) = &change.content {
                parts(bytes);
            }
        }
        let head = RecordHead {
            flushed: *flushed,
            salt: self.header.salt(),
            chain: self.chain,
            point: *point,
            changes: u32::try_from(changes.len()).map_err(|_| self.corrupt("an epoch of too many changes"))?,
            length,
            body_sum: sum.digest128(),
        };
        let (bytes, chain) = head.encode();
        let mut out = Batch { storage: &*self.storage, at: self.end, held: bytes.to_vec() };
        let written = changes
            .iter()
            .try_for_each(|change| {
                out.put(&change_head(change))?;
                if let DiskContent::Bytes(bytes) = &change.content { out.put(bytes) } else { Ok(()) }
            })
            .and_then(|()| out.finish());
        self.checked("it cannot be written", written)?;
        self.step(&head, chain);
        Ok(())
    }

    /// When it returns, every record that was added is on stable storage.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn sync(&mut self) -> Result<(), JournalError> {
        self.working()?;
        let synced = self.storage.sync();
        self.checked("it cannot be synced", synced)
    }

    /// Empties it, on stable storage: the images must be synced and the maps' bases moved before. The file keeps `keep` bytes of space.
    ///
    /// # Errors
    /// The host's; the journal takes nothing more then.
    pub fn restart(&mut self, keep: u64) -> Result<(), JournalError> {
        let next = Header { sequence: self.header.sequence + 1, ..self.header };
        let written = write_header(&*self.storage, next);
        self.checked("it cannot be emptied", written)?;
        (self.header, self.end, self.chain, self.open) = (next, RECORDS_AT, next.salt(), true);
        // A journal that failed for want of space works again when it is empty.
        self.failed = false;
        let length = self.storage.len().map_err(self.io("its length is unknown"))?;
        if length > RECORDS_AT.saturating_add(keep) {
            let cut = self.storage.set_len(RECORDS_AT + keep);
            self.checked("it cannot be made shorter", cut)?;
        }
        Ok(())
    }

    fn working(&self) -> Result<(), JournalError> {
        if self.failed { Err(JournalError::Failed { file: self.file.clone() }) } else { Ok(()) }
    }

    fn checked(&mut self, what: &'static str, result: io::Result<()>) -> Result<(), JournalError> {
        self.failed |= result.is_err();
        result.map_err(self.io(what))
    }
}

/// Writes pieces of a reasonable size.
struct Batch<'a> {
    storage: &'a dyn Storage,
    at: u64,
    held: Vec<u8>,
}

impl Batch<'_> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.held.extend_from_slice(bytes);
        if self.held.len() >= PIECE_BYTES { self.finish() } else { Ok(()) }
    }

    fn finish(&mut self) -> io::Result<()> {
        self.storage.write_at(self.at, &self.held)?;
        self.at += u64::try_from(self.held.len()).unwrap_or(0);
        self.held.clear();
        Ok(())
    }
}

fn find(storage: &dyn Storage, file: &std::path::Path, vm: VmId) -> Result<Option<Header>, JournalError> {
    let io = |source| JournalError::Io { file: file.into(), what: "it cannot be read", source };
    let corrupt = |what: &str| JournalError::Corrupt { file: file.into(), what: what.into() };
    let length = storage.len().map_err(io)?;
    if length == 0 {
        return Ok(None);
    }
    if length < RECORDS_AT {
        return Err(corrupt("too short"));
    }
    let (mut newest, mut blank, mut torn): (Option<Header>, usize, usize) = (None, 0, 0);
    for at in SLOTS {
        let mut bytes = [0; HEADER_BYTES];
        storage.read_at(at, &mut bytes).map_err(io)?;
        match Header::decode(&bytes) {
            Slot::Blank => blank += 1,
            Slot::Torn => torn += usize::from(at == SLOTS[1]),
            Slot::Version(found) => return Err(JournalError::Version { file: file.into(), found }),
            Slot::Whole(header) if newest.is_none_or(|newest| newest.sequence < header.sequence) => {
                newest = Some(header);
            }
            Slot::Whole(_) => {}
        }
    }
    // It is finished when both slots were written, slot 1 first; and it is as long as its header then.
    if newest.is_none() && blank + torn == 2 && length == RECORDS_AT {
        return Ok(None);
    }
    let header = newest.ok_or_else(|| corrupt("no valid header"))?;
    if header.vm != vm {
        return Err(JournalError::Foreign { file: file.into(), found: header.vm, expected: vm });
    }
    Ok(Some(header))
}

fn create(storage: &dyn Storage, vm: VmId, origin: u64) -> io::Result<Header> {
    storage.set_len(RECORDS_AT)?;
    storage.sync()?;
    let first = Header { vm, origin, sequence: 1 };
    write_header(storage, first)?;
    let second = Header { sequence: 2, ..first };
    write_header(storage, second)?;
    Ok(second)
}

fn write_header(storage: &dyn Storage, header: Header) -> io::Result<()> {
    let slot = usize::from(header.sequence % 2 == 1);
    storage.write_at(SLOTS[slot], &header.encode())?;
    storage.sync()
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
