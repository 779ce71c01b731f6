//! A digest of all of guest RAM that travels with a checkpoint, when `[epoch] ram_digest` asks for it. The primary takes it of its own memory
//! while the guest is paused; an activation takes it of the standby's memory and refuses to run on a difference. So it finds what the
//! digest of a checkpoint cannot: a page that was written and never sent. It costs about 0.15 ms of pause for each MiB: for tests.

use vmm::memory::NotRam;
use vmm::{GuestRam, PAGE_SIZE, Section, SectionKind};
use xxhash_rust::xxh3::Xxh3;

/// The section that carries it.
pub const RAM_DIGEST_SECTION: SectionKind = SectionKind(SectionKind::FIRST_FOREIGN.0 + 1);
/// Version of its encoding: 16 bytes, little-endian.
pub const RAM_DIGEST_VERSION: u16 = 1;

/// Why the digest of a checkpoint and that of memory cannot be compared, or differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RamDigestError {
    /// Not 16 bytes of version 1.
    #[error("the RAM digest of the checkpoint cannot be read (version {version}, {length} bytes)")]
    Unreadable {
        /// As received.
        version: u16,
        /// As received, in bytes.
        length: usize,
    },
    /// Memory is not what it was on the primary.
    #[error("the standby's RAM has the digest {here:032x}, the primary's had {there:032x}")]
    Differs {
        /// Of the memory to be activated.
        here: u128,
        /// Of the primary's memory at the end of the committed epoch.
        there: u128,
    },
    /// A page of the machine's own list is not RAM.
    #[error(transparent)]
    NotRam(#[from] NotRam),
}

/// The digest of all of RAM, in the order of its pages.
///
/// # Errors
/// A page of the machine's own list cannot be read.
pub fn ram_digest(ram: &GuestRam) -> Result<u128, NotRam> {
    let mut hash = Xxh3::new();
    let mut page = [0; PAGE_SIZE];
    for number in ram.pages() {
        ram.copy_out(number, &mut page)?;
        hash.update(&page);
    }
    Ok(hash.digest128())
}

/// The section for a checkpoint of a paused machine.
///
/// # Errors
/// As [`ram_digest`].
pub fn digest_section(ram: &GuestRam) -> Result<Section, NotRam> {
    let bytes = ram_digest(ram)?.to_le_bytes().to_vec();
    Ok(Section { kind: RAM_DIGEST_SECTION, version: RAM_DIGEST_VERSION, bytes })
}

/// Compares memory with the digest that came with its checkpoint; hands the digest back.
///
/// # Errors
/// See [`RamDigestError`].
pub fn compare(section: &Section, ram: &GuestRam) -> Result<u128, RamDigestError> {
    let Section { kind: _, version, bytes } = section;
    let unreadable = RamDigestError::Unreadable { version: *version, length: bytes.len() };
    let there = match (*version, <[u8; 16]>::try_from(bytes.as_slice())) {
        (RAM_DIGEST_VERSION, Ok(bytes)) => u128::from_le_bytes(bytes),
        _ => return Err(unreadable),
    };
    let here = ram_digest(ram)?;
    if here == there { Ok(here) } else { Err(RamDigestError::Differs { here, there }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm::PageNo;

    #[test]
    fn one_changed_bit_is_found_and_nothing_in_a_section_is_believed() {
        let ram = GuestRam::new(2 << 20).unwrap();
        let section = digest_section(&ram).unwrap();
        assert_eq!(compare(&section, &ram), Ok(ram_digest(&ram).unwrap()));
        let mut page = [0; PAGE_SIZE];
        page[77] = 1;
        ram.copy_in(PageNo(300), &page).unwrap();
        assert!(matches!(compare(&section, &ram), Err(RamDigestError::Differs { .. })));
        for (version, length) in [(1, 0), (1, 15), (1, 17), (0, 16), (2, 16)] {
            let odd = Section { kind: RAM_DIGEST_SECTION, version, bytes: vec![0; length] };
            assert_eq!(compare(&odd, &ram), Err(RamDigestError::Unreadable { version, length }));
        }
    }
}
