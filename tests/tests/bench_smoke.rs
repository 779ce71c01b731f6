//! The benchmark binary measures something and says it in both forms. Sizes are tiny: nothing here is a figure, and no target has to be met.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tests::machine::no_kvm;
use tests::real::MachineKind;
use tests::real::scene::{play, tool_wanted};

fn ftbench(words: &str, json: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ftbench"));
    command.args(words.split_whitespace()).arg("--json").arg(json).output().expect("it starts")
}

/// What a subcommand prints and what it writes; its schema is `schema`.
fn measured(words: &str, schema: &str) -> (String, Value) {
    let dir = tempfile::tempdir().expect("a directory");
    let json = dir.path().join("result.json");
    let output = ftbench(words, &json);
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&std::fs::read(&json).expect("a file")).expect("JSON");
    assert_eq!(report["schema"], schema, "{words}");
    assert!(report["targets"].is_array(), "{report}");
    (String::from_utf8_lossy(&output.stdout).into_owned(), report)
}

fn rows(report: &Value) -> &[Value] {
    report["rows"].as_array().expect("rows")
}

fn number(row: &Value, field: &str, point: &str) -> f64 {
    row[field][point].as_f64().unwrap_or_else(|| panic!("{field}.{point}: {row}"))
}

fn figure(row: &Value, field: &str) -> f64 {
    row[field].as_f64().unwrap_or_else(|| panic!("{field}: {row}"))
}

#[test]
fn pause_is_measured_beside_its_floor() {
    if no_kvm("pause_is_measured_beside_its_floor") {
        return;
    }
    let words = "pause --runs 2 --samples 10 --pages 100 --memory 256MiB --vcpus 1,2";
    let (said, report) = measured(words, "ft.bench.pause/2");
    assert!(said.contains("pause/floor") && said.contains("2 vCPUs over 1"), "{said}");
    let [one, two] = rows(&report) else { panic!("two rows: {report}") };
    assert_eq!((one["vcpus"].as_u64(), two["vcpus"].as_u64()), (Some(1), Some(2)));
    for row in [one, two] {
        assert_eq!(row["run_pause_p50_us"].as_array().map(Vec::len), Some(2), "{row}");
        assert!(number(row, "dirty_pages", "p50") >= 52.0, "{row}");
        let parts = ["stop_us", "capture_us", "dirty_us", "stage_us", "whole_us", "floor_kick_us", "floor_us"];
        assert!(parts.iter().all(|part| number(row, part, "p50") > 0.0), "{row}");
        // Until the guest was seen to run is longer than until it was told to.
        assert!(number(row, "pause_us", "p50") >= number(row, "whole_us", "p50"), "{row}");
        assert!(number(row, "floor_us", "p50") >= number(row, "floor_whole_us", "p50"), "{row}");
        assert!(figure(row, "ratio_p50") > 0.0 && figure(row, "tail_ratio") > 0.0, "{row}");
    }
    let targets = report["targets"].as_array().expect("targets");
    assert_eq!(targets.len(), 4, "a ratio and a tail for each row: {report}");
    assert!(targets.iter().all(|target| target["met"].is_boolean() && target["limit"].is_number()), "{report}");
}

#[test]
fn ways_to_know_what_was_written_find_the_same_pages() {
    if no_kvm("ways_to_know_what_was_written_find_the_same_pages") {
        return;
    }
    let words = "tracking --runs 1 --samples 10 --pages 100 --memory 64MiB";
    let (said, report) = measured(words, "ft.bench.tracking/1");
    assert!(said.contains("dirty ring") && said.contains("manual clear"), "{said}");
    let methods: Vec<&str> = rows(&report).iter().filter_map(|row| row["method"].as_str()).collect();
    assert_eq!(methods, ["plain", "manual", "hot", "ring"]);
    for row in rows(&report).iter().filter(|row| row["offered"] == true) {
        assert!(number(row, "guest_writes_us", "p50") > 0.0 && number(row, "collect_us", "p50") > 0.0, "{row}");
    }
    assert_eq!(rows(&report)[0]["offered"], true, "every KVM has a dirty log");
}

