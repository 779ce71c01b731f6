//! See `tests::fuzz::etcd_reply`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::etcd_reply(data));
