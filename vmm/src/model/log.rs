//! The log of changes on disk 0: what a machine that is switched on with empty RAM makes its data set of.
//!
//! One record for each request that may change the data set, written before it is carried out. A record begins at a sector of its own
//! and is padded with zeroes, so that no later write touches it:
//!
//! ```text
//! 0  magic "ftlg"
//! 4  bytes of the payload, u32
//! 8  XXH3-64 of record number and payload, u64
//! 16 payload: each argument as its length (u32) and its bytes
//! ```
//!
//! The log ends at the first sector that holds no record with the number that is due. What is behind it may be left of an earlier life whose
//! last writes were lost in part; it is made zeroes, and these flushed, before the first new record, or it might one day continue the log.
//! With one disk the log has its first half, otherwise all of disk 0.

use xxhash_rust::xxh3::Xxh3;

use super::disks::{DiskFailure, Disks};
use super::registers::{Log, LogPhase};
use crate::disk::{ByteRange, SECTOR_BYTES};

const DISK: u8 = 0;
const MAGIC: [u8; 4] = *b"ftlg";
const HEADER: usize = 16;
const SECTOR: usize = 512;
const _: () = assert!(SECTOR as u64 == SECTOR_BYTES);
/// Longest payload: more than a request can be.
const MAX_PAYLOAD: u32 = 256 << 10;

/// Bytes that the log may have on these disks; `None` when it cannot be there.
pub(super) fn capacity(disks: &Disks) -> Option<u64> {
    let bytes = disks.writable(DISK)?;
    Some(if disks.len() > 1 { bytes } else { bytes / 2 / SECTOR_BYTES * SECTOR_BYTES })
}

/// Why a record was not appended.
pub(super) enum NotLogged {
    Disk(DiskFailure),
    Full,
}

impl From<DiskFailure> for NotLogged {
    fn from(failure: DiskFailure) -> Self {
        Self::Disk(failure)
    }
}

fn checksum(number: u64, payload: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&number.to_le_bytes());
    hash.update(payload);
    hash.digest()
}

fn padded(payload: u64) -> u64 {
    (HEADER as u64 + payload).next_multiple_of(SECTOR_BYTES)
}

/// The record of a request, whole sectors.
fn record(number: u64, arguments: &[&[u8]]) -> Option<Vec<u8>> {
    let mut payload = Vec::new();
    for argument in arguments {
        payload.extend_from_slice(&u32::try_from(argument.len()).ok()?.to_le_bytes());
        payload.extend_from_slice(argument);
    }
    let length = u32::try_from(payload.len()).ok().filter(|length| *length <= MAX_PAYLOAD)?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&checksum(number, &payload).to_le_bytes());
    bytes.extend_from_slice(&payload);
    bytes.resize(usize::try_from(padded(u64::from(length))).ok()?, 0);
    Some(bytes)
}

/// Writes a request down, and flushes it when every request shall be. Nothing has changed on an error but, at most, what is behind the
/// log's end.
pub(super) fn append(log: &mut Log, disks: &mut Disks, arguments: &[&[u8]]) -> Result<(), NotLogged> {
    if log.phase != LogPhase::Ready {
        return Err(NotLogged::Disk(DiskFailure::Io));
    }
    let bytes = record(log.records, arguments).ok_or(NotLogged::Full)?;
    let end = log.tail + bytes.len() as u64;
    if capacity(disks).is_none_or(|capacity| end > capacity) {
        return Err(NotLogged::Full);
    }
    disks.write(DISK, log.tail, &bytes)?;
    if log.always
        && let Err(failure) = disks.flush()
    {
        // Whether the record is there nobody knows, and no later flush would tell.
        log.phase = LogPhase::Broken;
        return Err(failure.into());
    }
    log.tail = end;
    log.records += 1;
    Ok(())
}

/// The next record behind the log's end as far as it is known; `None` at its end. Moves the end behind it.
pub(super) fn next(log: &mut Log, disks: &Disks) -> Result<Option<Vec<Vec<u8>>>, DiskFailure> {
    let capacity = capacity(disks).ok_or(DiskFailure::Io)?;
    let mut first = [0; SECTOR];
    if log.tail + SECTOR_BYTES > capacity {
        return Ok(None);
    }
    disks.read(DISK, log.tail, &mut first)?;
    let (header, _) = first.split_at(HEADER);
    let [m0, m1, m2, m3, l0, l1, l2, l3, sum @ ..] = header else { return Ok(None) };
    let length = u32::from_le_bytes([*l0, *l1, *l2, *l3]);
    let end = log.tail + padded(u64::from(length));
    if [*m0, *m1, *m2, *m3] != MAGIC || length > MAX_PAYLOAD || end > capacity {
        return Ok(None);
    }
    let mut record = vec![0; usize::try_from(end - log.tail).map_err(|_| DiskFailure::Io)?];
    disks.read(DISK, log.tail, &mut record)?;
    let payload = record.get(HEADER..HEADER + length as usize).ok_or(DiskFailure::Io)?;
    if checksum(log.records, payload).to_le_bytes() != *sum {
        return Ok(None);
    }
    let Some(arguments) = arguments(payload) else { return Ok(None) };
    log.tail = end;
    log.records += 1;
    Ok(Some(arguments))
}

fn arguments(payload: &[u8]) -> Option<Vec<Vec<u8>>> {
    let (mut rest, mut arguments) = (payload, Vec::new());
    while !rest.is_empty() {
        let (length, behind) = rest.split_first_chunk::<4>()?;
        let (argument, behind) = behind.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
        arguments.push(argument.to_vec());
        rest = behind;
    }
    Some(arguments)
}

/// Makes zeroes of what is behind the log's end, on stable storage. Afterwards the log is ready.
pub(super) fn cut(log: &mut Log, disks: &mut Disks) -> Result<(), DiskFailure> {
    let capacity = capacity(disks).ok_or(DiskFailure::Io)?;
    let range = ByteRange { offset: log.tail, len: capacity.saturating_sub(log.tail) };
    if range.len > 0 {
        disks.zero(DISK, range)?;
    }
    disks.flush()?;
    log.phase = LogPhase::Ready;
    Ok(())
}
