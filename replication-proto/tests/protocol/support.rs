//! What the tests of this folder share: the two ends of a link in one place, a backup that holds memory, and a second writer of frames,
//! made from docs/protocol.md and not from the sources, that can say anything.

use bytes::Bytes;
use replication_proto::limits::{HEADER_BYTES, MAX_INPUT_BYTES, PAGE_BYTES};
use replication_proto::{
    CheckpointDigest, CheckpointKind, DiskChange, DiskContent, DiskStanding, EndOfCheckpoint, Epoch, EpochDigest,
    Facts, Generation, Identity, Incarnation, LinkError, NodeName, PageIndex, PageRange, PieceHashes, Point, RamLayout,
    Receiver, ReceiverConfig, ReceiverEvent, ReceiverLimits, RefuseCode, Sender, SenderConfig, Standing, VmId,
};

pub(crate) const VM: VmId = VmId(0x6f3c_0000_1111_4222_8333_4444_5555_6666);
pub(crate) const PRIMARY: Incarnation = Incarnation(0xA1A1);
pub(crate) const BACKUP: Incarnation = Incarnation(0xB2B2);
pub(crate) const GENERATION: Generation = Generation(3);

pub(crate) fn identity(node: &str, generation: Generation, incarnation: Incarnation) -> Identity {
    Identity { vm: VM, node: NodeName::new(node).unwrap(), generation, incarnation }
}

pub(crate) fn primary() -> Identity {
    identity("a", GENERATION, PRIMARY)
}

/// A backup that has seen no generation yet.
pub(crate) fn backup() -> Identity {
    identity("b", Generation(0), BACKUP)
}

/// Five pages, with a hole.
pub(crate) fn ram() -> RamLayout {
    let range = |first, pages| PageRange { first: PageIndex(first), pages };
    RamLayout::new(vec![range(0, 3), range(16, 2)]).unwrap()
}

pub(crate) fn all_pages(ram: &RamLayout) -> Vec<PageIndex> {
    ram.ranges().iter().flat_map(|range| (range.first.0..range.first.0 + range.pages).map(PageIndex)).collect()
}

pub(crate) fn facts() -> Facts {
    let mut facts = Facts::new();
    facts.insert("cpuid", "0123456789abcdef").unwrap();
    facts.insert("approx.tsc-khz", "2500000").unwrap();
    facts
}

/// Bytes of the disks of the test machine.
pub(crate) const DISKS: [u64; 2] = [1 << 20, 10 << 10];

/// What the test backup says of its images.
pub(crate) fn standing() -> Standing {
    let base = Some(Point { generation: Generation(2), epoch: Epoch(9) });
    let known = DiskStanding { base, was_owner: true, dirty: Bytes::from_static(&[1, 2, 3]) };
    Standing { warm_memory: true, disks: vec![known, DiskStanding::default()] }
}

pub(crate) fn sender_config(compress: bool) -> SenderConfig {
    SenderConfig {
        identity: primary(),
        ram: ram(),
        disks: DISKS.to_vec(),
        facts: facts(),
        max_in_flight: 4,
        compress_base: compress,
        patches: false,
    }
}

pub(crate) fn receiver_config() -> ReceiverConfig {
    let limits =
        ReceiverLimits { max_epoch_pages: 1000, max_epoch_section_bytes: 1 << 20, max_epoch_disk_bytes: 1 << 20 };
    ReceiverConfig {
        identity: backup(),
        ram: ram(),
        disks: DISKS.to_vec(),
        standing: standing(),
        facts: facts(),
        limits,
    }
}

/// Everything that is queued, as one piece.
pub(crate) fn drain(mut poll: impl FnMut() -> Option<Bytes>) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(bytes) = poll() {
        all.extend_from_slice(&bytes);
    }
    all
}

/// A page whose content says which it is.
pub(crate) fn page(fill: u8) -> Vec<u8> {
    (0..4096u32).map(|n| fill ^ n.to_le_bytes()[0].wrapping_mul(7)).collect()
}

