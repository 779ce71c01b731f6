//! Power cuts at random moments of a pair whose guest keeps its data on a disk: whatever was acknowledged with a flush is in the image of
//! whoever held the guest last, once the journal and the guest's own log are replayed.
//!
//! The processes are those with failpoints: with `FT_POWER_CUT` they keep in their own memory what was not synced, so that SIGKILL loses it as
//! a power cut would, but for sectors that went to the file early, as a kernel writes back what it likes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use failover::config::PairConfig;
use kv::log::SECTOR;
use kv::{AppendFsync, Args, Database, Out, Parsed, Session, Store};
use primary::disk::Opened;
use replication_proto::{Incarnation, NodeName};

use super::artifacts::Artifacts;
use super::client::{Ack, Writer, WriterConfig, key, value};
use super::pair::{DEFAULT_EPOCH, Pair, PairOptions};
use super::rng::Rng;
use super::{Error, MachineKind, Node, Result};

/// Size of the guest's disk.
const DISK_BYTES: u64 = 64 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// Who dies, and in which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The owner; the backup takes over and dies later.
    OwnerThenHeir,
    /// The backup; the owner goes on alone and dies later.
    BackupThenOwner,
    /// The owner, and the backup up to 30 ms later.
    BothOwnerFirst,
    /// The backup, and the owner up to 30 ms later.
    BothBackupFirst,
}

impl Cut {
    const ALL: [Self; 4] = [Self::OwnerThenHeir, Self::BackupThenOwner, Self::BothOwnerFirst, Self::BothBackupFirst];

    /// Who dies first, and who last.
    fn order(self) -> (Node, Node) {
        match self {
            Self::OwnerThenHeir | Self::BothOwnerFirst => (Node::A, Node::B),
            Self::BackupThenOwner | Self::BothBackupFirst => (Node::B, Node::A),
        }
    }
}

/// What one cut left.
#[derive(Debug)]
pub struct Aftermath {
    /// What was cut.
    pub cut: Cut,
    /// Writes acknowledged, each after a flush.
    pub acked: usize,
    /// Of these, those after the first death.
    pub acked_after: usize,
    /// Acknowledged, and not in the image of the one that held the guest last.
    pub missing: usize,
    /// Acknowledged before the first death, and not in the other image.
    pub missing_there: usize,
}

/// The programs for it.
///
/// # Errors
/// They cannot be built.
pub fn artifacts() -> Result<Artifacts> {
    Artifacts::build_failpoints(MachineKind::Kvm, |_| {})
}

/// One pair, one cut, one look at the images.
///
/// # Errors
/// The pair did not come up, or an image holds no log.
pub fn cut_once(artifacts: &Artifacts, seed: u64) -> Result<Aftermath> {
    let mut rng = Rng::new(seed);
    let options = PairOptions {
        memory: "64MiB".into(),
        epoch: epoch(&mut rng),
        cmdline: "appendfsync=always".into(),
        disks: vec![DISK_BYTES],
        extra: "[limits]\njournal = \"1MiB\"\n".into(),
        ..PairOptions::new(MachineKind::Kvm)
    };
    let mut pair = Pair::prepare(artifacts.clone(), &options)?;
    pair.set_env("FT_POWER_CUT", Some(seed.to_string().into()));
    pair.start_protected()?;
    let config = WriterConfig { seed, window: 8, patience: Duration::from_secs(3), ..WriterConfig::default() };
    let writer = pair.start_writer(config)?;
    let cut = Cut::ALL[usize::try_from(rng.range(0, 4)).unwrap_or(0)];
    let (first, last) = cut.order();
    thread::sleep(rng.duration(Duration::from_millis(10), Duration::from_millis(400)));
    let died_us = pair.kill(first)?;
    match cut {
        Cut::OwnerThenHeir => {
            pair.wait_event(last, died_us, LIMIT, "takeover", |e| e.event == "activated")?;
            wait_acked(&writer, rng.range(0, 100));
        }
        Cut::BackupThenOwner => {
            pair.wait_event(last, died_us, LIMIT, "the way to solo", |e| e.enters("solo"))?;
            wait_acked(&writer, rng.range(0, 100));
        }
        Cut::BothOwnerFirst | Cut::BothBackupFirst => {
            thread::sleep(rng.duration(Duration::ZERO, Duration::from_millis(30)))
        }
    }
    pair.kill(last)?;
    let acks = writer.abandon();
    let before: Vec<Ack> = acks.iter().filter(|ack| ack.at_us <= died_us).copied().collect();
    let config_path = pair.config().to_owned();
    let missing = missing(&config_path, last, &pair.image(last, 0), seed, &acks)?;
    let missing_there = self::missing(&config_path, first, &pair.image(first, 0), seed, &before)?;
    if missing + missing_there > 0 {
        pair.keep_files();
    }
    Ok(Aftermath { cut, acked: acks.len(), acked_after: acks.len() - before.len(), missing, missing_there })
}

