//! One rule broken at a time: a search that does not find it is worth nothing.

use std::time::Duration;

use replication_proto::mutant::Mutant;

use super::search::{Found, Limits, search};
use super::setup::Setup;

/// The broken rules that an exploration must find, each with a configuration in which it matters.
pub const HUNTED: [(Mutant, &str); 19] = [
    (Mutant::SoloWithoutCas, "calm"),
    (Mutant::TakeoverWithoutCas, "calm"),
    (Mutant::RecordWithoutIncarnation, "restored"),
    (Mutant::InSyncBeforeHolding, "calm"),
    (Mutant::PairingUncovered, "calm"),
    (Mutant::UncertainSyncIsFailure, "late"),
    (Mutant::SoloFromBareRead, "late"),
    (Mutant::UnknownIsApplied, "late"),
    (Mutant::PairingLostIsNeverNamed, "late"),
    (Mutant::RestartedPrimaryBoots, "lives"),
    (Mutant::ProtectedTooEarly, "calm"),
    (Mutant::RollbackBelieved, "rollback"),
    (Mutant::StopUnrecorded, "orders"),
    (Mutant::HandoverGivenUpBlindly, "orders"),
    (Mutant::HigherGenerationIgnored, "calm"),
    (Mutant::AckBeforeCommit, "calm"),
    (Mutant::AckAfterPromotion, "calm"),
    (Mutant::GateOpensOnLinkLoss, "calm"),
    (Mutant::IsolatedRejoins, "isolated"),
];

/// What a hunt came to.
#[derive(Debug)]
pub struct Hunt {
    /// The broken rule.
    pub mutant: Mutant,
    /// In which configuration it was looked for.
    pub setup: Setup,
    /// The violation, unless it got away.
    pub found: Option<Found>,
    /// States until then.
    pub states: usize,
    /// Time until then.
    pub took: Duration,
}

/// Explores with one rule broken until that is noticed.
///
/// # Panics
/// In a build without the feature `mutants`, and for a rule that is not in [`HUNTED`].
pub fn hunt(mutant: Mutant, limits: Limits) -> Hunt {
    let (_, name) = HUNTED.into_iter().find(|(hunted, _)| *hunted == mutant).expect("a rule of the core");
    let setup = Setup::named(name).expect("a configuration");
    let outcome = search(&setup, Limits { mutant: Some(mutant), ..limits });
    activate(None);
    Hunt { mutant, setup, found: outcome.found, states: outcome.states, took: outcome.took }
}

/// Breaks a rule on this thread, or none.
#[cfg(feature = "mutants")]
pub fn activate(mutant: Option<Mutant>) {
    replication_proto::mutant::activate(mutant);
}

/// Breaks a rule on this thread: not in this build.
#[cfg(not(feature = "mutants"))]
pub fn activate(mutant: Option<Mutant>) {
    assert_eq!(mutant, None, "this build has no broken rules: build with the feature `mutants`");
}
