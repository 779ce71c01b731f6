//! From a configuration to a machine and a host, with an exit code for everything that can be wrong.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use failover::arbiter::{ArbiterError, ArbiterThread, ConfiguredArbiter, NodeRef};
use failover::config::{CaptureStrategy, ConfigError, Console, MachineKind, PairConfig};
use failover::control::ControlError;
use failover::decide::{CoreConfig, Role};
use failover::exit::ExitCode;
use failover::generation::{StateDir, StateError};
use failover::status::{Labels, NodeRole, StatusBoard};
use replication_proto::{Facts, Incarnation, NodeName, PageIndex, PageRange, RamLayout};
use vmm::config::{DiskConfig, MachineConfig, MachineIo, NicConfig};
use vmm::machine::BootError;
use vmm::write_protect::{WriteProtect, WriteProtectError};
use vmm::{BuildError, FramePort, KvmMachine, Machine, ModelBuildError, ModelMachine, Tap, TapError};

use crate::clock::Clock;
use crate::decider::Decider;
use crate::desk::Desk;
use crate::disk::copy::Source as _;
use crate::disk::set::Waiting as WaitingDisks;
use crate::disk::{DiskError, DiskSet, Opened};
use crate::events::{Event, EventFile};
use crate::heap::keep_freed_memory;
use crate::host::Host;
use crate::metrics::Metrics;
use crate::mirror::{Mirror, MirroredPort};
use crate::output::queue::QueueLimits;
use crate::output::world::{ConsoleError, HostWorld, open_console};
use crate::output::{Gate, World};
use crate::pulse::SharedVoice;
use crate::staging::Arena;
use crate::verify::Verifier;

/// Why a process could not start. One line each, with what to do.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// `pair.toml`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The configuration names no kernel.
    #[error("[vm] kernel is missing: name the guest's image (a PVH ELF)")]
    NoKernel,
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The arbiter.
    #[error("the arbiter cannot be used: {0}")]
    Arbiter(#[from] ArbiterError),
    /// The tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The machine on KVM.
    #[error(transparent)]
    Machine(#[from] BuildError),
    /// The model machine.
    #[error(transparent)]
    Model(#[from] ModelBuildError),
    /// The guest's image.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The capture strategy.
    #[error("[epoch] capture = \"copy-on-write\" cannot work on this host: {0}; \"auto\" does without where it must")]
    Capture(#[from] WriteProtectError),
    /// A listening address.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Which.
        address: std::net::SocketAddr,
        /// The host's answer.
        source: std::io::Error,
    },
    /// Something else of the host.
    #[error("{what}: {source}")]
    Host {
        /// What.
        what: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
}

impl SetupError {
    /// The number that the process ends with.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(_) | Self::NoKernel | Self::Capture(_) => ExitCode::Config,
            Self::State(error) => error.exit_code(),
            Self::Control(error) => error.exit_code(),
            Self::Disk(error) => error.exit_code(),
            Self::Arbiter(_) => ExitCode::ArbiterUnusable,
            Self::Tap(_) => ExitCode::NoTap,
            Self::Machine(
                BuildError::NoKvm(_)
                | BuildError::KvmPermission(_)
                | BuildError::KvmVersion { .. }
                | BuildError::MissingCapability(_),
            ) => ExitCode::NoKvm,
            Self::Machine(BuildError::Config(_)) => ExitCode::Config,
            Self::Boot(_) => ExitCode::KernelUnusable,
            Self::Listen { .. } => ExitCode::PortInUse,
            Self::Console(_) | Self::Machine(_) | Self::Model(_) | Self::Host { .. } => ExitCode::Failure,
        }
    }
}

/// A machine that never ran, and the way in and out of it.
pub struct Built {
    /// The machine.
    pub machine: Box<dyn Machine>,
    /// Its way out; silent.
    pub gate: Arc<Gate>,
    /// Its way in.
    pub ports: Vec<Arc<dyn FramePort>>,
    /// Where inbound frames are told to.
    pub mirror: Arc<Mirror>,
    /// What is measured.
    pub metrics: Arc<Metrics>,
    /// Its disks, for a side that runs it.
    pub disks: DiskSet,
    /// The same, for a side that waits; `None` when there are none.
    pub waiting_disks: Option<WaitingDisks>,
}

/// What a process knows of itself before it has anything.
pub struct Process {
    /// Which of the two nodes it is on.
    pub node: NodeName,
    /// This life of it.
    pub incarnation: Incarnation,
    /// Time since it started.
    pub clock: Clock,
    /// What it shows.
    pub board: StatusBoard,
    /// What survives it; locked, so that nothing else of this VM runs on this node.
    pub state_dir: StateDir,
}

impl Process {
    /// A new life, alone on its node.
    ///
    /// # Errors
    /// Another process of this VM runs here, or the host has no random numbers.
    pub fn begin(config: &PairConfig, node: NodeName, role: NodeRole) -> Result<Self, SetupError> {
        keep_freed_memory();
        let clock = Clock::start();
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)
            .map_err(|e| SetupError::Host { what: "random numbers", source: std::io::Error::other(e) })?;
        let incarnation = Incarnation(u128::from_le_bytes(bytes));
        let board = StatusBoard::new(&Labels::new(config, &node, incarnation), role);
        let section = config.node(&node).expect("picked from this configuration");
        let state_dir = StateDir::open(&section.state_dir, config.vm.id)?;
        Ok(Self { node, incarnation, clock, board, state_dir })
    }
}

