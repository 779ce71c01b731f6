//! Pages that are written in most epochs, and are not protected again after each.
//!
//! The first write to a page whose dirty bit was cleared faults; a guest that writes the same pages in every epoch pays for that in every epoch. A *hot*
//! page's bit stays set, so that the log names the page in every epoch, written or not, and writing it costs nothing. What that costs instead is one copy
//! of it for each epoch, and patches find that nothing changed. This is safe by construction: a set is always all that the log names, and hot is only
//! which of its bits are not cleared.
//!
//! A page becomes hot when it was written in an epoch and in one of the two before. Nothing tells whether a hot page is still written, so each is put on
//! trial now and then: its bit is cleared, and it stays hot if it is written in the next epoch. A copy and a comparison cost about a quarter of a fault,
//! so that a page of every third epoch is worth being hot; this rule has such pages hot most of the time, and those of every tenth epoch seldom.
//!
//! Pages that are copied before the pause have their bits cleared while the guest runs. Those that are hot, on trial or about to become hot are left out
//! of that: they will be written again before the pause, and clearing their bits would make them cold. What was cleared counts as written in the
//! epoch.

use crate::page_bits::PageBits;

/// Every hot page is on trial in one of so many epochs.
const TRIAL_EVERY: u64 = 16;

/// What a host does about its log of dirty pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tracking {
    /// There is no log.
    #[default]
    Off,
    /// All pages of a set are protected again.
    Plain,
    /// Hot pages are not, where the host can leave them out.
    HotPages,
}

/// Which pages are hot. Pure: logs in, bits to be cleared out.
#[derive(Clone, Debug, Default)]
pub struct HotPages {
    /// Words of which something is known, ascending by their numbers.
    heats: Vec<(u64, Heat)>,
    /// Where the next list is made.
    next: Vec<(u64, Heat)>,
    taken: u64,
}

/// What is known of 64 pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Heat {
    /// Named by the log one and two sets ago.
    before: [u64; 2],
    hot: u64,
    /// Hot until the last set, which cleared their bits.
    trial: u64,
    /// Taken out of the log since the last set, while the guest ran.
    early: u64,
}

impl HotPages {
    /// The log as it is when an epoch ends. Returns the bits that are to be cleared in it, before any page of the set is copied.
    pub fn settle(&mut self, log: &PageBits) -> PageBits {
        let taken = self.taken;
        self.taken = taken.wrapping_add(1);
        self.look(log, |number, heat, bits| heat.settle(bits, number.wrapping_add(taken).is_multiple_of(TRIAL_EVERY)))
    }

    /// The log as it is while the guest runs. Returns those of its bits that may be cleared before the epoch ends, because their pages are not likely
    /// to be written again in it.
    pub fn cold(&mut self, log: &PageBits) -> PageBits {
        self.look(log, |_, heat, bits| heat.cold(bits))
    }

    /// Looks at every word of which something is known, or which the log has, and collects what comes of it.
    fn look(&mut self, log: &PageBits, mut each: impl FnMut(u64, &mut Heat, u64) -> u64) -> PageBits {
        let mut found = PageBits::default();
        self.next.clear();
        let (mut known, mut named) = (self.heats.iter().peekable(), log.words().iter().peekable());
        loop {
            let number = match (known.peek(), named.peek()) {
                (Some((k, _)), Some((n, _))) => *k.min(n),
                (Some((k, _)), None) => *k,
                (None, Some((n, _))) => *n,
                (None, None) => break,
            };
            let mut heat = known.next_if(|(at, _)| *at == number).map_or_else(Heat::default, |(_, heat)| *heat);
            let bits = named.next_if(|(at, _)| *at == number).map_or(0, |(_, bits)| *bits);
            found.push(number, each(number, &mut heat, bits));
            if heat != Heat::default() {
                self.next.push((number, heat));
            }
        }
        std::mem::swap(&mut self.heats, &mut self.next);
        found
    }

    /// Forgets everything: the log begins anew.
    pub fn forget(&mut self) {
        self.heats.clear();
    }

    /// How many pages are hot.
    #[cfg(test)]
    fn count(&self) -> usize {
        self.heats.iter().map(|(_, heat)| heat.hot.count_ones() as usize).sum()
    }
}

