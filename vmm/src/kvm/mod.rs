//! The machine on KVM.

mod build;
mod cpuid;
mod dirty_log;
mod facts;
mod probe;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_block;
#[cfg(test)]
mod tests_throttle;
#[cfg(test)]
mod tests_virtio;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, unbounded};
use kvm_ioctls::VmFd;

pub use build::BuildError;
use dirty_log::DirtyLog;

use crate::boot;
use crate::config::{ClockPolicy, Fact, MachineConfig, MachineIo};
use crate::devices::host_io::{Gate, HostIo, HostIoThread};
use crate::devices::{Devices, lock};
use crate::dirty::{DirtyLedger, DirtySet};
use crate::hot::Tracking;
use crate::machine::{
    BootError, CaptureError, DirtyError, Machine, MachineEvent, PauseError, RestoreError, RunError, StopTimings,
    ThrottleError,
};
use crate::memory::GuestRam;
use crate::pause::Stopped;
use crate::section::{Section, SectionKind};
use crate::state::clock::ClockStateV1;
use crate::state::codec::Saved;
use crate::state::irqchip::IrqchipStateV1;
use crate::state::vcpu::VcpuStateV1;
use crate::throttle::Throttle;
use crate::vcpu::{Vcpu, VcpuThreads};

/// How far a machine has come.
#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// Built; there is nothing to run.
    Hollow,
    /// Loaded or restored, never ran.
    Ready {
        /// Lines and kicks must be made up for at the first run.
        restored: bool,
    },
    Running,
    Stopped,
    Ended(String),
}

/// The vCPUs: with the machine until the first run, with threads of their own from then on.
enum Vcpus {
    Resting(Vec<Vcpu>, HostIo),
    Threads(VcpuThreads, HostIoThread),
    Gone,
}

/// A machine on KVM.
pub struct KvmMachine {
    config: MachineConfig,
    ram: Arc<GuestRam>,
    ledger: Arc<DirtyLedger>,
    // Before `vm` and `ram`, because vCPU threads and devices use both.
    vcpus: Vcpus,
    devices: Arc<Devices>,
    gate: Arc<Gate>,
    vm: Arc<VmFd>,
    msrs: Vec<u32>,
    facts: Vec<Fact>,
    tsc_writable: Option<bool>,
    phase: Phase,
    events_in: Sender<MachineEvent>,
    events: Receiver<MachineEvent>,
    log: DirtyLog,
}

impl KvmMachine {
    /// Builds a machine: KVM VM, vCPUs, memory and devices. It takes nothing from its ports until it runs.
    pub fn build(config: &MachineConfig, io: MachineIo) -> Result<Self, BuildError> {
        let build::Parts { ram, vm, vcpus, devices, host_io, gate, msrs, facts, tsc_writable } =
            build::build(config, io)?;
        let (events_in, events) = unbounded();
        let log = DirtyLog::new(&vm);
        Ok(Self {
            config: config.clone(),
            ledger: DirtyLedger::new(),
            ram,
            vcpus: Vcpus::Resting(vcpus, host_io),
            devices,
            gate,
            vm,
            msrs,
            facts,
            tsc_writable,
            phase: Phase::Hollow,
            events_in,
            events,
            log,
        })
    }

    fn resting(&mut self) -> &mut Vec<Vcpu> {
        match &mut self.vcpus {
            Vcpus::Resting(vcpus, _) => vcpus,
            _ => panic!("state can only be put into a machine that never ran"),
        }
    }

    /// Starts the threads of a machine that never ran.
    fn start_threads(&mut self) -> Result<(), RunError> {
        let Vcpus::Resting(vcpus, host_io) = std::mem::replace(&mut self.vcpus, Vcpus::Gone) else {
            panic!("a ready machine has resting vCPUs");
        };
        let threads = VcpuThreads::start(vcpus, &self.devices, self.events_in.clone())?;
        let host_io = host_io.start(Arc::clone(&self.devices), Arc::clone(&self.gate))?;
        self.vcpus = Vcpus::Threads(threads, host_io);
        Ok(())
    }

