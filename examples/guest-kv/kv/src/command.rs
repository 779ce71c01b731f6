//! From a parsed request to a reply: the table of commands.

use crate::resp::{Args, Out, OutOfMemory, parse_integer};
use crate::store::{Store, Value};
use crate::{keys, lists, own, server, strings};

/// What the commands need of the machine that the server runs on.
pub trait Machine {
    /// Milliseconds since boot; never goes back.
    fn uptime_ms(&self) -> u64;
    /// Writes `name:value` lines, each ended by CR LF.
    fn counters(&self, line: &mut dyn FnMut(&str, u64));
    /// Starts to write to `pages_per_second` pages a second, in a buffer of `pages` pages of its own; 0 stops.
    ///
    /// # Errors
    /// The buffer does not fit in memory.
    fn dirty(&mut self, pages_per_second: u64, pages: Option<u64>) -> Result<(), OutOfMemory>;
    /// Clients that are connected.
    fn connected(&self) -> usize;
    /// Bytes of heap in use.
    fn heap_used(&self) -> usize;
    /// Switches the machine off once the replies so far have been given to the network device.
    fn power_off(&mut self);
    /// Crashes the machine at once.
    fn crash(&mut self);
}

/// What belongs to one connection.
#[derive(Debug, Default, Clone, Copy)]
pub struct Session {
    /// The connection's number, from 1.
    pub id: u64,
}

/// What becomes of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on.
    Continue,
    /// It is closed once the replies are sent.
    Close,
}

/// Why a command failed; the reply says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    Arity,
    Syntax,
    WrongType,
    NotInteger,
    Overflow,
    OutOfRange,
    OutOfMemory,
    InvalidExpire,
    TooLong,
    Text(&'static str),
}

impl From<OutOfMemory> for Failure {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

impl Failure {
    fn reply(self, name: &str, out: &mut Out) {
        out.error(match self {
            Self::Arity => {
                out.raw(b"-ERR wrong number of arguments for '");
                name.bytes().for_each(|byte| out.raw(&[byte.to_ascii_lowercase()]));
                out.raw(b"' command\r\n");
                return;
            }
            Self::Syntax => "ERR syntax error",
            Self::WrongType => "WRONGTYPE Operation against a key holding the wrong kind of value",
            Self::NotInteger => "ERR value is not an integer or out of range",
            Self::Overflow => "ERR increment or decrement would overflow",
            Self::OutOfRange => "ERR index out of range",
            Self::OutOfMemory => "OOM command not allowed: the guest's memory is full",
            Self::InvalidExpire => "ERR invalid expire time",
            Self::TooLong => "ERR string exceeds maximum allowed size",
            Self::Text(text) => text,
        });
    }
}

/// One request being carried out.
pub(crate) struct Call<'a> {
    pub(crate) store: &'a mut Store,
    pub(crate) machine: &'a mut dyn Machine,
    pub(crate) session: &'a Session,
    pub(crate) out: &'a mut Out,
    buffer: &'a [u8],
    args: &'a Args,
}

impl<'a> Call<'a> {
    /// The number of arguments, the name included.
    pub(crate) fn len(&self) -> usize {
        self.args.len()
    }

    pub(crate) fn arg(&self, index: usize) -> &'a [u8] {
        self.args.get(self.buffer, index)
    }

    pub(crate) fn integer(&self, index: usize) -> Result<i64, Failure> {
        parse_integer(self.arg(index)).ok_or(Failure::NotInteger)
    }

    pub(crate) fn is(&self, index: usize, word: &str) -> bool {
        self.arg(index).eq_ignore_ascii_case(word.as_bytes())
    }

    /// The string at a key.
    pub(crate) fn string(&mut self, key: &[u8]) -> Result<Option<&mut alloc::vec::Vec<u8>>, Failure> {
        match self.store.value(key) {
            None => Ok(None),
            Some(Value::Bytes(bytes)) => Ok(Some(bytes)),
            Some(_) => Err(Failure::WrongType),
        }
    }

    pub(crate) fn ok(&mut self) {
        self.out.raw(b"+OK\r\n");
    }
}

