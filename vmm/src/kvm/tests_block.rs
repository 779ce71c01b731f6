//! The block device as a guest meets it: a driver that is played by the test, workers and gate as they are.

use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::testing::{GUEST_START, Heard, TempFile, config, elf, eventually, no_kvm};
use super::*;
use crate::config::DiskConfig;
use crate::devices::MMIO_BASE;
use crate::disk::memory::{MemoryDisk, Op};
use crate::disk::{ByteRange, Disk, DiskImage, DiskSerial};
use crate::pause::PausedVm;

const DISK_BYTES: usize = 1 << 20;
/// The disk is in the slot behind the network device.
const BASE: u64 = MMIO_BASE + 0x1000;
const SLOT: usize = 1;
const DESC: u64 = 0x11_0000;
const AVAIL: u64 = 0x11_1000;
const USED: u64 = 0x11_2000;
const HEADERS: u64 = 0x11_3000;
const STATUS: u64 = 0x11_4000;
/// Data of request n, 128 KiB each.
const DATA: u64 = 0x18_0000;
const DATA_EACH: u64 = 0x2_0000;
const QUEUE_SIZE: u16 = 32;
/// What a status byte is before the device writes it.
const UNANSWERED: u8 = 0xee;
const NEEDS_RESET: u32 = 0x40;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const FEATURE_FLUSH: u32 = 1 << 9;

fn machine_with(disk: Arc<dyn Disk>) -> KvmMachine {
    let image = TempFile::new(&elf(&[0xeb, 0xfe], GUEST_START, true));
    let parts = DiskConfig {
        bytes: disk.bytes(),
        read_only: disk.is_read_only(),
        serial: DiskSerial::new("test-disk").unwrap(),
    };
    let config = MachineConfig { disks: vec![parts], ..config(image.0.clone(), 1) };
    let (port, _) = crate::tap::SocketPort::pair().unwrap();
    let io = MachineIo {
        outputs: Arc::new(Heard::default()),
        ports: vec![Arc::new(port)],
        disks: vec![disk],
        console_input: None,
    };
    let mut machine = KvmMachine::build(&config, io).expect("a machine on KVM (FT_NO_KVM=1 where there is none)");
    machine.load().unwrap();
    machine
}

/// A machine that runs, with a driver that is live.
fn running(disk: &Arc<MemoryDisk>) -> KvmMachine {
    let mut machine = machine_with(Arc::clone(disk) as _);
    Driver(&machine).start(FEATURE_FLUSH);
    machine.run().unwrap();
    machine
}

struct Driver<'a>(&'a KvmMachine);

