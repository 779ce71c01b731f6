//! One vCPU. The order of the calls, and its causes, are in [`super`].

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_sync_regs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{SyncReg, VcpuFd};
use zerocopy::{FromBytes, IntoBytes};

use super::codec::{Decoder, Encoder, Malformed, Saved};
use super::{host_capture, host_restore};
use crate::machine::{CaptureError, RestoreError};

/// Time stamp counter.
pub(crate) const MSR_TSC: u32 = 0x10;
/// The LAPIC timer's deadline, which KVM compares with the TSC when it is written.
pub(crate) const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// More MSRs than any KVM lists.
const MAX_MSRS: u16 = 1024;
const CR4_LA57: u64 = 1 << 12;
/// Relative difference of TSC frequencies that needs no scaling: what NTP itself tolerates.
const TSC_TOLERANCE_PPM: u64 = 250;

/// All of one vCPU. The kernel's structures are its ABI, so their bytes are a fixed layout.
#[derive(Debug)]
pub(crate) struct VcpuStateV1 {
    mp_state: kvm_mp_state,
    tsc_khz: u32,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    /// Index and value, in the order of the machine's list.
    msrs: Vec<(u32, u64)>,
}

impl Saved for VcpuStateV1 {
    const VERSION: u16 = 1;

    fn encode(&self, out: &mut Encoder) {
        let Self { mp_state, tsc_khz, regs, sregs, xsave, xcrs, debug_regs, lapic, events, msrs } = self;
        out.abi(mp_state);
        out.u32(*tsc_khz);
        out.abi(regs);
        out.abi(sregs);
        out.bytes(xsave.region.as_bytes());
        out.abi(xcrs);
        out.abi(debug_regs);
        out.abi(lapic);
        out.abi(events);
        let count = u16::try_from(msrs.len()).expect("the list of MSRs is cut to MAX_MSRS when it is made");
        out.u16(count);
        for (index, value) in msrs {
            out.u32(*index);
            out.u64(*value);
        }
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, Malformed> {
        let mp_state = input.abi()?;
        let tsc_khz = input.u32()?;
        let regs = input.abi()?;
        let sregs = input.abi()?;
        let region = <[u32; 1024]>::read_from_bytes(input.bytes(4096)?)
            .map_err(|_| Malformed::new("wrong size of the XSAVE area"))?;
        let xsave = kvm_xsave { region, ..Default::default() };
        let (xcrs, debug_regs, lapic, events) = (input.abi()?, input.abi()?, input.abi()?, input.abi()?);
        let count = input.u16()?;
        if count > MAX_MSRS {
            return Err(Malformed(format!("{count} MSRs, at most {MAX_MSRS} are believed")));
        }
        let msrs = (0..count).map(|_| Ok((input.u32()?, input.u64()?))).collect::<Result<_, Malformed>>()?;
        Ok(Self { mp_state, tsc_khz, regs, sregs, xsave, xcrs, debug_regs, lapic, events, msrs })
    }
}

impl VcpuStateV1 {
    /// Reads the state. `buffer` holds one entry for each MSR of the machine's list and is reused from capture to capture.
    pub(crate) fn capture(fd: &mut VcpuFd, tsc_khz: u32, buffer: &mut Msrs) -> Result<Self, CaptureError> {
        let mp_state = fd.get_mp_state().map_err(host_capture("vCPU, KVM_GET_MP_STATE"))?;
        let kvm_sync_regs { regs, sregs, events } = read_registers(fd)?;
        let xsave = fd.get_xsave().map_err(host_capture("vCPU, KVM_GET_XSAVE"))?;
        let xcrs = fd.get_xcrs().map_err(host_capture("vCPU, KVM_GET_XCRS"))?;
        let debug_regs = fd.get_debug_regs().map_err(host_capture("vCPU, KVM_GET_DEBUGREGS"))?;
        let lapic = fd.get_lapic().map_err(host_capture("vCPU, KVM_GET_LAPIC"))?;
        let msrs = read_msrs(fd, buffer)?;
        Ok(Self { mp_state, tsc_khz, regs, sregs, xsave, xcrs, debug_regs, lapic, events, msrs })
    }

