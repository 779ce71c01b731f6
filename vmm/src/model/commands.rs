//! The commands of the server: the part of Redis that clients and `redis-benchmark` use, and our own.

use super::bus::Fault;
use super::disk_commands;
use super::disks::Disks;
use super::layout::Layout;
use super::log::{self, NotLogged};
use super::options::MAX_RATE;
use super::program::End;
use super::registers::{MILLISECOND, Registers};
use super::resp::{Reply, integer};
use super::store::{Kind, MAX_KEY, MAX_VALUE, Store, StoreError};

/// What becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Continue,
    /// It is closed once the replies are sent.
    Close,
    /// The request was not carried out: it comes again in the next step.
    Wait,
}

/// One request being carried out.
pub(super) struct Call<'a, 's> {
    pub(super) store: &'a Store<'s>,
    pub(super) registers: &'a mut Registers,
    pub(super) disks: &'a mut Disks,
    pub(super) layout: &'a Layout,
    pub(super) slot: usize,
    pub(super) connected: usize,
    pub(super) arguments: &'a [&'a [u8]],
    pub(super) reply: &'a mut Reply,
    pub(super) end: &'a mut Option<End>,
}

/// Why a command failed; the reply says it.
pub(super) enum Failure {
    Store(StoreError),
    Text(&'static str),
    /// Not yet, and nothing was changed.
    Wait,
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Store(StoreError::Fault(fault))
    }
}

pub(super) type Done = Result<(), Failure>;

pub(super) const SYNTAX: Failure = Failure::Text("ERR syntax error");
const NOT_INTEGER: Failure = Failure::Text("ERR value is not an integer or out of range");
const OVERFLOW: Failure = Failure::Text("ERR increment or decrement would overflow");
const LONG_KEY: Failure = Failure::Text("ERR the key is longer than 256 bytes");
const LONG_VALUE: Failure = Failure::Text("ERR the value is longer than 65536 bytes");
/// Elements that one LPOP or RPOP can take: their reply has to fit a known room.
const TOO_MANY: Failure = Failure::Text("ERR this machine pops one element at a time");

struct Command {
    name: &'static str,
    /// The fewest and the most arguments, the name included.
    arity: (usize, usize),
    /// It may change the data set: the log has it.
    changes: bool,
    run: fn(&mut Call<'_, '_>) -> Done,
}

const ANY: usize = usize::MAX;

const fn command(name: &'static str, arity: (usize, usize), run: fn(&mut Call<'_, '_>) -> Done) -> Command {
    Command { name, arity, changes: false, run }
}

const fn change(name: &'static str, arity: (usize, usize), run: fn(&mut Call<'_, '_>) -> Done) -> Command {
    Command { name, arity, changes: true, run }
}

/// All commands but QUIT, which is about the connection.
static COMMANDS: &[Command] = &[
    change("APPEND", (3, 3), append),
    command("CLIENT", (2, ANY), client),
    command("COMMAND", (1, ANY), no_commands),
    command("CONFIG", (2, ANY), config),
    command("DBSIZE", (1, 1), dbsize),
    change("DECR", (2, 2), |call| add(call, -1)),
    change("DECRBY", (3, 3), decrement_by),
    change("DEL", (2, ANY), delete),
    command("ECHO", (2, 2), echo),
    command("EXISTS", (2, ANY), exists),
    change("FLUSHALL", (1, 2), flush),
    change("FLUSHDB", (1, 2), flush),
    command("FT.COUNTERS", (1, 1), counters),
    command("FT.CRASH", (1, 1), crash),
    command("FT.DIGEST", (1, 1), digest),
    command("FT.DIRTY", (2, 3), dirty),
    command("FT.DISK", (2, 4), disk_commands::disk),
    command("FT.FSYNC", (1, 1), disk_commands::fsync),
    command("FT.POWEROFF", (1, 1), power_off),
    command("FT.UPTIME", (1, 1), uptime),
    command("GET", (2, 2), get),
    change("INCR", (2, 2), |call| add(call, 1)),
    change("INCRBY", (3, 3), increment_by),
    command("INFO", (1, ANY), info),
    command("LLEN", (2, 2), list_length),
    change("LPOP", (2, 3), |call| pop(call, true)),
    change("LPUSH", (3, ANY), |call| push(call, true)),
    command("LRANGE", (4, 4), list_range),
    command("MGET", (2, ANY), get_many),
    change("MSET", (3, ANY), set_many),
    command("PING", (1, 2), ping),
    change("RPOP", (2, 3), |call| pop(call, false)),
    change("RPUSH", (3, ANY), |call| push(call, false)),
    command("SELECT", (2, 2), select),
    change("SET", (3, ANY), set),
    command("STRLEN", (2, 2), string_length),
    command("TYPE", (2, 2), kind),
    change("UNLINK", (2, ANY), delete),
];

