//! Tests of the journal.

use super::*;
use crate::disk::testing::{Dice, Fault, LossyStorage, Power};

const VM: VmId = VmId(7);

fn point(epoch: u64) -> Point {
    Point { generation: Generation(2), epoch: Epoch(epoch) }
}

fn record(dice: &mut Dice, epoch: u64) -> Record {
    let mut changes = Vec::new();
    for _ in 0..dice.below(4) {
        let most = if dice.one_in(10) { 700 } else { 8 };
        let sectors = 1 + dice.index(most);
        let fill = u8::try_from(dice.below(256)).unwrap_or(0);
        let zeros = dice.one_in(4);
        let content = if zeros {
            DiskContent::Zeros(dice.below(1 << 30))
        } else {
            DiskContent::Bytes(vec![fill; 512 * sectors].into())
        };
        let disk = u8::try_from(dice.below(2)).unwrap_or(0);
        changes.push(DiskChange { disk, offset: 512 * dice.below(1 << 20), content });
    }
    Record { point: point(epoch), flushed: dice.one_in(3), changes }
}

fn open(storage: &Arc<LossyStorage>) -> Journal {
    Journal::open_or_create(Arc::clone(storage) as _, PathBuf::from("journal"), VM, 99).unwrap()
}

/// What a replay yields, with pieces of one change put together again.
fn read(journal: &mut Journal) -> (Replayed, Vec<(Point, DiskChange)>) {
    let mut found: Vec<(Point, DiskChange)> = Vec::new();
    let replayed = journal
        .replay(|at, change| {
            if let Some((last_at, last)) = found.last_mut()
                && *last_at == at
                && last.disk == change.disk
                && let (DiskContent::Bytes(a), DiskContent::Bytes(b)) = (&last.content, &change.content)
                && a.len() % MAX_DISK_CHANGE_BYTES == 0
                && last.offset + u64::try_from(a.len()).unwrap() == change.offset
            {
                last.content = DiskContent::Bytes([a.as_ref(), b.as_ref()].concat().into());
            } else {
                found.push((at, change.clone()));
            }
            Ok(())
        })
        .unwrap();
    (replayed, found)
}

fn flat(records: &[Record]) -> Vec<(Point, DiskChange)> {
    records.iter().flat_map(|record| record.changes.iter().map(|change| (record.point, change.clone()))).collect()
}

#[test]
fn a_journal_reads_what_it_took_until_it_starts_anew() {
    let mut dice = Dice::new(5);
    let storage = Power::new(1).storage(0, false);
    let mut journal = open(&storage);
    assert_eq!(read(&mut journal), (Replayed::default(), vec![]));
    journal.restart(1 << 20).unwrap();
    let records: Vec<Record> = (1..40).map(|epoch| record(&mut dice, epoch)).collect();
    records.iter().for_each(|record| journal.append(record).unwrap());
    journal.sync().unwrap();
    let mut again = open(&storage);
    let (replayed, found) = read(&mut again);
    assert_eq!(replayed, Replayed { records: 39, last: Some(point(39)) });
    assert!(found == flat(&records));
    assert_eq!(again.bytes(), journal.bytes());
    again.restart(1 << 10).unwrap();
    assert_eq!(storage.len().unwrap(), 8192 + 1024);
    assert_eq!(read(&mut again), (Replayed::default(), vec![]));
}

#[test]
#[should_panic(expected = "started anew before it takes records")]
fn a_journal_that_was_not_read_takes_nothing() {
    let storage = Power::new(1).storage(0, false);
    open(&storage).append(&Record { point: point(1), flushed: false, changes: vec![] }).unwrap();
}

/// Goal: whatever a power cut leaves, what is read is a beginning of what was added, with everything synced in it; never a record of
/// an earlier life. Method: seeded lives, each ended at a random write.
#[test]
fn after_a_power_cut_whole_records_are_read_and_nothing_else() {
    let (mut lost, mut kept) = (0, 0);
    for seed in 0..3000 {
        let (power, mut dice) = (Power::new(seed), Dice::new(!seed));
        let storage = power.storage(0, true);
        let (mut epoch, mut first_life) = (0, true);
        for _ in 0..4 {
            power.cut_after(dice.below(if first_life { 10 } else { 40 }));
            let (mut added, mut synced, mut restarting): (Vec<Record>, usize, bool) = (Vec::new(), 0, false);
            let mut live = || -> Result<(), JournalError> {
                let mut journal = Journal::open_or_create(Arc::clone(&storage) as _, PathBuf::from("journal"), VM, 99)?;
                journal.replay(|_, _| Ok(()))?;
                journal.restart(64 << 10)?;
                loop {
                    epoch += 1;
                    // Often of equal size, so that what an earlier life left lies where the next record would.
                    let next = if dice.one_in(2) {
                        Record { point: point(epoch), flushed: false, changes: vec![] }
                    } else {
                        record(&mut dice, epoch)
                    };
                    added.push(next);
                    journal.append(added.last().expect("just added"))?;
                    if dice.one_in(3) {
                        journal.sync()?;
                        synced = added.len();
                    }
                    if dice.one_in(20) {
                        restarting = true;
                        journal.restart(64 << 10)?;
                        (added, synced, restarting) = (Vec::new(), 0, false);
                    }
                }
            };
            live().expect_err("the power fails");
            first_life = false;
            power.cycle();
            let mut journal = open(&storage);
            let (replayed, found) = read(&mut journal);
            let count = usize::try_from(replayed.records).unwrap();
            // A start anew that was under way may have happened or not; then what was before it is whole or gone.
            if !(added.is_empty() || count == 0 && (synced == 0 || restarting)) {
                assert!(count >= synced && count <= added.len(), "seed {seed}: {synced} <= {count} <= {}", added.len());
                assert_eq!(replayed.last, Some(added[count - 1].point), "seed {seed}");
                assert!(found == flat(&added[..count]), "seed {seed}");
                lost += added.len() - count;
                kept += count - synced;
            }
        }
    }
    assert!(lost > 1000 && kept > 300, "{lost} lost, {kept} unsynced and kept");
}

