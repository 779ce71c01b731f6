//! Bytes that may be changed and synced.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// Bytes that may be changed and synced: a file, a block device, or in tests something that loses what was not synced.
#[expect(clippy::len_without_is_empty, reason = "a length that may fail; nobody asks whether a disk is empty")]
pub trait Storage: Send + Sync {
    /// Number of bytes.
    ///
    /// # Errors
    /// The host's, here and in all methods.
    fn len(&self) -> io::Result<u64>;

    /// Makes it so long: what is added reads as zeroes.
    ///
    /// # Errors
    /// `Unsupported` for a device.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Reads exactly `into.len()` bytes.
    ///
    /// # Errors
    /// `UnexpectedEof` beyond the end.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes all of `from`; a file grows when it must.
    ///
    /// # Errors
    /// Some of the bytes may have been written.
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()>;

    /// Makes a range within the length read as zeroes; `may_unmap` lets the host give the space back.
    ///
    /// # Errors
    /// Some of the range may have been zeroed.
    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;

    /// When this returns, everything that was written before is on stable storage (`fdatasync`).
    ///
    /// # Errors
    /// Nothing is then known of what is on stable storage, and a later success proves nothing of earlier writes.
    fn sync(&self) -> io::Result<()>;
}

/// Zeroes are written in pieces of this size where the host knows no better way.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A regular file or a block device.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    is_device: bool,
}

impl FileStorage {
    /// Around an open file.
    ///
    /// # Errors
    /// `InvalidInput` when it is neither a regular file nor a block device, otherwise the host's.
    pub fn new(file: File) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a regular file nor a block device"));
        }
        Ok(Self { file, is_device: kind.is_block_device() })
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What is read from here on comes from the disk, as far as the host can be made to: a kernel that failed to write a page keeps showing it as if it
    /// were written, over the end of the process that was told of it.
    pub fn forget_cache(&self) {
        // Advice: where it is not taken, nothing is worse than before.
        rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed).ok();
    }

    /// Lets the host zero a range; false when it cannot do that here.
    ///
    /// On a block device the same calls give zeroes for sure, with or without giving space back; `BLKDISCARD` would promise nothing of
    /// what is read afterwards.
    fn zero_by_host(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<bool> {
        let way = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        loop {
            return match rustix::fs::fallocate(&self.file, way | FallocateFlags::KEEP_SIZE, offset, len) {
                Ok(()) => Ok(true),
                Err(Errno::INTR) => continue,
                // INVAL: a device with larger sectors than ours.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(false),
                Err(error) => Err(error.into()),
            };
        }
    }
}

impl Storage for FileStorage {
    fn len(&self) -> io::Result<u64> {
        if self.is_device { (&self.file).seek(SeekFrom::End(0)) } else { Ok(self.file.metadata()?.len()) }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.is_device {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.file.set_len(len)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, offset)
    }

    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        if len == 0 || self.zero_by_host(offset, len, may_unmap)? {
            return Ok(());
        }
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let piece = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROES.len());
            let (zeroes, _) = ZEROES.split_at(piece);
            self.file.write_all_at(zeroes, at)?;
            let written = u64::try_from(piece).unwrap_or(left);
            at += written;
            left -= written;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_zeroes_what_it_is_told_to_and_nothing_else() {
        for may_unmap in [false, true] {
            let storage = FileStorage::new(tempfile::tempfile().unwrap()).unwrap();
            storage.write_at(0, &[7; 300_000]).unwrap();
            storage.zero(512, 200_000, may_unmap).unwrap();
            storage.zero(0, 0, may_unmap).unwrap();
            storage.sync().unwrap();
            let mut back = vec![1; 300_000];
            storage.read_at(0, &mut back).unwrap();
            assert!(back.iter().enumerate().all(|(i, b)| *b == if (512..200_512).contains(&i) { 0 } else { 7 }));
            assert_eq!(storage.len().unwrap(), 300_000);
        }
    }

    #[test]
    fn storage_ends_where_it_ends() {
        let storage = FileStorage::new(tempfile::tempfile().unwrap()).unwrap();
        storage.set_len(1024).unwrap();
        let error = storage.read_at(1000, &mut [0; 100]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn storage_is_no_terminal_and_no_directory() {
        for path in ["/dev/null", "/"] {
            let error = FileStorage::new(File::open(path).unwrap()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path}");
        }
    }
}
