//! The status for people. Text from outside is stripped of control characters: a name must not drive the terminal.

use std::fmt::Write;

use super::{Distribution, NodeRole, Status};
use crate::config::format_size;
use crate::decide::StateName;

fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn span(seconds: f64) -> String {
    match seconds {
        s if s < 0.001 => format!("{:.0} us", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s if s < 60.0 => format!("{s:.1} s"),
        s if s < 3600.0 => format!("{:.0}m{:02.0}s", (s / 60.0).floor(), (s % 60.0).floor()),
        s => format!("{:.0}h{:02.0}m", (s / 3600.0).floor(), (s % 3600.0 / 60.0).floor()),
    }
}

fn or_dash(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "-".into(), span)
}

fn short_state(state: StateName) -> &'static str {
    match state {
        StateName::Solo | StateName::Resync | StateName::Protected | StateName::Contending => "running",
        StateName::SwitchingOver => "handing over",
        StateName::InSync => "in sync",
        other => other.word(),
    }
}

fn quantiles(of: &Distribution) -> String {
    if of.count == 0 {
        return "-".into();
    }
    format!("{:.1}/{:.1} ms", of.p50_seconds * 1e3, of.p99_seconds * 1e3)
}

/// The status block.
pub(super) fn render(s: &Status) -> String {
    let mut out = String::new();
    let line = |out: &mut String, text: String| {
        // Writing to a string does not fail.
        let _ = writeln!(out, "{text}");
    };
    let id = s.vm_id.get(..8).unwrap_or(&s.vm_id);
    let since = clean(&s.since).replace('T', " ");
    line(
        &mut out,
        format!(
            "VM {} ({}…)  {}   state {}   gen {}   epoch {}   since {since} ({})",
            clean(&s.vm),
            clean(id),
            s.headline(),
            s.state.word(),
            s.generation,
            grouped(s.epoch),
            span(s.state_seconds)
        ),
    );
    nodes(&mut out, s);
    let failover = if s.armed { "armed (backup in sync, its arbiter reachable)" } else { "NOT armed" };
    line(&mut out, format!("Failover:  {failover}"));
    if !s.protected || !s.armed || !s.next_step.is_empty() {
        let next = if s.next_step.is_empty() { String::new() } else { format!(". Next: {}", clean(&s.next_step)) };
        line(&mut out, format!("{} ({}) - {}{next}", s.headline(), s.state.word(), clean(&s.reason_text)));
    }
    protection(&mut out, s);
    if !s.link.up && !s.link.text.is_empty() {
        line(&mut out, format!("Link:  {}", clean(&s.link.text)));
    }
    let t = &s.timings;
    line(
        &mut out,
        format!(
            "Epoch p50/p99: pause {}  transfer {}  ack {}  output hold {}",
            quantiles(&t.pause),
            quantiles(&t.transfer),
            quantiles(&t.ack),
            quantiles(&t.output_hold)
        ),
    );
    pacing(&mut out, s);
    overload(&mut out, s);
    capture(&mut out, s);
    let o = &s.output;
    line(
        &mut out,
        format!(
            "Output {}: {} frames / {} held (cap {}), {} released, {} dropped",
            clean(&o.gate),
            grouped(o.held_frames),
            format_size(o.held_bytes),
            format_size(o.limit_bytes),
            grouped(o.released_frames_total),
            grouped(o.dropped_frames_total)
        ),
    );
    if s.machine != "kvm" {
        line(&mut out, format!("Machine:  {} (NOT a KVM guest)", clean(&s.machine)));
    }
    let warnings = if s.warnings.is_empty() { "none".into() } else { clean(&s.warnings.join("; ")) };
    line(&mut out, format!("Warnings: {warnings}"));
    out
}

/// What decides when epochs end, and how that goes.
fn pacing(out: &mut String, s: &Status) {
    let p = &s.pacing;
    let percent = |ratio: f64| format!("{:.1} %", ratio * 100.0);
    let target = p.target_seconds.map(span).or_else(|| p.target_ratio.map(percent)).unwrap_or_default();
    let _ = write!(out, "Pacing:  {} {target}", clean(&p.mode));
    if p.commit_seconds > 0.0 {
        let _ = write!(
            out,
            ": {:.0} epochs/s, guest loses {}, commit {}, added to a reply p50/p99 {}/{}",
            p.epochs_per_second,
            percent(p.guest_lost_ratio),
            span(p.commit_seconds),
            span(p.reply_added_p50_seconds),
            span(p.reply_added_p99_seconds)
        );
    }
    let met = match p.met {
        Some(false) => " - TARGET NOT MET",
        _ => "",
    };
    let text = if p.text.is_empty() { String::new() } else { format!(" ({})", clean(&p.text)) };
    let _ = writeln!(out, "{met}{text}");
}