/// Carries out one request. Only a fault of the machine is an error; the peer's errors are replies.
pub(super) fn run(mut call: Call<'_, '_>) -> Result<Outcome, Fault> {
    let Some(name) = call.arguments.first().copied() else { return Ok(Outcome::Continue) };
    if name.eq_ignore_ascii_case(b"QUIT") {
        call.reply.simple("OK");
        return Ok(Outcome::Close);
    }
    let Some(command) = find(name) else {
        let shown = String::from_utf8_lossy(name.get(..64).unwrap_or(name)).into_owned();
        call.reply.error(&format!("ERR unknown command '{shown}'"));
        return Ok(Outcome::Continue);
    };
    if !command.takes(call.arguments.len()) {
        wrong_number(&mut call, command.name);
        return Ok(Outcome::Continue);
    }
    let logged = if command.changes && call.registers.log.on { write_down(&mut call) } else { Ok(()) };
    match logged.and_then(|()| (command.run)(&mut call)) {
        Ok(()) => {}
        Err(Failure::Wait) => return Ok(Outcome::Wait),
        Err(Failure::Text(text)) => call.reply.error(text),
        Err(Failure::Store(StoreError::Full)) => {
            call.reply.error("OOM command not allowed: the guest's memory is full");
        }
        Err(Failure::Store(StoreError::WrongType)) => {
            call.reply.error("WRONGTYPE Operation against a key holding the wrong kind of value");
        }
        Err(Failure::Store(StoreError::Fault(fault))) => return Err(fault),
    }
    Ok(Outcome::Continue)
}

/// Carries out a request of the log. It fails as it did when it was written down: nobody hears of it.
pub(super) fn replay(mut call: Call<'_, '_>) -> Result<(), Fault> {
    let command = call.arguments.first().and_then(|name| find(name)).filter(|c| c.takes(call.arguments.len()));
    match command.filter(|c| c.changes).map(|c| (c.run)(&mut call)) {
        Some(Err(Failure::Store(StoreError::Fault(fault)))) => Err(fault),
        _ => Ok(()),
    }
}

fn find(name: &[u8]) -> Option<&'static Command> {
    COMMANDS.iter().find(|c| name.eq_ignore_ascii_case(c.name.as_bytes()))
}

impl Command {
    fn takes(&self, arguments: usize) -> bool {
        let (fewest, most) = self.arity;
        (fewest..=most).contains(&arguments)
    }
}

/// Appends the request to the log.
fn write_down(call: &mut Call<'_, '_>) -> Done {
    log::append(&mut call.registers.log, call.disks, call.arguments).map_err(|error| match error {
        NotLogged::Disk(failure) => failure.into(),
        NotLogged::Full => Failure::Text("ERR the log on the disk is full"),
    })
}

fn wrong_number(call: &mut Call<'_, '_>, name: &str) {
    call.reply.error(&format!("ERR wrong number of arguments for '{}' command", name.to_ascii_lowercase()));
}

impl<'a> Call<'a, '_> {
    pub(super) fn argument(&self, index: usize) -> &'a [u8] {
        self.arguments.get(index).copied().unwrap_or_default()
    }

    pub(super) fn is(&self, index: usize, word: &str) -> bool {
        self.argument(index).eq_ignore_ascii_case(word.as_bytes())
    }

    fn key(&self, index: usize) -> Result<&'a [u8], Failure> {
        let key = self.argument(index);
        if key.len() <= MAX_KEY { Ok(key) } else { Err(LONG_KEY) }
    }

    fn value(&self, index: usize) -> Result<&'a [u8], Failure> {
        let value = self.argument(index);
        if value.len() <= MAX_VALUE { Ok(value) } else { Err(LONG_VALUE) }
    }

    pub(super) fn integer(&self, index: usize) -> Result<i64, Failure> {
        integer(self.argument(index)).ok_or(NOT_INTEGER)
    }

    pub(super) fn ok(&mut self) -> Done {
        self.reply.simple("OK");
        Ok(())
    }

    fn bulk_or_null(&mut self, value: Option<Vec<u8>>) {
        match value {
            Some(value) => self.reply.bulk(&value),
            None => self.reply.null(),
        }
    }
}