pub(crate) type Done = Result<(), Failure>;

pub(crate) struct Command {
    name: &'static str,
    /// The fewest and the most arguments, the name included.
    arity: (usize, usize),
    run: fn(&mut Call<'_>) -> Done,
}

const ANY: usize = usize::MAX;

const fn command(name: &'static str, arity: (usize, usize), run: fn(&mut Call<'_>) -> Done) -> Command {
    Command { name, arity, run }
}

/// All commands but QUIT, which is about the connection. In the order of the alphabet: looked up by binary search.
pub(crate) static COMMANDS: &[Command] = &[
    command("APPEND", (3, 3), strings::append),
    command("CLIENT", (2, ANY), server::client),
    command("COMMAND", (1, ANY), server::command),
    command("CONFIG", (2, ANY), server::config),
    command("DBSIZE", (1, 1), keys::dbsize),
    command("DECR", (2, 2), strings::decr),
    command("DECRBY", (3, 3), strings::decrby),
    command("DEL", (2, ANY), keys::del),
    command("ECHO", (2, 2), server::echo),
    command("EXISTS", (2, ANY), keys::exists),
    command("EXPIRE", (3, 3), keys::expire),
    command("FLUSHALL", (1, 2), keys::flush),
    command("FLUSHDB", (1, 2), keys::flush),
    command("FT.COUNTERS", (1, 1), own::counters),
    command("FT.CRASH", (1, 1), own::crash),
    command("FT.DIGEST", (1, 1), own::digest),
    command("FT.DIRTY", (2, 3), own::dirty),
    command("FT.POWEROFF", (1, 1), own::power_off),
    command("FT.UPTIME", (1, 1), own::uptime),
    command("GET", (2, 2), strings::get),
    command("GETDEL", (2, 2), strings::getdel),
    command("GETSET", (3, 3), strings::getset),
    command("INCR", (2, 2), strings::incr),
    command("INCRBY", (3, 3), strings::incrby),
    command("INFO", (1, ANY), server::info),
    command("KEYS", (2, 2), keys::keys),
    command("LINDEX", (3, 3), lists::lindex),
    command("LLEN", (2, 2), lists::llen),
    command("LPOP", (2, 3), lists::lpop),
    command("LPUSH", (3, ANY), lists::lpush),
    command("LRANGE", (4, 4), lists::lrange),
    command("MGET", (2, ANY), strings::mget),
    command("MSET", (3, ANY), strings::mset),
    command("PERSIST", (2, 2), keys::persist),
    command("PEXPIRE", (3, 3), keys::pexpire),
    command("PING", (1, 2), server::ping),
    command("PTTL", (2, 2), keys::pttl),
    command("RPOP", (2, 3), lists::rpop),
    command("RPUSH", (3, ANY), lists::rpush),
    command("SELECT", (2, 2), server::select),
    command("SET", (3, ANY), strings::set),
    command("SETNX", (3, 3), strings::setnx),
    command("STRLEN", (2, 2), strings::strlen),
    command("TTL", (2, 2), keys::ttl),
    command("TYPE", (2, 2), keys::kind),
    command("UNLINK", (2, ANY), keys::del),
];

/// The longest name in the table, in bytes.
const MAX_NAME: usize = 16;

fn find(name: &[u8]) -> Option<&'static Command> {
    let mut upper = [0; MAX_NAME];
    let upper = upper.get_mut(..name.len())?;
    upper.copy_from_slice(name);
    upper.make_ascii_uppercase();
    let index = COMMANDS.binary_search_by(|command| command.name.as_bytes().cmp(upper)).ok()?;
    COMMANDS.get(index)
}

