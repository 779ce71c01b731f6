//! What one key stands for, as bytes: what a compaction writes.
//!
//! Length of the key, key, deadline (all ones: none), type; then a string's bytes, or for each item of a list its length and
//! its bytes.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::log::ReplayError;
use crate::resp::OutOfMemory;
use crate::store::{Store, Value, copy};

const ABSENT: u8 = 0;
const STRING: u8 = 1;
const LIST: u8 = 2;
/// Bytes besides the key and the value.
const FIXED: usize = 4 + 8 + 1;

fn value_bytes(value: &Value) -> usize {
    match value {
        Value::Bytes(bytes) => bytes.len(),
        Value::List(list) => list.iter().map(|item| 4 + item.len()).sum(),
    }
}

/// Bytes of the state of `key`.
pub(crate) fn length(store: &mut Store, key: &[u8]) -> usize {
    FIXED + key.len() + store.entry(key).map_or(0, |entry| value_bytes(&entry.value))
}

/// Bytes of the states of all keys, and what each needs besides.
pub(crate) fn length_of_all(store: &Store, each: usize) -> u64 {
    store.entries().map(|(key, entry)| (FIXED + each + key.len() + value_bytes(&entry.value)) as u64).sum()
}

fn put_length(out: &mut Vec<u8>, length: usize) {
    // Keys and items came in requests, whose parts are much shorter.
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
}

/// Appends the state of `key`; there is room for it.
pub(crate) fn write(store: &mut Store, key: &[u8], out: &mut Vec<u8>) {
    put_length(out, key.len());
    out.extend_from_slice(key);
    let entry = store.entry(key);
    let expires = entry.as_ref().and_then(|entry| entry.expires).unwrap_or(u64::MAX);
    out.extend_from_slice(&expires.to_le_bytes());
    match entry.map(|entry| &entry.value) {
        None => out.push(ABSENT),
        Some(Value::Bytes(bytes)) => {
            out.push(STRING);
            out.extend_from_slice(bytes);
        }
        Some(Value::List(list)) => {
            out.push(LIST);
            for item in list {
                put_length(out, item.len());
                out.extend_from_slice(item);
            }
        }
    }
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(head)
}

fn take_prefixed<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u32::from_le_bytes(take(bytes, 4)?.try_into().ok()?);
    take(bytes, usize::try_from(length).ok()?)
}

/// Makes a key stand for what a state says.
///
/// # Errors
/// These bytes are no state, or memory ran out.
pub(crate) fn read(store: &mut Store, mut bytes: &[u8]) -> Result<(), ReplayError> {
    let bytes = &mut bytes;
    let head = |bytes: &mut &[u8]| {
        let expires = u64::from_le_bytes(take(bytes, 8)?.try_into().ok()?);
        Some((expires, *take(bytes, 1)?.first()?))
    };
    let key = take_prefixed(bytes).ok_or(ReplayError::Refused)?;
    let (expires, kind) = head(bytes).ok_or(ReplayError::Refused)?;
    let value = match kind {
        ABSENT if bytes.is_empty() => {
            store.remove(key);
            return Ok(());
        }
        STRING => Value::Bytes(copy(bytes)?.into_vec()),
        LIST => {
            let mut list = VecDeque::new();
            while !bytes.is_empty() {
                let item = take_prefixed(bytes).ok_or(ReplayError::Refused)?;
                list.try_reserve(1).map_err(|_| OutOfMemory)?;
                list.push_back(copy(item)?);
            }
            if list.is_empty() {
                return Err(ReplayError::Refused);
            }
            Value::List(list)
        }
        _ => return Err(ReplayError::Refused),
    };
    store.insert(key, value, (expires != u64::MAX).then_some(expires))?;
    Ok(())
}

impl From<OutOfMemory> for ReplayError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// The names of all keys at one moment, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Names {
    bytes: Vec<u8>,
    at: usize,
}

impl Names {
    pub(crate) fn of(store: &Store) -> Result<Self, OutOfMemory> {
        let length = store.entries().map(|(key, _)| 4 + key.len()).sum();
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(length).map_err(|_| OutOfMemory)?;
        for (key, _) in store.entries() {
            put_length(&mut bytes, key.len());
            bytes.extend_from_slice(key);
        }
        Ok(Self { bytes, at: 0 })
    }

    /// The next one.
    pub(crate) fn peek(&self) -> Option<&[u8]> {
        take_prefixed(&mut self.bytes.get(self.at..)?)
    }

    /// Goes past the next one.
    pub(crate) fn skip(&mut self) {
        self.at += self.peek().map_or(0, |name| 4 + name.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tests::Server;

    /// A state is read back as it was written, and no cut or changed one does harm.
    #[test]
    fn states_are_read_back() {
        let mut server = Server::new();
        for line in ["SET s value PX 500", "RPUSH l a bb ccc", "SET empty x", "GETSET empty y"] {
            server.ask(line);
        }
        let mut store = Store::new(1);
        let mut names = Names::of(&server.store).unwrap();
        while let Some(name) = names.peek() {
            let mut bytes = Vec::new();
            write(&mut server.store, name, &mut bytes);
            assert_eq!(bytes.len(), length(&mut server.store, name));
            read(&mut store, &bytes).unwrap();
            for end in 0..bytes.len() {
                let _error_or_shorter = read(&mut Store::new(1), &bytes[..end]);
            }
            for at in 0..bytes.len() {
                let mut bytes = bytes.clone();
                bytes[at] ^= 0x81;
                let _error_or_other = read(&mut Store::new(1), &bytes);
            }
            names.skip();
        }
        assert_eq!(store.digest(), server.store.digest());
        assert_eq!(store.entry(b"s").unwrap().expires, Some(500));
        let mut bytes = Vec::new();
        write(&mut Store::new(1), b"s", &mut bytes);
        read(&mut store, &bytes).unwrap();
        assert!(store.entry(b"s").is_none());
        let all = length_of_all(&store, 0);
        assert_eq!(all, (length(&mut store, b"l") + length(&mut store, b"empty")) as u64);
    }
}
