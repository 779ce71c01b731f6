//! Guest memory that the guest may read but not write for a while: whoever writes such a page waits in the kernel until somebody lets it
//! (userfaultfd's write-protect mode, on shared memory).
//!
//! Faults come from vCPU threads inside `KVM_RUN` and from system calls that write guest memory, so the descriptor must see faults of kernel mode: that needs
//! `/dev/userfaultfd`, `CAP_SYS_PTRACE` or `vm.unprivileged_userfaultfd = 1`. Pages that nobody has touched are protected, too: for memory of a file
//! the kernel leaves markers where a page table has no entry.
#![expect(unsafe_code, reason = "ioctls that take pointers, and a descriptor that the kernel makes")]

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Arc;

use vm_memory::GuestMemoryBackend as _;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use crate::memory::{GuestRam, PAGE_SHIFT, PageNo, RamRegion};

/// Messages read at once.
const MESSAGES: usize = 16;

/// The kernel's words (`linux/userfaultfd.h`).
mod words {
    use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

    const UFFDIO: u32 = 0xaa;
    pub(super) const UFFD_API: u64 = 0xaa;
    /// Write-protect faults are told.
    pub(super) const FEATURE_WP: u64 = 1 << 0;
    /// On memory of files, too, and where page tables have no entry.
    pub(super) const FEATURE_WP_SHARED: u64 = 1 << 12;
    pub(super) const REGISTER_MODE_WP: u64 = 1 << 1;
    pub(super) const WRITEPROTECT_ON: u64 = 1 << 0;
    pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
    /// Bytes of a `struct uffd_msg`.
    pub(super) const MESSAGE_BYTES: usize = 32;

    /// `struct uffdio_api`
    #[repr(C)]
    pub(super) struct Api {
        pub(super) api: u64,
        pub(super) features: u64,
        pub(super) ioctls: u64,
    }

    /// `struct uffdio_range`
    #[repr(C)]
    pub(super) struct Range {
        pub(super) start: u64,
        pub(super) len: u64,
    }

    /// `struct uffdio_register`
    #[repr(C)]
    pub(super) struct Register {
        pub(super) range: Range,
        pub(super) mode: u64,
        pub(super) ioctls: u64,
    }

    /// `struct uffdio_writeprotect`
    #[repr(C)]
    pub(super) struct Protection {
        pub(super) range: Range,
        pub(super) mode: u64,
    }

    ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
    ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
    ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFDIO, 0x01, Range);
    ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, Range);
    ioctl_iowr_nr!(UFFDIO_WRITEPROTECT, UFFDIO, 0x06, Protection);
    ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0x00);
}

use words::{
    Api, EVENT_PAGEFAULT, FEATURE_WP, FEATURE_WP_SHARED, MESSAGE_BYTES, Protection, REGISTER_MODE_WP, Range, Register,
    UFFD_API, UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_WRITEPROTECT, USERFAULTFD_IOC_NEW,
    WRITEPROTECT_ON,
};

/// Why guest memory cannot be write-protected.
#[derive(Debug, thiserror::Error)]
pub enum WriteProtectError {
    /// This process may not have a descriptor that sees faults of kernel mode.
    #[error(
        "userfaultfd is not to be had ({0}): it needs /dev/userfaultfd, CAP_SYS_PTRACE or vm.unprivileged_userfaultfd = 1"
    )]
    NotPermitted(#[source] io::Error),
    /// The kernel's userfaultfd cannot do this.
    #[error("this kernel's userfaultfd cannot write-protect shared memory: it needs Linux 5.19 or later")]
    NotOffered,
    /// The kernel refused a call.
    #[error("userfaultfd: {call} failed: {source}")]
    Host {
        /// The call.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// It was given up because of an earlier failure: nothing is protected any more.
    #[error("write protection was given up")]
    GivenUp,
}

/// Adjacent pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The first of them.
    pub first: PageNo,
    /// How many.
    pub pages: u64,
}

impl PageRun {
    /// A single page.
    pub const fn one(page: PageNo) -> Self {
        Self { first: page, pages: 1 }
    }
}

/// A region of RAM and where it is mapped in this process.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    region: RamRegion,
    host: u64,
}

impl Mapped {
    fn range(&self) -> Range {
        Range { start: self.host, len: self.region.pages << PAGE_SHIFT }
    }
}

