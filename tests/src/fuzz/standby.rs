//! The backup's own state machines (inbox, commits, inbound frames), driven by what a link could tell them.

use arbitrary::Unstructured;
use backup::commit::{Commits, Holding};
use backup::inbound::Inbound;
use backup::inbox::{Destination, Inbox, PageBatch};
use replication_proto::{CheckpointKind, EndOfCheckpoint, Epoch, EpochDigest, PageIndex};

const STEPS: usize = 400;
const INBOX_LIMIT: usize = 40 << 10;
const BACKLOG_LIMIT: usize = 20 << 10;

/// Target `standby`.
///
/// What is held grows by one verified epoch at a time; acknowledgements come in order, each once, never beyond what is held, never
/// while the backlog is over its limit, never after the end; the inbox keeps no more than its limit.
pub fn standby(data: &[u8]) {
    let mut standby = Standby::new();
    let mut input = Unstructured::new(data);
    for _ in 0..STEPS {
        if input.is_empty() || standby.step(&mut input).is_err() {
            break;
        }
    }
}

struct Arriving {
    epoch: u64,
    kind: CheckpointKind,
    digest: EpochDigest,
    pages: u64,
    sections: u32,
}

struct Standby {
    inbox: Inbox,
    commits: Commits,
    inbound: Inbound,
    arriving: Option<Arriving>,
    unapplied: Vec<usize>,
    acked: Option<Epoch>,
    kept: Vec<(u64, u8)>,
    closed: bool,
}

fn is_held(holding: Holding, epoch: Epoch) -> bool {
    matches!(holding, Holding::Whole(held) if epoch <= held)
}

impl Standby {
    fn new() -> Self {
        Self {
            inbox: Inbox::new(INBOX_LIMIT),
            commits: Commits::new(BACKLOG_LIMIT),
            inbound: Inbound::default(),
            arriving: None,
            unapplied: Vec::new(),
            acked: None,
            kept: Vec::new(),
            closed: false,
        }
    }

    fn next(&self) -> u64 {
        match self.commits.holding() {
            Holding::Hollow => 5,
            Holding::Whole(epoch) => epoch.0.wrapping_add(1),
        }
    }

    fn step(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        match input.int_in_range(0..=15u8)? {
            0..=2 => self.begin(input)?,
            3..=5 => self.pages(input)?,
            6 => self.section(input)?,
            7..=9 => self.end(input)?,
            10 => {
                if let Some(bytes) = self.unapplied.pop() {
                    self.commits.applied(bytes);
                }
            }
            11 | 12 => self.acks(),
            13 => {
                // The connection is gone, and with it what was incomplete.
                self.commits.connection_lost();
                assert_eq!(self.inbox.drop_incomplete(), self.arriving.take().is_some());
                assert!(self.commits.acks_due().is_empty());
                self.acked = None;
            }
            14 => self.frame(input)?,
            _ if input.ratio(1, 20)? => {
                let held = self.commits.holding();
                assert_eq!(self.commits.close(), held);
                self.closed = true;
            }
            _ => {}
        }
        assert_eq!(self.commits.backlog_bytes(), self.unapplied.iter().sum::<usize>());
        Ok(())
    }

    fn begin(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let epoch = if input.ratio(1, 8)? { input.int_in_range(1..=u64::MAX - 1)? } else { self.next() };
        let base = (self.commits.holding() == Holding::Hollow) != input.ratio(1, 12)?;
        let kind = if base { CheckpointKind::Base } else { CheckpointKind::Delta };
        let result = self.inbox.begin(Epoch(epoch), kind);
        assert_eq!(result.is_ok(), self.arriving.is_none());
        if result.is_ok() {
            let digest = EpochDigest::new(Epoch(epoch), kind);
            self.arriving = Some(Arriving { epoch, kind, digest, pages: 0, sections: 0 });
            if base {
                // As the link does it.
                self.commits.begin_base();
                self.inbound.clear();
                self.kept.clear();
                self.acked = None;
                assert_eq!(self.commits.holding(), Holding::Hollow);
            }
        }
        Ok(())
    }

