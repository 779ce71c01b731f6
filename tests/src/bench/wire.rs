//! What a checkpoint costs on the wire, and in processor time, by what changed in its pages. The real two halves of a data connection, with a TCP
//! connection over loopback between two threads; patches of earlier copies against whole pages, in turn.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use bytes::Bytes;
use replication_proto::limits::PAGE_BYTES;
use replication_proto::{
    CheckpointKind, Epoch, EpochDigest, Facts, Generation, Identity, Incarnation, PageIndex, PageRange, RamLayout,
    Receiver, ReceiverConfig, ReceiverEvent, ReceiverLimits, Sender, SenderConfig, SenderEvent, Standing, VmId,
};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::figures::{Spread, median};
use super::table::{Findings, Table, Target};
use super::{BenchError, host, host_description};
use crate::real::rng::mix;

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.wire/2";

/// What happens to each page between two checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// 64 bytes side by side.
    Line,
    /// 64 bytes, each in a cache line of its own.
    Scattered,
    /// A quarter of the page.
    Quarter,
    /// Half of it.
    Half,
    /// Every byte, by noise.
    Whole,
    /// It was written and is as before.
    Nothing,
}

impl Change {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Line, Self::Scattered, Self::Quarter, Self::Half, Self::Whole, Self::Nothing];

    /// For people.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Line => "64 bytes in one place",
            Self::Scattered => "64 bytes all over",
            Self::Quarter => "a quarter, in one place",
            Self::Half => "half, in one place",
            Self::Whole => "every byte, at random",
            Self::Nothing => "nothing",
        }
    }

    fn make(self, page: &mut [u8], seed: u64) {
        let noise = |at: usize| mix(seed ^ (at as u64) << 20).to_le_bytes();
        // Anywhere below 2048, so that half a page fits behind it.
        let start = usize::from(noise(0)[0]) * 8;
        let fill = |bytes: &mut [u8]| bytes.as_chunks_mut().0.iter_mut().enumerate().for_each(|(n, w)| *w = noise(n));
        match self {
            Self::Line => fill(&mut page[start..start + 64]),
            // Never what was there before.
            Self::Scattered => page.iter_mut().skip(start % 64).step_by(64).for_each(|byte| *byte ^= noise(1)[0] | 1),
            Self::Quarter => fill(&mut page[start..start + 1024]),
            Self::Half => fill(&mut page[start..start + 2048]),
            Self::Whole => fill(page),
            Self::Nothing => {}
        }
    }

    /// Bytes that it changes in a page.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Line | Self::Scattered => 64,
            Self::Quarter => 1024,
            Self::Half => 2048,
            Self::Whole => PAGE_BYTES,
            Self::Nothing => 0,
        }
    }
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Pages in each checkpoint.
    pub pages: u32,
    /// Checkpoints in each run.
    pub epochs: u32,
    /// Runs of each line; medians are reported.
    pub rounds: u32,
}

/// One line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    /// What happened to the pages.
    pub change: Change,
    /// Whether patches were agreed on.
    pub patches: bool,
    /// Bytes on the wire for each byte of pages.
    pub wire_ratio: f64,
    /// Processor time of both sides together for one page, kernel included, in microseconds.
    pub cpu_us_per_page: f64,
    /// From the first byte of a checkpoint until its acknowledgement, in microseconds.
    pub commit_us: Spread,
}

/// The result.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Name and version of this document.
    pub schema: String,
    /// The host.
    pub machine: String,
    /// Pages in each checkpoint.
    pub pages: u32,
    /// All lines.
    pub lines: Vec<Line>,
}

/// Most bytes on the wire for a byte of pages, where 64 bytes changed in each.
const SMALL: f64 = 0.1;
/// The same where every byte changed, by noise.
const NOISE: f64 = 1.02;

impl Findings for Report {
    const NAME: &'static str = "wire";

    fn tables(&self) -> Vec<Table> {
        let title = format!(
            "checkpoints of {} pages over a loopback connection, read, verified and acknowledged; CPU of both sides, kernel included; medians; {}",
            self.pages, self.machine
        );
        let heads = ["changed in each page", "sent as", "wire/pages", "CPU us/page", "commit p50 us", "p99"];
        let mut table = Table::new(title, &heads);
        for Line { change, patches, wire_ratio, cpu_us_per_page, commit_us } in &self.lines {
            let sent = if *patches { "patches" } else { "whole pages" };
            table.row(vec![
                change.text().into(),
                sent.into(),
                format!("{wire_ratio:.4}"),
                format!("{cpu_us_per_page:.2}"),
                format!("{:.0}", commit_us.p50),
                format!("{:.0}", commit_us.p99),
            ]);
        }
        vec![table]
    }

