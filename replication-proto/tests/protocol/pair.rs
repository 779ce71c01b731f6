//! Both halves of a data connection in one place, over a link that cuts, flips and splits.

use crate::support::{
    self, Backup, Session, backup, drain, frame_starts, primary, receiver_config, sender_config, session,
};
use bytes::Bytes;
use proptest::prelude::*;
use replication_proto::limits::{MAX_INPUT_BYTES, PAGE_BYTES};
use replication_proto::{
    ApiMisuse, CheckpointKind, Epoch, Generation, GoodbyeReason, LinkError, PageIndex, PageRange, RamLayout,
    ReceiverEvent, RefuseCode, Sender, SenderEvent,
};

/// How many of the session's epochs end in the first `bytes` bytes.
fn whole_epochs(session: &Session, bytes: usize) -> usize {
    let ends = |start: usize| session.to_backup[start + 10] == support::END;
    frame_starts(&session.to_backup).windows(2).filter(|frame| ends(frame[0]) && frame[1] <= bytes).count()
}

fn assert_holds_exactly(backup: &Backup, session: &Session, epochs: usize, what: &str) {
    let committed: Vec<Epoch> = backup.committed.iter().map(|end| end.epoch).collect();
    assert_eq!(committed, session.epochs[..epochs], "{what}");
    match epochs.checked_sub(1) {
        None => assert!(backup.memory.iter().all(|byte| *byte == 0xEE), "{what}: memory was touched before a commit"),
        Some(last) => assert!(backup.memory == session.memory_after[last], "{what}: memory is not that of the commit"),
    }
}

#[test]
fn pair_session_backup_holds_what_the_primary_sent() {
    for compress in [false, true] {
        let session = session(compress);
        assert_eq!(session.epochs, [Epoch(7), Epoch(8), Epoch(9)]);
        let memory = &session.memory_after;
        assert_eq!(memory[0][..PAGE_BYTES], support::page(1));
        assert!(memory[0][PAGE_BYTES..4 * PAGE_BYTES].iter().all(|byte| *byte == 0));
        assert_eq!(memory[0][4 * PAGE_BYTES..], support::page(2));
        assert_eq!(memory[1][..PAGE_BYTES], support::page(3));
        assert!(memory[1][PAGE_BYTES..].iter().all(|byte| *byte == 0));
        assert_eq!(memory[1], memory[2]);
    }
    assert!(session(true).to_backup.len() < session(false).to_backup.len() - 2 * PAGE_BYTES, "compression did nothing");
}

#[test]
fn pair_session_the_size_of_pieces_makes_no_difference() {
    let session = session(true);
    for piece in [1, 2, 79, 80, 81, 4096, 100_000] {
        let mut backup = Backup::new(receiver_config());
        backup.feed(&session.to_backup, piece).unwrap();
        assert_holds_exactly(&backup, &session, 3, &format!("pieces of {piece}"));
        assert_eq!(backup.answers(), session.to_primary);
    }
}

/// Corpus row 1: the stream ends at every byte offset.
#[test]
fn pair_cut_at_every_byte_what_was_whole_is_kept_and_nothing_else() {
    for compress in [false, true] {
        let session = session(compress);
        let starts = frame_starts(&session.to_backup);
        let mut backup = Backup::new(receiver_config());
        for cut in 0..=session.to_backup.len() {
            if cut > 0 {
                backup.feed(&session.to_backup[cut - 1..cut], 1).unwrap();
            }
            assert_holds_exactly(&backup, &session, whole_epochs(&session, cut), &format!("cut at {cut}"));
        }
        // The end of the stream is told apart: between two frames it is orderly.
        for cut in (0..session.to_backup.len()).step_by(7).chain(starts.iter().copied()) {
            let mut backup = Backup::new(receiver_config());
            backup.feed(&session.to_backup[..cut], usize::MAX).unwrap();
            let expected = if starts.contains(&cut) { None } else { Some("malformed.truncated") };
            assert_eq!(backup.receiver.handle_eof().err().map(|error| error.code()), expected, "cut at {cut}");
            assert_holds_exactly(&backup, &session, whole_epochs(&session, cut), &format!("cut at {cut}"));
        }
    }
}

