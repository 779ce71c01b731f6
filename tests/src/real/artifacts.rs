//! The programs under test, and the guest image: built when they are not up to date.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use std::{fs, io};

use super::{Error, MachineKind, Result, tools};

/// Paths of what a pair is made of.
#[derive(Clone, Debug)]
pub struct Artifacts {
    /// Where `ft-primary`, `ft-backup` and `ftctl` are.
    pub bin: PathBuf,
    /// The guest, when the machine is a KVM one.
    pub guest: Option<GuestImage>,
}

/// What a KVM machine boots.
#[derive(Clone, Debug)]
pub struct GuestImage {
    /// A PVH ELF: the demo guest, unless somebody brings another that speaks Redis's protocol, such as Linux with a Redis server.
    pub kernel: PathBuf,
    /// What it is given to begin with.
    pub initrd: Option<PathBuf>,
    /// Words for its command line, behind those that the demo guest needs.
    pub cmdline: String,
    /// How long it may take to boot.
    pub boot_limit: Duration,
}

/// How long a Linux guest may take to boot where its kernel is emulated.
const LINUX_BOOT_LIMIT: Duration = Duration::from_secs(300);

impl GuestImage {
    /// A PVH ELF that needs nothing else and starts at once, as the demo guest does; or a directory as `examples/linux-guest/build` makes it, with
    /// `vmlinux`, `initrd` and `cmdline`.
    ///
    /// # Errors
    /// There is no such file, or its command line cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        // What is relative in pair.toml is so to pair.toml.
        let path = path.canonicalize().map_err(Error::io(format!("no guest in {}", path.display())))?;
        if !path.is_dir() {
            return Ok(Self { kernel: path, initrd: None, cmdline: String::new(), boot_limit: Duration::ZERO });
        }
        let cmdline = path.join("cmdline");
        let text = fs::read_to_string(&cmdline).map_err(Error::io(format!("cannot read {}", cmdline.display())))?;
        Ok(Self {
            kernel: path.join("vmlinux"),
            initrd: Some(path.join("initrd")),
            cmdline: text.trim().to_owned(),
            boot_limit: LINUX_BOOT_LIMIT,
        })
    }
}

impl Artifacts {
    /// Builds what is needed for `machine`, telling `progress` about each step. With `FT_BIN_DIR` set, the programs are taken
    /// from there as they are; with `FT_GUEST` set, likewise the image ([`GuestImage::open`]).
    pub fn build(machine: MachineKind, progress: impl FnMut(&str)) -> Result<Self> {
        Self::build_with(machine, std::env::var_os("FT_GUEST").map(PathBuf::from).as_deref(), progress)
    }

    /// The same with this guest; the demo guest is built when there is none.
    pub fn build_with(machine: MachineKind, guest: Option<&Path>, mut progress: impl FnMut(&str)) -> Result<Self> {
        let bin = match std::env::var_os("FT_BIN_DIR") {
            Some(dir) => PathBuf::from(dir),
            None => {
                static BUILT: Built = Built::new();
                progress("building ft-primary, ft-backup and ftctl");
                BUILT.once(build_programs)?
            }
        };
        let guest = match (machine, guest) {
            (MachineKind::Model, _) => None,
            (MachineKind::Kvm, Some(image)) => Some(GuestImage::open(image)?),
            (MachineKind::Kvm, None) => {
                progress("building the demo guest");
                Some(GuestImage::open(&build_guest()?)?)
            }
        };
        Ok(Self { bin, guest })
    }

    /// The same with the failpoints in `ft-primary` and `ft-backup`. They are built beside the ordinary ones and share all dependencies
    /// with them; their directory is one further down.
    pub fn build_failpoints(machine: MachineKind, progress: impl FnMut(&str)) -> Result<Self> {
        static BUILT: Built = Built::new();
        let plain = Self::build(machine, progress)?;
        let bin = match std::env::var_os("FT_BIN_DIR") {
            Some(_) => plain.bin.join("failpoints"),
            None => BUILT.once(|| build_failpoints(&plain.bin))?,
        };
        Ok(Self { bin, ..plain })
    }

    /// The demo's program, built beside the others; with `FT_BIN_DIR` set it is taken from there.
    pub fn build_demo(&self) -> Result<PathBuf> {
        if std::env::var_os("FT_BIN_DIR").is_none() {
            let target = self.bin.parent().unwrap_or(&self.bin);
            let mut command = cargo();
            command.args(["build", "--quiet", "-p", "examples", "--bin", "demo"]);
            if !cfg!(debug_assertions) {
                command.arg("--release");
            }
            command.arg("--target-dir").arg(target);
            run(command)?;
        }
        Ok(self.program("demo"))
    }

