//! Every bound of the protocol in one place. What is over a bound is refused by the reader and never produced by the writer.

/// Bytes of one page of guest memory.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 80;
/// Most bytes of a frame's payload.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;
/// Most bytes of a frame.
pub const MAX_FRAME_BYTES: usize = HEADER_BYTES + MAX_PAYLOAD_BYTES;
/// Most bytes given to one call of `handle_bytes`.
pub const MAX_INPUT_BYTES: usize = 1 << 20;
/// Most pages of one Pages message. Small enough that one message's pages stay in a core's cache between checksum, digest and copy.
pub const MAX_PAGES_PER_MESSAGE: usize = 64;
/// Most bytes of a patch: a page that changed more is sent as a whole.
pub const MAX_PATCH_BYTES: usize = PAGE_BYTES / 2;
/// Most pages that both ends of a connection keep a copy of, for patches (64 MiB).
pub const MAX_HISTORY_PAGES: usize = 16_384;
/// Most bytes of one section, decoded.
pub const MAX_SECTION_BYTES: usize = MAX_PAYLOAD_BYTES - 4096;
/// Most bytes of one inbound frame of the guest's network.
pub const MAX_INBOUND_BYTES: usize = 65_550;
/// Most sections of one checkpoint.
pub const MAX_SECTIONS_PER_EPOCH: u32 = 4096;
/// Most facts of one hello.
pub const MAX_FACTS: usize = 512;
/// Most bytes of a fact's name.
pub const MAX_FACT_NAME_BYTES: usize = 64;
/// Most bytes of a fact's value.
pub const MAX_FACT_VALUE_BYTES: usize = 1024;
/// Most bytes of a text for people (refusal, goodbye).
pub const MAX_TEXT_BYTES: usize = 512;
/// Most questions after equal pieces that wait for their answers.
pub const MAX_QUESTIONS: usize = 64;
/// Most differences that one refusal names; the rest is left out.
pub const MAX_DIFFERENCES: usize = 64;
/// Most bytes of one value in a difference; the rest is cut off.
pub const MAX_DIFFERENCE_VALUE_BYTES: usize = 256;
/// Most ranges of guest memory.
pub const MAX_RAM_RANGES: usize = 64;
/// Every page index is below this: 52 bits of guest-physical address.
pub const PAGE_INDEX_END: u64 = 1 << 40;
/// Most pages of guest memory in all ranges together (16 TiB).
pub const MAX_RAM_PAGES: u64 = 1 << 32;
/// Most checkpoints begun and not acked.
pub const MAX_IN_FLIGHT: usize = 1024;
/// Most times that a base may send all of memory: a base without an end is a fault.
pub const MAX_BASE_PASSES: u64 = 1024;
/// Largest zstd window (as a power of 2, in bytes) that is decoded.
pub const ZSTD_WINDOW_LOG_MAX: u32 = 21;
/// Compression level; one encoder, for speed.
pub const ZSTD_LEVEL: i32 = 1;
/// Smaller sections are sent as they are.
pub const MIN_COMPRESSED_SECTION_BYTES: usize = PAGE_BYTES;

/// Bytes of the unit in which disks are addressed.
pub const SECTOR_BYTES: u64 = 512;
/// Most disks of a machine.
pub const MAX_DISKS: usize = 4;
/// Most bytes of data of one disk change.
pub const MAX_DISK_CHANGE_BYTES: usize = 256 << 10;
/// Most bytes that one change sets to zero.
pub const MAX_DISK_ZERO_BYTES: u64 = 1 << 30;
/// Most changes of one checkpoint.
pub const MAX_DISK_CHANGES_PER_EPOCH: u32 = 1 << 20;
/// Bytes of a disk that are compared by one hash.
pub const DISK_PIECE_BYTES: u64 = 4096;
/// Most pieces compared by one message.
pub const MAX_PIECES_PER_MESSAGE: usize = 4096;
/// Most differences that one answer to a comparison of both sides names.
pub const MAX_VERIFY_FINDINGS: usize = 64;
/// Most bytes of an encoded set of dirty blocks.
pub const MAX_DIRTY_BYTES: usize = 192 << 10;

const _: () = {
    // The largest of each message fits a payload.
    assert!(MAX_PAGES_PER_MESSAGE > 0 && MAX_PAGES_PER_MESSAGE <= u16::MAX as usize);
    assert!(16 + MAX_PAGES_PER_MESSAGE * (16 + PAGE_BYTES) <= MAX_PAYLOAD_BYTES);
    assert!(2 + MAX_PATCH_BYTES <= PAGE_BYTES && MAX_PATCH_BYTES <= u16::MAX as usize);
    assert!(16 + MAX_SECTION_BYTES <= MAX_PAYLOAD_BYTES);
    assert!(
        256 + 16 * MAX_RAM_RANGES + MAX_FACTS * (3 + MAX_FACT_NAME_BYTES + MAX_FACT_VALUE_BYTES) <= MAX_PAYLOAD_BYTES
    );
    assert!(
        16 + MAX_TEXT_BYTES + MAX_DIFFERENCES * (5 + MAX_FACT_NAME_BYTES + 2 * MAX_DIFFERENCE_VALUE_BYTES)
            <= MAX_PAYLOAD_BYTES
    );
    assert!(16 + MAX_DISK_CHANGE_BYTES <= MAX_PAYLOAD_BYTES && MAX_DISK_CHANGE_BYTES.is_multiple_of(512));
    assert!(16 + 16 * MAX_PIECES_PER_MESSAGE <= MAX_PAYLOAD_BYTES);
    assert!(64 + MAX_DISKS * (24 + MAX_DIRTY_BYTES) <= MAX_PAYLOAD_BYTES);
    // Lengths and counts fit the fields that carry them.
    assert!(MAX_PAYLOAD_BYTES <= u32::MAX as usize);
    assert!(MAX_FACT_NAME_BYTES <= u8::MAX as usize);
    let in_16_bits =
        [MAX_FACT_VALUE_BYTES, MAX_TEXT_BYTES, MAX_DIFFERENCE_VALUE_BYTES, MAX_FACTS, MAX_RAM_RANGES, MAX_DIFFERENCES];
    let mut n = 0;
    while n < in_16_bits.len() {
        assert!(in_16_bits[n] <= u16::MAX as usize);
        n += 1;
    }
    // A page index times the page size is an address in 64 bits.
    assert!(PAGE_INDEX_END <= u64::MAX / PAGE_BYTES as u64);
    assert!(MAX_RAM_PAGES.checked_mul(MAX_BASE_PASSES).is_some());
};
