//! The demo guest's image is nobody's in particular: it boots in QEMU's microvm as well, and answers.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tests::real::artifacts::Artifacts;
use tests::real::daemon::Daemon;
use tests::real::network::{GUEST_IP, GUEST_MAC, GUEST_PORT, Network, TAP};
use tests::real::resp::{Connection, Reply};
use tests::real::scene::{kvm_wanted, tool_wanted};
use tests::real::{MachineKind, Node};

const BOOT_LIMIT: Duration = Duration::from_secs(30);

fn qemu(image: &Path) -> Command {
    let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "microvm,accel=kvm,ioapic2=off,acpi=off"]);
    command.args([
        "-cpu",
        "host,-arch-capabilities",
        "-m",
        "256",
        "-smp",
        "1",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-nographic",
    ]);
    command.args(["-serial", "stdio", "-global", "virtio-mmio.force-legacy=false", "-kernel"]).arg(image);
    command.args(["-append", &format!("ip={GUEST_IP}/24 port={GUEST_PORT}")]);
    command.args(["-netdev", &format!("tap,id=n0,ifname={TAP},script=no,downscript=no")]);
    command.args(["-device", &format!("virtio-net-device,netdev=n0,mac={mac}")]);
    command
}

/// Boots, answers PING, keeps what it is told.
#[test]
fn guest_boots_in_qemu_and_answers() {
    if !kvm_wanted() || !tool_wanted("qemu-system-x86_64", "FT_NO_QEMU") {
        return;
    }
    let artifacts = Artifacts::build(MachineKind::Kvm, |_| {}).unwrap_or_else(|e| panic!("{e}"));
    let network = Network::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("qemu.log");
    let image = artifacts.guest.expect("built for KVM");
    let mut daemon = Daemon::start(Node::A, network.host(Node::A), qemu(&image), &log).unwrap();
    let deadline = Instant::now() + BOOT_LIMIT;
    let mut connection = loop {
        daemon.check().unwrap_or_else(|e| panic!("{e}"));
        match Connection::open(network.client(), Duration::from_secs(2)) {
            Ok(connection) => break connection,
            Err(e) => assert!(Instant::now() < deadline, "{e}; console:\n{}", daemon.log_tail()),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(connection.call(&["PING"]).unwrap(), Reply::Simple("PONG".into()));
    assert_eq!(connection.call(&["SET", "a", "1"]).unwrap(), Reply::Simple("OK".into()));
    assert_eq!(connection.call(&["INCR", "a"]).unwrap(), Reply::Integer(2));
    assert_eq!(connection.call(&["GET", "a"]).unwrap(), Reply::Bulk(Some(b"2".to_vec())));
}
