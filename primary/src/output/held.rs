//! Held frames as bytes: they travel with their epoch, so that the new owner of the guest can send those of the last committed epoch
//! again. A frame lost with the primary would otherwise cost its receiver a retransmission timeout (200 ms to 1 s), more
//! than the takeover itself.
//!
//! Encoding, little-endian: `count: u16`, then for each speaker `nic: u8, mac: [u8; 6], ipv4: [u8; 4]`; then `count: u32`, and for each frame
//! `nic: u8, length: u16, bytes`. Console bytes do not travel: those of an uncommitted epoch are said again by the guest itself, and
//! those of the last committed epoch may have been shown already.

use bytes::Bytes;
use vmm::SectionKind;

use super::queue::Output;
use super::speakers::Speaker;

/// The section that carries held frames.
pub const HELD_SECTION: SectionKind = SectionKind::FIRST_FOREIGN;
/// Version of its encoding.
pub const HELD_VERSION: u16 = 1;
/// Most bytes of frames that travel with one epoch; what is over it is left to retransmission.
pub const HELD_BYTES_MAX: usize = 512 << 10;
/// Largest Ethernet frame that this project carries.
pub const FRAME_BYTES_MAX: usize = 65_535;

/// Speakers and frames of one epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldFrames {
    /// Addresses that the guest speaks from.
    pub speakers: Vec<Speaker>,
    /// `(nic, frame)`, in the order in which the guest sent them.
    pub frames: Vec<(u8, Bytes)>,
}

/// Why a held-frames section could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeldError {
    /// The bytes end early, or go on after the last frame.
    #[error("held frames: the section's length does not fit its counts")]
    Length,
    /// A version that this build does not read.
    #[error("held frames: version {0} is unknown")]
    Version(u16),
}

impl HeldFrames {
    /// Picks the frames out of an epoch's outputs.
    pub fn of(outputs: &[Output], speakers: Vec<Speaker>) -> Self {
        let mut total = 0;
        let mut frames = Vec::new();
        for output in outputs {
            if let Output::Frame { nic, bytes } = output {
                total += bytes.len();
                if total > HELD_BYTES_MAX {
                    break;
                }
                frames.push((*nic, bytes.clone()));
            }
        }
        Self { speakers, frames }
    }

    /// The section's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + self.frames.iter().map(|(_, f)| f.len() + 3).sum::<usize>());
        let speakers = u16::try_from(self.speakers.len()).unwrap_or(u16::MAX);
        out.extend_from_slice(&speakers.to_le_bytes());
        for s in self.speakers.iter().take(usize::from(speakers)) {
            out.push(s.nic);
            out.extend_from_slice(&s.mac);
            out.extend_from_slice(&s.ipv4);
        }
        let frames: Vec<_> = self.frames.iter().filter(|(_, f)| f.len() <= FRAME_BYTES_MAX).collect();
        out.extend_from_slice(&u32::try_from(frames.len()).unwrap_or(u32::MAX).to_le_bytes());
        for (nic, frame) in frames {
            out.push(*nic);
            out.extend_from_slice(&u16::try_from(frame.len()).unwrap_or(u16::MAX).to_le_bytes());
            out.extend_from_slice(frame);
        }
        out
    }

    /// Reads a section's bytes; nothing in them is believed.
    pub fn decode(version: u16, bytes: &[u8]) -> Result<Self, HeldError> {
        if version != HELD_VERSION {
            return Err(HeldError::Version(version));
        }
        let mut rest = bytes;
        let mut take = |n: usize| -> Result<&[u8], HeldError> {
            let (head, tail) = rest.split_at_checked(n).ok_or(HeldError::Length)?;
            rest = tail;
            Ok(head)
        };
        let mut held = Self::default();
        let speakers = u16::from_le_bytes(array(take(2)?)?);
        for _ in 0..speakers {
            held.speakers.push(Speaker { nic: take(1)?[0], mac: array(take(6)?)?, ipv4: array(take(4)?)? });
        }
        let frames = u32::from_le_bytes(array(take(4)?)?);
        for _ in 0..frames {
            let nic = take(1)?[0];
            let length = u16::from_le_bytes(array(take(2)?)?);
            held.frames.push((nic, Bytes::copy_from_slice(take(usize::from(length))?)));
        }
        if rest.is_empty() { Ok(held) } else { Err(HeldError::Length) }
    }
}

fn array<const N: usize>(bytes: &[u8]) -> Result<[u8; N], HeldError> {
    bytes.try_into().map_err(|_| HeldError::Length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> HeldFrames {
        HeldFrames {
            speakers: vec![Speaker { nic: 0, mac: [2, 0, 0, 0, 0, 1], ipv4: [10, 77, 0, 10] }],
            frames: vec![(0, Bytes::from_static(b"one")), (1, Bytes::from_static(b""))],
        }
    }

    #[test]
    fn round_trip() {
        assert_eq!(HeldFrames::decode(HELD_VERSION, &sample().encode()), Ok(sample()));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = sample().encode();
        for end in 0..bytes.len() {
            assert_eq!(HeldFrames::decode(HELD_VERSION, &bytes[..end]), Err(HeldError::Length));
        }
        assert_eq!(HeldFrames::decode(HELD_VERSION, &[&bytes[..], b"x"].concat()), Err(HeldError::Length));
        assert_eq!(HeldFrames::decode(2, &bytes), Err(HeldError::Version(2)));
    }

    #[test]
    fn a_count_that_lies_allocates_nothing() {
        let mut bytes = vec![0, 0];
        bytes.extend_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(HeldFrames::decode(HELD_VERSION, &bytes), Err(HeldError::Length));
    }
}