#[test]
fn a_damaged_record_ends_the_journal_wherever_the_damage_is() {
    let mut dice = Dice::new(8);
    let storage = Power::new(1).storage(0, false);
    let mut journal = open(&storage);
    journal.replay(|_, _| Ok(())).unwrap();
    journal.restart(1 << 20).unwrap();
    let records: Vec<Record> = (1..6).map(|epoch| record(&mut dice, epoch)).collect();
    let mut ends = Vec::new();
    for record in &records {
        journal.append(record).unwrap();
        ends.push(8192 + journal.bytes());
    }
    journal.sync().unwrap();
    let len = storage.len().unwrap();
    for _ in 0..400 {
        let at = 8192 + dice.below(len - 8192);
        let mut byte = [0];
        storage.read_at(at, &mut byte).unwrap();
        storage.write_at(at, &[byte[0] ^ (1 << dice.below(8))]).unwrap();
        let (replayed, found) = read(&mut open(&storage));
        let hit = ends.iter().filter(|end| **end <= at).count();
        let count = usize::try_from(replayed.records).unwrap();
        // Between the end of a record and the next nothing is said.
        assert!(count == hit || count == records.len(), "byte {at}: {count} records, {hit} before it");
        assert!(found == flat(&records[..count]));
        storage.write_at(at, &byte).unwrap();
    }
}

#[test]
fn foreign_files_are_refused_and_not_touched() {
    let power = Power::new(1);
    let open = |storage: &Arc<LossyStorage>, vm| {
        Journal::open_or_create(Arc::clone(storage) as _, PathBuf::from("journal"), vm, 99).err()
    };
    let ours = power.storage(0, false);
    assert!(open(&ours, VM).is_none());
    let text = open(&ours, VmId(8)).unwrap().to_string();
    assert!(text.starts_with("the journal journal belongs to VM 00000000-0000-0000-0000-000000000007"), "{text}");
    let garbage = power.storage(0, false);
    garbage.write_at(0, &[7; 9000]).unwrap();
    assert!(matches!(open(&garbage, VM), Some(JournalError::Corrupt { .. })));
    let short = power.storage(0, false);
    short.write_at(0, &[7; 10]).unwrap();
    assert!(matches!(open(&short, VM), Some(JournalError::Corrupt { .. })));
    let newer = power.storage(8192, false);
    let mut header = Header { vm: VM, origin: 1, sequence: 1 }.encode();
    header[8] = 2;
    let sum = xxh3_128(&header[..496]).to_le_bytes();
    header[496..].copy_from_slice(&sum);
    newer.write_at(0, &header).unwrap();
    assert!(matches!(open(&newer, VM), Some(JournalError::Version { found: 2, .. })));
    assert_eq!((garbage.writes(), short.writes(), newer.writes()), (1, 1, 1));
}

#[test]
fn a_full_disk_is_named_and_the_journal_works_again_when_it_is_empty() {
    let storage = Power::new(1).storage(0, false);
    let mut journal = open(&storage);
    journal.replay(|_, _| Ok(())).unwrap();
    journal.restart(1 << 20).unwrap();
    let record = Record { point: point(1), flushed: true, changes: vec![] };
    storage.set_fault(Some(Fault::Full));
    let text = journal.append(&record).unwrap_err().to_string();
    assert!(text.starts_with("the journal journal: it cannot be written: No space left"), "{text}");
    storage.set_fault(None);
    assert!(matches!(journal.append(&record), Err(JournalError::Failed { .. })));
    assert!(matches!(journal.sync(), Err(JournalError::Failed { .. })));
    journal.restart(1 << 20).unwrap();
    journal.append(&record).unwrap();
    storage.set_fault(Some(Fault::SyncError));
    assert!(journal.sync().unwrap_err().to_string().contains("it cannot be synced"));
}
