//! The rules of ARCHITECTURE.md that a machine can check: who may know whom, and who may do what.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tests::real::artifacts::workspace;

/// A file longer than this wants to be two.
const FILE_LINES_MAX: usize = 700;

/// Who may depend on whom, dev-dependencies included. `tests` may know everything but `examples`, which may know everything.
const MAY_DEPEND: [(&str, &[&str]); 8] = [
    ("vmm", &[]),
    ("replication-proto", &[]),
    ("failover", &["replication-proto"]),
    ("primary", &["failover", "replication-proto", "vmm"]),
    ("backup", &["failover", "primary", "replication-proto", "vmm"]),
    // The demo guest's protocol, which the fuzz targets feed.
    ("kv", &[]),
    ("tests", &["backup", "failover", "kv", "primary", "replication-proto", "vmm"]),
    ("examples", &["backup", "failover", "primary", "replication-proto", "tests", "vmm"]),
];

/// Where a crate lives.
fn place(krate: &str) -> &str {
    if krate == "kv" { "examples/guest-kv/kv" } else { krate }
}

/// The source files of a crate, without what is below `#[cfg(test)]`, and with comments blanked out.
fn sources(krate: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    collect(&workspace().join(place(krate)).join("src"), &mut found);
    assert!(!found.is_empty(), "{krate} has no sources");
    found.sort();
    found
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).expect("a source file can be read");
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            let code: String =
                code.lines().flat_map(|line| [line.split("//").next().unwrap_or_default(), "\n"]).collect();
            (path, code)
        })
        .collect()
}

fn collect(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a source directory can be read") {
        let path = entry.expect("a source directory can be read").path();
        if path.is_dir() {
            collect(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

/// Every place where a crate's code contains one of `words`, except in files that `excepted` accepts.
fn places(krate: &str, words: &[&str], excepted: impl Fn(&Path) -> bool) -> Vec<String> {
    let mut places = Vec::new();
    for (path, code) in sources(krate) {
        if excepted(&path) {
            continue;
        }
        for (number, line) in code.lines().enumerate() {
            if let Some(word) = words.iter().find(|word| line.contains(*word)) {
                places.push(format!("{}:{}: {word}", path.display(), number + 1));
            }
        }
    }
    places
}

/// Design: the picture of the crates. An arrow that is not drawn does not exist.
#[test]
fn crates_depend_as_drawn() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(workspace())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let name = |value: &Value| value["name"].as_str().unwrap().to_owned();
    let ours: BTreeSet<String> = packages.iter().map(name).collect();
    let ruled: BTreeSet<String> = MAY_DEPEND.iter().map(|(krate, _)| (*krate).to_owned()).collect();
    assert_eq!(ours, ruled, "every crate of the workspace has a rule");
    let allowed: BTreeMap<&str, &[&str]> = MAY_DEPEND.into_iter().collect();
    let mut wrong = Vec::new();
    for package in packages {
        let krate = name(package);
        for dependency in package["dependencies"].as_array().unwrap() {
            let on = name(dependency);
            if ours.contains(&on) && !allowed[krate.as_str()].contains(&on.as_str()) {
                wrong.push(format!("{krate} depends on {on}"));
            }
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}

/// The protocol and the decision are safe Rust, whatever the workspace's lints say.
#[test]
fn protocol_and_decision_forbid_unsafe_code() {
    for root in ["replication-proto/src/lib.rs", "failover/src/lib.rs"] {
        let text = fs::read_to_string(workspace().join(root)).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{root}");
    }
}

/// The protocol has no I/O, no clock, no thread and no randomness of its own: events in, events out.
#[test]
fn protocol_is_pure() {
    let words = [
        "std::net",
        "std::fs",
        "std::thread",
        "std::process",
        "std::env",
        "Instant",
        "SystemTime",
        "getrandom",
        "rustix",
        "libc::",
        "mio::",
        "socket2",
        "thread_local",
        "std::os",
    ];
    // Broken rules are switched on for each thread of the checks, and are not compiled into anything that ships.
    assert_eq!(places("replication-proto", &words, |file| file.ends_with("mutant.rs")), Vec::<String>::new());
}

/// So are the decision core and what it is made of.
#[test]
fn decision_is_pure() {
    let words = [
        "std::net",
        "std::fs",
        "std::thread",
        "std::process",
        "std::env",
        "Instant::",
        "SystemTime",
        "getrandom",
        "rustix",
        "crossbeam",
    ];
    let root = workspace().join("failover/src");
    let pure = ["decide", "permit", "detector", "reason"];
    let core = |path: &Path| {
        let first = path.strip_prefix(&root).unwrap().iter().next().unwrap().to_string_lossy().into_owned();
        pure.contains(&first.trim_end_matches(".rs"))
    };
    assert!(sources("failover").iter().any(|(path, _)| core(path)), "the core is where this test looks");
    assert_eq!(places("failover", &words, |path| !core(path)), Vec::<String>::new());
}

/// Sockets are made only in the files that are named for it. (Handing one on is no matter.)
#[test]
fn sockets_have_owners() {
    let words = [
        "TcpStream::",
        "TcpListener::",
        "UdpSocket::",
        "UnixStream::",
        "UnixListener::",
        "UnixDatagram::",
        "socket2::",
    ];
    // `world` is where released output leaves: it has the console's socket.
    let owners = ["link", "dial", "pulse", "announce", "control", "health", "world"];
    let owner = |path: &Path| {
        path.iter().any(|part| owners.contains(&part.to_string_lossy().trim_end_matches(".rs")))
            || path.components().any(|part| part.as_os_str() == "bin")
    };
    let found: Vec<String> =
        ["primary", "backup", "failover"].into_iter().flat_map(|krate| places(krate, &words, owner)).collect();
    assert_eq!(found, Vec::<String>::new());
    // The machine knows no peer: frames and bytes of a console, but no connection to another host.
    assert_eq!(places("vmm", &["TcpStream", "TcpListener", "UdpSocket", "socket2"], |_| false), Vec::<String>::new());
}

/// The right to run is made in one place, and the guest's way in is asked for a permit by everybody else.
#[test]
fn permits_are_made_in_the_decision_core_only() {
    let outside = |path: &Path| {
        let text = path.to_string_lossy();
        text.contains("failover/src/permit.rs") || text.contains("failover/src/decide")
    };
    for krate in ["primary", "backup", "failover"] {
        assert_eq!(places(krate, &["RunPermit::", "RunPermit {"], outside), Vec::<String>::new());
    }
}

/// No file grows past what one reads in a sitting.
#[test]
fn files_are_of_readable_size() {
    let mut sizes: Vec<(usize, PathBuf)> = MAY_DEPEND
        .iter()
        .flat_map(|(krate, _)| sources(krate))
        .map(|(path, code)| (code.lines().count(), path))
        .collect();
    sizes.sort();
    sizes.reverse();
    let mut table = String::new();
    for (lines, path) in sizes.iter().take(10) {
        writeln!(table, "{lines:>5} {}", path.display()).unwrap();
    }
    println!("the ten longest files, tests not counted:\n{table}");
    assert!(sizes[0].0 <= FILE_LINES_MAX, "past {FILE_LINES_MAX} lines:\n{table}");
}
