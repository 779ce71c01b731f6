//! One connection over many moves of the guest: each time the side that runs it is killed and restarted, or hands it over, and the next move waits until
//! the pair is protected and armed again.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::real::artifacts::Artifacts;
use tests::real::client::{Writer, WriterConfig, WriterReport};
use tests::real::pair::{Pair, START_LIMIT};
use tests::real::rng::Rng;
use tests::real::{Error, MachineKind, Node, Result, clock};

use super::args::Args;
use super::error::DemoError;
use super::interrupt::Interrupt;
use super::outcome::ms_between;
use super::run;
use super::screen::{BAD, BOLD, FAINT, GOOD, Screen};
use super::summary::percentile;

/// How long one move, and the protection after it, may take.
const MOVE_LIMIT: Duration = Duration::from_secs(60);
/// The client works for a random time between these before each move.
const LOAD: (Duration, Duration) = (Duration::from_millis(400), Duration::from_millis(1_200));
const POLL: Duration = Duration::from_millis(10);

/// One move of the guest. Times are `CLOCK_MONOTONIC` in microseconds.
struct Move {
    from: Node,
    /// The kill, or the order.
    began_us: u64,
    /// The old owner stopped the guest for good; of a planned move only.
    stopped_us: Option<u64>,
    /// The arbiter granted the right to run.
    granted_us: u64,
    /// The guest ran on the other side.
    activated_us: u64,
    /// That side was PROTECTED.
    protected_us: u64,
    /// The client's longest time without an answer from the kill, or the order, until it heard the guest again.
    gap: f64,
    /// The same until that side was PROTECTED: while a base is copied, too.
    gap_until_protected: f64,
    /// Bytes that the new owner sent until it was PROTECTED and armed.
    sent_bytes: u64,
}

/// What is said again of the last epoch may be the first that a client hears of the new owner: the silence after it belongs to the move, too.
const FIRST_WORDS_US: u64 = 20_000;

/// A figure of each move.
type Column<'a> = &'a dyn Fn(&Move) -> f64;

/// What the disk was like in the end.
struct Compared {
    bytes: u64,
    /// What `ftctl verify` said of memory and disk while the pair was protected.
    verified: bool,
    said: String,
    /// The first byte in which the two images differ.
    differs_at: Option<u64>,
}

/// What came of all of them.
struct Chain {
    planned: bool,
    wanted: u32,
    memory_bytes: u64,
    disk: Option<Compared>,
    moves: Vec<Move>,
    report: WriterReport,
}

/// Plays the chain and shows what came of it; true when nothing was lost.
pub(super) fn chain(
    args: &Args,
    length: u32,
    seed: u64,
    artifacts: Artifacts,
    screen: &Screen,
    interrupt: &Interrupt,
) -> std::result::Result<bool, DemoError> {
    let mut stage = run::prepare(args, artifacts, interrupt)?;
    let chain = match story(args, length, seed, &mut stage.pair, screen) {
        Ok(chain) => chain,
        Err(source) => return Err(DemoError::Pair { source, kept: run::keep_files(stage, interrupt) }),
    };
    let passed = chain.passed();
    chain.print();
    if !passed {
        anstream::println!("  Logs and state of both sides: {}", run::keep_files(stage, interrupt));
    }
    if let Some(path) = &args.json {
        chain.write(path, args, seed)?;
    }
    Ok(passed)
}

fn story(args: &Args, length: u32, seed: u64, pair: &mut Pair, screen: &Screen) -> Result<Chain> {
    screen.during("starting", |step| run::protect(args, pair, step))?;
    let mut rng = Rng::new(seed);
    let config = WriterConfig { seed, window: usize::from(args.window), ..WriterConfig::default() };
    let writer = pair.start_writer(config)?;
    let mut moves = Vec::new();
    let mut owner = Node::A;
    let what = if args.planned { "switchovers" } else { "kills" };
    screen.during(&format!("{length} {what} on one connection"), |step| {
        wait_armed(pair, owner)?;
        for number in 1..=length {
            thread::sleep(rng.duration(LOAD.0, LOAD.1));
            if !writer.is_writing() {
                break;
            }
            let made = one_move(pair, owner, args.planned, &writer)?;
            owner = owner.peer();
            let ms = ms_between(made.began_us, made.activated_us);
            let again = ms_between(made.activated_us, made.protected_us);
            step(&format!(
                "{number}/{length}: {owner} runs after {ms:.1} ms, protected again after {again:.0} ms more"
            ));
            moves.push(made);
        }
        Ok::<_, Error>(())
    })?;
    let report =
        screen.during("reading everything back", |_| Ok::<_, Error>(writer.finish(pair.network().client())))?;
    for made in &mut moves {
        made.gap = longest_silence(&report, made.began_us, made.activated_us + FIRST_WORDS_US);
        made.gap_until_protected = longest_silence(&report, made.began_us, made.protected_us);
    }
    let memory_bytes = failover::config::parse_size(&args.memory).unwrap_or(0);
    let disk = match args.disk {
        Some(bytes) => Some(screen.during("comparing both sides", |_| compare(pair, owner, bytes))?),
        None => None,
    };
    Ok(Chain { planned: args.planned, wanted: length, memory_bytes, disk, moves, report })
}

