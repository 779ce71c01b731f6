//! The controller against a pair in a few lines: outputs, work and commits in, its decisions out.

use failover::config::Percent;
use proptest::prelude::*;

use super::*;

const US: Duration = Duration::from_micros(1);
const MS: Duration = Duration::from_millis(1);

fn percent(text: &str) -> Percent {
    text.to_owned().try_into().unwrap()
}

/// A link that commits after a given time, and a guest that does as it is told.
struct Toy {
    pacer: Pacer,
    now: Duration,
    last: Epoch,
    waiting_since: Option<Duration>,
    outputs: u32,
    ran: Duration,
    /// Part of the time in which the guest computes.
    busy: f64,
    pause: Duration,
    commit: Duration,
    commits: VecDeque<(Duration, Epoch)>,
    taken: Vec<Duration>,
    held_longest: Duration,
    most_in_flight: usize,
}

impl Toy {
    fn new(pace: EpochPace, in_flight_most: usize, busy: f64) -> Self {
        let mut pacer = Pacer::new(pace, in_flight_most, Epoch(1), Duration::ZERO);
        pacer.committed(Epoch(1), Duration::ZERO);
        Self {
            pacer,
            now: Duration::ZERO,
            last: Epoch(1),
            waiting_since: None,
            outputs: 0,
            ran: Duration::ZERO,
            busy,
            pause: 200 * US,
            commit: 600 * US,
            commits: VecDeque::new(),
            taken: Vec::new(),
            held_longest: Duration::ZERO,
            most_in_flight: 0,
        }
    }

    fn says(&mut self) {
        self.waiting_since.get_or_insert(self.now);
        self.outputs += 1;
    }

    fn pass(&mut self, span: Duration) {
        self.now += span;
        self.ran += span.mul_f64(self.busy);
    }

    /// Until `until`, exactly as the runner does it: looks, ends epochs, hears commits.
    fn live(&mut self, until: Duration) {
        while self.now < until {
            while let Some((_, epoch)) = self.commits.front().copied().filter(|(at, _)| *at <= self.now) {
                self.commits.pop_front();
                self.pacer.committed(epoch, self.now);
            }
            let look = Look {
                now: self.now,
                waiting_since: self.waiting_since,
                outputs: self.outputs,
                ran: Some(self.ran),
                asked: false,
                full: false,
            };
            match self.pacer.look(&look) {
                Next::End => self.end(),
                Next::Look(at) => {
                    let commit = self.commits.front().map_or(until, |(at, _)| *at);
                    let next = at.min(commit).min(until).max(self.now + US);
                    self.pass(next - self.now);
                }
            }
        }
    }

    fn end(&mut self) {
        let began = self.now;
        let (waited_since, outputs) = (self.waiting_since.take(), std::mem::take(&mut self.outputs));
        if let Some(since) = waited_since {
            self.held_longest = self.held_longest.max(began - since);
        }
        self.now += self.pause;
        self.last = self.last.next();
        self.taken.push(began);
        let taken = Taken { epoch: self.last, began, pause: self.pause, waited_since, outputs, ran: Some(self.ran) };
        self.pacer.ended(&taken, self.now);
        self.most_in_flight = self.most_in_flight.max(self.pacer.in_flight());
        // Commits come in order.
        let at = (self.now + self.commit).max(self.commits.back().map_or(Duration::ZERO, |(at, _)| *at));
        self.commits.push_back((at, self.last));
    }
}

#[test]
fn keeps_its_rhythm_and_makes_up_for_nothing() {
    let mut pacer = Pacer::new(EpochPace::Fixed(25 * MS), 8, Epoch(1), Duration::ZERO);
    let mut ends = |now: Duration, epoch: u64| {
        let look = Look { now, ..Look::default() };
        assert_eq!(pacer.look(&look), Next::End);
        let taken = Taken { epoch: Epoch(epoch), began: now, pause: MS, waited_since: None, outputs: 0, ran: None };
        pacer.ended(&taken, now);
        pacer.look(&look)
    };
    assert_eq!(ends(27 * MS, 2), Next::Look(50 * MS));
    assert_eq!(ends(180 * MS, 3), Next::Look(205 * MS));
}

#[test]
fn an_output_that_waits_alone_ends_the_epoch_at_once() {
    for pace in [EpochPace::Latency(2 * MS), EpochPace::Overhead(percent("10%"))] {
        let mut toy = Toy::new(pace, 8, 0.1);
        for request in 1..200 {
            toy.live(request * 10 * MS);
            toy.says();
        }
        toy.live(2_000 * MS);
        assert_eq!((toy.taken.len(), toy.held_longest), (199, Duration::ZERO), "{pace:?}");
    }
}

