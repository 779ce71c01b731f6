//! What is on a simulated host's disks: an image, its map and a journal. They outlive processes; when the power fails, each sector that was
//! written since the last sync keeps any of the contents that it had meanwhile.

use std::collections::BTreeMap;
use std::hash::Hash;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use primary::disk::owner::DiskParts;
use primary::disk::recover::Recoverable;
use primary::disk::{DirtyMap, DiskIdentity, FirstChange, Journal, OwnerDisks, recover};
use replication_proto::{Incarnation, VmId};
use vmm::disk::{Disk, DiskImage, Storage};

use super::guest::{PIECE_BYTES, PIECES};
use crate::real::rng::Rng;

/// Bytes of a journal: small, so that it often starts anew.
pub const JOURNAL_BYTES: u64 = 192 << 10;

/// Which of so many contents a sector of a file keeps, or a file which of so many lengths (sector `None`); and whether it makes no difference.
pub type Choice<'a> = dyn FnMut(&'static str, Option<usize>, usize, bool) -> usize + 'a;

fn by_chance(rng: &mut Rng) -> impl FnMut(&'static str, Option<usize>, usize, bool) -> usize {
    |_, _, count, _| usize::try_from(rng.range(0, count as u64)).expect("few")
}

const SECTOR: usize = 512;
type Sector = [u8; SECTOR];

/// What a host's storage answers instead of working.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// There is no space left.
    Full,
    /// Nothing can be written.
    Writes,
    /// Nothing can be synced.
    Syncs,
}

/// The power and the health of a host's storage.
#[derive(Default)]
pub struct Supply(Mutex<Supplied>);

#[derive(Default)]
struct Supplied {
    /// Changes until the power fails.
    left: Option<u64>,
    off: bool,
    /// Changes so far.
    spent: u64,
    trouble: Option<Trouble>,
    /// Something failed since a process last opened the files.
    failed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Supply {
    /// The power fails within the so-manieth change from now on.
    pub fn cut_within(&self, changes: u64) {
        lock(&self.0).left = Some(changes);
    }

    /// Whether it has failed.
    pub fn is_off(&self) -> bool {
        lock(&self.0).off
    }

    /// Changes so far.
    pub fn spent(&self) -> u64 {
        lock(&self.0).spent
    }

    /// What is wrong from now on.
    pub fn set_trouble(&self, trouble: Option<Trouble>) {
        lock(&self.0).trouble = trouble;
    }

    /// Whether everything works.
    pub fn is_well(&self) -> bool {
        let supplied = lock(&self.0);
        !supplied.off && supplied.trouble.is_none()
    }

    /// Whether something failed since a process last opened the files: it may have to be started again before it trusts them.
    pub fn has_failed(&self) -> bool {
        lock(&self.0).failed
    }

    /// Power is there, and will be.
    pub fn restore(&self) {
        let mut supplied = lock(&self.0);
        (supplied.off, supplied.left) = (false, None);
    }

    /// Something is about to be changed. False: the power fails within it.
    fn spend(&self, is_sync: bool) -> io::Result<bool> {
        let mut supplied = lock(&self.0);
        if supplied.off {
            return Err(io::Error::other("the power is off"));
        }
        let refused = match (supplied.trouble, is_sync) {
            (Some(Trouble::Full), false) => Some(28),
            (Some(Trouble::Writes), false) | (Some(Trouble::Syncs), true) => Some(5),
            _ => None,
        };
        if let Some(errno) = refused {
            supplied.failed = true;
            return Err(io::Error::from_raw_os_error(errno));
        }
        supplied.spent += 1;
        match supplied.left {
            Some(0) => {
                supplied.off = true;
                Ok(false)
            }
            left => {
                supplied.left = left.map(|left| left - 1);
                Ok(true)
            }
        }
    }
}

/// One file.
pub struct SimStorage {
    name: &'static str,
    supply: Arc<Supply>,
    /// A sector may be cut within when the power fails.
    torn: bool,
    content: Mutex<Content>,
}

#[derive(Clone, Default, Hash)]
struct Content {
    bytes: Vec<u8>,
    /// What sectors held before they were written, since the last sync: the oldest is on stable storage.
    before: BTreeMap<usize, Vec<Sector>>,
    /// The same of sectors that a sync failed to write: the host believes them to be clean, and no later sync writes them.
    doubtful: BTreeMap<usize, Vec<Sector>>,
    /// The same of the length.
    lengths: Vec<usize>,
}

impl Content {
    fn sector(&self, number: usize) -> Sector {
        let mut sector = [0; SECTOR];
        let there = self.bytes.get(number * SECTOR..).unwrap_or(&[]);
        let count = there.len().min(SECTOR);
        sector[..count].copy_from_slice(&there[..count]);
        sector
    }