impl Driver<'_> {
    fn write(&self, register: u64, value: u32) {
        self.0.devices.mmio_write(BASE + register, &value.to_le_bytes());
    }

    fn read(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.0.devices.mmio_read(BASE + register, &mut word);
        u32::from_le_bytes(word)
    }

    fn put<T: vm_memory::ByteValued>(&self, value: T, at: u64) {
        self.0.ram.tracked().write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.0.ram.tracked().read_obj(GuestAddress(at)).unwrap()
    }

    fn start(&self, features: u32) {
        for (register, value) in [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0)] {
            self.write(register, value);
        }
        self.write(0x20, features);
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11, "FEATURES_OK");
        self.write(0x30, 0);
        self.write(0x38, u32::from(QUEUE_SIZE));
        for (register, address) in [(0x80, DESC), (0x90, AVAIL), (0xa0, USED)] {
            self.write(register, u32::try_from(address).unwrap());
            self.write(register + 4, 0);
        }
        self.put(0u32, AVAIL);
        self.put(0u32, USED);
        self.write(0x44, 1);
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15, "DRIVER_OK");
    }

    fn descriptor(&self, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        let place = DESC + 16 * u64::from(index);
        self.put(at, place);
        self.put(len, place + 8);
        self.put(flags, place + 12);
        self.put(next, place + 14);
    }

    fn data(n: u16) -> u64 {
        DATA + DATA_EACH * u64::from(n)
    }

    /// Writes down request `n`: header, data (if any) in two buffers, status.
    fn prepare(&self, n: u16, code: u32, sector: u64, len: u32, device_writes: bool) {
        let (head, header) = (4 * n, HEADERS + 16 * u64::from(n));
        self.put(u64::from(code), header);
        self.put(sector, header + 8);
        self.put(UNANSWERED, STATUS + u64::from(n));
        let direction = if device_writes { 3 } else { 1 };
        let half = len / 2;
        self.descriptor(head, header, 16, 1, if len == 0 { head + 3 } else { head + 1 });
        self.descriptor(head + 1, Self::data(n), half, direction, head + 2);
        self.descriptor(head + 2, Self::data(n) + u64::from(half), len - half, direction, head + 3);
        self.descriptor(head + 3, STATUS + u64::from(n), 1, 2, 0);
    }

    /// Makes request `n` available without a kick.
    fn offer(&self, n: u16) {
        let index: u16 = self.get(AVAIL + 2);
        self.put(4 * n, AVAIL + 4 + 2 * u64::from(index % QUEUE_SIZE));
        self.put(index.wrapping_add(1), AVAIL + 2);
    }

    fn kick(&self) {
        self.write(0x50, 0);
    }

    fn queue_read(&self, n: u16, sector: u64, len: u32) {
        self.prepare(n, IN, sector, len, true);
        self.offer(n);
        self.kick();
    }

    fn queue_write(&self, n: u16, sector: u64, bytes: &[u8]) {
        self.0.ram.tracked().write_slice(bytes, GuestAddress(Self::data(n))).unwrap();
        self.prepare(n, OUT, sector, u32::try_from(bytes.len()).unwrap(), false);
        self.offer(n);
        self.kick();
    }

    fn queue_flush(&self, n: u16) {
        self.prepare(n, FLUSH, 0, 0, false);
        self.offer(n);
        self.kick();
    }

    fn queue_zeroes(&self, n: u16, code: u32, sector: u64, sectors: u32, flags: u32) {
        self.put(sector, Self::data(n));
        self.put(sectors, Self::data(n) + 8);
        self.put(flags, Self::data(n) + 12);
        self.prepare(n, code, 0, 16, false);
        self.offer(n);
        self.kick();
    }

    fn used(&self) -> u16 {
        self.get(USED + 2)
    }

    fn status(&self, n: u16) -> u8 {
        self.get(STATUS + u64::from(n))
    }

    /// Waits for the answer to request `n`.
    fn answer(&self, n: u16) -> u8 {
        eventually("an answer", || self.status(n) != UNANSWERED);
        self.status(n)
    }

    /// Length in the `n`th entry of the used ring, once it is there.
    fn used_length(&self, n: u16) -> u32 {
        eventually("a used entry", || self.used() > n);
        self.get(USED + 4 + 8 * u64::from(n) + 4)
    }

    fn bytes(&self, n: u16, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.ram.tracked().read_slice(&mut bytes, GuestAddress(Self::data(n))).unwrap();
        bytes
    }
}

