//! The program's way to its disks.
//!
//! A step may be in the way of a stop, and an announcement may take long, so no step announces: a command that would change what was not
//! announced leaves its request where it is, says what it wants in [`super::Step::announce`], and is tried again in the next step. Whoever runs the program
//! announces between two steps, while the machine may be stopped. Announcements are not state: a restored program asks again.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;

use crate::disk::{ByteRange, Disk};

/// Answers to announcements that are kept; the oldest are forgotten, and asked for again.
const MOST_ANSWERS: usize = 256;

/// A change that the program will make once it is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Number of the disk.
    pub disk: u8,
    /// The bytes.
    pub range: ByteRange,
}

impl Announcement {
    fn covers(&self, other: &Self) -> bool {
        let (own, range) = (self.range, other.range);
        self.disk == other.disk && own.offset <= range.offset && range.end() <= own.end()
    }
}

/// Why something could not be done with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiskFailure {
    /// It has to be announced first: try again in the next step.
    Wait,
    /// The disk failed, there is none, or it has no such bytes.
    Io,
}

/// The program's disks. Ranges are checked here, so that no number of a client reaches a [`Disk`].
#[derive(Default)]
pub(super) struct Disks {
    disks: Vec<Arc<dyn Disk>>,
    /// What was announced, and whether that succeeded.
    answers: VecDeque<(Announcement, bool)>,
    /// What is to be announced.
    wanted: Vec<Announcement>,
}

impl fmt::Debug for Disks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disks").field("disks", &self.disks.len()).finish_non_exhaustive()
    }
}

impl Disks {
    pub(super) fn new(disks: Vec<Arc<dyn Disk>>) -> Self {
        Self { disks, answers: VecDeque::new(), wanted: Vec::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.disks.len()
    }

    pub(super) fn get(&self, disk: u8) -> Option<&Arc<dyn Disk>> {
        self.disks.get(usize::from(disk))
    }

    /// Size of a disk that can be changed.
    pub(super) fn writable(&self, disk: u8) -> Option<u64> {
        self.get(disk).filter(|d| !d.is_read_only()).map(|d| d.bytes())
    }

    /// Forgets all announcements: the program was put into another state.
    pub(super) fn forget(&mut self) {
        self.answers.clear();
        self.wanted.clear();
    }

    /// What is to be announced before the next step.
    pub(super) fn take_wanted(&mut self) -> Vec<Announcement> {
        std::mem::take(&mut self.wanted)
    }

    /// How an announcement went.
    pub(super) fn announced(&mut self, what: Announcement, succeeded: bool) {
        if self.answers.len() >= MOST_ANSWERS {
            self.answers.pop_front();
        }
        self.answers.push_back((what, succeeded));
    }

    fn within(&self, disk: u8, range: ByteRange) -> Result<&Arc<dyn Disk>, DiskFailure> {
        let fits = |d: &&Arc<dyn Disk>| range.offset.checked_add(range.len).is_some_and(|end| end <= d.bytes());
        self.get(disk).filter(fits).ok_or(DiskFailure::Io)
    }

    pub(super) fn read(&self, disk: u8, offset: u64, into: &mut [u8]) -> Result<(), DiskFailure> {
        let range = ByteRange { offset, len: into.len() as u64 };
        self.within(disk, range)?.read(offset, into).map_err(|error| io_failure("read", disk, &error))
    }

    pub(super) fn write(&mut self, disk: u8, offset: u64, from: &[u8]) -> Result<(), DiskFailure> {
        self.change(disk, ByteRange { offset, len: from.len() as u64 }, |d| d.write(offset, from))
    }

    pub(super) fn zero(&mut self, disk: u8, range: ByteRange) -> Result<(), DiskFailure> {
        self.change(disk, range, |d| d.write_zeroes(range, true))
    }

    fn change(
        &mut self,
        disk: u8,
        range: ByteRange,
        change: impl FnOnce(&dyn Disk) -> io::Result<()>,
    ) -> Result<(), DiskFailure> {
        let target = Arc::clone(self.within(disk, range)?);
        if target.is_read_only() {
            return Err(DiskFailure::Io);
        }
        let this = Announcement { disk, range };
        match self.answers.iter().rposition(|(answer, _)| answer.covers(&this)) {
            Some(at) if self.answers.get(at).is_some_and(|(_, succeeded)| *succeeded) => match change(&*target) {
                // The announcement is not valid any more.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.answers.remove(at);
                }
                result => {
                    // Good for one change.
                    self.answers.remove(at);
                    return result.map_err(|error| io_failure("change", disk, &error));
                }
            },
            Some(at) => {
                // An error is told once; the next try is announced anew.
                self.answers.remove(at);
                return Err(DiskFailure::Io);
            }
            None => {}
        }
        if !self.wanted.contains(&this) {
            self.wanted.push(this);
        }
        Err(DiskFailure::Wait)
    }

    /// Flushes all disks.
    pub(super) fn flush(&self) -> Result<(), DiskFailure> {
        for (disk, target) in (0u8..).zip(&self.disks) {
            target.flush().map_err(|error| io_failure("flush", disk, &error))?;
        }
        Ok(())
    }
}

fn io_failure(what: &str, disk: u8, error: &io::Error) -> DiskFailure {
    log::debug!("disk {disk}: {what} failed: {error}");
    DiskFailure::Io
}