    fn write(&mut self, offset: usize, from: &[u8]) {
        let end = offset + from.len();
        for number in offset / SECTOR..end.div_ceil(SECTOR) {
            let sector = self.sector(number);
            let versions = self.before.entry(number).or_default();
            versions.extend(self.doubtful.remove(&number).into_iter().flatten());
            versions.push(sector);
        }
        if end > self.bytes.len() {
            self.lengths.push(self.bytes.len());
            self.bytes.resize(end, 0);
        }
        self.bytes[offset..end].copy_from_slice(from);
    }

    /// A sync fails.
    fn doubt(&mut self) {
        for (number, versions) in std::mem::take(&mut self.before) {
            self.doubtful.entry(number).or_default().extend(versions);
        }
    }

    /// Nobody has the file open: what the host failed to write may be read from the disk again.
    fn evict(&mut self, rng: &mut Rng) {
        for (number, mut versions) in std::mem::take(&mut self.doubtful) {
            versions.push(self.sector(number));
            let kept = versions[usize::try_from(rng.range(0, versions.len() as u64)).expect("few")];
            let end = self.bytes.len().min((number + 1) * SECTOR);
            if let Some(into) = self.bytes.get_mut(number * SECTOR..end) {
                let count = into.len();
                into.copy_from_slice(&kept[..count]);
            }
        }
    }

    /// The power fails.
    fn lose(&mut self, file: &'static str, torn: bool, choose: &mut Choice<'_>) {
        for (number, versions) in std::mem::take(&mut self.doubtful) {
            self.before.entry(number).or_default().extend(versions);
        }
        for (number, mut versions) in std::mem::take(&mut self.before) {
            versions.push(self.sector(number));
            let alike = versions.windows(2).all(|pair| pair[0] == pair[1]);
            let mut pick = |count: usize| choose(file, Some(number), count, alike);
            let mut kept = versions[pick(versions.len())];
            if torn && pick(4) == 0 {
                let (other, cut) = (versions[pick(versions.len())], pick(SECTOR));
                kept[cut..].copy_from_slice(&other[cut..]);
            }
            let end = self.bytes.len().min((number + 1) * SECTOR);
            if let Some(into) = self.bytes.get_mut(number * SECTOR..end) {
                let count = into.len();
                into.copy_from_slice(&kept[..count]);
            }
        }
        let mut lengths = std::mem::take(&mut self.lengths);
        lengths.push(self.bytes.len());
        let length = lengths[choose(file, None, lengths.len(), false)];
        self.bytes.resize(length, 0);
    }
}

impl SimStorage {
    fn change(&self, is_sync: bool, act: impl FnOnce(&mut Content)) -> io::Result<()> {
        let goes_on = self.supply.spend(is_sync).inspect_err(|_| {
            // Without power it makes no difference.
            if is_sync {
                lock(&self.content).doubt();
            }
        })?;
        // Of a sync that the power failed in, nothing is certain.
        if goes_on || !is_sync {
            act(&mut lock(&self.content));
        }
        if goes_on { Ok(()) } else { Err(io::Error::other("the power has failed")) }
    }

    /// What is in it, synced or not.
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.content).bytes.clone()
    }
}

fn index(at: u64) -> usize {
    usize::try_from(at).expect("a small file")
}

impl Storage for SimStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.content).bytes.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(false, |content| {
            content.lengths.push(content.bytes.len());
            content.bytes.resize(index(len), 0);
        })
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if self.supply.is_off() {
            return Err(io::Error::other("the power is off"));
        }
        let content = lock(&self.content);
        let from = content.bytes.get(index(offset)..index(offset) + into.len());
        into.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.change(false, |content| content.write(index(offset), from))
    }

    fn zero(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        self.write_at(offset, &vec![0; index(len)])
    }

    fn sync(&self) -> io::Result<()> {
        self.change(true, |content| {
            content.before.clear();
            content.lengths.clear();
        })
    }
}

/// The files of one host.
pub struct HostFiles {
    /// Their power.
    pub supply: Arc<Supply>,
    /// Over so many bytes the journal starts anew.
    pub journal_bytes: u64,
    image: Arc<SimStorage>,
    map: Arc<SimStorage>,
    journal: Arc<SimStorage>,
}

/// The files, opened by a process.
pub struct OpenDisks {
    /// For a side that runs the guest.
    pub owner: Arc<OwnerDisks>,
    /// For a side that waits; taken by it.
    pub waiting: Option<(Vec<Recoverable>, Journal)>,
    /// Over so many bytes the journal starts anew.
    pub journal_bytes: u64,
    due: Due,
}

type Due = Arc<Mutex<Option<Box<dyn FnOnce() -> io::Result<()> + Send>>>>;

impl OpenDisks {
    /// The guest is about to run here: this is due before its first change of a disk.
    pub fn before_first_change(&self, due: impl FnOnce() -> io::Result<()> + Send + 'static) {
        *lock(&self.due) = Some(Box::new(due));
    }

