//! A load on a disk: what to do next, and how long it took. It does no I/O itself.

use crate::histogram::Histogram;
use crate::log::SECTOR;
use crate::resp::Out;

/// Most bytes of one read or write.
pub const MAX_BLOCK: usize = 256 << 10;
/// Most reads and writes under way.
pub const MAX_DEPTH: usize = 32;
/// Longest load in milliseconds: an hour.
pub const MAX_MILLIS: u64 = 3_600_000;

/// What the load consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Writes all over the region.
    RandomWrite,
    /// Reads all over the region.
    RandomRead,
    /// Writes from the start of the region to its end, and again.
    SequentialWrite,
}

/// When the load ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// After so many reads or writes.
    Count(u64),
    /// After so many milliseconds.
    Millis(u64),
}

/// A load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spec {
    /// What it consists of.
    pub pattern: Pattern,
    /// When it ends.
    pub limit: Limit,
    /// Bytes of each read or write, whole sectors, at most [`MAX_BLOCK`].
    pub block: usize,
    /// Reads or writes under way at once, 1 to [`MAX_DEPTH`].
    pub depth: usize,
    /// After so many writes the load waits for all of them, and then for a flush.
    pub fsync: Option<u64>,
}

/// One thing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Io {
    /// Read [`Spec::block`] bytes from this sector on.
    Read(u64),
    /// Write as many.
    Write(u64),
    /// Flush.
    Flush,
}

/// A load under way.
#[derive(Debug)]
pub struct Load {
    spec: Spec,
    first: u64,
    /// Blocks of the region.
    blocks: u64,
    random: u64,
    started: u64,
    ended: u64,
    submitted: u64,
    unflushed: u64,
    under_way: usize,
    flushing: bool,
    errors: u64,
    latency: Histogram,
    flush_latency: Histogram,
}

impl Load {
    /// A load on the sectors from `first` to before `end`, at `now` in nanoseconds. `None` if not one block fits.
    #[must_use]
    pub fn new(spec: Spec, first: u64, end: u64, seed: u64, now: u64) -> Option<Self> {
        let sectors = (spec.block / SECTOR).max(1) as u64;
        let first = first.next_multiple_of(8);
        let blocks = end.checked_sub(first)? / sectors;
        (blocks > 0).then(|| Self {
            spec,
            first,
            blocks,
            random: seed | 1,
            started: now,
            ended: now,
            submitted: 0,
            unflushed: 0,
            under_way: 0,
            flushing: false,
            errors: 0,
            latency: Histogram::new(),
            flush_latency: Histogram::new(),
        })
    }

    /// Bytes of each read or write.
    #[must_use]
    pub fn block(&self) -> usize {
        self.spec.block
    }

    fn is_over(&self, now: u64) -> bool {
        match self.spec.limit {
            Limit::Count(count) => self.submitted >= count,
            Limit::Millis(millis) => now.saturating_sub(self.started) >= millis.saturating_mul(1_000_000),
        }
    }

