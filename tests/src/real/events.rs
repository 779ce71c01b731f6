//! The event log that each process of the pair keeps in its state directory.

use std::path::Path;

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
    /// Of `activated`: how long activation took, in microseconds.
    #[serde(default)]
    pub activate_us: Option<u64>,
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
}
