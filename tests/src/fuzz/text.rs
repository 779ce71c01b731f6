//! What people, files and the arbiter can say: control requests, `pair.toml`, the record, the generation file.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use crossbeam::channel::bounded;
use failover::arbiter::etcd::wire::{Header, History, HttpReply, MAX_REPLY_BYTES, ReplyError};
use failover::arbiter::{Arbiter, CasOutcome, FileArbiter, MAX_RECORD_BYTES, Record, Revision};
use failover::config::PairConfig;
use failover::control::{Client, ControlServer, FailoverMode, MAX_LINE_BYTES, Reply, Request};
use failover::decide::{Command, CommandOutcome, Role};
use failover::generation::StateDir;
use failover::status::{Labels, NodeRole, StatusBoard};
use replication_proto::{Generation, Incarnation};

use super::assert_harmless;
use super::support::VM;

const PATIENCE: Duration = Duration::from_secs(10);
const NAME: &str = "web1";

/// A directory in memory, one for each process, so that targets may run side by side.
fn place(name: &str) -> PathBuf {
    let path = Path::new("/dev/shm").join(format!("ft-fuzz-{name}-{}", std::process::id()));
    fs::create_dir_all(&path).expect("a directory in memory");
    path
}

/// Target `control`: lines to a real control socket.
///
/// Each line gets answers that end with one result or error, or the connection ends; no command reaches the core but those that a
/// line asks for word by word, and a forced failover only with the VM's name.
pub fn control(data: &[u8]) {
    let asked: Vec<Command> = data.split(|byte| *byte == b'\n').filter_map(command).collect();
    for line in data.split(|byte| *byte == b'\n') {
        // What an answer could be is read by ftctl.
        if let Ok(reply) = serde_json::from_slice::<Reply>(line) {
            let again = serde_json::to_string(&reply).expect("plain values");
            assert_eq!(serde_json::from_str::<Reply>(&again).ok(), Some(reply));
        }
    }
    let served = serve();
    let stream = UnixStream::connect(&served.socket).expect("the server listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    // A line that is too long is not read to its end.
    let written = (&stream).write_all(data).is_ok();
    drop(stream.shutdown(std::net::Shutdown::Write));
    let mut finals = 0;
    for line in BufReader::new(&stream).lines() {
        let Ok(line) = line else { break };
        match serde_json::from_str(&line).expect("an answer is a reply") {
            Reply::Progress(_) => {}
            Reply::Result(_) | Reply::Error(_) => finals += 1,
        }
    }
    let lines = data.iter().filter(|byte| **byte == b'\n').count();
    let tail = data.rsplit(|byte| *byte == b'\n').next().map_or(0, <[u8]>::len);
    assert!(finals <= lines + usize::from(tail > MAX_LINE_BYTES), "{finals} answers to {lines} lines");
    if written && data.split(|byte| *byte == b'\n').all(|line| line.len() <= MAX_LINE_BYTES) {
        assert_eq!(finals, lines, "each whole line gets its answer");
    }
    for command in served.commands.try_iter() {
        assert!(asked.contains(&command), "{command:?} was never asked for");
    }
}

/// The command that a line asks for, if it does.
fn command(line: &[u8]) -> Option<Command> {
    let request: Request = serde_json::from_slice(line).ok()?;
    let again = serde_json::to_string(&request).expect("plain values");
    assert_eq!(serde_json::from_str::<Request>(&again).ok().as_ref(), Some(&request));
    match request {
        Request::Status {} => None,
        Request::Failover { mode: FailoverMode::Planned, .. } => Some(Command::Switchover),
        Request::Failover { mode: FailoverMode::Force, confirm, without_arbiter } => {
            (confirm.as_deref() == Some(NAME)).then_some(Command::ForceTakeover { without_arbiter })
        }
        Request::Stop {} => Some(Command::Stop),
        Request::Protect {} => Some(Command::Protect),
        Request::Unprotect {} => Some(Command::Unprotect),
        Request::PauseProtection { seconds } => Some(Command::PauseProtection { length: Duration::from_secs(seconds) }),
        Request::Rejoin {} => Some(Command::Rejoin),
        Request::Verify {} => Some(Command::Verify),
    }
}

struct Served {
    socket: PathBuf,
    commands: crossbeam::channel::Receiver<Command>,
    _server: ControlServer,
}

/// The server of this process, with a core that does whatever is asked.
fn serve() -> &'static Served {
    static SERVED: OnceLock<Served> = OnceLock::new();
    SERVED.get_or_init(|| {
        let socket = place("control").join("a.sock");
        let labels = Labels {
            vm: NAME.into(),
            vm_id: VM.to_string(),
            machine: "model",
            node: "a".into(),
            peer: "b".into(),
            incarnation: Incarnation(1),
            pace: failover::config::EpochPace::Fixed(Duration::from_millis(25)),
            output_limit: 1 << 20,
            insecure_link: true,
        };
        let (requests_in, requests) = bounded(64);
        let (commands_in, commands) = crossbeam::channel::unbounded();
        let board = StatusBoard::new(&labels, NodeRole::Primary);
        let server = ControlServer::start(&socket, NAME, board, requests_in, || {}).expect("a control socket");
        std::thread::spawn(move || {
            for failover::control::ControlRequest { command, reply, asked_by: _ } in requests {
                let _ = commands_in.send(command);
                reply.progress("on the way");
                reply.finish(CommandOutcome::Done("done".into()), None);
            }
        });
        let client = Client::connect(&socket, PATIENCE).and_then(|mut client| client.status());
        assert_eq!(client.expect("a status").vm, NAME);
        Served { socket, commands, _server: server }
    })
}

