//! Where a disk's files are, and how they are opened. Everybody opens them here: with failpoints, `FT_POWER_CUT` makes each of
//! them lose at SIGKILL what was not synced, and `FT_DISK_FAULTS` lets each of them fail on order.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use failover::exit::ExitCode;
use rustix::fs::FlockOperation;
use vmm::disk::{DiskImage, FileStorage, ImageError, Storage};

use super::{JournalError, MapError};

/// The journal's name in the state directory.
pub const JOURNAL_FILE: &str = "journal";

/// Why the disks cannot be used. Nothing was overwritten.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A map.
    #[error("the dirty map {path}: {source}")]
    Map {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: MapError,
    },
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A file cannot be opened.
    #[error("{path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

impl DiskError {
    /// The number that the process ends with.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Map { source: MapError::Foreign { .. } | MapError::Corrupt(_) | MapError::Version(_), .. }
            | Self::Journal(
                JournalError::Foreign { .. } | JournalError::Corrupt { .. } | JournalError::Version { .. },
            ) => ExitCode::DiskForeign,
            Self::Image(_) | Self::Map { .. } | Self::Journal(_) | Self::Open { .. } => ExitCode::DiskUnusable,
        }
    }
}

/// Where the map of an image is: beside it, or in the state directory if the image is a device.
pub fn map_path(image: &Path, is_device: bool, state_dir: &Path, disk: &str) -> PathBuf {
    if is_device {
        return state_dir.join(format!("{disk}.ftmap"));
    }
    let mut path = image.as_os_str().to_owned();
    path.push(".ftmap");
    path.into()
}

/// Opens a map or a journal, makes an empty file if there is none, and locks it.
///
/// # Errors
/// The host's; `WouldBlock` when another process has it.
pub fn open_storage(path: &Path) -> io::Result<Arc<dyn Storage>> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    // A file that was just made is found again after a power cut only if its directory says so on stable storage.
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        std::fs::File::open(directory)?.sync_all()?;
    }
    let storage = FileStorage::new(file)?;
    storage.forget_cache();
    Ok(losing(Arc::new(storage), path))
}

/// Opens an image ([`DiskImage::open`]).
///
/// # Errors
/// See [`ImageError`].
pub fn open_image(path: &Path, bytes: Option<u64>, read_only: bool) -> Result<DiskImage, ImageError> {
    let image = DiskImage::open(path, bytes, read_only)?;
    let storage = losing(Arc::clone(image.storage()), path);
    DiskImage::over(storage, path, bytes, read_only)
}

#[cfg(not(feature = "failpoints"))]
fn losing(storage: Arc<dyn Storage>, _: &Path) -> Arc<dyn Storage> {
    storage
}

#[cfg(feature = "failpoints")]
fn losing(storage: Arc<dyn Storage>, path: &Path) -> Arc<dyn Storage> {
    super::failing::if_ordered(super::volatile::if_ordered(storage, path), path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_lie_beside_images_and_those_of_devices_in_the_state_directory() {
        let map = |image: &str, device| map_path(Path::new(image), device, Path::new("/var/lib/ft"), "data");
        assert_eq!(map("/images/a.img", false), Path::new("/images/a.img.ftmap"));
        assert_eq!(map("/dev/vg/data", true), Path::new("/var/lib/ft/data.ftmap"));
    }

    #[test]
    fn a_file_is_made_and_opened_by_one_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let first = open_storage(&path).unwrap();
        assert_eq!(first.len().unwrap(), 0);
        assert_eq!(open_storage(&path).err().map(|error| error.kind()), Some(io::ErrorKind::WouldBlock));
        drop(first);
        open_storage(&path).unwrap();
    }
}