    fn targets(&self) -> Vec<Target> {
        let limits = [(Change::Line, SMALL), (Change::Scattered, SMALL), (Change::Whole, NOISE)];
        let target = |(change, limit): (Change, f64)| {
            let line = self.lines.iter().find(|line| line.change == change && line.patches)?;
            Some(Target::at_most(format!("wire / pages; {}", change.text()), line.wire_ratio, limit))
        };
        limits.into_iter().filter_map(target).collect()
    }
}

/// Measures all lines in turn, `rounds` times.
///
/// # Errors
/// See [`BenchError`].
pub fn run(plan: &Plan, progress: impl Fn(&str)) -> Result<Report, BenchError> {
    let machine = host_description();
    let cases: Vec<_> = Change::ALL.into_iter().flat_map(|change| [(change, false), (change, true)]).collect();
    let mut runs = vec![Vec::new(); cases.len()];
    for round in 1..=plan.rounds {
        for ((change, patches), runs) in cases.iter().zip(&mut runs) {
            runs.push(one(plan, *change, *patches, u64::from(round))?);
        }
        progress(&format!("round {round} of {}", plan.rounds));
    }
    let lines = cases.into_iter().zip(runs).map(|((change, patches), runs)| Line {
        change,
        patches,
        wire_ratio: median(runs.iter().map(|run| run.wire_ratio).collect()),
        cpu_us_per_page: median(runs.iter().map(|run| run.cpu_us_per_page).collect()),
        commit_us: Spread::of_runs(runs.iter().map(|run| run.commit_us)),
    });
    Ok(Report { schema: SCHEMA.into(), machine, pages: plan.pages, lines: lines.collect() })
}

#[derive(Clone)]
struct Run {
    wire_ratio: f64,
    cpu_us_per_page: f64,
    commit_us: Spread,
}

fn one(plan: &Plan, change: Change, patches: bool, seed: u64) -> Result<Run, BenchError> {
    let ram = RamLayout::new(vec![PageRange { first: PageIndex(0), pages: u64::from(plan.pages) }])
        .map_err(|error| BenchError::Wrong(error.to_string()))?;
    let listener = TcpListener::bind("127.0.0.1:0").map_err(host("bind"))?;
    let address = listener.local_addr().map_err(host("getsockname"))?;
    std::thread::scope(|scope| {
        let there_ram = ram.clone();
        let there = scope.spawn(move || Backup::accept(&listener, there_ram)?.serve());
        let socket = TcpStream::connect(address).map_err(host("connect"))?;
        let run = Primary::greet(socket, ram, patches)?.measure(plan, change, seed)?;
        there.join().map_err(|_| BenchError::Wrong("the reader failed".into()))??;
        Ok(run)
    })
}

fn identity(node: &str, incarnation: u128) -> Identity {
    let node = node.parse().expect("a name");
    Identity { vm: VmId(1), node, generation: Generation(1), incarnation: Incarnation(incarnation) }
}

struct Primary {
    socket: TcpStream,
    sender: Sender,
    wire_bytes: usize,
}

impl Primary {
    fn greet(socket: TcpStream, ram: RamLayout, patches: bool) -> Result<Self, BenchError> {
        socket.set_nodelay(true).map_err(host("setsockopt"))?;
        let config = SenderConfig {
            identity: identity("a", 1),
            ram,
            disks: Vec::new(),
            facts: Facts::new(),
            max_in_flight: 1,
            compress_base: false,
            patches,
        };
        let mut this = Self { socket, sender: Sender::new(config), wire_bytes: 0 };
        this.transmit()?;
        match this.event()? {
            SenderEvent::Accepted { .. } => Ok(this),
            other => Err(BenchError::Wrong(format!("{other:?}"))),
        }
    }

    fn transmit(&mut self) -> Result<(), BenchError> {
        while let Some(bytes) = self.sender.poll_transmit() {
            self.wire_bytes += bytes.len();
            self.socket.write_all(&bytes).map_err(host("write"))?;
        }
        Ok(())
    }

