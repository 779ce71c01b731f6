//! The etcd arbiter against a server that says whatever a test makes it say: each wrong answer has a name, nothing is believed that was not
//! proved, and a compare-and-swap that may have been heard is never said twice.

#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use assert_cmd::Command;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use failover::arbiter::contract::sample;
use failover::arbiter::etcd::wire::MAX_REPLY_BYTES;
use failover::arbiter::{Arbiter, ArbiterError, CasOutcome, EtcdArbiter, Record, Revision};
use failover::config::EtcdSection;
use replication_proto::VmId;

const KEY: &str = "/ft/00000000-0000-0000-0000-000000000007/record";
const CLUSTER: u64 = 77;
/// How long a request may take in these tests; some wait for it in vain.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Far more than any of them needs: it says *bounded*, not *fast*.
const BOUNDED: Duration = Duration::from_secs(20);

/// A request as the server saw it.
#[derive(Clone, Debug)]
struct Seen {
    path: String,
    token: Option<String>,
}

/// What the server does about a request.
enum Act {
    /// Answers 200 with this.
    Json(String),
    /// Answers with this status and body.
    Status(u16, &'static str, String),
    /// Writes exactly these bytes and closes.
    Raw(Vec<u8>),
    /// Writes the first, then the second every now and then, until the client has had enough.
    Drip(&'static str, &'static str),
    /// Says nothing until the client has had enough.
    Silence,
}

struct Fake {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Fake {
    fn start(act: impl Fn(&Seen, usize) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, act) = (Arc::clone(&seen), Arc::new(act));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, act) = (Arc::clone(&log), Arc::clone(&act));
                // A connection that the client has closed is no error of the server.
                thread::spawn(move || serve(stream, &log, &*act).ok());
            }
        });
        Self { url, seen }
    }

    /// How many requests went to `path`.
    fn count(&self, path: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|seen| seen.path == path).count()
    }

    fn swaps(&self) -> usize {
        self.count("/v3/kv/txn")
    }
}

fn serve(mut stream: TcpStream, log: &Mutex<Vec<Seen>>, act: &dyn Fn(&Seen, usize) -> Act) -> std::io::Result<()> {
    stream.set_read_timeout(Some(BOUNDED))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut first = String::new();
        if reader.read_line(&mut first)? == 0 {
            return Ok(());
        }
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        let (mut length, mut token) = (0, None);
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim().split_once(": ") else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().unwrap(),
                "authorization" => token = Some(value.to_owned()),
                _ => {}
            }
        }
        reader.read_exact(&mut vec![0; length])?;
        let seen = Seen { path, token };
        let before = {
            let mut log = log.lock().unwrap();
            log.push(seen.clone());
            log.iter().filter(|other| other.path == seen.path).count() - 1
        };
        let (status, extra, body) = match act(&seen, before) {
            Act::Json(body) => (200, "", body),
            Act::Status(status, extra, body) => (status, extra, body),
            Act::Raw(bytes) => return stream.write_all(&bytes),
            Act::Drip(begin, piece) => {
                stream.write_all(begin.as_bytes())?;
                loop {
                    thread::sleep(Duration::from_millis(20));
                    stream.write_all(piece.as_bytes())?;
                }
            }
            Act::Silence => return reader.read_exact(&mut [0]),
        };
        let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n{extra}\r\n", body.len());
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
    }
}

