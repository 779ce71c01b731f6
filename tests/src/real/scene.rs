//! What a test of the real pair runs in: one machine kind, one pair on it at a time, a limit in time, and logs when it fails.

use std::fs::File;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

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

/// One pair on KVM and one of the model machine at a time: each has wires and files of its own.
static ONE_AT_A_TIME: [Mutex<()>; 2] = [const { Mutex::new(()) }; 2];

/// Runs one test: the only one on its kind of machine on this host, bounded in time, with the logs of both sides when it fails.
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
    // A test that failed before leaves nothing behind that would matter.
    let own = match machine {
        MachineKind::Kvm => &ONE_AT_A_TIME[0],
        MachineKind::Model => &ONE_AT_A_TIME[1],
    };
    let _alone_here = own.lock().unwrap_or_else(PoisonError::into_inner);
    let _alone_on_this_host = lock_host(machine);
    watched(machine, name, build, test);
}

/// How many pairs [`play_beside`] lets work at one time: their timers are long, and they mostly wait.
const BESIDE_MAX: usize = 4;

/// Tests that play beside each other: how many, and the host's lock that they share while there are any.
static BESIDE: Mutex<(usize, Option<File>)> = Mutex::new((0, None));
static ROOM: Condvar = Condvar::new();

struct Beside;

impl Beside {
    fn enter(machine: MachineKind) -> Self {
        let playing = BESIDE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut playing = ROOM.wait_while(playing, |(n, _)| *n >= BESIDE_MAX).unwrap_or_else(PoisonError::into_inner);
        if playing.1.is_none() {
            playing.1 = lock_host(machine);
        }
        playing.0 += 1;
        Self
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let mut playing = BESIDE.lock().unwrap_or_else(PoisonError::into_inner);
        playing.0 -= 1;
        if playing.0 == 0 {
            playing.1 = None;
        }
        ROOM.notify_one();
    }
}

/// Runs a test on the model machine beside up to three others of this process that are started in this way. Its timers must be patient.
///
/// # Panics
/// As [`play`].
pub fn play_beside(name: &str, build: impl FnOnce() -> Result<Artifacts>, test: impl FnOnce(&mut Scene) -> Result<()>) {
    let _one_of_few = Beside::enter(MachineKind::Model);
    watched(MachineKind::Model, name, build, test);
}

/// Pairs of other test processes would take the processors away that this one's timers need.
fn lock_host(machine: MachineKind) -> Option<File> {
    let path = std::env::temp_dir().join(format!("ft-pair-tests-{machine}.lock"));
    let file = File::options().create(true).append(true).open(&path).ok()?;
    flock(&file, FlockOperation::LockExclusive).expect("a lock can be waited for");
    Some(file)
}

fn watched(
    machine: MachineKind,
    name: &str,
    build: impl FnOnce() -> Result<Artifacts>,
    test: impl FnOnce(&mut Scene) -> Result<()>,
) {
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
