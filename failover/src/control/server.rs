//! The socket's server: one thread that accepts, one per client, all bounded.

use std::fs;
use std::io::{self, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use rustix::fs::{Mode, chmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

use super::{ErrorCode, FailoverMode, LineRead, MAX_LINE_BYTES, Reply, Request, read_line};
use crate::decide::{Command, CommandOutcome};
use crate::exit::ExitCode;
use crate::status::StatusBoard;
use crate::text::harmless;

/// Its user and its group.
const MODE: Mode = Mode::from_raw_mode(0o660);
/// Clients that wait to be accepted; more wait to connect.
const BACKLOG: i32 = 128;
/// Clients at a time.
const MAX_CLIENTS: usize = 16;
/// A client that sends nothing for this long is let go.
const IDLE: Duration = Duration::from_secs(30);
/// A client that takes nothing for this long is let go.
const STUCK: Duration = Duration::from_secs(5);
/// A command that is not answered for this long has an unknown outcome.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longest pause of protection: a week.
const MAX_PAUSE_SECONDS: u64 = 7 * 24 * 3600;
/// Progress lines that may wait for a slow client.
const PROGRESS: usize = 256;

/// The socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Another process answers there.
    #[error("{0}: another process serves this control socket: stop it first")]
    InUse(String),
    /// Something that is not a socket is in the way.
    #[error("{0}: exists and is not a socket: remove it, or change `control` in pair.toml")]
    NotASocket(String),
    /// An I/O error.
    #[error("{place}: {cause}")]
    Io {
        /// Where.
        place: String,
        /// The cause.
        cause: io::Error,
    },
}

impl ControlError {
    /// What a process that cannot go on ends with.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::InUse(_) => ExitCode::AlreadyRunning,
            Self::NotASocket(_) => ExitCode::StateUnusable,
            Self::Io { cause, .. } if cause.kind() == io::ErrorKind::PermissionDenied => ExitCode::Permission,
            Self::Io { .. } => ExitCode::StateUnusable,
        }
    }
}

/// Where the answer to a command goes. Dropped without an answer, it tells the client that the outcome is unknown.
#[derive(Debug)]
pub struct ReplyHandle {
    replies: Sender<Reply>,
}

impl ReplyHandle {
    /// Tells the client how far things are. A client that does not listen misses it.
    pub fn progress(&self, text: impl Into<String>) {
        let _ = self.replies.try_send(Reply::Progress(text.into()));
    }

    /// Answers for good. `gap`: for how long the guest stood still on its way to the other side, as far as this side can tell.
    pub fn finish(self, outcome: CommandOutcome, gap: Option<Duration>) {
        let reply = match outcome {
            CommandOutcome::Done(text) => {
                let gap = gap.map(|gap| gap.as_secs_f64());
                Reply::Result(serde_json::json!({ "text": text, "gap_seconds": gap }))
            }
            CommandOutcome::Refused(text) => Reply::error(ErrorCode::Refused, text),
            CommandOutcome::Unknown(text) => Reply::error(ErrorCode::OutcomeUnknown, text),
        };
        // A slow client's queue is full of progress at worst; the client thread takes it out before it gives up.
        let _ = self.replies.send_timeout(reply, STUCK);
    }
}

/// A command for the decision core, checked as far as a server can.
#[derive(Debug)]
pub struct ControlRequest {
    /// What is asked.
    pub command: Command,
    /// Where the answer goes.
    pub reply: ReplyHandle,
    /// Who asked: user id and process id.
    pub asked_by: (u32, i32),
}

struct Shared {
    board: StatusBoard,
    commands: Sender<ControlRequest>,
    wake: Box<dyn Fn() + Send + Sync>,
    vm: String,
    clients: AtomicUsize,
    ending: AtomicBool,
    owner: u32,
}

/// Serves until it is dropped; the socket is removed then.
pub struct ControlServer {
    path: PathBuf,
    shared: Arc<Shared>,
}

impl ControlServer {
    /// Serves `path`. `vm` is the name that `force` must confirm; commands go to `commands`, and `wake` is called after each.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn start(
        path: &Path,
        vm: &str,
        board: StatusBoard,
        commands: Sender<ControlRequest>,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, ControlError> {
        let io = |cause: io::Error| ControlError::Io { place: path.display().to_string(), cause };
        let listener = open(path)?;
        let shared = Arc::new(Shared {
            board,
            commands,
            wake: Box::new(wake),
            vm: vm.to_owned(),
            clients: AtomicUsize::new(0),
            ending: AtomicBool::new(false),
            owner: rustix::process::geteuid().as_raw(),
        });
        let accepting = Arc::clone(&shared);
        let spawned = thread::Builder::new().name("control".into()).spawn(move || accept(&listener, &accepting));
        spawned.map_err(io)?;
        Ok(Self { path: path.to_path_buf(), shared })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        // Wakes the thread that accepts.
        let _ = UnixStream::connect(&self.path);
        let _ = fs::remove_file(&self.path);
    }
}

impl std::fmt::Debug for ControlServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlServer").field("path", &self.path).finish_non_exhaustive()
    }
}

fn open(path: &Path) -> Result<UnixListener, ControlError> {
    let place = path.display().to_string();
    let io = |cause: io::Error| ControlError::Io { place: place.clone(), cause };
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o750).create(parent).map_err(io)?;
    }
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => match UnixStream::connect(path) {
            Ok(_) => return Err(ControlError::InUse(place)),
            // Nobody listens: left behind by a process that was killed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(io)?,
            Err(error) => return Err(io(error)),
        },
        // A symbolic link, too: following it could remove or replace somebody else's file.
        Ok(_) => return Err(ControlError::NotASocket(place)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io(error)),
    }
    bound(path).map_err(|cause| match cause.kind() {
        io::ErrorKind::AddrInUse => ControlError::InUse(place.clone()),
        _ => io(cause),
    })
}

