//! All disks of this node as a process finds them: images, maps and journal opened, and what the journal still held put into the images.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use failover::config::PairConfig;
use replication_proto::{Incarnation, NodeName};
use vmm::config::DiskConfig;
use vmm::disk::{Disk, DiskSerial};

use super::open::{JOURNAL_FILE, map_path};
use super::owner::DiskParts;
use super::recover::Recoverable;
use super::{DirtyMap, DiskError, DiskIdentity, FirstChange, Journal, OwnerDisks, open_image, open_storage, recover};

/// What is due before the first change of a guest that was activated here; set at the activation.
type Due = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// The disks of a machine, for whoever runs it.
#[derive(Clone)]
pub struct DiskSet {
    /// What the flows of protection see.
    pub owner: Arc<OwnerDisks>,
    due: Arc<Mutex<Option<Due>>>,
}

/// The same disks, for whoever keeps them while the machine waits.
pub struct Waiting {
    /// Images and maps.
    pub disks: Vec<Recoverable>,
    /// The journal, empty.
    pub journal: Journal,
}

/// Everything that was opened.
pub struct Opened {
    /// For a side that runs.
    pub set: DiskSet,
    /// For a side that waits. `None`: there are no disks.
    pub waiting: Option<Waiting>,
    /// The machine's parts list.
    pub configs: Vec<DiskConfig>,
}

impl DiskSet {
    /// Of a machine without disks.
    pub fn none() -> Self {
        Self { owner: Arc::new(OwnerDisks::none()), due: Arc::default() }
    }

    /// The guest is about to run here: this is due before its first change of a disk.
    pub fn before_first_change(&self, due: impl FnOnce() -> io::Result<()> + Send + 'static) {
        *self.due.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(due));
    }
}

impl DiskSet {
    /// Does what is due on a thread of its own, so that the guest's first change need not wait for it.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn prepare_in_background(&self) -> io::Result<()> {
        let owner = Arc::clone(&self.owner);
        std::thread::Builder::new().name("disk-retire".into()).spawn(move || {
            if let Err(error) = owner.first_change().prepare() {
                log::error!("the disks take no changes: {error}");
            }
        })?;
        Ok(())
    }
}

impl Opened {
    /// Of a machine without disks.
    pub fn none() -> Self {
        Self { set: DiskSet::none(), waiting: None, configs: Vec::new() }
    }

    /// Opens the disks of `node` and replays the journal.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn open(config: &PairConfig, node: &NodeName, me: Incarnation) -> Result<Self, DiskError> {
        if config.disk.is_empty() {
            return Ok(Self::none());
        }
        let section = config.node(node).expect("picked from this configuration");
        let (mut parts, mut configs) = (Vec::new(), Vec::new());
        for disk in &config.disk {
            let path = section.disks.get(&disk.name).expect("checked with the configuration");
            let image = Arc::new(open_image(path, disk.size, disk.read_only)?);
            let map = open_map(config, path, &section.state_dir, disk.name.as_str(), Arc::clone(&image) as _, me)?;
            let serial = DiskSerial::new(disk.name.as_str()).expect("a disk's name is a serial number");
            configs.push(DiskConfig { bytes: image.bytes(), read_only: disk.read_only, serial });
            parts.push(DiskParts { name: disk.name.to_string(), image, map: Arc::new(map) });
        }
        let disks: Vec<Recoverable> =
            parts.iter().map(|p| Recoverable { image: Arc::clone(&p.image), map: Arc::clone(&p.map) }).collect();
        let file = section.state_dir.join(JOURNAL_FILE);
        let storage = open_storage(&file).map_err(|source| DiskError::Open { path: file.clone(), source })?;
        let origin = u64::try_from(me.0 & u128::from(u64::MAX)).expect("masked");
        let mut journal = Journal::open_or_create(storage, file.clone(), config.vm.id, origin)?;
        recover(&disks, &mut journal, config.limits.journal)?;
        let due: Arc<Mutex<Option<Due>>> = Arc::default();
        let slot = Arc::clone(&due);
        let first = FirstChange::after(move || {
            let due = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
            due.map_or(Ok(()), |due| due())
        });
        let log_limit = usize::try_from(config.limits.disk_log).unwrap_or(usize::MAX);
        let owner =
            OwnerDisks::new(parts, log_limit, first).map_err(|source| DiskError::Open { path: file, source })?;
        let set = DiskSet { owner: Arc::new(owner), due };
        Ok(Self { set, waiting: Some(Waiting { disks, journal }), configs })
    }
}

fn open_map(
    config: &PairConfig,
    path: &Path,
    state_dir: &Path,
    name: &str,
    image: Arc<dyn Disk>,
    me: Incarnation,
) -> Result<DirtyMap, DiskError> {
    use std::os::unix::fs::FileTypeExt as _;
    let device = std::fs::metadata(path).is_ok_and(|data| data.file_type().is_block_device());
    let path = map_path(path, device, state_dir, name);
    let storage = open_storage(&path).map_err(|source| DiskError::Open { path: path.clone(), source })?;
    let identity = DiskIdentity { vm: config.vm.id, name: name.to_owned(), bytes: image.bytes() };
    DirtyMap::open_or_create(storage, image, identity, me).map_err(|source| DiskError::Map { path, source })
}
