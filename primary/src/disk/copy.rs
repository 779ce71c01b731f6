//! What of the disks is sent with a base. The guest runs and writes meanwhile: a round ends when all that was to be looked at when it began has
//! been sent, and what was changed in it is the next one. From the last round on, changes stay in the log and go with the checkpoint that ends the base.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use replication_proto::limits::{DISK_PIECE_BYTES, MAX_DISK_CHANGE_BYTES};
use replication_proto::mutant::{self, Mutant};
use replication_proto::{
    Comparable, DiskChange, DiskContent, DiskStanding, PieceHashes, PiecesWanted, Point, piece_hash,
};
use vmm::disk::{ByteRange, Disk};

use super::blocks::{BLOCK_BYTES, BlockSet, blocks_of, touched_by};

/// Blocks that are asked after, or sent, at once: 1 MiB.
const BLOCKS_AT_ONCE: u64 = 16;
/// Questions that may be without an answer at one time: after a short absence most of them are small, and each takes a journey. With those about memory fewer
/// than the protocol allows.
const QUESTIONS_MAX: usize = 40;
/// The last round looks at no more blocks than this: 4 MiB, which a checkpoint may have.
const FEW_BLOCKS: u64 = 64;
/// … or comes after so many others: a guest that writes faster than the link sends never gets below.
const ROUNDS_MAX: u32 = 8;

/// Where the content and the changes come from.
pub trait Source {
    /// The images, in their order.
    fn images(&self) -> Vec<Arc<dyn Disk>>;
    /// Empties the log of changes and hands over what was in it.
    fn drain(&self) -> Vec<DiskChange>;
}

/// What is done next.
#[derive(Debug, PartialEq, Eq)]
pub enum DiskStep {
    /// Ask the backup which of these pieces differ there.
    Ask(PieceHashes),
    /// Send this content.
    Send(Vec<DiskChange>),
    /// Nothing, before an answer comes.
    Await,
    /// Few blocks are left, or as few as there will be: the rest is for when everything else is sent.
    Few,
    /// All is sent but what is in the log.
    End,
}

/// The blocks of one disk that have to be looked at: those that differ from a state that both sides once had. All of them when there is none.
pub fn differing(ours: (Option<Point>, &BlockSet), theirs: &DiskStanding) -> BlockSet {
    let (base, bits) = ours;
    let all = || BlockSet::all(bits.blocks());
    let (Some(ours), Some(their)) = (base, theirs.base) else { return all() };
    // Whoever ran the guest after its base knows what changed since; so the older of two bases must be that side's, within one ownership.
    let known = ours.generation == their.generation
        && if theirs.was_owner { their.epoch <= ours.epoch } else { their.epoch >= ours.epoch };
    let Some(theirs) = known.then(|| BlockSet::decode(bits.blocks(), &theirs.dirty).ok()).flatten() else {
        return all();
    };
    let mut both = bits.clone();
    if !mutant::is(Mutant::ReturnersBitsIgnored) {
        both.union(&theirs);
    }
    both
}

struct OneDisk {
    image: Arc<dyn Disk>,
    /// Ranges of this round that are still to be looked at.
    waiting: VecDeque<ByteRange>,
    /// Blocks that changed since this round began.
    changed: BlockSet,
}

/// See the module.
pub struct DiskCopy {
    disks: Vec<OneDisk>,
    /// Ranges that the backup wants.
    wanted: VecDeque<(u8, ByteRange)>,
    unanswered: usize,
    /// This round asks first.
    asks: bool,
    rounds: u32,
    last: bool,
    buffer: Vec<u8>,
    /// Bytes of the images that were looked at, and that were sent.
    pub looked_at: u64,
    /// See above.
    pub sent: u64,
}

impl DiskCopy {
    /// `differing` names, for each disk, the blocks to look at. The log must be on already, so that no change is missed.
    pub fn begin(source: &dyn Source, differing: &[BlockSet]) -> Self {
        let disks = source.images().into_iter().zip(differing).map(|(image, blocks)| {
            let bytes = image.bytes();
            OneDisk { image, waiting: ranges(blocks, bytes), changed: BlockSet::none(blocks_of(bytes)) }
        });
        Self {
            disks: disks.collect(),
            wanted: VecDeque::new(),
            unanswered: 0,
            asks: true,
            rounds: 0,
            last: false,
            buffer: Vec::new(),
            looked_at: 0,
            sent: 0,
        }
    }

