//! Storage that loses what was not synced, for crash tests: when the power is cut, each sector that was written since the last sync keeps
//! any of the contents that it had meanwhile, independently of all others, and may be torn between two of them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm::disk::{SECTOR_BYTES, Storage};

const SECTOR: usize = 512;
type Sector = [u8; SECTOR];

/// A small seeded generator (splitmix64): the same seed, the same run.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.bits() % end
    }

    /// A position in something that has `len` elements, which is not 0.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(u64::try_from(len).unwrap_or(1))).unwrap_or(0)
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What a storage answers instead of working.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Every write fails: no space left.
    Full,
    /// Every write fails.
    WriteError,
    /// Every access fails.
    Dead,
    /// Every sync fails. As with a kernel that could not write back: what waited for it is still read, but no later sync brings it to the disk unless it is written
    /// again.
    SyncError,
}

/// The power supply of some storages.
pub struct Power {
    state: Mutex<Supply>,
    storages: Mutex<Vec<Arc<LossyStorage>>>,
}

struct Supply {
    dice: Dice,
    /// Operations until the power fails.
    left: Option<u64>,
    off: bool,
    done: u64,
}

/// A storage in memory, see the module.
pub struct LossyStorage {
    power: Arc<Power>,
    torn: bool,
    content: Mutex<Content>,
}

#[derive(Default)]
struct Content {
    /// What survived, and what was written since, oldest first.
    sectors: BTreeMap<u64, (Option<Sector>, Vec<Sector>)>,
    /// Sectors that a sync failed to write.
    forgotten: BTreeSet<u64>,
    durable_len: u64,
    lens: Vec<u64>,
    fault: Option<Fault>,
    syncs: u64,
    writes: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lost_power() -> io::Error {
    io::Error::other("the power is off")
}

impl Power {
    /// A supply that is on.
    pub fn new(seed: u64) -> Arc<Self> {
        let supply = Supply { dice: Dice::new(seed), left: None, off: false, done: 0 };
        Arc::new(Self { state: Mutex::new(supply), storages: Mutex::default() })
    }

    /// A storage of `len` zero bytes. If `torn`, a sector may be cut within at a power failure.
    pub fn storage(self: &Arc<Self>, len: u64, torn: bool) -> Arc<LossyStorage> {
        let content = Content { durable_len: len, ..Content::default() };
        let storage = Arc::new(LossyStorage { power: Arc::clone(self), torn, content: Mutex::new(content) });
        lock(&self.storages).push(Arc::clone(&storage));
        storage
    }

    /// The power fails within the `operations`-th change from now on (from 0).
    pub fn cut_after(&self, operations: u64) {
        lock(&self.state).left = Some(operations);
    }

    /// Whether it is off.
    pub fn is_off(&self) -> bool {
        lock(&self.state).off
    }

    /// Changes that were asked for so far.
    pub fn operations(&self) -> u64 {
        lock(&self.state).done
    }

    /// Cuts the power, if it is not off yet, decides what survived, and puts it on again.
    pub fn cycle(&self) {
        let storages = lock(&self.storages);
        let mut supply = lock(&self.state);
        for storage in storages.iter() {
            storage.lose(&mut supply.dice);
        }
        (supply.left, supply.off) = (None, false);
    }

    /// One operation is about to change something: false when the power fails within it.
    fn spend(&self) -> io::Result<bool> {
        let mut supply = lock(&self.state);
        if supply.off {
            return Err(lost_power());
        }
        supply.done += 1;
        match supply.left {
            Some(0) => {
                supply.off = true;
                Ok(false)
            }
            Some(left) => {
                supply.left = Some(left - 1);
                Ok(true)
            }
            None => Ok(true),
        }
    }
}

impl Content {
    fn len(&self) -> u64 {
        self.lens.last().copied().unwrap_or(self.durable_len)
    }

    fn sector(&self, number: u64) -> Sector {
        let entry = self.sectors.get(&number);
        entry.and_then(|(durable, written)| written.last().copied().or(*durable)).unwrap_or([0; SECTOR])
    }

    fn put(&mut self, number: u64, sector: Sector) {
        self.forgotten.remove(&number);
        self.sectors.entry(number).or_default().1.push(sector);
    }

    fn write(&mut self, offset: u64, from: &[u8]) {
        let mut at = offset;
        let mut left = from;
        while !left.is_empty() {
            let (number, within) = (at / SECTOR_BYTES, usize::try_from(at % SECTOR_BYTES).unwrap_or(0));
            let (now, rest) = left.split_at(left.len().min(SECTOR - within));
            let mut sector = self.sector(number);
            if let Some(part) = sector.get_mut(within..within + now.len()) {
                part.copy_from_slice(now);
            }
            self.put(number, sector);
            at += u64::try_from(now.len()).unwrap_or(0);
            left = rest;
        }
        if at > self.len() {
            self.lens.push(at);
        }
    }

