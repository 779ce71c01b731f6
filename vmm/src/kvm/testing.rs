//! What the tests of the KVM machine share: tiny guests, and a driver that plays the guest.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::KvmMachine;
use crate::config::{MachineConfig, MachineIo, NicConfig};
use crate::devices::MMIO_BASE;
use crate::outputs::{FramePort, Outputs};
use crate::tap::SocketPort;

pub(super) const PATIENCE: Duration = Duration::from_secs(10);
pub(super) const RAM_BYTES: u64 = 4 << 20;
/// Where tiny guests are loaded and begin.
pub(super) const GUEST_START: u32 = 0x10_0000;
/// Counts up in a register and in memory at 2 MiB, after one letter on the console:
/// `mov dx, 0x3f8; mov al, 'A'; out dx, al; again: inc dword [0x200000]; inc ebx; jmp again`
pub(super) const COUNTING: &[u8] =
    &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'A', 0xee, 0xff, 0x05, 0x00, 0x00, 0x20, 0x00, 0x43, 0xeb, 0xf7];
pub(super) const COUNTER_AT: u64 = 0x20_0000;

/// True when this host is declared to have no KVM.
pub(super) fn no_kvm() -> bool {
    let declared = std::env::var_os("FT_NO_KVM").is_some_and(|v| v == "1");
    if declared {
        eprintln!("NOT RUN, because FT_NO_KVM=1 says that this host has no KVM");
    }
    declared
}

/// Keeps what the guest says.
#[derive(Default)]
pub(super) struct Heard {
    pub(super) frames: Mutex<Vec<Vec<u8>>>,
    pub(super) console: Mutex<Vec<u8>>,
}

impl Outputs for Heard {
    fn frame(&self, _: u8, frame: &[u8]) {
        self.frames.lock().unwrap().push(frame.to_vec());
    }
    fn console(&self, bytes: &[u8]) {
        self.console.lock().unwrap().extend_from_slice(bytes);
    }
}

/// A machine with one network device, what it says, and the far end of its cable.
pub(super) struct Bench {
    pub(super) machine: KvmMachine,
    pub(super) heard: Arc<Heard>,
    pub(super) cable: SocketPort,
}

pub(super) fn config(kernel: PathBuf, vcpus: u8) -> MachineConfig {
    MachineConfig {
        vcpus,
        memory_bytes: RAM_BYTES,
        kernel,
        initrd: None,
        cmdline: String::new(),
        nics: vec![NicConfig { mac: [2, 0, 0, 0, 0, 7] }],
        disks: Vec::new(),
    }
}

pub(super) fn bench(config: &MachineConfig) -> Bench {
    bench_with_input(config, None)
}

/// Likewise, with somebody at the console.
pub(super) fn bench_with_input(config: &MachineConfig, console_input: Option<OwnedFd>) -> Bench {
    let heard = Arc::new(Heard::default());
    let (port, cable) = SocketPort::pair().unwrap();
    let io = MachineIo {
        outputs: Arc::clone(&heard) as Arc<dyn Outputs>,
        ports: vec![Arc::new(port) as Arc<dyn FramePort>],
        disks: Vec::new(),
        console_input,
    };
    let machine = KvmMachine::build(config, io).expect("a machine on KVM (FT_NO_KVM=1 where there is none)");
    Bench { machine, heard, cable }
}

/// A file that goes away with the value.
pub(super) struct TempFile(pub(super) PathBuf);