    /// Takes note of what the guest changed meanwhile, so that the log stays short. Nothing any more in the last round.
    pub fn note_changes(&mut self, source: &dyn Source) {
        if self.last {
            return;
        }
        for change in source.drain() {
            if let Some(disk) = self.disks.get_mut(usize::from(change.disk)) {
                disk.changed.insert_range(touched_by(ByteRange { offset: change.offset, len: change.len() }));
            }
        }
    }

    /// What to do next. `finish`: everything else is sent, so this may be the last round.
    ///
    /// # Errors
    /// An image cannot be read.
    pub fn next_step(&mut self, source: &dyn Source, finish: bool) -> io::Result<DiskStep> {
        self.note_changes(source);
        loop {
            if let Some((disk, range)) = self.wanted.pop_front() {
                return Ok(DiskStep::Send(self.read(disk, range)?));
            }
            let may_look = !self.asks || self.unanswered < QUESTIONS_MAX;
            if let Some((disk, range)) = may_look.then(|| self.next_range()).flatten() {
                self.looked_at += range.len;
                if self.asks {
                    return Ok(DiskStep::Ask(self.hashes(disk, range)?));
                }
                return Ok(DiskStep::Send(self.read(disk, range)?));
            }
            if self.unanswered > 0 {
                return Ok(DiskStep::Await);
            }
            if self.last {
                return Ok(DiskStep::End);
            }
            self.asks = false;
            let changed: u64 = self.disks.iter().map(|disk| disk.changed.count()).sum();
            let few = changed <= FEW_BLOCKS || self.rounds >= ROUNDS_MAX;
            if few && !finish {
                return Ok(DiskStep::Few);
            }
            self.rounds += 1;
            // Changes made from here on stay in the log: the set of the last round is taken after the last look at it.
            self.last = few;
            for disk in &mut self.disks {
                let bytes = disk.image.bytes();
                disk.waiting = ranges(&std::mem::replace(&mut disk.changed, BlockSet::none(blocks_of(bytes))), bytes);
            }
        }
    }

    /// The backup answered a question about a disk.
    pub fn answered(&mut self, disk: u8, answer: &PiecesWanted) {
        self.unanswered = self.unanswered.saturating_sub(1);
        let Some(bytes) = self.disks.get(usize::from(disk)).map(|d| d.image.bytes()) else { return };
        let mut run: Option<ByteRange> = None;
        for (piece, _) in (answer.first..).zip(&answer.wanted).filter(|(_, wanted)| **wanted) {
            let offset = piece * DISK_PIECE_BYTES;
            let len = DISK_PIECE_BYTES.min(bytes - offset);
            run = match run {
                Some(run) if run.end() == offset => Some(ByteRange { offset: run.offset, len: run.len + len }),
                other => {
                    self.wanted.extend(other.map(|range| (disk, range)));
                    Some(ByteRange { offset, len })
                }
            };
        }
        self.wanted.extend(run.map(|range| (disk, range)));
    }

    fn next_range(&mut self) -> Option<(u8, ByteRange)> {
        (0u8..).zip(&mut self.disks).find_map(|(number, disk)| disk.waiting.pop_front().map(|range| (number, range)))
    }

    fn fill(&mut self, disk: u8, range: ByteRange) -> io::Result<()> {
        let image = Arc::clone(&self.disks[usize::from(disk)].image);
        self.buffer.resize(usize::try_from(range.len).expect("a range of a few blocks"), 0);
        image.read(range.offset, &mut self.buffer)
    }

    fn hashes(&mut self, disk: u8, range: ByteRange) -> io::Result<PieceHashes> {
        self.fill(disk, range)?;
        self.unanswered += 1;
        let pieces = self.buffer.chunks(usize::try_from(DISK_PIECE_BYTES).expect("4096"));
        let hashes = pieces.map(piece_hash).collect();
        Ok(PieceHashes { of: Comparable::Disk(disk), first: range.offset / DISK_PIECE_BYTES, hashes })
    }