#[test]
fn qemu_is_measured_beside_the_pause() {
    if !tool_wanted("qemu-system-x86_64", "FT_NO_QEMU") {
        return;
    }
    play(MachineKind::Kvm, "bench_qemu", |_| {
        let (said, report) = measured("qemu --runs 1 --samples 10 --pages 500", "ft.bench.qemu/1");
        assert!(said.contains("QEMU silent us"), "{said}");
        let [row] = rows(&report) else { panic!("one row: {report}") };
        let run = &row["runs"][0];
        let (least, most) = (figure(run, "qemu_silence_least_us"), figure(run, "qemu_silence_most_us"));
        assert!(0.0 < least && least < most && most < 10e6, "{run}");
        assert!(number(row, "pause_us", "p50") > 0.0 && figure(row, "silence_ratio") > 0.0, "{row}");
        Ok(())
    });
}

#[test]
fn clients_and_epochs_are_measured_in_every_mode() {
    play(MachineKind::Kvm, "bench_modes", |_| {
        let words = "latency --rounds 1 --seconds 1 --fixed 25ms --adaptive latency=2ms";
        let (said, report) = measured(words, "ft.bench.latency/2");
        let modes: Vec<&str> = rows(&report).iter().filter_map(|row| row["mode"].as_str()).collect();
        assert_eq!(modes, ["unprotected", "25ms", "latency=2ms"]);
        assert!(said.contains("p50 over unprotected, us; latency=2ms"), "{said}");
        for row in rows(&report) {
            let curve = row["curve_us"].as_array().expect("a curve");
            let values: Vec<f64> = curve.iter().map(|point| figure(point, "value")).collect();
            assert!(values.len() > 10 && values.is_sorted() && values[0] > 0.0, "{row}");
        }
        let words = "epochs --rounds 1 --seconds 1 --other-seconds 1";
        let (said, report) = measured(words, "ft.bench.epochs/2");
        assert!(said.contains("hot pages") && said.contains("plain"), "{said}");
        assert_eq!(rows(&report).len(), 6, "three loads, each with both ways of tracking: {report}");
        for row in rows(&report) {
            assert!(figure(row, "committed_per_second") > 1.0 && figure(row, "guest_keeps_ratio") > 0.0, "{row}");
            assert!(row["most_in_flight"].as_u64().is_some_and(|most| most <= 3), "{row}");
        }
        Ok(())
    });
}

/// A strategy that the programs do not have is refused before anything is measured; one that they have is measured.
#[test]
fn strategies_are_measured_or_refused_in_words() {
    play(MachineKind::Kvm, "bench_strategies", |_| {
        let dir = tempfile::tempdir().expect("a directory");
        let json = dir.path().join("strategies.json");
        let small = "--rates 1000 --seconds 1 --rounds 1 --strategies";
        let output = ftbench(&format!("strategies {small} by-magic"), &json);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && !json.exists(), "{said}");
        assert!(said.contains("do not know [epoch]") && said.contains("by-magic"), "{said}");
        let output = ftbench(&format!("strategies {small} postponed"), &json);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            assert!(said.contains("do not know [epoch]") && said.contains("capture"), "{said}");
            return Ok(());
        }
        let report: Value = serde_json::from_slice(&std::fs::read(&json).expect("a file")).expect("JSON");
        let [alone, postponed] = rows(&report) else { panic!("two rows: {report}") };
        assert_eq!(
            (alone["strategy"].as_str(), postponed["strategy"].as_str()),
            (Some("unprotected"), Some("postponed"))
        );
        assert!(number(postponed, "pause_us", "p50") > 0.0 && figure(postponed, "ratio_to_unprotected") > 0.0);
        Ok(())
    });
}

#[test]
fn failovers_are_split_into_their_parts() {
    play(MachineKind::Kvm, "bench_failover", |_| {
        let (said, report) = measured("failover --runs 1 --kills process --dirty-rate 0", "ft.bench.failover/1");
        assert!(said.contains("first reply"), "{said}");
        let [row] = rows(&report) else { panic!("one row: {report}") };
        assert_eq!((row["kill"].as_str(), row["lost_acked_writes"].as_u64()), (Some("process"), Some(0)));
        assert!(number(row, "gap_ms", "p50") > 0.0 && number(row, "activate_ms", "p50") > 0.0, "{row}");
        Ok(())
    });
}

