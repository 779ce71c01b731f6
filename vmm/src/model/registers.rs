//! The program's registers: all of its state that is not in RAM.

use super::layout::Layout;
use super::options::{MAX_RATE, ProgramOptions};
use crate::disk::SECTOR_BYTES;
use crate::state::codec::{Decoder, Encoder, Malformed, Saved};

/// Times and counters of a saved state are below this, so that sums of them cannot overflow.
const MAX_COUNT: u64 = 1 << 62;
/// Guest time stands still from here on, a hundred years after boot.
pub(super) const LAST_TIME: u64 = 1 << 61;
/// Counts on, up to the greatest value that a saved state may hold: what a state that was accepted becomes is accepted too.
pub(super) fn count(counter: &mut u64, by: u64) {
    *counter = counter.saturating_add(by).min(MAX_COUNT - 1);
}

pub(super) const MILLISECOND: u64 = 1_000_000;

/// The background load that dirties pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Load {
    /// Pages a second; 0 is no load.
    pub(super) rate: u64,
    /// Over how many pages it goes round, at least 1 when there is a load.
    pub(super) pages: u64,
    /// Guest time from which touches are counted.
    pub(super) since: u64,
    /// Touches done since then.
    pub(super) done: u64,
    /// Touches done since boot: the next page, and what is written to it.
    pub(super) touches: u64,
}

/// The UDP broadcast.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Beacon {
    /// Nanoseconds between two; 0 is none.
    pub(super) every: u64,
    /// Guest time of the next.
    pub(super) next: u64,
    /// Number of the next.
    pub(super) number: u64,
}

/// How far the log is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum LogPhase {
    /// The machine was just switched on: the log is read first.
    #[default]
    Replay,
    /// It was read; what is behind it has to go.
    Cut,
    Ready,
    /// The disk failed: nothing is changed any more.
    Broken,
}

/// The log of changes on disk 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Log {
    /// There is one.
    pub(super) on: bool,
    /// Every record is flushed before its reply.
    pub(super) always: bool,
    pub(super) phase: LogPhase,
    /// Its end in bytes, whole sectors.
    pub(super) tail: u64,
    /// Records before that.
    pub(super) records: u64,
}

/// All of the program's state that is not in RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Registers {
    /// Nanoseconds of guest time since boot.
    pub(super) now: u64,
    /// State of the random numbers.
    pub(super) random: u64,
    /// The first step has been made.
    pub(super) greeted: bool,
    pub(super) load: Load,
    pub(super) beacon: Beacon,
    /// Frames taken in since boot.
    pub(super) frames_in: u64,
    /// Frames sent since boot.
    pub(super) frames_out: u64,
    /// Requests answered since boot.
    pub(super) requests: u64,
    pub(super) log: Log,
}

impl Registers {
    /// The registers at boot.
    pub(super) fn boot(options: &ProgramOptions, layout: &Layout) -> Self {
        let mut registers = Self { random: options.seed, ..Self::default() };
        let pages = options.working_set_pages.unwrap_or(layout.load_pages).min(layout.load_pages);
        registers.set_load(options.dirty_pages_per_second, pages);
        registers.beacon.every = options.beacon_ms * MILLISECOND;
        registers.log.on = options.disk_log;
        registers.log.always = options.append_fsync_always;
        registers
    }

    /// The next random number (SplitMix64: small, fast, and good enough for sequence numbers of a test guest).
    pub(super) fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Gives the background load a new rate and working set.
    pub(super) fn set_load(&mut self, rate: u64, pages: u64) {
        self.load = Load { rate, pages, since: self.now, done: 0, touches: self.load.touches };
    }

    /// Checks that decoded registers are ones that a program in this RAM, with a log of at most so many bytes, can have.
    pub(super) fn validate(&self, layout: &Layout, log_capacity: Option<u64>) -> Result<(), Malformed> {
        let Self { now, random: _, greeted: _, load, beacon, frames_in, frames_out, requests, log } = self;
        let Log { on, always: _, phase, tail, records } = log;
        if *on && (*tail > log_capacity.unwrap_or(0) || !tail.is_multiple_of(SECTOR_BYTES) || *records > *tail) {
            return Err(Malformed(format!("a log of {records} records in {tail} bytes")));
        }
        if !on && (*phase, *tail, *records) != (LogPhase::Replay, 0, 0) {
            return Err(Malformed::new("no log, and something in it"));
        }
        let Load { rate, pages, since, done, touches } = load;
        let Beacon { every, next, number } = beacon;
        let counts = [now, since, done, touches, every, next, number, frames_in, frames_out, requests];
        if counts.into_iter().any(|count| *count >= MAX_COUNT) {
            return Err(Malformed::new("a clock or counter that no machine reaches"));
        }
        if *rate > MAX_RATE || *pages > layout.load_pages || (*rate > 0 && *pages == 0) {
            return Err(Malformed::new(format!("a load of {rate} pages a second over {pages} pages")));
        }
        if *now > LAST_TIME {
            return Err(Malformed::new("a clock that no machine reaches"));
        }
        if *every >= LAST_TIME || *next >= LAST_TIME + LAST_TIME {
            return Err(Malformed::new("a beacon that no machine sends"));
        }
        if since > now {
            return Err(Malformed::new("a load that began in the future"));
        }
        Ok(())
    }
}

impl Saved for Registers {
    const VERSION: u16 = 2;

    fn encode(&self, out: &mut Encoder) {
        let Self { now, random, greeted, load, beacon, frames_in, frames_out, requests, log } = self;
        let Log { on, always, phase, tail, records } = log;
        let Load { rate, pages, since, done, touches } = load;
        let Beacon { every, next, number } = beacon;
        out.u8(u8::from(*greeted));
        for value in [now, random, rate, pages, since, done, touches, every, next, number] {
            out.u64(*value);
        }
        for value in [frames_in, frames_out, requests] {
            out.u64(*value);
        }
        out.u8(u8::from(*on));
        out.u8(u8::from(*always));
        out.u8(match phase {
            LogPhase::Replay => 0,
            LogPhase::Cut => 1,
            LogPhase::Ready => 2,
            LogPhase::Broken => 3,
        });
        out.u64(*tail);
        out.u64(*records);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            greeted: input.flag()?,
            now: input.u64()?,
            random: input.u64()?,
            load: Load {
                rate: input.u64()?,
                pages: input.u64()?,
                since: input.u64()?,
                done: input.u64()?,
                touches: input.u64()?,
            },
            beacon: Beacon { every: input.u64()?, next: input.u64()?, number: input.u64()? },
            frames_in: input.u64()?,
            frames_out: input.u64()?,
            requests: input.u64()?,
            log: Log {
                on: input.flag()?,
                always: input.flag()?,
                phase: match input.u8()? {
                    0 => LogPhase::Replay,
                    1 => LogPhase::Cut,
                    2 => LogPhase::Ready,
                    3 => LogPhase::Broken,
                    other => return Err(Malformed(format!("a log in phase {other}"))),
                },
                tail: input.u64()?,
                records: input.u64()?,
            },
        })
    }
}
