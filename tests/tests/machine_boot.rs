//! The demo guest on a KVM machine in this process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tests::machine::client::Counter;
use tests::machine::{Recorder, build, demo_config, demo_guest, no_kvm};
use vmm::{Machine, SocketPort};

const PATIENCE: Duration = Duration::from_secs(20);

/// Waits, within limits, until something holds.
fn eventually(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn boot_demo_guest_counts_for_a_client() {
    if no_kvm("boot_demo_guest_counts_for_a_client") {
        return;
    }
    drop(env_logger::builder().is_test(true).try_init());
    let (outputs, frames) = Recorder::new();
    let (guest_end, host_end) = SocketPort::pair().unwrap();
    let config = demo_config(demo_guest(), 1, 64 << 20);
    let mut machine = build(&config, &outputs, &Arc::new(guest_end));
    machine.load().unwrap();
    machine.run().unwrap();
    let client = Counter::start(frames, Arc::new(host_end), Vec::new());
    let began = Instant::now();
    eventually("the guest counts to 100", || {
        if let Ok(event) = machine.events().try_recv() {
            panic!("{event:?}; console:\n{}", String::from_utf8_lossy(&outputs.console()));
        }
        if began.elapsed() > PATIENCE / 2 {
            eprintln!("console:\n{}", String::from_utf8_lossy(&outputs.console()));
        }
        client.count() >= 100
    });
    println!("counted to 100 in {:?}", began.elapsed());
    let counted = client.finish().unwrap();
    assert!(counted >= 100);
}