#[test]
fn disk_is_measured_with_and_without_a_backup() {
    // Its timers are patient, but two pairs at once would leave little of the processors to measure.
    play(MachineKind::Kvm, "bench_disk", |_| {
        let dir = tempfile::tempdir().expect("a directory");
        let json = dir.path().join("disk.json");
        let output = Command::new(env!("CARGO_BIN_EXE_ftbench"))
            .args(["disk", "--runs", "1", "--seconds", "1", "--disk", "16MiB"])
            .args(["--only", "a flush after each", "--json"])
            .arg(&json)
            .output()
            .expect("it starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8_lossy(&output.stdout).contains("random writes, 4 KiB, a flush after each"));
        let report: Value = serde_json::from_slice(&std::fs::read(&json).expect("a file")).expect("JSON");
        assert_eq!(report["schema"], "ft.bench.disk/1");
        let [row] = rows(&report) else { panic!("one row: {report}") };
        for side in ["solo", "protected"] {
            let side = &row[side];
            assert!(number(side, "latency_us", "p50") > 0.0 && number(side, "flush_us", "p99") > 0.0, "{row}");
            assert!(figure(side, "iops_median") > 1.0 && side["errors"] == 0, "{row}");
        }
        assert!(figure(row, "iops_ratio_median") > 0.0, "{row}");
        Ok(())
    });
}

/// Bytes do not depend on the host: these are the figures that are asked for.
#[test]
fn wire_bytes_are_in_proportion_to_what_changed() {
    let (said, report) = measured("wire --pages 1000 --epochs 4 --rounds 1", "ft.bench.wire/2");
    let ratio = |change: &str, patches: bool| {
        let lines = report["lines"].as_array().expect("lines").iter();
        let found = lines.filter(|line| line["change"] == change && line["patches"] == patches);
        found.map(|line| figure(line, "wire_ratio")).next().expect("this line")
    };
    assert!(ratio("line", true) <= 0.1 && ratio("scattered", true) <= 0.1, "{report}");
    assert!(ratio("whole", true) <= 1.02 && ratio("whole", false) <= 1.02, "{report}");
    assert!(ratio("quarter", true) <= 0.26 && ratio("half", true) <= 1.02 && ratio("line", false) > 0.99, "{report}");
    let targets = report["targets"].as_array().expect("targets");
    assert!(targets.len() == 3 && targets.iter().all(|target| target["met"] == true), "{report}");
    assert!(said.contains("met") && !said.contains("NOT MET"), "{said}");
}

#[test]
fn a_report_has_results_tables_plots_and_a_page() {
    let dir = tempfile::tempdir().expect("a directory");
    let (out, page) = (dir.path().join("figures"), dir.path().join("page.md"));
    std::fs::write(&page, "# Page\n<!-- results: wire -->\n<!-- end of results -->\nthe end\n").expect("a page");
    let report = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ftbench"));
        command.args(["report", "--quick", "--only", "wire", "--out"]).arg(&out).arg("--page").arg(&page).args(more);
        let output = command.output().expect("it starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::read_to_string(&page).expect("a page")
    };
    let filled = report(&[]);
    assert!(filled.starts_with("# Page\n") && filled.ends_with("the end\n"), "{filled}");
    assert!(filled.contains("| every byte, at random | patches |"), "{filled}");
    let plot = std::fs::read(out.join("wire.png")).expect("a plot");
    assert!(plot.starts_with(b"\x89PNG") && plot.len() > 5_000);
    assert!(std::fs::read_to_string(out.join("tables.md")).expect("tables").contains("## `wire`"));
    // From what is stored the same comes again, without measuring: nothing of it differs.
    let from = out.to_str().expect("a path");
    assert_eq!(report(&["--from", from]), filled);
}
