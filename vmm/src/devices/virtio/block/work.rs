//! What a disk's worker threads do.
//!
//! A worker takes the earliest request that may start, does the part of it that may last (reading the image, announcing a change, a flush)
//! outside of the gate, so that no pause waits for it, and all that touches guest memory or changes the image inside, a piece at a time.
//! What has not finished when the machine is stopped is in the saved state as its head, and is done again by whoever runs it on: no
//! request does harm when it is repeated, because no later one that overlaps it has begun.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::request::{Kind, Request, S_IOERR, S_OK, gather, scatter};
use super::schedule::{Access, Schedule, Ticket};
use crate::devices::host_io::{Gate, Inside};
use crate::devices::{Devices, lock};
use crate::disk::{ByteRange, Disk};

/// Threads of each disk.
const WORKERS: usize = 4;
/// Bytes read or written in one go inside the gate: some tens of microseconds, which is what a pause may wait.
const PIECE: usize = 256 << 10;
/// Likewise for zeroes, of which the host mostly only takes a note.
const ZERO_PIECE: u64 = 1 << 20;
/// Time between two complaints of one disk.
const QUIET: Duration = Duration::from_secs(10);
/// How long the end of a machine waits for a disk that does not answer.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// A request that a worker has begun.
pub(super) struct Job {
    ticket: Ticket,
    generation: u64,
    write_through: bool,
    request: Arc<Request>,
}

/// A request that is done, for the device to give back.
pub(super) struct Done {
    pub(super) ticket: Ticket,
    pub(super) status: u8,
    /// Bytes written into the guest's buffers, the status included.
    pub(super) written: u32,
}

/// The requests of one disk, between its device and its workers. Locks are taken in this order: device, queue, generation.
pub(crate) struct Work {
    disk: Arc<dyn Disk>,
    name: String,
    queue: Mutex<WorkQueue>,
    wake: Condvar,
    /// Grows with every reset. Held for reading while guest memory or the image is touched for a request: a reset waits until all are out,
    /// and nothing happens for a request of before a reset after it.
    generation: RwLock<u64>,
    complaints: Mutex<Complaints>,
}

struct WorkQueue {
    schedule: Schedule<Arc<Request>>,
    done: VecDeque<Done>,
    write_through: bool,
    ending: bool,
}

#[derive(Default)]
struct Complaints {
    last: Option<Instant>,
    kept_back: u64,
}

impl Work {
    /// For a disk that messages call `name`.
    pub(super) fn new(disk: Arc<dyn Disk>, name: String) -> Self {
        let queue =
            WorkQueue { schedule: Schedule::new(WORKERS), done: VecDeque::new(), write_through: false, ending: false };
        Self {
            disk,
            name,
            queue: Mutex::new(queue),
            wake: Condvar::new(),
            generation: RwLock::new(0),
            complaints: Mutex::default(),
        }
    }

    fn queue(&self) -> MutexGuard<'_, WorkQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a request over; false when one of its head is under way already.
    pub(super) fn push(&self, access: Access, request: Request) -> bool {
        let mut queue = self.queue();
        if queue.schedule.iter().any(|r| r.head == request.head) {
            return false;
        }
        queue.schedule.push(access, Arc::new(request));
        drop(queue);
        self.wake.notify_one();
        true
    }

    /// Whether every change must be on stable storage before it completes: the driver knows no flush.
    pub(super) fn set_write_through(&self, write_through: bool) {
        self.queue().write_through = write_through;
    }

    /// Heads of what has not finished, in the guest's order.
    pub(super) fn heads(&self) -> Vec<u16> {
        self.queue().schedule.iter().map(|r| r.head).collect()
    }

    /// The next request that is done and was not forgotten.
    pub(super) fn next_done(&self) -> Option<(Done, Arc<Request>)> {
        let mut queue = self.queue();
        while let Some(done) = queue.done.pop_front() {
            if let Some(request) = queue.schedule.finish(done.ticket) {
                return Some((done, request));
            }
        }
        None
    }

    /// Forgets all requests. When this returns, nothing happens for them any more, in guest memory or in the image.
    pub(super) fn forget(&self) {
        let mut queue = self.queue();
        *self.generation.write().unwrap_or_else(PoisonError::into_inner) += 1;
        queue.schedule.clear();
        queue.done.clear();
    }

