//! The disk that a replicated machine works on: an image, its dirty map, and the log of the running epoch.
//!
//! A change goes: bits on stable storage (`announce`) → image → log. A flush goes: image on stable storage → the running epoch holds a flush
//! → the guest is told, in this epoch or a later one. So the backup that acknowledges the epoch in which the guest was told has on stable storage
//! what the flush promised.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use replication_proto::mutant::{self, Mutant};
use vmm::disk::{ByteRange, Disk};

use super::{DirtyMap, DiskChange, DiskContent, DiskLog, MAX_DISK_CHANGE_BYTES, MAX_DISK_ZERO_BYTES};

/// A disk of this side failed. If the two sides may differ for it, protection ends with this as its reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("disk {disk} ({name}): {what} failed: {cause}")]
pub struct DiskFailure {
    /// Its number.
    pub disk: u8,
    /// Its name.
    pub name: String,
    /// What was tried.
    pub what: &'static str,
    /// The host's answer.
    pub cause: String,
}

/// Different failures that an operator is told of.
const WARNINGS_MAX: usize = 8;

/// What went wrong with the disks of this process: what ends protection, and what an operator is told.
#[derive(Default)]
pub struct Alarm {
    first: Mutex<Option<DiskFailure>>,
    seen: Mutex<Vec<Seen>>,
}

/// A failure, in words, and how often it was seen. It stays for the life of the process: a disk that failed once is looked at by a person.
struct Seen {
    text: String,
    times: u64,
    last: Instant,
}

impl Alarm {
    /// The first failure since this was asked last for which the two sides may differ.
    pub fn take_failure(&self) -> Option<DiskFailure> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// An operator is to know of this.
    pub fn note(&self, text: String) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let last = Instant::now();
        if let Some(known) = seen.iter_mut().find(|known| known.text == text) {
            (known.times, known.last) = (known.times.saturating_add(1), last);
            return;
        }
        log::warn!("{text}");
        if seen.len() >= WARNINGS_MAX {
            seen.remove(0);
        }
        seen.push(Seen { text, times: 1, last });
    }

    /// What an operator is to know of, in words, the newest kind last.
    pub fn warnings(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let say = |Seen { text, times, last }: &Seen| {
            format!("{text} ({times} times, last {} s ago)", last.elapsed().as_secs())
        };
        seen.iter().map(say).collect()
    }

    fn raise(&self, failure: DiskFailure) {
        self.note(failure.to_string());
        self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
    }
}

/// Something that must be done once before the first change or flush of any disk of a machine: after an activation, the journal is retired.
/// Until then images and journal together are exactly the point of activation, and no bit may say otherwise.
pub struct FirstChange {
    done: AtomicBool,
    due: Mutex<Due>,
}

enum Due {
    Nothing,
    Work(Box<dyn FnOnce() -> io::Result<()> + Send>),
    Failed(String),
}

impl FirstChange {
    /// Nothing has to be done: the machine was booted here.
    pub fn nothing() -> Self {
        Self { done: AtomicBool::new(true), due: Mutex::new(Due::Nothing) }
    }

    /// This has to be done.
    pub fn after(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> Self {
        Self { done: AtomicBool::new(false), due: Mutex::new(Due::Work(Box::new(work))) }
    }

    /// Does it, unless it was done; waits when another thread is at it. May be called early, on a thread of its own, so that no request waits.
    ///
    /// # Errors
    /// The host's, now or when it was tried: it is not tried again, since a second sync proves nothing of the first.
    pub fn prepare(&self) -> io::Result<()> {
        if self.done.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *due, Due::Nothing) {
            Due::Nothing => Ok(()),
            Due::Work(work) => match work() {
                Ok(()) => {
                    self.done.store(true, Ordering::Release);
                    Ok(())
                }
                Err(error) => {
                    *due = Due::Failed(error.to_string());
                    Err(error)
                }
            },
            Due::Failed(why) => {
                let error = io::Error::other(format!("the journal could not be retired: {why}"));
                *due = Due::Failed(why);
                Err(error)
            }
        }
    }
}

/// See the module.
pub struct ReplicatedDisk {
    number: u8,
    name: String,
    image: Arc<dyn Disk>,
    map: Arc<DirtyMap>,
    log: Arc<DiskLog>,
    first: Arc<FirstChange>,
    alarm: Arc<Alarm>,
}

/// What all disks of a machine share.
#[derive(Clone)]
pub struct Shared {
    /// The log of the running epoch.
    pub log: Arc<DiskLog>,
    /// What is due before the first change.
    pub first: Arc<FirstChange>,
    /// Where failures go.
    pub alarm: Arc<Alarm>,
}

impl ReplicatedDisk {
    /// Disk `number` of a machine.
    pub fn new(number: u8, name: String, image: Arc<dyn Disk>, map: Arc<DirtyMap>, shared: Shared) -> Self {
        let Shared { log, first, alarm } = shared;
        Self { number, name, image, map, log, first, alarm }
    }

    /// Its map.
    pub fn map(&self) -> &Arc<DirtyMap> {
        &self.map
    }

