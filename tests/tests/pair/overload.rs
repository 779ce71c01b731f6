//! Link and backup are slower than the guest writes memory: under each policy memory stays bounded, the guest answers, nothing acknowledged is lost, and the status
//! says what is slow and what is done about it.
//!
//! The link is made narrow by `tc` (tbf) and long by a [`Shaper`]: not every kernel has netem. The backup is stopped and continued in a rhythm.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tests::on_both_machines;
use tests::real::client::{Writer, WriterConfig};
use tests::real::clock;
use tests::real::pair::{Pair, PairOptions, START_LIMIT};
use tests::real::resp::Reply;
use tests::real::scene::Scene;
use tests::real::shaper::{Shape, Shaper, Shapes};
use tests::real::status::Status;
use tests::real::tools;
use tests::real::{Error, MachineKind, Node, Result};

const MIB: u64 = 1 << 20;
/// Guest RAM, what is staged, and for encoded bytes, sockets, code and whatever else: of a checkpoint of 4 MiB.
const PRIMARY_MOST: u64 = (128 + 16 + 48) * MIB;
/// Guest RAM, an incomplete epoch and those that wait to be applied, and the same for the rest.
const BACKUP_MOST: u64 = (128 + 32 + 48) * MIB;
const LIMITS: &str = "[limits]\nstaging = \"16MiB\"\ninbox = \"16MiB\"\nbacklog = \"16MiB\"\n";
/// A saturated queue drops heartbeats, too; a stopped process sends none.
const TIMERS: &str = "[timers]\nsolo = \"2s\"\ntakeover = \"4s\"\nprotect_retry = \"100ms\"\n";
/// What the guest writes: 80 MB a second, and no epoch has more than 4 MiB.
const LOAD: [&str; 3] = ["FT.DIRTY", "20000", "1000"];
/// How long one side of it is watched.
const WATCHED: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(20);

on_both_machines!(
    lengthened_for_the_link,
    lengthened_for_the_backup,
    throttled_for_the_link,
    throttled_for_the_backup,
    dropped_for_the_link,
    dropped_for_the_backup,
);

fn lengthened_for_the_link(scene: &mut Scene) -> Result<()> {
    narrow_link(scene, "lengthen")
}

fn lengthened_for_the_backup(scene: &mut Scene) -> Result<()> {
    slow_backup(scene, "lengthen")
}

fn throttled_for_the_link(scene: &mut Scene) -> Result<()> {
    narrow_link(scene, "throttle")
}

fn throttled_for_the_backup(scene: &mut Scene) -> Result<()> {
    slow_backup(scene, "throttle")
}

fn dropped_for_the_link(scene: &mut Scene) -> Result<()> {
    narrow_link(scene, "drop")
}

fn dropped_for_the_backup(scene: &mut Scene) -> Result<()> {
    slow_backup(scene, "drop")
}

fn narrow_link(scene: &mut Scene, policy: &str) -> Result<()> {
    let machine = scene.machine();
    let pair = scene.prepare(&options(scene, policy))?;
    // From the beginning: a connection that knew a shorter wire would not fill this one.
    let narrow = NarrowLink::start(pair)?;
    let writer = start_without_patches(pair)?;
    watch(pair, &writer, machine, policy, "link")?;
    narrow.finish(pair)?;
    end(pair, writer, policy, "link")
}

fn slow_backup(scene: &mut Scene, policy: &str) -> Result<()> {
    let machine = scene.machine();
    let pair = scene.prepare(&options(scene, policy))?;
    let writer = start_without_patches(pair)?;
    let rhythm = Rhythm::start(pair.daemon(Node::B).id());
    watch(pair, &writer, machine, policy, "backup")?;
    rhythm.finish();
    end(pair, writer, policy, "backup")
}

fn options(scene: &Scene, policy: &str) -> PairOptions {
    PairOptions {
        epoch: format!("25ms overload={policy} overload_patience=1s"),
        extra: format!("{LIMITS}\n{TIMERS}"),
        ..scene.options()
    }
}

