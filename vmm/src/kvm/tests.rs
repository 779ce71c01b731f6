//! The machine as a whole: boot, end, stop, capture, restore.

use vm_memory::{Bytes, GuestAddress};

use super::testing::{
    Bench, COUNTER_AT, COUNTING, GUEST_START, TempFile, bench, bench_with_input, config, elf, eventually, loaded,
    no_kvm,
};
use super::*;
use crate::hot::Tracking;
use crate::pause::PausedVm;
use crate::state::codec::Saved;

fn counter(machine: &KvmMachine) -> u32 {
    machine.ram.tracked().read_obj(GuestAddress(COUNTER_AT)).unwrap()
}

/// Stops for good and captures.
fn final_sections(machine: &mut KvmMachine) -> Vec<Section> {
    let mut paused = PausedVm::pause(machine).unwrap();
    let sections = paused.capture().unwrap();
    let _ = paused.stay_stopped();
    sections
}

/// A section without what time alone changes.
fn timeless(section: &Section) -> Vec<u8> {
    let kind = section.kind;
    if kind == SectionKind::IRQCHIP {
        IrqchipStateV1::from_section(section).unwrap().timeless()
    } else if kind == SectionKind::CLOCK {
        Vec::new()
    } else if kind.0 >> 8 == 1 {
        VcpuStateV1::from_section(section).unwrap().timeless()
    } else {
        section.bytes.clone()
    }
}

/// A machine that ran, its sections, and a fresh one with its RAM.
fn ran_and_fresh(vcpus: u8) -> (Bench, Vec<Section>, Bench) {
    let mut first = loaded(COUNTING, vcpus);
    first.machine.run().unwrap();
    eventually("the guest counts", || counter(&first.machine) > 1000);
    let sections = final_sections(&mut first.machine);
    let fresh = loaded(COUNTING, vcpus);
    for page in first.machine.ram.pages() {
        let mut bytes = [0; 4096];
        first.machine.ram.copy_out(page, &mut bytes).unwrap();
        fresh.machine.ram.copy_in(page, &bytes).unwrap();
    }
    (first, sections, fresh)
}

#[test]
fn capture_restore_capture_is_equal_but_for_time() {
    if no_kvm() {
        return;
    }
    for vcpus in [1, 2] {
        let (_first, sections, mut fresh) = ran_and_fresh(vcpus);
        fresh.machine.restore(&sections, ClockPolicy::ResumeFromCheckpoint).unwrap();
        let again = final_sections(&mut fresh.machine);
        let kinds: Vec<_> = again.iter().map(|s| s.kind).collect();
        assert!(kinds.is_sorted(), "{kinds:?}");
        assert_eq!(kinds, sections.iter().map(|s| s.kind).collect::<Vec<_>>());
        for (before, after) in sections.iter().zip(&again) {
            assert_eq!(timeless(before), timeless(after), "{:?} with {vcpus} vCPUs", before.kind);
        }
    }
}

/// Registers come out of KVM_RUN's page: they must be what the calls of their own say.
#[test]
fn capture_reads_what_the_single_calls_read() {
    if no_kvm() {
        return;
    }
    use zerocopy::IntoBytes;
    let (_first, sections, mut fresh) = ran_and_fresh(2);
    fresh.machine.restore(&sections, ClockPolicy::ResumeFromCheckpoint).unwrap();
    for vcpu in fresh.machine.resting() {
        let fd = &vcpu.fd;
        let singly = [
            fd.get_regs().unwrap().as_bytes().to_vec(),
            fd.get_sregs().unwrap().as_bytes().to_vec(),
            fd.get_vcpu_events().unwrap().as_bytes().to_vec(),
        ];
        let together = vcpu.capture().unwrap().bytes;
        for part in singly {
            assert!(together.windows(part.len()).any(|w| w == part), "vCPU {}: {part:x?}", vcpu.index);
        }
    }
}

#[test]
fn restored_machine_goes_on_where_the_first_stood() {
    if no_kvm() {
        return;
    }
    let (first, sections, mut fresh) = ran_and_fresh(1);
    let stood = counter(&first.machine);
    fresh.machine.restore(&sections, ClockPolicy::ResumeFromCheckpoint).unwrap();
    fresh.machine.run().unwrap();
    eventually("the restored guest counts on", || counter(&fresh.machine) > stood + 1000);
    assert_eq!(counter(&first.machine), stood, "a stopped guest stands");
    assert!(fresh.heard.console.lock().unwrap().is_empty(), "the letter was said by the first machine only");
}

