//! The model machine does what the machine on KVM does: nothing that its guest writes is missed, and a captured state goes on
//! in a fresh machine as if nothing had happened.
//!
//! Checkpoints at random instants while a client of its own TCP stack counts on one connection; each dirty set is applied to a
//! shadow, all of RAM is compared with it byte by byte, and every tenth checkpoint is put into a fresh machine.
//! `FT_CHECKPOINTS` sets their number (1,000), `FT_SEED` the instants.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tests::machine::client::Counter;
use tests::machine::shadow::Shadow;
use tests::machine::{GUEST_MAC, Recorder};
use tests::real::rng::Rng;
use vmm::machine::{PauseError, RestoreError, RunError};
use vmm::{
    ClockPolicy, FramePort, Machine, MachineConfig, MachineEvent, MachineIo, ModelBuildError, ModelMachine, NicConfig,
    Outputs, PausedVm, Section, SectionKind, SocketPort, Throttle, Tracking,
};

/// How long anything may take that takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}={v:?} is not a number")))
}

fn config(words: &str) -> MachineConfig {
    MachineConfig {
        vcpus: 1,
        memory_bytes: 8 << 20,
        kernel: "ignored".into(),
        initrd: None,
        cmdline: format!("ip=10.77.0.10/24 {words}"),
        nics: vec![NicConfig { mac: GUEST_MAC }],
        disks: Vec::new(),
    }
}

/// What is outside of a machine, and stays when the machine is another.
struct Outside {
    outputs: Arc<Recorder>,
    port: Arc<SocketPort>,
}

impl Outside {
    /// Also the client's ends: frames from the guest, and the cable to it.
    fn new() -> (Self, crossbeam::channel::Receiver<Vec<u8>>, Arc<SocketPort>) {
        let (outputs, frames) = Recorder::new();
        let (guest_end, host_end) = SocketPort::pair().expect("a socket pair");
        (Self { outputs, port: Arc::new(guest_end) }, frames, Arc::new(host_end))
    }

    fn io(&self) -> MachineIo {
        let (outputs, port) = (Arc::clone(&self.outputs), Arc::clone(&self.port));
        MachineIo {
            outputs: outputs as Arc<dyn Outputs>,
            ports: vec![port as Arc<dyn FramePort>],
            disks: Vec::new(),
            console_input: None,
        }
    }

    fn build(&self, config: &MachineConfig) -> ModelMachine {
        ModelMachine::build(config, self.io()).expect("a model machine")
    }

    fn boot(&self, config: &MachineConfig) -> ModelMachine {
        let mut machine = self.build(config);
        machine.load().expect("there is nothing to load");
        machine.track_dirty(Tracking::Plain).expect("writes are tracked");
        machine.run().expect("a loaded machine runs");
        machine
    }
}

#[test]
fn checkpoints_miss_nothing_and_a_connection_survives_every_restore() {
    let (count, seed) = (from_env("FT_CHECKPOINTS", 1_000), from_env("FT_SEED", 1));
    let config = config("dirty=20000,300");
    let (outside, frames, cable) = Outside::new();
    let mut machine = outside.build(&config);
    machine.load().expect("there is nothing to load");
    let mut shadow = Shadow::zeroed(machine.ram());
    machine.track_dirty(Tracking::Plain).expect("writes are tracked");
    machine.run().expect("a loaded machine runs");
    let client = Counter::start(frames, cable, vec!["FLUSHALL".into()]);
    let mut rng = Rng::new(seed);
    let (mut counted, mut moved, mut pages) = (0, Instant::now(), 0);
    for n in 1..=count {
        std::thread::sleep(rng.duration(Duration::from_micros(50), Duration::from_millis(4)));
        let mut paused = PausedVm::pause(&mut machine).expect("the guest stops");
        let sections = paused.capture().expect("the state can be read");
        let dirty = paused.take_dirty().expect("the log can be read");
        pages += dirty.len();
        shadow.apply(&dirty, paused.ram());
        dirty.retire();
        assert_eq!(shadow.differing(paused.ram()), [], "checkpoint {n}, seed {seed}: pages missing from the dirty set");
        if n % 10 == 0 {
            let _ = paused.stay_stopped();
            machine.shut_down();
            let mut fresh = outside.build(&config);
            shadow.write_to(fresh.ram());
            fresh.restore(&sections, ClockPolicy::ResumeFromCheckpoint).expect("the state fits an equal machine");
            fresh.track_dirty(Tracking::Plain).expect("writes are tracked");
            fresh.run().expect("a restored machine runs");
            machine = fresh;
        } else {
            paused.resume().expect("the guest resumes");
        }
        if client.count() > counted {
            (counted, moved) = (client.count(), Instant::now());
        }
        if moved.elapsed() > PATIENCE || !client.is_alive() {
            panic!("checkpoint {n}, seed {seed}: the client stands at {counted}: {:?}", client.finish());
        }
    }
    let answers = client.finish().expect("every answer in its turn");
    println!("{count} checkpoints, {} restores, {pages} pages, {answers} answers", count / 10);
    assert!(answers > count / 10, "the guest served {answers} requests in {count} checkpoints");
    assert!(pages > 0);
}

