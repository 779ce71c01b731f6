//! Commands, failures and time, without the thread.

use std::path::{Path, PathBuf};

use crate::disk::flow::SYNC_AFTER;
use crate::disk::testing::{Fault, LossyStorage, Power};
use primary::disk::recover::Recoverable;
use primary::disk::{DirtyMap, DiskContent, DiskIdentity, Epoch, Generation, Journal, recover};
use replication_proto::{Incarnation, VmId};
use vmm::disk::{DiskImage, Storage};

use super::*;

/// Over so many bytes a journal starts anew.
pub const LIMIT: u64 = 1 << 20;
const NOON: Duration = Duration::from_secs(43_200);

/// One disk and its journal, recovered, on storage that fails when it is told to.
pub struct Files {
    /// The image.
    pub disk: Arc<LossyStorage>,
    /// The journal.
    pub journal: Arc<LossyStorage>,
    /// As recovery left the disk,
    pub disks: Vec<Recoverable>,
    /// and the journal.
    pub opened: Journal,
}

/// Files that were never used.
pub fn files() -> Files {
    let power = Power::new(1);
    let (disk, map, journal) = (power.storage(1 << 20, false), power.storage(0, false), power.storage(0, false));
    let storage: Arc<dyn Storage> = Arc::clone(&disk) as _;
    let image: Arc<dyn Disk> = Arc::new(DiskImage::over(storage, Path::new("a.img"), None, false).unwrap());
    let identity = DiskIdentity { vm: VmId(7), name: "data".into(), bytes: 1 << 20 };
    let map = DirtyMap::open_or_create(map, Arc::clone(&image), identity, Incarnation(1)).unwrap();
    let disks = vec![Recoverable { image, map: Arc::new(map) }];
    let file = PathBuf::from("journal");
    let mut opened = Journal::open_or_create(Arc::clone(&journal) as _, file, VmId(7), 5).unwrap();
    recover(&disks, &mut opened, LIMIT).unwrap();
    Files { disk, journal, disks, opened }
}

/// A point of the only generation.
pub fn point(epoch: u64) -> Point {
    Point { generation: Generation(1), epoch: Epoch(epoch) }
}

/// One change, at 1024.
pub fn change(fill: u8, flushed: bool) -> DiskChanges {
    let content = DiskContent::Bytes(vec![fill; 512].into());
    DiskChanges { changes: vec![DiskChange { disk: 0, offset: 1024, content }], flushed }
}

/// What [`change`] changed.
pub fn byte(disk: &LossyStorage) -> u8 {
    let mut byte = [9];
    disk.read_at(1024, &mut byte).unwrap();
    byte[0]
}

struct Rig {
    disk: Arc<LossyStorage>,
    journal: Arc<LossyStorage>,
    map: Arc<DirtyMap>,
    turn: Turn,
}

fn rig() -> Rig {
    let Files { disk, journal, disks, opened } = files();
    let map = Arc::clone(&disks[0].map);
    Rig { disk, journal, map, turn: Turn::new(Worker::new(disks, opened, LIMIT)) }
}

impl Rig {
    /// The command alone.
    fn obey(&mut self, command: Command) -> Vec<SinkEvent> {
        let mut told = Vec::new();
        self.turn.obey(command, NOON, &mut |event| told.push(event));
        told
    }

    /// Everything that is due at `now`.
    fn settle(&mut self, now: Duration) -> Vec<SinkEvent> {
        let mut told = Vec::new();
        while self.turn.patience(now) == Some(Duration::ZERO) {
            self.turn.step(now, &mut |event| told.push(event));
        }
        told
    }
}

fn progress(ackable: u64, durable: u64, applied: usize) -> SinkEvent {
    SinkEvent::Progress { ackable: point(ackable), durable: point(durable), applied }
}

