//! HTTP for probes, load balancers and Prometheus. Read-only; loopback unless configured otherwise.
//!
//! Small enough to be our own: `GET` of a fixed set of paths, one request per connection. What a library would not give is the bound on
//! everything: bytes of a request, time of a connection, number of connections.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::status::{NodeRole, Status, StatusBoard};

/// Longest request head, in bytes.
const MAX_HEAD_BYTES: usize = 8 * 1024;
/// Connections at a time; a further one is closed at once.
const MAX_CONNECTIONS: usize = 16;
/// A request must be complete, and its answer taken, within this time each.
const PATIENCE: Duration = Duration::from_secs(2);
/// The event loop counts as dead after this long without a sign of life.
const LOOP_DEAD: Duration = Duration::from_secs(5);

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves until it is dropped.
#[derive(Debug)]
pub struct HealthServer {
    address: SocketAddr,
    ending: Arc<AtomicBool>,
}

impl HealthServer {
    /// Listens at `address`.
    ///
    /// # Errors
    /// When the address is in use or none of this host.
    pub fn start(address: SocketAddr, board: StatusBoard) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let ending = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&ending);
        thread::Builder::new().name("health".into()).spawn(move || accept(&listener, &board, &stop))?;
        Ok(Self { address, ending })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for HealthServer {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_millis(100));
    }
}

struct Seat(Arc<AtomicUsize>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn accept(listener: &TcpListener, board: &StatusBoard, ending: &AtomicBool) {
    let taken = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        if ending.load(Ordering::Acquire) {
            return;
        }
        let Ok(stream) = stream else {
            // Out of file descriptors, most likely: others will close some.
            thread::yield_now();
            continue;
        };
        let seat = Seat(Arc::clone(&taken));
        if taken.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS {
            continue;
        }
        let board = board.clone();
        let serve = move || {
            let _seat = seat;
            // A client that went away is its own business.
            let _ = serve(stream, &board);
        };
        if let Err(error) = thread::Builder::new().name("health-client".into()).spawn(serve) {
            log::warn!("health: no thread for a client: {error}");
        }
    }
}

fn serve(mut stream: TcpStream, board: &StatusBoard) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let answer = match read_head(&mut stream)? {
        Head::Complete(head) => answer(&head, board),
        Head::TooLong => Answer::text(431, "the request is too long\n"),
        Head::Incomplete => return Ok(()),
    };
    stream.write_all(answer.head().as_bytes())?;
    if answer.with_body {
        stream.write_all(answer.body.as_bytes())?;
    }
    stream.flush()
}

enum Head {
    Complete(Vec<u8>),
    TooLong,
    Incomplete,
}

fn read_head(stream: &mut TcpStream) -> io::Result<Head> {
    let until = Instant::now() + PATIENCE;
    let mut head = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        // The time limit is for the whole head: one byte now and then does not extend it.
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Head::Incomplete);
        }
        stream.set_read_timeout(Some(left))?;
        let read = stream.read(&mut chunk)?;
        if read == 0 {
            return Ok(Head::Incomplete);
        }
        head.extend_from_slice(&chunk[..read]);
        if head.windows(4).any(|end| end == b"\r\n\r\n") {
            return Ok(Head::Complete(head));
        }
        if head.len() > MAX_HEAD_BYTES {
            return Ok(Head::TooLong);
        }
    }
}

struct Answer {
    code: u16,
    kind: &'static str,
    body: String,
    with_body: bool,
}

impl Answer {
    fn new(code: u16, kind: &'static str, body: String) -> Self {
        Self { code, kind, body, with_body: true }
    }

    fn text(code: u16, body: impl Into<String>) -> Self {
        Self::new(code, TEXT, body.into())
    }

    /// A probe: machines read the code, people the text.
    fn probe(good: bool, body: String) -> Self {
        Self::text(if good { 200 } else { 503 }, body)
    }

