//! The data set on a disk that loses power at any moment: what was durable is there afterwards, and nothing is there that was not written.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use kv::log::{Blocks, IoFailed, Job, MIN_DISK, OpenError, SECTOR};
use kv::resp::OutOfMemory;
use kv::{AppendFsync, Args, Database, DiskJob, Machine, Out, Outcome, Parsed, Session, Store, parse};
use proptest::prelude::*;

const KEYS: u8 = 12;

struct NoMachine;

impl Machine for NoMachine {
    fn uptime_ms(&self) -> u64 {
        0
    }
    fn counters(&self, _: &mut dyn FnMut(&str, u64)) {}
    fn dirty(&mut self, _: u64, _: Option<u64>) -> Result<(), OutOfMemory> {
        Ok(())
    }
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

fn mix(mut seed: u64) -> u64 {
    seed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    seed = (seed ^ (seed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    seed ^ (seed >> 31)
}

fn pick(seed: u64, of: usize) -> usize {
    usize::try_from(mix(seed) % of as u64).unwrap()
}

/// What is on stable storage, and what is on its way there.
struct Disk {
    stable: Vec<u8>,
    /// Written and not flushed.
    cached: Vec<(usize, Vec<u8>)>,
    /// Jobs, each with the number of cached writes when it was begun.
    jobs: Vec<(Job, usize)>,
    fails: bool,
}

impl Disk {
    fn new(sectors: u64) -> Self {
        let stable = vec![0; usize::try_from(sectors).unwrap() * SECTOR];
        Self { stable, cached: Vec::new(), jobs: Vec::new(), fails: false }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.stable[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Completes one job, whichever.
    fn step(&mut self, database: &mut Database, seed: u64) {
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

    /// The power goes: of what was not flushed each sector is written or not.
    fn crash(&mut self, seed: u64) {
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

fn open(disk: &mut Disk, policy: AppendFsync) -> Result<Database, OpenError> {
    let mut disk = disk;
    Database::open(Store::new(7), &mut disk, 99, false, policy, &mut NoMachine)
}

/// Runs a command: its reply, and the ticket that it waits for. `None` if it has to be run again.
fn ask(database: &mut Database, line: &str) -> Option<(String, u64)> {
    let (mut args, mut out) = (Args::new(), Out::new());
    let line = format!("{line}\r\n");
    assert_eq!(parse(line.as_bytes(), &mut args), Ok(Parsed::Request(line.len())));
    let ran = database.run(&mut NoMachine, &Session { id: 1 }, line.as_bytes(), &args, &mut out);
    if ran.outcome == Outcome::Stall {
        return None;
    }
    Some((String::from_utf8(out.bytes().to_vec()).unwrap(), ran.until))
}

#[derive(Debug, Clone)]
enum Step {
    Command(u8, u8, u16),
    Complete(u8, u64),
    Wait(u16),
    Crash(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        60 => (any::<u8>(), 0..KEYS, any::<u16>()).prop_map(|(kind, key, size)| Step::Command(kind, key, size)),
        50 => (1..6u8, any::<u64>()).prop_map(|(count, seed)| Step::Complete(count, seed)),
        4 => (0..3000u16).prop_map(Step::Wait),
        1 => any::<u64>().prop_map(Step::Crash),
    ]
}

fn command(kind: u8, key: u8, size: u16) -> String {
    let text = |length: u16| format!("{size:x}").repeat(usize::from(length / 4 + 1));
    match kind % 32 {
        0 => format!("DEL s{key} l{key} n{key}"),
        1 => format!("INCR n{key}"),
        2..6 => format!("RPUSH l{key} {} b{size}", text(size % 3000)),
        6 => format!("LPOP l{key} {}", size % 4),
        7 => format!("RPOP l{key}"),
        8 => format!("MSET s{key} {} n{key} {size}", text(size % 500)),
        9 => format!("APPEND s{key} {}", text(size % 100)),
        10 if size < 4000 => "FLUSHALL".into(),
        11 => format!("PEXPIRE s{key} 99999999"),
        12 => format!("GETDEL s{key}"),
        13 => format!("SETNX s{key} {size}"),
        14 => format!("SET s{key} x XX"),
        _ => format!("SET s{key} {}", text(size % 6000)),
    }
}

/// A machine, its disk, and what the disk may hold.
struct World {
    disk: Disk,
    database: Database,
    policy: AppendFsync,
    /// The digest after each change, from the one that the machine started with.
    states: Vec<u64>,
    uptime: u64,
}

impl World {
    fn new(policy: AppendFsync) -> Self {
        let mut disk = Disk::new(MIN_DISK);
        let database = open(&mut disk, policy).unwrap();
        Self { disk, database, policy, states: vec![0], uptime: 0 }
    }

    fn changes(&self) -> u64 {
        self.states.len() as u64 - 1
    }

    fn complete(&mut self, count: u8, seed: u64) {
        for index in 0..count {
            self.database.work();
            self.disk.step(&mut self.database, seed.wrapping_add(index.into()));
        }
    }

    /// Runs a command until it is run, and notes what it changed.
    fn command(&mut self, line: &str) -> (String, u64) {
        let mut tries = 0;
        let done = loop {
            match ask(&mut self.database, line) {
                Some(done) => break done,
                None => {
                    tries += 1;
                    assert!(tries < 10_000, "{line} waits for ever");
                    self.complete(1, tries);
                }
            }
        };
        let digest = self.database.store().digest();
        if self.database.changes() > self.changes() {
            self.states.push(digest);
        }
        assert_eq!(*self.states.last().unwrap(), digest, "{line} changed something that is not logged");
        done
    }

    /// Loses power, starts again and looks at what is there.
    fn crash(&mut self, seed: u64) {
        let durable = self.database.durable();
        self.disk.crash(seed);
        self.database = open(&mut self.disk, self.policy).unwrap();
        let digest = self.database.store().digest();
        let from = usize::try_from(durable).unwrap();
        let found = self.states.iter().position(|state| *state == digest);
        assert!(
            self.states[from..].contains(&digest),
            "{durable} of {} changes were durable, {found:?} found; {:?} records",
            self.changes(),
            self.database.replayed()
        );
        (self.states, self.uptime) = (vec![digest], 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, max_shrink_iters: 20000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_durable_is_lost(steps in prop::collection::vec(step(), 50..900), policy in 0..3usize) {
        let policies = [AppendFsync::Always, AppendFsync::EverySecond, AppendFsync::Never];
        let mut world = World::new(policies[policy]);
        for step in steps {
            match step {
                Step::Command(kind, key, size) => {
                    let (reply, until) = world.command(&command(kind, key, size));
                    prop_assert!(!reply.starts_with("-E") || reply.starts_with("-ERR"), "{}", reply);
                    prop_assert!(until == 0 || policy == 0);
                }
                Step::Complete(count, seed) => world.complete(count, seed),
                Step::Wait(ms) => {
                    world.uptime += u64::from(ms);
                    world.database.set_uptime(world.uptime);
                    world.complete(1, 0);
                }
                Step::Crash(seed) => world.crash(seed),
            }
        }
        world.crash(1);
        // Everything becomes durable if one waits for it.
        world.command("SET last 1");
        let mut tries = 0;
        while !world.database.settle() {
            tries += 1;
            prop_assert!(tries < 10_000);
            world.complete(1, tries);
        }
        prop_assert_eq!(world.database.durable(), world.changes());
        world.crash(2);
        prop_assert_eq!(world.command("GET last").0, "$1\r\n1\r\n");
    }
}
