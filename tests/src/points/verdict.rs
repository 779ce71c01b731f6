//! What must hold after every case.

use std::thread;
use std::time::{Duration, Instant};

use failover::arbiter::Record;
use failover::failpoint::{Moment, Point, Side};

use super::ground::Ground;
use super::{Action, Case, Outcome, Row};
use crate::real::client::Writer;
use crate::real::events::Event;
use crate::real::watch::{Seen, Watch};
use crate::real::{Error, Node, Result};

/// A frame's time is when the witness read it, and an event's time is when its line was made.
const SLACK_US: u64 = 200_000;
/// How long both sides may take to say of themselves what they are.
const SAYS_SO: Duration = Duration::from_secs(60);

/// How long a client may look for a guest that was booted anew.
const FOUND: Duration = Duration::from_secs(5);

/// A case, and what is known of its course.
pub struct Fault {
    /// The case.
    pub case: Case,
    /// When it began.
    pub began_us: u64,
    /// When the fault came.
    pub fired_us: u64,
    /// Who ran the guest before.
    pub before: Node,
    /// Who runs it now.
    pub after: Node,
    /// What the arbiter held right after the fault.
    pub record: Option<Record>,
}

/// The right to run changed hands, or was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Right {
    at_us: u64,
    node: Node,
    /// `None`: the node has no right from here on.
    generation: Option<u64>,
}

/// Judges a case whose pair is whole again.
pub fn judge(ground: &mut Ground, fault: &Fault, writer: Option<Writer>, watch: Watch) -> Result<Row> {
    let outcome = outcome(ground, fault)?;
    let (gap_us, writes) = match (outcome, writer) {
        (Outcome::Lost | Outcome::Off | Outcome::Booted, _) | (_, None) => {
            // Wherever it was before, a client finds it.
            ground.pair.wait_guest(FOUND)?;
            (None, 0)
        }
        (_, Some(writer)) => client(ground, fault, writer)?,
    };
    tells_the_truth(ground, fault.after)?;
    let rights = rights(ground)?;
    let seen = watch.finish()?;
    let late_frames = one_speaker(&rights, &seen)?;
    ground.seen.extend(seen);
    let expected = expected(fault);
    if !expected.contains(&outcome) {
        let detail = format!("the outcome is {outcome:?}, not one of {expected:?}; the record: {:?}", fault.record);
        return Err(Error::Busy { what: fault.case.to_string(), detail });
    }
    Ok(Row { case: fault.case, outcome, gap_us, writes, late_frames, again: false })
}

fn outcome(ground: &Ground, fault: &Fault) -> Result<Outcome> {
    let mine = ground.pair.events(fault.before, fault.fired_us)?;
    let theirs = ground.pair.events(fault.before.peer(), fault.began_us)?;
    let granted = |events: &[Event], right: &str| {
        events.iter().any(|e| e.event == "granted" && e.right.as_deref() == Some(right))
    };
    let booted = granted(&mine, "boot") || granted(&theirs, "boot");
    let takeover = fault.after != fault.before;
    Ok(match fault.case.moment {
        Moment::Boot => Outcome::Booted,
        Moment::Stop if booted && !granted(&theirs, "takeover") => Outcome::Off,
        _ if booted => Outcome::Lost,
        _ if granted(&mine, "resume") => Outcome::Forced,
        _ if takeover => Outcome::Takeover,
        _ if mine.iter().any(|e| e.enters("solo")) => Outcome::Solo,
        _ => Outcome::Unnoticed,
    })
}

