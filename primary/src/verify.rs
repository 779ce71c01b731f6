//! Comparing both sides while the pair is protected: with each checkpoint go the hashes of a small part of memory or of a disk, as of the end of that epoch;
//! the backup compares once it has applied the epoch, and says what it found. Nobody stops for it, and protection does not drop. Pure but for the reading.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use failover::decide::CommandOutcome;
use replication_proto::limits::{DISK_PIECE_BYTES, MAX_PIECES_PER_MESSAGE, MAX_VERIFY_FINDINGS};
use replication_proto::{Comparable, Epoch, PieceHashes, RamLayout, Verified, disk_pieces, piece_hash};
use vmm::disk::Disk;
use vmm::memory::NotRam;
use vmm::{GuestRam, PAGE_SIZE, PageNo, Section, SectionKind};

/// The section that carries the hashes.
pub const VERIFY_SECTION: SectionKind = SectionKind(SectionKind::FIRST_FOREIGN.0 + 2);
/// Version of its encoding.
pub const VERIFY_VERSION: u16 = 1;
/// Pieces that one epoch compares: 1 MiB, hashed in about 0.1 ms of the pause.
const PIECES_AN_EPOCH: u64 = 256;

/// Why hashes that came with a checkpoint cannot be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the hashes of a comparison cannot be read (version {version}, {length} bytes)")]
pub struct UnreadableHashes {
    /// As received.
    pub version: u16,
    /// As received, in bytes.
    pub length: usize,
}

/// Consecutive pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Of what.
    pub of: Comparable,
    /// The first piece.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// One comparison of everything.
#[derive(Clone, Debug)]
pub struct Verification {
    waiting: VecDeque<Part>,
    /// Parts that went with an epoch and were not answered.
    asked: VecDeque<(Epoch, u64)>,
    pieces: u64,
    compared: u64,
    differing: Vec<(Comparable, u64)>,
}

/// What a comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Pieces that there are: pages of memory, and 4 KiB of disks.
    pub pieces: u64,
    /// Pieces that were compared.
    pub compared: u64,
    /// The first that differ.
    pub differing: Vec<(Comparable, u64)>,
}

impl Findings {
    /// How far it is.
    pub fn progress(&self) -> String {
        let percent = self.compared.saturating_mul(100) / self.pieces.max(1);
        format!("{percent} % compared ({} of {} pieces of 4 KiB)", self.compared, self.pieces)
    }

    /// What an operator is told when everything was compared.
    pub fn outcome(&self) -> CommandOutcome {
        if self.differing.is_empty() {
            return CommandOutcome::Done(format!("both sides are equal: {} pieces of 4 KiB compared", self.compared));
        }
        let name = |(of, piece): &(Comparable, u64)| match of {
            Comparable::Memory => format!("memory page {piece:#x}"),
            Comparable::Disk(disk) => format!("disk {disk} at byte {:#x}", piece * DISK_PIECE_BYTES),
        };
        let named: Vec<String> = self.differing.iter().map(name).collect();
        let text = format!(
            "the backup's copy DIFFERS: {}; have it copied anew with `ftctl unprotect` and `ftctl protect`",
            named.join(", ")
        );
        CommandOutcome::Refused(text)
    }

    /// What an operator is told when protection ended before that.
    pub fn broken_off(&self) -> CommandOutcome {
        let found = if self.differing.is_empty() { "nothing differed so far" } else { "differences were found" };
        let text = format!("protection ended at {}; {found}: ask again when it is back", self.progress());
        CommandOutcome::Refused(text)
    }
}

impl Verification {
    /// Of all of memory and of disks of these sizes in bytes.
    pub fn new(ram: &RamLayout, disks: &[u64]) -> Self {
        let memory = ram.ranges().iter().map(|range| (Comparable::Memory, range.first.0, range.pages));
        let disks = (0u8..).zip(disks).map(|(disk, bytes)| (Comparable::Disk(disk), 0, disk_pieces(*bytes)));
        let mut waiting = VecDeque::new();
        let mut pieces = 0;
        for (of, mut first, mut left) in memory.chain(disks) {
            pieces += left;
            while left > 0 {
                let count = left.min(PIECES_AN_EPOCH);
                waiting.push_back(Part { of, first, count });
                first += count;
                left -= count;
            }
        }
        Self { waiting, asked: VecDeque::new(), pieces, compared: 0, differing: Vec::new() }
    }

    /// The part that goes with `epoch`, which ends now.
    pub fn next_part(&mut self, epoch: Epoch) -> Option<Part> {
        let part = self.waiting.pop_front()?;
        self.asked.push_back((epoch, part.count));
        Some(part)
    }

    /// The backup's findings of `epoch`. What was not asked, or is no answer to it, is not counted.
    pub fn found(&mut self, epoch: Epoch, found: &Verified) {
        let Some(at) = self.asked.iter().position(|asked| *asked == (epoch, found.compared)) else { return };
        self.asked.remove(at);
        self.compared += found.compared;
        let room = MAX_VERIFY_FINDINGS.saturating_sub(self.differing.len());
        self.differing.extend(found.differing.iter().take(room));
    }

