//! A real pair of processes on this host, as the demo has it, for benchmarks: wires between network namespaces, one guest on KVM.

use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::BenchError;
use super::figures::Spread;
use crate::real::artifacts::Artifacts;
use crate::real::pair::{Pair, PairOptions, START_LIMIT};
use crate::real::resp::{Connection, Reply};
use crate::real::status::Status;
use crate::real::{MachineKind, Node, clock};

/// Timers that a busy host does not run into: a run that lost its protection measures nothing.
const PATIENT: &str = "[timers]\nsolo = \"5s\"\ntakeover = \"9s\"\n";
/// How long a reply may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How the guest is protected while something is measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mode {
    /// For tables.
    pub name: String,
    /// `[epoch]` in words ([`PairOptions::epoch`]); without any there is no backup.
    pub epoch: Option<String>,
}

impl Mode {
    /// No backup, output leaves at once.
    #[must_use]
    pub fn unprotected() -> Self {
        Self { name: "unprotected".into(), epoch: None }
    }

    /// Protected; `epoch` is also the name.
    #[must_use]
    pub fn protected(epoch: &str) -> Self {
        Self { name: epoch.into(), epoch: Some(epoch.into()) }
    }

    /// Those that are compared: nobody there, clocks, and targets.
    #[must_use]
    pub fn compared(fixed: &[String], adaptive: &[String]) -> Vec<Self> {
        let protected = fixed.iter().chain(adaptive).map(|epoch| Self::protected(epoch));
        std::iter::once(Self::unprotected()).chain(protected).collect()
    }

    /// Whether the programs take such a configuration: before hours of measuring, not in them.
    ///
    /// # Errors
    /// They do not, in their words.
    pub fn check(&self, artifacts: &Artifacts) -> Result<(), BenchError> {
        let Some(epoch) = &self.epoch else { return Ok(()) };
        let options = PairOptions { epoch: epoch.clone(), ..PairOptions::new(MachineKind::Kvm) };
        let pair = Pair::prepare(artifacts.clone(), &options)?;
        let said = pair.ftctl(Node::A, &["config", "check"])?;
        match said.success("ftctl config check") {
            Ok(_) => Ok(()),
            Err(error) => Err(BenchError::Wrong(format!("these programs do not know [epoch] {epoch:?}: {error}"))),
        }
    }
}

/// A pair whose guest answers in the state that is wanted.
pub struct Bench {
    /// The pair; its guest runs on A.
    pub pair: Pair,
    state: &'static str,
    since_us: u64,
}

impl Bench {
    /// Starts a pair.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(artifacts: &Artifacts, mode: &Mode, memory: &str, extra: &str) -> Result<Self, BenchError> {
        let mut options = PairOptions {
            memory: memory.into(),
            extra: format!("{PATIENT}{extra}"),
            ..PairOptions::new(MachineKind::Kvm)
        };
        let Some(epoch) = &mode.epoch else {
            let mut pair = Pair::prepare(artifacts.clone(), &options)?;
            pair.start_primary(Node::A, &[])?;
            drop(pair.wait_guest(START_LIMIT)?);
            return Ok(Self { pair, state: "solo", since_us: clock::mono_us() });
        };
        options.epoch.clone_from(epoch);
        let mut pair = Pair::prepare(artifacts.clone(), &options)?;
        pair.start_protected()?;
        Ok(Self { pair, state: "protected", since_us: clock::mono_us() })
    }

    /// A connection to the guest.
    ///
    /// # Errors
    /// The guest cannot be reached.
    pub fn connect(&self) -> Result<Connection, BenchError> {
        Ok(Connection::open(self.pair.network().client(), PATIENCE)?)
    }

    /// What the owner says about itself. A side that left its state meanwhile has no figures.
    ///
    /// # Errors
    /// The state changed, or there is no status.
    pub fn status(&self) -> Result<Status, BenchError> {
        let status = self.pair.status(Node::A)?;
        let left = self.pair.events(Node::A, self.since_us)?.iter().any(|event| event.event == "state");
        if left || status.state() != self.state {
            return Err(BenchError::Wrong(format!("{} was left: now {}", self.state, status.state())));
        }
        Ok(status)
    }
}

