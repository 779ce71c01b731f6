//! Where things are in the program's RAM. A function of the size of RAM alone, so that both hosts agree without a word.
//!
//! ```text
//! 0x0000  nothing (a null pointer faults in no page of ours)
//! 0x1000  store header: magic, heap, free lists
//! 0x2000  connection table, 128 bytes each
//! 0x10000 rings: for each connection 128 KiB received, 128 KiB to send
//!         pages for the dirtying load: a quarter of RAM
//!         buckets of the hash table
//!         heap, to the end of low RAM
//! ```

use crate::memory::{GuestRam, PAGE_SIZE};

/// Bytes in a ring.
pub(super) const RING: u32 = 128 << 10;
/// Bytes in a record of the connection table.
pub(super) const RECORD: usize = 128;
/// Most connections.
const MAX_CONNECTIONS: u64 = 64;
/// The store's header.
pub(super) const STORE: u64 = 0x1000;
/// The connection table.
pub(super) const TABLE: u64 = 0x2000;
const RINGS: u64 = 0x1_0000;
const PAGE: u64 = PAGE_SIZE as u64;

/// Addresses that depend on the size of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Entries of the connection table.
    pub(super) connections: usize,
    /// First address of the dirtying load's pages.
    pub(super) load: u64,
    /// Number of those pages.
    pub(super) load_pages: u64,
    /// First address of the bucket table.
    pub(super) buckets: u64,
    /// Number of buckets, a power of two.
    pub(super) bucket_count: u64,
    /// First address of the heap.
    pub(super) heap: u64,
    /// End of the heap.
    pub(super) end: u64,
}

impl Layout {
    /// The layout of this RAM. The smallest RAM there is, 2 MiB, has room for two connections.
    pub(super) fn of(ram: &GuestRam) -> Self {
        let end = ram.regions().first().map_or(0, |region| region.pages * PAGE);
        let quarter = end / 4;
        let pair = u64::from(2 * RING);
        let connections = (quarter / pair).clamp(1, MAX_CONNECTIONS);
        let load = RINGS + connections * pair;
        let load_pages = quarter / PAGE;
        let buckets = load + load_pages * PAGE;
        let bucket_count = 1 << ((end.saturating_sub(buckets)) / 1024).max(1).ilog2();
        let heap = buckets + bucket_count * 8;
        assert!(heap < end, "guest RAM is a multiple of 2 MiB");
        Self {
            connections: usize::try_from(connections).unwrap_or(1),
            load,
            load_pages,
            buckets,
            bucket_count,
            heap,
            end,
        }
    }

    /// Received bytes of a connection.
    pub(super) fn received(&self, connection: usize) -> u64 {
        RINGS + connection as u64 * u64::from(2 * RING)
    }

    /// Bytes to send of a connection.
    pub(super) fn outgoing(&self, connection: usize) -> u64 {
        self.received(connection) + u64::from(RING)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_of_ram_has_room_for_all_parts() {
        for mib in [2, 4, 8, 64, 256] {
            let layout = Layout::of(&GuestRam::new(mib << 20).unwrap());
            assert!(layout.load >= layout.outgoing(layout.connections - 1) + u64::from(RING));
            assert!(layout.end - layout.heap > (mib << 20) / 8, "{mib} MiB: {layout:?}");
            assert!(TABLE + (layout.connections * RECORD) as u64 <= RINGS);
        }
    }
}