#[test]
fn disk_does_all_that_it_offers() {
    if no_kvm() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(DISK_BYTES as u64).unwrap();
    let image = DiskImage::open(file.path(), Some(DISK_BYTES as u64), false).unwrap();
    let mut machine = machine_with(Arc::new(image));
    machine.run().unwrap();
    let driver = Driver(&machine);
    assert_eq!((driver.read(0x08), driver.read(0x100)), (2, 2048), "device and sectors");
    driver.start(FEATURE_FLUSH);
    let pattern: Vec<u8> = (0..DATA_EACH).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    driver.queue_write(0, 8, &pattern);
    assert_eq!(driver.answer(0), 0);
    assert_eq!(driver.used_length(0), 1);
    driver.queue_flush(1);
    assert_eq!(driver.answer(1), 0);
    driver.queue_read(2, 8, u32::try_from(DATA_EACH).unwrap());
    assert_eq!(driver.answer(2), 0);
    assert_eq!(driver.bytes(2, pattern.len()), pattern);
    assert_eq!(driver.used_length(2), u32::try_from(DATA_EACH).unwrap() + 1);
    driver.queue_zeroes(3, WRITE_ZEROES, 8, 2, 0);
    driver.queue_zeroes(4, WRITE_ZEROES, 12, 2, 1);
    driver.queue_zeroes(5, DISCARD, 16, 2, 0);
    for n in 3..=5 {
        assert_eq!(driver.answer(n), 0);
    }
    driver.prepare(6, GET_ID, 0, 20, true);
    driver.offer(6);
    driver.kick();
    assert_eq!(driver.answer(6), 0);
    assert_eq!(driver.bytes(6, 20), *b"test-disk\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(driver.read(0x60), 1, "interrupt status");
    let mut wanted = vec![0; DISK_BYTES];
    wanted[4096..4096 + pattern.len()].copy_from_slice(&pattern);
    for sector in [8, 12, 16] {
        wanted[512 * sector..512 * (sector + 2)].fill(0);
    }
    assert_eq!(std::fs::read(file.path()).unwrap(), wanted);
}

#[test]
fn disk_of_a_driver_without_flush_writes_through() {
    if no_kvm() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(DISK_BYTES, false));
    let mut machine = machine_with(Arc::clone(&disk) as _);
    machine.run().unwrap();
    let driver = Driver(&machine);
    for (features, flushes) in [(0, 1), (FEATURE_FLUSH, 0)] {
        driver.start(features);
        disk.take_calls();
        driver.queue_write(0, 0, &[1; 512]);
        assert_eq!(driver.answer(0), 0);
        let calls = disk.take_calls();
        assert_eq!(calls.iter().filter(|(op, _)| *op == Op::Flush).count(), flushes, "{calls:?}");
    }
}

/// What is asked for in vain, and the status that says so. None of it reaches the disk, none harms the device.
#[test]
fn requests_that_cannot_be_granted_get_their_status() {
    if no_kvm() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(DISK_BYTES, false));
    let machine = running(&disk);
    let driver = Driver(&machine);
    let sectors = (DISK_BYTES / 512) as u64;
    let cases = [
        (IN, sectors, 512, 1),
        (IN, sectors - 1, 1024, 1),
        (IN, u64::MAX, 512, 1),
        (IN, u64::MAX / 512 + 1, 512, 1),
        (IN, 0, 511, 1),
        (7, 0, 512, 2),
        (14, 0, 16, 2),
    ];
    for (code, sector, len, wanted) in cases {
        driver.prepare(0, code, sector, len, true);
        driver.offer(0);
        driver.kick();
        assert_eq!(driver.answer(0), wanted, "{code} of {len} at {sector}");
    }
    for (code, sector, count, flags, wanted) in [
        (DISCARD, sectors, 1, 0, 1),
        (DISCARD, 0, 1, 1, 2),
        (DISCARD, 0, u32::MAX, 0, 1),
        (WRITE_ZEROES, u64::MAX, 1, 0, 1),
        (WRITE_ZEROES, 0, 1, 2, 2),
    ] {
        driver.queue_zeroes(0, code, sector, count, flags);
        assert_eq!(driver.answer(0), wanted, "{code} of {count} at {sector}, flags {flags}");
    }
    driver.prepare(0, DISCARD, 0, 32, false);
    driver.offer(0);
    driver.kick();
    assert_eq!(driver.answer(0), 1, "two ranges, one is offered");
    assert_eq!(disk.take_calls(), []);
    driver.queue_read(0, 0, 512);
    assert_eq!(driver.answer(0), 0);
}

