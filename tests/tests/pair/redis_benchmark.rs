//! `redis-benchmark`, unmodified, against the guest: unprotected, protected, and with the primary killed in the middle. It ends
//! by itself with an error when a connection breaks or an answer is not one.
//!
//! `FT_BENCH_N` sets the number of requests of each kind.

use std::process::Command;
use std::thread;
use std::time::Duration;

use tests::on_both_machines;
use tests::real::network::GUEST_IP;
use tests::real::pair::{Pair, START_LIMIT};
use tests::real::resp::{Connection, Reply};
use tests::real::rng::Rng;
use tests::real::scene::{Scene, tool_wanted};
use tests::real::{Error, Node, Result, tools};

/// Far more than the default number of requests takes.
const LIMIT: Duration = Duration::from_secs(240);
const KINDS: [&str; 6] = ["PING_INLINE", "SET", "GET", "INCR", "LPUSH", "LPOP"];

on_both_machines!(unprotected, protected, primary_killed);

/// What the benchmark counts with its INCRs, the fourth kind of six.
const COUNTER: &str = "counter:__rand_int__";

fn requests() -> u64 {
    let asked = std::env::var("FT_BENCH_N").ok();
    asked.map_or(3000, |number| number.parse().expect("FT_BENCH_N is a number"))
}

fn benchmark() -> Command {
    let mut command = Command::new("redis-benchmark");
    command.args([
        "-h",
        GUEST_IP,
        "-t",
        "ping,set,get,incr,lpush,lpop",
        "-n",
        &requests().to_string(),
        "-c",
        "10",
        "--csv",
    ]);
    command
}

/// Every kind of request was carried out to its end, and nothing was said on standard error.
fn check(finished: tools::Finished) -> Result<()> {
    let stderr = finished.stderr.trim().to_owned();
    let stdout = finished.success("redis-benchmark")?;
    println!("{stdout}");
    for kind in KINDS {
        assert!(
            stdout.lines().any(|line| line.starts_with(&format!("\"{kind}\","))),
            "no {kind} in:\n{stdout}\n{stderr}"
        );
    }
    assert!(!stdout.contains("Error") && !stderr.contains("Error"), "{stdout}\n{stderr}");
    Ok(())
}

fn run(pair: &Pair) -> Result<()> {
    check(tools::run(pair.network().client(), benchmark(), "", LIMIT)?)
}

fn unprotected(scene: &mut Scene) -> Result<()> {
    if !tool_wanted("redis-benchmark", "FT_NO_REDIS") {
        return Ok(());
    }
    let options = scene.options();
    let pair = scene.prepare(&options)?;
    pair.start_primary(Node::A, &["--alone"])?;
    pair.wait_guest(START_LIMIT)?;
    run(pair)
}

fn protected(scene: &mut Scene) -> Result<()> {
    if !tool_wanted("redis-benchmark", "FT_NO_REDIS") {
        return Ok(());
    }
    let pair = scene.protected_small()?;
    run(pair)?;
    // On a host too busy for the heartbeats protection may have been lost and won again meanwhile.
    pair.wait_protected(Node::A, START_LIMIT)
}

fn primary_killed(scene: &mut Scene) -> Result<()> {
    if !tool_wanted("redis-benchmark", "FT_NO_REDIS") {
        return Ok(());
    }
    let pair = scene.protected_small()?;
    let mut command = benchmark();
    command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .stdin(std::process::Stdio::null());
    let child = pair.network().client().spawn(command).map_err(|e| tools::start_error("redis-benchmark", e))?;
    thread::scope(|scope| {
        let finished = scope.spawn(|| tools::finish(child, "redis-benchmark", "", LIMIT));
        let quarter = requests() / 4;
        wait_counted(pair, Rng::new(11).range(quarter, 3 * quarter))?;
        pair.wait_protected(Node::A, START_LIMIT)?;
        let killed_us = pair.kill(Node::A)?;
        assert!(!finished.is_finished(), "the benchmark was over before the kill: {} requests are too few", requests());
        pair.wait_event(Node::B, killed_us, Duration::from_secs(10), "takeover", |e| e.event == "activated")?;
        check(finished.join().expect("the benchmark's thread does not panic")?)
    })
}

/// Waits until the benchmark has come so far with its INCRs.
fn wait_counted(pair: &Pair, count: u64) -> Result<()> {
    let mut guest = Connection::open(pair.network().client(), LIMIT)?;
    loop {
        let counted = match guest.call(&["GET", COUNTER]).map_err(Error::io("cannot ask for the counter"))? {
            Reply::Bulk(None) => 0,
            Reply::Bulk(Some(digits)) => String::from_utf8_lossy(&digits).parse().expect("the guest counts in digits"),
            other => return Err(Error::answer("GET", format!("{other:?}"))),
        };
        if counted >= count {
            return Ok(());
        }
    }
}