/// Nobody can connect before it listens, and it has its mode by then. (A umask would do for the file what this does, but it is the whole
/// process's: files that other threads make at the same moment would get it, too.)
fn bound(path: &Path) -> io::Result<UnixListener> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    chmod(path, MODE)?;
    listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

/// Counts a client for as long as it lives.
struct Seat(Arc<Shared>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::AcqRel);
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        if shared.ending.load(Ordering::Acquire) {
            return;
        }
        let Ok(stream) = stream else {
            // Out of file descriptors, most likely: others will close some.
            thread::yield_now();
            continue;
        };
        let taken = shared.clients.fetch_add(1, Ordering::AcqRel);
        let seat = Seat(Arc::clone(shared));
        if taken >= MAX_CLIENTS {
            let _ = stream.set_write_timeout(Some(Duration::from_millis(10)));
            let _ = write(&stream, &Reply::error(ErrorCode::Busy, format!("more than {MAX_CLIENTS} clients")));
            continue;
        }
        let client = move || {
            let seat = seat;
            serve(&stream, &seat.0);
        };
        if let Err(error) = thread::Builder::new().name("control-client".into()).spawn(client) {
            log::warn!("control: no thread for a client: {error}");
        }
    }
}

fn write(mut stream: &UnixStream, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_string(reply).expect("string keys and finite numbers");
    line.push('\n');
    stream.write_all(line.as_bytes())
}

fn serve(stream: &UnixStream, shared: &Shared) {
    let _ = stream.set_read_timeout(Some(IDLE));
    let _ = stream.set_write_timeout(Some(STUCK));
    let Ok(peer) = rustix::net::sockopt::socket_peercred(stream) else { return };
    let (user, process) = (peer.uid.as_raw(), peer.pid.as_raw_nonzero().get());
    if user != 0 && user != shared.owner {
        log::warn!("control: user {user} (process {process}) was turned away");
        let _ = write(stream, &Reply::error(ErrorCode::Denied, "only root and the user of this process may connect"));
        return;
    }
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        // A read without a place for file descriptors: the kernel closes those that a client passes.
        let reply = match read_line(&mut reader, &mut line) {
            Ok(LineRead::Line) => handle(stream, shared, &line, (user, process)),
            Ok(LineRead::TooLong) => {
                let text = format!("a request has at most {MAX_LINE_BYTES} bytes");
                let _ = write(stream, &Reply::error(ErrorCode::TooLong, text));
                return;
            }
            Ok(LineRead::End) | Err(_) => return,
        };
        let Some(reply) = reply else { return };
        if write(stream, &reply).is_err() {
            return;
        }
    }
}

/// `None`: the client is gone.
fn handle(stream: &UnixStream, shared: &Shared, line: &[u8], asked_by: (u32, i32)) -> Option<Reply> {
    let request: Request = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(error) => return Some(Reply::error(ErrorCode::BadRequest, harmless(&error.to_string()))),
    };
    let command = match request {
        Request::Status {} => {
            let value = serde_json::to_value(shared.board.snapshot()).expect("string keys and finite numbers");
            return Some(Reply::Result(value));
        }
        Request::Failover { mode: FailoverMode::Planned, confirm: _, without_arbiter: _ } => Command::Switchover,
        Request::Failover { mode: FailoverMode::Force, confirm, without_arbiter } => {
            if confirm.as_deref() != Some(shared.vm.as_str()) {
                let text = format!("a forced failover may lose data: confirm it with the VM's name ({})", shared.vm);
                return Some(Reply::error(ErrorCode::Refused, text));
            }
            Command::ForceTakeover { without_arbiter }
        }
        Request::Stop {} => Command::Stop,
        Request::Protect {} => Command::Protect,
        Request::Unprotect {} => Command::Unprotect,
        Request::PauseProtection { seconds } => {
            if !(1..=MAX_PAUSE_SECONDS).contains(&seconds) {
                let text = format!("a pause lasts 1 to {MAX_PAUSE_SECONDS} s: use `unprotect` for longer");
                return Some(Reply::error(ErrorCode::Refused, text));
            }
            Command::PauseProtection { length: Duration::from_secs(seconds) }
        }
        Request::Rejoin {} => Command::Rejoin,
        Request::Verify {} => Command::Verify,
    };
    log::info!("control: {command:?} asked by user {}, process {}", asked_by.0, asked_by.1);
    let (replies, inbox) = bounded(PROGRESS);
    let request = ControlRequest { command, reply: ReplyHandle { replies }, asked_by };
    match shared.commands.try_send(request) {
        Ok(()) => (shared.wake)(),
        Err(TrySendError::Full(_)) => return Some(Reply::error(ErrorCode::Busy, "too many commands are waiting")),
        Err(TrySendError::Disconnected(_)) => return Some(Reply::error(ErrorCode::Ending, "the process is ending")),
    }
    relay(stream, &inbox)
}

fn relay(stream: &UnixStream, inbox: &Receiver<Reply>) -> Option<Reply> {
    let until = Instant::now() + PATIENCE;
    loop {
        match inbox.recv_deadline(until) {
            Ok(progress @ Reply::Progress(_)) => write(stream, &progress).ok()?,
            Ok(last) => return Some(last),
            Err(RecvTimeoutError::Timeout) => {
                return Some(Reply::error(ErrorCode::OutcomeUnknown, "no answer in time: ask for the status"));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Some(Reply::error(ErrorCode::OutcomeUnknown, "the process ended before it answered"));
            }
        }
    }
}
