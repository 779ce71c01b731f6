//! What is true of the guest's disk: what each side's image must hold when somebody runs from it, and what a flush promised.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::{Ghost, LifeId};
use crate::world::Who;
use crate::world::guest::{PIECE_BYTES, PIECES, Request, stamped};

const COUNT: usize = 256;
const BYTES: usize = 4096;
const _: () = assert!(PIECES == 256 && PIECE_BYTES == 4096, "the same, as other types");

/// The disk at one moment: a hash of each piece, and when it was changed last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shadow {
    hashes: Arc<[u64; COUNT]>,
    orders: Arc<[u64; COUNT]>,
}

#[derive(Clone, Copy, Debug)]
struct Written {
    piece: u64,
    order: u64,
    life: LifeId,
}

/// All that is known of disks.
#[derive(Debug, Default)]
pub struct Disks {
    /// Changes so far, of whomever.
    order: u64,
    /// The changes that an image may hold, by what they wrote.
    writes: HashMap<u64, Written>,
    /// When each piece was zeroed last.
    zeroed: BTreeMap<u64, u64>,
    /// What each completed flush promised: when each piece was changed last.
    flushes: HashMap<u64, Arc<[u64; COUNT]>>,
    /// The last promise that anybody was told of.
    promised: Option<(u64, Arc<[u64; COUNT]>)>,
    /// The disk of each running guest.
    running: BTreeMap<LifeId, Shadow>,
    /// Disks as of the ends of bases.
    bases: BTreeMap<(LifeId, u64), Shadow>,
}

fn pieces(image: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    (0..).zip(image.chunks_exact(BYTES))
}

fn index(piece: u64) -> usize {
    usize::try_from(piece).expect("a small disk")
}

fn differing(shadow: &Shadow, image: &[u8]) -> Vec<u64> {
    let differs = |(piece, bytes): &(u64, &[u8])| shadow.hashes[index(*piece)] != xxh3_64(bytes);
    pieces(image).filter(differs).map(|(piece, _)| piece).collect()
}

impl Disks {
    /// The disk of a running guest, and how many changes there were when it was as it is.
    pub fn shadow(&self, life: LifeId) -> Option<(Shadow, u64)> {
        self.running.get(&life).map(|shadow| (shadow.clone(), self.order))
    }

    /// When the content of a sector came there; `None`: it cannot be there.
    fn order_of(&self, piece: u64, sector: &[u8], least: u64) -> Option<u64> {
        let stamp = u64::from_le_bytes(sector.as_chunks::<8>().0[0]);
        // All words are the same: each is like the one before.
        if sector[8..] != sector[..sector.len() - 8] {
            return None;
        }
        if stamp == 0 {
            let zeroed = self.zeroed.get(&piece).copied().unwrap_or(0);
            return (zeroed >= least).then_some(least);
        }
        self.writes.get(&stamp).filter(|written| written.piece == piece).map(|written| written.order)
    }

    /// The first sector that breaks what was promised, in words.
    fn broken_promise(&self, image: &[u8]) -> Option<String> {
        for (piece, bytes) in pieces(image) {
            let least = self.promised.as_ref().map_or(0, |(_, orders)| orders[index(piece)]);
            for (number, sector) in bytes.chunks_exact(512).enumerate() {
                let order = self.order_of(piece, sector, least);
                if order.is_none_or(|order| order < least) {
                    let stamp = u64::from_le_bytes(sector.as_chunks::<8>().0[0]);
                    return Some(format!(
                        "sector {number} of piece {piece} holds {stamp:x} ({order:?}), a flush promised {least}"
                    ));
                }
            }
        }
        None
    }
}

impl Ghost {
    /// The guest of `who` was booted on this image.
    pub fn disk_begins(&mut self, who: Who, image: &[u8]) {
        self.check_promise(&format!("the guest is booted on {}", who.node), image);
        let mut orders = [0; COUNT];
        for (piece, bytes) in pieces(image) {
            let sectors = bytes.chunks_exact(512).map(|sector| self.disks.order_of(piece, sector, 0).unwrap_or(0));
            orders[index(piece)] = sectors.min().unwrap_or(0);
        }
        let mut hashes = [0; COUNT];
        pieces(image).for_each(|(piece, bytes)| hashes[index(piece)] = xxh3_64(bytes));
        let shadow = Shadow { hashes: Arc::new(hashes), orders: Arc::new(orders) };
        self.disks.running.insert(who.life, shadow);
    }

