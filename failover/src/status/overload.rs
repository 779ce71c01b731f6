//! What happens when the link or the backup is slower than the guest writes memory, and whether that is so.

use serde::{Deserialize, Serialize};

use crate::config::Overload;

/// Whether checkpoints come faster than they are committed, what is slow, and what is done about it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OverloadStatus {
    /// `lengthen`, `throttle` or `drop`; empty on a side that never protected anybody.
    pub policy: String,
    /// It is so.
    pub overloaded: bool,
    /// For how long it has been so, or 0.
    pub seconds: f64,
    /// How often it began since this process started.
    pub count: u64,
    /// `link` or `backup`; absent when nothing is slow.
    pub slow: Option<String>,
    /// The part of the last second in which an epoch should have ended and could not.
    pub blocked_ratio: f64,
    /// The part of its time that the guest's processors are kept from running: 0 to 0.99.
    pub throttle_ratio: f64,
    /// So many checkpoints may be on their way at present.
    pub in_flight_most: u64,
    /// Bytes that wait on this side, encoded, for the connection to take them.
    pub unsent_bytes: u64,
    /// In words: what is slow and what is done about it; empty when nothing is slow.
    pub text: String,
}

impl OverloadStatus {
    /// Of a side under this policy that is not overloaded.
    pub fn configured(policy: Overload) -> Self {
        Self { policy: policy.word().into(), ..Self::default() }
    }
}
