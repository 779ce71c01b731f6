//! Rows 1 to 16, 19, 21 and 22 of the bad-input corpus and its texts and files, made by the hundred thousand from golden sessions: each
//! case ends in a typed error or in nothing at all; no panic, no commit that was not earned, memory always that of the last commit, and
//! allocation within limits.
//!
//! One test in a program of its own, so that what it allocates can be counted.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod meter;
mod pinned;
mod stream;
#[expect(dead_code, reason = "the protocol's own tests share it")]
#[path = "../../../replication-proto/tests/protocol/support.rs"]
mod support;
mod texts;

use replication_proto::limits::{MAX_FRAME_BYTES, MAX_INPUT_BYTES};

/// Least number of cases. A generator that makes fewer has lost some.
const CASES_MIN: usize = 200_000;
const PEAK_MAX: usize = 64 << 20;
/// What a reader of frames holds: one frame, and what it was handed last; a buffer that grows doubles.
const LARGEST_OF_STREAMS: usize = 2 * (MAX_FRAME_BYTES + MAX_INPUT_BYTES);
/// The longest text that is tried has 10 MiB, and is itself one allocation.
const LARGEST_OF_TEXTS: usize = 10 << 20;

/// The families that are not about the replication link.
const TEXTS: [&str; 4] = ["control requests", "pair.toml", "arbiter's record, generation file", "etcd's answers"];

/// Counts the cases of one family.
type Family = fn() -> usize;

#[test]
fn malformed_inputs_change_nothing_and_cost_little() {
    let families: [(&str, Family); 14] = [
        ("row 1: the stream ends at every byte", stream::ends),
        ("row 2: every bit flipped", stream::flips),
        ("rows 2 to 9: every bit flipped under sound checksums", stream::sound_flips),
        ("rows 3 to 7: edges of 16, 32 and 64 bits everywhere", stream::edges),
        ("rows 4, 14: payloads cut short and prolonged", stream::cuts),
        ("rows 8, 10: frames lost, doubled, exchanged, put in", stream::sequences),
        ("rows 3, 14: compressed bodies changed", stream::compressed),
        ("row 19: what the backup answers, changed", stream::answers),
        ("row 22: heartbeats changed", stream::heartbeats),
        ("rows 3, 17, 21: as long as it may be", stream::long_ones),
        ("control requests", texts::control),
        ("pair.toml", texts::config),
        ("arbiter's record, generation file", texts::files),
        ("etcd's answers", texts::etcd),
    ];
    let resident = meter::resident();
    let (mut cases, mut peak) = (0, 0);
    let mut largest = [0, 0];
    for (name, family) in families {
        let began = std::time::Instant::now();
        let mut count = 0;
        let used = meter::measure(|| count = family());
        println!(
            "{count:>8} cases, peak {:>6} KiB, largest {:>5} KiB, {:>6} ms: {name}",
            used.peak >> 10,
            used.largest >> 10,
            began.elapsed().as_millis()
        );
        assert!(count > 0, "{name}: no cases");
        cases += count;
        peak = peak.max(used.peak);
        let of_texts = usize::from(TEXTS.contains(&name));
        largest[of_texts] = largest[of_texts].max(used.largest);
    }
    let used = meter::measure(pinned::small_pages_among_large_frames);
    peak = peak.max(used.peak);
    let grown = meter::resident().saturating_sub(resident);
    let mib = |bytes: usize| format!("{:.1} MiB", f64::from(u32::try_from(bytes >> 10).unwrap()) / 1024.0);
    println!(
        "{cases} malformed cases, 0 panics, 0 commits changed, peak {}, largest allocation {}, resident grew by {}",
        mib(peak),
        mib(largest[0].max(largest[1])),
        mib(grown)
    );
    assert!(cases >= CASES_MIN, "{cases} cases");
    assert!(peak <= PEAK_MAX && grown <= PEAK_MAX, "peak {}, grown by {}", mib(peak), mib(grown));
    let [of_streams, of_texts] = largest;
    assert!(of_streams <= LARGEST_OF_STREAMS, "an allocation of {} by what a peer sent", mib(of_streams));
    assert!(of_texts <= LARGEST_OF_TEXTS, "an allocation of {} by a text", mib(of_texts));
}