/// Corpus row 2: every single bit of what the primary says.
#[test]
fn pair_flip_of_every_bit_is_an_error_and_commits_nothing_more() {
    let session = session(true);
    let starts = frame_starts(&session.to_backup);
    for bit in 0..session.to_backup.len() * 8 {
        let mut stream = session.to_backup.clone();
        stream[bit / 8] ^= 1 << (bit % 8);
        let mut backup = Backup::new(receiver_config());
        let error = backup.feed(&stream, usize::MAX).expect_err("a flipped bit was believed");
        assert!(matches!(error, LinkError::Malformed(_)), "bit {bit}: {error}");
        assert_holds_exactly(&backup, &session, whole_epochs(&session, bit / 8), &format!("bit {bit}"));
        // It stays failed: the rest of the session, sound as it is, changes nothing.
        let rest = starts.iter().find(|start| **start > bit / 8).copied().unwrap_or(stream.len());
        assert_eq!(backup.feed(&stream[rest..], usize::MAX).is_err(), rest < stream.len());
        assert_holds_exactly(&backup, &session, whole_epochs(&session, bit / 8), &format!("bit {bit}, later"));
    }
}

/// Rows 2 to 9 at once: a bit is flipped and both checksums are made right again, so that the fault gets past them. Whatever the flip
/// means then, what is committed is what the primary committed to, and only that.
#[test]
fn pair_flips_under_sound_checksums_commit_nothing_false() {
    let session = session(true);
    let starts = frame_starts(&session.to_backup);
    let mut let_through = 0;
    for frame in starts.windows(2) {
        for byte in frame[0] + 8..frame[1] {
            // Every bit where the fields are, one bit of each byte in the bulk behind them.
            let bits = if byte < frame[0] + 80 + 64 { 0..8 } else { byte % 8..byte % 8 + 1 };
            for bit in bits {
                let mut stream = session.to_backup.clone();
                stream[byte] ^= 1 << bit;
                let payload = crc32fast::hash(&stream[frame[0] + 80..frame[1]]).to_le_bytes();
                stream[frame[0] + 16..frame[0] + 20].copy_from_slice(&payload);
                let header = crc32fast::hash(&stream[frame[0] + 8..frame[0] + 80]).to_le_bytes();
                stream[frame[0] + 4..frame[0] + 8].copy_from_slice(&header);
                let mut backup = Backup::new(receiver_config());
                let result = backup.feed(&stream, usize::MAX);
                let epochs = backup.committed.len();
                assert_holds_exactly(&backup, &session, epochs, &format!("byte {byte}, bit {bit}"));
                if result.is_ok() && epochs == 3 {
                    let_through += 1;
                } else {
                    assert!(epochs <= whole_epochs(&session, byte), "byte {byte}, bit {bit}");
                }
            }
        }
    }
    // Flips that mean nothing here: of a checksum that is put right again, of words in the goodbye, of abilities only offered.
    assert!(let_through > 0 && let_through < starts.len() * 80, "{let_through} flips made no difference");
}

/// A primary that has sent the epochs of [`session`] and read none of the answers.
fn deaf_sender() -> Sender {
    let mut sender = Sender::new(sender_config(false));
    drain(|| sender.poll_transmit());
    sender.handle_bytes(&support::Forge::backup().accept()).unwrap();
    assert!(matches!(sender.poll_event(), Some(SenderEvent::Accepted { .. })));
    let all = support::all_pages(&support::ram());
    for epoch in 7..10 {
        let kind = if epoch == 7 { CheckpointKind::Base } else { CheckpointKind::Delta };
        sender.begin(Epoch(epoch), kind).unwrap();
        sender.pages(&all, &vec![1; all.len() * PAGE_BYTES]).unwrap();
        sender.end(false).unwrap();
    }
    drain(|| sender.poll_transmit());
    sender
}

fn committed(sender: &mut Sender) -> Vec<Epoch> {
    core::iter::from_fn(|| sender.poll_event())
        .map(|event| match event {
            SenderEvent::Committed { epoch } => epoch,
            other => panic!("{other:?}"),
        })
        .collect()
}