/// Builds the machine that `config` describes, with this node's tap and console.
///
/// # Errors
/// See [`SetupError`].
pub fn build_machine(config: &PairConfig, process: &Process) -> Result<Built, SetupError> {
    let node = config.node(&process.node).expect("picked from this configuration");
    if config.epoch.capture == CaptureStrategy::CopyOnWrite {
        WriteProtect::probe()?;
    }
    let metrics = Arc::new(Metrics::new(process.board.clone()));
    let tap = Arc::new(Tap::open(&node.tap)?);
    let (console, console_input) = open_console(&console_name(&node.console()))?;
    let world: Arc<dyn World> = Arc::new(HostWorld::new(vec![Arc::clone(&tap)], console));
    let limits = QueueLimits {
        bytes: usize::try_from(config.limits.output).unwrap_or(usize::MAX),
        max_hold: config.timers.max_hold,
    };
    let gate = Gate::new(limits, world, process.clock.clone(), Arc::clone(&metrics));
    let mirror = Arc::new(Mirror::default());
    let ports: Vec<Arc<dyn FramePort>> = vec![Arc::new(MirroredPort::new(tap, 0, Arc::clone(&mirror)))];
    let outputs: Arc<dyn vmm::Outputs> = Arc::clone(&gate) as _;
    let Opened { set: disks, waiting: waiting_disks, configs } =
        Opened::open(config, &process.node, process.incarnation)?;
    let io = MachineIo { outputs, ports: ports.clone(), disks: disks.owner.for_machine(), console_input };
    let parts = machine_config(config, configs)?;
    let machine: Box<dyn Machine> = match config.vm.machine {
        MachineKind::Kvm => Box::new(KvmMachine::build(&parts, io)?),
        MachineKind::Model => Box::new(ModelMachine::build(&parts, io)?),
    };
    Ok(Built { machine, gate, ports, mirror, metrics, disks, waiting_disks })
}

fn console_name(console: &Console) -> String {
    match console {
        Console::File(path) => path.display().to_string(),
        Console::Unix(path) => format!("unix:{}", path.display()),
        Console::Stdio => "stdio".into(),
    }
}

fn machine_config(config: &PairConfig, disks: Vec<DiskConfig>) -> Result<MachineConfig, SetupError> {
    let kernel = match (&config.vm.kernel, config.vm.machine) {
        (Some(kernel), _) => kernel.clone(),
        // The model machine brings its program along.
        (None, MachineKind::Model) => PathBuf::new(),
        (None, MachineKind::Kvm) => return Err(SetupError::NoKernel),
    };
    Ok(MachineConfig {
        vcpus: config.vm.vcpus,
        memory_bytes: config.vm.memory,
        kernel,
        initrd: config.vm.initrd.clone(),
        cmdline: config.vm.cmdline.clone(),
        nics: vec![NicConfig { mac: config.vm.mac().0 }],
        disks,
    })
}

/// Makes the host around a machine: state directory, arbiter, decision core, events, desk.
///
/// # Errors
/// See [`SetupError`].
pub fn open_host(
    config: PairConfig,
    process: Process,
    role: Role,
    force_cold_boot: bool,
    built: &Built,
) -> Result<Host, SetupError> {
    let host = |what| move |source| SetupError::Host { what, source };
    let Process { node, incarnation, clock, board, state_dir } = process;
    let section = config.node(&node).expect("picked from this configuration").clone();
    let events = EventFile::open(&section.state_dir, node.as_str()).map_err(host("the event file"))?;
    let arbiter = ConfiguredArbiter::open(&config.arbiter, config.vm.id)?;
    // The event loop listens to the answers' channel itself: nobody needs to be woken.
    let arbiter = ArbiterThread::spawn(arbiter, || {}).map_err(host("the arbiter's thread"))?;
    let core_config = config.core(&node, incarnation, role, state_dir.highest());
    let decider = Decider::new(CoreConfig { force_cold_boot, ..core_config });
    let desk = Desk::open(board, &section, config.vm.name.as_str())?;
    let terminate = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&terminate)).map_err(host("the signal handlers"))?;
    }
    events.write(&Event::Started { incarnation: incarnation.to_string() });
    let voice: SharedVoice = Arc::new(Mutex::default());
    Ok(Host {
        arena: Arena::new(usize::try_from(config.limits.staging).unwrap_or(usize::MAX)),
        me: NodeRef { node, incarnation },
        clock,
        gate: Arc::clone(&built.gate),
        mirror: Arc::clone(&built.mirror),
        metrics: Arc::clone(&built.metrics),
        verifier: Arc::new(Verifier::new(built.disks.owner.images())),
        disks: built.disks.clone(),
        events,
        voice,
        decider,
        desk,
        ram: ram_layout(&*built.machine),
        facts: facts(&*built.machine),
        arbiter,
        state_dir,
        terminate,
        link_note: String::new(),
        config,
    })
}

/// The machine's memory in the stream's words.
pub fn ram_layout(machine: &dyn Machine) -> RamLayout {
    let ranges = machine.ram().regions().iter();
    let ranges = ranges.map(|r| PageRange { first: PageIndex(r.first.0), pages: r.pages }).collect();
    RamLayout::new(ranges).expect("a machine's regions are ascending and not empty")
}

/// The machine's facts in the stream's words.
pub fn facts(machine: &dyn Machine) -> Facts {
    let mut facts = Facts::new();
    for fact in machine.facts() {
        if let Err(error) = facts.insert(fact.name.clone(), fact.value) {
            panic!("fact {:?} of the machine cannot be stated: {error}", fact.name);
        }
    }
    facts
}
