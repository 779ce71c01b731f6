//! What a test of the real pair runs in: one machine kind, few pairs on it at a time, a limit in time, and logs when it fails.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::artifacts::Artifacts;
use super::pair::{Pair, PairOptions};
use super::{MachineKind, Result, tools};

/// No test of the real pair takes longer than this; one that does is ended with the whole test process.
const LIMIT: Duration = Duration::from_secs(600);

/// Declares each function as a test on both machines: `kvm::name` and `model::name`.
#[macro_export]
macro_rules! on_both_machines {
    ($($name:ident),+ $(,)?) => {
        mod kvm {
            $(#[test] fn $name() { $crate::real::scene::play($crate::real::MachineKind::Kvm, stringify!($name), super::$name); })+
        }
        mod model {
            $(#[test] fn $name() { $crate::real::scene::play($crate::real::MachineKind::Model, stringify!($name), super::$name); })+
        }
    };
}

/// What a test is given.
pub struct Scene {
    machine: MachineKind,
    artifacts: Artifacts,
    pair: Option<Pair>,
}

impl Scene {
    /// The machine on which this test runs.
    #[must_use]
    pub fn machine(&self) -> MachineKind {
        self.machine
    }

    /// The programs under test.
    #[must_use]
    pub fn artifacts(&self) -> &Artifacts {
        &self.artifacts
    }

    /// Small options, so that a test is quick.
    #[must_use]
    pub fn options(&self) -> PairOptions {
        PairOptions { memory: "128MiB".into(), ..PairOptions::new(self.machine) }
    }

    /// Small options with timers that a busy host does not run into, for tests whose subject is not time.
    #[must_use]
    pub fn patient_options(&self) -> PairOptions {
        PairOptions { extra: "[timers]\nsolo = \"2s\"\ntakeover = \"4s\"\n".into(), ..self.options() }
    }

    /// Wires and files of a pair, nothing started. A pair from before is taken down first.
    pub fn prepare(&mut self, options: &PairOptions) -> Result<&mut Pair> {
        self.pair = None;
        let pair = Pair::prepare(self.artifacts.clone(), options)?;
        Ok(self.pair.insert(pair))
    }

    /// A pair whose guest answers and is protected.
    pub fn protected(&mut self, options: &PairOptions) -> Result<&mut Pair> {
        let pair = self.prepare(options)?;
        pair.start_protected()?;
        Ok(pair)
    }

    /// A pair with small options whose guest answers and is protected.
    pub fn protected_small(&mut self) -> Result<&mut Pair> {
        let options = self.options();
        self.protected(&options)
    }
}

/// So many pairs of each kind of machine at a time on this host, whichever test programs they belong to: each has wires and files of its own, and they mostly
/// wait for timers; with more of them, each one's timers would wait for processors.
const PLACES: usize = 2;

/// A place for one pair, free again when this is dropped.
struct Place {
    _locked: File,
}

impl Place {
    fn wait(machine: MachineKind) -> io::Result<Self> {
        // Where to queue when all are taken: in turn.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let open = |place: usize| {
            let path = std::env::temp_dir().join(format!("ft-pair-tests-{machine}-{place}.lock"));
            File::options().create(true).append(true).open(path)
        };
        for place in 0..PLACES {
            let file = open(place)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self { _locked: file }),
                Err(Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let file = open(NEXT.fetch_add(1, Ordering::Relaxed) % PLACES)?;
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))?;
        Ok(Self { _locked: file })
    }
}

/// Runs one test, one of few at a time on this host, bounded in time, with the logs of both sides when it fails.
///
/// # Panics
/// When the test fails, or what it needs is not there.
pub fn play(machine: MachineKind, name: &str, test: impl FnOnce(&mut Scene) -> Result<()>) {
    play_with(machine, name, || Artifacts::build(machine, |_| {}), test);
}

/// The same with programs built in a way of their own.
///
/// # Panics
/// As [`play`].
pub fn play_with(
    machine: MachineKind,
    name: &str,
    build: impl FnOnce() -> Result<Artifacts>,
    test: impl FnOnce(&mut Scene) -> Result<()>,
) {
    if machine == MachineKind::Kvm && !kvm_wanted() {
        return;
    }
    let _place = Place::wait(machine).expect("a lock can be had");
    let (done, ended) = channel::<()>();
    let title = format!("{machine}::{name}");
    thread::spawn(move || {
        if ended.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{title} took longer than {LIMIT:?}");
            std::process::abort();
        }
    });
    let artifacts = build().unwrap_or_else(|e| panic!("{e}"));
    let mut scene = Scene { machine, artifacts, pair: None };
    if let Err(e) = test(&mut scene) {
        // Unwinding drops the pair, which then shows and keeps its logs.
        panic!("{machine}::{name}: {e}");
    }
    drop(done);
}

/// Whether tests on KVM are to run: always, unless `FT_NO_KVM=1` says that this host has none.
///
/// # Panics
/// If KVM cannot be used and nobody said so.
#[must_use]
pub fn kvm_wanted() -> bool {
    if std::env::var_os("FT_NO_KVM").is_some_and(|value| value == "1") {
        println!("left out: FT_NO_KVM=1");
        return false;
    }
    if let Err(e) = File::options().read(true).write(true).open("/dev/kvm") {
        panic!("cannot use /dev/kvm ({e}); FT_NO_KVM=1 leaves the tests on KVM out");
    }
    true
}

/// Whether a test that needs a program of the host is to run: always, unless the environment variable `unless` is 1.
///
/// # Panics
/// If the program is missing and nobody said so.
#[must_use]
pub fn tool_wanted(tool: &str, unless: &str) -> bool {
    if std::env::var_os(unless).is_some_and(|value| value == "1") {
        println!("left out: {unless}=1");
        return false;
    }
    if let Err(e) = tools::require(tool) {
        panic!("{e}; {unless}=1 leaves the tests out that need it");
    }
    true
}
