//! What must not bring a guest back, or bring it back twice: a primary that is restarted at once, a guest that switched itself off,
//! a primary that was ended in order.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::on_both_machines;
use tests::real::client::WriterConfig;
use tests::real::pair::Pair;
use tests::real::resp::Connection;
use tests::real::scene::Scene;
use tests::real::watch::{Watch, changes};
use tests::real::{Error, Node, Result, clock};

/// Longer than any timer after which a backup could take over.
const WATCHED: Duration = Duration::from_secs(2);
const LIMIT: Duration = Duration::from_secs(30);

on_both_machines!(restarted_at_once, powered_off_stays_off, ended_in_order_stays_off);

/// A loop restarts the primary as soon as it has ended, as a service manager would, faster than the backup can take over.
fn restarted_at_once(scene: &mut Scene) -> Result<()> {
    let pair = scene.protected_small()?;
    let watch = Watch::start(pair.network())?;
    let writer = pair.start_writer(WriterConfig::default())?;
    thread::sleep(Duration::from_millis(500));
    let killed_us = pair.kill(Node::A)?;
    pair.start_primary(Node::A, &[])?;
    let mut restarts = 1;
    let deadline = Instant::now() + LIMIT;
    while !pair.events(Node::B, killed_us)?.iter().any(|e| e.event == "activated") {
        assert!(Instant::now() < deadline, "no takeover;\n{}", pair.logs());
        if pair.daemon(Node::A).ended()?.is_some() {
            pair.start_primary(Node::A, &[])?;
            restarts += 1;
        }
        thread::sleep(Duration::from_millis(2));
    }
    println!("{restarts} restarts before the takeover");
    // The restarted process becomes the backup of its successor, by a full copy.
    pair.wait_protected(Node::B, LIMIT)?;
    thread::sleep(WATCHED);
    let report = writer.finish(pair.network().client());
    let seen = watch.finish()?;
    assert!(report.connection_survived(), "{:?}", report.connection_error);
    assert!(report.same.complete(report.acks.len()) && report.fresh.complete(report.acks.len()));
    assert_eq!(
        (changes(&seen), seen.last().map(|frame| frame.from)),
        (1, Some(Node::B)),
        "one guest, and it moved once"
    );
    let started = pair.daemon(Node::A).started_us();
    let a = pair.events(Node::A, started)?;
    let ran = a.iter().find(|e| ["solo", "resync", "protected"].iter().any(|state| e.enters(state)));
    assert!(ran.is_none(), "a second guest ran: {ran:?}");
    Ok(())
}

fn powered_off_stays_off(scene: &mut Scene) -> Result<()> {
    let pair = scene.protected_small()?;
    let mut guest = pair.wait_guest(LIMIT)?;
    let at = clock::mono_us();
    // The machine may be gone before it answers.
    let _answer = guest.call(&["FT.POWEROFF"]);
    assert_off(pair, at)
}

fn ended_in_order_stays_off(scene: &mut Scene) -> Result<()> {
    let pair = scene.protected_small()?;
    let at = clock::mono_us();
    pair.signal(Node::A, Signal::TERM)?;
    assert_off(pair, at)
}

/// The primary ends with success, and the backup leaves the guest alone.
fn assert_off(pair: &mut Pair, at_us: u64) -> Result<()> {
    let status = pair.daemon(Node::A).wait(LIMIT)?;
    assert!(status.success(), "{status};\n{}", pair.logs());
    let watch = Watch::start(pair.network())?;
    thread::sleep(WATCHED);
    let events = pair.events(Node::B, at_us)?;
    assert!(!events.iter().any(|e| e.event == "activated"), "resurrected: {events:?}");
    let tried = Connection::open(pair.network().client(), Duration::from_millis(500));
    assert!(matches!(tried, Err(Error::Io { .. })), "somebody answers");
    assert_eq!(watch.finish()?, Vec::new(), "somebody speaks for a guest that is off");
    let state = pair.status(Node::B)?.state();
    assert!(state.contains("standby"), "the backup says {state:?}");
    Ok(())
}