#[test]
fn a_failure_is_told_once_and_a_new_synchronisation_begins_anew() {
    let mut rig = rig();
    assert_eq!(rig.obey(Command::Based(point(4))), [SinkEvent::Based(point(4))]);
    rig.journal.set_fault(Some(Fault::Full));
    assert_eq!(rig.obey(Command::Commit(point(5), change(1, true))), [progress(4, 4, 0)]);
    let told = rig.settle(NOON);
    let [SinkEvent::Failed { why, lost: false }] = &told[..] else { panic!("{told:?}") };
    assert!(why.contains("the journal journal: it cannot be written: No space left"), "{why}");
    assert_eq!(rig.turn.patience(NOON), None, "it does not try again");
    assert!(rig.turn.images().is_none());
    // The answer to what follows was the failure; what was committed before anybody heard of it is kept.
    let weight = change(2, true).weight();
    assert_eq!(rig.obey(Command::Commit(point(6), change(2, true))), []);
    for ignored in [Command::Put(change(3, false).changes[0].clone()), Command::Based(point(7)), Command::Hurry] {
        assert_eq!(rig.obey(ignored), []);
    }
    rig.turn.step(NOON, &mut |event| panic!("{event:?}"));
    rig.turn.drain(&mut |event| panic!("{event:?}"));
    rig.journal.set_fault(None);
    assert_eq!(rig.obey(Command::Hollow), [progress(6, 6, 2 * weight)], "what was committed is not lost");
    assert_eq!((byte(&rig.disk), rig.turn.images().map(<[_]>::len)), (2, Some(1)));
    assert_eq!(rig.obey(Command::Based(point(9))), [SinkEvent::Based(point(9))]);
}

/// The checkpoint that arrives between the journal's failure and the end of the connection is committed in memory: the disks must go along (simulator, seed
/// 1034801: a takeover found memory an epoch ahead of the disks).
#[test]
fn who_takes_over_after_the_journal_failed_has_disks_of_the_same_epoch() {
    let mut rig = rig();
    rig.obey(Command::Based(point(4)));
    rig.obey(Command::Commit(point(5), change(1, true)));
    rig.journal.set_fault(Some(Fault::Full));
    rig.settle(NOON);
    rig.obey(Command::Commit(point(6), change(2, false)));
    rig.journal.set_fault(None);
    let retire = rig.turn.finish().unwrap();
    assert_eq!((retire.point(), byte(&rig.disk)), (point(6), 2));
}

/// Where the disks have lost something, nothing can follow it.
#[test]
fn what_follows_a_loss_is_let_go() {
    let mut rig = rig();
    rig.obey(Command::Based(point(4)));
    rig.obey(Command::Commit(point(5), change(1, true)));
    rig.disk.set_fault(Some(Fault::WriteError));
    rig.settle(NOON);
    let weight = change(2, false).weight();
    assert_eq!(rig.obey(Command::Commit(point(6), change(2, false))), [progress(5, 5, weight)]);
    assert!(matches!(rig.turn.finish(), Err(SinkError::Unusable)));
}

#[test]
fn a_synchronisation_that_cannot_begin_fails_too() {
    let mut rig = rig();
    rig.obey(Command::Based(point(4)));
    rig.obey(Command::Commit(point(5), change(1, true)));
    rig.disk.set_fault(Some(Fault::WriteError));
    let told = rig.obey(Command::Hollow);
    let [SinkEvent::Failed { why, lost: true }] = &told[..] else { panic!("{told:?}") };
    assert!(why.starts_with("disk 0: a committed change cannot be applied"), "{why}");
    assert_eq!(rig.obey(Command::Put(change(2, false).changes[0].clone())), [], "it is not hollow");
    rig.disk.set_fault(None);
    // What is lost does not wait any more, either.
    assert_eq!(rig.obey(Command::Hollow), [progress(5, 5, change(1, true).weight())]);
    assert_eq!(rig.map.base(), None, "the map knows nothing");
    rig.obey(Command::Put(change(2, false).changes[0].clone()));
    assert_eq!(rig.obey(Command::Based(point(7))), [SinkEvent::Based(point(7))]);
    assert_eq!((byte(&rig.disk), rig.map.base()), (2, Some(point(7))));
}

