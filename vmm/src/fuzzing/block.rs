//! A hostile driver of the block device: registers, rings and descriptors as it likes, and requests that are almost sound.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::bench::{Bench, alone};
use super::net::{assert_consistent, assert_restorable};
use crate::devices::{MMIO_BASE, lock};
use crate::disk::ByteRange;
use crate::disk::memory::{MemoryDisk, Op};
use crate::state::codec::{Decoder, Malformed};

const STEPS: usize = 120;
const RAM_END: u64 = 2 << 20;
const DISK_BYTES: usize = 64 << 10;
const DESC: u64 = 0x1_0000;
const AVAIL: u64 = 0x1_1000;
const USED: u64 = 0x1_2000;
/// Header and status of request n, and its data elsewhere.
const HEADERS: u64 = 0x1_3000;
const DATA: u64 = 0x2_0000;
const SIZE: u16 = 64;
const CODES: [u32; 8] = [0, 1, 1, 4, 8, 11, 13, 99];
const REGISTERS: [u64; 12] = [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x60, 0x100];

/// Target `virtio_blk`: what a driver does, in the order of the input's bytes.
///
/// Nothing panics; the disk is asked for nothing beyond its end, changed only where it was announced, and not at all when it is read-only;
/// the interrupt line fits the status; the state can always be captured and restored; what a sound driver asked for is answered.
pub fn virtio_blk(data: &[u8]) {
    let mut input = Decoder::new(data);
    let Ok(read_only) = input.u8().map(|first| first & 1 != 0) else { return };
    alone(|| {
        let disk = Arc::new(MemoryDisk::new(DISK_BYTES, read_only));
        let mut driver = Driver { bench: Bench::with_disk(Arc::clone(&disk)), avail: 0, announced: Vec::new() };
        for _ in 0..STEPS {
            if driver.step(&mut input).is_err() {
                break;
            }
            assert_consistent(&driver.bench);
            driver.assert_announced(&disk);
        }
        drop(assert_restorable(&driver.bench));
        driver.assert_answers();
    });
}

struct Driver {
    bench: Bench,
    avail: u16,
    announced: Vec<ByteRange>,
}

impl Driver {
    fn put(&self, bytes: &[u8], at: u64) {
        // Outside of RAM there is nothing to write to.
        drop(self.bench.devices.ram.tracked().write_slice(bytes, GuestAddress(at)));
    }

    fn step(&mut self, input: &mut Decoder<'_>) -> Result<(), Malformed> {
        match input.u8()? % 12 {
            0 => self.bench.write(REGISTERS[usize::from(input.u8()?) % REGISTERS.len()], input.u32()?),
            1 => {
                let (offset, value) = (u64::from(input.u16()? % 0x1000), input.u32()?.to_le_bytes());
                let length = [1, 2, 4][usize::from(input.u8()? % 3)];
                self.bench.devices.mmio_write(MMIO_BASE + offset, &value[..length]);
                self.bench.devices.mmio_read(MMIO_BASE + offset, &mut [0; 8]);
            }
            2 => self.start(input.flag().unwrap_or(true)),
            3 => self.descriptor(input)?,
            4 => self.offer(u16::from(input.u8()?)),
            5..=7 => self.request(input)?,
            8 => {
                self.bench.work();
            }
            9 => while self.bench.work() {},
            10 => {
                let other = assert_restorable(&self.bench);
                lock(&other.devices.virtio[0]).resume_after_restore(other.devices.ram.tracked());
                self.bench = other;
            }
            _ => {
                let (at, length) = (u64::from(input.u32()?) % RAM_END, usize::from(input.u8()? % 33));
                let bytes = input.bytes(length)?.to_vec();
                self.put(&bytes, at);
            }
        }
        Ok(())
    }

