//! The data set: a hash table with chains, and a heap of power-of-two blocks, all in RAM.
//!
//! A block is found by its address alone, and every address in RAM is checked before it is followed. Freed blocks are kept
//! in a list for each size and are split but never joined: a heap that was filled with small values has no room for large
//! ones until FLUSHALL.

use super::bus::{Bus, Fault};
use super::layout::{Layout, STORE};

/// Longest key in bytes.
pub(super) const MAX_KEY: usize = 256;
/// Longest value, and longest element of a list, in bytes.
pub(super) const MAX_VALUE: usize = 64 << 10;

const MAGIC: u64 = u64::from_le_bytes(*b"modelkv1");
/// The smallest block is `1 << LEAST` bytes.
const LEAST: u8 = 6;
/// The largest holds the longest key and value with their header.
const MOST: u8 = 17;
const NEXT_FREE: u64 = STORE + 8;
const KEYS: u64 = STORE + 16;
const USED: u64 = STORE + 24;
const FREE_LISTS: u64 = STORE + 32;
/// Bytes before the key of an entry, and before the bytes of a list element.
const HEADER: u64 = 24;
const HEADER_LENGTH: usize = 24;
/// Bytes of a list's own value: first, last, length.
const LIST: usize = 24;

const BAD_BLOCK: Fault = Fault("a heap address that no program wrote");
const BAD_ENTRY: Fault = Fault("an entry of the store that no program wrote");

/// Why a command on the store failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StoreError {
    /// The heap is full.
    Full,
    /// The key holds the other kind of value.
    WrongType,
    /// RAM is not what it should be.
    Fault(Fault),
}

impl From<Fault> for StoreError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    String,
    List,
}

/// An entry, and where the pointer to it is.
#[derive(Clone, Copy, Debug)]
struct Entry {
    link: u64,
    address: u64,
    next: u64,
    hash: u32,
    key_length: u16,
    kind: Kind,
    class: u8,
    length: u32,
}

impl Entry {
    fn key(&self) -> u64 {
        self.address + HEADER
    }

    fn value(&self) -> u64 {
        self.key() + u64::from(self.key_length)
    }
}

/// An element of a list.
#[derive(Clone, Copy, Debug)]
struct Element {
    address: u64,
    next: u64,
    previous: u64,
    length: u32,
    class: u8,
}

/// A list's value.
#[derive(Clone, Copy, Debug)]
struct List {
    first: u64,
    last: u64,
    length: u64,
}

/// The data set in RAM.
#[derive(Clone, Copy)]
pub(super) struct Store<'a> {
    bus: Bus<'a>,
    layout: &'a Layout,
}