/// Target `config`: a text that should be a `pair.toml`.
///
/// What is accepted can be shown, and what is shown is accepted as the same; what is refused is refused in harmless words.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match PairConfig::parse(text, "pair.toml", Path::new("/etc/ft")) {
        Err(error) => {
            let text = error.to_string();
            assert_harmless(&text);
            assert!(!text.contains('\n'), "more than one line: {text:?}");
        }
        Ok(config) => {
            let shown = config.effective();
            let again = PairConfig::parse(&shown, "shown", Path::new("/")).expect("what is shown is a configuration");
            assert_eq!(again, config);
            assert_harmless(&config.derived());
            let names: Vec<_> = config.nodes.keys().cloned().collect();
            for name in &names {
                assert_eq!(config.pick(name.as_str()).as_ref(), Ok(name));
                let (peer, _) = config.peer_of(name).expect("a pair");
                assert!(peer != name);
                let core = config.core(name, Incarnation(1), Role::Primary, Generation(0));
                assert!(core.timers.takeover > core.timers.solo);
            }
        }
    }
}

/// Target `record`: bytes that the arbiter could hold. As a record, and as the file arbiter's file.
///
/// What is accepted reads the same again; what is refused is never overwritten.
pub fn record(data: &[u8]) {
    match Record::parse(data) {
        Ok(record) => {
            assert_eq!(record.validate(), Ok(()));
            assert_eq!(Record::parse(record.to_json().as_bytes()).as_ref(), Ok(&record));
        }
        Err(error) => assert_harmless(&error.to_string()),
    }
    let path = place("record").join("record.json");
    fs::write(&path, data).expect("a file in memory");
    let mut arbiter = FileArbiter::open(&path).expect("a local file system");
    let sample = failover::arbiter::contract::sample(9);
    match arbiter.read() {
        Err(error) => {
            assert_harmless(&error.to_string());
            for expected in [None, Some(Revision(0)), Some(Revision(1))] {
                assert!(matches!(arbiter.compare_and_swap(expected, &sample), CasOutcome::Failed(_)));
            }
            assert_eq!(fs::read(&path).expect("the file is there"), data, "what cannot be read was overwritten");
        }
        Ok(None) => panic!("a file of {} bytes is no record at all", data.len()),
        Ok(Some(found)) => {
            assert!(data.len() <= MAX_RECORD_BYTES);
            assert_eq!(arbiter.compare_and_swap(None, &sample), CasOutcome::Conflict);
            match arbiter.compare_and_swap(Some(found.revision), &sample) {
                CasOutcome::Applied(revision) => {
                    assert!(revision > found.revision);
                    let read = arbiter.read().expect("readable").expect("a record");
                    assert_eq!((read.revision, read.record), (revision, sample));
                }
                CasOutcome::Failed(_) if found.revision.0 == u64::MAX => {}
                other => panic!("{other:?} at revision {}", found.revision),
            }
        }
    }
}

