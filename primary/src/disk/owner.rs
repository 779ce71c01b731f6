//! All disks of a machine that runs here, as the flows of protection see them.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Sender, bounded};
use vmm::disk::Disk;

use super::copy::Source;
use super::replicated::Shared;
use super::{
    Alarm, BlockSet, DirtyMap, DiskChange, DiskChanges, DiskFailure, DiskLog, Epoch, FirstChange, Point, ReplicatedDisk,
};

/// One disk: its name, its image and its map.
pub struct DiskParts {
    /// Its name.
    pub name: String,
    /// The image.
    pub image: Arc<dyn Disk>,
    /// Its map.
    pub map: Arc<DirtyMap>,
}

/// See the module. The order of one protected life: [`Self::begin_log`] at the moment from which changes travel with epochs;
/// [`Self::dirty`] after it, which is what a synchronisation has to look at; [`Self::cover`] with the epoch that ends the
/// synchronisation; [`Self::seal`] at every checkpoint; [`Self::durable`] at every acknowledgement of stable storage; [`Self::end_log`].
pub struct OwnerDisks {
    disks: Vec<Arc<ReplicatedDisk>>,
    shared: Shared,
    /// None when it has ended.
    keeper: Option<(Sender<Point>, JoinHandle<()>)>,
}

impl OwnerDisks {
    /// Disks of a machine; `log_limit` is in bytes, `first` what is due before the first change.
    ///
    /// # Errors
    /// The thread that clears bits does not start.
    ///
    /// # Panics
    /// With more than 255 disks.
    pub fn new(parts: Vec<DiskParts>, log_limit: usize, first: FirstChange) -> io::Result<Self> {
        let mut owner = Self::without_thread(parts, log_limit, first);
        let maps = owner.maps();
        let (tell, told) = bounded::<Point>(1);
        let keeper = std::thread::Builder::new().name("disk-maps".into()).spawn(move || {
            for point in told {
                tidy(&maps, point);
            }
        })?;
        owner.keeper = Some((tell, keeper));
        Ok(owner)
    }

    /// The same, but for the thread: whoever calls [`Self::durable`] calls [`Self::tidy`], too.
    ///
    /// # Panics
    /// With more than 255 disks.
    pub fn without_thread(parts: Vec<DiskParts>, log_limit: usize, first: FirstChange) -> Self {
        let shared = Shared {
            log: Arc::new(DiskLog::new(log_limit)),
            first: Arc::new(first),
            alarm: Arc::new(Alarm::default()),
        };
        let disks = parts.into_iter().enumerate().map(|(number, DiskParts { name, image, map })| {
            let number = u8::try_from(number).expect("a handful of disks");
            Arc::new(ReplicatedDisk::new(number, name, image, map, shared.clone()))
        });
        Self { disks: disks.collect(), shared, keeper: None }
    }

    /// Of a machine without disks.
    pub fn none() -> Self {
        let (log, first) = (Arc::new(DiskLog::new(0)), Arc::new(FirstChange::nothing()));
        let shared = Shared { log, first, alarm: Arc::new(Alarm::default()) };
        Self { disks: Vec::new(), shared, keeper: None }
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// Bytes of each.
    pub fn sizes(&self) -> Vec<u64> {
        self.disks.iter().map(|disk| disk.bytes()).collect()
    }

    /// What the machine works on.
    pub fn for_machine(&self) -> Vec<Arc<dyn Disk>> {
        self.disks.iter().map(|disk| Arc::clone(disk) as Arc<dyn Disk>).collect()
    }

    /// Each disk.
    pub fn disks(&self) -> &[Arc<ReplicatedDisk>] {
        &self.disks
    }

    /// What is due before the first change; whoever activates calls [`FirstChange::prepare`] soon, so that no request waits for it.
    pub fn first_change(&self) -> &Arc<FirstChange> {
        &self.shared.first
    }

    /// Where failures are told.
    pub fn alarm(&self) -> &Arc<Alarm> {
        &self.shared.alarm
    }

    /// The first failure of an image since this was asked last for which the two sides may differ: protection ends with it.
    pub fn take_failure(&self) -> Option<DiskFailure> {
        self.shared.alarm.take_failure()
    }

    /// Changes are logged from now on, in the running epoch `first`.
    ///
    /// That epoch counts as holding a flush: the base carries what the guest was told of before, so it is acknowledged only when the other side has
    /// all of it on stable storage.
    pub fn begin_log(&self, first: Epoch) {
        self.shared.log.on(first);
        if !self.disks.is_empty() {
            self.shared.log.mark_flushed();
        }
    }

    /// Protection, or the attempt at it, has ended: nothing is logged, and no bit goes.
    pub fn end_log(&self) {
        self.shared.log.off();
        self.disks.iter().for_each(|disk| disk.map().hold());
    }

    /// The changes of an epoch that ends; the machine is stopped.
    pub fn seal(&self, epoch: Epoch) -> DiskChanges {
        self.shared.log.seal(epoch)
    }

    /// Whether writers of the guest will soon wait for the end of the epoch, because the log has little room.
    pub fn wants_checkpoint(&self) -> bool {
        !self.disks.is_empty() && self.shared.log.fills()
    }

    /// What may differ from each map's base: after [`Self::begin_log`], what a synchronisation has to look at.
    pub fn dirty(&self) -> Vec<(Option<Point>, BlockSet)> {
        self.disks.iter().map(|disk| (disk.map().base(), disk.map().dirty())).collect()
    }

    /// What was dirty before the log began is on the other side with `epoch`.
    pub fn cover(&self, epoch: Epoch) {
        self.disks.iter().for_each(|disk| disk.map().cover(epoch));
    }

    /// The other side holds `point` on stable storage; `now` since any fixed moment. Cheap; when it is worth it (which is returned), bits are
    /// cleared by the thread.
    pub fn durable(&self, point: Point, now: Duration) -> bool {
        let due = self.disks.iter().filter(|disk| disk.map().durable(point, now)).count() > 0;
        if let (true, Some((tell, _))) = (due, &self.keeper) {
            // When it is still at the last one, a later acknowledgement serves as well.
            tell.try_send(point).ok();
        }
        due
    }

    /// Clears bits of what the other side holds on stable storage at `point`. Syncs the images.
    pub fn tidy(&self, point: Point) {
        tidy(&self.maps(), point);
    }

    fn maps(&self) -> Vec<Arc<DirtyMap>> {
        self.disks.iter().map(|disk| Arc::clone(disk.map())).collect()
    }

    /// Whether all maps are still ours: asked when protection begins.
    ///
    /// # Errors
    /// The host's.
    pub fn still_ours(&self) -> io::Result<bool> {
        for disk in &self.disks {
            if !disk.map().still_ours()? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn tidy(maps: &[Arc<DirtyMap>], point: Point) {
    for map in maps {
        if let Err(error) = map.tidy(point) {
            log::warn!("a disk's map keeps its bits: {error}");
        }
    }
}

impl Source for OwnerDisks {
    fn images(&self) -> Vec<Arc<dyn Disk>> {
        self.disks.iter().map(|disk| Arc::clone(disk.image())).collect()
    }

    fn drain(&self) -> Vec<DiskChange> {
        self.shared.log.drain()
    }
}

impl Drop for OwnerDisks {
    fn drop(&mut self) {
        // A writer that waits for room would wait for ever.
        self.shared.log.off();
        if let Some((tell, keeper)) = self.keeper.take() {
            drop(tell);
            keeper.join().ok();
        }
    }
}
