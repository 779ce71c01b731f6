//! See `vmm::fuzzing::sections`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::fuzzing::sections(data));
