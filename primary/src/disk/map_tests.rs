//! Tests of the dirty map, power cuts above all.

use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use replication_proto::VmId;
use vmm::disk::DiskImage;

use super::*;
use crate::disk::book::QUIET;
use crate::disk::testing::{Dice, Fault, LossyStorage, Power};
use crate::disk::{BLOCK_BYTES, Generation};

const BLOCKS: u64 = 6;
const BYTES: u64 = BLOCKS * BLOCK_BYTES - 1024;
const ME: Incarnation = Incarnation(1);

fn identity(bytes: u64) -> DiskIdentity {
    DiskIdentity { vm: VmId(7), name: "data".into(), bytes }
}

fn point(epoch: u64) -> Point {
    Point { generation: Generation(1), epoch: Epoch(epoch) }
}

fn block(number: u64) -> ByteRange {
    ByteRange { offset: number * BLOCK_BYTES, len: 512 }
}

fn image(storage: &Arc<LossyStorage>) -> Arc<dyn Disk> {
    let storage: Arc<dyn Storage> = Arc::clone(storage) as _;
    Arc::new(DiskImage::over(storage, Path::new("a.img"), None, false).unwrap())
}

fn read(disk: &dyn Disk, number: u64) -> u64 {
    let mut sector = [0; 512];
    disk.read(number * BLOCK_BYTES, &mut sector).unwrap();
    u64::from_le_bytes(sector[..8].try_into().unwrap())
}

fn sector(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(64)
}

/// A map, its image, and what a historian knows.
struct World {
    power: Arc<Power>,
    disk: Arc<LossyStorage>,
    image: Arc<dyn Disk>,
    file: Arc<LossyStorage>,
    map: Option<DirtyMap>,
    dice: Dice,
    /// Content of each block at the end of each epoch.
    history: Vec<Vec<u64>>,
    now: Vec<u64>,
    logged: bool,
    /// No earlier epoch's durability counts: what was held then travelled with this one.
    covered_at: Option<u64>,
    durable: u64,
    /// Of the acknowledgements.
    clock: Duration,
    values: u64,
    /// There was a base, and nobody has asked to forget it.
    has_base: bool,
    /// It may have been forgotten in the file only.
    half_forgotten: bool,
    /// The map's file fails.
    faulty: bool,
    /// What failed for that.
    failures: u64,
}

type Outcome = io::Result<()>;

impl World {
    fn new(seed: u64) -> Self {
        let power = Power::new(seed);
        let disk = power.storage(BYTES, false);
        let image = image(&disk);
        let file = power.storage(0, true);
        let now = vec![0; 6];
        let dice = Dice::new(seed ^ 0xABCD);
        let history = vec![now.clone()];
        Self {
            power,
            disk,
            image,
            file,
            map: None,
            dice,
            history,
            now,
            logged: false,
            covered_at: None,
            durable: 0,
            clock: Duration::ZERO,
            values: 0,
            has_base: false,
            half_forgotten: false,
            faulty: false,
            failures: 0,
        }
    }

    fn running(&self) -> u64 {
        u64::try_from(self.history.len()).unwrap_or(u64::MAX)
    }

    fn open(&mut self) -> Outcome {
        self.map = None;
        let opened =
            DirtyMap::open_or_create(Arc::clone(&self.file) as _, Arc::clone(&self.image), identity(BYTES), ME);
        match opened {
            Ok(map) => self.map = Some(map),
            Err(MapError::Io { what: _, source }) if self.power.is_off() => return Err(source),
            Err(error) => panic!("after any power cut a map opens: {error}"),
        }
        (self.logged, self.covered_at, self.half_forgotten) = (false, None, false);
        Ok(())
    }

    fn map(&self) -> &DirtyMap {
        self.map.as_ref().expect("opened")
    }