    fn head(&self) -> String {
        let phrase = match self.code {
            200 => "OK",
            400 => "Bad Request",
            404 => "Not Found",
            405 => "Method Not Allowed",
            431 => "Request Header Fields Too Large",
            _ => "Service Unavailable",
        };
        let more = match self.code {
            405 => "Allow: GET, HEAD\r\n",
            503 => "Retry-After: 1\r\n",
            _ => "",
        };
        format!(
            "HTTP/1.1 {} {phrase}\r\nContent-Type: {}\r\nContent-Length: {}\r\n{more}Cache-Control: no-store\r\nConnection: close\r\n\r\n",
            self.code,
            self.kind,
            self.body.len()
        )
    }
}

fn answer(head: &[u8], board: &StatusBoard) -> Answer {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let Ok(line) = std::str::from_utf8(line) else { return Answer::text(400, "not a request\n") };
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Answer::text(400, "not a request\n");
    };
    if !version.starts_with("HTTP/1.") {
        return Answer::text(400, "only HTTP/1.0 and HTTP/1.1\n");
    }
    if method != "GET" && method != "HEAD" {
        return Answer::text(405, "read only\n");
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut answer = route(path, query, board);
    answer.with_body = method == "GET";
    answer
}

fn route(path: &str, query: &str, board: &StatusBoard) -> Answer {
    let status = board.snapshot();
    let line = |status: &Status| format!("{}\n", status.to_line());
    match path {
        "/livez" => {
            let idle = board.idle_for();
            Answer::probe(idle < LOOP_DEAD, format!("event loop: last sign of life {} ms ago\n", idle.as_millis()))
        }
        "/readyz" | "/healthz" => ready(&status, board, query == "verbose" || query.starts_with("verbose=")),
        "/primary" => Answer::probe(status.role == NodeRole::Primary && status.state.runs(), line(&status)),
        "/backup" => Answer::probe(status.role == NodeRole::Backup, line(&status)),
        "/protected" => Answer::probe(status.protected, line(&status)),
        "/status.json" => Answer::new(200, JSON, status.to_json() + "\n"),
        "/metrics" => Answer::new(200, METRICS, status.to_prometheus()),
        "/" => Answer::text(200, "/livez /readyz?verbose /primary /backup /protected /status.json /metrics\n"),
        _ => Answer::text(404, "no such page\n"),
    }
}

fn ready(status: &Status, board: &StatusBoard, verbose: bool) -> Answer {
    let fresh = |age: Option<f64>| age.is_some_and(|age| age < 5.0);
    // What decides depends on the role: a primary is ready while it serves, a backup while it could take over.
    let primary = status.role == NodeRole::Primary;
    let checks = [
        ("loop", board.idle_for() < LOOP_DEAD, true, "the event loop gave no sign of life"),
        ("ending", !board.is_ending(), true, "the process is ending"),
        ("state", status.ready() || !primary, true, status.reason.text()),
        ("link", status.link.up, false, "no accepted connection to the peer"),
        ("arbiter", fresh(status.arbiter.age_seconds), false, "no usable answer of the arbiter lately"),
        ("protected", status.protected, false, "output is not covered by a backup"),
        ("armed", status.armed, !primary, "a takeover now would not be granted"),
    ];
    let good = checks.iter().all(|(_, good, needed, _)| *good || !needed);
    if !verbose {
        return Answer::probe(good, if good { "ready\n".into() } else { "not ready\n".into() });
    }
    let mut text = String::new();
    for (name, good, needed, why) in checks {
        let line = match (good, needed) {
            (true, _) => format!("[+]{name} ok\n"),
            (false, true) => format!("[-]{name} failed: {why}\n"),
            (false, false) => format!("[!]{name} not ok (not needed for this role): {why}\n"),
        };
        text.push_str(&line);
    }
    Answer::probe(good, text)
}

#[cfg(test)]
mod tests;