    /// Everything was compared.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.asked.is_empty()
    }

    /// What was found so far.
    pub fn findings(&self) -> Findings {
        Findings { pieces: self.pieces, compared: self.compared, differing: self.differing.clone() }
    }
}

/// The comparison of the moment, if there is one: the runner's thread takes its parts, the link's brings the answers, an operator looks.
pub struct Verifier {
    images: Vec<Arc<dyn Disk>>,
    current: Mutex<Option<Verification>>,
}

/// Why a part could not be hashed.
#[derive(Debug, thiserror::Error)]
pub enum HashError {
    /// A page of the machine's own list is not RAM.
    #[error(transparent)]
    NotRam(#[from] NotRam),
    /// An image cannot be read.
    #[error("a disk cannot be read: {0}")]
    Disk(#[from] std::io::Error),
}

impl Verifier {
    /// Of a machine with these disks.
    pub fn new(images: Vec<Arc<dyn Disk>>) -> Self {
        Self { images, current: Mutex::new(None) }
    }

    /// Begins anew.
    pub fn start(&self, ram: &RamLayout) {
        let disks: Vec<u64> = self.images.iter().map(|image| image.bytes()).collect();
        *self.lock() = Some(Verification::new(ram, &disks));
    }

    /// Ends, whole or not.
    pub fn stop(&self) {
        *self.lock() = None;
    }

    /// Whether parts wait for epochs to go with.
    pub fn wants_epochs(&self) -> bool {
        self.lock().as_ref().is_some_and(|current| !current.is_done())
    }

    /// What was found so far, and whether that is everything. `None` when nothing is under way.
    pub fn findings(&self) -> Option<(Findings, bool)> {
        self.lock().as_ref().map(|current| (current.findings(), current.is_done()))
    }

    /// What goes with `epoch`, which ends now. Only while the guest is paused.
    ///
    /// # Errors
    /// See [`HashError`].
    pub fn section(&self, epoch: Epoch, ram: &GuestRam) -> Result<Option<Section>, HashError> {
        let part = self.lock().as_mut().and_then(|current| current.next_part(epoch));
        let Some(part) = part else { return Ok(None) };
        let hashes = match part.of {
            Comparable::Memory => hash_memory(ram, part)?,
            Comparable::Disk(disk) => {
                let image = self.images.get(usize::from(disk)).expect("a comparison of this machine's disks");
                hash_disk(&**image, part)?
            }
        };
        Ok(Some(hashes_section(&hashes)))
    }

    /// The backup's findings of `epoch`.
    pub fn found(&self, epoch: Epoch, found: &Verified) {
        if let Some(current) = self.lock().as_mut() {
            current.found(epoch, found);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Verification>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hashes of a part of memory. Only while the guest is paused.
///
/// # Errors
/// A page of the machine's own list is not RAM.
pub fn hash_memory(ram: &GuestRam, part: Part) -> Result<PieceHashes, NotRam> {
    let mut page = [0; PAGE_SIZE];
    let hashes = (part.first..part.first + part.count).map(|number| {
        ram.copy_out(PageNo(number), &mut page)?;
        Ok(piece_hash(&page))
    });
    Ok(PieceHashes { of: part.of, first: part.first, hashes: hashes.collect::<Result<_, NotRam>>()? })
}

/// Hashes of a part of a disk that nobody changes now.
///
/// # Errors
/// The image cannot be read.
pub fn hash_disk(image: &dyn Disk, part: Part) -> std::io::Result<PieceHashes> {
    let offset = part.first * DISK_PIECE_BYTES;
    let len = (part.count * DISK_PIECE_BYTES).min(image.bytes().saturating_sub(offset));
    let mut bytes = vec![0; usize::try_from(len).map_err(std::io::Error::other)?];
    image.read(offset, &mut bytes)?;
    let hashes = bytes.chunks(usize::try_from(DISK_PIECE_BYTES).map_err(std::io::Error::other)?).map(piece_hash);
    Ok(PieceHashes { of: part.of, first: part.first, hashes: hashes.collect() })
}

/// The hashes as a section.
pub fn hashes_section(hashes: &PieceHashes) -> Section {
    let PieceHashes { of, first, hashes } = hashes;
    let (kind, disk) = match of {
        Comparable::Memory => (0, 0),
        Comparable::Disk(disk) => (1, *disk),
    };
    let mut bytes = vec![kind, disk];
    bytes.extend(first.to_le_bytes());
    hashes.iter().for_each(|hash| bytes.extend(hash.to_le_bytes()));
    Section { kind: VERIFY_SECTION, version: VERIFY_VERSION, bytes }
}

/// Reads the section. Nothing in it is believed: whether the pieces exist is the caller's to check.
///
/// # Errors
/// [`UnreadableHashes`].
pub fn read_hashes(section: &Section) -> Result<PieceHashes, UnreadableHashes> {
    let Section { kind: _, version, bytes } = section;
    let unreadable = UnreadableHashes { version: *version, length: bytes.len() };
    let (head, rest) = bytes.split_first_chunk::<10>().ok_or(unreadable)?;
    let (hashes, left) = rest.as_chunks::<16>();
    let [kind, disk, first @ ..] = *head;
    let of = match (kind, disk) {
        (0, 0) => Comparable::Memory,
        (1, disk) => Comparable::Disk(disk),
        _ => return Err(unreadable),
    };
    if *version != VERIFY_VERSION || !left.is_empty() || hashes.is_empty() || hashes.len() > MAX_PIECES_PER_MESSAGE {
        return Err(unreadable);
    }
    let hashes = hashes.iter().map(|hash| u128::from_le_bytes(*hash)).collect();
    Ok(PieceHashes { of, first: u64::from_le_bytes(first), hashes })
}

/// Which of `theirs` differ from `ours`, as a finding.
pub fn compare(theirs: &PieceHashes, ours: &PieceHashes) -> Verified {
    let pairs = (theirs.first..).zip(theirs.hashes.iter().zip(&ours.hashes));
    let differing = pairs.filter(|(_, (theirs, ours))| theirs != ours).map(|(piece, _)| (theirs.of, piece));
    let compared = u64::try_from(theirs.hashes.len().min(ours.hashes.len())).unwrap_or(u64::MAX);
    Verified { compared, differing: differing.take(MAX_VERIFY_FINDINGS).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replication_proto::{PageIndex, PageRange};

    fn layout(ram: &GuestRam) -> RamLayout {
        let ranges = ram.regions().iter().map(|r| PageRange { first: PageIndex(r.first.0), pages: r.pages });
        RamLayout::new(ranges.collect()).unwrap()
    }

    fn run(ram: &GuestRam, copy: &GuestRam, disks: &[u64]) -> Verification {
        let mut verification = Verification::new(&layout(ram), disks);
        for epoch in (1..).map(Epoch) {
            let Some(part) = verification.next_part(epoch) else { break };
            if let Comparable::Disk(_) = part.of {
                verification.found(epoch, &Verified { compared: part.count, differing: Vec::new() });
                continue;
            }
            let theirs = read_hashes(&hashes_section(&hash_memory(ram, part).unwrap())).unwrap();
            let ours = hash_memory(copy, Part { of: theirs.of, first: theirs.first, count: part.count }).unwrap();
            assert!(!verification.is_done());
            verification.found(epoch, &compare(&theirs, &ours));
        }
        verification
    }

    #[test]
    fn one_changed_bit_anywhere_is_found_and_named() {
        let (ram, copy) = (GuestRam::new(4 << 20).unwrap(), GuestRam::new(4 << 20).unwrap());
        let same = run(&ram, &copy, &[1 << 20, 512]);
        assert!(same.is_done());
        assert_eq!(same.findings(), Findings { pieces: 1024 + 257, compared: 1024 + 257, differing: vec![] });
        let mut page = [0; PAGE_SIZE];
        page[4095] = 128;
        copy.copy_in(PageNo(1023), &page).unwrap();
        copy.copy_in(PageNo(256), &page).unwrap();
        let found = run(&ram, &copy, &[]).findings().differing;
        assert_eq!(found, [(Comparable::Memory, 256), (Comparable::Memory, 1023)]);
    }

    #[test]
    fn answers_to_nothing_count_for_nothing() {
        let ram = GuestRam::new(2 << 20).unwrap();
        let mut verification = Verification::new(&layout(&ram), &[]);
        verification.next_part(Epoch(5)).unwrap();
        let answer = |compared| Verified { compared, differing: Vec::new() };
        verification.found(Epoch(4), &answer(256));
        verification.found(Epoch(5), &answer(255));
        assert_eq!(verification.findings().compared, 0);
        verification.found(Epoch(5), &answer(256));
        verification.found(Epoch(5), &answer(256));
        assert_eq!(verification.findings().compared, 256);
        assert!(!verification.is_done(), "half of memory was not asked for yet");
    }

    #[test]
    fn nothing_in_a_section_is_believed() {
        let good = hashes_section(&PieceHashes { of: Comparable::Disk(3), first: 9, hashes: vec![1, 2] });
        assert_eq!(read_hashes(&good).unwrap().hashes, [1, 2]);
        for cut in 0..good.bytes.len() {
            let bytes = good.bytes[..cut].to_vec();
            assert_eq!(read_hashes(&Section { bytes, ..good.clone() }).is_ok(), cut == 26);
        }
        assert!(read_hashes(&Section { version: 2, ..good.clone() }).is_err());
        let mut other = good;
        other.bytes[0] = 0;
        assert!(read_hashes(&other).is_err(), "memory has no number");
    }
}
