//! The data set on a disk that loses power at any moment: what was durable is there afterwards, and nothing is there that was not written.

use crate::disk::{Disk, ask, open};
use kv::log::MIN_DISK;
use kv::{AppendFsync, Database};
use proptest::prelude::*;

const KEYS: u8 = 12;

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
