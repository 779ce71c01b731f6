//! A Linux guest on a KVM machine in this process. By hand, because a kernel is needed that no repository carries.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tests::machine::client::say;
use tests::machine::{Recorder, build, demo_config};
use vmm::{ClockPolicy, Machine, MachineConfig, PausedVm, SocketPort};

const PATIENCE: Duration = Duration::from_secs(300);
/// Pauses while the guest boots; every tenth goes on in a fresh machine.
const PAUSES_EVERY: Duration = Duration::from_millis(200);

/// Boots `FT_LINUX` (a vmlinux) with `FT_INITRD`, whose init must print `INIT REACHED`, give eth0 the address 10.77.0.10/24, echo on
/// TCP port 7 and print `ALIVE` then; with the words of `FT_CMDLINE`. With
/// `FT_LINUX_PAUSES=1` the guest is stopped and moved into fresh machines all the way.
#[test]
#[ignore = "by hand: needs FT_LINUX, FT_INITRD and FT_CMDLINE"]
fn linux_reaches_init_and_echoes() {
    drop(env_logger::builder().is_test(true).try_init());
    let path = |name: &str| PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")));
    let (outputs, frames) = Recorder::new();
    let (guest_end, host_end) = SocketPort::pair().expect("a socket pair");
    let port = Arc::new(guest_end);
    let config = MachineConfig {
        initrd: Some(path("FT_INITRD")),
        cmdline: std::env::var("FT_CMDLINE").expect("FT_CMDLINE"),
        ..demo_config(path("FT_LINUX"), 1, 256 << 20)
    };
    let with_pauses = std::env::var_os("FT_LINUX_PAUSES").is_some();
    let mut machine = build(&config, &outputs, &port);
    machine.load().expect("the kernel is bootable");
    machine.run().expect("a loaded machine runs");
    let began = Instant::now();
    let mut moves = 0;
    for n in 1.. {
        let console = String::from_utf8_lossy(&outputs.console()).into_owned();
        if console.contains("INIT REACHED") && console.contains("ALIVE") {
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
        if with_pauses {
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
    }
    let echo = say(frames, Arc::new(host_end), 7, &["is anybody there?"], PATIENCE).expect("an echo over virtio-net");
    assert_eq!(echo, ["is anybody there?"]);
}
