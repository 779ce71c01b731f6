//! Every way in which our processes end has a number of its own; `docs/exit-codes.md` is the operator's copy of this table.

/// Why a process of ours ended. The numbers are stable: service managers and scripts depend on them.
///
/// 64, 77 and 78 follow `sysexits.h`; 124 follows `timeout(1)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ExitCode {
    /// Ended in order: asked to stop, or the guest switched itself off.
    Ok = 0,
    /// An error that has no code of its own; the message says which.
    Failure = 1,
    /// `/dev/kvm` is missing or may not be opened.
    NoKvm = 10,
    /// The tap device cannot be opened (missing, busy, or no permission).
    NoTap = 11,
    /// A listening address (replication, health) is in use or not ours.
    PortInUse = 12,
    /// The two sides have different machines, versions or features; the peer refused, or we did.
    MachineMismatch = 13,
    /// The kernel or initrd image is missing or not bootable.
    KernelUnusable = 14,
    /// The arbiter cannot be used at all (corrupt record, network filesystem, no permission).
    ArbiterUnusable = 15,
    /// The arbiter's record is older than what this node has already seen, or it is gone.
    ArbiterRolledBack = 16,
    /// Another process of this VM runs on this node.
    AlreadyRunning = 17,
    /// The state directory or a file in it is unusable.
    StateUnusable = 18,
    /// The arbiter's record belongs to another VM or names other nodes.
    ArbiterForeign = 19,
    /// Lost the right to run; the paused guest was kept for `fenced_keep` and is now dropped.
    Fenced = 20,
    /// Reached neither the peer nor the arbiter for `isolation_halt`.
    Isolated = 21,
    /// The guest crashed (triple fault or an emulation failure).
    GuestCrashed = 22,
    /// The guest asked for a reset, which ends the process; start it again to boot again.
    GuestReset = 23,
    /// A planned switchover moved the guest to the peer.
    HandedOver = 24,
    /// Stopped in order, but the arbiter could not be told: the backup may still take over.
    StopNotRecorded = 25,
    /// The record names this node as the owner, nothing of the guest is left, and `cold_start = "never"`.
    ColdStartRefused = 26,
    /// This host could not stop, resume or run the machine any longer; a backup in sync takes over.
    MachineFailed = 27,
    /// A disk image is missing, busy, of another size, or may not be opened; or the host failed to read or write one of a disk's files.
    DiskUnusable = 28,
    /// A disk's map or journal is of another VM or disk, or cannot be read: nothing was overwritten.
    DiskForeign = 29,
    /// Wrong use of the command line.
    Usage = 64,
    /// Not permitted.
    Permission = 77,
    /// `pair.toml` is missing or wrong.
    Config = 78,
}

impl ExitCode {
    /// All codes, in the order of their numbers.
    pub const ALL: [Self; 25] = [
        Self::Ok,
        Self::Failure,
        Self::NoKvm,
        Self::NoTap,
        Self::PortInUse,
        Self::MachineMismatch,
        Self::KernelUnusable,
        Self::ArbiterUnusable,
        Self::ArbiterRolledBack,
        Self::AlreadyRunning,
        Self::StateUnusable,
        Self::ArbiterForeign,
        Self::Fenced,
        Self::Isolated,
        Self::GuestCrashed,
        Self::GuestReset,
        Self::HandedOver,
        Self::StopNotRecorded,
        Self::ColdStartRefused,
        Self::MachineFailed,
        Self::DiskUnusable,
        Self::DiskForeign,
        Self::Usage,
        Self::Permission,
        Self::Config,
    ];

    /// The number that the process ends with.
    pub const fn number(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failure => 1,
            Self::NoKvm => 10,
            Self::NoTap => 11,
            Self::PortInUse => 12,
            Self::MachineMismatch => 13,
            Self::KernelUnusable => 14,
            Self::ArbiterUnusable => 15,
            Self::ArbiterRolledBack => 16,
            Self::AlreadyRunning => 17,
            Self::StateUnusable => 18,
            Self::ArbiterForeign => 19,
            Self::Fenced => 20,
            Self::Isolated => 21,
            Self::GuestCrashed => 22,
            Self::GuestReset => 23,
            Self::HandedOver => 24,
            Self::StopNotRecorded => 25,
            Self::ColdStartRefused => 26,
            Self::MachineFailed => 27,
            Self::DiskUnusable => 28,
            Self::DiskForeign => 29,
            Self::Usage => 64,
            Self::Permission => 77,
            Self::Config => 78,
        }
    }

    /// Short stable name, for logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failure => "failure",
            Self::NoKvm => "no-kvm",
            Self::NoTap => "no-tap",
            Self::PortInUse => "port-in-use",
            Self::MachineMismatch => "machine-mismatch",
            Self::KernelUnusable => "kernel-unusable",
            Self::ArbiterUnusable => "arbiter-unusable",
            Self::ArbiterRolledBack => "arbiter-rolled-back",
            Self::AlreadyRunning => "already-running",
            Self::StateUnusable => "state-unusable",
            Self::ArbiterForeign => "arbiter-foreign",
            Self::Fenced => "fenced",
            Self::Isolated => "isolated",
            Self::GuestCrashed => "guest-crashed",
            Self::GuestReset => "guest-reset",
            Self::HandedOver => "handed-over",
            Self::StopNotRecorded => "stop-not-recorded",
            Self::ColdStartRefused => "cold-start-refused",
            Self::MachineFailed => "machine-failed",
            Self::DiskUnusable => "disk-unusable",
            Self::DiskForeign => "disk-foreign",
            Self::Usage => "usage",
            Self::Permission => "permission",
            Self::Config => "config",
        }
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code.number())
    }
}

/// What `ftctl` ends with: the answer to its question, readable by a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CtlExit {
    /// `status`: protected and armed. `failover`, `stop` and the others: done.
    Ok,
    /// `status`: the guest runs, but it is not protected or a takeover is not armed.
    Degraded,
    /// `status`: the guest does not run here (fenced, stopped, starting).
    Down,
    /// The state cannot be determined: no process behind the socket, no answer in time.
    Unknown,
    /// Refused: not safe, or not confirmed.
    Refused,
    /// The command was carried out or not: nobody can say. Ask `ftctl status`.
    OutcomeUnknown,
    /// Wrong use of the command line.
    Usage,
    /// Not permitted.
    Permission,
    /// `pair.toml` is missing or wrong.
    Config,
    /// The wanted state was not reached in time.
    Timeout,
}

impl CtlExit {
    /// The number that `ftctl` ends with.
    pub const fn number(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Degraded => 1,
            Self::Down => 2,
            Self::Unknown => 3,
            Self::Refused => 4,
            Self::OutcomeUnknown => 5,
            Self::Usage => ExitCode::Usage.number(),
            Self::Permission => ExitCode::Permission.number(),
            Self::Config => ExitCode::Config.number(),
            Self::Timeout => 124,
        }
    }
}

impl From<CtlExit> for std::process::ExitCode {
    fn from(code: CtlExit) -> Self {
        Self::from(code.number())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_distinct_and_documented() {
        let page = include_str!("../../docs/exit-codes.md");
        for (at, code) in ExitCode::ALL.iter().enumerate() {
            for other in &ExitCode::ALL[at + 1..] {
                assert_ne!(code.number(), other.number());
                assert_ne!(code.name(), other.name());
            }
            let row = format!("| {} | `{}` |", code.number(), code.name());
            assert!(page.contains(&row), "docs/exit-codes.md lacks the row {row}");
        }
    }
}
