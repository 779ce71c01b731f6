//! What a run found, for people and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::checker::Checked;
use super::judge::Outage;
use crate::real::MachineKind;

/// Silences over this are listed one by one.
pub(super) const LONG_US: u64 = 1_000_000;

/// One fault and what came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Round {
    /// Its number, from 0; with the run's seed it gives the same draws again.
    pub number: u64,
    /// The kind, or both kinds.
    pub fault: String,
    /// When the second fault came after the first.
    pub second_after_ms: Option<u64>,
    /// Clients only read, and knew every answer.
    pub quiet: bool,
    /// From the first act to the last.
    pub lasted_ms: u64,
    /// The longest time in which no client at all had an answer.
    pub gap_us: u64,
    /// The longest time in which one client had no answer.
    pub client_gap_us: u64,
    /// From the first act until the pair was protected and armed again, or given up.
    pub healed_ms: u64,
    /// The guest runs on the other side now.
    pub moved: bool,
    /// The row of the failure matrix, if nobody could go on.
    pub outage: Option<Outage>,
    /// State changes and grants of both sides, for the long ones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trace: Vec<String>,
}

/// Three points of a distribution, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// Median.
    pub p50_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// Largest.
    pub max_ms: f64,
}

impl Spread {
    fn of(mut values_us: Vec<u64>) -> Self {
        values_us.sort_unstable();
        let at = |percent: usize| {
            let index = (values_us.len() * percent).div_ceil(100).saturating_sub(1);
            let us = values_us.get(index).copied().unwrap_or(0);
            f64::from(u32::try_from(us).unwrap_or(u32::MAX)) / 1_000.0
        };
        Self { p50_ms: at(50), p99_ms: at(99), max_ms: at(100) }
    }
}

/// What all rounds of one kind had in common.
#[derive(Clone, Debug, Default, Serialize)]
pub struct KindSummary {
    /// Rounds that consisted of this fault alone.
    pub single: u64,
    /// Rounds in which it was one of two.
    pub in_double: u64,
    /// Single rounds after which the guest ran on the other side.
    pub moved: u64,
    /// Times without any answer, of single rounds.
    pub gap: Spread,
    /// Longest time that a client waited, of single rounds.
    pub client_gap: Spread,
    /// Until protected and armed again, of single rounds.
    pub healed: Spread,
}

/// All of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this form.
    pub schema: &'static str,
    /// `kvm` or `model`.
    pub machine: String,
    /// What the run was drawn from.
    pub seed: u64,
    /// Faults asked for.
    pub asked: u64,
    /// Faults that happened.
    pub faults: u64,
    /// Of these, two at once.
    pub double_faults: u64,
    /// Legitimate outages by row of the failure matrix.
    pub outages: BTreeMap<Outage, u64>,
    /// Pairs that were set up.
    pub pairs: u64,
    /// Highest generation of each pair.
    pub generations: Vec<u64>,
    /// Takeovers in which the digest of all of RAM was compared (and equal, or the run fails).
    pub ram_compared: u64,
    /// Takeovers, resumptions and boots.
    pub activations: u64,
    /// Guests that an operator resumed because the winner had died (row 21).
    pub resumed: u64,
    /// Digests of the guest's own that clients compared in quiet rounds.
    pub guest_digests_compared: u64,
    /// Keys whose last value was read again later, after other faults.
    pub values_read_again: u64,
    /// Operations that were answered.
    pub operations_answered: u64,
    /// Operations with an unknown outcome.
    pub operations_unknown: u64,
    /// Keys whose histories were checked.
    pub keys_checked: u64,
    /// Most operations on one key.
    pub longest_history: u64,
    /// Connections that did not survive, outages apart.
    pub connections_lost: u64,
    /// Bytes that were said twice on the guest LAN, the same each time.
    pub repeated_bytes: u64,
    /// How often the side before was heard after a takeover, and how long after at most: late frames that the backup had acknowledged.
    pub late_turns: u64,
    /// Milliseconds.
    pub latest_ms: u64,
    /// By kind of fault.
    pub kinds: BTreeMap<String, KindSummary>,
    /// Times without any answer, all rounds without an outage.
    pub gap: Spread,
    /// Rounds with a silence of more than a second.
    pub long_gaps: Vec<Round>,
    /// What must not be. Empty, or the run has failed.
    pub failures: Vec<String>,
    /// Kept directories of failed pairs.
    pub kept: Vec<String>,
    /// Wall-clock time of the run.
    pub took_seconds: u64,
    /// Every round.
    pub rounds: Vec<Round>,
}

impl Report {
    pub(super) fn new(machine: MachineKind, seed: u64, asked: u64) -> Self {
        Self {
            schema: "ft.faults/1",
            machine: machine.to_string(),
            seed,
            asked,
            faults: 0,
            double_faults: 0,
            outages: BTreeMap::new(),
            pairs: 0,
            generations: Vec::new(),
            ram_compared: 0,
            activations: 0,
            resumed: 0,
            guest_digests_compared: 0,
            values_read_again: 0,
            operations_answered: 0,
            operations_unknown: 0,
            keys_checked: 0,
            longest_history: 0,
            connections_lost: 0,
            repeated_bytes: 0,
            late_turns: 0,
            latest_ms: 0,
            kinds: BTreeMap::new(),
            gap: Spread::default(),
            long_gaps: Vec::new(),
            failures: Vec::new(),
            kept: Vec::new(),
            took_seconds: 0,
            rounds: Vec::new(),
        }
    }

