//! Power cuts, full disks and broken ones, against a historian who knows every epoch.

use std::path::{Path, PathBuf};

use crate::disk::testing::{Dice, Fault, LossyStorage, Power};
use primary::disk::replicated::Shared;
use primary::disk::{Alarm, BLOCK_BYTES, DirtyMap, DiskIdentity, DiskLog, FirstChange, ReplicatedDisk, recover};
use replication_proto::{Incarnation, VmId};
use vmm::disk::{DiskImage, Storage};

use super::*;

const VM: VmId = VmId(7);
const DISKS: usize = 2;
const BLOCKS: u64 = 4;
/// Sectors that are looked at: two in each block.
const SECTORS: usize = 8;
const BYTES: u64 = BLOCKS * BLOCK_BYTES;
const LIMIT: u64 = 64 << 10;

/// The content of every sector that is looked at.
type State = [[u64; SECTORS]; DISKS];
/// Disk, sector and value of each write.
type Writes = Vec<(usize, usize, u64)>;

fn offset(sector: usize) -> u64 {
    let sector = u64::try_from(sector).unwrap();
    sector / 2 * BLOCK_BYTES + sector % 2 * 512
}

fn filled(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(64)
}

fn write_to(disk: usize, sector: usize, value: u64) -> DiskChange {
    let content = if value == 0 { DiskContent::Zeros(512) } else { DiskContent::Bytes(filled(value).into()) };
    DiskChange { disk: u8::try_from(disk).unwrap(), offset: offset(sector), content }
}

fn state(images: &[Arc<dyn Disk>]) -> State {
    let mut state = State::default();
    for (disk, sectors) in images.iter().zip(&mut state) {
        for (number, value) in sectors.iter_mut().enumerate() {
            let mut sector = [0; 512];
            disk.read(offset(number), &mut sector).unwrap();
            *value = u64::from_le_bytes(sector[..8].try_into().unwrap());
            assert_eq!(sector, *filled(*value), "whole sectors");
        }
    }
    state
}

struct World {
    seed: u64,
    power: Arc<Power>,
    dice: Dice,
    disks: Vec<Arc<LossyStorage>>,
    maps: Vec<Arc<LossyStorage>>,
    journal: Arc<LossyStorage>,
    /// The state at the end of each epoch.
    history: Vec<State>,
    now: State,
    values: u64,
    /// Every change of every committed epoch.
    written: Vec<(u64, (usize, usize, u64))>,
    /// While the life is exact: what must be there after a power cut, at least and at most.
    exact: Option<(u64, u64)>,
    /// While a guest runs here: what its last flush promised, and what it wrote since.
    owner: Option<(State, Writes)>,
    journal_failed: bool,
    seen: Seen,
}

/// How often the world came to something: a test that never gets there shows nothing.
#[derive(Debug, Default)]
struct Seen {
    lives: u64,
    exact: u64,
    behind: u64,
    retired: u64,
    finished: u64,
    owner_flushes: u64,
    owner_lost: u64,
    journal_failures: u64,
    failed_and_finished: u64,
}

/// The power is off, or what was planned is over.
#[derive(Debug)]
struct Over;

impl<E: std::error::Error> From<E> for Over {
    fn from(_: E) -> Self {
        Self
    }
}

fn point(epoch: u64) -> Point {
    Point { generation: Generation(1), epoch: Epoch(epoch) }
}

impl World {
    fn new(seed: u64) -> Self {
        let power = Power::new(seed);
        let some = |len, torn| -> Vec<_> { (0..DISKS).map(|_| power.storage(len, torn)).collect() };
        let (disks, maps, journal) = (some(BYTES, false), some(0, true), power.storage(0, true));
        Self {
            seed,
            power: Arc::clone(&power),
            dice: Dice::new(seed ^ 0x5EED),
            disks,
            maps,
            journal,
            history: vec![State::default()],
            now: State::default(),
            values: 0,
            written: Vec::new(),
            exact: None,
            owner: None,
            journal_failed: false,
            seen: Seen::default(),
        }
    }

    fn last(&self) -> u64 {
        u64::try_from(self.history.len()).unwrap() - 1
    }

    fn value(&mut self) -> u64 {
        self.values += 1;
        if self.dice.one_in(8) { 0 } else { self.values }
    }

