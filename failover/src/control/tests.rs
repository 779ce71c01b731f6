use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use crossbeam::channel::{Receiver, bounded};

use super::*;
use crate::decide::{Command, CommandOutcome};
use crate::status::tests_support::board;

struct Scene {
    directory: tempfile::TempDir,
    commands: Receiver<ControlRequest>,
    server: Option<ControlServer>,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (sender, commands) = bounded(4);
        let path = directory.path().join("sub/a.sock");
        let server = ControlServer::start(&path, "web1", board(), sender, || {}).unwrap();
        Self { directory, commands, server: Some(server) }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("sub/a.sock")
    }

    fn client(&self) -> Client {
        Client::connect(&self.path(), Duration::from_secs(10)).unwrap()
    }

    /// Sends raw bytes, closes its side, reads all answers.
    fn raw(&self, bytes: &[u8]) -> Vec<String> {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let _ = (&stream).write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        BufReader::new(stream).lines().map_while(Result::ok).collect()
    }
}

#[test]
fn status_and_commands_with_progress() {
    let scene = Scene::new();
    assert_eq!(scene.client().status().unwrap().vm, "web1");
    let commands = scene.commands.clone();
    let core = std::thread::spawn(move || {
        let request = commands.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(request.command, Command::Switchover);
        request.reply.progress("draining");
        request.reply.progress("handing over");
        request.reply.finish(CommandOutcome::Done("b runs in generation 2".into()), None);
    });
    let mut seen = vec![];
    let request = Request::Failover { mode: FailoverMode::Planned, confirm: None, without_arbiter: false };
    let result = scene.client().ask(&request, |text| seen.push(text.to_owned())).unwrap();
    assert_eq!(seen, ["draining", "handing over"]);
    assert_eq!(result["text"], "b runs in generation 2");
    core.join().unwrap();
}

#[test]
fn force_needs_the_vms_name() {
    let scene = Scene::new();
    for confirm in [None, Some("web2".to_owned()), Some(String::new())] {
        let request = Request::Failover { mode: FailoverMode::Force, confirm, without_arbiter: false };
        let error = scene.client().ask(&request, |_| {}).unwrap_err();
        assert!(matches!(error, ClientError::Answered(ErrorBody { code: ErrorCode::Refused, .. })), "{error}");
    }
    assert!(scene.commands.is_empty(), "the core was not bothered");
}

#[test]
fn a_core_that_ends_without_an_answer_leaves_the_outcome_unknown() {
    let scene = Scene::new();
    let commands = scene.commands.clone();
    let core = std::thread::spawn(move || drop(commands.recv_timeout(Duration::from_secs(10)).unwrap()));
    let error = scene.client().ask(&Request::Stop {}, |_| {}).unwrap_err();
    assert!(matches!(error, ClientError::Answered(ErrorBody { code: ErrorCode::OutcomeUnknown, .. })), "{error}");
    core.join().unwrap();
}

#[test]
fn wrong_lines_get_an_error_and_the_connection_goes_on() {
    let scene = Scene::new();
    let deep = format!("{{\"method\":{}1{}}}", "[".repeat(5000), "]".repeat(5000));
    let wrong: [&[u8]; 14] = [
        b"",
        b"\0\0\0",
        b"\xff\xfe",
        b"{",
        b"[]",
        b"null",
        b"{\"method\":\"reboot\"}",
        b"{\"method\":\"status\",\"method\":\"stop\"}",
        b"{\"method\":\"status\",\"extra\":1}",
        b"{\"method\":7}",
        b"{\"method\":\"failover\"}",
        b"{\"method\":\"failover\",\"mode\":1e400}",
        b"{\"method\":\"failover\",\"mode\":\"force\",\"without_arbiter\":NaN}",
        deep.as_bytes(),
    ];
    let mut all = vec![];
    for line in wrong {
        all.extend_from_slice(line);
        all.push(b'\n');
    }
    all.extend_from_slice(b"{\"method\":\"status\"}\n");
    let answers = scene.raw(&all);
    assert_eq!(answers.len(), wrong.len() + 1);
    for (line, answer) in wrong.iter().zip(&answers) {
        assert!(answer.contains("\"bad_request\""), "{:?} got {answer}", String::from_utf8_lossy(line));
    }
    assert!(answers[wrong.len()].contains("ft.status/1"));
    assert!(scene.commands.is_empty());
}

