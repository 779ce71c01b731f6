//! The demo guest's log and its load, on somebody else's disks: QEMU's.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use tests::real::MachineKind;
use tests::real::artifacts::Artifacts;
use tests::real::load::{LoadReport, digest, disk_info, disk_sums};
use tests::real::network::Network;
use tests::real::qemu::{self, Drive, Machine, PATIENCE};
use tests::real::resp::{Connection, Reply};
use tests::real::scene::{kvm_wanted, tool_wanted};

const MIB: u64 = 1 << 20;

/// Several machines at once would take the processors away from each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A network, the guest's image and a directory for disks.
struct Bench {
    _alone: MutexGuard<'static, ()>,
    network: Network,
    guest: PathBuf,
    dir: TempDir,
}

impl Bench {
    fn new() -> Option<Self> {
        if !kvm_wanted() || !tool_wanted("qemu-system-x86_64", "FT_NO_QEMU") {
            return None;
        }
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let artifacts = Artifacts::build(MachineKind::Kvm, |_| {}).unwrap_or_else(|e| panic!("{e}"));
        let guest = artifacts.guest.expect("built for KVM").kernel;
        let (network, dir) = (Network::new().expect("a network"), tempfile::tempdir().expect("a directory"));
        Some(Self { _alone: alone, network, guest, dir })
    }

    fn disk(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.dir.path().join(name);
        let file = fs::File::create(&path).expect("an image");
        file.set_len(bytes).expect("an image");
        path
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("qemu.log")
    }

    fn boot(&self, append: &str, drives: &[Drive<'_>]) -> Machine {
        Machine::boot(&self.network, qemu::command(&self.guest, append, drives), &self.log())
            .unwrap_or_else(|e| panic!("{e}"))
    }

    fn connect(&self) -> Connection {
        Connection::open(self.network.client(), PATIENCE).expect("the guest listens")
    }

    /// Every line of the console so far.
    fn console(&self) -> String {
        fs::read_to_string(self.log()).expect("a console")
    }
}

fn ok(connection: &mut Connection, words: &[&str]) {
    assert_eq!(connection.call(words).expect("an answer"), Reply::Simple("OK".into()), "{words:?}");
}

fn is_io_error(reply: &Reply) -> bool {
    matches!(reply, Reply::Error(text) if text.starts_with("EIO"))
}

fn get(connection: &mut Connection, key: &str) -> Option<String> {
    match connection.call(&["GET", key]).expect("an answer") {
        Reply::Bulk(value) => value.map(|bytes| String::from_utf8(bytes).expect("text")),
        other => panic!("GET {key} answered {other:?}"),
    }
}

const KEYS: usize = 50;
const WINDOW: usize = 8;
const WRITES: usize = 450;

fn key(n: usize) -> String {
    format!("k{}", n % KEYS)
}

/// Sends writes, [`WINDOW`] at a time, each followed by a push to a list, until so many are acknowledged; the rest is under way. Returns how
/// many were sent.
fn write_until_acknowledged(connection: &mut Connection, life: usize, pushed: i64) -> usize {
    let (mut sent, mut acknowledged) = (0, 0);
    while acknowledged < WRITES {
        while sent < acknowledged + WINDOW {
            let value = format!("{life} {sent} {}", "x".repeat(1000));
            connection.send(&["SET", &key(sent), &value]).expect("a request");
            connection.send(&["RPUSH", "list", "x"]).expect("a request");
            sent += 1;
        }
        assert_eq!(connection.receive().expect("an answer"), Reply::Simple("OK".into()));
        acknowledged += 1;
        let length = pushed + i64::try_from(acknowledged).expect("a small number");
        assert_eq!(connection.receive().expect("an answer"), Reply::Integer(length));
    }
    sent
}

/// Writes until the machine is killed, three times on the same disk: whatever was acknowledged, in whichever life, is there in the next.
#[test]
fn acknowledged_writes_survive_a_killed_machine() {
    let Some(bench) = Bench::new() else { return };
    // Small: in each life the log is compacted, perhaps when the kill comes.
    let image = bench.disk("a.img", 2 * MIB);
    let drives = [Drive::new(&image)];
    let mut pushed = 0_i64;
    for life in 0..3 {
        let mut machine = bench.boot("appendfsync=always", &drives);
        let sent = write_until_acknowledged(&mut machine.connection, life, pushed);
        assert!(disk_info(&mut bench.connect(), "log_generation").expect("a number") > 1);
        machine.daemon.kill().expect("a kill");
        drop(machine);
        let mut machine = bench.boot("appendfsync=always", &drives);
        let ready = bench.console().lines().last().unwrap_or_default().to_owned();
        assert!(ready.contains(" records replayed"), "{ready}");
        for n in WRITES - KEYS..WRITES {
            let value = get(&mut machine.connection, &key(n)).expect("an acknowledged write");
            let mut words = value.split(' ').map(|word| word.parse::<usize>().ok());
            let (of, number) = (words.next().flatten(), words.next().flatten());
            // A later write to the same key was perhaps carried out, but not acknowledged.
            let last = [Some(n), Some(n + KEYS).filter(|later| *later < sent)];
            assert!(of == Some(life) && last.contains(&number), "{} is {of:?} {number:?}, not {n}", key(n));
        }
        let length = machine.connection.call(&["LLEN", "list"]).expect("an answer");
        let Reply::Integer(length) = length else { panic!("{length:?}") };
        let (least, most) = (pushed + i64::try_from(WRITES).unwrap(), pushed + i64::try_from(sent).unwrap());
        assert!((least..=most).contains(&length), "{length} of {least} to {most}");
        pushed = length;
    }
}

/// Loads run while others are served, and digests are those of the images.
#[test]
fn loads_and_digests_of_disks() {
    let Some(bench) = Bench::new() else { return };
    let (first, second) = (bench.disk("a.img", 16 * MIB), bench.disk("b.img", 4 * MIB));
    let mut machine = bench.boot("appendfsync=no", &[Drive::new(&first), Drive::new(&second)]);
    let connection = &mut machine.connection;
    assert_eq!(disk_info(connection, "disk0_bytes").expect("a size"), 16 * MIB);
    assert_eq!(disk_info(connection, "disk1_bytes").expect("a size"), 4 * MIB);
    connection.send(&["FT.DISK", "randwrite", "2s", "4096", "4", "fsync=64"]).expect("a request");
    let mut other = bench.connect();
    ok(&mut other, &["SET", "meanwhile", "1"]);
    assert!(matches!(other.call(&["FT.DISK", "sum"]), Ok(Reply::Error(text)) if text.starts_with("BUSY")));
    let report = LoadReport::parse(&connection.receive().expect("a report")).expect("a report");
    assert!(report.ios > 0 && report.bytes == 4096 * report.ios && report.errors == 0, "{report:?}");
    assert!(report.flushes > 0 && report.elapsed >= Duration::from_secs(1), "{report:?}");
    assert!(report.p50 <= report.p99 && report.p99 <= report.max, "{report:?}");
    let report = LoadReport::run(connection, &["randread", "50"]).expect("a report");
    assert_eq!((report.ios, report.flushes, report.errors), (50, 0, 0));
    // All of the second disk, so that its digest says that each block was written.
    let report = LoadReport::run(connection, &["seqwrite", "64", "64K", "8"]).expect("a report");
    assert_eq!((report.ios, report.bytes, report.errors), (64, 4 * MIB, 0));
    ok(connection, &["FT.FSYNC"]);
    let images = [&first, &second].map(|path| fs::read(path).expect("an image"));
    assert!(images[1].chunks(512).all(|sector| sector.iter().any(|byte| *byte != 0)));
    assert_eq!(disk_sums(connection).expect("digests"), images.map(|image| digest(&image)));
}

/// A disk that fails: changes are refused and nothing else; when it is well again they are taken, and are there afterwards.
#[test]
fn a_disk_that_fails_is_said_to_and_heals() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.disk("a.img", 4 * MIB);
    let machine = bench.boot("appendfsync=always", &[Drive::new(&image)]);
    ok(&mut bench.connect(), &["SET", "before", "1"]);
    drop(machine);
    // The first write to the log's fifth sector fails: sector 8 is the first one.
    let more = ",werror=report,file.driver=blkdebug,file.inject-error.0.event=pwritev,file.inject-error.0.sector=12,\
                file.inject-error.0.errno=5,file.inject-error.0.once=on";
    let mut machine = bench.boot("appendfsync=always", &[Drive { image: &image, more }]);
    let connection = &mut machine.connection;
    let refused = (0..100).find(|n| is_io_error(&connection.call(&["SET", &format!("k{n}"), "x"]).expect("an answer")));
    assert!(refused.is_some_and(|n| n < 10), "{refused:?}");
    assert!(is_io_error(&connection.call(&["INCR", "n"]).expect("an answer")));
    assert!(is_io_error(&connection.call(&["FT.FSYNC"]).expect("an answer")));
    assert_eq!(get(connection, "before").as_deref(), Some("1"));
    let healed = (0..400).any(|_| {
        thread::sleep(Duration::from_millis(25));
        connection.call(&["SET", "after", "1"]).expect("an answer") == Reply::Simple("OK".into())
    });
    assert!(healed, "{}", machine.daemon.log_tail());
    machine.daemon.kill().expect("a kill");
    let mut machine = bench.boot("appendfsync=always", &[Drive::new(&image)]);
    for key in ["before", "k0", "after"] {
        assert!(get(&mut machine.connection, key).is_some(), "{key}");
    }
}