impl Heat {
    fn settle(&mut self, log: u64, on_trial: bool) -> u64 {
        let [one, two] = self.before;
        let early = std::mem::take(&mut self.early);
        let named = log | early;
        // A hot page that the log does not name had its bit cleared by somebody else.
        let hot = (self.hot | self.trial | one | two) & named;
        self.trial = if on_trial { hot } else { 0 };
        self.hot = hot & !self.trial;
        self.before = [named, one];
        log & !self.hot
    }

    fn cold(&mut self, log: u64) -> u64 {
        let [one, two] = self.before;
        let cold = log & !(self.hot | self.trial | one | two);
        self.early |= cold;
        cold
    }
}

/// A log that is kept in memory, for machines that are not KVM's: what is hot stays in it.
#[derive(Clone, Debug, Default)]
pub struct KeptLog {
    tracking: Tracking,
    bits: PageBits,
    hot: HotPages,
}

impl KeptLog {
    /// Begins anew, with nothing.
    pub fn begin(&mut self, tracking: Tracking) {
        *self = Self { tracking, ..Self::default() };
    }

    /// Whether there is a log.
    pub fn is_on(&self) -> bool {
        self.tracking != Tracking::Off
    }

    /// What was written since the last call makes this set.
    pub fn take(&mut self, written: PageBits) -> PageBits {
        let mut set = written;
        set.unite(&self.bits);
        if self.tracking == Tracking::HotPages {
            self.bits = set.without(&self.hot.settle(&set));
        }
        set
    }