    /// Invariant M, on what is there now.
    fn check(&self) {
        let Some(base) = self.map().base() else { return };
        let then = &self.history[usize::try_from(base.epoch.0).expect("a small number")];
        let dirty = self.map().dirty();
        for number in (0..BLOCKS).filter(|number| !dirty.contains(*number)) {
            let (found, at_base) = (read(&*self.image, number), then[usize::try_from(number).expect("a small number")]);
            assert_eq!(found, at_base, "block {number} has no bit and is not as at {base:?}; dirty {dirty:?}");
        }
    }

    fn write(&mut self, number: u64) -> Outcome {
        let range = block(number);
        // A change may come without its announcement or long after it.
        if !self.dice.one_in(5) {
            self.map().mark(range)?;
        }
        if self.dice.one_in(6) {
            self.step()?;
        }
        while !self.map().touch(range, self.logged.then_some(Epoch(self.running()))) {
            self.map().mark(range)?;
        }
        self.values += 1;
        self.now[usize::try_from(number).expect("a small number")] = self.values;
        self.image.write(range.offset, &sector(self.values))
    }

    fn seal(&mut self) {
        for _ in 0..=self.dice.below(50) {
            self.history.push(self.now.clone());
        }
    }

    /// A synchronisation towards us: blocks are raised, overwritten, and the result is a new base.
    fn overwritten(&mut self) -> Outcome {
        let mut set = BlockSet::none(BLOCKS);
        for _ in 0..self.dice.below(3) {
            set.insert(self.dice.below(BLOCKS));
        }
        for run in set.ranges() {
            self.map().raise(run)?;
        }
        for number in set.iter() {
            self.values += 1;
            self.now[usize::try_from(number).expect("a small number")] = self.values;
            self.image.write(number * BLOCK_BYTES, &sector(self.values))?;
        }
        self.history.push(self.now.clone());
        let end = self.running() - 1;
        if self.dice.one_in(4) { Ok(()) } else { self.map().reset(point(end)) }
    }

    fn mend(&mut self) {
        self.faulty = false;
        self.file.set_fault(None);
    }

    fn step(&mut self) -> Outcome {
        match self.dice.below(15) {
            0..=4 => {
                let number = self.dice.below(BLOCKS);
                self.write(number)?;
            }
            5..=7 => self.seal(),
            8..=10 if self.logged => {
                let first = self.covered_at.map_or(self.durable, |at| at.max(self.durable));
                let last = self.running() - 1;
                if self.covered_at.is_some() && first <= last {
                    self.durable = first + self.dice.below(last - first + 1);
                    self.clock += QUIET * u32::try_from(self.dice.below(8)).unwrap_or(0);
                    if self.map().durable(point(self.durable), self.clock) {
                        self.map().tidy(point(self.durable))?;
                    }
                }
            }
            8..=10 => {
                self.logged = true;
                self.covered_at = None;
            }
            11 if self.logged && self.covered_at.is_none() => {
                self.map().cover(Epoch(self.running()));
                self.covered_at = Some(self.running());
            }
            11 if self.dice.one_in(3) => {
                self.logged = false;
                self.map().hold();
            }
            11 => self.image.flush()?,
            12 if !self.logged => self.overwritten()?,
            12 => assert!(self.map().still_ours()?, "nobody else is there"),
            13 if self.dice.one_in(6) => {
                self.has_base = false;
                self.half_forgotten = self.faulty;
                self.map().set_base(None)?;
            }
            13 if self.dice.one_in(3) => {
                self.mend();
                self.open()?;
            }
            14 if self.faulty => self.mend(),
            14 if self.dice.one_in(3) => {
                let faults = [Fault::Full, Fault::WriteError, Fault::SyncError];
                self.file.set_fault(Some(faults[self.dice.index(faults.len())]));
                self.faulty = true;
            }
            _ => {}
        }
        Ok(())
    }

