//! What people and files can say. The rules themselves are those of the fuzz targets.

use tests::fuzz;

/// Single bytes that mean something to one parser or another.
const BYTES: [u8; 13] = [0, b'\n', b'\r', 0x1b, b'"', b'\\', b'{', b'[', b'-', b'.', b'e', 0x7f, 0xff];

/// Each byte with a bit flipped, taken out, doubled, something put in its place; and all cut there.
fn around(sound: &[u8], mut say: impl FnMut(&[u8])) -> usize {
    let mut cases = 0;
    let mut say = |bytes: &[u8]| {
        say(bytes);
        cases += 1;
    };
    for at in 0..sound.len() {
        for bit in 0..8 {
            let mut changed = sound.to_vec();
            changed[at] ^= 1 << bit;
            say(&changed);
        }
        for byte in BYTES {
            let mut changed = sound.to_vec();
            changed[at] = byte;
            say(&changed);
            changed[at] = sound[at];
            changed.insert(at, byte);
            say(&changed);
        }
        say(&sound[..at]);
        say(&[&sound[..at], &sound[at + 1..]].concat());
        say(&[&sound[..=at], &sound[at..]].concat());
    }
    cases
}

fn seed(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/corpus/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

pub(crate) fn control() -> usize {
    let mut cases = 0;
    for n in 0..5 {
        // To the parser alone; what gets through it is compared with what was said.
        cases += around(&seed(&format!("control/{n}")), |line| {
            let request = serde_json::from_slice::<failover::control::Request>(line);
            let again = request.map(|request| (serde_json::to_vec(&request).unwrap(), request));
            if let Ok((bytes, request)) = again {
                assert_eq!(serde_json::from_slice::<failover::control::Request>(&bytes).unwrap(), request);
            }
        });
    }
    // To the socket.
    let deep =
        |n: usize| [b"{\"method\":".to_vec(), b"[".repeat(n), b"1".to_vec(), b"]".repeat(n), b"}\n".to_vec()].concat();
    let lines: [Vec<u8>; 20] = [
        vec![],
        vec![b'\n'],
        vec![0; 100],
        vec![b'x'; 1 << 20],
        [vec![b'x'; 65_536], vec![b'\n']].concat(),
        [vec![b'x'; 65_537], vec![b'\n']].concat(),
        [vec![b'['; 65_000], vec![b'\n']].concat(),
        deep(127),
        deep(128),
        deep(10_000),
        b"\xff\xfe\n\xc3\x28\n".to_vec(),
        b"{\"method\":\"status\",\"method\":\"stop\"}\n".to_vec(),
        b"{\"method\":\"failover\",\"mode\":1e400}\n".to_vec(),
        b"{\"method\":\"failover\",\"mode\":\"force\",\"without_arbiter\":NaN}\n".to_vec(),
        b"{\"method\":\"failover\",\"mode\":\"force\",\"confirm\":\"../web1\"}\n".to_vec(),
        b"{\"method\":\"failover\",\"mode\":\"force\",\"confirm\":\"web1\\n\"}\n".to_vec(),
        b"{\"method\":\"failover\",\"mode\":\"force\",\"confirm\":-0}\n".to_vec(),
        b"{\"method\":\"reboot\\u001b[2J\"}\n".to_vec(),
        b"{\"method\":\"stop\"}".to_vec(),
        b"{\"method\":\"status\"}\n".repeat(500),
    ];
    for line in &lines {
        fuzz::control(line);
    }
    cases + lines.len()
}

pub(crate) fn config() -> usize {
    let sound = seed("config/readme");
    let cases = around(&sound, fuzz::config);
    let text = String::from_utf8(sound).unwrap();
    let key = |key: &str, value: &str| text.replacen(&format!("{key} = "), &format!("{key} = {value} # "), 1);
    let more = [
        format!("\u{feff}{text}"),
        text.replace('\n', "\r\n"),
        key("memory", "\"256mib\""),
        key("memory", "-1"),
        key("memory", "\"99999999999999999999GiB\""),
        key("memory", "\"0B\""),
        key("interval", "\"0ms\""),
        key("interval", "1e400"),
        key("interval", "nan"),
        key("id", "\"00000000-0000-0000-0000-000000000000\""),
        key("replication", "\"10.9.0.2:7400\""),
        key("name", "\"../x\""),
        key("name", "\"a\\u001b[2J\""),
        format!("{text}\n[timers]\ntakeover = \"1ms\"\n"),
        format!("{text}\n[evil\\u001b]\n"),
        format!("{text}\n\"\\u001b[2J\\u0007\" = 1\n"),
        format!("{text}\n[limits]\n\"in\\nbox\" = 1\n"),
        format!("x = {}1{}", "[".repeat(100_000), "]".repeat(100_000)),
        format!("{} = 1", ["a"; 10_000].join(".")),
        "[".repeat(100_000),
        "#".repeat(1 << 20),
        "[vm]\n".repeat(10_000),
    ];
    for text in &more {
        fuzz::config(text.as_bytes());
    }
    cases + more.len()
}

pub(crate) fn etcd() -> usize {
    let mut cases = 0;
    for n in 0..8 {
        let answer = seed(&format!("etcd_reply/{n}"));
        cases += around(&answer[2..], |body| fuzz::etcd_reply(&[&answer[..2], body].concat()));
    }
    let header = r#""header":{"cluster_id":"1","revision":"9"}"#;
    let more = [
        String::new(),
        "null".into(),
        "[".repeat(90_000),
        " ".repeat(1 << 20),
        format!(r#"{{{header},"kvs":[{{"key":"%%%","mod_revision":"5","value":"!"}}]}}"#),
        format!(r#"{{{header},"kvs":[{{"mod_revision":"18446744073709551616"}}]}}"#),
        format!(r#"{{{header},"kvs":[{{"mod_revision":-1}}]}}"#),
        format!(r#"{{{header},"kvs":[{{"mod_revision":1e400}}]}}"#),
        format!(r#"{{{header},"kvs":[{}{{}}]}}"#, "{},".repeat(10_000)),
        r#"{"header":{"cluster_id":"0","revision":"0"}}"#.into(),
        r#"{"error":"[2J
"}"#
        .into(),
        r#"{"etcdserver":"3.99999999999.1"}"#.into(),
        format!(r#"{{"token":"{}"}}"#, "x".repeat(5000)),
    ];
    for (body, how) in more.iter().flat_map(|body| (0..48).map(move |how| (body, how))) {
        fuzz::etcd_reply(&[&[how, how], body.as_bytes()].concat());
        cases += 1;
    }
    cases
}

pub(crate) fn files() -> usize {
    let mut cases = around(&seed("record/plain"), fuzz::record);
    cases += around(&seed("record/file"), fuzz::record);
    let record = String::from_utf8(seed("record/file")).unwrap();
    let more = [
        String::new(),
        "<html><body>502 Bad Gateway</body></html>".into(),
        "null".into(),
        "{}".into(),
        format!("{record}{record}"),
        record.replace("\"v\":1", "\"v\":2"),
        record.replace("\"v\":1", "\"v\":0"),
        record.replace("\"v\":1", "\"v\":1e400"),
        record.replace("\"v\":1", "\"v\":-0"),
        record.replace("\"v\":1", "\"v\":1,\"v\":2"),
        record.replace("\"revision\":7", "\"revision\":18446744073709551615"),
        record.replace("\"revision\":7", "\"revision\":18446744073709551616"),
        record.replace("\"generation\":", "\"generation\":9"),
        record.replace("\"v\":1", "\"\\u001b[2J\\n\":1"),
        format!("{{\"revision\":1,\"record\":{}}}", "[".repeat(60_000)),
        " ".repeat(10 << 20),
        record.replace("\"note\":\"", &format!("\"note\":\"{}", "x".repeat(2000))),
    ];
    for text in &more {
        fuzz::record(text.as_bytes());
    }
    cases += more.len();
    let sound = seed("generation/file");
    cases += around(&sound, fuzz::generation);
    for bytes in [Vec::new(), vec![0; 4096], vec![b' '; 5000], sound.repeat(2)] {
        fuzz::generation(&bytes);
        cases += 1;
    }
    cases
}