    /// Checks what KVM would not, against the machine that is to take the state.
    pub(crate) fn validate(&self, list: &[u32]) -> Result<(), Malformed> {
        const STATES: [u32; 5] = [
            KVM_MP_STATE_RUNNABLE,
            KVM_MP_STATE_UNINITIALIZED,
            KVM_MP_STATE_INIT_RECEIVED,
            KVM_MP_STATE_HALTED,
            KVM_MP_STATE_SIPI_RECEIVED,
        ];
        if !STATES.contains(&self.mp_state.mp_state) {
            return Err(Malformed(format!("{} is not a state of an x86 vCPU", self.mp_state.mp_state)));
        }
        let address_bits = if self.sregs.cr4 & CR4_LA57 == 0 { 48 } else { 57 };
        if !is_canonical(self.regs.rip, address_bits) {
            return Err(Malformed(format!("instruction pointer {:#x} is not canonical", self.regs.rip)));
        }
        let indexes = self.msrs.iter().map(|(index, _)| *index);
        if !indexes.eq(list.iter().copied()) {
            return Err(Malformed::new("its MSRs are not the ones of this machine"));
        }
        Ok(())
    }

    /// The guest's TSC at the checkpoint.
    pub(crate) fn tsc(&self) -> Option<u64> {
        self.msrs.iter().find(|(index, _)| *index == MSR_TSC).map(|(_, value)| *value)
    }

