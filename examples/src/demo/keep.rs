//! A pair to play with.

use rustix::process::getpid;
use tests::real::Node;
use tests::real::artifacts::Artifacts;
use tests::real::netns::NetNs;
use tests::real::network::GUEST_IP;
use tests::real::pair::Pair;

use super::args::Args;
use super::error::DemoError;
use super::host;
use super::interrupt::Interrupt;
use super::run;
use super::screen::{BOLD, FAINT, Screen};

/// Starts a protected pair, says how to play with it, and takes it down on a signal.
pub(super) fn keep(args: &Args, artifacts: Artifacts, screen: &Screen, interrupt: &Interrupt) -> Result<(), DemoError> {
    let mut stage = run::prepare(args, artifacts, interrupt)?;
    let started = screen.during("starting", |step| run::protect(args, &mut stage.pair, step));
    if let Err(source) = started {
        stage.pair.keep_files();
        drop(stage);
        return Err(DemoError::Pair { source, kept: interrupt.keep_files() });
    }
    how_to_play(&mut stage.pair);
    interrupt.wait();
    anstream::println!("\n  taking everything down");
    Ok(())
}

/// The words that run a command inside a namespace, for another terminal.
fn inside(ns: &NetNs) -> String {
    let net = ns.path().display();
    if host::in_user_namespace() {
        return format!("nsenter --user --preserve-credentials -t {} --net={net}", getpid().as_raw_nonzero());
    }
    format!("nsenter --net={net}")
}

fn how_to_play(pair: &mut Pair) {
    let client = inside(pair.network().client());
    let ctl = pair.artifacts().program("ftctl").display().to_string();
    let backup = pair.artifacts().program("ft-backup").display().to_string();
    let config = pair.config().display().to_string();
    let (a, b) = (inside(pair.network().host(Node::A)), inside(pair.network().host(Node::B)));
    let lines = [
        ("talk to the guest", format!("{client} redis-cli -h {GUEST_IP}")),
        ("load it", format!("{client} redis-benchmark -h {GUEST_IP} -t ping,set,get,incr -n 100000 -c 10")),
        ("ask how the primary is", format!("{ctl} --config {config} --node a status")),
        ("ask how the backup is", format!("{ctl} --config {config} --node b status")),
        ("move the guest to b in order", format!("{ctl} --config {config} --node a failover")),
        ("kill the primary", format!("kill -9 {}", pair.daemon(Node::A).id())),
        ("cut the replication link", format!("{client} ip link set repl-a down")),
        ("give the survivor a new backup", format!("{a} {backup} --config {config} --node a")),
        ("watch host b's network", format!("{b} tcpdump -ni br0")),
        ("logs, consoles, events", pair.dir().display().to_string()),
    ];
    anstream::println!("\n  The guest is {GUEST_IP}. In another terminal:\n");
    for (what, command) in lines {
        anstream::println!("  {BOLD}{what}{BOLD:#}\n    {command}");
    }
    anstream::println!("\n  {FAINT}Ctrl-C takes everything down.{FAINT:#}");
}
