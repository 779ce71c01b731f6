//! Connecting to the backup: both connections of a session, on a thread of their own, because a host that is gone answers nothing.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use failover::failpoint;

/// Both connections of a session.
#[derive(Debug)]
pub struct Streams {
    /// Checkpoints and acknowledgements.
    pub data: TcpStream,
    /// Heartbeats.
    pub heartbeat: TcpStream,
}

/// How long one connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Connects to `peer`; `done` is called on another thread with the outcome.
///
/// # Errors
/// No thread could be started.
pub fn dial(peer: SocketAddr, done: impl FnOnce(io::Result<Streams>) + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name("ft-dial".into()).spawn(move || {
        let streams = || -> io::Result<Streams> {
            failpoint!(Dial => return Err(failpoint::injected()));
            let heartbeat = TcpStream::connect_timeout(&peer, CONNECT_TIMEOUT)?;
            let data = TcpStream::connect_timeout(&peer, CONNECT_TIMEOUT)?;
            Ok(Streams { data, heartbeat })
        };
        done(streams());
    })?;
    Ok(())
}

/// The same for a heartbeat connection alone, to learn which process lives at `peer`.
///
/// # Errors
/// No thread could be started.
pub fn dial_heartbeat(peer: SocketAddr, done: impl FnOnce(io::Result<TcpStream>) + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new()
        .name("ft-dial".into())
        .spawn(move || done(TcpStream::connect_timeout(&peer, CONNECT_TIMEOUT)))?;
    Ok(())
}