    /// Of what was written since the last call, what is not likely to be written again before the epoch ends makes this set; the rest stays in the log.
    pub fn take_cold(&mut self, written: PageBits) -> PageBits {
        if self.tracking != Tracking::HotPages {
            return self.take(written);
        }
        let mut log = written;
        log.unite(&self.bits);
        let cold = self.hot.cold(&log);
        self.bits = log.without(&cold);
        cold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The set of these pages of the first word.
    fn bits(word: u64) -> PageBits {
        let mut bits = PageBits::default();
        bits.push(0, word);
        bits
    }

    fn word(bits: &PageBits) -> u64 {
        bits.words().first().map_or(0, |(_, word)| *word)
    }

    /// Bits at random, the same for one seed.
    fn noise(seed: u64) -> impl FnMut() -> u64 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 24
        }
    }

    /// A log whose cleared bits come back when their page is written, as KVM's.
    #[derive(Default)]
    struct Log(u64);

    impl Log {
        fn epoch(&mut self, hot: &mut HotPages, written: u64) -> u64 {
            self.0 |= written;
            let set = self.0;
            let clear = word(&hot.settle(&bits(set)));
            assert_eq!(clear & !set, 0, "only what the set has is cleared");
            self.0 &= !clear;
            set
        }
    }

    #[test]
    fn two_epochs_of_three_make_a_page_hot_and_a_trial_makes_it_cold() {
        let (mut log, mut hot) = (Log::default(), HotPages::default());
        let mut faults = 0;
        for epoch in 0..160 {
            faults += u32::from(log.0 & 1 == 0);
            assert_eq!(log.epoch(&mut hot, 1) & 1, 1, "epoch {epoch}");
        }
        assert!((10..=16).contains(&faults), "{faults} faults in 160 epochs: two to learn, one for each trial");
        assert_eq!(hot.count(), 1);
        let named = (0..40).filter(|_| log.epoch(&mut hot, 0) & 1 == 1).count();
        assert!(named as u64 <= TRIAL_EVERY, "{named} copies of a page that is not written any more");
        assert_eq!((hot.count(), log.0), (0, 0));
        assert_eq!([log.epoch(&mut hot, 2), hot.count() as u64], [2, 0], "once is not enough");
        assert_eq!(
            [log.epoch(&mut hot, 0), log.epoch(&mut hot, 2), hot.count() as u64],
            [0, 2, 1],
            "one epoch is left out"
        );
        hot.forget();
        log.epoch(&mut hot, 2);
        assert_eq!(hot.count(), 0);
    }

    /// Faults and copies, an epoch, of 64 pages each of which is written in so many of a hundred epochs.
    fn costs(percent: u64) -> (f64, f64) {
        const EPOCHS: u32 = 4_000;
        let mut noise = noise(11);
        let mut written = || (0..64).fold(0, |word, page| word | u64::from(noise() % 100 < percent) << page);
        let (mut log, mut hot, mut faults, mut copies) = (Log::default(), HotPages::default(), 0, 0);
        for _ in 0..EPOCHS {
            let written = written();
            faults += (written & !log.0).count_ones();
            copies += log.epoch(&mut hot, written).count_ones();
        }
        let each = |count: u32| f64::from(count) / f64::from(64 * EPOCHS);
        (each(faults), each(copies))
    }

    #[test]
    fn pages_of_every_third_epoch_seldom_fault_and_those_of_every_tenth_are_seldom_copied() {
        for (percent, most_faults, most_copies) in
            [(90, 0.08, 1.0), (50, 0.10, 0.95), (33, 0.13, 0.82), (10, 0.10, 0.27), (2, 0.02, 0.03)]
        {
            let (faults, copies) = costs(percent);
            assert!(
                faults <= most_faults && copies <= most_copies,
                "{percent} %: {faults:.3} faults, {copies:.3} copies"
            );
        }
    }

    #[test]
    fn every_written_page_is_in_the_set_of_its_epoch() {
        let mut noise = noise(5);
        let (mut log, mut hot, mut seen_hot) = (Log::default(), HotPages::default(), 0);
        let mut busy = 0;
        for epoch in 0..20_000 {
            if epoch % 50 == 0 {
                busy = noise() & noise();
            }
            let written = busy & (noise() | noise() | noise()) | noise() & noise() & noise() & noise();
            assert_eq!(written & !log.epoch(&mut hot, written), 0, "epoch {epoch}");
            seen_hot += hot.count();
        }
        assert!(seen_hot > 20_000, "some are hot most of the time: {seen_hot}");
    }

    /// A log of which a part is taken before the epoch ends: nothing is missed, hot pages stay hot, and what is taken early is learned from.
    #[test]
    fn what_is_taken_early_is_cold_and_counts() {
        let mut noise = noise(7);
        let (mut log, mut hot) = (Log::default(), HotPages::default());
        let (busy, mut seen_hot, mut seen_early) = (0xff, 0, 0);
        for epoch in 0..20_000u32 {
            let (before, after) = (busy & noise() | noise() & noise() & noise(), busy & noise());
            log.0 |= before;
            let was_hot = hot.heats.first().map_or(0, |(_, heat)| heat.hot);
            let early = word(&hot.cold(&bits(log.0)));
            assert_eq!((early & !log.0, early & was_hot), (0, 0), "epoch {epoch}");
            log.0 &= !early;
            let late = log.epoch(&mut hot, after);
            assert_eq!((before | after) & !(early | late), 0, "epoch {epoch}");
            seen_hot += hot.count();
            seen_early += early.count_ones();
        }
        assert!(seen_hot > 20_000 && seen_early > 20_000, "{seen_hot} hot, {seen_early} early");
        // Taken early in every epoch and never written again in it: still a page of most epochs.
        let (mut log, mut hot) = (Log::default(), HotPages::default());
        for _ in 0..4 {
            log.0 |= 1;
            log.0 &= !word(&hot.cold(&bits(log.0)));
            log.epoch(&mut hot, 0);
        }
        assert_eq!(hot.count(), 1);
    }

    #[test]
    fn a_kept_log_leaves_hot_pages_for_the_end_of_the_epoch() {
        let mut log = KeptLog::default();
        log.begin(Tracking::HotPages);
        (0..4).for_each(|_| assert_eq!(word(&log.take(bits(6))), 6));
        assert_eq!(word(&log.take_cold(bits(0b1110))), 0b1000);
        assert_eq!(word(&log.take(bits(0))), 6);
        log.begin(Tracking::Plain);
        assert_eq!(word(&log.take_cold(bits(0b1110))), 0b1110);
        assert_eq!(word(&log.take(bits(1))), 1);
    }

    #[test]
    fn a_kept_log_names_hot_pages_whether_they_are_written_or_not() {
        let mut log = KeptLog::default();
        assert!(!log.is_on());
        for (tracking, later) in [(Tracking::Plain, 0), (Tracking::HotPages, 6)] {
            log.begin(tracking);
            assert!(log.is_on());
            let once = |log: &mut KeptLog, written| word(&log.take(bits(written)));
            (0..4).for_each(|_| assert_eq!(once(&mut log, 6), 6));
            assert_eq!(once(&mut log, 0), later);
        }
    }
}