impl TempFile {
    pub(super) fn new(bytes: &[u8]) -> Self {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vmm-test-{}-{n}", std::process::id()));
        std::fs::File::create_new(&path).unwrap().write_all(bytes).unwrap();
        Self(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

/// A PVH ELF with one loadable segment at `at` and, if asked, the note that makes it bootable.
pub(super) fn elf(code: &[u8], at: u32, with_note: bool) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    let length = u64::try_from(code.len()).unwrap();
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&at.to_le_bytes());

    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let u16s = |out: &mut Vec<u8>, vs: &[u16]| vs.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
    let u32s = |out: &mut Vec<u8>, vs: &[u32]| vs.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
    let u64s = |out: &mut Vec<u8>, vs: &[u64]| vs.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
    u16s(&mut out, &[2, 62]);
    u32s(&mut out, &[1]);
    u64s(&mut out, &[u64::from(at), 64, 0]);
    u32s(&mut out, &[0]);
    u16s(&mut out, &[64, 56, if with_note { 2 } else { 1 }, 0, 0, 0]);
    u32s(&mut out, &[1, 7]);
    u64s(&mut out, &[HEADERS, u64::from(at), u64::from(at), length, length, 4]);
    u32s(&mut out, &[4, 4]);
    let note_length = u64::try_from(note.len()).unwrap();
    u64s(&mut out, &[HEADERS + length, 0, 0, note_length, note_length, 4]);
    out.extend_from_slice(code);
    out.extend_from_slice(&note);
    out
}

/// A machine that was loaded with `code`.
pub(super) fn loaded(code: &[u8], vcpus: u8) -> Bench {
    use crate::machine::Machine;
    let image = TempFile::new(&elf(code, GUEST_START, true));
    let mut bench = bench(&config(image.0.clone(), vcpus));
    bench.machine.load().unwrap();
    bench
}

/// Waits, within limits, until something holds.
pub(super) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::yield_now();
    }
}

/// Plays the guest's driver of the network device, register by register and ring by ring.
pub(super) struct Driver<'a>(pub(super) &'a KvmMachine);

/// Where the driver keeps its queues: a page for each ring, so that each is told apart in a dirty set.
pub(super) struct Ring {
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    pub(super) buffer: u64,
}

pub(super) const RX: Ring = Ring { desc: 0x11_0000, avail: 0x11_1000, used: 0x11_2000, buffer: 0x11_3000 };
pub(super) const TX: Ring = Ring { desc: 0x12_0000, avail: 0x12_1000, used: 0x12_2000, buffer: 0x12_3000 };
pub(super) const QUEUE_SIZE: u16 = 8;

impl Driver<'_> {
    pub(super) fn write(&self, register: u64, value: u32) {
        self.0.devices.mmio_write(MMIO_BASE + register, &value.to_le_bytes());
    }

    pub(super) fn read(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.0.devices.mmio_read(MMIO_BASE + register, &mut word);
        u32::from_le_bytes(word)
    }

    pub(super) fn put<T: vm_memory::ByteValued>(&self, value: T, at: u64) {
        self.0.ram.tracked().write_obj(value, GuestAddress(at)).unwrap();
    }

    pub(super) fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.0.ram.tracked().read_obj(GuestAddress(at)).unwrap()
    }

    pub(super) fn negotiate(&self) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.write(0x24, 1);
        self.write(0x20, 1);
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11, "FEATURES_OK");
    }

    pub(super) fn queue(&self, index: u32, ring: &Ring) {
        self.write(0x30, index);
        self.write(0x38, u32::from(QUEUE_SIZE));
        for (register, address) in [(0x80, ring.desc), (0x90, ring.avail), (0xa0, ring.used)] {
            self.write(register, u32::try_from(address).unwrap());
            self.write(register + 4, 0);
        }
        self.write(0x44, 1);
    }

    /// Negotiates, sets up both queues, goes live.
    pub(super) fn start(&self) {
        self.negotiate();
        self.queue(0, &RX);
        self.queue(1, &TX);
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15, "DRIVER_OK");
    }

    /// Makes descriptor `head` available as the `n`th of its ring.
    pub(super) fn offer(&self, ring: &Ring, n: u16, length: u32, device_writes: bool) {
        let head = n % QUEUE_SIZE;
        let at = ring.desc + 16 * u64::from(head);
        self.put(ring.buffer, at);
        self.put(length, at + 8);
        self.put(if device_writes { 2u16 } else { 0 }, at + 12);
        self.put(0u16, at + 14);
        self.put(head, ring.avail + 4 + 2 * u64::from(head));
        self.put(n.wrapping_add(1), ring.avail + 2);
    }

    pub(super) fn kick(&self, queue: u32) {
        self.write(0x50, queue);
    }
}
