//! The programs under test, and the guest image: built when they are not up to date.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
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

impl GuestImage {
    /// The demo guest, which starts at once.
    fn demo(kernel: PathBuf) -> Self {
        Self { kernel, initrd: None, cmdline: String::new(), boot_limit: Duration::ZERO }
    }

    /// What `FT_GUEST`, `FT_GUEST_INITRD`, `FT_GUEST_CMDLINE` and `FT_GUEST_BOOT` (seconds) say; nothing without the first.
    fn from_env() -> Result<Option<Self>> {
        let Some(kernel) = std::env::var_os("FT_GUEST") else { return Ok(None) };
        let text = |name: &str| match std::env::var(name) {
            Ok(text) => Ok(text),
            Err(std::env::VarError::NotPresent) => Ok(String::new()),
            Err(error) => Err(Error::answer(name, error.to_string())),
        };
        let boot = text("FT_GUEST_BOOT")?;
        let seconds = if boot.is_empty() { Ok(0) } else { boot.parse() };
        let boot_limit =
            seconds.map(Duration::from_secs).map_err(|e| Error::answer("FT_GUEST_BOOT", format!("{boot:?}: {e}")))?;
        let initrd = std::env::var_os("FT_GUEST_INITRD").map(PathBuf::from);
        Ok(Some(Self { initrd, cmdline: text("FT_GUEST_CMDLINE")?, boot_limit, ..Self::demo(kernel.into()) }))
    }
}

impl Artifacts {
    /// Builds what is needed for `machine`, telling `progress` about each step. With `FT_BIN_DIR` set, the programs are taken
    /// from there as they are; with `FT_GUEST` set, likewise the image (and what [`GuestImage`] has beside it).
    pub fn build(machine: MachineKind, mut progress: impl FnMut(&str)) -> Result<Self> {
        let bin = match std::env::var_os("FT_BIN_DIR") {
            Some(dir) => PathBuf::from(dir),
            None => {
                progress("building ft-primary, ft-backup and ftctl");
                build_programs()?
            }
        };
        let guest = match (machine, GuestImage::from_env()?) {
            (MachineKind::Model, _) => None,
            (MachineKind::Kvm, Some(image)) => Some(image),
            (MachineKind::Kvm, None) => {
                progress("building the demo guest");
                Some(GuestImage::demo(build_guest()?))
            }
        };
        Ok(Self { bin, guest })
    }

    /// The same with the failpoints in `ft-primary` and `ft-backup`. They are built beside the ordinary ones and share all dependencies
    /// with them; their directory is one further down.
    pub fn build_failpoints(machine: MachineKind, progress: impl FnMut(&str)) -> Result<Self> {
        let plain = Self::build(machine, progress)?;
        let bin = plain.bin.join("failpoints");
        if std::env::var_os("FT_BIN_DIR").is_some() {
            return Ok(Self { bin, ..plain });
        }
        let target = plain.bin.parent().unwrap_or(&plain.bin);
        let mut command = cargo();
        command.args(["build", "--quiet", "-p", "primary", "-p", "backup"]);
        command.args(["--features", "primary/failpoints,backup/failpoints"]);
        command.args(["--bin", "ft-primary-failpoints", "--bin", "ft-backup-failpoints"]);
        if !cfg!(debug_assertions) {
            command.arg("--release");
        }
        command.arg("--target-dir").arg(target);
        run(command)?;
        fs::create_dir_all(&bin).map_err(Error::io(format!("cannot make {}", bin.display())))?;
        let names =
            [("ft-primary-failpoints", "ft-primary"), ("ft-backup-failpoints", "ft-backup"), ("ftctl", "ftctl")];
        for (from, to) in names {
            let to = bin.join(to);
            match fs::remove_file(&to) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("cannot replace {}", to.display()))(e));
                }
                _ => {}
            }
            // Hard links: a program finds its sibling beside the name that it was started under.
            fs::hard_link(plain.bin.join(from), &to).map_err(Error::io(format!("cannot make {}", to.display())))?;
        }
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
