//! The bad-input corpus, row by row, in frames whose checksums are right: each gets its own typed error, the connection is over, and the
//! backup holds what it held. Rows 1 and 2 are in `pair.rs`; headers of rows 2, 3 and 10, and zstd frames of row 14, beside their decoders.

use crate::support::{
    self, ACK, BACKUP, BEGIN, Backup, Forge, GOODBYE, HEARTBEAT, HELLO, PAGES, REFUSE, SECTION, accept_payload, drain,
    hello_payload, identity, page, pages_payload, receiver_config, section_payload, sender_config,
};
use replication_proto::limits::{
    MAX_FACTS, MAX_INPUT_BYTES, MAX_PAGES_PER_MESSAGE, MAX_SECTION_BYTES, MAX_SECTIONS_PER_EPOCH, PAGE_BYTES,
};
use replication_proto::{
    CheckpointKind, Epoch, EpochDigest, Generation, Greeting, PageIndex, Receiver, ReceiverConfig, ReceiverLimits,
    RefuseCode, Sender, SenderEvent,
};

/// A backup that holds the all-zero base of epoch 7, and the forger that goes on from there.
fn opened(config: ReceiverConfig) -> (Backup, Forge) {
    let mut forge = Forge::primary();
    let mut backup = Backup::new(config);
    backup.feed(&forge.opening(), usize::MAX).unwrap();
    assert_eq!(backup.last_committed(), Some(Epoch(7)));
    backup.answers();
    (backup, forge)
}

/// Feeds what `forgery` says; the code of the error that it must get.
fn refused_with(config: ReceiverConfig, forgery: impl FnOnce(&mut Forge) -> Vec<u8>) -> &'static str {
    let (mut backup, mut forge) = opened(config);
    let error = backup.feed(&forgery(&mut forge), usize::MAX).expect_err("bad input was believed");
    // Nothing changed, nothing is acked, the peer is told, and the connection stays over.
    assert_eq!(backup.committed.len(), 1, "{error}");
    assert!(backup.memory.iter().all(|byte| *byte == 0), "{error}");
    let answer = backup.answers();
    assert_eq!(support::frame_starts(&answer).len(), 2, "one answer to {error}");
    assert_eq!(answer[10], REFUSE, "{error}");
    assert_eq!(backup.feed(&forge.begin(8, 1), usize::MAX), Err(error.clone()));
    error.code()
}

fn refused(forgery: impl FnOnce(&mut Forge) -> Vec<u8>) -> &'static str {
    refused_with(receiver_config(), forgery)
}

/// One frame within epoch 8.
fn refused_in_epoch(message: u8, payload: &[u8]) -> &'static str {
    refused(|forge| [forge.begin(8, 1), forge.frame(message, 8, payload)].concat())
}

fn refused_hello(payload: &[u8]) -> &'static str {
    let mut backup = Backup::new(receiver_config());
    let error =
        backup.feed(&Forge::primary().frame(HELLO, 0, payload), usize::MAX).expect_err("a bad hello was believed");
    assert_eq!(backup.receiver.peer(), None);
    error.code()
}

#[test]
fn row_03_lengths_at_every_edge() {
    for length in [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 1 << 31, u32::MAX] {
        for message in HELLO..=GOODBYE {
            let (mut backup, mut forge) = opened(receiver_config());
            let header = forge.frame_of_length(message, u64::from((BEGIN..=ACK).contains(&message)), &[], length);
            // A length that this message can have is waited for, without an error and without a commit; any other is refused at once.
            if let Err(error) = backup.feed(&header, usize::MAX) {
                assert_ne!(error.code(), "malformed.header_checksum");
            }
            assert_eq!(backup.committed.len(), 1);
        }
    }
    assert_eq!(refused(|forge| forge.frame_of_length(PAGES, 8, &[], u32::MAX)), "malformed.length");
    assert_eq!(refused(|forge| forge.frame_of_length(BEGIN, 8, &[1], 1)), "malformed.length");
}

#[test]
fn row_04_lengths_that_are_no_multiple_of_a_page() {
    let body = vec![1; PAGE_BYTES];
    for (data, body) in [(4096, &body[..4095]), (4095, &body[..4095]), (4096, &[]), (0, &body), (8192, &body)] {
        let payload = pages_payload(0, &[(0, 1, 0)], 1, data, body);
        assert_eq!(refused_in_epoch(PAGES, &payload), "malformed.count");
    }
    let leftover = pages_payload(0, &[(0, 1, 0)], 1, 4096, &[&body[..], &[0]].concat());
    assert_eq!(refused_in_epoch(PAGES, &leftover), "malformed.count");
    assert_eq!(refused_in_epoch(SECTION, &section_payload(1, 1, 0, 3, b"four")), "malformed.count");
    assert_eq!(refused_in_epoch(SECTION, &section_payload(1, 1, 0, 5, b"four")), "malformed.count");
}

