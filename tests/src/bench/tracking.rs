//! `ftbench tracking`: what it costs to know which pages a guest wrote, by each way that KVM offers. A plain VM with the guest of [`super::floor`], which writes one
//! word to so many pages and says so; then it is stopped and what it wrote is collected, as in a pause. Nothing is copied.
#![expect(unsafe_code, reason = "two ioctls with pointers to bitmaps, and the ring that KVM shares")]

use std::io;
use std::os::fd::AsRawFd as _;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_PAGE_OFFSET, KVM_MAX_CPUID_ENTRIES, KVMIO,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm::GuestRam;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use super::figures::Spread;
use super::floor::{DATA, SAID, TOLD, Words, end_vcpu, set_registers, set_slots, write_memory};
use super::table::{Findings, Table};
use super::{BenchError, host, host_description};

mod call {
    use super::{KVMIO, ioctl_io_nr, ioctl_iowr_nr, kvm_clear_dirty_log};

    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
    ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
}
use call::{KVM_CLEAR_DIRTY_LOG, KVM_RESET_DIRTY_RINGS};

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.tracking/1";
/// Rounds before the first that counts.
const WARM_UP: u32 = 5;
/// No round lasts this long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Entries of the ring: more than any round writes pages.
const RING_ENTRIES: usize = 1 << 16;
/// `KVM_DIRTY_GFN_F_DIRTY` and `KVM_DIRTY_GFN_F_RESET`.
const GFN_DIRTY: u32 = 1;
const GFN_RESET: u32 = 2;

/// A way to know which pages were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// `KVM_GET_DIRTY_LOG`, which clears and protects what it tells.
    Plain,
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: read, then cleared and protected by a call of its own.
    Manual,
    /// The same without that call: pages that were written once stay writable, and stay in the log.
    Hot,
    /// `KVM_CAP_DIRTY_LOG_RING`: page by page, and protected by `KVM_RESET_DIRTY_RINGS`.
    Ring,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Plain, Self::Manual, Self::Hot, Self::Ring];

    /// For people.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Plain => "dirty log",
            Self::Manual => "manual clear",
            Self::Hot => "hot pages",
            Self::Ring => "dirty ring",
        }
    }

    fn capability(self) -> Option<kvm_enable_cap> {
        let (cap, first) = match self {
            Self::Plain => return None,
            Self::Manual | Self::Hot => (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1),
            Self::Ring => {
                let bytes = RING_ENTRIES * size_of::<kvm_dirty_gfn>();
                (KVM_CAP_DIRTY_LOG_RING, u64::try_from(bytes).unwrap_or(u64::MAX))
            }
        };
        Some(kvm_enable_cap { cap, args: [first, 0, 0, 0], ..Default::default() })
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Pages that the guest writes in a round.
    pub pages: Vec<u32>,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// Rounds of each method in each run.
    pub samples: u32,
    /// Runs, each with VMs of its own.
    pub runs: u32,
}

/// The result.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Report {
    pub schema: String,
    pub machine: String,
    pub memory_bytes: u64,
    pub samples: u32,
    pub runs: u32,
    pub rows: Vec<Row>,
}

/// One method with one number of pages; medians over the runs.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Row {
    pub method: Method,
    pub pages: u32,
    /// False where this host's KVM does not have the method: then there are no figures.
    pub offered: bool,
    pub guest_writes_us: Spread,
    pub collect_us: Spread,
    pub per_epoch_us: Spread,
}

/// One round.
#[derive(Clone, Copy, Debug)]
struct Round {
    writes: Duration,
    collect: Duration,
}

