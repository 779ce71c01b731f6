//! A whole session against a backup: sound messages, wrong ones, changed, cut, repeated and reordered ones, in any order.

use arbitrary::Unstructured;
use replication_proto::limits::{HEADER_BYTES, MAX_DISK_CHANGE_BYTES, PAGE_BYTES};
use replication_proto::{
    CheckpointDigest, CheckpointKind, DiskChange, DiskContent, Epoch, EpochDigest, Generation, GoodbyeReason,
    LinkError, PageIndex, PiecesWanted, ReceiverConfig, ReceiverLimits, RefuseCode,
};

use super::frames::assert_final;
use super::support::{
    self, Backup, DISK_CHANGE, END, Forge, GOODBYE, HASHES, INBOUND, PAGES, SECTION, receiver_config,
};

const STEPS: usize = 300;
/// Frames kept to be said again.
const KEPT: usize = 16;
const MAX_EPOCH_PAGES: u64 = 64;
const ALL: [u64; 5] = [0, 1, 2, 16, 17];

/// Target `receiver_session`: operations in the order of the input's bytes.
///
/// Whatever is said: memory is always that of the last committed epoch; commits come one by one and only for checkpoints whose end
/// tells the digest of what was sent; after the first error nothing changes any more.
pub fn receiver_session(data: &[u8]) {
    let mut session = Session::new();
    let mut input = Unstructured::new(data);
    for _ in 0..STEPS {
        if input.is_empty() || session.step(&mut input).is_err() || session.failed {
            break;
        }
    }
}

/// The checkpoint that the forger is saying, as an honest primary would know it.
struct Said {
    epoch: u64,
    digest: EpochDigest,
    memory: Vec<u8>,
    pages: u64,
    sections: u32,
    changes: u64,
}

struct Session {
    backup: Backup,
    forge: Forge,
    /// What is said next is changed on the way.
    damage: Option<Damage>,
    kept: Vec<Vec<u8>>,
    /// A frame that waits to be said too late.
    late: Option<Vec<u8>>,
    said: Option<Said>,
    /// The memory of the last checkpoint that ended with the right digest.
    truth: Vec<u8>,
    commits: usize,
    last: Option<Epoch>,
    /// Generation, VM and incarnation of the hello that was accepted.
    opened_as: Option<(u64, u128, u128)>,
    failed: bool,
}

#[derive(Clone, Copy)]
enum Damage {
    Flip(usize),
    FlipUnderChecksum(usize),
    Cut(usize),
}

impl Session {
    fn new() -> Self {
        let limits = ReceiverLimits {
            max_epoch_pages: MAX_EPOCH_PAGES,
            max_epoch_section_bytes: 1 << 16,
            max_epoch_disk_bytes: 1 << 16,
        };
        let backup = Backup::new(ReceiverConfig { limits, ..receiver_config() });
        let truth = backup.memory.clone();
        Self {
            backup,
            forge: Forge::primary(),
            damage: None,
            kept: Vec::new(),
            late: None,
            said: None,
            truth,
            commits: 0,
            last: None,
            opened_as: None,
            failed: false,
        }
    }

    /// Says a frame and looks at what became of the backup.
    fn say(&mut self, mut frame: Vec<u8>) {
        match self.damage.take() {
            Some(Damage::Flip(bit)) => {
                let bit = bit % (frame.len() * 8);
                frame[bit / 8] ^= 1 << (bit % 8);
            }
            Some(Damage::FlipUnderChecksum(bit)) if frame.len() >= HEADER_BYTES => {
                let bit = 64 + bit % ((frame.len() - 8) * 8);
                frame[bit / 8] ^= 1 << (bit % 8);
                seal(&mut frame);
            }
            Some(Damage::Cut(at)) => frame.truncate(at % frame.len()),
            _ => {}
        }
        if self.kept.len() < KEPT {
            self.kept.push(frame.clone());
        }
        let piece = if frame.len().is_multiple_of(3) { 61 } else { usize::MAX };
        let result = self.backup.feed(&frame, piece);
        self.check(result);
    }

