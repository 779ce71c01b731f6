//! A raw image.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FlockOperation;

use super::{ByteRange, Disk, FileStorage, SECTOR_BYTES, Storage};

/// Why an image could not be opened. Nothing of it was changed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is no such file.
    #[error("there is no disk image {path}: make one of {} with `truncate -s`", size_hint(*expected))]
    Missing {
        /// The image.
        path: PathBuf,
        /// Bytes that it should have, if that is known.
        expected: Option<u64>,
    },
    /// This user may not, or the file system is read-only.
    #[error("no permission to open the disk image {path} for {}", if *read_only { "reading" } else { "writing" })]
    Permission {
        /// The image.
        path: PathBuf,
        /// How it was to be opened.
        read_only: bool,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("{path} is neither a regular file nor a block device")]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// Another process has it open, to change it or (when this one wants to change it) to read it.
    #[error("the disk image {path} is in use by another process on this host")]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// Not a whole number of sectors, or none.
    #[error("the disk image {path} has {bytes} bytes, which is not a positive multiple of {SECTOR_BYTES}")]
    NotSectors {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Another size than the configuration (or the other side) says.
    #[error("the disk image {path} has {bytes} bytes, it should have {expected}")]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The size that it should have.
        expected: u64,
    },
    /// Anything else.
    #[error("cannot open the disk image {path}")]
    Host {
        /// The image.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

fn size_hint(expected: Option<u64>) -> String {
    expected.map_or_else(|| "the size that the disk shall have".to_owned(), |bytes| format!("{bytes} bytes"))
}

/// A raw image: byte n of the disk is byte n of the storage. Announcing does nothing.
pub struct DiskImage {
    storage: Arc<dyn Storage>,
    bytes: u64,
    read_only: bool,
    /// A flush failed. The kernel then marks pages that it could not write as clean, and the next `fdatasync` succeeds without them.
    broken: AtomicBool,
}

impl DiskImage {
    /// Opens a raw file or block device and locks it against other processes of this host (`flock`: shared when it is only read, so that
    /// several may) for as long as the image is open. `bytes` is the size that it must have.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open(path: &Path, bytes: Option<u64>, read_only: bool) -> Result<Self, ImageError> {
        let file = open_file(path, bytes, read_only)?;
        let host = |source| ImageError::Host { path: path.into(), source };
        let storage = FileStorage::new(file).map_err(|source| match source.kind() {
            io::ErrorKind::InvalidInput => ImageError::Kind { path: path.into() },
            _ => host(source),
        })?;
        let lock =
            if read_only { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
        rustix::fs::flock(storage.file(), lock).map_err(|errno| match errno {
            rustix::io::Errno::WOULDBLOCK => ImageError::InUse { path: path.into() },
            other => host(other.into()),
        })?;
        storage.forget_cache();
        Self::over(Arc::new(storage), path, bytes, read_only)
    }

    /// Over a storage that is open already; `path` is its name in messages.
    ///
    /// # Errors
    /// The sizes' and the host's of [`ImageError`].
    pub fn over(
        storage: Arc<dyn Storage>,
        path: &Path,
        expected: Option<u64>,
        read_only: bool,
    ) -> Result<Self, ImageError> {
        let bytes = storage.len().map_err(|source| ImageError::Host { path: path.into(), source })?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(ImageError::NotSectors { path: path.into(), bytes });
        }
        match expected {
            Some(expected) if expected != bytes => Err(ImageError::Size { path: path.into(), bytes, expected }),
            _ => Ok(Self { storage, bytes, read_only, broken: AtomicBool::new(false) }),
        }
    }

    /// What the image is on.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// An image that was made shorter while it was open must not grow again by a write beyond its end, with zeroes between.
    fn check(&self, range: ByteRange, is_change: bool) -> io::Result<()> {
        if is_change && self.read_only {
            return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the disk is read-only"));
        }
        if range.end() > self.bytes {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk"));
        }
        let now = self.storage.len()?;
        if now < self.bytes {
            let message = format!("the image has shrunk from {} to {now} bytes", self.bytes);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
        }
        Ok(())
    }
}

fn open_file(path: &Path, expected: Option<u64>, read_only: bool) -> Result<File, ImageError> {
    use std::os::unix::fs::OpenOptionsExt;
    // Without NONBLOCK, opening a pipe by mistake would wait for its other end.
    let opened = OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_NONBLOCK).open(path);
    opened.map_err(|source| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => ImageError::Missing { path, expected },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                ImageError::Permission { path, read_only, source }
            }
            io::ErrorKind::IsADirectory => ImageError::Kind { path },
            _ => ImageError::Host { path, source },
        }
    })
}

