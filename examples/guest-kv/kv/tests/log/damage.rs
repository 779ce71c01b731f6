//! Logs that are cut, changed, full or on a disk that fails.

use crate::disk::{Disk, ask, mix, open, pick};
use kv::database::Fate;
use kv::log::{Geometry, MIN_DISK, OpenError, SECTOR};
use kv::{AppendFsync, Database};

/// The first byte of the first half.
const LOG: usize = 8 * SECTOR;

/// Completes jobs until there are none.
fn finish(disk: &mut Disk, database: &mut Database) {
    for seed in 0..10_000 {
        database.work();
        if database.settle() {
            return;
        }
        disk.step(database, seed);
    }
    panic!("the log does not settle");
}

fn reply(database: &mut Database, line: &str) -> String {
    ask(database, line).expect("there is room").0
}

/// A disk with so many records, each flushed by itself, and the digest after each.
fn written(records: usize) -> (Disk, Vec<u64>) {
    let mut disk = Disk::new(MIN_DISK);
    let mut database = open(&mut disk, AppendFsync::Always).unwrap();
    let mut digests = vec![0];
    for n in 0..records {
        reply(&mut database, &format!("SET k{n} {}", "v".repeat(1 + n * 97 % 1200)));
        finish(&mut disk, &mut database);
        digests.push(database.store().digest());
    }
    disk.crash(0);
    (disk, digests)
}

/// Where the records end.
fn end(disk: &Disk) -> usize {
    disk.stable.iter().rposition(|byte| *byte != 0).unwrap() + 1
}

/// A log that is cut anywhere, down to a byte, has whole records up to there and goes on behind them.
#[test]
fn a_torn_tail_is_cut_at_any_byte() {
    let (mut disk, digests) = written(6);
    let whole = disk.stable.clone();
    let mut last = 0;
    for cut in LOG..=end(&disk) {
        disk.stable.copy_from_slice(&whole);
        disk.stable[cut..].fill(if cut % 2 == 0 { 0 } else { 0xa5 });
        let mut database = open(&mut disk, AppendFsync::Always).unwrap();
        let found = usize::try_from(database.replayed().unwrap()).unwrap();
        assert_eq!(database.store().digest(), digests[found], "cut at {cut}");
        assert!(found >= last, "cut at {cut}: {found} after {last}");
        last = found;
        if cut % 61 == 0 {
            reply(&mut database, "SET more 1");
            finish(&mut disk, &mut database);
            let digest = database.store().digest();
            disk.crash(0);
            assert_eq!(open(&mut disk, AppendFsync::Always).unwrap().store().digest(), digest, "cut at {cut}");
        }
    }
    assert_eq!(last, 6);
}

/// A changed byte ends the log before the record in which it is.
#[test]
fn wrong_checksums_end_the_log() {
    let (mut disk, digests) = written(6);
    let whole = disk.stable.clone();
    let end = end(&disk);
    for at in LOG..end {
        disk.stable.copy_from_slice(&whole);
        disk.stable[at] ^= 0x10;
        let database = open(&mut disk, AppendFsync::Always).unwrap();
        let found = usize::try_from(database.replayed().unwrap()).unwrap();
        assert_eq!(database.store().digest(), digests[found], "byte {at}");
        // Only padding may change without a consequence.
        assert!(found < 6 || whole[at] == 0, "byte {at}");
    }
    // The superblock is not guessed.
    for at in 0..64 {
        disk.stable.copy_from_slice(&whole);
        disk.stable[at] ^= 0x10;
        let error = open(&mut disk, AppendFsync::Always).err();
        let known = [OpenError::Foreign, OpenError::Version, OpenError::Damaged].map(Some);
        assert!(known.contains(&error), "byte {at}: {error:?}");
    }
}

/// What a compaction left in the half that no longer counts never comes back, and what it wrote is vouched for.
#[test]
fn stale_records_stay_dead() {
    let mut disk = Disk::new(MIN_DISK);
    let mut database = open(&mut disk, AppendFsync::Never).unwrap();
    let half = Geometry::of_disk(MIN_DISK).unwrap().capacity();
    let mut uptime = 0;
    for n in 0..1200_u64 {
        let line = format!("SET k{} {n}{}", n % 10, "v".repeat(900));
        while ask(&mut database, &line).is_none() {
            database.work();
            disk.step(&mut database, n);
        }
        uptime += 30;
        database.set_uptime(uptime);
        database.work();
        disk.step(&mut database, n);
        if n % 50 == 0 {
            finish(&mut disk, &mut database);
            let digest = database.store().digest();
            disk.crash(n);
            database = open(&mut disk, AppendFsync::Never).unwrap();
            assert_eq!(database.store().digest(), digest, "after {n}");
            uptime = 0;
        }
    }
    // Four halves' worth was written: both have been used, again and again.
    assert!(1200 * 900 > 4 * half);
    finish(&mut disk, &mut database);
    disk.crash(0);
    // States that the superblock vouches for are damaged: said, not skipped.
    let both = [LOG, LOG + usize::try_from(half).unwrap()];
    both.iter().for_each(|at| disk.stable[at + 60] ^= 1);
    assert!(matches!(open(&mut disk, AppendFsync::Never), Err(OpenError::Missing { found: 0, .. })));
}

