//! The base: all of guest memory, copied while the guest runs, ended by a first checkpoint. Output stays open meanwhile: it is held only
//! once the base is committed, for the one epoch that makes the backup the one in sync (rule R5).

use std::time::{Duration, Instant};

use failover::failpoint;
use replication_proto::mutant::{self, Mutant};
use replication_proto::{Comparable, Epoch, PieceHashes, PiecesWanted, Standing, piece_hash};
use vmm::machine::DirtyError;
use vmm::{Machine, PAGE_SIZE, PageNo, Tracking};

use crate::contention::Vcpus;
use crate::disk::{BlockSet, DiskCopy, DiskStep, OwnerDisks, differing};
use crate::epoch::{Afterwards, CheckpointError, EpochParts, ROOM_PATIENCE, checkpoint_base};
use crate::link::Link;
use crate::metrics::Metrics;
use crate::pacer::BasePacer;
use crate::staging::StagedPages;

/// Pages in one piece of the copy: 1 MiB, so that a command is looked at about every millisecond.
const PIECE_PAGES: usize = 256;
/// The copy ends when a round leaves no more than this many pages: about what an ordinary epoch has.
const FEW_PAGES: usize = 2_048;
/// … or after this many rounds: a guest that writes faster than the link sends never gets below.
const ROUNDS_MAX: usize = 8;

/// Questions about pieces that may be without an answer at one time.
const QUESTIONS_MAX: usize = 16;

/// What is done next for a base.
#[derive(Debug, PartialEq, Eq)]
pub enum BaseStep {
    /// Ask the backup whether it holds these consecutive pages already.
    Ask(Vec<PageNo>),
    /// Send these pages.
    Send(Vec<PageNo>),
    /// Nothing, before an answer comes.
    Await,
    /// What is left goes with the checkpoint that ends the base.
    End,
}

/// What of the base is copied next. Pages are copied while the guest runs; a round ends when all that was dirty at its beginning is copied,
/// and the first round is all of RAM. Where the backup's memory holds an older checkpoint, the first round asks before it sends.
#[derive(Debug)]
pub struct BaseCopy {
    /// Pages of this round that are still to be copied, in reverse.
    waiting: Vec<PageNo>,
    /// Pages that the backup wants.
    wanted: Vec<PageNo>,
    /// Questions without an answer.
    unanswered: usize,
    /// This round asks first.
    asks: bool,
    rounds: usize,
    few: bool,
}

impl BaseCopy {
    /// Starts recording the guest's writes; everything is to be copied. `warm`: the backup's memory holds an older checkpoint.
    ///
    /// # Errors
    /// The dirty log cannot be switched on.
    pub fn begin(machine: &mut dyn Machine, tracking: Tracking, warm: bool) -> Result<Self, DirtyError> {
        machine.track_dirty(tracking)?;
        let mut waiting: Vec<_> = machine.ram().pages().collect();
        waiting.reverse();
        Ok(Self { waiting, wanted: Vec::new(), unanswered: 0, asks: warm, rounds: 0, few: false })
    }

    /// What to do next. The dirty bit of each page was cleared before this returns, so that what the guest writes during or after the copy is dirty
    /// again.
    ///
    /// # Errors
    /// The dirty log cannot be read.
    pub fn next_step(&mut self, machine: &mut dyn Machine) -> Result<BaseStep, DirtyError> {
        if !self.wanted.is_empty() {
            let rest = self.wanted.len().saturating_sub(PIECE_PAGES);
            return Ok(BaseStep::Send(self.wanted.split_off(rest)));
        }
        if self.asks && !self.waiting.is_empty() {
            return Ok(if self.unanswered < QUESTIONS_MAX { BaseStep::Ask(self.next_run()) } else { BaseStep::Await });
        }
        if self.unanswered > 0 {
            return Ok(BaseStep::Await);
        }
        self.asks = false;
        while self.waiting.is_empty() {
            if self.few || self.rounds == ROUNDS_MAX {
                return Ok(BaseStep::End);
            }
            self.rounds += 1;
            let dirty = machine.take_dirty()?;
            if mutant::is(Mutant::DirtyClearedAfterCopy) {
                dirty.retire();
                return Ok(BaseStep::End);
            }
            self.few = dirty.len() <= FEW_PAGES;
            self.waiting = dirty.iter().collect();
            self.waiting.reverse();
            // Sent, not committed: but the base is all or nothing, and a failure copies all of RAM anew.
            dirty.retire();
        }
        let rest = self.waiting.len().saturating_sub(PIECE_PAGES);
        let mut piece = self.waiting.split_off(rest);
        piece.reverse();
        Ok(BaseStep::Send(piece))
    }

