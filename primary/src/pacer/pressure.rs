//! Link or backup are slower than the guest writes memory: whether it is so, what is slow, and what is done about it.
//!
//! | what is seen | what follows |
//! |---|---|
//! | an epoch should have ended and had no room to, for a quarter of a second in all of the last one | *overloaded*, until that is less than a twentieth |
//! | … and commits take long | fewer checkpoints on their way: a queue adds to what outputs wait, and nothing to what gets through |
//! | … and the policy is `throttle` | the guest's processors get a third less of their time, again and again, until epochs have room; later a little more |
//! | … for too long, and the policy is `drop` | protection ends |
//!
//! A link that is only long makes epochs wait, too; there everything is on its way and nothing waits to be sent. That is no overload, and less work would not help.

use std::collections::VecDeque;
use std::time::Duration;

use failover::config::Overload;
use failover::status::OverloadStatus;
use vmm::Throttle;

/// What is seen is judged this often.
const WINDOW: Duration = Duration::from_millis(250);
/// So many windows make up a judgement: a burst that is over within half a second is none.
const REMEMBERED: usize = 4;
/// Parts of the time without room at which an overload begins and ends.
const BEGINS: f64 = 0.25;
const ENDS: f64 = 0.05;
/// Parts of a window without room above which the guest is slowed further, and below which it is slowed less.
const SLOWER: f64 = 0.10;
const FASTER: f64 = 0.02;
/// What remains of the guest's time with each step, and what it grows by.
const STEP_DOWN: f64 = 0.7;
const STEP_UP: f64 = 1.15;
/// Slowing the guest further does not help when less than this part of what once got through is asked for: something else holds epochs up.
const HELPS_ABOVE: f64 = 0.5;
/// What once got through is forgotten by this part in each window.
const FORGOTTEN: f64 = 0.01;
/// Commits that take a larger part of the time after which frames are dropped make the queue shorter, those that take half of it longer.
const LATE_PART: u32 = 4;

/// What cannot keep up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slow {
    /// The connection takes bytes more slowly than they are made.
    Link,
    /// The backup reads, applies or syncs more slowly.
    Backup,
}

impl Slow {
    /// The word for events and the status.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Link => "link",
            Self::Backup => "backup",
        }
    }
}

/// How far the connection is, at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Bytes that have left over connections since the process started.
    pub sent_bytes: u64,
    /// Bytes that wait on this side: staged, encoded, or not sent yet by the kernel.
    pub unsent_bytes: usize,
    /// Something was sent and is not acknowledged by the backup's kernel.
    pub on_its_way: bool,
    /// For how long the connection has had something to send, in its life.
    pub busy: Duration,
    /// For how much of that the backup's process did not read.
    pub unread: Duration,
}

impl Reading {
    /// What holds up checkpoints that wait for their commits, if it is not the distance alone. `before`: an earlier reading.
    pub fn slow(&self, before: &Self) -> Option<Slow> {
        let busy = self.busy.saturating_sub(before.busy);
        let unread = self.unread.saturating_sub(before.unread);
        if !busy.is_zero() && unread * 2 > busy {
            Some(Slow::Backup)
        } else if self.unsent_bytes > 0 {
            Some(Slow::Link)
        } else {
            // Everything arrived there.
            (!self.on_its_way).then_some(Slow::Backup)
        }
    }
}

/// The operator's will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverloadRules {
    /// What is done.
    pub policy: Overload,
    /// For how long it is borne under [`Overload::Drop`].
    pub patience: Duration,
    /// Frames held for longer are dropped.
    pub max_hold: Duration,
}

/// What began or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// An overload, because this is slow.
    Began(Slow),
    /// The overload ended after so long.
    Ended(Duration),
}

/// What a judgement came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Judged {
    /// What is new.
    pub turn: Option<Turn>,
    /// The guest is to be slowed by this much from now on.
    pub throttle: Option<Throttle>,
    /// Protection is to end: for this long it has been like this, and this is slow.
    pub give_up: Option<(Slow, Duration)>,
}

/// One window's observations.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    blocked: Duration,
    span: Duration,
    link: u32,
    backup: u32,
    neither: u32,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Pressure {
    rules: OverloadRules,
    in_flight_most: usize,
    depth: usize,
    /// Since when an epoch has been waiting for room to end.
    blocked_since: Option<Duration>,
    began: Duration,
    window: Window,
    windows: VecDeque<Window>,
    before: Reading,
    sent_at_begin: u64,
    /// Most bytes in a second that got through in a window, lately, and in the last one.
    peak: f64,
    rate: f64,
    throttle: Throttle,
    overloaded: Option<(Slow, Duration)>,
}