#[test]
fn row_05_counts_and_addresses_that_overflow() {
    let count = |runs: &[(u64, u32, u32)], pages| refused_in_epoch(PAGES, &pages_payload(0, runs, pages, 0, &[]));
    assert_eq!(count(&[(0, u32::MAX, 1)], u32::MAX), "malformed.count");
    assert_eq!(count(&[(0, u32::MAX, 1)], 1), "malformed.count");
    assert_eq!(count(&[(0, 0, 1)], 0), "malformed.count");
    assert_eq!(count(&[(0, 0, 1)], 1), "malformed.count");
    assert_eq!(count(&[(0, 1, 1)], 2), "malformed.count");
    assert_eq!(count(&[(0, 1, 1), (1, 1, 1)], 1), "malformed.count");
    let many = u32::try_from(MAX_PAGES_PER_MESSAGE + 1).unwrap();
    assert_eq!(count(&[(0, many, 1)], many), "malformed.count");
    assert_eq!(count(&[(u64::MAX, 1, 1)], 1), "malformed.value");
    assert_eq!(count(&[(u64::MAX / 4096, 2, 1)], 2), "malformed.value");
    assert_eq!(count(&[((1 << 40) - 1, 2, 1)], 2), "malformed.value");
    assert_eq!(count(&[(0, 1, 4)], 1), "malformed.value");
    // More runs than there are bytes for.
    let mut payload = pages_payload(0, &[(0, 1, 1)], 2, 0, &[]);
    payload[2] = 2;
    assert_eq!(refused_in_epoch(PAGES, &payload), "malformed.too_short");
    let section = section_payload(1, 1, 0, u32::try_from(MAX_SECTION_BYTES + 1).unwrap(), b"");
    assert_eq!(refused_in_epoch(SECTION, &section), "malformed.count");
}

/// Patches that were not agreed on, of what did not come before, of a base, and those that are none.
#[test]
fn row_05_patches_that_say_too_much() {
    let patch = |body: &[u8]| {
        let length = u32::try_from(body.len()).unwrap();
        pages_payload(0, &[(0, 1, 2)], 1, length, body)
    };
    assert_eq!(refused_in_epoch(PAGES, &patch(&[0, 0])), "misbehaved.not_negotiated");
    let kept = pages_payload(0, &[(0, 1, 3)], 1, 4096, &page(5));
    assert_eq!(refused_in_epoch(PAGES, &kept), "misbehaved.not_negotiated");

    let opening = |forge: &mut Forge, kind: u8| {
        let hello = forge.hello_offering(2);
        if kind == 0 {
            return [hello, forge.begin(7, 0)].concat();
        }
        [forge.opening_after(hello), forge.begin(8, 1)].concat()
    };
    let with = |kind: u8, payloads: &[Vec<u8>]| {
        let (mut backup, mut forge) = (Backup::new(receiver_config()), Forge::primary());
        backup.feed(&opening(&mut forge, kind), usize::MAX).unwrap();
        let epoch = if kind == 0 { 7 } else { 8 };
        let said: Vec<u8> = payloads.iter().flat_map(|payload| forge.frame(PAGES, epoch, payload)).collect();
        let error = backup.feed(&said, usize::MAX).expect_err("a bad patch was believed");
        assert_eq!(backup.committed.len(), usize::from(kind));
        error.code()
    };
    let page_1 = pages_payload(0, &[(1, 1, 3)], 1, 4096, &page(5));
    let unkept = vec![pages_payload(0, &[(1, 1, 0), (0, 1, 2)], 2, 4098, &[&page(5)[..], &[0, 0]].concat())];
    assert_eq!(with(1, &unkept), "misbehaved.patch_of_nothing");
    let of_page_1 = |body: &[u8]| {
        let length = u32::try_from(body.len()).unwrap();
        vec![page_1.clone(), pages_payload(0, &[(1, 1, 2)], 1, length, body)]
    };
    assert_eq!(with(0, &[patch(&[0, 0])]), "misbehaved.not_negotiated", "there are none in a base");
    assert_eq!(with(0, &[kept]), "misbehaved.not_negotiated");
    assert_eq!(with(1, &[patch(&[0, 0])]), "misbehaved.patch_of_nothing", "a base leaves no copies");
    assert_eq!(with(1, &of_page_1(&[0, 0])), "misbehaved.page_twice");
    for (body, code) in [
        (&[][..], "malformed.count"),
        (&[0], "malformed.count"),
        (&[1, 0], "malformed.count"),
        (&[0, 0, 0], "malformed.count"),
        (&[3, 0, 0, 1], "malformed.count"),
        (&[2, 0, 0, 1], "malformed.value"),
        (&[2, 0, 0, 0], "malformed.value"),
        (&[5, 0, 0xff, 0x1f, 2, 7, 7], "malformed.value"),
        (&[4, 0, 0x80, 0x20, 1, 7], "malformed.value"),
        (&[5, 0, 0x80, 0x80, 0x80, 0x80, 0x80], "malformed.value"),
    ] {
        assert_eq!(with(1, &of_page_1(body)), code, "{body:?}");
    }
    let longest = 2 + PAGE_BYTES / 2;
    let mut long = vec![0; longest + 1];
    long[..2].copy_from_slice(&u16::try_from(longest - 1).unwrap().to_le_bytes());
    assert_eq!(with(1, &of_page_1(&long)), "malformed.count", "longer than any patch");
}