/// Write protection over all of a machine's RAM, which is protected nowhere at first. Dropping it protects nothing any more, and wakes all that waited.
#[derive(Debug)]
pub struct WriteProtect {
    descriptor: File,
    mapped: Vec<Mapped>,
    /// Mapped for as long as it is registered.
    _ram: Arc<GuestRam>,
}

impl WriteProtect {
    /// Whether this process on this host can have it.
    ///
    /// # Errors
    /// See [`WriteProtectError`].
    pub fn probe() -> Result<(), WriteProtectError> {
        open().map(drop)
    }

    /// Over `ram`.
    ///
    /// # Errors
    /// See [`WriteProtectError`].
    pub fn over(ram: &Arc<GuestRam>) -> Result<Self, WriteProtectError> {
        let descriptor = open()?;
        let hosts = ram.tracked().iter().map(|region| region.as_ptr().expose_provenance() as u64);
        let mapped: Vec<_> =
            ram.regions().iter().zip(hosts).map(|(region, host)| Mapped { region: *region, host }).collect();
        let this = Self { descriptor, mapped, _ram: Arc::clone(ram) };
        for mapped in &this.mapped {
            let mut register = Register { range: mapped.range(), mode: REGISTER_MODE_WP, ioctls: 0 };
            // SAFETY: the kernel reads and writes a `struct uffdio_register`, which this is. The range is RAM that this process mapped and `_ram`
            // keeps mapped; registering it changes no byte, and only delays writers once a page is protected.
            let done = unsafe { ioctl_with_mut_ref(&this.descriptor, UFFDIO_REGISTER(), &mut register) };
            check("UFFDIO_REGISTER", done)?;
        }
        Ok(this)
    }

    /// From now on, whoever writes one of these pages waits.
    ///
    /// # Errors
    /// See [`WriteProtectError`]; some of the pages may be protected.
    ///
    /// # Panics
    /// When they are not RAM of this machine.
    pub fn protect(&self, run: PageRun) -> Result<(), WriteProtectError> {
        self.set(run, WRITEPROTECT_ON)
    }

    /// Lets these pages be written, and wakes all that wait for one of them.
    ///
    /// # Errors
    /// See [`WriteProtectError`]; some of the pages may still be protected.
    ///
    /// # Panics
    /// When they are not RAM of this machine.
    pub fn unprotect(&self, run: PageRun) -> Result<(), WriteProtectError> {
        self.set(run, 0)
    }

    /// Lets whoever waits for one of these pages look again: it goes on if the page may be written by now, and is told anew if not. Whoever is told and will
    /// not unprotect the page *after that* owes this: the kernel puts a writer to sleep that comes just after its page was let go, because the page table may
    /// still say read-only then (a clean page of shared memory becomes writable with its first write only), and nobody would wake it.
    ///
    /// # Errors
    /// See [`WriteProtectError`].
    ///
    /// # Panics
    /// When they are not RAM of this machine.
    pub fn wake(&self, run: PageRun) -> Result<(), WriteProtectError> {
        let range = self.range_of(run);
        // SAFETY: the kernel reads a `struct uffdio_range`, which this is, and changes no byte of memory.
        let done = unsafe { ioctl_with_ref(&self.descriptor, UFFDIO_WAKE(), &range) };
        check("UFFDIO_WAKE", done)
    }

    /// Where pages are mapped.
    fn range_of(&self, run: PageRun) -> Range {
        let holds = |mapped: &&Mapped| {
            let Mapped { region, .. } = mapped;
            run.first >= region.first && run.first.0 + run.pages <= region.first.0 + region.pages
        };
        let mapped = self.mapped.iter().find(holds).expect("adjacent pages of RAM");
        let start = mapped.host + ((run.first.0 - mapped.region.first.0) << PAGE_SHIFT);
        Range { start, len: run.pages << PAGE_SHIFT }
    }