#[derive(Debug)]
struct Incomplete {
    digest: EpochDigest,
    pages: Vec<(Vec<PageIndex>, Bytes)>,
    sections: Vec<(u16, u16, Bytes)>,
    disk: Vec<DiskChange>,
}

/// A backup as small as can be: memory, and the checkpoint that is not whole yet.
#[derive(Debug)]
pub(crate) struct Backup {
    pub(crate) receiver: Receiver,
    pub(crate) ram: RamLayout,
    pub(crate) memory: Vec<u8>,
    pub(crate) sections: Vec<(u16, u16, Bytes)>,
    pub(crate) committed: Vec<EndOfCheckpoint>,
    pub(crate) goodbye: bool,
    pub(crate) inbound: Vec<(Epoch, u8, Bytes)>,
    /// Changes of disks that were committed.
    pub(crate) disk: Vec<DiskChange>,
    pub(crate) asked: Vec<PieceHashes>,
    incomplete: Option<Incomplete>,
}

impl Backup {
    pub(crate) fn new(config: ReceiverConfig) -> Self {
        let bytes = usize::try_from(config.ram.pages()).unwrap() * PAGE_BYTES;
        Self {
            ram: config.ram.clone(),
            receiver: Receiver::new(config),
            memory: vec![0xEE; bytes],
            sections: Vec::new(),
            committed: Vec::new(),
            goodbye: false,
            inbound: Vec::new(),
            disk: Vec::new(),
            asked: Vec::new(),
            incomplete: None,
        }
    }

    /// Takes bytes in pieces of `piece`; what is whole and verified is committed and acked.
    pub(crate) fn feed(&mut self, bytes: &[u8], piece: usize) -> Result<(), LinkError> {
        for bytes in bytes.chunks(piece.min(MAX_INPUT_BYTES)) {
            self.receiver.handle_bytes(bytes)?;
            while let Some(event) = self.receiver.poll_event()? {
                self.handle(event)?;
            }
        }
        Ok(())
    }

    pub(crate) fn answers(&mut self) -> Vec<u8> {
        drain(|| self.receiver.poll_transmit())
    }

    pub(crate) fn last_committed(&self) -> Option<Epoch> {
        self.committed.last().map(|end| end.epoch)
    }

    fn handle(&mut self, event: ReceiverEvent) -> Result<(), LinkError> {
        match event {
            ReceiverEvent::Opened { .. } => {}
            ReceiverEvent::Begin { epoch, kind } => {
                let digest = EpochDigest::new(epoch, kind);
                self.incomplete =
                    Some(Incomplete { digest, pages: Vec::new(), sections: Vec::new(), disk: Vec::new() });
            }
            ReceiverEvent::Pages { indexes, bytes } => {
                let incomplete = self.incomplete.as_mut().unwrap();
                incomplete.digest.pages(&indexes, &bytes);
                incomplete.pages.push((indexes, bytes));
            }
            ReceiverEvent::Section { kind, version, bytes } => {
                let incomplete = self.incomplete.as_mut().unwrap();
                incomplete.digest.section(kind, version, &bytes);
                incomplete.sections.push((kind, version, bytes));
            }
            ReceiverEvent::Disk(change) => {
                let incomplete = self.incomplete.as_mut().unwrap();
                incomplete.digest.disk(&change);
                incomplete.disk.push(change);
            }
            ReceiverEvent::Hashes(ask) => self.asked.push(ask),
            ReceiverEvent::End(end) => self.commit(end)?,
            ReceiverEvent::Inbound { epoch, nic, frame } => self.inbound.push((epoch, nic, frame)),
            ReceiverEvent::Goodbye(_) => self.goodbye = true,
        }
        Ok(())
    }