#[test]
fn row_06_pages_that_are_no_memory() {
    // Behind the first range, in the hole, one before and one behind the second range, across both edges of the hole.
    for (first, pages) in [(3, 1), (9, 1), (15, 1), (18, 1), (u64::from(u32::MAX), 1), (2, 2), (15, 2), (17, 2)] {
        let payload = pages_payload(0, &[(first, pages, 1)], pages, 0, &[]);
        assert_eq!(refused_in_epoch(PAGES, &payload), "misbehaved.page_outside", "{pages} from {first}");
    }
}

#[test]
fn row_07_pages_twice_and_unsorted() {
    let twice = pages_payload(0, &[(1, 1, 1), (1, 1, 1)], 2, 0, &[]);
    assert_eq!(refused_in_epoch(PAGES, &twice), "misbehaved.page_twice");
    let once = pages_payload(0, &[(1, 1, 1)], 1, 0, &[]);
    let other = pages_payload(0, &[(1, 1, 0)], 1, 4096, &page(5));
    let in_two_messages =
        refused(|forge| [forge.begin(8, 1), forge.frame(PAGES, 8, &once), forge.frame(PAGES, 8, &other)].concat());
    assert_eq!(in_two_messages, "misbehaved.page_twice");
    // In any order is fine, and the same page in the next epoch is, too.
    let (mut backup, mut forge) = opened(receiver_config());
    for epoch in [8, 9] {
        let unsorted = pages_payload(0, &[(17, 1, 1), (0, 1, 1)], 2, 0, &[]);
        let mut digest = EpochDigest::new(Epoch(epoch), CheckpointKind::Delta);
        digest.pages(&[PageIndex(17), PageIndex(0)], &[0; 2 * PAGE_BYTES]);
        let pages = [forge.begin(epoch, 1), forge.frame(PAGES, epoch, &unsorted)].concat();
        backup.feed(&pages, usize::MAX).unwrap();
        backup.feed(&forge.end(epoch, 2, 0, digest.finish()), usize::MAX).unwrap();
        assert_eq!(backup.last_committed(), Some(Epoch(epoch)));
    }
}

#[test]
fn row_08_epochs_out_of_order() {
    for wrong in [1, 6, 7, 9, 10, Epoch::END.0 - 1] {
        assert_eq!(refused(|forge| forge.begin(wrong, 1)), "misbehaved.epoch", "{wrong}");
    }
    for wrong in [Epoch::END.0, u64::MAX - 1, u64::MAX] {
        assert_eq!(refused(|forge| forge.begin(wrong, 1)), "misbehaved.bad_epoch", "{wrong}");
    }
    assert_eq!(refused(|forge| forge.begin(0, 1)), "malformed.value");
    assert_eq!(refused(|forge| forge.begin(8, 0)), "misbehaved.kind");
    assert_eq!(refused(|forge| forge.begin(8, 2)), "malformed.value");
    let pages = pages_payload(0, &[(1, 1, 1)], 1, 0, &[]);
    let none = EpochDigest::new(Epoch(8), CheckpointKind::Delta).finish();
    // Interleaved, outside, begun twice, ended twice, ended as another.
    assert_eq!(refused(|forge| [forge.begin(8, 1), forge.frame(PAGES, 9, &pages)].concat()), "misbehaved.epoch");
    assert_eq!(refused(|forge| [forge.begin(8, 1), forge.end(9, 0, 0, none)].concat()), "misbehaved.epoch");
    assert_eq!(refused(|forge| [forge.begin(8, 1), forge.begin(8, 1)].concat()), "misbehaved.unexpected");
    assert_eq!(refused(|forge| [forge.begin(8, 1), forge.begin(9, 1)].concat()), "misbehaved.unexpected");
    assert_eq!(refused(|forge| forge.frame(PAGES, 8, &pages)), "misbehaved.unexpected");
    assert_eq!(refused(|forge| forge.frame(SECTION, 7, &section_payload(1, 1, 0, 0, b""))), "misbehaved.unexpected");
    assert_eq!(refused(|forge| forge.end(7, 5, 0, none)), "misbehaved.unexpected");
    assert_eq!(refused(|forge| forge.end(8, 0, 0, none)), "misbehaved.unexpected");
}

