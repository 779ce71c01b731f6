//! The frame header: its own checksum comes first, so that nothing in it, least of all the length, is believed before it is verified.
//! Identity, generation and sequence number are in every frame.

use crate::error::{Incompatible, LinkError, Malformed};
use crate::ids::{Epoch, Generation, Incarnation, NodeName, VmId};
use crate::limits::{
    HEADER_BYTES, MAX_DIRTY_BYTES, MAX_DISK_CHANGE_BYTES, MAX_DISKS, MAX_INBOUND_BYTES, MAX_PAGES_PER_MESSAGE,
    MAX_PAYLOAD_BYTES, MAX_PIECES_PER_MESSAGE, MAX_TEXT_BYTES, MAX_VERIFY_FINDINGS, PAGE_BYTES,
};
use crate::message::{Difference, RefuseCode, VersionRange};

/// First bytes of every frame, in every version.
pub(crate) const MAGIC: [u8; 4] = *b"FTCS";

/// Offsets of the header's fields.
pub(crate) mod at {
    pub(crate) const MAGIC: usize = 0;
    pub(crate) const HEADER_CHECKSUM: usize = 4;
    pub(crate) const VERSION: usize = 8;
    pub(crate) const MESSAGE_TYPE: usize = 10;
    pub(crate) const FLAGS: usize = 11;
    pub(crate) const LENGTH: usize = 12;
    pub(crate) const PAYLOAD_CHECKSUM: usize = 16;
    pub(crate) const RESERVED: usize = 20;
    pub(crate) const SEQUENCE: usize = 24;
    pub(crate) const EPOCH: usize = 32;
    pub(crate) const GENERATION: usize = 40;
    pub(crate) const VM: usize = 48;
    pub(crate) const INCARNATION: usize = 64;
    pub(crate) const END: usize = 80;
}

const _: () = {
    // No gap, no overlap, each number at a multiple of its own size, and the whole is what limits say.
    assert!(at::MAGIC == 0 && at::HEADER_CHECKSUM == at::MAGIC + MAGIC.len());
    assert!(at::VERSION == at::HEADER_CHECKSUM + size_of::<u32>());
    assert!(at::MESSAGE_TYPE == at::VERSION + size_of::<u16>() && at::FLAGS == at::MESSAGE_TYPE + 1);
    assert!(at::LENGTH == at::FLAGS + 1 && at::PAYLOAD_CHECKSUM == at::LENGTH + size_of::<u32>());
    assert!(at::RESERVED == at::PAYLOAD_CHECKSUM + size_of::<u32>());
    assert!(at::SEQUENCE == at::RESERVED + size_of::<u32>() && at::SEQUENCE.is_multiple_of(8));
    assert!(at::EPOCH == at::SEQUENCE + size_of::<u64>() && at::GENERATION == at::EPOCH + size_of::<u64>());
    assert!(at::VM == at::GENERATION + size_of::<u64>() && at::VM.is_multiple_of(16));
    assert!(at::INCARNATION == at::VM + size_of::<u128>() && at::END == at::INCARNATION + size_of::<u128>());
    assert!(at::END == HEADER_BYTES && HEADER_BYTES.is_multiple_of(16));
};

/// What a frame carries. Numbers never change their meaning; 0 is never valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum MessageType {
    Hello = 1,
    Accept = 2,
    Refuse = 3,
    Begin = 4,
    Pages = 5,
    Section = 6,
    End = 7,
    Ack = 8,
    Heartbeat = 9,
    Goodbye = 10,
    Inbound = 11,
    DiskChange = 12,
    Hashes = 13,
    Wanted = 14,
    Durable = 15,
    Verified = 16,
}

