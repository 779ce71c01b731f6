//! Which faults and commands there are in an exploration, and its bounds.

use std::time::Duration;

use failover::arbiter::NodeRef;
use failover::decide::{ColdStart, Command, CoreConfig, CoreTimers, GuestEnd, OnBackupLoss, Rejoin, Role};
use replication_proto::{Generation, Incarnation, NodeName, VmId};

/// The two nodes.
pub const A: usize = 0;
/// See [`A`].
pub const B: usize = 1;
/// Both of them.
pub const NODES: [usize; 2] = [A, B];
/// The moment that every state is moved to; far enough from zero for every age that counts.
pub const NOW: Duration = Duration::from_secs(3600);
/// The unit of all timers: a timer of one tick runs out whenever time passes at all.
pub const TICK: Duration = Duration::from_millis(10);
/// A timer that never runs out.
pub const NEVER: Duration = Duration::MAX;
/// Most lives of one node.
pub const LIVES_MAX: u8 = 5;
/// Largest number of an epoch or generation that the ghost log has room for.
pub const NUMBER_MAX: u8 = 11;

const VM: VmId = VmId(0x77);

/// Everything that makes one exploration differ from another.
#[derive(Debug, Clone)]
pub struct Setup {
    /// What it is called on the command line.
    pub name: &'static str,
    /// What it is for.
    pub about: &'static str,
    /// Small enough for every day.
    pub daily: bool,
    /// Lives of the process on each node.
    pub lives: [u8; 2],
    /// What a process on each node may be started as.
    pub roles: [Vec<Role>; 2],
    /// Epochs with a higher number are not sealed.
    pub epochs: u8,
    /// The arbiter takes no write that would give the record a higher revision.
    pub writes: u64,
    /// Checkpoints on their way at one time.
    pub in_flight: u8,
    /// Writes that are lost and may still land at one time; none: every write is answered truly, or not done.
    pub zombies: usize,
    /// Requests to the arbiter may fail for certain.
    pub arbiter_fails: bool,
    /// Connections may break although both processes live.
    pub cuts: bool,
    /// Old heartbeats may arrive late, in place of the present one.
    pub late_beats: bool,
    /// Threads of one process lag behind each other; otherwise the core hears at once what the link saw.
    pub lag: bool,
    /// Processes may be killed.
    pub kills: bool,
    /// Operators' commands.
    pub commands: Vec<(usize, Command)>,
    /// Each of these ends of the guest may happen.
    pub ends: Vec<GuestEnd>,
    /// How often the record may be set back to an older one.
    pub rollbacks: u8,
    /// Commands and rollbacks in one history.
    pub orders: u8,
    /// R10.
    pub on_backup_loss: OnBackupLoss,
    /// Whether a fenced side becomes the backup by itself.
    pub rejoin: Rejoin,
    /// Timers of both cores.
    pub timers: CoreTimers,
}

/// Timers that keep the space small: one tick for what ends a wait, two for the takeover, never for the rest.
pub fn timers() -> CoreTimers {
    CoreTimers {
        solo: TICK,
        takeover: 2 * TICK,
        eof_grace: TICK,
        fenced_keep: NEVER,
        isolation_halt: NEVER,
        protect_retry: Duration::ZERO,
        arbiter_probe: NEVER,
        arbiter_retry: TICK,
        command_patience: 2 * TICK,
        stop_patience: 2 * TICK,
        handed_over_keep: NEVER,
        rejoin_linger: TICK,
    }
}

/// A process of a node: its incarnation tells which life it is.
pub fn node_ref(node: usize, life: u8) -> NodeRef {
    let (name, base) = if node == A { ("a", 16) } else { ("b", 32) };
    NodeRef { node: NodeName::new(name).expect("a short name"), incarnation: Incarnation(base + u128::from(life)) }
}

/// Which node and which life a reference means.
pub fn of_ref(of: &NodeRef) -> (usize, u8) {
    let (node, base) = if of.incarnation.0 < 32 { (A, 16) } else { (B, 32) };
    (node, u8::try_from(of.incarnation.0 - base).expect("made by node_ref"))
}

impl Setup {
    /// The configuration of one process's core.
    pub fn core(&self, node: usize, life: u8, role: Role, highest: u8) -> CoreConfig {
        CoreConfig {
            vm: VM,
            me: node_ref(node, life),
            peer: node_ref(1 - node, 0).node,
            role,
            highest_generation: Generation(u64::from(highest)),
            on_backup_loss: self.on_backup_loss,
            cold_start: ColdStart::Owner,
            rejoin: self.rejoin,
            force_cold_boot: false,
            timers: self.timers.clone(),
        }
    }

