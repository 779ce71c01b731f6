//! Wrong rules, to prove that the checks catch them: each variant breaks one safety rule at the place where the code asks [`is`]. Without the
//! feature `mutants`, which no shipped binary has, [`is`] is the constant `false` and nothing of this is compiled in.

/// A rule, broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mutant {
    /// The owner goes solo without asking the arbiter.
    SoloWithoutCas,
    /// The backup takes over without asking the arbiter.
    TakeoverWithoutCas,
    /// The record's `in_sync` is compared by node only: a restarted, empty backup may take over.
    RecordWithoutIncarnation,
    /// The backup acknowledges after it has learnt that its takeover succeeded.
    AckAfterPromotion,
    /// The backup acknowledges an epoch when its end arrives, before it is verified and committed.
    AckBeforeCommit,
    /// The record names the backup before output is held and covered.
    InSyncBeforeHolding,
    /// An uncertain in-sync compare-and-swap is treated as one that failed: output opens again.
    UncertainSyncIsFailure,
    /// *Solo* is concluded from a read while an own in-sync compare-and-swap may still be applied.
    SoloFromBareRead,
    /// A dirty set is retired when its checkpoint was sent, not when it is committed.
    RetireOnSend,
    /// Held output leaves when the link to the backup is lost.
    GateOpensOnLinkLoss,
    /// Acknowledgements release output whatever generation they name.
    AckGenerationUnchecked,
    /// While the guest runs, dirty bits are cleared after their pages were copied, not before.
    DirtyClearedAfterCopy,
    /// A restarted primary boots at once although the record names a backup in sync.
    RestartedPrimaryBoots,
    /// Status says PROTECTED as soon as the base is committed.
    ProtectedTooEarly,
    /// The pages of an incomplete epoch go straight into the standby's memory.
    DeltaIntoStandby,
    /// A record of a lower generation than was seen is believed.
    RollbackBelieved,
    /// An ordered stop says goodbye and ends before the record says *stopped*.
    StopUnrecorded,
    /// The owner takes any backup's acknowledgement, not only that of the one in the record.
    AckOfAnyIncarnation,
    /// An owner that hears of a higher generation runs on.
    HigherGenerationIgnored,
    /// The record names the backup as soon as its base is committed, without an epoch that covers what was let out meanwhile.
    PairingUncovered,
    /// A compare-and-swap without an answer is concluded to be done.
    UnknownIsApplied,
    /// A switchover's owner resumes the guest after its patience without asking the arbiter.
    HandoverGivenUpBlindly,
    /// An owner that loses its backup while the record may name it opens its output without asking.
    PairingLostIsNeverNamed,
    /// The backup acknowledges an epoch that holds a flush before its changes are on stable storage.
    AckBeforeStable,
    /// A side that halted because it reached nobody drops its guest and offers itself as the backup, whoever owns the guest.
    IsolatedRejoins,
    /// A pause of protection never ends by itself.
    PauseForEver,
    /// A block changes before its bit is on stable storage.
    BitAfterWrite,
    /// A map's base moves, and the journal is emptied, before the image is on stable storage.
    BaseBeforeImage,
    /// What a returning side changed itself is not looked at.
    ReturnersBitsIgnored,
    /// A page that was copied before the pause and written again is not copied again.
    PrecopiedPageKept,
    /// The pages that were copied before the pause are retired when they were copied.
    PrecopyRetired,
    /// A write-protected page may be written before it was copied.
    WrittenBeforeCopied,
}

impl Mutant {
    /// Every one of them.
    pub const ALL: [Self; 32] = [
        Self::SoloWithoutCas,
        Self::TakeoverWithoutCas,
        Self::RecordWithoutIncarnation,
        Self::AckAfterPromotion,
        Self::AckBeforeCommit,
        Self::InSyncBeforeHolding,
        Self::UncertainSyncIsFailure,
        Self::SoloFromBareRead,
        Self::RetireOnSend,
        Self::GateOpensOnLinkLoss,
        Self::AckGenerationUnchecked,
        Self::DirtyClearedAfterCopy,
        Self::RestartedPrimaryBoots,
        Self::ProtectedTooEarly,
        Self::DeltaIntoStandby,
        Self::RollbackBelieved,
        Self::StopUnrecorded,
        Self::AckOfAnyIncarnation,
        Self::HigherGenerationIgnored,
        Self::PairingUncovered,
        Self::UnknownIsApplied,
        Self::HandoverGivenUpBlindly,
        Self::PairingLostIsNeverNamed,
        Self::AckBeforeStable,
        Self::IsolatedRejoins,
        Self::PauseForEver,
        Self::BitAfterWrite,
        Self::BaseBeforeImage,
        Self::ReturnersBitsIgnored,
        Self::PrecopiedPageKept,
        Self::PrecopyRetired,
        Self::WrittenBeforeCopied,
    ];
}

/// Whether this rule is broken now, on this thread.
#[cfg(not(feature = "mutants"))]
#[must_use]
pub const fn is(_: Mutant) -> bool {
    false
}

#[cfg(feature = "mutants")]
pub use active::{activate, is};

#[cfg(feature = "mutants")]
mod active {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Breaks one rule on this thread from now on, or none.
    pub fn activate(mutant: Option<Mutant>) {
        ACTIVE.set(mutant);
    }

    /// Whether this rule is broken now, on this thread.
    #[must_use]
    pub fn is(mutant: Mutant) -> bool {
        ACTIVE.get() == Some(mutant)
    }
}
