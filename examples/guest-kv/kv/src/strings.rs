//! Commands on strings.

use alloc::vec::Vec;

use crate::command::{Call, Done, Failure};
use crate::resp::{Decimal, MAX_BULK, OutOfMemory, parse_integer};
use crate::store::Value;

/// Sets a string, in the memory that it had before where that is large enough: fewer pages are dirtied.
fn put(call: &mut Call<'_>, key: &[u8], bytes: &[u8], expires: Option<u64>) -> Result<(), OutOfMemory> {
    if let Some(entry) = call.store.entry(key)
        && let Value::Bytes(value) = &mut entry.value
        && value.capacity() >= bytes.len()
        && value.capacity() / 2 <= bytes.len().max(32)
    {
        value.clear();
        value.extend_from_slice(bytes);
        entry.expires = expires;
        call.changed();
        return Ok(());
    }
    let mut value = Vec::new();
    value.try_reserve_exact(bytes.len()).map_err(|_| OutOfMemory)?;
    value.extend_from_slice(bytes);
    call.store.insert(key, Value::Bytes(value), expires)?;
    call.changed();
    Ok(())
}

/// The instant that is `amount` units of `unit` milliseconds from now.
pub(crate) fn deadline(now: u64, amount: i64, unit: u64) -> Result<u64, Failure> {
    let amount = u64::try_from(amount).ok().filter(|amount| *amount > 0).ok_or(Failure::InvalidExpire)?;
    amount.checked_mul(unit).and_then(|wait| now.checked_add(wait)).ok_or(Failure::InvalidExpire)
}

pub(crate) fn set(call: &mut Call<'_>) -> Done {
    let (key, bytes) = (call.arg(1), call.arg(2));
    let (mut only_new, mut only_old, mut keep, mut get, mut expires) = (false, false, false, false, None);
    let mut at = 3;
    while at < call.len() {
        if call.is(at, "NX") {
            only_new = true;
        } else if call.is(at, "XX") {
            only_old = true;
        } else if call.is(at, "KEEPTTL") {
            keep = true;
        } else if call.is(at, "GET") {
            get = true;
        } else if (call.is(at, "EX") || call.is(at, "PX")) && at + 1 < call.len() && expires.is_none() {
            let unit = if call.is(at, "EX") { 1000 } else { 1 };
            expires = Some(deadline(call.store.now(), call.integer(at + 1)?, unit)?);
            at += 1;
        } else {
            return Err(Failure::Syntax);
        }
        at += 1;
    }
    if (only_new && only_old) || (keep && expires.is_some()) {
        return Err(Failure::Syntax);
    }
    let before = call.store.entry(key).map(|entry| entry.expires);
    if keep {
        expires = before.flatten();
    }
    let refused = (only_new && before.is_some()) || (only_old && before.is_none());
    if get {
        // The old value is sent before it is overwritten in place; should memory then run out, the error follows it
        // and the client is out of step, so the room is made sure of first.
        let old = self::old(call, key)?;
        if !refused {
            put(call, key, bytes, expires)?;
        }
        reply(call, old.as_deref());
    } else if refused {
        call.out.null();
    } else {
        put(call, key, bytes, expires)?;
        call.ok();
    }
    Ok(())
}

/// A copy of the string at `key`.
fn old(call: &mut Call<'_>, key: &[u8]) -> Result<Option<alloc::boxed::Box<[u8]>>, Failure> {
    Ok(call.string(key)?.map(|bytes| crate::store::copy(bytes)).transpose()?)
}

fn reply(call: &mut Call<'_>, value: Option<&[u8]>) {
    match value {
        Some(bytes) => call.out.bulk(bytes),
        None => call.out.null(),
    }
}

pub(crate) fn setnx(call: &mut Call<'_>) -> Done {
    let (key, bytes) = (call.arg(1), call.arg(2));
    let new = call.store.entry(key).is_none();
    if new {
        put(call, key, bytes, None)?;
    }
    call.out.integer(i64::from(new));
    Ok(())
}

pub(crate) fn get(call: &mut Call<'_>) -> Done {
    match call.store.value(call.arg(1)) {
        None => call.out.null(),
        Some(Value::Bytes(bytes)) => {
            call.out.reserve(bytes.len() + 32)?;
            call.out.bulk(bytes);
        }
        Some(_) => return Err(Failure::WrongType),
    }
    Ok(())
}

pub(crate) fn getdel(call: &mut Call<'_>) -> Done {
    let key = call.arg(1);
    get(call)?;
    if call.store.remove(key).is_some() {
        call.changed();
    }
    Ok(())
}

pub(crate) fn getset(call: &mut Call<'_>) -> Done {
    let (key, bytes) = (call.arg(1), call.arg(2));
    let old = old(call, key)?;
    put(call, key, bytes, None)?;
    reply(call, old.as_deref());
    Ok(())
}

pub(crate) fn strlen(call: &mut Call<'_>) -> Done {
    let length = call.string(call.arg(1))?.map_or(0, |bytes| bytes.len());
    call.out.count(length);
    Ok(())
}

pub(crate) fn append(call: &mut Call<'_>) -> Done {
    let (key, more) = (call.arg(1), call.arg(2));
    let length = match call.string(key)? {
        Some(bytes) => {
            if bytes.len() + more.len() > MAX_BULK {
                return Err(Failure::TooLong);
            }
            bytes.try_reserve(more.len()).map_err(|_| OutOfMemory)?;
            bytes.extend_from_slice(more);
            let length = bytes.len();
            call.changed();
            length
        }
        None => {
            put(call, key, more, None)?;
            more.len()
        }
    };
    call.out.count(length);
    Ok(())
}