    fn commit(&mut self, end: EndOfCheckpoint) -> Result<(), LinkError> {
        let incomplete = self.incomplete.take().unwrap();
        if incomplete.digest.finish() != end.digest {
            return self.receiver.refuse(RefuseCode::Misbehaved, "wrong digest");
        }
        for (indexes, bytes) in &incomplete.pages {
            for (index, page) in indexes.iter().zip(bytes.chunks(PAGE_BYTES)) {
                let at = usize::try_from(self.ram.position(*index).unwrap()).unwrap() * PAGE_BYTES;
                self.memory[at..at + PAGE_BYTES].copy_from_slice(page);
            }
        }
        self.sections = incomplete.sections;
        self.disk.extend(incomplete.disk);
        self.committed.push(end);
        self.receiver.ack(end.epoch)
    }
}

/// A session from hello to goodbye: what the primary said, what the backup answered, and the backup's memory after each commit.
pub(crate) struct Session {
    pub(crate) to_backup: Vec<u8>,
    pub(crate) to_primary: Vec<u8>,
    pub(crate) memory_after: Vec<Vec<u8>>,
    pub(crate) epochs: Vec<Epoch>,
}

/// The base (epoch 7: data, zero and repeated pages), two deltas, one of them empty, sections of several sizes, a goodbye.
pub(crate) fn session(compress: bool) -> Session {
    let mut sender = Sender::new(sender_config(compress));
    let mut backup = Backup::new(receiver_config());
    let (mut to_backup, mut to_primary, mut memory_after) = (Vec::new(), Vec::new(), Vec::new());
    let mut exchange = |sender: &mut Sender, backup: &mut Backup| {
        let said = drain(|| sender.poll_transmit());
        backup.feed(&said, usize::MAX).unwrap();
        let answered = backup.answers();
        sender.handle_bytes(&answered).unwrap();
        to_backup.extend(said);
        to_primary.extend(answered);
    };
    exchange(&mut sender, &mut backup);
    sender.begin(Epoch(7), CheckpointKind::Base).unwrap();
    let zero = vec![0; PAGE_BYTES];
    let pages = |indexes: &[u64]| indexes.iter().copied().map(PageIndex).collect::<Vec<_>>();
    sender.pages(&pages(&[0, 1, 2]), &[page(1), zero.clone(), zero.clone()].concat()).unwrap();
    sender.pages_shared(&pages(&[16, 17, 2]), &Bytes::from([zero.clone(), page(2), zero.clone()].concat())).unwrap();
    sender.section(0x0100, 1, b"vcpu").unwrap();
    sender.section(0x0600, 2, &page(9).repeat(2)).unwrap();
    sender.end(false).unwrap();
    exchange(&mut sender, &mut backup);
    memory_after.push(backup.memory.clone());
    sender.begin(Epoch(8), CheckpointKind::Delta).unwrap();
    sender.pages(&pages(&[17, 0]), &[zero, page(3)].concat()).unwrap();
    sender.section(0x0100, 1, b"vcpu later").unwrap();
    let change = |disk, offset, content| DiskChange { disk, offset, content };
    sender.disk_change(&change(0, 512, DiskContent::Bytes(Bytes::from(page(4))))).unwrap();
    sender.disk_change(&change(1, 0, DiskContent::Zeros(10 << 10))).unwrap();
    sender.end(true).unwrap();
    exchange(&mut sender, &mut backup);
    memory_after.push(backup.memory.clone());
    sender.begin(Epoch(9), CheckpointKind::Delta).unwrap();
    sender.section(0xF000, 0, b"").unwrap();
    sender.end(false).unwrap();
    exchange(&mut sender, &mut backup);
    memory_after.push(backup.memory.clone());
    sender.goodbye(replication_proto::GoodbyeReason::Stopped, "power off").unwrap();
    exchange(&mut sender, &mut backup);
    assert!(backup.goodbye);
    let epochs = backup.committed.iter().map(|end| end.epoch).collect();
    Session { to_backup, to_primary, memory_after, epochs }
}