    /// Writes the state into a vCPU that never ran. Call [`VcpuStateV1::validate`] first.
    pub(crate) fn restore(&self, fd: &VcpuFd, own_tsc_khz: u32) -> Result<(), RestoreError> {
        let Self { mp_state, tsc_khz, regs, sregs, xsave, xcrs, debug_regs, lapic, events, msrs } = self;
        if needs_scaling(*tsc_khz, own_tsc_khz) {
            fd.set_tsc_khz(*tsc_khz).map_err(host_restore("vCPU, KVM_SET_TSC_KHZ"))?;
        }
        fd.set_mp_state(*mp_state).map_err(host_restore("vCPU, KVM_SET_MP_STATE"))?;
        fd.set_regs(regs).map_err(host_restore("vCPU, KVM_SET_REGS"))?;
        fd.set_sregs(sregs).map_err(host_restore("vCPU, KVM_SET_SREGS"))?;
        set_xsave(fd, xsave).map_err(host_restore("vCPU, KVM_SET_XSAVE"))?;
        fd.set_xcrs(xcrs).map_err(host_restore("vCPU, KVM_SET_XCRS"))?;
        fd.set_debug_regs(debug_regs).map_err(host_restore("vCPU, KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(lapic).map_err(host_restore("vCPU, KVM_SET_LAPIC"))?;
        let (deferred, first): (Vec<_>, Vec<_>) =
            msrs.iter().copied().partition(|(index, _)| *index == MSR_TSC_DEADLINE);
        write_msrs(fd, &first)?;
        write_msrs(fd, &deferred)?;
        fd.set_vcpu_events(events).map_err(host_restore("vCPU, KVM_SET_VCPU_EVENTS"))
    }

    /// The encoding without what time alone changes in a stopped machine (the list is in [`super`]).
    #[cfg(test)]
    pub(crate) fn timeless(mut self) -> Vec<u8> {
        for (index, value) in &mut self.msrs {
            if *index == MSR_TSC {
                *value = 0;
            }
        }
        self.lapic.regs[0x390..0x394].fill(0);
        let mut out = Encoder::default();
        self.encode(&mut out);
        out.into_bytes()
    }
}

fn is_canonical(address: u64, bits: u32) -> bool {
    let top = address >> (bits - 1);
    top == 0 || top == u64::MAX >> (bits - 1)
}

fn needs_scaling(captured_khz: u32, own_khz: u32) -> bool {
    let (captured, own) = (u64::from(captured_khz), u64::from(own_khz));
    captured.abs_diff(own) * 1_000_000 > own * TSC_TOLERANCE_PPM
}

/// Makes the buffer that [`VcpuStateV1::capture`] reads MSRs into.
pub(crate) fn msr_buffer(list: &[u32]) -> Msrs {
    let entries: Vec<_> = list.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    Msrs::from_entries(&entries).expect("the list of MSRs is cut to MAX_MSRS when it is made")
}

/// The MSRs of KVM's list that this vCPU lets the host read and write.
///
/// KVM lists MSRs for the host as a whole; which of them a vCPU has depends on its CPUID.
pub(crate) fn supported_msrs(fd: &VcpuFd, listed: &[u32]) -> Vec<u32> {
    let accepted = |index: &&u32| {
        let mut one = msr_buffer(&[**index]);
        fd.get_msrs(&mut one).is_ok_and(|n| n == 1) && fd.set_msrs(&one).is_ok_and(|n| n == 1)
    };
    listed.iter().filter(accepted).copied().take(usize::from(MAX_MSRS)).collect()
}

/// Registers, system registers and events in one call: KVM_RUN leaves them in the shared page, and with `immediate_exit` it does nothing
/// else to a vCPU whose last exit is completed. Each call of its own costs about as much as this one.
fn read_registers(fd: &mut VcpuFd) -> Result<kvm_sync_regs, CaptureError> {
    const WANTED: [SyncReg; 3] = [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents];
    WANTED.into_iter().for_each(|reg| fd.set_sync_valid_reg(reg));
    // Whoever lets the vCPU run clears the flag first.
    fd.set_kvm_immediate_exit(1);
    let answer = fd.run().map(|exit| format!("{exit:?}"));
    WANTED.into_iter().for_each(|reg| fd.clear_sync_valid_reg(reg));
    match answer {
        Err(error) if error.errno() == libc::EINTR => Ok(fd.sync_regs()),
        Err(error) => Err(host_capture("vCPU, KVM_RUN for its registers")(error)),
        Ok(exit) => Err(CaptureError::Host {
            what: format!("vCPU, KVM_RUN for its registers: {exit}"),
            source: std::io::ErrorKind::ResourceBusy.into(),
        }),
    }
}

fn read_msrs(fd: &VcpuFd, buffer: &mut Msrs) -> Result<Vec<(u32, u64)>, CaptureError> {
    let wanted = buffer.as_slice().len();
    let got = fd.get_msrs(buffer).map_err(host_capture("vCPU, KVM_GET_MSRS"))?;
    if got != wanted {
        // KVM stops at the first MSR that it does not give.
        let refused = buffer.as_slice().get(got).map_or(0, |e| e.index);
        let what = format!("vCPU, KVM_GET_MSRS: MSR {refused:#x}");
        return Err(CaptureError::Host { what, source: std::io::ErrorKind::Unsupported.into() });
    }
    Ok(buffer.as_slice().iter().map(|e| (e.index, e.data)).collect())
}

fn write_msrs(fd: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), RestoreError> {
    if msrs.is_empty() {
        return Ok(());
    }
    let entries: Vec<_> =
        msrs.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    let list = Msrs::from_entries(&entries).expect("as many as were decoded, which is bounded");
    let done = fd.set_msrs(&list).map_err(host_restore("vCPU, KVM_SET_MSRS"))?;
    match entries.get(done) {
        None => Ok(()),
        Some(refused) => Err(RestoreError::Host {
            what: format!("vCPU, KVM_SET_MSRS: value {:#x} for MSR {:#x}", refused.data, refused.index),
            source: std::io::ErrorKind::InvalidInput.into(),
        }),
    }
}

#[expect(unsafe_code, reason = "kvm-ioctls marks KVM_SET_XSAVE unsafe because of features with larger areas")]
fn set_xsave(fd: &VcpuFd, xsave: &kvm_xsave) -> Result<(), vmm_sys_util::errno::Error> {
    // SAFETY: KVM reads more than the 4096 bytes of `kvm_xsave` only for features enabled by arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM),
    // which this program never calls.
    unsafe { fd.set_xsave(xsave) }
}
