//! A hostile driver of the network device: registers, rings and descriptors as it likes.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::bench::{Bench, alone};
use crate::devices::{MMIO_BASE, lock};
use crate::state::codec::{Decoder, Malformed, Saved};
use crate::{SectionKind, devices::virtio::mmio::VirtioStateV2};

const STEPS: usize = 120;
const RAM_END: u64 = 2 << 20;
/// Where a driver that behaves keeps its rings: descriptors, available, used, buffers of each queue.
const RINGS: [[u64; 4]; 2] = [[0x1_0000, 0x1_1000, 0x1_2000, 0x2_0000], [0x5_0000, 0x5_1000, 0x5_2000, 0x6_0000]];
const REGISTERS: [u64; 18] =
    [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x60, 0xfc, 0x100];

/// The line's level says whether an interrupt waits.
pub(super) fn assert_consistent(bench: &Bench) {
    let waits = bench.read(0x60) != 0;
    assert_eq!(bench.line.load(Ordering::Relaxed), waits, "interrupt status and line disagree");
}

/// Whatever a guest did: its device can be captured, and another one takes the state as it is.
pub(super) fn assert_restorable(bench: &Bench) -> Bench {
    let state = lock(&bench.devices.virtio[0]).capture();
    let section = state.to_section(SectionKind::virtio(0));
    assert_eq!(VirtioStateV2::from_section(&section).ok().as_ref(), Some(&state));
    let other = bench.another();
    if let Err(error) = other.devices.restore(&section) {
        panic!("a guest made a state that nobody can restore: {error}: {state:?}");
    }
    assert_eq!(lock(&other.devices.virtio[0]).capture(), state);
    other
}

/// Target `virtio_net`: what a driver does, in the order of the input's bytes.
///
/// Nothing panics; no frame is longer than a frame; the interrupt line fits the status; the state can always be captured and restored.
pub fn virtio_net(data: &[u8]) {
    alone(|| {
        let mut driver = Driver { bench: Bench::new(), avail: [0; 2], size: 8 };
        let mut input = Decoder::new(data);
        for _ in 0..STEPS {
            if driver.step(&mut input).is_err() {
                break;
            }
            assert_consistent(&driver.bench);
        }
        drop(assert_restorable(&driver.bench));
    });
}

struct Driver {
    bench: Bench,
    avail: [u16; 2],
    size: u16,
}

impl Driver {
    fn put(&self, bytes: &[u8], at: u64) {
        // Outside of RAM there is nothing to write to.
        drop(self.bench.devices.ram.tracked().write_slice(bytes, GuestAddress(at)));
    }

    fn step(&mut self, input: &mut Decoder<'_>) -> Result<(), Malformed> {
        match input.u8()? % 16 {
            0 => self.bench.write(REGISTERS[usize::from(input.u8()?) % REGISTERS.len()], input.u32()?),
            1 => self.access(input)?,
            2 => self.start(input.u8()?),
            3..=5 => self.descriptor(input)?,
            6 | 7 => self.offer(input)?,
            8 | 9 => self.bench.write(0x50, u32::from(input.u8()? % 3)),
            10 => {
                let length = usize::from(input.u16()?);
                self.bench.send(vec![length.to_le_bytes()[0]; length]);
                self.pump();
            }
            11 => self.pump(),
            12 => {
                let (at, length) = (u64::from(input.u32()?) % RAM_END, usize::from(input.u8()? % 33));
                let bytes = input.bytes(length)?.to_vec();
                self.put(&bytes, at);
            }
            13 => {
                let other = assert_restorable(&self.bench);
                lock(&other.devices.virtio[0]).resume_after_restore(other.devices.ram.tracked());
                self.bench = other;
            }
            14 => {
                self.bench.write(0x70, 0);
                self.avail = [0; 2];
                assert_eq!(self.bench.read(0x70), 0);
                assert_eq!(self.bench.read(0x60), 0);
            }
            _ => lock(&self.bench.devices.virtio[0]).queue_inbound(vec![vec![9; usize::from(input.u16()?)]]),
        }
        Ok(())
    }

    fn pump(&self) {
        lock(&self.bench.devices.virtio[0]).pump(self.bench.devices.ram.tracked());
    }

    /// An access of any size anywhere in the device's page.
    fn access(&mut self, input: &mut Decoder<'_>) -> Result<(), Malformed> {
        let (offset, length, writes) = (u64::from(input.u16()? % 0x1000), input.u8()?, input.flag().unwrap_or(true));
        let mut data = [0; 8];
        let length = [1, 2, 4, 8][usize::from(length % 4)];
        data[..4].copy_from_slice(&input.u32()?.to_le_bytes());
        if writes {
            self.bench.devices.mmio_write(MMIO_BASE + offset, &data[..length]);
        } else {
            self.bench.devices.mmio_read(MMIO_BASE + offset, &mut data[..length]);
        }
        Ok(())
    }

    /// What a driver that behaves does to get going.
    fn start(&mut self, choice: u8) {
        self.size = 1 << (choice % 9);
        self.avail = [0; 2];
        for (register, value) in [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)] {
            self.bench.write(register, value);
        }
        for (index, [desc, avail, used, _]) in (0u32..).zip(RINGS) {
            self.bench.write(0x30, index);
            self.bench.write(0x38, u32::from(self.size));
            for (register, address) in [(0x80, desc), (0x90, avail), (0xa0, used)] {
                self.bench.write(register, u32::try_from(address).expect("below 2 MiB"));
                self.bench.write(register + 4, 0);
            }
            self.put(&[0; 4], avail);
            self.bench.write(0x44, 1);
        }
        self.bench.write(0x70, 15);
        assert_eq!(self.bench.read(0x70), 15, "a driver that behaves gets through");
    }

    fn descriptor(&mut self, input: &mut Decoder<'_>) -> Result<(), Malformed> {
        let (choice, index, flags, next) = (input.u8()?, input.u8()?, input.u8()?, input.u8()?);
        let [desc, _, _, buffer] = RINGS[usize::from(choice & 1)];
        let address = match choice >> 1 & 7 {
            0 => input.u64()?,
            1 => RAM_END - 8,
            2 => desc,
            _ => buffer + u64::from(index) * 64,
        };
        let length = match choice >> 4 & 7 {
            0 => input.u32()?,
            1 => 12,
            2 => 11,
            3 => 2048,
            4 => 65_548,
            5 => 0,
            _ => 72,
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&u16::from(flags & 7).to_le_bytes());
        bytes[14..].copy_from_slice(&u16::from(next).to_le_bytes());
        self.put(&bytes, desc + 16 * u64::from(index));
        Ok(())
    }

    fn offer(&mut self, input: &mut Decoder<'_>) -> Result<(), Malformed> {
        let (choice, head) = (input.u8()?, input.u8()?);
        let queue = usize::from(choice & 1);
        let [_, avail, _, _] = RINGS[queue];
        let slot = self.avail[queue] % self.size;
        self.put(&u16::from(head).to_le_bytes(), avail + 4 + 2 * u64::from(slot));
        self.avail[queue] = if choice & 0xf0 == 0xf0 { input.u16()? } else { self.avail[queue].wrapping_add(1) };
        self.put(&[choice >> 1 & 1, 0], avail);
        self.put(&self.avail[queue].to_le_bytes(), avail + 2);
        let before = self.bench.frames_out();
        self.bench.write(0x50, u32::from(choice & 1));
        assert!(self.bench.frames_out() - before <= usize::from(u16::MAX));
        Ok(())
    }
}
