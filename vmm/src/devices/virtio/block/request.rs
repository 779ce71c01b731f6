//! What the guest asks for. Nothing of it is believed.
//!
//! A chain that is no request at all breaks the queue. A request that cannot be granted has a place for its status, and gets one.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::schedule::Access;
use crate::disk::{ByteRange, SECTOR_BYTES};
use crate::memory::TrackedMemory;

/// Most segments of one request beside header and status: what fits the queue.
pub(super) const SEG_MAX: u32 = 126;
/// Most bytes of a segment that a driver which knows `VIRTIO_BLK_F_SIZE_MAX` makes.
pub(super) const SIZE_MAX: u32 = 64 << 10;
/// Most bytes of a read or write. A driver that keeps the two limits above never asks for more.
const MAX_BYTES: u64 = SEG_MAX as u64 * SIZE_MAX as u64;
/// Most sectors of a discard or of zeroes: 64 MiB.
pub(super) const MAX_ZERO_SECTORS: u32 = 64 << 11;

const HEADER: usize = 16;
const ZERO_SEGMENT: usize = 16;
/// `VIRTIO_BLK_S_OK`, `_IOERR` and `_UNSUPP` as they are in memory.
pub(super) const S_OK: u8 = 0;
pub(super) const S_IOERR: u8 = 1;
pub(super) const S_UNSUPP: u8 = 2;
const _: () = assert!(VIRTIO_BLK_S_IOERR == 1 && VIRTIO_BLK_S_UNSUPP == 2);

/// A stretch of guest memory, within RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) at: GuestAddress,
    pub(super) len: usize,
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    WriteZeroes {
        may_unmap: bool,
    },
    Discard,
    Flush,
    /// The disk's serial number.
    GetId,
    /// It was refused with this status.
    Refused(u8),
}

/// One request. `range` lies within the disk, `data` is as long as it for reads and writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Of its chain.
    pub(super) head: u16,
    pub(super) kind: Kind,
    pub(super) range: ByteRange,
    pub(super) data: Vec<Segment>,
    /// Where its status belongs.
    pub(super) status: GuestAddress,
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) bytes: u64,
    pub(super) read_only: bool,
}

impl Request {
    /// What the disk has to do with it; `None` when nothing.
    pub(super) fn access(&self) -> Option<Access> {
        match self.kind {
            Kind::Read => Some(Access::Read(self.range)),
            Kind::Write | Kind::WriteZeroes { .. } | Kind::Discard => Some(Access::Change(self.range)),
            Kind::Flush => Some(Access::Flush),
            Kind::GetId | Kind::Refused(_) => None,
        }
    }

    /// Reads the chain that begins at `head`, or says why it is none.
    pub(super) fn parse(head: u16, queue: &Queue, ram: &TrackedMemory, limits: Limits) -> Result<Self, String> {
        let Chain { mut readable, mut writable } = Chain::walk(head, queue, ram)?;
        let mut header = [0; HEADER];
        if take(ram, &mut readable, &mut header)? < HEADER {
            return Err("a request without a whole header".into());
        }
        let status = take_last_byte(&mut writable).ok_or("a request without a place for its status")?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let (code, sector) = (u32::from_le_bytes([t0, t1, t2, t3]), u64::from_le_bytes(sector));
        let (kind, range, data) = match code {
            VIRTIO_BLK_T_IN => transfer(Kind::Read, sector, writable, limits),
            VIRTIO_BLK_T_OUT if limits.read_only => refused(S_IOERR),
            VIRTIO_BLK_T_OUT => transfer(Kind::Write, sector, readable, limits),
            VIRTIO_BLK_T_FLUSH => (Kind::Flush, NOWHERE, Vec::new()),
            VIRTIO_BLK_T_GET_ID => (Kind::GetId, NOWHERE, writable),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                zeroes(code == VIRTIO_BLK_T_DISCARD, ram, readable, limits)?
            }
            _ => refused(S_UNSUPP),
        };
        Ok(Self { head, kind, range, data, status })
    }
}

type Parsed = (Kind, ByteRange, Vec<Segment>);

const NOWHERE: ByteRange = ByteRange { offset: 0, len: 0 };

fn refused(status: u8) -> Parsed {
    (Kind::Refused(status), NOWHERE, Vec::new())
}

fn total(segments: &[Segment]) -> u64 {
    // A chain has at most 2^15 segments of less than 2^32 bytes.
    segments.iter().map(|s| s.len as u64).sum()
}

/// The range of whole sectors, if it is one of the disk.
fn within(sector: u64, len: u64, limits: Limits) -> Option<ByteRange> {
    let offset = sector.checked_mul(SECTOR_BYTES)?;
    (len.is_multiple_of(SECTOR_BYTES) && offset.checked_add(len)? <= limits.bytes).then_some(ByteRange { offset, len })
}

fn transfer(kind: Kind, sector: u64, data: Vec<Segment>, limits: Limits) -> Parsed {
    let len = total(&data);
    match within(sector, len, limits).filter(|_| len <= MAX_BYTES) {
        Some(range) => (kind, range, data),
        None => refused(S_IOERR),
    }
}

