//! The demo guest on a disk: checkpoints and restores in the middle of its requests miss no page and lose no request, and a cold boot on the
//! image finds everything that was answered under `appendfsync=always`.
//!
//! `FT_CHECKPOINTS` sets their number (300), `FT_SEED` the instants.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tests::machine::client::{Counter, say};
use tests::machine::shadow::Shadow;
use tests::machine::{Recorder, build_with_disks, demo_config, demo_guest, no_kvm};
use tests::real::rng::Rng;
use vmm::{
    ClockPolicy, Disk, DiskConfig, DiskImage, DiskSerial, KvmMachine, Machine, MachineConfig, PausedVm, SocketPort,
    Tracking,
};

const DISK_BYTES: u64 = 32 << 20;
const RESTORE_EVERY: u64 = 20;
const PATIENCE: Duration = Duration::from_secs(20);

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}={v:?} is not a number")))
}

fn config() -> MachineConfig {
    let serial = DiskSerial::new("data").expect("a name");
    let demo = demo_config(demo_guest(), 1, 48 << 20);
    MachineConfig {
        cmdline: format!("{} appendfsync=always", demo.cmdline),
        disks: vec![DiskConfig { bytes: DISK_BYTES, read_only: false, serial }],
        ..demo
    }
}

fn open(path: &Path) -> Arc<dyn Disk> {
    Arc::new(DiskImage::open(path, Some(DISK_BYTES), false).expect("nobody else has the image"))
}

/// Counts under checkpoints and restores; how far it came.
fn count(config: &MachineConfig, path: &Path, checkpoints: u64) -> u64 {
    let (outputs, frames) = Recorder::new();
    let (guest_end, host_end) = SocketPort::pair().expect("a socket pair");
    let (port, disk) = (Arc::new(guest_end), open(path));
    let build = || build_with_disks(config, &outputs, &port, vec![Arc::clone(&disk)]);
    let mut machine: KvmMachine = build();
    machine.load().expect("the demo guest is bootable");
    let mut shadow = Shadow::zeroed(machine.ram());
    machine.track_dirty(Tracking::Plain).expect("writes can be logged");
    shadow.copy_all(machine.ram());
    machine.run().expect("a loaded machine runs");
    let client = Counter::start(frames, Arc::new(host_end), Vec::new());
    let mut rng = Rng::new(from_env("FT_SEED", 1));
    let (mut counted, mut moved, mut longest) = (0, Instant::now(), Duration::ZERO);
    let mut done = 0;
    while done < checkpoints || counted < checkpoints / 10 {
        done += 1;
        std::thread::sleep(rng.duration(Duration::from_micros(50), Duration::from_millis(4)));
        let mut paused = PausedVm::pause(&mut machine).expect("the guest stops");
        let sections = paused.capture().expect("the state can be read");
        let dirty = paused.take_dirty().expect("the log can be read");
        shadow.apply(&dirty, paused.ram());
        dirty.retire();
        assert_eq!(shadow.differing(paused.ram()), [], "pages that changed and were not in the dirty set");
        if done.is_multiple_of(RESTORE_EVERY) {
            let _ = paused.stay_stopped();
            machine.shut_down();
            machine = build();
            shadow.write_to(machine.ram());
            machine.restore(&sections, ClockPolicy::ResumeFromCheckpoint).expect("the state fits an equal machine");
            machine.track_dirty(Tracking::Plain).expect("writes can be logged");
            machine.run().expect("a restored machine runs");
        } else {
            longest = longest.max(paused.resume().expect("the guest resumes").stop.quiesce);
        }
        if client.count() > counted {
            (counted, moved) = (client.count(), Instant::now());
        }
        let console = || String::from_utf8_lossy(&outputs.console()).into_owned();
        assert!(moved.elapsed() < PATIENCE && client.is_alive(), "stands at {counted}; console:\n{}", console());
    }
    let answers = client.finish().expect("every answer in its turn");
    println!("{done} checkpoints, {} restores, {answers} answers, quiesce at most {longest:?}", done / RESTORE_EVERY);
    answers
}

#[test]
fn guest_on_a_disk_survives_checkpoints_restores_and_a_cold_boot() {
    if no_kvm("guest_on_a_disk_survives_checkpoints_restores_and_a_cold_boot") {
        return;
    }
    drop(env_logger::builder().is_test(true).try_init());
    let image = tempfile::NamedTempFile::new().expect("a temporary file");
    image.as_file().set_len(DISK_BYTES).expect("a sparse file");
    let config = config();
    let answers = count(&config, image.path(), from_env("FT_CHECKPOINTS", 300));

    let (outputs, frames) = Recorder::new();
    let (guest_end, host_end) = SocketPort::pair().expect("a socket pair");
    let mut machine = build_with_disks(&config, &outputs, &Arc::new(guest_end), vec![open(image.path())]);
    machine.load().expect("the demo guest is bootable");
    machine.run().expect("a loaded machine runs");
    let said = say(frames, Arc::new(host_end), 6379, &["INCR counter"], PATIENCE).expect("an answer");
    let answer = said.concat();
    // The last request may have been carried out without an answer.
    let expected = [format!(":{}", answers + 1), format!(":{}", answers + 2)];
    assert!(expected.contains(&answer), "{answer} after {answers}: {}", String::from_utf8_lossy(&outputs.console()));
}
