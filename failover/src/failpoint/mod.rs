//! Named places in the real programs at which a test lets them crash, stall or fail.
//!
//! The list below is the only one: tests walk it, and fail when a point of it is never passed. Without the feature `failpoints` the macro
//! [`failpoint!`](crate::failpoint) is empty, and nothing of this is in the programs. With it, a process takes orders from its environment:
//!
//! * `FAILPOINTS="name=action[@n];…"`: what is armed from the start; `n`: on the n-th pass, and on that one only (1 if not said). A process that
//!   begins anew as a backup does not inherit it.
//! * `FAILPOINTS_DIR`: a directory with a FIFO `NODE.orders`, made by whoever gives orders, that takes further lines of the same kind while the process
//!   runs, and a file `NODE.log` to which the process adds what happened; `NODE` is the word after `--node` on its command line.
//!
//! | action | what happens |
//! |---|---|
//! | `crash` | SIGKILL to itself: no unwinding, nothing flushed |
//! | `stop` | SIGSTOP to itself: the whole process stands still until somebody continues it |
//! | `pause:MS` | this thread stands still for so many milliseconds, the others go on |
//! | `error` | the operation returns its typed error, where it has one |
//!
//! fail-rs was looked at first: its `panic` unwinds one thread, which is not how a process crashes; it can neither stop a process nor take orders while one
//! runs, and it has no list of its points.

#[cfg(feature = "failpoints")]
mod orders;

#[cfg(feature = "failpoints")]
pub use orders::{begin, injected, pass};

use crate::arbiter::Reason;

/// Passes a point by its name in [`Point`], or by a function of it: `failpoint!(GateOpen)`, `failpoint!(cas_before(reason) => return …)`. What is
/// behind the arrow is done when the point is told to fail. Empty without the feature `failpoints`.
#[cfg(feature = "failpoints")]
#[macro_export]
macro_rules! failpoint {
    ($name:ident) => {{
        $crate::failpoint::pass($crate::failpoint::Point::$name);
    }};
    ($name:ident => $failed:expr) => {
        if $crate::failpoint::pass($crate::failpoint::Point::$name) {
            $failed
        }
    };
    ($of:ident($($argument:expr),*) => $failed:expr) => {
        if $crate::failpoint::pass($crate::failpoint::Point::$of($($argument),*)) {
            $failed
        }
    };
}

/// Passes a point: nothing, because the feature `failpoints` is off.
#[cfg(not(feature = "failpoints"))]
#[macro_export]
macro_rules! failpoint {
    ($($point:tt)*) => {{}};
}

/// Takes orders from the environment: there are none, because the feature `failpoints` is off.
#[cfg(not(feature = "failpoints"))]
pub const fn begin() {}

/// Which of the two processes passes a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// The one that runs the guest, or is about to boot it.
    Owner,
    /// The one that waits, or takes over.
    Standby,
}

/// What is going on when a point is passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Moment {
    /// Protected, epoch after epoch.
    Epochs,
    /// A backup is being brought in sync.
    Base,
    /// The owner goes on alone because its backup is silent.
    Solo,
    /// The standby takes over because its owner is silent.
    Takeover,
    /// An owner learns that another generation runs.
    Fence,
    /// An ordered switchover.
    Switchover,
    /// A fenced owner is made to run again by an operator.
    Force,
    /// An ordered stop.
    Stop,
    /// A primary boots the guest.
    Boot,
}

macro_rules! points {
    ($($name:ident $word:literal [$(($side:ident $moment:ident)),+] $can_fail:ident $weight:ident $what:literal;)*) => {
        /// Every point.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Point {
            $(#[doc = $what] $name,)*
        }

        impl Point {
            /// Every point, in the order of this list.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The name in orders and logs.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }

            /// Where it is, in words.
            pub const fn what(self) -> &'static str {
                match self { $(Self::$name => $what,)* }
            }

            /// Who passes it, and when.
            pub const fn passed_by(self) -> &'static [(Side, Moment)] {
                match self { $(Self::$name => &[$((Side::$side, Moment::$moment)),+],)* }
            }

            /// Whether the operation there has an error to return.
            pub const fn can_fail(self) -> bool {
                match self { $(Self::$name => points!(@ $can_fail),)* }
            }

            /// Whether it stands at one of the acts that safety rests on: tests do more there.
            pub const fn is_key(self) -> bool {
                match self { $(Self::$name => points!(@ $weight),)* }
            }
        }
    };
    (@ fails) => { true };
    (@ never) => { false };
    (@ key) => { true };
    (@ usual) => { false };
}