/// What the failure matrix allows. After a crash it follows from the record as it was then.
fn expected(fault: &Fault) -> Vec<Outcome> {
    use Outcome::{Booted, Forced, Lost, Off, Solo, Takeover, Unnoticed};
    let Case { point, side, moment, action, .. } = fault.case;
    let name = |node: Node| node.as_str().to_owned();
    let owned_by_other = fault.record.as_ref().is_some_and(|r| r.owner.node.as_str() == name(fault.before.peer()));
    let names_other = fault
        .record
        .as_ref()
        .and_then(|r| r.in_sync.as_ref())
        .is_some_and(|s| s.node.as_str() == name(fault.before.peer()));
    let crash = action == Action::Crash;
    let machine_fails = action == Action::Fail && matches!(point, Point::EpochStop | Point::EpochStaged);
    match (moment, side) {
        (Moment::Epochs, Side::Owner) if crash => vec![Takeover],
        // The machine can be neither stopped nor resumed here: a copy of it can.
        (Moment::Epochs, Side::Owner) if machine_fails => vec![Takeover],
        (Moment::Epochs, Side::Owner) => vec![Unnoticed, Solo, Takeover],
        (Moment::Epochs, Side::Standby) if crash => vec![Solo],
        // A standby that closes its connections looks dead, and the owner looks dead to it: whoever asks the arbiter first goes on.
        (Moment::Epochs, Side::Standby) if action == Action::Fail => vec![Unnoticed, Solo, Takeover],
        (Moment::Epochs, Side::Standby) => vec![Unnoticed, Solo],
        // By the time the record is looked at, a backup that it named may have used its right.
        (Moment::Base | Moment::Solo, Side::Owner) if crash => {
            vec![if names_other || owned_by_other { Takeover } else { Lost }]
        }
        (Moment::Base, Side::Owner) if action == Action::Stop => vec![Unnoticed, Solo, Takeover],
        (Moment::Base, _) => vec![Unnoticed, Solo],
        (Moment::Solo, _) => vec![Solo],
        // The winner of the record died: nobody but the fenced side has the guest. Or the record was not written yet.
        (Moment::Takeover, _) if crash => vec![if owned_by_other { Forced } else { Solo }],
        (Moment::Takeover, _) if action == Action::Fail => vec![Takeover, Forced],
        (Moment::Takeover | Moment::Fence, _) => vec![Takeover],
        (Moment::Switchover, Side::Owner) if crash => vec![Takeover],
        (Moment::Switchover, Side::Standby) if crash => vec![if owned_by_other { Forced } else { Solo }],
        (Moment::Switchover, _) if point == Point::TakeoverGranted && action == Action::Fail => vec![Forced],
        (Moment::Switchover, _) => vec![Takeover, Solo, Unnoticed],
        (Moment::Force, _) => vec![if crash { Lost } else { Forced }],
        (Moment::Stop, _) if crash => vec![if names_other || owned_by_other { Takeover } else { Off }],
        (Moment::Stop, _) if action == Action::Stop => vec![Off, Takeover],
        (Moment::Stop, _) => vec![Off],
        (Moment::Boot, _) => vec![Booted],
    }
}

/// Nothing that the client was told is lost or wrong, and its connection lives.
fn client(ground: &Ground, fault: &Fault, writer: Writer) -> Result<(Option<u64>, usize)> {
    let report = writer.finish(ground.pair.network().client());
    let acked = report.acks.len();
    if !report.connection_survived() || !report.same.complete(acked) || !report.fresh.complete(acked) {
        let detail = format!(
            "{acked} writes acknowledged, {} lost, {} wrong; its connection: {:?}; read back there: {:?}, on a new one: {:?}",
            report.lost(),
            report.wrong(),
            report.connection_error,
            report.same,
            report.fresh
        );
        return Err(Error::answer("the client", detail));
    }
    Ok((report.longest_silence(fault.fired_us).map(|(begin, end)| end - begin), acked))
}

