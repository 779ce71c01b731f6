//! Everything short of a clean death: processes that stop and go on, cables that are cut and mended, a backup that is lost. Never do
//! two guests speak, never is an answer lost that was given, and `ftctl status` tells the truth at each step.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::on_both_machines;
use tests::real::client::{Writer, WriterConfig};
use tests::real::network::Wire;
use tests::real::pair::Pair;
use tests::real::scene::Scene;
use tests::real::watch::{Seen, Watch, changes};
use tests::real::{Error, Node, Result, clock};

const LIMIT: Duration = Duration::from_secs(30);
/// Longer than `max_hold`: what a stopped primary still held may not leave any more.
const STOPPED: Duration = Duration::from_millis(1_500);

on_both_machines!(
    primary_stopped_and_continued,
    backup_stopped_and_continued,
    replication_cut_and_mended,
    lan_cut_and_switched_over,
    backup_killed_and_replaced,
);

/// A client and a witness over one scenario.
struct Witnesses {
    writer: Writer,
    watch: Watch,
}

impl Witnesses {
    fn start(pair: &Pair) -> Result<Self> {
        let watch = Watch::start(pair.network())?;
        let writer = pair.start_writer(WriterConfig::default())?;
        thread::sleep(Duration::from_millis(300));
        Ok(Self { writer, watch })
    }

