//! A takeover does not take longer because the guest has more memory: it is all in place already.

use std::time::Duration;

use tests::on_both_machines;
use tests::real::pair::{PairOptions, START_LIMIT};
use tests::real::scene::Scene;
use tests::real::{Node, Result};

/// Takeovers of each size; the fastest counts, because a busy host delays some of them.
const TAKEOVERS: usize = 3;
const SIZES: [&str; 2] = ["128MiB", "1GiB"];

on_both_machines!(activation_does_not_depend_on_memory);

fn activation_does_not_depend_on_memory(scene: &mut Scene) -> Result<()> {
    let mut fastest = Vec::new();
    for memory in SIZES {
        let mut took = Vec::new();
        for _ in 0..TAKEOVERS {
            let options = PairOptions { memory: memory.into(), ..scene.patient_options() };
            let pair = scene.protected(&options)?;
            let killed_us = pair.kill(Node::A)?;
            let activated = pair.wait_event(Node::B, killed_us, START_LIMIT, "takeover", |e| e.event == "activated")?;
            took.push(Duration::from_micros(activated.activate_us.expect("it says how long it took")));
        }
        took.sort_unstable();
        println!("{} with {memory}: activated in {took:?}", scene.machine());
        fastest.push(took[0]);
    }
    let [small, large] = fastest[..] else { panic!("two sizes") };
    // Eight times the memory: to touch the rest of it once would take hundreds of milliseconds. Less is noise of a busy host.
    assert!(large <= 2 * small + Duration::from_millis(40), "{small:?} with {}, {large:?} with {}", SIZES[0], SIZES[1]);
    Ok(())
}
