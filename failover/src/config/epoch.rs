//! `[epoch]`: when epochs end. The operator states a target or an interval, one of them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::check::{Wrong, span_within, wrong};
use super::units::{self, format_span};
use super::{PairConfig, Percent};

/// Checkpoints on their way at one time: enough to hide a round trip, few enough that an overload lengthens epochs soon.
pub const EPOCHS_IN_FLIGHT: u8 = 8;
/// What it is when the file says nothing: what clients wait for. Measured, it is better than a clock in every figure (docs/performance.md).
const DEFAULT_LATENCY: Duration = Duration::from_millis(2);
const SECOND: Duration = Duration::from_secs(1);
/// Long enough for a burst, or for what a base leaves behind on a slow link.
const DEFAULT_PATIENCE: Duration = Duration::from_secs(5);

/// What decides when an epoch ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EpochPace {
    /// The clock: one checkpoint after each interval.
    Fixed(Duration),
    /// The guest's outputs: the 99th percentile of what a reply waits shall not be longer.
    Latency(Duration),
    /// The guest's time: pauses shall not take more of it.
    Overhead(Percent),
}

/// What is done when the link or the backup is slower than the guest writes memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Overload {
    /// Epochs get longer, and output waits for as long.
    #[default]
    Lengthen,
    /// The guest's processors are slowed until what it writes fits.
    Throttle,
    /// Protection ends when it lasts for [`EpochSection::overload_patience`], and is tried again as after any other loss.
    Drop,
}

impl Overload {
    /// The word as in the file.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Lengthen => "lengthen",
            Self::Throttle => "throttle",
            Self::Drop => "drop",
        }
    }
}

/// How the pages that an epoch dirtied come out of the guest, and when it runs on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaptureStrategy {
    /// Copied in the pause, sent while the guest runs.
    #[default]
    Postponed,
    /// Copied in the pause, which lasts until the backup has the checkpoint.
    StopAndCopy,
    /// Write-protected in the pause, copied while the guest runs.
    CopyOnWrite,
    /// Postponed, or on write where that pays.
    Auto,
}

impl CaptureStrategy {
    /// As in the file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Postponed => "postponed",
            Self::StopAndCopy => "stop-and-copy",
            Self::CopyOnWrite => "copy-on-write",
            Self::Auto => "auto",
        }
    }
}

/// Whether pages are copied before the pause, while the guest runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precopy {
    /// Where that pays.
    #[default]
    Auto,
    /// In each epoch.
    Always,
    /// Never.
    Never,
}

impl Precopy {
    /// As in the file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        }
    }
}

/// `[epoch]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Lines", into = "Lines")]
pub struct EpochSection {
    /// When an epoch ends.
    pub pace: EpochPace,
    /// Most checkpoints that are sent and not committed: 1 to [`EPOCHS_IN_FLIGHT`].
    pub in_flight: u8,
    /// Whether each checkpoint carries a digest of all of RAM, which an activation compares. For tests: about 0.15 ms of pause for each MiB.
    pub ram_digest: bool,
    /// Pages that are written in most epochs are not protected again after each, but copied in each.
    pub hot_pages: bool,
    /// What an overload does.
    pub overload: Overload,
    /// For how long an overload is borne before it ends protection, if it shall.
    pub overload_patience: Duration,
    /// How pages come out of the guest.
    pub capture: CaptureStrategy,
    /// Whether pages are copied before the pause.
    pub precopy: Precopy,
}

impl Default for EpochSection {
    fn default() -> Self {
        Self {
            pace: EpochPace::Latency(DEFAULT_LATENCY),
            in_flight: EPOCHS_IN_FLIGHT,
            ram_digest: false,
            hot_pages: true,
            overload: Overload::default(),
            overload_patience: DEFAULT_PATIENCE,
            capture: CaptureStrategy::default(),
            precopy: Precopy::default(),
        }
    }
}

/// The section as it is written.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Lines {
    #[serde(with = "units::maybe_span", skip_serializing_if = "Option::is_none")]
    interval: Option<Duration>,
    #[serde(with = "units::maybe_span", skip_serializing_if = "Option::is_none")]
    latency: Option<Duration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    overhead: Option<Percent>,
    in_flight: Option<u8>,
    ram_digest: bool,
    hot_pages: Option<bool>,
    overload: Overload,
    #[serde(with = "units::maybe_span", skip_serializing_if = "Option::is_none")]
    overload_patience: Option<Duration>,
    capture: CaptureStrategy,
    precopy: Precopy,
}

impl TryFrom<Lines> for EpochSection {
    type Error = &'static str;

