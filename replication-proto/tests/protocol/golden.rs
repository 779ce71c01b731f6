//! Bytes that must not change: what a build of version 1 says today is what all builds of version 1 said. `UPDATE_GOLDEN=1` writes them
//! anew, which is right only before the first release or together with a new version.

use core::time::Duration;
use std::path::PathBuf;

use replication_proto::{
    CheckpointKind, Epoch, EpochDigest, GoodbyeReason, HeartbeatBody, PageIndex, Pulse, PulseEvent, RefuseCode, Sender,
    SenderConfig,
};

use crate::support::{self, Backup, Forge, backup, drain, primary, receiver_config, sender_config, session};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The golden bytes of `name`; `said` becomes them if that is asked for.
fn golden(name: &str, said: &[u8]) -> Vec<u8> {
    let path = root().join(format!("tests/golden/proto-v1-{name}.bin"));
    if std::env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, said).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn assert_golden(name: &str, said: &[u8]) {
    let golden = golden(name, said);
    let first = golden.iter().zip(said).position(|(golden, said)| golden != said);
    assert_eq!((first, said.len()), (None, golden.len()), "{name}: the first byte that differs, and the length");
}

#[test]
fn golden_session_is_said_and_understood_as_ever() {
    let session = session(false);
    assert_golden("session-to-backup", &session.to_backup);
    assert_golden("session-to-primary", &session.to_primary);
}

/// Patches: what is said and what it means must not change.
#[test]
fn golden_patches_are_said_and_understood_as_ever() {
    let mut sender = Sender::new(SenderConfig { patches: true, ..sender_config(false) });
    let mut backup = Backup::new(receiver_config());
    let all = support::all_pages(&support::ram());
    let mut memory: Vec<u8> = (1..).take(all.len()).flat_map(support::page).collect();
    let mut said = drain(|| sender.poll_transmit());
    backup.feed(&said, usize::MAX).unwrap();
    sender.handle_bytes(&backup.answers()).unwrap();
    for epoch in 7..=9 {
        sender.begin(Epoch(epoch), if epoch == 7 { CheckpointKind::Base } else { CheckpointKind::Delta }).unwrap();
        let fill = u8::try_from(epoch).unwrap();
        memory[10..20].fill(fill);
        memory[2 * 4096..3 * 4096].copy_from_slice(&support::page(fill));
        memory[4096 + usize::from(fill)] = fill;
        sender.pages(&all, &memory).unwrap();
        sender.end(false).unwrap();
        let more = drain(|| sender.poll_transmit());
        backup.feed(&more, usize::MAX).unwrap();
        sender.handle_bytes(&backup.answers()).unwrap();
        said.extend(more);
    }
    assert_golden("session-patches-to-backup", &said);
    let mut understood = Backup::new(receiver_config());
    understood.feed(&golden("session-patches-to-backup", &said), usize::MAX).unwrap();
    assert!(understood.memory == memory && understood.last_committed() == Some(Epoch(9)));
}

/// What zstd makes of bytes may change with its version; that old bytes are understood may not.
#[test]
fn golden_compressed_session_is_understood() {
    let now = session(true);
    let before = golden("session-zstd-to-backup", &now.to_backup);
    let mut backup = Backup::new(receiver_config());
    backup.feed(&before, usize::MAX).unwrap();
    assert_eq!(backup.committed.len(), 3);
    assert!(backup.memory == now.memory_after[2]);
    assert_golden("session-to-primary", &backup.answers());
}

#[test]
fn golden_heartbeats_and_goodbye() {
    let ms = Duration::from_millis;
    let mut pulse = Pulse::new(primary(), ms(20), ms(0));
    let mut said = drain(|| pulse.poll_transmit(ms(0)));
    let body = HeartbeatBody { committed_epoch: Epoch(1 << 40), state: 2, armed: 3, arbiter_ok_ms: Some(41) };
    pulse.set_body(body);
    said.extend(drain(|| pulse.poll_transmit(ms(20))));
    pulse.goodbye(GoodbyeReason::Switchover, "planned").unwrap();
    said.extend(drain(|| pulse.poll_transmit(ms(40))));
    assert_golden("heartbeat", &said);
    let mut there = Pulse::new(backup(), ms(20), ms(0));
    there.handle_bytes(&golden("heartbeat", &said)).unwrap();
    let events: Vec<PulseEvent> = core::iter::from_fn(|| there.poll_event()).collect();
    assert!(
        matches!(&events[..], [_, PulseEvent::Heard { body: heard, .. }, PulseEvent::Goodbye { .. }] if *heard == body)
    );
}