    fn settle(&mut self) {
        self.durable_len = self.len();
        self.lens.clear();
        for (number, (durable, written)) in &mut self.sectors {
            if self.forgotten.contains(number) {
                continue;
            }
            *durable = written.pop().or(*durable);
            written.clear();
        }
    }

    fn forget(&mut self) {
        let waiting = self.sectors.iter().filter(|(_, (_, written))| !written.is_empty());
        let waiting: Vec<u64> = waiting.map(|(number, _)| *number).collect();
        self.forgotten.extend(waiting);
    }

    fn cut_beyond(&mut self, len: u64) {
        self.sectors.retain(|number, _| number * SECTOR_BYTES < len);
    }
}

impl LossyStorage {
    /// Lets it fail from now on, or work again.
    pub fn set_fault(&self, fault: Option<Fault>) {
        lock(&self.content).fault = fault;
    }

    /// How often it was synced.
    pub fn syncs(&self) -> u64 {
        lock(&self.content).syncs
    }

    /// How often it was written to.
    pub fn writes(&self) -> u64 {
        lock(&self.content).writes
    }

    /// Decides what survived.
    fn lose(&self, dice: &mut Dice) {
        let mut content = lock(&self.content);
        let kept = dice.index(content.lens.len() + 1);
        content.durable_len =
            kept.checked_sub(1).and_then(|at| content.lens.get(at)).copied().unwrap_or(content.durable_len);
        content.lens.clear();
        content.forgotten.clear();
        for (durable, written) in content.sectors.values_mut() {
            if written.is_empty() {
                continue;
            }
            let mut versions = vec![durable.unwrap_or([0; SECTOR])];
            versions.append(written);
            let mut kept = versions[dice.index(versions.len())];
            if self.torn && dice.one_in(4) {
                let (other, cut) = (versions[dice.index(versions.len())], dice.index(SECTOR));
                kept[cut..].copy_from_slice(&other[cut..]);
            }
            *durable = Some(kept);
        }
        let len = content.durable_len;
        content.cut_beyond(len);
    }

    fn change(&self, fault: impl Fn(Fault) -> bool, act: impl FnOnce(&mut Content)) -> io::Result<()> {
        let mut content = lock(&self.content);
        if let Some(found) = content.fault.filter(|found| fault(*found)) {
            let full = found == Fault::Full;
            return Err(io::Error::from_raw_os_error(if full { 28 } else { 5 }));
        }
        let goes_on = self.power.spend()?;
        act(&mut content);
        if goes_on { Ok(()) } else { Err(lost_power()) }
    }
}

impl Storage for LossyStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.content).len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(
            |fault| fault != Fault::SyncError,
            |content| {
                content.lens.push(len);
                content.cut_beyond(len);
            },
        )
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if self.power.is_off() {
            return Err(lost_power());
        }
        let content = lock(&self.content);
        if content.fault == Some(Fault::Dead) {
            return Err(io::Error::from_raw_os_error(5));
        }
        let mut at = offset;
        if offset.saturating_add(u64::try_from(into.len()).unwrap_or(u64::MAX)) > content.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut left = into;
        while !left.is_empty() {
            let within = usize::try_from(at % SECTOR_BYTES).unwrap_or(0);
            let (now, rest) = left.split_at_mut(left.len().min(SECTOR - within));
            now.copy_from_slice(&content.sector(at / SECTOR_BYTES)[within..within + now.len()]);
            at += u64::try_from(now.len()).unwrap_or(0);
            left = rest;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.change(
            |fault| fault != Fault::SyncError,
            |content| {
                content.writes += 1;
                content.write(offset, from);
            },
        )
    }

    fn zero(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        self.write_at(offset, &vec![0; usize::try_from(len).unwrap_or(0)])
    }

    fn sync(&self) -> io::Result<()> {
        let mut content = lock(&self.content);
        if matches!(content.fault, Some(Fault::SyncError | Fault::Dead)) {
            content.forget();
            return Err(io::Error::from_raw_os_error(5));
        }
        if !self.power.spend()? {
            return Err(lost_power());
        }
        content.syncs += 1;
        content.settle();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn synced_bytes_survive_and_others_may_or_may_not() {
        let (mut lost, mut kept, mut torn) = (0, 0, 0);
        for seed in 0..200 {
            let power = Power::new(seed);
            let storage = power.storage(4096, true);
            storage.write_at(100, &[1; 1000]).unwrap();
            storage.sync().unwrap();
            storage.write_at(0, &[2; 512]).unwrap();
            power.cut_after(0);
            assert!(storage.write_at(8192, &[3; 512]).is_err());
            assert!(storage.read_at(0, &mut [0]).is_err());
            power.cycle();
            let mut back = [9; 4096];
            storage.read_at(0, &mut back).unwrap();
            assert_eq!(back[512..1100], [1; 588]);
            match (back[511], back[0]) {
                (1, 0) => lost += 1,
                (2, 2) => kept += 1,
                _ => torn += 1,
            }
        }
        assert!(lost > 30 && kept > 30 && torn > 5, "{lost} {kept} {torn}");
    }
}
