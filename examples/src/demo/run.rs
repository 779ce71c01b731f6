//! One run, from an empty machine to a verdict.

use std::thread;
use std::time::{Duration, Instant};

use tests::real::MachineKind;
use tests::real::artifacts::Artifacts;
use tests::real::client::{Writer, WriterConfig};
use tests::real::etcd::ArbiterSite;
use tests::real::pair::{Pair, PairOptions, START_LIMIT};
use tests::real::pause::{ArbiterPause, pause_arbiter};
use tests::real::resp::Reply;
use tests::real::rng::Rng;
use tests::real::{Error, Node, Result};

use super::args::{Arbiter, Args, Kill};
use super::error::DemoError;
use super::interrupt::Interrupt;
use super::outcome::{Before, Frames, Moments, Outcome};
use super::screen::Screen;

/// How long a takeover may take before it counts as none.
const TAKEOVER_LIMIT: Duration = Duration::from_secs(20);
/// How long the same connection must work after the takeover.
pub(super) const WORK_AFTER: Duration = Duration::from_secs(5);
/// The kill comes at a random moment of load between these two.
const LOAD_BEFORE: (Duration, Duration) = (Duration::from_millis(1_000), Duration::from_millis(3_000));

/// Writes that are acknowledged before the arbiter is stopped.
const ACKED_BEFORE_PAUSE: u64 = 200;

/// What a run plays on.
pub(super) struct Stage {
    // Declared first: its cables end in the pair's namespaces.
    site: Option<ArbiterSite>,
    pub(super) pair: Pair,
}

/// Starts a pair, kills its primary under load, and finds out what was kept.
pub(super) fn run(
    args: &Args,
    seed: u64,
    artifacts: Artifacts,
    screen: &Screen,
    interrupt: &Interrupt,
) -> Result<Outcome, DemoError> {
    let mut stage = prepare(args, artifacts, interrupt)?;
    match story(args, seed, &mut stage, screen) {
        Ok(outcome) if outcome.passed() => Ok(outcome),
        Ok(mut outcome) => {
            outcome.files = Some(keep_files(stage, interrupt));
            Ok(outcome)
        }
        Err(source) => Err(DemoError::Pair { source, kept: keep_files(stage, interrupt) }),
    }
}

/// Wires and files of a pair, nothing started but the arbiter.
pub(super) fn prepare(args: &Args, artifacts: Artifacts, interrupt: &Interrupt) -> Result<Stage, DemoError> {
    let mut options = PairOptions::new(args.machine.into());
    options.memory.clone_from(&args.memory);
    options.epoch.clone_from(&args.epoch);
    options.vcpus = args.vcpus;
    options.files = Some(interrupt.files().to_path_buf());
    if let Some(bytes) = args.disk {
        options.disks = vec![bytes];
        options.cmdline = match options.machine {
            MachineKind::Kvm => "appendfsync=always".into(),
            MachineKind::Model => "disklog=1 appendfsync=always".into(),
        };
    }
    if args.arbiter == Arbiter::Etcd {
        options.arbiter = Some(ArbiterSite::table());
    }
    let pair = Pair::prepare(artifacts, &options)?;
    let site = match args.arbiter {
        Arbiter::File => None,
        Arbiter::Etcd => Some(ArbiterSite::start(pair.network(), interrupt.files())?),
    };
    Ok(Stage { site, pair })
}

pub(super) fn keep_files(mut stage: Stage, interrupt: &Interrupt) -> String {
    stage.pair.keep_files();
    drop(stage);
    interrupt.keep_files()
}

fn story(args: &Args, seed: u64, stage: &mut Stage, screen: &Screen) -> Result<Outcome> {
    let Stage { site, pair } = stage;
    let mut rng = Rng::new(seed);
    let protected_us = screen.during("starting", |step| protect(args, pair, step))?;
    let config = WriterConfig { seed, window: usize::from(args.window), ..WriterConfig::default() };
    let writer = pair.start_writer(config)?;
    let pause = match (args.arbiter_pause, site) {
        (Some(length), Some(site)) => Some(pause(pair, site, &writer, length, screen)?),
        _ => None,
    };
    let before = screen.during("client writing", |_| load(pair, &writer, &mut rng))?;
    let killed_us = match args.kill {
        Kill::Process => pair.kill(Node::A)?,
        Kill::Host => pair.kill_host(Node::A)?,
    };
    let acked_at_kill = writer.acked();
    let took_over = screen.during("primary killed; the connection goes on", |_| takeover(pair, &writer, killed_us))?;
    let report =
        screen.during("reading everything back", |_| Ok::<_, Error>(writer.finish(pair.network().client())))?;
    let moments = Moments {
        protected_us,
        killed_us,
        gone_us: pair.daemon(Node::A).gone_us(),
        detected_us: took_over.detected_us,
        granted_us: took_over.granted_us,
        activated_us: took_over.activated_us,
        first_reply_us: report.first_reply(took_over.activated_us),
    };
    Ok(Outcome {
        machine: args.machine,
        kill: args.kill,
        arbiter: args.arbiter,
        seed,
        pause,
        before,
        acked_at_kill,
        moments,
        activation_us: took_over.activation_us,
        frames: took_over.frames,
        generation: took_over.generation,
        silence_us: report.longest_silence(killed_us),
        report,
        files: None,
    })
}