#[test]
fn row_08_counts_that_are_not_what_came() {
    let none = EpochDigest::new(Epoch(8), CheckpointKind::Delta).finish();
    let one_page = pages_payload(0, &[(1, 1, 1)], 1, 0, &[]);
    for pages in [0, 2, u64::MAX] {
        let wrong = refused(|forge| {
            [forge.begin(8, 1), forge.frame(PAGES, 8, &one_page), forge.end(8, pages, 0, none)].concat()
        });
        assert_eq!(wrong, "misbehaved.wrong_count");
    }
    assert_eq!(refused(|forge| [forge.begin(8, 1), forge.end(8, 0, 1, none)].concat()), "misbehaved.wrong_count");
    // A base that lacks pages.
    let mut forge = Forge::primary();
    let begin = [forge.hello(), forge.begin(7, 0), forge.frame(PAGES, 7, &one_page)].concat();
    let mut backup = Backup::new(receiver_config());
    backup.feed(&begin, usize::MAX).unwrap();
    let error = backup.feed(&forge.end(7, 1, 0, none), usize::MAX).unwrap_err();
    assert_eq!((error.code(), backup.last_committed()), ("misbehaved.base_incomplete", None));
    // A connection that starts with a delta.
    let mut forge = Forge::primary();
    let mut backup = Backup::new(receiver_config());
    let error = backup.feed(&[forge.hello(), forge.begin(8, 1)].concat(), usize::MAX).unwrap_err();
    assert_eq!(error.code(), "misbehaved.kind");
}

/// The receiver passes the digest on; who holds the pages compares, refuses, and does not ack.
#[test]
fn row_08_digest_that_is_not_that_of_what_came() {
    let (mut backup, mut forge) = opened(receiver_config());
    let of_another_epoch = EpochDigest::new(Epoch(9), CheckpointKind::Delta).finish();
    let stream = [forge.begin(8, 1), forge.end(8, 0, 0, of_another_epoch)].concat();
    backup.feed(&stream, usize::MAX).unwrap();
    assert_eq!(backup.last_committed(), Some(Epoch(7)));
    let answer = backup.answers();
    assert_eq!((answer[10], &answer[80..82]), (REFUSE, &12u16.to_le_bytes()[..]));
}

/// Replayed, dropped and reordered frames: the number in the connection tells.
#[test]
fn row_08_frames_replayed_dropped_and_reordered() {
    let pages = pages_payload(0, &[(1, 1, 1)], 1, 0, &[]);
    let frames = |forge: &mut Forge| [forge.begin(8, 1), forge.frame(PAGES, 8, &pages), forge.frame(PAGES, 8, &pages)];
    let replayed = refused(|forge| {
        let [begin, pages, _] = frames(forge);
        [begin, pages.clone(), pages].concat()
    });
    let dropped = refused(|forge| {
        let [begin, _, later] = frames(forge);
        [begin, later].concat()
    });
    let reordered = refused(|forge| {
        let [begin, first, second] = frames(forge);
        [begin, second, first].concat()
    });
    let from_zero = refused(|_| Forge::primary().begin(8, 1));
    assert_eq!([replayed, dropped, reordered, from_zero], ["misbehaved.sequence"; 4]);
}

#[test]
fn row_09_frames_of_others() {
    let as_other = |change: fn(&mut Forge)| {
        refused(|forge| {
            change(forge);
            forge.begin(8, 1)
        })
    };
    assert_eq!(as_other(|forge| forge.generation -= 1), "stale_generation");
    assert_eq!(as_other(|forge| forge.generation = 0), "stale_generation");
    assert_eq!(as_other(|forge| forge.generation += 1), "misbehaved.generation_changed");
    assert_eq!(as_other(|forge| forge.incarnation += 1), "misbehaved.other_incarnation");
    assert_eq!(as_other(|forge| forge.vm += 1), "misbehaved.other_vm");
}

#[test]
fn row_09_hellos_of_others() {
    let hello = |change: fn(&mut Forge), known: u64| {
        let mut forge = Forge::primary();
        change(&mut forge);
        let config = ReceiverConfig { identity: identity("b", Generation(known), BACKUP), ..receiver_config() };
        let mut backup = Backup::new(config);
        let result = backup.feed(&forge.hello(), usize::MAX);
        let answer = backup.answers();
        // The answer tells the generation known here, so that a primary whose right is over learns of it.
        let told = u64::from_le_bytes(answer[40..48].try_into().unwrap());
        (result.map_or_else(|error| error.code(), |()| "accepted"), answer[10], told)
    };
    assert_eq!(hello(|_| {}, 3), ("accepted", support::ACCEPT, 3));
    assert_eq!(hello(|forge| forge.generation = 9, 3), ("accepted", support::ACCEPT, 9));
    assert_eq!(hello(|_| {}, 4), ("stale_generation", REFUSE, 4));
    assert_eq!(hello(|forge| forge.generation = 0, 0), ("misbehaved.no_generation", REFUSE, 0));
    assert_eq!(hello(|forge| forge.vm ^= 1, 3), ("incompatible.other_vm", REFUSE, 3));
    assert_eq!(hello(|forge| forge.incarnation = BACKUP.0, 3), ("incompatible.self_connection", REFUSE, 3));
    // The same host's name, in another process.
    let mut receiver =
        Receiver::new(ReceiverConfig { identity: identity("a", Generation(3), BACKUP), ..receiver_config() });
    receiver.handle_bytes(&Forge::primary().hello()).unwrap();
    assert_eq!(receiver.poll_event().unwrap_err().code(), "incompatible.self_connection");
}

