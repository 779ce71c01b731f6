//! A disk that loses power, and a server on it.

use kv::log::{Blocks, IoFailed, Job, OpenError, SECTOR};
use kv::resp::OutOfMemory;
use kv::{AppendFsync, Args, Database, DiskJob, Machine, Out, Outcome, Parsed, Session, Store, parse};

/// Answers for the machine.
pub(crate) struct NoMachine;

impl Machine for NoMachine {
    fn uptime_ms(&self) -> u64 {
        0
    }
    fn counters(&self, _: &mut dyn FnMut(&str, u64)) {}
    fn dirty(&mut self, _: u64, _: Option<u64>) -> Result<(), OutOfMemory> {
        Ok(())
    }
    fn work(&mut self, _: bool) {}
    fn connected(&self) -> usize {
        0
    }
    fn heap_used(&self) -> usize {
        0
    }
    fn power_off(&mut self) {}
    fn crash(&mut self) {}
    fn disk(&mut self, _: u64, _: DiskJob) -> Result<(), &'static str> {
        Err("ERR no")
    }
    fn disks(&self, _: &mut dyn FnMut(&str, u64)) {}
}

pub(crate) fn mix(mut seed: u64) -> u64 {
    seed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    seed = (seed ^ (seed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    seed ^ (seed >> 31)
}

pub(crate) fn pick(seed: u64, of: usize) -> usize {
    usize::try_from(mix(seed) % of as u64).unwrap()
}

/// What is on stable storage, and what is on its way there.
pub(crate) struct Disk {
    pub(crate) stable: Vec<u8>,
    /// Written and not flushed.
    cached: Vec<(usize, Vec<u8>)>,
    /// Jobs, each with the number of cached writes when it was begun.
    jobs: Vec<(Job, usize)>,
    /// Every job fails.
    pub(crate) fails: bool,
}

impl Disk {
    pub(crate) fn new(sectors: u64) -> Self {
        let stable = vec![0; usize::try_from(sectors).unwrap() * SECTOR];
        Self { stable, cached: Vec::new(), jobs: Vec::new(), fails: false }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.stable[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Completes one job, whichever.
    pub(crate) fn step(&mut self, database: &mut Database, seed: u64) {
        let cached = self.cached.len();
        while let Some(job) = database.poll() {
            self.jobs.push((job, cached));
        }
        if self.jobs.is_empty() {
            return;
        }
        let (job, covered) = self.jobs.swap_remove(pick(seed, self.jobs.len()));
        let result = if self.fails { Err(IoFailed) } else { Ok(()) };
        match job {
            Job::Write { id, sector, bytes } => {
                if !self.fails {
                    self.cached.push((usize::try_from(sector).unwrap() * SECTOR, bytes.clone()));
                }
                database.completed(id, result, Some(bytes));
            }
            Job::Flush { id } => {
                if !self.fails {
                    let flushed: Vec<_> = self.cached.drain(..covered).collect();
                    flushed.iter().for_each(|(at, bytes)| self.put(*at, bytes));
                    self.jobs.iter_mut().for_each(|(_, count)| *count = count.saturating_sub(covered));
                }
                database.completed(id, result, None);
            }
        }
    }

    /// A copy, with nothing under way but writes.
    pub(crate) fn fork(&self) -> Self {
        let write = |(job, _): &(Job, usize)| match job {
            Job::Write { sector, bytes, .. } => Some((usize::try_from(*sector).unwrap() * SECTOR, bytes.clone())),
            Job::Flush { .. } => None,
        };
        let cached = self.cached.iter().cloned().chain(self.jobs.iter().filter_map(write)).collect();
        Self { stable: self.stable.clone(), cached, jobs: Vec::new(), fails: false }
    }

    /// The power goes: of what was not flushed each sector is written or not.
    pub(crate) fn crash(&mut self, seed: u64) {
        let jobs = std::mem::take(&mut self.jobs).into_iter().filter_map(|(job, _)| match job {
            Job::Write { sector, bytes, .. } => Some((usize::try_from(sector).unwrap() * SECTOR, bytes)),
            Job::Flush { .. } => None,
        });
        let lost: Vec<_> = std::mem::take(&mut self.cached).into_iter().chain(jobs).collect();
        let mut seed = seed;
        for (at, bytes) in lost {
            for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                seed = mix(seed.wrapping_add(1));
                if !seed.is_multiple_of(3) {
                    self.put(at + index * SECTOR, sector);
                }
            }
        }
    }
}

impl Blocks for &mut Disk {
    fn sectors(&self) -> u64 {
        (self.stable.len() / SECTOR) as u64
    }

    fn read(&mut self, sector: u64, into: &mut [u8]) -> Result<(), IoFailed> {
        let at = usize::try_from(sector).unwrap() * SECTOR;
        into.copy_from_slice(&self.stable[at..at + into.len()]);
        Ok(())
    }
}

/// Starts a machine with the disk.
pub(crate) fn open(disk: &mut Disk, policy: AppendFsync) -> Result<Database, OpenError> {
    let mut disk = disk;
    Database::open(Store::new(7), &mut disk, 99, false, policy, &mut NoMachine)
}

/// Runs a command: its reply, and the ticket that it waits for. `None` if it has to be run again.
pub(crate) fn ask(database: &mut Database, line: &str) -> Option<(String, u64)> {
    let (mut args, mut out) = (Args::new(), Out::new());
    let words: Vec<_> = line.split(' ').map(|word| format!("${}\r\n{word}\r\n", word.len())).collect();
    let request = format!("*{}\r\n{}", words.len(), words.concat());
    assert_eq!(parse(request.as_bytes(), &mut args), Ok(Parsed::Request(request.len())));
    let ran = database.run(&mut NoMachine, &Session { id: 1 }, request.as_bytes(), &args, &mut out);
    if ran.outcome == Outcome::Stall {
        return None;
    }
    Some((String::from_utf8(out.bytes().to_vec()).unwrap(), ran.until))
}
