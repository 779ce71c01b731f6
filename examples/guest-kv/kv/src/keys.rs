//! Commands on keys of any type.

use crate::command::{Call, Done, Failure};
use crate::strings::deadline;

pub(crate) fn dbsize(call: &mut Call<'_>) -> Done {
    call.out.count(call.store.len());
    Ok(())
}

pub(crate) fn flush(call: &mut Call<'_>) -> Done {
    if call.len() == 2 && !call.is(1, "SYNC") && !call.is(1, "ASYNC") {
        return Err(Failure::Syntax);
    }
    if !call.store.is_empty() {
        call.changed();
    }
    call.store.clear();
    call.ok();
    Ok(())
}

pub(crate) fn del(call: &mut Call<'_>) -> Done {
    let removed = (1..call.len()).filter(|index| call.store.remove(call.arg(*index)).is_some()).count();
    if removed > 0 {
        call.changed();
    }
    call.out.count(removed);
    Ok(())
}

pub(crate) fn exists(call: &mut Call<'_>) -> Done {
    let found = (1..call.len()).filter(|index| call.store.entry(call.arg(*index)).is_some()).count();
    call.out.count(found);
    Ok(())
}

pub(crate) fn kind(call: &mut Call<'_>) -> Done {
    let kind = call.store.value(call.arg(1)).map_or("none", |value| value.kind());
    call.out.simple(kind);
    Ok(())
}

/// `KEYS *` and `KEYS prefix*`; other patterns are refused.
pub(crate) fn keys(call: &mut Call<'_>) -> Done {
    let special = |byte: &u8| b"*?[\\".contains(byte);
    let pattern = call.arg(1);
    let (prefix, open) = match pattern.strip_suffix(b"*") {
        Some(prefix) => (prefix, true),
        None => (pattern, false),
    };
    if prefix.iter().any(special) {
        return Err(Failure::Text("ERR only the patterns 'name' and 'prefix*' are supported"));
    }
    let matches = |key: &&[u8]| if open { key.starts_with(prefix) } else { *key == prefix };
    let (mut count, mut bytes) = (0, 32);
    for key in call.store.keys().filter(matches) {
        count += 1;
        bytes += key.len() + 32;
    }
    call.out.reserve(bytes)?;
    call.out.array(count);
    call.store.keys().filter(matches).for_each(|key| call.out.bulk(key));
    Ok(())
}

fn set_expiry(call: &mut Call<'_>, unit: u64) -> Done {
    let (key, amount) = (call.arg(1), call.integer(2)?);
    // A deadline in the past deletes the key.
    let at = if amount <= 0 { call.store.now() } else { deadline(call.store.now(), amount, unit)? };
    let found = call.store.entry(key).map(|entry| entry.expires = Some(at)).is_some();
    if found {
        call.changed();
    }
    call.out.integer(i64::from(found));
    Ok(())
}

pub(crate) fn expire(call: &mut Call<'_>) -> Done {
    set_expiry(call, 1000)
}

pub(crate) fn pexpire(call: &mut Call<'_>) -> Done {
    set_expiry(call, 1)
}

pub(crate) fn persist(call: &mut Call<'_>) -> Done {
    let had = call.store.entry(call.arg(1)).is_some_and(|entry| entry.expires.take().is_some());
    if had {
        call.changed();
    }
    call.out.integer(i64::from(had));
    Ok(())
}

fn remaining(call: &mut Call<'_>, unit: u64) -> Done {
    let now = call.store.now();
    let reply = match call.store.entry(call.arg(1)).map(|entry| entry.expires) {
        None => -2,
        Some(None) => -1,
        Some(Some(at)) => i64::try_from(at.saturating_sub(now).div_ceil(unit)).unwrap_or(i64::MAX),
    };
    call.out.integer(reply);
    Ok(())
}

pub(crate) fn ttl(call: &mut Call<'_>) -> Done {
    remaining(call, 1000)
}

pub(crate) fn pttl(call: &mut Call<'_>) -> Done {
    remaining(call, 1)
}

#[cfg(test)]
mod tests {
    use crate::command::tests::Server;

    #[test]
    fn keys_come_and_go() {
        let mut server = Server::new();
        server.ask("MSET a1 x a2 y");
        server.ask("LPUSH b z");
        assert_eq!(server.ask("DBSIZE"), ":3|");
        assert_eq!(server.ask("EXISTS a1 a1 none"), ":2|");
        assert_eq!(server.ask("TYPE b"), "+list|");
        assert_eq!(server.ask("TYPE none"), "+none|");
        assert_eq!(server.ask("KEYS b"), "*1|$1|b|");
        assert!(server.ask("KEYS a*").starts_with("*2|"));
        assert!(server.ask("KEYS *").starts_with("*3|"));
        assert!(server.ask("KEYS a?").starts_with("-ERR"));
        assert_eq!(server.ask("DEL a1 none"), ":1|");
        assert_eq!(server.ask("FLUSHALL NOW"), "-ERR syntax error|");
        assert_eq!(server.ask("FLUSHALL"), "+OK|");
        assert_eq!(server.ask("DBSIZE"), ":0|");
    }

    #[test]
    fn deadlines() {
        let mut server = Server::new();
        server.ask("SET k v");
        assert_eq!(server.ask("TTL k"), ":-1|");
        assert_eq!(server.ask("TTL none"), ":-2|");
        assert_eq!(server.ask("EXPIRE k 10"), ":1|");
        assert_eq!(server.ask("EXPIRE none 10"), ":0|");
        server.store.set_now(1);
        assert_eq!(server.ask("TTL k"), ":10|");
        assert_eq!(server.ask("PERSIST k"), ":1|");
        assert_eq!(server.ask("PERSIST k"), ":0|");
        assert_eq!(server.ask("PEXPIRE k -1"), ":1|");
        assert_eq!(server.ask("EXISTS k"), ":0|");
    }
}