/// Where each frame starts, and the end of the last; from the length field alone.
pub(crate) fn frame_starts(stream: &[u8]) -> Vec<usize> {
    let mut starts = vec![0];
    let mut at = 0;
    while at < stream.len() {
        let length = u32::from_le_bytes(stream[at + 12..at + 16].try_into().unwrap());
        at += HEADER_BYTES + length as usize;
        starts.push(at);
    }
    assert_eq!(at, stream.len());
    starts
}

pub(crate) const HELLO: u8 = 1;
pub(crate) const ACCEPT: u8 = 2;
pub(crate) const REFUSE: u8 = 3;
pub(crate) const BEGIN: u8 = 4;
pub(crate) const PAGES: u8 = 5;
pub(crate) const SECTION: u8 = 6;
pub(crate) const END: u8 = 7;
pub(crate) const ACK: u8 = 8;
pub(crate) const HEARTBEAT: u8 = 9;
pub(crate) const GOODBYE: u8 = 10;
pub(crate) const INBOUND: u8 = 11;
pub(crate) const DISK_CHANGE: u8 = 12;
pub(crate) const HASHES: u8 = 13;
pub(crate) const WANTED: u8 = 14;

/// Writes frames whose checksums are right, whatever they say.
#[derive(Debug, Clone)]
pub(crate) struct Forge {
    pub(crate) version: u16,
    pub(crate) flags: u8,
    pub(crate) sequence: u64,
    pub(crate) generation: u64,
    pub(crate) vm: u128,
    pub(crate) incarnation: u128,
}

impl Forge {
    pub(crate) fn primary() -> Self {
        Self { version: 1, flags: 0, sequence: 0, generation: GENERATION.0, vm: VM.0, incarnation: PRIMARY.0 }
    }

    pub(crate) fn backup() -> Self {
        Self { incarnation: BACKUP.0, ..Self::primary() }
    }

    pub(crate) fn frame(&mut self, message: u8, epoch: u64, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap();
        self.frame_of_length(message, epoch, payload, length)
    }

    pub(crate) fn frame_of_length(&mut self, message: u8, epoch: u64, payload: &[u8], length: u32) -> Vec<u8> {
        let checked = [
            &self.version.to_le_bytes()[..],
            &[message, self.flags],
            &length.to_le_bytes(),
            &crc32fast::hash(payload).to_le_bytes(),
            &[0; 4],
            &self.sequence.to_le_bytes(),
            &epoch.to_le_bytes(),
            &self.generation.to_le_bytes(),
            &self.vm.to_le_bytes(),
            &self.incarnation.to_le_bytes(),
        ]
        .concat();
        self.sequence = self.sequence.wrapping_add(1);
        [b"FTCS", &crc32fast::hash(&checked).to_le_bytes()[..], &checked, payload].concat()
    }

    pub(crate) fn hello(&mut self) -> Vec<u8> {
        self.frame(HELLO, 0, &hello_payload())
    }

    /// The same, with these abilities offered.
    pub(crate) fn hello_offering(&mut self, abilities: u8) -> Vec<u8> {
        let mut payload = hello_payload();
        payload[8] = abilities;
        self.frame(HELLO, 0, &payload)
    }

    pub(crate) fn accept(&mut self) -> Vec<u8> {
        self.frame(ACCEPT, 0, &accept_payload(1, 1, "b"))
    }

    pub(crate) fn begin(&mut self, epoch: u64, kind: u8) -> Vec<u8> {
        self.frame(BEGIN, epoch, &[kind, 0, 0, 0, 0, 0, 0, 0])
    }

    pub(crate) fn end(&mut self, epoch: u64, pages: u64, sections: u32, digest: CheckpointDigest) -> Vec<u8> {
        self.end_with_disk(epoch, (pages, sections, 0, false), digest)
    }

