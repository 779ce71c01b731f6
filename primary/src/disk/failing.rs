//! A storage that fails on order, for tests with real processes: while a file `PATH.fails-write` lies beside a disk's file, nothing can be written to that.
//! Likewise `PATH.fails-read` and `PATH.fails-sync`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;
use vmm::disk::Storage;

/// Set to anything: then a process looks for orders.
pub const ORDER: &str = "FT_DISK_FAULTS";

/// See the module.
pub struct FailingStorage {
    below: Arc<dyn Storage>,
    read: PathBuf,
    write: PathBuf,
    sync: PathBuf,
}

/// Wraps `storage` if the environment says so.
pub fn if_ordered(storage: Arc<dyn Storage>, path: &Path) -> Arc<dyn Storage> {
    if std::env::var_os(ORDER).is_none() {
        return storage;
    }
    log::info!("{} fails on order", path.display());
    Arc::new(FailingStorage::new(storage, path))
}

impl FailingStorage {
    /// Around another storage; `path` is its file.
    pub fn new(below: Arc<dyn Storage>, path: &Path) -> Self {
        let order = |what: &str| {
            let mut name = path.as_os_str().to_owned();
            name.push(format!(".fails-{what}"));
            PathBuf::from(name)
        };
        Self { below, read: order("read"), write: order("write"), sync: order("sync") }
    }
}

fn unless(order: &Path) -> io::Result<()> {
    if order.exists() { Err(Errno::IO.into()) } else { Ok(()) }
}

impl Storage for FailingStorage {
    fn len(&self) -> io::Result<u64> {
        self.below.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        unless(&self.write)?;
        self.below.set_len(len)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        unless(&self.read)?;
        self.below.read_at(offset, into)
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        unless(&self.write)?;
        self.below.write_at(offset, from)
    }

    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        unless(&self.write)?;
        self.below.zero(offset, len, may_unmap)
    }

    fn sync(&self) -> io::Result<()> {
        unless(&self.sync)?;
        self.below.sync()
    }
}