    /// `who` took over and goes on with this image.
    pub fn disk_goes_on(&mut self, who: Who, image: &[u8]) {
        self.check_promise(&format!("the guest is taken over on {}", who.node), image);
        let Some((from, epoch)) = self.life(who.life).committed else { return };
        let content = self.lives[&from].contents.iter().find(|content| content.epoch == epoch);
        let Some((shadow, order)) = content.and_then(|content| content.disk.clone()) else { return };
        let wrong = differing(&shadow, image);
        if !wrong.is_empty() {
            self.broken("image", format!("epoch {epoch} of life {from}: pieces {wrong:?} differ after the takeover"));
        }
        // What the other side wrote since is to be undone there.
        self.disks.writes.retain(|_, written| written.life != from || written.order <= order);
        self.disks.running.insert(who.life, shadow);
    }

    /// A base of `owner`'s ends with `epoch`, which was just sealed.
    pub fn base_sealed(&mut self, owner: Who, epoch: u64) {
        if let Some((shadow, _)) = self.disks.shadow(owner.life) {
            self.disks.bases.insert((owner.life, epoch), shadow);
        }
    }

    /// The backup `who` says that its image holds the base that ended with `epoch` of the owner that was granted `generation`.
    pub fn disk_based(&mut self, who: Who, generation: u64, epoch: u64, image: &[u8]) {
        self.seen.disk_bases += 1;
        let Some(owner) = self.permits.get(&generation).copied() else {
            let what = format!("life {} holds a base of generation {generation}, which nobody was granted", who.life);
            return self.broken("image", what);
        };
        let Some(shadow) = self.disks.bases.get(&(owner, epoch)) else {
            return self
                .broken("image", format!("life {} holds a base {epoch} that life {owner} never ended", who.life));
        };
        let wrong = differing(shadow, image);
        if !wrong.is_empty() {
            let what = format!("base {epoch} of life {owner}: pieces {wrong:?} differ on life {}", who.life);
            self.broken("image", what);
        }
    }

    /// A change begins; it may be in the image from now on.
    pub fn disk_tries(&mut self, who: Who, request: Request, stamp: u64) {
        self.disks.order += 1;
        let (order, life) = (self.disks.order, who.life);
        match request {
            Request::Write(piece) => {
                self.disks.writes.insert(stamp, Written { piece, order, life });
            }
            Request::Zero(piece) => {
                self.disks.zeroed.insert(piece, order);
            }
            Request::Flush => {}
        }
    }

    /// A request was completed well.
    pub fn disk_did(&mut self, who: Who, request: Request, stamp: u64) {
        let order = self.disks.order;
        let Some(shadow) = self.disks.running.get_mut(&who.life) else { return };
        let (piece, hash) = match request {
            Request::Write(piece) => (index(piece), xxh3_64(&stamped(stamp))),
            Request::Zero(piece) => (index(piece), xxh3_64(&[0; BYTES])),
            Request::Flush => {
                self.seen.flushes += 1;
                self.disks.flushes.insert(stamp, Arc::clone(&shadow.orders));
                return;
            }
        };
        Arc::make_mut(&mut shadow.hashes)[piece] = hash;
        Arc::make_mut(&mut shadow.orders)[piece] = order;
    }

    /// Somebody hears that this flush was completed. True when that is news.
    pub fn promise_heard(&mut self, promise: u64) -> bool {
        let known = self.disks.promised.as_ref().is_some_and(|(last, _)| *last == promise);
        let Some(orders) = self.disks.flushes.get(&promise).filter(|_| !known) else { return false };
        // Frames may arrive in another order than they were said in.
        if let Some((_, last)) = &self.disks.promised
            && last.iter().max() > orders.iter().max()
        {
            return false;
        }
        self.disks.promised = Some((promise, Arc::clone(orders)));
        true
    }

    /// An image from which somebody runs, or could, holds all that anybody was promised.
    pub fn check_promise(&mut self, when: &str, image: &[u8]) {
        if !self.forced
            && let Some(what) = self.disks.broken_promise(image)
        {
            self.broken("flush", format!("{when}: {what}"));
        }
    }
}