/// Each register counts: a state that differs in one general register gives a machine that differs.
#[test]
fn capture_of_a_changed_state_differs() {
    if no_kvm() {
        return;
    }
    let (_first, mut sections, mut fresh) = ran_and_fresh(1);
    let before = timeless(&sections[0]);
    // mp_state and tsc_khz come first, then RAX.
    sections[0].bytes[8] ^= 1;
    fresh.machine.restore(&sections, ClockPolicy::ResumeFromCheckpoint).unwrap();
    assert_ne!(timeless(&final_sections(&mut fresh.machine)[0]), before);
}

#[test]
fn clock_goes_on_from_the_checkpoint() {
    if no_kvm() {
        return;
    }
    let (_first, sections, mut fresh) = ran_and_fresh(1);
    let clock = |sections: &[Section]| {
        let section = sections.iter().find(|s| s.kind == SectionKind::CLOCK).unwrap();
        ClockStateV1::from_section(section).unwrap().nanoseconds()
    };
    fresh.machine.restore(&sections, ClockPolicy::ResumeFromCheckpoint).unwrap();
    let began = Instant::now();
    let after = clock(&final_sections(&mut fresh.machine));
    let passed = after.checked_sub(clock(&sections)).expect("guest time never runs backwards");
    assert!(u128::from(passed) < began.elapsed().as_nanos() + 1_000_000_000, "{passed} ns passed");
}

#[test]
fn restore_of_cut_or_foreign_sections_is_a_typed_error_and_leaves_nothing_to_run() {
    if no_kvm() {
        return;
    }
    let (_first, sections, _) = ran_and_fresh(1);
    let mut fresh = bench(&config("/nowhere".into(), 1));
    let mut refused = |sections: &[Section]| {
        let error = fresh.machine.restore(sections, ClockPolicy::ResumeFromCheckpoint).unwrap_err();
        assert!(matches!(fresh.machine.run(), Err(RunError::Hollow)), "after {error}");
        error
    };
    for at in 0..sections.len() {
        let kind = sections[at].kind;
        let with = |change: &dyn Fn(&mut Section)| {
            let mut all = sections.clone();
            change(&mut all[at]);
            all
        };
        let length = sections[at].bytes.len();
        for cut in [0, 1, length / 2, length.saturating_sub(1)] {
            if cut < length {
                let error = refused(&with(&|s| s.bytes.truncate(cut)));
                assert!(matches!(error, RestoreError::Malformed { kind: k, .. } if k == kind), "{kind:?}: {error}");
            }
        }
        let error = refused(&with(&|s| s.bytes.push(0)));
        assert!(matches!(error, RestoreError::Malformed { kind: k, .. } if k == kind), "{kind:?}: {error}");
        let error = refused(&with(&|s| s.version += 1));
        assert!(
            matches!(error, RestoreError::Version { kind: k, got, reads } if k == kind && got == reads + 1),
            "{error}"
        );
        let mut less = sections.clone();
        less.remove(at);
        assert!(matches!(refused(&less), RestoreError::Missing(k) if k == kind));
        let mut more = sections.clone();
        more.push(sections[at].clone());
        assert!(matches!(refused(&more), RestoreError::Unexpected(k) if k == kind));
    }
    let mut more = sections.clone();
    more.push(Section { kind: SectionKind::MODEL, version: 1, bytes: Vec::new() });
    assert!(matches!(refused(&more), RestoreError::Unexpected(SectionKind::MODEL)));
}

/// Random damage: whatever the bytes are, the answer is a state or a typed error.
#[test]
fn restore_of_damaged_bytes_never_panics() {
    if no_kvm() {
        return;
    }
    let (_first, sections, mut fresh) = ran_and_fresh(1);
    let mut seed = 1u64;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).unwrap() % below
    };
    let mut refused = 0;
    for _ in 0..2000 {
        let mut damaged = sections.clone();
        let which = random(damaged.len());
        let bytes = &mut damaged[which].bytes;
        for _ in 0..=random(4) {
            if !bytes.is_empty() {
                let at = random(bytes.len());
                bytes[at] = u8::try_from(random(256)).unwrap();
            }
        }
        refused += usize::from(fresh.machine.restore(&damaged, ClockPolicy::ResumeFromCheckpoint).is_err());
    }
    assert!(refused > 0, "no damage was noticed");
    fresh.machine.restore(&sections, ClockPolicy::ResumeFromCheckpoint).unwrap();
}

