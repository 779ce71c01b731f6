//! What a pause costs at least: the same calls and the same copy in a bare loop, on a plain KVM VM with a guest of thirteen instructions.
//!
//! The guest runs at CPL 3 in 64-bit mode. Told a count, it writes a word to so many pages and then spins. A round is: kick it out of
//! KVM_RUN with a signal, read all state that a capture needs, read the dirty log, copy each dirty page into a warm buffer, enter again; one
//! thread does all of it, so nothing is handed from thread to thread.
#![expect(unsafe_code, reason = "memory slots, and copies straight out of guest memory")]

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, Msrs, kvm_irqchip, kvm_msr_entry, kvm_pit_config, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm::{GuestRam, PAGE_SIZE};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{BenchError, host};

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORIES: u64 = 0x3000;
const CODE: u64 = 0x1_0000;
/// What the guest is told: round, count of pages, address of the first.
pub(super) const TOLD: u64 = 0x1_1000;
/// What it says: a heartbeat, and the last round that it did.
pub(super) const SAID: u64 = 0x1_2000;
/// The first page that it dirties.
pub(super) const DATA: u64 = 16 << 20;
const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
/// Present, writable, user, accessed and dirty: KVM has no bit to set, and thus no page table to dirty.
const TABLE: u64 = 0x67;
const LARGE: u64 = TABLE | 0x80;
/// No round lasts this long.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two kicks of a thread that is to end.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// RSI is [`TOLD`], R8 is [`SAID`], RDX a page's size, RBX the last round.
const PROGRAM: [u8; 39] = [
    0x48, 0x8b, 0x06, // again: mov rax, [rsi]
    0x49, 0xff, 0x00, //        inc qword [r8]
    0x48, 0x39, 0xd8, //        cmp rax, rbx
    0x74, 0xf5, //              je again
    0x48, 0x89, 0xc3, //        mov rbx, rax
    0x48, 0x8b, 0x4e, 0x08, //  mov rcx, [rsi+8]
    0x48, 0x8b, 0x7e, 0x10, //  mov rdi, [rsi+16]
    0x48, 0x89, 0x1f, // next:  mov [rdi], rbx
    0x48, 0x01, 0xd7, //        add rdi, rdx
    0x48, 0xff, 0xc9, //        dec rcx
    0x75, 0xf5, //              jnz next
    0x49, 0x89, 0x58, 0x08, //  mov [r8+8], rbx
    0xeb, 0xd9, //              jmp again
];

/// The parts of one round.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// From the signal until KVM_RUN returned.
    pub kick: Duration,
    /// All state that a capture needs.
    pub state: Duration,
    /// KVM_GET_DIRTY_LOG of every slot.
    pub dirty: Duration,
    /// Copying the pages.
    pub copy: Duration,
    /// The four above, from the signal until just before KVM_RUN: ends where the product's pause ends.
    pub whole: Duration,
    /// From there until the guest was seen to run.
    pub reentry: Duration,
    /// Pages that were dirty, and copied.
    pub pages: usize,
}

struct Measured {
    out: Instant,
    state: Instant,
    dirty: Instant,
    copied: Instant,
    pages: usize,
    heartbeat: u64,
}

enum Answer {
    Measured(Measured),
    Parked,
    Failed(String),
}

/// Guest memory as this side sees it.
pub(super) struct Words(pub(super) Arc<GuestRam>);

impl Words {
    pub(super) fn at(&self, address: u64) -> *mut u8 {
        self.0.tracked().get_host_address(GuestAddress(address)).expect("an address that lies in RAM")
    }

    pub(super) fn word(&self, address: u64) -> &AtomicU64 {
        // SAFETY: eight aligned bytes of a mapping that lives as long as `self`; guest and host only touch them whole.
        unsafe { AtomicU64::from_ptr(self.at(address).cast()) }
    }
}

