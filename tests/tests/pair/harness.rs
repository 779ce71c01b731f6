//! The harness itself: wires that can be cut, children that die with their namespace, a client that notices what is lost.
//! No machine is needed: a server in a host's namespace plays the guest.

use std::collections::HashMap;
use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tests::real::client::{Writer, WriterConfig};
use tests::real::counters::Counters;
use tests::real::network::{GUEST_IP, GUEST_MAC, GUEST_PORT, Network, Wire, replication_ip};
use tests::real::resp::{Connection, Reply, read_reply};
use tests::real::shaper::{Shape, Shaper, Shapes};
use tests::real::watch::{Watch, changes};
use tests::real::{Node, clock, tools};

const PATIENCE: Duration = Duration::from_secs(5);

/// Puts the guest's addresses on a host's own bridge, and a server behind them that knows what the clients here use. Its threads end
/// with the test's process.
fn stand_in(network: &Network, node: Node) {
    let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    network.host(node).ip(&format!("link set br0 address {mac}\naddr add {GUEST_IP}/24 dev br0\n")).expect("ip works");
    let listener = network.host(node).run(|| TcpListener::bind((GUEST_IP, GUEST_PORT))).expect("the address is there");
    let store = Arc::new(Mutex::new(HashMap::new()));
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let store = Arc::clone(&store);
            thread::spawn(move || serve(&stream, &store));
        }
    });
}

type Store = Mutex<HashMap<Vec<u8>, Vec<u8>>>;

fn serve(stream: &TcpStream, store: &Store) {
    let mut reader = BufReader::new(stream);
    while let Ok(Reply::Array(words)) = read_reply(&mut reader, 0) {
        let words: Vec<Vec<u8>> = words
            .into_iter()
            .map(|word| match word {
                Reply::Bulk(Some(bytes)) => bytes,
                other => panic!("not a word of a request: {other:?}"),
            })
            .collect();
        let answer = carry_out(&words, &mut store.lock().expect("nobody panics with the store in hand"));
        let mut stream = stream;
        if stream.write_all(&answer).is_err() {
            return;
        }
    }
}

fn carry_out(words: &[Vec<u8>], store: &mut HashMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
    match words {
        [set, key, value] if set == b"SET" => {
            store.insert(key.clone(), value.clone());
            b"+OK\r\n".to_vec()
        }
        [get, key] if get == b"GET" => match store.get(key) {
            Some(value) => [format!("${}\r\n", value.len()).as_bytes(), value, b"\r\n"].concat(),
            None => b"$-1\r\n".to_vec(),
        },
        [incr, key] if incr == b"INCR" => {
            let text = store.get(key).map_or("0".into(), |value| String::from_utf8_lossy(value).into_owned());
            let number = text.parse::<i64>().expect("a counter") + 1;
            store.insert(key.clone(), number.to_string().into_bytes());
            format!(":{number}\r\n").into_bytes()
        }
        [del, key] if del == b"DEL" => format!(":{}\r\n", i32::from(store.remove(key).is_some())).into_bytes(),
        _ => b"-ERR unknown\r\n".to_vec(),
    }
}

fn connect(network: &Network) -> Connection {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Connection::open(network.client(), PATIENCE) {
            Ok(connection) => return connection,
            Err(e) => assert!(Instant::now() < deadline, "{e}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a host's answer comes back from the other over the replication link within a second. Nobody listens there: being refused
/// is an answer as well.
fn replication_works(network: &Network) -> bool {
    let nobody = format!("{}:9", replication_ip(Node::B)).parse().expect("a constant address");
    let answer = network.host(Node::A).run(move || TcpStream::connect_timeout(&nobody, Duration::from_secs(1)));
    matches!(answer, Err(e) if e.kind() == ErrorKind::ConnectionRefused)
}

/// The kernel may take a second to notice that a cable is there again.
fn replication_works_soon(network: &Network) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if replication_works(network) {
            return true;
        }
    }
    false
}

#[test]
fn wires_can_be_cut_and_mended() {
    let network = Network::new().unwrap();
    assert!(replication_works_soon(&network));
    network.cut(&[Wire::Replication]).unwrap();
    assert!(!replication_works(&network));
    network.mend(&[Wire::Replication]).unwrap();
    assert!(replication_works_soon(&network));
}

/// Sends so many bytes from host a to host b, which sends one back when it has them all; how long that took, if it worked.
fn transfer(network: &Network, bytes: usize) -> Option<Duration> {
    let listener = network.host(Node::B).run(|| TcpListener::bind((replication_ip(Node::B), 7400))).ok()?;
    let taking = thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut got = vec![0; bytes];
        stream.read_exact(&mut got)?;
        assert!(
            got.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at % 251),
            "what arrives is what was sent"
        );
        stream.write_all(b"!")
    });
    let began = Instant::now();
    let address = (replication_ip(Node::B).parse::<std::net::Ipv4Addr>().ok()?, 7400);
    let stream = network.host(Node::A).run(move || TcpStream::connect_timeout(&address.into(), PATIENCE));
    let sent = stream.and_then(|mut stream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&(0..bytes).map(|at| u8::try_from(at % 251).expect("small")).collect::<Vec<_>>())?;
        stream.read_exact(&mut [0])
    });
    let took = began.elapsed();
    let taken = taking.join().expect("what arrives is what was sent");
    sent.and(taken).ok().map(|()| took)
}