    /// The content of a range: zeros as such, the rest in parts of what one message takes.
    fn read(&mut self, disk: u8, range: ByteRange) -> io::Result<Vec<DiskChange>> {
        self.fill(disk, range)?;
        self.sent += range.len;
        let mut changes = Vec::new();
        let mut offset = range.offset;
        for part in self.buffer.chunks(MAX_DISK_CHANGE_BYTES) {
            let len = u64::try_from(part.len()).expect("a part of a range");
            let zero = part.chunks(128).all(|some| some.iter().fold(0, |all, byte| all | byte) == 0);
            let content = if zero { DiskContent::Zeros(len) } else { DiskContent::Bytes(Bytes::copy_from_slice(part)) };
            changes.push(DiskChange { disk, offset, content });
            offset += len;
        }
        Ok(changes)
    }
}

/// The ranges of a set, each of a few blocks and within the disk.
fn ranges(blocks: &BlockSet, bytes: u64) -> VecDeque<ByteRange> {
    let most = BLOCKS_AT_ONCE * BLOCK_BYTES;
    let mut out = VecDeque::new();
    for ByteRange { mut offset, len } in blocks.byte_ranges(bytes) {
        let end = offset + len;
        while offset < end {
            let len = most.min(end - offset);
            out.push_back(ByteRange { offset, len });
            offset += len;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    const BYTES: u64 = 4 << 20;

    struct Memory(Mutex<Vec<u8>>);

    impl Disk for Memory {
        fn bytes(&self) -> u64 {
            BYTES
        }
        fn is_read_only(&self) -> bool {
            false
        }
        fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
            let at = usize::try_from(offset).unwrap();
            into.copy_from_slice(&self.0.lock().unwrap()[at..at + into.len()]);
            Ok(())
        }
        fn announce(&self, _: ByteRange) -> io::Result<()> {
            Ok(())
        }
        fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
            let at = usize::try_from(offset).unwrap();
            self.0.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
            Ok(())
        }
        fn write_zeroes(&self, range: ByteRange, _: bool) -> io::Result<()> {
            let at = usize::try_from(range.offset).unwrap();
            self.0.lock().unwrap()[at..at + usize::try_from(range.len).unwrap()].fill(0);
            Ok(())
        }
        fn discard(&self, range: ByteRange) -> io::Result<()> {
            self.write_zeroes(range, true)
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Guest {
        disk: Arc<Memory>,
        log: Mutex<Vec<DiskChange>>,
    }

    impl Guest {
        fn write(&self, offset: u64, fill: u8, len: usize) {
            let bytes = vec![fill; len];
            self.disk.write(offset, &bytes).unwrap();
            let content = DiskContent::Bytes(bytes.into());
            self.log.lock().unwrap().push(DiskChange { disk: 0, offset, content });
        }
    }

    impl Source for Guest {
        fn images(&self) -> Vec<Arc<dyn Disk>> {
            vec![Arc::clone(&self.disk) as Arc<dyn Disk>]
        }
        fn drain(&self) -> Vec<DiskChange> {
            std::mem::take(&mut self.log.lock().unwrap())
        }
    }

    fn apply(copy: &Memory, change: &DiskChange) {
        match &change.content {
            DiskContent::Bytes(bytes) => copy.write(change.offset, bytes).unwrap(),
            DiskContent::Zeros(len) => {
                copy.write_zeroes(ByteRange { offset: change.offset, len: *len }, false).unwrap();
            }
        }
    }

    fn answer(copy: &Memory, ask: &PieceHashes) -> PiecesWanted {
        let wanted = (ask.first..).zip(&ask.hashes).map(|(piece, hash)| {
            let mut bytes = [0; 4096];
            copy.read(piece * DISK_PIECE_BYTES, &mut bytes).unwrap();
            piece_hash(&bytes) != *hash
        });
        PiecesWanted { of: ask.of, first: ask.first, wanted: wanted.collect() }
    }

    /// Synchronises `copy`; the guest does `work` before each step. Returns the bytes that were sent.
    fn synchronise(guest: &Guest, copy: &Memory, blocks: &BlockSet, mut work: impl FnMut(usize, &Guest)) -> u64 {
        let mut sync = DiskCopy::begin(guest, std::slice::from_ref(blocks));
        let mut answers = VecDeque::new();
        for step in 0..10_000 {
            work(step, guest);
            match sync.next_step(guest, step > 50).unwrap() {
                DiskStep::Ask(ask) => answers.push_back(answer(copy, &ask)),
                DiskStep::Send(changes) => changes.iter().for_each(|change| apply(copy, change)),
                DiskStep::Await => sync.answered(0, &answers.pop_front().expect("an answer is due")),
                DiskStep::Few => {}
                DiskStep::End => {
                    guest.drain().iter().for_each(|change| apply(copy, change));
                    return sync.sent;
                }
            }
        }
        panic!("it does not end");
    }

    fn guest() -> Guest {
        let bytes = (0..BYTES).map(|n| u8::try_from(n / 4096 % 251).unwrap()).collect();
        Guest { disk: Arc::new(Memory(Mutex::new(bytes))), log: Mutex::default() }
    }

    #[test]
    fn a_whole_disk_arrives_under_a_guest_that_writes_all_the_time() {
        let (guest, copy) = (guest(), Memory(Mutex::new(vec![9; usize::try_from(BYTES).unwrap()])));
        let mut seed = 1u64;
        synchronise(&guest, &copy, &BlockSet::all(blocks_of(BYTES)), |step, guest| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            guest.write(seed % (BYTES / 512 - 16) * 512, u8::try_from(step % 256).unwrap(), 512 * 9);
        });
        assert!(*guest.disk.0.lock().unwrap() == *copy.0.lock().unwrap());
    }

    #[test]
    fn only_what_differs_is_sent_and_nothing_outside_of_the_blocks_named() {
        let guest = guest();
        let copy = Memory(Mutex::new(guest.disk.0.lock().unwrap().clone()));
        guest.write(70_000 / 512 * 512, 1, 512);
        guest.write(3 << 20, 2, 4096);
        guest.drain();
        let mut blocks = BlockSet::none(blocks_of(BYTES));
        blocks.insert_range(touched_by(ByteRange { offset: 69_632, len: 512 }));
        let sent = synchronise(&guest, &copy, &blocks, |_, _| {});
        assert_eq!(sent, 4096);
        let differs = guest.disk.0.lock().unwrap().iter().zip(&*copy.0.lock().unwrap()).position(|(a, b)| a != b);
        assert_eq!(differs, Some(3 << 20), "a block that nobody names is not looked at: the map must not forget one");
        assert_eq!(synchronise(&guest, &copy, &BlockSet::all(blocks_of(BYTES)), |_, _| {}), 4096);
        assert!(*guest.disk.0.lock().unwrap() == *copy.0.lock().unwrap());
    }

    #[test]
    fn bases_that_do_not_fit_together_make_the_whole_disk_differ() {
        let blocks = blocks_of(BYTES);
        let point = |generation, epoch| {
            Some(Point {
                generation: replication_proto::Generation(generation),
                epoch: replication_proto::Epoch(epoch),
            })
        };
        let set = |block| {
            let mut set = BlockSet::none(blocks);
            set.insert(block);
            set
        };
        let theirs = |base, was_owner| DiskStanding { base, was_owner, dirty: set(1).encode().into() };
        let count = |ours, theirs: &DiskStanding| differing((ours, &set(3)), theirs).count();
        // A former owner whose base is ours or older; a former backup that is as far or further.
        assert_eq!(count(point(2, 10), &theirs(point(2, 10), true)), 2);
        assert_eq!(count(point(2, 10), &theirs(point(2, 8), true)), 2);
        assert_eq!(count(point(2, 10), &theirs(point(2, 12), false)), 2);
        for unknown in [
            theirs(point(2, 11), true),
            theirs(point(2, 9), false),
            theirs(point(1, 10), true),
            theirs(None, false),
            DiskStanding { dirty: Bytes::from_static(b"\xff\xff\xff"), ..theirs(point(2, 10), true) },
        ] {
            assert_eq!(count(point(2, 10), &unknown), blocks, "{unknown:?}");
        }
        assert_eq!(count(None, &theirs(point(2, 10), true)), blocks);
    }
}