/// Everything is as before when the guest writes less; nothing grew beyond its bounds, and nothing was lost.
fn end(pair: &mut Pair, writer: Writer, policy: &str, slow: &str) -> Result<()> {
    calm(pair, policy)?;
    for (node, limit) in [(Node::A, PRIMARY_MOST), (Node::B, BACKUP_MOST)] {
        let (_, most) = pair.daemon(node).resident()?;
        println!("{policy}, slow {slow}: {node} had at most {} MiB, limit {} MiB", most / MIB, limit / MIB);
        assert!(most <= limit, "{policy}, {slow}: {node}: {most} bytes resident, {limit} allowed");
    }
    let report = writer.finish(pair.network().client());
    assert!(report.connection_survived(), "{policy}, {slow}: {:?} {:?}", report.connection_error, report.same);
    assert!(report.same.complete(report.acks.len()), "{policy}, {slow}: {:?}", report.same);
    assert!(report.fresh.complete(report.acks.len()), "{policy}, {slow}: {:?}", report.fresh);
    Ok(())
}

/// What a page is patched with is small: whole pages make the link narrow. With a client at work.
fn start_without_patches(pair: &mut Pair) -> Result<Writer> {
    let config = pair.altered_config("whole.toml", "insecure_lab = true", "insecure_lab = true\npatches = false")?;
    pair.start_with(Node::B, "ft-backup", &config, &[])?;
    pair.start_with(Node::A, "ft-primary", &config, &[])?;
    pair.wait_guest(START_LIMIT)?;
    pair.wait_protected(Node::A, START_LIMIT)?;
    pair.wait_state(Node::B, "in_sync", START_LIMIT)?;
    let pace = Duration::from_millis(5);
    pair.start_writer(WriterConfig { window: 1, pace, patience: PATIENCE, ..WriterConfig::default() })
}

/// The guest writes more than `slow` takes, until that was seen and the policy did what it does.
fn watch(pair: &mut Pair, writer: &Writer, machine: MachineKind, policy: &str, slow: &str) -> Result<()> {
    let since = clock::mono_us();
    set_load(pair, &LOAD)?;
    let began = pair.wait_event(Node::A, since, PATIENCE, "an overload", |e| e.event == "overload_began")?;
    assert_eq!(began.slow.as_deref(), Some(slow), "{policy}");
    let acked = writer.acked();
    if policy == "drop" {
        let what = "the end of protection";
        pair.wait_event(Node::A, since, PATIENCE, what, |e| {
            e.enters("solo") && e.reason.as_deref() == Some("overloaded")
        })?;
        let answers = wait_for(writer, acked + 50)?;
        println!(
            "{policy}, slow {slow}: solo after {} ms, {answers} answers",
            (clock::mono_us() - began.mono_us) / 1000
        );
        return Ok(());
    }
    let deadline = Instant::now() + WATCHED;
    let mut seen = pair.status(Node::A)?;
    while Instant::now() < deadline {
        thread::sleep(Duration::from_millis(200));
        let status = pair.status(Node::A)?;
        if explains(&status, slow) {
            seen = status;
        }
    }
    let overload = &seen.json()["overload"];
    println!("{policy}, slow {slow}: {} answers, {overload}", writer.acked() - acked);
    assert!(explains(&seen, slow), "{policy}, {slow}: {overload}");
    let throttle = overload["throttle_ratio"].as_f64().unwrap_or_default();
    assert_eq!(throttle > 0.0, policy == "throttle", "{policy}, {slow}: {overload}");
    assert_eq!(seen.state(), "protected", "{policy}, {slow}");
    let table = pair.ftctl(Node::A, &["status"])?.stdout;
    assert!(table.contains("OVERLOADED:"), "{policy}, {slow}: {table}");
    // However slowly: what it says now, not what it said before all of it was in the way.
    wait_for(writer, writer.acked() + 1)?;
    if policy == "throttle" && slow == "link" && machine == MachineKind::Model {
        fits(pair)?;
    }
    Ok(())
}

