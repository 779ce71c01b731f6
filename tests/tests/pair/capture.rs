//! Each way in which pages come out of the guest protects it under load: the primary dies, its clients keep their connections, nothing that they were told is
//! lost, and the memory that the backup goes on with is that of the checkpoint (`ram_digest`: an activation compares all of it).

use std::thread;
use std::time::Duration;

use serde_json::Value;
use tests::on_both_machines;
use tests::real::client::WriterConfig;
use tests::real::counters::Counters;
use tests::real::pair::{Pair, PairOptions};
use tests::real::scene::Scene;
use tests::real::{Node, Result, clock};

const PATIENCE: Duration = Duration::from_secs(20);
const TAKEOVER_LIMIT: Duration = Duration::from_secs(20);
/// How long clients go on before the kill, and after the takeover.
const BEFORE: Duration = Duration::from_millis(1_500);
const AFTER: Duration = Duration::from_secs(1);
/// Not a measurement: hosts that run tests are busy, and a digest of all of RAM is in each pause.
const GAP_LIMIT: Duration = Duration::from_secs(6);

on_both_machines!(
    postponed,
    postponed_after_precopy,
    stop_and_copy,
    stop_and_copy_waits_for_nobody_who_is_gone,
    copy_on_write,
    copy_on_write_after_precopy,
    auto
);

fn postponed(scene: &mut Scene) -> Result<()> {
    let capture = outlives_a_kill(scene, "postponed", "never")?;
    assert_eq!(
        (count(&capture, "precopied_epochs_total"), count(&capture, "protected_epochs_total")),
        (0, 0),
        "{capture}"
    );
    Ok(())
}

fn postponed_after_precopy(scene: &mut Scene) -> Result<()> {
    let capture = outlives_a_kill(scene, "postponed", "always")?;
    assert!(count(&capture, "precopied_pages_total") > 0, "{capture}");
    Ok(())
}

fn stop_and_copy(scene: &mut Scene) -> Result<()> {
    outlives_a_kill(scene, "stop-and-copy", "auto").map(drop)
}

/// An order ends the wait for a commit, and so does the death of the backup: the guest is moved, and then runs on alone.
fn stop_and_copy_waits_for_nobody_who_is_gone(scene: &mut Scene) -> Result<()> {
    let epoch = "25ms capture=stop-and-copy".into();
    let options = PairOptions { epoch, memory: "64MiB".into(), ..scene.patient_options() };
    let pair = scene.protected(&options)?;
    let writer = pair.start_writer(WriterConfig { seed: 6, patience: PATIENCE, ..WriterConfig::default() })?;
    thread::sleep(BEFORE);
    pair.wait_protected(Node::A, PATIENCE)?;
    pair.ftctl(Node::A, &["failover", "--yes", "--wait"])?.success("ftctl failover")?;
    pair.wait_protected(Node::B, TAKEOVER_LIMIT)?;
    writer.works_on(clock::mono_us(), AFTER, PATIENCE)?;
    pair.kill(Node::A)?;
    pair.wait_state(Node::B, "solo", TAKEOVER_LIMIT)?;
    writer.works_on(clock::mono_us(), AFTER, PATIENCE)?;
    let report = writer.finish(pair.network().client());
    assert_eq!(report.connection_error, None);
    assert!(report.same.complete(report.acks.len()), "{:?}", report.same);
    assert!(report.fresh.complete(report.acks.len()), "{:?}", report.fresh);
    Ok(())
}

fn copy_on_write(scene: &mut Scene) -> Result<()> {
    let capture = outlives_a_kill(scene, "copy-on-write", "never")?;
    assert!(count(&capture, "protected_pages_total") > 0, "{capture}");
    Ok(())
}

fn copy_on_write_after_precopy(scene: &mut Scene) -> Result<()> {
    let capture = outlives_a_kill(scene, "copy-on-write", "always")?;
    assert!(count(&capture, "protected_pages_total") > 0 && count(&capture, "precopied_pages_total") > 0, "{capture}");
    Ok(())
}

fn auto(scene: &mut Scene) -> Result<()> {
    outlives_a_kill(scene, "auto", "auto").map(drop)
}

fn count(capture: &Value, name: &str) -> u64 {
    capture[name].as_u64().unwrap_or_else(|| panic!("{name} in {capture}"))
}

/// Returns what the primary's status said of capture shortly before it died.
fn outlives_a_kill(scene: &mut Scene, strategy: &str, precopy: &str) -> Result<Value> {
    let epoch = format!("25ms capture={strategy} precopy={precopy} ram_digest=true");
    let options = PairOptions { epoch, memory: "64MiB".into(), ..scene.patient_options() };
    let pair = scene.protected(&options)?;
    let writer = pair.start_writer(WriterConfig { seed: 5, patience: PATIENCE, ..WriterConfig::default() })?;
    let counters = Counters::start(pair.network().client(), 3, PATIENCE)?;
    thread::sleep(BEFORE);
    // A host too busy for the heartbeats may just have lost protection; the promise is about a protected guest.
    pair.wait_protected(Node::A, PATIENCE)?;
    let status = pair.status(Node::A)?;
    let capture = status.json()["capture"].clone();
    assert_eq!((&capture["strategy"], &capture["precopy"]), (&strategy.into(), &precopy.into()), "{}", status.json());
    println!("{}: {}, {capture}", scene_name(pair), status.json()["timings"]["pause"]);
    let killed_us = pair.kill(Node::A)?;
    let activated = pair.wait_event(Node::B, killed_us, TAKEOVER_LIMIT, "takeover", |e| e.event == "activated")?;
    writer.works_on(activated.mono_us, AFTER, PATIENCE)?;
    let report = writer.finish(pair.network().client());
    let counted = counters.finish();
    assert_eq!(report.connection_error, None);
    assert!(report.same.complete(report.acks.len()), "{:?}", report.same);
    assert!(report.fresh.complete(report.acks.len()), "{:?}", report.fresh);
    assert_eq!(counted.violations, Vec::<String>::new());
    assert!(counted.acked > 0 && !report.acks.is_empty());
    let (begin, end) = report.longest_silence(killed_us).expect("answers after the kill");
    assert!(Duration::from_micros(end - begin) <= GAP_LIMIT, "no answer for {} us", end - begin);
    println!("{} writes, {} increments, none lost", report.acks.len(), counted.acked);
    Ok(capture)
}

fn scene_name(pair: &Pair) -> String {
    pair.status(Node::A).map_or_else(|_| "?".into(), |status| status.json()["machine"].to_string())
}
