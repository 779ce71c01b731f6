//! The benchmark binary's subcommands.
//!
//! * [`pause`]: the pause of the product, beside its floor in the same run
//! * [`subject`]: the product's machine under a dirtying load, and one checkpoint of it; [`pulse`]: how another thread sees that its guest runs
//! * [`floor`]: what a pause costs at least, on a plain KVM VM
//! * [`qemu`]: the downtime of QEMU's live migration, beside that pause
//! * [`tracking`]: the ways to know which pages were written, on a plain KVM VM
//! * [`epochs`]: what many checkpoints a second cost the guest
//! * [`latency`], [`throughput`]: what clients notice, unprotected, with fixed epochs and with such as follow the work
//! * [`linux`]: the same load on Linux with a Redis server
//! * [`strategies`]: the ways to capture, by what the guest and its clients notice
//! * [`wire`]: what checkpoints cost on the wire, by what changed
//! * [`failover`]: the gap that a client sees, part by part
//! * [`base`]: what the copying of a base costs the guest
//! * [`disk`]: a guest's disk with and without a backup, in turn
//! * [`report`]: all of these, their tables and plots
//! * [`pairs`]: real pairs for these, [`processors`]: who runs where, and for how long
//! * [`figures`]: distributions of what was measured, [`table`]: results for people, pages and programs

pub mod base;
mod chart;
pub mod disk;
pub mod epochs;
pub mod failover;
pub mod figures;
pub mod floor;
pub mod latency;
pub mod linux;
pub mod pairs;
pub mod pause;
mod plots;
pub mod processors;
pub mod pulse;
pub mod qemu;
mod qmp;
pub mod report;
pub mod strategies;
pub mod subject;
pub mod table;
pub mod throughput;
pub mod tracking;
pub mod wire;

/// What a benchmark could not do. One line for people.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The machine cannot be built: among others because there is no /dev/kvm.
    #[error(transparent)]
    Build(#[from] vmm::BuildError),
    /// The guest's image.
    #[error(transparent)]
    Boot(#[from] vmm::machine::BootError),
    /// The guest did not run.
    #[error(transparent)]
    Run(#[from] vmm::machine::RunError),
    /// The guest could not be stopped.
    #[error(transparent)]
    Pause(#[from] vmm::machine::PauseError),
    /// The dirty log.
    #[error(transparent)]
    Dirty(#[from] vmm::machine::DirtyError),
    /// A checkpoint failed.
    #[error(transparent)]
    Checkpoint(#[from] primary::epoch::CheckpointError),
    /// Its pages could not be copied.
    #[error(transparent)]
    Copy(#[from] primary::capture::CopyError),
    /// Guest RAM.
    #[error(transparent)]
    Ram(#[from] vmm::memory::RamError),
    /// A pair of real processes.
    #[error(transparent)]
    Pair(#[from] crate::real::Error),
    /// A call to the host failed.
    #[error("{what}: {source}")]
    Host {
        /// The call.
        what: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
    /// What was measured is not what was meant to be.
    #[error("{0}")]
    Wrong(String),
}

/// Makes a [`BenchError::Host`] of a call's error.
pub(crate) fn host<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> BenchError {
    move |source| BenchError::Host { what, source: source.into() }
}

/// Processors and kernel of this host, and how busy it is before anything of ours runs.
pub(crate) fn host_description() -> String {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let busy =
        processors::share_busy().map_or_else(|_| "unknown".to_owned(), |share| format!("{:.0} %", share * 100.0));
    format!("{processors} processors, Linux {}, busy before: {busy}", kernel.trim_end())
}
