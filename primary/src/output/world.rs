//! The way out: taps and the console.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm::tap::Tap;

/// Where released outputs go.
pub trait World: Send + Sync {
    /// Puts a frame on the guest LAN.
    fn frame(&self, nic: u8, frame: &[u8]);
    /// Shows console bytes.
    fn console(&self, bytes: &[u8]);
}

/// Taps and a console of this host.
pub struct HostWorld {
    taps: Vec<Arc<Tap>>,
    console: ConsoleOut,
    /// Frames that the tap did not take: to the guest's network, loss.
    pub frames_refused: AtomicU64,
}

/// Where the console's bytes go.
pub enum ConsoleOut {
    /// A file, or standard output.
    File(Mutex<File>),
    /// A unix socket: the client of the moment, and what the last one missed.
    Socket(Arc<Mutex<ConsoleClients>>),
}

/// Bytes shown to the next client of a console socket.
const CONSOLE_BACKLOG_BYTES: usize = 64 << 10;

/// The client of a console socket, if there is one.
#[derive(Default)]
pub struct ConsoleClients {
    client: Option<UnixStream>,
    backlog: Vec<u8>,
}

/// Why a console could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the console {path}: {source}")]
pub struct ConsoleError {
    path: PathBuf,
    source: io::Error,
}

impl HostWorld {
    /// The way out through these taps and this console.
    pub fn new(taps: Vec<Arc<Tap>>, console: ConsoleOut) -> Self {
        Self { taps, console, frames_refused: AtomicU64::new(0) }
    }
}

impl World for HostWorld {
    fn frame(&self, nic: u8, frame: &[u8]) {
        let Some(tap) = self.taps.get(usize::from(nic)) else { return };
        if let Err(error) = tap.send(frame) {
            self.frames_refused.fetch_add(1, Ordering::Relaxed);
            log::debug!("the tap refused a frame of {} bytes: {error}", frame.len());
        }
    }

    fn console(&self, bytes: &[u8]) {
        let shown = match &self.console {
            ConsoleOut::File(file) => file.lock().unwrap_or_else(PoisonError::into_inner).write_all(bytes),
            ConsoleOut::Socket(clients) => {
                clients.lock().unwrap_or_else(PoisonError::into_inner).show(bytes);
                Ok(())
            }
        };
        if let Err(error) = shown {
            log::warn!("the console took {} bytes badly: {error}", bytes.len());
        }
    }
}

impl ConsoleClients {
    fn show(&mut self, bytes: &[u8]) {
        if let Some(client) = &mut self.client {
            if client.write_all(bytes).is_ok() {
                return;
            }
            self.client = None;
        }
        self.backlog.extend_from_slice(bytes);
        let excess = self.backlog.len().saturating_sub(CONSOLE_BACKLOG_BYTES);
        self.backlog.drain(..excess);
    }

    fn adopt(&mut self, mut client: UnixStream) {
        let backlog = std::mem::take(&mut self.backlog);
        if client.write_all(&backlog).is_ok() {
            self.client = Some(client);
        } else {
            self.backlog = backlog;
        }
    }
}

/// Opens the console that a configuration names: `stdio`, `unix:PATH`, or a file's path. The descriptor, if any, is where typed bytes come from.
///
/// # Errors
/// The file or socket cannot be created.
pub fn open_console(name: &str) -> Result<(ConsoleOut, Option<OwnedFd>), ConsoleError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ConsoleError { path, source }
    };
    if name == "stdio" {
        let path = Path::new("stdio");
        let stdout = rustix::io::dup(io::stdout()).map_err(io::Error::from).map_err(failed(path))?;
        let stdin = rustix::io::dup(io::stdin()).map_err(io::Error::from).map_err(failed(path))?;
        return Ok((ConsoleOut::File(Mutex::new(File::from(stdout))), Some(stdin)));
    }
    if let Some(path) = name.strip_prefix("unix:") {
        let path = Path::new(path);
        return serve_console(path).map_err(failed(path));
    }
    let path = Path::new(name);
    let file = File::options().create(true).append(true).open(path).map_err(failed(path))?;
    Ok((ConsoleOut::File(Mutex::new(file)), None))
}

fn serve_console(path: &Path) -> io::Result<(ConsoleOut, Option<OwnedFd>)> {
    if path.exists() {
        if UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process serves it"));
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    let (typed, into) = rustix::pipe::pipe()?;
    let clients = Arc::new(Mutex::new(ConsoleClients::default()));
    let shown = Arc::clone(&clients);
    let mut into = File::from(into);
    std::thread::Builder::new().name("ft-console".into()).spawn(move || {
        for client in listener.incoming() {
            let reader = client.and_then(|client| {
                let reader = client.try_clone()?;
                shown.lock().unwrap_or_else(PoisonError::into_inner).adopt(client);
                Ok(reader)
            });
            if let Err(error) = reader.and_then(|reader| relay(reader, &mut into)) {
                log::warn!("console client: {error}");
            }
        }
    })?;
    Ok((ConsoleOut::Socket(clients), Some(typed)))
}

/// Passes on what a console client types until it leaves.
fn relay(mut from: UnixStream, into: &mut File) -> io::Result<()> {
    let mut buffer = [0; 256];
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        into.write_all(&buffer[..n])?;
    }
}
