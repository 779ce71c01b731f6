//! The socket's client, as `ftctl` and tests use it.

use std::io::{self, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::{ErrorBody, LineRead, Reply, Request, read_line};
use crate::status::Status;

/// A request did not get its answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: nothing was asked, nothing was done.
    #[error("{place}: {cause}: is the process running?")]
    NotThere {
        /// The socket.
        place: String,
        /// The cause.
        cause: io::Error,
    },
    /// The socket may not be opened by this user.
    #[error("{0}: permission denied: run as root or as the user of the process")]
    Permission(String),
    /// The connection broke or the time ran out after the request was sent.
    #[error("no answer: {0}")]
    Broken(String),
    /// The process answered with an error.
    #[error("{}", .0.text)]
    Answered(ErrorBody),
}

/// A connection to one process.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects; every answer must come within `timeout`.
    ///
    /// # Errors
    /// [`ClientError::NotThere`] or [`ClientError::Permission`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let place = path.display().to_string();
        let stream = UnixStream::connect(path).map_err(|cause| match cause.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Permission(place.clone()),
            _ => ClientError::NotThere { place: place.clone(), cause },
        })?;
        let limit = Some(timeout.max(Duration::from_millis(1)));
        let set = stream.set_read_timeout(limit).and_then(|()| stream.set_write_timeout(limit));
        set.map_err(|cause| ClientError::NotThere { place, cause })?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// Asks, and hands every line of progress to `progress`.
    ///
    /// # Errors
    /// [`ClientError::Answered`] when the process says no, [`ClientError::Broken`] when it says nothing.
    pub fn ask(&mut self, request: &Request, mut progress: impl FnMut(&str)) -> Result<serde_json::Value, ClientError> {
        let broken = |error: io::Error| {
            let timeout = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
            ClientError::Broken(if timeout { "time ran out".into() } else { error.to_string() })
        };
        let mut line = serde_json::to_string(request).expect("string keys and plain values");
        line.push('\n');
        // A server that is full answers and closes without reading: its answer matters more than our failure to write.
        let sent = self.reader.get_mut().write_all(line.as_bytes());
        let mut answer = Vec::new();
        loop {
            match read_line(&mut self.reader, &mut answer) {
                Ok(LineRead::Line) => {}
                Ok(LineRead::TooLong) => return Err(ClientError::Broken("an answer without end".into())),
                Ok(LineRead::End) => {
                    sent.map_err(broken)?;
                    return Err(ClientError::Broken("the process closed the connection".into()));
                }
                Err(error) => return Err(broken(error)),
            }
            match serde_json::from_slice(&answer) {
                Ok(Reply::Progress(text)) => progress(&text),
                Ok(Reply::Result(value)) => return Ok(value),
                Ok(Reply::Error(error)) => return Err(ClientError::Answered(error)),
                Err(error) => return Err(ClientError::Broken(format!("an answer that is none: {error}"))),
            }
        }
    }

    /// The status.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn status(&mut self) -> Result<Status, ClientError> {
        let value = self.ask(&Request::Status {}, |_| {})?;
        serde_json::from_value(value).map_err(|error| {
            ClientError::Broken(format!("the process speaks another version of {}: {error}", crate::status::SCHEMA))
        })
    }
}
