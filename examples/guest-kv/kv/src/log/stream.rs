//! Records on their way to one half: collected in chunks, cut into writes, followed until they are on stable storage.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use super::format::{Geometry, HEADER, Header, Kind, SECTOR, body_sum};
use crate::resp::OutOfMemory;

/// Bytes of a chunk: the most that one write takes.
const CHUNK: usize = 64 << 10;
/// Chunks that are kept for later.
const SPARE: usize = 8;
/// Writes of one half that may be under way.
const WRITES: usize = 8;

/// A point in the sequence of records.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    /// Number of the record in its half.
    pub(super) sequence: u64,
    /// The last change of the store that is covered.
    pub(super) ticket: u64,
}

#[derive(Debug)]
struct Chunk {
    bytes: Vec<u8>,
    /// The last record that ends in here.
    end: Option<Mark>,
}

#[derive(Debug)]
struct Flight {
    id: u64,
    done: bool,
    mark: Mark,
}

/// One half being written.
#[derive(Debug)]
pub(super) struct Stream {
    salt: u64,
    pub(super) generation: u64,
    start: u64,
    capacity: u64,
    /// Sectors that are given to writes.
    at: u64,
    chunks: VecDeque<Chunk>,
    spare: Vec<Vec<u8>>,
    /// Since when something waits in the chunks, in milliseconds.
    since: u64,
    flights: VecDeque<Flight>,
    pub(super) appended: Mark,
    cut: Mark,
    pub(super) written: Mark,
    pub(super) flushed: Mark,
}

impl Stream {
    /// The half from sector `at` of it on, after the records up to `mark`.
    pub(super) fn new(salt: u64, generation: u64, geometry: Geometry, half: u8, at: u64, mark: Mark) -> Self {
        Self {
            salt,
            generation,
            start: geometry.start(half),
            capacity: geometry.half_sectors,
            at,
            chunks: VecDeque::new(),
            spare: Vec::new(),
            since: 0,
            flights: VecDeque::new(),
            appended: mark,
            cut: mark,
            written: mark,
            flushed: mark,
        }
    }

    /// Bytes that wait to be written.
    pub(super) fn waiting(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.bytes.len()).sum()
    }

    /// Since when something waits that no write has taken yet, in milliseconds.
    pub(super) fn waits_since(&self) -> Option<u64> {
        (!self.chunks.is_empty()).then_some(self.since)
    }

    /// Writes that are under way.
    pub(super) fn flights(&self) -> usize {
        self.flights.len()
    }

    /// Bytes of the half that are used, padding included.
    pub(super) fn used(&self) -> u64 {
        (self.at + self.waiting().div_ceil(SECTOR) as u64) * SECTOR as u64
    }

    /// Bytes of the half that are left. Less than what a chunk may lose to padding is not.
    pub(super) fn left(&self) -> u64 {
        let padding = (self.chunks.len() as u64 + 1) * SECTOR as u64;
        (self.capacity * SECTOR as u64).saturating_sub(self.used() + padding)
    }

    /// Makes room in memory for a record with a body of `length` bytes: the next [`Self::append`] cannot fail.
    pub(super) fn reserve(&mut self, length: usize) -> Result<(), OutOfMemory> {
        let last = self.chunks.back().map_or(0, |chunk| CHUNK - chunk.bytes.len());
        let missing = (HEADER + length).saturating_sub(last).div_ceil(CHUNK);
        self.chunks.try_reserve(missing).map_err(|_| OutOfMemory)?;
        self.spare.try_reserve(missing.max(SPARE)).map_err(|_| OutOfMemory)?;
        while self.spare.len() < missing {
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(CHUNK).map_err(|_| OutOfMemory)?;
            self.spare.push(bytes);
        }
        Ok(())
    }

    /// Appends a record. There is room for it, in memory ([`Self::reserve`]) and in the half ([`Self::left`]).
    pub(super) fn append(&mut self, kind: Kind, time: u64, body: &[u8], ticket: u64, now: u64) {
        let length = u32::try_from(body.len()).expect("the body of a record is smaller");
        self.appended = Mark { sequence: self.appended.sequence + 1, ticket };
        let (sequence, generation) = (self.appended.sequence, self.generation);
        let header = Header { kind, length, sequence, generation, time, body_sum: body_sum(body, self.salt) };
        if self.chunks.is_empty() {
            self.since = now;
        }
        self.push(&header.encode(self.salt));
        self.push(body);
        if let Some(chunk) = self.chunks.back_mut() {
            chunk.end = Some(self.appended);
        }
    }

    fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.chunks.back().is_none_or(|chunk| chunk.bytes.len() == CHUNK) {
                let chunk = self.spare.pop().expect("a chunk was reserved");
                self.chunks.push_back(Chunk { bytes: chunk, end: None });
            }
            let Some(chunk) = self.chunks.back_mut() else { return };
            let (head, rest) = bytes.split_at(bytes.len().min(CHUNK - chunk.bytes.len()));
            chunk.bytes.extend_from_slice(head);
            bytes = rest;
        }
    }

    /// The next write: where, and what. `all` takes what does not fill a chunk, too.
    pub(super) fn cut(&mut self, all: bool, id: u64) -> Option<(u64, Vec<u8>)> {
        let full = self.chunks.front().is_some_and(|chunk| chunk.bytes.len() == CHUNK);
        if self.flights.len() >= WRITES || !(full || all) {
            return None;
        }
        let Chunk { mut bytes, end } = self.chunks.pop_front()?;
        // A chunk's size is a multiple of a sector's: it has room.
        bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
        let sector = self.start + self.at;
        self.at += (bytes.len() / SECTOR) as u64;
        assert!(self.at <= self.capacity, "a record was appended only where it fits");
        self.cut = end.unwrap_or(self.cut);
        self.flights.push_back(Flight { id, done: false, mark: self.cut });
        Some((sector, bytes))
    }

    /// A write has completed. False if it is not one of this half.
    pub(super) fn completed(&mut self, id: u64) -> bool {
        let Some(flight) = self.flights.iter_mut().find(|flight| flight.id == id) else { return false };
        flight.done = true;
        while self.flights.front().is_some_and(|flight| flight.done) {
            self.written = self.flights.pop_front().map_or(self.written, |flight| flight.mark);
        }
        true
    }

    /// Takes back the memory of a write.
    pub(super) fn recycle(&mut self, mut bytes: Vec<u8>) {
        if self.spare.len() < SPARE && bytes.capacity() >= CHUNK && self.spare.capacity() > self.spare.len() {
            bytes.clear();
            self.spare.push(bytes);
        }
    }

    /// Gives up what no write has taken yet.
    pub(super) fn abandon(&mut self) {
        self.chunks.clear();
    }
}