/// `clients`, each of which says its next word when it has been answered, one after the other: what they were answered in so many epochs, and the longest
/// wait for the end of an epoch.
fn rounds(clients: u64) -> (usize, usize, Duration) {
    const STEP: Duration = Duration::from_micros(10);
    let mut toy = Toy::new(EpochPace::Latency(2 * MS), 8, 0.1);
    let mut speak_at: Vec<Duration> = (1..=clients).map(|client| STEP * u32::try_from(client).unwrap()).collect();
    let (mut running, mut sealed): (usize, VecDeque<(Epoch, usize)>) = (0, VecDeque::new());
    let mut answered = 0;
    while toy.now < 500 * MS {
        let (step, taken) = (toy.now + STEP, toy.taken.len());
        toy.live(step);
        if toy.taken.len() > taken {
            sealed.push_back((toy.last, std::mem::take(&mut running)));
        }
        let flying = toy.commits.front().map_or(Epoch(u64::MAX), |(_, epoch)| *epoch);
        while let Some((_, outputs)) = sealed.pop_front_if(|(epoch, _)| *epoch < flying) {
            answered += outputs;
            speak_at.extend((1..=outputs).map(|nth| toy.now + STEP * u32::try_from(nth).unwrap()));
        }
        let (speak, later): (Vec<_>, Vec<_>) = speak_at.into_iter().partition(|at| *at <= toy.now);
        speak_at = later;
        speak.iter().for_each(|_| toy.says());
        running += speak.len();
    }
    (answered, toy.taken.len(), toy.held_longest)
}

#[test]
fn clients_that_are_answered_together_are_heard_together() {
    let (answered, epochs, held) = rounds(10);
    assert!(answered * 10 > epochs * 95, "{answered} answers in {epochs} epochs");
    assert!(held < MS, "{held:?}");
    // One client never waits for others.
    assert_eq!(rounds(1).2, Duration::ZERO);
}

#[test]
fn clients_that_do_not_speak_again_are_not_waited_for() {
    let mut toy = Toy::new(EpochPace::Latency(2 * MS), 8, 0.1);
    let mut waits = Vec::new();
    for round in 0..1_000 {
        // Two frames each time, the second of which nobody answers: the next round is one frame, and late.
        toy.held_longest = Duration::ZERO;
        toy.says();
        if round % 2 == 0 {
            toy.says();
        }
        let next = toy.now + if round % 2 == 0 { 900 * US } else { 5 * MS };
        toy.live(next);
        waits.push(toy.held_longest);
    }
    let late = waits.iter().skip(100).filter(|wait| !wait.is_zero()).count();
    assert!(late < 20, "{late} of 900 rounds were held for nobody");
}

#[test]
fn an_idle_guest_has_a_rare_checkpoint_and_a_silent_busy_one_is_bounded() {
    for pace in [EpochPace::Latency(2 * MS), EpochPace::Overhead(percent("10%"))] {
        let mut idle = Toy::new(pace, 8, 0.001);
        idle.live(Duration::from_secs(10));
        assert!((8..=11).contains(&idle.taken.len()), "{}", idle.taken.len());
        let mut busy = Toy::new(pace, 8, 1.0);
        busy.live(Duration::from_secs(10));
        assert!((380..=410).contains(&busy.taken.len()), "{}", busy.taken.len());
    }
}

#[test]
fn what_nobody_knows_of_a_guest_is_taken_to_be_work() {
    let mut pacer = Pacer::new(EpochPace::Latency(2 * MS), 8, Epoch(1), Duration::ZERO);
    assert_eq!(pacer.look(&Look { now: MS, ..Look::default() }), Next::Look(WORK));
    assert_eq!(pacer.look(&Look { now: WORK, ..Look::default() }), Next::End);
}

/// Outputs without a pause: replies of many clients to a guest that has always something to do.
fn stream(pace: EpochPace, pause: Duration) -> Toy {
    let mut toy = Toy::new(pace, 8, 1.0);
    toy.pause = pause;
    while toy.now < Duration::from_secs(5) {
        toy.says();
        let next = toy.now + 100 * US;
        toy.live(next);
    }
    toy
}

