//! The disks: whose requests they are, and the work on them that clients ask for.

use alloc::boxed::Box;
use alloc::vec::Vec;

use kv::load::{Io, Load, Pattern, Spec};
use kv::log::{IoFailed, Job, SECTOR};
use kv::{Database, DiskJob, Out};
use xxhash_rust::xxh3::Xxh3;

use crate::blk::{Blk, Finished, Op};
use crate::boot;
use crate::clock::Clock;

/// Most disks.
pub(crate) const MAX_DISKS: usize = 4;
/// Bytes that a digest reads at once.
const SUM_READ: usize = 128 << 10;

/// Whose request it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tag {
    /// Whoever starts the guest.
    Boot,
    /// The log's, with its number.
    Log(u64),
    /// A load's, and when it was begun, in nanoseconds since boot.
    Load(Io, u64),
    /// The digest's.
    Sum,
}

/// A load, and where it goes.
struct Running {
    load: Load,
    disk: usize,
    /// Buffers that are not in use.
    buffers: Vec<Vec<u8>>,
    stamp: u64,
}

/// A digest of all disks.
struct Sum {
    disk: usize,
    sector: u64,
    hasher: Box<Xxh3>,
    /// One for each disk that is done; `None` if it could not be read.
    digests: Vec<Option<u128>>,
    /// Empty while a read is under way.
    buffer: Vec<u8>,
    reading: bool,
}

enum Work {
    Load(Running),
    Sum(Sum),
}

/// All disks.
pub(crate) struct Disks {
    pub(crate) disks: Vec<Blk>,
    /// The first sector of disk 0 behind the log.
    pub(crate) log_end: u64,
    work: Option<(u64, Work)>,
    reads: u64,
    writes: u64,
    flushes: u64,
    errors: u64,
}

fn buffer(length: usize) -> Option<Vec<u8>> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(length).ok()?;
    buffer.resize(length, 0);
    Some(buffer)
}

impl Disks {
    pub(crate) fn new(disks: Vec<Blk>) -> Self {
        Self { disks, log_end: 0, work: None, reads: 0, writes: 0, flushes: 0, errors: 0 }
    }

    /// Says what there is.
    pub(crate) fn describe(&self, line: &mut dyn FnMut(&str, u64)) {
        const NAMES: [[&str; 2]; MAX_DISKS] = [
            ["disk0_bytes", "disk0_read_only"],
            ["disk1_bytes", "disk1_read_only"],
            ["disk2_bytes", "disk2_read_only"],
            ["disk3_bytes", "disk3_read_only"],
        ];
        line("disks", self.disks.len() as u64);
        for ([bytes, read_only], disk) in NAMES.iter().zip(&self.disks) {
            line(bytes, disk.sectors().saturating_mul(SECTOR as u64));
            line(read_only, u64::from(disk.is_read_only()));
        }
        line("disk_reads", self.reads);
        line("disk_writes", self.writes);
        line("disk_flushes", self.flushes);
        line("disk_errors", self.errors);
    }