fn zeroes(discard: bool, ram: &TrackedMemory, mut data: Vec<Segment>, limits: Limits) -> Result<Parsed, String> {
    // One range in each request: that many are offered.
    let mut segment = [0; ZERO_SEGMENT];
    if total(&data) != ZERO_SEGMENT as u64 || take(ram, &mut data, &mut segment)? < ZERO_SEGMENT || limits.read_only {
        return Ok(refused(S_IOERR));
    }
    let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = segment;
    let (sectors, flags) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes([f0, f1, f2, f3]));
    let known = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
    if flags & !known != 0 {
        return Ok(refused(S_UNSUPP));
    }
    let range = within(u64::from_le_bytes(sector), u64::from(sectors) * SECTOR_BYTES, limits);
    let kind = if discard { Kind::Discard } else { Kind::WriteZeroes { may_unmap: flags != 0 } };
    Ok(match range.filter(|_| sectors <= MAX_ZERO_SECTORS) {
        Some(range) => (kind, range, Vec::new()),
        None => refused(S_IOERR),
    })
}

/// The buffers of a chain. (The library walks chains, too, but only those that it has just taken from the ring; those of a restored device
/// were taken by another.)
struct Chain {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Chain {
    fn walk(head: u16, queue: &Queue, ram: &TrackedMemory) -> Result<Self, String> {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut index = head;
        for _ in 0..queue.size() {
            if index >= queue.size() {
                return Err(format!("descriptor {index} of a queue of {}", queue.size()));
            }
            let at = queue.desc_table().saturating_add(16 * u64::from(index));
            let descriptor: Descriptor = ram.read_obj(GuestAddress(at)).map_err(|e| e.to_string())?;
            if descriptor.refers_to_indirect_table() {
                return Err("an indirect descriptor, which was never offered".into());
            }
            let len = usize::try_from(descriptor.len()).map_err(|e| e.to_string())?;
            let segment = Segment { at: descriptor.addr(), len };
            if len > 0 && !ram.check_range(segment.at, len, Permissions::ReadWrite) {
                return Err(format!("a buffer of {len} bytes at {:#x} is not in RAM", segment.at.0));
            }
            if descriptor.is_write_only() {
                writable.push(segment);
            } else if writable.is_empty() {
                readable.push(segment);
            } else {
                return Err("a buffer to read behind one to write".into());
            }
            if !descriptor.has_next() {
                return Ok(Self { readable, writable });
            }
            index = descriptor.next();
        }
        Err("a chain that never ends".into())
    }
}

/// Moves bytes from the front of `segments` into `into`; how many there were.
fn take(ram: &TrackedMemory, segments: &mut Vec<Segment>, into: &mut [u8]) -> Result<usize, String> {
    let len = usize::try_from(total(segments)).unwrap_or(usize::MAX).min(into.len());
    let into = into.get_mut(..len).unwrap_or_default();
    gather(ram, segments, 0, into).map_err(|e| e.to_string())?;
    let mut left = len;
    segments.retain_mut(|segment| {
        let cut = segment.len.min(left);
        left -= cut;
        segment.at.0 = segment.at.0.saturating_add(cut as u64);
        segment.len -= cut;
        segment.len > 0
    });
    Ok(len)
}

fn take_last_byte(segments: &mut Vec<Segment>) -> Option<GuestAddress> {
    while segments.last().is_some_and(|segment| segment.len == 0) {
        segments.pop();
    }
    let last = segments.last_mut()?;
    last.len -= 1;
    Some(GuestAddress(last.at.0.saturating_add(last.len as u64)))
}

/// Copies guest memory, from byte `skip` of the segments on, into `into`.
pub(super) fn gather(
    ram: &TrackedMemory,
    segments: &[Segment],
    skip: u64,
    into: &mut [u8],
) -> Result<(), vm_memory::GuestMemoryError> {
    let mut rest = into;
    for (at, len) in stretches(segments, skip, rest.len()) {
        let (piece, behind) = rest.split_at_mut(len);
        ram.read_slice(piece, at)?;
        rest = behind;
    }
    Ok(())
}

/// Copies `from` into guest memory, from byte `skip` of the segments on.
pub(super) fn scatter(
    ram: &TrackedMemory,
    segments: &[Segment],
    skip: u64,
    from: &[u8],
) -> Result<(), vm_memory::GuestMemoryError> {
    let mut rest = from;
    for (at, len) in stretches(segments, skip, rest.len()) {
        let (piece, behind) = rest.split_at(len);
        ram.write_slice(piece, at)?;
        rest = behind;
    }
    Ok(())
}

/// Where `len` bytes from byte `skip` of the segments on are; together not more than `len`.
fn stretches(segments: &[Segment], skip: u64, len: usize) -> impl Iterator<Item = (GuestAddress, usize)> {
    let (mut skip, mut left) = (skip, len);
    segments.iter().filter_map(move |segment| {
        let skipped = usize::try_from(skip).unwrap_or(usize::MAX).min(segment.len);
        skip -= skipped as u64;
        let len = (segment.len - skipped).min(left);
        left -= len;
        (len > 0).then(|| (GuestAddress(segment.at.0.saturating_add(skipped as u64)), len))
    })
}
