//! What the fuzz targets do, one function each: bytes in, a panic when a rule is broken. The targets of `tests/fuzz` call them under
//! libFuzzer; `corpus_replay` calls them on stable with what the fuzzer once found, and with the seeds.
//!
//! Those of the machine, whose decoders are private to `vmm`, are in `vmm::fuzzing`.

#[expect(
    dead_code,
    clippy::unwrap_used,
    reason = "the protocol's own tests share it; what is wrong in it must panic here too"
)]
#[path = "../../../replication-proto/tests/protocol/support.rs"]
mod support;

mod frames;
mod guest;
mod patches;
mod sender;
mod session;
mod standby;
mod text;

pub use frames::{header, message, pages};
pub use guest::{model_frames, resp};
pub use patches::patches;
pub use sender::{pulse_session, sender_session};
pub use session::receiver_session;
pub use standby::standby;
pub use text::{config, control, etcd_reply, generation, record};

/// What one target does with one input.
pub type Body = fn(&[u8]);

/// All targets by name: the name of the program in `tests/fuzz`, of its folder in `tests/corpus` and in `tests/corpus/regressions`.
pub const TARGETS: [(&str, Body); 15] = [
    ("header", header),
    ("message", message),
    ("pages", pages),
    ("patches", patches),
    ("receiver_session", receiver_session),
    ("sender_session", sender_session),
    ("pulse_session", pulse_session),
    ("standby", standby),
    ("control", control),
    ("config", config),
    ("record", record),
    ("etcd_reply", etcd_reply),
    ("generation", generation),
    ("resp", resp),
    ("model_frames", model_frames),
];

/// A text that a person or a log will see came partly from outside: it must not move a terminal's cursor or begin a line of its own.
#[track_caller]
fn assert_harmless(text: &str) {
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "control characters in {text:?}");
}