// The connection and the server.

fn ping(call: &mut Call<'_, '_>) -> Done {
    match call.arguments.get(1) {
        Some(text) => call.reply.bulk(text),
        None => call.reply.simple("PONG"),
    }
    Ok(())
}

fn echo(call: &mut Call<'_, '_>) -> Done {
    call.reply.bulk(call.argument(1));
    Ok(())
}

fn select(call: &mut Call<'_, '_>) -> Done {
    match call.integer(1)? {
        0 => call.ok(),
        _ => Err(Failure::Text("ERR DB index is out of range")),
    }
}

fn client(call: &mut Call<'_, '_>) -> Done {
    if call.is(1, "ID") {
        call.reply.count(call.slot as u64 + 1);
        Ok(())
    } else if call.is(1, "GETNAME") {
        call.reply.null();
        Ok(())
    } else if ["SETNAME", "SETINFO", "NO-EVICT", "NO-TOUCH"].iter().any(|word| call.is(1, word)) {
        call.ok()
    } else {
        Err(Failure::Text("ERR unknown CLIENT subcommand"))
    }
}

fn no_commands(call: &mut Call<'_, '_>) -> Done {
    if call.is(1, "COUNT") {
        call.reply.count(COMMANDS.len() as u64);
    } else {
        call.reply.array(0);
    }
    Ok(())
}

fn config(call: &mut Call<'_, '_>) -> Done {
    if !call.is(1, "GET") {
        return Err(Failure::Text("ERR settings cannot be changed: only CONFIG GET is supported"));
    }
    // What redis-benchmark asks for.
    for (name, value) in [("save", ""), ("appendonly", "no")] {
        if call.is(2, name) {
            call.reply.array(2);
            call.reply.bulk(name.as_bytes());
            call.reply.bulk(value.as_bytes());
            return Ok(());
        }
    }
    call.reply.array(0);
    Ok(())
}

fn info(call: &mut Call<'_, '_>) -> Done {
    let (keys, used, connected) = (call.store.keys()?, call.store.used()?, call.connected);
    let seconds = call.registers.now / (1000 * MILLISECOND);
    let text = format!(
        "# Server\r\nredis_version:7.0.0\r\nredis_mode:standalone\r\nos:model machine\r\nuptime_in_seconds:{seconds}\r\n\
         # Clients\r\nconnected_clients:{connected}\r\n# Memory\r\nused_memory:{used}\r\n\
         # Keyspace\r\ndb0:keys={keys},expires=0,avg_ttl=0\r\n"
    );
    call.reply.bulk(text.as_bytes());
    Ok(())
}

// Keys.

fn dbsize(call: &mut Call<'_, '_>) -> Done {
    call.reply.count(call.store.keys()?);
    Ok(())
}

fn flush(call: &mut Call<'_, '_>) -> Done {
    if call.arguments.len() == 2 && !call.is(1, "SYNC") && !call.is(1, "ASYNC") {
        return Err(SYNTAX);
    }
    call.store.clear()?;
    call.ok()
}

fn delete(call: &mut Call<'_, '_>) -> Done {
    let mut removed = 0;
    for index in 1..call.arguments.len() {
        removed += u64::from(call.store.remove(call.argument(index))?);
    }
    call.reply.count(removed);
    Ok(())
}

fn exists(call: &mut Call<'_, '_>) -> Done {
    let mut found = 0;
    for index in 1..call.arguments.len() {
        found += u64::from(call.store.kind(call.argument(index))?.is_some());
    }
    call.reply.count(found);
    Ok(())
}

fn kind(call: &mut Call<'_, '_>) -> Done {
    call.reply.simple(match call.store.kind(call.argument(1))? {
        None => "none",
        Some(Kind::String) => "string",
        Some(Kind::List) => "list",
    });
    Ok(())
}

// Strings.

fn set(call: &mut Call<'_, '_>) -> Done {
    let (key, value) = (call.key(1)?, call.value(2)?);
    let (mut only_new, mut only_old) = (false, false);
    for index in 3..call.arguments.len() {
        match () {
            () if call.is(index, "NX") => only_new = true,
            () if call.is(index, "XX") => only_old = true,
            () if call.is(index, "KEEPTTL") => {}
            () => return Err(Failure::Text("ERR of SET's options only NX, XX and KEEPTTL are supported")),
        }
    }
    if only_new && only_old {
        return Err(SYNTAX);
    }
    if only_new || only_old {
        let there = call.store.kind(key)?.is_some();
        if there != only_old {
            call.reply.null();
            return Ok(());
        }
    }
    call.store.set(key, value)?;
    call.ok()
}