/// Starts both sides and waits until the guest answers and is protected. Returns when that was, in microseconds.
pub(super) fn protect(args: &Args, pair: &mut Pair, step: &mut dyn FnMut(&str)) -> Result<u64> {
    step("starting the backup on b");
    pair.start_backup(Node::B)?;
    step("starting the primary on a, booting the guest");
    pair.start_primary(Node::A, &[])?;
    let mut guest = pair.wait_guest(START_LIMIT)?;
    step("copying the guest to b");
    pair.wait_protected(Node::A, START_LIMIT)?;
    let since = pair.daemon(Node::A).started_us();
    let event = pair.wait_event(Node::A, since, START_LIMIT, "protection", |e| e.enters("protected"))?;
    if args.dirty_rate > 0 {
        let rate = args.dirty_rate.to_string();
        match guest.call(&["FT.DIRTY", &rate]).map_err(Error::io("FT.DIRTY"))? {
            Reply::Simple(_) | Reply::Integer(_) => {}
            other => return Err(Error::answer("FT.DIRTY", format!("{other:?}"))),
        }
    }
    step("guest running on a, protected by b");
    Ok(event.mono_us)
}

/// Stops the arbiter while the client writes.
fn pause(
    pair: &mut Pair,
    site: &ArbiterSite,
    writer: &Writer,
    length: Duration,
    screen: &Screen,
) -> Result<ArbiterPause> {
    screen.during("client writing", |step| {
        // Some answers before, to compare the gaps with. A client that has failed is found out at the end.
        let deadline = Instant::now() + START_LIMIT;
        while writer.is_writing() && writer.acked() < ACKED_BEFORE_PAUSE && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        step(&format!("etcd stopped for {length:?}, the client writes on"));
        pause_arbiter(pair, site, length)
    })
}

/// Lets the client write until the moment of the kill, which depends on the seed only.
fn load(pair: &mut Pair, writer: &Writer, rng: &mut Rng) -> Result<Before> {
    let until = Instant::now() + rng.duration(LOAD_BEFORE.0, LOAD_BEFORE.1);
    // A little before the kill, and not always equally long, so that asking does not decide where in an epoch the kill falls.
    thread::sleep(until.saturating_duration_since(Instant::now()).saturating_sub(Duration::from_millis(100)));
    let status = pair.status(Node::A)?;
    thread::sleep(until.saturating_duration_since(Instant::now()));
    // A host too busy for the heartbeats may just have lost protection; the promise is about a protected guest.
    pair.wait_protected(Node::A, START_LIMIT)?;
    if writer.acked() == 0 {
        return Err(Error::Timeout {
            what: "the first acknowledged write".into(),
            waited: LOAD_BEFORE.0,
            detail: pair.logs(),
        });
    }
    Ok(Before {
        epochs: status.number("epoch"),
        pause_us: status.timing("pause", 1e-6),
        hold_ms: status.timing("output_hold", 1e-3),
    })
}

/// What B's event log tells about the takeover.
struct TookOver {
    detected_us: u64,
    granted_us: u64,
    activated_us: u64,
    activation_us: Option<u64>,
    frames: Option<Frames>,
    generation: Option<u64>,
}

/// Waits for the takeover, and then until the client's connection has worked for [`WORK_AFTER`] more.
fn takeover(pair: &mut Pair, writer: &Writer, killed_us: u64) -> Result<TookOver> {
    let mut wait = |what: &str| pair.wait_event(Node::B, killed_us, TAKEOVER_LIMIT, what, |e| e.event == what);
    let detected = wait("peer_quiet")?;
    let granted = wait("granted")?;
    let activated = wait("activated")?;
    let work_us = u64::try_from(WORK_AFTER.as_micros()).expect("a few seconds");
    let deadline = Instant::now() + TAKEOVER_LIMIT + WORK_AFTER;
    let mut first = None;
    while writer.is_writing() && Instant::now() < deadline {
        let last = writer.last_reply_us();
        if last > activated.mono_us {
            let first = *first.get_or_insert(last);
            if last >= first + work_us {
                break;
            }
        }
        pair.daemon(Node::B).check()?;
        thread::sleep(Duration::from_millis(5));
    }
    Ok(TookOver {
        detected_us: detected.mono_us,
        granted_us: granted.mono_us,
        activated_us: activated.mono_us,
        activation_us: activated.activate_us,
        frames: activated.resent.zip(activated.delivered).map(|(resent, delivered)| Frames { resent, delivered }),
        generation: activated.generation.or(granted.generation),
    })
}