fn header(cluster: u64, revision: u64) -> String {
    format!(r#""header":{{"cluster_id":"{cluster}","member_id":"1","revision":"{revision}","raft_term":"2"}}"#)
}

fn stored(store: u64, revision: u64, record: &Record) -> String {
    let (key, value) = (BASE64.encode(KEY), BASE64.encode(record.to_json()));
    let head = header(CLUSTER, store);
    format!(r#"{{{head},"kvs":[{{"key":"{key}","mod_revision":"{revision}","value":"{value}"}}],"count":"1"}}"#)
}

fn applied(revision: u64) -> String {
    format!(r#"{{{},"succeeded":true,"responses":[{{"response_put":{{}}}}]}}"#, header(CLUSTER, revision))
}

fn conflict(revision: u64) -> String {
    let key = BASE64.encode(KEY);
    let kvs = format!(r#""kvs":[{{"key":"{key}","mod_revision":"{revision}"}}]"#);
    format!(r#"{{{},"responses":[{{"response_range":{{{kvs}}}}}]}}"#, header(CLUSTER, revision))
}

/// What an honest server says: record `sample(3)` at revision 5, every swap succeeds as revision 6.
fn honest(seen: &Seen) -> Act {
    match seen.path.as_str() {
        "/version" => Act::Json(r#"{"etcdserver":"3.6.9","etcdcluster":"3.6.0"}"#.into()),
        "/v3/kv/range" => Act::Json(stored(5, 5, &sample(3))),
        "/v3/kv/txn" => Act::Json(applied(6)),
        "/v3/auth/authenticate" => Act::Json(format!(r#"{{{},"token":"T"}}"#, header(CLUSTER, 5))),
        other => panic!("nobody asks for {other}"),
    }
}

/// A server that is honest but for requests to `path`.
fn honest_but(path: &'static str, act: impl Fn(usize) -> Act + Send + Sync + 'static) -> Fake {
    Fake::start(move |seen, before| if seen.path == path { act(before) } else { honest(seen) })
}

fn arbiter_with(fakes: &[&Fake], extra: &str) -> EtcdArbiter {
    let endpoints: Vec<&str> = fakes.iter().map(|fake| fake.url.as_str()).collect();
    let timeout = TIMEOUT.as_millis();
    let text = format!("endpoints = {endpoints:?}\ntimeout = \"{timeout}ms\"\nconnect_timeout = \"1s\"\n{extra}");
    let section: EtcdSection = toml::from_str(&text).unwrap();
    EtcdArbiter::open(&section, VmId(7)).unwrap()
}

fn arbiter(fakes: &[&Fake]) -> EtcdArbiter {
    arbiter_with(fakes, "")
}

/// A name for the test, what comes, and a piece of what is said about it.
type WrongAnswer = (&'static str, fn() -> Act, &'static str);

/// Wrong answers that any request may get.
fn wrong_answers() -> Vec<WrongAnswer> {
    vec![
        ("HTML of a proxy", || Act::Status(502, "", "<html>502 Bad Gateway</html>".into()), "no JSON"),
        ("HTML and 200", || Act::Json("<html>hello</html>".into()), "no JSON"),
        ("no body", || Act::Json(String::new()), "no JSON"),
        ("an error and 200", || Act::Json(r#"{"error":"etcdserver: no leader","code":14}"#.into()), "no leader"),
        ("gzip", || Act::Status(200, "Content-Encoding: gzip\r\n", stored(5, 5, &sample(3))), "not asked for"),
        ("10 MB", || Act::Json(" ".repeat(10 << 20)), "a reply of more than"),
        ("half a body", || Act::Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{".to_vec()), "isconnected"),
        ("no HTTP", || Act::Raw(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()), "protocol"),
        ("a cut head", || Act::Raw(b"HTTP/1.1 200 OK\r\nContent-Le".to_vec()), "isconnected"),
        ("an endless head", || Act::Raw([b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'x'; 1 << 20]].concat()), "header"),
        ("nothing", || Act::Raw(Vec::new()), "isconnected"),
        ("silence", || Act::Silence, "timeout"),
        ("a slow body", || Act::Drip("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n"), "timeout"),
        ("a slow head", || Act::Drip("HTTP/1.1 200 OK\r\nX: ", "x"), "timeout"),
        ("another key", || Act::Json(stored(5, 5, &sample(3)).replace(&BASE64.encode(KEY), "L3g=")), ""),
        ("another service", || Act::Json(r#"{"status":"ok"}"#.into()), "not an answer of etcd"),
    ]
}

#[test]
fn a_read_names_each_wrong_answer_and_is_bounded_in_time() {
    for (name, act, expected) in wrong_answers() {
        let fake = honest_but("/v3/kv/range", move |_| act());
        let started = Instant::now();
        let error = arbiter(&[&fake]).read().expect_err(name);
        assert!(started.elapsed() < BOUNDED, "{name} took {:?}", started.elapsed());
        let text = error.to_string();
        assert!(text.contains(expected) && text.lines().count() == 1, "{name}: {text}");
        // Only what a person must look at is more than an outage.
        let hopeless = matches!(error, ArbiterError::Unusable(_));
        assert_eq!(hopeless, name == "another key", "{name}: {text}");
    }
}

#[test]
fn a_swap_with_a_wrong_answer_is_unknown_and_never_said_twice() {
    for (name, act, expected) in wrong_answers() {
        let fake = honest_but("/v3/kv/txn", move |_| act());
        let other = Fake::start(|seen, _| honest(seen));
        let mut arbiter = arbiter(&[&fake, &other]);
        arbiter.read().expect(name);
        let started = Instant::now();
        let outcome = arbiter.compare_and_swap(Some(Revision(5)), &sample(4));
        assert!(started.elapsed() < BOUNDED, "{name} took {:?}", started.elapsed());
        let CasOutcome::Unknown(text) = &outcome else { panic!("{name}: {outcome:?}") };
        assert!(text.contains(expected), "{name}: {text}");
        assert_eq!((fake.swaps(), other.swaps()), (1, 0), "{name}");
        // The next question goes to somebody else.
        arbiter.read().expect(name);
        assert_eq!(other.count("/v3/kv/range"), 1, "{name}");
    }
}

#[test]
fn what_etcd_refused_is_certainly_not_done() {
    for (status, message, code) in
        [(403, "permission denied", 7), (429, "too many requests", 8), (400, "mvcc: database space exceeded", 8)]
    {
        let body = format!(r#"{{"error":"etcdserver: {message}","message":"etcdserver: {message}","code":{code}}}"#);
        let fake = honest_but("/v3/kv/txn", move |_| Act::Status(status, "", body.clone()));
        let outcome = arbiter(&[&fake]).compare_and_swap(Some(Revision(5)), &sample(4));
        assert!(matches!(&outcome, CasOutcome::Failed(text) if text.contains(message)), "{outcome:?}");
    }
}

#[test]
fn redirects_are_not_followed() {
    let elsewhere = Fake::start(|seen, _| honest(seen));
    for path in ["/v3/kv/range", "/v3/kv/txn"] {
        for status in [301, 302, 303, 307, 308] {
            let to: &'static str = Box::leak(format!("Location: {}{path}\r\n", elsewhere.url).into_boxed_str());
            let fake = honest_but(path, move |_| Act::Status(status, to, String::new()));
            let mut arbiter = arbiter(&[&fake]);
            let text = if path == "/v3/kv/range" {
                arbiter.read().unwrap_err().to_string()
            } else {
                let CasOutcome::Unknown(text) = arbiter.compare_and_swap(Some(Revision(5)), &sample(4)) else {
                    panic!("{status}")
                };
                text
            };
            assert!(text.contains("redirects are not followed"), "{status}: {text}");
        }
    }
    assert!(elsewhere.seen.lock().unwrap().is_empty(), "nobody went there");
}

#[test]
fn records_that_cannot_be_acted_on_need_a_person() {
    let newer = sample(3).to_json().replace(r#""v":1"#, r#""v":2"#);
    let cases = [
        (
            stored(5, 5, &sample(3)).replace(&BASE64.encode(sample(3).to_json()), &BASE64.encode(newer)),
            "schema version 2",
        ),
        (stored(5, 5, &sample(3)).replace(&BASE64.encode(sample(3).to_json()), "!!!"), "not base64"),
        (stored(5, 5, &sample(3)).replace(&BASE64.encode(sample(3).to_json()), &BASE64.encode("null")), "not a record"),
        (stored(4, 5, &sample(3)), "contradictory"),
    ];
    for (body, expected) in cases {
        let fake = honest_but("/v3/kv/range", move |_| Act::Json(body.clone()));
        let Err(ArbiterError::Unusable(text)) = arbiter(&[&fake]).read() else { panic!("{expected}") };
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn the_longest_record_is_read() {
    let long = format!("{}{}", sample(3).to_json(), " ".repeat(64 * 1024 - sample(3).to_json().len()));
    let body = stored(5, 5, &sample(3)).replace(&BASE64.encode(sample(3).to_json()), &BASE64.encode(long));
    assert!(body.len() <= MAX_REPLY_BYTES);
    let fake = honest_but("/v3/kv/range", move |_| Act::Json(body.clone()));
    assert_eq!(arbiter(&[&fake]).read().unwrap().unwrap().record, sample(3));
}

#[test]
fn a_foreign_cluster_is_refused_and_nothing_is_written_there() {
    let ours = Fake::start(|seen, _| honest(seen));
    let foreign = |seen: &Seen| match honest(seen) {
        Act::Json(body) => Act::Json(body.replace(r#""cluster_id":"77""#, r#""cluster_id":"78""#)),
        other => other,
    };
    let theirs = Fake::start(move |seen, _| foreign(seen));
    // Configured: refused from the first answer on.
    let Err(ArbiterError::Unusable(text)) = arbiter_with(&[&theirs], "cluster_id = \"4d\"").read() else { panic!() };
    assert!(text.contains("etcd cluster 4e, but this arbiter is cluster 4d"), "{text}");
    assert!(arbiter_with(&[&ours], "cluster_id = \"4d\"").read().is_ok());
    // Not configured: the first that answers is ours, and where it is away nobody else takes its place.
    let turned = honest_but("/v3/kv/txn", |_| Act::Silence);
    let mut arbiter = arbiter(&[&turned, &theirs]);
    arbiter.read().unwrap();
    assert!(matches!(arbiter.compare_and_swap(Some(Revision(5)), &sample(4)), CasOutcome::Unknown(_)));
    // The next in turn would be the foreign one: it is looked at before anything is written.
    let outcome = arbiter.compare_and_swap(Some(Revision(5)), &sample(4));
    assert!(matches!(outcome, CasOutcome::Unknown(_)), "{outcome:?}");
    assert_eq!((turned.swaps(), theirs.swaps()), (2, 0));
}

/// An answer to a swap from another cluster than before proves nothing about ours.
#[test]
fn a_swap_answered_by_another_cluster_is_unknown() {
    let fake = honest_but("/v3/kv/txn", |_| Act::Json(applied(6).replace("\"77\"", "\"78\"")));
    let mut arbiter = arbiter(&[&fake]);
    arbiter.read().unwrap();
    let outcome = arbiter.compare_and_swap(Some(Revision(5)), &sample(4));
    assert!(matches!(&outcome, CasOutcome::Unknown(text) if text.contains("cluster 4e")), "{outcome:?}");
}

#[test]
fn a_stale_answer_is_looked_at_again_and_one_that_stays_is_handed_on() {
    // Revision 9, then once 5, then 9 again.
    let fake = honest_but("/v3/kv/range", |before| {
        Act::Json(if before == 1 { stored(5, 5, &sample(1)) } else { stored(9, 9, &sample(3)) })
    });
    let mut stale = arbiter(&[&fake]);
    assert_eq!(stale.read().unwrap().unwrap().revision, Revision(9));
    assert_eq!(stale.read().unwrap().unwrap().revision, Revision(9));
    assert_eq!(fake.count("/v3/kv/range"), 3);
    // Revision 9, then 5 for ever: restored from a backup. The decision core refuses the record; it must see it for that.
    let fake = honest_but("/v3/kv/range", |before| {
        Act::Json(if before == 0 { stored(9, 9, &sample(3)) } else { stored(5, 5, &sample(1)) })
    });
    let mut restored = arbiter(&[&fake]);
    assert_eq!(restored.read().unwrap().unwrap().revision, Revision(9));
    assert_eq!(restored.read().unwrap().unwrap().revision, Revision(5));
}

#[test]
fn an_endpoint_that_takes_no_connection_is_passed_over() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = Fake { url: format!("http://{}", closed.local_addr().unwrap()), seen: Arc::default() };
    drop(closed);
    let fake = Fake::start(|seen, _| honest(seen));
    let mut first = arbiter(&[&gone, &fake]);
    assert_eq!(first.compare_and_swap(Some(Revision(5)), &sample(4)), CasOutcome::Applied(Revision(6)));
    assert_eq!(fake.swaps(), 1);
    // It looked at the server before it wrote there, and asks it first from now on.
    assert_eq!((fake.count("/v3/kv/range"), fake.count("/version")), (1, 1));
    assert!(first.describe().contains(&fake.url), "{}", first.describe());
    first.read().unwrap();
    assert_eq!(fake.count("/version"), 1, "asked once");
}

#[test]
fn a_silent_endpoint_costs_a_read_one_timeout_and_then_nothing() {
    let silent = Fake::start(|_, _| Act::Silence);
    let fake = Fake::start(|seen, _| honest(seen));
    let mut arbiter = arbiter(&[&silent, &fake]);
    arbiter.read().unwrap();
    arbiter.read().unwrap();
    assert_eq!((silent.count("/v3/kv/range"), fake.count("/v3/kv/range")), (1, 2));
}

#[test]
fn conflicts_are_conflicts() {
    let fake = honest_but("/v3/kv/txn", |_| Act::Json(conflict(6)));
    let mut arbiter = arbiter(&[&fake]);
    assert_eq!(arbiter.compare_and_swap(Some(Revision(5)), &sample(4)), CasOutcome::Conflict);
    assert_eq!(arbiter.compare_and_swap(Some(Revision(0)), &sample(4)), CasOutcome::Conflict);
    assert_eq!(fake.swaps(), 1, "no key has revision 0");
    // "Unequal", and yet the revision is the one that was asked for.
    assert!(matches!(arbiter.compare_and_swap(Some(Revision(6)), &sample(4)), CasOutcome::Unknown(_)));
}

#[test]
fn a_token_that_expires_in_the_middle_of_a_swap_is_renewed() {
    let directory = tempfile::tempdir().unwrap();
    let password = directory.path().join("password");
    std::fs::write(&password, "p").unwrap();
    std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o600)).unwrap();
    let login = format!("user = \"ft\"\npassword_file = {:?}\n", password.display().to_string());
    let invalid = r#"{"error":"etcdserver: invalid auth token","message":"etcdserver: invalid auth token","code":16}"#;
    let fake = Fake::start(move |seen, before| match (seen.path.as_str(), seen.token.as_deref()) {
        ("/v3/auth/authenticate", None) => Act::Json(format!(r#"{{{},"token":"T{before}"}}"#, header(CLUSTER, 5))),
        ("/v3/kv/txn", Some("T0")) => Act::Status(401, "", invalid.into()),
        ("/v3/kv/txn" | "/v3/kv/range", Some(_)) | ("/version", None) => honest(seen),
        other => panic!("{other:?}"),
    });
    let mut renewed = arbiter_with(&[&fake], &login);
    renewed.read().unwrap();
    assert_eq!(renewed.compare_and_swap(Some(Revision(5)), &sample(4)), CasOutcome::Applied(Revision(6)));
    assert_eq!((fake.swaps(), fake.count("/v3/auth/authenticate")), (2, 2));
    // A server that never accepts a token is not asked for ever.
    let fake = honest_but("/v3/kv/txn", move |_| Act::Status(401, "", invalid.into()));
    let outcome = arbiter_with(&[&fake], &login).compare_and_swap(Some(Revision(5)), &sample(4));
    assert!(matches!(outcome, CasOutcome::Failed(_)), "{outcome:?}");
    assert_eq!(fake.swaps(), 2);
    // A wrong password is for a person to mend, and was not written anywhere.
    let denied = r#"{"error":"etcdserver: authentication failed, invalid user ID or password","code":3}"#;
    let fake = honest_but("/v3/auth/authenticate", move |_| Act::Status(400, "", denied.into()));
    let mut wrong = arbiter_with(&[&fake], &login);
    assert!(matches!(wrong.read(), Err(ArbiterError::Unusable(_))));
    assert!(matches!(wrong.compare_and_swap(None, &sample(4)), CasOutcome::Failed(_)));
    assert_eq!(fake.swaps(), 0);
}

#[test]
fn old_servers_are_refused_or_told_of() {
    for (version, usable, advice) in [
        ("3.3.27", false, ""),
        ("3.4.23", true, "upgrade it to 3.4.42"),
        ("3.5.27", true, "upgrade it to 3.5.28"),
        ("3.6.9", true, ""),
    ] {
        let fake = honest_but("/version", move |_| Act::Json(format!(r#"{{"etcdserver":"{version}"}}"#)));
        let mut arbiter = arbiter(&[&fake]);
        assert_eq!(arbiter.read().is_ok(), usable, "{version}");
        if usable {
            let text = arbiter.describe();
            assert!(text.contains(version) && text.contains(advice), "{text}");
            assert_eq!(text.contains("upgrade"), !advice.is_empty(), "{text}");
        } else {
            let outcome = arbiter.compare_and_swap(None, &sample(1));
            assert!(matches!(outcome, CasOutcome::Failed(_)), "{outcome:?}");
            assert_eq!(fake.swaps(), 0);
        }
    }
    // Not to say one's version is no crime.
    let fake = honest_but("/version", |_| Act::Status(404, "", "not found".into()));
    assert!(arbiter(&[&fake]).read().is_ok());
}

/// As a person meets it; and what the environment says of proxies is not for us.
#[test]
fn ftctl_shows_the_record_and_asks_no_proxy() {
    let proxy = Fake::start(|_, _| Act::Status(502, "", String::new()));
    let fake = honest_but("/version", |_| Act::Json(r#"{"etcdserver":"3.4.23"}"#.into()));
    let directory = tempfile::tempdir().unwrap();
    let node = |name: &str, port: u16| {
        format!(
            "[nodes.{name}]\nreplication = \"127.0.0.1:{port}\"\ntap = \"t{name}\"\ncontrol = \"{name}.sock\"\nstate_dir = \"{name}\"\n"
        )
    };
    let config = format!(
        "[vm]\nname = \"web1\"\nid = \"00000000-0000-0000-0000-000000000007\"\nmemory = \"64MiB\"\nmachine = \"model\"\n\
         [arbiter]\nkind = \"etcd\"\nendpoints = [{:?}]\n{}{}",
        fake.url,
        node("a", 7400),
        node("b", 7401)
    );
    let path = directory.path().join("pair.toml");
    std::fs::write(&path, config).unwrap();
    let ftctl = |words: &[&str]| {
        let mut command = Command::cargo_bin("ftctl").unwrap();
        for name in ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy"] {
            command.env(name, &proxy.url);
        }
        let output = command.arg("--config").arg(&path).args(words).timeout(BOUNDED).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, table) = ftctl(&["arbiter", "show"]);
    for expected in ["server      etcd 3.4.23", "upgrade it to 3.4.42", "generation  3", "revision    5", "latency"] {
        assert!(code == 0 && table.contains(expected), "{expected}: {table}");
    }
    let (code, json) = ftctl(&["arbiter", "show", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, &json["etcd"]["key"], &json["revision"]), (0, &KEY.into(), &5.into()));
    let (code, checked) = ftctl(&["config", "check"]);
    assert!(code == 0 && checked.contains("# arbiter: etcd, one endpoint"), "{checked}");
    assert!(proxy.seen.lock().unwrap().is_empty(), "a proxy was asked");
}