    /// Lives until the power fails, then looks at what is left.
    fn live(&mut self, operations: u64) {
        self.power.cut_after(operations);
        let mut outcome = if self.map.is_some() { Ok(()) } else { self.open() };
        let mut steps = 0;
        while outcome.is_ok() && steps < 500 {
            steps += 1;
            self.has_base = self.map().base().is_some() && !self.half_forgotten;
            outcome = self.step();
            if self.faulty && !self.power.is_off() {
                // What fails for a while costs what was asked for, and nothing else.
                self.failures += u64::from(outcome.is_err());
                outcome = Ok(());
            }
        }
        self.mend();
        self.power.cycle();
        // An image that failed to be synced is not believed again by whoever has it open.
        self.image = image(&self.disk);
        self.open().expect("the power is on");
        assert!(!self.has_base || self.map().base().is_some(), "a torn header must not cost a whole synchronisation");
        self.check();
        // The survivors are what the guest finds.
        self.now = (0..BLOCKS).map(|number| read(&*self.image, number)).collect();
        self.history.push(self.now.clone());
    }
}

/// Goal: invariant M holds after a power cut at any change of any file, whatever subset of unsynced sectors survived. Method: a world
/// whose historian knows every epoch; thousands of seeded lives, each ended at a random change.
#[test]
fn invariant_holds_after_a_power_cut_at_any_moment() {
    let (mut based, mut clean, mut failures) = (0, 0, 0);
    for seed in 0..4000 {
        let mut world = World::new(seed);
        for life in 0..4 {
            let operations = world.dice.below(if life == 0 { 12 } else { 90 });
            world.live(operations);
            based += u64::from(world.map().base().is_some());
            clean += BLOCKS - world.map().dirty().count();
        }
        failures += world.failures;
    }
    // The check is not empty: most lives end with a base, and with blocks that have no bit.
    assert!(based > 5000 && clean > 10_000, "{based} with a base, {clean} blocks without a bit");
    assert!(failures > 5000, "{failures} operations failed because the file did");
}

fn opened(power: &Arc<Power>, seconds: Incarnation) -> (Arc<LossyStorage>, Arc<LossyStorage>, DirtyMap) {
    let (disk, file) = (power.storage(BYTES, false), power.storage(0, true));
    let map = DirtyMap::open_or_create(Arc::clone(&file) as _, image(&disk), identity(BYTES), seconds);
    (disk, file, map.expect("a new map"))
}

#[test]
fn a_map_of_another_disk_or_version_is_refused_and_not_touched() {
    let power = Power::new(1);
    let (disk, file, map) = opened(&power, ME);
    map.reset(point(3)).unwrap();
    drop(map);
    let writes = file.writes();
    let open = |identity: DiskIdentity, disk: &Arc<LossyStorage>| {
        DirtyMap::open_or_create(Arc::clone(&file) as _, image(disk), identity, ME).err().map(|error| error.to_string())
    };
    let other_vm = DiskIdentity { vm: VmId(8), ..identity(BYTES) };
    let other_name = DiskIdentity { name: "log".into(), ..identity(BYTES) };
    let larger = power.storage(2 * BYTES, false);
    for (identity, disk) in [(other_vm, &disk), (other_name, &disk), (identity(2 * BYTES), &larger)] {
        let said = open(identity.clone(), disk).unwrap();
        assert!(said.contains("belongs to data of VM") && said.contains(&identity.bytes.to_string()), "{said}");
    }
    assert_eq!(file.writes(), writes);
    for (at, byte, expected) in [(8, 9, "version 9"), (0, b'X', "no dirty map"), (200, 1, "no dirty map")] {
        let kept = Power::new(2).storage(0, false);
        let mut all = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
        file.read_at(0, &mut all).unwrap();
        (all[at], all[at + 4096]) = (byte, byte);
        kept.write_at(0, &all).unwrap();
        let said = DirtyMap::open_or_create(Arc::clone(&kept) as _, image(&disk), identity(BYTES), ME).err().unwrap();
        assert!(said.to_string().contains(expected), "{said}");
        let mut after = vec![0; all.len()];
        kept.read_at(0, &mut after).unwrap();
        assert!(after == all, "a file that is refused is as it was");
    }
    let short = power.storage(100, false);
    short.write_at(0, b"hello").unwrap();
    let said = DirtyMap::open_or_create(short as _, image(&disk), identity(BYTES), ME).err().unwrap();
    assert!(matches!(said, MapError::Corrupt("too short")), "{said}");
}

