//! The judgement against a guest that writes memory and a link that is too narrow for it.

use super::*;
use failover::config::EpochPace;
use vmm::Throttle;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// A guest, a link of a certain width and length, and the pacer between them, millisecond by millisecond.
struct Narrow {
    pacer: Pacer,
    now: Duration,
    /// Bytes a second that the guest writes when it is not slowed, and that the link takes.
    writes: f64,
    takes: f64,
    /// No epoch has more bytes.
    working_set: f64,
    distance: Duration,
    epoch_bytes: f64,
    last: Epoch,
    /// Bytes of each checkpoint that are not sent yet.
    waiting: VecDeque<(Epoch, f64)>,
    commits: VecDeque<(Duration, Epoch)>,
    sent: f64,
    throttle: Throttle,
    turns: Vec<(Duration, Turn)>,
    given_up: Option<(Slow, Duration)>,
    most_waiting: f64,
    committed_at: Duration,
    longest: Duration,
}

impl Narrow {
    fn new(policy: Overload, writes: f64, takes: f64) -> Self {
        let overload = OverloadRules { policy, patience: 5 * SECOND, max_hold: SECOND };
        let rules = Rules { pace: EpochPace::Fixed(25 * MS), overload };
        let mut pacer = Pacer::new(rules, 8, Epoch(1), Duration::ZERO);
        pacer.committed(Epoch(1), Duration::ZERO);
        Self {
            pacer,
            now: Duration::ZERO,
            writes,
            takes,
            working_set: f64::INFINITY,
            distance: 10 * MS,
            epoch_bytes: 0.0,
            last: Epoch(1),
            waiting: VecDeque::new(),
            commits: VecDeque::new(),
            sent: 0.0,
            throttle: Throttle::NONE,
            turns: Vec::new(),
            given_up: None,
            most_waiting: 0.0,
            committed_at: Duration::ZERO,
            longest: Duration::ZERO,
        }
    }

    fn unsent(&self) -> f64 {
        self.waiting.iter().map(|(_, bytes)| bytes).sum()
    }

