//! The header of a dirty map: 512 bytes in one of two slots.

use replication_proto::{Incarnation, VmId};
use xxhash_rust::xxh3::xxh3_128;

use super::blocks::BLOCK_BYTES;
use super::{Epoch, Generation, Point};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 512;
/// Where the slots are; the header with the sequence number n is in slot n % 2.
pub const SLOTS: [u64; 2] = [0, 4096];
/// Where the bits begin.
pub const BITS_AT: u64 = 8192;

const MAGIC: [u8; 8] = *b"FTDIRTY\0";
const VERSION: u32 = 1;
const SUM_AT: usize = HEADER_BYTES - 16;
const MAX_NAME: usize = 32;

/// Which disk of which VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskIdentity {
    /// The VM.
    pub vm: VmId,
    /// The disk's name, at most 32 bytes.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
}

/// What a map says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whose it is.
    pub identity: DiskIdentity,
    /// What blocks without a bit hold.
    pub base: Option<Point>,
    /// Who opened it last.
    pub opened_by: Incarnation,
    /// Grows with each header written.
    pub sequence: u64,
}

/// What was found in a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Zeroes: never written.
    Blank,
    /// Whole.
    Whole(Box<Header>),
    /// It has our magic, and another version.
    Version(u32),
    /// It begins as a header does, or with zeroes, and is torn or damaged.
    Torn,
    /// Something else.
    Foreign,
}

impl Header {
    /// Its bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let Self { identity: DiskIdentity { vm, name, bytes }, base, opened_by, sequence } = self;
        assert!(name.len() <= MAX_NAME, "a name of at most {MAX_NAME} bytes");
        let (generation, epoch) = base.map_or((0, 0), |base| (base.generation.0, base.epoch.0));
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&u32::try_from(BLOCK_BYTES).unwrap_or(0).to_le_bytes());
        out.extend_from_slice(&vm.0.to_le_bytes());
        out.extend_from_slice(&opened_by.0.to_le_bytes());
        for number in [*bytes, *sequence, u64::from(base.is_some()), generation, epoch] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.push(u8::try_from(name.len()).unwrap_or(0));
        out.extend_from_slice(name.as_bytes());
        out.resize(SUM_AT, 0);
        out.extend_from_slice(&xxh3_128(&out).to_le_bytes());
        out.try_into().expect("as many as were put")
    }

    /// Reads a slot; nothing in it is believed.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Slot {
        if bytes.iter().all(|byte| *byte == 0) {
            return Slot::Blank;
        }
        let mut cursor = Cursor(bytes);
        // Torn within its first bytes, which were zeroes before, it has some of the magic's bytes and zeroes.
        let magic = cursor.take::<8>();
        if magic != MAGIC {
            let torn = magic.iter().zip(&MAGIC).all(|(found, ours)| found == ours || *found == 0);
            return if torn { Slot::Torn } else { Slot::Foreign };
        }
        let version = u32::from_le_bytes(cursor.take());
        let (body, sum) = bytes.split_at(SUM_AT);
        if xxh3_128(body).to_le_bytes() != sum {
            // A torn header of ours has our version or none yet; another version may keep its sum elsewhere.
            return if version == VERSION || version == 0 { Slot::Torn } else { Slot::Version(version) };
        }
        if version != VERSION {
            return Slot::Version(version);
        }
        let block = u64::from(u32::from_le_bytes(cursor.take()));
        let vm = VmId(u128::from_le_bytes(cursor.take()));
        let opened_by = Incarnation(u128::from_le_bytes(cursor.take()));
        let [bytes, sequence, known, generation, epoch] = [(); 5].map(|()| u64::from_le_bytes(cursor.take()));
        let [length] = cursor.take::<1>();
        let name = cursor.0.get(..usize::from(length).min(MAX_NAME)).and_then(|name| std::str::from_utf8(name).ok());
        let (Some(name), true) = (name, block == BLOCK_BYTES && sequence > 0) else { return Slot::Foreign };
        let base = (known == 1).then_some(Point { generation: Generation(generation), epoch: Epoch(epoch) });
        let identity = DiskIdentity { vm, name: name.to_owned(), bytes };
        Slot::Whole(Box::new(Self { identity, base, opened_by, sequence }))
    }
}

/// Reads fixed parts; zeroes beyond the end.
struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (now, rest) = self.0.split_at(N.min(self.0.len()));
        self.0 = rest;
        now.try_into().unwrap_or([0; N])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_what_it_writes_and_believes_nothing_else() {
        let identity = DiskIdentity { vm: VmId(7), name: "data".into(), bytes: 1 << 20 };
        let base = Some(Point { generation: Generation(3), epoch: Epoch(99) });
        let header = Header { identity, base, opened_by: Incarnation(5), sequence: 4 };
        let bytes = header.encode();
        assert_eq!(Header::decode(&bytes), Slot::Whole(Box::new(header.clone())));
        assert_eq!(Header::decode(&[0; HEADER_BYTES]), Slot::Blank);
        for at in 0..HEADER_BYTES {
            for bit in 0..8 {
                let mut broken = bytes;
                broken[at] ^= 1 << bit;
                assert!(!matches!(Header::decode(&broken), Slot::Whole(_) | Slot::Blank), "byte {at} bit {bit}");
            }
            let mut torn = bytes;
            torn[at..].fill(0);
            let expected = if at == 0 { Slot::Blank } else { Slot::Torn };
            assert_eq!(Header::decode(&torn), expected, "cut at {at}");
            let mut begun = bytes;
            begun[..at].fill(0);
            let expected = if at == 0 { Slot::Whole(Box::new(header.clone())) } else { Slot::Torn };
            assert_eq!(Header::decode(&begun), expected, "from {at}");
        }
        let none = Header { base: None, ..header };
        assert_eq!(Header::decode(&none.encode()), Slot::Whole(Box::new(none)));
    }
}
