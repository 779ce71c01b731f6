//! Commands about the server and the connection, as far as ordinary clients and redis-benchmark ask for them.

use alloc::string::String;
use core::fmt::Write as _;

use crate::command::{COMMANDS, Call, Done, Failure};

pub(crate) fn ping(call: &mut Call<'_>) -> Done {
    match call.len() {
        1 => call.out.raw(b"+PONG\r\n"),
        _ => call.out.bulk(call.arg(1)),
    }
    Ok(())
}

pub(crate) fn echo(call: &mut Call<'_>) -> Done {
    call.out.bulk(call.arg(1));
    Ok(())
}

pub(crate) fn select(call: &mut Call<'_>) -> Done {
    match call.integer(1)? {
        0 => call.ok(),
        _ => return Err(Failure::Text("ERR DB index is out of range")),
    }
    Ok(())
}

/// Settings that redis-benchmark and others ask for; they cannot be changed.
const SETTINGS: &[(&str, &str)] =
    &[("databases", "1"), ("maxmemory", "0"), ("proto-max-bulk-len", "8388608"), ("save", "")];

pub(crate) fn config(call: &mut Call<'_>) -> Done {
    if !call.is(1, "GET") {
        return Err(Failure::Text("ERR settings cannot be changed: only CONFIG GET is supported"));
    }
    let policy = call.keeper.as_ref().map(|keeper| keeper.policy.name());
    let logged = [("appendfsync", policy.unwrap_or("no")), ("appendonly", if policy.is_some() { "yes" } else { "no" })];
    let settings = logged.iter().chain(SETTINGS);
    let asked = |call: &Call<'_>, name: &str| (2..call.len()).any(|at| call.arg(at) == b"*" || call.is(at, name));
    let count = settings.clone().filter(|(name, _)| asked(call, name)).count();
    call.out.array(2 * count);
    for (name, value) in settings {
        if asked(call, name) {
            call.out.bulk(name.as_bytes());
            call.out.bulk(value.as_bytes());
        }
    }
    Ok(())
}

/// No descriptions of commands: clients take an empty answer as "none known".
pub(crate) fn command(call: &mut Call<'_>) -> Done {
    if call.len() > 1 && call.is(1, "COUNT") {
        call.out.count(COMMANDS.len() + 1);
    } else {
        call.out.array(0);
    }
    Ok(())
}

pub(crate) fn client(call: &mut Call<'_>) -> Done {
    if ["SETNAME", "SETINFO", "NO-EVICT", "NO-TOUCH"].iter().any(|word| call.is(1, word)) {
        call.ok();
    } else if call.is(1, "ID") {
        call.out.integer(i64::try_from(call.session.id).unwrap_or(i64::MAX));
    } else if call.is(1, "GETNAME") {
        call.out.null();
    } else {
        return Err(Failure::Text("ERR unknown CLIENT subcommand"));
    }
    Ok(())
}

pub(crate) fn info(call: &mut Call<'_>) -> Done {
    let uptime = call.machine.uptime_ms();
    let mut text = String::new();
    // Room for all of it: writing then allocates nothing, and cannot fail.
    text.try_reserve_exact(1024).map_err(|_| Failure::OutOfMemory)?;
    let _ = write!(
        text,
        "# Server\r\nredis_version:7.0.0\r\nredis_mode:standalone\r\nos:guest-kv\r\nuptime_in_seconds:{}\r\n\
         uptime_in_ms:{uptime}\r\n# Clients\r\nconnected_clients:{}\r\n# Memory\r\nused_memory:{}\r\n\
         # Replication\r\nrole:master\r\nconnected_slaves:0\r\n# Keyspace\r\ndb0:keys={},expires=0,avg_ttl=0\r\n",
        uptime / 1000,
        call.machine.connected(),
        call.machine.heap_used(),
        call.store.len(),
    );
    call.out.bulk(text.as_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::command::tests::Server;

    #[test]
    fn what_clients_ask_first() {
        let mut server = Server::new();
        assert_eq!(server.ask("PING"), "+PONG|");
        assert_eq!(server.ask("PING x"), "$1|x|");
        assert_eq!(server.ask("ECHO x"), "$1|x|");
        assert_eq!(server.ask("SELECT 0"), "+OK|");
        assert!(server.ask("SELECT 1").starts_with("-ERR"));
        assert_eq!(server.ask("CONFIG GET save"), "*2|$4|save|$0||");
        assert_eq!(server.ask("CONFIG GET appendonly nothing"), "*2|$10|appendonly|$2|no|");
        assert!(server.ask("CONFIG SET save x").starts_with("-ERR"));
        assert_eq!(server.ask("COMMAND DOCS"), "*0|");
        assert_eq!(server.ask("CLIENT SETINFO LIB-NAME x"), "+OK|");
        assert_eq!(server.ask("CLIENT ID"), ":1|");
        assert!(server.ask("INFO").contains("db0:keys=0"));
    }
}
