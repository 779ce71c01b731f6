//! Tests of the replicated disk.

use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use replication_proto::{Incarnation, VmId};
use vmm::disk::{DiskImage, Storage};

use super::*;
use crate::disk::owner::{DiskParts, OwnerDisks};
use crate::disk::testing::{Fault, LossyStorage, Power};
use crate::disk::{BLOCK_BYTES, DiskChanges, DiskIdentity, Epoch, Generation, Point};

const BYTES: u64 = 16 * BLOCK_BYTES;

struct Rig {
    disk: Arc<LossyStorage>,
    file: Arc<LossyStorage>,
    owner: OwnerDisks,
}

fn rig(limit: usize, first: FirstChange, read_only: bool) -> Rig {
    let power = Power::new(1);
    let (disk, file) = (power.storage(BYTES, false), power.storage(0, false));
    let storage: Arc<dyn Storage> = Arc::clone(&disk) as _;
    let image: Arc<dyn Disk> = Arc::new(DiskImage::over(storage, Path::new("a.img"), None, read_only).unwrap());
    let identity = DiskIdentity { vm: VmId(7), name: "data".into(), bytes: BYTES };
    let map = DirtyMap::open_or_create(Arc::clone(&file) as _, Arc::clone(&image), identity, Incarnation(1)).unwrap();
    let parts = DiskParts { name: "data".into(), image, map: Arc::new(map) };
    Rig { disk, file, owner: OwnerDisks::new(vec![parts], limit, first).unwrap() }
}

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange { offset, len }
}

fn point(epoch: u64) -> Point {
    Point { generation: Generation(1), epoch: Epoch(epoch) }
}

impl Rig {
    fn disk(&self) -> &ReplicatedDisk {
        &self.owner.disks()[0]
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.disk().announce(range(offset, u64::try_from(bytes.len()).unwrap_or(0)))?;
        self.disk().write(offset, bytes)
    }
}

#[test]
fn changes_reach_the_image_the_map_and_the_log_of_their_epoch() {
    let rig = rig(1 << 30, FirstChange::nothing(), false);
    rig.put(0, &[1; 512]).unwrap();
    rig.owner.begin_log(Epoch(5));
    let large: Vec<u8> = (0..=255).cycle().take(MAX_DISK_CHANGE_BYTES + 1024).collect();
    rig.put(4096, &large).unwrap();
    rig.disk().announce(range(0, 2048)).unwrap();
    rig.disk().write_zeroes(range(0, 1024), false).unwrap();
    rig.disk().discard(range(1024, 1024)).unwrap();
    rig.disk().flush().unwrap();
    let sealed = rig.owner.seal(Epoch(5));
    assert!(sealed.flushed);
    let shapes: Vec<(u64, usize, u64)> = sealed
        .changes
        .iter()
        .map(|change| match &change.content {
            DiskContent::Bytes(bytes) => (change.offset, bytes.len(), 0),
            DiskContent::Zeros(len) => (change.offset, 0, *len),
        })
        .collect();
    let second = 4096 + u64::try_from(MAX_DISK_CHANGE_BYTES).unwrap();
    assert_eq!(shapes, [(4096, MAX_DISK_CHANGE_BYTES, 0), (second, 1024, 0), (0, 0, 1024), (1024, 0, 1024)]);
    // What was logged makes an equal image elsewhere.
    let other = Power::new(2).storage(BYTES, false);
    let storage: Arc<dyn Storage> = other;
    let other: Arc<dyn Disk> = Arc::new(DiskImage::over(storage, Path::new("b.img"), None, false).unwrap());
    for change in &sealed.changes {
        crate::disk::recover::apply(std::slice::from_ref(&other), change).unwrap();
    }
    let (mut here, mut there) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    rig.disk().read(0, &mut here).unwrap();
    other.read(0, &mut there).unwrap();
    assert!(here == there && here[4096..4096 + large.len()] == large[..]);
    assert_eq!(rig.owner.seal(Epoch(6)).changes, []);
}

