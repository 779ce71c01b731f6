//! A disk in memory whose calls can be held up or made to fail, for tests.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::{ByteRange, Disk};

/// The calls of [`Disk`] that do something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Announce,
    Write,
    Zero { may_unmap: bool },
    Flush,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    calls: Vec<(Op, ByteRange)>,
    held: Option<Op>,
    waiting: usize,
    failing: Option<(Op, i32)>,
}

/// A disk in memory.
pub(crate) struct MemoryDisk {
    bytes: u64,
    read_only: bool,
    state: Mutex<State>,
    changed: Condvar,
}

impl MemoryDisk {
    /// All zeroes.
    pub(crate) fn new(bytes: usize, read_only: bool) -> Self {
        let state = Mutex::new(State { bytes: vec![0; bytes], ..State::default() });
        Self { bytes: bytes as u64, read_only, state, changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is on the disk.
    pub(crate) fn contents(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// The calls since the last time.
    pub(crate) fn take_calls(&self) -> Vec<(Op, ByteRange)> {
        std::mem::take(&mut self.state().calls)
    }

    /// Holds up every such call from now on.
    #[cfg(test)]
    pub(crate) fn hold(&self, op: Op) {
        self.state().held = Some(op);
    }

    /// Waits until so many calls are held up.
    #[cfg(test)]
    pub(crate) fn wait_for_held(&self, number: usize) {
        let state = self.state();
        let patience = std::time::Duration::from_secs(10);
        let waited = self.changed.wait_timeout_while(state, patience, |s| s.waiting < number);
        assert!(!waited.unwrap_or_else(PoisonError::into_inner).1.timed_out(), "no {number} calls within {patience:?}");
    }

    /// Lets the calls that were held up go on.
    #[cfg(test)]
    pub(crate) fn release(&self) {
        self.state().held = None;
        self.changed.notify_all();
    }

    /// Makes every such call fail with this number from now on, or none.
    #[cfg(test)]
    pub(crate) fn fail(&self, failing: Option<(Op, i32)>) {
        self.state().failing = failing;
    }

    /// Begins a call: the state to work on, once it may go on.
    fn call(&self, op: Op, range: ByteRange) -> io::Result<MutexGuard<'_, State>> {
        assert!(range.end() <= self.bytes, "{op:?} beyond the end: {range:?}");
        assert!(range.offset.is_multiple_of(512) && range.len.is_multiple_of(512), "{op:?} of no sectors: {range:?}");
        let is_change = matches!(op, Op::Write | Op::Zero { .. });
        assert!(!(self.read_only && is_change), "{op:?} on a disk that is only read");
        let mut state = self.state();
        if state.held == Some(op) {
            state.waiting += 1;
            self.changed.notify_all();
            state = self.changed.wait_while(state, |s| s.held == Some(op)).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        state.calls.push((op, range));
        match state.failing {
            Some((failing, number)) if failing == op => Err(io::Error::from_raw_os_error(number)),
            _ => Ok(state),
        }
    }
}

fn indices(range: ByteRange) -> std::ops::Range<usize> {
    let index = |at: u64| usize::try_from(at).expect("a disk in memory");
    index(range.offset)..index(range.end())
}

impl Disk for MemoryDisk {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let range = ByteRange { offset, len: into.len() as u64 };
        into.copy_from_slice(&self.call(Op::Read, range)?.bytes[indices(range)]);
        Ok(())
    }

    fn announce(&self, range: ByteRange) -> io::Result<()> {
        self.call(Op::Announce, range).map(drop)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let range = ByteRange { offset, len: from.len() as u64 };
        self.call(Op::Write, range)?.bytes[indices(range)].copy_from_slice(from);
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> io::Result<()> {
        self.call(Op::Zero { may_unmap }, range)?.bytes[indices(range)].fill(0);
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.write_zeroes(range, true)
    }

    fn flush(&self) -> io::Result<()> {
        self.call(Op::Flush, ByteRange { offset: 0, len: 0 }).map(drop)
    }
}
