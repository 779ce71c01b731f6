//! The dirty map: a file beside each image that says which blocks may differ from a known state of the VM, across restarts and power cuts.
//!
//! **Invariant M**: every block whose bit is not set holds in the image what it held at `base`, on stable storage (on a backup: together
//! with the journal's records). So
//! * a bit is set on stable storage *before* its block changes ([`DirtyMap::mark`], [`DirtyMap::touched`]);
//! * a base moves forward in this order: the image is synced, the header with the new base is synced, bits are cleared. The image
//!   comes first, because the guest's changes wait in the page cache until somebody syncs them, and a block without a bit is never sent again;
//! * clearing need not be durable: a bit too many costs a comparison, no more.
//!
//! **A file that fails** refuses changes of blocks without a sure bit for as long as it fails, and no longer. Bits that were on stable storage stay there, for a sector
//! is only ever written with them; what was not is written again as a whole, which makes a later sync a statement about it. Of a header both slots' content is sound
//! (see [`DirtyMap::tidy`]), and it is written again before anything changes.
//!
//! The file: two header slots, written in turn, each whole or recognisably not ([`super::header`]); then one bit for each 64 KiB.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use replication_proto::Incarnation;
use replication_proto::mutant::{self, Mutant};
use vmm::disk::{ByteRange, Disk, Storage};

use super::blocks::{BlockSet, blocks_of, touched_by};
use super::book::{BLOCKS_PER_SECTOR, Book};
use super::header::{BITS_AT, DiskIdentity, HEADER_BYTES, Header, SLOTS, Slot};
use super::{Epoch, Point};

const SECTOR: usize = 512;
/// Sectors of bits that are read or written at once.
const SECTORS_AT_ONCE: u64 = 128;