#[test]
fn restore_of_a_non_canonical_instruction_pointer_is_refused() {
    if no_kvm() {
        return;
    }
    let (_first, mut sections, mut fresh) = ran_and_fresh(1);
    // RIP is the 17th of the general registers.
    let at = 8 + 16 * 8;
    sections[0].bytes[at..at + 8].copy_from_slice(&(1u64 << 63).to_le_bytes());
    let error = fresh.machine.restore(&sections, ClockPolicy::ResumeFromCheckpoint).unwrap_err();
    assert!(error.to_string().contains("canonical"), "{error}");
}

/// A run that is followed by a stop at once must neither be missed nor hang.
#[test]
fn stop_right_after_run_a_thousand_times() {
    if no_kvm() {
        return;
    }
    for vcpus in [1, 2] {
        let mut bench = loaded(COUNTING, vcpus);
        bench.machine.run().unwrap();
        for _ in 0..1000 {
            drop(PausedVm::pause(&mut bench.machine).unwrap());
        }
        let before = counter(&bench.machine);
        eventually("the guest counts on", || counter(&bench.machine) > before);
    }
}

#[test]
fn dirty_log_has_exactly_what_a_counting_guest_writes() {
    if no_kvm() {
        return;
    }
    let mut bench = loaded(COUNTING, 1);
    bench.machine.track_dirty(Tracking::Plain).unwrap();
    bench.machine.run().unwrap();
    for _ in 0..10 {
        let before = counter(&bench.machine);
        eventually("the guest counts on", || counter(&bench.machine) > before);
        let mut paused = PausedVm::pause(&mut bench.machine).unwrap();
        let dirty = paused.take_dirty().unwrap();
        assert_eq!(dirty.iter().map(|p| p.0).collect::<Vec<_>>(), [COUNTER_AT >> 12]);
        dirty.retire();
        assert!(paused.take_dirty().unwrap().is_empty(), "a stopped guest wrote");
    }
}

/// The first vCPU starts the second through its LAPIC (INIT, then SIPI to 0x8000); each counts on a page of its own.
///
/// `mov dword [0xfee000f0], 0x1ff` (a LAPIC that is off sends nothing), `mov dword [0xfee00310], 1 << 24;`
/// `mov dword [0xfee00300], 0x4500; mov dword [0xfee00300], 0x4608; again: inc dword [0x200000]; jmp again`, and in real mode:
/// `xor ax, ax; mov ds, ax; again: inc word [0x9000]; jmp again`
#[test]
fn two_running_vcpus_stop_together_and_go_on_elsewhere() {
    if no_kvm() {
        return;
    }
    const FIRST: [u8; 48] = [
        0xc7, 5, 0xf0, 0, 0xe0, 0xfe, 0xff, 1, 0, 0, 0xc7, 0x05, 0x10, 0x03, 0xe0, 0xfe, 0, 0, 0, 1, 0xc7, 0x05, 0x00,
        0x03, 0xe0, 0xfe, 0x00, 0x45, 0, 0, 0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x08, 0x46, 0, 0, 0xff, 0x05, 0x00,
        0x00, 0x20, 0x00, 0xeb, 0xf8,
    ];
    const SECOND: [u8; 10] = [0x31, 0xc0, 0x8e, 0xd8, 0xff, 0x06, 0x00, 0x90, 0xeb, 0xfa];
    const SECOND_COUNTER: u64 = 0x9000;
    let counters = |m: &KvmMachine| {
        let second: u16 = m.ram.tracked().read_obj(GuestAddress(SECOND_COUNTER)).unwrap();
        (counter(m), second)
    };
    let both_go_on = |m: &KvmMachine| {
        let before = counters(m);
        eventually("both count", || {
            assert_eq!(m.events().try_recv().ok(), None, "the guest ended at {:?}", counters(m));
            counters(m).0 != before.0 && counters(m).1 != before.1
        });
    };
    let mut bench = loaded(&FIRST, 2);
    bench.machine.ram.tracked().write_slice(&SECOND, GuestAddress(0x8000)).unwrap();
    bench.machine.track_dirty(Tracking::Plain).unwrap();
    bench.machine.run().unwrap();
    for _ in 0..100 {
        both_go_on(&bench.machine);
        let mut paused = PausedVm::pause(&mut bench.machine).unwrap();
        let dirty = paused.take_dirty().unwrap();
        assert_eq!(dirty.iter().map(|p| p.address().0).collect::<Vec<_>>(), [SECOND_COUNTER, COUNTER_AT]);
        dirty.retire();
        assert!(paused.take_dirty().unwrap().is_empty(), "a stopped guest wrote");
    }
    let sections = final_sections(&mut bench.machine);
    let mut fresh = loaded(&FIRST, 2);
    for page in bench.machine.ram.pages() {
        let mut bytes = [0; 4096];
        bench.machine.ram.copy_out(page, &mut bytes).unwrap();
        fresh.machine.ram.copy_in(page, &bytes).unwrap();
    }
    fresh.machine.restore(&sections, ClockPolicy::ResumeFromCheckpoint).unwrap();
    assert_eq!(counters(&fresh.machine), counters(&bench.machine));
    fresh.machine.run().unwrap();
    both_go_on(&fresh.machine);
}

