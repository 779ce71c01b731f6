//! The demo guest's image is nobody's in particular: it boots in QEMU's microvm as well, and answers.

use tests::real::MachineKind;
use tests::real::artifacts::Artifacts;
use tests::real::network::Network;
use tests::real::qemu::{self, Machine};
use tests::real::resp::Reply;
use tests::real::scene::{kvm_wanted, tool_wanted};

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
    let image = artifacts.guest.expect("built for KVM").kernel;
    let mut machine = Machine::boot(&network, qemu::command(&image, "", &[]), &log).unwrap_or_else(|e| panic!("{e}"));
    let connection = &mut machine.connection;
    assert_eq!(connection.call(&["PING"]).unwrap(), Reply::Simple("PONG".into()));
    assert_eq!(connection.call(&["SET", "a", "1"]).unwrap(), Reply::Simple("OK".into()));
    assert_eq!(connection.call(&["INCR", "a"]).unwrap(), Reply::Integer(2));
    assert_eq!(connection.call(&["GET", "a"]).unwrap(), Reply::Bulk(Some(b"2".to_vec())));
}
