//! As much of QEMU's monitor protocol as a live migration needs.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{BenchError, host};

/// How long QEMU may take for an answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest line that is taken.
const MAX_LINE: u64 = 1 << 20;

/// A connection to one QEMU's monitor.
pub(super) struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the socket that a QEMU makes when it starts, and greets it.
    ///
    /// # Errors
    /// There is no such socket after a while, or no QEMU behind it.
    pub(super) fn connect(path: &Path) -> Result<Self, BenchError> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= deadline => return Err(host("QEMU's monitor")(error)),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).map_err(host("setsockopt"))?;
        let reader = BufReader::new(stream.try_clone().map_err(host("dup"))?);
        let mut this = Self { stream, reader };
        let greeting = this.line()?;
        if greeting["QMP"].is_null() {
            return Err(BenchError::Wrong(format!("QEMU's monitor greets with {greeting}")));
        }
        this.execute("qmp_capabilities", json!({}))?;
        Ok(this)
    }

    /// Carries out a command and returns its answer; events that come before it are passed over.
    ///
    /// # Errors
    /// QEMU refuses, or is gone.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, BenchError> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.stream.write_all(line.as_bytes()).map_err(host("QEMU's monitor"))?;
        loop {
            let mut said = self.line()?;
            if !said["error"].is_null() {
                return Err(BenchError::Wrong(format!("QEMU refuses {command}: {}", said["error"])));
            }
            if let Some(answer) = said.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    fn line(&mut self) -> Result<Value, BenchError> {
        let mut line = String::new();
        let read = self.reader.by_ref().take(MAX_LINE).read_line(&mut line).map_err(host("QEMU's monitor"))?;
        if read == 0 {
            return Err(BenchError::Wrong("QEMU closed its monitor".into()));
        }
        serde_json::from_str(&line).map_err(|error| BenchError::Wrong(format!("QEMU's monitor: {error} in {line:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_passed_over_and_errors_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let there = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut asked = Vec::new();
            for answer in [
                "{\"event\":\"RESUME\"}\n{\"return\":{}}\n",
                "{\"return\":{\"downtime\":3}}\n",
                "{\"error\":{\"class\":\"no\"}}\n",
            ] {
                if asked.is_empty() {
                    stream.write_all(b"{\"QMP\":{\"version\":{}}}\n").unwrap();
                }
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                asked.push(line);
                stream.write_all(answer.as_bytes()).unwrap();
            }
            asked
        });
        let mut qmp = Qmp::connect(&path).unwrap();
        assert_eq!(qmp.execute("query-migrate", json!({})).unwrap()["downtime"], 3);
        assert!(qmp.execute("migrate", json!({"uri": "x"})).unwrap_err().to_string().contains("refuses migrate"));
        assert!(there.join().unwrap()[2].contains("\"uri\":\"x\""));
    }
}