/// The client's longest time without an answer that touches this span.
fn longest_silence(report: &WriterReport, from_us: u64, to_us: u64) -> f64 {
    let silences = report.acks.windows(2).map(|pair| (pair[0].at_us, pair[1].at_us));
    let touching = silences.filter(|(begin, end)| *end >= from_us && *begin <= to_us);
    touching.map(|(begin, end)| ms_between(begin, end)).fold(f64::NAN, f64::max)
}

/// Asks the owner to compare everything, and then looks at the files.
fn compare(pair: &Pair, owner: Node, bytes: u64) -> Result<Compared> {
    let verified = pair.ftctl(owner, &["verify", "--timeout", "15s"])?;
    let said = if verified.status.success() { &verified.stdout } else { &verified.stderr };
    let said = said.lines().last().unwrap_or_default().trim().to_owned();
    let differs_at = pair.wait_equal_images(0, Duration::from_secs(10))?;
    Ok(Compared { bytes, verified: verified.status.success(), said, differs_at })
}

/// Takes the guest off `from`, puts the pair together again, and waits until that is protected and armed.
fn one_move(pair: &mut Pair, from: Node, planned: bool, writer: &Writer) -> Result<Move> {
    let to = from.peer();
    let began_us = clock::mono_us();
    if planned {
        pair.ftctl(from, &["failover", "--yes", "--no-wait"])?.success("ftctl failover")?;
    } else {
        pair.kill(from)?;
    }
    let wait = |pair: &mut Pair, what: &str| pair.wait_event(to, began_us, MOVE_LIMIT, what, |e| e.event == what);
    let granted_us = wait(pair, "granted")?.mono_us;
    let activated_us = wait(pair, "activated")?.mono_us;
    let stopped_us = pair.events(from, began_us)?.iter().find(|e| e.event == "stopped").map(|e| e.mono_us);
    if !planned {
        pair.start_primary(from, &[])?;
    }
    let protected = pair.wait_event(to, activated_us, MOVE_LIMIT, "protection", |e| e.enters("protected"))?;
    let sent_bytes = wait_armed(pair, to)?;
    let deadline = Instant::now() + MOVE_LIMIT;
    while writer.is_writing() && writer.last_reply_us() <= activated_us && Instant::now() < deadline {
        thread::sleep(POLL);
    }
    Ok(Move {
        from,
        began_us,
        stopped_us,
        granted_us,
        activated_us,
        protected_us: protected.mono_us,
        gap: f64::NAN,
        gap_until_protected: f64::NAN,
        sent_bytes,
    })
}

/// Waits until the status of both sides says that a takeover would be granted; the bytes that the owner has sent by then.
fn wait_armed(pair: &mut Pair, owner: Node) -> Result<u64> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let [here, there] = [owner, owner.peer()].map(|node| pair.status(node));
        if let (Ok(here), Ok(there)) = (&here, &there)
            && [here, there].iter().all(|status| status.flag("armed") == Some(true))
            && here.state() == "protected"
        {
            return Ok(here.json()["counters"]["replication_wire_bytes"].as_u64().unwrap_or(0));
        }
        if Instant::now() >= deadline {
            let what = "the pair to be protected and armed".into();
            return Err(Error::Timeout { what, waited: START_LIMIT, detail: pair.logs() });
        }
        thread::sleep(POLL);
    }
}

impl Chain {
    fn passed(&self) -> bool {
        let acked = self.report.acks.len();
        u32::try_from(self.moves.len()).is_ok_and(|made| made == self.wanted)
            && acked > 0
            && self.disk.as_ref().is_none_or(|disk| disk.verified && disk.differs_at.is_none())
            && self.moves.iter().all(|made| made.gap.is_finite())
            && self.report.connection_survived()
            && self.report.same.complete(acked)
            && self.report.fresh.complete(acked)
    }

