//! The link's handle on the thread that has the disks, and what of the protocol is answered there. What it answers is pure and stands alone: the
//! simulator's disks answer the same.

use std::io;
use std::sync::Arc;

use primary::disk::set::Waiting;
use primary::disk::{DirtyMap, DiskSet};
use primary::verify::{self, Part, hash_disk};
use replication_proto::limits::{DISK_PIECE_BYTES, MAX_DIRTY_BYTES};
use replication_proto::{
    CheckpointKind, Comparable, DiskChange, DiskChanges, DiskStanding, Epoch, PieceHashes, PiecesWanted, Point,
};
use vmm::disk::Disk;

use super::sink::DiskSink;
use super::turn::{Command, SinkEvent};
use super::worker::{Retire, SinkError};
use crate::intake::{News, Question};
use crate::link::LinkHandle;

/// Hands what concerns disks to their thread. A machine without disks has none.
#[derive(Clone)]
pub struct DiskKeeper {
    sink: Option<Arc<DiskSink>>,
    link: LinkHandle,
}

impl DiskKeeper {
    /// For these disks, or for none; `link` is told what comes of it.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(disks: Option<Waiting>, journal_limit: u64, link: LinkHandle) -> io::Result<Self> {
        let Some(Waiting { disks, journal }) = disks else { return Ok(Self { sink: None, link }) };
        let told = link.clone();
        let tell = move |event| news_of(event).for_each(|news| told.tell(news));
        let sink = DiskSink::start(disks, journal, journal_limit, tell)?;
        let keeper = Self { sink: Some(Arc::new(sink)), link };
        keeper.tell_standing();
        Ok(keeper)
    }

    /// What the images hold, as it is said in a greeting.
    pub fn standing(&self) -> Vec<DiskStanding> {
        self.sink.iter().flat_map(|sink| standing(sink.maps())).collect()
    }

    /// A connection begins or has ended: what is said in the next greeting. The base of an exact image is behind what is committed, which costs a few
    /// more comparisons and no more.
    pub fn tell_standing(&self) {
        if self.sink.is_some() {
            self.link.tell(News::Standing(self.standing()));
        }
    }

    /// The peer is silent, or its connection is gone: what is committed goes on its way into the images now, while others decide who runs the guest.
    pub fn hurry(&self) {
        if let Some(sink) = &self.sink {
            sink.hurry();
        }
    }

    /// A base begins: the images may become a mixture until it is committed.
    pub fn begin_base(&self) {
        if let Some(sink) = &self.sink {
            sink.order(Command::Hollow);
        }
    }

    /// A piece of a base that is not committed.
    pub fn apply_hollow(&self, change: DiskChange) {
        if let Some(sink) = &self.sink {
            sink.order(Command::Put(change));
        }
    }

    /// Which of these pieces differ, after all that was handed over before.
    pub fn compare(&self, question: Question, ask: PieceHashes) {
        let Some(sink) = &self.sink else { return };
        let link = self.link.clone();
        sink.look(move |images| link.tell(answer(images, question, &ask)));
    }

    /// A checkpoint is committed.
    pub fn apply(&self, point: Point, kind: CheckpointKind, changes: DiskChanges) {
        if let Some(sink) = &self.sink {
            sink.order(Command::committed(point, kind, changes));
        }
    }

    /// Compares a part of a disk with the primary's hashes of it, both as of the end of this epoch.
    pub fn verify(&self, epoch: Epoch, hashes: PieceHashes) {
        let Some(sink) = &self.sink else { return };
        let link = self.link.clone();
        sink.look_whole(move |images| match hashes_here(images, &hashes) {
            Ok(ours) => link.tell(News::Verified(epoch, verify::compare(&hashes, &ours))),
            Err(error) => link.tell(News::DiskFailed { why: unreadable(&error), lost: false }),
        });
    }

    /// The guest is going to be booted anew on these disks: whatever is committed goes into them, and the journal is retired before the first change.
    ///
    /// # Errors
    /// See [`SinkError`].
    pub fn settle_for_boot(self, set: &DiskSet) -> Result<(), SinkError> {
        let Some(sink) = self.sink else { return Ok(()) };
        let sink = Arc::into_inner(sink).expect("the link's thread has ended");
        if let Some(retire) = sink.finish_for_boot()? {
            set.before_first_change(move || retire.run());
        }
        Ok(())
    }

    /// The standby is going to run: everything that is committed goes into the images. The link's thread must have ended. `None` without disks.
    ///
    /// # Errors
    /// See [`SinkError`]: the standby must not run.
    pub fn finish(self) -> Result<Option<Retire>, SinkError> {
        let Self { sink, link: _ } = self;
        sink.map(|sink| Arc::into_inner(sink).expect("the link's thread has ended").finish()).transpose()
    }
}

/// What disks with these maps hold, as it is said in a greeting.
pub fn standing(maps: &[Arc<DirtyMap>]) -> Vec<DiskStanding> {
    let standing = |map: &Arc<DirtyMap>| DiskStanding {
        base: map.base(),
        was_owner: map.has_run(),
        dirty: map.dirty().encode_within(MAX_DIRTY_BYTES).into(),
    };
    maps.iter().map(standing).collect()
}

/// What the connection is told of what the disks' thread says, in order.
pub fn news_of(event: SinkEvent) -> impl Iterator<Item = News> {
    let news = match event {
        SinkEvent::Based(point) => [Some(News::Stable { ackable: point, durable: point }), None],
        SinkEvent::Progress { ackable, durable, applied } => {
            [Some(News::Applied(applied)), Some(News::Stable { ackable, durable })]
        }
        SinkEvent::Failed { why, lost } => [Some(News::DiskFailed { why, lost }), None],
    };
    news.into_iter().flatten()
}

/// The answer to a question of the primary's: which of these pieces differ in the images.
pub fn answer(images: &[Arc<dyn Disk>], question: Question, ask: &PieceHashes) -> News {
    match compare(images, ask) {
        Ok(answer) => News::Compared(question, answer),
        Err(error) => News::DiskFailed { why: unreadable(&error), lost: false },
    }
}

fn unreadable(error: &io::Error) -> String {
    format!("an image cannot be read: {error}")
}

fn hashes_here(images: &[Arc<dyn Disk>], hashes: &PieceHashes) -> io::Result<PieceHashes> {
    let missing = || io::Error::new(io::ErrorKind::InvalidInput, "a comparison of pieces that do not exist");
    let Comparable::Disk(disk) = hashes.of else { return Err(missing()) };
    let image = images.get(usize::from(disk)).ok_or_else(missing)?;
    let count = u64::try_from(hashes.hashes.len()).map_err(io::Error::other)?;
    let end = hashes.first.checked_add(count).and_then(|end| end.checked_mul(DISK_PIECE_BYTES)).ok_or_else(missing)?;
    if end.saturating_sub(DISK_PIECE_BYTES) >= image.bytes() {
        return Err(missing());
    }
    hash_disk(&**image, Part { of: hashes.of, first: hashes.first, count })
}

fn compare(images: &[Arc<dyn Disk>], ask: &PieceHashes) -> io::Result<PiecesWanted> {
    let ours = hashes_here(images, ask)?;
    let wanted = ask.hashes.iter().zip(&ours.hashes).map(|(theirs, ours)| theirs != ours).collect();
    Ok(PiecesWanted { of: ask.of, first: ask.first, wanted })
}
