//! Why a side is in the state that it is in: a stable code, a sentence, and what to do about it.

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident, $code:literal, $text:literal, $next:literal;)*) => {
        /// A stable code for logs, metrics and scripts.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum ReasonCode {
            $($(#[$doc])* #[doc = $text] #[serde(rename = $code)] $name,)*
        }

        impl ReasonCode {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The code as in JSON.
            pub const fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)* }
            }

            /// One sentence for people.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// What a person does next; empty when there is nothing to do.
            pub const fn next_step(self) -> &'static str {
                match self { $(Self::$name => $next,)* }
            }
        }
    };
}

reasons! {
    Starting, "starting", "reading the arbiter's record", "";
    ArbiterUnreachable, "arbiter_unreachable", "the arbiter does not answer", "check that the arbiter's path or address is reachable from this node";
    ArbiterUnusable, "arbiter_unusable", "the arbiter holds something that is not a usable record", "inspect it with `ftctl arbiter show`; nothing overwrites it";
    ArbiterRolledBack, "arbiter_rolled_back", "the arbiter's record is older than what this node has seen, or gone", "the arbiter was restored or emptied: find out which side runs, then re-seed with `ftctl failover --force` there";
    ArbiterForeign, "arbiter_foreign", "the arbiter's record belongs to another VM or names other nodes", "compare [vm] id, [nodes] and [arbiter] in pair.toml on both hosts";
    FirstBoot, "first_boot", "no record yet: this node boots the guest for the first time", "";
    ColdBoot, "cold_boot", "the guest is booted anew by its recorded owner", "";
    ColdStartRefused, "cold_start_refused", "nothing of the guest is left and cold_start = \"never\"", "start with `--force-cold-boot` to boot it anew";
    WaitingForBackup, "waiting_for_backup", "no backup is connected", "start ft-backup on the other node; protection starts by itself";
    BaseCopy, "base_copy", "the base is being copied to the backup", "wait; protection starts by itself";
    ClosingIn, "closing_in", "the base is committed; the last epoch before protection is on its way", "wait; protection starts by itself";
    Covered, "covered", "every output that leaves is covered by the backup", "";
    BackupSilent, "backup_silent", "the backup went silent", "check the replication link and ft-backup on the other node; resync starts by itself";
    BackupClosed, "backup_closed", "the backup's connection was closed", "start ft-backup on the other node; resync starts by itself";
    BackupReplaced, "backup_replaced", "the backup process was restarted", "wait; resync starts by itself";
    BackupLeft, "backup_left", "the backup said goodbye", "start ft-backup on the other node; resync starts by itself";
    BackupDropped, "backup_dropped", "this side closed the connection to the backup", "see the log for the cause; resync starts by itself";
    Overloaded, "overloaded", "link or backup could not keep up with the guest, and [epoch] overload = \"drop\"", "a faster link or backup, or another policy; resync starts by itself";
    NotInSync, "not_in_sync", "the record does not name a backup in sync any more", "wait; resync starts by itself";
    Unprotected, "unprotected", "an operator switched protection off", "`ftctl protect` switches it on again";
    ProtectionPaused, "protection_paused", "an operator paused protection for a time", "wait, or `ftctl protect` ends the pause now";
    Offered, "offered", "waiting for an owner to send its base", "";
    OwnedElsewhere, "owned_elsewhere", "the record names the other node as the owner", "";
    RecordNamesBackup, "record_names_backup", "the record names a backup in sync: it may take over, so this node does not boot", "if both nodes lost the guest, start ft-primary with `--force-cold-boot` on the owner";
    OwnedHere, "owned_here", "the record names this node as the owner, and this process may not boot", "start ft-primary on this node";
    Hollow, "hollow", "the standby has no committed base: it cannot take over, not even by force", "wait for the base copy";
    Following, "following", "in sync with the owner", "";
    OwnerSilent, "owner_silent", "the owner went silent", "";
    OwnerClosed, "owner_closed", "the owner's connection was closed", "";
    OwnerReplaced, "owner_replaced", "the owner's process was restarted", "";
    OwnerLeft, "owner_left", "the owner said goodbye", "";
    OwnerStopped, "owner_stopped", "the guest was switched off in order; nobody resurrects it", "start ft-primary on the owner's node to boot it again";
    TakeoverRefused, "takeover_refused", "the owner is silent, but the record does not name this backup in sync", "if the owner is certainly off: `ftctl failover --force` (shows what would be lost)";
    TookOver, "took_over", "took over from a silent owner", "start ft-backup on the other node; protection starts by itself";
    SwitchedOver, "switched_over", "took over in a planned switchover", "";
    Forced, "forced", "an operator forced this side to run", "";
    Superseded, "superseded", "another generation runs: this guest is paused and kept", "if the other side serves: `ftctl rejoin` makes this side its backup at once; else `ftctl failover --force` here resumes this guest";
    Isolated, "isolated", "neither the peer nor the arbiter could be reached: the guest is paused and kept", "repair the network; `ftctl failover --force` here resumes this guest";
    HandedOver, "handed_over", "the guest was handed to the other node", "";
    Rejoining, "rejoining", "this side begins anew as the backup", "";
    SwitchoverAsked, "switchover_asked", "an operator asked for a switchover", "";
    SwitchoverGivenUp, "switchover_given_up", "the backup did not take the guest over in time", "see the backup's log; try again";
    StopAsked, "stop_asked", "an operator asked to stop", "";
    StopNotRecorded, "stop_not_recorded", "stopped, but the arbiter could not be told", "the backup may take over; stop it too";
    GuestPoweredOff, "guest_powered_off", "the guest switched itself off", "start ft-primary to boot it again";
    GuestReset, "guest_reset", "the guest asked for a reset", "start ft-primary to boot it again";
    GuestCrashed, "guest_crashed", "the guest crashed; a copy of it would crash, too", "see the guest's console; start ft-primary to boot it again";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_words() {
        for (at, reason) in ReasonCode::ALL.iter().enumerate() {
            assert!(reason.code().bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{reason:?}");
            assert!(!reason.text().is_empty());
            assert!(ReasonCode::ALL[at + 1..].iter().all(|other| other.code() != reason.code()), "{reason:?}");
            assert_eq!(serde_json::to_string(reason).unwrap(), format!("{:?}", reason.code()));
        }
    }
}