    fn set(&self, run: PageRun, mode: u64) -> Result<(), WriteProtectError> {
        let mut protection = Protection { range: self.range_of(run), mode };
        loop {
            // SAFETY: the kernel reads a `struct uffdio_writeprotect`, which this is, and changes no byte of memory.
            let done = unsafe { ioctl_with_mut_ref(&self.descriptor, UFFDIO_WRITEPROTECT(), &mut protection) };
            match check("UFFDIO_WRITEPROTECT", done) {
                // The process's mappings are changing: it wants to be asked again.
                Err(WriteProtectError::Host { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }

    /// The pages that somebody waits to write and that were not told before; none when nobody does. Does not wait: see [`AsFd`] for what to poll.
    ///
    /// # Errors
    /// See [`WriteProtectError`].
    pub fn wanted(&self) -> Result<Vec<PageNo>, WriteProtectError> {
        let mut messages = [0; MESSAGES * MESSAGE_BYTES];
        let read = match (&self.descriptor).read(&mut messages) {
            Ok(read) => read,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(source) => return Err(WriteProtectError::Host { call: "read", source }),
        };
        let messages = messages.as_chunks::<MESSAGE_BYTES>().0.iter().take(read / MESSAGE_BYTES);
        Ok(messages.filter_map(|message| self.page_of(message)).collect())
    }

    /// `struct uffd_msg`: the event in its first byte, for a fault the address in its third word.
    fn page_of(&self, message: &[u8; MESSAGE_BYTES]) -> Option<PageNo> {
        let [_, _, address, _] = message.as_chunks::<8>().0 else { return None };
        let address = u64::from_ne_bytes(*address);
        let mapped = self.mapped.iter().find(|mapped| {
            let Range { start, len } = mapped.range();
            (start..start + len).contains(&address)
        })?;
        let page = mapped.region.first.0 + ((address - mapped.host) >> PAGE_SHIFT);
        (message[0] == EVENT_PAGEFAULT).then_some(PageNo(page))
    }

    /// Protects nothing any more, for good, and wakes all that waited. Every later call fails.
    pub fn give_up(&self) {
        for mapped in &self.mapped {
            let range = mapped.range();
            // SAFETY: the kernel reads a `struct uffdio_range`, which this is, and changes no byte of memory.
            let done = unsafe { ioctl_with_ref(&self.descriptor, UFFDIO_UNREGISTER(), &range) };
            // It wakes only those who miss a page, not those who wait to write one.
            // SAFETY: the same.
            let woken = unsafe { ioctl_with_ref(&self.descriptor, UFFDIO_WAKE(), &range) };
            // An error means that it was given up already; or else the descriptor's end, which is near, does the same.
            drop((check("UFFDIO_UNREGISTER", done), check("UFFDIO_WAKE", woken)));
        }
    }
}

impl AsFd for WriteProtect {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

fn check(call: &'static str, done: i32) -> Result<(), WriteProtectError> {
    if done == 0 { Ok(()) } else { Err(WriteProtectError::Host { call, source: io::Error::last_os_error() }) }
}

/// A descriptor that sees faults of kernel mode, and has what is needed here.
fn open() -> Result<File, WriteProtectError> {
    let descriptor = from_device().or_else(|_| from_call()).map_err(WriteProtectError::NotPermitted)?;
    let mut api = Api { api: UFFD_API, features: FEATURE_WP | FEATURE_WP_SHARED, ioctls: 0 };
    // SAFETY: the kernel reads and writes a `struct uffdio_api`, which this is.
    let done = unsafe { ioctl_with_mut_ref(&descriptor, UFFDIO_API(), &mut api) };
    match check("UFFDIO_API", done) {
        // A feature that the kernel does not know is an invalid argument.
        Err(WriteProtectError::Host { source, .. }) if source.kind() == io::ErrorKind::InvalidInput => {
            Err(WriteProtectError::NotOffered)
        }
        other => other.map(|()| descriptor),
    }
}

const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;

fn from_device() -> io::Result<File> {
    let device = File::options().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/userfaultfd")?;
    let flags = std::ffi::c_ulong::try_from(FLAGS).map_err(io::Error::other)?;
    // SAFETY: this ioctl takes flags and makes a descriptor.
    let made = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags) };
    owned(made)
}

fn from_call() -> io::Result<File> {
    // SAFETY: this call takes flags and makes a descriptor.
    let made = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
    owned(i32::try_from(made).map_err(io::Error::other)?)
}

fn owned(made: i32) -> io::Result<File> {
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor, and nobody else has it.
    Ok(unsafe { File::from_raw_fd(made) })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::memory::PAGE_SIZE;

    const PATIENCE: Duration = Duration::from_secs(10);
    const RUN: PageRun = PageRun { first: PageNo(10), pages: 4 };

    /// RAM of which pages 0 to 11 were touched and the rest never.
    fn ram() -> Arc<GuestRam> {
        let ram = GuestRam::new(4 << 20).unwrap();
        (0..12).for_each(|page| ram.copy_in(PageNo(page), &[1; PAGE_SIZE]).unwrap());
        Arc::new(ram)
    }

    fn first_byte(ram: &GuestRam, page: u64) -> u8 {
        let mut bytes = [0; PAGE_SIZE];
        ram.copy_out(PageNo(page), &mut bytes).unwrap();
        bytes[0]
    }

    /// Threads that write 7 to these pages, one each, and how many of them have done so.
    fn writers(ram: &Arc<GuestRam>, pages: &[u64]) -> (Vec<thread::JoinHandle<()>>, Arc<AtomicU64>) {
        let done = Arc::new(AtomicU64::new(0));
        let start = |page: &u64| {
            let (ram, done, page) = (Arc::clone(ram), Arc::clone(&done), PageNo(*page));
            thread::spawn(move || {
                ram.copy_in(page, &[7; PAGE_SIZE]).unwrap();
                done.fetch_add(1, Ordering::AcqRel);
            })
        };
        (pages.iter().map(start).collect(), done)
    }

    fn told(protect: &WriteProtect, count: usize) -> Vec<u64> {
        let (mut pages, began) = (Vec::new(), Instant::now());
        while pages.len() < count {
            pages.extend(protect.wanted().unwrap().iter().map(|page| page.0));
            assert!(began.elapsed() < PATIENCE, "only {pages:?} were wanted");
            thread::yield_now();
        }
        pages.sort_unstable();
        pages
    }

    /// Pages 12 and 13 have no entry in any page table: they are protected all the same.
    #[test]
    fn writers_of_protected_pages_wait_and_all_others_do_not() {
        let ram = ram();
        let protect = WriteProtect::over(&ram).unwrap();
        protect.protect(RUN).unwrap();
        let (others, done) = writers(&ram, &[9, 14, 700]);
        others.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(done.load(Ordering::Acquire), 3);
        let (waiting, done) = writers(&ram, &[10, 11, 12, 13]);
        assert_eq!(told(&protect, 4), [10, 11, 12, 13]);
        assert_eq!(done.load(Ordering::Acquire), 0);
        // Who reads does not wait, wherever the page is.
        assert_eq!([10, 11, 12, 13].map(|page| first_byte(&ram, page)), [1, 1, 0, 0]);
        protect.unprotect(PageRun::one(PageNo(12))).unwrap();
        while done.load(Ordering::Acquire) == 0 {
            thread::yield_now();
        }
        assert_eq!([11, 12, 13].map(|page| first_byte(&ram, page)), [1, 7, 0]);
        protect.unprotect(RUN).unwrap();
        waiting.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!([10, 11, 12, 13].map(|page| first_byte(&ram, page)), [7; 4]);
        assert_eq!(protect.wanted().unwrap(), []);
    }

    /// A page that was read after it was protected, and one that was let go and protected again.
    #[test]
    fn protection_outlives_reading_and_comes_back() {
        let ram = ram();
        let protect = WriteProtect::over(&ram).unwrap();
        for _ in 0..3 {
            protect.protect(RUN).unwrap();
            assert_eq!(first_byte(&ram, 13) % 7, 0);
            let (waiting, done) = writers(&ram, &[10, 13]);
            assert_eq!(told(&protect, 2), [10, 13]);
            assert_eq!(done.load(Ordering::Acquire), 0);
            protect.unprotect(RUN).unwrap();
            waiting.into_iter().for_each(|thread| thread.join().unwrap());
        }
    }

    #[test]
    fn whoever_waits_goes_on_when_it_is_given_up_or_dropped() {
        for dropped in [false, true] {
            let ram = ram();
            let protect = WriteProtect::over(&ram).unwrap();
            protect.protect(RUN).unwrap();
            let (waiting, _) = writers(&ram, &[10, 12]);
            assert_eq!(told(&protect, 2), [10, 12]);
            if dropped {
                drop(protect);
            } else {
                protect.give_up();
                assert!(protect.protect(RUN).is_err(), "it is over for good");
                protect.give_up();
            }
            waiting.into_iter().for_each(|thread| thread.join().unwrap());
            let (free, done) = writers(&ram, &[11, 13]);
            free.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(done.load(Ordering::Acquire), 2);
            // And anew.
            WriteProtect::over(&ram).unwrap().protect(RUN).unwrap();
        }
    }
}