    fn try_from(lines: Lines) -> Result<Self, Self::Error> {
        let Lines {
            interval,
            latency,
            overhead,
            in_flight,
            ram_digest,
            hot_pages,
            overload,
            overload_patience,
            capture,
            precopy,
        } = lines;
        let unsaid = Self::default();
        let pace = match (interval, latency, overhead) {
            (None, None, None) => unsaid.pace,
            (Some(interval), None, None) => EpochPace::Fixed(interval),
            (None, Some(latency), None) => EpochPace::Latency(latency),
            (None, None, Some(overhead)) => EpochPace::Overhead(overhead),
            _ => return Err("interval, latency and overhead in one [epoch]: say one of them"),
        };
        let in_flight = in_flight.unwrap_or(unsaid.in_flight);
        let overload_patience = overload_patience.unwrap_or(unsaid.overload_patience);
        let hot_pages = hot_pages.unwrap_or(unsaid.hot_pages);
        Ok(Self { pace, in_flight, ram_digest, hot_pages, overload, overload_patience, capture, precopy })
    }
}

impl From<EpochSection> for Lines {
    fn from(section: EpochSection) -> Self {
        let EpochSection { pace, in_flight, ram_digest, hot_pages, overload, overload_patience, capture, precopy } =
            section;
        let (in_flight, hot_pages, overload_patience) = (Some(in_flight), Some(hot_pages), Some(overload_patience));
        let said = Self { in_flight, ram_digest, hot_pages, overload, overload_patience, ..Self::default() };
        let mut lines = Self { capture, precopy, ..said };
        match pace {
            EpochPace::Fixed(interval) => lines.interval = Some(interval),
            EpochPace::Latency(latency) => lines.latency = Some(latency),
            EpochPace::Overhead(overhead) => lines.overhead = Some(overhead),
        }
        lines
    }
}

impl PairConfig {
    pub(super) fn check_epoch(&self) -> Result<(), Wrong> {
        let (us, ms) = (Duration::from_micros(1), Duration::from_millis(1));
        match self.epoch.pace {
            EpochPace::Fixed(interval) => span_within("epoch.interval", interval, 100 * us, Duration::from_secs(1))?,
            EpochPace::Latency(latency) => span_within("epoch.latency", latency, 500 * us, 100 * ms)?,
            EpochPace::Overhead(overhead) if overhead.share() > 0.9 => {
                let cause = format!("{} leaves the guest nothing: 1% to 90%", String::from(overhead));
                return Err(wrong("epoch.overhead", cause));
            }
            EpochPace::Overhead(_) => {}
        }
        if self.epoch.in_flight == 0 || self.epoch.in_flight > EPOCHS_IN_FLIGHT {
            let cause = format!("{} is out of bounds: 1 to {EPOCHS_IN_FLIGHT}", self.epoch.in_flight);
            return Err(wrong("epoch.in_flight", cause));
        }
        span_within("epoch.overload_patience", self.epoch.overload_patience, SECOND, 3600 * SECOND)
    }

    pub(super) fn derived_overload(&self) -> String {
        match self.epoch.overload {
            Overload::Lengthen => format!(
                "overload: epochs get longer than asked for; output that waits for more than timers.max_hold ({}) is dropped",
                format_span(self.timers.max_hold)
            ),
            Overload::Throttle => "overload: the guest's processors are slowed until what it writes fits".into(),
            Overload::Drop => format!(
                "overload: after {} of it protection ends; tried again after timers.protect_retry, and after longer if that is soon",
                format_span(self.epoch.overload_patience)
            ),
        }
    }

    pub(super) fn derived_capture(&self) -> String {
        let how = match self.epoch.capture {
            CaptureStrategy::Postponed => "copied in the pause, sent while the guest runs",
            CaptureStrategy::StopAndCopy => {
                "copied in the pause, which lasts until the backup has acknowledged the epoch"
            }
            CaptureStrategy::CopyOnWrite => {
                "write-protected in the pause, copied while the guest runs (needs userfaultfd on both hosts)"
            }
            CaptureStrategy::Auto => {
                "copied in the pause; large sets that the guest rewrites little are copied while it runs"
            }
        };
        let before = match self.epoch.precopy {
            Precopy::Auto => "before the pause where that makes it shorter",
            Precopy::Always => "before each pause, too",
            Precopy::Never => "never before the pause",
        };
        format!("pages: {how}; {before}")
    }

    pub(super) fn derived_epoch(&self) -> String {
        match self.epoch.pace {
            EpochPace::Fixed(interval) => format!(
                "epochs: one every {}, whatever the guest does; at most {} a second; a reply waits for half of one on average, and for its commit",
                format_span(interval),
                1_000_000 / interval.as_micros().max(1)
            ),
            EpochPace::Latency(latency) => format!(
                "epochs: end when output waits; of a hundred replies 99 shall wait for at most {}, as far as link and backup let; \
                 a guest that computes and says nothing has one after 25ms of its time, an idle one every second",
                format_span(latency)
            ),
            EpochPace::Overhead(overhead) => format!(
                "epochs: end when output waits, as often as pauses take at most {} of the guest's time; \
                 an output waits for 100ms at most for that; an idle guest has one every second",
                String::from(overhead)
            ),
        }
    }
}