    /// Counts are pages, sections and changes of disks; then whether there was a flush.
    pub(crate) fn end_with_disk(
        &mut self,
        epoch: u64,
        (pages, sections, changes, flushed): (u64, u32, u64, bool),
        digest: CheckpointDigest,
    ) -> Vec<u8> {
        let payload = [
            &pages.to_le_bytes()[..],
            &changes.to_le_bytes(),
            &sections.to_le_bytes(),
            &[u8::from(flushed), 0, 0, 0],
            &digest.0.to_le_bytes()[..],
        ]
        .concat();
        self.frame(END, epoch, &payload)
    }

    /// Hello and an all-zero base of epoch 7: what comes after it is epoch 8.
    pub(crate) fn opening(&mut self) -> Vec<u8> {
        let hello = self.hello();
        self.opening_after(hello)
    }

    /// The base alone, after this hello.
    pub(crate) fn opening_after(&mut self, hello: Vec<u8>) -> Vec<u8> {
        let begin = self.begin(7, 0);
        let pages = self.frame(PAGES, 7, &pages_payload(0, &[(0, 3, 1), (16, 2, 1)], 5, 0, &[]));
        let mut digest = EpochDigest::new(Epoch(7), CheckpointKind::Base);
        digest.pages(&all_pages(&ram()), &[0; 5 * PAGE_BYTES]);
        let end = self.end(7, 5, 0, digest.finish());
        [hello, begin, pages, end].concat()
    }
}

/// The hello of [`sender_config`].
pub(crate) fn hello_payload() -> Vec<u8> {
    let mut payload = vec![1, 0, 0, 0];
    payload.extend([1u16, 1].map(u16::to_le_bytes).concat());
    payload.extend([1u64, 0].map(u64::to_le_bytes).concat());
    payload.extend(b"\x01a");
    payload.extend(2u16.to_le_bytes());
    payload.extend([0u64, 3, 16, 2].map(u64::to_le_bytes).concat());
    payload.extend(2u16.to_le_bytes());
    payload.extend(b"\x0eapprox.tsc-khz\x07\x002500000");
    payload.extend(b"\x05cpuid\x10\x000123456789abcdef");
    payload
}

pub(crate) fn accept_payload(version: u16, features: u64, node: &str) -> Vec<u8> {
    let length = u8::try_from(node.len()).unwrap();
    // The standing of `standing()`: warm memory, two disks, of which the first is known but for three bytes' worth of blocks.
    let known = [&2u64.to_le_bytes()[..], &9u64.to_le_bytes(), &[1, 0, 0, 0], &3u32.to_le_bytes(), &[1, 2, 3]].concat();
    let unknown = [0; 24];
    let head = [&version.to_le_bytes()[..], &[0; 6], &features.to_le_bytes(), &[length], node.as_bytes()].concat();
    [&head[..], &[1, 2], &known, &unknown].concat()
}

/// Runs are (first page, pages, kind).
pub(crate) fn pages_payload(encoding: u8, runs: &[(u64, u32, u32)], pages: u32, data: u32, body: &[u8]) -> Vec<u8> {
    let count = u16::try_from(runs.len()).unwrap();
    let mut payload = vec![encoding, 0];
    payload.extend(count.to_le_bytes());
    payload.extend([pages, data, 0].map(u32::to_le_bytes).concat());
    for (first, pages, kind) in runs {
        payload.extend(first.to_le_bytes());
        payload.extend([*pages, *kind].map(u32::to_le_bytes).concat());
    }
    payload.extend(body);
    payload
}

pub(crate) fn section_payload(kind: u16, version: u16, encoding: u8, length: u32, body: &[u8]) -> Vec<u8> {
    let mut payload = [kind, version].map(u16::to_le_bytes).concat();
    payload.extend([encoding, 0, 0, 0]);
    payload.extend(length.to_le_bytes());
    payload.extend([0; 4]);
    payload.extend(body);
    payload
}
