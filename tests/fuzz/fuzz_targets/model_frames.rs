//! See `tests::fuzz::model_frames`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::model_frames(data));