    /// Waits for a request that may start; `None` when the machine ends.
    fn take(&self) -> Option<Job> {
        let mut queue = self.queue();
        while !queue.ending {
            if let Some(job) = self.start(&mut queue) {
                if queue.schedule.may_start() {
                    self.wake.notify_one();
                }
                return Some(job);
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    fn start(&self, queue: &mut WorkQueue) -> Option<Job> {
        let write_through = queue.write_through;
        let (ticket, request) = queue.schedule.start()?;
        let generation = *self.generation.read().unwrap_or_else(PoisonError::into_inner);
        Some(Job { ticket, generation, write_through, request: Arc::clone(request) })
    }

    /// Leave to touch guest memory and image for a job; `None` when its request was forgotten.
    fn turn(&self, job: &Job) -> Option<RwLockReadGuard<'_, u64>> {
        let generation = self.generation.read().unwrap_or_else(PoisonError::into_inner);
        (*generation == job.generation).then_some(generation)
    }

    fn end(&self) {
        self.queue().ending = true;
        self.wake.notify_all();
    }

    /// Says what failed, not too often.
    fn complain(&self, request: &Request, error: &io::Error) {
        let mut complaints = self.complaints.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if complaints.last.is_some_and(|last| now.duration_since(last) < QUIET) {
            complaints.kept_back += 1;
            return;
        }
        complaints.last = Some(now);
        let others = std::mem::take(&mut complaints.kept_back);
        let Request { kind, range, .. } = request;
        log::warn!(
            "disk {}: {kind:?} of {} bytes at {} failed, the guest gets an I/O error: {error} (and {others} times before)",
            self.name,
            range.len,
            range.offset,
        );
    }
}

/// One worker of the disk in one slot.
pub(crate) struct Worker {
    work: Arc<Work>,
    devices: Arc<Devices>,
    gate: Arc<Gate>,
    slot: usize,
}

/// The worker is inside the gate, and what came of the request.
type Outcome<'g> = Option<(Inside<'g>, io::Result<()>)>;

impl Worker {
    /// A worker of the disk in `slot`; `None` when there is none.
    pub(crate) fn new(devices: &Arc<Devices>, gate: &Arc<Gate>, slot: usize) -> Option<Self> {
        let work = lock(devices.virtio.get(slot)?).work()?;
        Some(Self { work, devices: Arc::clone(devices), gate: Arc::clone(gate), slot })
    }

    fn main(&self) {
        let mut buffer = vec![0; PIECE];
        while let Some(job) = self.work.take() {
            self.carry_out(&job, &mut buffer);
        }
    }

    /// Carries out one request that may start, if there is one, on the calling thread, in pieces of the buffer's size.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn try_one(&self, buffer: &mut [u8]) -> bool {
        let job = self.work.start(&mut self.work.queue());
        if let Some(job) = &job {
            self.carry_out(job, buffer);
        }
        job.is_some()
    }

    /// Carries a request out and gives it back to the guest, unless it was forgotten or the machine ends.
    fn carry_out(&self, job: &Job, buffer: &mut [u8]) {
        let outcome = match job.request.kind {
            Kind::Read => self.read(job, buffer),
            Kind::Write | Kind::WriteZeroes { .. } | Kind::Discard => self.change(job, buffer),
            Kind::Flush => self.flush(),
            Kind::GetId | Kind::Refused(_) => panic!("what needs no disk is answered by the device"),
        };
        if let Some((inside, result)) = outcome {
            self.complete(&inside, job, &result);
        }
    }

    fn complete(&self, _: &Inside<'_>, job: &Job, result: &io::Result<()>) {
        if let Err(error) = result {
            self.work.complain(&job.request, error);
        }
        let data = if result.is_ok() && job.request.kind == Kind::Read { job.request.range.len } else { 0 };
        let written = u32::try_from(data).unwrap_or(u32::MAX).saturating_add(1);
        let status = if result.is_ok() { S_OK } else { S_IOERR };
        self.work.queue().done.push_back(Done { ticket: job.ticket, status, written });
        if let Some(device) = self.devices.virtio.get(self.slot) {
            lock(device).pump(self.devices.ram.tracked());
        }
    }