/// Corpus row 2: every single bit of what the backup says: output is released for acks that came whole, and for none else.
#[test]
fn pair_flip_of_every_bit_of_the_acks_commits_nothing_more() {
    let all = session(false).to_primary;
    let starts = frame_starts(&all);
    assert_eq!(starts.len(), 5, "the accept, then three acks");
    let acks = &all[starts[1]..];
    let mut sound = deaf_sender();
    sound.handle_bytes(acks).unwrap();
    assert_eq!(committed(&mut sound), [Epoch(7), Epoch(8), Epoch(9)]);
    for bit in 0..acks.len() * 8 {
        let mut stream = acks.to_vec();
        stream[bit / 8] ^= 1 << (bit % 8);
        let mut sender = deaf_sender();
        let error = sender.handle_bytes(&stream).expect_err("a flipped bit was believed");
        assert!(matches!(error, LinkError::Malformed(_)), "bit {bit}: {error}");
        let whole = bit / 8 / 80;
        assert_eq!(committed(&mut sender), [Epoch(7), Epoch(8), Epoch(9)][..whole], "bit {bit}");
        assert_eq!(sender.handle_bytes(&acks[80 * whole..]), Err(error));
        assert_eq!(committed(&mut sender), []);
    }
}

/// Corpus row 1, the other way: acks cut at every byte.
#[test]
fn pair_cut_acks_commit_only_what_came_whole() {
    let all = session(false).to_primary;
    let acks = &all[frame_starts(&all)[1]..];
    for cut in 0..acks.len() {
        let mut sender = deaf_sender();
        sender.handle_bytes(&acks[..cut]).unwrap();
        assert_eq!(committed(&mut sender).len(), cut / 80);
        assert_eq!(sender.handle_eof().is_err(), cut % 80 != 0);
    }
}

#[test]
fn sender_orders_out_of_place_are_refused() {
    let fails = |order: &dyn Fn(&mut Sender) -> Result<(), LinkError>| {
        let mut sender = deaf_sender();
        let error = order(&mut sender).expect_err("misuse was let through");
        assert_eq!(drain(|| sender.poll_transmit()), [], "nothing is sent after misuse");
        assert_eq!(sender.handle_bytes(&[]), Err(error.clone()), "misuse ends the connection");
        error.to_string()
    };
    let begin = |sender: &mut Sender| sender.begin(Epoch(10), CheckpointKind::Delta);
    let needs_checkpoint = fails(&|sender| sender.section(1, 1, b""));
    assert!(needs_checkpoint.contains("a checkpoint under way"), "{needs_checkpoint}");
    assert_eq!(fails(&|sender| sender.end(false).map(drop)), needs_checkpoint);
    assert_eq!(fails(&|sender| sender.pages(&[], &[])), needs_checkpoint);
    fails(&|sender| sender.begin(Epoch(9), CheckpointKind::Delta));
    fails(&|sender| sender.begin(Epoch(11), CheckpointKind::Delta));
    fails(&|sender| sender.begin(Epoch(10), CheckpointKind::Base));
    fails(&|sender| begin(sender).and_then(|()| begin(sender)));
    fails(&|sender| begin(sender).and_then(|()| sender.pages(&[PageIndex(3)], &[0; PAGE_BYTES])));
    fails(&|sender| begin(sender).and_then(|()| sender.pages(&[PageIndex(0)], &[0; PAGE_BYTES + 1])));
    fails(&|sender| begin(sender).and_then(|()| sender.pages(&[PageIndex(0); 2], &[0; 2 * PAGE_BYTES])));
    // With four in flight there is no room for a fifth.
    fails(&|sender| {
        begin(sender)?;
        sender.end(false)?;
        assert!(!sender.can_begin() && sender.in_flight() == 4);
        sender.begin(Epoch(11), CheckpointKind::Delta)
    });
    fails(&|sender| {
        sender.goodbye(GoodbyeReason::Stopped, "")?;
        sender.goodbye(GoodbyeReason::Stopped, "")
    });
}

#[test]
fn sender_begins_nothing_before_it_is_accepted() {
    let mut sender = Sender::new(sender_config(false));
    assert!(!sender.can_begin());
    assert_eq!(sender.begin(Epoch(1), CheckpointKind::Base).unwrap_err().code(), "api_misuse");
}

#[test]
fn sender_base_without_a_page_is_refused_at_home() {
    let mut sender = Sender::new(sender_config(false));
    sender.handle_bytes(&support::Forge::backup().accept()).unwrap();
    sender.begin(Epoch(1), CheckpointKind::Base).unwrap();
    sender.pages(&[PageIndex(0), PageIndex(17)], &[0; 2 * PAGE_BYTES]).unwrap();
    let error = sender.end(false).unwrap_err();
    assert_eq!(error.to_string(), "misuse of the connection by this side: the base lacks 3 pages");
}

