//! The pair with a real etcd as its arbiter: a death is survived for the price of one compare-and-swap, and while etcd is away nobody but the
//! status notices, for as long as nothing else fails.

use std::thread;
use std::time::Duration;

use tests::on_both_machines;
use tests::real::client::{Writer, WriterConfig};
use tests::real::etcd::{ArbiterSite, wanted};
use tests::real::pair::{Pair, PairOptions};
use tests::real::pause::{pause_arbiter, wait_armed};
use tests::real::scene::Scene;
use tests::real::{Node, Result};

const LIMIT: Duration = Duration::from_secs(60);
/// Longer than three probes, which is how long the last answer counts.
const PAUSE: Duration = Duration::from_secs(5);

on_both_machines!(
    killed_with_etcd,
    etcd_paused_beside_a_healthy_pair,
    killed_while_etcd_is_paused,
    each_side_cut_from_etcd,
);

/// A protected pair with etcd beside it. The site goes before the pair.
fn protected<'a>(scene: &'a mut Scene, options: &PairOptions) -> Result<(ArbiterSite, &'a mut Pair)> {
    let options = PairOptions { arbiter: Some(ArbiterSite::table()), ..options.clone() };
    let pair = scene.prepare(&options)?;
    let site = ArbiterSite::start(pair.network(), pair.dir())?;
    pair.start_protected()?;
    Ok((site, pair))
}

/// Nothing that the client was told is lost.
fn finish(writer: Writer, pair: &Pair) -> Vec<tests::real::client::Ack> {
    let report = writer.finish(pair.network().client());
    assert_eq!(report.connection_error, None);
    assert!(report.same.complete(report.acks.len()), "{:?}", report.same);
    assert!(report.fresh.complete(report.acks.len()), "{:?}", report.fresh);
    report.acks
}

/// Waits until the client had `more` answers.
fn work(writer: &Writer, more: u64) {
    let enough = writer.acked() + more;
    while writer.is_writing() && writer.acked() < enough {
        thread::sleep(Duration::from_millis(5));
    }
}

/// Matrix row 2, and what `ftctl arbiter show` says before and after.
fn killed_with_etcd(scene: &mut Scene) -> Result<()> {
    if !wanted() {
        return Ok(());
    }
    let options = scene.options();
    let (_site, pair) = protected(scene, &options)?;
    let writer = pair.start_writer(WriterConfig::default())?;
    work(&writer, 20);
    let shown = |pair: &Pair, node: Node| -> Result<serde_json::Value> {
        let text = pair.ftctl(node, &["arbiter", "show", "--json"])?.success("ftctl arbiter show")?;
        Ok(serde_json::from_str(&text).expect("JSON"))
    };
    pair.wait_protected(Node::A, LIMIT)?;
    let before = shown(pair, Node::B)?;
    assert_eq!(before["record"]["owner"]["node"], "a", "{before}");
    assert!(before["etcd"]["server"].as_str().is_some_and(|version| version.starts_with("3.")), "{before}");
    assert!(before["latency_seconds"].as_f64().is_some_and(|latency| latency > 0.0), "{before}");
    let killed_us = pair.kill(Node::A)?;
    pair.wait_event(Node::B, killed_us, LIMIT, "takeover", |e| e.event == "activated")?;
    work(&writer, 20);
    let after = shown(pair, Node::B)?;
    assert_eq!(
        (&after["record"]["owner"]["node"], &after["record"]["in_sync"]),
        (&"b".into(), &serde_json::Value::Null)
    );
    assert!(after["revision"].as_u64() > before["revision"].as_u64(), "{after}");
    let table = pair.ftctl(Node::B, &["arbiter", "show"])?.success("ftctl arbiter show")?;
    assert!(table.contains("in sync     nobody") && table.contains("server      etcd 3."), "{table}");
    // What the process itself says of the place has the version, too.
    let place = pair.status(Node::B)?.json()["arbiter"]["place"].to_string();
    assert!(place.contains("etcd http://10.79.0.9:2379") && place.contains("version 3."), "{place}");
    finish(writer, pair);
    Ok(())
}

/// Matrix row 4.
fn etcd_paused_beside_a_healthy_pair(scene: &mut Scene) -> Result<()> {
    if !wanted() {
        return Ok(());
    }
    // The subject is the arbiter's absence; a busy host's own hiccups are not.
    let options = scene.patient_options();
    let (site, pair) = protected(scene, &options)?;
    let writer = pair.start_writer(WriterConfig::default())?;
    let pause = pause_arbiter(pair, &site, PAUSE)?;
    assert!(pause.as_promised(), "{pause:?}");
    // Whoever waited for the arbiter would have waited for nearly all of the pause.
    let acks = finish(writer, pair);
    let gap = pause.longest_gap(&acks);
    println!("longest gap {gap:?} while etcd was stopped for {:?}", pause.length());
    assert!(gap < pause.length() / 2, "{gap:?} of {:?}", pause.length());
    Ok(())
}

/// Matrix row 5: an outage until the arbiter is back, and then nothing is lost.
fn killed_while_etcd_is_paused(scene: &mut Scene) -> Result<()> {
    if !wanted() {
        return Ok(());
    }
    let options = scene.patient_options();
    let (site, pair) = protected(scene, &options)?;
    wait_armed(pair)?;
    let writer = pair.start_writer(WriterConfig::default())?;
    work(&writer, 20);
    site.pause()?;
    let killed_us = pair.kill(Node::A)?;
    pair.wait_state(Node::B, "taking_over", LIMIT)?;
    // Nobody was asked for longer than one answer takes; it does not run by itself.
    thread::sleep(Duration::from_secs(2));
    assert!(pair.events(Node::B, killed_us)?.iter().all(|event| event.event != "activated"));
    site.resume()?;
    pair.wait_event(Node::B, killed_us, LIMIT, "takeover", |e| e.event == "activated")?;
    work(&writer, 20);
    finish(writer, pair);
    Ok(())
}

/// Matrix rows 7 and 8: protected, not armed when the backup is the one that is cut off, and the primary can still go on alone.
fn each_side_cut_from_etcd(scene: &mut Scene) -> Result<()> {
    if !wanted() {
        return Ok(());
    }
    let options = scene.patient_options();
    let (site, pair) = protected(scene, &options)?;
    wait_armed(pair)?;
    let writer = pair.start_writer(WriterConfig::default())?;
    for node in Node::BOTH {
        site.set_cable(node, false)?;
        thread::sleep(Duration::from_secs(4));
        let (a, b) = (pair.status(Node::A)?, pair.status(Node::B)?);
        assert_eq!((a.state().as_str(), b.state().as_str()), ("protected", "in_sync"), "{node} cut off");
        // A takeover is the backup's to ask for.
        let armed = node == Node::A;
        assert_eq!((a.flag("armed"), b.flag("armed")), (Some(armed), Some(armed)), "{node} cut off");
        site.set_cable(node, true)?;
        wait_armed(pair)?;
    }
    // The backup is cut off and dies: the primary reaches the arbiter, and that is enough.
    site.set_cable(Node::B, false)?;
    let killed_us = pair.kill(Node::B)?;
    pair.wait_event(Node::A, killed_us, LIMIT, "going on alone", |e| e.enters("solo"))?;
    work(&writer, 20);
    finish(writer, pair);
    Ok(())
}
