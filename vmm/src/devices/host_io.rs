//! The thread that carries frames and key strokes into the guest, and the gate that keeps it and the disks' workers out of a stopped machine.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};

use super::virtio::block::Workers;
use super::{Devices, lock};

const BELL: Token = Token(usize::MAX);

/// What a device's host side did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pumped {
    /// Its turn was over before its input was: call again.
    More,
    /// Nothing waits, or the guest has no room; a bell or the descriptor will tell.
    Idle,
}

/// Wakes the I/O thread: a device that had no room has some again.
#[derive(Clone)]
pub(crate) struct Doorbell(Arc<Waker>);

impl Doorbell {
    pub(crate) fn ring(&self) {
        if let Err(error) = self.0.wake() {
            log::error!("cannot wake the I/O thread: {error}");
        }
    }
}

/// Keeps the I/O thread and the disks' workers out of the devices and of guest memory while the machine is stopped.
///
/// Closing waits until all are outside; each enters for one short turn at a time. Closed when made: a machine that never ran
/// takes nothing from its ports.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    /// It was opened, or ends.
    opened: Condvar,
    /// It is closed and the last one left.
    emptied: Condvar,
}

/// A thread is inside. A panic in there leads out too: who closes the gate must not wait for ever.
pub(crate) struct Inside<'g>(&'g Gate);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.inside -= 1;
        if state.inside == 0 && !state.open {
            self.0.emptied.notify_all();
        }
    }
}

#[derive(Default)]
struct GateState {
    open: bool,
    /// Threads inside.
    inside: usize,
    ending: bool,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an open gate and steps in; `None` when the machine ends.
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        let mut state = self.lock();
        while !state.open && !state.ending {
            state = self.opened.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.ending {
            return None;
        }
        state.inside += 1;
        Some(Inside(self))
    }

    /// Lets the threads in again.
    pub(crate) fn open(&self) {
        self.lock().open = true;
        self.opened.notify_all();
    }

    /// When this returns, all threads are outside and stay there.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.open = false;
        while state.inside > 0 {
            state = self.emptied.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Closes it for good: whoever waits for it turns back.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        state.open = false;
        state.ending = true;
        self.opened.notify_all();
    }
}

/// The I/O thread before it is started: the bell must exist when devices are made, the devices when the thread starts.
pub(crate) struct HostIo {
    poll: Poll,
    bell: Doorbell,
}

impl HostIo {
    pub(crate) fn new() -> io::Result<Self> {
        let poll = Poll::new()?;
        let bell = Doorbell(Arc::new(Waker::new(poll.registry(), BELL)?));
        Ok(Self { poll, bell })
    }

    pub(crate) fn bell(&self) -> Doorbell {
        self.bell.clone()
    }

    /// Starts the thread and those of the disks, outside of `gate`.
    pub(crate) fn start(self, devices: Arc<Devices>, gate: Arc<Gate>) -> io::Result<HostIoThread> {
        let Self { mut poll, bell } = self;
        register(&poll, &devices)?;
        let (thread_gate, disks) = (Arc::clone(&gate), Arc::clone(&devices));
        // Descriptors were readable before the thread began to watch them: the first turn looks at all.
        bell.ring();
        let thread =
            std::thread::Builder::new().name("host-io".into()).spawn(move || run(&mut poll, &devices, &thread_gate))?;
        let mut running = HostIoThread { gate, bell, thread: Some(thread), workers: None };
        match Workers::start(&disks, &running.gate) {
            Ok(workers) => running.workers = Some(workers),
            Err(error) => {
                running.end();
                return Err(error);
            }
        }
        Ok(running)
    }
}

fn register(poll: &Poll, devices: &Devices) -> io::Result<()> {
    for (slot, device) in devices.virtio.iter().enumerate() {
        if let Some(port) = lock(device).host_port() {
            watch(poll, port.as_fd(), Token(slot))?;
        }
    }
    match lock(&devices.serial).input() {
        Some(fd) => match watch(poll, fd, Token(devices.virtio.len())) {
            // A regular file or /dev/null is always ready and cannot be watched; the first turns read it to its end.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            other => other,
        },
        None => Ok(()),
    }
}

fn watch(poll: &Poll, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
    poll.registry().register(&mut SourceFd(&fd.as_raw_fd()), token, Interest::READABLE)
}

fn run(poll: &mut Poll, devices: &Devices, gate: &Gate) {
    let mut events = Events::with_capacity(16);
    loop {
        if let Err(error) = poll.poll(&mut events, None)
            && error.kind() != io::ErrorKind::Interrupted
        {
            log::error!("the I/O thread ends: {error}");
            return;
        }
        // Which descriptor became ready does not matter: there are few, and asking an idle one costs one system call.
        loop {
            let Some(inside) = gate.enter() else { return };
            let more = turn(devices);
            drop(inside);
            if more == Pumped::Idle {
                break;
            }
        }
    }
}

/// One short turn over all devices.
fn turn(devices: &Devices) -> Pumped {
    let mut all = lock(&devices.serial).pump();
    for device in &devices.virtio {
        if lock(device).pump(devices.ram.tracked()) == Pumped::More {
            all = Pumped::More;
        }
    }
    all
}

/// The running I/O thread, and the disks' workers.
pub(crate) struct HostIoThread {
    gate: Arc<Gate>,
    bell: Doorbell,
    thread: Option<JoinHandle<()>>,
    workers: Option<Workers>,
}

impl HostIoThread {
    /// Ends the threads and waits for their end.
    pub(crate) fn end(&mut self) {
        self.gate.end();
        self.bell.ring();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the I/O thread panicked");
        }
        if let Some(mut workers) = self.workers.take() {
            workers.end();
        }
    }
}