#[test]
fn receiver_acks_in_order_each_once_and_only_what_ended() {
    let session = session(false);
    let starts = frame_starts(&session.to_backup);
    let mut receiver = replication_proto::Receiver::new(receiver_config());
    receiver.handle_bytes(&session.to_backup[..starts[starts.len() - 2]]).unwrap();
    while receiver.poll_event().unwrap().is_some() {}
    receiver.ack(Epoch(7)).unwrap();
    receiver.ack(Epoch(8)).unwrap();
    for wrong in [8, 10, 0, 7] {
        let mut receiver = replication_proto::Receiver::new(receiver_config());
        receiver.handle_bytes(&session.to_backup).unwrap();
        while receiver.poll_event().unwrap().is_some() {}
        receiver.ack(Epoch(7)).unwrap();
        let error = receiver.ack(Epoch(if wrong == 8 { 9 } else { wrong })).unwrap_err();
        assert_eq!(error.code(), "api_misuse");
    }
    // The primary said goodbye while the last ack was due: it still gets it.
    receiver.handle_bytes(&session.to_backup[starts[starts.len() - 2]..]).unwrap();
    assert!(receiver.poll_event().unwrap().is_some());
    receiver.ack(Epoch(9)).unwrap();
    assert_eq!(drain(|| receiver.poll_transmit()), session.to_primary);
}

/// Frames for the guest still reach a side that has handed it over; nothing else may follow a goodbye.
#[test]
fn frames_for_the_guest_may_follow_a_goodbye() {
    let mut sender = Sender::new(sender_config(false));
    let mut receiver = replication_proto::Receiver::new(receiver_config());
    receiver.handle_bytes(&drain(|| sender.poll_transmit())).unwrap();
    assert!(matches!(receiver.poll_event(), Ok(Some(ReceiverEvent::Opened { .. }))));
    sender.handle_bytes(&drain(|| receiver.poll_transmit())).unwrap();
    sender.goodbye(GoodbyeReason::Switchover, "1700").unwrap();
    sender.inbound(Epoch(10), 0, b"late").unwrap();
    receiver.handle_bytes(&drain(|| sender.poll_transmit())).unwrap();
    match receiver.poll_event() {
        Ok(Some(ReceiverEvent::Goodbye(goodbye))) => assert_eq!(goodbye.text, "1700"),
        other => panic!("{other:?}"),
    }
    match receiver.poll_event() {
        Ok(Some(ReceiverEvent::Inbound { epoch: Epoch(10), nic: 0, frame })) => assert_eq!(&frame[..], b"late"),
        other => panic!("{other:?}"),
    }
}

/// A takeover seen elsewhere ends the connection: not one ack more (rule R2), and the primary learns why.
#[test]
fn receiver_that_learns_of_a_higher_generation_acks_nothing_more() {
    let session = session(false);
    let starts = frame_starts(&session.to_backup);
    let before_end = starts.iter().rposition(|start| session.to_backup.get(start + 10) == Some(&support::END)).unwrap();
    let mut backup = Backup::new(receiver_config());
    backup.feed(&session.to_backup[..starts[before_end]], usize::MAX).unwrap();
    assert_eq!(backup.last_committed(), Some(Epoch(8)));
    backup.answers();
    let stale = LinkError::StaleGeneration { ours: Generation(4), theirs: Generation(3) };
    assert_eq!(backup.receiver.raise_generation(Generation(4)), Err(stale.clone()));
    assert_eq!(backup.feed(&session.to_backup[starts[before_end]..], usize::MAX), Err(stale.clone()));
    assert_eq!(backup.receiver.ack(Epoch(9)), Err(stale));
    assert_eq!(backup.last_committed(), Some(Epoch(8)));
    let mut sender = deaf_sender();
    let mut refusal = session.to_primary[frame_starts(&session.to_primary)[1]..].to_vec();
    refusal.truncate(160);
    refusal.extend(backup.answers());
    sender.handle_bytes(&refusal).unwrap();
    assert_eq!(sender.poll_event(), Some(SenderEvent::Committed { epoch: Epoch(7) }));
    assert_eq!(sender.poll_event(), Some(SenderEvent::Committed { epoch: Epoch(8) }));
    match sender.poll_event() {
        Some(SenderEvent::Refused { refuse, generation: Generation(4) }) => {
            assert_eq!(refuse.code, RefuseCode::StaleGeneration);
        }
        other => panic!("{other:?}"),
    }
    assert!(!sender.can_begin());
}