    /// By name, what each move gave, sorted.
    fn columns(&self) -> Vec<(&'static str, Vec<f64>)> {
        let mib = |bytes: u64| ms_between(0, bytes) * 1_000.0 / f64::from(1 << 20);
        // Memory and disk.
        let all = self.memory_bytes + self.disk.as_ref().map_or(0, |disk| disk.bytes);
        let of: [(&'static str, Column<'_>); 7] = [
            ("gap_ms", &|m| m.gap),
            ("gap_until_protected_ms", &|m| m.gap_until_protected),
            ("until_granted_ms", &|m| ms_between(m.stopped_us.unwrap_or(m.began_us), m.granted_us)),
            ("activate_ms", &|m| ms_between(m.granted_us, m.activated_us)),
            ("protected_again_ms", &|m| ms_between(m.activated_us, m.protected_us)),
            ("sent_mib", &|m| mib(m.sent_bytes)),
            ("sent_of_all_percent", &|m| mib(m.sent_bytes) * 100.0 / mib(all.max(1))),
        ];
        let column = |value: &dyn Fn(&Move) -> f64| {
            let mut values: Vec<f64> = self.moves.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        of.into_iter().map(|(name, value)| (name, column(value))).collect()
    }

    fn print(&self) {
        let moved = if self.planned { "moved on purpose" } else { "killed" };
        anstream::println!("\n  {BOLD}{:<24}{:>9}{:>9}{:>9}{BOLD:#}", "", "p50", "p99", "max");
        for (name, values) in self.columns() {
            let at = |percent| percentile(&values, percent);
            anstream::println!("  {:<24}{:>9.1}{:>9.1}{:>9.1}", name.replace('_', " "), at(50), at(99), at(100));
        }
        if let Some(Compared { bytes: _, verified: _, said, differs_at }) = &self.disk {
            let images = differs_at
                .map_or("both images are equal".to_owned(), |at| format!("the images DIFFER at byte {at:#x}"));
            anstream::println!("\n  disk: {images}; {said}");
        }
        let (word, style) = if self.passed() { ("PASSED", GOOD) } else { ("FAILED", BAD) };
        let report = &self.report;
        anstream::println!(
            "\n  {style}{word}{style:#} {} times {moved}, one connection; {} acknowledged, {} lost, {} wrong {FAINT}{}{FAINT:#}",
            self.moves.len(),
            report.acks.len(),
            report.lost(),
            report.wrong(),
            report.connection_error.as_deref().unwrap_or(""),
        );
    }

    fn write(&self, path: &Path, args: &Args, seed: u64) -> std::result::Result<(), DemoError> {
        let spread: serde_json::Map<String, Value> = self
            .columns()
            .into_iter()
            .map(|(name, values)| {
                let at = |percent| percentile(&values, percent);
                (name.to_owned(), json!({"p50": at(50), "p99": at(99), "max": at(100)}))
            })
            .collect();
        let moves: Vec<Value> = self
            .moves
            .iter()
            .map(|made| {
                json!({
                    "from": made.from.as_str(),
                    "gap_ms": made.gap,
                    "gap_until_protected_ms": made.gap_until_protected,
                    "began_to_granted_ms": ms_between(made.began_us, made.granted_us),
                    "granted_to_activated_ms": ms_between(made.granted_us, made.activated_us),
                    "activated_to_protected_ms": ms_between(made.activated_us, made.protected_us),
                    "sent_bytes": made.sent_bytes,
                })
            })
            .collect();
        let value = json!({
            "schema": "ft.demo-chain/1",
            "machine": MachineKind::from(args.machine).as_str(),
            "memory_bytes": self.memory_bytes,
            "disk": self.disk.as_ref().map(|disk| json!({
                "bytes": disk.bytes, "verified": disk.verified, "differs_at": disk.differs_at,
            })),
            "planned": self.planned,
            "seed": seed,
            "passed": self.passed(),
            "acked_writes": self.report.acks.len(),
            "lost_acked_writes": self.report.lost(),
            "wrong_values": self.report.wrong(),
            "connection_survived": self.report.connection_survived(),
            "distribution": spread,
            "moves": moves,
        });
        let text = serde_json::to_string_pretty(&value).expect("plain values only") + "\n";
        fs::write(path, text).map_err(|source| DemoError::Report { path: path.to_path_buf(), source })
    }
}