    fn check(&mut self, result: Result<(), LinkError>) {
        let new = &self.backup.committed[self.commits..];
        for end in new {
            assert!(
                self.last.is_none_or(|last| last.checked_next() == Some(end.epoch)),
                "{:?}, then {end:?}",
                self.last
            );
            assert_eq!(end.kind == CheckpointKind::Base, self.last.is_none(), "{end:?}");
            self.last = Some(end.epoch);
        }
        let Forge { generation, vm, incarnation, .. } = self.forge;
        if self.backup.receiver.peer().is_some() {
            self.opened_as.get_or_insert((generation, vm, incarnation));
        }
        if !new.is_empty() {
            assert_eq!(self.opened_as, Some((generation, vm, incarnation)), "somebody else's end was committed");
            assert_eq!(new.len(), 1, "one frame ends one checkpoint");
            // The digest was compared: what is committed is what was said, if the end told the truth.
            let said = self.said.take().expect("a checkpoint is committed that was never ended");
            assert_eq!(new[0].epoch.0, said.epoch);
            self.truth = said.memory;
        }
        self.commits = self.backup.committed.len();
        assert!(self.backup.memory == self.truth, "memory is that of no checkpoint that ended");
        if let Err(error) = result {
            self.failed = true;
            assert_final(&mut self.backup.receiver, &error);
            let (commits, memory) = (self.commits, self.backup.memory.clone());
            let begin = self.forge.begin(8, 1);
            assert_eq!(self.backup.feed(&begin, usize::MAX), Err(error));
            assert!(self.backup.committed.len() == commits && self.backup.memory == memory);
        } else {
            drop(self.backup.answers());
        }
    }

    fn next_epoch(&self) -> u64 {
        self.last.map_or(7, |last| last.0.wrapping_add(1))
    }

    fn step(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        match input.int_in_range(0..=25u8)? {
            0 => {
                let hello = self.forge.hello();
                self.say(hello);
            }
            1..=3 => self.begin(input)?,
            4..=7 => self.pages(input)?,
            8 | 9 => self.section(input)?,
            10..=12 => self.end(),
            13 => self.false_end(input)?,
            14 => self.any_message(input)?,
            15 => self.damage = Some(Damage::Flip(input.arbitrary()?)),
            16 => self.damage = Some(Damage::FlipUnderChecksum(input.arbitrary()?)),
            17 => self.damage = Some(Damage::Cut(input.arbitrary()?)),
            18 if !self.kept.is_empty() => {
                let again = input.choose(&self.kept)?.clone();
                if !again.is_empty() {
                    self.say(again);
                }
            }
            19 => match self.late.take() {
                None => self.late = Some(self.forge.frame(INBOUND, 8, &[0, 0, 0, 0, 1])),
                Some(late) => self.say(late),
            },
            20 => self.identity(input)?,
            21 => self.whole_checkpoint(input)?,
            22 => self.orders(input)?,
            23 => self.disk(input)?,
            24 => self.hashes(input)?,
            _ => {
                let length = input.int_in_range(0..=80usize)?;
                let inbound = [&[0, 0, 0, 0][..], &vec![7; length]].concat();
                let epoch = self.next_epoch();
                let frame = self.forge.frame(INBOUND, epoch, &inbound);
                self.say(frame);
            }
        }
        Ok(())
    }

    fn begin(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let (mut epoch, mut base) = (self.next_epoch(), self.last.is_none());
        match input.int_in_range(0..=15u8)? {
            0 => epoch = *input.choose(&[0, 1, 6, 7, 8, 9, Epoch::END.0 - 1, Epoch::END.0, u64::MAX - 1, u64::MAX])?,
            1 => base = !base,
            _ => {}
        }
        let kind = if base { CheckpointKind::Base } else { CheckpointKind::Delta };
        let memory = self.truth.clone();
        let digest = EpochDigest::new(Epoch(epoch), kind);
        self.said = Some(Said { epoch, digest, memory, pages: 0, sections: 0, changes: 0 });
        let frame = self.forge.begin(epoch, u8::from(!base));
        self.say(frame);
        Ok(())
    }

    fn epoch(&self) -> u64 {
        self.said.as_ref().map_or_else(|| self.next_epoch(), |said| said.epoch)
    }