#[test]
fn pair_that_does_not_fit_says_so_on_both_sides() {
    let mut config = receiver_config();
    config.ram = RamLayout::new(vec![PageRange { first: PageIndex(0), pages: 8 }]).unwrap();
    let mut backup = Backup::new(config);
    let mut sender = Sender::new(sender_config(false));
    let error = backup.feed(&drain(|| sender.poll_transmit()), usize::MAX).unwrap_err();
    assert_eq!(error.code(), "incompatible.ram");
    assert_eq!(error.to_string(), "the two sides do not fit together (ram); memory pages: here 0+8, there 0+3 16+2");
    sender.handle_bytes(&backup.answers()).unwrap();
    match sender.poll_event() {
        Some(SenderEvent::Refused { refuse, generation: Generation(0) }) => {
            assert_eq!(refuse.code, RefuseCode::Ram);
            assert_eq!(refuse.differences[0].to_string(), "memory pages: here 0+3 16+2, there 0+8");
        }
        other => panic!("{other:?}"),
    }
}

/// What becomes of a page.
#[derive(Debug, Clone, Copy)]
enum Change {
    Zeros,
    Whole(u8),
    /// These, somewhere.
    Bytes([u8; 3]),
}

impl Change {
    fn make(self, page: &mut [u8]) {
        match self {
            Self::Zeros => page.fill(0),
            Self::Whole(fill) => page.copy_from_slice(&support::page(fill)),
            Self::Bytes(bytes) => {
                bytes.iter().enumerate().for_each(|(n, byte)| page[usize::from(*byte) * 16 + n] = *byte)
            }
        }
    }
}

/// What both sides have sent before costs only what changed; a connection begins without copies.
#[test]
fn pages_that_changed_a_little_are_patched() {
    let mut wire = Vec::new();
    for patches in [false, true] {
        let mut sender = Sender::new(replication_proto::SenderConfig { patches, ..sender_config(false) });
        let mut backup = Backup::new(receiver_config());
        backup.feed(&drain(|| sender.poll_transmit()), usize::MAX).unwrap();
        sender.handle_bytes(&backup.answers()).unwrap();
        let all = support::all_pages(&support::ram());
        let mut memory = vec![7; all.len() * PAGE_BYTES];
        let mut bytes = Vec::new();
        for epoch in 1..=4 {
            sender.begin(Epoch(epoch), if epoch == 1 { CheckpointKind::Base } else { CheckpointKind::Delta }).unwrap();
            memory.chunks_exact_mut(PAGE_BYTES).for_each(|page| page[100..164].fill(u8::try_from(epoch).unwrap()));
            sender.pages(&all, &memory).unwrap();
            sender.end(false).unwrap();
            let said = drain(|| sender.poll_transmit());
            bytes.push(said.len());
            backup.feed(&said, usize::MAX).unwrap();
            assert!(backup.memory == memory);
            sender.handle_bytes(&backup.answers()).unwrap();
        }
        wire.push(bytes);
    }
    let whole = support::all_pages(&support::ram()).len() * PAGE_BYTES;
    assert!(wire[0].iter().all(|bytes| *bytes > whole), "{wire:?}");
    assert!(wire[1][..2].iter().all(|bytes| *bytes > whole), "nothing is known before the first delta: {wire:?}");
    assert!(wire[1][2..].iter().all(|bytes| *bytes < whole / 10), "{wire:?}");
}