/// A slowed guest writes less in the same time, stops at once although it rests for most of its time, and is as fast as before afterwards.
#[test]
fn a_throttled_guest_writes_less_and_stops_at_once() {
    let (outside, _frames, _cable) = Outside::new();
    let mut machine = outside.boot(&config("dirty=5000,500"));
    let mut written = |throttle: Throttle| {
        machine.throttle(throttle).expect("it can be slowed");
        let (mut pages, mut stops) = (0, Vec::new());
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(20));
            let began = Instant::now();
            let mut paused = PausedVm::pause(&mut machine).expect("the guest stops");
            stops.push(began.elapsed());
            let dirty = paused.take_dirty().expect("the log can be read");
            pages += dirty.len();
            dirty.retire();
        }
        stops.sort_unstable();
        (pages, stops[stops.len() / 2])
    };
    written(Throttle::NONE);
    let (free, slowed, again) = (written(Throttle::NONE).0, written(Throttle::percent(95)), written(Throttle::NONE).0);
    assert!(slowed.0 < free / 3 && slowed.0 < again / 3, "{free}, {slowed:?}, {again}");
    assert!(slowed.1 < Duration::from_millis(5), "a stop waits for the end of a rest: {slowed:?}");
}

/// A stopped machine neither writes nor speaks, and time does not pass for its guest; while it runs, all three.
#[test]
fn stop_is_exact() {
    let (outside, frames, _cable) = Outside::new();
    let mut machine = outside.boot(&config("dirty=1000000 beacon=1"));
    for _ in 0..20 {
        frames.recv_timeout(PATIENCE).expect("a beacon each millisecond");
        let mut paused = PausedVm::pause(&mut machine).expect("the guest stops");
        paused.take_dirty().expect("the log can be read").retire();
        let before = paused.capture().expect("the state can be read");
        while frames.try_recv().is_ok() {}
        std::thread::sleep(Duration::from_millis(5));
        assert!(paused.take_dirty().expect("the log can be read").is_empty());
        assert!(frames.is_empty());
        assert_eq!(paused.capture().expect("the state can be read"), before);
        paused.resume().expect("the guest resumes");
    }
    assert!(outside.outputs.console().starts_with(b"model ready 10.77.0.10:6379\n"));
}

/// Guest time counts while the guest sleeps, over checkpoints that come more often than it wakes; not over an outage.
#[test]
fn guest_time_goes_on_from_the_checkpoint() {
    let (outside, frames, _cable) = Outside::new();
    let config = config("beacon=100");
    let mut machine = outside.boot(&config);
    frames.recv_timeout(PATIENCE).expect("the first beacon at once");
    let (began, mut sections) = (Instant::now(), Vec::new());
    while frames.is_empty() {
        assert!(began.elapsed() < PATIENCE, "the clock stands still");
        std::thread::sleep(Duration::from_millis(2));
        let mut paused = PausedVm::pause(&mut machine).expect("the guest stops");
        sections = paused.capture().expect("the state can be read");
    }
    assert!(began.elapsed() >= Duration::from_millis(95), "the second beacon came after {:?}", began.elapsed());
    machine.shut_down();
    std::thread::sleep(Duration::from_millis(300));
    while frames.try_recv().is_ok() {}
    let mut fresh = outside.build(&config);
    fresh.restore(&sections, ClockPolicy::ResumeFromCheckpoint).expect("the state fits an equal machine");
    fresh.run().expect("a restored machine runs");
    let again = PausedVm::pause(&mut fresh).expect("the guest stops").capture().expect("the state can be read");
    // The clock is the first number after the flag.
    let now = |s: &[Section]| u64::from_le_bytes(s[0].bytes[1..9].try_into().expect("eight bytes"));
    let passed = now(&again).checked_sub(now(&sections)).expect("guest time never runs backwards");
    assert!(passed < 200_000_000, "the outage of 300 ms took {passed} ns of guest time");
}