impl MessageType {
    const ALL: [Self; 16] = [
        Self::Hello,
        Self::Accept,
        Self::Refuse,
        Self::Begin,
        Self::Pages,
        Self::Section,
        Self::End,
        Self::Ack,
        Self::Heartbeat,
        Self::Goodbye,
        Self::Inbound,
        Self::DiskChange,
        Self::Hashes,
        Self::Wanted,
        Self::Durable,
        Self::Verified,
    ];

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|message| *message as u8 == number)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Hello => "Hello",
            Self::Accept => "Accept",
            Self::Refuse => "Refuse",
            Self::Begin => "Begin",
            Self::Pages => "Pages",
            Self::Section => "Section",
            Self::End => "End",
            Self::Ack => "Ack",
            Self::Heartbeat => "Heartbeat",
            Self::Goodbye => "Goodbye",
            Self::Inbound => "Inbound",
            Self::DiskChange => "DiskChange",
            Self::Hashes => "Hashes",
            Self::Wanted => "Wanted",
            Self::Durable => "Durable",
            Self::Verified => "Verified",
        }
    }

    /// Least and most bytes of the payload.
    pub(crate) const fn payload_bounds(self) -> (usize, usize) {
        match self {
            Self::Hello => (30, MAX_PAYLOAD_BYTES),
            Self::Accept => (20, 20 + NodeName::MAX_BYTES + MAX_DISKS * (24 + MAX_DIRTY_BYTES)),
            Self::Refuse => (8, MAX_PAYLOAD_BYTES),
            Self::Begin => (8, 8),
            Self::Pages => (32, 16 + MAX_PAGES_PER_MESSAGE * (16 + PAGE_BYTES)),
            Self::Section => (16, MAX_PAYLOAD_BYTES),
            Self::End => (40, 40),
            Self::Ack => (0, 0),
            Self::Heartbeat => (24, 24),
            Self::Goodbye => (4, 4 + MAX_TEXT_BYTES),
            Self::Inbound => (5, 4 + MAX_INBOUND_BYTES),
            Self::DiskChange => (24, 24 + MAX_DISK_CHANGE_BYTES),
            Self::Hashes => (32, 16 + 16 * MAX_PIECES_PER_MESSAGE),
            Self::Wanted => (17, 16 + MAX_PIECES_PER_MESSAGE.div_ceil(8)),
            Self::Durable => (0, 0),
            Self::Verified => (16, 16 + 16 * MAX_VERIFY_FINDINGS),
        }
    }

    /// Whether the header's epoch is set; else it must be 0.
    fn has_epoch(self) -> bool {
        matches!(
            self,
            Self::Begin
                | Self::Pages
                | Self::Section
                | Self::End
                | Self::Ack
                | Self::Inbound
                | Self::DiskChange
                | Self::Hashes
                | Self::Wanted
                | Self::Durable
                | Self::Verified
        )
    }
}

/// A verified header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u16,
    pub(crate) message: MessageType,
    pub(crate) length: u32,
    pub(crate) payload_checksum: u32,
    pub(crate) sequence: u64,
    pub(crate) epoch: Epoch,
    pub(crate) generation: Generation,
    pub(crate) vm: VmId,
    pub(crate) incarnation: Incarnation,
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let Self { version, message, length, payload_checksum, sequence, epoch, generation, vm, incarnation } = *self;
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(at::MAGIC, &MAGIC);
        put(at::VERSION, &version.to_le_bytes());
        put(at::MESSAGE_TYPE, &[message as u8]);
        put(at::LENGTH, &length.to_le_bytes());
        put(at::PAYLOAD_CHECKSUM, &payload_checksum.to_le_bytes());
        put(at::SEQUENCE, &sequence.to_le_bytes());
        put(at::EPOCH, &epoch.0.to_le_bytes());
        put(at::GENERATION, &generation.0.to_le_bytes());
        put(at::VM, &vm.0.to_le_bytes());
        put(at::INCARNATION, &incarnation.0.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[at::VERSION..]);
        bytes[at::HEADER_CHECKSUM..at::VERSION].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// # Errors
    /// [`LinkError::Malformed`], or [`LinkError::Incompatible`] for a sound header of a version that this build does not speak.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, LinkError> {
        if bytes[..at::HEADER_CHECKSUM] != MAGIC {
            return Err(Malformed::Magic.into());
        }
        if u32::from_le_bytes(field(bytes, at::HEADER_CHECKSUM)) != crc32fast::hash(&bytes[at::VERSION..]) {
            return Err(Malformed::HeaderChecksum.into());
        }
        let version = u16::from_le_bytes(field(bytes, at::VERSION));
        if version < VersionRange::OURS.min || version > VersionRange::OURS.max {
            return Err(other_version(version));
        }
        if bytes[at::FLAGS] != 0 || bytes[at::RESERVED..at::SEQUENCE] != [0; 4] {
            return Err(Malformed::Reserved.into());
        }
        let number = bytes[at::MESSAGE_TYPE];
        let message = MessageType::from_number(number).ok_or(Malformed::MessageType { number })?;
        let length = u32::from_le_bytes(field(bytes, at::LENGTH));
        let (least, most) = message.payload_bounds();
        if (length as usize) < least || length as usize > most {
            return Err(Malformed::Length { bytes: length }.into());
        }
        let epoch = Epoch(u64::from_le_bytes(field(bytes, at::EPOCH)));
        if message.has_epoch() == (epoch == Epoch(0)) {
            return Err(Malformed::Value { field: "the header's epoch" }.into());
        }
        Ok(Self {
            version,
            message,
            length,
            payload_checksum: u32::from_le_bytes(field(bytes, at::PAYLOAD_CHECKSUM)),
            sequence: u64::from_le_bytes(field(bytes, at::SEQUENCE)),
            epoch,
            generation: Generation(u64::from_le_bytes(field(bytes, at::GENERATION))),
            vm: VmId(u128::from_le_bytes(field(bytes, at::VM))),
            incarnation: Incarnation(u128::from_le_bytes(field(bytes, at::INCARNATION))),
        })
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    *bytes[at..].first_chunk().expect("offsets are asserted to lie within the header")
}