#[test]
fn another_opener_is_noticed_and_its_header_not_overwritten() {
    let power = Power::new(1);
    let (disk, file, map) = opened(&power, ME);
    assert!(map.still_ours().unwrap());
    let other = DirtyMap::open_or_create(file as _, image(&disk), identity(BYTES), Incarnation(2)).unwrap();
    assert!(!map.still_ours().unwrap());
    let refused = map.set_base(Some(point(1))).unwrap_err().to_string();
    assert!(refused.contains("shared"), "{refused}");
    assert!(other.still_ours().unwrap());
}

#[test]
fn a_map_that_fails_allows_no_change_to_new_blocks_and_works_when_its_file_does() {
    for fault in [Fault::Full, Fault::WriteError, Fault::SyncError] {
        let power = Power::new(1);
        let (disk, file, map) = opened(&power, ME);
        map.mark(block(0)).unwrap();
        file.set_fault(Some(fault));
        assert!(map.mark(block(1)).is_err() && !map.touch(block(1), None) && map.tidy(point(1)).is_err());
        assert!(map.touch(block(0), None), "what is on stable storage stays there");
        assert!(map.mark(block(1)).is_err() && map.set_base(Some(point(2))).is_err());
        assert_eq!(map.base(), None);
        file.set_fault(None);
        // The kernel has forgotten what it failed to write: it is written again.
        map.mark(block(1)).unwrap();
        assert!(map.touch(block(1), None) && map.still_ours().unwrap());
        map.set_base(Some(point(3))).unwrap();
        drop(map);
        power.cycle();
        let map = DirtyMap::open_or_create(file as _, image(&disk), identity(BYTES), ME).unwrap();
        assert!(map.dirty().contains(0) && map.dirty().contains(1), "{fault:?}: {:?}", map.dirty());
        assert_eq!(map.base(), Some(point(3)));
    }
}

#[test]
fn what_a_process_finds_in_a_map_is_on_stable_storage_once_it_is_open() {
    let power = Power::new(1);
    let (disk, file, map) = opened(&power, ME);
    map.mark(block(0)).unwrap();
    file.set_fault(Some(Fault::SyncError));
    assert!(map.mark(block(1)).is_err());
    drop(map);
    file.set_fault(None);
    let open = || DirtyMap::open_or_create(Arc::clone(&file) as _, image(&disk), identity(BYTES), ME).unwrap();
    assert!(open().touch(block(1), None), "the page cache says so");
    power.cycle();
    assert!(open().dirty().contains(1), "and so it has to be true");
}

#[test]
fn an_image_that_cannot_be_synced_is_distrusted_even_if_its_map_could_not_be_told_at_once() {
    let power = Power::new(1);
    let (disk, file, map) = opened(&power, ME);
    map.reset(point(1)).unwrap();
    disk.set_fault(Some(Fault::SyncError));
    file.set_fault(Some(Fault::Full));
    assert!(map.tidy(point(2)).is_err() && map.mark(block(1)).is_err());
    file.set_fault(None);
    map.mark(block(1)).unwrap();
    assert_eq!(map.base(), None);
    drop(map);
    power.cycle();
    disk.set_fault(None);
    let map = DirtyMap::open_or_create(file as _, image(&disk), identity(BYTES), ME).unwrap();
    assert_eq!(map.base(), None, "said before the first change");
}

