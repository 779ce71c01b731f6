//! As much of the Redis protocol as a client needs.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::time::Duration;

use super::netns::NetNs;
use super::network::{GUEST_IP, GUEST_PORT};
use super::{Error, Result};

/// Longest bulk string that a reply may hold, in bytes.
const MAX_BULK: u64 = 16 << 20;
/// Longest line of a reply, in bytes.
const MAX_LINE: u64 = 64 << 10;

/// One reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// `+OK`
    Simple(String),
    /// `-ERR …`
    Error(String),
    /// `:1`
    Integer(i64),
    /// `$3 abc`, `None` for the null string.
    Bulk(Option<Vec<u8>>),
    /// `*N …`
    Array(Vec<Self>),
}

/// One TCP connection to the guest.
pub struct Connection {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Connection {
    /// Connects from inside `ns`. `patience` bounds the connecting and each read afterwards: a failover must fit into it.
    pub fn open(ns: &NetNs, patience: Duration) -> Result<Self> {
        let ip: Ipv4Addr = GUEST_IP.parse().expect("a constant address");
        let address = SocketAddrV4::new(ip, GUEST_PORT);
        let stream = ns
            .run(move || TcpStream::connect_timeout(&address.into(), patience))
            .map_err(Error::io(format!("cannot connect to the guest at {address}")))?;
        let prepare = || {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(patience))?;
            stream.set_write_timeout(Some(patience))?;
            stream.try_clone()
        };
        let reader = prepare().map_err(Error::io("cannot prepare a connection"))?;
        Ok(Self { stream, reader: BufReader::new(reader) })
    }

    /// A handle on the same connection, with which another thread can end it.
    pub fn handle(&self) -> io::Result<TcpStream> {
        self.stream.try_clone()
    }

    /// Sends one command.
    pub fn send(&mut self, words: &[&str]) -> io::Result<()> {
        self.stream.write_all(encode(words).as_bytes())
    }

    /// Reads one reply.
    pub fn receive(&mut self) -> io::Result<Reply> {
        read_reply(&mut self.reader, 0)
    }

    /// Sends one command and reads its reply.
    pub fn call(&mut self, words: &[&str]) -> io::Result<Reply> {
        self.send(words)?;
        self.receive()
    }

    /// Whether the peer has not closed the connection.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let peek = |blocking: bool| self.stream.set_nonblocking(!blocking);
        if peek(false).is_err() {
            return false;
        }
        let open = match self.stream.peek(&mut [0]) {
            Ok(n) => n > 0,
            Err(e) => e.kind() == io::ErrorKind::WouldBlock,
        };
        peek(true).is_ok() && open
    }
}

fn encode(words: &[&str]) -> String {
    let mut out = format!("*{}\r\n", words.len());
    for word in words {
        write!(out, "${}\r\n{word}\r\n", word.len()).expect("a string takes everything");
    }
    out
}

fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Reads one reply from a stream that is not believed.
pub fn read_reply(from: &mut impl BufRead, depth: u8) -> io::Result<Reply> {
    let mut line = Vec::new();
    from.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the guest closed the connection"));
    }
    let text = line.strip_suffix(b"\r\n").ok_or_else(|| bad("a reply line without an end"))?;
    let text = std::str::from_utf8(text).map_err(|_| bad("a reply line that is not text"))?;
    let (kind, rest) = text.split_at_checked(1).ok_or_else(|| bad("an empty reply line"))?;
    let number = || rest.parse::<i64>().map_err(|_| bad(format!("not a number: {text:?}")));
    match kind {
        "+" => Ok(Reply::Simple(rest.to_owned())),
        "-" => Ok(Reply::Error(rest.to_owned())),
        ":" => Ok(Reply::Integer(number()?)),
        "$" => read_bulk(from, number()?),
        "*" if depth < 4 => {
            let count = number()?.max(0);
            (0..count).map(|_| read_reply(from, depth + 1)).collect::<io::Result<_>>().map(Reply::Array)
        }
        _ => Err(bad(format!("not a reply: {text:?}"))),
    }
}

fn read_bulk(from: &mut impl BufRead, len: i64) -> io::Result<Reply> {
    let Ok(len) = u64::try_from(len) else {
        return Ok(Reply::Bulk(None));
    };
    if len > MAX_BULK {
        return Err(bad(format!("a bulk string of {len} bytes")));
    }
    let mut bytes = Vec::new();
    from.by_ref().take(len + 2).read_to_end(&mut bytes)?;
    if !bytes.ends_with(b"\r\n") || bytes.len() as u64 != len + 2 {
        return Err(bad("a bulk string without its end"));
    }
    bytes.truncate(bytes.len() - 2);
    Ok(Reply::Bulk(Some(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_of_every_kind() {
        let mut bytes: &[u8] = b"+OK\r\n-ERR no\r\n:-7\r\n$3\r\na\r\n\r\n$-1\r\n*2\r\n:1\r\n$0\r\n\r\n";
        let mut next = || read_reply(&mut bytes, 0).unwrap();
        assert_eq!(next(), Reply::Simple("OK".into()));
        assert_eq!(next(), Reply::Error("ERR no".into()));
        assert_eq!(next(), Reply::Integer(-7));
        assert_eq!(next(), Reply::Bulk(Some(b"a\r\n".to_vec())));
        assert_eq!(next(), Reply::Bulk(None));
        assert_eq!(next(), Reply::Array(vec![Reply::Integer(1), Reply::Bulk(Some(Vec::new()))]));
        assert_eq!(read_reply(&mut bytes, 0).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn malformed_replies_are_errors() {
        for bytes in
            [&b"x\r\n"[..], b"\r\n", b"$99999999999\r\n", b"$3\r\nab", b":1", b"*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n"]
        {
            let mut from = bytes;
            assert!(read_reply(&mut from, 0).is_err(), "{bytes:?}");
        }
    }
}