impl Pressure {
    pub(super) fn new(rules: OverloadRules, in_flight_most: usize, now: Duration) -> Self {
        Self {
            rules,
            in_flight_most,
            depth: in_flight_most,
            blocked_since: None,
            began: now,
            window: Window::default(),
            windows: VecDeque::with_capacity(REMEMBERED),
            before: Reading::default(),
            sent_at_begin: 0,
            peak: 0.0,
            rate: 0.0,
            throttle: Throttle::NONE,
            overloaded: None,
        }
    }

    /// Most checkpoints on their way, as things are.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    /// An epoch should have ended at `due` and has no room to.
    pub(super) fn blocked(&mut self, due: Duration) {
        self.blocked_since.get_or_insert(due.max(self.began));
    }

    /// It has.
    pub(super) fn free(&mut self, now: Duration) {
        if let Some(since) = self.blocked_since.take() {
            self.window.blocked += now.saturating_sub(since);
        }
    }

    /// Nothing of what was seen in this window counts: what is on its way is a base.
    pub(super) fn begin_anew(&mut self, now: Duration) {
        (self.began, self.window, self.blocked_since) = (now, Window::default(), None);
    }

    /// Judges, if it is time. `commit`: what a commit takes, or has taken up to now.
    pub(super) fn judge(&mut self, reading: &Reading, commit: Duration, now: Duration) -> Judged {
        if self.blocked_since.is_some() {
            match reading.slow(&self.before) {
                Some(Slow::Link) => self.window.link += 1,
                Some(Slow::Backup) => self.window.backup += 1,
                None => self.window.neither += 1,
            }
        }
        let span = now.saturating_sub(self.began);
        self.before = Reading { sent_bytes: self.before.sent_bytes, ..*reading };
        if span < WINDOW {
            return Judged::default();
        }
        if self.blocked_since.is_some() {
            self.free(now);
            self.blocked_since = Some(now);
        }
        self.measure_rate(reading.sent_bytes, span);
        let window = Window { span, ..std::mem::take(&mut self.window) };
        self.began = now;
        if self.windows.len() == REMEMBERED {
            self.windows.pop_front();
        }
        self.windows.push_back(window);
        let share = share_of(std::iter::once(&window));
        self.adapt_depth(share, commit);
        let turn = self.turn(now);
        let throttle = self.adapt_throttle(share);
        let patience = self.rules.patience;
        let give_up = self
            .overloaded
            .map(|(slow, since)| (slow, now.saturating_sub(since)))
            .filter(|(_, lasted)| self.rules.policy == Overload::Drop && *lasted >= patience);
        Judged { turn, throttle, give_up }
    }

    fn measure_rate(&mut self, sent: u64, span: Duration) {
        let bytes = u32::try_from(sent.saturating_sub(self.sent_at_begin)).unwrap_or(u32::MAX);
        self.rate = f64::from(bytes) / span.as_secs_f64();
        self.sent_at_begin = sent;
        self.peak = (self.peak * (1.0 - FORGOTTEN)).max(self.rate);
    }

    fn adapt_depth(&mut self, share: f64, commit: Duration) {
        let late = self.rules.max_hold / LATE_PART;
        if share >= BEGINS && commit > late {
            self.depth = (self.depth / 2).max(1);
        } else if commit < late / 2 || (share < ENDS && self.overloaded.is_none()) {
            self.depth = (self.depth + 1).min(self.in_flight_most);
        }
    }

    fn turn(&mut self, now: Duration) -> Option<Turn> {
        let share = self.blocked_share();
        match self.overloaded {
            None if self.windows.len() == REMEMBERED && share >= BEGINS => {
                let slow = self.slow()?;
                self.overloaded = Some((slow, now));
                Some(Turn::Began(slow))
            }
            Some((_, since)) if share < ENDS && self.throttle.is_none() => {
                self.overloaded = None;
                Some(Turn::Ended(now.saturating_sub(since)))
            }
            Some((_, since)) => {
                // It may be something else by now.
                self.overloaded = self.slow().map(|slow| (slow, since)).or(self.overloaded);
                None
            }
            None => None,
        }
    }