/// What people run, or a rhythm.
fn epoch(rng: &mut Rng) -> String {
    if rng.range(0, 2) == 0 { DEFAULT_EPOCH.into() } else { format!("{}ms", rng.range(5, 30)) }
}

/// Waits for more acknowledgements; a client that lost its connection has all that it gets.
fn wait_acked(writer: &Writer, more: u64) {
    let (wanted, deadline) = (writer.acked() + more, Instant::now() + Duration::from_secs(5));
    while writer.acked() < wanted && writer.is_writing() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
}

/// What a cold boot would find: the journal is replayed into the image by the product's own recovery, then the guest's log by the guest's
/// own code. Returns how many acknowledged writes are not there.
fn missing(config: &Path, node: Node, image: &Path, seed: u64, acks: &[Ack]) -> Result<usize> {
    let odd = |what: &str, e: &dyn std::fmt::Display| Error::answer(what.to_owned(), e.to_string());
    let config = PairConfig::load(config).map_err(|e| odd("pair.toml", &e))?;
    let name = NodeName::new(node.as_str()).map_err(|e| odd("the node's name", &e))?;
    drop(Opened::open(&config, &name, Incarnation(u128::from(seed))).map_err(|e| odd("recovery", &e))?);
    let mut disk = Image(File::open(image).map_err(Error::io("cannot open the image"))?);
    let mut machine = NoMachine;
    let mut database = Database::open(Store::new(seed), &mut disk, 1, true, AppendFsync::Never, &mut machine)
        .map_err(|e| odd("the guest's log", &format!("{e:?}")))?;
    Ok(acks.iter().filter(|ack| get(&mut database, &key(ack.n)) != value(seed, ack.n).as_bytes()).count())
}

fn get(database: &mut Database, key: &str) -> Vec<u8> {
    let request = format!("*2\r\n$3\r\nGET\r\n${}\r\n{key}\r\n", key.len());
    let (mut args, mut out) = (Args::new(), Out::new());
    assert_eq!(kv::parse(request.as_bytes(), &mut args).ok(), Some(Parsed::Request(request.len())), "a whole request");
    database.run(&mut NoMachine, &Session { id: 1 }, request.as_bytes(), &args, &mut out);
    let reply = out.bytes();
    let body = reply.iter().position(|byte| *byte == b'\n').map_or(&reply[..0], |at| &reply[at + 1..]);
    body.strip_suffix(b"\r\n").unwrap_or(body).to_vec()
}

struct Image(File);

impl kv::log::Blocks for Image {
    fn sectors(&self) -> u64 {
        self.0.metadata().map_or(0, |data| data.len() / SECTOR as u64)
    }

    fn read(&mut self, sector: u64, into: &mut [u8]) -> std::result::Result<(), kv::log::IoFailed> {
        self.0.read_exact_at(into, sector * SECTOR as u64).map_err(|_| kv::log::IoFailed)
    }
}

/// The guest's code on no machine.
struct NoMachine;

impl kv::Machine for NoMachine {
    fn uptime_ms(&self) -> u64 {
        0
    }
    fn counters(&self, _: &mut dyn FnMut(&str, u64)) {}
    fn dirty(&mut self, _: u64, _: Option<u64>) -> std::result::Result<(), kv::resp::OutOfMemory> {
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
    fn disk(&mut self, _: u64, _: kv::DiskJob) -> std::result::Result<(), &'static str> {
        Err("ERR there is no disk")
    }
    fn disks(&self, _: &mut dyn FnMut(&str, u64)) {}
}