#[derive(Debug, Clone)]
struct Step {
    pages: Vec<(u8, Change)>,
    sections: Vec<(u16, Vec<u8>)>,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let page = (
        0..200u8,
        prop_oneof![Just(Change::Zeros), any::<u8>().prop_map(Change::Whole), any::<[u8; 3]>().prop_map(Change::Bytes)],
    );
    let section = (any::<u16>(), proptest::collection::vec(any::<u8>(), 0..6000));
    let step = (proptest::collection::vec(page, 0..150), proptest::collection::vec(section, 0..4));
    proptest::collection::vec(step.prop_map(|(pages, sections)| Step { pages, sections }), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is sent, however it is split: memory and sections of both sides are equal after each commit.
    #[test]
    fn pair_round_trip(steps in steps(), compress: bool, patches: bool, shared: bool, piece in 1..50_000usize) {
        let ram = RamLayout::new(vec![
            PageRange { first: PageIndex(0), pages: 90 },
            PageRange { first: PageIndex(1 << 20), pages: 110 },
        ]).unwrap();
        let mut memory: Vec<u8> = (0..200).flat_map(|n| if n % 3 == 0 { vec![0; PAGE_BYTES] } else { support::page(n) }).collect();
        let mut sender = Sender::new(replication_proto::SenderConfig { ram: ram.clone(), patches, ..sender_config(compress) });
        let mut backup = Backup::new(replication_proto::ReceiverConfig { ram: ram.clone(), ..receiver_config() });
        let indexes = support::all_pages(&ram);
        backup.feed(&drain(|| sender.poll_transmit()), piece).unwrap();
        sender.handle_bytes(&backup.answers()).unwrap();
        let send = |sender: &mut Sender, indexes: &[PageIndex], bytes: Vec<u8>| if shared {
            sender.pages_shared(indexes, &Bytes::from(bytes)).unwrap();
        } else {
            sender.pages(indexes, &bytes).unwrap();
        };
        for (n, step) in steps.iter().enumerate() {
            let epoch = Epoch(1 + n as u64);
            sender.begin(epoch, if n == 0 { CheckpointKind::Base } else { CheckpointKind::Delta }).unwrap();
            if n == 0 {
                send(&mut sender, &indexes, memory.clone());
            }
            // A base repeats pages; a delta has each once.
            let mut changed: Vec<(u8, Change)> = step.pages.clone();
            if n > 0 {
                let mut seen = std::collections::BTreeSet::new();
                changed.retain(|(page, _)| seen.insert(*page));
            }
            let mut bytes = Vec::new();
            for (page, change) in &changed {
                let at = usize::from(*page) * PAGE_BYTES;
                let page = &mut memory[at..at + PAGE_BYTES];
                change.make(page);
                bytes.extend_from_slice(page);
            }
            let numbers: Vec<PageIndex> = changed.iter().map(|(page, _)| indexes[usize::from(*page)]).collect();
            send(&mut sender, &numbers, bytes);
            for (kind, bytes) in &step.sections {
                sender.section(*kind, 1, bytes).unwrap();
            }
            sender.end(false).unwrap();
            backup.feed(&drain(|| sender.poll_transmit()), piece).unwrap();
            prop_assert_eq!(backup.last_committed(), Some(epoch));
            prop_assert!(backup.memory == memory);
            let sections: Vec<(u16, Vec<u8>)> =
                backup.sections.iter().map(|(kind, _, bytes)| (*kind, bytes.to_vec())).collect();
            prop_assert_eq!(&sections, &step.sections);
            sender.handle_bytes(&backup.answers()).unwrap();
            prop_assert_eq!(sender.in_flight(), 0);
        }
    }

    /// Noise, after a sound opening or at once: never a panic, never a commit.
    #[test]
    fn receiver_noise_commits_nothing(noise in proptest::collection::vec(any::<u8>(), 1..5000), opened: bool, piece in 1..500usize) {
        let session = session(true);
        let starts = frame_starts(&session.to_backup);
        let opening = if opened { &session.to_backup[..starts[1]] } else { &[] };
        let mut backup = Backup::new(receiver_config());
        backup.feed(opening, usize::MAX).unwrap();
        let _outcome = backup.feed(&noise, piece);
        prop_assert_eq!(backup.last_committed(), None);
    }
}

#[test]
fn identities_of_the_two_sides_reach_each_other() {
    let mut sender = Sender::new(sender_config(false));
    let mut there = Backup::new(receiver_config());
    there.feed(&drain(|| sender.poll_transmit()), usize::MAX).unwrap();
    assert_eq!(there.receiver.peer(), Some(&primary()));
    sender.handle_bytes(&there.answers()).unwrap();
    // The backup took over the primary's generation with its hello.
    let expected = replication_proto::Identity { generation: support::GENERATION, ..backup() };
    assert_eq!(sender.poll_event(), Some(SenderEvent::Accepted { peer: expected, standing: support::standing() }));
}

/// Corpus row 21: tiny frames that decode to much never become much memory: each waits, encoded, until it is asked for, and zero pages
/// share one piece of memory.
#[test]
fn receiver_amplification_is_one_message_at_a_time() {
    let mut forge = support::Forge::primary();
    let mut stream = [forge.hello(), forge.begin(7, 0)].concat();
    let zeros = support::pages_payload(0, &[(0, 3, 1)], 3, 0, &[]);
    let frames = 1000;
    for _ in 0..frames {
        stream.extend(forge.frame(support::PAGES, 7, &zeros));
    }
    let mut receiver = replication_proto::Receiver::new(receiver_config());
    receiver.handle_bytes(&stream).unwrap();
    let mut kept = Vec::new();
    while let Some(event) = receiver.poll_event().unwrap() {
        if let ReceiverEvent::Pages { bytes, .. } = event {
            kept.push(bytes);
        }
    }
    assert_eq!(kept.len(), frames);
    assert!(kept.iter().all(|bytes| bytes.len() == 3 * PAGE_BYTES && bytes.as_ptr() == kept[0].as_ptr()));
}

/// Input that is not asked for is not piled up.
#[test]
fn receiver_input_that_nobody_takes_is_refused() {
    let stream = session(false).to_backup;
    let mut receiver = replication_proto::Receiver::new(receiver_config());
    let piece = vec![0; MAX_INPUT_BYTES];
    assert_eq!(receiver.handle_bytes(&piece), Ok(()));
    assert_eq!(receiver.handle_bytes(&piece), Ok(()));
    assert_eq!(receiver.handle_bytes(&piece), Err(ApiMisuse::InputNotPolled.into()));
    let mut receiver = replication_proto::Receiver::new(receiver_config());
    let oversize = [&stream[..], &piece].concat();
    assert_eq!(receiver.handle_bytes(&oversize), Err(ApiMisuse::InputNotPolled.into()));
}

/// Inbound frames are told between and within checkpoints and change nothing of what is committed.
#[test]
fn inbound_frames_come_at_any_time_and_are_no_part_of_a_checkpoint() {
    let mut sender = Sender::new(sender_config(false));
    let mut backup = Backup::new(receiver_config());
    backup.feed(&drain(|| sender.poll_transmit()), 1000).unwrap();
    sender.handle_bytes(&backup.answers()).unwrap();
    let ram = support::ram();
    let indexes = support::all_pages(&ram);
    sender.inbound(Epoch(6), 0, b"before").unwrap();
    sender.begin(Epoch(7), CheckpointKind::Base).unwrap();
    sender.inbound(Epoch(7), 1, b"within").unwrap();
    sender.pages(&indexes, &vec![0; indexes.len() * PAGE_BYTES]).unwrap();
    let end = sender.end(false).unwrap();
    backup.feed(&drain(|| sender.poll_transmit()), 1000).unwrap();
    assert_eq!(backup.committed, [end]);
    let told: Vec<_> = backup.inbound.iter().map(|(epoch, nic, frame)| (epoch.0, *nic, &frame[..])).collect();
    assert_eq!(told, [(6, 0, &b"before"[..]), (7, 1, &b"within"[..])]);
}

#[test]
fn inbound_frames_that_are_malformed_or_come_from_the_backup_are_refused() {
    let refused = |payload: &[u8]| {
        let mut forge = support::Forge::primary();
        let stream = [forge.opening(), forge.frame(support::INBOUND, 8, payload)].concat();
        Backup::new(receiver_config()).feed(&stream, 1000).unwrap_err().code()
    };
    assert_eq!(refused(&[0, 0, 0, 0]), "malformed.length");
    assert_eq!(refused(&[0, 1, 0, 0, 9]), "malformed.reserved");
    assert_eq!(refused(&vec![0; 4 + 65_551]), "malformed.length");
    let mut sender = deaf_sender();
    assert!(sender.inbound(Epoch(1), 0, &[]).is_err());
    let mut sender = Sender::new(sender_config(false));
    assert!(sender.inbound(Epoch(1), 0, b"early").is_err());
}