fn other_version(version: u16) -> LinkError {
    let VersionRange { min, max } = VersionRange::OURS;
    let difference = Difference::new("protocol version", &format!("{min} to {max}"), &version.to_string());
    LinkError::Incompatible(Incompatible { code: RefuseCode::Version, differences: vec![difference] })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            version: 1,
            message: MessageType::Section,
            length: 99,
            payload_checksum: 0x0102_0304,
            sequence: u64::MAX - 5,
            epoch: Epoch(7),
            generation: Generation(3),
            vm: VmId(1 << 127),
            incarnation: Incarnation(u128::MAX),
        }
    }

    fn resealed(mut bytes: [u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
        let checksum = crc32fast::hash(&bytes[at::VERSION..]);
        bytes[at::HEADER_CHECKSUM..at::VERSION].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    #[test]
    fn a_header_reads_as_written() {
        assert_eq!(Header::decode(&header().encode()), Ok(header()));
    }

    /// Corpus row 2, for headers.
    #[test]
    fn every_flipped_bit_is_found_before_any_field_is_believed() {
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = header().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let expected = if bit / 8 < at::HEADER_CHECKSUM { Malformed::Magic } else { Malformed::HeaderChecksum };
            assert_eq!(Header::decode(&bytes), Err(expected.into()), "bit {bit}");
        }
    }

    /// Corpus row 3: lengths, with a checksum that is right.
    #[test]
    fn lengths_outside_a_message_s_bounds_are_refused() {
        for message in MessageType::ALL {
            let (least, most) = message.payload_bounds();
            let epoch = Epoch(u64::from(message.has_epoch()));
            let decode = |length| Header::decode(&Header { message, epoch, length, ..header() }.encode());
            for length in [least, most] {
                assert!(decode(u32::try_from(length).unwrap()).is_ok(), "{message:?} {length}");
            }
            for length in [least.wrapping_sub(1), most + 1, 1 << 31, u32::MAX as usize, usize::MAX] {
                let bytes = u32::try_from(length).unwrap_or(u32::MAX);
                assert_eq!(decode(bytes), Err(Malformed::Length { bytes }.into()), "{message:?}");
            }
        }
    }

    /// Corpus row 10: versions, types and flags of other protocols, with a checksum that is right.
    #[test]
    fn other_versions_types_and_flags_are_refused() {
        for version in [0, 2, 3, u16::MAX] {
            let error = Header::decode(&Header { version, ..header() }.encode()).unwrap_err();
            assert_eq!(error.code(), "incompatible.version");
        }
        for number in [0, 17, 255] {
            let mut bytes = header().encode();
            bytes[at::MESSAGE_TYPE] = number;
            assert_eq!(Header::decode(&resealed(bytes)), Err(Malformed::MessageType { number }.into()));
        }
        for at in [at::FLAGS, at::RESERVED, at::SEQUENCE - 1] {
            let mut bytes = header().encode();
            bytes[at] = 1;
            assert_eq!(Header::decode(&resealed(bytes)), Err(Malformed::Reserved.into()));
        }
        let no_epoch = Header { epoch: Epoch(0), ..header() };
        assert_eq!(Header::decode(&no_epoch.encode()).unwrap_err().code(), "malformed.value");
    }
}