/// FNV-1a, then mixed, because buckets are picked by the low bits.
fn hash(seed: u64, pieces: &[&[u8]]) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325 ^ seed;
    for byte in pieces.iter().copied().flatten() {
        h = (h ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
    h ^= h >> 32;
    h = h.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    h ^ (h >> 29)
}

/// The smallest class of block for so many bytes.
fn class_for(bytes: u64) -> u8 {
    let exponent = bytes.next_power_of_two().trailing_zeros();
    u8::try_from(exponent).unwrap_or(u8::MAX).max(LEAST)
}

impl<'a> Store<'a> {
    /// The store in this RAM, made when there is none yet.
    pub(super) fn open(bus: Bus<'a>, layout: &'a Layout) -> Result<Self, Fault> {
        let store = Self { bus, layout };
        match bus.u64(STORE)? {
            MAGIC => {}
            0 => store.format()?,
            _ => return Err(Fault("the store's header is not one")),
        }
        Ok(store)
    }

    fn format(&self) -> Result<(), Fault> {
        self.bus.put_u64(STORE, MAGIC)?;
        self.bus.put_u64(NEXT_FREE, self.layout.heap.next_multiple_of(1 << LEAST))?;
        self.bus.put_u64(KEYS, 0)?;
        self.bus.put_u64(USED, 0)?;
        self.bus.write(FREE_LISTS, &[0; 8 * (MOST - LEAST + 1) as usize])
    }

    /// Forgets all keys.
    pub(super) fn clear(&self) -> Result<(), Fault> {
        let mut page = [0; 4096];
        let length = self.layout.bucket_count * 8;
        for offset in (0..length).step_by(page.len()) {
            let part = usize::try_from(length - offset).unwrap_or(page.len()).min(page.len());
            let Some(part) = page.get_mut(..part) else { break };
            self.bus.read(self.layout.buckets + offset, part)?;
            // Pages that are clear already need not become dirty.
            if part.iter().any(|byte| *byte != 0) {
                part.fill(0);
                self.bus.write(self.layout.buckets + offset, part)?;
            }
        }
        self.format()
    }

    /// Number of keys.
    pub(super) fn keys(&self) -> Result<u64, Fault> {
        self.bus.u64(KEYS)
    }

    /// Bytes of heap in use.
    pub(super) fn used(&self) -> Result<u64, Fault> {
        self.bus.u64(USED)
    }

    // The heap.

    fn free_list(class: u8) -> u64 {
        FREE_LISTS + 8 * u64::from(class - LEAST)
    }

    fn check_block(&self, address: u64, class: u8) -> Result<(), Fault> {
        let inside = address >= self.layout.heap
            && address.is_multiple_of(1 << LEAST)
            && (LEAST..=MOST).contains(&class)
            && address.checked_add(1 << class).is_some_and(|end| end <= self.layout.end);
        if inside { Ok(()) } else { Err(BAD_BLOCK) }
    }

    fn take_free(&self, class: u8) -> Result<Option<u64>, Fault> {
        let address = self.bus.u64(Self::free_list(class))?;
        if address == 0 {
            return Ok(None);
        }
        self.check_block(address, class)?;
        self.bus.put_u64(Self::free_list(class), self.bus.u64(address)?)?;
        Ok(Some(address))
    }

    fn give_free(&self, address: u64, class: u8) -> Result<(), Fault> {
        self.check_block(address, class)?;
        self.bus.put_u64(address, self.bus.u64(Self::free_list(class))?)?;
        self.bus.put_u64(Self::free_list(class), address)
    }

    /// A block of `1 << class` bytes with undefined contents.
    fn allocate(&self, class: u8) -> Result<u64, StoreError> {
        if class > MOST {
            return Err(StoreError::Full);
        }
        let address = match self.take_free(class)? {
            Some(address) => address,
            None => match self.extend(class)? {
                Some(address) => address,
                None => self.split(class)?.ok_or(StoreError::Full)?,
            },
        };
        self.bus.put_u64(USED, self.bus.u64(USED)?.saturating_add(1 << class))?;
        Ok(address)
    }

    fn extend(&self, class: u8) -> Result<Option<u64>, Fault> {
        let address = self.bus.u64(NEXT_FREE)?;
        let Some(end) = address.checked_add(1 << class).filter(|end| *end <= self.layout.end) else { return Ok(None) };
        self.check_block(address, class)?;
        self.bus.put_u64(NEXT_FREE, end)?;
        Ok(Some(address))
    }

    fn split(&self, class: u8) -> Result<Option<u64>, Fault> {
        for larger in class + 1..=MOST {
            if let Some(address) = self.take_free(larger)? {
                for half in (class..larger).rev() {
                    self.give_free(address + (1 << half), half)?;
                }
                return Ok(Some(address));
            }
        }
        Ok(None)
    }

    fn release(&self, address: u64, class: u8) -> Result<(), Fault> {
        self.give_free(address, class)?;
        self.bus.put_u64(USED, self.bus.u64(USED)?.saturating_sub(1 << class))
    }

    // The table.

    fn entry(&self, link: u64, address: u64) -> Result<Entry, Fault> {
        self.check_block(address, LEAST)?;
        let header: [u8; HEADER_LENGTH] = self.bus.array(address)?;
        let [n0, n1, n2, n3, n4, n5, n6, n7, h0, h1, h2, h3, k0, k1, kind, class, l0, l1, l2, l3, ..] = header;
        let kind = match kind {
            1 => Kind::String,
            2 => Kind::List,
            _ => return Err(BAD_ENTRY),
        };
        self.check_block(address, class)?;
        let next = u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]);
        let (hash, key_length) = (u32::from_le_bytes([h0, h1, h2, h3]), u16::from_le_bytes([k0, k1]));
        let entry =
            Entry { link, address, next, hash, key_length, kind, class, length: u32::from_le_bytes([l0, l1, l2, l3]) };
        let size = HEADER + u64::from(key_length) + u64::from(entry.length);
        let fits = size <= 1 << class && usize::from(key_length) <= MAX_KEY && entry.length as usize <= MAX_VALUE;
        if fits && (kind == Kind::String || entry.length as usize == LIST) { Ok(entry) } else { Err(BAD_ENTRY) }
    }

    fn write_header(&self, entry: &Entry) -> Result<(), Fault> {
        let Entry { link: _, address, next, hash, key_length, kind, class, length } = *entry;
        let mut header = Vec::with_capacity(HEADER_LENGTH);
        header.extend_from_slice(&next.to_le_bytes());
        header.extend_from_slice(&hash.to_le_bytes());
        header.extend_from_slice(&key_length.to_le_bytes());
        header.push(match kind {
            Kind::String => 1,
            Kind::List => 2,
        });
        header.push(class);
        header.extend_from_slice(&length.to_le_bytes());
        self.bus.write(address, &header)
    }

    /// Most steps along a chain: more entries than that do not fit into RAM.
    fn chain_limit(&self) -> u64 {
        (self.layout.end - self.layout.heap) >> LEAST
    }

    fn bucket(&self, hash: u64) -> u64 {
        self.layout.buckets + 8 * (hash & (self.layout.bucket_count - 1))
    }

    fn find(&self, key: &[u8]) -> Result<Option<Entry>, Fault> {
        let hash = hash(0, &[key]);
        let mut link = self.bucket(hash);
        for _ in 0..=self.chain_limit() {
            let address = self.bus.u64(link)?;
            if address == 0 {
                return Ok(None);
            }
            let entry = self.entry(link, address)?;
            let same = entry.hash == short(hash) && usize::from(entry.key_length) == key.len();
            if same && self.bus.vec(entry.key(), key.len())? == key {
                return Ok(Some(entry));
            }
            link = address;
        }
        Err(Fault("a chain of the store without an end"))
    }

    /// Makes an entry with room for `room` bytes of value, of which `value` is written.
    fn insert(&self, old: Option<Entry>, key: &[u8], kind: Kind, value: &[u8]) -> Result<Entry, StoreError> {
        let class = class_for(HEADER + key.len() as u64 + value.len() as u64);
        let address = self.allocate(class)?;
        let hash = hash(0, &[key]);
        let link = old.map_or(self.bucket(hash), |old| old.link);
        let next = match old {
            Some(old) => old.next,
            None => self.bus.u64(link)?,
        };
        let entry = Entry {
            link,
            address,
            next,
            hash: short(hash),
            key_length: u16::try_from(key.len()).expect("keys are checked where they come in"),
            kind,
            class,
            length: u32::try_from(value.len()).expect("values are checked where they come in"),
        };
        self.write_header(&entry)?;
        self.bus.write(entry.key(), key)?;
        self.bus.write(entry.value(), value)?;
        self.bus.put_u64(link, address)?;
        match old {
            Some(old) => self.release(old.address, old.class)?,
            None => self.bus.put_u64(KEYS, self.keys()?.saturating_add(1))?,
        }
        Ok(entry)
    }

    fn unlink(&self, entry: &Entry) -> Result<(), Fault> {
        self.bus.put_u64(entry.link, entry.next)?;
        self.bus.put_u64(KEYS, self.keys()?.saturating_sub(1))?;
        self.release(entry.address, entry.class)
    }

    /// What kind of value a key has.
    pub(super) fn kind(&self, key: &[u8]) -> Result<Option<Kind>, Fault> {
        Ok(self.find(key)?.map(|entry| entry.kind))
    }

    /// Removes a key; true when it was there.
    pub(super) fn remove(&self, key: &[u8]) -> Result<bool, Fault> {
        let Some(entry) = self.find(key)? else { return Ok(false) };
        if entry.kind == Kind::List {
            self.free_elements(self.bus.u64(entry.value())?)?;
        }
        self.unlink(&entry)?;
        Ok(true)
    }

    // Strings.

    /// The string at a key.
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        match self.find(key)? {
            None => Ok(None),
            Some(entry) if entry.kind == Kind::List => Err(StoreError::WrongType),
            Some(entry) => Ok(Some(self.bus.vec(entry.value(), entry.length as usize)?)),
        }
    }

    /// Puts a string at a key, whatever was there.
    pub(super) fn set(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        let old = self.find(key)?;
        if let Some(mut entry) = old
            && entry.kind == Kind::String
            && class_for(HEADER + key.len() as u64 + value.len() as u64) == entry.class
        {
            entry.length = u32::try_from(value.len()).expect("values are checked where they come in");
            self.write_header(&entry)?;
            return Ok(self.bus.write(entry.value(), value)?);
        }
        let elements = match old {
            Some(entry) if entry.kind == Kind::List => self.bus.u64(entry.value())?,
            _ => 0,
        };
        self.insert(old, key, Kind::String, value)?;
        Ok(self.free_elements(elements)?)
    }

    // Lists.

    fn list(&self, key: &[u8]) -> Result<Option<(Entry, List)>, StoreError> {
        match self.find(key)? {
            None => Ok(None),
            Some(entry) if entry.kind == Kind::String => Err(StoreError::WrongType),
            Some(entry) => {
                let at = entry.value();
                let list =
                    List { first: self.bus.u64(at)?, last: self.bus.u64(at + 8)?, length: self.bus.u64(at + 16)? };
                if list.length > self.chain_limit() {
                    return Err(BAD_ENTRY.into());
                }
                Ok(Some((entry, list)))
            }
        }
    }

    fn write_list(&self, entry: &Entry, list: List) -> Result<(), Fault> {
        let List { first, last, length } = list;
        for (value, at) in [first, last, length].into_iter().zip((entry.value()..).step_by(8)) {
            self.bus.put_u64(at, value)?;
        }
        Ok(())
    }

    fn element(&self, address: u64) -> Result<Element, Fault> {
        self.check_block(address, LEAST)?;
        let header: [u8; HEADER_LENGTH] = self.bus.array(address)?;
        let [n0, n1, n2, n3, n4, n5, n6, n7, p0, p1, p2, p3, p4, p5, p6, p7, l0, l1, l2, l3, class, ..] = header;
        let next = u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]);
        let previous = u64::from_le_bytes([p0, p1, p2, p3, p4, p5, p6, p7]);
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        self.check_block(address, class)?;
        let fits = HEADER + u64::from(length) <= 1 << class && length as usize <= MAX_VALUE;
        if fits { Ok(Element { address, next, previous, length, class }) } else { Err(BAD_ENTRY) }
    }

    /// Appends to a list, at its front or its end; its new length.
    pub(super) fn push(&self, key: &[u8], value: &[u8], front: bool) -> Result<u64, StoreError> {
        let found = self.list(key)?;
        let class = class_for(HEADER + value.len() as u64);
        let address = self.allocate(class)?;
        let (entry, mut list) = match found {
            Some(found) => found,
            None => match self.insert(None, key, Kind::List, &[0; LIST]) {
                Ok(entry) => (entry, List { first: 0, last: 0, length: 0 }),
                Err(error) => {
                    self.release(address, class)?;
                    return Err(error);
                }
            },
        };
        let (next, previous) = if front { (list.first, 0) } else { (0, list.last) };
        let mut header = Vec::with_capacity(HEADER_LENGTH);
        header.extend_from_slice(&next.to_le_bytes());
        header.extend_from_slice(&previous.to_le_bytes());
        header.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_le_bytes());
        header.extend_from_slice(&u32::from(class).to_le_bytes());
        self.bus.write(address, &header)?;
        self.bus.write(address + HEADER, value)?;
        // The neighbour's pointer back, or the list's other end when there is no neighbour.
        let neighbour = if front { list.first } else { list.last };
        if neighbour == 0 {
            list = List { first: address, last: address, length: list.length };
        } else {
            self.check_block(neighbour, LEAST)?;
            self.bus.put_u64(neighbour + if front { 8 } else { 0 }, address)?;
            *(if front { &mut list.first } else { &mut list.last }) = address;
        }
        list.length += 1;
        self.write_list(&entry, list)?;
        Ok(list.length)
    }

    /// Takes an element from the front or the end of a list. A list without elements is removed.
    pub(super) fn pop(&self, key: &[u8], front: bool) -> Result<Option<Vec<u8>>, StoreError> {
        let Some((entry, mut list)) = self.list(key)? else { return Ok(None) };
        let element = self.element(if front { list.first } else { list.last })?;
        let value = self.bus.vec(element.address + HEADER, element.length as usize)?;
        self.release(element.address, element.class)?;
        let neighbour = if front { element.next } else { element.previous };
        if neighbour == 0 || list.length <= 1 {
            self.unlink(&entry)?;
            return Ok(Some(value));
        }
        self.check_block(neighbour, LEAST)?;
        self.bus.put_u64(neighbour + if front { 8 } else { 0 }, 0)?;
        *(if front { &mut list.first } else { &mut list.last }) = neighbour;
        list.length -= 1;
        self.write_list(&entry, list)?;
        Ok(Some(value))
    }

    /// Length of a list; 0 when there is none.
    pub(super) fn length(&self, key: &[u8]) -> Result<u64, StoreError> {
        Ok(self.list(key)?.map_or(0, |(_, list)| list.length))
    }

    /// Gives `visit` the elements `from..=to` of a list until it says false.
    pub(super) fn range(
        &self,
        key: &[u8],
        from: u64,
        to: u64,
        visit: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<(), StoreError> {
        let Some((_, list)) = self.list(key)? else { return Ok(()) };
        let mut address = list.first;
        for index in 0..list.length.min(to.saturating_add(1)) {
            let element = self.element(address)?;
            if index >= from && !visit(&self.bus.vec(address + HEADER, element.length as usize)?) {
                break;
            }
            address = element.next;
        }
        Ok(())
    }

    /// Frees the elements from `address` on.
    fn free_elements(&self, mut address: u64) -> Result<(), Fault> {
        for _ in 0..=self.chain_limit() {
            if address == 0 {
                return Ok(());
            }
            let element = self.element(address)?;
            self.release(address, element.class)?;
            address = element.next;
        }
        Err(Fault("a list of the store without an end"))
    }

    // All of it.

    /// A hash of the data set that depends on keys and values and not on where they are.
    pub(super) fn digest(&self) -> Result<u64, StoreError> {
        let mut sum = 0u64;
        let mut left = self.chain_limit();
        for bucket in 0..self.layout.bucket_count {
            let mut link = self.layout.buckets + bucket * 8;
            loop {
                let address = self.bus.u64(link)?;
                if address == 0 {
                    break;
                }
                left = left.checked_sub(1).ok_or(Fault("a chain of the store without an end"))?;
                let entry = self.entry(link, address)?;
                let key = self.bus.vec(entry.key(), usize::from(entry.key_length))?;
                let mut h = hash(1, &[&key]);
                match entry.kind {
                    Kind::String => h = hash(h, &[&self.bus.vec(entry.value(), entry.length as usize)?]),
                    Kind::List => self.range(&key, 0, u64::MAX, &mut |element| {
                        h = hash(h, &[&[2], element]);
                        true
                    })?,
                }
                sum = sum.wrapping_add(h);
                link = address;
            }
        }
        Ok(sum)
    }
}

