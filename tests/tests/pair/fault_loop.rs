//! Two dozen real faults on each machine, drawn from a fixed seed: see `tests::real::faults`. By hand, and longer: `cargo faults`.

use std::time::Duration;

use tests::on_both_machines;
use tests::real::faults::{Options, run};
use tests::real::pair::DEFAULT_EPOCH;
use tests::real::scene::Scene;
use tests::real::{MachineKind, Result};

const FAULTS: u64 = 24;

on_both_machines!(faults_one_after_the_other);

/// No history that one guest without failures could not have produced, no two guests, no outage that the failure matrix does not name.
fn faults_one_after_the_other(scene: &mut Scene) -> Result<()> {
    // One with pages that are copied in every way, one with all that is the default.
    let (seed, epoch) = match scene.machine() {
        MachineKind::Kvm => (31, "latency=2ms capture=auto precopy=always"),
        MachineKind::Model => (32, DEFAULT_EPOCH),
    };
    let options = Options {
        machine: scene.machine(),
        epoch: epoch.into(),
        seed,
        first: 0,
        faults: FAULTS,
        longest: Duration::from_millis(1_200),
        kind: None,
        double: None,
        files: None,
        until: None,
    };
    let report = run(scene.artifacts(), &options, |_, _| {})?;
    println!("{}", report.table());
    // Each failure names its seed and round, and the directory with the logs.
    assert!(report.failures.is_empty(), "{}", report.failures.join("\n"));
    assert_eq!(report.faults, FAULTS);
    assert!(report.activations > 0 && report.double_faults > 0 && report.keys_checked > 0);
    assert!(report.guest_digests_compared > 0 && report.ram_compared > 0);
    Ok(())
}
