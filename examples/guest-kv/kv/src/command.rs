//! From a parsed request to a reply: the table of commands.

use crate::database::{IO_ERROR, Keeper};
use crate::disk::{self, DiskJob};
use crate::log::Room;
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
    /// Computes without an end beside everything else, and counts what it gets done; or no longer.
    fn work(&mut self, on: bool);
    /// Clients that are connected.
    fn connected(&self) -> usize;
    /// Bytes of heap in use.
    fn heap_used(&self) -> usize;
    /// Switches the machine off once the replies so far have been given to the network device.
    fn power_off(&mut self);
    /// Crashes the machine at once.
    fn crash(&mut self);
    /// Begins work on the disks, the reply to which goes to this session when it is done.
    ///
    /// # Errors
    /// Why it cannot; the reply says it.
    fn disk(&mut self, session: u64, job: DiskJob) -> Result<(), &'static str>;
    /// Says what disks there are, as [`Self::counters`] does.
    fn disks(&self, line: &mut dyn FnMut(&str, u64));
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
    /// Nothing has been done: the request has to be run again when the log has more room.
    Stall,
    /// The reply comes later, and before it none of the requests that follow.
    Wait,
}

/// What running a request came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ran {
    /// What becomes of the connection.
    pub outcome: Outcome,
    /// The reply must not leave before the log is durable up to this ticket.
    pub until: u64,
}

impl From<Outcome> for Ran {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, until: 0 }
    }
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
    Io,
    LogFull,
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
            Self::Io => {
                out.raw(IO_ERROR);
                return;
            }
            Self::LogFull => "ENOSPC the log is full: delete something, or use a larger disk",
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
    pub(crate) keeper: Option<&'a mut Keeper>,
    /// The reply must not leave before the log is durable up to this ticket.
    pub(crate) until: u64,
    /// The reply comes later.
    pub(crate) waits: bool,
    /// So many arguments of the command, the name included, have changed the store; 0 if none has.
    applied: usize,
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

    /// The command has changed the store.
    pub(crate) fn changed(&mut self) {
        self.applied = self.len();
    }

    /// A command that consists of the first `count` arguments would have changed the store as it has been by now.
    pub(crate) fn changed_by(&mut self, count: usize) {
        self.applied = count;
    }
}

pub(crate) type Done = Result<(), Failure>;

pub(crate) struct Command {
    name: &'static str,
    /// The fewest and the most arguments, the name included.
    arity: (usize, usize),
    run: fn(&mut Call<'_>) -> Done,
    effect: Effect,
}

/// What a command may do to the store.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Effect {
    Reads,
    Changes,
    /// Changes it, and it does not become larger.
    Shrinks,
}

const ANY: usize = usize::MAX;

const fn command(name: &'static str, arity: (usize, usize), run: fn(&mut Call<'_>) -> Done) -> Command {
    Command { name, arity, run, effect: Effect::Reads }
}

impl Command {
    const fn changes(self) -> Self {
        Self { effect: Effect::Changes, ..self }
    }

    const fn shrinks(self) -> Self {
        Self { effect: Effect::Shrinks, ..self }
    }
}