    /// Path of one of the programs.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }
}

/// The workspace's root.
#[must_use]
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().map_or_else(|| tests.to_path_buf(), Path::to_path_buf)
}

/// What this process has built: everybody in it wants the same, and what somebody uses is not replaced.
struct Built(Mutex<Option<PathBuf>>);

impl Built {
    const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// A build that failed is tried again by the next who wants it; others wait for one that is under way.
    fn once(&self, build: impl FnOnce() -> Result<PathBuf>) -> Result<PathBuf> {
        let mut built = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = &*built {
            return Ok(path.clone());
        }
        let path = build()?;
        *built = Some(path.clone());
        Ok(path)
    }
}

/// Builds with the profile that the caller was built with, into the directory where the caller is, so that nothing is built twice.
fn build_programs() -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--quiet", "-p", "primary", "-p", "backup", "-p", "failover", "--bins"]);
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    if profile == "release" {
        command.arg("--release");
    }
    let exe = std::env::current_exe().map_err(Error::io("cannot tell where this program is"))?;
    // Tests are one directory further down, in deps/.
    let dir = exe.ancestors().find(|dir| dir.ends_with(profile)).ok_or_else(|| {
        Error::answer(
            exe.display().to_string(),
            "is not in a cargo target directory; set FT_BIN_DIR to where ft-primary is",
        )
    })?;
    let target = dir.parent().ok_or_else(|| Error::answer(dir.display().to_string(), "has no parent directory"))?;
    command.arg("--target-dir").arg(target);
    run(command)?;
    Ok(dir.to_path_buf())
}

/// Builds the demo guest's workspace into its own target directory.
pub(crate) fn build_guest() -> Result<PathBuf> {
    static BUILT: Built = Built::new();
    BUILT.once(build_guest_anew)
}

fn build_guest_anew() -> Result<PathBuf> {
    let root = workspace().join("examples/guest-kv");
    let target = root.join("target");
    let mut command = cargo();
    command.args(["build", "--quiet", "--release", "--manifest-path"]).arg(root.join("Cargo.toml"));
    command.arg("--target-dir").arg(&target);
    run(command)?;
    let places = ["x86_64-unknown-linux-gnu/release/guest-kv", "release/guest-kv"];
    places
        .iter()
        .map(|place| target.join(place))
        .find(|path| path.is_file())
        .ok_or_else(|| Error::answer(target.display().to_string(), "the build left no guest-kv there"))
}

/// Builds the programs with failpoints beside the ordinary ones in `plain`, and gives them the same names in a directory of their own.
fn build_failpoints(plain: &Path) -> Result<PathBuf> {
    let bin = plain.join("failpoints");
    let mut command = cargo();
    command.args(["build", "--quiet", "-p", "primary", "-p", "backup"]);
    command.args(["--features", "primary/failpoints,backup/failpoints"]);
    command.args(["--bin", "ft-primary-failpoints", "--bin", "ft-backup-failpoints"]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    command.arg("--target-dir").arg(plain.parent().unwrap_or(plain));
    run(command)?;
    fs::create_dir_all(&bin).map_err(Error::io(format!("cannot make {}", bin.display())))?;
    let names = [("ft-primary-failpoints", "ft-primary"), ("ft-backup-failpoints", "ft-backup"), ("ftctl", "ftctl")];
    for (from, to) in names {
        let to = bin.join(to);
        match fs::remove_file(&to) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(format!("cannot replace {}", to.display()))(e));
            }
            _ => {}
        }
        // Hard links: a program finds its sibling beside the name that it was started under.
        fs::hard_link(plain.join(from), &to).map_err(Error::io(format!("cannot make {}", to.display())))?;
    }
    Ok(bin)
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    // What cargo tells the program that it runs is not for the cargo that this program runs: build scripts of some crates (ring's) look at it, and
    // everything above them would be built anew each time.
    for (name, _) in std::env::vars_os() {
        let ours = name.to_str().is_some_and(|name| {
            ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
                || ["CARGO_PRIMARY_PACKAGE", "OUT_DIR"].contains(&name)
        });
        if ours {
            command.env_remove(name);
        }
    }
    command
}

fn run(mut command: Command) -> Result<()> {
    let name = tools::describe(&command);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let output = command.output().map_err(|e| tools::start_error("cargo", e))?;
    if output.status.success() {
        return Ok(());
    }
    let detail = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::Command { command: name, detail: format!("{}:\n{detail}", output.status) })
}
