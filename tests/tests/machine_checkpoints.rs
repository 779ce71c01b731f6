//! Nothing that a guest writes is missed, and nothing that a machine is made of is left behind.
//!
//! Checkpoints at random instants of a guest that serves a client, ticks, and writes from CPL 0 and CPL 3. Each dirty set is applied to a
//! shadow; while the guest is still stopped, all of its RAM is compared with the shadow byte by byte. Every hundredth
//! checkpoint is put into a fresh machine, which goes on serving the same connection.
//!
//! `FT_CHECKPOINTS` sets their number (5,000), `FT_SEED` the instants, `FT_RAM_MIB` the size of RAM (48).

use std::sync::Arc;
use std::time::{Duration, Instant};

use tests::machine::client::Counter;
use tests::machine::shadow::Shadow;
use tests::machine::{Recorder, build, demo_config, demo_guest, no_kvm};
use tests::real::rng::Rng;
use vmm::{ClockPolicy, KvmMachine, Machine, MachineConfig, PausedVm, SocketPort, Tracking};

const DEFAULT_CHECKPOINTS: u64 = 5_000;
const RESTORE_EVERY: u64 = 100;
/// A long run says every so often that it is alive.
const WORD_EVERY: u64 = 10_000;
/// How long the client may stand still before that counts as a failure.
const PATIENCE: Duration = Duration::from_secs(10);

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}={v:?} is not a number")))
}

/// Durations of one part of the pause, in the order in which they were measured.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn line(&mut self, name: &str) -> String {
        self.0.sort_unstable();
        let at = |share: usize| self.0.get(self.0.len() * share / 1000).copied().unwrap_or_default().as_micros();
        format!("{name:>12} {:>8} {:>8} {:>8}", at(500), at(990), self.0.last().map_or(0, Duration::as_micros))
    }
}

/// One machine after the other, and what is known about them.
struct Run {
    config: MachineConfig,
    outputs: Arc<Recorder>,
    port: Arc<SocketPort>,
    machine: KvmMachine,
    shadow: Shadow,
    tracking: Tracking,
    mismatches: u64,
    pages: u64,
    /// Pages of sets that were not changed.
    unchanged: u64,
    times: [Times; 6],
    activations: Times,
}

impl Run {
    /// Stops, captures, takes the dirty set, compares; and either resumes or goes on in a fresh machine.
    fn checkpoint(&mut self, replace: bool) {
        let mut paused = PausedVm::pause(&mut self.machine).expect("the guest stops");
        let sections = paused.capture().expect("the state can be read");
        let dirty = paused.take_dirty().expect("the log can be read");
        self.pages += u64::try_from(dirty.len()).expect("a count of pages");
        let began = Instant::now();
        self.unchanged += self.shadow.apply(&dirty, paused.ram());
        let copy = began.elapsed();
        dirty.retire();
        let differing = self.shadow.differing(paused.ram());
        if !differing.is_empty() {
            self.mismatches += 1;
            eprintln!("pages that changed and were not in the dirty set: {differing:x?}");
            self.shadow.copy_all(paused.ram());
        }
        if self.tracking == Tracking::Plain {
            let again = paused.take_dirty().expect("the log can be read twice");
            assert!(again.is_empty(), "a stopped machine wrote {:x?}", again.iter().collect::<Vec<_>>());
            again.retire();
        }
        if !replace {
            let timings = paused.resume().expect("the guest resumes");
            let stop = timings.stop;
            let parts = [stop.quiesce, stop.kick, stop.vcpu_state, timings.capture, timings.dirty, copy];
            for (times, part) in self.times.iter_mut().zip(parts) {
                times.0.push(part);
            }
            return;
        }
        let _ = paused.stay_stopped();
        let mut fresh = build(&self.config, &self.outputs, &self.port);
        self.shadow.write_to(fresh.ram());
        self.machine.shut_down();
        let began = Instant::now();
        fresh.restore(&sections, ClockPolicy::ResumeFromCheckpoint).expect("the state fits an equal machine");
        fresh.track_dirty(self.tracking).expect("writes can be logged");
        fresh.run().expect("a restored machine runs");
        self.activations.0.push(began.elapsed());
        self.machine = fresh;
    }
}

/// How many pages the guest writes over and over: with few of them, most are hot.
const PAGES: [(Tracking, u32); 2] = [(Tracking::Plain, 1024), (Tracking::HotPages, 24)];

