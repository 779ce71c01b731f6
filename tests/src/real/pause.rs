//! The arbiter stops for a while beside a healthy pair: who notices, and who must not.

use std::thread;
use std::time::{Duration, Instant};

use super::client::Ack;
use super::etcd::ArbiterSite;
use super::pair::Pair;
use super::{Error, Node, Result, clock};

/// How long the pair may take to be armed, before and after.
const ARMED_LIMIT: Duration = Duration::from_secs(30);
/// Time between two looks at the status.
const LOOK: Duration = Duration::from_millis(50);

/// What was seen of a pause. Times are `CLOCK_MONOTONIC` in microseconds.
#[derive(Clone, Debug)]
pub struct ArbiterPause {
    /// The arbiter was stopped.
    pub from_us: u64,
    /// It went on.
    pub until_us: u64,
    /// Each side's status said *not armed* for the first time, in the order of [`Node::BOTH`].
    pub not_armed_us: [Option<u64>; 2],
    /// Both said *armed* again.
    pub armed_again_us: u64,
    /// States that the primary was in meanwhile besides *protected*.
    pub left_for: Vec<String>,
}

impl ArbiterPause {
    /// Whether the pair took it as it should: both sides said that a takeover would not be granted, and protection went on.
    #[must_use]
    pub fn as_promised(&self) -> bool {
        self.not_armed_us.iter().all(Option::is_some) && self.left_for.is_empty()
    }

    /// How long the arbiter was stopped.
    #[must_use]
    pub fn length(&self) -> Duration {
        Duration::from_micros(self.until_us.saturating_sub(self.from_us))
    }

    /// The longest time without an answer that a client saw from the pause on until both sides were armed again.
    #[must_use]
    pub fn longest_gap(&self, acks: &[Ack]) -> Duration {
        longest_gap(acks, self.from_us, self.armed_again_us)
    }
}

/// The longest time between two answers that overlaps the time between two moments.
#[must_use]
pub fn longest_gap(acks: &[Ack], from_us: u64, until_us: u64) -> Duration {
    let gaps = acks.windows(2).map(|pair| (pair[0].at_us, pair[1].at_us));
    let inside = gaps.filter(|&(begin, end)| end >= from_us && begin <= until_us);
    Duration::from_micros(inside.map(|(begin, end)| end - begin).max().unwrap_or(0))
}

/// Stops the arbiter for `length` and looks at both sides until they are armed again.
pub fn pause_arbiter(pair: &mut Pair, site: &ArbiterSite, length: Duration) -> Result<ArbiterPause> {
    wait_armed(pair)?;
    let from_us = clock::mono_us();
    site.pause()?;
    let looked = look_until(pair, Instant::now() + length);
    // It goes on whatever was seen.
    site.resume()?;
    let not_armed_us = looked?;
    let until_us = clock::mono_us();
    wait_armed(pair)?;
    let states = pair.events(Node::A, from_us)?.into_iter().filter(|event| event.event == "state");
    let left_for = states.filter_map(|event| event.to).filter(|to| to != "protected").collect();
    Ok(ArbiterPause { from_us, until_us, not_armed_us, armed_again_us: clock::mono_us(), left_for })
}

/// When each side said *not armed* for the first time.
fn look_until(pair: &Pair, end: Instant) -> Result<[Option<u64>; 2]> {
    let mut not_armed_us = [None; 2];
    while Instant::now() < end {
        for (node, not_armed_us) in Node::BOTH.into_iter().zip(&mut not_armed_us) {
            if pair.status(node)?.flag("armed") != Some(true) {
                not_armed_us.get_or_insert(clock::mono_us());
            }
        }
        thread::sleep(LOOK);
    }
    Ok(not_armed_us)
}

/// Waits until both sides' status says that a takeover would be granted.
pub fn wait_armed(pair: &mut Pair) -> Result<()> {
    let deadline = Instant::now() + ARMED_LIMIT;
    loop {
        let mut said = Vec::new();
        for node in Node::BOTH {
            let status = pair.status(node)?;
            if status.flag("armed") != Some(true) {
                said.push(format!("{node}: {}", status.json()));
            }
        }
        if said.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let detail = format!("{}\n{}", said.join("\n"), pair.logs());
            return Err(Error::Timeout { what: "both sides to be armed".into(), waited: ARMED_LIMIT, detail });
        }
        thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_that_counts_overlaps_the_pause() {
        let acks: Vec<Ack> = [0, 500, 510, 700, 1_500].map(|at_us| Ack { n: 0, sent_us: 0, at_us }).to_vec();
        let gap = |from, until| longest_gap(&acks, from, until).as_micros();
        assert_eq!(gap(505, 600), 190);
        assert_eq!(gap(505, 699), 190);
        assert_eq!(gap(505, 700), 800);
        assert_eq!(gap(100, 200), 500);
        assert_eq!(gap(1_600, 1_700), 0);
    }
}