/// A bad wire carries what it does not lose, late or slowly as it was told, and the good one works again afterwards.
#[test]
fn a_wire_can_be_made_bad() {
    let network = Network::new().unwrap();
    assert!(replication_works_soon(&network));
    let through = |shape: Shape, bytes: usize| {
        let shaper = Shaper::start(&network, Shapes::both(shape), 1).unwrap();
        let took = transfer(&network, bytes);
        assert!(shaper.finish(&network).unwrap() > 0);
        took
    };
    let good = through(Shape::GOOD, 32 << 20).expect("a good wire");
    println!("32 MiB over a good wire in {good:?}");
    let late = through(Shape { delay: Duration::from_millis(30), ..Shape::GOOD }, 1 << 20).expect("a late wire");
    assert!(late >= Duration::from_millis(120), "{late:?}");
    println!("1 MiB over a late wire in {late:?}");
    let slow = through(Shape { rate: 4 << 20, ..Shape::GOOD }, 2 << 20).expect("a slow wire");
    assert!(slow >= Duration::from_millis(450), "{slow:?}");
    println!("2 MiB over a slow wire in {slow:?}");
    let shape = Shape { delay: Duration::from_millis(1), lost_permille: 20, overtaken_permille: 100, ..Shape::GOOD };
    println!("1 MiB over a lossy wire in {:?}", through(shape, 1 << 20).expect("a lossy wire"));
    let deaf = Shaper::start(&network, Shapes::deaf(Node::B), 1).unwrap();
    assert!(!replication_works(&network));
    deaf.finish(&network).unwrap();
    assert!(replication_works_soon(&network));
}

#[test]
fn children_die_with_their_namespace() {
    let network = Network::new().unwrap();
    let mut command = Command::new("sleep");
    command.arg("1000");
    let mut child = network.host(Node::A).spawn(command).unwrap();
    assert!(child.try_wait().unwrap().is_none());
    drop(network);
    let deadline = Instant::now() + PATIENCE;
    let status = tools::wait_until(&mut child, deadline).unwrap().expect("killed with its namespace");
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
}

/// An outage of the LAN shows as a silence, and nothing is lost over it; the witness sees one host only.
#[test]
fn client_survives_a_cut_and_counts() {
    let network = Network::new().unwrap();
    stand_in(&network, Node::A);
    connect(&network);
    let watch = Watch::start(&network).unwrap();
    let writer = Writer::start(network.client(), WriterConfig::default()).unwrap();
    let counters = Counters::start(network.client(), 4, PATIENCE).unwrap();
    thread::sleep(Duration::from_millis(300));
    let cut_us = clock::mono_us();
    network.cut(&[Wire::Lan(Node::A)]).unwrap();
    thread::sleep(Duration::from_millis(300));
    network.mend(&[Wire::Lan(Node::A)]).unwrap();
    thread::sleep(Duration::from_millis(700));
    let report = writer.finish(network.client());
    let counted = counters.finish();
    let seen = watch.finish().unwrap();
    assert_eq!(counted.violations, Vec::<String>::new());
    assert!(report.connection_survived(), "{:?}", report.connection_error);
    assert!(report.same.complete(report.acks.len()) && report.fresh.complete(report.acks.len()));
    let (begin, end) = report.longest_silence(cut_us).unwrap();
    assert!((250_000..2_000_000).contains(&(end - begin)), "silence of {} us", end - begin);
    assert!(seen.iter().any(|frame| frame.at_us < cut_us) && changes(&seen) == 0);
}

/// A server that forgets and alters what it acknowledged is found out.
#[test]
fn client_notices_loss_and_change() {
    let network = Network::new().unwrap();
    stand_in(&network, Node::B);
    let mut saboteur = connect(&network);
    let writer = Writer::start(network.client(), WriterConfig::default()).unwrap();
    while writer.acked() < 100 {
        assert!(writer.is_writing());
        thread::sleep(Duration::from_millis(1));
    }
    for key in ["k:3", "k:50"] {
        assert_eq!(saboteur.call(&["DEL", key]).unwrap(), Reply::Integer(1));
    }
    assert_eq!(saboteur.call(&["SET", "k:7", "another"]).unwrap(), Reply::Simple("OK".into()));
    let report = writer.finish(network.client());
    assert_eq!((report.lost(), report.wrong()), (2, 1));
    assert!(!report.same.complete(report.acks.len()) && !report.fresh.complete(report.acks.len()));
}
