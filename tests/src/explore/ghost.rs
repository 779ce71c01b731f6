//! What really happened, written down beside the cores and never shown to them.
//!
//! The state of the guest at the end of epoch *k* is named by `(generation, k)`: the generation says which history the epoch belongs to. A generation
//! that began by a takeover has the epochs up to the one that it went on from in common with the generation before it.

use super::setup::{LIVES_MAX, NUMBER_MAX};

const SIZE: usize = NUMBER_MAX as usize + 1;

/// A state of the guest: the end of `epoch` in the history of `generation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Image {
    /// In whose history.
    pub generation: u8,
    /// The end of which epoch.
    pub epoch: u8,
}

/// An image in one byte; 0: none. Generations begin with 1.
type Packed = u8;

fn pack(Image { generation, epoch }: Image) -> Packed {
    generation << 4 | epoch
}

fn unpack(packed: Packed) -> Option<Image> {
    (packed != 0).then_some(Image { generation: packed >> 4, epoch: packed & 15 })
}

/// The log.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Ghost {
    /// For each generation: which image it went on from; generation 0: it booted.
    from: [Packed; SIZE],
    /// For each epoch of which something was let out: by whose history.
    released: [u8; SIZE],
    /// For each life on each node: the last image that it committed as a standby.
    commits: [[Packed; LIVES_MAX as usize + 1]; 2],
    /// The generation of the last boot.
    booted: u8,
    /// The generation of the last permit.
    permitted: u8,
    /// An operator vouched for what the rules cannot know: output may be lost from here on.
    pub forced: bool,
    /// An operator vouched that the other side is off, and the arbiter was not asked: it does not know of that permit.
    pub blind: bool,
    /// The arbiter was restored from a backup.
    pub rolled_back: bool,
    /// A process said that the guest is off for good, and that it is recorded.
    pub stopped: bool,
}

fn at(number: u8) -> usize {
    usize::from(number)
}

impl Ghost {
    /// Whose history an epoch belongs to, seen from `generation`.
    fn branch(&self, generation: u8, epoch: u8) -> u8 {
        let mut generation = generation;
        while let Some(Image { generation: parent, epoch: last }) = unpack(self.from[at(generation)]) {
            if epoch > last {
                break;
            }
            generation = parent;
        }
        generation
    }

    fn root(&self, generation: u8) -> u8 {
        self.branch(generation, 0)
    }

    /// Whether everything that was ever let out is part of `image`'s history; if not, the epoch that is missing.
    pub fn missing_in(&self, image: Image) -> Option<u8> {
        (1..=NUMBER_MAX).find(|epoch| {
            let by = self.released[at(*epoch)];
            by != 0 && (*epoch > image.epoch || self.branch(image.generation, *epoch) != by)
        })
    }

    /// Outputs of `image`'s last epoch leave.
    ///
    /// # Errors
    /// They contradict what is known to be the guest's history by then.
    pub fn release(&mut self, Image { generation, epoch }: Image) -> Result<(), String> {
        if self.forced {
            return Ok(());
        }
        let by = self.branch(generation, epoch);
        if self.root(generation) != self.booted {
            return Err(format!("generation {generation} lets epoch {epoch} out, but {} booted anew", self.booted));
        }
        if self.branch(self.permitted, epoch) != by {
            return Err(format!(
                "generation {generation} lets epoch {epoch} out, which generation {} went on without",
                self.permitted
            ));
        }
        self.released[at(epoch)] = by;
        Ok(())
    }

    /// A standby committed an image.
    pub fn commit(&mut self, node: usize, life: u8, image: Image) {
        self.commits[node][at(life)] = pack(image);
    }

    /// What a life of a standby committed last.
    pub fn committed(&self, node: usize, life: u8) -> Option<Image> {
        unpack(self.commits[node][at(life)])
    }

    /// A permit was made.
    ///
    /// # Errors
    /// G2: generations of permits strictly increase.
    pub fn permit(&mut self, generation: u8) -> Result<(), String> {
        if generation <= self.permitted && !self.blind {
            return Err(format!("G2: a permit for generation {generation} after one for {}", self.permitted));
        }
        self.permitted = self.permitted.max(generation);
        Ok(())
    }

    /// The guest boots anew: what was said before is of no concern any more.
    pub fn boot(&mut self, generation: u8) {
        self.booted = generation;
        self.released = [0; SIZE];
        self.stopped = false;
        self.from[at(generation)] = 0;
    }

    /// A standby goes on from `image`.
    ///
    /// # Errors
    /// The claim of the safety argument: everything that was ever let out belongs to an epoch that the new owner holds. A stopped guest stays off.
    pub fn activate(&mut self, generation: u8, image: Image) -> Result<(), String> {
        self.from[at(generation)] = pack(image);
        if self.forced {
            return Ok(());
        }
        if self.stopped {
            return Err(format!("generation {generation} resurrects a guest that was stopped"));
        }
        match self.missing_in(image) {
            Some(epoch) => Err(format!(
                "generation {generation} goes on from epoch {}, but output of epoch {epoch} was let out by generation {}",
                image.epoch,
                self.released[at(epoch)]
            )),
            None => Ok(()),
        }
    }
}