    fn pages(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let (mut runs, mut body, mut total) = (Vec::new(), Vec::new(), 0);
        for _ in 0..input.int_in_range(1..=3)? {
            let (page, zero): (u64, bool) = (*input.choose(&ALL)?, input.arbitrary()?);
            let content = if zero { vec![0; PAGE_BYTES] } else { support::page(input.arbitrary()?) };
            runs.push((page, 1, u32::from(zero)));
            total += 1;
            if let Some(said) = &mut self.said {
                said.digest.pages(&[PageIndex(page)], &content);
                said.pages += 1;
                let at = ALL.iter().position(|known| *known == page).expect("one of them") * PAGE_BYTES;
                said.memory[at..at + PAGE_BYTES].copy_from_slice(&content);
            }
            if !zero {
                body.extend(content);
            }
        }
        let length = u32::try_from(body.len()).expect("three pages");
        let compressed = length > 0 && input.arbitrary()?;
        if compressed {
            body = zstd::bulk::compress(&body, 1).expect("memory to compress");
        }
        let payload = support::pages_payload(u8::from(compressed), &runs, total, length, &body);
        let epoch = self.epoch();
        let frame = self.forge.frame(PAGES, epoch, &payload);
        self.say(frame);
        Ok(())
    }

    fn section(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let bytes = vec![input.arbitrary()?; input.int_in_range(0..=5000)?];
        let kind = input.arbitrary()?;
        if let Some(said) = &mut self.said {
            said.digest.section(kind, 1, &bytes);
            said.sections += 1;
        }
        let length = u32::try_from(bytes.len()).expect("at most 5000");
        let payload = support::section_payload(kind, 1, 0, length, &bytes);
        let epoch = self.epoch();
        let frame = self.forge.frame(SECTION, epoch, &payload);
        self.say(frame);
        Ok(())
    }

    fn disk(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let (disk, zeros): (u8, bool) = (input.int_in_range(0..=2)?, input.arbitrary()?);
        let offset = if input.ratio(1, 8)? { input.arbitrary()? } else { input.int_in_range(0..=40u64)? * 512 };
        let length = *input.choose(&[512, 512, 4096, 0, 100, 300 << 10])?;
        let body = if zeros { Vec::new() } else { vec![input.arbitrary()?; length] };
        let content = if zeros {
            DiskContent::Zeros(u64::try_from(length).expect("a few kilobytes"))
        } else {
            DiskContent::Bytes(body.clone().into())
        };
        let change = DiskChange { disk, offset, content };
        if let Some(said) = &mut self.said {
            said.digest.disk(&change);
            said.changes += 1;
        }
        let head = [&[disk, u8::from(zeros), 0, 0, 0, 0, 0, 0][..], &offset.to_le_bytes(), &change.len().to_le_bytes()];
        let epoch = self.epoch();
        let payload = [head.concat(), body].concat();
        if payload.len() <= 24 + MAX_DISK_CHANGE_BYTES {
            let frame = self.forge.frame(DISK_CHANGE, epoch, &payload);
            self.say(frame);
        }
        Ok(())
    }

    fn hashes(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let (of, disk): (u8, u8) = (input.int_in_range(0..=2)?, input.int_in_range(0..=2)?);
        let first: u64 = *input.choose(&[0, 1, 2, 16, 17, 255, 256, u64::MAX])?;
        let count = input.int_in_range(0..=3u32)?;
        let head = [&[of, disk, 0, 0][..], &count.to_le_bytes(), &first.to_le_bytes()].concat();
        let payload = [head, vec![1; 16 * usize::try_from(count).expect("three")]].concat();
        let epoch = self.epoch();
        let frame = self.forge.frame(HASHES, epoch, &payload);
        self.say(frame);
        // An honest backup answers some at once; the others keep the base open.
        if input.arbitrary()? {
            for ask in std::mem::take(&mut self.backup.asked) {
                let wanted = vec![input.arbitrary().unwrap_or(true); ask.hashes.len()];
                let answer = PiecesWanted { of: ask.of, first: ask.first, wanted };
                if self.backup.receiver.wanted(&answer).is_err() {
                    break;
                }
            }
        }
        Ok(())
    }

    fn end(&mut self) {
        let frame = match &self.said {
            Some(said) => {
                let counts = (said.pages, said.sections, said.changes, false);
                self.forge.end_with_disk(said.epoch, counts, said.digest.finish())
            }
            None => self.forge.end(self.next_epoch(), 0, 0, CheckpointDigest(0)),
        };
        self.say(frame);
        self.said = None;
    }

    /// An end that lies in one field: never committed.
    fn false_end(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let Some(said) = &self.said else { return Ok(()) };
        let (mut epoch, mut pages, mut sections, mut digest) =
            (said.epoch, said.pages, said.sections, said.digest.finish());
        let by = input.int_in_range(1..=u64::MAX)?;
        match input.int_in_range(0..=3u8)? {
            0 => epoch = epoch.wrapping_add(by),
            1 => pages = pages.wrapping_add(by),
            2 => sections = sections.wrapping_add(u32::try_from(by | 1).unwrap_or(1)),
            _ => digest.0 ^= u128::from(by),
        }
        let frame = self.forge.end(epoch, pages, sections, digest);
        let before = self.commits;
        self.damage = None;
        self.say(frame);
        assert_eq!(self.commits, before, "a false end was committed");
        self.said = None;
        Ok(())
    }