#[test]
fn an_image_that_cannot_be_synced_is_trusted_in_nothing() {
    let power = Power::new(1);
    let (disk, file, map) = opened(&power, ME);
    map.reset(point(1)).unwrap();
    disk.set_fault(Some(Fault::SyncError));
    assert!(map.tidy(point(2)).is_err());
    disk.set_fault(None);
    assert_eq!(map.base(), None);
    assert!(
        !map.durable(point(900), Duration::ZERO) && map.tidy(point(900)).is_err() && map.reset(point(900)).is_err()
    );
    map.mark(block(1)).unwrap();
    drop(map);
    let map = DirtyMap::open_or_create(file as _, image(&disk), identity(BYTES), ME).unwrap();
    assert_eq!(map.base(), None);
}

/// Storage whose syncs wait until they are let through.
struct Gated {
    below: Arc<LossyStorage>,
    open: Mutex<bool>,
    opened: Condvar,
    waiting: AtomicU64,
}

impl Storage for Gated {
    fn len(&self) -> io::Result<u64> {
        self.below.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.below.set_len(len)
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.below.read_at(offset, into)
    }
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.below.write_at(offset, from)
    }
    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.below.zero(offset, len, may_unmap)
    }
    fn sync(&self) -> io::Result<()> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(open, |open| !*open).unwrap_or_else(PoisonError::into_inner));
        self.below.sync()
    }
}

fn comes_true(condition: impl Fn() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        if Instant::now() > end {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

#[test]
fn callers_at_the_same_time_share_a_sync_and_none_returns_before_it() {
    let power = Power::new(1);
    let below = power.storage(0, false);
    let gated = Arc::new(Gated {
        below: Arc::clone(&below),
        open: Mutex::new(true),
        opened: Condvar::new(),
        waiting: AtomicU64::new(0),
    });
    let bytes = 100 * BLOCK_BYTES;
    let disk = image(&power.storage(bytes, false));
    let map = DirtyMap::open_or_create(Arc::clone(&gated) as _, disk, identity(bytes), ME).unwrap();
    // The first mark of all also says in the header that a guest runs.
    map.mark(block(90)).unwrap();
    *gated.open.lock().unwrap() = false;
    let (syncs, before, returned) = (below.syncs(), gated.waiting.load(Ordering::SeqCst), AtomicU64::new(0));
    let barrier = Barrier::new(9);
    std::thread::scope(|scope| {
        for number in 0..9 {
            let (map, returned, barrier) = (&map, &returned, &barrier);
            scope.spawn(move || {
                barrier.wait();
                map.mark(block(number)).unwrap();
                returned.fetch_add(1, Ordering::SeqCst);
            });
        }
        let all_wait = comes_true(|| gated.waiting.load(Ordering::SeqCst) > before && map.dirty().count() == 10);
        let early = returned.load(Ordering::SeqCst);
        *gated.open.lock().unwrap() = true;
        gated.opened.notify_all();
        assert!(all_wait && early == 0, "{early} returned before the sync");
    });
    let used = below.syncs() - syncs;
    assert!((1..=2).contains(&used), "{used} syncs for nine callers");
    // And what is sure costs nothing.
    map.mark(block(4)).unwrap();
    assert_eq!(below.syncs() - syncs, used);
}

#[test]
fn bits_survive_in_sectors_of_their_own_on_a_large_disk() {
    let power = Power::new(3);
    let bytes = 3 * BLOCKS_PER_SECTOR * BLOCK_BYTES;
    let (disk, file) = (image(&power.storage(bytes, false)), power.storage(0, true));
    let open = || DirtyMap::open_or_create(Arc::clone(&file) as _, Arc::clone(&disk), identity(bytes), ME).unwrap();
    let map = open();
    let mut set = BlockSet::none(blocks_of(bytes));
    for number in [0, BLOCKS_PER_SECTOR - 1, BLOCKS_PER_SECTOR, 3 * BLOCKS_PER_SECTOR - 1] {
        set.insert(number);
    }
    set.ranges().for_each(|run| map.raise(run).unwrap());
    drop(map);
    power.cycle();
    assert_eq!(open().dirty(), set);
}
