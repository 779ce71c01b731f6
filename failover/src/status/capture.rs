//! How pages come out of the guest, and what that was worth.

use serde::{Deserialize, Serialize};

/// How pages come out of the guest, and what was done since the process began to run it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CaptureStatus {
    /// `postponed`, `stop-and-copy`, `copy-on-write` or `auto`; empty on a side that runs no guest.
    pub strategy: String,
    /// Whether pages are copied before the pause: `auto`, `always` or `never`.
    pub precopy: String,
    /// The last checkpoint's pages were copied before its pause.
    pub precopies: bool,
    /// The last checkpoint's pages were write-protected in its pause and copied after it.
    pub protects: bool,
    /// Checkpoints with pages that were copied before the pause.
    pub precopied_epochs_total: u64,
    /// Pages copied before a pause.
    pub precopied_pages_total: u64,
    /// Of these, pages that were written again before the pause and copied again in it.
    pub precopied_again_total: u64,
    /// Checkpoints whose pages were write-protected in the pause.
    pub protected_epochs_total: u64,
    /// Pages write-protected in a pause.
    pub protected_pages_total: u64,
    /// Of these, pages that were copied because somebody wanted to write them.
    pub copied_on_write_total: u64,
}