    /// The next thing to do; `None` if there is none before something completes.
    pub fn next(&mut self, now: u64) -> Option<Io> {
        if self.flushing {
            return None;
        }
        if self.spec.fsync.is_some_and(|count| self.unflushed >= count) {
            self.flushing = self.under_way == 0;
            self.under_way += usize::from(self.flushing);
            return self.flushing.then_some(Io::Flush);
        }
        if self.is_over(now) || self.under_way >= self.spec.depth {
            return None;
        }
        let block = match self.spec.pattern {
            Pattern::SequentialWrite => self.submitted % self.blocks,
            Pattern::RandomRead | Pattern::RandomWrite => {
                // xorshift64*
                self.random ^= self.random >> 12;
                self.random ^= self.random << 25;
                self.random ^= self.random >> 27;
                let scaled = u128::from(self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)) * u128::from(self.blocks);
                u64::try_from(scaled >> 64).unwrap_or(0)
            }
        };
        self.submitted += 1;
        self.under_way += 1;
        let sector = self.first + block * (self.spec.block / SECTOR) as u64;
        if self.spec.pattern == Pattern::RandomRead {
            return Some(Io::Read(sector));
        }
        self.unflushed += 1;
        Some(Io::Write(sector))
    }

    /// Something has completed that was begun at `begun`, in nanoseconds.
    pub fn completed(&mut self, io: Io, begun: u64, now: u64, ok: bool) {
        let took = now.saturating_sub(begun) / 1000;
        self.under_way = self.under_way.saturating_sub(1);
        self.errors += u64::from(!ok);
        self.ended = self.ended.max(now);
        if io == Io::Flush {
            self.flushing = false;
            self.unflushed = 0;
            self.flush_latency.record(took);
        } else {
            self.latency.record(took);
        }
    }

    /// Whether everything is done.
    #[must_use]
    pub fn is_done(&self, now: u64) -> bool {
        let flush_due = self.spec.fsync.is_some_and(|count| self.unflushed >= count);
        self.is_over(now) && self.under_way == 0 && !flush_due
    }

    /// Appends the reply: names and numbers in turn. Latencies are in microseconds.
    pub fn report(&self, out: &mut Out) {
        let ios = self.latency.count();
        let elapsed = (self.ended - self.started) / 1000;
        let per_second = u128::from(ios) * 1_000_000 / u128::from(elapsed.max(1));
        let fields = [
            ("ios", ios),
            ("bytes", ios.saturating_mul(self.spec.block as u64)),
            ("elapsed_us", elapsed),
            ("iops", u64::try_from(per_second).unwrap_or(u64::MAX)),
            ("p50_us", self.latency.percentile(50)),
            ("p99_us", self.latency.percentile(99)),
            ("max_us", self.latency.max()),
            ("flushes", self.flush_latency.count()),
            ("flush_p50_us", self.flush_latency.percentile(50)),
            ("flush_p99_us", self.flush_latency.percentile(99)),
            ("flush_max_us", self.flush_latency.max()),
            ("errors", self.errors),
        ];
        out.array(2 * fields.len());
        for (name, value) in fields {
            out.bulk(name.as_bytes());
            out.integer(i64::try_from(value).unwrap_or(i64::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(pattern: Pattern, limit: Limit, depth: usize, fsync: Option<u64>) -> Spec {
        Spec { pattern, limit, block: 4096, depth, fsync }
    }

    /// Runs a load whose I/O takes 1 ms each, one completion at a time.
    fn run(load: &mut Load) -> Vec<Io> {
        let (mut all, mut under_way, mut now) = (Vec::new(), std::collections::VecDeque::new(), 0);
        loop {
            while let Some(io) = load.next(now) {
                all.push(io);
                under_way.push_back((io, now));
                assert!(under_way.len() <= MAX_DEPTH);
            }
            let Some((io, begun)) = under_way.pop_front() else { break };
            now += 1_000_000;
            load.completed(io, begun, now, true);
        }
        assert!(load.is_done(now));
        all
    }

    #[test]
    fn writes_stay_in_the_region_and_cover_it() {
        for pattern in [Pattern::RandomWrite, Pattern::SequentialWrite] {
            let mut load = Load::new(spec(pattern, Limit::Count(500), 4, None), 21, 24 + 8 * 10 + 7, 5, 0).unwrap();
            let mut seen = [false; 10];
            for io in run(&mut load) {
                let Io::Write(sector) = io else { panic!("{io:?}") };
                assert_eq!(sector % 8, 0);
                seen[usize::try_from((sector - 24) / 8).unwrap()] = true;
            }
            assert_eq!(seen, [true; 10]);
        }
        assert!(Load::new(spec(Pattern::RandomRead, Limit::Count(1), 1, None), 24, 31, 5, 0).is_none());
        assert!(Load::new(spec(Pattern::RandomRead, Limit::Count(1), 1, None), 24, 3, 5, 0).is_none());
    }

    /// A flush comes after every so many writes, when they are all done, the last ones included.
    #[test]
    fn flushes_are_barriers() {
        let mut load = Load::new(spec(Pattern::SequentialWrite, Limit::Count(10), 4, Some(5)), 0, 800, 5, 0).unwrap();
        let all = run(&mut load);
        let flushes: Vec<_> = (0..all.len()).filter(|at| all[*at] == Io::Flush).collect();
        assert_eq!((all.len(), flushes), (12, vec![5, 11]));
    }

    #[test]
    fn time_ends_a_load_and_the_report_adds_up() {
        let mut load = Load::new(spec(Pattern::RandomRead, Limit::Millis(50), 1, None), 0, 800, 5, 0).unwrap();
        assert_eq!(run(&mut load).len(), 50);
        let mut out = Out::new();
        load.report(&mut out);
        let text = String::from_utf8(out.bytes().to_vec()).unwrap().replace("\r\n", "|");
        assert!(
            text.starts_with("*24|$3|ios|:50|$5|bytes|:204800|$10|elapsed_us|:50000|$4|iops|:1000|$6|p50_us|:1000|")
        );
        assert!(text.ends_with("$6|errors|:0|"));
    }
}
