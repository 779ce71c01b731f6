//! Commands on lists.

use alloc::boxed::Box;
use alloc::collections::VecDeque;

use crate::command::{Call, Done, Failure};
use crate::resp::OutOfMemory;
use crate::store::{Value, copy};

type List = VecDeque<Box<[u8]>>;

fn list<'c>(call: &'c mut Call<'_>) -> Result<Option<&'c mut List>, Failure> {
    match call.store.value(call.arg(1)) {
        None => Ok(None),
        Some(Value::List(list)) => Ok(Some(list)),
        Some(_) => Err(Failure::WrongType),
    }
}

fn push(call: &mut Call<'_>, front: bool) -> Done {
    let key = call.arg(1);
    if list(call)?.is_none() {
        call.store.insert(key, Value::List(List::new()), None)?;
    }
    // On error, what was pushed before stays: an empty list must not.
    let done = push_all(call, front);
    match list(call)?.map_or(0, |list| list.len()) {
        0 => drop(call.store.remove(key)),
        length if done.is_ok() => call.out.count(length),
        _ => {}
    }
    done
}

fn push_all(call: &mut Call<'_>, front: bool) -> Done {
    for index in 2..call.len() {
        let item = copy(call.arg(index))?;
        let Some(list) = list(call)? else { return Ok(()) };
        list.try_reserve(1).map_err(|_| OutOfMemory)?;
        if front {
            list.push_front(item);
        } else {
            list.push_back(item);
        }
        call.changed_by(index + 1);
    }
    Ok(())
}

pub(crate) fn lpush(call: &mut Call<'_>) -> Done {
    push(call, true)
}

pub(crate) fn rpush(call: &mut Call<'_>) -> Done {
    push(call, false)
}

fn pop(call: &mut Call<'_>, front: bool) -> Done {
    let many = call.len() == 3;
    let wanted = if many { usize::try_from(call.integer(2)?).map_err(|_| Failure::OutOfRange)? } else { 1 };
    let key = call.arg(1);
    let list = match call.store.value(key) {
        Some(Value::List(list)) => list,
        Some(_) => return Err(Failure::WrongType),
        None if many => {
            call.out.null_array();
            return Ok(());
        }
        None => {
            call.out.null();
            return Ok(());
        }
    };
    let count = wanted.min(list.len());
    let bytes: usize = if front {
        list.iter().take(count).map(|item| item.len() + 32).sum()
    } else {
        list.iter().rev().take(count).map(|item| item.len() + 32).sum()
    };
    call.out.reserve(bytes + 32)?;
    if many {
        call.out.array(count);
    }
    for _ in 0..count {
        let item = if front { list.pop_front() } else { list.pop_back() };
        call.out.bulk(&item.unwrap_or_default());
    }
    if list.is_empty() {
        call.store.remove(key);
    }
    if count > 0 {
        call.changed();
    }
    Ok(())
}

pub(crate) fn lpop(call: &mut Call<'_>) -> Done {
    pop(call, true)
}

pub(crate) fn rpop(call: &mut Call<'_>) -> Done {
    pop(call, false)
}

pub(crate) fn llen(call: &mut Call<'_>) -> Done {
    let length = list(call)?.map_or(0, |list| list.len());
    call.out.count(length);
    Ok(())
}

/// An index counted from the front; negative ones count from the back. May lie outside of the list.
fn absolute(index: i64, length: usize) -> i64 {
    if index < 0 { index.saturating_add(i64::try_from(length).unwrap_or(i64::MAX)) } else { index }
}

pub(crate) fn lindex(call: &mut Call<'_>) -> Done {
    let index = call.integer(2)?;
    let found = match call.store.value(call.arg(1)) {
        Some(Value::List(list)) => usize::try_from(absolute(index, list.len())).ok().and_then(|at| list.get(at)),
        Some(_) => return Err(Failure::WrongType),
        None => None,
    };
    match found {
        Some(item) => {
            call.out.reserve(item.len() + 32)?;
            call.out.bulk(item);
        }
        None => call.out.null(),
    }
    Ok(())
}

pub(crate) fn lrange(call: &mut Call<'_>) -> Done {
    let (first, last) = (call.integer(2)?, call.integer(3)?);
    let list = match call.store.value(call.arg(1)) {
        Some(Value::List(list)) => list,
        Some(_) => return Err(Failure::WrongType),
        None => {
            call.out.array(0);
            return Ok(());
        }
    };
    let start = usize::try_from(absolute(first, list.len()).max(0)).unwrap_or(usize::MAX);
    // The index after the last one; 0 if the last one lies before the front.
    let end = usize::try_from(absolute(last, list.len()).saturating_add(1)).unwrap_or(0).min(list.len());
    let (start, end) = if start < end { (start, end) } else { (0, 0) };
    let bytes: usize = list.range(start..end).map(|item| item.len() + 32).sum();
    call.out.reserve(bytes + 32)?;
    call.out.array(end - start);
    for item in list.range(start..end) {
        call.out.bulk(item);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::command::tests::Server;

    #[test]
    fn push_pop_and_range() {
        let mut server = Server::new();
        assert_eq!(server.ask("RPUSH l b c"), ":2|");
        assert_eq!(server.ask("LPUSH l a z"), ":4|");
        assert_eq!(server.ask("LRANGE l 0 -1"), "*4|$1|z|$1|a|$1|b|$1|c|");
        assert_eq!(server.ask("LRANGE l -2 99"), "*2|$1|b|$1|c|");
        for empty in ["LRANGE l 3 1", "LRANGE l 9 10", "LRANGE l 0 -9", "LRANGE none 0 -1"] {
            assert_eq!(server.ask(empty), "*0|", "{empty}");
        }
        assert_eq!(server.ask("LRANGE l -9223372036854775808 9223372036854775807").len(), "*4|".len() + 20);
        assert_eq!(server.ask("LINDEX l -1"), "$1|c|");
        assert_eq!(server.ask("LINDEX l 4"), "$-1|");
        assert_eq!(server.ask("LPOP l"), "$1|z|");
        assert_eq!(server.ask("RPOP l 2"), "*2|$1|c|$1|b|");
        assert_eq!(server.ask("LPOP l -1"), "-ERR index out of range|");
        assert_eq!(server.ask("LPOP l 9223372036854775807"), "*1|$1|a|");
        assert_eq!(server.ask("EXISTS l"), ":0|");
        assert_eq!(server.ask("LPOP l"), "$-1|");
        assert_eq!(server.ask("LPOP l 2"), "*-1|");
        assert_eq!(server.ask("LLEN l"), ":0|");
    }

    #[test]
    fn the_type_is_checked() {
        let mut server = Server::new();
        server.ask("SET s x");
        for line in ["LPUSH s x", "LPOP s", "LLEN s", "LRANGE s 0 1", "LINDEX s 0"] {
            assert!(server.ask(line).starts_with("-WRONGTYPE"), "{line}");
        }
    }
}
