//! Style: the decision core and what it is made of stay free of clocks, threads, I/O and randomness. The compiler cannot say so per module.

use std::fs;
use std::path::{Path, PathBuf};

const FORBIDDEN: [&str; 14] = [
    "Instant",
    "SystemTime",
    "Timestamp",
    "thread::",
    "std::fs",
    "std::io",
    "std::net",
    "std::env",
    "std::process",
    "Mutex",
    "HashMap",
    "HashSet",
    "getrandom",
    "log::",
];

fn rust_files(place: &Path, found: &mut Vec<PathBuf>) {
    if place.is_file() {
        found.push(place.to_path_buf());
        return;
    }
    for entry in fs::read_dir(place).expect("readable") {
        rust_files(&entry.expect("readable").path(), found);
    }
}

#[test]
fn the_core_is_pure() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![];
    for pure in ["decide", "detector.rs", "permit.rs", "reason.rs"] {
        rust_files(&source.join(pure), &mut files);
    }
    assert!(files.len() >= 10, "{files:?}");
    for file in files {
        for (number, line) in fs::read_to_string(&file).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for word in FORBIDDEN {
                assert!(!code.contains(word), "{}:{}: {word}", file.display(), number + 1);
            }
        }
    }
}

#[test]
fn a_permit_is_made_in_one_place() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![];
    rust_files(&source, &mut files);
    let made: Vec<PathBuf> =
        files.into_iter().filter(|file| fs::read_to_string(file).unwrap().contains("RunPermit::new(")).collect();
    assert_eq!(made, [source.join("decide/mod.rs")]);
    let core = fs::read_to_string(source.join("decide/mod.rs")).unwrap();
    assert_eq!(core.matches("RunPermit::new(").count(), 1);
}