/// Why a map cannot be used. The file is as it was.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// It belongs to another VM, disk or size of image.
    #[error("it belongs to {} of VM {} with {} bytes, not to {} of VM {} with {} bytes",
        found.name, found.vm, found.bytes, expected.name, expected.vm, expected.bytes)]
    Foreign {
        /// As found.
        found: Box<DiskIdentity>,
        /// As configured.
        expected: Box<DiskIdentity>,
    },
    /// Neither a map nor the beginning of one.
    #[error("it is no dirty map, or damaged ({0}): move it away to have the whole disk compared anew")]
    Corrupt(&'static str),
    /// Written by another version of this program.
    #[error("it has version {0}, this program knows version 1")]
    Version(u32),
    /// The host failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

/// See the module.
pub struct DirtyMap {
    storage: Arc<dyn Storage>,
    image: Arc<dyn Disk>,
    state: Mutex<State>,
    turned: Condvar,
}

struct State {
    book: Book,
    header: Header,
    /// Somebody writes to the file, without holding the lock.
    writing: bool,
    /// A header was written and that failed: the file may hold it, or the one before. Written anew before anything else changes.
    unsettled: bool,
    /// Another process has opened the file: nothing is written any more.
    taken: bool,
    /// The image failed to be synced: what the host dropped nobody knows, and a sync that succeeds later proves nothing.
    distrusted: bool,
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> MapError {
    move |source| MapError::Io { what, source }
}

fn taken() -> io::Error {
    io::Error::other("another process has opened the disk's map: its image is shared")
}

/// Bytes of the file of a disk of `bytes`.
fn file_bytes(bytes: u64) -> u64 {
    BITS_AT + blocks_of(bytes).div_ceil(BLOCKS_PER_SECTOR) * 512
}

impl DirtyMap {
    /// Opens the map of `image`, or makes one in a file that is empty; from here on the file says that `me` opened it.
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn open_or_create(
        storage: Arc<dyn Storage>,
        image: Arc<dyn Disk>,
        identity: DiskIdentity,
        me: Incarnation,
    ) -> Result<Self, MapError> {
        assert_eq!(image.bytes(), identity.bytes, "the identity of this image");
        let found = find(&*storage, &identity)?;
        let (header, bits) = match found {
            Some(found) => {
                let bits = read_bits(&*storage, identity.bytes)?;
                rewrite(&*storage, &found, &bits).map_err(io_error("the map cannot be written"))?;
                (Header { opened_by: me, sequence: found.sequence + 1, ..*found }, bits)
            }
            None => (create(&*storage, identity, me)?, BlockSet::none(blocks_of(image.bytes()))),
        };
        write_header(&*storage, &header).map_err(io_error("the map's header cannot be written"))?;
        let book = Book::new(bits, header.base);
        let state = State { book, header, writing: false, unsettled: false, taken: false, distrusted: false };
        Ok(Self { storage, image, state: Mutex::new(state), turned: Condvar::new() })
    }

    /// The image's size in bytes.
    pub fn image_bytes(&self) -> u64 {
        self.image.bytes()
    }

    /// What blocks without a bit hold.
    pub fn base(&self) -> Option<Point> {
        self.lock().book.base()
    }

    /// The blocks that may differ from the base.
    pub fn dirty(&self) -> BlockSet {
        self.lock().book.bits().clone()
    }

    /// Whether a guest ran on the image after its base.
    pub fn has_run(&self) -> bool {
        self.lock().header.ran
    }

    /// Sets the bits of a range on stable storage before it returns; costs nothing when they are. Callers at the same time share a sync.
    ///
    /// # Errors
    /// The host's; the range must not be changed then.
    pub fn mark(&self, range: ByteRange) -> io::Result<()> {
        let blocks = touched_by(range);
        // From here on the bits are what a guest changed: said first.
        self.settle_header(true)?;
        let mut state = self.lock();
        state.book.announce(blocks.clone());
        self.settle(state, |book| book.is_sure(blocks.clone()))
    }

    /// Notes that a range changes now, in an epoch whose changes are logged (or in none). To be called before the change begins, by
    /// somebody during whose work no epoch ends. Never waits for the file: false, and nothing is noted, when not all bits of the range are on stable storage, because
    /// it was never marked, or long ago. It has to be marked anew then.
    #[must_use]
    pub fn touch(&self, range: ByteRange, epoch: Option<Epoch>) -> bool {
        let mut state = self.lock();
        !state.taken && state.book.touch(touched_by(range), epoch)
    }

    /// These blocks may differ from the base, too: on stable storage when it returns.
    ///
    /// # Errors
    /// As [`Self::mark`].
    pub fn raise(&self, blocks: Range<u64>) -> io::Result<()> {
        self.settle_header(false)?;
        let mut state = self.lock();
        state.book.raise(blocks.clone());
        self.settle(state, |book| book.is_sure(blocks.clone()))
    }

    /// The log ends: what it holds may never arrive on the other side.
    pub fn hold(&self) {
        self.lock().book.hold();
    }

    /// What is dirty and in no log travels with the synchronisation that ends with `epoch`.
    pub fn cover(&self, epoch: Epoch) {
        self.lock().book.cover(epoch);
    }

    /// The other side holds `point` on stable storage. True when [`Self::tidy`] is worth its syncs. Cheap; called at every such
    /// acknowledgement, `now` since any fixed moment.
    pub fn durable(&self, point: Point, now: Duration) -> bool {
        let mut state = self.lock();
        !state.taken && !state.distrusted && state.book.is_due(point, now)
    }

    /// Moves the base to `point`, which the other side holds on stable storage, and clears bits. Syncs the image: not on a thread that
    /// must not wait. When it fails the file holds the old header or the new one, and M holds with either: the image is synced, and all bits still stand.
    ///
    /// # Errors
    /// The host's; no bit has gone then.
    pub fn tidy(&self, point: Point) -> io::Result<()> {
        self.sync_image()?;
        self.change_base(Some(point), |book| book.base_moved(point))
    }

    /// Another base; bits stay. `None` when nothing is known of the image any more.
    ///
    /// # Errors
    /// The host's.
    pub fn set_base(&self, base: Option<Point>) -> io::Result<()> {
        self.change_base(base, |book| book.base_set(base))
    }

    /// The image holds exactly `point`: syncs it, then the base, and clears the bits.
    ///
    /// # Errors
    /// The host's.
    pub fn reset(&self, point: Point) -> io::Result<()> {
        self.sync_image()?;
        self.change_header(|last| Header { base: Some(point), ran: false, ..last.clone() }, |book| book.reset(point))
    }

    /// The image failed to be synced: nothing is known of it any more, until this process has ended and all of it was compared.
    ///
    /// # Errors
    /// The host's.
    pub fn distrust(&self) -> io::Result<()> {
        self.lock().distrusted = true;
        self.settle_header(false)
    }

    /// Whether nobody else has opened the file since: two processes that use one image would destroy it.
    ///
    /// # Errors
    /// The host's.
    pub fn still_ours(&self) -> io::Result<bool> {
        // What a failed write left in the file is a header that nobody relies on: that is no other process.
        self.settle_header(false)?;
        let mut state = self.exclusive(self.lock());
        state.writing = true;
        let header = state.header.clone();
        drop(state);
        let ours = is_ours(&*self.storage, &header);
        self.lock().writing = false;
        self.turned.notify_all();
        ours
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody writes.
    fn exclusive<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.turned.wait_while(state, |state| state.writing).unwrap_or_else(PoisonError::into_inner)
    }

    fn sync_image(&self) -> io::Result<()> {
        if mutant::is(Mutant::BaseBeforeImage) {
            return Ok(());
        }
        if self.lock().distrusted {
            return Err(io::Error::other("the image could not be synced before"));
        }
        self.image.flush().inspect_err(|_| {
            // When even that fails, it is said before the next change of a block.
            self.distrust().ok();
        })
    }

    /// What the header has to say before a block changes (`runs`: by a guest).
    fn settle_header(&self, runs: bool) -> io::Result<()> {
        let state = self.lock();
        let distrusted = state.distrusted;
        let owes = state.unsettled || runs && !state.header.ran || distrusted && state.header.base.is_some();
        drop(state);
        if !owes {
            return Ok(());
        }
        let base = |last: &Header| last.base.filter(|_| !distrusted);
        let said = |last: &Header| Header { ran: last.ran || runs, base: base(last), ..last.clone() };
        self.change_header(said, |book| {
            if distrusted {
                book.base_set(None)
            }
        })
    }

    /// Writes rounds until `done`. Whoever comes while a round is written waits for it and then, if need be, writes the next for all who wait.
    fn settle<'a>(&'a self, mut state: MutexGuard<'a, State>, done: impl Fn(&Book) -> bool) -> io::Result<()> {
        loop {
            state = self.exclusive(state);
            if state.taken {
                return Err(taken());
            }
            if done(&state.book) {
                return Ok(());
            }
            let (sectors, sure) = state.book.take_round();
            let pieces = pieces(state.book.bits(), &sectors);
            state.writing = true;
            drop(state);
            let written = write_pieces(&*self.storage, &pieces).and_then(|()| self.storage.sync());
            state = self.lock();
            state.writing = false;
            self.turned.notify_all();
            if let Err(error) = written {
                state.book.round_failed(sectors);
                return Err(error);
            }
            state.book.round_done(&sure);
        }
    }

    fn change_base(&self, base: Option<Point>, moved: impl FnOnce(&mut Book)) -> io::Result<()> {
        self.change_header(|last| Header { base, ..last.clone() }, moved)
    }

    fn change_header(&self, change: impl FnOnce(&Header) -> Header, moved: impl FnOnce(&mut Book)) -> io::Result<()> {
        let mut state = self.exclusive(self.lock());
        if state.taken {
            return Err(taken());
        }
        let last = state.header.clone();
        // The same number as at an attempt that failed: the other slot, which holds what is sure, stays.
        let next = Header { sequence: last.sequence + 1, ..change(&last) };
        state.writing = true;
        drop(state);
        let written = self.write_next(&last, &next);
        let mut state = self.lock();
        state.writing = false;
        self.turned.notify_all();
        match written {
            Ok(true) => {
                (state.header, state.unsettled) = (next, false);
                moved(&mut state.book);
            }
            Ok(false) => {
                state.taken = true;
                return Err(taken());
            }
            Err(error) => {
                state.unsettled = true;
                state.book.round_failed(BTreeSet::new());
                return Err(error);
            }
        }
        // Bits that went: written now, on stable storage whenever it suits.
        let (sectors, _) = state.book.take_round();
        if write_pieces(&*self.storage, &pieces(state.book.bits(), &sectors)).is_err() {
            // Too many bits are no harm.
            state.book.round_failed(sectors);
        }
        Ok(())
    }

    /// False when another process has opened the file.
    fn write_next(&self, last: &Header, next: &Header) -> io::Result<bool> {
        let ours = is_ours(&*self.storage, last)?;
        if ours {
            write_header(&*self.storage, next)?;
        }
        Ok(ours)
    }
}

/// Where to write what of the bits.
fn pieces(bits: &BlockSet, sectors: &BTreeSet<u64>) -> Vec<(u64, Vec<u8>)> {
    let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
    for sector in sectors {
        let at = BITS_AT + sector * 512;
        let mut bytes = [0; SECTOR];
        bits.bits(sector * BLOCKS_PER_SECTOR, &mut bytes);
        match pieces.last_mut() {
            Some((start, run)) if u64::try_from(run.len()).is_ok_and(|len| *start + len == at) => {
                run.extend_from_slice(&bytes);
            }
            _ => pieces.push((at, bytes.to_vec())),
        }
    }
    pieces
}

fn write_pieces(storage: &dyn Storage, pieces: &[(u64, Vec<u8>)]) -> io::Result<()> {
    pieces.iter().try_for_each(|(at, bytes)| storage.write_at(*at, bytes))
}

/// What was read may be what a kernel kept in memory after it had failed to write it, in an earlier life: written again, so that it is on stable storage.
fn rewrite(storage: &dyn Storage, header: &Header, bits: &BlockSet) -> io::Result<()> {
    let sectors = bits.iter().map(|block| block / BLOCKS_PER_SECTOR).collect();
    write_pieces(storage, &pieces(bits, &sectors))?;
    write_header(storage, header)
}

fn read_slots(storage: &dyn Storage) -> io::Result<[Slot; 2]> {
    let mut slots = [Slot::Blank, Slot::Blank];
    for (slot, at) in slots.iter_mut().zip(SLOTS) {
        let mut bytes = [0; HEADER_BYTES];
        storage.read_at(at, &mut bytes)?;
        *slot = Header::decode(&bytes);
    }
    Ok(slots)
}

fn newest(slots: [Slot; 2]) -> Option<Box<Header>> {
    let whole = slots.into_iter().filter_map(|slot| if let Slot::Whole(header) = slot { Some(header) } else { None });
    whole.max_by_key(|header| header.sequence)
}

/// Whether nobody has opened the file since: it holds this header, or what the same process tried to write after it.
fn is_ours(storage: &dyn Storage, header: &Header) -> io::Result<bool> {
    let ours = |newest: &Header| newest.opened_by == header.opened_by && newest.sequence - header.sequence <= 1;
    Ok(newest(read_slots(storage)?).is_some_and(|newest| newest.sequence >= header.sequence && ours(&newest)))
}

/// The header of a map, or `None` when the file is empty or was never finished.
fn find(storage: &dyn Storage, identity: &DiskIdentity) -> Result<Option<Box<Header>>, MapError> {
    let length = storage.len().map_err(io_error("the map's length is unknown"))?;
    if length == 0 {
        return Ok(None);
    }
    if length < BITS_AT {
        return Err(MapError::Corrupt("too short"));
    }
    let slots = read_slots(storage).map_err(io_error("the map cannot be read"))?;
    for slot in &slots {
        if let Slot::Version(version) = slot {
            return Err(MapError::Version(*version));
        }
    }
    // A map is finished when both slots were written, slot 1 first.
    if let [Slot::Blank, Slot::Blank | Slot::Torn] = slots {
        return if length == file_bytes(identity.bytes) { Ok(None) } else { Err(MapError::Corrupt("no header")) };
    }
    let header = newest(slots).ok_or(MapError::Corrupt("no valid header"))?;
    if header.identity != *identity {
        let (found, expected) = (Box::new(header.identity), Box::new(identity.clone()));
        return Err(MapError::Foreign { found, expected });
    }
    if length != file_bytes(identity.bytes) {
        return Err(MapError::Corrupt("another length than its header says"));
    }
    Ok(Some(header))
}

/// Makes the file, up to its first header; the second finishes it.
fn create(storage: &dyn Storage, identity: DiskIdentity, me: Incarnation) -> Result<Header, MapError> {
    let header = Header { identity, base: None, ran: false, opened_by: me, sequence: 1 };
    let made = storage
        .set_len(file_bytes(header.identity.bytes))
        // With its space: that the file system is full must not keep a bit from being set.
        .and_then(|()| storage.zero(0, file_bytes(header.identity.bytes), false))
        .and_then(|()| storage.sync())
        .and_then(|()| write_header(storage, &header));
    made.map_err(io_error("the map cannot be made"))?;
    Ok(Header { sequence: 2, ..header })
}

fn read_bits(storage: &dyn Storage, bytes: u64) -> Result<BlockSet, MapError> {
    let mut set = BlockSet::none(blocks_of(bytes));
    let sectors = blocks_of(bytes).div_ceil(BLOCKS_PER_SECTOR);
    let mut at = 0;
    while at < sectors {
        let now = (sectors - at).min(SECTORS_AT_ONCE);
        let mut piece = vec![0; SECTOR * usize::try_from(now).unwrap_or(1)];
        storage.read_at(BITS_AT + at * 512, &mut piece).map_err(io_error("the map's bits cannot be read"))?;
        if !set.add_bits(at * BLOCKS_PER_SECTOR, &piece) {
            return Err(MapError::Corrupt("bits beyond the disk's end"));
        }
        at += now;
    }
    Ok(set)
}

fn write_header(storage: &dyn Storage, header: &Header) -> io::Result<()> {
    let slot = usize::from(header.sequence % 2 == 1);
    storage.write_at(SLOTS[slot], &header.encode())?;
    storage.sync()
}

#[cfg(test)]
#[path = "map_tests.rs"]
mod tests;