/// What the owner measured of its checkpoints.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Checkpoints {
    pub epochs_per_second: f64,
    pub guest_lost_ratio: f64,
    pub commit_us: f64,
    pub pause_us: Spread,
    pub transfer_us: Spread,
    pub ack_us: Spread,
    pub output_hold_us: Spread,
}

impl Checkpoints {
    /// Of a status; all zero without protection.
    #[must_use]
    pub fn of(status: &Status) -> Self {
        let pacing = |name: &str| status.json()["pacing"][name].as_f64().unwrap_or_default();
        let timing = |name: &str| {
            let points = status.timing(name, 1e-6).unwrap_or_default();
            Spread { p50: points.p50, p99: points.p99, max: points.max }
        };
        Self {
            epochs_per_second: pacing("epochs_per_second"),
            guest_lost_ratio: pacing("guest_lost_ratio"),
            commit_us: pacing("commit_seconds") * 1e6,
            pause_us: timing("pause"),
            transfer_us: timing("transfer"),
            ack_us: timing("ack"),
            output_hold_us: timing("output_hold"),
        }
    }
}

/// Sends a command that is answered with OK.
///
/// # Errors
/// Any other answer, or none.
pub fn order(connection: &mut Connection, words: &[&str]) -> Result<(), BenchError> {
    match connection.call(words).map_err(super::host("a command to the guest"))? {
        Reply::Simple(ok) if ok == "OK" => Ok(()),
        other => Err(BenchError::Wrong(format!("{words:?} was answered by {other:?}"))),
    }
}

/// What the guest has counted.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    /// Work done since boot.
    pub work_units: u64,
    /// Pages written since boot.
    pub pages_dirtied: u64,
    /// Its own clock.
    pub uptime: Duration,
}

impl Counted {
    /// Asks the guest.
    ///
    /// # Errors
    /// The guest does not answer, or does not count work.
    pub fn ask(connection: &mut Connection) -> Result<Self, BenchError> {
        let reply = connection.call(&["FT.COUNTERS"]).map_err(super::host("FT.COUNTERS"))?;
        Self::parse(&reply).map_err(super::host("FT.COUNTERS"))
    }

    fn parse(reply: &Reply) -> io::Result<Self> {
        let Reply::Bulk(Some(text)) = reply else {
            return Err(io::Error::other(format!("not counters: {reply:?}")));
        };
        let text = String::from_utf8_lossy(text);
        let field = |name: &str| {
            let value = text.lines().filter_map(|line| line.split_once(':')).find(|(known, _)| *known == name);
            value.and_then(|(_, value)| value.parse().ok()).ok_or_else(|| io::Error::other(format!("no {name}")))
        };
        let uptime = Duration::from_millis(field("uptime_ms")?);
        Ok(Self { work_units: field("work_units")?, pages_dirtied: field("pages_dirtied")?, uptime })
    }

    /// Work done a second since `before`, by the guest's clock.
    #[must_use]
    pub fn speed_since(&self, before: &Self) -> f64 {
        rate(self.work_units - before.work_units, self.uptime.saturating_sub(before.uptime))
    }

    /// Pages written a second since `before`.
    #[must_use]
    pub fn pages_since(&self, before: &Self) -> f64 {
        rate(self.pages_dirtied - before.pages_dirtied, self.uptime.saturating_sub(before.uptime))
    }
}

/// So many in this time, a second.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
pub fn rate(count: u64, span: Duration) -> f64 {
    if span.is_zero() { 0.0 } else { count as f64 / span.as_secs_f64() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_and_others_are_errors() {
        let text = |text: &str| Reply::Bulk(Some(text.as_bytes().to_vec()));
        let early = Counted::parse(&text("work_units:7\r\nuptime_ms:1000\r\npages_dirtied:3\r\n")).unwrap();
        let late =
            Counted::parse(&text("frames_sent:1\r\npages_dirtied:13\r\nuptime_ms:3000\r\nwork_units:107\r\n")).unwrap();
        assert_eq!((late.speed_since(&early), late.pages_since(&early)), (50.0, 5.0));
        assert!(Counted::parse(&text("uptime_ms:1\r\n")).is_err() && Counted::parse(&Reply::Integer(1)).is_err());
    }
}