    fn open(&self) -> Result<(Vec<Recoverable>, Journal), SinkError> {
        let mut disks = Vec::new();
        for (number, (disk, file)) in self.disks.iter().zip(&self.maps).enumerate() {
            let storage: Arc<dyn Storage> = Arc::clone(disk) as _;
            let image: Arc<dyn Disk> = Arc::new(DiskImage::over(storage, Path::new("x.img"), None, false).unwrap());
            let identity = DiskIdentity { vm: VM, name: format!("d{number}"), bytes: BYTES };
            let map = DirtyMap::open_or_create(Arc::clone(file) as _, Arc::clone(&image), identity, Incarnation(1));
            let map = map.map_err(|error| {
                assert!(self.power.is_off(), "after any power cut a map opens: {error}");
                SinkError::Unusable
            })?;
            disks.push(Recoverable { image, map: Arc::new(map) });
        }
        let mut journal = Journal::open_or_create(Arc::clone(&self.journal) as _, PathBuf::from("journal"), VM, 5)
            .inspect_err(|error| assert!(self.power.is_off(), "after any power cut a journal opens: {error}"))?;
        recover(&disks, &mut journal, LIMIT)?;
        Ok((disks, journal))
    }

    /// What is left after a power cut.
    fn check(&mut self) -> (Vec<Recoverable>, Journal) {
        let (disks, journal) = self.open().expect("the power is on");
        let images: Vec<Arc<dyn Disk>> = disks.iter().map(|disk| Arc::clone(&disk.image)).collect();
        let found = state(&images);
        self.check_invariant(&disks, &found);
        if let Some((promised, since)) = self.owner.take() {
            self.check_owner(&found, &promised, &since);
        } else if let Some((least, most)) = self.exact.take() {
            let base = |disk: &Recoverable| disk.map.base().expect("an exact life has a base").epoch.0;
            let bases: Vec<u64> = disks.iter().map(base).collect();
            assert!(bases.iter().all(|base| (least..=most).contains(base)), "{least} <= {bases:?} <= {most}");
            let newest = bases.iter().copied().max().unwrap();
            // Bases differ only in the middle of a retirement: by epochs in which nothing happened, or behind bits.
            let exactly = found == self.history[usize::try_from(newest).unwrap()];
            assert!(exactly || self.journal_failed, "seed {}: not epoch {newest}", self.seed);
            self.check_exact(&disks, &found, &bases, (least, most));
            self.seen.exact += 1;
            self.seen.behind += u64::from(newest < most);
        }
        self.now = found;
        self.history.push(found);
        (disks, journal)
    }

    /// Exactly one epoch; but what was put beside a journal that failed has bits, and is then of an epoch that was committed.
    fn check_exact(&self, disks: &[Recoverable], found: &State, bases: &[u64], (least, most): (u64, u64)) {
        for (number, (disk, base)) in disks.iter().zip(bases).enumerate() {
            let then = &self.history[usize::try_from(*base).unwrap()];
            let dirty = disk.map.dirty();
            for (sector, value) in found[number].iter().copied().enumerate() {
                let beside = dirty.contains(offset(sector) / BLOCK_BYTES)
                    && self.journal_failed
                    && self
                        .written
                        .iter()
                        .any(|(epoch, write)| (least..=most).contains(epoch) && *write == (number, sector, value));
                assert!(
                    value == then[number][sector] || beside,
                    "seed {}: sector {sector} of disk {number}, epoch {base}",
                    self.seed
                );
            }
        }
    }

    /// Invariant M: what has no bit is as at the base.
    fn check_invariant(&self, disks: &[Recoverable], found: &State) {
        for ((number, disk), found) in disks.iter().enumerate().zip(found) {
            let Some(base) = disk.map.base() else { continue };
            let (then, dirty) = (&self.history[usize::try_from(base.epoch.0).unwrap()][number], disk.map.dirty());
            for sector in (0..SECTORS).filter(|sector| !dirty.contains(offset(*sector) / BLOCK_BYTES)) {
                assert_eq!(
                    found[sector], then[sector],
                    "seed {}: sector {sector} of disk {number}, base {base:?}",
                    self.seed
                );
            }
        }
    }