#[test]
fn row_10_versions_and_types() {
    let with = |at: usize, bytes: &[u8]| {
        let mut payload = hello_payload();
        payload[at..at + bytes.len()].copy_from_slice(bytes);
        refused_hello(&payload)
    };
    assert_eq!(with(4, &[2, 0, 9, 0]), "incompatible.version");
    assert_eq!(with(4, &[0, 0, 1, 0]), "malformed.value");
    assert_eq!(with(4, &[2, 0, 1, 0]), "malformed.value");
    assert_eq!(with(0, &[2]), "malformed.value");
    assert_eq!(with(0, &[3]), "malformed.value");
    assert_eq!(with(1, &[1]), "malformed.reserved");
    // A feature that is required and not known here, and one that is required and not offered.
    assert_eq!(with(8, &[[5u64, 4].map(u64::to_le_bytes).concat()].concat()), "incompatible.features");
    assert_eq!(with(8, &[[1u64, 4].map(u64::to_le_bytes).concat()].concat()), "malformed.value");
    // An ability that is only offered is no reason to refuse, nor are newer versions beside ours.
    let mut payload = hello_payload();
    payload[6] = 9;
    payload[8] = 0xFF;
    let mut backup = Backup::new(receiver_config());
    assert_eq!(backup.feed(&Forge::primary().frame(HELLO, 0, &payload), usize::MAX), Ok(()));
    assert_eq!(&backup.answers()[80..96], &accept_payload(1, 3, "b")[..16]);
    // Messages of the other direction and of the other channel.
    for (message, payload) in [(HEARTBEAT, vec![0; 24]), (ACK, vec![]), (REFUSE, vec![0; 8]), (HELLO, hello_payload())]
    {
        let epoch = u64::from(message == ACK);
        assert_eq!(refused(|forge| forge.frame(message, epoch, &payload)), "misbehaved.unexpected");
    }
    assert_eq!(
        refused(|forge| [forge.frame(GOODBYE, 0, &[1, 0, 0, 0]), forge.begin(8, 1)].concat()),
        "misbehaved.after_end"
    );
    assert_eq!(refused(|forge| forge.frame(GOODBYE, 0, &[1, 0, 2, 0, 0x1b, b'c'])), "malformed.value");
    assert_eq!(refused(|forge| forge.frame(GOODBYE, 0, &[1, 1, 0, 0])), "malformed.reserved");
}

#[test]
fn row_10_hello_is_first_and_whole() {
    let mut backup = Backup::new(receiver_config());
    let error = backup.feed(&Forge::primary().begin(7, 0), usize::MAX).unwrap_err();
    assert_eq!(error.code(), "misbehaved.unexpected");
    let payload = hello_payload();
    for cut in 30..payload.len() {
        assert_eq!(refused_hello(&payload[..cut]), "malformed.too_short", "cut at {cut}");
    }
    assert_eq!(refused_hello(&[&payload[..], &[0]].concat()), "malformed.leftover");
    // Noise from a stranger is not answered.
    let mut backup = Backup::new(receiver_config());
    assert_eq!(backup.feed(&[b'G'; 80], usize::MAX).unwrap_err().code(), "malformed.magic");
    assert_eq!(backup.answers(), []);
}