    fn event(&mut self) -> Result<SenderEvent, BenchError> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(event) = self.sender.poll_event() {
                return Ok(event);
            }
            let read = self.socket.read(&mut buffer).map_err(host("read"))?;
            self.sender.handle_bytes(&buffer[..read]).map_err(|error| BenchError::Wrong(error.to_string()))?;
        }
    }

    /// A base, one delta that leaves copies, then those that count.
    fn measure(mut self, plan: &Plan, change: Change, seed: u64) -> Result<Run, BenchError> {
        let wrong = |error: replication_proto::LinkError| BenchError::Wrong(error.to_string());
        let indexes: Vec<PageIndex> = (0..u64::from(plan.pages)).map(PageIndex).collect();
        let mut memory = vec![0; indexes.len() * PAGE_BYTES];
        memory.chunks_exact_mut(PAGE_BYTES).zip(seed << 32..).for_each(|(page, n)| Change::Whole.make(page, n));
        let (mut cpu, mut commits, mut wire) = (Duration::ZERO, Vec::new(), 0);
        for epoch in 1..=u64::from(plan.epochs) + 2 {
            let pages = memory.chunks_exact_mut(PAGE_BYTES).zip(mix(seed ^ epoch)..=u64::MAX);
            pages.for_each(|(page, n)| change.make(page, n));
            let staged = Bytes::copy_from_slice(&memory);
            let (wire_before, cpu_before) = (self.wire_bytes, processor_time());
            let began = std::time::Instant::now();
            let kind = if epoch == 1 { CheckpointKind::Base } else { CheckpointKind::Delta };
            self.sender.begin(Epoch(epoch), kind).map_err(wrong)?;
            self.sender.pages_shared(&indexes, &staged).map_err(wrong)?;
            self.sender.end(false).map_err(wrong)?;
            self.transmit()?;
            match self.event()? {
                SenderEvent::Committed { epoch: done } if done == Epoch(epoch) => {}
                other => return Err(BenchError::Wrong(format!("{other:?}"))),
            }
            if epoch > 2 {
                commits.push(began.elapsed());
                cpu += processor_time().saturating_sub(cpu_before);
                wire += self.wire_bytes - wire_before;
            }
        }
        let pages = f64::from(plan.pages) * f64::from(plan.epochs);
        Ok(Run {
            wire_ratio: wire as f64 / (pages * PAGE_BYTES as f64),
            cpu_us_per_page: cpu.as_secs_f64() * 1e6 / pages,
            commit_us: Spread::of_us(commits.into_iter()),
        })
    }
}

struct Backup {
    socket: TcpStream,
    receiver: Receiver,
}

impl Backup {
    fn accept(listener: &TcpListener, ram: RamLayout) -> Result<Self, BenchError> {
        let (socket, _) = listener.accept().map_err(host("accept"))?;
        socket.set_nodelay(true).map_err(host("setsockopt"))?;
        let limits =
            ReceiverLimits { max_epoch_pages: ram.pages(), max_epoch_section_bytes: 1 << 20, max_epoch_disk_bytes: 0 };
        let config = ReceiverConfig {
            identity: identity("b", 2),
            ram,
            disks: Vec::new(),
            standing: Standing::default(),
            facts: Facts::new(),
            limits,
        };
        Ok(Self { socket, receiver: Receiver::new(config) })
    }

    /// Until the other side closes.
    fn serve(mut self) -> Result<(), BenchError> {
        let wrong = |error: replication_proto::LinkError| BenchError::Wrong(error.to_string());
        let mut buffer = vec![0; 256 << 10];
        let mut digest = None;
        loop {
            let read = self.socket.read(&mut buffer).map_err(host("read"))?;
            if read == 0 {
                return Ok(());
            }
            self.receiver.handle_bytes(&buffer[..read]).map_err(wrong)?;
            while let Some(event) = self.receiver.poll_event().map_err(wrong)? {
                match (event, &mut digest) {
                    (ReceiverEvent::Begin { epoch, kind }, digest) => *digest = Some(EpochDigest::new(epoch, kind)),
                    (ReceiverEvent::Pages { indexes, bytes }, Some(digest)) => digest.pages(&indexes, &bytes),
                    (ReceiverEvent::End(end), Some(digest)) if digest.finish() == end.digest => {
                        self.receiver.ack(end.epoch).map_err(wrong)?;
                    }
                    (ReceiverEvent::Opened { .. }, _) => {}
                    (other, _) => return Err(BenchError::Wrong(format!("{other:?}"))),
                }
            }
            while let Some(bytes) = self.receiver.poll_transmit() {
                self.socket.write_all(&bytes).map_err(host("write"))?;
            }
        }
    }
}

/// Of all threads of this process.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or_default(), u32::try_from(time.tv_nsec).unwrap_or_default())
}