    /// Pages of this round that are still to be copied or asked about.
    pub fn left(&self) -> usize {
        self.waiting.len() + self.wanted.len()
    }

    /// The backup answered a question about pages.
    pub fn answered(&mut self, answer: &PiecesWanted) {
        self.unanswered = self.unanswered.saturating_sub(1);
        let asked = (answer.first..).map(PageNo).zip(&answer.wanted);
        self.wanted.extend(asked.filter(|(_, wanted)| **wanted).map(|(page, _)| page));
    }

    /// The next consecutive pages that wait.
    fn next_run(&mut self) -> Vec<PageNo> {
        self.unanswered += 1;
        let mut run: Vec<PageNo> = Vec::with_capacity(PIECE_PAGES);
        while let Some(page) = self.waiting.last().copied() {
            if run.len() == PIECE_PAGES || run.last().is_some_and(|last| last.0 + 1 != page.0) {
                break;
            }
            self.waiting.pop();
            run.push(page);
        }
        run
    }
}

/// The hashes of staged pages, which are consecutive.
pub fn hashes_of(staged: &StagedPages) -> PieceHashes {
    let first = staged.indexes.first().map_or(0, |page| page.0);
    let hashes = staged.bytes().chunks_exact(PAGE_SIZE).map(piece_hash).collect();
    PieceHashes { of: Comparable::Memory, first, hashes }
}

/// The blocks of each disk that differ, or may.
pub fn blocks_to_look_at(disks: &OwnerDisks, standing: &Standing) -> Vec<BlockSet> {
    let ours = disks.dirty();
    ours.iter().zip(&standing.disks).map(|((base, bits), theirs)| differing((*base, bits), theirs)).collect()
}

/// The pace of one copy, and how far it is, for the status.
struct Pace<'a> {
    metrics: &'a Metrics,
    pacer: BasePacer,
    vcpus: Vcpus,
    began: Instant,
    /// Processor time used until the last pause.
    used: Duration,
}

impl<'a> Pace<'a> {
    fn begin(parts: &'a EpochParts) -> Self {
        let now = Instant::now();
        let pacer = BasePacer::new(parts.base_share, Duration::ZERO);
        let vcpus = Vcpus::find();
        let used = vcpus.others_ran();
        Self { metrics: &parts.metrics, pacer, vcpus, began: now, used }
    }

    /// How long to pause after what was done since the last pause.
    fn pause(&mut self) -> Duration {
        let used = self.vcpus.others_ran();
        let took = used.saturating_sub(std::mem::replace(&mut self.used, used));
        self.pacer.copied(took, self.vcpus.waited(), self.began.elapsed())
    }
}

impl Drop for Pace<'_> {
    fn drop(&mut self) {
        self.metrics.base_ended();
    }
}

/// Whether to go on, asked between two pieces.
pub type Interrupted<'a> = dyn FnMut() -> bool + 'a;