/// What the slowed guest writes fits in the end: epochs have their rhythm again. (On KVM a hundredth of its time is enough for a guest that only writes to fill
/// this link: there epochs are longer, too.)
fn fits(pair: &Pair) -> Result<()> {
    let began = Instant::now();
    loop {
        let status = pair.status(Node::A)?;
        let (overload, pacing) = (&status.json()["overload"], &status.json()["pacing"]);
        if pacing["epochs_per_second"].as_f64() >= Some(20.0) && overload["throttle_ratio"].as_f64() > Some(0.3) {
            println!("it fits after {:?}: {overload}", WATCHED + began.elapsed());
            return Ok(());
        }
        if began.elapsed() > PATIENCE {
            return Err(Error::answer("the guest is slowed", format!("{overload} {pacing}")));
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn explains(status: &Status, slow: &str) -> bool {
    let overload = &status.json()["overload"];
    let text = overload["text"].as_str().unwrap_or_default();
    overload["overloaded"] == true && overload["slow"] == slow && text.contains(&format!("the {slow}"))
}

/// The guest writes less, and everything is as before.
fn calm(pair: &mut Pair, policy: &str) -> Result<()> {
    set_load(pair, &["FT.DIRTY", "0"])?;
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let status = pair.status(Node::A)?;
        let overload = &status.json()["overload"];
        if status.state() == "protected" && overload["overloaded"] == false && overload["throttle_ratio"] == 0.0 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let detail = format!("{policy}: {} {overload}\n{}", status.state(), pair.logs());
            return Err(Error::Timeout { what: "an end of the overload".into(), waited: START_LIMIT, detail });
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn set_load(pair: &Pair, words: &[&str]) -> Result<()> {
    let mut guest = pair.wait_guest(PATIENCE)?;
    let answer = guest.call(words).map_err(Error::io("FT.DIRTY"))?;
    assert!(matches!(answer, Reply::Simple(_) | Reply::Integer(_)), "{answer:?}");
    Ok(())
}

fn wait_for(writer: &Writer, acked: u64) -> Result<u64> {
    let deadline = Instant::now() + PATIENCE;
    while writer.acked() < acked {
        if Instant::now() >= deadline || !writer.is_writing() {
            let detail = format!("{} writes acknowledged", writer.acked());
            return Err(Error::Timeout { what: "the guest's answers".into(), waited: PATIENCE, detail });
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(writer.acked())
}

/// 100 Mbit/s from the primary to the backup, behind a queue that drops nothing, and 5 ms each way.
struct NarrowLink(Shaper);

impl NarrowLink {
    fn start(pair: &Pair) -> Result<Self> {
        tc(pair, "qdisc add dev repl0 root tbf rate 100mbit burst 128kb limit 8mb")?;
        let far = Shape { delay: Duration::from_millis(5), ..Shape::GOOD };
        Ok(Self(Shaper::start(pair.network(), Shapes::both(far), 1)?))
    }

    fn finish(self, pair: &Pair) -> Result<()> {
        self.0.finish(pair.network())?;
        tc(pair, "qdisc del dev repl0 root")
    }
}

fn tc(pair: &Pair, words: &str) -> Result<()> {
    let mut command = Command::new("tc");
    command.args(words.split_whitespace());
    tools::run(pair.network().host(Node::A), command, "", Duration::from_secs(10))?.success("tc").map(drop)
}

/// A process that hardly gets to run: it stands still for longer than eight epochs take, and shorter than anybody would call it dead.
struct Rhythm {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Rhythm {
    fn start(process: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let process = i32::try_from(process).ok().and_then(Pid::from_raw).expect("a process id");
        let thread = thread::spawn(move || {
            while !seen.load(Ordering::Acquire) {
                for (signal, span) in [(Signal::STOP, 400), (Signal::CONT, 20)] {
                    // It is a child that nobody has waited for: the id is its own even if it has ended.
                    kill_process(process, signal).expect("a child can be signalled");
                    thread::sleep(Duration::from_millis(span));
                }
            }
        });
        Self { stop, thread }
    }

    fn finish(self) {
        self.stop.store(true, Ordering::Release);
        self.thread.join().expect("the rhythm ends");
    }
}
