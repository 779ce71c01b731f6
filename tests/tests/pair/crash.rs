//! A few power cuts at random moments; `cargo crash -- --cuts 500` is the long run.

use tests::real::MachineKind;
use tests::real::crash::{artifacts, cut_once};
use tests::real::scene::play_with;

const CUTS: u64 = 10;

#[test]
fn kvm_acknowledged_writes_survive_power_cuts() {
    play_with(MachineKind::Kvm, "power_cuts", artifacts, |scene| {
        let mut acked = 0;
        for seed in 1..=CUTS {
            let found = cut_once(scene.artifacts(), seed)?;
            assert_eq!((found.missing, found.missing_there), (0, 0), "seed {seed}: {found:?}");
            acked += found.acked;
        }
        assert!(acked > 0, "the guest never acknowledged anything");
        Ok(())
    });
}