#[test]
fn errors_of_the_host_are_errors_of_the_disk() {
    if no_kvm() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(DISK_BYTES, false));
    let machine = running(&disk);
    let driver = Driver(&machine);
    let zero = Op::Zero { may_unmap: true };
    for (op, number) in [
        (Op::Read, libc::EIO),
        (Op::Announce, libc::ENOSPC),
        (Op::Write, libc::ENOSPC),
        (Op::Flush, libc::EIO),
        (zero, libc::EIO),
    ] {
        let ask = || match op {
            Op::Read => driver.queue_read(0, 0, 4096),
            Op::Announce | Op::Write => driver.queue_write(0, 0, &[9; 4096]),
            Op::Flush => driver.queue_flush(0),
            Op::Zero { .. } => driver.queue_zeroes(0, DISCARD, 0, 8, 0),
        };
        disk.fail(Some((op, number)));
        ask();
        assert_eq!(driver.answer(0), 1, "{op:?}");
        disk.fail(None);
        ask();
        assert_eq!(driver.answer(0), 0, "{op:?} again");
    }
    let calls = disk.take_calls();
    let at = calls.iter().position(|(op, _)| *op == Op::Announce).unwrap();
    assert_eq!(calls[at + 1].0, Op::Announce, "nothing is written after an announcement that failed: {calls:?}");
}

#[test]
fn disk_that_is_read_only_is_never_changed() {
    if no_kvm() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(DISK_BYTES, true));
    let machine = running(&disk);
    let driver = Driver(&machine);
    driver.write(0x14, 0);
    assert_eq!(driver.read(0x10) & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5, "read-only, no discard, no zeroes");
    driver.queue_write(0, 0, &[1; 512]);
    assert_eq!(driver.answer(0), 1);
    driver.queue_zeroes(1, DISCARD, 0, 1, 0);
    assert_eq!(driver.answer(1), 1);
    driver.queue_zeroes(2, WRITE_ZEROES, 0, 1, 0);
    assert_eq!(driver.answer(2), 1);
    driver.queue_read(3, 0, 512);
    assert_eq!(driver.answer(3), 0);
}

/// An announcement that is not valid any more is made again, for what is left.
#[test]
fn changes_are_announced_again_when_the_disk_asks_for_it() {
    if no_kvm() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(DISK_BYTES, false));
    let machine = running(&disk);
    let driver = Driver(&machine);
    disk.fail(Some((Op::Write, libc::EAGAIN)));
    driver.queue_write(0, 8, &[3; 4096]);
    eventually("several announcements", || disk.take_calls().iter().filter(|(op, _)| *op == Op::Announce).count() > 1);
    assert_eq!(driver.status(0), UNANSWERED);
    disk.fail(None);
    assert_eq!(driver.answer(0), 0);
    assert_eq!(disk.contents()[4096..8192], [3; 4096]);
}

#[test]
fn pause_does_not_wait_for_a_flush_and_nothing_completes_in_it() {
    if no_kvm() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(DISK_BYTES, false));
    let mut machine = running(&disk);
    disk.hold(Op::Flush);
    Driver(&machine).queue_flush(0);
    disk.wait_for_held(1);
    // Would wait for ever.
    let mut paused = PausedVm::pause(&mut machine).unwrap();
    let sections = paused.capture().unwrap();
    disk.release();
    eventually("the end of the flush", || disk.take_calls().iter().any(|(op, _)| *op == Op::Flush));
    // A worker that ignored the gate would complete within microseconds.
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(paused.capture().unwrap().last(), sections.last(), "the device's state stands still");
    let _ = paused.stay_stopped();
    assert_eq!((Driver(&machine).status(0), Driver(&machine).used()), (UNANSWERED, 0));
    machine.run().unwrap();
    assert_eq!(Driver(&machine).answer(0), 0);
}

