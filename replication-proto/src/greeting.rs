//! The first frame of a connection that someone opened: what it is for and who is there, before anything else is decided.

use bytes::Bytes;
use bytes::BytesMut;

use crate::error::{ApiMisuse, LinkError, Malformed, Misbehaved};
use crate::ids::Identity;
use crate::limits::{MAX_FRAME_BYTES, MAX_INPUT_BYTES};
use crate::message::Channel;
use crate::wire::frame::FrameReader;
use crate::wire::header::MessageType;
use crate::wire::messages;

/// Reads a fresh inbound connection until its hello is whole. Then [`into_bytes`](Self::into_bytes) is the first input of the
/// [`Receiver`](crate::Receiver) or [`Pulse`](crate::Pulse) that takes the connection over: what was read here, hello included.
///
/// How long a stranger may take is for the owner of the clock: close what has not said hello after a second or two.
#[derive(Debug, Default)]
pub struct Greeting {
    reader: FrameReader,
    bytes: BytesMut,
    caller: Option<Caller>,
}

/// Who opened a connection, as they say themselves: nothing but the form of it is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// What the connection is for.
    pub channel: Channel,
    /// Who speaks.
    pub peer: Identity,
}

impl Greeting {
    /// A connection of which nothing was read.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the connection; tells who is there once the hello is whole. Then no more bytes are to be read from the connection
    /// before it is handed over.
    ///
    /// # Errors
    /// What comes first is no hello: close without an answer. For [`LinkError::Incompatible`] (another protocol version) feed
    /// [`into_bytes`](Self::into_bytes) to a [`Receiver`](crate::Receiver), whose refusal tells the caller why.
    pub fn handle_bytes(&mut self, bytes: &[u8]) -> Result<Option<&Caller>, LinkError> {
        if self.caller.is_some() || bytes.len() > MAX_INPUT_BYTES || self.bytes.len() > MAX_FRAME_BYTES {
            return Err(ApiMisuse::InputNotPolled.into());
        }
        self.reader.push(bytes)?;
        self.bytes.extend_from_slice(bytes);
        let frame = self.reader.next(|header| match header.message {
            MessageType::Hello => Ok(()),
            other => Err(Misbehaved::Unexpected { message: other.name(), waiting_for: "Hello" }.into()),
        })?;
        if let Some(frame) = frame {
            let hello = messages::hello(&frame.payload)?;
            let (vm, generation, incarnation) = (frame.header.vm, frame.header.generation, frame.header.incarnation);
            let peer = Identity { vm, node: hello.node, generation, incarnation };
            self.caller = Some(Caller { channel: hello.channel, peer });
        }
        Ok(self.caller.as_ref())
    }

    /// The peer closed the connection before its hello was whole.
    ///
    /// # Errors
    /// Always [`Malformed::Truncated`], for the metric.
    pub fn handle_eof(&mut self) -> Result<(), LinkError> {
        Err(Malformed::Truncated.into())
    }

    /// All that was read, for whoever takes the connection over. Feed it in pieces of at most [`MAX_INPUT_BYTES`], taking events between.
    pub fn into_bytes(self) -> Bytes {
        self.bytes.freeze()
    }
}
