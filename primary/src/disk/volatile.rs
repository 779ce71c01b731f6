//! A storage that keeps unsynced writes in the process's memory, so that SIGKILL is a power cut. Some sectors go to the file at once, as
//! a kernel writes back what it likes when it likes.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm::disk::{SECTOR_BYTES, Storage};
use xxhash_rust::xxh3::xxh3_64;

use super::testing::Dice;

/// Names a seed: then every disk's file loses at SIGKILL what was not synced.
pub const ORDER: &str = "FT_POWER_CUT";

const SECTOR: usize = 512;
/// Sectors held before all are written back.
const HELD_MAX: usize = 1 << 17;

/// See the module.
pub struct VolatileStorage {
    below: Arc<dyn Storage>,
    state: Mutex<State>,
}

struct State {
    dice: Dice,
    held: BTreeMap<u64, [u8; SECTOR]>,
    len: u64,
}

/// Wraps `storage` if the environment says so.
pub fn if_ordered(storage: Arc<dyn Storage>, path: &Path) -> Arc<dyn Storage> {
    let seed = std::env::var(ORDER).ok().and_then(|text| text.parse::<u64>().ok());
    let wrapped = seed.and_then(|seed| {
        let seed = seed ^ xxh3_64(path.as_os_str().as_encoded_bytes());
        VolatileStorage::new(Arc::clone(&storage), seed).ok()
    });
    match wrapped {
        Some(volatile) => {
            log::info!("{} loses at SIGKILL what was not synced", path.display());
            Arc::new(volatile)
        }
        None => storage,
    }
}

impl VolatileStorage {
    /// Around another storage.
    ///
    /// # Errors
    /// Its length is unknown.
    pub fn new(below: Arc<dyn Storage>, seed: u64) -> io::Result<Self> {
        let len = below.len()?;
        Ok(Self { below, state: Mutex::new(State { dice: Dice::new(seed), held: BTreeMap::new(), len }) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a sector below; zeroes beyond its end.
    fn below(&self, number: u64) -> io::Result<[u8; SECTOR]> {
        let mut sector = [0; SECTOR];
        let (at, end) = (number * SECTOR_BYTES, self.below.len()?);
        let there = usize::try_from(end.saturating_sub(at).min(SECTOR_BYTES)).unwrap_or(SECTOR);
        let (read, _) = sector.split_at_mut(there);
        if !read.is_empty() {
            self.below.read_at(at, read)?;
        }
        Ok(sector)
    }

    fn write_back(&self, number: u64, sector: &[u8; SECTOR], len: u64) -> io::Result<()> {
        let at = number * SECTOR_BYTES;
        let inside = usize::try_from(len.saturating_sub(at).min(SECTOR_BYTES)).unwrap_or(SECTOR);
        self.below.write_at(at, sector.split_at(inside).0)
    }

    fn write_back_all(&self, state: &mut State) -> io::Result<()> {
        for (number, sector) in &state.held {
            self.write_back(*number, sector, state.len)?;
        }
        state.held.clear();
        Ok(())
    }
}

impl Storage for VolatileStorage {
    fn len(&self) -> io::Result<u64> {
        // An image that is made shorter below while it is open is shorter.
        let below = self.below.len()?;
        let state = self.lock();
        Ok(if state.held.is_empty() { below } else { state.len.max(below) })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.lock();
        self.write_back_all(&mut state)?;
        self.below.set_len(len)?;
        state.len = len;
        Ok(())
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let state = self.lock();
        let end = offset.saturating_add(u64::try_from(into.len()).unwrap_or(u64::MAX));
        if end > state.len.max(self.below.len()?) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut at, mut left) = (offset, into);
        while !left.is_empty() {
            let (number, within) = (at / SECTOR_BYTES, usize::try_from(at % SECTOR_BYTES).unwrap_or(0));
            let count = left.len().min(SECTOR - within);
            let (now, rest) = left.split_at_mut(count);
            let sector = match state.held.get(&number) {
                Some(sector) => *sector,
                None => self.below(number)?,
            };
            now.copy_from_slice(sector.get(within..within + count).unwrap_or_default());
            at += u64::try_from(count).unwrap_or(0);
            left = rest;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let mut state = self.lock();
        let (mut at, mut left) = (offset, from);
        state.len = state.len.max(offset.saturating_add(u64::try_from(from.len()).unwrap_or(u64::MAX)));
        while !left.is_empty() {
            let (number, within) = (at / SECTOR_BYTES, usize::try_from(at % SECTOR_BYTES).unwrap_or(0));
            let (now, rest) = left.split_at(left.len().min(SECTOR - within));
            let mut sector = match state.held.get(&number) {
                Some(sector) => *sector,
                None if now.len() == SECTOR => [0; SECTOR],
                None => self.below(number)?,
            };
            sector.get_mut(within..within + now.len()).unwrap_or_default().copy_from_slice(now);
            if state.dice.one_in(8) {
                self.write_back(number, &sector, state.len)?;
                state.held.remove(&number);
            } else {
                state.held.insert(number, sector);
            }
            at += u64::try_from(now.len()).unwrap_or(0);
            left = rest;
        }
        if state.held.len() > HELD_MAX { self.write_back_all(&mut state) } else { Ok(()) }
    }

    fn zero(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        let zeroes = [0; 64 << 10];
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let now = usize::try_from(end - at).unwrap_or(usize::MAX).min(zeroes.len());
            self.write_at(at, zeroes.split_at(now).0)?;
            at += u64::try_from(now).unwrap_or(end);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.write_back_all(&mut self.lock())?;
        self.below.sync()
    }
}

#[cfg(test)]
mod tests {
    use vmm::disk::FileStorage;

    use super::*;

    #[test]
    fn what_was_not_synced_is_lost_with_the_process_in_part() {
        let file = tempfile::tempfile().unwrap();
        let below: Arc<dyn Storage> = Arc::new(FileStorage::new(file).unwrap());
        let storage = VolatileStorage::new(Arc::clone(&below), 1).unwrap();
        storage.set_len(1 << 20).unwrap();
        storage.write_at(0, &vec![1; 1 << 20]).unwrap();
        storage.sync().unwrap();
        storage.write_at(256, &vec![2; 1 << 19]).unwrap();
        storage.zero(0, 512, true).unwrap();
        let read = |storage: &dyn Storage| {
            let mut all = vec![9; 1 << 20];
            storage.read_at(0, &mut all).unwrap();
            all
        };
        let here = read(&storage);
        assert!(here[..512].iter().all(|b| *b == 0) && here[512..1 << 19].iter().all(|b| *b == 2));
        assert!(here[(1 << 19) + 256..].iter().all(|b| *b == 1));
        // As after a kill: what is below.
        let survived = read(&*below);
        let new = survived.iter().filter(|b| **b == 2).count();
        assert!((1 << 14..1 << 18).contains(&new), "{new} bytes of {} were written back early", 1 << 19);
        storage.sync().unwrap();
        assert_eq!(read(&*below), here);
        storage.write_at((1 << 20) + 100, &[3; 10]).unwrap();
        storage.sync().unwrap();
        assert_eq!(below.len().unwrap(), (1 << 20) + 110);
    }
}
