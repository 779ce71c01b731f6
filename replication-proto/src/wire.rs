//! Messages as bytes. Everything is little-endian; docs/protocol.md draws it.

pub(crate) mod codec;
pub(crate) mod disk;
pub(crate) mod frame;
pub(crate) mod header;
pub(crate) mod messages;
pub(crate) mod pages;
pub(crate) mod patch;
pub(crate) mod zstd;