/// Carries out one request, whose arguments lie in `buffer`, and appends the reply to `out`.
pub fn execute(
    store: &mut Store,
    machine: &mut dyn Machine,
    session: &Session,
    buffer: &[u8],
    args: &Args,
    out: &mut Out,
) -> Outcome {
    let name = args.get(buffer, 0);
    if args.is_empty() {
        return Outcome::Continue;
    }
    if name.eq_ignore_ascii_case(b"QUIT") {
        out.simple("OK");
        return Outcome::Close;
    }
    let Some(command) = find(name) else {
        unknown(name, out);
        return Outcome::Continue;
    };
    let mut call = Call { store, machine, session, out, buffer, args };
    let done = if (command.arity.0..=command.arity.1).contains(&args.len()) {
        (command.run)(&mut call)
    } else {
        Err(Failure::Arity)
    };
    if let Err(failure) = done {
        failure.reply(command.name, out);
    }
    Outcome::Continue
}

/// Clients that try a newer protocol first (HELLO) expect exactly this error from servers that are older.
fn unknown(name: &[u8], out: &mut Out) {
    out.raw(b"-ERR unknown command '");
    for &byte in name.iter().take(64) {
        out.raw(&[if byte.is_ascii_graphic() { byte } else { b'?' }]);
    }
    out.raw(b"'\r\n");
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::resp::{Parsed, parse};

    #[derive(Default)]
    pub(crate) struct FakeMachine {
        pub(crate) dirty: Option<(u64, Option<u64>)>,
        pub(crate) off: bool,
        pub(crate) crashed: bool,
    }

    impl Machine for FakeMachine {
        fn uptime_ms(&self) -> u64 {
            1234
        }
        fn counters(&self, line: &mut dyn FnMut(&str, u64)) {
            line("frames", 7);
        }
        fn dirty(&mut self, pages_per_second: u64, pages: Option<u64>) -> Result<(), OutOfMemory> {
            if pages.is_some_and(|pages| pages > 1000) {
                return Err(OutOfMemory);
            }
            self.dirty = Some((pages_per_second, pages));
            Ok(())
        }
        fn connected(&self) -> usize {
            1
        }
        fn heap_used(&self) -> usize {
            4096
        }
        fn power_off(&mut self) {
            self.off = true;
        }
        fn crash(&mut self) {
            self.crashed = true;
        }
    }

    /// A server to talk to: inline requests in, raw replies out.
    pub(crate) struct Server {
        pub(crate) store: Store,
        pub(crate) machine: FakeMachine,
        pub(crate) outcome: Outcome,
    }

    impl Server {
        pub(crate) fn new() -> Self {
            Self { store: Store::new(3), machine: FakeMachine::default(), outcome: Outcome::Continue }
        }

        pub(crate) fn ask(&mut self, line: &str) -> String {
            let (mut args, mut out) = (Args::new(), Out::new());
            let line = format!("{line}\r\n");
            assert_eq!(parse(line.as_bytes(), &mut args), Ok(Parsed::Request(line.len())));
            let session = Session { id: 1 };
            self.outcome = execute(&mut self.store, &mut self.machine, &session, line.as_bytes(), &args, &mut out);
            assert!(!out.failed());
            String::from_utf8(out.bytes().to_vec()).unwrap().replace("\r\n", "|")
        }
    }

    #[test]
    fn the_table_is_in_order_and_names_fit() {
        assert!(COMMANDS.is_sorted_by(|a, b| a.name < b.name));
        assert!(COMMANDS.iter().all(|command| command.name.len() <= MAX_NAME));
    }

    #[test]
    fn unknown_commands_arity_and_case() {
        let mut server = Server::new();
        assert_eq!(server.ask("HELLO 3"), "-ERR unknown command 'HELLO'|");
        assert_eq!(server.ask("averyveryverylongcommandname"), "-ERR unknown command 'averyveryverylongcommandname'|");
        assert_eq!(server.ask("get"), "-ERR wrong number of arguments for 'get' command|");
        assert_eq!(server.ask("gEt nothing"), "$-1|");
        assert_eq!(server.outcome, Outcome::Continue);
        assert_eq!(server.ask("quit"), "+OK|");
        assert_eq!(server.outcome, Outcome::Close);
        assert_eq!(server.ask(""), "");
    }
}