#[test]
fn golden_refusals() {
    let mut config = receiver_config();
    config.facts = replication_proto::Facts::new();
    config.facts.insert("cpuid", "fedcba9876543210").unwrap();
    let mut unfit = Backup::new(config);
    unfit.feed(&Forge::primary().hello(), usize::MAX).unwrap_err();
    assert_golden("refusal-facts", &unfit.answers());
    let mut busy = Backup::new(receiver_config());
    busy.feed(&Forge::primary().hello(), usize::MAX).unwrap();
    busy.answers();
    busy.receiver.refuse(RefuseCode::Busy, "another primary is here").unwrap();
    assert_golden("refusal-busy", &busy.answers());
}

/// The specification's writer, in `support.rs`, says the same bytes as the sources.
#[test]
fn golden_session_is_that_of_the_specification() {
    let said = session(false).to_backup;
    let starts = support::frame_starts(&said);
    let mut forge = Forge::primary();
    assert_eq!(forge.hello(), said[starts[0]..starts[1]]);
    assert_eq!(forge.begin(7, 0), said[starts[1]..starts[2]]);
    let first = support::pages_payload(0, &[(0, 1, 0), (1, 2, 1)], 3, 4096, &support::page(1));
    assert_eq!(forge.frame(support::PAGES, 7, &first), said[starts[2]..starts[3]]);
    let second = support::pages_payload(0, &[(16, 1, 1), (17, 1, 0), (2, 1, 1)], 3, 4096, &support::page(2));
    assert_eq!(forge.frame(support::PAGES, 7, &second), said[starts[3]..starts[4]]);
    let small = support::section_payload(0x0100, 1, 0, 4, b"vcpu");
    assert_eq!(forge.frame(support::SECTION, 7, &small), said[starts[4]..starts[5]]);
    let large = support::section_payload(0x0600, 2, 0, 8192, &support::page(9).repeat(2));
    assert_eq!(forge.frame(support::SECTION, 7, &large), said[starts[5]..starts[6]]);
    // The digest in one piece, as docs/protocol.md writes it down.
    let mut digested = [&7u64.to_le_bytes()[..], &[0]].concat();
    let zero = vec![0; 4096];
    let pages = [(0u64, support::page(1)), (1, zero.clone()), (2, zero.clone()), (16, zero.clone())];
    for (index, bytes) in pages.into_iter().chain([(17, support::page(2)), (2, zero)]) {
        digested.extend([&[1][..], &index.to_le_bytes(), &bytes].concat());
    }
    for (kind, version, bytes) in [(0x0100u16, 1u16, b"vcpu".to_vec()), (0x0600, 2, support::page(9).repeat(2))] {
        let length = u64::try_from(bytes.len()).unwrap();
        digested
            .extend([&[2][..], &kind.to_le_bytes(), &version.to_le_bytes(), &length.to_le_bytes(), &bytes].concat());
    }
    let digest = replication_proto::CheckpointDigest(xxhash_rust::xxh3::xxh3_128(&digested));
    assert_eq!(forge.end(7, 6, 2, digest), said[starts[6]..starts[7]]);
    let mut empty = EpochDigest::new(Epoch(7), CheckpointKind::Base);
    empty.pages(&[PageIndex(0)], &support::page(1));
    assert_ne!(empty.finish(), digest);
}

/// docs/protocol.md names a hash of the sources that fix the bytes: who changes them reads the page again, then sets the hash.
#[test]
fn protocol_page_is_of_these_sources() {
    let sources = [
        "src/limits.rs",
        "src/message.rs",
        "src/digest.rs",
        "src/disk.rs",
        "src/stamp.rs",
        "src/wire/codec.rs",
        "src/wire/disk.rs",
        "src/wire/frame.rs",
        "src/wire/header.rs",
        "src/wire/messages.rs",
        "src/wire/pages.rs",
        "src/wire/patch.rs",
        "src/history.rs",
        "src/wire/zstd.rs",
    ];
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    for source in sources {
        let text = std::fs::read_to_string(root().join("replication-proto").join(source)).unwrap();
        hash.update(text.split("#[cfg(test)]").next().unwrap().trim_end().as_bytes());
    }
    let page = std::fs::read_to_string(root().join("docs/protocol.md")).unwrap();
    let line = format!("Sources: `{:016x}`", hash.digest());
    assert!(
        page.contains(&line),
        "the sources changed: read docs/protocol.md again, correct it, then put this in it: {line}"
    );
}