    /// What the machine works on.
    pub fn for_machine(&self) -> Arc<dyn Disk> {
        self.owner.for_machine().swap_remove(0)
    }
}

impl HostFiles {
    /// An image full of zeroes.
    pub fn new() -> Self {
        Self::of_size(PIECES * PIECE_BYTES, JOURNAL_BYTES, true)
    }

    /// The same, of another size. `torn`: sectors of map and journal may be cut within when the power fails.
    pub fn of_size(image_bytes: u64, journal_bytes: u64, torn: bool) -> Self {
        let supply = Arc::new(Supply::default());
        let file = |name, len: u64, torn| {
            let content = Mutex::new(Content { bytes: vec![0; index(len)], ..Content::default() });
            Arc::new(SimStorage { name, supply: Arc::clone(&supply), torn, content })
        };
        let (image, map) = (file("image", image_bytes, false), file("map", 0, torn));
        let journal = file("journal", 0, torn);
        Self { supply, journal_bytes, image, map, journal }
    }

    fn each(&self) -> [&Arc<SimStorage>; 3] {
        [&self.image, &self.map, &self.journal]
    }

    /// The power fails, if it has not, and will be there again.
    pub fn lose(&self, rng: &mut Rng) {
        self.lose_as(&mut by_chance(rng));
    }

    /// The same; what is kept is chosen.
    pub fn lose_as(&self, choose: &mut Choice<'_>) {
        for file in self.each() {
            lock(&file.content).lose(file.name, file.torn, choose);
        }
        self.supply.restore();
    }

    /// A process is about to open the files, and none has them open: what failed to be written is as it is on the disk.
    pub fn evict(&self, rng: &mut Rng) {
        for file in self.each() {
            lock(&file.content).evict(rng);
        }
        lock(&self.supply.0).failed = false;
    }

    /// The same files once more.
    pub fn copy(&self) -> Self {
        let supply = Arc::new(Supply::default());
        let [image, map, journal] = self.each().map(|file| {
            let content = Mutex::new(lock(&file.content).clone());
            Arc::new(SimStorage { name: file.name, supply: Arc::clone(&supply), torn: file.torn, content })
        });
        Self { supply, journal_bytes: self.journal_bytes, image, map, journal }
    }

    /// What the files might be if the power failed now.
    pub fn survivors(&self, rng: &mut Rng) -> Self {
        let survivors = self.copy();
        survivors.lose(rng);
        survivors
    }

    /// All that is in the files, synced or not, folded into one number.
    pub fn print(&self) -> u128 {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        self.each().iter().for_each(|file| lock(&file.content).hash(&mut hasher));
        hasher.digest128()
    }

    /// The image.
    pub fn image(&self) -> Vec<u8> {
        self.image.bytes()
    }

    /// As a process does when it starts: everything is opened, and what the journal holds is put into the image.
    ///
    /// # Errors
    /// What failed.
    pub fn open(&self, me: Incarnation) -> Result<OpenDisks, String> {
        let vm = VmId(0x51);
        let (image, map, journal): (Arc<dyn Storage>, Arc<dyn Storage>, Arc<dyn Storage>) =
            (Arc::clone(&self.image) as _, Arc::clone(&self.map) as _, Arc::clone(&self.journal) as _);
        let image = DiskImage::over(image, Path::new("image"), None, false).map_err(|e| e.to_string())?;
        let image: Arc<dyn Disk> = Arc::new(image);
        let identity = DiskIdentity { vm, name: "data".into(), bytes: image.bytes() };
        let map = DirtyMap::open_or_create(map, Arc::clone(&image), identity, me).map_err(|e| e.to_string())?;
        let map = Arc::new(map);
        let origin = u64::try_from((me.0 >> 32) & u128::from(u64::MAX)).expect("masked");
        let mut journal = Journal::open_or_create(journal, "journal".into(), vm, origin).map_err(|e| e.to_string())?;
        let disks = vec![Recoverable { image: Arc::clone(&image), map: Arc::clone(&map) }];
        recover(&disks, &mut journal, self.journal_bytes).map_err(|e| e.to_string())?;
        let due = Due::default();
        let slot = Arc::clone(&due);
        let first = FirstChange::after(move || {
            let due = lock(&slot).take();
            due.map_or(Ok(()), |due| due())
        });
        let parts = vec![DiskParts { name: "data".into(), image, map }];
        // One thread writes and takes checkpoints: it never waits for itself.
        let owner = Arc::new(OwnerDisks::without_thread(parts, usize::MAX, first));
        Ok(OpenDisks { owner, waiting: Some((disks, journal)), journal_bytes: self.journal_bytes, due })
    }
}

impl Default for HostFiles {
    fn default() -> Self {
        Self::new()
    }
}
