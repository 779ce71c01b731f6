//! What every process does first with the images, maps and journal that it finds, whichever side it will be: a backup that was killed may be
//! started as a primary.

use std::sync::Arc;

use vmm::disk::Disk;

use super::{DirtyMap, DiskChange, DiskContent, Journal, JournalError, Point};

/// One disk to recover.
#[derive(Clone)]
pub struct Recoverable {
    /// The image.
    pub image: Arc<dyn Disk>,
    /// Its map.
    pub map: Arc<DirtyMap>,
}

/// Applies a change that was checked against nothing yet.
///
/// # Errors
/// There is no such disk, the change is not in it, or the host failed.
pub fn apply(images: &[Arc<dyn Disk>], change: &DiskChange) -> std::io::Result<()> {
    let DiskChange { disk, offset, content } = change;
    let outside =
        || std::io::Error::new(std::io::ErrorKind::InvalidData, format!("byte {offset} of disk {disk} does not exist"));
    let image = images.get(usize::from(*disk)).ok_or_else(outside)?;
    let len = match content {
        DiskContent::Bytes(bytes) => u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        DiskContent::Zeros(len) => *len,
    };
    if offset.checked_add(len).is_none_or(|end| end > image.bytes()) {
        return Err(outside());
    }
    match content {
        DiskContent::Bytes(bytes) => image.write(*offset, bytes),
        DiskContent::Zeros(len) => image.write_zeroes(vmm::disk::ByteRange { offset: *offset, len: *len }, true),
    }
}

/// Brings the images to the end of the journal, says so in the maps, and empties the journal. Afterwards each map says what its image
/// holds; the result is the point that all of them hold exactly, if there is one: bases are equal and no bits are set.
///
/// Bits stay: they are of blocks that some earlier life wrote to beside the journal.
///
/// # Errors
/// The journal's; the images' and maps' as its [`JournalError::Io`]. It may be tried again: the journal is as it was until the end.
pub fn recover(disks: &[Recoverable], journal: &mut Journal, keep: u64) -> Result<Option<Point>, JournalError> {
    let file = journal.file().clone();
    let failed = |what| {
        let file = file.clone();
        move |source| JournalError::Io { file: file.clone(), what, source }
    };
    let images: Vec<Arc<dyn Disk>> = disks.iter().map(|disk| Arc::clone(&disk.image)).collect();
    let replayed =
        journal.replay(|_, change| apply(&images, change).map_err(failed("it cannot be applied to an image")))?;
    if let Some(last) = replayed.last {
        log::info!("the journal held {} epochs, to epoch {}", replayed.records, last.epoch);
        for disk in disks {
            disk.image.flush().map_err(failed("an image cannot be synced"))?;
            // An empty epoch has no record: a base that was moved before the journal was emptied may be later.
            // And a map that knows nothing learns nothing.
            if let Some(base) = disk.map.base() {
                disk.map.set_base(Some(base.max(last))).map_err(failed("a map cannot be written"))?;
            }
        }
    }
    journal.restart(keep)?;
    let mut bases = disks.iter().map(|disk| disk.map.base().filter(|_| disk.map.dirty().is_empty()));
    let first = bases.next().flatten();
    Ok(first.filter(|_| bases.all(|base| base == first)))
}
