//! The dirtying load: a given number of pages written a second, in memory of its own.

use alloc::vec::Vec;

use kv::resp::OutOfMemory;

/// Pages of the buffer unless the client says otherwise: 16 MiB.
const DEFAULT_PAGES: u64 = 4096;
/// Pages written before the network is looked at again.
const SLICE: u64 = 512;
/// Shortest sleep between slices, in nanoseconds.
const PAUSE_NS: u64 = 1_000_000;
/// Work that is made up for after a pause, in nanoseconds of the rate: what was missed before is forgotten.
const BACKLOG_NS: u64 = 100_000_000;
const SECOND_NS: u64 = 1_000_000_000;

#[repr(C, align(4096))]
struct Page([u64; 512]);

/// The load; off at first.
pub(crate) struct DirtyLoad {
    /// Grows to `count` in the first round, for which room is reserved: touching all of a large buffer at once would
    /// stop the server for seconds.
    pages: Vec<Page>,
    count: usize,
    rate: u64,
    cursor: usize,
    written: u64,
    /// The instant up to which the work is done.
    done_until: u64,
}

impl DirtyLoad {
    pub(crate) const fn new() -> Self {
        Self { pages: Vec::new(), count: 0, rate: 0, cursor: 0, written: 0, done_until: 0 }
    }

    /// Pages written so far.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Changes the rate, and the buffer if its size is given or there is none yet.
    pub(crate) fn configure(&mut self, rate: u64, pages: Option<u64>, now: u64) -> Result<(), OutOfMemory> {
        self.rate = 0;
        self.done_until = now;
        if rate == 0 {
            (self.pages, self.count) = (Vec::new(), 0);
            return Ok(());
        }
        let current = u64::try_from(self.count).unwrap_or(0);
        let wanted = pages.unwrap_or(if current == 0 { DEFAULT_PAGES } else { current });
        if wanted != current {
            (self.pages, self.count) = (Vec::new(), 0);
            let count = usize::try_from(wanted).map_err(|_| OutOfMemory)?;
            self.pages.try_reserve_exact(count).map_err(|_| OutOfMemory)?;
            self.cursor = 0;
            self.count = count;
        }
        self.rate = rate;
        Ok(())
    }

    /// Does a part of the work that is due at `now`. True if there is more.
    pub(crate) fn work(&mut self, now: u64) -> bool {
        if self.rate == 0 {
            return false;
        }
        self.done_until = self.done_until.max(now.saturating_sub(BACKLOG_NS));
        let behind = now.saturating_sub(self.done_until);
        let due = u64::try_from(u128::from(behind) * u128::from(self.rate) / u128::from(SECOND_NS)).unwrap_or(SLICE);
        if due == 0 {
            return false;
        }
        let count = due.min(SLICE);
        for _ in 0..count {
            self.written = self.written.wrapping_add(1);
            if self.cursor == self.pages.len() && self.cursor < self.pages.capacity() {
                self.pages.push(Page([0; 512]));
            }
            if let Some(page) = self.pages.get_mut(self.cursor) {
                // Another word each time round, so that the page does not just alternate.
                let word = usize::try_from(self.written % 509).unwrap_or(0);
                page.0[word] = self.written.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            }
            self.cursor = if self.cursor + 1 < self.count { self.cursor + 1 } else { 0 };
        }
        let span = u128::from(count) * u128::from(SECOND_NS) / u128::from(self.rate);
        self.done_until = self.done_until.saturating_add(u64::try_from(span).unwrap_or(u64::MAX));
        due > count
    }

    /// When there is work again.
    pub(crate) fn next(&self, now: u64) -> Option<u64> {
        (self.rate > 0).then(|| {
            let one = SECOND_NS.div_ceil(self.rate);
            self.done_until.saturating_add(one).max(now.saturating_add(PAUSE_NS))
        })
    }
}