    /// The image below it.
    pub fn image(&self) -> &Arc<dyn Disk> {
        &self.image
    }

    fn failure(&self, what: &'static str, error: &io::Error) -> DiskFailure {
        DiskFailure { disk: self.number, name: self.name.clone(), what, cause: error.to_string() }
    }

    /// An error that only the guest has to know of.
    fn note(&self, what: &'static str, error: &io::Error) {
        self.alarm.note(self.failure(what, error).to_string());
    }

    /// An error that makes the two sides differ.
    fn fail(&self, what: &'static str, error: &io::Error) {
        self.alarm.raise(self.failure(what, error));
    }

    /// A change failed: the range is old, new or a mixture. The guest knows of it; the other side gets what is there now, so that both are equal.
    fn changed_somehow(&self, range: ByteRange, what: &'static str, error: &io::Error) {
        let len = usize::try_from(range.len).unwrap_or(usize::MAX);
        let mut now = vec![0; len];
        if self.image.read(range.offset, &mut now).is_ok() {
            self.note(what, error);
            if self.log.running().is_some() {
                self.log.append(self.pieces(range.offset, &now));
            }
            return;
        }
        // Unknown, and in no log: the bits stay until a synchronisation.
        if !self.map.touch(range, None) {
            log::error!("disk {} ({}): its map was taken from under it", self.number, self.name);
        }
        self.fail(what, error);
    }

    fn pieces(&self, offset: u64, from: &[u8]) -> Vec<DiskChange> {
        let whole = Bytes::copy_from_slice(from);
        let starts = (0..from.len()).step_by(MAX_DISK_CHANGE_BYTES);
        let changes = starts.map(|at| DiskChange {
            disk: self.number,
            offset: offset + u64::try_from(at).unwrap_or(0),
            content: DiskContent::Bytes(whole.slice(at..from.len().min(at + MAX_DISK_CHANGE_BYTES))),
        });
        changes.collect()
    }

    /// A change of the image, between its notes in the map and in the log.
    fn change(
        &self,
        range: ByteRange,
        what: &'static str,
        change: impl FnOnce() -> io::Result<()>,
        logged: impl FnOnce() -> Vec<DiskChange>,
    ) -> io::Result<()> {
        let late = mutant::is(Mutant::BitAfterWrite);
        if !late && !self.map.touch(range, self.log.running()) {
            // Setting bits waits for the host's disk, and the machine may be about to be stopped.
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if let Err(error) = change() {
            self.changed_somehow(range, what, &error);
            return Err(error);
        }
        if late {
            self.map.mark(range)?;
            assert!(self.map.touch(range, self.log.running()), "marked just now");
        }
        if self.log.running().is_some() {
            self.log.append(logged());
        }
        Ok(())
    }
}

fn writable(disk: &dyn Disk) -> io::Result<()> {
    if disk.is_read_only() {
        return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the disk is read-only"));
    }
    Ok(())
}

impl Disk for ReplicatedDisk {
    fn bytes(&self) -> u64 {
        self.image.bytes()
    }

    fn is_read_only(&self) -> bool {
        self.image.is_read_only()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, into).inspect_err(|error| self.note("a read", error))
    }

    fn announce(&self, range: ByteRange) -> io::Result<()> {
        writable(&*self.image)?;
        if range.end() > self.bytes() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk"));
        }
        self.first.prepare().inspect_err(|error| self.note("the first change here", error))?;
        self.log.wait_for_room();
        if mutant::is(Mutant::BitAfterWrite) {
            return Ok(());
        }
        self.map.mark(range).inspect_err(|error| self.note("setting a bit of its map", error))
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        writable(&*self.image)?;
        let range = ByteRange { offset, len: u64::try_from(from.len()).unwrap_or(u64::MAX) };
        if range.end() > self.bytes() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk"));
        }
        self.change(range, "a write", || self.image.write(offset, from), || self.pieces(offset, from))
    }

    fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> io::Result<()> {
        writable(&*self.image)?;
        if range.end() > self.bytes() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk"));
        }
        let logged = || {
            let (mut changes, mut at) = (Vec::new(), range.offset);
            while at < range.end() {
                let len = (range.end() - at).min(MAX_DISK_ZERO_BYTES);
                changes.push(DiskChange { disk: self.number, offset: at, content: DiskContent::Zeros(len) });
                at += len;
            }
            changes
        };
        self.change(range, "zeroing", || self.image.write_zeroes(range, may_unmap), logged)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.write_zeroes(range, true)
    }

    fn flush(&self) -> io::Result<()> {
        self.first.prepare()?;
        if let Err(error) = self.image.flush() {
            // What the host dropped nobody knows: not even blocks without a bit hold what they should. If the map cannot say so it does before the next change.
            self.map.distrust().ok();
            // What is read from the image is still what the other side has, and there it is on stable storage: no reason to give that up.
            self.note("a flush", &error);
            return Err(error);
        }
        self.log.mark_flushed();
        Ok(())
    }
}

#[cfg(test)]
#[path = "replicated_tests.rs"]
mod tests;