    fn check_owner(&mut self, found: &State, promised: &State, since: &[(usize, usize, u64)]) {
        for (disk, sectors) in found.iter().enumerate() {
            for (sector, value) in sectors.iter().enumerate() {
                let later = since.iter().any(|(d, s, v)| (*d, *s, *v) == (disk, sector, *value));
                assert!(
                    *value == promised[disk][sector] || later,
                    "sector {sector} of disk {disk} has {value}, flushed was {}, since then {since:?}",
                    promised[disk][sector]
                );
                let changed = since.iter().any(|(d, s, _)| (*d, *s) == (disk, sector));
                self.seen.owner_lost += u64::from(changed && *value == promised[disk][sector]);
            }
        }
    }

    /// A synchronisation: some changes, then the base.
    fn synchronise(&mut self, worker: &mut Worker) -> Result<(), Over> {
        self.exact = None;
        let mut durable = self.dice.one_in(8);
        for _ in 0..self.dice.below(5) {
            let (disk, sector, value) = (self.dice.index(DISKS), self.dice.index(SECTORS), self.value());
            worker.put(&write_to(disk, sector, value))?;
            self.now[disk][sector] = value;
        }
        if std::mem::take(&mut durable) {
            return Err(Over);
        }
        self.history.push(self.now);
        worker.based(point(self.last()))?;
        self.exact = Some((self.last(), self.last()));
        Ok(())
    }

    fn changes(&mut self) -> DiskChanges {
        let mut changes = Vec::new();
        for _ in 0..self.dice.below(4) {
            let (disk, sector, value) = (self.dice.index(DISKS), self.dice.index(SECTORS), self.value());
            self.now[disk][sector] = value;
            self.written.push((self.last() + 1, (disk, sector, value)));
            changes.push(write_to(disk, sector, value));
        }
        DiskChanges { changes, flushed: self.dice.one_in(4) }
    }

    /// Epochs come and go; what may be acknowledged is, at once: a flush that is acknowledged is promised.
    fn epochs(&mut self, worker: &mut Worker) -> Result<(), Over> {
        let (mut now, mut flushes) = (Duration::ZERO, Vec::new());
        for _ in 0..self.dice.below(40) {
            let changes = self.changes();
            let flushed = changes.flushed;
            self.history.push(self.now);
            let last = self.last();
            if flushed {
                flushes.push(last);
            }
            let (least, _) = self.exact.expect("exact");
            self.exact = Some((least, last));
            worker.commit(point(last), changes, now);
            if self.dice.one_in(10) {
                worker.hurry();
            }
            for _ in 0..self.dice.below(6) {
                let retires = matches!(worker.flow().next(now), Some(Order::Retire(_)));
                if worker.step(now)?.is_none() {
                    break;
                }
                self.seen.retired += u64::from(retires);
                self.promise(worker, &flushes);
            }
            now += Duration::from_millis(self.dice.below(300));
        }
        Ok(())
    }

    fn promise(&mut self, worker: &Worker, flushes: &[u64]) {
        let (least, most) = self.exact.expect("exact");
        let ackable = worker.flow().ackable().0;
        let flush = flushes.iter().rev().find(|epoch| **epoch <= ackable).copied().unwrap_or(0);
        self.exact = Some((least.max(worker.flow().durable().epoch.0).max(flush), most));
    }