/// The plain VM, its vCPU outside KVM_RUN between rounds.
pub struct Floor {
    words: Words,
    go: Option<Sender<()>>,
    answers: Receiver<Answer>,
    measure: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    rounds: u64,
}

impl Floor {
    /// Builds the VM, with the memory and the number of vCPUs of the product's machine.
    ///
    /// # Errors
    /// The host refuses.
    pub fn start(vcpus: u8, memory_bytes: u64) -> Result<Self, BenchError> {
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), nothing).map_err(host("sigaction"))?;
        let ram = Arc::new(GuestRam::new(memory_bytes)?);
        write_memory(&Words(Arc::clone(&ram)), memory_bytes);
        let bare = Bare::build(vcpus, &ram)?;
        let (go, orders) = bounded(1);
        // Room for a failure beside an answer that nobody took.
        let (answer, answers) = bounded(4);
        let measure = Arc::new(AtomicBool::new(false));
        let shared = Arc::clone(&measure);
        let thread = std::thread::Builder::new()
            .name("floor".into())
            .spawn(move || bare.live(&orders, &answer, &shared))
            .map_err(host("a thread"))?;
        let mut floor = Self { words: Words(ram), go: Some(go), answers, measure, thread: Some(thread), rounds: 0 };
        // The first round dirties pages of its own, and no later one does: the log begins with it.
        let first = floor.any_round(2)?;
        log::debug!("the floor's first round: {first:?}");
        Ok(floor)
    }

    /// One round in which the guest dirties exactly `pages` pages, at least two.
    ///
    /// # Errors
    /// Another number of pages was dirty; the guest stands; the host refuses.
    pub fn round(&mut self, pages: usize) -> Result<Round, BenchError> {
        let round = self.any_round(pages)?;
        if round.pages != pages {
            let got = round.pages;
            return Err(BenchError::Wrong(format!("the floor: {got} pages are dirty where {pages} were meant to be")));
        }
        Ok(round)
    }

    fn any_round(&mut self, pages: usize) -> Result<Round, BenchError> {
        let wrong = |what: &str| BenchError::Wrong(format!("the floor: {what}"));
        // The page of the heartbeat is dirty too.
        let count = u64::try_from(pages).unwrap_or(u64::MAX).saturating_sub(1);
        let room = self.words.0.page_count().saturating_sub(DATA / 4096);
        if count == 0 || count > room {
            return Err(wrong(&format!("{pages} pages cannot be dirtied")));
        }
        self.rounds += 1;
        self.words.word(TOLD + 8).store(count, Ordering::SeqCst);
        self.words.word(TOLD + 16).store(DATA, Ordering::SeqCst);
        self.words.word(TOLD).store(self.rounds, Ordering::SeqCst);
        self.go.as_ref().expect("taken by drop only").send(()).map_err(|_| wrong("its thread is gone"))?;
        self.wait("to dirty its pages", || self.words.word(SAID + 8).load(Ordering::SeqCst) == self.rounds)?;
        self.measure.store(true, Ordering::SeqCst);
        let signalled = Instant::now();
        self.kick()?;
        self.wait("to be measured", || !self.answers.is_empty())?;
        let measured = match self.answers.try_recv() {
            Ok(Answer::Measured(measured)) => measured,
            Ok(Answer::Failed(why)) => return Err(wrong(&why)),
            _ => return Err(wrong("an answer out of turn")),
        };
        self.wait("to run again", || self.words.word(SAID).load(Ordering::SeqCst) != measured.heartbeat)?;
        let seen = Instant::now();
        self.measure.store(false, Ordering::SeqCst);
        self.kick()?;
        match self.answers.recv_timeout(PATIENCE) {
            Ok(Answer::Parked) => {}
            Ok(Answer::Failed(why)) => return Err(wrong(&why)),
            _ => return Err(wrong("the guest does not stop")),
        }
        let Measured { out, state, dirty, copied, pages, heartbeat: _ } = measured;
        Ok(Round {
            kick: out - signalled,
            state: state - out,
            dirty: dirty - state,
            copy: copied - dirty,
            whole: copied - signalled,
            reentry: seen.saturating_duration_since(copied),
            pages,
        })
    }

    fn wait(&self, what: &str, done: impl Fn() -> bool) -> Result<(), BenchError> {
        let began = Instant::now();
        while !done() {
            if began.elapsed() > PATIENCE || self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                let why = match self.answers.try_recv() {
                    Ok(Answer::Failed(why)) => why,
                    _ => format!("the guest does not come {what}"),
                };
                return Err(BenchError::Wrong(format!("the floor: {why}")));
            }
            // The scheduler may have put the floor's thread on this very processor.
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Interrupts KVM_RUN. Only while the guest was seen to run, so the signal cannot come before the call.
    fn kick(&self) -> Result<(), BenchError> {
        let thread = self.thread.as_ref().expect("taken by drop only");
        thread.kill(SIGRTMIN()).map_err(host("pthread_kill"))
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        self.go = None;
        self.measure.store(false, Ordering::SeqCst);
        end_vcpu(&mut self.thread);
    }
}