/// The upper half of a hash: the lower picked the bucket.
fn short(hash: u64) -> u32 {
    u32::try_from(hash >> 32).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, VecDeque};

    use super::*;
    use crate::memory::GuestRam;
    use crate::model::registers::Registers;

    fn with_store(mib: u64, body: impl FnOnce(Store<'_>)) {
        let ram = GuestRam::new(mib << 20).unwrap();
        let layout = Layout::of(&ram);
        body(Store::open(Bus(ram.tracked()), &layout).unwrap());
    }

    /// Random operations against the standard library's collections.
    #[test]
    fn store_behaves_like_a_map() {
        with_store(4, |store| {
            let mut random = Registers { random: 42, ..Registers::default() };
            let mut below = |n: u64| usize::try_from(random.random() % n).unwrap();
            let (mut strings, mut lists) = (HashMap::new(), HashMap::<Vec<u8>, VecDeque<Vec<u8>>>::new());
            for _ in 0..20_000 {
                let number = below(300);
                let (string, list) = (format!("key:{number}").into_bytes(), format!("list:{number}").into_bytes());
                let value = vec![u8::try_from(below(256)).unwrap(); below(700)];
                match below(7) {
                    0 | 1 => {
                        if store.set(&string, &value) == Ok(()) {
                            strings.insert(string, value);
                        }
                    }
                    2 => assert_eq!(store.get(&string).unwrap().as_ref(), strings.get(&string)),
                    3 => assert_eq!(store.remove(&string).unwrap(), strings.remove(&string).is_some()),
                    4 => {
                        let front = below(2) == 0;
                        if store.push(&list, &value, front).is_ok() {
                            let model = lists.entry(list).or_default();
                            if front { model.push_front(value) } else { model.push_back(value) }
                        }
                    }
                    5 => {
                        let front = below(2) == 0;
                        let model = lists.get_mut(&list);
                        let wanted = model.and_then(|m| if front { m.pop_front() } else { m.pop_back() });
                        assert_eq!(store.pop(&list, front).unwrap(), wanted);
                        lists.retain(|_, m| !m.is_empty());
                    }
                    _ => {
                        let mut got = VecDeque::new();
                        store
                            .range(&list, 0, u64::MAX, &mut |e| {
                                got.push_back(e.to_vec());
                                true
                            })
                            .unwrap();
                        assert_eq!(got, lists.get(&list).cloned().unwrap_or_default());
                        assert_eq!(store.length(&list).unwrap(), got.len() as u64);
                    }
                }
                assert_eq!(store.keys().unwrap(), (strings.len() + lists.len()) as u64);
            }
            for key in lists.keys().chain(strings.keys()) {
                assert!(store.remove(key).unwrap());
            }
            assert_eq!((store.keys().unwrap(), store.used().unwrap(), store.digest().unwrap()), (0, 0, 0));
        });
    }

    #[test]
    fn a_full_heap_refuses_and_keeps_what_it_has() {
        with_store(2, |store| {
            let value = vec![7; MAX_VALUE];
            let mut stored = 0u32;
            while store.set(format!("{stored}").as_bytes(), &value).is_ok() {
                stored += 1;
            }
            assert!(stored > 2);
            assert_eq!(store.set(b"0", &value), Ok(()), "a value of the same size takes its old place");
            assert_eq!(store.push(b"list", &value, true), Err(StoreError::Full));
            assert_eq!(store.keys().unwrap(), u64::from(stored));
            for n in 0..stored {
                assert_eq!(store.get(format!("{n}").as_bytes()).unwrap().as_ref(), Some(&value));
            }
            store.clear().unwrap();
            assert_eq!(store.set(b"0", &value), Ok(()));
            assert_eq!(store.keys().unwrap(), 1);
        });
    }

    #[test]
    fn digest_depends_on_contents_and_not_on_history() {
        with_store(2, |a| {
            with_store(2, |b| {
                a.set(b"x", b"1").unwrap();
                a.set(b"y", b"2").unwrap();
                b.set(b"y", &[0; 500]).unwrap();
                b.set(b"x", b"1").unwrap();
                b.set(b"y", b"2").unwrap();
                assert_eq!(a.digest(), b.digest());
                b.set(b"x", b"2").unwrap();
                b.set(b"y", b"1").unwrap();
                assert_ne!(a.digest(), b.digest());
            });
        });
    }

    #[test]
    fn kinds_are_kept_apart() {
        with_store(2, |store| {
            store.push(b"l", b"1", true).unwrap();
            assert_eq!(store.get(b"l"), Err(StoreError::WrongType));
            store.set(b"l", b"s").unwrap();
            assert_eq!(store.push(b"l", b"1", true), Err(StoreError::WrongType));
            assert_eq!(store.keys(), Ok(1));
        });
    }
}