    fn pages(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let count = input.int_in_range(0..=3u64)?;
        let indexes: Vec<PageIndex> = (0..count).map(PageIndex).collect();
        let bytes = vec![input.arbitrary::<u8>()?; indexes.len() * 4096];
        let batch = PageBatch { indexes: indexes.clone(), bytes: bytes.clone().into() };
        let result = self.inbox.pages(batch.clone());
        let Some(arriving) = &mut self.arriving else {
            assert!(result.is_err(), "pages of no checkpoint");
            return Ok(());
        };
        arriving.digest.pages(&indexes, &bytes);
        arriving.pages += count;
        match (result, arriving.kind) {
            (Ok(Destination::Hollow(given)), CheckpointKind::Base) => assert_eq!(given, batch),
            (Ok(Destination::Kept), CheckpointKind::Delta) => {}
            (Err(_), CheckpointKind::Delta) => self.lost(),
            (other, kind) => panic!("{other:?} for a {kind:?}"),
        }
        Ok(())
    }

    fn section(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let bytes = vec![1; input.int_in_range(0..=9000)?];
        let result = self.inbox.section(3, 1, &bytes);
        if let Some(arriving) = &mut self.arriving {
            arriving.digest.section(3, 1, &bytes);
            arriving.sections += 1;
        }
        if result.is_err() && self.arriving.is_some() {
            self.lost();
        }
        Ok(())
    }

    /// An error ends the connection.
    fn lost(&mut self) {
        assert!(self.inbox.drop_incomplete());
        self.arriving = None;
        self.commits.connection_lost();
        self.acked = None;
    }

    fn end(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let Some(Arriving { epoch, kind, digest, pages, sections }) = self.arriving.take() else {
            assert!(self.inbox.take().is_err());
            return Ok(());
        };
        let mut end = EndOfCheckpoint {
            epoch: Epoch(epoch),
            kind,
            pages,
            sections,
            disk_changes: 0,
            flushed: false,
            digest: digest.finish(),
        };
        let lie = input.int_in_range(0..=15u8)?;
        match lie {
            0 => end.epoch.0 ^= 1,
            1 => end.pages ^= 1,
            2 => end.sections ^= 1,
            3 => end.digest.0 ^= 1,
            _ => {}
        }
        let before = self.commits.holding();
        let follows = match (kind, before) {
            (CheckpointKind::Base, Holding::Hollow) => true,
            (CheckpointKind::Delta, Holding::Whole(last)) => last.checked_next() == Some(Epoch(epoch)),
            _ => false,
        };
        let arrived = self.inbox.take().expect("a checkpoint is under way");
        match self.commits.commit(arrived, &end) {
            Ok(committed) => {
                assert!(lie > 3 && follows && !self.closed, "committed: {end:?} after {before:?}");
                assert_eq!(self.commits.holding(), Holding::Whole(Epoch(epoch)));
                assert!(committed.bytes() <= INBOX_LIMIT);
                self.unapplied.push(committed.bytes());
                self.inbound.committed(end.epoch);
                // Frames are in the order of their arrival: one of a later epoch keeps those behind it.
                while self.kept.first().is_some_and(|(of, _)| *of <= epoch) {
                    self.kept.remove(0);
                }
            }
            Err(_) => {
                assert!(lie <= 3 || !follows || self.closed, "refused: {end:?} after {before:?}");
                assert_eq!(self.commits.holding(), before, "an error changed what is held");
                self.commits.connection_lost();
                self.acked = None;
            }
        }
        Ok(())
    }

    fn acks(&mut self) {
        let over = self.commits.backlog_bytes() > BACKLOG_LIMIT;
        for epoch in self.commits.acks_due() {
            assert!(!over && !self.closed, "{epoch} is acknowledged");
            assert!(is_held(self.commits.holding(), epoch), "{epoch} is acknowledged and not held");
            assert!(
                self.acked.is_none_or(|acked| acked.checked_next() == Some(epoch)),
                "{:?}, then {epoch}",
                self.acked
            );
            self.acked = Some(epoch);
        }
    }

    fn frame(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let (epoch, nic) = (input.int_in_range(1..=12)?, input.int_in_range(0..=1)?);
        self.inbound.keep(Epoch(epoch), nic, &[1, 2, 3]);
        self.kept.push((epoch, nic));
        for nic in [0, 1] {
            assert_eq!(self.inbound.of(nic).len(), self.kept.iter().filter(|(_, of)| *of == nic).count());
        }
        Ok(())
    }
}