    /// The standby runs; its guest writes and flushes on this side's disks.
    fn activate(&mut self, worker: Worker) -> Result<(), Over> {
        let parts: Vec<Recoverable> = worker.disks.clone();
        let failed = worker.journal_failed;
        let retire = worker.finish()?;
        self.seen.finished += 1;
        self.seen.failed_and_finished += u64::from(failed);
        assert_eq!(
            (retire.point(), state(&parts.iter().map(|d| Arc::clone(&d.image)).collect::<Vec<_>>())),
            (point(self.last()), self.now)
        );
        // From here on the guest runs, and whatever it was told was told to others.
        (self.exact, self.owner) = (None, Some((self.now, Vec::new())));
        let first = Arc::new(FirstChange::after(move || retire.run()));
        let shared = Shared { log: Arc::new(DiskLog::new(1 << 20)), first, alarm: Arc::new(Alarm::default()) };
        let guest: Vec<ReplicatedDisk> = parts
            .iter()
            .enumerate()
            .map(|(number, part)| {
                let number = u8::try_from(number).unwrap();
                ReplicatedDisk::new(number, "d".into(), Arc::clone(&part.image), Arc::clone(&part.map), shared.clone())
            })
            .collect();
        for _ in 0..self.dice.below(25) {
            let disk = self.dice.index(DISKS);
            if self.dice.one_in(4) {
                guest[disk].flush()?;
                self.seen.owner_flushes += 1;
                let (promised, since) = self.owner.as_mut().expect("the guest runs");
                promised[disk] = self.now[disk];
                since.retain(|(d, ..)| *d != disk);
                continue;
            }
            let (sector, value) = (self.dice.index(SECTORS), self.value());
            let range = ByteRange { offset: offset(sector), len: 512 };
            guest[disk].announce(range)?;
            if let Some((_, since)) = &mut self.owner {
                since.push((disk, sector, value));
            }
            if value == 0 {
                guest[disk].discard(range)?
            } else {
                guest[disk].write(range.offset, &filled(value))?
            }
            self.now[disk][sector] = value;
        }
        Err(Over)
    }

    fn life(&mut self, opened: Option<(Vec<Recoverable>, Journal)>) -> Result<(), Over> {
        let (disks, journal) = match opened {
            Some(opened) => opened,
            None => self.open()?,
        };
        let mut worker = Worker::new(disks, journal, LIMIT);
        self.journal_failed = false;
        loop {
            worker.hollow()?;
            self.synchronise(&mut worker)?;
            let fault =
                self.dice.one_in(5).then(|| [Fault::Full, Fault::WriteError, Fault::SyncError][self.dice.index(3)]);
            self.epochs(&mut worker)?;
            if fault.is_some() {
                self.journal.set_fault(fault);
                self.journal_failed = true;
                let failed = self.epochs(&mut worker);
                // Full for ever, or until somebody makes room.
                if self.dice.one_in(2) {
                    self.journal.set_fault(None);
                }
                if failed.is_err() {
                    self.seen.journal_failures += 1;
                }
            }
            if self.dice.one_in(2) {
                worker.hurry();
                return self.activate(worker);
            }
        }
    }
}

/// Goal: after a power cut at any change of any file, in any role, images and journal are recovered to exactly the state of one epoch, not older
/// than the last acknowledged flush or durable point, or, after an activation, to what the guest's own flushes promise; and invariant M
/// holds. Also when the journal's disk was full or broken before. Method: seeded lives, each ended at a random change.
#[test]
fn whatever_was_promised_is_there_after_a_power_cut_at_any_moment() {
    let mut sum = Seen::default();
    for seed in 0..4000 {
        let mut world = World::new(seed);
        let mut opened = None;
        for _ in 0..4 {
            let most = if world.dice.one_in(4) { 20 } else { 400 };
            world.power.cut_after(world.dice.below(most));
            world.life(opened.take()).expect_err("no life ends by itself");
            world.journal.set_fault(None);
            world.power.cycle();
            // The next life begins here, or with another start in whose middle the power may fail, too.
            let found = world.check();
            opened = world.dice.one_in(2).then_some(found);
            world.seen.lives += 1;
        }
        sum.add(&world.seen);
    }
    println!("{sum:?}");
    let enough = sum.exact > 4000 && sum.behind > 1000 && sum.retired > 300 && sum.finished > 1000;
    let enough = enough && sum.owner_flushes > 1000 && sum.owner_lost > 300;
    assert!(enough && sum.journal_failures > 300 && sum.failed_and_finished > 50, "{sum:?}");
}

impl Seen {
    fn add(&mut self, other: &Self) {
        let Self {
            lives,
            exact,
            behind,
            retired,
            finished,
            owner_flushes,
            owner_lost,
            journal_failures,
            failed_and_finished,
        } = other;
        self.lives += lives;
        self.exact += exact;
        self.behind += behind;
        self.retired += retired;
        self.finished += finished;
        self.owner_flushes += owner_flushes;
        self.owner_lost += owner_lost;
        self.journal_failures += journal_failures;
        self.failed_and_finished += failed_and_finished;
    }
}