/// Measures; `progress` is told of each method before it begins.
///
/// # Errors
/// The first thing that goes wrong: no KVM, a method that finds other pages than were written.
pub fn run(plan: &Plan, mut progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    let machine = host_description();
    let mut cases = Vec::new();
    for &pages in &plan.pages {
        cases.extend(Method::ALL.map(|method| (method, pages)));
    }
    let mut runs: Vec<Vec<Vec<Round>>> = vec![Vec::new(); cases.len()];
    for number in 1..=plan.runs {
        for ((method, pages), runs) in cases.iter().zip(&mut runs) {
            progress(&format!("run {number} of {}: {}, {pages} pages", plan.runs, method.text()));
            runs.extend(one(plan, *method, *pages)?);
        }
    }
    let rows = cases.into_iter().zip(runs).map(|((method, pages), runs)| {
        let of = |part: fn(&Round) -> Duration| {
            Spread::of_runs(runs.iter().map(|rounds| Spread::of_us(rounds.iter().map(part))))
        };
        Row {
            method,
            pages,
            offered: !runs.is_empty(),
            guest_writes_us: of(|round| round.writes),
            collect_us: of(|round| round.collect),
            per_epoch_us: of(|round| round.writes + round.collect),
        }
    });
    Ok(Report {
        schema: SCHEMA.into(),
        machine,
        memory_bytes: plan.memory_bytes,
        samples: plan.samples,
        runs: plan.runs,
        rows: rows.collect(),
    })
}

/// All rounds of a method in one VM; `None` where KVM does not have it.
fn one(plan: &Plan, method: Method, pages: u32) -> Result<Option<Vec<Round>>, BenchError> {
    let Some(mut tracked) = Tracked::start(method, plan.memory_bytes)? else { return Ok(None) };
    let mut rounds = Vec::new();
    for n in 0..WARM_UP + plan.samples {
        let (round, found) = tracked.round(pages)?;
        // One of the pages is that of the guest's heartbeat. Before the first round it may have written another one, which then stays among the hot ones.
        let wanted = usize::try_from(pages).unwrap_or(usize::MAX);
        let more = if method == Method::Hot { 4 } else { 0 };
        if n > 0 && !(wanted..=wanted + more).contains(&found) {
            let text = method.text();
            return Err(BenchError::Wrong(format!("{text}: {found} pages were found where {wanted} were written")));
        }
        if n >= WARM_UP {
            rounds.push(round);
        }
    }
    Ok(Some(rounds))
}

/// The ring of a vCPU's dirty pages, shared with KVM.
struct Ring {
    first: *mut kvm_dirty_gfn,
    next: usize,
}

impl Ring {
    fn map(vcpu: &VcpuFd) -> Result<Self, BenchError> {
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
        let bytes = RING_ENTRIES * size_of::<kvm_dirty_gfn>();
        // SAFETY: a new mapping of a file, where the kernel chooses; nothing that exists is touched.
        let at = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), bytes, protection, libc::MAP_SHARED, vcpu.as_raw_fd(), offset)
        };
        if at == libc::MAP_FAILED {
            return Err(host("mmap")(io::Error::last_os_error()));
        }
        Ok(Self { first: at.cast(), next: 0 })
    }

    /// Takes all entries, for the kernel to reset; their number.
    fn harvest(&mut self) -> usize {
        let mut found = 0;
        loop {
            // SAFETY: the index is below the number of entries of the mapping, which lives as long as `self`.
            let entry = unsafe { self.first.add(self.next % RING_ENTRIES) };
            // SAFETY: the entry's flags are an aligned word that KVM and this thread touch whole.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            if flags.load(Ordering::Acquire) & GFN_DIRTY == 0 {
                return found;
            }
            // SAFETY: KVM wrote slot and offset before the flag, and writes them no more until the reset.
            std::hint::black_box(unsafe { ((*entry).slot, (*entry).offset) });
            flags.store(GFN_RESET, Ordering::Release);
            self.next += 1;
            found += 1;
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made, once; nobody has a pointer into it any more.
        unsafe { libc::munmap(self.first.cast(), RING_ENTRIES * size_of::<kvm_dirty_gfn>()) };
    }
}