#[test]
fn guest_that_ends_says_so_once() {
    if no_kvm() {
        return;
    }
    let power_off: &[u8] = &[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef];
    let reset: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64];
    let triple_fault: &[u8] = &[0x0f, 0x0b];
    for (code, expected) in [(power_off, "PoweredOff"), (reset, "Reset"), (triple_fault, "Crashed")] {
        let mut bench = loaded(code, 2);
        let events = bench.machine.events();
        bench.machine.run().unwrap();
        let event = events.recv_timeout(super::testing::PATIENCE).unwrap();
        assert!(format!("{event:?}").starts_with(expected), "{event:?}");
        let paused = PausedVm::pause(&mut bench.machine).map(drop);
        assert!(matches!(paused, Err(PauseError::Ended(_))), "{paused:?}");
        assert!(matches!(bench.machine.run(), Err(RunError::Ended(_))));
        assert!(events.is_empty(), "the other vCPU must not report an end of its own");
    }
}

#[test]
fn console_says_what_the_guest_wrote() {
    if no_kvm() {
        return;
    }
    let mut bench = loaded(COUNTING, 1);
    bench.machine.run().unwrap();
    eventually("one letter", || *bench.heard.console.lock().unwrap() == b"A");
}

/// `int3` at CPL 0, which some KVMs cannot emulate: its handler says H and goes back, and the guest says B.
///
/// `mov esp, 0x9000; lgdt [0x3000]; lidt [0x3008]; mov dx, 0x3f8; int3; mov al, 'B'; out dx, al; jmp $`, then at 29 the handler:
/// `mov al, 'H'; out dx, al; add esp, 12; jmp back` (not `iret`, which the same KVMs cannot emulate in 32-bit mode either).
#[test]
fn breakpoint_reaches_the_guests_handler() {
    if no_kvm() {
        return;
    }
    const CODE: [u8; 37] = [
        0xbc, 0x00, 0x90, 0x00, 0x00, 0x0f, 0x01, 0x15, 0x00, 0x30, 0x00, 0x00, 0x0f, 0x01, 0x1d, 0x08, 0x30, 0x00,
        0x00, 0x66, 0xba, 0xf8, 0x03, 0xcc, 0xb0, b'B', 0xee, 0xeb, 0xfe, 0xb0, b'H', 0xee, 0x83, 0xc4, 0x0c, 0xeb,
        0xf3,
    ];
    let mut bench = loaded(&CODE, 1);
    let put = |bytes: &[u8], at| bench.machine.ram.tracked().write_slice(bytes, GuestAddress(at)).unwrap();
    put(&[0x17, 0, 0x00, 0x40, 0, 0], 0x3000);
    put(&[0x1f, 0, 0x00, 0x50, 0, 0], 0x3008);
    put(&0x00cf_9b00_0000_ffffu64.to_le_bytes(), 0x4008);
    put(&0x00cf_9300_0000_ffffu64.to_le_bytes(), 0x4010);
    let [low, high, page, _] = (GUEST_START + 29).to_le_bytes();
    put(&[low, high, 0x08, 0, 0, 0x8e, page, 0], 0x5018);
    bench.machine.run().unwrap();
    eventually("both letters", || {
        assert_eq!(bench.machine.events().try_recv().ok(), None, "the guest ended");
        *bench.heard.console.lock().unwrap() == b"HB"
    });
}

/// More bytes than the FIFO holds, read by a guest that polls:
/// `again: mov dx, 0x3fd; wait: in al, dx; test al, 1; jz wait; mov dx, 0x3f8; in al, dx; out dx, al; jmp again`
#[test]
fn console_hears_everything_that_was_typed() {
    if no_kvm() {
        return;
    }
    let code = [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 1, 0x74, 0xfb, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0xeb, 0xef];
    let image = TempFile::new(&elf(&code, GUEST_START, true));
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut bench = bench_with_input(&config(image.0.clone(), 1), Some(reader.into()));
    bench.machine.load().unwrap();
    bench.machine.run().unwrap();
    let typed: Vec<u8> = (0..=255).cycle().take(1000).collect();
    std::io::Write::write_all(&mut writer, &typed).unwrap();
    drop(writer);
    eventually("all of it", || bench.heard.console.lock().unwrap().len() == typed.len());
    assert_eq!(*bench.heard.console.lock().unwrap(), typed);
}

