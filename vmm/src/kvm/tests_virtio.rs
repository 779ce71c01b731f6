//! The network device as a guest meets it, an ill-behaved one included.

use vm_memory::{Bytes, GuestAddress};

use super::testing::{Bench, Driver, RX, Ring, TX, bench, config, eventually, no_kvm};
use super::*;
use crate::devices::host_io::Pumped;
use crate::devices::virtio::mmio::VirtioStateV2;
use crate::hot::Tracking;

const HEADER: u32 = 12;
const NEEDS_RESET: u32 = 0x40;

fn started() -> Bench {
    let mut bench = bench(&config("/nowhere".into(), 1));
    bench.machine.track_dirty(Tracking::Plain).unwrap();
    Driver(&bench.machine).start();
    drop(bench.machine.ram.take_own_writes());
    bench
}

fn pump(machine: &KvmMachine) -> Pumped {
    lock(&machine.devices.virtio[0]).pump(machine.ram.tracked())
}

fn section(machine: &KvmMachine) -> VirtioStateV2 {
    lock(&machine.devices.virtio[0]).capture()
}

/// The pages that the device wrote since the driver last wrote any.
fn own_writes(machine: &mut KvmMachine) -> Vec<u64> {
    let set = machine.take_dirty().unwrap();
    let pages = set.iter().map(|p| p.0 << 12).collect();
    set.retire();
    pages
}

#[test]
fn transmit_hands_over_the_frame_and_its_used_ring_is_dirty() {
    if no_kvm() {
        return;
    }
    let mut bench = started();
    let driver = Driver(&bench.machine);
    let frame = [0xab; 60];
    bench.machine.ram.tracked().write_slice(&frame, GuestAddress(TX.buffer + u64::from(HEADER))).unwrap();
    driver.offer(&TX, 0, HEADER + 60, false);
    drop(bench.machine.ram.take_own_writes());
    driver.kick(1);
    assert_eq!(*bench.heard.frames.lock().unwrap(), [frame.to_vec()]);
    assert_eq!(driver.get::<u16>(TX.used + 2), 1);
    assert_eq!(driver.read(0x60), 1, "interrupt status");
    driver.write(0x64, 1);
    assert_eq!(driver.read(0x60), 0, "interrupt status after the acknowledgement");
    assert_eq!(own_writes(&mut bench.machine), [TX.used]);
}

#[test]
fn transmit_with_interrupts_suppressed_raises_none() {
    if no_kvm() {
        return;
    }
    let bench = started();
    let driver = Driver(&bench.machine);
    driver.put(1u16, TX.avail);
    driver.offer(&TX, 0, HEADER + 60, false);
    driver.kick(1);
    assert_eq!(driver.get::<u16>(TX.used + 2), 1);
    assert_eq!(driver.read(0x60), 0);
}

#[test]
fn receive_fills_the_buffer_and_both_pages_are_dirty() {
    if no_kvm() {
        return;
    }
    let mut bench = started();
    Driver(&bench.machine).offer(&RX, 0, 2048, true);
    drop(bench.machine.ram.take_own_writes());
    bench.cable.send(&[0xcd; 100]).unwrap();
    assert_eq!(pump(&bench.machine), Pumped::Idle);
    let driver = Driver(&bench.machine);
    assert_eq!(driver.get::<u16>(RX.used + 2), 1);
    assert_eq!(driver.get::<u32>(RX.used + 8), HEADER + 100);
    assert_eq!(driver.get::<u16>(RX.buffer + 10), 1, "num_buffers");
    assert_eq!(driver.get::<[u8; 32]>(RX.buffer + u64::from(HEADER) + 68), [0xcd; 32], "the frame's end");
    assert_eq!(driver.read(0x60), 1);
    assert_eq!(own_writes(&mut bench.machine), [RX.used, RX.buffer]);
}

#[test]
fn receive_without_buffers_leaves_the_frame_in_the_port() {
    if no_kvm() {
        return;
    }
    let bench = started();
    bench.cable.send(&[1; 60]).unwrap();
    assert_eq!(pump(&bench.machine), Pumped::Idle);
    let driver = Driver(&bench.machine);
    assert_eq!(driver.get::<u16>(RX.used + 2), 0);
    driver.offer(&RX, 0, 2048, true);
    driver.kick(0);
    pump(&bench.machine);
    assert_eq!(driver.get::<u16>(RX.used + 2), 1);
}

