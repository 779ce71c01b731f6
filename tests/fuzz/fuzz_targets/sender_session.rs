//! See `tests::fuzz::sender_session`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::sender_session(data));