fn add(call: &mut Call<'_>, amount: i64) -> Done {
    let key = call.arg(1);
    let before = match call.string(key)? {
        Some(bytes) => parse_integer(bytes).ok_or(Failure::NotInteger)?,
        None => 0,
    };
    let after = before.checked_add(amount).ok_or(Failure::Overflow)?;
    let expires = call.store.entry(key).and_then(|entry| entry.expires);
    put(call, key, Decimal::new(after).as_bytes(), expires)?;
    call.out.integer(after);
    Ok(())
}

pub(crate) fn incr(call: &mut Call<'_>) -> Done {
    add(call, 1)
}

pub(crate) fn decr(call: &mut Call<'_>) -> Done {
    add(call, -1)
}

pub(crate) fn incrby(call: &mut Call<'_>) -> Done {
    let amount = call.integer(2)?;
    add(call, amount)
}

pub(crate) fn decrby(call: &mut Call<'_>) -> Done {
    let amount = call.integer(2)?.checked_neg().ok_or(Failure::Overflow)?;
    add(call, amount)
}

pub(crate) fn mget(call: &mut Call<'_>) -> Done {
    let mut room = 32;
    for index in 1..call.len() {
        if let Some(Value::Bytes(bytes)) = call.store.value(call.arg(index)) {
            room += bytes.len();
        }
        room += 32;
    }
    call.out.reserve(room)?;
    call.out.array(call.len() - 1);
    for index in 1..call.len() {
        match call.store.value(call.arg(index)) {
            Some(Value::Bytes(bytes)) => call.out.bulk(bytes),
            _ => call.out.null(),
        }
    }
    Ok(())
}

pub(crate) fn mset(call: &mut Call<'_>) -> Done {
    if call.len().is_multiple_of(2) {
        return Err(Failure::Arity);
    }
    for index in (1..call.len()).step_by(2) {
        let (key, bytes) = (call.arg(index), call.arg(index + 1));
        if let Err(error) = put(call, key, bytes, None) {
            // The pairs before this one are in the store, and in the log as a shorter command.
            call.changed_by(if index > 1 { index } else { 0 });
            return Err(error.into());
        }
    }
    call.ok();
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::command::tests::Server;

    #[test]
    fn set_and_get() {
        let mut server = Server::new();
        assert_eq!(server.ask("SET k v"), "+OK|");
        assert_eq!(server.ask("SET k longer-than-before"), "+OK|");
        assert_eq!(server.ask("GET k"), "$18|longer-than-before|");
        assert_eq!(server.ask("SET k x NX"), "$-1|");
        assert_eq!(server.ask("SET other x XX"), "$-1|");
        assert_eq!(server.ask("SET other x NX"), "+OK|");
        assert_eq!(server.ask("SET other y XX GET"), "$1|x|");
        assert_eq!(server.ask("SET k x NX XX"), "-ERR syntax error|");
        assert_eq!(server.ask("SET k x BOGUS"), "-ERR syntax error|");
        assert_eq!(server.ask("SET k x EX"), "-ERR syntax error|");
        assert_eq!(server.ask("SET k x EX 0"), "-ERR invalid expire time|");
        assert_eq!(server.ask("SET k x EX 9223372036854775807"), "-ERR invalid expire time|");
        assert_eq!(server.ask("MSET a 1 b 2"), "+OK|");
        assert_eq!(server.ask("MSET a 1 b"), "-ERR wrong number of arguments for 'mset' command|");
        assert_eq!(server.ask("MGET a none b"), "*3|$1|1|$-1|$1|2|");
        assert_eq!(server.ask("GETSET a 5"), "$1|1|");
        assert_eq!(server.ask("GETDEL a"), "$1|5|");
        assert_eq!(server.ask("GET a"), "$-1|");
        assert_eq!(server.ask("APPEND b 34"), ":3|");
        assert_eq!(server.ask("STRLEN b"), ":3|");
    }

    #[test]
    fn a_deadline_ends_a_key() {
        let mut server = Server::new();
        assert_eq!(server.ask("SET k v PX 100"), "+OK|");
        assert_eq!(server.ask("PTTL k"), ":100|");
        server.store.set_now(60);
        assert_eq!(server.ask("SET k w KEEPTTL"), "+OK|");
        assert_eq!(server.ask("PTTL k"), ":40|");
        server.store.set_now(100);
        assert_eq!(server.ask("GET k"), "$-1|");
        assert_eq!(server.ask("SET k w XX"), "$-1|");
    }

    #[test]
    fn counting() {
        let mut server = Server::new();
        assert_eq!(server.ask("INCR n"), ":1|");
        assert_eq!(server.ask("INCRBY n 41"), ":42|");
        assert_eq!(server.ask("DECR n"), ":41|");
        assert_eq!(server.ask("DECRBY n 50"), ":-9|");
        assert_eq!(server.ask("GET n"), "$2|-9|");
        assert_eq!(server.ask("SET n 9223372036854775807"), "+OK|");
        assert_eq!(server.ask("INCR n"), "-ERR increment or decrement would overflow|");
        assert_eq!(server.ask("DECRBY n -9223372036854775808"), "-ERR increment or decrement would overflow|");
        assert_eq!(server.ask("SET n x"), "+OK|");
        assert_eq!(server.ask("INCR n"), "-ERR value is not an integer or out of range|");
    }

    #[test]
    fn the_type_is_checked() {
        let mut server = Server::new();
        server.ask("LPUSH l x");
        for line in ["GET l", "INCR l", "APPEND l x", "STRLEN l", "GETSET l x"] {
            assert!(server.ask(line).starts_with("-WRONGTYPE"), "{line}");
        }
        assert_eq!(server.ask("MGET l"), "*1|$-1|");
        assert_eq!(server.ask("SET l x"), "+OK|");
    }
}