#[test]
fn what_is_outside_or_read_only_is_an_error_and_leaves_no_bit() {
    let rig = rig(1 << 20, FirstChange::nothing(), false);
    for result in [
        rig.disk().announce(range(BYTES, 512)),
        rig.disk().announce(range(u64::MAX - 511, 512)),
        rig.disk().write(BYTES - 512, &[0; 1024]),
        rig.disk().discard(range(BYTES, 512)),
    ] {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    let fixed = super::tests::rig(1 << 20, FirstChange::nothing(), true);
    for result in [fixed.disk().announce(range(0, 512)), fixed.put(0, &[1; 512]), fixed.disk().discard(range(0, 512))] {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
    }
    fixed.disk().flush().unwrap();
    assert!(rig.disk().map().dirty().is_empty() && fixed.disk().map().dirty().is_empty());
    assert_eq!((rig.owner.take_failure(), fixed.owner.take_failure()), (None, None));
}

#[test]
fn what_a_failed_change_left_goes_to_the_other_side() {
    let rig = rig(1 << 20, FirstChange::nothing(), false);
    rig.put(512, &[7; 512]).unwrap();
    rig.owner.begin_log(Epoch(2));
    rig.disk.set_fault(Some(Fault::Full));
    for _ in 0..2 {
        assert_eq!(rig.put(0, &[1; 1024]).unwrap_err().raw_os_error(), Some(28), "the guest gets it");
    }
    rig.disk.set_fault(None);
    let left = DiskContent::Bytes([[0; 512], [7; 512]].concat().into());
    let changes = vec![DiskChange { disk: 0, offset: 0, content: left }; 2];
    assert_eq!(rig.owner.seal(Epoch(2)), DiskChanges { changes, flushed: true });
    assert_eq!(rig.owner.take_failure(), None, "the two sides are equal");
    let [warning] = rig.owner.alarm().warnings().try_into().unwrap();
    assert!(
        warning.starts_with("disk 0 (data): a write failed: No space left") && warning.contains("2 times"),
        "{warning}"
    );
}

#[test]
fn a_change_whose_outcome_cannot_be_read_is_told_and_its_bits_stay() {
    let rig = rig(1 << 20, FirstChange::nothing(), false);
    rig.disk().map().reset(point(1)).unwrap();
    rig.owner.begin_log(Epoch(2));
    rig.owner.cover(Epoch(2));
    rig.disk().announce(range(0, 512)).unwrap();
    rig.disk.set_fault(Some(Fault::Dead));
    assert!(rig.disk().write(0, &[1; 512]).is_err());
    rig.disk.set_fault(None);
    let failure = rig.owner.take_failure().unwrap();
    assert!(failure.to_string().starts_with("disk 0 (data): a write failed: "), "{failure}");
    assert_eq!(rig.owner.take_failure(), None);
    assert_eq!(rig.owner.seal(Epoch(2)).changes, []);
    rig.put(0, &[2; 512]).unwrap();
    for epoch in [3, 2000, 9000] {
        rig.owner.durable(point(epoch), Duration::from_secs(epoch));
        rig.disk().map().tidy(point(epoch)).unwrap();
    }
    assert!(rig.disk().map().dirty().contains(0), "until a synchronisation has looked at it");
}

#[test]
fn a_failed_flush_makes_the_map_know_nothing_and_leaves_protection() {
    let rig = rig(1 << 20, FirstChange::nothing(), false);
    rig.disk().map().reset(point(1)).unwrap();
    rig.owner.begin_log(Epoch(2));
    rig.disk.set_fault(Some(Fault::SyncError));
    assert!(rig.disk().flush().is_err());
    rig.disk.set_fault(None);
    assert_eq!(rig.owner.take_failure(), None, "the other side has it all, on stable storage");
    assert!(rig.owner.alarm().warnings()[0].contains("a flush failed"));
    assert!(rig.owner.seal(Epoch(2)).flushed, "the first epoch of a log stands for what the base carries");
    assert_eq!(rig.disk().map().base(), None);
    // The guest may go on, but no later flush is believed.
    rig.put(0, &[1; 512]).unwrap();
    assert!(rig.disk().flush().is_err());
    assert!(!rig.owner.seal(Epoch(3)).flushed);
}

#[test]
fn no_space_for_the_map_is_an_error_of_the_guest_and_not_a_difference() {
    let rig = rig(1 << 20, FirstChange::nothing(), false);
    rig.owner.begin_log(Epoch(2));
    rig.put(0, &[1; 512]).unwrap();
    rig.file.set_fault(Some(Fault::Full));
    assert_eq!(rig.put(BLOCK_BYTES, &[1; 512]).unwrap_err().raw_os_error(), Some(28));
    let unannounced = rig.disk().write(BLOCK_BYTES, &[1; 512]).unwrap_err();
    assert_eq!(unannounced.kind(), io::ErrorKind::WouldBlock, "no bit is set while the machine may be about to stop");
    let mut back = [9; 512];
    rig.disk().read(BLOCK_BYTES, &mut back).unwrap();
    assert_eq!(back, [0; 512]);
    assert_eq!((rig.owner.take_failure(), rig.owner.seal(Epoch(2)).changes.len()), (None, 1));
    rig.file.set_fault(None);
    rig.put(BLOCK_BYTES, &[1; 512]).unwrap();
    assert_eq!(rig.owner.seal(Epoch(3)).changes.len(), 1, "and it works again when there is space");
}

#[test]
fn bits_go_by_themselves_when_the_other_side_holds_their_changes() {
    let rig = rig(1 << 20, FirstChange::nothing(), false);
    rig.put(0, &[1; 512]).unwrap();
    rig.owner.begin_log(Epoch(2));
    assert_eq!(rig.owner.dirty()[0].1.count(), 1);
    rig.put(BLOCK_BYTES, &[1; 512]).unwrap();
    rig.owner.seal(Epoch(2));
    rig.owner.cover(Epoch(3));
    rig.owner.seal(Epoch(3));
    assert!(rig.owner.still_ours().unwrap());
    let end = std::time::Instant::now() + Duration::from_secs(30);
    let mut epoch = 3;
    while !rig.owner.dirty()[0].1.is_empty() {
        epoch += 10;
        rig.owner.durable(point(epoch), Duration::from_secs(epoch));
        assert!(std::time::Instant::now() < end);
        std::thread::yield_now();
    }
    assert!(rig.disk().map().base().unwrap() > point(3));
    rig.owner.end_log();
}

#[test]
fn the_journal_is_retired_once_and_before_the_first_bit_or_flush() {
    for flush_first in [false, true] {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let first = FirstChange::after(move || {
            counted.fetch_add(1, Ordering::SeqCst);
            Ok(())
        });
        let rig = rig(1 << 20, first, false);
        let mut sector = [0; 512];
        rig.disk().read(0, &mut sector).unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), 0);
        if flush_first {
            rig.disk().flush().unwrap();
        } else {
            rig.disk().announce(range(0, 512)).unwrap();
        }
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        rig.put(0, &[1; 512]).unwrap();
        rig.disk().flush().unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), 1);
    }
    let rig = rig(1 << 20, FirstChange::after(|| Err(io::Error::other("no"))), false);
    for _ in 0..2 {
        assert!(rig.disk().announce(range(0, 512)).is_err() && rig.disk().flush().is_err());
    }
    assert!(rig.disk().map().dirty().is_empty());
}