points! {
    GenerationWrite "generation.write" [(Standby Takeover), (Owner Fence)] fails usual "before the generation file is written";
    GenerationRename "generation.rename" [(Standby Takeover)] fails usual "the new generation file is on disk, the old one still in place";
    GenerationFsync "generation.fsync" [(Standby Takeover)] fails usual "the new generation file is in place, its directory not yet on disk";
    RecordWrite "record.write" [(Owner Base), (Standby Takeover)] fails usual "the arbiter's lock is held, the revision compared, nothing written";
    RecordRename "record.rename" [(Owner Base), (Standby Takeover)] fails usual "the new record is on disk beside the old one";
    RecordFsync "record.fsync" [(Owner Base), (Standby Takeover)] fails usual "the new record is in place, its directory not yet on disk";
    CasBootBefore "cas.boot.before" [(Owner Boot)] fails usual "before the compare-and-swap that lets a primary boot";
    CasBootAfter "cas.boot.after" [(Owner Boot)] fails usual "after it, its answer not yet known; error: the answer is lost";
    CasProtectedBefore "cas.protected.before" [(Owner Base)] fails key "before the compare-and-swap that names a backup in sync";
    CasProtectedAfter "cas.protected.after" [(Owner Base)] fails key "after it; error: the answer is lost";
    CasSoloBefore "cas.solo.before" [(Owner Solo)] fails key "before the compare-and-swap that removes the backup from the record";
    CasSoloAfter "cas.solo.after" [(Owner Solo)] fails key "after it; error: the answer is lost";
    CasTakeoverBefore "cas.takeover.before" [(Standby Takeover)] fails key "before the compare-and-swap of a takeover";
    CasTakeoverAfter "cas.takeover.after" [(Standby Takeover)] fails key "after it; error: the answer is lost";
    CasSwitchoverBefore "cas.switchover.before" [(Standby Switchover)] fails usual "before the compare-and-swap of an ordered switchover";
    CasSwitchoverAfter "cas.switchover.after" [(Standby Switchover)] fails usual "after it; error: the answer is lost";
    CasForcedBefore "cas.forced.before" [(Owner Force)] fails usual "before the compare-and-swap of an operator's force";
    CasForcedAfter "cas.forced.after" [(Owner Force)] fails usual "after it; error: the answer is lost";
    CasStoppedBefore "cas.stopped.before" [(Owner Stop)] fails usual "before the compare-and-swap that records a stop";
    CasStoppedAfter "cas.stopped.after" [(Owner Stop)] fails usual "after it; error: the answer is lost";
    EventsWrite "events.write" [(Standby Takeover), (Owner Solo)] fails usual "before a line of the event file";
    EventsWritten "events.written" [(Standby Takeover)] never usual "after it";
    PermitRun "permit.run" [(Owner Boot), (Standby Takeover)] fails key "the runner holds the permit, the machine does not run yet";
    PermitRunning "permit.running" [(Owner Boot), (Standby Takeover)] never key "the machine runs on the strength of the permit";
    Dial "dial" [(Owner Base)] fails usual "before the connections to the backup are made";
    BaseBegin "base.begin" [(Owner Base)] fails usual "before the base begins";
    BasePages "base.pages" [(Owner Base)] fails usual "before a piece of the base is handed to the link";
    BaseEnd "base.end" [(Owner Base)] fails usual "all of the base is handed over but its last checkpoint";
    EpochStop "epoch.stop" [(Owner Epochs)] fails usual "before the guest is stopped at the end of an epoch; error: a vCPU does not stop";
    EpochStopped "epoch.stopped" [(Owner Epochs)] never usual "the guest is stopped, outputs are not sealed";
    EpochSealed "epoch.sealed" [(Owner Epochs)] fails usual "outputs are sealed; error: the state cannot be read";
    EpochCaptured "epoch.captured" [(Owner Epochs)] fails usual "the state is captured; error: the dirty log cannot be read";
    EpochDirty "epoch.dirty" [(Owner Epochs)] fails usual "the dirty log is taken; error: a page is not RAM";
    EpochStaged "epoch.staged" [(Owner Epochs)] fails key "pages are staged, the guest does not run on yet; error: it cannot be resumed";
    EpochResumed "epoch.resumed" [(Owner Epochs)] fails key "the guest runs on, its checkpoint is not handed to the link";
    SendBegin "send.begin" [(Owner Epochs)] fails usual "before a checkpoint is begun on the wire";
    SendPages "send.pages" [(Owner Epochs)] never usual "before its pages";
    SendEnd "send.end" [(Owner Epochs)] never usual "before its end";
    Sent "send.done" [(Owner Epochs)] never usual "the socket has taken all of a checkpoint";
    InboundSend "inbound.send" [(Owner Epochs)] fails usual "before a frame that reached the guest is told to the backup; error: it is not told";
    HeartbeatSend "heartbeat.send" [(Owner Epochs), (Standby Epochs)] fails usual "before a heartbeat is written";
    HeartbeatHeard "heartbeat.heard" [(Owner Epochs), (Standby Epochs)] fails usual "heartbeats were read and are not handled";
    AckReceived "ack.received" [(Owner Epochs)] fails key "an acknowledgement was read, nothing released; error: it counts for nothing";
    AckReleased "ack.released" [(Owner Epochs)] never key "its outputs are released, its dirty set is not retired";
    AckRetired "ack.retired" [(Owner Epochs)] never usual "its dirty set is retired";
    GateHold "gate.hold" [(Owner Base), (Owner Solo)] never usual "before outputs begin to be held";
    GateTrust "gate.trust" [(Owner Base)] never usual "the record names the backup; commits do not release yet";
    GateTrusted "gate.trusted" [(Owner Base)] never usual "commits release";
    GateOpen "gate.open" [(Owner Solo), (Standby Takeover)] never key "this side runs alone; held outputs are not out yet";
    GateOpened "gate.opened" [(Owner Solo)] never usual "held outputs are out";
    FenceBegin "fence.begin" [(Owner Fence)] never usual "this side lost the right to run, its gate is not silent yet";
    FenceFrozen "fence.frozen" [(Owner Fence)] never usual "the guest is frozen";
    SwitchoverBegin "switchover.begin" [(Owner Switchover)] never usual "before the last checkpoint of a switchover is ordered";
    SwitchoverFinal "switchover.final" [(Owner Switchover)] never usual "the last checkpoint is handed to the link, the guest is stopped";
    Goodbye "goodbye.send" [(Owner Switchover), (Owner Stop)] fails usual "before a goodbye goes to the socket";
    Exit "exit" [(Owner Stop)] never usual "before the machine is ended and the process exits";
    RecvBegin "recv.begin" [(Standby Base), (Standby Epochs)] fails usual "the beginning of a checkpoint was read";
    RecvPages "recv.pages" [(Standby Base), (Standby Epochs)] fails usual "pages were read";
    RecvEnd "recv.end" [(Standby Base), (Standby Epochs)] fails key "the end of a checkpoint was read, nothing is verified";
    Committed "commit.done" [(Standby Base), (Standby Epochs)] never key "a checkpoint is committed, the applier does not know of it";
    AckSend "ack.send" [(Standby Base), (Standby Epochs)] fails key "before an acknowledgement is written";
    AckSent "ack.sent" [(Standby Epochs)] fails key "an acknowledgement is with the socket";
    InboundKept "inbound.kept" [(Standby Epochs)] fails usual "before a told frame is kept; error: it is not kept";
    ApplyBefore "apply.before" [(Standby Epochs)] never usual "before a committed checkpoint is put into the standby's memory";
    ApplyAfter "apply.after" [(Standby Epochs)] never usual "after it";
    TakeoverGranted "takeover.granted" [(Standby Takeover), (Standby Switchover)] fails key "the permit is granted, nothing is done with it";
    TakeoverClosed "takeover.closed" [(Standby Takeover)] fails usual "the link is closed, the incomplete epoch dropped";
    TakeoverApplied "takeover.applied" [(Standby Takeover)] fails usual "everything committed is in memory";
    TakeoverRestored "takeover.restored" [(Standby Takeover)] fails key "the machine's state is restored";
    TakeoverAnnounced "takeover.announced" [(Standby Takeover)] fails usual "the LAN is told where the guest is";
    TakeoverResent "takeover.resent" [(Standby Takeover)] fails usual "the outputs of the last committed epoch are sent again";
    TakeoverDelivered "takeover.delivered" [(Standby Takeover)] fails usual "inbound frames are queued for the guest";
}