/// Both sides and the record say the same, and it is so.
fn tells_the_truth(ground: &Ground, owner: Node) -> Result<()> {
    let deadline = Instant::now() + SAYS_SO;
    loop {
        let (here, there) = (ground.pair.status(owner)?, ground.pair.status(owner.peer())?);
        let record = ground.record()?.ok_or_else(|| Error::answer("the arbiter", "no record"))?;
        let generation = Some(record.generation.0);
        let named = record.owner.node.as_str() == owner.as_str()
            && record.in_sync.as_ref().is_some_and(|s| s.node.as_str() == owner.peer().as_str());
        let said = here.state() == "protected" && there.state() == "in_sync";
        let flags = [(&here, "protected"), (&here, "armed")].iter().all(|(s, f)| s.flag(f) == Some(true));
        if named && said && flags && here.number("generation") == generation && there.number("generation") == generation
        {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let detail = format!("owner: {}\nstandby: {}\nrecord: {record:?}", here.json(), there.json());
            return Err(Error::answer(format!("the status of a pair that {owner} owns"), detail));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Every change of the right to run that the processes told of, in order of time. No generation is granted twice, and they grow.
fn rights(ground: &Ground) -> Result<Vec<Right>> {
    let mut rights = Vec::new();
    for node in Node::BOTH {
        for event in ground.pair.events(node, 0)? {
            let granted =
                event.event == "granted" && matches!(event.right.as_deref(), Some("boot" | "takeover" | "resume"));
            if granted {
                rights.push(Right { at_us: event.mono_us, node, generation: event.generation });
            } else if event.event == "started" || event.enters("fenced") {
                rights.push(Right { at_us: event.mono_us, node, generation: None });
            }
        }
    }
    rights.sort_by_key(|right| right.at_us);
    let granted: Vec<u64> = rights.iter().filter_map(|right| right.generation).collect();
    if granted.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Err(Error::answer("generations", format!("do not grow with every grant: {granted:?}")));
    }
    Ok(rights)
}

/// Whoever spoke for the guest had the right to. Returns how many frames left a former owner after another had been granted the right: those of epochs
/// that were acknowledged before.
fn one_speaker(rights: &[Right], seen: &[Seen]) -> Result<usize> {
    let holds = |node: Node, at_us: u64| {
        rights.iter().rev().find(|right| right.node == node && right.at_us <= at_us).and_then(|right| right.generation)
    };
    let granted = |node: Node, from_us: u64, until_us: u64| {
        let within = |right: &&Right| right.node == node && (from_us..=until_us).contains(&right.at_us);
        rights.iter().filter(within).filter_map(|right| right.generation).max()
    };
    let mut late = 0;
    for frame in seen {
        let since = frame.at_us.saturating_sub(SLACK_US);
        let Some(generation) = granted(frame.from, since, frame.at_us + SLACK_US).or(holds(frame.from, since)) else {
            return Err(Error::answer(
                "the guest LAN",
                format!("{} spoke at {} us without the right to run: {rights:?}", frame.from, frame.at_us),
            ));
        };
        if holds(frame.from.peer(), frame.at_us).is_some_and(|other| other > generation) {
            late += 1;
        }
    }
    Ok(late)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn right(at_s: u64, node: Node, generation: Option<u64>) -> Right {
        Right { at_us: at_s * 1_000_000, node, generation }
    }

    fn frame(at_s: u64, from: Node) -> Seen {
        Seen { at_us: at_s * 1_000_000, from, ether_type: 0x0800 }
    }

    #[test]
    fn a_speaker_without_the_right_is_found_and_a_late_one_is_counted() {
        let rights = [
            right(0, Node::A, None),
            right(1, Node::A, Some(1)),
            right(1, Node::B, None),
            right(4, Node::B, Some(2)),
            right(6, Node::A, None),
        ];
        assert_eq!(one_speaker(&rights, &[frame(2, Node::A), frame(5, Node::B)]).unwrap(), 0);
        assert_eq!(one_speaker(&rights, &[frame(5, Node::A)]).unwrap(), 1);
        assert!(one_speaker(&rights, &[frame(3, Node::B)]).is_err());
        assert!(one_speaker(&rights, &[frame(8, Node::A)]).is_err());
    }
}
