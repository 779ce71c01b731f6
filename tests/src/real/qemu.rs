//! The demo guest in QEMU's microvm: somebody else's devices.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::daemon::Daemon;
use super::network::{GUEST_IP, GUEST_MAC, GUEST_PORT, Network, TAP};
use super::resp::Connection;
use super::{Error, Node, Result};

/// How long a boot may take.
const BOOT_LIMIT: Duration = Duration::from_secs(30);
/// How long one try to connect takes at most: QEMU may have ended.
const TRY: Duration = Duration::from_secs(2);
/// How long the guest may take for an answer: reading all of a disk takes a while on a busy host.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A disk.
#[derive(Clone, Copy, Debug)]
pub struct Drive<'a> {
    /// The raw image.
    pub image: &'a Path,
    /// More options of `-drive`, with a comma before each.
    pub more: &'a str,
}

impl<'a> Drive<'a> {
    /// A disk with nothing special.
    #[must_use]
    pub fn new(image: &'a Path) -> Self {
        Self { image, more: "" }
    }
}

/// The command that boots `image` with these disks; `append` goes to the guest's command line.
#[must_use]
pub fn command(image: &Path, append: &str, drives: &[Drive<'_>]) -> Command {
    let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "microvm,accel=kvm,ioapic2=off,acpi=off"]);
    command.args(["-cpu", "host,-arch-capabilities", "-m", "256", "-smp", "1", "-nodefaults", "-no-user-config"]);
    command.args(["-no-reboot", "-nographic", "-serial", "stdio", "-global", "virtio-mmio.force-legacy=false"]);
    command.arg("-kernel").arg(image).args(["-append", &format!("ip={GUEST_IP}/24 port={GUEST_PORT} {append}")]);
    command.args(["-netdev", &format!("tap,id=n0,ifname={TAP},script=no,downscript=no")]);
    command.args(["-device", &format!("virtio-net-device,netdev=n0,mac={mac}")]);
    for (index, Drive { image, more }) in drives.iter().enumerate() {
        let file = if more.contains("file.driver=") { "file.image.filename" } else { "file" };
        command.arg("-drive").arg(format!("if=none,id=d{index},format=raw,{file}={}{more}", image.display()));
        command.args(["-device", &format!("virtio-blk-device,drive=d{index}")]);
    }
    command
}

/// A machine that answers.
pub struct Machine {
    /// QEMU.
    pub daemon: Daemon,
    /// A connection to the guest.
    pub connection: Connection,
}

impl Machine {
    /// Starts a command of [`command`] on the first host and waits until the guest takes connections.
    pub fn boot(network: &Network, command: Command, log: &Path) -> Result<Self> {
        let mut daemon = Daemon::start(Node::A, network.host(Node::A), command, log)?;
        let deadline = Instant::now() + BOOT_LIMIT;
        loop {
            daemon.check()?;
            match Connection::open(network.client(), TRY) {
                Ok(_) => {
                    let connection = Connection::open(network.client(), PATIENCE)?;
                    return Ok(Self { daemon, connection });
                }
                Err(e) if Instant::now() >= deadline => {
                    return Err(Error::Timeout {
                        what: "the guest's first answer".into(),
                        waited: BOOT_LIMIT,
                        detail: format!("{e}; console:\n{}", daemon.log_tail()),
                    });
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}
