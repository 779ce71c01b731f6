//! The benchmark binary measures something and says it in both forms.

use std::process::Command;

use serde_json::Value;
use tests::machine::no_kvm;

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