    fn read(&self, job: &Job, buffer: &mut [u8]) -> Outcome<'_> {
        let Request { range, data, .. } = &*job.request;
        let mut done = 0;
        loop {
            let piece = piece_of(buffer, range.len - done);
            let read = self.work.disk.read(range.offset + done, piece);
            let inside = self.gate.enter()?;
            if read.is_err() {
                return Some((inside, read));
            }
            let turn = self.work.turn(job)?;
            let copied = scatter(self.devices.ram.tracked(), data, done, piece).map_err(io::Error::other);
            drop(turn);
            done += piece.len() as u64;
            if copied.is_err() || done >= range.len {
                return Some((inside, copied));
            }
        }
    }

    fn change(&self, job: &Job, buffer: &mut [u8]) -> Outcome<'_> {
        let range = job.request.range;
        let (mut done, mut announced) = (0, false);
        while done < range.len {
            if !std::mem::replace(&mut announced, true) {
                let rest = ByteRange { offset: range.offset + done, len: range.len - done };
                if let Err(error) = self.work.disk.announce(rest) {
                    return Some((self.gate.enter()?, Err(error)));
                }
            }
            let inside = self.gate.enter()?;
            let turn = self.work.turn(job)?;
            let changed = self.change_piece(&job.request, done, buffer);
            drop(turn);
            match changed {
                Ok(bytes) => done += bytes,
                // The announcement is not valid any more.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => announced = false,
                Err(error) => return Some((inside, Err(error))),
            }
            if done >= range.len && !job.write_through {
                return Some((inside, Ok(())));
            }
        }
        if job.write_through { self.flush() } else { Some((self.gate.enter()?, Ok(()))) }
    }

    /// Changes the next bytes of a request; how many.
    fn change_piece(&self, request: &Request, done: u64, buffer: &mut [u8]) -> io::Result<u64> {
        let Request { kind, range, data, .. } = request;
        let (offset, left) = (range.offset + done, range.len - done);
        let zeroes = ByteRange { offset, len: left.min(ZERO_PIECE) };
        match kind {
            Kind::WriteZeroes { may_unmap } => {
                self.work.disk.write_zeroes(zeroes, *may_unmap)?;
                Ok(zeroes.len)
            }
            Kind::Discard => {
                self.work.disk.discard(zeroes)?;
                Ok(zeroes.len)
            }
            _ => {
                let piece = piece_of(buffer, left);
                gather(self.devices.ram.tracked(), data, done, piece).map_err(io::Error::other)?;
                self.work.disk.write(offset, piece)?;
                Ok(piece.len() as u64)
            }
        }
    }

    fn flush(&self) -> Outcome<'_> {
        let flushed = self.work.disk.flush();
        Some((self.gate.enter()?, flushed))
    }
}

fn piece_of(buffer: &mut [u8], left: u64) -> &mut [u8] {
    let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
    buffer.split_at_mut(len).0
}

/// The worker threads of all disks of a machine.
pub(crate) struct Workers {
    all: Vec<Arc<Work>>,
    threads: Vec<JoinHandle<()>>,
    /// Says that all threads have ended: each holds the other end, over which nothing is ever sent.
    ended: Receiver<()>,
}

impl Workers {
    /// Starts the threads, outside of `gate`.
    pub(crate) fn start(devices: &Arc<Devices>, gate: &Arc<Gate>) -> io::Result<Self> {
        let (alive, ended) = bounded(0);
        let mut workers = Self { all: Vec::new(), threads: Vec::new(), ended };
        for slot in 0..devices.virtio.len() {
            for number in 0..WORKERS {
                let Some(worker) = Worker::new(devices, gate, slot) else { break };
                if number == 0 {
                    workers.all.push(Arc::clone(&worker.work));
                }
                if let Err(error) = workers.spawn(worker, number, alive.clone()) {
                    gate.end();
                    workers.end();
                    return Err(error);
                }
            }
        }
        Ok(workers)
    }

    fn spawn(&mut self, worker: Worker, number: usize, alive: Sender<()>) -> io::Result<()> {
        let name = format!("disk{}-{number}", worker.slot);
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            worker.main();
            drop(alive);
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Ends the threads, once the gate has ended. One that its disk does not let go is left behind: it does nothing but wait.
    pub(crate) fn end(&mut self) {
        self.all.iter().for_each(|work| work.end());
        if !self.threads.is_empty() {
            let _ = self.ended.recv_timeout(END_PATIENCE);
        }
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if !thread.is_finished() {
                log::error!("thread {name} waits for its disk and is left behind");
            } else if thread.join().is_err() {
                log::error!("thread {name} panicked");
            }
        }
    }
}
