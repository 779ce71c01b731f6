//! See `tests::fuzz::generation`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::generation(data));
