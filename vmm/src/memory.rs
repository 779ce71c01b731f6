//! Guest RAM, page by page.

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::fs::MemfdFlags;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::own_writes::OwnWrites;
use crate::page_bits::PageBits;

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// RAM above this guest-physical address continues at [`HIGH_RAM_START`]; devices live between.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// Where RAM continues above the device hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// Sizes of guest RAM are multiples of this, so that every region's bitmap is whole words.
pub const RAM_GRANULE: u64 = 2 << 20;

/// A page of guest-physical address space: address / 4096. Not every number is RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageNo(pub u64);

impl PageNo {
    /// First address of the page.
    pub const fn address(self) -> GuestAddress {
        GuestAddress(self.0 << PAGE_SHIFT)
    }
}

/// One contiguous stretch of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// First page.
    pub first: PageNo,
    /// Number of pages, a multiple of 512.
    pub pages: u64,
}

/// Why guest RAM could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The configured size is unusable.
    #[error("guest memory of {bytes} bytes is not a positive multiple of 2 MiB")]
    Size {
        /// As configured.
        bytes: u64,
    },
    /// The host did not give the memory.
    #[error("cannot create guest memory of {bytes} bytes")]
    Create {
        /// As configured.
        bytes: u64,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
    /// The host did not map the memory.
    #[error("cannot map guest memory: {0}")]
    Map(String),
}

/// A page number that is not RAM of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page {:#x} is not guest RAM", page.0)]
pub struct NotRam {
    /// The number asked for.
    pub page: PageNo,
}

/// The memory type that devices use; each write through it is recorded in a bitmap.
pub type TrackedMemory = GuestMemoryMmap<OwnWrites>;

/// Guest RAM on a memfd, with a bitmap of the VMM's own writes.
#[derive(Debug)]
pub struct GuestRam {
    memory: TrackedMemory,
    regions: Vec<RamRegion>,
}

impl GuestRam {
    /// RAM of `bytes` bytes from guest-physical 0, with a hole below 4 GiB for larger sizes.
    pub fn new(bytes: u64) -> Result<Self, RamError> {
        if bytes == 0 || !bytes.is_multiple_of(RAM_GRANULE) {
            return Err(RamError::Size { bytes });
        }
        Self::map(bytes)
    }

    /// RAM of so many times 64 pages, less than any machine here boots in: for simulated machines, whose whole memory is copied often.
    ///
    /// # Errors
    /// See [`RamError`].
    pub fn tiny(words: u32) -> Result<Self, RamError> {
        let bytes = (u64::from(words) * 64) << PAGE_SHIFT;
        if bytes == 0 {
            return Err(RamError::Size { bytes });
        }
        Self::map(bytes)
    }

    fn map(bytes: u64) -> Result<Self, RamError> {
        let create = |source: rustix::io::Errno| RamError::Create { bytes, source: source.into() };
        let memfd: OwnedFd = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC).map_err(create)?;
        rustix::fs::ftruncate(&memfd, bytes).map_err(create)?;
        let file = std::sync::Arc::new(File::from(memfd));

        let low = bytes.min(LOW_RAM_END);
        let mut ranges = vec![(GuestAddress(0), low, 0)];
        if bytes > low {
            ranges.push((GuestAddress(HIGH_RAM_START), bytes - low, low));
        }
        let mut mapped = Vec::with_capacity(ranges.len());
        let mut regions = Vec::with_capacity(ranges.len());
        for (start, length, offset) in ranges {
            let size = usize::try_from(length).map_err(|_| RamError::Size { bytes })?;
            let backing = FileOffset::from_arc(file.clone(), offset);
            let region =
                GuestRegionMmap::from_range(start, size, Some(backing)).map_err(|e| RamError::Map(e.to_string()))?;
            mapped.push(region);
            regions.push(RamRegion { first: PageNo(start.0 >> PAGE_SHIFT), pages: length >> PAGE_SHIFT });
        }
        let memory = GuestMemoryMmap::from_regions(mapped).map_err(|e| RamError::Map(e.to_string()))?;
        Ok(Self { memory, regions })
    }

    /// The memory as devices see it. Every write through it is in the next dirty set.
    pub fn tracked(&self) -> &TrackedMemory {
        &self.memory
    }

    /// The stretches of RAM, in ascending order.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Number of pages of RAM.
    pub fn page_count(&self) -> u64 {
        self.regions.iter().map(|r| r.pages).sum()
    }

    /// Every page of RAM, ascending.
    pub fn pages(&self) -> impl Iterator<Item = PageNo> + '_ {
        self.regions.iter().flat_map(|r| (r.first.0..r.first.0 + r.pages).map(PageNo))
    }

    fn has(&self, page: PageNo) -> bool {
        self.regions.iter().any(|region| (region.first.0..region.first.0 + region.pages).contains(&page.0))
    }

    /// Copies a page out of the guest.
    pub fn copy_out(&self, page: PageNo, into: &mut [u8; PAGE_SIZE]) -> Result<(), NotRam> {
        self.memory.read_slice(into, page.address()).map_err(|_| NotRam { page })
    }

    /// Copies a page into the guest (a standby, or a restored machine). Recorded as a write of the VMM.
    pub fn copy_in(&self, page: PageNo, from: &[u8; PAGE_SIZE]) -> Result<(), NotRam> {
        self.memory.write_slice(from, page.address()).map_err(|_| NotRam { page })
    }

    /// Copies pages that lie one after another out of the guest: as many as `into` holds.
    ///
    /// # Errors
    /// One of them is no RAM.
    pub fn copy_out_run(&self, first: PageNo, into: &mut [[u8; PAGE_SIZE]]) -> Result<(), NotRam> {
        let count = u64::try_from(into.len()).unwrap_or(u64::MAX);
        self.memory.read_slice(into.as_flattened_mut(), first.address()).map_err(|_| {
            let wrong = (first.0..first.0.saturating_add(count)).map(PageNo).find(|page| !self.has(*page));
            NotRam { page: wrong.unwrap_or(first) }
        })
    }

    /// Takes the pages that the VMM itself wrote. For machines: whoever takes them owes them to the next dirty set.
    pub fn take_own_writes(&self) -> PageBits {
        let mut written = PageBits::default();
        for (region, stretch) in self.memory.iter().zip(&self.regions) {
            MmapRegion::bitmap(region).take(stretch.first, &mut written);
        }
        written
    }
}
