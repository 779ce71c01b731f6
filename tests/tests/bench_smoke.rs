//! The benchmark binary measures something and says it in both forms.

use std::process::Command;

use serde_json::Value;
use tests::machine::no_kvm;
use tests::real::MachineKind;
use tests::real::scene::play;

#[test]
fn pause_is_measured_beside_its_floor() {
    if no_kvm("pause_is_measured_beside_its_floor") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("pause.json");
    let output = Command::new(env!("CARGO_BIN_EXE_ftbench"))
        .args(["pause", "--samples", "20", "--pages", "100", "--json"])
        .arg(&json)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("whole/floor"));
    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["schema"], "ft.bench.pause/1");
    let [row] = report["rows"].as_array().unwrap().as_slice() else { panic!("one row: {report}") };
    assert_eq!(row["samples"], 20);
    let number = |field: &str| row[field]["p50"].as_f64().unwrap_or_else(|| panic!("{field}: {row}"));
    assert!(number("dirty_pages") >= 52.0, "{row}");
    for field in ["stop_us", "capture_us", "dirty_us", "stage_us", "whole_us", "floor_kick_us", "floor_us"] {
        assert!(number(field) > 0.0, "{field}: {row}");
    }
    assert!(number("whole_us") > number("stage_us"), "{row}");
    assert!(row["ratio_p50"].as_f64().unwrap() > 0.0, "{row}");
}

#[test]
fn disk_is_measured_with_and_without_a_backup() {
    // Its timers are patient, but two pairs at once would leave little of the processors to measure.
    play(MachineKind::Kvm, "bench_disk", |_| {
        let dir = tempfile::tempdir().expect("a directory");
        let json = dir.path().join("disk.json");
        let output = Command::new(env!("CARGO_BIN_EXE_ftbench"))
            .args([
                "disk",
                "--runs",
                "1",
                "--seconds",
                "1",
                "--disk",
                "16MiB",
                "--only",
                "a flush after each",
                "--json",
            ])
            .arg(&json)
            .output()
            .expect("it starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8_lossy(&output.stdout).contains("random writes, 4 KiB, a flush after each"));
        let report: Value = serde_json::from_slice(&std::fs::read(&json).expect("a file")).expect("JSON");
        assert_eq!(report["schema"], "ft.bench.disk/1");
        let [row] = report["rows"].as_array().expect("rows").as_slice() else { panic!("one row: {report}") };
        for side in ["solo", "protected"] {
            let number = |of: &str, field: &str| row[side][of][field].as_f64().unwrap_or_else(|| panic!("{of}: {row}"));
            assert!(number("latency_us", "p50") > 0.0 && number("flush_us", "p99") > 0.0, "{row}");
            assert!(row[side]["iops_median"].as_f64().is_some_and(|iops| iops > 1.0), "{row}");
            assert_eq!(row[side]["errors"], 0);
        }
        assert!(row["iops_ratio_median"].as_f64().is_some_and(|ratio| ratio > 0.0), "{row}");
        Ok(())
    });
}

/// Bytes do not depend on the host: these are the figures that are asked for.
#[test]
fn wire_bytes_are_in_proportion_to_what_changed() {
    let dir = tempfile::tempdir().expect("a directory");
    let json = dir.path().join("wire.json");
    let output = Command::new(env!("CARGO_BIN_EXE_ftbench"))
        .args(["wire", "--pages", "1000", "--epochs", "4", "--rounds", "1", "--json"])
        .arg(&json)
        .output()
        .expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&std::fs::read(&json).expect("a file")).expect("JSON");
    assert_eq!(report["schema"], "ft.bench.wire/1");
    let ratio = |change: &str, patches: bool| {
        let lines = report["lines"].as_array().expect("lines").iter();
        let found = lines.filter(|line| line["change"] == change && line["patches"] == patches);
        found.map(|line| line["wire_ratio"].as_f64().expect("a number")).next().expect("this line")
    };
    assert!(ratio("line", true) <= 0.1 && ratio("scattered", true) <= 0.1, "{report}");
    assert!(ratio("whole", true) <= 1.02 && ratio("whole", false) <= 1.02, "{report}");
    assert!(ratio("line", false) > 0.99, "{report}");
}
