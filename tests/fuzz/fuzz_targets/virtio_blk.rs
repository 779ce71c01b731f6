//! See `vmm::fuzzing::virtio_blk`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::fuzzing::virtio_blk(data));
