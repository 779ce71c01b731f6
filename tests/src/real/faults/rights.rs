//! Who was ever given the right to run, as the event logs have it, and whether the LAN heard anybody else.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::real::Node;
use crate::real::events::Event;
use crate::real::lineage::Turn;

/// How long after a takeover frames of the side before may still come: it was stopped with frames in hand that the backup had
/// acknowledged, and lets them go when it goes on; what it held for longer (`max_hold`, 1 s) it drops.
const LATE_MAX: Duration = Duration::from_millis(1_100);

/// The right to run, given once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Grant {
    at_us: u64,
    node: Node,
    generation: u64,
}

/// All rights of one pair.
#[derive(Default)]
pub(super) struct Rights {
    grants: Vec<Grant>,
    /// How many events of each side were looked at.
    looked: BTreeMap<&'static str, usize>,
    /// The longest time after a takeover at which the side before was heard.
    pub(super) latest: Duration,
    /// How often the side before was heard after a takeover at all.
    pub(super) late_turns: u64,
}

impl Rights {
    /// Takes in what both logs have now, and what the LAN heard; says what must not be.
    pub(super) fn look(&mut self, logs: [&[Event]; 2], turns: &[Turn]) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut told: Vec<(Node, &Event)> = Vec::new();
        for (node, log) in Node::BOTH.into_iter().zip(logs) {
            let looked = self.looked.entry(node.as_str()).or_default();
            told.extend(log.iter().skip(*looked).filter(|e| e.event == "granted").map(|e| (node, e)));
            *looked = log.len();
        }
        told.sort_by_key(|(_, event)| event.mono_us);
        for (node, event) in told {
            self.granted(node, event, &mut wrong);
        }
        for turn in turns {
            self.heard(turn, &mut wrong);
        }
        wrong
    }

    /// The highest generation under which the guest ran.
    #[must_use]
    pub(super) fn generation(&self) -> u64 {
        self.grants.last().map_or(0, |grant| grant.generation)
    }

    fn granted(&mut self, node: Node, event: &Event, wrong: &mut Vec<String>) {
        let (right, generation) = (event.right.as_deref().unwrap_or_default(), event.generation.unwrap_or(0));
        let holder = self.grants.iter().rev().find(|grant| grant.generation == generation);
        if matches!(right, "boot" | "takeover" | "resume") {
            if let Some(other) = holder {
                wrong.push(format!("generation {generation} was granted to {node} ({right}) and to {}", other.node));
            }
            if let Some(last) = self.grants.last()
                && last.generation >= generation
            {
                wrong.push(format!("generation {generation} ({right}, {node}) came after {}", last.generation));
            }
            self.grants.push(Grant { at_us: event.mono_us, node, generation });
        } else if holder.is_none_or(|grant| grant.node != node) {
            wrong.push(format!("{node} was granted {right:?} under generation {generation}, which is not its own"));
        }
    }

    fn heard(&mut self, turn: &Turn, wrong: &mut Vec<String>) {
        let at = self.grants.partition_point(|grant| grant.at_us <= turn.last_us);
        let Some(owner) = at.checked_sub(1).and_then(|at| self.grants.get(at)) else {
            return wrong.push(format!("{} spoke for the guest before anybody was granted to: {turn:?}", turn.from));
        };
        if owner.node == turn.from {
            return;
        }
        // How long ago its own right had ended.
        let own = self.grants.get(..at).unwrap_or_default().windows(2).rev().find(|pair| pair[0].node == turn.from);
        let late = own.map(|pair| Duration::from_micros(turn.last_us.saturating_sub(pair[1].at_us)));
        match late {
            Some(late) if late <= LATE_MAX => {
                self.latest = self.latest.max(late);
                self.late_turns += 1;
            }
            Some(late) => {
                wrong.push(format!("{} spoke for the guest {late:?} after it had lost the right: {turn:?}", turn.from));
            }
            None => wrong.push(format!("{} spoke for the guest and never had the right: {turn:?}", turn.from)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn granted(at_us: u64, right: &str, generation: u64) -> Event {
        let text =
            format!("{{\"mono_us\":{at_us},\"event\":\"granted\",\"right\":\"{right}\",\"generation\":{generation}}}");
        serde_json::from_str(&text).unwrap()
    }

    fn turn(from: Node, first_us: u64, last_us: u64) -> Turn {
        Turn { from, first_us, last_us, frames: 3 }
    }

    #[test]
    fn one_after_the_other_is_fine() {
        let mut rights = Rights::default();
        let a = [granted(10, "boot", 1), granted(11, "solo", 1), granted(20, "protected", 1)];
        assert_eq!(rights.look([&a, &[]], &[turn(Node::A, 12, 30)]), Vec::<String>::new());
        let b = [granted(100, "takeover", 2), granted(101, "solo", 2)];
        assert_eq!(rights.look([&a, &b], &[turn(Node::B, 102, 200)]), Vec::<String>::new());
        // Late frames of the side before, within a second.
        assert_eq!(rights.look([&a, &b], &[turn(Node::A, 900_000, 900_100)]), Vec::<String>::new());
        assert_eq!((rights.late_turns, rights.latest), (1, Duration::from_micros(900_000)));
        assert_eq!(rights.generation(), 2);
    }

    #[test]
    fn two_at_once_are_found() {
        let a = [granted(10, "boot", 1)];
        let b = [granted(100, "takeover", 2)];
        let wrong = |a: &[Event], b: &[Event], turn: Turn| Rights::default().look([a, b], &[turn]);
        let fine = turn(Node::A, 12, 30);
        assert_eq!(wrong(&a, &b, turn(Node::A, 2_000_000, 2_000_001)).len(), 1);
        assert_eq!(wrong(&a, &b, turn(Node::B, 20, 30)).len(), 1, "before its takeover");
        assert_eq!(wrong(&[], &b, turn(Node::A, 120, 130)).len(), 1, "never granted");
        assert_eq!(wrong(&a, &b, turn(Node::A, 1, 2)).len(), 1, "before anybody");
        assert_eq!(wrong(&a, &[granted(100, "takeover", 1)], fine).len(), 2, "twice, and not growing");
        assert_eq!(wrong(&a, &[granted(100, "solo", 1)], fine).len(), 1, "another's generation");
    }
}
