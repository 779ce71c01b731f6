//! See `tests::fuzz::receiver_session`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::receiver_session(data));
