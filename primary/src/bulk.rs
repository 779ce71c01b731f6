//! The base: all of guest memory, copied while the guest runs, ended by a first checkpoint. Output stays open meanwhile: it is held only
//! once the base is committed, for the one epoch that makes the backup the one in sync (rule R5).

use replication_proto::Epoch;
use vmm::Machine;

use crate::epoch::{Afterwards, CheckpointError, EpochParts, checkpoint_base};
use crate::link::Link;

/// Pages in one piece of the copy: 1 MiB, so that a command is looked at about every millisecond.
const PIECE_PAGES: usize = 256;
/// The copy ends when a round leaves no more than this many pages: about what an ordinary epoch has.
const FEW_PAGES: usize = 2_048;
/// … or after this many rounds: a guest that writes faster than the link sends never gets below.
const ROUNDS_MAX: usize = 8;

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
    machine.track_dirty(true)?;
    link.begin_base(epoch)?;
    let everything: Vec<_> = machine.ram().pages().collect();
    send_pages(machine, parts, link, &everything, interrupted)?;
    drop(everything);

    for _ in 0..ROUNDS_MAX {
        let dirty = machine.take_dirty()?;
        let few = dirty.len() <= FEW_PAGES;
        let pages: Vec<_> = dirty.iter().collect();
        send_pages(machine, parts, link, &pages, interrupted)?;
        // Sent, not committed: but the base is all or nothing, and a failure copies all of RAM anew.
        dirty.retire();
        if few {
            break;
        }
    }
    checkpoint_base(machine, parts, link, epoch, Afterwards::RunsOn)
}

fn send_pages(
    machine: &mut dyn Machine,
    parts: &EpochParts,
    link: &Link,
    pages: &[vmm::PageNo],
    interrupted: &mut Interrupted<'_>,
) -> Result<(), CheckpointError> {
    for piece in pages.chunks(PIECE_PAGES) {
        if interrupted() {
            return Err(CheckpointError::LinkLost);
        }
        link.wait_for_room(&parts.arena)?;
        let staged = parts.arena.stage_pages(machine.ram(), piece.len(), piece.iter().copied())?;
        link.base_pages(staged)?;
    }
    Ok(())
}