#[test]
fn row_11_hellos_with_impossible_layouts_and_facts() {
    // From the node name on: memory ranges, then facts.
    let hello = |ranges: &[u64], count: u16, facts: &[u8]| {
        let ranges_count = u16::try_from(ranges.len() / 2).unwrap().to_le_bytes();
        let ranges = ranges.iter().copied().map(u64::to_le_bytes).collect::<Vec<_>>().concat();
        [&hello_payload()[..26], &ranges_count, &ranges, &count.to_le_bytes(), facts].concat()
    };
    assert_eq!(refused_hello(&hello(&[], 0, b"")), "malformed.value");
    assert_eq!(refused_hello(&hello(&[0, 0], 0, b"")), "malformed.value");
    assert_eq!(refused_hello(&hello(&[5, 5, 0, 5], 0, b"")), "malformed.value");
    assert_eq!(refused_hello(&hello(&[u64::MAX, 2], 0, b"")), "malformed.value");
    assert_eq!(refused_hello(&hello(&[0, 1].repeat(65), 0, b"")), "malformed.count");
    assert_eq!(refused_hello(&hello(&[0, 3, 16, 2], u16::try_from(MAX_FACTS + 1).unwrap(), b"")), "malformed.count");
    assert_eq!(refused_hello(&hello(&[0, 3, 16, 2], 2, b"\x01a\0\0\x01a\0\0")), "malformed.value");
    assert_eq!(refused_hello(&hello(&[0, 3, 16, 2], 1, b"\x00\0\0")), "malformed.value");
    assert_eq!(refused_hello(&hello(&[0, 3, 16, 2], 1, b"\x01a\x02\0\xFF\xFE")), "malformed.value");
    assert_eq!(refused_hello(&hello(&[0, 3, 16, 2], 1, b"\xFFaaaa")), "malformed.count");
    // Sound, and another machine.
    assert_eq!(refused_hello(&hello(&[0, 5], 0, b"")), "incompatible.ram");
    assert_eq!(refused_hello(&hello(&[0, 3, 16, 2], 0, b"")), "incompatible.facts");
}

#[test]
fn row_14_compressed_pages_and_sections_that_lie() {
    let frame = |content: &[u8]| zstd::bulk::compress(content, 1).unwrap();
    let pages = |body: &[u8]| refused_in_epoch(PAGES, &pages_payload(1, &[(0, 1, 0)], 1, 4096, body));
    let bomb = frame(&vec![0; 64 << 20]);
    assert!(bomb.len() < 16_384);
    assert_eq!(pages(&bomb), "malformed.zstd");
    assert_eq!(pages(&frame(&page(1)[..4095])), "malformed.zstd");
    assert_eq!(pages(&[frame(&page(1)), frame(&page(2))].concat()), "malformed.zstd");
    assert_eq!(pages(b""), "malformed.zstd");
    assert_eq!(refused_in_epoch(PAGES, &pages_payload(1, &[(0, 1, 1)], 1, 0, b"")), "malformed.count");
    assert_eq!(refused_in_epoch(PAGES, &pages_payload(2, &[(0, 1, 0)], 1, 4096, &page(1))), "malformed.value");
    let section = |length, body: &[u8]| refused_in_epoch(SECTION, &section_payload(1, 1, 1, length, body));
    assert_eq!(section(4096, &bomb), "malformed.zstd");
    assert_eq!(section(64 << 20, &bomb), "malformed.count");
    assert_eq!(refused_in_epoch(SECTION, &section_payload(1, 1, 2, 0, b"")), "malformed.value");
    // Without having agreed on it.
    let mut payload = hello_payload();
    payload[8] = 0;
    let mut forge = Forge::primary();
    let mut backup = Backup::new(receiver_config());
    let body = pages_payload(1, &[(0, 1, 0)], 1, 4096, &frame(&page(1)));
    let stream = [forge.frame(HELLO, 0, &payload), forge.begin(7, 0), forge.frame(PAGES, 7, &body)].concat();
    assert_eq!(backup.feed(&stream, usize::MAX).unwrap_err().code(), "misbehaved.not_negotiated");
}

/// A stranger that never gets to the point costs one frame of memory and no more; how long is for the owner of the clock.
#[test]
fn row_17_greetings() {
    let mut greeting = Greeting::new();
    let hello = Forge::primary().hello();
    for byte in &hello[..hello.len() - 1] {
        assert_eq!(greeting.handle_bytes(&[*byte]), Ok(None));
    }
    let more = [&hello[hello.len() - 1..], b"what follows"].concat();
    let caller = greeting.handle_bytes(&more).unwrap().unwrap();
    assert_eq!((caller.channel, &caller.peer), (replication_proto::Channel::Data, &support::primary()));
    assert_eq!(greeting.into_bytes(), [&hello[..], b"what follows"].concat());

    assert_eq!(Greeting::new().handle_bytes(b"GET / HTTP/1.1\r\n").map(drop), Ok(()), "not a header's length yet");
    assert_eq!(Greeting::new().handle_bytes(&[b'G'; 80]).unwrap_err().code(), "malformed.magic");
    let begin = Forge::primary().begin(7, 0);
    assert_eq!(Greeting::new().handle_bytes(&begin).unwrap_err().code(), "misbehaved.unexpected");
    let oversize = vec![0; MAX_INPUT_BYTES + 1];
    assert_eq!(Greeting::new().handle_bytes(&oversize).unwrap_err().code(), "api_misuse");
    assert_eq!(Greeting::new().handle_eof().unwrap_err().code(), "malformed.truncated");
}

