//! Every seed and everything that the fuzzer once found, through the fuzz targets' bodies on stable: no rule is broken. (Those of the
//! machine are replayed in `vmm`.)

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use tests::fuzz::TARGETS;
use tests::real::artifacts::workspace;

fn corpus() -> PathBuf {
    workspace().join("tests/corpus")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn corpus_seeds_break_no_rule() {
    for (name, body) in TARGETS {
        let seeds = files(&corpus().join(name));
        assert!(!seeds.is_empty(), "no seeds for {name}");
        for seed in seeds {
            eprintln!("{}", seed.display());
            body(&fs::read(seed).unwrap());
        }
    }
}

#[test]
fn corpus_regressions_stay_fixed() {
    let known: BTreeMap<&str, tests::fuzz::Body> = TARGETS.into_iter().collect();
    for folder in files(&corpus().join("regressions")) {
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        // Replayed in `vmm`, whose decoders are private.
        if ["sections", "virtio_net"].contains(&name.as_str()) {
            continue;
        }
        let body = known.get(name.as_str()).unwrap_or_else(|| panic!("{name}: no target of this name"));
        for file in files(&folder) {
            eprintln!("{}", file.display());
            body(&fs::read(file).unwrap());
        }
    }
}

/// Bytes that look random and are the same each time.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

/// The frames of a golden session, by its length fields.
fn golden_frames(name: &str) -> Vec<Vec<u8>> {
    let stream = fs::read(workspace().join("tests/golden").join(name)).unwrap();
    let (mut frames, mut rest) = (Vec::new(), &stream[..]);
    while !rest.is_empty() {
        let length = u32::from_le_bytes(rest[12..16].try_into().unwrap()) as usize;
        let (frame, behind) = rest.split_at(80 + length);
        frames.push(frame.to_vec());
        rest = behind;
    }
    frames
}

type Seeds = BTreeMap<String, Vec<u8>>;

fn frames_as_seeds(seeds: &mut Seeds) {
    let goldens = ["session-to-backup", "session-to-primary", "session-zstd-to-backup", "heartbeat", "refusal-facts"];
    for golden in goldens {
        for (n, frame) in golden_frames(&format!("proto-v1-{golden}.bin")).into_iter().enumerate() {
            seeds.insert(format!("header/{golden}-{n:02}"), [&[0xFF][..], &frame].concat());
            let (kind, epoch) = (frame[10], frame[32]);
            seeds.insert(format!("message/{golden}-{n:02}"), [&[kind, epoch, 255][..], &frame[80..]].concat());
        }
    }
}

fn texts_as_seeds(seeds: &mut Seeds) {
    let readme = fs::read_to_string(workspace().join("README.md")).unwrap();
    let config = readme.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let config: String = config.lines().map(|line| format!("{}\n", line.strip_prefix("   ").unwrap_or(line))).collect();
    seeds.insert("config/readme".into(), config.clone().into_bytes());
    let all = failover::config::PairConfig::parse(&config, "readme", Path::new("/")).unwrap().effective();
    seeds.insert("config/effective".into(), all.into_bytes());
    let record = failover::arbiter::contract::sample(3);
    seeds.insert("record/plain".into(), record.to_json().into_bytes());
    let file = format!("{{\"revision\":7,\"record\":{}}}", record.to_json());
    seeds.insert("record/file".into(), file.into_bytes());
    let directory = tempfile::tempdir().unwrap();
    let vm = replication_proto::VmId(0x6f3c_0000_1111_4222_8333_4444_5555_6666);
    let mut state = failover::generation::StateDir::open(directory.path(), vm).unwrap();
    state.persist(replication_proto::Generation(41)).unwrap();
    seeds.insert("generation/file".into(), fs::read(directory.path().join("generation.json")).unwrap());
    let lines = [
        "{\"method\":\"status\"}\n",
        "{\"method\":\"failover\",\"mode\":\"planned\"}\n",
        "{\"method\":\"failover\",\"mode\":\"force\",\"confirm\":\"web1\",\"without_arbiter\":true}\n",
        "{\"method\":\"stop\"}\n{\"method\":\"protect\"}\n{\"method\":\"unprotect\"}\n",
        "{\"progress\":\"x\"}\n{\"result\":{\"text\":\"y\"}}\n{\"error\":{\"code\":\"refused\",\"text\":\"z\"}}\n",
    ];
    for (n, line) in lines.into_iter().enumerate() {
        seeds.insert(format!("control/{n}"), line.into());
    }
}

/// Answers of an etcd, as its JSON gateway writes them.
fn etcd_as_seeds(seeds: &mut Seeds) {
    use failover::arbiter::etcd::wire::Call;
    let asked: serde_json::Value = {
        let call = Call::swap("/ft/x/record", None, &failover::arbiter::contract::sample(3)).unwrap();
        serde_json::from_str(&call.body.unwrap()).unwrap()
    };
    let put = &asked["success"][0]["request_put"];
    let header = r#""header":{"cluster_id":"12297829382473034410","member_id":"7","revision":"9","raft_term":"2"}"#;
    let entry =
        format!(r#"{{"key":{},"create_revision":"2","mod_revision":"5","value":{}}}"#, put["key"], put["value"]);
    let answers = [
        format!(r#"{{{header},"kvs":[{entry}],"count":"1"}}"#),
        format!(r#"{{{header}}}"#),
        format!(r#"{{{header},"succeeded":true,"responses":[{{"response_put":{{{header}}}}}]}}"#),
        format!(r#"{{{header},"responses":[{{"response_range":{{{header},"kvs":[{entry}],"count":"1"}}}}]}}"#),
        r#"{"header":{},"token":"abc.def"}"#.into(),
        r#"{"etcdserver":"3.4.23","etcdcluster":"3.4.0"}"#.into(),
        r#"{"error":"etcdserver: invalid auth token","message":"etcdserver: invalid auth token","code":16}"#.into(),
        "<html><body>502 Bad Gateway</body></html>".into(),
    ];
    for (n, answer) in answers.into_iter().enumerate() {
        seeds.insert(format!("etcd_reply/{n}"), [&[0, n.to_le_bytes()[0]], answer.as_bytes()].concat());
    }
}

fn clients_as_seeds(seeds: &mut Seeds) {
    let requests = [
        "SET k v\r\nGET k\r\nAPPEND k w\r\nGETSET k x\r\nSTRLEN k\r\nGETDEL k\r\n",
        "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$2\r\n12\r\n*2\r\n$4\r\nINCR\r\n$1\r\nk\r\n*3\r\n$6\r\nDECRBY\r\n$1\r\nk\r\n$1\r\n5\r\n",
        "RPUSH l 1 2 3 4\r\nLRANGE l 0 -1\r\nLPOP l 2\r\nRPOP l\r\nLINDEX l -1\r\nLLEN l\r\n",
        "SET k v PX 1\r\nPEXPIRE k 5\r\nPTTL k\r\nPERSIST k\r\nEXPIRE k 9\r\nTTL k\r\nKEYS *\r\nDEL k\r\nTYPE k\r\n",
        "MSET a 1 b 2\r\nMGET a b c\r\nEXISTS a b\r\nDBSIZE\r\nFT.DIGEST\r\nFT.DIRTY 10 20\r\nFT.COUNTERS\r\nINFO\r\nFLUSHALL\r\n",
        "CONFIG GET *\r\nCLIENT ID\r\nCOMMAND\r\nPING x\r\nECHO y\r\nSELECT 0\r\nSETNX a b\r\nQUIT\r\n",
    ];
    for (n, request) in requests.into_iter().enumerate() {
        seeds.insert(format!("resp/{n}"), [&[7 + n.to_le_bytes()[0]], request.as_bytes()].concat());
    }
}

/// The seeds are made by this file, from the golden sessions, the README and what the programs write. `UPDATE_CORPUS=1` writes them.
#[test]
fn corpus_seeds_are_those_of_the_generator() {
    let mut seeds = Seeds::new();
    frames_as_seeds(&mut seeds);
    texts_as_seeds(&mut seeds);
    etcd_as_seeds(&mut seeds);
    clients_as_seeds(&mut seeds);
    for target in ["pages", "patches", "receiver_session", "sender_session", "pulse_session", "standby", "model_frames"]
    {
        for n in 0..8u64 {
            let length = 64 << (n % 6);
            seeds.insert(format!("{target}/noise-{n}"), noise(n + 1, length));
        }
    }
    if std::env::var_os("UPDATE_CORPUS").is_some_and(|value| value == "1") {
        for (name, bytes) in &seeds {
            let path = corpus().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }
    // The README's example and the settings grow; a seed made from older ones is as good.
    for (name, bytes) in seeds.iter().filter(|(name, _)| !name.starts_with("config/")) {
        let found = fs::read(corpus().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(found == *bytes, "{name} is not what the generator makes: UPDATE_CORPUS=1 writes it");
    }
}
