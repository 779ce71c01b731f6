//! The heartbeat connection: one small frame every few milliseconds in each direction, on a connection and a thread of its own, so that
//! bulk data never delays it and a busy guest does not starve it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use failover::failpoint;
use replication_proto::LinkError;
use replication_proto::{Generation, Identity};
use replication_proto::{GoodbyeReason, HeartbeatBody};
use replication_proto::{Pulse, PulseEvent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::clock::Clock;

/// What the heartbeat connection tells its owner.
#[derive(Debug)]
pub enum PulseReport {
    /// The peer lives, and this is what it says of itself.
    Heard {
        /// Who.
        peer: Identity,
        /// What.
        body: HeartbeatBody,
        /// After which moment of this process ([`PulseEvent::Heard`]).
        answers: Option<Duration>,
    },
    /// A frame named this generation, which may be higher than ours: of a peer that refuses or was superseded, too.
    Generation(Generation),
    /// The peer leaves on purpose.
    Goodbye(GoodbyeReason),
    /// The connection is gone.
    Closed(PulseEnd),
}

/// Why a heartbeat connection ended.
#[derive(Debug, thiserror::Error)]
pub enum PulseEnd {
    /// The peer's kernel closed it.
    #[error("closed by the peer")]
    EndOfFile,
    /// The network failed, or this side closed it.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    /// The peer broke the protocol.
    #[error("protocol: {0}")]
    Protocol(#[from] LinkError),
}

/// What this side says of itself in every heartbeat.
#[derive(Clone, Copy, Debug, Default)]
pub struct Voice {
    /// The highest generation that it knows.
    pub generation: Generation,
    /// The rest.
    pub body: HeartbeatBody,
}

/// Shared by all heartbeat threads of a process.
pub type SharedVoice = Arc<Mutex<Voice>>;

/// A connection that heartbeats run on, or will.
pub type HeartbeatStream = TcpStream;

/// A running heartbeat connection. Dropping the handle does not end it; [`PulseHandle::close`] does.
pub struct PulseHandle {
    stream: TcpStream,
}

impl PulseHandle {
    /// Closes the connection; the thread ends.
    pub fn close(&self) {
        // It fails only if the connection is gone already.
        self.stream.shutdown(Shutdown::Both).ok();
    }
}

/// How much nicer than others the heartbeat threads are not.
const HEARTBEAT_NICE: i32 = -15;
/// A heartbeat that the socket does not take within this time means that the peer is not reading.
const WRITE_TIMEOUT: Duration = Duration::from_millis(200);
/// How long the connection stays after this side said its last word.
const LAST_WORD_PATIENCE: Duration = Duration::from_millis(500);

/// Starts the heartbeat thread on a connection, of which `read` was read already. `tell` is called on it.
///
/// # Errors
/// The socket cannot be configured, or no thread could be started.
pub fn start(
    stream: TcpStream,
    mut pulse: Pulse,
    read: &[u8],
    voice: SharedVoice,
    clock: Clock,
    tell: impl Fn(PulseReport) + Send + 'static,
) -> io::Result<PulseHandle> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    let handle = PulseHandle { stream: stream.try_clone()? };
    let read = read.to_vec();
    std::thread::Builder::new().name("ft-heartbeat".into()).spawn(move || {
        if let Err(error) = rustix::process::setpriority_process(None, HEARTBEAT_NICE) {
            log::debug!("heartbeats run at ordinary priority: {error}");
        }
        let end = match pulse.handle_bytes(&read) {
            Ok(()) => beat(&stream, &mut pulse, &voice, &clock, &tell),
            Err(error) => {
                say(&stream, &mut pulse, &clock).ok();
                error.into()
            }
        };
        stream.shutdown(Shutdown::Both).ok();
        tell(PulseReport::Closed(end));
    })?;
    Ok(handle)
}

fn beat(
    mut stream: &TcpStream,
    pulse: &mut Pulse,
    voice: &SharedVoice,
    clock: &Clock,
    tell: &impl Fn(PulseReport),
) -> PulseEnd {
    let mut buffer = [0; 4096];
    let mut known = Generation::default();
    loop {
        while let Some(event) = pulse.poll_event() {
            tell(event.into());
        }
        let Voice { generation, body } = *voice.lock().unwrap_or_else(PoisonError::into_inner);
        pulse.set_body(body);
        let raised = if generation > known { pulse.raise_generation(generation) } else { Ok(()) };
        known = generation;
        let said = say(stream, pulse, clock);
        if let Err(error) = raised {
            return error.into();
        }
        if let Err(error) = said {
            return error.into();
        }
        let wait = pulse.next_deadline().map_or(LAST_WORD_PATIENCE, |at| at.saturating_sub(clock.now()));
        match readable_within(stream, wait) {
            Ok(false) => continue,
            Ok(true) => {}
            Err(error) => return error.into(),
        }
        let heard = match stream.read(&mut buffer) {
            Ok(0) => return PulseEnd::EndOfFile,
            Ok(n) => {
                failpoint!(HeartbeatHeard => return failpoint::injected().into());
                pulse.handle_bytes(&buffer[..n])
            }
            Err(error) => return error.into(),
        };
        if let Err(error) = heard {
            while let Some(event) = pulse.poll_event() {
                tell(event.into());
            }
            // A refusal that names the error is the last word.
            say(stream, pulse, clock).ok();
            return error.into();
        }
    }
}

fn say(mut stream: &TcpStream, pulse: &mut Pulse, clock: &Clock) -> io::Result<()> {
    while let Some(bytes) = pulse.poll_transmit(clock.now()) {
        failpoint!(HeartbeatSend => return Err(failpoint::injected()));
        stream.write_all(&bytes)?;
    }
    Ok(())
}

impl From<PulseEvent> for PulseReport {
    fn from(event: PulseEvent) -> Self {
        match event {
            PulseEvent::Opened { peer } | PulseEvent::Stale { peer } => Self::Generation(peer.generation),
            PulseEvent::Heard { peer, body, answers } => Self::Heard { peer, body, answers },
            PulseEvent::Refused { refuse, generation } => {
                log::warn!("the peer refuses heartbeats: {}", refuse.text);
                Self::Generation(generation)
            }
            PulseEvent::Goodbye { goodbye, generation: _ } => Self::Goodbye(goodbye.reason),
        }
    }
}

fn readable_within(stream: &TcpStream, timeout: Duration) -> io::Result<bool> {
    let timeout = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
    match poll(&mut [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)], Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