#[test]
fn pause_waits_for_a_change_that_has_begun() {
    if no_kvm() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(DISK_BYTES, false));
    let mut machine = running(&disk);
    disk.hold(Op::Write);
    Driver(&machine).queue_write(0, 0, &[1; 4096]);
    disk.wait_for_held(1);
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| PausedVm::pause(&mut machine).map(PausedVm::stay_stopped));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!pausing.is_finished(), "the machine was stopped in the middle of a change");
        disk.release();
        pausing.join().unwrap().unwrap();
    });
    assert_eq!(disk.contents()[..4096], [1; 4096]);
    // Stopped here: no announcement or queued change goes further than the gate.
    disk.take_calls();
    Driver(&machine).queue_write(1, 16, &[2; 512]);
    eventually("an announcement", || disk.take_calls().contains(&(Op::Announce, ByteRange { offset: 8192, len: 512 })));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(disk.take_calls(), []);
    machine.run().unwrap();
    assert_eq!(Driver(&machine).answer(1), 0);
}

/// A machine is stopped with requests in every stage. Another one, with an image that has only what was completed, does the rest.
#[test]
fn restored_machine_repeats_what_was_not_completed_in_order() {
    if no_kvm() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(DISK_BYTES, false));
    let mut first = running(&disk);
    let driver = Driver(&first);
    driver.queue_write(0, 0, &[1; 4096]);
    assert_eq!(driver.answer(0), 0);
    disk.hold(Op::Announce);
    driver.queue_write(1, 0, &[2; 1024]);
    disk.wait_for_held(1);
    driver.queue_read(2, 0, 2048);
    driver.queue_write(3, 1, &[3; 512]);
    driver.queue_flush(4);
    driver.queue_read(5, 4, 512);
    assert_eq!(driver.answer(5), 0, "overlaps nothing: it does not wait");
    let mut paused = PausedVm::pause(&mut first).unwrap();
    let sections = paused.capture().unwrap();
    let _ = paused.stay_stopped();
    assert_eq!(lock(&first.devices.virtio[SLOT]).pending(), [4, 8, 12, 16]);

    let image = Arc::new(MemoryDisk::new(DISK_BYTES, false));
    image.write(0, &disk.contents()).unwrap();
    let mut second = machine_with(Arc::clone(&image) as _);
    for page in first.ram.pages() {
        let mut bytes = [0; 4096];
        first.ram.copy_out(page, &mut bytes).unwrap();
        second.ram.copy_in(page, &bytes).unwrap();
    }
    second.restore(&sections, ClockPolicy::ResumeFromCheckpoint).unwrap();
    assert_eq!(lock(&second.devices.virtio[SLOT]).pending(), [4, 8, 12, 16], "captured as it came");
    image.take_calls();
    second.run().unwrap();
    let driver = Driver(&second);
    for n in 1..=4 {
        assert_eq!(driver.answer(n), 0);
    }
    assert_eq!(driver.used(), 6, "each once");
    let mut seen = vec![2; 1024];
    seen.extend([1; 1024]);
    assert_eq!(driver.bytes(2, 2048), seen, "the read came after write 1 and before write 3");
    let contents = image.contents();
    assert_eq!((&contents[..512], &contents[512..1024]), (&[2; 512][..], &[3; 512][..]));
    let flush = image.take_calls();
    assert_eq!(flush.last().map(|(op, _)| *op), Some(Op::Flush), "{flush:?}");
    // The first never goes on: its worker is released, and then finds the machine ending.
    disk.release();
}

