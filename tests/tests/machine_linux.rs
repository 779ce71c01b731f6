//! Linux with a Redis server on a KVM machine in this process. By hand, because a kernel is needed that no repository carries:
//!
//! ```text
//! examples/linux-guest/build target/linux-guest
//! FT_GUEST=$PWD/target/linux-guest cargo test --release -p tests --test machine_linux -- --ignored --nocapture
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tests::machine::client::say;
use tests::machine::{Recorder, build, demo_config};
use tests::real::artifacts::GuestImage;
use tests::real::network::GUEST_PORT;
use vmm::{ClockPolicy, Machine, MachineConfig, PausedVm, SocketPort};

const PATIENCE: Duration = Duration::from_secs(300);
/// Pauses while the guest boots; every tenth goes on in a fresh machine.
const PAUSES_EVERY: Duration = Duration::from_millis(200);
/// What the server says on the console when it is up.
const READY: &str = "Ready to accept connections";

/// The guest is stopped and moved into fresh machines all the way from its first instruction to its first answer.
#[test]
#[ignore = "by hand: needs FT_GUEST, a directory made by examples/linux-guest/build"]
fn linux_boots_from_machine_to_machine_and_answers() {
    drop(env_logger::builder().is_test(true).try_init());
    let image = std::env::var_os("FT_GUEST").expect("FT_GUEST is not set");
    let image = GuestImage::open(&PathBuf::from(image)).expect("a guest");
    let (outputs, frames) = Recorder::new();
    let (guest_end, host_end) = SocketPort::pair().expect("a socket pair");
    let port = Arc::new(guest_end);
    let config =
        MachineConfig { initrd: image.initrd, cmdline: image.cmdline, ..demo_config(image.kernel, 1, 256 << 20) };
    let mut machine = build(&config, &outputs, &port);
    machine.load().expect("the kernel is bootable");
    machine.run().expect("a loaded machine runs");
    let began = Instant::now();
    let mut moves = 0;
    for n in 1.. {
        let console = String::from_utf8_lossy(&outputs.console()).into_owned();
        if console.contains(READY) {
            println!("{console}\nafter {:?} and {moves} moves", began.elapsed());
            break;
        }
        let ended = machine.events().try_recv();
        assert!(
            ended.is_err() && began.elapsed() < PATIENCE,
            "{ended:?} after {:?}; console:\n{console}",
            began.elapsed()
        );
        std::thread::sleep(PAUSES_EVERY);
        let mut paused = PausedVm::pause(&mut machine).expect("the guest stops");
        let sections = paused.capture().expect("the state can be read");
        if n % 10 == 0 {
            let _ = paused.stay_stopped();
            let mut fresh = build(&config, &outputs, &port);
            let mut bytes = [0; vmm::PAGE_SIZE];
            for page in machine.ram().pages() {
                machine.ram().copy_out(page, &mut bytes).expect("a page of this RAM");
                fresh.ram().copy_in(page, &bytes).expect("machines of equal size");
            }
            fresh.restore(&sections, ClockPolicy::ResumeFromCheckpoint).expect("the state fits an equal machine");
            machine.shut_down();
            fresh.run().expect("a restored machine runs");
            machine = fresh;
            moves += 1;
        }
    }
    let answers = say(frames, Arc::new(host_end), GUEST_PORT, &["PING", "INCR n", "INCR n"], PATIENCE);
    assert_eq!(answers.expect("answers over virtio-net"), ["+PONG", ":1", ":2"]);
}