#[test]
fn under_load_epochs_are_as_long_as_the_target_lets_them_be() {
    let toy = stream(EpochPace::Latency(10 * MS), MS);
    let length = Duration::from_secs(5) / u32::try_from(toy.taken.len()).unwrap();
    assert!(length > 3 * MS && length < 12 * MS, "{length:?}");
    let status = toy.pacer.status();
    assert_eq!(status.met, Some(true), "{status:?}");
    assert!(status.guest_lost_ratio < 0.3, "{status:?}");
    let toy = stream(EpochPace::Overhead(percent("10%")), MS);
    let status = toy.pacer.status();
    assert!(status.guest_lost_ratio > 0.08 && status.guest_lost_ratio < 0.11, "{status:?}");
    assert_eq!(status.met, Some(true));
}

#[test]
fn a_target_that_cannot_be_met_is_told() {
    let mut slow = Toy::new(EpochPace::Latency(2 * MS), 8, 0.5);
    slow.commit = 5 * MS;
    for request in 1..100 {
        slow.live(request * 20 * MS);
        slow.says();
    }
    slow.live(2_100 * MS);
    let status = slow.pacer.status();
    assert_eq!(status.met, Some(false));
    assert!(status.text.contains("a commit alone takes"), "{}", status.text);
    let status = stream(EpochPace::Overhead(percent("1%")), 20 * MS).pacer.status();
    assert_eq!(status.met, Some(false), "{status:?}");
}

#[test]
fn who_gets_on_with_each_epoch_is_not_left_to_an_idle_guest() {
    let mut pacer = Pacer::new(EpochPace::Latency(2 * MS), 8, Epoch(1), Duration::ZERO);
    pacer.committed(Epoch(1), Duration::ZERO);
    let look = Look { now: MS, ran: Some(Duration::ZERO), asked: true, ..Look::default() };
    assert_eq!(pacer.look(&look), Next::Look(WORK));
    assert_eq!(pacer.look(&Look { now: WORK, ..look }), Next::End);
}

fn paces() -> impl Strategy<Value = EpochPace> {
    prop_oneof![
        (500..20_000u64).prop_map(|us| EpochPace::Latency(Duration::from_micros(us))),
        (1..=90u8).prop_map(|share| EpochPace::Overhead(percent(&format!("{share}%")))),
        (100..50_000u64).prop_map(|us| EpochPace::Fixed(Duration::from_micros(us))),
    ]
}

proptest! {
    /// Whatever the guest does and however commits come: what is in flight is within its limit, and while there is room below it no output waits longer than the
    /// bound, nor any work longer than [`KEEP_FRESH`]. A guest that does nothing costs next to nothing.
    #[test]
    fn the_bounds_hold(
        pace in paces(),
        in_flight_most in 1..=8usize,
        steps in prop::collection::vec((0..6u8, 1..5_000u64, 0..40u32), 1..200),
    ) {
        let mut toy = Toy::new(pace, in_flight_most, 0.0);
        for (what, us, size) in steps {
            match what {
                0 | 1 => toy.says(),
                2 => toy.busy = f64::from(size) / 40.0,
                3 => toy.pause = Duration::from_micros(us),
                // A link that is not healthy, and one that is again.
                4 => toy.commit = Duration::from_micros(us) * size,
                _ => {}
            }
            let until = toy.now + Duration::from_micros(us);
            toy.live(until);
            prop_assert!(toy.most_in_flight <= in_flight_most);
            let looked = Look {
                now: toy.now,
                waiting_since: toy.waiting_since,
                outputs: toy.outputs,
                ran: Some(toy.ran),
                asked: false,
                full: false,
            };
            if toy.pacer.in_flight() < in_flight_most {
                let decided = toy.pacer.look(&looked);
                if let (Some(since), Next::Look(at)) = (toy.waiting_since, decided) {
                    prop_assert!(at <= since + toy.pacer.bound().max(MS), "{at:?} for {since:?}, bound {:?}", toy.pacer.bound());
                }
            }
        }
        // All is well: what waits is committed soon, and then there is silence.
        (toy.busy, toy.pause, toy.commit) = (0.0, 100 * US, 500 * US);
        toy.live(toy.now + 2 * KEEP_FRESH);
        prop_assert_eq!(toy.waiting_since, None);
        if !matches!(pace, EpochPace::Fixed(_)) {
            let before = toy.taken.len();
            toy.live(toy.now + 10 * KEEP_FRESH);
            prop_assert!(toy.taken.len() - before <= 11, "{} checkpoints of an idle guest", toy.taken.len() - before);
        }
    }
}