/// Target `generation`: bytes in the place of the generation file.
///
/// Accepted or refused, never changed by the reading; what is accepted only ever grows.
pub fn generation(data: &[u8]) {
    let directory = place("generation");
    let file = directory.join("generation.json");
    fs::write(&file, data).expect("a file in memory");
    match StateDir::open(&directory, VM) {
        Err(error) => {
            assert_harmless(&error.to_string());
            assert_eq!(fs::read(&file).expect("the file is there"), data);
        }
        Ok(mut state) => {
            let highest = state.highest();
            state.persist(Generation(highest.0.saturating_sub(1))).expect("nothing to write");
            assert_eq!(state.highest(), highest, "a generation fell");
            if let Some(next) = highest.checked_next() {
                state.persist(next).expect("room in memory");
                drop(state);
                assert_eq!(StateDir::open(&directory, VM).expect("as written").highest(), next);
            }
        }
    }
}

/// Target `etcd_reply`: how a reply's status and encoding are, what was asked, the body.
///
/// A record is believed only with a revision that the store has; a compare-and-swap counts as done only at a later revision and in
/// words that say so; texts are harmless; no store runs backwards.
pub fn etcd_reply(data: &[u8]) {
    const KEY: &str = "/ft/x/record";
    let [how, asked, body @ ..] = data else { return };
    let status = [200, 200, 200, 200, 301, 400, 401, 503][usize::from(how & 7)];
    let encoding = [None, None, None, Some("identity"), Some("gzip"), Some("\u{1b}[2J")][usize::from(how >> 3) % 6];
    let reply = HttpReply { status, encoding: encoding.map(str::to_owned), body: body.to_vec() };
    let expected = [None, Some(Revision(1)), Some(Revision(5)), Some(Revision(u64::MAX))][usize::from(asked & 3)];
    let text = |error: ReplyError| {
        let text = error.to_string();
        assert_harmless(&text);
        assert!(text.len() < 4096, "{} bytes of text", text.len());
        let certain = error.certainly_not_done();
        assert!(!certain || matches!(error, ReplyError::Refused { .. }), "{error:?}");
    };
    let mut history = History::new(None);
    match reply.found(KEY) {
        Ok(found) => {
            assert!(status == 200 && body.len() <= MAX_REPLY_BYTES);
            if let Some(versioned) = &found.record {
                assert!(versioned.revision.0 > 0 && versioned.revision.0 <= found.header.revision);
                assert_eq!(versioned.record.validate(), Ok(()));
            }
            assert_eq!(history.admit(found.header), Ok(()));
            assert!(history.admit(Header { revision: found.header.revision - 1, ..found.header }).is_err());
        }
        Err(error) => text(error),
    }
    match reply.swapped(KEY, expected) {
        Ok(swapped) => {
            assert!(status == 200 && swapped.header.revision > 0);
            if let Some(revision) = swapped.applied {
                assert!(expected.is_none_or(|expected| revision > expected));
                // Only this word: what is not looked at need not even be text.
                #[derive(serde::Deserialize)]
                struct Said {
                    succeeded: bool,
                }
                assert!(serde_json::from_slice::<Said>(body).is_ok_and(|said| said.succeeded));
            }
        }
        Err(error) => text(error),
    }
    match reply.token() {
        Ok(token) => assert!(!token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic())),
        Err(error) => text(error),
    }
    match reply.version() {
        Ok(version) => drop((version.worth(), version.to_string())),
        Err(error) => text(error),
    }
}