/// A primary with epochs 7 and 8 ended, of which 7 left the house.
fn waiting_sender() -> (Sender, Forge) {
    let mut sender = Sender::new(sender_config(false));
    let mut forge = Forge::backup();
    sender.handle_bytes(&forge.accept()).unwrap();
    assert!(matches!(sender.poll_event(), Some(SenderEvent::Accepted { .. })));
    let all = support::all_pages(&support::ram());
    sender.begin(Epoch(7), CheckpointKind::Base).unwrap();
    sender.pages(&all, &vec![0; all.len() * PAGE_BYTES]).unwrap();
    sender.end(false).unwrap();
    drain(|| sender.poll_transmit());
    sender.begin(Epoch(8), CheckpointKind::Delta).unwrap();
    sender.end(false).unwrap();
    (sender, forge)
}

#[test]
fn row_19_acks_that_no_honest_backup_sends() {
    let refused = |forgery: &dyn Fn(&mut Forge) -> Vec<u8>| {
        let (mut sender, mut forge) = waiting_sender();
        let error = sender.handle_bytes(&forgery(&mut forge)).expect_err("a bad ack was believed");
        assert_eq!(sender.poll_event(), None, "{error}");
        assert_eq!(sender.poll_transmit(), None, "{error}");
        error.code()
    };
    // Of the past, of an epoch that did not leave yet, of the future.
    for epoch in [1, 6, 8, 9, u64::MAX] {
        assert_eq!(refused(&|forge| forge.frame(ACK, epoch, &[])), "misbehaved.ack_not_in_flight");
    }
    assert_eq!(refused(&|forge| forge.frame(ACK, 0, &[])), "malformed.value");
    assert_eq!(refused(&|forge| forge.frame(ACK, 7, &[0])), "malformed.length");
    let as_other = |change: fn(&mut Forge)| {
        refused(&|forge| {
            change(forge);
            forge.frame(ACK, 7, &[])
        })
    };
    assert_eq!(as_other(|forge| forge.incarnation += 1), "misbehaved.other_incarnation");
    assert_eq!(as_other(|forge| forge.vm += 1), "misbehaved.other_vm");
    assert_eq!(as_other(|forge| forge.generation -= 1), "misbehaved.generation_changed");
    assert_eq!(as_other(|forge| forge.generation += 1), "stale_generation");
    assert_eq!(as_other(|forge| forge.sequence += 1), "misbehaved.sequence");
    assert_eq!(refused(&Forge::accept), "misbehaved.unexpected");
    assert_eq!(refused(&|forge| forge.frame(HEARTBEAT, 0, &[0; 24])), "misbehaved.unexpected");
    // A flood: the first is honest.
    let (mut sender, mut forge) = waiting_sender();
    let flood: Vec<u8> = (0..1000).flat_map(|_| forge.frame(ACK, 7, &[])).collect();
    assert_eq!(sender.handle_bytes(&flood).unwrap_err().code(), "misbehaved.ack_not_in_flight");
    assert_eq!(sender.poll_event(), Some(SenderEvent::Committed { epoch: Epoch(7) }));
    assert_eq!(sender.poll_event(), None);
}

/// One ack may stand for several epochs; each still gets its event.
#[test]
fn row_19_acks_may_be_cumulative() {
    let (mut sender, mut forge) = waiting_sender();
    drain(|| sender.poll_transmit());
    sender.handle_bytes(&forge.frame(ACK, 8, &[])).unwrap();
    let events: Vec<SenderEvent> = core::iter::from_fn(|| sender.poll_event()).collect();
    assert_eq!(events, [7, 8].map(|epoch| SenderEvent::Committed { epoch: Epoch(epoch) }));
    assert_eq!(sender.in_flight(), 0);
}

#[test]
fn row_19_answers_to_the_hello_that_no_honest_backup_gives() {
    let refused = |forgery: &dyn Fn(&mut Forge) -> Vec<u8>| {
        let mut sender = Sender::new(sender_config(true));
        let error = sender.handle_bytes(&forgery(&mut Forge::backup())).expect_err("a bad answer was believed");
        assert_eq!((sender.poll_event(), sender.can_begin()), (None, false), "{error}");
        error.code()
    };
    let accept = |version, features, node| {
        refused(&|forge| forge.frame(support::ACCEPT, 0, &accept_payload(version, features, node)))
    };
    assert_eq!(accept(2, 1, "b"), "misbehaved.not_offered");
    assert_eq!(accept(0, 1, "b"), "misbehaved.not_offered");
    assert_eq!(accept(1, 2, "b"), "misbehaved.not_offered");
    assert_eq!(accept(1, 1, "a"), "misbehaved.not_offered");
    assert_eq!(accept(1, 1, "B"), "malformed.value");
    assert_eq!(accept(1, 1, ""), "malformed.value");
    assert_eq!(refused(&|forge| forge.frame(ACK, 7, &[])), "misbehaved.unexpected");
    assert_eq!(refused(&|_| Forge::primary().accept()), "misbehaved.other_incarnation");
    assert_eq!(refused(&|forge| forge.begin(7, 0)), "misbehaved.unexpected");
    let after_refusal =
        |forge: &mut Forge| [forge.frame(REFUSE, 0, &[8, 0, 0, 0, 0, 0, 0, 0]), forge.accept()].concat();
    let mut sender = Sender::new(sender_config(true));
    assert_eq!(sender.handle_bytes(&after_refusal(&mut Forge::backup())).unwrap_err().code(), "misbehaved.after_end");
    match sender.poll_event() {
        Some(SenderEvent::Refused { refuse, .. }) => assert_eq!(refuse.code, RefuseCode::Busy),
        other => panic!("{other:?}"),
    }
}