#[test]
fn a_standby_whose_committed_change_is_lost_does_not_run() {
    let mut rig = rig();
    rig.obey(Command::Based(point(9)));
    rig.obey(Command::Commit(point(10), change(7, true)));
    rig.disk.set_fault(Some(Fault::WriteError));
    let told = rig.settle(NOON);
    let Some(SinkEvent::Failed { lost: true, .. }) = told.last() else { panic!("{told:?}") };
    rig.disk.set_fault(None);
    assert!(matches!(rig.turn.finish(), Err(SinkError::Unusable)));
    assert_eq!(rig.map.base(), Some(point(9)));
}

#[test]
fn what_a_synchronisation_drains_does_not_wait_any_more() {
    let mut rig = rig();
    rig.obey(Command::Based(point(1)));
    assert_eq!(rig.obey(Command::Commit(point(2), change(1, false))), [progress(2, 1, 0)]);
    assert_eq!(rig.obey(Command::Hollow), [progress(2, 2, change(1, false).weight())]);
    assert_eq!(byte(&rig.disk), 1);
    assert_eq!(rig.obey(Command::Hollow), [], "nothing is drained twice");
}

#[test]
fn a_flush_is_due_at_once_and_everything_else_later_or_when_it_hurries() {
    let weight = change(1, true).weight();
    let mut rig = rig();
    assert_eq!(rig.turn.patience(NOON), None);
    rig.obey(Command::Based(point(1)));
    assert_eq!(rig.turn.patience(NOON), None);
    rig.obey(Command::Commit(point(2), change(1, true)));
    // Added, synced, applied.
    assert_eq!(rig.settle(NOON), [progress(2, 2, 0), progress(2, 2, weight)]);
    assert_eq!(rig.turn.patience(NOON), None);

    rig.obey(Command::Commit(point(3), change(2, false)));
    assert_eq!(rig.settle(NOON), []);
    let half = SYNC_AFTER / 2;
    assert_eq!(rig.turn.patience(NOON), Some(SYNC_AFTER));
    assert_eq!(rig.turn.patience(NOON + half), Some(half));
    assert_eq!(rig.settle(NOON + SYNC_AFTER), [progress(3, 3, 0), progress(3, 3, weight)]);

    rig.obey(Command::Commit(point(4), change(3, false)));
    rig.settle(NOON);
    assert_eq!(rig.obey(Command::Hurry), []);
    assert_eq!(rig.settle(NOON), [progress(4, 4, 0), progress(4, 4, weight)]);
}

#[test]
fn who_looks_at_the_whole_sees_what_was_committed() {
    let mut rig = rig();
    rig.obey(Command::Based(point(1)));
    rig.obey(Command::Commit(point(2), change(6, false)));
    let mut told = Vec::new();
    rig.turn.drain(&mut |event| told.push(event));
    assert_eq!(told, [progress(2, 2, 0), progress(2, 2, change(6, false).weight())]);
    assert_eq!((byte(&rig.disk), rig.turn.patience(NOON)), (6, None));
    // And when it cannot be brought there, nobody looks.
    rig.journal.set_fault(Some(Fault::Dead));
    rig.obey(Command::Commit(point(3), change(7, false)));
    let mut told = Vec::new();
    rig.turn.drain(&mut |event| told.push(event));
    assert!(matches!(told[..], [SinkEvent::Failed { lost: false, .. }]), "{told:?}");
    assert!(rig.turn.images().is_none());
}

#[test]
fn a_checkpoint_is_a_command() {
    let base = Command::committed(point(1), CheckpointKind::Base, DiskChanges { changes: vec![], flushed: true });
    assert!(matches!(base, Command::Based(at) if at == point(1)), "{base:?}");
    let delta = Command::committed(point(2), CheckpointKind::Delta, change(1, true));
    assert!(matches!(&delta, Command::Commit(at, of) if *at == point(2) && *of == change(1, true)), "{delta:?}");
}