    /// Begins what a client asks for.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn begin(&mut self, session: u64, job: DiskJob, now: u64) -> Result<(), &'static str> {
        if self.disks.is_empty() {
            return Err("ERR there is no disk");
        }
        if self.work.is_some() {
            return Err("BUSY another FT.DISK is under way");
        }
        let work = match job {
            DiskJob::Load(spec) => Work::Load(self.load(spec, now)?),
            DiskJob::Sum => {
                let buffer = buffer(SUM_READ).ok_or("OOM no memory for a buffer")?;
                let hasher = Box::new(Xxh3::new());
                Work::Sum(Sum { disk: 0, sector: 0, hasher, digests: Vec::new(), buffer, reading: false })
            }
        };
        self.work = Some((session, work));
        Ok(())
    }

    fn load(&self, spec: Spec, now: u64) -> Result<Running, &'static str> {
        let disk = usize::from(self.disks.len() > 1);
        let target = self.disks.get(disk).ok_or("ERR there is no disk")?;
        if target.is_read_only() && spec.pattern != Pattern::RandomRead {
            return Err("ERR the disk is read-only");
        }
        let first = if disk == 0 { self.log_end } else { 0 };
        let load = Load::new(spec, first, target.sectors(), boot::tsc(), now).ok_or("ERR the disk is too small")?;
        let mut buffers = Vec::new();
        let mut word = boot::tsc() | 1;
        for _ in 0..spec.depth {
            let mut buffer = buffer(spec.block).ok_or("OOM no memory for buffers")?;
            for bytes in buffer.chunks_exact_mut(8) {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                bytes.copy_from_slice(&(word >> 7).to_le_bytes());
            }
            buffers.push(buffer);
        }
        Ok(Running { load, disk, buffers, stamp: boot::tsc() })
    }

    /// Takes what the disks have done.
    pub(crate) fn collect(&mut self, database: &mut Database, clock: &Clock) {
        for disk in &mut self.disks {
            while let Some(Finished { tag, data, result }) = disk.finished() {
                self.errors += u64::from(result.is_err());
                match (tag, &mut self.work) {
                    (Tag::Log(id), _) => {
                        let bytes = Some(data).filter(|bytes| !bytes.is_empty());
                        database.completed(id, result, bytes);
                    }
                    (Tag::Load(io, begun), Some((_, Work::Load(running)))) => {
                        if io != Io::Flush {
                            running.buffers.push(data);
                        }
                        running.load.completed(io, begun, clock.now_ns(), result.is_ok());
                    }
                    (Tag::Sum, Some((_, Work::Sum(sum)))) => sum.read(data, result),
                    _ => {}
                }
            }
        }
    }

    /// Gives the disks what is to be done.
    pub(crate) fn submit(&mut self, database: &mut Database, clock: &Clock) {
        if let Some(disk) = self.disks.first_mut() {
            while disk.has_room()
                && let Some(job) = database.poll()
            {
                match job {
                    Job::Write { id, sector, bytes } => {
                        self.writes += 1;
                        disk.submit(Op::Write, sector, bytes, Tag::Log(id));
                    }
                    Job::Flush { id } => {
                        self.flushes += 1;
                        disk.submit(Op::Flush, 0, Vec::new(), Tag::Log(id));
                    }
                }
            }
        }
        match &mut self.work {
            Some((_, Work::Load(_))) => self.submit_load(clock.now_ns()),
            Some((_, Work::Sum(_))) => self.submit_sum(),
            None => {}
        }
        self.disks.iter_mut().for_each(Blk::kick);
    }

    fn submit_load(&mut self, now: u64) {
        let Some((_, Work::Load(running))) = &mut self.work else { return };
        let Some(disk) = self.disks.get_mut(running.disk) else { return };
        while disk.has_room()
            && let Some(io) = running.load.next(now)
        {
            let tag = Tag::Load(io, now);
            match io {
                Io::Flush => {
                    self.flushes += 1;
                    disk.submit(Op::Flush, 0, Vec::new(), tag);
                }
                Io::Read(sector) => {
                    self.reads += 1;
                    disk.submit(Op::Read, sector, running.buffers.pop().unwrap_or_default(), tag);
                }
                Io::Write(sector) => {
                    self.writes += 1;
                    let mut data = running.buffers.pop().unwrap_or_default();
                    for bytes in data.chunks_exact_mut(SECTOR) {
                        running.stamp = running.stamp.wrapping_add(1);
                        bytes[..8].copy_from_slice(&running.stamp.to_le_bytes());
                    }
                    disk.submit(Op::Write, sector, data, tag);
                }
            }
        }
    }

    fn submit_sum(&mut self) {
        let Some((_, Work::Sum(sum))) = &mut self.work else { return };
        while !sum.reading
            && let Some(disk) = self.disks.get_mut(sum.disk)
        {
            let left = disk.sectors().saturating_sub(sum.sector);
            if left == 0 {
                sum.end_disk(true);
                continue;
            }
            if !disk.has_room() {
                return;
            }
            let length = usize::try_from(left).unwrap_or(usize::MAX).min(SUM_READ / SECTOR) * SECTOR;
            // Its memory was reserved at the start.
            sum.buffer.resize(length, 0);
            sum.reading = true;
            self.reads += 1;
            disk.submit(Op::Read, sum.sector, core::mem::take(&mut sum.buffer), Tag::Sum);
        }
    }

    /// Whether what a client asked for is done and not answered yet.
    pub(crate) fn has_answer(&self, now: u64) -> bool {
        match &self.work {
            Some((_, Work::Load(running))) => running.load.is_done(now),
            Some((_, Work::Sum(sum))) => !sum.reading && sum.disk >= self.disks.len(),
            None => false,
        }
    }

    /// The reply to what a client asked for, when it is done, and the client's session.
    pub(crate) fn answer(&mut self, now: u64) -> Option<(u64, Vec<u8>)> {
        let done = self.has_answer(now);
        let (session, work) = self.work.take_if(|_| done)?;
        let mut out = Out::new();
        match work {
            Work::Load(running) => running.load.report(&mut out),
            Work::Sum(sum) => {
                out.array(sum.digests.len());
                for digest in sum.digests {
                    match digest {
                        Some(digest) => out.bulk(&hex(digest)),
                        None => out.error("EIO the disk cannot be read"),
                    }
                }
            }
        }
        Some((session, out.take()))
    }

    /// Lets the disks interrupt, before a sleep. True if they have left something to do already.
    pub(crate) fn enable_interrupts(&mut self) -> bool {
        self.disks.iter_mut().filter(|disk| disk.is_busy()).any(|disk| disk.set_interrupts(true))
    }

    /// Asks the disks not to interrupt: their rings are looked at anyway.
    pub(crate) fn disable_interrupts(&mut self) {
        for disk in &mut self.disks {
            disk.set_interrupts(false);
        }
    }
}

impl Sum {
    fn read(&mut self, data: Vec<u8>, result: Result<(), IoFailed>) {
        self.reading = false;
        if result.is_ok() {
            self.hasher.update(&data);
            self.sector += (data.len() / SECTOR) as u64;
        } else {
            self.end_disk(false);
        }
        self.buffer = data;
    }

    fn end_disk(&mut self, whole: bool) {
        self.digests.push(whole.then(|| self.hasher.digest128()));
        self.hasher.reset();
        self.disk += 1;
        self.sector = 0;
    }
}

fn hex(digest: u128) -> [u8; 32] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = [0; 32];
    for (byte, shift) in text.iter_mut().zip((0..32).rev()) {
        *byte = DIGITS[usize::try_from((digest >> (4 * shift)) & 15).unwrap_or(0)];
    }
    text
}