/// Sends the base as of the end of `epoch`, to a backup of this standing.
///
/// # Errors
/// As [`crate::epoch::checkpoint`]; [`CheckpointError::LinkLost`] also when `interrupted` said so.
pub fn send_base(
    machine: &mut dyn Machine,
    parts: &EpochParts,
    link: &Link,
    (epoch, standing): (Epoch, &Standing),
    interrupted: &mut Interrupted<'_>,
) -> Result<(), CheckpointError> {
    if !parts.disks.still_ours().map_err(CheckpointError::DiskRead)? {
        return Err(CheckpointError::SharedDisk);
    }
    // From here on every change of a disk is noted, and every page that is written.
    parts.disks.begin_log(epoch);
    let mut disks = DiskCopy::begin(&*parts.disks, &blocks_to_look_at(&parts.disks, standing));
    failpoint!(BaseBegin => return Err(CheckpointError::LinkLost));
    link.begin_base(epoch)?;
    let mut session = Session { parts, link, interrupted };
    // Disks first: memory changes faster, so its last round shall be short.
    session.send_disks(&mut disks, None, false)?;
    let mut memory = BaseCopy::begin(machine, parts.tracking, standing.warm_memory)?;
    session.send_memory(machine, &mut memory, &mut disks)?;
    session.send_disks(&mut disks, Some(&mut memory), true)?;
    parts.disks.cover(epoch);
    failpoint!(BaseEnd => return Err(CheckpointError::LinkLost));
    checkpoint_base(machine, parts, link, epoch, Afterwards::RunsOn)
}

/// A base under way.
struct Session<'a> {
    parts: &'a EpochParts,
    link: &'a Link,
    interrupted: &'a mut Interrupted<'a>,
}

impl Session<'_> {
    fn check(&mut self) -> Result<(), CheckpointError> {
        if (self.interrupted)() { Err(CheckpointError::LinkLost) } else { Ok(()) }
    }

    /// Sends memory until what is left goes with the checkpoint.
    fn send_memory(
        &mut self,
        machine: &mut dyn Machine,
        memory: &mut BaseCopy,
        disks: &mut DiskCopy,
    ) -> Result<(), CheckpointError> {
        let mut pace = Pace::begin(self.parts);
        loop {
            self.check()?;
            disks.note_changes(&*self.parts.disks);
            self.parts.metrics.base_left(memory.left());
            // A pause is a wait for answers, of which there may be some: the copy goes on with those.
            self.take_answers(pace.pause(), Some(memory), disks)?;
            let stage = |machine: &dyn Machine, pages: &[PageNo]| self.parts.arena.stage_pages(machine.ram(), pages);
            match memory.next_step(machine)? {
                BaseStep::Ask(pages) => self.link.ask(hashes_of(&stage(machine, &pages)?))?,
                BaseStep::Send(pages) => {
                    self.link.wait_for_room(&self.parts.arena)?;
                    let staged = stage(machine, &pages)?;
                    failpoint!(BasePages => return Err(CheckpointError::LinkLost));
                    self.link.base_pages(staged)?;
                }
                BaseStep::Await => self.take_answers(ROOM_PATIENCE, Some(memory), disks)?,
                BaseStep::End => return Ok(()),
            }
        }
    }

    /// Sends disks until few blocks are left, or, to `finish`, until what is left goes with the checkpoint.
    fn send_disks(
        &mut self,
        disks: &mut DiskCopy,
        mut memory: Option<&mut BaseCopy>,
        finish: bool,
    ) -> Result<(), CheckpointError> {
        loop {
            self.check()?;
            if let Some(failure) = self.parts.disks.take_failure() {
                return Err(failure.into());
            }
            self.take_answers(Duration::ZERO, memory.as_deref_mut(), disks)?;
            match disks.next_step(&*self.parts.disks, finish).map_err(CheckpointError::DiskRead)? {
                DiskStep::Ask(ask) => self.link.ask(ask)?,
                DiskStep::Send(pieces) => {
                    for piece in pieces {
                        self.link.disk_piece(piece)?;
                    }
                }
                DiskStep::Await => self.take_answers(ROOM_PATIENCE, memory.as_deref_mut(), disks)?,
                DiskStep::Few | DiskStep::End => return Ok(()),
            }
        }
    }

    fn take_answers(
        &self,
        mut patience: Duration,
        mut memory: Option<&mut BaseCopy>,
        disks: &mut DiskCopy,
    ) -> Result<(), CheckpointError> {
        while let Some(answer) = self.link.next_answer(patience)? {
            match (answer.of, &mut memory) {
                (Comparable::Memory, Some(memory)) => memory.answered(&answer),
                (Comparable::Memory, None) => log::warn!("an answer about memory that nobody asked for"),
                (Comparable::Disk(disk), _) => disks.answered(disk, &answer),
            }
            patience = Duration::ZERO;
        }
        Ok(())
    }
}
