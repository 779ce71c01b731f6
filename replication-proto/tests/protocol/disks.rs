//! Changes of disks, questions after equal pieces, and what an older life left behind.

use bytes::Bytes;
use replication_proto::limits::{MAX_DISK_CHANGE_BYTES, MAX_QUESTIONS};
use replication_proto::{
    ApiMisuse, CheckpointKind, Comparable, DiskChange, DiskContent, Epoch, GoodbyeReason, LinkError, PageIndex,
    PieceHashes, PiecesWanted, Sender, SenderEvent, Verified, piece_hash,
};

use crate::support::{self, Backup, DISKS, Forge, drain, page, receiver_config, sender_config, session, standing};

/// A pair that has greeted.
fn greeted() -> (Sender, Backup) {
    let (mut sender, mut backup) = (Sender::new(sender_config(false)), Backup::new(receiver_config()));
    exchange(&mut sender, &mut backup);
    (sender, backup)
}

fn exchange(sender: &mut Sender, backup: &mut Backup) {
    backup.feed(&drain(|| sender.poll_transmit()), usize::MAX).unwrap();
    sender.handle_bytes(&backup.answers()).unwrap();
}

fn events(sender: &mut Sender) -> Vec<SenderEvent> {
    core::iter::from_fn(|| sender.poll_event()).collect()
}

/// A pair in sync, as of epoch 7.
fn in_sync() -> (Sender, Backup) {
    let (mut sender, mut backup) = greeted();
    sender.begin(Epoch(7), CheckpointKind::Base).unwrap();
    let pages = support::all_pages(&support::ram());
    sender.pages(&pages, &page(1).repeat(pages.len())).unwrap();
    sender.end(false).unwrap();
    exchange(&mut sender, &mut backup);
    events(&mut sender);
    (sender, backup)
}

#[test]
fn the_standing_of_the_backup_comes_with_its_acceptance() {
    let (mut sender, _) = greeted();
    let [SenderEvent::Accepted { standing: said, .. }] = &events(&mut sender)[..] else { panic!("one event") };
    assert_eq!(*said, standing());
}

#[test]
fn changes_arrive_in_order_with_their_epoch_and_are_part_of_its_digest() {
    for compress in [false, true] {
        let said = session(compress);
        let mut backup = Backup::new(receiver_config());
        backup.feed(&said.to_backup, 1000).unwrap();
        let change = |disk, offset, content| DiskChange { disk, offset, content };
        let bytes = DiskContent::Bytes(Bytes::from(page(4)));
        assert_eq!(backup.disk, [change(0, 512, bytes), change(1, 0, DiskContent::Zeros(DISKS[1]))]);
        let ends: Vec<_> = backup.committed.iter().map(|end| (end.disk_changes, end.flushed)).collect();
        assert_eq!(ends, [(0, false), (2, true), (0, false)]);
    }
}

#[test]
fn a_change_outside_of_its_disk_is_refused_on_both_sides() {
    let zeros = |disk, offset, len| DiskChange { disk, offset, content: DiskContent::Zeros(len) };
    let long = DiskContent::Bytes(Bytes::from(vec![1; MAX_DISK_CHANGE_BYTES + 512]));
    let wrong = [
        zeros(2, 0, 512),
        zeros(1, DISKS[1], 512),
        zeros(1, DISKS[1] - 512, 1024),
        zeros(0, u64::MAX - 511, 512),
        zeros(0, 1, 512),
        zeros(0, 0, 100),
        zeros(0, 0, 0),
        DiskChange { disk: 0, offset: 0, content: long },
    ];
    for change in wrong {
        let (mut sender, _) = in_sync();
        sender.begin(Epoch(8), CheckpointKind::Delta).unwrap();
        assert!(matches!(sender.disk_change(&change), Err(LinkError::ApiMisuse(_))), "{change:?}");
    }
    for (disk, offset, len) in [(2u8, 0, 512u64), (1, DISKS[1], 512), (0, 1, 512), (0, u64::MAX - 511, 512), (0, 0, 0)]
    {
        let mut forge = Forge::primary();
        let mut stream = [forge.opening(), forge.begin(8, 1)].concat();
        let payload = [&[disk, 1, 0, 0, 0, 0, 0, 0][..], &u64::to_le_bytes(offset), &len.to_le_bytes()].concat();
        stream.extend(forge.frame(support::DISK_CHANGE, 8, &payload));
        let error = Backup::new(receiver_config()).feed(&stream, usize::MAX).unwrap_err();
        assert_eq!(error.code(), "misbehaved.disk_outside");
    }
}

#[test]
fn more_changes_than_an_epoch_may_have_are_refused() {
    let mut config = receiver_config();
    config.limits.max_epoch_disk_bytes = 5000;
    let mut backup = Backup::new(config);
    let said = session(false).to_backup;
    backup.feed(&said, usize::MAX).unwrap();
    let mut config = receiver_config();
    config.limits.max_epoch_disk_bytes = 4096;
    let error = Backup::new(config).feed(&said, usize::MAX).unwrap_err();
    assert_eq!(error.code(), "misbehaved.epoch_too_large");
}

