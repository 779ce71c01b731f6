//! What is true of the guest's disk, kept apart from the machinery.

use std::collections::{BTreeMap, BTreeSet};

use super::node::{IMAGE_BYTES, PIECES, SECTORS};

/// When what is in each sector of the pieces came there: the number of the change, which is also what the sector is full of; 0: never changed.
pub type Content = [[u8; SECTORS]; PIECES.len()];

/// The disk at one moment, and the last change of each piece that was completed before the last flush was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Snapshot {
    /// The disk.
    pub content: Content,
    /// Last change of each piece.
    pub changed: [u8; PIECES.len()],
    /// As the last flush found it.
    pub flushed: [u8; PIECES.len()],
}

/// The log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ghost {
    /// Changes so far.
    pub changes: u8,
    /// Changes that somebody else went on without.
    void: BTreeSet<u8>,
    /// The disk of the guest on each node, if one runs there.
    pub running: [Option<Snapshot>; 2],
    /// Whose right to run is over: what it changes is void.
    pub superseded: [bool; 2],
    /// The ends of epochs, by generation and number.
    pub ends: BTreeMap<(u64, u64), Snapshot>,
    /// The least that anybody was promised.
    promised: [u8; PIECES.len()],
}

/// Reads an image: the number in each sector, or why it cannot be.
///
/// # Errors
/// Something is where it never was written, or a sector is a mixture.
pub fn read(image: &[u8]) -> Result<Content, String> {
    let mut content = Content::default();
    assert_eq!(image.len(), usize::try_from(IMAGE_BYTES).expect("small"), "an image of this size");
    for (number, sector) in image.chunks_exact(512).enumerate() {
        if sector.iter().any(|byte| *byte != sector[0]) {
            return Err(format!("sector {number} is a mixture"));
        }
        let place = PIECES.iter().position(|piece| (piece * SECTORS..(piece + 1) * SECTORS).contains(&number));
        match place {
            Some(place) => content[place][number % SECTORS] = sector[0],
            None if sector[0] != 0 => return Err(format!("sector {number} holds {}", sector[0])),
            None => {}
        }
    }
    Ok(content)
}

impl Ghost {
    /// A change begins: its number.
    pub fn begins(&mut self, node: usize) -> u8 {
        self.changes += 1;
        if self.superseded[node] {
            self.void.insert(self.changes);
        }
        self.changes
    }

    /// It was completed.
    pub fn completed(&mut self, node: usize, place: usize, number: u8) {
        if let Some(disk) = &mut self.running[node] {
            disk.content[place] = [number; SECTORS];
            disk.changed[place] = number;
        }
    }

    /// A flush was completed.
    pub fn flushed(&mut self, node: usize) {
        if let Some(disk) = &mut self.running[node] {
            disk.flushed = disk.changed;
        }
    }

    /// Somebody hears what the guest knew at this moment of its last flush.
    pub fn heard(&mut self, told: &Snapshot) {
        for (least, told) in self.promised.iter_mut().zip(told.flushed) {
            *least = told.max(*least);
        }
    }

    /// From this image somebody runs, or could.
    ///
    /// # Errors
    /// It lacks what was promised, or holds what is void.
    pub fn check_promise(&self, image: &[u8]) -> Result<Content, String> {
        let content = read(image)?;
        for (place, sectors) in content.iter().enumerate() {
            let least = self.promised[place];
            if let Some(number) = sectors.iter().find(|number| **number < least || self.void.contains(number)) {
                return Err(format!("piece {place} holds change {number}, a flush promised {least}"));
            }
        }
        Ok(content)
    }

    /// The guest is booted from this image.
    ///
    /// # Errors
    /// See [`Self::check_promise`].
    pub fn boots(&mut self, node: usize, image: &[u8]) -> Result<(), String> {
        let content = self.check_promise(image).map_err(|why| format!("no released flush is lost: booted: {why}"))?;
        let changed = content.map(|sectors| sectors.into_iter().min().unwrap_or(0));
        self.running = [None; 2];
        self.running[node] = Some(Snapshot { content, changed, flushed: changed });
        self.superseded = [true; 2];
        self.superseded[node] = false;
        Ok(())
    }

    /// The guest goes on from the end of an epoch.
    ///
    /// # Errors
    /// The image is not that of the epoch.
    pub fn goes_on(&mut self, node: usize, from: (u64, u64), image: &[u8]) -> Result<(), String> {
        let end = *self.ends.get(&from).ok_or_else(|| format!("epoch {from:?} never ended"))?;
        let content = read(image)?;
        if content != end.content {
            return Err(format!(
                "disk equals epoch: {content:?} after the takeover, {:?} at the end of {from:?}",
                end.content
            ));
        }
        // What the new owner says again of the last committed epoch.
        self.heard(&end);
        let last = end.changed.into_iter().max().unwrap_or(0);
        self.void.extend(last + 1..=self.changes);
        self.superseded = [true; 2];
        self.superseded[node] = false;
        self.running[node] = Some(end);
        self.check_promise(image).map(|_| ()).map_err(|why| format!("no released flush is lost: taken over: {why}"))
    }

    /// The backup says that its image holds the end of a base.
    ///
    /// # Errors
    /// It does not.
    pub fn based(&self, end: (u64, u64), image: &[u8]) -> Result<(), String> {
        let sealed = self.ends.get(&end).ok_or_else(|| format!("base {end:?} never ended"))?;
        let content = read(image)?;
        if content == sealed.content {
            return Ok(());
        }
        Err(format!(
            "a base equals its owner's disk: {content:?} at the backup, {:?} at the end of {end:?}",
            sealed.content
        ))
    }
}