impl Point {
    /// The point just before a compare-and-swap for `reason`.
    pub const fn cas_before(reason: Reason) -> Self {
        match reason {
            Reason::Created | Reason::ColdStart => Self::CasBootBefore,
            Reason::Protected => Self::CasProtectedBefore,
            Reason::BackupLost | Reason::Unprotected => Self::CasSoloBefore,
            Reason::Takeover => Self::CasTakeoverBefore,
            Reason::Switchover => Self::CasSwitchoverBefore,
            Reason::Forced => Self::CasForcedBefore,
            Reason::Stopped => Self::CasStoppedBefore,
        }
    }

    /// The point just after a compare-and-swap for `reason`, before anybody knows its outcome.
    pub const fn cas_after(reason: Reason) -> Self {
        match reason {
            Reason::Created | Reason::ColdStart => Self::CasBootAfter,
            Reason::Protected => Self::CasProtectedAfter,
            Reason::BackupLost | Reason::Unprotected => Self::CasSoloAfter,
            Reason::Takeover => Self::CasTakeoverAfter,
            Reason::Switchover => Self::CasSwitchoverAfter,
            Reason::Forced => Self::CasForcedAfter,
            Reason::Stopped => Self::CasStoppedAfter,
        }
    }

    /// The point of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|point| point.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_words_and_every_point_says_what_it_is() {
        for (at, point) in Point::ALL.iter().enumerate() {
            assert!(point.name().bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'.'), "{point:?}");
            assert!(!point.what().is_empty() && !point.passed_by().is_empty(), "{point:?}");
            assert!(Point::ALL[at + 1..].iter().all(|other| other.name() != point.name()), "{point:?}");
            assert_eq!(Point::named(point.name()), Some(*point));
        }
        assert!(Point::ALL.len() >= 60);
        assert!(Point::ALL.iter().filter(|point| point.is_key()).count() >= 10);
    }

    /// The row of a point in docs/testing.md.
    fn row(point: Point) -> String {
        let mut moments: Vec<String> = vec![];
        for side in [Side::Owner, Side::Standby] {
            let of: Vec<String> = point
                .passed_by()
                .iter()
                .filter(|(by, _)| *by == side)
                .map(|(_, moment)| format!("{moment:?}").to_lowercase())
                .collect();
            if !of.is_empty() {
                moments.push(format!("{}: {}", format!("{side:?}").to_lowercase(), of.join(", ")));
            }
        }
        let error = if point.can_fail() { ", error" } else { "" };
        let stop = if point.is_key() { ", stop" } else { "" };
        format!("| `{}` | {} | crash, pause{stop}{error} | {} |", point.name(), moments.join("; "), point.what())
    }

    #[test]
    fn the_table_in_the_documentation_is_this_list() {
        let page = include_str!("../../../docs/testing.md");
        let rows: Vec<String> = Point::ALL.iter().map(|point| row(*point)).collect();
        let missing = rows.iter().any(|row| !page.contains(row.as_str()));
        assert!(!missing, "docs/testing.md lacks rows of this table:\n{}", rows.join("\n"));
        let shown = page.lines().filter(|line| line.contains("| crash, pause")).count();
        assert_eq!(shown, rows.len(), "docs/testing.md shows points that are gone");
    }
}
