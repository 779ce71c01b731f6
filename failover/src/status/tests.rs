use std::time::Duration;

use super::tests_support::{board, view};
use super::*;
use crate::decide::View;

#[test]
fn json_reads_as_itself_and_names_its_schema() {
    let board = board();
    board.apply(&view(StateName::Protected));
    let status = board.snapshot();
    let read: Status = serde_json::from_str(&status.to_json()).unwrap();
    assert_eq!(read.schema, "ft.status/1");
    assert_eq!(read.state, StateName::Protected);
    assert!(read.protected && read.armed);
    assert!(status.to_json().contains("\"reason\":\"covered\""));
    assert!(read.since.ends_with('Z'), "{}", read.since);
}

#[test]
fn a_degraded_status_says_why_and_what_to_do() {
    let board = board();
    board.apply(&view(StateName::Protected));
    assert_eq!(board.snapshot().headline(), "PROTECTED");
    board.apply(&view(StateName::Solo));
    let text = board.snapshot().to_table();
    assert!(text.contains("DEGRADED (solo) - the backup went silent. Next: check the replication link"), "{text}");
    assert!(text.contains("NOT armed") && text.contains("insecure_lab"), "{text}");
    let fenced = View { owner: false, protected: false, ..view(StateName::Fenced) };
    board.apply(&fenced);
    let status = board.snapshot();
    assert_eq!((status.headline(), status.role, status.counters.fenced), ("FENCED", NodeRole::Primary, 1));
}

#[test]
fn a_side_on_its_way_to_protection_says_how_far_it_is() {
    let board = board();
    board.apply(&View { protects_in: Some(Duration::from_secs(12)), ..view(StateName::Solo) });
    let text = board.snapshot().to_table();
    assert!(text.contains("Next base:  not before 12.0 s") && text.contains("Unprotected:  for "), "{text}");
    board.apply(&view(StateName::Resync));
    board.update(|status| {
        (status.resync_total_bytes, status.resync_remaining_bytes) = (256 << 20, 146 << 20);
        status.resync_left_seconds = Some(12.0);
    });
    let text = board.snapshot().to_table();
    assert!(text.contains("Resync:  42 % (110 of 256 MiB), 12.0 s left"), "{text}");
    assert!(!text.contains("Next base"), "{text}");
    board.apply(&view(StateName::Protected));
    let status = board.snapshot();
    assert!(status.unprotected_seconds.is_none() && status.unprotected_seconds_total > 0.0);
}

#[test]
fn an_overload_is_explained_and_remembered() {
    let board = board();
    assert!(!board.snapshot().to_table().to_lowercase().contains("overload"));
    board.update(|status| {
        status.overload = OverloadStatus {
            overloaded: true,
            seconds: 3.0,
            count: 1,
            throttle_ratio: 0.4,
            text: "the link is slow".into(),
            ..OverloadStatus::configured(crate::config::Overload::Throttle)
        };
    });
    let status = board.snapshot();
    assert!(status.to_table().contains("OVERLOADED:  for 3.0 s: the link is slow"), "{}", status.to_table());
    let metrics = status.to_prometheus();
    for line in ["ft_overloaded 1", "ft_overloads_total 1", "ft_throttle_ratio 0.4"] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
    board.update(|status| status.overload.overloaded = false);
    let text = board.snapshot().to_table();
    assert!(text.contains("Overload:  none now, 1 so far (policy throttle)"), "{text}");
}

#[test]
fn escape_sequences_do_not_reach_the_terminal() {
    let board = board();
    board.update(|status| {
        status.vm = "web\u{1b}[2J\n".into();
        status.warnings.push("bad \u{7}\u{9b}31m".into());
    });
    let text = board.snapshot().to_table();
    assert!(!text.contains(['\u{1b}', '\u{7}', '\u{9b}']), "{text:?}");
}

#[test]
fn percentiles_and_buckets_of_known_durations() {
    let board = board();
    for micros in 1..=1000 {
        board.observe(Timing::Pause, Duration::from_micros(micros));
    }
    let pause = board.snapshot().timings.pause;
    assert_eq!(pause.count, 1000);
    assert!((pause.p50_seconds - 0.0005).abs() < 0.00002, "{pause:?}");
    assert!((pause.p99_seconds - 0.00099).abs() < 0.00002, "{pause:?}");
    assert_eq!(pause.buckets.iter().sum::<u64>(), 1000);
    assert!(pause.buckets[0].abs_diff(100) <= 1, "{pause:?}");
}

#[test]
fn metrics_have_conventional_names_and_one_state_is_set() {
    let board = board();
    board.apply(&view(StateName::Protected));
    board.observe(Timing::Pause, Duration::from_millis(2));
    board.update(|status| {
        status.counters.failovers.insert("takeover".into(), 1);
        status.counters.protocol_errors.insert("malformed".into(), 3);
    });
    let text = board.snapshot().to_prometheus();
    for line in [
        "ft_protected 1",
        "ft_failover_armed 1",
        "ft_generation 7",
        "ft_state{state=\"protected\"} 1",
        "ft_state{state=\"solo\"} 0",
        "ft_role{role=\"primary\"} 1",
        "ft_epochs_total{result=\"committed\"} 0",
        "ft_failovers_total{cause=\"takeover\"} 1",
        "ft_protocol_errors_total{code=\"malformed\"} 3",
        "ft_epoch_pause_seconds_bucket{le=\"0.0025\"} 1",
        "ft_epoch_pause_seconds_bucket{le=\"+Inf\"} 1",
        "ft_epoch_pause_seconds_count 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert_eq!(text.lines().filter(|line| line.starts_with("ft_state{") && line.ends_with(" 1")).count(), 1);
}

#[test]
fn ages_grow_when_the_event_loop_stops() {
    let board = board();
    board.apply(&view(StateName::Protected));
    let before = board.snapshot().arbiter.age_seconds.unwrap();
    while board.idle_for() < Duration::from_millis(20) {
        std::thread::yield_now();
    }
    assert!(board.snapshot().arbiter.age_seconds.unwrap() >= before + 0.019);
}

#[test]
fn what_capture_did_is_shown_by_a_side_that_runs_the_guest() {
    let board = board();
    board.apply(&view(StateName::Protected));
    assert!(!board.snapshot().to_table().contains("Capture:"));
    let capture = CaptureStatus {
        strategy: "auto".into(),
        precopy: "always".into(),
        precopies: true,
        precopied_pages_total: 12_345,
        precopied_again_total: 67,
        copied_on_write_total: 8,
        ..CaptureStatus::default()
    };
    board.update(|status| status.capture = capture);
    let text = board.snapshot().to_table();
    let line = "Capture: auto, pre-copy always (now: before the pause): 12,345 pages before pauses, 67 of them again";
    assert!(text.contains(line), "{text}");
    let text = board.snapshot().to_prometheus();
    for line in [
        "ft_capture{strategy=\"auto\"} 1",
        "ft_capture_pages_total{how=\"precopied_again\"} 67",
        "ft_capture_pages_total{how=\"copied_on_write\"} 8",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}