/// What waits in the FIFO is state: the other machine's guest still hears it.
#[test]
fn bytes_in_the_console_fifo_are_captured() {
    if no_kvm() {
        return;
    }
    let image = TempFile::new(&elf(COUNTING, GUEST_START, true));
    let (reader, mut writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writer, b"typed").unwrap();
    let mut first = bench_with_input(&config(image.0.clone(), 1), Some(reader.into()));
    first.machine.load().unwrap();
    first.machine.run().unwrap();
    eventually("the bytes are in the FIFO", || lock(&first.machine.devices.serial).read(5) & 1 == 1);
    let sections = final_sections(&mut first.machine);
    let mut second = bench(&config(image.0.clone(), 1));
    second.machine.restore(&sections, ClockPolicy::ResumeFromCheckpoint).unwrap();
    let mut serial = lock(&second.machine.devices.serial);
    let heard: Vec<u8> = std::iter::from_fn(|| (serial.read(5) & 1 == 1).then(|| serial.read(0))).collect();
    assert_eq!(heard, b"typed");
}

#[test]
fn load_of_what_is_no_guest_says_what_is_wrong() {
    if no_kvm() {
        return;
    }
    let mut bzimage = vec![0; 0x300];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    let cases: [(Vec<u8>, &str); 6] = [
        (b"not a kernel".to_vec(), "ELF"),
        (Vec::new(), "ELF"),
        (bzimage, "vmlinux"),
        (elf(COUNTING, GUEST_START, false), "PVH"),
        (elf(COUNTING, 0x4000_0000, true), "guest memory"),
        (elf(COUNTING, GUEST_START, true)[..180].to_vec(), "cut short"),
    ];
    for (bytes, word) in cases {
        let image = TempFile::new(&bytes);
        let mut bench = bench(&config(image.0.clone(), 1));
        let error = bench.machine.load().unwrap_err();
        assert!(matches!(error, BootError::Image { .. }) && error.to_string().contains(word), "{word}: {error}");
        assert!(matches!(bench.machine.run(), Err(RunError::Hollow)));
    }
    let mut bench = bench(&config("/nowhere/at/all".into(), 1));
    assert!(matches!(bench.machine.load(), Err(BootError::Read { .. })));
}

#[test]
fn load_of_too_much_is_refused() {
    if no_kvm() {
        return;
    }
    let image = TempFile::new(&elf(COUNTING, GUEST_START, true));
    let initrd = TempFile::new(&vec![7; 4 << 20]);
    let mut large = config(image.0.clone(), 1);
    large.initrd = Some(initrd.0.clone());
    assert!(matches!(bench(&large).machine.load(), Err(BootError::TooLarge { what: "the initrd", .. })));
    let mut wordy = config(image.0.clone(), 1);
    wordy.cmdline = "x".repeat(2100);
    assert!(matches!(bench(&wordy).machine.load(), Err(BootError::TooLarge { .. })));
}

#[test]
fn build_of_a_wrong_parts_list_is_refused() {
    let io = || MachineIo {
        outputs: Arc::new(super::testing::Heard::default()),
        ports: Vec::new(),
        disks: Vec::new(),
        console_input: None,
    };
    let good = config("/nowhere".into(), 1);
    let without_vcpus = MachineConfig { vcpus: 0, ..good.clone() };
    let with_three = MachineConfig { vcpus: 3, ..good.clone() };
    for wrong in [without_vcpus, with_three, good] {
        assert!(matches!(KvmMachine::build(&wrong, io()), Err(BuildError::Config(_))), "{wrong:?}");
    }
}

#[test]
fn facts_are_equal_for_equal_machines_and_name_the_host() {
    if no_kvm() {
        return;
    }
    let one = bench(&config("/nowhere".into(), 1)).machine.facts();
    let other = bench(&config("/elsewhere".into(), 1)).machine.facts();
    let compared = |facts: &[Fact]| facts.iter().filter(|f| !f.name.starts_with("info.")).cloned().collect::<Vec<_>>();
    assert_eq!(compared(&one), compared(&other));
    let names: std::collections::BTreeSet<_> = one.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names.len(), one.len(), "a name is given twice");
    for name in ["ram.bytes", "vcpus", "device.virtio.0", "cpuid.00000001.0", "host.cpuid.00000001.0", "tsc.writable"] {
        assert!(names.contains(name), "{name}");
    }
    let two = bench(&config("/nowhere".into(), 2)).machine.facts();
    assert_ne!(compared(&one), compared(&two));
}
