//! What operators do to a pair that is well: the guest is moved and called back, protection is paused. Nothing that a client was told is lost, and the
//! pair is whole afterwards with no further command.

use std::time::{Duration, Instant};

use serde_json::Value;
use tests::on_both_machines;
use tests::real::client::{Writer, WriterConfig};
use tests::real::pair::Pair;
use tests::real::scene::Scene;
use tests::real::{Error, Node, Result, clock};

const LIMIT: Duration = Duration::from_secs(30);
/// A guest that stands still for longer than this has not been moved on purpose. Not a measurement: hosts that run tests are busy.
const STILL: f64 = 2.0;

on_both_machines!(drilled, called_to_the_backup, paused_for_a_while);

fn drilled(scene: &mut Scene) -> Result<()> {
    let pair = scene.protected_small()?;
    let writer = pair.start_writer(WriterConfig::default())?;
    let said = json(&pair.ftctl(Node::A, &["drill", "--yes", "--json"])?.success("ftctl drill")?)?;
    assert_eq!((&said["schema"], &said["ok"]), (&"ft.command/1".into(), &true.into()));
    for gap in ["there_gap_seconds", "back_gap_seconds"] {
        let seconds = said[gap].as_f64().unwrap_or_else(|| panic!("{gap} in {said}"));
        assert!(seconds > 0.0 && seconds < STILL, "{gap} is {seconds}");
    }
    whole(pair, Node::A)?;
    kept(pair, writer);
    // Not of a backup, and not of a pair that is not protected.
    assert_eq!(pair.ftctl(Node::B, &["drill", "--yes"])?.status.code(), Some(4));
    pair.kill(Node::B)?;
    let solo = pair.wait_event(Node::A, 0, LIMIT, "going on alone", |e| e.enters("solo"))?;
    pair.wait_state(Node::A, "solo", LIMIT)?;
    assert!(solo.mono_us > 0);
    assert_eq!(pair.ftctl(Node::A, &["drill", "--yes"])?.status.code(), Some(4));
    Ok(())
}

fn called_to_the_backup(scene: &mut Scene) -> Result<()> {
    let pair = scene.protected_small()?;
    let writer = pair.start_writer(WriterConfig::default())?;
    let at = clock::mono_us();
    let said = pair.ftctl(Node::B, &["failover", "--yes", "--wait", "--json"])?.success("ftctl failover")?;
    assert!(json(&said)?["gap_seconds"].as_f64().is_some_and(|gap| gap < STILL), "{said}");
    whole(pair, Node::B)?;
    kept(pair, writer);
    let lives = pair.events(Node::A, at)?.iter().filter(|e| e.event == "started").count();
    assert_eq!(lives, 1, "the old owner began anew, in the same process place");
    Ok(())
}

fn paused_for_a_while(scene: &mut Scene) -> Result<()> {
    let pair = scene.protected_small()?;
    let began = Instant::now();
    pair.ftctl(Node::A, &["pause-protection", "--for", "3s", "--yes"])?.success("ftctl pause-protection")?;
    pair.wait_state(Node::A, "solo", LIMIT)?;
    let status = pair.status(Node::A)?;
    assert_eq!(status.flag("protected"), Some(false));
    assert!(status.json()["protects_in_seconds"].as_f64().is_some_and(|left| left <= 3.0), "{}", status.json());
    whole(pair, Node::A)?;
    assert!(began.elapsed() >= Duration::from_secs(3), "it was not paused");
    Ok(())
}

/// The owner is protected and armed, and its backup in sync.
fn whole(pair: &mut Pair, owner: Node) -> Result<()> {
    pair.wait_state(owner, "protected", LIMIT)?;
    pair.wait_state(owner.peer(), "in_sync", LIMIT)?;
    pair.ftctl(owner, &["status", "--wait", "armed", "--timeout", "15s"])?.success("armed").map(drop)
}

fn kept(pair: &Pair, writer: Writer) {
    let report = writer.finish(pair.network().client());
    assert!(report.connection_survived(), "{:?}", report.connection_error);
    assert!(!report.acks.is_empty());
    assert!(report.same.complete(report.acks.len()) && report.fresh.complete(report.acks.len()));
}

fn json(text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|e| Error::answer("ftctl --json", format!("{e} in {text}")))
}