/// Ends the thread of a vCPU that has no orders any more. After a failed round its guest may still spin, so it is kicked. A kick that comes just before KVM_RUN
/// is lost, hence the next; one right after another would keep the thread from getting on with its end.
pub(super) fn end_vcpu(thread: &mut Option<JoinHandle<()>>) {
    while let Some(running) = thread.as_ref().filter(|thread| !thread.is_finished()) {
        if let Err(error) = running.kill(SIGRTMIN()) {
            log::debug!("a vCPU's thread is gone: {error}");
        }
        std::thread::park_timeout(KICK_INTERVAL);
    }
    if let Some(thread) = thread.take()
        && thread.join().is_err()
    {
        log::error!("a vCPU's thread panicked");
    }
}

/// Puts the guest's page tables and its program into its memory.
pub(super) fn write_memory(words: &Words, memory_bytes: u64) {
    let mapped = memory_bytes.min(vmm::memory::LOW_RAM_END);
    words.word(PML4).store(PDPT | TABLE, Ordering::SeqCst);
    for directory in 0..mapped.div_ceil(GIB) {
        words.word(PDPT + directory * 8).store((DIRECTORIES + directory * 0x1000) | TABLE, Ordering::SeqCst);
    }
    for large in 0..mapped / LARGE_PAGE {
        words.word(DIRECTORIES + large * 8).store((large * LARGE_PAGE) | LARGE, Ordering::SeqCst);
    }
    // SAFETY: the program is shorter than a page, which lies inside one region; no vCPU exists yet.
    unsafe { ptr::copy_nonoverlapping(PROGRAM.as_ptr(), words.at(CODE), PROGRAM.len()) };
}

/// What the thread owns.
struct Bare {
    vm: VmFd,
    vcpus: Vec<VcpuFd>,
    msrs: Vec<Msrs>,
    words: Words,
    /// First address and bytes of each slot.
    slots: Vec<(u64, usize)>,
    buffer: Vec<u8>,
}

