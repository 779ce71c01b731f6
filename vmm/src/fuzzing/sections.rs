//! Bytes in the place of each kind of section.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::bench::{Bench, alone};
use crate::devices::lock;
use crate::disk::memory::MemoryDisk;
use crate::machine::RestoreError;
use crate::memory::GuestRam;
use crate::model::{ModelProgram, ProgramOptions};
use crate::section::{Section, SectionKind};
use crate::state::clock::ClockStateV1;
use crate::state::codec::Saved;
use crate::state::irqchip::IrqchipStateV1;
use crate::state::vcpu::VcpuStateV1;

/// MSRs of a small machine: what the section names must be exactly these.
const MSRS: [u32; 3] = [0x10, 0xc000_0080, 0x6e0];

/// Target `sections`: which kind, which version, the section's bytes.
///
/// What is accepted is encoded again as the same bytes; a device that took a state can be used by a guest, captured, and its state
/// taken by another device.
pub fn sections(data: &[u8]) {
    let [which, version, bytes @ ..] = data else { return };
    let version = if *version == 0 { 1 } else { u16::from(*version) };
    let section = |kind| Section { kind, version, bytes: bytes.to_vec() };
    match which % 8 {
        0 => {
            if let Some(state) = open::<VcpuStateV1>(&section(SectionKind::vcpu(0))) {
                // The values are KVM's to judge; `tests/corpus_kvm` gives them to it.
                let fits = state.validate(&MSRS).is_ok();
                assert!(!fits || state.tsc().is_some());
            }
        }
        1 => drop(open::<IrqchipStateV1>(&section(SectionKind::IRQCHIP))),
        2 => drop(open::<ClockStateV1>(&section(SectionKind::CLOCK))),
        3 => alone(|| serial(&section(SectionKind::SERIAL))),
        4 => alone(|| virtio(&section(SectionKind::virtio(0)), Bench::new())),
        6 => alone(|| {
            let disk = Arc::new(MemoryDisk::new(64 << 10, false));
            virtio(&section(SectionKind::virtio(0)), Bench::with_disk(disk));
        }),
        5 => model(&section(SectionKind::MODEL)),
        _ => alone(|| {
            let kind = SectionKind(u16::from_le_bytes([*bytes.first().unwrap_or(&0), *bytes.get(1).unwrap_or(&0)]));
            let _ = Bench::new().devices.restore(&section(kind));
        }),
    }
}

/// Opens a section; what is accepted says the same again.
fn open<S: Saved>(section: &Section) -> Option<S> {
    match S::from_section(section) {
        Ok(state) => {
            assert_eq!(state.to_section(section.kind), *section, "accepted, and encoded as something else");
            Some(state)
        }
        Err(RestoreError::Malformed { .. } | RestoreError::Version { .. }) => None,
        Err(other) => panic!("{other:?} of bytes alone"),
    }
}

fn serial(section: &Section) {
    let bench = Bench::new();
    if bench.devices.restore(section).is_err() {
        return;
    }
    let captured = lock(&bench.devices.serial).capture().to_section(section.kind);
    for round in 0..70u8 {
        for port in 0x3f8..=0x3ff {
            bench.devices.port_in(port, &mut [0]);
            assert!(bench.devices.port_out(port, &[round]).is_none());
        }
    }
    let used = lock(&bench.devices.serial).capture().to_section(section.kind);
    for state in [captured, used] {
        Bench::new().devices.restore(&state).expect("a captured state is a state");
    }
}

fn virtio(section: &Section, bench: Bench) {
    let ram = bench.devices.ram.tracked();
    // Rings of some kind for queues that claim to be ready.
    ram.write_slice(&section.bytes, GuestAddress(0x1_0000)).expect("a section is small");
    if bench.devices.restore(section).is_err() {
        let untouched = bench.another().devices.capture().expect("a capture");
        assert_eq!(bench.devices.capture().expect("a capture"), untouched, "an error changed the device");
        return;
    }
    let device = &bench.devices.virtio[0];
    assert_eq!(lock(device).capture().to_section(section.kind), *section, "accepted, and something else");
    lock(device).resume_after_restore(ram);
    super::net::assert_consistent(&bench);
    bench.send(vec![1; 60]);
    lock(device).queue_inbound(vec![vec![2; 1514]]);
    for queue in 0..3 {
        bench.write(0x50, queue);
    }
    lock(device).pump(ram);
    while bench.work() {}
    super::net::assert_consistent(&bench);
    super::net::assert_restorable(&bench);
}

fn model(section: &Section) {
    let ram = Arc::new(GuestRam::new(2 << 20).expect("2 MiB of memory"));
    let mut program = ModelProgram::new(ram, [2, 0, 0, 0, 0, 7], &ProgramOptions::default()).expect("it fits");
    program.boot();
    let before = program.capture();
    if program.restore(section).is_err() {
        assert_eq!(program.capture(), before, "an error changed the registers");
        return;
    }
    assert_eq!(program.capture(), *section, "accepted, and something else");
    for _ in 0..3 {
        let now = program.now();
        let step = program.step(now.saturating_add(1_000_000), &[]);
        assert_eq!(step.end, None);
        assert!(program.now() >= now, "guest time ran backwards");
        program.restore(&program.capture()).expect("a captured state is a state");
    }
}