fn checkpoints(vcpus: u8, count: u64, tracking: Tracking) {
    drop(env_logger::builder().is_test(true).try_init());
    let seed = from_env("FT_SEED", 1);
    let (_, pages) = PAGES.into_iter().find(|(of, _)| *of == tracking).expect("a tracked guest");
    let (outputs, frames) = Recorder::new();
    let (guest_end, host_end) = SocketPort::pair().expect("a socket pair");
    let port = Arc::new(guest_end);
    let config = demo_config(demo_guest(), vcpus, from_env("FT_RAM_MIB", 48) << 20);
    let mut machine = build(&config, &outputs, &port);
    machine.load().expect("the demo guest is bootable");
    let mut shadow = Shadow::zeroed(machine.ram());
    machine.track_dirty(tracking).expect("writes can be logged");
    shadow.copy_all(machine.ram());
    machine.run().expect("a loaded machine runs");

    let client = Counter::start(frames, Arc::new(host_end), vec![format!("FT.DIRTY 20000 {pages}")]);
    let times = Default::default();
    let activations = Times::default();
    let mut run = Run {
        config,
        outputs,
        port,
        machine,
        shadow,
        tracking,
        mismatches: 0,
        pages: 0,
        unchanged: 0,
        times,
        activations,
    };
    let mut rng = Rng::new(seed);
    let (mut counted, mut moved) = (0, Instant::now());
    let began = Instant::now();
    for n in 1..=count {
        std::thread::sleep(rng.duration(Duration::from_micros(50), Duration::from_millis(4)));
        run.checkpoint(n % RESTORE_EVERY == 0);
        if client.count() > counted {
            (counted, moved) = (client.count(), Instant::now());
        }
        if n % WORD_EVERY == 0 {
            eprintln!("{n} checkpoints, {} mismatches, {counted} answers", run.mismatches);
        }
        let stands_still = moved.elapsed() > PATIENCE || !client.is_alive();
        if stands_still {
            let event = run.machine.events().try_recv();
            let console = String::from_utf8_lossy(&run.outputs.console()).into_owned();
            panic!(
                "checkpoint {n}, seed {seed}: the client stands at {counted}: {:?}; machine: {event:?}; console:\n{console}",
                client.finish()
            );
        }
    }
    let answers = client.finish().expect("every answer in its turn");
    println!(
        "{count} checkpoints, {vcpus} vCPU, seed {seed}: {} mismatches, {} restores, {} pages each, {answers} answers, {:.1} s",
        run.mismatches,
        count / RESTORE_EVERY,
        run.pages / count,
        began.elapsed().as_secs_f64()
    );
    println!("{:>12} {:>8} {:>8} {:>8}  us", "", "p50", "p99", "max");
    for (times, name) in run.times.iter_mut().zip(["quiesce", "kick", "of it state", "capture", "dirty log", "copy"]) {
        println!("{}", times.line(name));
    }
    println!("{}", run.activations.line("activation"));
    assert_eq!(run.mismatches, 0);
    // Devices and interrupts write the same bytes anew now and then; hot pages are named because they are hot.
    let unchanged = run.unchanged as f64 / run.pages as f64;
    println!("{:.1} % of the named pages were as before", unchanged * 100.0);
    assert!(tracking == Tracking::Plain || unchanged > 0.02, "pages become hot: {unchanged}");
    assert!(answers > count / 10, "the guest served {answers} requests in {count} checkpoints");
}

#[test]
fn checkpoints_of_one_vcpu_miss_nothing() {
    if !no_kvm("checkpoints_of_one_vcpu_miss_nothing") {
        checkpoints(1, from_env("FT_CHECKPOINTS", DEFAULT_CHECKPOINTS), Tracking::Plain);
    }
}

/// The guest leaves the second vCPU alone: it waits for its start-up signal, and is stopped, captured and restored like the first.
#[test]
fn checkpoints_of_two_vcpus_miss_nothing() {
    if !no_kvm("checkpoints_of_two_vcpus_miss_nothing") {
        checkpoints(2, from_env("FT_CHECKPOINTS", DEFAULT_CHECKPOINTS) / 5, Tracking::Plain);
    }
}

/// Pages whose bits are not cleared are in every set, and those on trial are protected again: nothing is missed, and much is named in vain.
#[test]
fn checkpoints_with_hot_pages_miss_nothing() {
    if !no_kvm("checkpoints_with_hot_pages_miss_nothing") {
        checkpoints(1, from_env("FT_CHECKPOINTS", DEFAULT_CHECKPOINTS) / 5, Tracking::HotPages);
    }
}