#[test]
fn a_line_without_end_is_cut_off_and_a_line_without_newline_is_no_request() {
    let scene = Scene::new();
    let answers = scene.raw(&vec![b'x'; 2 << 20]);
    assert!(answers.len() <= 1 && answers.iter().all(|answer| answer.contains("too_long")), "{answers:?}");
    assert!(scene.raw(b"{\"method\":\"stop\"}").is_empty());
    assert!(scene.commands.is_empty());
    scene.client().status().unwrap();
}

#[test]
fn many_pipelined_requests_and_clients_that_leave_are_survived() {
    let scene = Scene::new();
    let answers = scene.raw(&b"{\"method\":\"oops\"}\n".repeat(10_000));
    assert_eq!(answers.len(), 10_000);
    for _ in 0..20 {
        let mut stream = UnixStream::connect(scene.path()).unwrap();
        let _ = stream.write_all(&b"{\"method\":\"status\"}\n".repeat(100));
    }
    let served = (0..1000).find_map(|_| scene.client().status().ok());
    assert!(served.is_some());
}

#[test]
fn a_thousand_idle_clients_are_turned_away_and_others_are_served_again() {
    let scene = Scene::new();
    let idle: Vec<UnixStream> = (0..1000).filter_map(|_| UnixStream::connect(scene.path()).ok()).collect();
    let mut refused = 0;
    for mut stream in idle.iter().skip(16) {
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut text = [0; 256];
        let read = stream.read(&mut text).unwrap();
        assert!(String::from_utf8_lossy(&text[..read]).contains("busy"));
        refused += 1;
    }
    assert!(refused > 100);
    drop(idle);
    assert!((0..1000).find_map(|_| scene.client().status().ok()).is_some());
}

#[test]
fn only_its_user_may_connect() {
    let scene = Scene::new();
    let mode = fs::metadata(scene.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
}

/// The mode of the socket must not come from something that all threads share.
#[test]
fn files_made_while_a_socket_is_opened_keep_their_mode() {
    let directory = tempfile::tempdir().unwrap();
    let mode = |name: &str| {
        let path = directory.path().join(name);
        fs::write(&path, "").unwrap();
        fs::metadata(path).unwrap().permissions().mode()
    };
    let usual = mode("first");
    let (tell, told) = bounded::<()>(0);
    let opening = std::thread::spawn(move || {
        for _ in 0..300 {
            drop(Scene::new());
        }
        drop(tell);
    });
    let mut made = 0_u64;
    while told.try_recv() != Err(crossbeam::channel::TryRecvError::Disconnected) {
        assert_eq!(mode(&made.to_string()), usual);
        made += 1;
    }
    opening.join().unwrap();
    assert!(made > 0);
}

#[test]
fn a_stale_socket_is_replaced_a_living_one_and_other_files_are_not() {
    let mut scene = Scene::new();
    let path = scene.path();
    let start = || ControlServer::start(&path, "web1", board(), bounded(1).0, || {});
    assert!(matches!(start(), Err(ControlError::InUse(_))));
    scene.server = None;
    assert!(!path.exists(), "removed by an ordered end");
    drop(UnixListener::bind(&path).unwrap());
    drop(start().unwrap());
    fs::write(&path, "precious").unwrap();
    assert!(matches!(start(), Err(ControlError::NotASocket(_))));
    fs::rename(&path, path.with_extension("file")).unwrap();
    std::os::unix::fs::symlink(path.with_extension("file"), &path).unwrap();
    assert!(matches!(start(), Err(ControlError::NotASocket(_))));
    assert_eq!(fs::read_to_string(path.with_extension("file")).unwrap(), "precious");
}

#[test]
fn a_client_says_when_nobody_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let error = Client::connect(&directory.path().join("none.sock"), Duration::from_secs(1)).unwrap_err();
    assert!(matches!(error, ClientError::NotThere { .. }));
    // A process that accepts and never answers.
    let path = directory.path().join("mute.sock");
    let _mute = UnixListener::bind(&path).unwrap();
    let error = Client::connect(&path, Duration::from_millis(50)).unwrap().status().unwrap_err();
    assert!(matches!(&error, ClientError::Broken(text) if text == "time ran out"), "{error}");
}
