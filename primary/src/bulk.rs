//! The base: all of guest memory, copied while the guest runs, ended by a first checkpoint. Output stays open meanwhile: it is held only
//! once the base is committed, for the one epoch that makes the backup the one in sync (rule R5).

use failover::failpoint;
use replication_proto::Epoch;
use replication_proto::mutant::{self, Mutant};
use vmm::machine::DirtyError;
use vmm::{Machine, PageNo};

use crate::epoch::{Afterwards, CheckpointError, EpochParts, checkpoint_base};
use crate::link::Link;

/// Pages in one piece of the copy: 1 MiB, so that a command is looked at about every millisecond.
const PIECE_PAGES: usize = 256;
/// The copy ends when a round leaves no more than this many pages: about what an ordinary epoch has.
const FEW_PAGES: usize = 2_048;
/// … or after this many rounds: a guest that writes faster than the link sends never gets below.
const ROUNDS_MAX: usize = 8;

/// What of the base is copied next. Pages are copied while the guest runs; a round ends when all that was dirty at its beginning is copied,
/// and the first round is all of RAM.
#[derive(Debug)]
pub struct BaseCopy {
    /// Pages of this round that are still to be copied, in reverse.
    waiting: Vec<PageNo>,
    rounds: usize,
    few: bool,
}

impl BaseCopy {
    /// Starts recording the guest's writes; everything is to be copied.
    ///
    /// # Errors
    /// The dirty log cannot be switched on.
    pub fn begin(machine: &mut dyn Machine) -> Result<Self, DirtyError> {
        machine.track_dirty(true)?;
        let mut waiting: Vec<_> = machine.ram().pages().collect();
        waiting.reverse();
        Ok(Self { waiting, rounds: 0, few: false })
    }

    /// The next pages to copy. Each one's dirty bit was cleared before this returns, so that what the guest writes during or after the copy is dirty
    /// again. `None`: what is left goes with the checkpoint that ends the base.
    ///
    /// # Errors
    /// The dirty log cannot be read.
    pub fn next_piece(&mut self, machine: &mut dyn Machine) -> Result<Option<Vec<PageNo>>, DirtyError> {
        while self.waiting.is_empty() {
            if self.few || self.rounds == ROUNDS_MAX {
                return Ok(None);
            }
            self.rounds += 1;
            let dirty = machine.take_dirty()?;
            if mutant::is(Mutant::DirtyClearedAfterCopy) {
                dirty.retire();
                return Ok(None);
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
        Ok(Some(piece))
    }
}

/// Whether to go on, asked between two pieces.
pub type Interrupted<'a> = dyn FnMut() -> bool + 'a;

/// Sends the base as of the end of `epoch`.
///
/// # Errors
/// As [`crate::epoch::checkpoint`]; [`CheckpointError::LinkLost`] also when `interrupted` said so.
pub fn send_base(
    machine: &mut dyn Machine,
    parts: &EpochParts,
    link: &Link,
    epoch: Epoch,
    interrupted: &mut Interrupted<'_>,
) -> Result<(), CheckpointError> {
    let mut copy = BaseCopy::begin(machine)?;
    failpoint!(BaseBegin => return Err(CheckpointError::LinkLost));
    link.begin_base(epoch)?;
    while let Some(piece) = copy.next_piece(machine)? {
        if interrupted() {
            return Err(CheckpointError::LinkLost);
        }
        link.wait_for_room(&parts.arena)?;
        let staged = parts.arena.stage_pages(machine.ram(), piece.len(), piece.iter().copied())?;
        failpoint!(BasePages => return Err(CheckpointError::LinkLost));
        link.base_pages(staged)?;
    }
    failpoint!(BaseEnd => return Err(CheckpointError::LinkLost));
    checkpoint_base(machine, parts, link, epoch, Afterwards::RunsOn)
}
