//! The etcd arbiter against a real etcd that is raced for, killed, paused, partitioned and guarded.

#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use failover::arbiter::contract::{self, sample};
use failover::arbiter::{Arbiter, ArbiterError, CasOutcome, EtcdArbiter, Revision, Versioned};
use failover::config::EtcdSection;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use replication_proto::VmId;
use rustix::process::Signal;
use tests::real::etcd::{Etcd, EtcdOptions, TlsFiles, own_loopback, wanted};

/// For tests whose subject is not time: a busy host's disk may take its time.
const PATIENT: &str = "timeout = \"10s\"";
/// Long enough for an election and for a busy host.
const LIMIT: Duration = Duration::from_secs(60);

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Ends the test process if a test takes longer than anything in it may. One at a time: several clusters on one disk wait for each other.
struct Bounded(Arc<AtomicBool>, #[expect(dead_code, reason = "held until the test ends")] MutexGuard<'static, ()>);

impl Bounded {
    fn new(name: &'static str) -> Self {
        // A test that failed before leaves nothing behind that would matter.
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let done = Arc::new(AtomicBool::new(false));
        let watched = Arc::clone(&done);
        thread::spawn(move || {
            let deadline = Instant::now() + 4 * LIMIT;
            while Instant::now() < deadline {
                if watched.load(Ordering::Acquire) {
                    return;
                }
                thread::sleep(Duration::from_millis(100));
            }
            eprintln!("{name} took longer than {:?}", 4 * LIMIT);
            std::process::abort();
        });
        Self(done, alone)
    }
}

impl Drop for Bounded {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn section(endpoints: &[String], extra: &str) -> EtcdSection {
    toml::from_str(&format!("endpoints = {endpoints:?}\n{extra}")).unwrap()
}

fn open(endpoints: &[String], extra: &str) -> EtcdArbiter {
    EtcdArbiter::open(&section(endpoints, extra), VmId(7)).unwrap()
}

/// Reads until there is an answer.
fn read_at_last(arbiter: &mut EtcdArbiter) -> Versioned {
    let deadline = Instant::now() + LIMIT;
    loop {
        match arbiter.read() {
            Ok(Some(found)) => return found,
            Err(ArbiterError::Unreachable(text)) => assert!(Instant::now() < deadline, "{text}"),
            other => panic!("{other:?}"),
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn created(arbiter: &mut EtcdArbiter) -> Revision {
    match arbiter.compare_and_swap(None, &sample(1)) {
        CasOutcome::Applied(revision) => revision,
        other => panic!("{other:?}"),
    }
}

#[test]
fn keeps_the_contract_of_arbiters() {
    if !wanted() {
        return;
    }
    let _bounded = Bounded::new("the contract");
    let etcd = Etcd::start(&EtcdOptions::default()).unwrap();
    contract::check(|| open(&etcd.endpoints(), PATIENT));
    // Registers of two VMs, and of two prefixes, are two registers.
    let mut other = EtcdArbiter::open(&section(&etcd.endpoints(), ""), VmId(8)).unwrap();
    assert_eq!(other.read(), Ok(None));
    assert_eq!(open(&etcd.endpoints(), "prefix = \"/lab/\"").read(), Ok(None));
    let mut named = open(&etcd.endpoints(), "");
    named.read().unwrap();
    assert!(named.describe().contains("version 3."), "{}", named.describe());
}

#[test]
fn of_two_clients_exactly_one_wins_each_of_200_races() {
    if !wanted() {
        return;
    }
    let _bounded = Bounded::new("200 races");
    let etcd = Etcd::start(&EtcdOptions::default()).unwrap();
    let mut revision = created(&mut open(&etcd.endpoints(), PATIENT));
    let mut clients = [open(&etcd.endpoints(), PATIENT), open(&etcd.endpoints(), PATIENT)];
    let mut wins = [0, 0];
    for race in 0..200_u64 {
        let start = &Barrier::new(2);
        let outcomes = thread::scope(|scope| {
            let racing = [0, 1].into_iter().zip(&mut clients).map(|(who, client)| {
                let record = sample(10 + 2 * race + who);
                scope.spawn(move || {
                    start.wait();
                    client.compare_and_swap(Some(revision), &record)
                })
            });
            racing.collect::<Vec<_>>().into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        let winners: Vec<usize> = (0..2).filter(|who| matches!(outcomes[*who], CasOutcome::Applied(_))).collect();
        assert_eq!(winners.len(), 1, "race {race}: {outcomes:?}");
        assert_eq!(outcomes[1 - winners[0]], CasOutcome::Conflict, "race {race}");
        wins[winners[0]] += 1;
        let found = clients[1 - winners[0]].read().unwrap().unwrap();
        assert_eq!(found.record, sample(10 + 2 * race + u64::try_from(winners[0]).unwrap()), "race {race}");
        assert_eq!(outcomes[winners[0]], CasOutcome::Applied(found.revision));
        revision = found.revision;
    }
    println!("wins: {wins:?}");
}

/// What a takeover pays. Printed, not judged: it is the disk's fsync and whatever else this host does meanwhile.
#[test]
fn a_thousand_swaps() {
    if !wanted() {
        return;
    }
    let _bounded = Bounded::new("a thousand swaps");
    let etcd = Etcd::start(&EtcdOptions::default()).unwrap();
    let mut arbiter = open(&etcd.endpoints(), PATIENT);
    let mut revision = created(&mut arbiter);
    let mut times = Vec::new();
    for number in 0..1_000 {
        let started = Instant::now();
        let outcome = arbiter.compare_and_swap(Some(revision), &sample(2 + number));
        times.push(started.elapsed());
        let CasOutcome::Applied(next) = outcome else { panic!("{number}: {outcome:?}") };
        assert_eq!(next.0, revision.0 + 1, "one write each");
        revision = next;
    }
    times.sort();
    println!("1,000 swaps: p50 {:?}, p99 {:?}, max {:?}", times[499], times[989], times[999]);
}

/// What one client believes while its server comes and goes: an applied write stays, a failed one never comes, an unknown one is either.
struct Believer {
    arbiter: EtcdArbiter,
    known: Versioned,
    next: u64,
    unknown: u32,
    applied: u32,
    /// The same for another thread: writes applied at once, and all others.
    seen: Arc<[AtomicU32; 2]>,
}

impl Believer {
    fn new(mut arbiter: EtcdArbiter) -> Self {
        let revision = created(&mut arbiter);
        Self {
            arbiter,
            known: Versioned { revision, record: sample(1) },
            next: 2,
            unknown: 0,
            applied: 0,
            seen: Arc::default(),
        }
    }

    /// One compare-and-swap, and whatever it takes to know what came of it.
    fn step(&mut self) {
        let record = sample(self.next);
        self.next += 1;
        let expected = self.known.revision;
        match self.arbiter.compare_and_swap(Some(expected), &record) {
            CasOutcome::Applied(revision) => {
                assert!(revision > expected);
                self.known = Versioned { revision, record };
                self.applied += 1;
                self.seen[0].fetch_add(1, Ordering::AcqRel);
            }
            CasOutcome::Conflict => panic!("nobody else writes"),
            CasOutcome::Failed(_) => {
                self.seen[1].fetch_add(1, Ordering::AcqRel);
                thread::sleep(Duration::from_millis(20));
            }
            CasOutcome::Unknown(_) => {
                self.unknown += 1;
                self.seen[1].fetch_add(1, Ordering::AcqRel);
                let found = read_at_last(&mut self.arbiter);
                if found.revision == expected {
                    assert_eq!(found.record, self.known.record);
                    // It may still be applied; a write that succeeds at this revision settles it.
                    return;
                }
                assert_eq!(found.record, record, "only this one can have been applied");
                self.known = found;
            }
        }
    }

    fn finish(mut self) {
        let found = read_at_last(&mut self.arbiter);
        assert_eq!(found, self.known);
        println!("{} applied at once, {} unknown at first", self.applied, self.unknown);
    }
}

#[test]
fn killed_and_restarted_in_the_middle_of_writes() {
    if !wanted() {
        return;
    }
    let _bounded = Bounded::new("kills");
    let mut etcd = Etcd::start(&EtcdOptions::default()).unwrap();
    let mut believer = Believer::new(open(&etcd.endpoints(), ""));
    let (go_on, seen) = (Arc::new(AtomicBool::new(true)), Arc::clone(&believer.seen));
    let writing = Arc::clone(&go_on);
    let writer = thread::spawn(move || {
        while writing.load(Ordering::Acquire) {
            believer.step();
        }
        believer
    });
    // How many outcomes of a kind the writer has met (0 applied, 1 anything else), and a wait for more of them than there were.
    let count = |kind: usize| seen[kind].load(Ordering::Acquire);
    let more_than = |kind: usize, before: u32| {
        let deadline = Instant::now() + LIMIT;
        while count(kind) <= before {
            assert!(Instant::now() < deadline, "no more outcomes of kind {kind}");
            thread::sleep(Duration::from_millis(5));
        }
    };
    for _ in 0..5 {
        more_than(0, count(0) + 2);
        // Counted before the kill: the writer then meets one such outcome and waits for the server.
        let before = count(1);
        etcd.kill(0).unwrap();
        more_than(1, before);
        etcd.start_members(&[0]).unwrap();
    }
    more_than(0, count(0) + 2);
    go_on.store(false, Ordering::Release);
    let believer = writer.join().unwrap();
    believer.finish();
}

#[test]
fn paused_is_unknown_and_a_later_read_tells() {
    if !wanted() {
        return;
    }
    let _bounded = Bounded::new("a pause");
    let etcd = Etcd::start(&EtcdOptions::default()).unwrap();
    let mut arbiter = open(&etcd.endpoints(), "timeout = \"500ms\"");
    let first = created(&mut arbiter);
    etcd.signal(0, Signal::STOP).unwrap();
    let asked = Instant::now();
    let outcome = arbiter.compare_and_swap(Some(first), &sample(2));
    assert!(matches!(outcome, CasOutcome::Unknown(_)), "{outcome:?}");
    assert!(asked.elapsed() < Duration::from_secs(20), "the time limit holds: {:?}", asked.elapsed());
    assert!(matches!(arbiter.read(), Err(ArbiterError::Unreachable(_))));
    thread::sleep(Duration::from_secs(2).saturating_sub(asked.elapsed()));
    etcd.signal(0, Signal::CONT).unwrap();
    // The request lay in the paused server's socket: it is carried out now, long after it was given up.
    let deadline = Instant::now() + LIMIT;
    let second = loop {
        let found = read_at_last(&mut arbiter);
        if found.revision > first {
            break found;
        }
        assert_eq!(found.record, sample(1));
        if Instant::now() >= deadline {
            // Allowed, too: then the next write settles it.
            break found;
        }
    };
    println!("applied after the pause: {}", second.record == sample(2));
    assert!(second.record == sample(2) || second.record == sample(1));
    let settled = arbiter.compare_and_swap(Some(second.revision), &sample(3));
    assert!(matches!(settled, CasOutcome::Applied(_)), "{settled:?}");
    assert_eq!(arbiter.read().unwrap().unwrap().record, sample(3));
}

/// What the cable between client and server does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Cable {
    /// All is well.
    Whole,
    /// What the client says is lost.
    NothingThere,
    /// What the server says is lost.
    NothingBack,
    /// The client's next words get through, then the connection breaks before the answer.
    CutAfterRequest,
    /// Connections are taken, and nothing happens on them.
    TakenAndIgnored,
}

impl Cable {
    const ALL: [Self; 5] =
        [Self::Whole, Self::NothingThere, Self::NothingBack, Self::CutAfterRequest, Self::TakenAndIgnored];
}

struct Proxy {
    url: String,
    cable: Arc<AtomicU8>,
}

impl Proxy {
    fn start(to: &str) -> Self {
        let to: SocketAddr = to.trim_start_matches("http://").parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let cable = Arc::new(AtomicU8::new(Cable::Whole as u8));
        let shared = Arc::clone(&cable);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let server = TcpStream::connect(to).unwrap();
                for (from, to, back) in [
                    (client.try_clone().unwrap(), server.try_clone().unwrap(), false),
                    (server.try_clone().unwrap(), client.try_clone().unwrap(), true),
                ] {
                    let cable = Arc::clone(&shared);
                    // Ends with either connection.
                    thread::spawn(move || pump(from, to, back, &cable).ok());
                }
            }
        });
        Self { url, cable }
    }

    fn set(&self, cable: Cable) {
        self.cable.store(cable as u8, Ordering::SeqCst);
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, back: bool, cable: &AtomicU8) -> std::io::Result<()> {
    let mut bytes = [0; 16 * 1024];
    loop {
        let length = from.read(&mut bytes)?;
        let cable = Cable::ALL[usize::from(cable.load(Ordering::SeqCst))];
        if length == 0 {
            return to.shutdown(Shutdown::Both);
        }
        match (cable, back) {
            (Cable::Whole, _) | (Cable::NothingThere, true) | (Cable::NothingBack | Cable::CutAfterRequest, false) => {
                to.write_all(&bytes[..length])?;
            }
            (Cable::NothingThere, false) | (Cable::NothingBack, true) | (Cable::TakenAndIgnored, _) => {}
            // The answer is here, so the request was carried out.
            (Cable::CutAfterRequest, true) => {
                from.shutdown(Shutdown::Both)?;
                return to.shutdown(Shutdown::Both);
            }
        }
    }
}

#[test]
fn partitioned_in_every_way() {
    if !wanted() {
        return;
    }
    let _bounded = Bounded::new("partitions");
    let etcd = Etcd::start(&EtcdOptions::default()).unwrap();
    let proxy = Proxy::start(&etcd.endpoints()[0]);
    let mut through = open(std::slice::from_ref(&proxy.url), "timeout = \"1s\"");
    let mut beside = open(&etcd.endpoints(), "");
    let mut revision = created(&mut through);
    let mut number = 2;
    for (cable, applied) in [
        (Cable::NothingThere, false),
        (Cable::NothingBack, true),
        (Cable::CutAfterRequest, true),
        (Cable::TakenAndIgnored, false),
        (Cable::NothingBack, true),
        (Cable::CutAfterRequest, true),
    ] {
        proxy.set(cable);
        let outcome = through.compare_and_swap(Some(revision), &sample(number));
        assert!(matches!(outcome, CasOutcome::Unknown(_)), "{cable:?}: {outcome:?}");
        assert!(matches!(through.read(), Err(ArbiterError::Unreachable(_))), "{cable:?}");
        proxy.set(Cable::Whole);
        let found = read_at_last(&mut through);
        assert_eq!(found.record == sample(number), applied, "{cable:?}");
        assert_eq!(found.revision > revision, applied, "{cable:?}");
        assert_eq!(beside.read().unwrap().unwrap(), found, "{cable:?}");
        // The lost answer does not come back as a second write.
        let next = through.compare_and_swap(Some(found.revision), &sample(number + 1));
        let CasOutcome::Applied(later) = next else { panic!("{cable:?}: {next:?}") };
        (revision, number) = (later, number + 2);
    }
}

/// A second way round a cut cable serves reads at once, and a write is never sent down both.
#[test]
fn a_second_endpoint_takes_over_reads_but_never_repeats_a_write() {
    if !wanted() {
        return;
    }
    let _bounded = Bounded::new("two ways");
    let etcd = Etcd::start(&EtcdOptions::default()).unwrap();
    let proxies = [Proxy::start(&etcd.endpoints()[0]), Proxy::start(&etcd.endpoints()[0])];
    let mut arbiter = open(&[proxies[0].url.clone(), proxies[1].url.clone()], "timeout = \"1s\"");
    let mut revision = created(&mut arbiter);
    for round in 0..6_u64 {
        // The one that was good last fails now.
        let (bad, good) = if round % 2 == 0 { (0, 1) } else { (1, 0) };
        proxies[bad].set(if round < 3 { Cable::NothingBack } else { Cable::CutAfterRequest });
        proxies[good].set(Cable::Whole);
        let outcome = arbiter.compare_and_swap(Some(revision), &sample(100 + round));
        assert!(matches!(outcome, CasOutcome::Unknown(_)), "{round}: {outcome:?}");
        let found = arbiter.read().unwrap().unwrap();
        assert_eq!(found.record, sample(100 + round));
        assert_eq!(found.revision.0, revision.0 + 1, "written once");
        revision = found.revision;
    }
}

#[test]
fn three_members_survive_one() {
    if !wanted() {
        return;
    }
    let _bounded = Bounded::new("three members");
    let mut etcd = Etcd::start(&EtcdOptions { members: 3, ..EtcdOptions::default() }).unwrap();
    let mut believer = Believer::new(open(&etcd.endpoints(), ""));
    for victim in 0..3 {
        for _ in 0..10 {
            believer.step();
        }
        etcd.kill(victim).unwrap();
        // The victim may have been the leader: until another one is elected nothing is applied.
        let (before, deadline) = (believer.applied, Instant::now() + LIMIT);
        while believer.applied < before + 10 {
            assert!(Instant::now() < deadline, "member {victim} is missed");
            believer.step();
        }
        etcd.start_members(&[victim]).unwrap();
    }
    // All three tell the same, each asked alone.
    let known = believer.known.clone();
    for endpoint in etcd.endpoints() {
        assert_eq!(read_at_last(&mut open(&[endpoint], "")), known);
    }
    believer.finish();
    // Without a majority nothing is decided, and nobody is told otherwise.
    etcd.kill(0).unwrap();
    etcd.kill(1).unwrap();
    let mut lonely = open(&etcd.endpoints()[2..], "timeout = \"500ms\"");
    assert!(matches!(lonely.read(), Err(ArbiterError::Unreachable(_))));
    // Not a member that was looked at before: the write is not even asked for.
    assert!(matches!(lonely.compare_and_swap(Some(known.revision), &sample(9)), CasOutcome::Failed(_)));
}

/// Writes a file that only its owner may read.
fn secret(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes `NAME.ca.pem`, `NAME.pem` and `NAME.key.pem` of a certificate for `address`.
    fn issue(&self, directory: &Path, name: &str, address: &str) -> TlsFiles {
        let mut params = CertificateParams::new(vec![address.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let at = |suffix: &str| directory.join(format!("{name}.{suffix}"));
        let files = TlsFiles { ca: at("ca.pem"), cert: at("pem"), key: at("key.pem") };
        fs::write(&files.ca, self.0.pem()).unwrap();
        fs::write(&files.cert, certificate.pem()).unwrap();
        secret(&files.key, &key.serialize_pem());
        files
    }
}

fn tls_lines(ca: &Path, own: Option<&TlsFiles>) -> String {
    let own = own.map_or(String::new(), |own| format!("cert = {:?}\nkey = {:?}\n", own.cert, own.key));
    format!("ca = {ca:?}\n{own}timeout = \"10s\"\nconnect_timeout = \"10s\"\n")
}

#[test]
fn tls_lets_in_whom_it_should_and_nobody_else() {
    if !wanted() {
        return;
    }
    let _bounded = Bounded::new("TLS");
    let directory = tempfile::tempdir().unwrap();
    let ours = Authority::new("ours");
    let server = ours.issue(directory.path(), "server", &own_loopback().to_string());
    let client = ours.issue(directory.path(), "client", "client.invalid");
    let stranger = Authority::new("another").issue(directory.path(), "stranger", "client.invalid");
    let etcd = Etcd::start(&EtcdOptions { tls: Some(server.clone()), ..EtcdOptions::default() }).unwrap();
    let endpoints = etcd.endpoints();
    let good = tls_lines(&server.ca, Some(&client));
    contract::check(|| open(&endpoints, &good));
    let found = open(&endpoints, &good).read().unwrap().unwrap();

    // We do not believe who answers: not a byte of the request leaves.
    let elsewhere = Proxy::start(&endpoints[0].replace("https", "http"));
    let by_another_name = [elsewhere.url.replace("http", "https")];
    for (name, endpoints, lines) in [
        ("another authority", &endpoints, tls_lines(&stranger.ca, Some(&client))),
        ("another name", &by_another_name.to_vec(), good.clone()),
    ] {
        let mut arbiter = open(endpoints, &lines);
        assert!(matches!(arbiter.read(), Err(ArbiterError::Unreachable(_))), "{name}");
        let outcome = arbiter.compare_and_swap(Some(found.revision), &sample(66));
        let CasOutcome::Failed(text) = &outcome else { panic!("{name}: {outcome:?}") };
        assert!(text.contains("certificate"), "{name}: {text}");
    }
    // They do not believe us.
    for (name, own) in [("no certificate", None), ("a stranger's", Some(&stranger))] {
        let mut arbiter = open(&endpoints, &tls_lines(&server.ca, own));
        assert!(matches!(arbiter.read(), Err(ArbiterError::Unreachable(_))), "{name}");
        let outcome = arbiter.compare_and_swap(Some(found.revision), &sample(66));
        assert!(!matches!(outcome, CasOutcome::Applied(_) | CasOutcome::Conflict), "{name}: {outcome:?}");
    }
    // In the clear to a TLS port, and a key that others may read.
    let clear: Vec<String> = endpoints.iter().map(|url| url.replace("https", "http")).collect();
    assert!(open(&clear, "").read().is_err());
    fs::set_permissions(&client.key, fs::Permissions::from_mode(0o640)).unwrap();
    let error = EtcdArbiter::open(&section(&endpoints, &good), VmId(7)).unwrap_err().to_string();
    assert!(error.contains("client.key.pem") && error.contains("chmod 600"), "{error}");
    fs::set_permissions(&client.key, fs::Permissions::from_mode(0o600)).unwrap();
    // A key that belongs to another certificate.
    let mixed = TlsFiles { key: server.key.clone(), ..client.clone() };
    let error = EtcdArbiter::open(&section(&endpoints, &tls_lines(&server.ca, Some(&mixed))), VmId(7)).unwrap_err();
    assert!(error.to_string().contains("does not belong to"), "{error}");
    // After all of that the record is what it was.
    assert_eq!(open(&endpoints, &good).read().unwrap().unwrap(), found);
}

/// Posts JSON to etcd as an administrator would.
fn admin(endpoint: &str, path: &str, token: Option<&str>, body: &str) -> String {
    let address: SocketAddr = endpoint.trim_start_matches("http://").parse().unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let token = token.map_or(String::new(), |token| format!("Authorization: {token}\r\n"));
    let length = body.len();
    let head = format!("POST {path} HTTP/1.0\r\nHost: etcd\r\n{token}Content-Length: {length}\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.0 200") || answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    answer
}

#[test]
fn users_passwords_and_tokens_that_expire() {
    if !wanted() {
        return;
    }
    let _bounded = Bounded::new("users");
    let mut etcd = Etcd::start(&EtcdOptions { token_seconds: 3, ..EtcdOptions::default() }).unwrap();
    let endpoint = etcd.endpoints()[0].clone();
    // "/ft/" to "/ft0", in base64: everything that begins with the prefix.
    let grant = r#"{"name":"ft","perm":{"permType":"READWRITE","key":"L2Z0Lw==","range_end":"L2Z0MA=="}}"#;
    for (path, body) in [
        ("/v3/auth/user/add", r#"{"name":"root","password":"r"}"#),
        ("/v3/auth/user/grant", r#"{"user":"root","role":"root"}"#),
        ("/v3/auth/role/add", r#"{"name":"ft"}"#),
        ("/v3/auth/role/grant", grant),
        ("/v3/auth/user/add", r#"{"name":"ft","password":"s3cret pass"}"#),
        ("/v3/auth/user/grant", r#"{"user":"ft","role":"ft"}"#),
        ("/v3/auth/user/add", r#"{"name":"nobody","password":"s3cret pass"}"#),
        ("/v3/auth/enable", "{}"),
    ] {
        if body.contains("\"role\":\"root\"") {
            admin(&endpoint, "/v3/auth/role/add", None, r#"{"name":"root"}"#);
        }
        admin(&endpoint, path, None, body);
    }
    let directory = tempfile::tempdir().unwrap();
    let password = directory.path().join("password");
    secret(&password, "s3cret pass\n");
    let lines = |user: &str| format!("user = {user:?}\npassword_file = {password:?}\n{PATIENT}\n");
    let mut arbiter = open(&etcd.endpoints(), &lines("ft"));
    let first = created(&mut arbiter);
    // Unused for longer than it lives, the token is refused; nobody notices, because a new one is fetched.
    thread::sleep(Duration::from_secs(6));
    let outcome = arbiter.compare_and_swap(Some(first), &sample(2));
    let CasOutcome::Applied(second) = outcome else { panic!("{outcome:?}") };
    // A restarted server knows none of its tokens.
    etcd.kill(0).unwrap();
    etcd.start_members(&[0]).unwrap();
    let outcome = arbiter.compare_and_swap(Some(second), &sample(5));
    assert!(matches!(outcome, CasOutcome::Applied(_)), "{outcome:?}");

    let needs_a_person = |arbiter: &mut EtcdArbiter| {
        assert!(matches!(arbiter.read(), Err(ArbiterError::Unusable(_))));
        let outcome = arbiter.compare_and_swap(None, &sample(6));
        assert!(matches!(outcome, CasOutcome::Failed(_)), "{outcome:?}");
    };
    needs_a_person(&mut open(&etcd.endpoints(), ""));
    needs_a_person(&mut open(&etcd.endpoints(), &lines("nobody")));
    // A password that is changed in the file is used from the next token on.
    secret(&password, "wrong\n");
    let mut late = open(&etcd.endpoints(), &lines("ft"));
    needs_a_person(&mut late);
    secret(&password, "s3cret pass\n");
    assert_eq!(late.read().unwrap().unwrap().record, sample(5));
}
