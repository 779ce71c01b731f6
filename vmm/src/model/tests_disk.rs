//! The program's disks: commands, log, and what is left of it.

use std::sync::Arc;

use super::bus::Bus;
use super::commands::{self, Call, Outcome};
use super::disks::Disks;
use super::layout::Layout;
use super::log;
use super::options::ProgramOptions;
use super::program::open_log;
use super::registers::{LogPhase, Registers};
use super::resp::Reply;
use super::store::Store;
use super::{ModelMachine, ModelProgram, ProgramError};
use crate::config::{ClockPolicy, DiskConfig, MachineConfig, MachineIo};
use crate::disk::memory::{MemoryDisk, Op};
use crate::disk::{ByteRange, Disk, DiskSerial};
use crate::machine::Machine;
use crate::memory::GuestRam;
use crate::outputs::Outputs;
use crate::pause::PausedVm;

const DISK_BYTES: usize = 256 << 10;

fn disk() -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::new(DISK_BYTES, false))
}

/// A disk with these bytes.
fn disk_of(bytes: &[u8]) -> Arc<MemoryDisk> {
    let disk = disk();
    disk.write(0, bytes).expect("a write");
    disk
}

/// The program without frames and time.
struct Guest {
    ram: Arc<GuestRam>,
    layout: Layout,
    registers: Registers,
    disks: Disks,
}

fn announce(disks: &mut Disks) {
    let wanted = disks.take_wanted();
    assert!(!wanted.is_empty(), "who waits says for what");
    for what in wanted {
        let result = disks.get(what.disk).expect("a disk").announce(what.range);
        disks.announced(what, result.is_ok());
    }
}

impl Guest {
    /// Switched on, with the log read.
    fn boot(cmdline: &str, backing: &[&Arc<MemoryDisk>]) -> Self {
        let ram = Arc::new(GuestRam::new(2 << 20).expect("2 MiB"));
        let layout = Layout::of(&ram);
        let options = ProgramOptions::parse(cmdline).expect("a command line");
        let mut registers = Registers::boot(&options, &layout);
        let mut disks = Disks::new(backing.iter().map(|d| Arc::clone(d) as Arc<dyn Disk>).collect());
        while !open_log(Bus(ram.tracked()), &layout, &mut registers, &mut disks).expect("no fault") {
            announce(&mut disks);
        }
        Self { ram, layout, registers, disks }
    }

    fn ask(&mut self, request: &str) -> String {
        let arguments: Vec<_> = request.split(' ').map(str::as_bytes).collect();
        loop {
            let (mut reply, mut end) = (Reply::default(), None);
            let call = Call {
                store: &Store::open(Bus(self.ram.tracked()), &self.layout).expect("no fault"),
                registers: &mut self.registers,
                disks: &mut self.disks,
                layout: &self.layout,
                slot: 0,
                connected: 1,
                arguments: &arguments,
                reply: &mut reply,
                end: &mut end,
            };
            if commands::run(call).expect("no fault") != Outcome::Wait {
                return String::from_utf8_lossy(&reply.bytes).replace("\r\n", "|");
            }
            assert!(reply.bytes.is_empty(), "who waits has said nothing");
            announce(&mut self.disks);
        }
    }

    fn digest(&mut self) -> String {
        self.ask("FT.DIGEST")
    }
}

#[test]
fn blocks_are_written_read_zeroed_and_digested() {
    let disk = disk();
    let mut guest = Guest::boot("", &[&disk]);
    let empty = guest.ask("FT.DISK SUM");
    assert_eq!(guest.ask("FT.DISK WRITE 3 abc"), "+OK|");
    assert_eq!(guest.ask("FT.FSYNC"), "+OK|");
    let range = ByteRange { offset: 3 * 4096, len: 4096 };
    let wanted = [(Op::Announce, range), (Op::Write, range), (Op::Flush, ByteRange { offset: 0, len: 0 })];
    let calls = disk.take_calls();
    assert_eq!(calls.into_iter().filter(|(op, _)| *op != Op::Read).collect::<Vec<_>>(), wanted);
    assert_eq!(disk.contents()[3 * 4096..][..4], *b"abca");
    assert!(guest.ask("FT.DISK READ 3").starts_with("$4096|abcabc"));
    assert_eq!(guest.ask("FT.DISK SUM").len(), "$16||".len() + 16);
    assert_ne!(guest.ask("FT.DISK SUM"), empty);
    assert_eq!(guest.ask("FT.DISK ZERO 2 2"), "+OK|");
    assert_eq!(guest.ask("FT.DISK SUM 0"), empty);
    for (request, wanted) in [
        ("FT.DISK WRITE 64 x", "-ERR the disk has no such block|"),
        ("FT.DISK READ -1", "-ERR the disk has no such block|"),
        ("FT.DISK ZERO 0 65", "-ERR the disk has no such block|"),
        ("FT.DISK ZERO 9223372036854775807 9223372036854775807", "-ERR the disk has no such block|"),
        ("FT.DISK SUM 1", "-ERR there is no such disk|"),
        ("FT.DISK WRITE 0", "-ERR syntax error|"),
    ] {
        assert_eq!(guest.ask(request), wanted, "{request}");
    }
}