#[test]
fn receive_delivers_queued_frames_before_the_ports() {
    if no_kvm() {
        return;
    }
    let mut bench = started();
    bench.cable.send(&[3; 60]).unwrap();
    bench.machine.queue_inbound(0, vec![vec![1; 60], vec![2; 60]]);
    let driver = Driver(&bench.machine);
    for (n, expected) in [(0, 1u8), (1, 2), (2, 3)] {
        driver.offer(&RX, n, 2048, true);
        pump(&bench.machine);
        assert_eq!(driver.get::<u8>(RX.buffer + u64::from(HEADER)), expected);
    }
}

#[test]
fn frame_larger_than_the_buffer_is_dropped_and_the_next_delivered() {
    if no_kvm() {
        return;
    }
    let bench = started();
    let driver = Driver(&bench.machine);
    driver.offer(&RX, 0, 200, true);
    bench.cable.send(&[1; 1000]).unwrap();
    bench.cable.send(&[2; 100]).unwrap();
    pump(&bench.machine);
    assert_eq!(driver.get::<u16>(RX.used + 2), 1);
    assert_eq!(driver.get::<u8>(RX.buffer + u64::from(HEADER)), 2);
}

/// Each way in which a guest can break a queue ends in NEEDS_RESET; a reset makes the device as new.
#[test]
fn broken_queue_needs_a_reset_and_recovers() {
    if no_kvm() {
        return;
    }
    let jump = |d: &Driver<'_>| d.put(1000u16, TX.avail + 2);
    let short = |d: &Driver<'_>| d.offer(&TX, 0, 4, false);
    let outside = |d: &Driver<'_>| {
        d.offer(&TX, 0, 100, false);
        d.put(u64::MAX - 50, TX.desc);
    };
    let breakages: [&dyn Fn(&Driver<'_>); 3] = [&jump, &short, &outside];
    for (n, break_it) in breakages.into_iter().enumerate() {
        let bench = started();
        let driver = Driver(&bench.machine);
        break_it(&driver);
        driver.kick(1);
        assert_eq!(driver.read(0x70), 15 | NEEDS_RESET, "breakage {n}");
        assert_eq!(driver.read(0x60), 2, "breakage {n}: the driver is told");
        assert!(bench.heard.frames.lock().unwrap().is_empty());
        driver.put(0u32, TX.avail);
        driver.put(0u32, TX.used);
        driver.start();
        driver.offer(&TX, 0, HEADER + 60, false);
        driver.kick(1);
        assert_eq!(bench.heard.frames.lock().unwrap().len(), 1, "breakage {n}: after a reset");
    }
}

#[test]
fn rings_outside_ram_never_become_ready() {
    if no_kvm() {
        return;
    }
    let bench = bench(&config("/nowhere".into(), 1));
    let driver = Driver(&bench.machine);
    let nowhere = 0x8000_0000;
    for ring in [Ring { desc: nowhere, ..TX }, Ring { avail: nowhere, ..TX }, Ring { used: nowhere, ..TX }] {
        driver.negotiate();
        driver.queue(1, &ring);
        assert_eq!(driver.read(0x44), 0);
        assert_ne!(driver.read(0x70) & NEEDS_RESET, 0);
    }
}

#[test]
fn ready_queue_cannot_be_moved() {
    if no_kvm() {
        return;
    }
    let bench = bench(&config("/nowhere".into(), 1));
    let driver = Driver(&bench.machine);
    driver.negotiate();
    driver.queue(1, &TX);
    assert_eq!(driver.read(0x44), 1);
    driver.write(0x90, 0x8000_0000);
    driver.write(0x38, 4);
    let saved = section(&bench.machine);
    lock(&bench.machine.devices.virtio[0]).restore(&saved, bench.machine.ram.tracked()).unwrap();
    driver.write(0x70, 15);
    driver.offer(&TX, 0, HEADER + 60, false);
    driver.kick(1);
    assert_eq!(bench.heard.frames.lock().unwrap().len(), 1, "still where it was");
}

#[test]
fn features_that_were_not_offered_are_not_agreed_to() {
    if no_kvm() {
        return;
    }
    let bench = bench(&config("/nowhere".into(), 1));
    let driver = Driver(&bench.machine);
    for (low, high) in [(1 << 15, 1), (0, 0)] {
        driver.write(0x70, 0);
        driver.write(0x70, 3);
        driver.write(0x24, 0);
        driver.write(0x20, low);
        driver.write(0x24, 1);
        driver.write(0x20, high);
        driver.write(0x70, 11);
        assert_eq!(driver.read(0x70), 3, "features {high:x}:{low:x}");
    }
}

/// Registers take any value at any time.
#[test]
fn registers_survive_a_guest_that_writes_at_random() {
    if no_kvm() {
        return;
    }
    let bench = started();
    let driver = Driver(&bench.machine);
    let mut seed = 7u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from(seed >> 33).unwrap()
    };
    for _ in 0..20_000 {
        let (register, value) = (u64::from(random() % 0x110), random());
        let value = match value % 4 {
            0 => value % 16,
            1 => 0x12_0000 + value % 0x8000,
            _ => value,
        };
        driver.write(register & !3, value);
        driver.read(register);
        pump(&bench.machine);
    }
    // Whatever came of it can be restored.
    let saved = section(&bench.machine);
    lock(&bench.machine.devices.virtio[0]).restore(&saved, bench.machine.ram.tracked()).unwrap();
    assert_eq!(section(&bench.machine), saved);
}