    fn live(&mut self, span: Duration) {
        let until = self.now + span;
        while self.now < until && self.given_up.is_none() {
            self.now += MS;
            self.epoch_bytes += self.writes * (1.0 - self.throttle.share()) / 1e3;
            self.epoch_bytes = self.epoch_bytes.min(self.working_set);
            let mut room = self.takes / 1e3;
            while let Some((epoch, bytes)) = self.waiting.front_mut() {
                let now = bytes.min(room);
                (*bytes, room, self.sent) = (*bytes - now, room - now, self.sent + now);
                if *bytes > 0.0 {
                    break;
                }
                self.commits.push_back((self.now + self.distance, *epoch));
                self.waiting.pop_front();
            }
            while let Some((_, epoch)) = self.commits.front().copied().filter(|(at, _)| *at <= self.now) {
                self.commits.pop_front();
                self.pacer.committed(epoch, self.now);
                self.longest = self.longest.max(self.now - self.committed_at);
                self.committed_at = self.now;
            }
            if self.now.as_millis().is_multiple_of(100) {
                self.judge();
            }
            if self.pacer.look(&Look { now: self.now, ..Look::default() }) == Next::End {
                self.last = self.last.next();
                self.waiting.push_back((self.last, std::mem::take(&mut self.epoch_bytes)));
                let pause = Duration::ZERO;
                let taken =
                    Taken { epoch: self.last, began: self.now, pause, waited_since: None, outputs: 0, ran: None };
                self.pacer.ended(&taken, self.now);
            }
            self.most_waiting = self.most_waiting.max(self.unsent());
        }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small positive numbers of a toy")]
    fn judge(&mut self) {
        let (sent_bytes, unsent_bytes) = (self.sent as u64, self.unsent() as usize);
        let on_its_way = !self.commits.is_empty();
        let reading = Reading { sent_bytes, unsent_bytes, on_its_way, ..Reading::default() };
        let judged = self.pacer.judge(&reading, self.now);
        self.throttle = judged.throttle.unwrap_or(self.throttle);
        self.turns.extend(judged.turn.map(|turn| (self.now, turn)));
        self.given_up = judged.give_up;
    }

    fn mib(mib: u32) -> f64 {
        f64::from(mib << 20)
    }
}

#[test]
fn lengthened_epochs_keep_little_on_its_way_and_go_back_to_normal() {
    let mut pair = Narrow::new(Overload::Lengthen, Narrow::mib(80), Narrow::mib(12));
    pair.working_set = Narrow::mib(4);
    pair.live(10 * SECOND);
    assert!(matches!(pair.turns[..], [(at, Turn::Began(Slow::Link))] if at <= 2 * SECOND), "{:?}", pair.turns);
    // A checkpoint takes a third of a second: of several in a row nothing would come but that outputs wait for all of them.
    let depth = pair.pacer.overload_status(pair.now).in_flight_most;
    assert_eq!(depth, 1);
    (pair.most_waiting, pair.longest) = (0.0, Duration::ZERO);
    pair.live(10 * SECOND);
    assert!(pair.most_waiting <= Narrow::mib(4) && pair.longest < 500 * MS, "{} {:?}", pair.most_waiting, pair.longest);
    let status = pair.pacer.overload_status(pair.now);
    assert!(status.overloaded && status.throttle_ratio == 0.0, "{status:?}");
    assert!(status.text.contains("the link takes 1") && status.text.contains("lengthened"), "{}", status.text);

    pair.takes = Narrow::mib(200);
    pair.live(5 * SECOND);
    assert!(matches!(pair.turns[..], [_, (_, Turn::Ended(_))]), "{:?}", pair.turns);
    assert_eq!(pair.pacer.overload_status(pair.now).in_flight_most, 8);
}

#[test]
fn a_throttled_guest_fits_and_is_let_go_again() {
    for writes in [20, 80, 400] {
        let mut pair = Narrow::new(Overload::Throttle, Narrow::mib(writes), Narrow::mib(12));
        pair.working_set = Narrow::mib(8);
        pair.live(20 * SECOND);
        let share = 1.0 - pair.throttle.share();
        let fits = 12.0 / f64::from(writes);
        assert!(share > fits * 0.4 && share < fits * 1.3, "{writes} MiB/s: it runs {share} of the time, {fits} fits");
        // It stays there: slowed or let go by a step now and then, and the link is used.
        let (before, sent) = (pair.pacer.overload_status(pair.now), pair.sent);
        pair.live(10 * SECOND);
        let used = (pair.sent - sent) / (pair.takes * 10.0);
        assert!(used > 0.5, "{writes} MiB/s: {used} of the link is used, {before:?}");
        assert_eq!(pair.turns.len(), 1, "{:?}", pair.turns);

        pair.writes = Narrow::mib(1);
        pair.live(20 * SECOND);
        assert!(pair.throttle.is_none(), "{:?}", pair.throttle);
        assert!(matches!(pair.turns[..], [_, (_, Turn::Ended(_))]), "{:?}", pair.turns);
    }
}

#[test]
fn protection_is_given_up_after_the_patience_and_not_before() {
    let mut pair = Narrow::new(Overload::Drop, Narrow::mib(80), Narrow::mib(12));
    pair.live(20 * SECOND);
    let (slow, lasted) = pair.given_up.expect("it is given up");
    assert_eq!(slow, Slow::Link);
    assert!(lasted >= 5 * SECOND && lasted < 6 * SECOND, "{lasted:?}");
    assert!(pair.now < 8 * SECOND, "{:?}", pair.now);

    // A burst is borne.
    let mut pair = Narrow::new(Overload::Drop, Narrow::mib(80), Narrow::mib(12));
    pair.working_set = Narrow::mib(4);
    pair.live(3 * SECOND);
    pair.writes = Narrow::mib(1);
    pair.live(30 * SECOND);
    assert_eq!(pair.given_up, None);
    assert!(matches!(pair.turns[..], [(_, Turn::Began(_)), (_, Turn::Ended(_))]), "{:?}", pair.turns);
}

#[test]
fn a_link_that_is_only_long_is_no_overload() {
    let mut pair = Narrow::new(Overload::Throttle, Narrow::mib(1), Narrow::mib(100));
    pair.distance = 600 * MS;
    pair.live(20 * SECOND);
    assert_eq!((pair.turns.len(), pair.throttle), (0, Throttle::NONE));
    assert!(pair.pacer.overload_status(pair.now).blocked_ratio > 0.5, "its epochs do wait");
}

#[test]
fn what_a_base_leaves_behind_is_no_overload() {
    let overload = OverloadRules { policy: Overload::Throttle, patience: 5 * SECOND, max_hold: SECOND };
    let mut pacer = Pacer::new(Rules { pace: EpochPace::Fixed(25 * MS), overload }, 1, Epoch(1), Duration::ZERO);
    let reading = Reading { unsent_bytes: 1 << 20, ..Reading::default() };
    for n in 1..100 {
        assert!(matches!(pacer.look(&Look { now: 100 * MS * n, ..Look::default() }), Next::Look(_)));
        assert_eq!(pacer.judge(&reading, 100 * MS * n), Judged::default());
    }
    assert_eq!(pacer.overloaded(), None);
}

#[test]
fn what_is_staged_at_its_limit_holds_epochs_up_and_counts() {
    let overload = OverloadRules { policy: Overload::Lengthen, patience: 5 * SECOND, max_hold: SECOND };
    let mut pacer = Pacer::new(Rules { pace: EpochPace::Fixed(25 * MS), overload }, 8, Epoch(1), Duration::ZERO);
    pacer.committed(Epoch(1), Duration::ZERO);
    let reading = Reading { unsent_bytes: 1 << 20, ..Reading::default() };
    let (mut turn, mut now) = (None, Duration::ZERO);
    while turn.is_none() && now < 5 * SECOND {
        now += 25 * MS;
        assert!(matches!(pacer.look(&Look { now, full: true, ..Look::default() }), Next::Look(at) if at > now));
        turn = pacer.judge(&reading, now).turn;
    }
    assert_eq!(turn, Some(Turn::Began(Slow::Link)));
    assert_eq!(pacer.look(&Look { now, ..Look::default() }), Next::End);
}

#[test]
fn who_is_to_blame() {
    let of = |unsent_bytes, on_its_way, busy: u32, unread: u32| {
        let reading = Reading { sent_bytes: 0, unsent_bytes, on_its_way, busy: busy * MS, unread: unread * MS };
        reading.slow(&Reading { busy: 100 * MS, unread: 50 * MS, ..Reading::default() })
    };
    assert_eq!(of(1, true, 200, 50), Some(Slow::Link));
    assert_eq!(of(1, true, 200, 110), Some(Slow::Backup), "it does not read");
    assert_eq!(of(0, false, 200, 50), Some(Slow::Backup), "it has everything and says nothing");
    assert_eq!(of(0, true, 200, 50), None, "it is on its way");
}
