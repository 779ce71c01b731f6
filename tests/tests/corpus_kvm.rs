//! Bad-input corpus, rows 12 and 13, with the real KVM: sections of a guest that ran, changed, are put into a standby machine. It takes
//! them or refuses them with a typed error, and after an error it does not run. What was taken is read again and not run: what a guest
//! does with a state that it never had is its own affair, and what the host's kernel makes of that is not this test's.
//!
//! `FT_SECTIONS` sets how many changed states are tried (2,500), `FT_SEED` where the changes are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tests::machine::client::Counter;
use tests::machine::{Recorder, build, demo_config, demo_guest, no_kvm};
use tests::real::rng::Rng;
use vmm::machine::{RestoreError, RunError};
use vmm::{ClockPolicy, KvmMachine, Machine, MachineConfig, PausedVm, Section, SocketPort};

const CASES: u64 = 2_500;
const RAM: u64 = 48 << 20;

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}={v:?} is not a number")))
}

/// A guest that served a client: its configuration, its state, its RAM.
fn ran(
    outputs: &Arc<Recorder>,
    frames: crossbeam::channel::Receiver<Vec<u8>>,
) -> (MachineConfig, Vec<Section>, Arc<SocketPort>) {
    let (guest_end, host_end) = SocketPort::pair().expect("a socket pair");
    let port = Arc::new(guest_end);
    let config = demo_config(demo_guest(), 1, RAM);
    let mut machine = build(&config, outputs, &port);
    machine.load().expect("the demo guest is bootable");
    machine.run().expect("a loaded machine runs");
    let client = Counter::start(frames, Arc::new(host_end), Vec::new());
    let began = Instant::now();
    while client.count() < 20 {
        let waits = client.is_alive() && began.elapsed() < Duration::from_secs(60);
        assert!(waits, "the guest serves nobody; its console:\n{}", String::from_utf8_lossy(&outputs.console()));
        std::thread::yield_now();
    }
    let mut paused = PausedVm::pause(&mut machine).expect("the guest stops");
    let sections = paused.capture().expect("the state can be read");
    let _ = paused.stay_stopped();
    drop(client.finish());
    (config, sections, port)
}

/// One of the changes that a bad peer or bad memory could make.
fn change(rng: &mut Rng, sections: &mut Vec<Section>) {
    let count = u64::try_from(sections.len()).expect("a few");
    // The vCPU's section has most of what only KVM can judge.
    let at = if rng.range(0, 2) == 0 { 0 } else { index(rng.range(0, count)) };
    let length = sections[at].bytes.len();
    let place = |rng: &mut Rng, width: usize| index(rng.range(0, u64::try_from(length - width + 1).expect("a length")));
    match rng.range(0, 16) {
        0 => sections[at].version = u16::try_from(rng.range(0, 3)).expect("small"),
        1 => drop(sections.remove(at)),
        2 => {
            let again = sections[at].clone();
            sections.push(again);
        }
        3 if length > 0 => {
            let cut = place(rng, 1);
            sections[at].bytes.truncate(cut);
        }
        4 => sections[at].bytes.push(0),
        5 => {
            let other = index(rng.range(0, count));
            let bytes = sections[other].bytes.clone();
            sections[at].bytes = bytes;
        }
        6..=8 if length >= 8 => {
            let (from, edge) = (place(rng, 8), [0, 1, 0x8000_0000, u64::MAX, 1 << 63, 0xffff_8000_0000_0000, 1 << 47]);
            let value = edge[index(rng.range(0, 7))].to_le_bytes();
            let width = index(rng.range(1, 9));
            sections[at].bytes[from..from + width].copy_from_slice(&value[..width]);
        }
        9 if length > 0 => {
            let from = place(rng, 1);
            sections[at].bytes[from..].iter_mut().take(64).for_each(|byte| *byte = rng.next_u64().to_le_bytes()[0]);
        }
        _ if length > 0 => {
            for _ in 0..rng.range(1, 9) {
                let (byte, bit) = (place(rng, 1), rng.range(0, 8));
                sections[at].bytes[byte] ^= 1 << bit;
            }
        }
        _ => {}
    }
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("an index")
}

fn refuses_to_run(machine: &mut KvmMachine, why: &RestoreError) {
    assert!(matches!(machine.run(), Err(RunError::Hollow)), "it runs after {why}");
}

#[test]
fn changed_sections_are_taken_or_refused_and_nothing_half_restored_runs() {
    if no_kvm("changed_sections_are_taken_or_refused_and_nothing_half_restored_runs") {
        return;
    }
    let (outputs, frames) = Recorder::new();
    let (config, sound, port) = ran(&outputs, frames);
    let (cases, seed) = (from_env("FT_SECTIONS", CASES), from_env("FT_SEED", 1));
    let mut rng = Rng::new(seed);
    let mut standby = build(&config, &outputs, &port);
    let (mut taken, mut refusals) = (0, BTreeMap::<String, u64>::new());
    for n in 0..cases {
        let mut sections = sound.clone();
        for _ in 0..rng.range(1, 3) {
            if !sections.is_empty() {
                change(&mut rng, &mut sections);
            }
        }
        match standby.restore(&sections, ClockPolicy::ResumeFromCheckpoint) {
            Err(error) => {
                refuses_to_run(&mut standby, &error);
                let kind = match &error {
                    RestoreError::Missing(_) => "missing".to_owned(),
                    RestoreError::Unexpected(_) => "unexpected".to_owned(),
                    RestoreError::Version { .. } => "version".to_owned(),
                    RestoreError::Malformed { kind, .. } => format!("malformed {:#06x}", kind.0),
                    RestoreError::Host { what, .. } => what.split(':').next().unwrap_or_default().to_owned(),
                };
                *refusals.entry(kind).or_default() += 1;
            }
            Ok(()) => {
                taken += 1;
                // Whatever it is, it is a state: it can be read again, as an error or as sections.
                let mut paused = PausedVm::pause(&mut standby).expect("a machine that never ran stands");
                if let Ok(again) = paused.capture() {
                    assert_eq!(again.len(), sound.len(), "case {n}, seed {seed}");
                }
                let _ = paused.stay_stopped();
                standby = build(&config, &outputs, &port);
            }
        }
    }
    // After all of that, the sound state still makes a machine that can run.
    let mut last = build(&config, &outputs, &port);
    last.restore(&sound, ClockPolicy::ResumeFromCheckpoint).expect("the sound state");
    println!("{cases} changed states, seed {seed}: {taken} taken, {} refused: {refusals:?}", cases - taken);
    assert!(taken > 0 && refusals.len() > 5, "{taken} taken, refusals: {refusals:?}");
}