fn get(call: &mut Call<'_, '_>) -> Done {
    let value = call.store.get(call.argument(1))?;
    call.bulk_or_null(value);
    Ok(())
}

fn string_length(call: &mut Call<'_, '_>) -> Done {
    let value = call.store.get(call.argument(1))?;
    call.reply.count(value.map_or(0, |value| value.len() as u64));
    Ok(())
}

fn append(call: &mut Call<'_, '_>) -> Done {
    let key = call.key(1)?;
    let mut value = call.store.get(key)?.unwrap_or_default();
    value.extend_from_slice(call.argument(2));
    if value.len() > MAX_VALUE {
        return Err(LONG_VALUE);
    }
    call.store.set(key, &value)?;
    call.reply.count(value.len() as u64);
    Ok(())
}

fn get_many(call: &mut Call<'_, '_>) -> Done {
    call.reply.array(call.arguments.len() - 1);
    for index in 1..call.arguments.len() {
        let value = match call.store.get(call.argument(index)) {
            Err(StoreError::WrongType) => None,
            other => other?,
        };
        call.bulk_or_null(value);
        if call.reply.overflowed {
            break;
        }
    }
    Ok(())
}

fn set_many(call: &mut Call<'_, '_>) -> Done {
    if call.arguments.len().is_multiple_of(2) {
        wrong_number(call, "mset");
        return Ok(());
    }
    // All are checked before the first is set.
    for index in (1..call.arguments.len()).step_by(2) {
        call.key(index)?;
        call.value(index + 1)?;
    }
    for index in (1..call.arguments.len()).step_by(2) {
        call.store.set(call.argument(index), call.argument(index + 1))?;
    }
    call.ok()
}

fn add(call: &mut Call<'_, '_>, amount: i64) -> Done {
    let key = call.key(1)?;
    let old = match call.store.get(key)? {
        Some(text) => integer(&text).ok_or(NOT_INTEGER)?,
        None => 0,
    };
    let new = old.checked_add(amount).ok_or(OVERFLOW)?;
    call.store.set(key, new.to_string().as_bytes())?;
    call.reply.integer(new);
    Ok(())
}

fn increment_by(call: &mut Call<'_, '_>) -> Done {
    let amount = call.integer(2)?;
    add(call, amount)
}

fn decrement_by(call: &mut Call<'_, '_>) -> Done {
    let amount = call.integer(2)?.checked_neg().ok_or(OVERFLOW)?;
    add(call, amount)
}

// Lists.

fn push(call: &mut Call<'_, '_>, front: bool) -> Done {
    let key = call.key(1)?;
    for index in 2..call.arguments.len() {
        call.value(index)?;
    }
    let mut length = 0;
    for index in 2..call.arguments.len() {
        length = call.store.push(key, call.argument(index), front)?;
    }
    call.reply.count(length);
    Ok(())
}

fn pop(call: &mut Call<'_, '_>, front: bool) -> Done {
    if call.arguments.len() == 3 {
        return Err(TOO_MANY);
    }
    let value = call.store.pop(call.argument(1), front)?;
    call.bulk_or_null(value);
    Ok(())
}

fn list_length(call: &mut Call<'_, '_>) -> Done {
    call.reply.count(call.store.length(call.argument(1))?);
    Ok(())
}

fn list_range(call: &mut Call<'_, '_>) -> Done {
    let (key, from, to) = (call.argument(1), call.integer(2)?, call.integer(3)?);
    let length = call.store.length(key)?;
    let signed = i64::try_from(length).unwrap_or(i64::MAX);
    let absolute = |index: i64| if index < 0 { signed.saturating_add(index) } else { index };
    let (from, to) = (absolute(from).max(0), absolute(to).min(signed - 1));
    let (Ok(from), Ok(to)) = (u64::try_from(from), u64::try_from(to)) else {
        call.reply.array(0);
        return Ok(());
    };
    if from > to {
        call.reply.array(0);
        return Ok(());
    }
    call.reply.array(usize::try_from(to - from + 1).unwrap_or(usize::MAX));
    let reply = &mut *call.reply;
    call.store.range(key, from, to, &mut |element| {
        reply.bulk(element);
        !reply.overflowed
    })?;
    Ok(())
}