    /// What a driver that behaves does to get going.
    fn start(&mut self, flush: bool) {
        self.avail = 0;
        let features = if flush { 1 << 9 } else { 0 };
        for (register, value) in
            [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0), (0x20, features), (0x70, 11), (0x30, 0)]
        {
            self.bench.write(register, value);
        }
        self.bench.write(0x38, u32::from(SIZE));
        for (register, address) in [(0x80, DESC), (0x90, AVAIL), (0xa0, USED)] {
            self.bench.write(register, u32::try_from(address).expect("below 2 MiB"));
            self.bench.write(register + 4, 0);
        }
        self.put(&[0; 4], AVAIL);
        self.put(&[0; 4], USED);
        self.bench.write(0x44, 1);
        self.bench.write(0x70, 15);
        assert_eq!(self.bench.read(0x70), 15, "a driver that behaves gets through");
    }

    fn raw_descriptor(&self, index: u16, at: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&at.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(&bytes, DESC + 16 * u64::from(index));
    }

    fn descriptor(&mut self, input: &mut Decoder<'_>) -> Result<(), Malformed> {
        let (choice, index, flags, next) = (input.u8()?, input.u8()?, input.u8()?, input.u8()?);
        let at = match choice & 3 {
            0 => input.u64()?,
            1 => RAM_END - 8,
            2 => DESC,
            _ => HEADERS + u64::from(index) * 16,
        };
        let length = match choice >> 2 & 7 {
            0 => input.u32()?,
            1 => 16,
            2 => 1,
            3 => 512,
            4 => 0,
            _ => 17,
        };
        self.raw_descriptor(u16::from(index), at, length, u16::from(flags & 7), u16::from(next));
        Ok(())
    }

    /// A request as a sound driver makes it, but for what it asks for.
    fn request(&mut self, input: &mut Decoder<'_>) -> Result<(), Malformed> {
        let (choice, place, length) = (input.u8()?, input.u8()?, input.u8()?);
        let n = u16::from(choice >> 4);
        let code = CODES[usize::from(choice & 7)];
        let sector = if place == 0xff { u64::MAX / 256 } else { u64::from(place % 132) };
        let bytes = match length {
            0xff => 16,
            0xfe => 511,
            _ => u32::from(length % 24) * 512,
        };
        let (header, data) = (HEADERS + 32 * u64::from(n), DATA + 0x4000 * u64::from(n));
        self.put(&code.to_le_bytes(), header);
        self.put(&sector.to_le_bytes(), header + 8);
        if bytes == 16 {
            self.put(&u64::from(place % 132).to_le_bytes(), data);
            self.put(&u32::from(choice).to_le_bytes(), data + 8);
            self.put(&[place >> 7, 0, 0, 0], data + 12);
        } else {
            self.put(&[place ^ length; 8], data);
        }
        let direction = if code == 0 || code == 8 { 3 } else { 1 };
        self.raw_descriptor(3 * n, header, 16, 1, 3 * n + 1);
        self.raw_descriptor(3 * n + 1, data, bytes, direction, 3 * n + 2);
        self.raw_descriptor(3 * n + 2, header + 16, 1, 2, 0);
        self.offer(3 * n);
        Ok(())
    }

    fn offer(&mut self, head: u16) {
        self.put(&head.to_le_bytes(), AVAIL + 4 + 2 * u64::from(self.avail % SIZE));
        self.avail = self.avail.wrapping_add(1);
        self.put(&self.avail.to_le_bytes(), AVAIL + 2);
        self.bench.write(0x50, 0);
    }

    /// Every change was announced before it.
    fn assert_announced(&mut self, disk: &MemoryDisk) {
        for (op, range) in disk.take_calls() {
            match op {
                Op::Announce => self.announced.push(range),
                Op::Write | Op::Zero { .. } => {
                    let covers = |a: &ByteRange| a.offset <= range.offset && range.end() <= a.end();
                    assert!(self.announced.iter().any(covers), "{range:?} was not announced");
                }
                Op::Read | Op::Flush => {}
            }
        }
    }

    /// Whatever was before: after a reset the device does what it is asked for.
    fn assert_answers(&mut self) {
        self.start(true);
        let used = |bench: &Bench| bench.devices.ram.tracked().read_obj::<u16>(GuestAddress(USED + 2)).unwrap_or(0);
        for (number, request) in (1u16..).zip([[0x00, 0, 4], [0x13, 0, 0], [0x21, 0, 4]]) {
            self.request(&mut Decoder::new(&request)).expect("three bytes");
            while self.bench.work() {}
            assert_eq!(used(&self.bench), number, "an answer to each");
        }
    }
}
