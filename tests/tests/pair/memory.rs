//! Both processes stay small under load: guest RAM, a quarter of it, and 64 MiB.
//!
//! `FT_MEMORY_SECONDS` sets how long the load goes on.

use std::thread;
use std::time::Duration;

use tests::on_both_machines;
use tests::real::client::WriterConfig;
use tests::real::counters::Counters;
use tests::real::pair::{PairOptions, START_LIMIT};
use tests::real::resp::Reply;
use tests::real::scene::Scene;
use tests::real::{Error, Node, Result};

const GUEST_RAM: u64 = 256 << 20;
const LIMIT: u64 = GUEST_RAM + GUEST_RAM / 4 + (64 << 20);

on_both_machines!(resident_memory_is_bounded);

fn seconds() -> u64 {
    let text = std::env::var("FT_MEMORY_SECONDS").unwrap_or_else(|_| "10".into());
    text.parse().unwrap_or_else(|_| panic!("FT_MEMORY_SECONDS is {text:?}, not a number of seconds"))
}

fn resident_memory_is_bounded(scene: &mut Scene) -> Result<()> {
    let options = PairOptions { memory: "256MiB".into(), ..PairOptions::new(scene.machine()) };
    let pair = scene.protected(&options)?;
    let mut guest = pair.wait_guest(Duration::from_secs(5))?;
    let answer = guest.call(&["FT.DIRTY", "20000", "8192"]).map_err(Error::io("FT.DIRTY"))?;
    assert!(matches!(answer, Reply::Simple(_) | Reply::Integer(_)), "{answer:?}");
    let writer = pair.start_writer(WriterConfig::default())?;
    let counters = Counters::start(pair.network().client(), 4, Duration::from_secs(20))?;
    for _ in 0..seconds() {
        thread::sleep(Duration::from_secs(1));
        for node in Node::BOTH {
            pair.daemon(node).check()?;
        }
    }
    for node in Node::BOTH {
        let (now, most) = pair.daemon(node).resident()?;
        println!("{node}: resident {} MiB, at most {} MiB, limit {} MiB", now >> 20, most >> 20, LIMIT >> 20);
        assert!(most <= LIMIT, "{node}: {most} bytes resident, {LIMIT} allowed");
    }
    pair.wait_protected(Node::A, START_LIMIT)?;
    assert_eq!(counters.finish().violations, Vec::<String>::new());
    let report = writer.finish(pair.network().client());
    assert!(report.connection_survived() && report.same.complete(report.acks.len()), "{:?}", report.connection_error);
    Ok(())
}
