//! The event log that each process of the pair keeps in its state directory.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Error, Result};

/// One line of `events.jsonl`. Which of the optional fields are there depends on the event.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    /// When, `CLOCK_MONOTONIC` in microseconds.
    pub mono_us: u64,
    /// What: `state`, `peer_quiet`, `granted`, `activated`, …
    pub event: String,
    /// Of a state change: the state before.
    #[serde(default)]
    pub from: Option<String>,
    /// Of a state change: the state after.
    #[serde(default)]
    pub to: Option<String>,
    /// Why.
    #[serde(default)]
    pub reason: Option<String>,
    /// Of an overload: what is slow, `link` or `backup`.
    #[serde(default)]
    pub slow: Option<String>,
    /// Generation of the right to run.
    #[serde(default)]
    pub generation: Option<u64>,
    /// Epoch at that time.
    #[serde(default)]
    pub epoch: Option<u64>,
    /// Of `peer_quiet`: when the peer was last heard, same clock.
    #[serde(default)]
    pub last_heard_us: Option<u64>,
    /// Of `started`: which life of the process.
    #[serde(default)]
    pub incarnation: Option<String>,
    /// Of `granted`: the right to do what.
    #[serde(default)]
    pub right: Option<String>,
    /// Of `activated`: the digest of RAM that was compared, if the checkpoint carried one.
    #[serde(default)]
    pub ram_digest: Option<String>,
    /// Of `activated`: how long activation took, in microseconds.
    #[serde(default)]
    pub activate_us: Option<u64>,
    /// Of `activated`: frames of the guest that were said again.
    #[serde(default)]
    pub resent: Option<u64>,
    /// Of `activated`: frames to the guest that were delivered.
    #[serde(default)]
    pub delivered: Option<u64>,
}

impl Event {
    /// Whether this is a change into `state`.
    #[must_use]
    pub fn enters(&self, state: &str) -> bool {
        self.event == "state" && self.to.as_deref() == Some(state)
    }
}

/// All whole lines of an event log from `since_us` on. A file that is not there yet has none; unknown fields are skipped.
pub fn read(path: &Path, since_us: u64) -> Result<Vec<Event>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(format!("cannot read {}", path.display()))(e)),
    };
    // A process that was killed may have left half a line, and the next one appends to it.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |line: &str| match serde_json::from_str::<Event>(line) {
        Ok(event) => Some(Ok(event)),
        Err(_) if !line.starts_with('{') || !line.ends_with('}') => None,
        Err(e) => Some(Err(Error::answer(path.display().to_string(), format!("{e} in {line}")))),
    };
    let events: Vec<Event> = whole.lines().filter_map(parse).collect::<Result<_>>()?;
    Ok(events.into_iter().filter(|e| e.mono_us >= since_us).collect())
}

/// Reads a growing event log piece by piece.
pub struct Tail {
    path: PathBuf,
    read_bytes: u64,
    /// All events so far, in order.
    pub events: Vec<Event>,
}

impl Tail {
    /// Begins at the log's beginning.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, read_bytes: 0, events: Vec::new() }
    }

    /// Reads the whole lines that were added.
    pub fn poll(&mut self) -> Result<()> {
        let failed = |e| Error::io(format!("cannot read {}", self.path.display()))(e);
        let mut file = match std::fs::File::open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(failed(e)),
        };
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(self.read_bytes)).and_then(|_| file.read_to_end(&mut bytes)).map_err(failed)?;
        let Some(end) = bytes.iter().rposition(|&byte| byte == b'\n') else { return Ok(()) };
        let whole = bytes.get(..=end).unwrap_or_default();
        self.read_bytes += whole.len() as u64;
        for line in String::from_utf8_lossy(whole).lines() {
            // A line that a killed process left half written is followed by one of its successor, without a break.
            let line = line.rfind("{\"mono_us\"").map_or(line, |at| &line[at..]);
            if let Ok(event) = serde_json::from_str(line) {
                self.events.push(event);
            }
        }
        Ok(())
    }

    /// The events from a time on.
    pub fn since(&self, since_us: u64) -> impl DoubleEndedIterator<Item = &Event> {
        self.events.iter().filter(move |event| event.mono_us >= since_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Half a line at the end is not there yet; older lines are left out; a line that is JSON of another shape is an error.
    #[test]
    fn reads_whole_lines_since() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        assert!(read(&path, 0).unwrap().is_empty());
        std::fs::write(
            &path,
            "{\"mono_us\":1,\"event\":\"x\"}\n{\"mono_us\":5,\"event\":\"state\",\"to\":\"solo\"}\n{\"mono",
        )
        .unwrap();
        let events = read(&path, 2).unwrap();
        assert_eq!(events.len(), 1);
        assert!(events[0].enters("solo") && !events[0].enters("protected"));
        std::fs::write(&path, "{\"event\":\"x\"}\n").unwrap();
        assert!(read(&path, 0).is_err());
    }

    /// Lines are read once, halves of lines when they are whole, and a line behind the half line of a dead process counts.
    #[test]
    fn a_tail_reads_what_was_added() {
        use std::io::Write as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut tail = Tail::new(path.clone());
        tail.poll().unwrap();
        let mut file = std::fs::File::create(&path).unwrap();
        file.write_all(b"{\"mono_us\":1,\"event\":\"x\"}\n{\"mono_us\":2,\"ev").unwrap();
        tail.poll().unwrap();
        assert_eq!(tail.events.len(), 1);
        file.write_all(b"ent\":\"y\"}\n{\"mono_{\"mono_us\":3,\"event\":\"z\"}\n").unwrap();
        tail.poll().unwrap();
        tail.poll().unwrap();
        let words: Vec<&str> = tail.since(2).map(|event| event.event.as_str()).collect();
        assert_eq!(words, ["y", "z"]);
    }
}