    fn base(name: &'static str, about: &'static str) -> Self {
        Self {
            name,
            about,
            daily: true,
            lives: [1, 1],
            roles: [vec![Role::Primary], vec![Role::Backup]],
            epochs: 3,
            writes: 3,
            in_flight: 1,
            zombies: 0,
            arbiter_fails: false,
            cuts: true,
            late_beats: false,
            lag: false,
            kills: true,
            commands: Vec::new(),
            ends: Vec::new(),
            rollbacks: 0,
            orders: 0,
            on_backup_loss: OnBackupLoss::Solo,
            rejoin: Rejoin::Never,
            timers: timers(),
        }
    }
}

impl Setup {
    /// The named configurations.
    pub fn all() -> Vec<Self> {
        [Self::unordered(), Self::ordered(), Self::rejoining()].concat()
    }

    /// Whatever happens, it happens by itself.
    fn unordered() -> Vec<Self> {
        let both = || [vec![Role::Primary], vec![Role::Primary, Role::Backup]];
        vec![
            Self::base("calm", "one life each, connections break, processes die"),
            Self {
                zombies: 1,
                epochs: 2,
                writes: 3,
                arbiter_fails: true,
                ..Self::base("late", "answers of the arbiter are lost, writes land late")
            },
            Self { daily: false, lives: [2, 2], writes: 3, epochs: 2, ..Self::base("lives", "two lives on each node") },
            Self {
                daily: false,
                lives: [2, 2],
                writes: 4,
                roles: both(),
                ..Self::base("roles", "two lives, B in either role")
            },
            Self { late_beats: true, epochs: 2, ..Self::base("beats", "old heartbeats arrive late") },
            Self {
                daily: false,
                lag: true,
                epochs: 2,
                ..Self::base("lag", "the threads of a process lag behind each other")
            },
            Self {
                daily: false,
                on_backup_loss: OnBackupLoss::Hold,
                ..Self::base("hold", "every output is on two hosts")
            },
        ]
    }

    /// People take part: operators, and whoever restores an arbiter.
    fn ordered() -> Vec<Self> {
        let order = |command| vec![(A, command)];
        vec![
            Self {
                daily: false,
                commands: vec![
                    (A, Command::Switchover),
                    (A, Command::Stop),
                    (A, Command::Unprotect),
                    (A, Command::Protect),
                    (B, Command::Stop),
                ],
                ends: vec![GuestEnd::PoweredOff],
                orders: 1,
                ..Self::base("orders", "one command of an operator, or the guest's end")
            },
            Self {
                daily: false,
                commands: order(Command::Switchover),
                orders: 2,
                zombies: 1,
                ..Self::base("switchover", "two switchovers, answers of the arbiter are lost")
            },
            Self {
                daily: false,
                commands: [A, B]
                    .into_iter()
                    .flat_map(|node| {
                        [false, true].map(|without_arbiter| (node, Command::ForceTakeover { without_arbiter }))
                    })
                    .collect(),
                orders: 1,
                ..Self::base("force", "one takeover by force")
            },
            Self {
                lives: [1, 2],
                epochs: 2,
                rollbacks: 1,
                orders: 1,
                ..Self::base("rollback", "the record is set back to an older one")
            },
            Self {
                daily: false,
                lives: [1, 2],
                rollbacks: 1,
                orders: 1,
                cuts: false,
                ..Self::base(
                    "restored",
                    "the record is set back, a backup is restarted, connections break with their processes only",
                )
            },
        ]
    }

    /// Fenced sides become backups.
    fn rejoining() -> Vec<Self> {
        let switchover = vec![(A, Command::Switchover)];
        vec![
            Self {
                lives: [2, 1],
                commands: switchover,
                orders: 1,
                epochs: 4,
                writes: 4,
                cuts: false,
                kills: false,
                rejoin: Rejoin::AtOnce,
                ..Self::base("rejoin", "a switchover or a takeover, and the fenced side becomes the backup")
            },
            Self {
                daily: false,
                lives: [2, 1],
                commands: vec![(B, Command::Switchover)],
                orders: 1,
                epochs: 4,
                writes: 4,
                cuts: false,
                kills: false,
                rejoin: Rejoin::AtOnce,
                ..Self::base("called", "the backup asks for the guest, and the fenced side becomes the backup")
            },
            Self {
                lives: [2, 1],
                epochs: 2,
                arbiter_fails: true,
                kills: false,
                rejoin: Rejoin::AtOnce,
                timers: CoreTimers { isolation_halt: TICK, ..timers() },
                ..Self::base(
                    "isolated",
                    "a side that reaches nobody halts, and rejoins when it learns that the other one runs",
                )
            },
        ]
    }

    /// A configuration by its name.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().into_iter().find(|setup| setup.name == name)
    }
}
