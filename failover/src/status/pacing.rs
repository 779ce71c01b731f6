//! What decides when epochs end, and how that goes.

use serde::{Deserialize, Serialize};

use crate::config::EpochPace;

/// When epochs end, and what came of it lately.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PacingStatus {
    /// `fixed`, `latency` or `overhead`.
    pub mode: String,
    /// The interval, or the latency aimed at.
    pub target_seconds: Option<f64>,
    /// The part of the guest's time that pauses may take.
    pub target_ratio: Option<f64>,
    /// Whether the target is met; absent while there is nothing to judge by.
    pub met: Option<bool>,
    /// What the controller does, and why the target is not met if it is not.
    pub text: String,
    /// Checkpoints in the last second or so.
    pub epochs_per_second: f64,
    /// The part of its time that the guest lost to pauses in the last second or so. Writes that fault because the log of dirty pages began anew are not in it.
    pub guest_lost_ratio: f64,
    /// From the beginning of a pause to its commit, lately.
    pub commit_seconds: f64,
    /// What the first output of an epoch waited from when the guest said it until its commit: median of the last 256 epochs that had any.
    pub reply_added_p50_seconds: f64,
    /// The same: 99th percentile.
    pub reply_added_p99_seconds: f64,
}

impl PacingStatus {
    /// Of a side that protects nobody.
    pub fn configured(pace: EpochPace) -> Self {
        let (mode, target_seconds, target_ratio) = match pace {
            EpochPace::Fixed(interval) => ("fixed", Some(interval.as_secs_f64()), None),
            EpochPace::Latency(latency) => ("latency", Some(latency.as_secs_f64()), None),
            EpochPace::Overhead(overhead) => ("overhead", None, Some(overhead.share())),
        };
        Self { mode: mode.into(), target_seconds, target_ratio, ..Self::default() }
    }
}