    fn adapt_throttle(&mut self, share: f64) -> Option<Throttle> {
        if self.rules.policy != Overload::Throttle || self.overloaded.is_none() {
            return None;
        }
        let left = 100.0 - f64::from(self.throttle.as_percent());
        let left = if share > SLOWER && self.rate > self.peak * HELPS_ABOVE {
            left * STEP_DOWN
        } else if share < FASTER {
            (left * STEP_UP).max(left + 1.0)
        } else {
            return None;
        };
        let before = self.throttle;
        self.throttle = percent_left(left);
        (self.throttle != before).then_some(self.throttle)
    }

    /// The part of the remembered time without room.
    fn blocked_share(&self) -> f64 {
        share_of(self.windows.iter())
    }

    /// What was slow in most of the looks at epochs without room.
    fn slow(&self) -> Option<Slow> {
        let sum = |of: fn(&Window) -> u32| self.windows.iter().map(of).sum::<u32>();
        let (link, backup, neither) = (sum(|w| w.link), sum(|w| w.backup), sum(|w| w.neither));
        match link.max(backup) {
            most if most <= neither => None,
            _ if link >= backup => Some(Slow::Link),
            _ => Some(Slow::Backup),
        }
    }

    /// Since when it has been like this, and what is slow.
    pub(super) fn overloaded(&self) -> Option<(Slow, Duration)> {
        self.overloaded
    }

    /// For the status. `commit`: what a commit takes; `epochs`: how many there are in a second.
    pub(super) fn status(&self, commit: Duration, epochs: f64, now: Duration) -> OverloadStatus {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let lasted = self.overloaded.map(|(_, since)| now.saturating_sub(since)).unwrap_or_default();
        OverloadStatus {
            overloaded: self.overloaded.is_some(),
            seconds: lasted.as_secs_f64(),
            slow: self.overloaded.map(|(slow, _)| slow.word().into()),
            blocked_ratio: self.blocked_share(),
            throttle_ratio: self.throttle.share(),
            in_flight_most: count(self.depth),
            unsent_bytes: count(self.before.unsent_bytes),
            text: self.overloaded.map_or(String::new(), |(slow, _)| self.words(slow, lasted, commit, epochs)),
            ..OverloadStatus::configured(self.rules.policy)
        }
    }

    fn words(&self, slow: Slow, lasted: Duration, commit: Duration, epochs: f64) -> String {
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        let waiting = f64::from(u32::try_from(self.before.unsent_bytes).unwrap_or(u32::MAX));
        let (commit_ms, max_hold) = (commit.as_millis(), self.rules.max_hold);
        let what = match slow {
            Slow::Link => format!(
                "the link takes {:.1} MiB/s at most, less than the guest makes; {:.1} MiB wait to be sent",
                mib(self.peak),
                mib(waiting)
            ),
            Slow::Backup => format!("the backup does not keep up: what it got it commits after {commit_ms} ms"),
        };
        // What is said at the beginning of an epoch waits for its end, too.
        let late = if commit * 2 > max_hold {
            format!("; replies may wait for longer than {} ms and be dropped", max_hold.as_millis())
        } else {
            String::new()
        };
        let done = match self.rules.policy {
            Overload::Lengthen => {
                format!("epochs are lengthened: {epochs:.1} a second, commit after {commit_ms} ms{late}")
            }
            Overload::Throttle if self.throttle.is_none() => format!("the guest is about to be slowed{late}"),
            Overload::Throttle => {
                format!("the guest's processors rest {} % of the time{late}", self.throttle.as_percent())
            }
            Overload::Drop => {
                let left = self.rules.patience.saturating_sub(lasted).as_secs_f64();
                format!("protection ends in {left:.1} s{late}")
            }
        };
        format!("{what}; {done}")
    }
}

fn share_of<'a>(windows: impl Iterator<Item = &'a Window>) -> f64 {
    let (blocked, span) = windows.fold((Duration::ZERO, Duration::ZERO), |(b, s), w| (b + w.blocked, s + w.span));
    if span.is_zero() { 0.0 } else { blocked.as_secs_f64() / span.as_secs_f64() }
}

/// The throttle that leaves so many per cent of its time to the guest.
fn percent_left(left: f64) -> Throttle {
    // The smallest one that leaves no more.
    let throttle = (0..=Throttle::MOST.as_percent()).find(|percent| 100.0 - f64::from(*percent) <= left);
    Throttle::percent(throttle.unwrap_or(Throttle::MOST.as_percent()))
}