impl Bare {
    fn build(vcpus: u8, ram: &Arc<GuestRam>) -> Result<Self, BenchError> {
        let kvm = Kvm::new().map_err(host("open /dev/kvm"))?;
        let vm = kvm.create_vm().map_err(host("KVM_CREATE_VM"))?;
        vm.set_identity_map_address(0xfffb_c000).map_err(host("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(0xfffb_d000).map_err(host("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(host("KVM_CREATE_IRQCHIP"))?;
        vm.create_pit2(kvm_pit_config::default()).map_err(host("KVM_CREATE_PIT2"))?;
        let words = Words(Arc::clone(ram));
        let slots = set_slots(&vm, &words)?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(host("KVM_GET_SUPPORTED_CPUID"))?;
        let listed = kvm.get_msr_index_list().map_err(host("KVM_GET_MSR_INDEX_LIST"))?;
        let (mut fds, mut msrs) = (Vec::new(), Vec::new());
        for index in 0..vcpus {
            let vcpu = vm.create_vcpu(u64::from(index)).map_err(host("KVM_CREATE_VCPU"))?;
            vcpu.set_cpuid2(&cpuid).map_err(host("KVM_SET_CPUID2"))?;
            msrs.push(msr_buffer(&vcpu, listed.as_slice()));
            fds.push(vcpu);
        }
        set_registers(fds.first().expect("a machine has a vCPU"))?;
        Ok(Self { vm, vcpus: fds, msrs, words, slots, buffer: Vec::new() })
    }

    fn live(mut self, orders: &Receiver<()>, answers: &Sender<Answer>, measure: &AtomicBool) {
        while orders.recv().is_ok() {
            loop {
                let ran = self.vcpus.first_mut().expect("a machine has a vCPU").run().map(|exit| format!("{exit:?}"));
                let out = Instant::now();
                let answer = match ran {
                    Err(e) if e.errno() == libc::EINTR && measure.load(Ordering::SeqCst) => self.measure(out),
                    Err(e) if e.errno() == libc::EINTR => Ok(Answer::Parked),
                    Err(e) => Err(BenchError::Wrong(format!("KVM_RUN: {e}"))),
                    Ok(exit) => Err(BenchError::Wrong(format!("KVM_RUN: {exit}"))),
                };
                let answer = answer.unwrap_or_else(|e| Answer::Failed(e.to_string()));
                let goes_on = matches!(answer, Answer::Measured(_));
                // Nobody listens any more: the floor is being dropped.
                if answers.try_send(answer).is_err() || !goes_on {
                    break;
                }
            }
        }
    }

    fn measure(&mut self, out: Instant) -> Result<Answer, BenchError> {
        self.read_state()?;
        let state = Instant::now();
        let mut logs = Vec::with_capacity(self.slots.len());
        for (slot, (_, bytes)) in (0u32..).zip(&self.slots) {
            logs.push(self.vm.get_dirty_log(slot, *bytes).map_err(host("KVM_GET_DIRTY_LOG"))?);
        }
        let dirty = Instant::now();
        let pages = self.copy(&logs);
        let copied = Instant::now();
        let heartbeat = self.words.word(SAID).load(Ordering::SeqCst);
        Ok(Answer::Measured(Measured { out, state, dirty, copied, pages, heartbeat }))
    }

    fn read_state(&mut self) -> Result<(), BenchError> {
        use std::hint::black_box;
        for (fd, msrs) in self.vcpus.iter().zip(&mut self.msrs) {
            black_box(fd.get_mp_state().map_err(host("KVM_GET_MP_STATE"))?);
            black_box(fd.get_regs().map_err(host("KVM_GET_REGS"))?);
            black_box(fd.get_sregs().map_err(host("KVM_GET_SREGS"))?);
            black_box(fd.get_xsave().map_err(host("KVM_GET_XSAVE"))?);
            black_box(fd.get_xcrs().map_err(host("KVM_GET_XCRS"))?);
            black_box(fd.get_debug_regs().map_err(host("KVM_GET_DEBUGREGS"))?);
            black_box(fd.get_lapic().map_err(host("KVM_GET_LAPIC"))?);
            black_box(fd.get_msrs(msrs).map_err(host("KVM_GET_MSRS"))?);
            black_box(fd.get_vcpu_events().map_err(host("KVM_GET_VCPU_EVENTS"))?);
        }
        for chip_id in 0..3 {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.vm.get_irqchip(&mut chip).map_err(host("KVM_GET_IRQCHIP"))?;
            black_box(chip);
        }
        black_box(self.vm.get_pit2().map_err(host("KVM_GET_PIT2"))?);
        black_box(self.vm.get_clock().map_err(host("KVM_GET_CLOCK"))?);
        Ok(())
    }

    /// Copies each page of the logs; their number. The buffer is warm from the second round on.
    fn copy(&mut self, logs: &[Vec<u64>]) -> usize {
        let pages: usize = logs.iter().flatten().map(|w| w.count_ones() as usize).sum();
        if self.buffer.len() < pages * PAGE_SIZE {
            self.buffer.resize(pages * PAGE_SIZE * 5 / 4, 0);
        }
        let mut into = self.buffer.as_chunks_mut::<PAGE_SIZE>().0.iter_mut();
        for ((start, _), log) in self.slots.iter().zip(logs) {
            let base = self.words.at(*start);
            for (n, word) in log.iter().enumerate() {
                let mut left = *word;
                while left != 0 {
                    let page = n * 64 + left.trailing_zeros() as usize;
                    left &= left - 1;
                    let target = into.next().expect("as many as were counted");
                    // SAFETY: KVM's log has a bit for each page of the slot, all of which is mapped at `base`; the only vCPU that runs is
                    // stopped, and the buffer is no guest memory.
                    unsafe { ptr::copy_nonoverlapping(base.add(page * PAGE_SIZE), target.as_mut_ptr(), PAGE_SIZE) };
                }
            }
        }
        std::hint::black_box(&self.buffer);
        pages
    }
}

/// A slot for each region of RAM, with its log on; its first address and its bytes. Whoever has the VM keeps `words` as long.
pub(super) fn set_slots(vm: &VmFd, words: &Words) -> Result<Vec<(u64, usize)>, BenchError> {
    let mut slots = Vec::new();
    for (slot, region) in (0u32..).zip(words.0.regions()) {
        let start = region.first.address().0;
        let slot = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: start,
            memory_size: region.pages * 4096,
            userspace_addr: u64::try_from(words.at(start).addr()).unwrap_or(u64::MAX),
        };
        // SAFETY: the mapping is as long as its region says, and who calls this keeps `words`, and with it the mapping, as long as the VM.
        unsafe { vm.set_user_memory_region(slot) }.map_err(host("KVM_SET_USER_MEMORY_REGION"))?;
        slots.push((start, usize::try_from(region.pages).unwrap_or(usize::MAX) * PAGE_SIZE));
    }
    Ok(slots)
}

/// The MSRs that the product would read: those that this vCPU lets the host read and write.
fn msr_buffer(vcpu: &VcpuFd, listed: &[u32]) -> Msrs {
    let buffer = |list: &[u32]| {
        let entries: Vec<_> = list.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        Msrs::from_entries(&entries).expect("KVM lists some hundred MSRs at most")
    };
    let accepted = |index: &&u32| {
        let mut one = buffer(&[**index]);
        vcpu.get_msrs(&mut one).is_ok_and(|n| n == 1) && vcpu.set_msrs(&one).is_ok_and(|n| n == 1)
    };
    let list: Vec<u32> = listed.iter().filter(accepted).copied().collect();
    buffer(&list)
}

/// 64-bit mode at CPL 3, interrupts off.
pub(super) fn set_registers(vcpu: &VcpuFd) -> Result<(), BenchError> {
    let mut sregs = vcpu.get_sregs().map_err(host("KVM_GET_SREGS"))?;
    let segment = |selector, type_, l| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: 1 - l,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    let data = segment(0x2b, 3, 0);
    sregs.cs = segment(0x33, 11, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr3 = PML4;
    sregs.cr4 = 0x20 | 0x600;
    sregs.cr0 = 0x8000_0033;
    sregs.efer = 0x500;
    vcpu.set_sregs(&sregs).map_err(host("KVM_SET_SREGS"))?;
    let mut regs = vcpu.get_regs().map_err(host("KVM_GET_REGS"))?;
    regs.rip = CODE;
    regs.rflags = 2;
    regs.rsi = TOLD;
    regs.r8 = SAID;
    regs.rdx = 4096;
    regs.rbx = 0;
    vcpu.set_regs(&regs).map_err(host("KVM_SET_REGS"))
}
