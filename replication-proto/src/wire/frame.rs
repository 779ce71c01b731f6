//! Frames out of a byte stream and into it. The reader never holds more than one frame and what its caller handed it last.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};

use crate::error::{ApiMisuse, LinkError, Malformed, Misbehaved};
use crate::ids::{Epoch, Generation, Identity};
use crate::limits::{HEADER_BYTES, MAX_FRAME_BYTES, MAX_INPUT_BYTES};
use crate::message::VersionRange;
use crate::wire::codec::narrow32;
use crate::wire::header::{Header, MessageType};

/// A frame whose checksums are right and whose number is the one that was due.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) header: Header,
    pub(crate) payload: Bytes,
}

#[derive(Debug, Default)]
pub(crate) struct FrameReader {
    buffer: BytesMut,
    /// Header of the frame whose payload is awaited.
    header: Option<Header>,
    next_sequence: u64,
}

impl FrameReader {
    /// Takes bytes as they came from the connection.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        // With all frames taken, less than one frame is left here.
        if bytes.len() > MAX_INPUT_BYTES || self.buffer.len() > MAX_FRAME_BYTES {
            return Err(ApiMisuse::InputNotPolled.into());
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The next whole frame. `vet` sees a header as soon as it is verified, before its payload is waited for.
    pub(crate) fn next(
        &mut self,
        vet: impl FnOnce(&Header) -> Result<(), LinkError>,
    ) -> Result<Option<Frame>, LinkError> {
        let header = match self.header {
            Some(header) => header,
            None => {
                let Some(bytes) = self.buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
                let header = Header::decode(bytes)?;
                if header.sequence != self.next_sequence {
                    let (expected, found) = (self.next_sequence, header.sequence);
                    return Err(Misbehaved::Sequence { expected, found }.into());
                }
                vet(&header)?;
                let _verified = self.buffer.split_to(HEADER_BYTES);
                self.header = Some(header);
                header
            }
        };
        let length = header.length as usize;
        if self.buffer.len() < length {
            // Once for the whole payload, however small the pieces are in which it comes.
            self.buffer.reserve(length - self.buffer.len());
            return Ok(None);
        }
        let payload = self.buffer.split_to(length).freeze();
        if crc32fast::hash(&payload) != header.payload_checksum {
            return Err(Malformed::PayloadChecksum.into());
        }
        self.header = None;
        self.next_sequence = next_sequence(self.next_sequence)?;
        Ok(Some(Frame { header, payload }))
    }

    /// Whether the stream may end here.
    pub(crate) fn at_boundary(&self) -> bool {
        self.header.is_none() && self.buffer.is_empty()
    }
}

/// The number after `sequence`. A connection ends before its numbers start anew: an old frame would fit again.
fn next_sequence(sequence: u64) -> Result<u64, LinkError> {
    sequence.checked_add(1).ok_or_else(|| Misbehaved::Sequence { expected: sequence, found: sequence }.into())
}

/// Bytes to send, with the checkpoint that is on its way once they are handed out.
#[derive(Debug)]
struct Outgoing {
    bytes: Bytes,
    ends: Option<Epoch>,
}

#[derive(Debug)]
pub(crate) struct FrameWriter {
    identity: Identity,
    next_sequence: u64,
    queue: VecDeque<Outgoing>,
    queued_bytes: usize,
}

impl FrameWriter {
    pub(crate) fn new(identity: Identity) -> Self {
        Self { identity, next_sequence: 0, queue: VecDeque::new(), queued_bytes: 0 }
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The generation of all frames from here on.
    pub(crate) fn set_generation(&mut self, generation: Generation) {
        self.identity.generation = generation;
    }

    /// Queues one frame whose payload is `head` and then `parts`, which are not copied.
    pub(crate) fn frame(&mut self, message: MessageType, epoch: Epoch, head: &[u8], parts: &[Bytes]) {
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(head);
        parts.iter().for_each(|part| checksum.update(part));
        let length = head.len() + parts.iter().map(Bytes::len).sum::<usize>();
        let header = self.header(message, epoch, length, checksum.finalize());
        let mut bytes = BytesMut::with_capacity(HEADER_BYTES + head.len());
        bytes.put_slice(&header);
        bytes.put_slice(head);
        let ends = (message == MessageType::End).then_some(epoch);
        self.enqueue(bytes.freeze(), ends);
        for part in parts {
            self.enqueue(part.clone(), None);
        }
    }

    /// Queues one frame whose header space is at the front of `frame`.
    pub(crate) fn frame_in_place(&mut self, message: MessageType, epoch: Epoch, mut frame: BytesMut) {
        let (space, payload) = frame.split_at_mut(HEADER_BYTES);
        space.copy_from_slice(&self.header(message, epoch, payload.len(), crc32fast::hash(payload)));
        self.enqueue(frame.freeze(), None);
    }

    fn header(&mut self, message: MessageType, epoch: Epoch, length: usize, checksum: u32) -> [u8; HEADER_BYTES] {
        let (least, most) = message.payload_bounds();
        assert!(length >= least && length <= most, "{} of {length} bytes", message.name());
        let header = Header {
            version: VersionRange::OURS.max,
            message,
            length: narrow32(length),
            payload_checksum: checksum,
            sequence: self.next_sequence,
            epoch,
            generation: self.identity.generation,
            vm: self.identity.vm,
            incarnation: self.identity.incarnation,
        };
        self.next_sequence = self.next_sequence.checked_add(1).expect("2^64 frames in one connection");
        header.encode()
    }

    fn enqueue(&mut self, bytes: Bytes, ends: Option<Epoch>) {
        self.queued_bytes += bytes.len();
        self.queue.push_back(Outgoing { bytes, ends });
    }

    /// The next bytes to send, and the epoch whose last byte they hold, if any.
    pub(crate) fn poll(&mut self) -> Option<(Bytes, Option<Epoch>)> {
        let Outgoing { bytes, ends } = self.queue.pop_front()?;
        self.queued_bytes -= bytes.len();
        Some((bytes, ends))
    }

    pub(crate) fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Drops what was not handed out. Only for a connection that is over.
    pub(crate) fn discard(&mut self) {
        self.queue.clear();
        self.queued_bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Corpus row 22: a number that would start anew ends the connection.
    #[test]
    fn sequence_numbers_end_instead_of_wrapping() {
        let mut sequence = u64::MAX - 5;
        for _ in 0..5 {
            sequence = next_sequence(sequence).unwrap();
        }
        assert_eq!(next_sequence(sequence).unwrap_err().code(), "misbehaved.sequence");
    }
}