#[test]
fn restored_device_raises_its_interrupt_and_counts_as_kicked() {
    if no_kvm() {
        return;
    }
    let first = started();
    let driver = Driver(&first.machine);
    driver.offer(&TX, 0, HEADER + 60, false);
    driver.kick(1);
    driver.offer(&TX, 1, HEADER + 61, false);
    // Stopped here: an interrupt is pending and a kick on its way.
    let saved = section(&first.machine);

    let second = bench(&config("/nowhere".into(), 1));
    for page in first.machine.ram.pages() {
        let mut bytes = [0; 4096];
        first.machine.ram.copy_out(page, &mut bytes).unwrap();
        second.machine.ram.copy_in(page, &bytes).unwrap();
    }
    let (device, ram) = (&second.machine.devices.virtio[0], second.machine.ram.tracked());
    lock(device).restore(&saved, ram).unwrap();
    assert_eq!(section(&second.machine), saved);
    assert!(!pending(&second.machine), "restoring alone raises nothing");
    lock(device).resume_after_restore(ram);
    assert!(pending(&second.machine), "interrupt 5 is latched");
    let lengths: Vec<_> = second.heard.frames.lock().unwrap().iter().map(Vec::len).collect();
    assert_eq!(lengths, [61], "only the frame that the first machine had not seen");
}

/// Whether the master PIC has latched interrupt 5.
fn pending(machine: &KvmMachine) -> bool {
    let sections = IrqchipStateV1::capture(&machine.vm).unwrap();
    sections.timeless()[9] & 1 << 5 != 0
}

/// The I/O thread, end to end: a frame that arrives while the machine runs is delivered, one that arrives while it is stopped waits.
#[test]
fn frames_wait_while_the_machine_is_stopped() {
    if no_kvm() {
        return;
    }
    let mut bench = super::testing::loaded(&[0xeb, 0xfe], 1);
    Driver(&bench.machine).start();
    for n in 0..4 {
        Driver(&bench.machine).offer(&RX, n, 2048, true);
    }
    let used = |machine: &KvmMachine| Driver(machine).get::<u16>(RX.used + 2);
    bench.cable.send(&[1; 60]).unwrap();
    bench.machine.run().unwrap();
    eventually("the frame that waited", || used(&bench.machine) == 1);
    let stopped = crate::pause::PausedVm::pause(&mut bench.machine).unwrap();
    bench.cable.send(&[2; 60]).unwrap();
    // A thread that ignored the gate would deliver within microseconds.
    std::thread::sleep(std::time::Duration::from_millis(20));
    let _ = stopped.stay_stopped();
    assert_eq!(used(&bench.machine), 1);
    bench.machine.run().unwrap();
    eventually("the frame that came meanwhile", || used(&bench.machine) == 2);
}
