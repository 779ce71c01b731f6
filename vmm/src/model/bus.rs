//! The program's way to guest RAM: typed loads and stores that fail like a bus does, never like Rust does.

use vm_memory::{Bytes, GuestAddress};

use crate::memory::TrackedMemory;

/// The program met something that it cannot go on from. On silicon this would be a triple fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault(pub(super) &'static str);

const OUTSIDE: Fault = Fault("an access outside of RAM");

/// Guest RAM as the program sees it. Every store is in the next dirty set.
#[derive(Clone, Copy)]
pub(super) struct Bus<'a>(pub(super) &'a TrackedMemory);

impl Bus<'_> {
    pub(super) fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Fault> {
        self.0.read_slice(into, GuestAddress(address)).map_err(|_| OUTSIDE)
    }

    pub(super) fn write(&self, address: u64, from: &[u8]) -> Result<(), Fault> {
        self.0.write_slice(from, GuestAddress(address)).map_err(|_| OUTSIDE)
    }

    pub(super) fn array<const N: usize>(&self, address: u64) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.read(address, &mut bytes)?;
        Ok(bytes)
    }

    /// `length` bytes; the caller has bounded the length.
    pub(super) fn vec(&self, address: u64, length: usize) -> Result<Vec<u8>, Fault> {
        let mut bytes = vec![0; length];
        self.read(address, &mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn u64(&self, address: u64) -> Result<u64, Fault> {
        self.array(address).map(u64::from_le_bytes)
    }

    pub(super) fn put_u64(&self, address: u64, value: u64) -> Result<(), Fault> {
        self.write(address, &value.to_le_bytes())
    }
}