/// The VM, its vCPU outside KVM_RUN between rounds.
struct Tracked {
    method: Method,
    vm: VmFd,
    ring: Option<Ring>,
    words: Words,
    /// First address and bytes of each slot.
    slots: Vec<(u64, usize)>,
    go: Option<Sender<()>>,
    parked: Receiver<Result<(), String>>,
    thread: Option<JoinHandle<()>>,
    rounds: u64,
}

impl Tracked {
    fn start(method: Method, memory_bytes: u64) -> Result<Option<Self>, BenchError> {
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), nothing).map_err(host("sigaction"))?;
        let kvm = Kvm::new().map_err(host("open /dev/kvm"))?;
        let vm = kvm.create_vm().map_err(host("KVM_CREATE_VM"))?;
        vm.set_identity_map_address(0xfffb_c000).map_err(host("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(0xfffb_d000).map_err(host("KVM_SET_TSS_ADDR"))?;
        if let Some(capability) = method.capability() {
            let offered = vm.check_extension_raw(u64::from(capability.cap)) > 0;
            if !offered || vm.enable_cap(&capability).is_err() {
                return Ok(None);
            }
        }
        let words = Words(Arc::new(GuestRam::new(memory_bytes)?));
        write_memory(&words, memory_bytes);
        let slots = set_slots(&vm, &words)?;
        let mut vcpu = vm.create_vcpu(0).map_err(host("KVM_CREATE_VCPU"))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(host("KVM_GET_SUPPORTED_CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(host("KVM_SET_CPUID2"))?;
        set_registers(&vcpu)?;
        let ring = (method == Method::Ring).then(|| Ring::map(&vcpu)).transpose()?;
        let (go, orders) = bounded::<()>(1);
        let (tell, parked) = bounded(4);
        let live = move || {
            while orders.recv().is_ok() {
                let left = match vcpu.run() {
                    Err(error) if error.errno() == libc::EINTR => Ok(()),
                    Err(error) => Err(format!("KVM_RUN: {error}")),
                    Ok(exit) => Err(format!("KVM_RUN: {exit:?}")),
                };
                // Nobody listens any more: the VM is being dropped.
                if tell.try_send(left).is_err() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("tracked".into()).spawn(live).map_err(host("a thread"))?;
        let (go, thread) = (Some(go), Some(thread));
        Ok(Some(Self { method, vm, ring, words, slots, go, parked, thread, rounds: 0 }))
    }

    /// Lets the guest write to so many pages, stops it, and collects. The pages that were found.
    fn round(&mut self, pages: u32) -> Result<(Round, usize), BenchError> {
        let word = |at| self.words.word(at);
        let wrong = |what: &str| BenchError::Wrong(format!("{}: {what}", self.method.text()));
        let room = self.words.0.page_count().saturating_sub(DATA / 4096);
        let count = u64::from(pages).saturating_sub(1);
        if count == 0 || count > room || pages as usize >= RING_ENTRIES {
            return Err(wrong(&format!("{pages} pages cannot be written in a round")));
        }
        let beat = word(SAID).load(Ordering::SeqCst);
        self.go.as_ref().expect("taken by drop only").send(()).map_err(|_| wrong("its thread is gone"))?;
        self.wait("to run", || word(SAID).load(Ordering::SeqCst) != beat)?;
        let next = self.rounds + 1;
        word(TOLD + 8).store(count, Ordering::SeqCst);
        word(TOLD + 16).store(DATA, Ordering::SeqCst);
        let told = Instant::now();
        word(TOLD).store(next, Ordering::SeqCst);
        self.wait("to write its pages", || word(SAID + 8).load(Ordering::SeqCst) == next)?;
        let writes = told.elapsed();
        let thread = self.thread.as_ref().expect("taken by drop only");
        thread.kill(SIGRTMIN()).map_err(host("pthread_kill"))?;
        match self.parked.recv_timeout(PATIENCE) {
            Ok(Ok(())) => {}
            Ok(Err(why)) => return Err(wrong(&why)),
            Err(_) => return Err(wrong("the guest does not stop")),
        }
        self.rounds = next;
        let began = Instant::now();
        let found = self.collect()?;
        Ok((Round { writes, collect: began.elapsed() }, found))
    }

    fn collect(&mut self) -> Result<usize, BenchError> {
        if let Some(ring) = &mut self.ring {
            let found = ring.harvest();
            // SAFETY: the call takes no pointer.
            let reset = unsafe { ioctl(&self.vm, KVM_RESET_DIRTY_RINGS()) };
            return if reset < 0 { Err(host("KVM_RESET_DIRTY_RINGS")(io::Error::last_os_error())) } else { Ok(found) };
        }
        let mut found = 0;
        for (slot, (_, bytes)) in (0u32..).zip(&self.slots) {
            let log = self.vm.get_dirty_log(slot, *bytes).map_err(host("KVM_GET_DIRTY_LOG"))?;
            found += log.iter().map(|word| word.count_ones() as usize).sum::<usize>();
            if self.method == Method::Manual {
                self.clear(slot, &log)?;
            }
        }
        Ok(found)
    }

    /// Clears what was read, from the first word with a bit to the last.
    fn clear(&self, slot: u32, log: &[u64]) -> Result<(), BenchError> {
        let Some(first) = log.iter().position(|word| *word != 0) else { return Ok(()) };
        let last = log.iter().rposition(|word| *word != 0).unwrap_or(first);
        let part = &log[first..=last];
        let request = kvm_clear_dirty_log {
            slot,
            num_pages: u32::try_from(part.len() * 64).expect("a slot has fewer than 2^32 pages"),
            first_page: u64::try_from(first * 64).unwrap_or(u64::MAX),
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: part.as_ptr().cast_mut().cast() },
        };
        // SAFETY: KVM reads `num_pages` bits of `part`, which has them, and writes none.
        match unsafe { ioctl_with_ref(&self.vm, KVM_CLEAR_DIRTY_LOG(), &request) } {
            0 => Ok(()),
            _ => Err(host("KVM_CLEAR_DIRTY_LOG")(io::Error::last_os_error())),
        }
    }

    fn wait(&self, what: &str, done: impl Fn() -> bool) -> Result<(), BenchError> {
        let began = Instant::now();
        while !done() {
            if began.elapsed() > PATIENCE || !self.parked.is_empty() {
                let why = match self.parked.try_recv() {
                    Ok(Err(why)) => why,
                    _ => format!("the guest does not come {what}"),
                };
                return Err(BenchError::Wrong(format!("{}: {why}", self.method.text())));
            }
            // On a busy host the vCPU's thread may wait for this very processor.
            std::thread::yield_now();
        }
        Ok(())
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.go = None;
        end_vcpu(&mut self.thread);
    }
}

impl Findings for Report {
    const NAME: &'static str = "tracking";

    fn tables(&self) -> Vec<Table> {
        let title = format!(
            "ways to know which pages were written, us; a bare VM of {} MiB that writes the same pages each time; medians of {} runs of {} rounds; {}",
            self.memory_bytes >> 20,
            self.runs,
            self.samples,
            self.machine
        );
        let heads = ["", "pages", "guest writes p50", "p99", "collect p50", "p99", "both p50", "p99", "max"];
        let mut table = Table::new(title, &heads);
        for row in &self.rows {
            let mut cells = vec![row.method.text().to_owned(), row.pages.to_string()];
            let Row { guest_writes_us: writes, collect_us: collect, per_epoch_us: both, .. } = row;
            let figures = [writes.p50, writes.p99, collect.p50, collect.p99, both.p50, both.p99, both.max];
            let cell = |figure: &f64| if row.offered { format!("{figure:.1}") } else { "not offered".into() };
            cells.extend(figures.iter().map(cell));
            table.row(cells);
        }
        vec![table]
    }
}
