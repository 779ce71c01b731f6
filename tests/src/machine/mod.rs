//! A KVM machine in this process, without a pair around it: what guests say is kept, what they hear comes from a test.

pub mod client;
pub mod shadow;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam::channel::{Receiver, Sender, bounded};
use vmm::{Disk, FramePort, KvmMachine, MachineConfig, MachineIo, NicConfig, Outputs, SocketPort};

use crate::real::artifacts;

/// The guest's network address.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x00, 0x00, 0x00, 0x00, 0x10];
/// Frames from the guest that may wait for a test to look at them.
const FRAMES: usize = 4096;

/// True when this host is declared to have no KVM (`FT_NO_KVM=1`). Everything else that is missing fails loudly later on.
#[must_use]
pub fn no_kvm(test: &str) -> bool {
    let declared = std::env::var_os("FT_NO_KVM").is_some_and(|v| v == "1");
    if declared {
        eprintln!("{test}: NOT RUN, because FT_NO_KVM=1 says that this host has no KVM");
    }
    declared
}

/// The demo guest: `FT_GUEST`, or built now.
#[must_use]
pub fn demo_guest() -> PathBuf {
    match std::env::var_os("FT_GUEST") {
        Some(image) => PathBuf::from(image),
        None => artifacts::build_guest().expect("the demo guest builds"),
    }
}

/// What the guest said.
pub struct Recorder {
    console: Mutex<Vec<u8>>,
    frames: Sender<Vec<u8>>,
}

impl Recorder {
    /// A recorder, and the frames that it hears. Frames that nobody takes are dropped, as a switch would.
    #[must_use]
    pub fn new() -> (Arc<Self>, Receiver<Vec<u8>>) {
        let (frames, heard) = bounded(FRAMES);
        (Arc::new(Self { console: Mutex::default(), frames }), heard)
    }

    /// All console bytes so far.
    #[must_use]
    pub fn console(&self) -> Vec<u8> {
        self.bytes().clone()
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outputs for Recorder {
    fn frame(&self, _nic: u8, frame: &[u8]) {
        drop(self.frames.try_send(frame.to_vec()));
    }

    fn console(&self, bytes: &[u8]) {
        self.bytes().extend_from_slice(bytes);
    }
}

/// The parts list of a machine that runs the demo guest.
#[must_use]
pub fn demo_config(kernel: PathBuf, vcpus: u8, memory_bytes: u64) -> MachineConfig {
    MachineConfig {
        vcpus,
        memory_bytes,
        kernel,
        initrd: None,
        cmdline: "ip=10.77.0.10/24".into(),
        nics: vec![NicConfig { mac: GUEST_MAC }],
        disks: Vec::new(),
    }
}

/// Builds a machine without disks whose frames and console go to `outputs` and whose network hears `port`.
///
/// # Panics
/// When this host cannot: these tests do not pass without KVM.
#[must_use]
pub fn build(config: &MachineConfig, outputs: &Arc<Recorder>, port: &Arc<SocketPort>) -> KvmMachine {
    build_with_disks(config, outputs, port, Vec::new())
}

/// Likewise, with a disk for each of the configuration.
///
/// # Panics
/// As [`build`].
#[must_use]
pub fn build_with_disks(
    config: &MachineConfig,
    outputs: &Arc<Recorder>,
    port: &Arc<SocketPort>,
    disks: Vec<Arc<dyn Disk>>,
) -> KvmMachine {
    let ports = config.nics.iter().map(|_| Arc::clone(port) as Arc<dyn FramePort>).collect();
    let io = MachineIo { outputs: Arc::clone(outputs) as Arc<dyn Outputs>, ports, disks, console_input: None };
    KvmMachine::build(config, io).expect("a machine on KVM (FT_NO_KVM=1 leaves this test out where there is none)")
}
