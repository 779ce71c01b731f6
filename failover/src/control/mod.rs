//! `ftctl`'s way in: a unix socket, one JSON object per line in each direction.
//!
//! Request: `{"method":"status"}`, `failover` (`"mode":"planned"|"force"`, `"confirm"`, `"without_arbiter"`), `stop`, `protect`, `unprotect`, `pause-protection` (`"seconds"`),
//! `rejoin`, `verify`.
//! Answer: any number of `{"progress":"…"}`, then exactly one `{"result":…}` or `{"error":{"code":…,"text":…}}`.
//!
//! Only root and the user that runs the process may connect. Every line is bounded, every client has a time limit, and the number of clients is
//! bounded, too: a client can waste its own time only.

use serde::{Deserialize, Serialize};

mod client;
mod server;

pub use client::{Client, ClientError};
pub use server::{ControlError, ControlRequest, ControlServer, ReplyHandle};

/// Longest line in either direction, in bytes, without its newline.
pub const MAX_LINE_BYTES: usize = 64 * 1024;

/// How a failover is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailoverMode {
    /// The owner hands the guest over; nothing is lost.
    Planned,
    /// R11: this side takes over although the record does not allow it by itself.
    Force,
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// The status as one object.
    Status {},
    /// Move the guest.
    Failover {
        /// How.
        mode: FailoverMode,
        /// The VM's name, for `force`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        confirm: Option<String>,
        /// Also when the arbiter does not answer.
        #[serde(default)]
        without_arbiter: bool,
    },
    /// End the guest (primary) or the process (backup), in order.
    Stop {},
    /// Take backups on.
    Protect {},
    /// Go on without a backup.
    Unprotect {},
    /// Go on without a backup for so long.
    #[serde(rename = "pause-protection")]
    PauseProtection {
        /// How long, in seconds.
        seconds: u64,
    },
    /// A fenced side becomes the backup.
    Rejoin {},
    /// Compare both sides.
    Verify {},
}

/// Why a request was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// Not JSON, not a known method, wrong or missing fields.
    BadRequest,
    /// Longer than [`MAX_LINE_BYTES`].
    TooLong,
    /// This user may not.
    Denied,
    /// Too many clients, or the process has too much to do.
    Busy,
    /// Not safe, or not confirmed. Nothing changed.
    Refused,
    /// Nobody can say whether it was done.
    OutcomeUnknown,
    /// The process is ending.
    Ending,
}

/// An error, as sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// For scripts.
    pub code: ErrorCode,
    /// For people.
    pub text: String,
}

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    /// More follows.
    Progress(String),
    /// Done.
    Result(serde_json::Value),
    /// Not done, or unknown.
    Error(ErrorBody),
}

impl Reply {
    /// An error.
    pub fn error(code: ErrorCode, text: impl Into<String>) -> Self {
        Self::Error(ErrorBody { code, text: text.into() })
    }
}

/// Reads one line, at most [`MAX_LINE_BYTES`] long. `Ok(None)`: end of file before the first byte of a line.
fn read_line(reader: &mut impl std::io::BufRead, line: &mut Vec<u8>) -> std::io::Result<LineRead> {
    use std::io::{BufRead, Read};
    line.clear();
    let limit = u64::try_from(MAX_LINE_BYTES + 1).expect("a small constant");
    let read = reader.by_ref().take(limit).read_until(b'\n', line)?;
    if read == 0 {
        return Ok(LineRead::End);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
        return Ok(LineRead::Line);
    }
    Ok(if line.len() > MAX_LINE_BYTES { LineRead::TooLong } else { LineRead::End })
}

#[derive(Debug, PartialEq, Eq)]
enum LineRead {
    Line,
    /// End of file; what came before it without a newline is no request.
    End,
    TooLong,
}

#[cfg(test)]
mod tests;
