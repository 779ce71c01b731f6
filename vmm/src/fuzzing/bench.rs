//! Devices with RAM and loose ends, and no machine around them.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::config::DiskConfig;
use crate::devices::host_io::{Doorbell, Gate, HostIo};
use crate::devices::irq::IrqLine;
use crate::devices::serial::SerialPort;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::{Block, Worker};
use crate::devices::virtio::mmio::VirtioMmio;
use crate::devices::virtio::net::Net;
use crate::devices::{Devices, MMIO_BASE};
use crate::disk::memory::MemoryDisk;
use crate::disk::{Disk, DiskSerial};
use crate::memory::{GuestRam, PAGE_SIZE};
use crate::outputs::{FramePort, Outputs};

/// Longest frame that a device may let out: a header more than this is its buffer.
const MAX_FRAME: usize = 65_536;

/// Counts what the guest says.
#[derive(Default)]
struct Heard {
    frames: AtomicUsize,
}

impl Outputs for Heard {
    fn frame(&self, nic: u8, frame: &[u8]) {
        assert!(nic == 0 && frame.len() <= MAX_FRAME, "a frame of {} bytes on device {nic}", frame.len());
        self.frames.fetch_add(1, Ordering::Relaxed);
    }
    fn console(&self, _: &[u8]) {}
}

/// Frames that wait for the guest.
struct Cable {
    waiting: Mutex<VecDeque<Vec<u8>>>,
    null: File,
}

impl FramePort for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.null.as_fd()
    }
    fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(frame) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front() else {
            return Ok(None);
        };
        let length = frame.len().min(buffer.len());
        buffer[..length].copy_from_slice(&frame[..length]);
        Ok(Some(length))
    }
}

/// The serial port and one virtio device, with RAM that is all zeroes at first.
pub(super) struct Bench {
    pub(super) devices: Arc<Devices>,
    cable: Arc<Cable>,
    heard: Arc<Heard>,
    /// What the device works on, if it is a block device.
    pub(super) disk: Option<Arc<MemoryDisk>>,
    worker: Option<Worker>,
    /// Level of the virtio device's line.
    pub(super) line: Arc<AtomicBool>,
}

/// RAM and bell are made once: a fuzzer makes many benches, one at a time in each process.
struct Parts {
    ram: Arc<GuestRam>,
    bell: Doorbell,
    turn: Mutex<()>,
}

fn parts() -> &'static Parts {
    static PARTS: OnceLock<Parts> = OnceLock::new();
    PARTS.get_or_init(|| Parts {
        ram: Arc::new(GuestRam::new(2 << 20).expect("2 MiB of memory")),
        bell: HostIo::new().expect("an epoll and an eventfd").bell(),
        turn: Mutex::new(()),
    })
}

/// Runs `body` while nobody else uses the RAM, and cleans up after it.
pub(super) fn alone(body: impl FnOnce()) {
    let Parts { ram, turn, .. } = parts();
    let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
    body();
    for page in ram.take_own_writes().iter() {
        ram.copy_in(page, &[0; PAGE_SIZE]).expect("a page of RAM");
    }
    drop(ram.take_own_writes());
}

impl Bench {
    /// A network device as it is built. The RAM is that of all benches.
    pub(super) fn new() -> Self {
        Self::with(None)
    }

    /// Likewise, a block device on this disk.
    pub(super) fn with_disk(disk: Arc<MemoryDisk>) -> Self {
        Self::with(Some(disk))
    }

    /// Another one like this, with the same disk.
    pub(super) fn another(&self) -> Self {
        Self::with(self.disk.clone())
    }

    fn with(disk: Option<Arc<MemoryDisk>>) -> Self {
        let Parts { ram, bell, .. } = parts();
        let (line, heard) = (Arc::new(AtomicBool::new(false)), Arc::new(Heard::default()));
        let null = File::open("/dev/null").expect("/dev/null");
        let cable = Arc::new(Cable { waiting: Mutex::default(), null });
        let outputs = Arc::clone(&heard) as Arc<dyn Outputs>;
        let device: Box<dyn VirtioDevice> = match &disk {
            None => {
                let port = Arc::clone(&cable) as _;
                Box::new(Net::new(0, [2, 0, 0, 0, 0, 7], Arc::clone(&outputs), port, bell.clone()))
            }
            Some(disk) => {
                let serial = DiskSerial::new("fuzz").expect("a name");
                let config = DiskConfig { bytes: disk.bytes(), read_only: disk.is_read_only(), serial };
                Box::new(Block::new(&config, Arc::clone(disk) as _))
            }
        };
        let device = VirtioMmio::new(IrqLine::loose(Arc::clone(&line)), device);
        let serial = SerialPort::new(IrqLine::loose(Arc::default()), outputs, bell.clone(), None);
        let (ram, serial) = (Arc::clone(ram), Mutex::new(serial));
        let devices = Arc::new(Devices { ram, serial, virtio: vec![Mutex::new(device)] });
        let gate = Arc::new(Gate::default());
        gate.open();
        let worker = Worker::new(&devices, &gate, 0);
        Self { devices, cable, heard, disk, worker, line }
    }

    /// Carries out one request of the guest, in small pieces; false when none may start.
    pub(super) fn work(&self) -> bool {
        self.worker.as_ref().is_some_and(|worker| worker.try_one(&mut [0; 1024]))
    }

    pub(super) fn send(&self, frame: Vec<u8>) {
        self.cable.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(frame);
    }

    pub(super) fn write(&self, register: u64, value: u32) {
        self.devices.mmio_write(MMIO_BASE + register, &value.to_le_bytes());
    }

    pub(super) fn read(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.devices.mmio_read(MMIO_BASE + register, &mut word);
        u32::from_le_bytes(word)
    }

    pub(super) fn frames_out(&self) -> usize {
        self.heard.frames.load(Ordering::Relaxed)
    }
}
