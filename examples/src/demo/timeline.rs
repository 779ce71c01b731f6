//! One run, shown.

use super::args::Kill;
use super::outcome::{Frames, Outcome, ms_between};
use super::screen::{BAD, BOLD, FAINT, GOOD};

/// Width of the bar that splits the gap, in characters.
const BAR: f64 = 60.0;

/// Prints the timeline, the split of the gap, and the verdict.
pub(super) fn print(outcome: &Outcome) {
    timeline(outcome);
    bar(outcome);
    figures(outcome);
    verdict(outcome);
}

fn timeline(outcome: &Outcome) {
    let moments = outcome.moments;
    let how = match outcome.kill {
        Kill::Process => "SIGKILL to ft-primary on a",
        Kill::Host => "both cables of a cut, then SIGKILL",
    };
    let epoch = outcome.before.epochs.map_or(String::new(), |epoch| format!(" about epoch {epoch},"));
    let acked = outcome.acked_at_kill;
    let generation = outcome.generation.map_or(String::new(), |g| format!(": generation {g}"));
    let took =
        outcome.activation_us.map_or(String::new(), |us| format!(", activated in {:.1} ms", us as f64 / 1_000.0));
    let again = outcome.frames.map_or(String::new(), |Frames { resent, delivered }| {
        format!("; {resent} frames of it said again, {delivered} to it delivered again")
    });
    let mut lines = vec![
        (moments.protected_us, "protected", "b holds the whole guest, output waits for its commits".to_owned()),
        (moments.killed_us, "killed", format!("{how},{epoch} {acked} writes acknowledged so far")),
        (moments.detected_us, "detected", "b misses its peer".to_owned()),
        (moments.granted_us, "granted", format!("the arbiter gives b the right to run{generation}")),
        (moments.activated_us, "activated", format!("the guest runs on b{took}{again}")),
    ];
    let first = moments.first_reply_us;
    lines.extend(
        first.map(|at| (at, "first reply", "to the client, on the connection that it opened before".to_owned())),
    );
    if let Some(pause) = &outcome.pause {
        let gap = pause.longest_gap(&outcome.report.acks).as_secs_f64() * 1e3;
        let before = outcome.gap_before(pause).as_secs_f64() * 1e3;
        lines.push((
            pause.from_us,
            "paused",
            format!("etcd is stopped; the client's longest gap so far: {before:.1} ms"),
        ));
        let not_armed = pause.not_armed_us.iter().flatten().max();
        lines.extend(not_armed.map(|at| (*at, "not armed", "both sides' status says so; output goes on".to_owned())));
        lines.push((
            pause.until_us,
            "goes on",
            format!("etcd runs again; longest gap since it was stopped: {gap:.1} ms"),
        ));
        lines.push((pause.armed_again_us, "armed", "a takeover would be granted again".to_owned()));
    }
    lines.extend(moments.gone_us.map(|at| (at, "gone", "a's kernel has taken all of the process apart".to_owned())));
    let all = outcome.report.acks.len();
    lines.extend(outcome.report.acks.last().map(|ack| (ack.at_us, "last write", format!("{all} acknowledged in all"))));
    lines.sort_by_key(|&(at, ..)| at);
    anstream::println!();
    for (at_us, what, note) in lines {
        let ms = ms_between(moments.killed_us, at_us);
        anstream::println!("  {ms:>+10.1} ms  {BOLD}{what:<12}{BOLD:#} {FAINT}{note}{FAINT:#}");
    }
}

/// The parts between kill and first reply, drawn to scale.
fn bar(outcome: &Outcome) {
    let parts = outcome.parts();
    let total = parts.detect + parts.arbitrate + parts.activate + parts.first_reply;
    if !total.is_finite() || total <= 0.0 {
        return;
    }
    let glyphs = ['█', '▓', '▒', '░'];
    let mut drawn = String::new();
    let mut legend = Vec::new();
    for ((name, ms), glyph) in parts.named().into_iter().zip(glyphs) {
        let width = (1..=60_u8).filter(|&cell| f64::from(cell) <= (ms / total * BAR).round()).count();
        drawn.extend(std::iter::repeat_n(glyph, width));
        legend.push(format!("{glyph} {} {ms:.1}", name.replace('_', " ")));
    }
    anstream::println!("\n  {drawn}\n  {}  (ms)", legend.join("   "));
    anstream::println!("  {BOLD}The client went without an answer for {:.1} ms.{BOLD:#}", parts.gap);
}

fn figures(outcome: &Outcome) {
    let before = &outcome.before;
    if let (Some(pause), Some(hold)) = (before.pause_us, before.hold_ms) {
        anstream::println!(
            "  {FAINT}Before: pause {:.0} / {:.0} / {:.0} us, output held {:.1} / {:.1} / {:.1} ms (p50 / p99 / max).{FAINT:#}",
            pause.p50,
            pause.p99,
            pause.max,
            hold.p50,
            hold.p99,
            hold.max
        );
    }
}

fn verdict(outcome: &Outcome) {
    let report = &outcome.report;
    let acked = report.acks.len();
    let row = |name: &str, value: String, good: bool| {
        let style = if good { GOOD } else { BAD };
        anstream::println!("  {name:<28}{style}{value}{style:#}");
    };
    anstream::println!();
    row("acknowledged writes", acked.to_string(), acked > 0);
    row("lost", report.lost().to_string(), report.lost() == 0);
    row("wrong values", report.wrong().to_string(), report.wrong() == 0);
    let survived = outcome.connection_survived();
    let connection = match (&report.connection_error, &report.same.error) {
        (Some(e), _) => format!("broke: {e}"),
        (None, Some(e)) => format!("broke while reading back: {e}"),
        (None, None) if survived => "survived".to_owned(),
        (None, None) => "did not work for long enough after the takeover".to_owned(),
    };
    row("client's connection", connection, survived);
    if let Some(pause) = &outcome.pause {
        let (said, good) = match (pause.left_for.as_slice(), pause.as_promised()) {
            ([], true) => ("protected, not armed, armed again".to_owned(), true),
            ([], false) => ("nobody said that it was not armed".to_owned(), false),
            (left, _) => (format!("protection was lost: {}", left.join(", ")), false),
        };
        row("while etcd was stopped", said, good);
    }
    if let Some(e) = &report.fresh.error {
        row("new connection", format!("failed: {e}"), false);
    }
    let (word, style) = if outcome.passed() { ("PASSED", GOOD) } else { ("FAILED", BAD) };
    anstream::println!("\n  {style}{word}{style:#} {FAINT}seed {}{FAINT:#}", outcome.seed);
    if let Some(files) = &outcome.files {
        anstream::println!("  Logs and state of both sides: {files}");
    }
}