/// The power goes at each moment of several compactions.
#[test]
fn a_compaction_can_end_anywhere() {
    let mut disk = Disk::new(MIN_DISK);
    let mut database = open(&mut disk, AppendFsync::Always).unwrap();
    let half = Geometry::of_disk(MIN_DISK).unwrap().capacity();
    let (mut digests, mut bytes) = (vec![0], 0);
    for n in 0..1000_u64 {
        let seed = mix(n);
        let line = format!("SET k{} {n}{}", n % 10, "v".repeat(pick(seed, 1500)));
        bytes += line.len() as u64;
        // Several changes share a write.
        for part in 0..3 {
            let line = if part == 0 { &line } else { "INCR n" };
            while ask(&mut database, line).is_none() {
                database.work();
                disk.step(&mut database, seed);
            }
            digests.push(database.store().digest());
        }
        for step in 0..1 + seed % 4 {
            database.work();
            disk.step(&mut database, seed + step);
            let mut fork = disk.fork();
            fork.crash(seed + step);
            let digest = open(&mut fork, AppendFsync::Always).unwrap().store().digest();
            let durable = usize::try_from(database.durable()).unwrap();
            assert!(digests[durable..].contains(&digest), "after {n}, step {step}");
        }
    }
    assert!(bytes > 2 * half);
}

/// A log that is full of live data says so, takes what makes it smaller, and then more.
#[test]
fn a_full_log_refuses_and_recovers() {
    let mut disk = Disk::new(MIN_DISK);
    let mut database = open(&mut disk, AppendFsync::Never).unwrap();
    let (mut uptime, mut seed) = (0, 0);
    let mut run = |database: &mut Database, disk: &mut Disk, line: &str| loop {
        uptime += 40;
        database.set_uptime(uptime);
        let done = ask(database, line);
        for _ in 0..8 {
            seed += 1;
            database.work();
            disk.step(database, seed);
        }
        if let Some((reply, _)) = done {
            return reply;
        }
    };
    let value = "v".repeat(3000);
    let refused = (0..1000).find(|n| {
        let reply = run(&mut database, &mut disk, &format!("SET k{n} {value}"));
        assert!(reply == "+OK\r\n" || reply.starts_with("-ENOSPC"), "{reply}");
        reply != "+OK\r\n"
    });
    let refused = refused.expect("the log is full some time");
    assert!((50..100).contains(&refused), "{refused} values of 3000 bytes");
    assert!(run(&mut database, &mut disk, &format!("APPEND k1 {value}")).starts_with("-ENOSPC"));
    assert_eq!(run(&mut database, &mut disk, "GET k1").len(), 3000 + "$3000\r\n\r\n".len());
    for n in 0..refused / 2 {
        assert_eq!(run(&mut database, &mut disk, &format!("DEL k{n}")), ":1\r\n");
    }
    let again = (0..200).any(|_| run(&mut database, &mut disk, &format!("SET again {value}")) == "+OK\r\n");
    assert!(again, "there is room again");
    assert!(run(&mut database, &mut disk, &format!("SET long {}", "v".repeat(200_000))).starts_with("-ERR"));
    finish(&mut disk, &mut database);
    let digest = database.store().digest();
    disk.crash(3);
    assert_eq!(open(&mut disk, AppendFsync::Never).unwrap().store().digest(), digest);
}

/// A disk that fails at any moment, and works again later: whoever was told that a change is durable was told the truth, and changes
/// are taken again.
#[test]
fn a_disk_that_fails_heals() {
    for start in 0..60_u64 {
        let mut disk = Disk::new(MIN_DISK);
        let mut database = open(&mut disk, AppendFsync::Always).unwrap();
        let (mut waiting, mut digests, mut told) = (Vec::new(), vec![0], 0);
        let mut uptime = 0;
        let mut healed = false;
        for n in 0..600 {
            let seed = mix(start * 1000 + n);
            disk.fails = (start..start + 20).contains(&n);
            uptime += 50;
            database.set_uptime(uptime);
            let line = format!("SET k{} {n}{}", n % 7, "v".repeat(pick(seed, 2000)));
            if let Some((reply, until)) = ask(&mut database, &line) {
                assert!(reply == "+OK\r\n" || reply.starts_with("-EIO"), "{reply}");
                if reply == "+OK\r\n" {
                    digests.push(database.store().digest());
                    waiting.push((until, digests.len() - 1));
                    healed |= n > start + 20;
                }
            }
            for step in 0..2 + seed % 3 {
                database.work();
                disk.step(&mut database, seed + step);
            }
            waiting.retain(|(until, change)| {
                let fate = database.fate(*until);
                told = if fate == Fate::Leaves { told.max(*change) } else { told };
                fate == Fate::Waits
            });
        }
        assert!(healed, "start {start}");
        disk.crash(start);
        let digest = open(&mut disk, AppendFsync::Always).unwrap().store().digest();
        assert!(digests[told..].contains(&digest), "start {start}");
    }
}

/// Time goes on where the log ends: what had an hour left has it still, however long the machine was off.
#[test]
fn deadlines_survive() {
    let mut disk = Disk::new(MIN_DISK);
    let mut database = open(&mut disk, AppendFsync::Always).unwrap();
    database.set_uptime(5000);
    reply(&mut database, "SET short x PX 1000");
    reply(&mut database, "SET long x PX 60000");
    database.set_uptime(7000);
    assert_eq!(reply(&mut database, "SETNX short y"), ":1\r\n");
    finish(&mut disk, &mut database);
    disk.crash(0);
    let mut database = open(&mut disk, AppendFsync::Always).unwrap();
    database.set_uptime(1000);
    assert_eq!(reply(&mut database, "PTTL long"), ":57000\r\n");
    assert_eq!(reply(&mut database, "GET short"), "$1\r\ny\r\n");
    database.set_uptime(58_000);
    assert_eq!(reply(&mut database, "EXISTS long"), ":0\r\n");
}
