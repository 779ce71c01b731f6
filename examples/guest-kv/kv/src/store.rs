//! The data set.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::hash::{BuildHasher, Hasher};

use hashbrown::HashMap;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::resp::OutOfMemory;

/// An owned copy of `bytes`.
pub(crate) fn copy(bytes: &[u8]) -> Result<Box<[u8]>, OutOfMemory> {
    let mut owned = Vec::new();
    owned.try_reserve_exact(bytes.len()).map_err(|_| OutOfMemory)?;
    owned.extend_from_slice(bytes);
    Ok(owned.into_boxed_slice())
}

/// What a key stands for.
#[derive(Debug)]
pub enum Value {
    /// A string.
    Bytes(Vec<u8>),
    /// A list.
    List(VecDeque<Box<[u8]>>),
}

impl Value {
    /// The name of the type, as the TYPE command gives it.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Bytes(_) => "string",
            Self::List(_) => "list",
        }
    }
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) value: Value,
    /// When the entry is no more, in milliseconds of the store's clock.
    pub(crate) expires: Option<u64>,
}

/// A hash that is the same on every run unless seeded, fast for short keys, and hard to flood once seeded.
#[derive(Debug, Clone, Copy)]
struct Seeded(u64);

struct SeededHasher {
    seed: u64,
    hash: u64,
}

impl Hasher for SeededHasher {
    fn write(&mut self, bytes: &[u8]) {
        self.hash = xxh3_64_with_seed(bytes, self.seed ^ self.hash);
    }

    /// The length prefix of a slice: keys are the only thing hashed, so it adds nothing.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.hash
    }
}

impl BuildHasher for Seeded {
    type Hasher = SeededHasher;

    fn build_hasher(&self) -> SeededHasher {
        SeededHasher { seed: self.0, hash: 0 }
    }
}

/// Keys and values. Expired keys are invisible at once, and removed when somebody asks for them.
#[derive(Debug)]
pub struct Store {
    map: HashMap<Box<[u8]>, Entry, Seeded>,
    now: u64,
}

impl Entry {
    fn alive(&self, now: u64) -> bool {
        self.expires.is_none_or(|at| at > now)
    }
}

impl Store {
    /// An empty store; `seed` should differ from run to run, against clients that choose colliding keys.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { map: HashMap::with_hasher(Seeded(seed)), now: 0 }
    }

    /// Sets the clock, in milliseconds; it never goes back.
    pub fn set_now(&mut self, now: u64) {
        self.now = self.now.max(now);
    }

    pub(crate) fn now(&self) -> u64 {
        self.now
    }

    /// The number of keys, expired ones that nobody asked for included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether there are no keys.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        // A new map instead of `clear`: the memory is given back.
        self.map = HashMap::with_hasher(*self.map.hasher());
    }

    pub(crate) fn entry(&mut self, key: &[u8]) -> Option<&mut Entry> {
        if !self.map.get(key)?.alive(self.now) {
            self.map.remove(key);
            return None;
        }
        self.map.get_mut(key)
    }

    pub(crate) fn value(&mut self, key: &[u8]) -> Option<&mut Value> {
        self.entry(key).map(|entry| &mut entry.value)
    }

    /// Puts a value in place of whatever the key stood for.
    pub(crate) fn insert(&mut self, key: &[u8], value: Value, expires: Option<u64>) -> Result<(), OutOfMemory> {
        if let Some(entry) = self.map.get_mut(key) {
            *entry = Entry { value, expires };
            return Ok(());
        }
        let key = copy(key)?;
        self.map.try_reserve(1).map_err(|_| OutOfMemory)?;
        self.map.insert(key, Entry { value, expires });
        Ok(())
    }

    pub(crate) fn remove(&mut self, key: &[u8]) -> Option<Value> {
        let entry = self.map.remove(key)?;
        entry.alive(self.now).then_some(entry.value)
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = (&[u8], &Entry)> {
        self.map.iter().filter(|(_, entry)| entry.alive(self.now)).map(|(key, entry)| (&**key, entry))
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &[u8]> {
        self.entries().map(|(key, _)| key)
    }

    /// A hash of all keys and values, whatever their order in memory; deadlines are not part of it.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let one = |(key, entry): (&[u8], &Entry)| {
            let name = xxh3_64_with_seed(key, 0);
            match &entry.value {
                Value::Bytes(bytes) => xxh3_64_with_seed(bytes, name ^ 1),
                Value::List(list) => list.iter().fold(name ^ 2, |hash, item| xxh3_64_with_seed(item, hash)),
            }
        };
        self.entries().map(one).fold(0, u64::wrapping_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(store: &mut Store, key: &str, value: &str) {
        store.insert(key.as_bytes(), Value::Bytes(value.as_bytes().to_vec()), None).unwrap();
    }

    #[test]
    fn the_digest_sees_contents_and_not_order() {
        let (mut one, mut two) = (Store::new(1), Store::new(2));
        for index in 0..1000 {
            put(&mut one, &format!("key{index}"), &index.to_string());
            put(&mut two, &format!("key{}", 999 - index), &(999 - index).to_string());
        }
        assert_eq!(one.digest(), two.digest());
        put(&mut two, "key7", "8");
        assert_ne!(one.digest(), two.digest());
        put(&mut two, "key7", "7");
        assert_eq!(one.digest(), two.digest());
        two.remove(b"key7");
        assert_ne!(one.digest(), two.digest());
    }

    #[test]
    fn expired_keys_are_gone() {
        let mut store = Store::new(0);
        store.insert(b"k", Value::Bytes(vec![1]), Some(10)).unwrap();
        store.set_now(9);
        assert!(store.entry(b"k").is_some());
        store.set_now(10);
        assert_eq!(store.digest(), 0);
        assert!(store.entry(b"k").is_none());
        assert!(store.is_empty());
        store.set_now(3);
        assert_eq!(store.now(), 10);
    }
}