/// Valid but too much: told apart from broken, so that the primary goes solo instead of trying again at once.
#[test]
fn row_21_checkpoints_over_the_limits() {
    let limits = ReceiverLimits { max_epoch_pages: 2, max_epoch_section_bytes: 10, max_epoch_disk_bytes: 1024 };
    let config = || ReceiverConfig { limits, ..receiver_config() };
    let pages = pages_payload(0, &[(0, 3, 1)], 3, 0, &[]);
    let too_many = |forge: &mut Forge| [forge.begin(8, 1), forge.frame(PAGES, 8, &pages)].concat();
    assert_eq!(refused_with(config(), too_many), "misbehaved.epoch_too_large");
    let section = section_payload(1, 1, 0, 6, b"sixsix");
    let too_much = |forge: &mut Forge| {
        [forge.begin(8, 1), forge.frame(SECTION, 8, &section), forge.frame(SECTION, 8, &section)].concat()
    };
    assert_eq!(refused_with(config(), too_much), "misbehaved.epoch_too_large");
    let empty = section_payload(1, 1, 0, 0, b"");
    let too_many = |forge: &mut Forge| {
        let mut stream = forge.begin(8, 1);
        (0..=MAX_SECTIONS_PER_EPOCH).for_each(|_| stream.extend(forge.frame(SECTION, 8, &empty)));
        stream
    };
    assert_eq!(refused_with(config(), too_many), "misbehaved.epoch_too_large");
    // The base is as large as memory, whatever the limit; and the code says what it is.
    let (mut backup, mut forge) = opened(config());
    let stream = [forge.begin(8, 1), forge.frame(PAGES, 8, &pages)].concat();
    backup.feed(&stream, usize::MAX).unwrap_err();
    assert_eq!(backup.answers()[80..82], 9u16.to_le_bytes());
}

/// Checkpoints that are never acked end the connection instead of piling up.
#[test]
fn row_21_checkpoints_without_acks() {
    let mut forge = Forge::primary();
    let mut receiver = Receiver::new(receiver_config());
    receiver.handle_bytes(&forge.opening()).unwrap();
    while receiver.poll_event().unwrap().is_some() {}
    let mut epochs = 1;
    let error = loop {
        let epoch = 7 + epochs;
        let digest = EpochDigest::new(Epoch(epoch), CheckpointKind::Delta).finish();
        receiver.handle_bytes(&[forge.begin(epoch, 1), forge.end(epoch, 0, 0, digest)].concat()).unwrap();
        match [receiver.poll_event(), receiver.poll_event()] {
            [Ok(Some(_)), Ok(Some(_))] => epochs += 1,
            [Err(error), _] => break error,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((epochs, error.code()), (1024, "misbehaved.too_many_in_flight"));
}

/// The end of the numbers of epochs is an end, not a new start; and it is so early that a backup that activates such a base still has numbers
/// for its own epochs. (It once took a base of epoch 2^64 - 2, and would have run out as a primary.)
#[test]
fn row_22_epochs_near_the_end_of_numbers() {
    let mut forge = Forge::primary();
    let mut backup = Backup::new(receiver_config());
    let last = Epoch::END.0 - 1;
    let pages = pages_payload(0, &[(0, 3, 1), (16, 2, 1)], 5, 0, &[]);
    let mut digest = EpochDigest::new(Epoch(last), CheckpointKind::Base);
    digest.pages(&support::all_pages(&support::ram()), &[0; 5 * PAGE_BYTES]);
    let base =
        [forge.hello(), forge.begin(last, 0), forge.frame(PAGES, last, &pages), forge.end(last, 5, 0, digest.finish())];
    backup.feed(&base.concat(), usize::MAX).unwrap();
    assert_eq!(backup.last_committed(), Some(Epoch(last)));
    assert_eq!(backup.feed(&forge.begin(last + 1, 1), usize::MAX).unwrap_err().code(), "misbehaved.bad_epoch");
    for epoch in [Epoch::END.0, u64::MAX - 1, u64::MAX] {
        let mut forge = Forge::primary();
        let mut hollow = Backup::new(receiver_config());
        let begin = [forge.hello(), forge.begin(epoch, 0)].concat();
        assert_eq!(hollow.feed(&begin, usize::MAX).unwrap_err().code(), "misbehaved.bad_epoch");
    }
}
