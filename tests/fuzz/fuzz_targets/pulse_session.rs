//! See `tests::fuzz::pulse_session`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::pulse_session(data));
