//! The harness itself: wires that can be cut, children that die with their namespace, a client that notices what is lost.
//! No machine is needed: `redis-server` plays the guest.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tests::real::client::{Writer, WriterConfig};
use tests::real::counters::Counters;
use tests::real::daemon::Daemon;
use tests::real::network::{GUEST_IP, GUEST_MAC, Network, Wire, replication_ip};
use tests::real::resp::{Connection, Reply};
use tests::real::scene::tool_wanted;
use tests::real::watch::{Watch, changes};
use tests::real::{Node, clock, tools};

const PATIENCE: Duration = Duration::from_secs(5);

/// Puts the guest's addresses on a host's own bridge and a Redis server behind them.
fn stand_in(network: &Network, node: Node) -> Daemon {
    let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    network.host(node).ip(&format!("link set br0 address {mac}\naddr add {GUEST_IP}/24 dev br0\n")).expect("ip works");
    let mut command = Command::new("redis-server");
    command.args(["--bind", GUEST_IP, "--save", "", "--appendonly", "no", "--protected-mode", "no"]);
    Daemon::start(node, network.host(node), command, Path::new("/dev/null")).expect("redis-server starts")
}

fn connect(network: &Network) -> Connection {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        match Connection::open(network.client(), PATIENCE) {
            Ok(connection) => return connection,
            Err(e) => assert!(std::time::Instant::now() < deadline, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether one ping of a second's patience gets through from a host to the other over the replication link.
fn replication_works(network: &Network) -> bool {
    let mut command = Command::new("bash");
    // A listener is not needed: a refused connection is an answer as well.
    let probe = format!("exec 3<>/dev/tcp/{}/9; [[ $? == 0 ]] || true", replication_ip(Node::B));
    command.args(["-c", &format!("timeout 1 bash -c '{probe}' 2>&1 | grep -q refused")]);
    tools::run(network.host(Node::A), command, "", PATIENCE).expect("bash runs").status.success()
}

#[test]
fn wires_can_be_cut_and_mended() {
    let network = Network::new().unwrap();
    assert!(replication_works(&network));
    network.cut(&[Wire::Replication]).unwrap();
    assert!(!replication_works(&network));
    network.mend(&[Wire::Replication]).unwrap();
    assert!(replication_works(&network));
}

#[test]
fn children_die_with_their_namespace() {
    let network = Network::new().unwrap();
    let mut command = Command::new("sleep");
    command.arg("1000");
    let mut child = network.host(Node::A).spawn(command).unwrap();
    assert!(child.try_wait().unwrap().is_none());
    drop(network);
    let deadline = std::time::Instant::now() + PATIENCE;
    let status = tools::wait_until(&mut child, deadline).unwrap().expect("killed with its namespace");
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
}

/// An outage of the LAN shows as a silence, and nothing is lost over it; the witness sees one host only.
#[test]
fn client_survives_a_cut_and_counts() {
    if !tool_wanted("redis-server", "FT_NO_REDIS") {
        return;
    }
    let network = Network::new().unwrap();
    let _server = stand_in(&network, Node::A);
    connect(&network);
    let watch = Watch::start(&network).unwrap();
    let writer = Writer::start(network.client(), WriterConfig::default()).unwrap();
    let counters = Counters::start(network.client(), 4, PATIENCE).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let cut_us = clock::mono_us();
    network.cut(&[Wire::Lan(Node::A)]).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    network.mend(&[Wire::Lan(Node::A)]).unwrap();
    std::thread::sleep(Duration::from_millis(700));
    let report = writer.finish(network.client());
    let counted = counters.finish();
    let seen = watch.finish().unwrap();
    assert_eq!(counted.violations, Vec::<String>::new());
    assert!(report.connection_survived(), "{:?}", report.connection_error);
    assert!(report.same.complete(report.acks.len()) && report.fresh.complete(report.acks.len()));
    let (begin, end) = report.longest_silence(cut_us).unwrap();
    assert!((250_000..2_000_000).contains(&(end - begin)), "silence of {} us", end - begin);
    assert!(seen.iter().any(|frame| frame.at_us < cut_us) && changes(&seen) == 0);
}

/// A server that forgets and alters what it acknowledged is found out.
#[test]
fn client_notices_loss_and_change() {
    if !tool_wanted("redis-server", "FT_NO_REDIS") {
        return;
    }
    let network = Network::new().unwrap();
    let _server = stand_in(&network, Node::B);
    let mut saboteur = connect(&network);
    let writer = Writer::start(network.client(), WriterConfig::default()).unwrap();
    while writer.acked() < 100 {
        assert!(writer.is_writing());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(saboteur.call(&["DEL", "k:3", "k:50"]).unwrap(), Reply::Integer(2));
    assert!(matches!(saboteur.call(&["APPEND", "k:7", "x"]).unwrap(), Reply::Integer(_)));
    let report = writer.finish(network.client());
    assert_eq!((report.lost(), report.wrong()), (2, 1));
    assert!(!report.same.complete(report.acks.len()) && !report.fresh.complete(report.acks.len()));
}