    fn any_message(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let (kind, length): (u8, usize) = (input.int_in_range(0..=17)?, input.int_in_range(0..=80)?);
        if kind == END {
            return Ok(());
        }
        let payload = input.bytes(length.min(input.len()))?.to_vec();
        let epoch = if input.arbitrary()? { self.epoch() } else { 0 };
        let frame = self.forge.frame(kind, epoch, &payload);
        // Whatever this was, it is no longer what an honest primary said.
        self.said = None;
        self.say(frame);
        Ok(())
    }

    /// From here on the forger is, or claims to be, somebody else.
    fn identity(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let by = input.int_in_range(1..=u64::MAX)?;
        match input.int_in_range(0..=5u8)? {
            0 => self.forge.generation = self.forge.generation.wrapping_add(by),
            1 => self.forge.generation = self.forge.generation.saturating_sub(1),
            2 => self.forge.vm ^= u128::from(by),
            3 => self.forge.incarnation ^= u128::from(by),
            4 => self.forge.sequence = self.forge.sequence.wrapping_add(by),
            _ => self.forge.version = u16::try_from(by % 4).expect("below 4"),
        }
        Ok(())
    }

    /// A sound checkpoint in one go, so that the fuzzer finds its way past the base.
    fn whole_checkpoint(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        if self.last.is_none() && self.backup.receiver.peer().is_none() {
            let hello = self.forge.hello();
            self.say(hello);
        }
        if self.failed {
            return Ok(());
        }
        let (epoch, base) = (self.next_epoch(), self.last.is_none());
        let kind = if base { CheckpointKind::Base } else { CheckpointKind::Delta };
        let fill: u8 = input.arbitrary()?;
        let content = support::page(fill);
        let some: &[u64] = if base { &ALL } else { &ALL[..usize::from(fill % 5)] };
        let indexes: Vec<PageIndex> = some.iter().copied().map(PageIndex).collect();
        let mut said = Said {
            epoch,
            digest: EpochDigest::new(Epoch(epoch), kind),
            memory: self.truth.clone(),
            pages: 0,
            sections: 0,
            changes: 0,
        };
        let mut frames = self.forge.begin(epoch, u8::from(!base));
        if !some.is_empty() {
            let bytes = content.repeat(some.len());
            said.digest.pages(&indexes, &bytes);
            said.pages = u64::try_from(some.len()).expect("at most 5");
            said.memory[..bytes.len()].copy_from_slice(&bytes);
            let runs: Vec<_> = some.iter().map(|page| (*page, 1, 0)).collect();
            let (pages, length) = (u32::try_from(some.len()).expect("5"), u32::try_from(bytes.len()).expect("5 pages"));
            frames.extend(self.forge.frame(PAGES, epoch, &support::pages_payload(0, &runs, pages, length, &bytes)));
        }
        frames.extend(self.forge.end(epoch, said.pages, said.sections, said.digest.finish()));
        self.said = Some(said);
        self.say(frames);
        self.said = None;
        Ok(())
    }

    /// What the backup's own process does meanwhile.
    fn orders(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let receiver = &mut self.backup.receiver;
        let result = match input.int_in_range(0..=6u8)? {
            0 => receiver.raise_generation(Generation(input.int_in_range(0..=5)?)),
            1 => receiver.refuse(RefuseCode::Busy, "another"),
            2 => receiver.goodbye(GoodbyeReason::Stopped, "over\u{7}"),
            3 => receiver.handle_eof(),
            4 => receiver.ack(Epoch(input.arbitrary()?)),
            5 => {
                let frame = self.forge.frame(GOODBYE, 0, &[1, 0, 0, 0]);
                self.say(frame);
                return Ok(());
            }
            _ => Ok(()),
        };
        self.check(result);
        Ok(())
    }
}

/// Makes both checksums of a frame right again.
pub(super) fn seal(frame: &mut [u8]) {
    let payload = crc32fast::hash(&frame[80..]).to_le_bytes();
    frame[16..20].copy_from_slice(&payload);
    let header = crc32fast::hash(&frame[8..80]).to_le_bytes();
    frame[4..8].copy_from_slice(&header);
}