/// All commands but QUIT, which is about the connection. In the order of the alphabet: looked up by binary search.
pub(crate) static COMMANDS: &[Command] = &[
    command("APPEND", (3, 3), strings::append).changes(),
    command("CLIENT", (2, ANY), server::client),
    command("COMMAND", (1, ANY), server::command),
    command("CONFIG", (2, ANY), server::config),
    command("DBSIZE", (1, 1), keys::dbsize),
    command("DECR", (2, 2), strings::decr).changes(),
    command("DECRBY", (3, 3), strings::decrby).changes(),
    command("DEL", (2, ANY), keys::del).shrinks(),
    command("ECHO", (2, 2), server::echo),
    command("EXISTS", (2, ANY), keys::exists),
    command("EXPIRE", (3, 3), keys::expire).shrinks(),
    command("FLUSHALL", (1, 2), keys::flush).shrinks(),
    command("FLUSHDB", (1, 2), keys::flush).shrinks(),
    command("FT.COUNTERS", (1, 1), own::counters),
    command("FT.CRASH", (1, 1), own::crash),
    command("FT.DIGEST", (1, 1), own::digest),
    command("FT.DIRTY", (2, 3), own::dirty),
    command("FT.DISK", (2, 6), disk::disk),
    command("FT.FSYNC", (1, 1), disk::fsync),
    command("FT.POWEROFF", (1, 1), own::power_off),
    command("FT.UPTIME", (1, 1), own::uptime),
    command("FT.WORK", (2, 2), own::work),
    command("GET", (2, 2), strings::get),
    command("GETDEL", (2, 2), strings::getdel).shrinks(),
    command("GETSET", (3, 3), strings::getset).changes(),
    command("INCR", (2, 2), strings::incr).changes(),
    command("INCRBY", (3, 3), strings::incrby).changes(),
    command("INFO", (1, ANY), server::info),
    command("KEYS", (2, 2), keys::keys),
    command("LINDEX", (3, 3), lists::lindex),
    command("LLEN", (2, 2), lists::llen),
    command("LPOP", (2, 3), lists::lpop).shrinks(),
    command("LPUSH", (3, ANY), lists::lpush).changes(),
    command("LRANGE", (4, 4), lists::lrange),
    command("MGET", (2, ANY), strings::mget),
    command("MSET", (3, ANY), strings::mset).changes(),
    command("PERSIST", (2, 2), keys::persist).shrinks(),
    command("PEXPIRE", (3, 3), keys::pexpire).shrinks(),
    command("PING", (1, 2), server::ping),
    command("PTTL", (2, 2), keys::pttl),
    command("RPOP", (2, 3), lists::rpop).shrinks(),
    command("RPUSH", (3, ANY), lists::rpush).changes(),
    command("SELECT", (2, 2), server::select),
    command("SET", (3, ANY), strings::set).changes(),
    command("SETNX", (3, 3), strings::setnx).changes(),
    command("STRLEN", (2, 2), strings::strlen),
    command("TTL", (2, 2), keys::ttl),
    command("TYPE", (2, 2), keys::kind),
    command("UNLINK", (2, ANY), keys::del).shrinks(),
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

/// Carries out one request, whose arguments lie in `buffer`, on a store without a log, and appends the reply to `out`.
pub fn execute(
    store: &mut Store,
    machine: &mut dyn Machine,
    session: &Session,
    buffer: &[u8],
    args: &Args,
    out: &mut Out,
) -> Outcome {
    run(store, None, machine, session, buffer, args, out).outcome
}

/// Carries out one request, and logs what it changes.
pub(crate) fn run(
    store: &mut Store,
    mut keeper: Option<&mut Keeper>,
    machine: &mut dyn Machine,
    session: &Session,
    buffer: &[u8],
    args: &Args,
    out: &mut Out,
) -> Ran {
    let name = args.get(buffer, 0);
    if args.is_empty() {
        return Outcome::Continue.into();
    }
    if name.eq_ignore_ascii_case(b"QUIT") {
        out.simple("OK");
        return Outcome::Close.into();
    }
    let Some(command) = find(name) else {
        unknown(name, out);
        return Outcome::Continue.into();
    };
    if !(command.arity.0..=command.arity.1).contains(&args.len()) {
        Failure::Arity.reply(command.name, out);
        return Outcome::Continue.into();
    }
    let now = store.now();
    if command.effect != Effect::Reads
        && let Some(keeper) = &mut keeper
    {
        match admit(keeper, command, args, now) {
            Ok(true) => {}
            Ok(false) => return Outcome::Stall.into(),
            Err(failure) => {
                failure.reply(command.name, out);
                return Outcome::Continue.into();
            }
        }
    }
    let keeper_of_call = keeper.as_deref_mut();
    let mut call =
        Call { store, machine, session, out, keeper: keeper_of_call, until: 0, waits: false, applied: 0, buffer, args };
    let done = (command.run)(&mut call);
    let Call { applied, mut until, waits, .. } = call;
    if let Err(failure) = done {
        failure.reply(command.name, out);
    }
    if let Some(keeper) = keeper.filter(|_| applied > 0) {
        debug_assert!(command.effect != Effect::Reads, "{} said that it does not change anything", command.name);
        until = keeper.append(now, buffer, args, applied);
    }
    Ran { outcome: if waits { Outcome::Wait } else { Outcome::Continue }, until }
}

/// Whether a command that changes something may run: false if it has to wait.
fn admit(keeper: &mut Keeper, command: &Command, args: &Args, now: u64) -> Result<bool, Failure> {
    match keeper.log.room(args.written_length(), command.effect == Effect::Shrinks, now) {
        Room::Ready => Ok(true),
        Room::Wait => Ok(false),
        Room::Full => Err(Failure::LogFull),
        Room::TooLong => Err(Failure::Text("ERR the command does not fit in the log")),
        Room::Failed => Err(Failure::Io),
        Room::OutOfMemory => Err(Failure::OutOfMemory),
    }
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
        pub(crate) works: bool,
        pub(crate) off: bool,
        pub(crate) crashed: bool,
        pub(crate) job: Option<DiskJob>,
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
        fn work(&mut self, on: bool) {
            self.works = on;
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
        fn disk(&mut self, _: u64, job: DiskJob) -> Result<(), &'static str> {
            self.job = Some(job);
            Ok(())
        }
        fn disks(&self, line: &mut dyn FnMut(&str, u64)) {
            line("disks", 0);
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