/// What is slower than the guest, and what is done about it.
fn overload(out: &mut String, s: &Status) {
    let o = &s.overload;
    if o.overloaded {
        let _ = writeln!(out, "OVERLOADED:  for {}: {}", span(o.seconds), clean(&o.text));
    } else if o.count > 0 {
        let _ = writeln!(out, "Overload:  none now, {} so far (policy {})", grouped(o.count), clean(&o.policy));
    }
}

/// How pages come out of the guest, and what was done.
fn capture(out: &mut String, s: &Status) {
    let c = &s.capture;
    if c.strategy.is_empty() {
        return;
    }
    let now = match (c.protects, c.precopies) {
        (true, true) => " (now: before the pause, and on write)",
        (true, false) => " (now: on write)",
        (false, true) => " (now: before the pause)",
        (false, false) => "",
    };
    let _ = writeln!(
        out,
        "Capture: {}, pre-copy {}{now}: {} pages before pauses, {} of them again; {} write-protected, {} of them copied on write",
        clean(&c.strategy),
        clean(&c.precopy),
        grouped(c.precopied_pages_total),
        grouped(c.precopied_again_total),
        grouped(c.protected_pages_total),
        grouped(c.copied_on_write_total)
    );
}

/// How far the next protection is, and for how long there has been none.
fn protection(out: &mut String, s: &Status) {
    if s.resync_total_bytes > 0 {
        let done = s.resync_total_bytes.saturating_sub(s.resync_remaining_bytes);
        let percent = done.saturating_mul(100) / s.resync_total_bytes;
        let mib = |bytes: u64| bytes >> 20;
        let left = s.resync_left_seconds.map_or(String::new(), |left| format!(", {} left", span(left)));
        let total = mib(s.resync_total_bytes);
        let _ = writeln!(out, "Resync:  {percent} % ({} of {total} MiB){left}", mib(done));
    }
    if let Some(wait) = s.protects_in_seconds {
        let _ = writeln!(out, "Next base:  not before {}", span(wait));
    }
    if let Some(seconds) = s.unprotected_seconds {
        let _ = writeln!(out, "Unprotected:  for {} ({} in all)", span(seconds), span(s.unprotected_seconds_total));
    }
}

fn nodes(out: &mut String, s: &Status) {
    let row = |out: &mut String, cells: [&str; 8]| {
        let [node, role, state, epoch, lag, link, arbiter, seen] = cells;
        let _ =
            writeln!(out, "  {node:<10} {role:<8} {state:<13} {epoch:<12} {lag:<16} {link:<18} {arbiter:<14} {seen}");
    };
    row(out, ["NODE", "ROLE", "STATE", "EPOCH", "LAG", "LINK", "ARBITER", "SEEN"]);
    let link = match (s.link.up, s.link.rtt_seconds) {
        (true, Some(rtt)) => format!("up  {} rtt", span(rtt)),
        (true, None) => "up".into(),
        (false, _) => "DOWN".into(),
    };
    let arbiter = |age: Option<f64>| age.map_or_else(|| "-".to_owned(), |age| format!("ok {} ago", span(age)));
    let lag = format!("{} ep / {}", s.lag_epochs, or_dash(s.lag_seconds));
    let (own_lag, peer_lag) = if s.role == NodeRole::Backup { (lag.as_str(), "-") } else { ("-", lag.as_str()) };
    row(
        out,
        [
            &clean(&s.node),
            s.role.word(),
            short_state(s.state),
            &grouped(s.epoch),
            own_lag,
            &link,
            &arbiter(s.arbiter.age_seconds),
            "here",
        ],
    );
    let (peer_role, heard) = match s.role {
        NodeRole::Primary => ("backup", s.peer.seen_age_seconds.is_some()),
        NodeRole::Backup => ("primary", s.peer.seen_age_seconds.is_some()),
    };
    let peer_state = if heard { "heard" } else { "not heard" };
    row(
        out,
        [
            &clean(&s.peer.node),
            peer_role,
            peer_state,
            &grouped(s.peer.epoch),
            peer_lag,
            "",
            &arbiter(s.peer.arbiter_age_seconds),
            &or_dash(s.peer.seen_age_seconds),
        ],
    );
}
