//! What is wrong from outside: foreign bytes on the replication port and the control socket, a configuration, an image or a host that
//! does not fit. Each is answered with one clear line and a number of its own, and changes nothing else.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use tests::on_both_machines;
use tests::real::client::WriterConfig;
use tests::real::network::replication_ip;
use tests::real::pair::Pair;
use tests::real::rng::Rng;
use tests::real::scene::Scene;
use tests::real::{Error, MachineKind, Node, Result, clock, tools};

const LIMIT: Duration = Duration::from_secs(30);

on_both_machines!(
    foreign_bytes_on_the_replication_port,
    foreign_bytes_on_the_control_socket,
    wrong_configuration,
    wrong_host,
    different_machines,
);

/// What nobody should send to a replication port.
fn foreign_streams() -> Vec<Vec<u8>> {
    let mut rng = Rng::new(3);
    let noise: Vec<u8> = (0..65_536).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
    vec![
        Vec::new(),
        vec![0],
        b"GET / HTTP/1.1\r\nHost: b\r\n\r\n".to_vec(),
        vec![0; 1 << 20],
        vec![0xff; 1 << 20],
        noise[..100].to_vec(),
        noise,
    ]
}

/// Connects to B's replication port from host A, says something, and waits until B has closed.
fn say(pair: &Pair, bytes: Vec<u8>) -> Result<()> {
    let address: SocketAddr = format!("{}:7400", replication_ip(Node::B)).parse().expect("a constant address");
    let len = bytes.len();
    let closed = pair.network().host(Node::A).run(move || -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        // B may close before all is written, which shows as a broken pipe or a reset.
        let _refused = stream.write_all(&bytes).and_then(|()| stream.shutdown(Shutdown::Write));
        match stream.read_to_end(&mut Vec::new()) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Err(e),
            _ => Ok(()),
        }
    });
    closed.map_err(Error::io(format!("B does not close a connection that sent {len} foreign bytes")))
}

/// B throws every stranger out, stays in sync meanwhile, and can be promoted afterwards.
fn foreign_bytes_on_the_replication_port(scene: &mut Scene) -> Result<()> {
    let options = scene.patient_options();
    let pair = scene.protected(&options)?;
    let writer = pair.start_writer(WriterConfig::default())?;
    let at = clock::mono_us();
    for bytes in foreign_streams() {
        say(pair, bytes)?;
    }
    for node in Node::BOTH {
        pair.daemon(node).check()?;
        let changes = pair.events(node, at)?.into_iter().filter(|e| e.event == "state").count();
        assert_eq!(changes, 0, "{node} changed its state;\n{}", pair.logs());
    }
    let killed_us = pair.kill(Node::A)?;
    pair.wait_event(Node::B, killed_us, LIMIT, "takeover", |e| e.event == "activated")?;
    thread::sleep(Duration::from_millis(500));
    let report = writer.finish(pair.network().client());
    assert!(report.connection_survived(), "{:?}", report.connection_error);
    assert!(report.same.complete(report.acks.len()) && report.fresh.complete(report.acks.len()));
    Ok(())
}

/// Each line gets an answer or a closed connection; the process goes on.
fn foreign_bytes_on_the_control_socket(scene: &mut Scene) -> Result<()> {
    let options = scene.patient_options();
    let pair = scene.protected(&options)?;
    let lines: [Vec<u8>; 8] = [
        b"\n".to_vec(),
        b"{}\n".to_vec(),
        b"not json\n".to_vec(),
        b"{\"method\":\"no such method\"}\n".to_vec(),
        b"\0\0\0\n".to_vec(),
        b"\xff\xfe\n".to_vec(),
        [b"[".repeat(4096), b"\n".to_vec()].concat(),
        vec![b'a'; 2 << 20],
    ];
    for node in Node::BOTH {
        for line in &lines {
            let socket = pair.dir().join(node.as_str()).join("control.sock");
            let mut stream = UnixStream::connect(&socket).map_err(Error::io("cannot connect to the control socket"))?;
            let prepared = stream.set_read_timeout(Some(LIMIT)).and_then(|()| stream.set_write_timeout(Some(LIMIT)));
            prepared.map_err(Error::io("cannot prepare a connection"))?;
            // It may close while we still write.
            let _refused = stream.write_all(line).and_then(|()| stream.shutdown(Shutdown::Write));
            let mut answer = Vec::new();
            match stream.read_to_end(&mut answer) {
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    return Err(Error::answer(
                        "the control socket",
                        format!("{} bytes: neither answer nor end", line.len()),
                    ));
                }
                _ => assert!(!String::from_utf8_lossy(&answer).contains("\"result\""), "accepted: {line:?}"),
            }
        }
        pair.daemon(node).check()?;
    }
    let (a, b) = (pair.status(Node::A)?, pair.status(Node::B)?);
    assert_eq!((a.state().as_str(), b.state().as_str()), ("protected", "in_sync"));
    Ok(())
}