fn range(offset: u64, bytes: &[u8]) -> ByteRange {
    ByteRange { offset, len: u64::try_from(bytes.len()).unwrap_or(u64::MAX) }
}

impl Disk for DiskImage {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.check(range(offset, into), false)?;
        self.storage.read_at(offset, into)
    }

    fn announce(&self, _: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.check(range(offset, from), true)?;
        self.storage.write_at(offset, from)
    }

    fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> io::Result<()> {
        self.check(range, true)?;
        self.storage.zero(range.offset, range.len, may_unmap)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.write_zeroes(range, true)
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        if self.broken.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier flush of this image failed, which only a new process forgets"));
        }
        self.storage.sync().inspect_err(|_| self.broken.store(true, Ordering::Release))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.as_file().set_len(bytes).expect("a longer file");
        file
    }

    #[test]
    fn image_is_read_written_zeroed_and_flushed() {
        let file = image(1 << 20);
        let disk = DiskImage::open(file.path(), Some(1 << 20), false).unwrap();
        assert_eq!((disk.bytes(), disk.is_read_only()), (1 << 20, false));
        disk.announce(ByteRange { offset: 4096, len: 4096 }).unwrap();
        disk.write(4096, &[5; 4096]).unwrap();
        disk.write_zeroes(ByteRange { offset: 4096, len: 512 }, false).unwrap();
        disk.discard(ByteRange { offset: 4608, len: 512 }).unwrap();
        disk.flush().unwrap();
        let mut back = [1; 8192];
        disk.read(0, &mut back).unwrap();
        assert!(back.iter().enumerate().all(|(i, b)| *b == if i < 5120 { 0 } else { 5 }));
    }

    #[test]
    fn image_that_does_not_fit_is_refused() {
        let open = |bytes, expected| DiskImage::open(image(bytes).path(), expected, false).err();
        assert!(matches!(open(0, None), Some(ImageError::NotSectors { bytes: 0, .. })));
        assert!(matches!(open(1000, None), Some(ImageError::NotSectors { .. })));
        assert!(matches!(open(1024, Some(2048)), Some(ImageError::Size { bytes: 1024, expected: 2048, .. })));
        let missing = DiskImage::open(Path::new("/nowhere/a.img"), Some(512), false).err();
        assert!(matches!(missing, Some(ImageError::Missing { expected: Some(512), .. })));
        for path in ["/", "/dev/null"] {
            assert!(matches!(DiskImage::open(Path::new(path), None, true), Err(ImageError::Kind { .. })), "{path}");
        }
    }

    #[test]
    fn image_is_changed_by_one_or_read_by_many() {
        let file = image(4096);
        let open = |read_only| DiskImage::open(file.path(), None, read_only);
        let writer = open(false).unwrap();
        assert!(matches!(open(false), Err(ImageError::InUse { .. })));
        assert!(matches!(open(true), Err(ImageError::InUse { .. })));
        drop(writer);
        let (_one, _two) = (open(true).unwrap(), open(true).unwrap());
        assert!(matches!(open(false), Err(ImageError::InUse { .. })));
    }

    #[test]
    fn image_that_is_read_only_is_not_changed() {
        let file = image(4096);
        let disk = DiskImage::open(file.path(), None, true).unwrap();
        let range = ByteRange { offset: 0, len: 512 };
        for result in [disk.write(0, &[1; 512]), disk.write_zeroes(range, true), disk.discard(range)] {
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        }
        disk.flush().unwrap();
    }

    #[test]
    fn image_that_has_shrunk_does_not_grow_again() {
        let file = image(8192);
        let disk = DiskImage::open(file.path(), None, false).unwrap();
        file.as_file().set_len(4096).unwrap();
        for result in [disk.write(4096, &[1; 512]), disk.read(0, &mut [0; 512])] {
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
        assert_eq!(file.as_file().metadata().unwrap().len(), 4096);
    }

    #[test]
    fn image_has_an_end() {
        let file = image(4096);
        let disk = DiskImage::open(file.path(), None, false).unwrap();
        assert!(disk.write(4096, &[1; 512]).is_err());
        assert!(disk.read(u64::MAX - 511, &mut [0; 512]).is_err());
        assert_eq!(file.as_file().metadata().unwrap().len(), 4096);
    }
}