    /// Decodes and checks all sections before the first of them changes anything.
    fn open_sections(&self, sections: &[Section]) -> Result<Opened, RestoreError> {
        let mut by_kind = BTreeMap::new();
        for section in sections {
            if by_kind.insert(section.kind, section).is_some() {
                return Err(RestoreError::Unexpected(section.kind));
            }
        }
        let mut take = |kind| by_kind.remove(&kind).ok_or(RestoreError::Missing(kind));
        let mut vcpus = Vec::new();
        for index in 0..self.config.vcpus {
            let section = take(SectionKind::vcpu(index))?;
            let state = VcpuStateV1::from_section(section)?;
            state.validate(&self.msrs).map_err(|e| e.of(section.kind))?;
            self.check_tsc(section.kind, &state)?;
            vcpus.push(state);
        }
        let irqchip = IrqchipStateV1::from_section(take(SectionKind::IRQCHIP)?)?;
        let clock = ClockStateV1::from_section(take(SectionKind::CLOCK)?)?;
        let devices = self.devices.kinds().map(|k| take(k).cloned()).collect::<Result<_, _>>()?;
        match by_kind.into_keys().next() {
            Some(left_over) => Err(RestoreError::Unexpected(left_over)),
            None => Ok(Opened { vcpus, irqchip, clock, devices }),
        }
    }

    /// Guest time never runs backwards: where the guest reads the host's TSC, that must not be behind the captured one.
    fn check_tsc(&self, kind: SectionKind, state: &VcpuStateV1) -> Result<(), RestoreError> {
        let (captured, own) = (state.tsc().unwrap_or(0), probe::host_tsc());
        if self.tsc_writable == Some(false) && captured > own {
            let reason = format!(
                "its TSC {captured} is ahead of this host's {own}, and this host's KVM cannot offset the guest's"
            );
            return Err(RestoreError::Malformed { kind, reason });
        }
        Ok(())
    }
}

/// All sections of a machine, decoded and checked.
struct Opened {
    vcpus: Vec<VcpuStateV1>,
    irqchip: IrqchipStateV1,
    clock: ClockStateV1,
    devices: Vec<Section>,
}

impl Machine for KvmMachine {
    fn facts(&self) -> Vec<Fact> {
        self.facts.clone()
    }

    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    fn ledger(&self) -> &Arc<DirtyLedger> {
        &self.ledger
    }

    fn load(&mut self) -> Result<(), BootError> {
        let (config, ram) = (self.config.clone(), Arc::clone(&self.ram));
        if let Some(first) = self.resting().first() {
            boot::load(&config, &ram, &first.fd)?;
        }
        self.phase = Phase::Ready { restored: false };
        Ok(())
    }

    fn restore(&mut self, sections: &[Section], clock: ClockPolicy) -> Result<(), RestoreError> {
        let ClockPolicy::ResumeFromCheckpoint = clock;
        let opened = self.open_sections(sections)?;
        // A machine that took only a part of a state is not one.
        self.phase = Phase::Hollow;
        for (vcpu, state) in self.resting().iter().zip(&opened.vcpus) {
            vcpu.restore(state)?;
        }
        opened.irqchip.restore(&self.vm)?;
        for section in &opened.devices {
            self.devices.restore(section)?;
        }
        opened.clock.resume_from_checkpoint(&self.vm)?;
        self.phase = Phase::Ready { restored: true };
        Ok(())
    }

    fn queue_inbound(&mut self, nic: u8, frames: Vec<Vec<u8>>) {
        let device = self.devices.virtio.get(usize::from(nic)).expect("a network device of this machine");
        lock(device).queue_inbound(frames);
    }

    fn run(&mut self) -> Result<(), RunError> {
        match &self.phase {
            Phase::Hollow => return Err(RunError::Hollow),
            Phase::Ended(why) => return Err(RunError::Ended(why.clone())),
            Phase::Running => return Ok(()),
            Phase::Ready { restored } => {
                if *restored {
                    let ram = self.ram.tracked();
                    self.devices.virtio.iter().for_each(|d| lock(d).resume_after_restore(ram));
                }
                self.start_threads()?;
            }
            Phase::Stopped => {}
        }
        let Vcpus::Threads(threads, _) = &self.vcpus else { panic!("a machine that can run has threads") };
        if let Err(why) = threads.run() {
            self.phase = Phase::Ended(why.clone());
            return Err(RunError::Ended(why));
        }
        self.gate.open();
        self.phase = Phase::Running;
        Ok(())
    }