/// Starts a program that cannot work and expects its exit code, with one line that names `word`.
fn refused(pair: &mut Pair, program: &str, config: &Path, code: i32, word: &str) -> Result<()> {
    let node = if program == "ft-backup" { Node::B } else { Node::A };
    pair.start_with(node, program, config, &[])?;
    let status = pair.daemon(node).wait(LIMIT)?;
    let said = pair.daemon(node).log_tail();
    assert_eq!(status.code(), Some(code), "{program} with {}:\n{said}", config.display());
    let last = said.lines().last().unwrap_or_default();
    assert!(last.contains(word), "{program} with {}: no {word:?} in its last line:\n{said}", config.display());
    Ok(())
}

fn wrong_configuration(scene: &mut Scene) -> Result<()> {
    let machine = scene.machine();
    let options = scene.options();
    let pair = scene.prepare(&options)?;
    let absent = pair.dir().join("absent.toml");
    let cases = [
        ("unknown.toml", "[epoch]", "[epoch]\nfrequency = 7", "frequency"),
        ("unit.toml", "latency = \"2ms\"", "interval = \"25 parsecs\"", "interval"),
        ("zero.toml", "latency = \"2ms\"", "interval = \"0ms\"", "interval"),
        ("vcpus.toml", "vcpus = 1", "vcpus = 99", "vcpus"),
        ("open.toml", "insecure_lab = true", "insecure_lab = false", "insecure_lab"),
        ("timers.toml", "[epoch]", "[timers]\nsolo = \"900ms\"\n\n[epoch]", "takeover"),
    ];
    for program in ["ft-primary", "ft-backup"] {
        refused(pair, program, &absent, 78, "absent.toml")?;
        for (name, from, to, word) in cases {
            let config = pair.altered_config(name, from, to)?;
            refused(pair, program, &config, 78, word)?;
        }
    }
    if machine == MachineKind::Kvm {
        let kernel = pair.artifacts().guest.clone().expect("built for KVM").kernel.display().to_string();
        let no_image = pair.altered_config("image.toml", &kernel, "/etc/passwd")?;
        refused(pair, "ft-primary", &no_image, 14, "/etc/passwd")?;
        let no_file = pair.altered_config("file.toml", &kernel, "/no/such/kernel")?;
        refused(pair, "ft-primary", &no_file, 14, "/no/such/kernel")?;
    }
    Ok(())
}

fn wrong_host(scene: &mut Scene) -> Result<()> {
    let machine = scene.machine();
    let options = scene.options();
    let pair = scene.prepare(&options)?;
    let config = pair.config().to_path_buf();

    let address: SocketAddr = format!("{}:7400", replication_ip(Node::B)).parse().expect("a constant address");
    let occupied = pair.network().host(Node::B).run(move || TcpListener::bind(address));
    let occupied = occupied.map_err(Error::io("cannot listen"))?;
    refused(pair, "ft-backup", &config, 12, "7400")?;
    drop(occupied);

    let no_tap = pair.altered_config("tap.toml", "tap = \"ftap0\"", "tap = \"lan0\"")?;
    refused(pair, "ft-primary", &no_tap, 11, "lan0")?;
    refused(pair, "ft-backup", &no_tap, 11, "lan0")?;

    pair.start_backup(Node::B)?;
    pair.wait_state(Node::B, "standby", LIMIT)?;
    let mut second = Command::new(pair.artifacts().program("ft-backup"));
    second.arg("--config").arg(&config).args(["--node", "b"]);
    let second = tools::run(pair.network().host(Node::B), second, "", LIMIT)?;
    assert_eq!(second.status.code(), Some(17), "{}", second.stderr);
    pair.daemon(Node::B).check()?;

    if machine == MachineKind::Kvm {
        // /dev/null in its place, for this one process: a host without KVM.
        let program = pair.artifacts().program("ft-primary").display().to_string();
        let script =
            format!("mount --bind /dev/null /dev/kvm && exec {program} --config {} --node a", config.display());
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]);
        let finished = tools::run(pair.network().host(Node::A), command, "", LIMIT)?;
        assert_eq!(finished.status.code(), Some(10), "{}{}", finished.stdout, finished.stderr);
        assert!(finished.stderr.contains("/dev/kvm"), "{}", finished.stderr);
    }
    Ok(())
}

/// Protection is refused before any state flows; the guest runs on unprotected, and says why.
fn different_machines(scene: &mut Scene) -> Result<()> {
    let options = scene.options();
    let pair = scene.prepare(&options)?;
    let other = pair.altered_config("other.toml", "memory = \"128MiB\"", "memory = \"192MiB\"")?;
    pair.start_with(Node::B, "ft-backup", &other, &[])?;
    pair.start_primary(Node::A, &[])?;
    pair.wait_guest(LIMIT)?;
    let status = pair.daemon(Node::B).wait(LIMIT)?;
    let said = pair.daemon(Node::B).log_tail();
    assert_eq!(status.code(), Some(13), "{said}");
    assert!(said.contains("ram"), "the difference is not named:\n{said}");
    pair.daemon(Node::A).check()?;
    assert_eq!(pair.status(Node::A)?.state(), "solo");
    Ok(())
}