#[test]
fn equal_pages_need_not_be_sent() {
    let (mut sender, mut backup) = greeted();
    events(&mut sender);
    sender.begin(Epoch(7), CheckpointKind::Base).unwrap();
    let ask = |of, first, count: usize| PieceHashes { of, first, hashes: vec![piece_hash(&page(1)); count] };
    sender.hashes(&ask(Comparable::Memory, 0, 3)).unwrap();
    sender.hashes(&ask(Comparable::Disk(1), 1, 2)).unwrap();
    sender.hashes(&ask(Comparable::Memory, 16, 2)).unwrap();
    exchange(&mut sender, &mut backup);
    assert_eq!(backup.asked.len(), 3);
    let answers = [
        PiecesWanted { of: Comparable::Memory, first: 0, wanted: vec![false, true, false] },
        PiecesWanted { of: Comparable::Disk(1), first: 1, wanted: vec![true, false] },
        PiecesWanted { of: Comparable::Memory, first: 16, wanted: vec![false, false] },
    ];
    for answer in &answers {
        backup.receiver.wanted(answer).unwrap();
    }
    exchange(&mut sender, &mut backup);
    assert_eq!(events(&mut sender), answers.map(SenderEvent::Wanted));
    // What is wanted must still come, and nothing else has to.
    let mut early = Sender::new(sender_config(false));
    assert!(early.end(false).is_err());
    sender.pages(&[PageIndex(1)], &page(1)).unwrap();
    sender.end(false).unwrap();
    exchange(&mut sender, &mut backup);
    assert_eq!(backup.last_committed(), Some(Epoch(7)));
}

/// An operator pauses protection while a base is copied, and a slow disk's answer comes after the goodbye.
#[test]
fn an_answer_after_a_goodbye_is_nobodys_business() {
    let (mut sender, mut backup) = greeted();
    sender.begin(Epoch(7), CheckpointKind::Base).unwrap();
    sender.hashes(&PieceHashes { of: Comparable::Memory, first: 0, hashes: vec![0; 3] }).unwrap();
    sender.goodbye(GoodbyeReason::Restarting, "").unwrap();
    exchange(&mut sender, &mut backup);
    let answer = PiecesWanted { of: Comparable::Memory, first: 0, wanted: vec![false, true, false] };
    backup.receiver.wanted(&answer).unwrap();
    assert!(backup.answers().is_empty());
}

#[test]
fn a_base_does_not_end_before_all_answers_and_all_wanted_pages() {
    let (mut sender, mut backup) = greeted();
    sender.begin(Epoch(7), CheckpointKind::Base).unwrap();
    sender.hashes(&PieceHashes { of: Comparable::Memory, first: 0, hashes: vec![0; 3] }).unwrap();
    sender.pages(&[PageIndex(16), PageIndex(17)], &page(1).repeat(2)).unwrap();
    exchange(&mut sender, &mut backup);
    let answer = PiecesWanted { of: Comparable::Memory, first: 0, wanted: vec![false, true, false] };
    backup.receiver.wanted(&answer).unwrap();
    exchange(&mut sender, &mut backup);
    assert_eq!(
        sender.end(false),
        Err(LinkError::ApiMisuse(ApiMisuse::BaseIncomplete { missing: 1 })),
        "the wanted page did not come"
    );
}

#[test]
fn answers_that_nobody_waits_for_are_refused() {
    let (mut sender, mut backup) = greeted();
    sender.begin(Epoch(7), CheckpointKind::Base).unwrap();
    exchange(&mut sender, &mut backup);
    let answer = PiecesWanted { of: Comparable::Memory, first: 0, wanted: vec![false; 3] };
    assert!(backup.receiver.wanted(&answer).is_err());
    let mut forge = Forge::backup();
    let mut stream = forge.accept();
    let payload = [&[0, 0, 0, 0, 3, 0, 0, 0][..], &0u64.to_le_bytes(), &[7]].concat();
    stream.extend(forge.frame(support::WANTED, 7, &payload));
    let mut sender = Sender::new(sender_config(false));
    assert_eq!(sender.handle_bytes(&stream).unwrap_err().code(), "misbehaved.unexpected");
}

#[test]
fn questions_are_bounded_and_about_what_exists() {
    let (mut sender, _) = greeted();
    sender.begin(Epoch(7), CheckpointKind::Base).unwrap();
    let one = PieceHashes { of: Comparable::Disk(0), first: 0, hashes: vec![0] };
    (0..MAX_QUESTIONS).for_each(|_| sender.hashes(&one).unwrap());
    assert!(sender.hashes(&one).is_err());
    for (of, first, count) in [
        (0u8, 3u64, 1u32), // page 3 is a hole
        (0, 2, 2),
        (0, u64::MAX, 2),
        (1, 256, 1),
    ] {
        let mut forge = Forge::primary();
        let mut stream = [forge.hello(), forge.begin(7, 0)].concat();
        let hashes = vec![0; 16 * usize::try_from(count).unwrap()];
        let head = [&[of, 0, 0, 0][..], &count.to_le_bytes(), &first.to_le_bytes()].concat();
        stream.extend(forge.frame(support::HASHES, 7, &[head, hashes].concat()));
        let error = Backup::new(receiver_config()).feed(&stream, usize::MAX).unwrap_err();
        assert!(matches!(error.code(), "malformed.value" | "malformed.length"), "{}", error.code());
    }
    // Nor within a delta.
    let (mut sender, _) = in_sync();
    sender.begin(Epoch(8), CheckpointKind::Delta).unwrap();
    assert!(sender.hashes(&one).is_err());
}

#[test]
fn stable_storage_and_findings_are_told_and_never_ahead_of_what_was_sent() {
    let (mut sender, mut backup) = in_sync();
    backup.receiver.durable(Epoch(7)).unwrap();
    let found = Verified { compared: 10, differing: vec![(Comparable::Disk(1), 2), (Comparable::Memory, 16)] };
    backup.receiver.verified(Epoch(7), &found).unwrap();
    exchange(&mut sender, &mut backup);
    let told = [SenderEvent::Durable { epoch: Epoch(7) }, SenderEvent::Verified { epoch: Epoch(7), found }];
    assert_eq!(events(&mut sender), told);
    backup.receiver.durable(Epoch(8)).unwrap();
    assert_eq!(sender.handle_bytes(&backup.answers()).unwrap_err().code(), "misbehaved.ack_not_in_flight");
}