// Our own.

/// `FT.DIRTY pages-per-second [working-set-pages]`
fn dirty(call: &mut Call<'_, '_>) -> Done {
    let rate = u64::try_from(call.integer(1)?).ok().filter(|rate| *rate <= MAX_RATE).ok_or(NOT_INTEGER)?;
    let pages = match call.arguments.len() {
        3 => u64::try_from(call.integer(2)?).ok().filter(|pages| *pages > 0).ok_or(NOT_INTEGER)?,
        _ => call.layout.load_pages,
    };
    if pages > call.layout.load_pages {
        return Err(Failure::Store(StoreError::Full));
    }
    call.registers.set_load(rate, pages);
    call.ok()
}

fn digest(call: &mut Call<'_, '_>) -> Done {
    let digest = call.store.digest()?;
    call.reply.bulk(format!("{digest:016x}").as_bytes());
    Ok(())
}

fn uptime(call: &mut Call<'_, '_>) -> Done {
    call.reply.count(call.registers.now / MILLISECOND);
    Ok(())
}

fn counters(call: &mut Call<'_, '_>) -> Done {
    let Registers { frames_in, frames_out, requests, load, beacon, .. } = &*call.registers;
    let text = format!(
        "frames_in:{frames_in}\r\nframes_out:{frames_out}\r\nrequests:{requests}\r\ntouches:{}\r\nbeacons:{}\r\n",
        load.touches, beacon.number
    );
    call.reply.bulk(text.as_bytes());
    Ok(())
}

fn power_off(call: &mut Call<'_, '_>) -> Done {
    *call.end = Some(End::PoweredOff);
    call.ok()
}