#[test]
fn disk_that_fails_is_an_error_of_the_command() {
    let disk = disk();
    let mut guest = Guest::boot("", &[&disk]);
    for (op, request) in [
        (Op::Announce, "FT.DISK WRITE 0 x"),
        (Op::Write, "FT.DISK WRITE 0 x"),
        (Op::Zero { may_unmap: true }, "FT.DISK ZERO 0"),
        (Op::Read, "FT.DISK READ 0"),
        (Op::Read, "FT.DISK SUM"),
        (Op::Flush, "FT.FSYNC"),
    ] {
        disk.fail(Some((op, libc::EIO)));
        assert_eq!(guest.ask(request), "-EIO disk|", "{op:?}");
        disk.fail(None);
        assert!(!guest.ask(request).starts_with('-'), "{op:?} afterwards");
    }
    let read_only = Arc::new(MemoryDisk::new(DISK_BYTES, true));
    let mut guest = Guest::boot("", &[&read_only]);
    assert_eq!(guest.ask("FT.DISK WRITE 0 x"), "-EIO disk|");
    assert!(guest.ask("FT.DISK READ 0").starts_with("$4096|"));
    let program = ModelProgram::new(
        Arc::new(GuestRam::new(2 << 20).unwrap()),
        [2, 0, 0, 0, 0, 7],
        &ProgramOptions::parse("disklog=1").unwrap(),
    );
    assert!(matches!(program.unwrap().with_disks(vec![read_only]), Err(ProgramError::NoLogDisk)));
}

/// Requests of all kinds that the log has, some of which fail.
fn requests() -> Vec<String> {
    let each = |n: u32| {
        [
            format!("SET k{} v{n}", n % 7),
            format!("INCR n{}", n % 3),
            format!("APPEND a{} x{n}", n % 2),
            format!("RPUSH l 1 2 {n}"),
            "LPOP l".into(),
            format!("DEL k{}", n % 5),
            "INCR l".into(),
            format!("MSET m {n} o {n}"),
        ]
    };
    (0..12).flat_map(each).chain(["FLUSHALL".into()]).chain((12..20).flat_map(each)).collect()
}

#[test]
fn log_is_replayed_on_a_cold_boot() {
    let disk = disk();
    let mut guest = Guest::boot("disklog=1", &[&disk]);
    for request in requests() {
        guest.ask(&request);
    }
    let digest = guest.digest();
    assert!(guest.ask("INFO").contains("db0:keys=1"), "a data set");
    let mut again = Guest::boot("disklog=1", &[&disk]);
    assert_eq!(again.digest(), digest);
    assert_eq!(again.registers.log, guest.registers.log);
    let info = format!("log_records:{}|", requests().len());
    assert!(again.ask("FT.DISK INFO").contains(&info), "each once, those that failed too");
    assert_eq!(again.ask("SET one more"), "+OK|");
    assert_eq!(Guest::boot("disklog=1", &[&disk]).ask("GET one"), "$4|more|");
    // Behind the log's half are the blocks.
    let before = guest.registers.log.tail;
    assert_eq!(again.ask("FT.DISK WRITE 0 z"), "+OK|");
    assert_eq!(disk.contents()[DISK_BYTES / 2..][..4096], [b'z'; 4096]);
    assert!(before < (DISK_BYTES / 2) as u64);
}

/// A log whose end is lost, byte by byte: what is whole is replayed, and nothing of what was cut off ever comes back.
#[test]
fn log_that_is_torn_anywhere_ends_before_the_tear() {
    let disk = disk();
    let mut guest = Guest::boot("disklog=1", &[&disk]);
    let (mut digests, mut ends) = (vec![guest.digest()], vec![0]);
    for n in 0..4 {
        let value = "v".repeat(700 * n);
        guest.ask(&format!("SET key{n} x{value}"));
        digests.push(guest.digest());
        ends.push(usize::try_from(guest.registers.log.tail).unwrap());
    }
    let whole = disk.contents();
    for tear in (0..ends[4]).step_by(37) {
        let mut torn = whole.clone();
        torn[tear] ^= 0x55;
        let disk = disk_of(&torn);
        let mut guest = Guest::boot("disklog=1", &[&disk]);
        let records = usize::try_from(guest.registers.log.records).unwrap();
        let is_padding = whole[tear] == 0 && records > 0 && tear < ends[records];
        assert!(is_padding || (ends[records]..ends[records + 1]).contains(&tear), "byte {tear}, {records} records");
        assert_eq!(guest.digest(), digests[records], "byte {tear}");
        assert_eq!(usize::try_from(guest.registers.log.tail).unwrap(), ends[records]);
        // The same request as the one that was torn: the one behind it must not follow.
        guest.ask(&format!("SET key{records} x{}", "v".repeat(700 * records)));
        let digest = guest.digest();
        assert_eq!(Guest::boot("disklog=1", &[&disk]).digest(), digest, "byte {tear}");
        assert!(disk.contents()[ends[records] + 4096..DISK_BYTES / 2].iter().all(|b| *b == 0), "byte {tear}");
    }
}