    /// Whether everything was as promised.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.failures.is_empty() && self.faults >= self.asked
    }

    pub(super) fn count(&mut self, checked: &Checked) {
        self.keys_checked = checked.keys;
        self.operations_answered = checked.answered;
        self.operations_unknown = checked.unknown;
        self.longest_history = checked.longest;
        self.failures.extend(checked.violations.iter().map(|(round, what)| format!("round {round}: {what}")));
    }

    /// Sums the rounds up.
    pub(super) fn sum_up(&mut self) {
        let mut singles: BTreeMap<&str, Vec<&Round>> = BTreeMap::new();
        let mut kinds: BTreeMap<String, KindSummary> = BTreeMap::new();
        for round in &self.rounds {
            match round.fault.split_once('+') {
                None => singles.entry(&round.fault).or_default().push(round),
                Some(both) => {
                    for kind in [both.0, both.1] {
                        kinds.entry(kind.to_owned()).or_default().in_double += 1;
                    }
                }
            }
        }
        for (kind, rounds) in singles {
            let lived = |value: fn(&Round) -> u64| {
                Spread::of(rounds.iter().filter(|r| r.outage.is_none()).map(|r| value(r)).collect())
            };
            let summary = kinds.entry(kind.to_owned()).or_default();
            summary.single = rounds.len() as u64;
            summary.moved = rounds.iter().filter(|round| round.moved).count() as u64;
            summary.gap = lived(|round| round.gap_us);
            summary.client_gap = lived(|round| round.client_gap_us);
            summary.healed = lived(|round| round.healed_ms * 1_000);
        }
        let lived = || self.rounds.iter().filter(|round| round.outage.is_none());
        self.gap = Spread::of(lived().map(|round| round.gap_us).collect());
        self.long_gaps = lived().filter(|round| round.gap_us > LONG_US).cloned().collect();
        self.faults = self.rounds.len() as u64;
        self.double_faults = self.rounds.iter().filter(|round| round.fault.contains('+')).count() as u64;
        self.kinds = kinds;
    }

    /// A table for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut out = String::new();
        let mut line = |text: String| writeln!(out, "{text}").expect("a string takes everything");
        line(format!(
            "{:<24} {:>6} {:>7} {:>6}   {:>8} {:>8} {:>8}   {:>9}",
            "fault", "single", "doubles", "moved", "gap p50", "p99", "max ms", "healed ms"
        ));
        for (kind, summary) in &self.kinds {
            let KindSummary { single, in_double, moved, gap, healed, client_gap: _ } = summary;
            line(format!(
                "{kind:<24} {single:>6} {in_double:>7} {moved:>6}   {:>8.0} {:>8.0} {:>8.0}   {:>9.0}",
                gap.p50_ms, gap.p99_ms, gap.max_ms, healed.p50_ms
            ));
        }
        line(format!(
            "{} faults ({} double) on {} pairs of {} machines, seed {}, {} s; outages {:?}; resumed by force {}",
            self.faults,
            self.double_faults,
            self.pairs,
            self.machine,
            self.seed,
            self.took_seconds,
            self.outages,
            self.resumed
        ));
        line(format!(
            "{} operations answered, {} unknown, {} keys linearizable (longest history {}), {} connections lost",
            self.operations_answered,
            self.operations_unknown,
            self.keys_checked,
            self.longest_history,
            self.connections_lost
        ));
        line(format!(
            "{} activations, RAM compared in {}; guest digests compared {}, values read again {}; \
             {} bytes said twice alike; late frames {} times, at most {} ms",
            self.activations,
            self.ram_compared,
            self.guest_digests_compared,
            self.values_read_again,
            self.repeated_bytes,
            self.late_turns,
            self.latest_ms
        ));
        line(format!("silences over 1 s: {}; failures: {}", self.long_gaps.len(), self.failures.len()));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_summed_up_by_kind() {
        let round = |fault: &str, gap_us, outage| Round {
            number: 0,
            fault: fault.into(),
            second_after_ms: None,
            quiet: false,
            lasted_ms: 0,
            gap_us,
            client_gap_us: gap_us,
            healed_ms: 7,
            moved: gap_us > 100,
            outage,
            trace: Vec::new(),
        };
        let mut report = Report::new(MachineKind::Model, 1, 4);
        report.rounds = vec![
            round("flap", 50_000, None),
            round("flap", 2_000_000, None),
            round("flap", 9_000_000, Some(Outage::SoloDied)),
            round("flap+slow", 1, None),
        ];
        report.sum_up();
        let flap = &report.kinds["flap"];
        assert_eq!((flap.single, flap.in_double, flap.moved), (3, 1, 3));
        assert_eq!((flap.gap.p50_ms, flap.gap.max_ms), (50.0, 2_000.0));
        assert_eq!((report.long_gaps.len(), report.double_faults, report.faults), (1, 1, 4));
        assert!(report.is_good() && report.table().contains("4 faults (1 double)"));
    }
}