fn crash(call: &mut Call<'_, '_>) -> Done {
    *call.end = Some(End::Crashed("FT.CRASH was asked for".into()));
    call.ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;
    use crate::model::bus::Bus;

    /// Asks one request after the other and compares the replies, with `|` for CR LF.
    fn dialogue(lines: &[(&str, &str)]) {
        let ram = GuestRam::new(4 << 20).unwrap();
        let layout = Layout::of(&ram);
        let store = Store::open(Bus(ram.tracked()), &layout).unwrap();
        let mut registers = Registers { now: 1234 * MILLISECOND, ..Registers::default() };
        for (request, wanted) in lines {
            let arguments: Vec<_> = request.split(' ').map(str::as_bytes).collect();
            assert_eq!(ask(&store, &layout, &mut registers, &arguments).0, *wanted, "{request}");
        }
    }

    fn ask(store: &Store<'_>, layout: &Layout, registers: &mut Registers, arguments: &[&[u8]]) -> (String, bool) {
        let (mut reply, mut end, mut disks) = (Reply::default(), None, Disks::default());
        let (reply_to, end_to) = (&mut reply, &mut end);
        let disks = &mut disks;
        let call =
            Call { store, registers, disks, layout, slot: 0, connected: 1, arguments, reply: reply_to, end: end_to };
        run(call).unwrap();
        (String::from_utf8_lossy(&reply.bytes).replace("\r\n", "|"), reply.overflowed)
    }

    #[test]
    fn strings() {
        dialogue(&[
            ("GET k", "$-1|"),
            ("SET k hello", "+OK|"),
            ("get k", "$5|hello|"),
            ("SET k x NX", "$-1|"),
            ("SET n x XX", "$-1|"),
            ("SET n 41 NX", "+OK|"),
            ("SET n x NX XX", "-ERR syntax error|"),
            ("SET n x EX 10", "-ERR of SET's options only NX, XX and KEEPTTL are supported|"),
            ("INCR n", ":42|"),
            ("DECR n", ":41|"),
            ("INCRBY n 9223372036854775807", "-ERR increment or decrement would overflow|"),
            ("DECRBY n -9223372036854775808", "-ERR increment or decrement would overflow|"),
            ("DECRBY n 1", ":40|"),
            ("INCR k", "-ERR value is not an integer or out of range|"),
            ("APPEND k !", ":6|"),
            ("STRLEN k", ":6|"),
            ("MSET a 1 b 2", "+OK|"),
            ("MSET a 1 b", "-ERR wrong number of arguments for 'mset' command|"),
            ("MGET a none b", "*3|$1|1|$-1|$1|2|"),
            ("EXISTS a a none", ":2|"),
            ("DEL a none", ":1|"),
            ("DBSIZE", ":3|"),
            ("FLUSHALL", "+OK|"),
            ("DBSIZE", ":0|"),
        ]);
    }

    #[test]
    fn lists() {
        dialogue(&[
            ("RPUSH l a b c", ":3|"),
            ("LPUSH l z", ":4|"),
            ("LRANGE l 0 -1", "*4|$1|z|$1|a|$1|b|$1|c|"),
            ("LRANGE l -2 99", "*2|$1|b|$1|c|"),
            ("LRANGE l 3 1", "*0|"),
            ("LRANGE none 0 -1", "*0|"),
            ("LRANGE l 0 x", "-ERR value is not an integer or out of range|"),
            ("LPOP l", "$1|z|"),
            ("RPOP l", "$1|c|"),
            ("RPOP l 2", "-ERR this machine pops one element at a time|"),
            ("LLEN l", ":2|"),
            ("GET l", "-WRONGTYPE Operation against a key holding the wrong kind of value|"),
            ("MGET l", "*1|$-1|"),
            ("TYPE l", "+list|"),
            ("SET l now-a-string", "+OK|"),
            ("LPUSH l x", "-WRONGTYPE Operation against a key holding the wrong kind of value|"),
            ("DEL l", ":1|"),
            ("LPOP l", "$-1|"),
        ]);
    }

    #[test]
    fn the_server_and_our_own() {
        dialogue(&[
            ("PING", "+PONG|"),
            ("PING hi", "$2|hi|"),
            ("ECHO", "-ERR wrong number of arguments for 'echo' command|"),
            ("NONSENSE 1", "-ERR unknown command 'NONSENSE'|"),
            ("SELECT 0", "+OK|"),
            ("SELECT 1", "-ERR DB index is out of range|"),
            ("CONFIG GET save", "*2|$4|save|$0||"),
            ("CONFIG GET x", "*0|"),
            ("CONFIG SET save x", "-ERR settings cannot be changed: only CONFIG GET is supported|"),
            ("CLIENT SETNAME x", "+OK|"),
            ("COMMAND DOCS", "*0|"),
            ("FT.UPTIME", ":1234|"),
            ("FT.DIRTY 1000 16", "+OK|"),
            ("FT.DIRTY 0", "+OK|"),
            ("FT.DIRTY 1 999999", "-OOM command not allowed: the guest's memory is full|"),
            ("FT.DIRTY -1", "-ERR value is not an integer or out of range|"),
            ("FT.DIRTY 1 0", "-ERR value is not an integer or out of range|"),
            ("FT.DIGEST", "$16|0000000000000000|"),
            ("FT.FSYNC", "+OK|"),
            ("FT.DISK SUM", "-ERR there is no such disk|"),
            ("FT.DISK WRITE 0 x", "-ERR there is no such disk|"),
            ("FT.DISK NONSENSE", "-ERR syntax error|"),
        ]);
    }

    #[test]
    fn what_is_too_long_is_refused_and_changes_nothing() {
        let ram = GuestRam::new(4 << 20).unwrap();
        let layout = Layout::of(&ram);
        let store = Store::open(Bus(ram.tracked()), &layout).unwrap();
        let mut registers = Registers::default();
        let (key, value) = (vec![b'k'; MAX_KEY], vec![b'v'; MAX_VALUE]);
        let (long_key, long_value) = (vec![b'k'; MAX_KEY + 1], vec![b'v'; MAX_VALUE + 1]);
        let mut ask = |arguments: &[&[u8]]| ask(&store, &layout, &mut registers, arguments);
        assert_eq!(ask(&[b"SET", &key, &value]).0, "+OK|");
        assert_eq!(ask(&[b"GET", &key]).0.len(), MAX_VALUE + "$65536||".len());
        for request in [
            [&b"SET"[..], &long_key, b"x"],
            [b"SET", b"x", &long_value],
            [b"LPUSH", b"x", &long_value],
            [b"APPEND", &key, b"x"],
        ] {
            assert!(ask(&request).0.starts_with("-ERR the "), "{:?}", String::from_utf8_lossy(request[0]));
        }
        assert_eq!(ask(&[b"MSET", b"a", b"1", b"b", &long_value]).0, "-ERR the value is longer than 65536 bytes|");
        assert_eq!(ask(&[b"DBSIZE"]).0, ":1|");
        assert!(ask(&[b"MGET", &key, &key]).1, "a reply of more than a ring");
    }
}
