//! The log of disk changes of the running epoch, in the order in which they were made.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::{DiskChange, DiskChanges, Epoch};

/// Changes of the running epoch; shared by all disks of a machine. Off while no backup is in sync or being brought in sync.
pub struct DiskLog {
    limit: usize,
    state: Mutex<State>,
    room: Condvar,
}

#[derive(Default)]
struct State {
    running: Option<Epoch>,
    changes: Vec<DiskChange>,
    bytes: usize,
    flushed: bool,
}

impl DiskLog {
    /// A log that is off. Writers wait while it holds `limit` bytes or more; those that are past their wait then add what they have.
    pub fn new(limit: usize) -> Self {
        Self { limit, state: Mutex::default(), room: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins: changes from now on belong to epoch `first`, which runs.
    pub fn on(&self, first: Epoch) {
        *self.lock() = State { running: Some(first), ..State::default() };
        self.room.notify_all();
    }

    /// Ends, and forgets what it holds. The maps must hold their bits then ([`super::DirtyMap::hold`]).
    pub fn off(&self) {
        *self.lock() = State::default();
        self.room.notify_all();
    }

    /// The epoch that changes belong to now, if they are logged.
    pub fn running(&self) -> Option<Epoch> {
        self.lock().running
    }

    /// Bytes held, about.
    pub fn bytes(&self) -> usize {
        self.lock().bytes
    }

    /// Whether more than half of the room is used.
    pub fn fills(&self) -> bool {
        let state = self.lock();
        state.running.is_some() && state.bytes > self.limit / 2
    }

    /// Waits until there is room. Never called inside a change: the machine can be stopped meanwhile, which makes the room.
    pub fn wait_for_room(&self) {
        let full = |state: &mut State| state.running.is_some() && state.bytes >= self.limit;
        drop(self.room.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner));
    }

    /// Adds a change that has been made. Nothing happens when the log is off.
    pub fn append(&self, changes: impl IntoIterator<Item = DiskChange>) {
        let mut state = self.lock();
        if state.running.is_some() {
            for change in changes {
                state.bytes += change.weight();
                state.changes.push(change);
            }
        }
    }

    /// Hands over what it holds and goes on, in the same epoch: for a synchronisation that takes note of what changed and sends it in its own way.
    pub fn drain(&self) -> Vec<DiskChange> {
        let mut state = self.lock();
        state.bytes = 0;
        self.room.notify_all();
        std::mem::take(&mut state.changes)
    }

    /// The guest is about to be told that what it changed before is on stable storage.
    pub fn mark_flushed(&self) {
        let mut state = self.lock();
        state.flushed = state.running.is_some();
    }

    /// Epoch `epoch` ends: hands over its changes; the next epoch's follow. Called while the machine is stopped. Empty when the log is off.
    ///
    /// # Panics
    /// When another epoch runs.
    pub fn seal(&self, epoch: Epoch) -> DiskChanges {
        let mut state = self.lock();
        let Some(running) = state.running else { return DiskChanges::default() };
        assert_eq!(running, epoch, "the log's epoch is the machine's");
        let State { running: _, changes, bytes: _, flushed } =
            std::mem::replace(&mut *state, State { running: Some(epoch.next()), ..State::default() });
        self.room.notify_all();
        DiskChanges { changes, flushed }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::disk::DiskContent;

    fn change(offset: u64) -> DiskChange {
        DiskChange { disk: 0, offset, content: DiskContent::Bytes(vec![1; 512].into()) }
    }

    #[test]
    fn changes_and_flushes_belong_to_the_epoch_that_runs() {
        let log = DiskLog::new(1 << 20);
        log.append([change(0)]);
        log.mark_flushed();
        assert_eq!(log.seal(Epoch(4)), DiskChanges::default());
        log.on(Epoch(5));
        log.append([change(512), change(0)]);
        log.mark_flushed();
        let sealed = log.seal(Epoch(5));
        assert_eq!(sealed, DiskChanges { changes: vec![change(512), change(0)], flushed: true });
        assert!(sealed.weight() > 1024 && log.bytes() == 0);
        log.append([change(1024)]);
        assert_eq!(log.running(), Some(Epoch(6)));
        assert_eq!(log.seal(Epoch(6)), DiskChanges { changes: vec![change(1024)], flushed: false });
        log.append([change(0)]);
        log.off();
        assert_eq!((log.running(), log.bytes()), (None, 0));
    }

    #[test]
    #[should_panic(expected = "the log's epoch is the machine's")]
    fn sealing_another_epoch_is_a_mistake() {
        let log = DiskLog::new(1);
        log.on(Epoch(1));
        log.seal(Epoch(2));
    }

    #[test]
    fn writers_wait_for_the_checkpoint_when_the_log_is_full() {
        for end in [|log: &DiskLog| drop(log.seal(Epoch(1))), |log: &DiskLog| log.off()] {
            let log = Arc::new(DiskLog::new(512));
            log.wait_for_room();
            log.on(Epoch(1));
            log.wait_for_room();
            log.append([change(0)]);
            let (tell, told) = mpsc::channel();
            let writer = std::thread::spawn({
                let log = Arc::clone(&log);
                move || {
                    log.wait_for_room();
                    tell.send(log.bytes()).unwrap();
                }
            });
            assert!(told.recv_timeout(Duration::from_millis(50)).is_err(), "the log is full");
            end(&log);
            assert_eq!(told.recv_timeout(Duration::from_secs(20)), Ok(0));
            writer.join().unwrap();
        }
    }
}