    /// Waits until the client has had answers for `time` more.
    fn work(&self, time: Duration) -> Result<()> {
        let enough = clock::mono_us() + u64::try_from(time.as_micros()).expect("a few seconds");
        let deadline = Instant::now() + LIMIT;
        while self.writer.last_reply_us() < enough {
            if !self.writer.is_writing() || Instant::now() >= deadline {
                return Err(Error::Timeout {
                    what: "the client to go on".into(),
                    waited: LIMIT,
                    detail: String::new(),
                });
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Nothing was lost; what was seen on the LAN is handed back.
    fn finish(self, pair: &Pair) -> Result<Vec<Seen>> {
        let report = self.writer.finish(pair.network().client());
        assert_eq!(report.connection_error, None);
        assert!(report.same.complete(report.acks.len()), "{:?}", report.same);
        assert!(report.fresh.complete(report.acks.len()), "{:?}", report.fresh);
        self.watch.finish()
    }
}

/// Waits until `ftctl status` of a host says `state`.
fn wait_status(pair: &Pair, node: Node, state: &str) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let status = pair.status(node)?;
        if status.state() == state {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Error::Timeout {
                what: format!("status {state} of {node}"),
                waited: LIMIT,
                detail: format!("{}\n{}", status.json(), pair.logs()),
            });
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// The speakers in the order in which they took turns.
fn speakers(seen: &[Seen]) -> Vec<Node> {
    let mut order: Vec<Node> = seen.iter().map(|frame| frame.from).collect();
    order.dedup();
    order
}

/// Matrix row 12: the takeover happens, and the old primary fences itself when it wakes up, without a word.
fn primary_stopped_and_continued(scene: &mut Scene) -> Result<()> {
    let pair = scene.protected_small()?;
    let witnesses = Witnesses::start(pair)?;
    let at = clock::mono_us();
    pair.signal(Node::A, Signal::STOP)?;
    pair.wait_event(Node::B, at, LIMIT, "takeover", |e| e.event == "activated")?;
    witnesses.work(STOPPED)?;
    pair.signal(Node::A, Signal::CONT)?;
    pair.wait_state(Node::A, "fenced", LIMIT)?;
    wait_status(pair, Node::A, "fenced")?;
    wait_status(pair, Node::B, "solo")?;
    witnesses.work(Duration::from_millis(500))?;
    let seen = witnesses.finish(pair)?;
    assert_eq!(speakers(&seen), [Node::A, Node::B]);
    Ok(())
}

/// Matrix row 13: the primary goes on alone, and takes the backup on again when it wakes up.
fn backup_stopped_and_continued(scene: &mut Scene) -> Result<()> {
    let pair = scene.protected_small()?;
    let witnesses = Witnesses::start(pair)?;
    let at = clock::mono_us();
    pair.signal(Node::B, Signal::STOP)?;
    pair.wait_event(Node::A, at, LIMIT, "going on alone", |e| e.enters("solo"))?;
    wait_status(pair, Node::A, "solo")?;
    witnesses.work(STOPPED)?;
    pair.signal(Node::B, Signal::CONT)?;
    wait_status(pair, Node::A, "protected")?;
    wait_status(pair, Node::B, "in_sync")?;
    witnesses.work(Duration::from_millis(500))?;
    let seen = witnesses.finish(pair)?;
    assert_eq!(speakers(&seen), [Node::A]);
    Ok(())
}

/// Matrix row 1: the guest stays where it is.
fn replication_cut_and_mended(scene: &mut Scene) -> Result<()> {
    let pair = scene.protected_small()?;
    let witnesses = Witnesses::start(pair)?;
    let at = clock::mono_us();
    pair.network().cut(&[Wire::Replication])?;
    pair.wait_event(Node::A, at, LIMIT, "going on alone", |e| e.enters("solo"))?;
    wait_status(pair, Node::A, "solo")?;
    wait_status(pair, Node::B, "standby")?;
    witnesses.work(STOPPED)?;
    pair.network().mend(&[Wire::Replication])?;
    wait_status(pair, Node::A, "protected")?;
    wait_status(pair, Node::B, "in_sync")?;
    witnesses.work(Duration::from_millis(500))?;
    let seen = witnesses.finish(pair)?;
    assert_eq!(speakers(&seen), [Node::A]);
    Ok(())
}

/// Nobody in the pair can tell that the clients are cut off, so nothing happens by itself; an ordered switchover brings the
/// guest back to them, on the same connection.
fn lan_cut_and_switched_over(scene: &mut Scene) -> Result<()> {
    let pair = scene.protected_small()?;
    let witnesses = Witnesses::start(pair)?;
    pair.network().cut(&[Wire::Lan(Node::A)])?;
    thread::sleep(STOPPED);
    wait_status(pair, Node::A, "protected")?;
    wait_status(pair, Node::B, "in_sync")?;
    let at = clock::mono_us();
    pair.ftctl(Node::A, &["failover", "--yes"])?.success("ftctl failover")?;
    pair.wait_event(Node::B, at, LIMIT, "the switchover", |e| e.event == "activated")?;
    witnesses.work(Duration::from_millis(500))?;
    let seen = witnesses.finish(pair)?;
    assert_eq!(speakers(&seen), [Node::A, Node::B]);
    assert_eq!(changes(&seen), 1);
    // The side that handed the guest over becomes the backup by itself; and the guest can go back.
    pair.network().mend(&[Wire::Lan(Node::A)])?;
    wait_status(pair, Node::B, "protected")?;
    wait_status(pair, Node::A, "in_sync")?;
    let back = clock::mono_us();
    pair.ftctl(Node::B, &["failover", "--yes", "--wait"])?.success("ftctl failover --wait")?;
    pair.wait_event(Node::A, back, LIMIT, "the way back", |e| e.event == "activated")?;
    wait_status(pair, Node::A, "protected")?;
    wait_status(pair, Node::B, "in_sync")?;
    Ok(())
}

/// Matrix row 3, then row 2 with the new backup: protection heals, and is real.
fn backup_killed_and_replaced(scene: &mut Scene) -> Result<()> {
    let pair = scene.protected_small()?;
    let witnesses = Witnesses::start(pair)?;
    let at = pair.kill(Node::B)?;
    pair.wait_event(Node::A, at, LIMIT, "going on alone", |e| e.enters("solo"))?;
    wait_status(pair, Node::A, "solo")?;
    witnesses.work(Duration::from_millis(500))?;
    pair.start_backup(Node::B)?;
    wait_status(pair, Node::A, "protected")?;
    wait_status(pair, Node::B, "in_sync")?;
    witnesses.work(Duration::from_millis(300))?;
    let killed_us = pair.kill(Node::A)?;
    pair.wait_event(Node::B, killed_us, LIMIT, "takeover", |e| e.event == "activated")?;
    witnesses.work(Duration::from_millis(500))?;
    let seen = witnesses.finish(pair)?;
    assert_eq!(speakers(&seen), [Node::A, Node::B]);
    Ok(())
}
