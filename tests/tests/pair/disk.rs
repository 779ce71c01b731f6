//! Disks of the protected guest: the image that takes over is that of the last committed epoch, whoever comes back gets only what differs, and
//! what was acknowledged with a flush is there after a cold boot.

use std::fs::File;
use std::thread;
use std::time::{Duration, Instant};

use tests::real::client::{Writer, WriterConfig, read_back};
use tests::real::pair::PairOptions;
use tests::real::scene::{Scene, play};
use tests::real::{Error, MachineKind, Node, Result};

const DISK_BYTES: u64 = 64 << 20;
/// Nothing here is about time: what takes this long on a busy host will not come.
const LIMIT: Duration = Duration::from_secs(180);

fn options(scene: &Scene) -> PairOptions {
    PairOptions { disks: vec![DISK_BYTES], cmdline: "appendfsync=always".into(), ..scene.options() }
}

/// Waits until so many more writes are acknowledged.
fn wait_acked(writer: &Writer, more: u64) -> Result<()> {
    let (wanted, deadline) = (writer.acked() + more, Instant::now() + LIMIT);
    while writer.acked() < wanted {
        if !writer.is_writing() || Instant::now() >= deadline {
            return Err(Error::Timeout {
                what: format!("{wanted} acknowledged writes"),
                waited: LIMIT,
                detail: format!("{} so far", writer.acked()),
            });
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn killed_and_back(scene: &mut Scene) -> Result<()> {
    let options = options(scene);
    let pair = scene.protected(&options)?;
    let writer = pair.start_writer(WriterConfig { patience: LIMIT, ..WriterConfig::default() })?;
    wait_acked(&writer, 200)?;
    for (dies, lives) in [(Node::A, Node::B), (Node::B, Node::A), (Node::A, Node::B)] {
        let killed_us = pair.kill(dies)?;
        pair.wait_event(lives, killed_us, LIMIT, "takeover", |e| e.event == "activated")?;
        wait_acked(&writer, 100)?;
        // As a service manager would: the same program again, which becomes the backup of its successor.
        pair.start_primary(dies, &[])?;
        pair.wait_protected(lives, LIMIT)?;
        wait_acked(&writer, 100)?;
    }
    let report = writer.finish(pair.network().client());
    assert_eq!(report.connection_error, None);
    assert!(report.same.complete(report.acks.len()), "{:?}", report.same);
    assert!(report.fresh.complete(report.acks.len()), "{:?}", report.fresh);
    assert_eq!(pair.wait_equal_images(0, LIMIT)?, None, "the first byte that differs");
    Ok(())
}

/// Both hosts lose the guest, one just after the other; what was acknowledged is read from the image of the one that was the last to hold it.
fn cold_boot(scene: &mut Scene) -> Result<()> {
    for (first, last) in [(Node::A, Node::B), (Node::B, Node::A)] {
        let options = options(scene);
        let pair = scene.protected(&options)?;
        let writer = pair.start_writer(WriterConfig { patience: Duration::from_secs(5), ..WriterConfig::default() })?;
        wait_acked(&writer, 300)?;
        pair.kill(first)?;
        pair.kill(last)?;
        let report = writer.finish(pair.network().client());
        assert!(report.acks.len() >= 300);
        // Whom the record names as the owner depends on how far a takeover or the way to solo had come.
        pair.start_primary(last, &["--force-cold-boot"])?;
        let mut guest = pair.wait_guest(LIMIT)?;
        let missing = read_back(&mut guest, WriterConfig::default().seed, &report.acks);
        assert!(missing.complete(report.acks.len()), "{last}: {missing:?};\n{}", pair.logs());
    }
    Ok(())
}

/// Both sides are compared while the guest works; a block of the backup's image that changed behind everybody's back is found and named. That is what a bit
/// that is lost from a map would leave: a difference that no synchronisation looks at.
fn compared(scene: &mut Scene) -> Result<()> {
    let cmdline = "appendfsync=always dirty=1000".into();
    let options = PairOptions { disks: vec![DISK_BYTES], cmdline, ..scene.patient_options() };
    let pair = scene.protected(&options)?;
    let writer = pair.start_writer(WriterConfig { patience: LIMIT, ..WriterConfig::default() })?;
    wait_acked(&writer, 100)?;
    let equal = pair.ftctl(Node::A, &["verify", "--timeout", "60s"])?;
    assert!(equal.status.success() && equal.stdout.contains("both sides are equal"), "{equal:?}");
    pair.kill(Node::B)?;
    let at = DISK_BYTES - 8192;
    let image = File::options().write(true).open(pair.image(Node::B, 0)).map_err(Error::io("cannot open an image"))?;
    std::os::unix::fs::FileExt::write_all_at(&image, b"lost", at).map_err(Error::io("cannot write to an image"))?;
    drop(image);
    pair.start_backup(Node::B)?;
    pair.wait_protected(Node::A, LIMIT)?;
    wait_acked(&writer, 50)?;
    let differs = pair.ftctl(Node::A, &["verify", "--timeout", "60s"])?;
    assert!(!differs.status.success(), "{differs:?}");
    assert!(differs.stderr.contains(&format!("DIFFERS: disk 0 at byte {at:#x};")), "{differs:?}");
    pair.wait_protected(Node::A, LIMIT)?;
    let report = writer.finish(pair.network().client());
    assert!(report.connection_survived() && report.same.complete(report.acks.len()), "{:?}", report.same);
    Ok(())
}

#[test]
fn kvm_compared() {
    play(MachineKind::Kvm, "compared", compared);
}

#[test]
fn kvm_killed_and_back() {
    play(MachineKind::Kvm, "killed_and_back", killed_and_back);
}

#[test]
fn kvm_cold_boot() {
    play(MachineKind::Kvm, "cold_boot", cold_boot);
}