    fn track_dirty(&mut self, tracking: Tracking) -> Result<(), DirtyError> {
        let (call, on) = ("KVM_SET_USER_MEMORY_REGION", tracking != Tracking::Off);
        build::set_memory_slots(&self.vm, &self.ram, on).map_err(|e| DirtyError { call, source: e.into() })?;
        // Switching on begins with an empty log, unless it was on.
        self.log.switch(tracking, &self.vm, &self.ram)?;
        if on {
            drop(self.ram.take_own_writes());
            self.ledger.clear();
        }
        Ok(())
    }

    fn take_dirty(&mut self) -> Result<DirtySet, DirtyError> {
        assert!(self.log.is_on(), "dirty pages can only be taken while they are tracked");
        let mut written = self.log.take(&self.vm, &self.ram, self.phase == Phase::Stopped)?;
        written.unite(&self.ram.take_own_writes());
        Ok(self.ledger.take(written))
    }

    fn share_work(&self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        match &self.vcpus {
            Vcpus::Threads(threads, _) if self.phase == Phase::Stopped => threads.share(pieces, work),
            _ => (0..pieces).for_each(work),
        }
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<(), ThrottleError> {
        match &mut self.vcpus {
            Vcpus::Threads(threads, _) => Ok(threads.throttle(throttle)?),
            Vcpus::Resting(..) | Vcpus::Gone => Ok(()),
        }
    }

    fn take_cold_dirty(&mut self) -> Result<DirtySet, DirtyError> {
        assert!(self.log.is_on(), "dirty pages can only be taken while they are tracked");
        let log = self.log.take_cold(&self.vm, &self.ram)?;
        // The VMM's own writes are few, and most of them to pages that devices write all the time.
        Ok(self.ledger.take(log))
    }

    fn events(&self) -> Receiver<MachineEvent> {
        self.events.clone()
    }

    fn stop(&mut self, _: &Stopped) -> Result<StopTimings, PauseError> {
        match &self.phase {
            Phase::Running => {}
            Phase::Ended(why) => return Err(PauseError::Ended(why.clone())),
            Phase::Hollow | Phase::Ready { .. } | Phase::Stopped => return Ok(StopTimings::default()),
        }
        let Vcpus::Threads(threads, _) = &self.vcpus else { panic!("a running machine has threads") };
        let began = Instant::now();
        self.gate.close();
        let quiesce = began.elapsed();
        if let Err(error) = threads.stop() {
            self.phase = Phase::Ended(error.to_string());
            return Err(error);
        }
        let kick = began.elapsed() - quiesce;
        let vcpu_state = threads.state_time();
        self.phase = Phase::Stopped;
        Ok(StopTimings { quiesce, kick, vcpu_state })
    }

    fn capture(&mut self, _: &Stopped) -> Result<Vec<Section>, CaptureError> {
        let mut sections = Vec::new();
        match &mut self.vcpus {
            Vcpus::Resting(vcpus, _) => {
                for vcpu in vcpus {
                    sections.push(vcpu.capture()?);
                }
            }
            Vcpus::Threads(threads, _) => {
                for section in threads.sections() {
                    sections.push(section?);
                }
            }
            Vcpus::Gone => panic!("a machine that was shut down cannot be captured"),
        }
        sections.push(IrqchipStateV1::capture(&self.vm)?.to_section(SectionKind::IRQCHIP));
        sections.push(ClockStateV1::capture(&self.vm)?.to_section(SectionKind::CLOCK));
        sections.extend(self.devices.capture()?);
        Ok(sections)
    }

    fn shut_down(&mut self) {
        if let Vcpus::Threads(mut threads, mut host_io) = std::mem::replace(&mut self.vcpus, Vcpus::Gone) {
            threads.end();
            host_io.end();
        }
        if !matches!(self.phase, Phase::Ended(_)) {
            self.phase = Phase::Ended("it was shut down".into());
        }
    }
}

impl Drop for KvmMachine {
    fn drop(&mut self) {
        self.shut_down();
    }
}