/// A driver that resets the device owns its memory again at once, whatever was under way.
#[test]
fn reset_forgets_what_is_under_way() {
    if no_kvm() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(DISK_BYTES, false));
    let machine = running(&disk);
    let driver = Driver(&machine);
    for op in [Op::Read, Op::Announce, Op::Flush] {
        disk.hold(op);
        match op {
            Op::Read => driver.queue_read(0, 0, 4096),
            Op::Announce => driver.queue_write(0, 0, &[7; 4096]),
            _ => driver.queue_flush(0),
        }
        disk.wait_for_held(1);
        driver.start(FEATURE_FLUSH);
        assert!(lock(&machine.devices.virtio[SLOT]).pending().is_empty());
        machine.ram.tracked().write_slice(&[0x55; 4096], GuestAddress(Driver::data(0))).unwrap();
        disk.release();
        // The same worker may be asked for this one, after it has done with the other.
        for n in 1..=4 {
            driver.queue_read(n, 64, 512);
        }
        for n in 1..=4 {
            assert_eq!(driver.answer(n), 0);
        }
        eventually("the end of what was held", || disk.take_calls().iter().any(|(called, _)| *called == op));
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!((driver.status(0), driver.used()), (UNANSWERED, 4), "{op:?}");
        assert_eq!(driver.bytes(0, 4096), [0x55; 4096], "{op:?}");
    }
    assert_eq!(disk.contents(), vec![0; DISK_BYTES], "a write that was forgotten before it began");
}

#[test]
fn chains_that_are_no_requests_need_a_reset() {
    if no_kvm() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(DISK_BYTES, false));
    let machine = running(&disk);
    let driver = Driver(&machine);
    let far = super::testing::RAM_BYTES;
    let breaks: [(&str, &dyn Fn()); 8] = [
        ("no header", &|| driver.descriptor(0, HEADERS, 15, 1, 3)),
        ("no status", &|| driver.descriptor(0, HEADERS, 16, 0, 0)),
        ("a loop", &|| driver.descriptor(3, STATUS, 1, 3, 1)),
        ("outside of the table", &|| driver.descriptor(2, Driver::data(0), 256, 3, QUEUE_SIZE)),
        ("outside of RAM", &|| driver.descriptor(1, far - 8, 256, 3, 2)),
        ("at the end of the world", &|| driver.descriptor(1, u64::MAX - 8, 256, 3, 2)),
        ("to read behind to write", &|| driver.descriptor(2, Driver::data(0), 256, 1, 3)),
        ("indirect", &|| driver.descriptor(1, Driver::data(0), 256, 7, 2)),
    ];
    for (what, break_it) in breaks {
        driver.start(FEATURE_FLUSH);
        driver.prepare(0, IN, 0, 512, true);
        break_it();
        driver.offer(0);
        driver.kick();
        assert_eq!(driver.read(0x70) & NEEDS_RESET, NEEDS_RESET, "{what}");
    }
    driver.start(FEATURE_FLUSH);
    disk.hold(Op::Flush);
    driver.queue_flush(0);
    driver.offer(0);
    driver.kick();
    assert_eq!(driver.read(0x70) & NEEDS_RESET, NEEDS_RESET, "one request twice");
    disk.release();
    driver.start(FEATURE_FLUSH);
    driver.queue_read(0, 0, 512);
    assert_eq!(driver.answer(0), 0);
    assert!(disk.take_calls().iter().all(|(op, _)| matches!(op, Op::Read | Op::Flush)));
}

/// Order under load: many overlapping writes and flushes end as if done one after the other, and stops in between change nothing.
#[test]
fn overlapping_writes_keep_their_order_over_stops() {
    if no_kvm() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(DISK_BYTES, false));
    let mut machine = running(&disk);
    for round in 0..200u8 {
        let driver = Driver(&machine);
        for n in 0..6u16 {
            driver.queue_write(n, u64::from(n % 3), &[round.wrapping_add(n.to_le_bytes()[0]); 2048]);
        }
        if round % 8 == 0 {
            drop(PausedVm::pause(&mut machine).unwrap());
        }
        let driver = Driver(&machine);
        for n in 0..6 {
            assert_eq!(driver.answer(n), 0);
        }
        let contents = disk.contents();
        assert!(contents[..512].iter().all(|b| *b == round.wrapping_add(3)));
        assert!(contents[512..1024].iter().all(|b| *b == round.wrapping_add(4)));
        assert!(contents[1024..3072].iter().all(|b| *b == round.wrapping_add(5)));
    }
}
