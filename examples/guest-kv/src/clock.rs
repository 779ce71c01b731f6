//! Time: the TSC, and the local APIC's timer to wake up by. Both are calibrated against the PIT at boot.

use core::cell::Cell;

use crate::apic;
use crate::boot::{inb, outb, timer_interrupts, tsc};

const PIT_CHANNEL_0: u16 = 0x40;
const PIT_COMMAND: u16 = 0x43;
const PIT_HZ: u64 = 1_193_182;
/// Length of the calibration, in periods of the PIT: 20 ms.
const WINDOW: u16 = 23_864;
/// Ticks of the local APIC's timer (divided) after which a PIT that does not count is given up: 80 ms under KVM.
const PATIENCE: u32 = 5_000_000;
/// Frequency of the (divided) local APIC timer under KVM, for machines without a PIT.
const NOMINAL_APIC_HZ: u64 = 1_000_000_000 / apic::TIMER_DIVIDER;

/// Tries before the host is taken to be too busy for a calibration.
const TRIES: u32 = 50;
/// The TSC is then taken to run at 2 GHz: time is wrong, but goes on.
const NOMINAL_TSC_HZ: u64 = 2_000_000_000;

/// The clock of the guest. It never goes back, even where the TSC does: a guest that was moved to another host may see
/// that host's counter.
pub(crate) struct Clock {
    /// Nanoseconds for each tick of the TSC, with 32 fraction bits.
    scale: u64,
    last_tsc: Cell<u64>,
    elapsed_ns: Cell<u64>,
    /// Ticks of the local APIC's timer for each nanosecond, with 32 fraction bits.
    apic_scale: u64,
    /// The instant that the timer is set to and the interrupts that it had raised then.
    armed: Cell<Option<(u64, u64)>>,
}

/// One look at the PIT, the TSC and the local APIC's timer, as close together as possible.
struct Sample {
    pit: u16,
    tsc: u64,
    apic: u32,
}

fn sample() -> Sample {
    // Each access may be an exit of unknown length: of some tries the shortest is believed.
    let one = || {
        let before = tsc();
        outb(PIT_COMMAND, 0); // latch channel 0
        let apic = apic::timer_remaining();
        let after = tsc();
        let pit = u16::from_le_bytes([inb(PIT_CHANNEL_0), inb(PIT_CHANNEL_0)]);
        (after.wrapping_sub(before), Sample { pit, tsc: before, apic })
    };
    let mut best = one();
    for _ in 0..4 {
        let next = one();
        if next.0 < best.0 {
            best = next;
        }
    }
    best.1
}

/// How far the three counters went in the same time.
struct Window {
    pit: u64,
    tsc: u64,
    apic: u64,
}

/// Lets the counters run for [`WINDOW`]. `None` if the processor was away for so long that the PIT, whose counter
/// wraps after 55 ms, may have gone round.
fn measure() -> Option<Window> {
    let start = sample();
    let (mut last, mut longest) = (start.tsc, 0);
    loop {
        let now = sample();
        longest = longest.max(now.tsc.wrapping_sub(last));
        last = now.tsc;
        let (pit, apic) = (start.pit.wrapping_sub(now.pit), start.apic.wrapping_sub(now.apic));
        if pit >= WINDOW || apic > PATIENCE {
            let tsc = now.tsc.wrapping_sub(start.tsc);
            let window = Window { pit: pit.into(), tsc: tsc.max(1), apic: u64::from(apic).max(1) };
            return (longest <= tsc / 2).then_some(window);
        }
    }
}

impl Clock {
    /// Calibrates; takes 20 ms, and more on a host that is busy.
    pub(crate) fn calibrate() -> Self {
        // Channel 0 as a rate generator of 65,536 periods, which counts evenly; its interrupt is masked everywhere.
        for (port, value) in [(PIT_COMMAND, 0x34), (PIT_CHANNEL_0, 0), (PIT_CHANNEL_0, 0)] {
            outb(port, value);
        }
        apic::start_timer(u32::MAX);
        let window = (0..TRIES).find_map(|_| measure());
        apic::start_timer(0);
        // One shot that nobody sees: the PIT is quiet afterwards.
        for (port, value) in [(PIT_COMMAND, 0x30), (PIT_CHANNEL_0, 1), (PIT_CHANNEL_0, 0)] {
            outb(port, value);
        }
        let window = window.unwrap_or(Window { pit: 0, tsc: NOMINAL_TSC_HZ, apic: NOMINAL_APIC_HZ });
        let ns = if window.pit >= u64::from(WINDOW) {
            window.pit * 1_000_000_000 / PIT_HZ
        } else {
            window.apic * 1_000_000_000 / NOMINAL_APIC_HZ
        };
        Self {
            scale: (ns << 32) / window.tsc,
            last_tsc: Cell::new(tsc()),
            elapsed_ns: Cell::new(0),
            apic_scale: (window.apic << 32) / ns.max(1),
            armed: Cell::new(None),
        }
    }

    /// Nanoseconds since boot.
    pub(crate) fn now_ns(&self) -> u64 {
        let now = tsc();
        let ticks = now.wrapping_sub(self.last_tsc.get());
        // More than half of the range is a counter that went back.
        if ticks < 1 << 63 {
            let ns = (u128::from(ticks) * u128::from(self.scale)) >> 32;
            self.elapsed_ns.set(self.elapsed_ns.get().saturating_add(u64::try_from(ns).unwrap_or(u64::MAX)));
        }
        self.last_tsc.set(now);
        self.elapsed_ns.get()
    }

    /// Frequency of the TSC in kHz.
    pub(crate) fn tsc_khz(&self) -> u64 {
        (1_000_000 << 32) / self.scale.max(1)
    }

    /// Makes sure that there is an interrupt at `deadline` (in nanoseconds since boot) or before it.
    ///
    /// A timer that is already set to an earlier instant is left alone: one early wake-up costs less than an exit for
    /// every request, whose retransmission timer is set and cancelled again.
    pub(crate) fn wake_at(&self, deadline: u64) {
        let fired = timer_interrupts();
        if self.armed.get().is_some_and(|(at, count)| count == fired && at <= deadline) {
            return;
        }
        let wait = deadline.saturating_sub(self.elapsed_ns.get());
        let ticks = (u128::from(wait) * u128::from(self.apic_scale)) >> 32;
        let ticks = u32::try_from(ticks).unwrap_or(u32::MAX).max(1);
        self.armed.set(Some((deadline, fired)));
        apic::start_timer(ticks);
    }
}
