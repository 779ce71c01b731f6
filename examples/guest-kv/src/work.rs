//! The computing load: always the same work, counted, so that a client can tell how much of its speed the guest keeps.

use core::hint::black_box;

/// Steps of a unit: about two microseconds.
const STEPS: u32 = 1_000;
/// Units between two looks at the network.
const SLICE: u32 = 32;

/// The load; off at first.
#[derive(Default)]
pub(crate) struct WorkLoad {
    on: bool,
    units: u64,
    state: u64,
}

impl WorkLoad {
    /// Units done so far.
    pub(crate) fn units(&self) -> u64 {
        self.units
    }

    pub(crate) fn set(&mut self, on: bool) {
        self.on = on;
    }

    /// Does some units. True if there is more, which there always is.
    pub(crate) fn work(&mut self) -> bool {
        if self.on {
            for _ in 0..SLICE {
                for _ in 0..STEPS {
                    // Each step waits for the one before: nothing is done at once, and nothing left out.
                    self.state = black_box(self.state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1));
                }
                self.units = self.units.wrapping_add(1);
            }
        }
        self.on
    }
}