#[test]
fn request_that_cannot_be_logged_changes_nothing() {
    let disk = disk();
    let mut guest = Guest::boot("disklog=1", &[&disk]);
    for op in [Op::Announce, Op::Write] {
        disk.fail(Some((op, libc::ENOSPC)));
        assert_eq!(guest.ask("SET k v"), "-EIO disk|", "{op:?}");
        assert_eq!(guest.ask("GET k"), "$-1|");
        disk.fail(None);
    }
    assert_eq!(guest.ask("SET k v"), "+OK|");
    let value = "x".repeat(60_000);
    assert_eq!(guest.ask(&format!("SET big {value}")), "+OK|");
    assert_eq!(guest.ask(&format!("SET big {value}")), "+OK|");
    assert_eq!(guest.ask(&format!("SET big {value}")), "-ERR the log on the disk is full|");
    assert_eq!(guest.ask("SET k w"), "+OK|", "a smaller one fits");
    assert_eq!(Guest::boot("disklog=1", &[&disk]).ask("GET k"), "$1|w|");
}

#[test]
fn with_appendfsync_always_a_change_is_flushed_before_its_answer() {
    let disk = disk();
    let mut guest = Guest::boot("disklog=1 appendfsync=always", &[&disk]);
    disk.take_calls();
    assert_eq!(guest.ask("SET k v"), "+OK|");
    let calls: Vec<_> = disk.take_calls().into_iter().map(|(op, _)| op).collect();
    assert_eq!(calls, [Op::Announce, Op::Write, Op::Flush]);
    disk.fail(Some((Op::Flush, libc::EIO)));
    assert_eq!(guest.ask("SET k w"), "-EIO disk|");
    assert_eq!(guest.ask("GET k"), "$1|v|");
    // Nobody knows what is on the disk: no change is promised any more.
    disk.fail(None);
    assert_eq!(guest.ask("SET k w"), "-EIO disk|");
    assert_eq!(guest.registers.log.phase, LogPhase::Broken);
}

#[test]
fn log_on_a_disk_of_its_own_has_all_of_it() {
    let (first, second) = (disk(), disk());
    let mut guest = Guest::boot("disklog=1", &[&first, &second]);
    assert_eq!(log::capacity(&guest.disks), Some(DISK_BYTES as u64));
    assert_eq!(guest.ask("FT.DISK WRITE 0 q"), "+OK|");
    assert_eq!(second.contents()[..4096], [b'q'; 4096]);
    assert_eq!(first.contents(), vec![0; DISK_BYTES]);
}

struct Deaf;

impl Outputs for Deaf {
    fn frame(&self, _: u8, _: &[u8]) {}
    fn console(&self, _: &[u8]) {}
}

fn machine(disk: &Arc<MemoryDisk>) -> ModelMachine {
    let serial = DiskSerial::new("log").expect("a name");
    let config = MachineConfig {
        vcpus: 1,
        memory_bytes: 2 << 20,
        kernel: "".into(),
        initrd: None,
        cmdline: "disklog=1".into(),
        nics: Vec::new(),
        disks: vec![DiskConfig { bytes: DISK_BYTES as u64, read_only: false, serial }],
    };
    let disks = vec![Arc::clone(disk) as Arc<dyn Disk>];
    let io = MachineIo { outputs: Arc::new(Deaf), ports: Vec::new(), disks, console_input: None };
    ModelMachine::build(&config, io).expect("a model machine")
}

fn flushed(disk: &MemoryDisk) -> bool {
    disk.take_calls().iter().any(|(op, _)| *op == Op::Flush)
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let began = std::time::Instant::now();
    while !holds() {
        assert!(began.elapsed().as_secs() < 10, "{what}: not within 10 s");
        std::thread::yield_now();
    }
}

/// The announcement of the log's first change is held up: the machine can be stopped, captured and restored elsewhere, and both go on.
#[test]
fn stop_does_not_wait_for_an_announcement() {
    let held = disk();
    held.hold(Op::Announce);
    let mut first = machine(&held);
    first.load().unwrap();
    first.run().unwrap();
    held.wait_for_held(1);
    let mut paused = PausedVm::pause(&mut first).unwrap();
    let sections = paused.capture().unwrap();
    drop(paused);
    let mut paused = PausedVm::pause(&mut first).unwrap();
    assert_eq!(paused.capture().unwrap().len(), 1);
    held.release();
    drop(paused);
    eventually("the first goes on", || flushed(&held));

    let disk = disk();
    let mut second = machine(&disk);
    second.restore(&sections, ClockPolicy::ResumeFromCheckpoint).unwrap();
    second.run().unwrap();
    eventually("the second announces anew", || flushed(&disk));
}