#[test]
fn the_guest_ends_itself_and_says_how() {
    for (command, wanted) in [
        ("FT.POWEROFF", MachineEvent::PoweredOff),
        ("FT.CRASH", MachineEvent::Crashed { vcpu: 0, reason: "FT.CRASH was asked for".into() }),
    ] {
        let (outside, frames, cable) = Outside::new();
        let mut machine = outside.boot(&config(""));
        let client = Counter::start(frames, cable, vec![command.into()]);
        assert_eq!(machine.events().recv_timeout(PATIENCE), Ok(wanted));
        assert!(matches!(PausedVm::pause(&mut machine), Err(PauseError::Ended(_))));
        assert!(matches!(machine.run(), Err(RunError::Ended(_))));
        drop(client.finish());
    }
}

#[test]
fn sections_that_are_not_a_state_of_this_machine_are_refused() {
    let (outside, _frames, _cable) = Outside::new();
    let good = {
        let mut machine = outside.boot(&config("dirty=10"));
        let mut paused = PausedVm::pause(&mut machine).expect("the guest stops");
        paused.capture().expect("the state can be read").remove(0)
    };
    let restore = |sections: &[Section]| {
        let mut machine = outside.build(&config("dirty=10"));
        let result = machine.restore(sections, ClockPolicy::ResumeFromCheckpoint);
        assert_eq!(result.is_ok(), machine.run().is_ok(), "only a restored machine runs");
        result
    };
    restore(std::slice::from_ref(&good)).expect("the state fits an equal machine");
    assert!(matches!(restore(&[]), Err(RestoreError::Missing(SectionKind::MODEL))));
    let foreign = Section { kind: SectionKind::CLOCK, ..good.clone() };
    assert!(matches!(restore(std::slice::from_ref(&foreign)), Err(RestoreError::Unexpected(SectionKind::CLOCK))));
    for second in [foreign.clone(), good.clone()] {
        assert!(
            matches!(restore(&[good.clone(), second.clone()]), Err(RestoreError::Unexpected(k)) if k == second.kind)
        );
    }
    let other = Section { version: good.version + 1, ..good.clone() };
    assert!(matches!(restore(&[other]), Err(RestoreError::Version { .. })));
    for length in 0..good.bytes.len() {
        let cut = Section { bytes: good.bytes[..length].to_vec(), ..good.clone() };
        assert!(matches!(restore(&[cut]), Err(RestoreError::Malformed { .. })), "cut at {length}");
    }
    let mut long = good.clone();
    long.bytes.push(0);
    assert!(matches!(restore(&[long]), Err(RestoreError::Malformed { .. })));
    for at in 0..good.bytes.len() {
        let mut changed = good.clone();
        changed.bytes[at] = 0xff;
        // Refused or taken, and then run: never a panic.
        drop(restore(&[changed]));
    }
}

#[test]
fn parts_lists_that_make_no_machine_are_refused() {
    let build = |config: &MachineConfig| {
        let (outside, _, _) = Outside::new();
        ModelMachine::build(config, outside.io()).map(drop)
    };
    assert!(build(&config("")).is_ok());
    assert!(matches!(build(&config("port=0")), Err(ModelBuildError::CommandLine(_))));
    assert!(matches!(build(&config("dirty=1,513")), Err(ModelBuildError::Program(_))), "8 MiB have 512 pages for it");
    assert!(matches!(build(&MachineConfig { vcpus: 3, ..config("") }), Err(ModelBuildError::Config(_))));
    assert!(matches!(build(&MachineConfig { nics: Vec::new(), ..config("") }), Err(ModelBuildError::Config(_))));
    assert!(matches!(build(&MachineConfig { memory_bytes: 4096, ..config("") }), Err(ModelBuildError::Memory(_))));
    let multicast = vec![NicConfig { mac: [1; 6] }];
    assert!(matches!(build(&MachineConfig { nics: multicast, ..config("") }), Err(ModelBuildError::Config(_))));
}