/// A read-only disk is read, and takes no changes; a disk with something else on it is left alone; an ordered end flushes.
#[test]
fn read_only_foreign_and_orderly() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.disk("a.img", 4 * MIB);
    let mut machine = bench.boot("appendfsync=no", &[Drive::new(&image)]);
    ok(&mut machine.connection, &["SET", "k", "1"]);
    ok(&mut machine.connection, &["FT.POWEROFF"]);
    let written = |image: &Path| fs::read(image).expect("an image")[8 * 512..].iter().any(|byte| *byte != 0);
    // QEMU does not know the port: the guest halts, with all that it had on the disk.
    let flushed = (0..400).any(|_| {
        thread::sleep(Duration::from_millis(10));
        written(&image)
    });
    assert!(flushed, "{}", machine.daemon.log_tail());
    drop(machine);
    let before = fs::read(&image).expect("an image");
    let mut machine = bench.boot("", &[Drive { image: &image, more: ",readonly=on" }]);
    assert_eq!(get(&mut machine.connection, "k").as_deref(), Some("1"));
    assert!(is_io_error(&machine.connection.call(&["SET", "k", "2"]).expect("an answer")));
    drop(machine);
    assert_eq!(fs::read(&image).expect("an image"), before);
    let foreign = bench.disk("b.img", 4 * MIB);
    fs::write(&foreign, vec![7; 4 << 20]).expect("an image");
    let command = qemu::command(&bench.guest, "", &[Drive::new(&foreign)]);
    let refused = Machine::boot(&bench.network, command, &bench.log()).err().expect("no machine").to_string();
    assert!(refused.contains("not a log"), "{refused}");
    assert!(fs::read(&foreign).expect("an image").iter().all(|byte| *byte == 7));
    let mut machine = bench.boot("disk=off", &[Drive::new(&foreign)]);
    ok(&mut machine.connection, &["SET", "k", "3"]);
}
