//! The heartbeat connection. Both ends are the same: each says hello, then beats, and listens. It runs whatever the data connection does.

use core::time::Duration;
use std::collections::VecDeque;

use bytes::Bytes;

use crate::error::{ApiMisuse, Incompatible, LinkError, Malformed, Misbehaved};
use crate::facts::Facts;
use crate::ids::{Epoch, Generation, Identity};
use crate::message::{
    Channel, Difference, Features, Goodbye, GoodbyeReason, HeartbeatBody, Hello, Refuse, RefuseCode, VersionRange,
};
use crate::negotiate::negotiate;
use crate::stamp::Stamp;
use crate::wire::frame::{Frame, FrameReader, FrameWriter};
use crate::wire::header::{Header, MessageType};
use crate::wire::messages::{self, Heartbeat};

/// What a [`Pulse`] learnt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PulseEvent {
    /// The peer said hello, and the two fit together.
    Opened {
        /// Who is there.
        peer: Identity,
    },
    /// The peer lives. Of several heartbeats at once only the latest is told.
    Heard {
        /// Who, with the generation that it knows now, which may be higher than ours.
        peer: Identity,
        /// What it says of itself.
        body: HeartbeatBody,
        /// When we, on our clock, had said the last heartbeat that the peer knew of when it said this: it is not older. `None` until it knew any. A frame
        /// may wait in the connection as long as the network is cut.
        answers: Option<Duration>,
    },
    /// A heartbeat of a lower generation than ours came and was dropped: its sender does not know yet, or lost its right to run.
    Stale {
        /// Who, with its generation.
        peer: Identity,
    },
    /// The peer refuses to go on.
    Refused {
        /// Why.
        refuse: Refuse,
        /// The peer's generation.
        generation: Generation,
    },
    /// The peer ends the connection in order.
    Goodbye {
        /// Why.
        goodbye: Goodbye,
        /// The peer's generation.
        generation: Generation,
    },
}

/// One end of a heartbeat connection: no I/O, no clock. `now` is a [`Duration`] since the process started.
///
/// * in: [`handle_bytes`](Self::handle_bytes), [`handle_eof`](Self::handle_eof);
/// * out: [`poll_event`](Self::poll_event) and [`poll_transmit`](Self::poll_transmit), each until `None`, after every other call and when
///   [`next_deadline`](Self::next_deadline) has come;
/// * orders: [`set_body`](Self::set_body), [`raise_generation`](Self::raise_generation), [`goodbye`](Self::goodbye).
///
/// Any error is the end: the same error comes from every later call. A refusal that names it is queued; transmit it, then close.
#[derive(Debug)]
pub struct Pulse {
    reader: FrameReader,
    writer: FrameWriter,
    interval: Duration,
    next_beat: Duration,
    body: HeartbeatBody,
    peer: Option<Identity>,
    /// When the last heartbeat was made.
    last_beat: Duration,
    /// The stamp on the last one that was heard.
    heard: Option<Stamp>,
    events: VecDeque<PulseEvent>,
    /// We said our last word.
    silent: bool,
    peer_ended: bool,
    failure: Option<LinkError>,
}

impl Pulse {
    /// A connection that starts with a hello and beats every `interval`, first at `now`.
    ///
    /// # Panics
    /// When `interval` is zero.
    pub fn new(identity: Identity, interval: Duration, now: Duration) -> Self {
        assert!(!interval.is_zero(), "heartbeats without a pause");
        let hello = Self::hello(&identity);
        let mut writer = FrameWriter::new(identity);
        writer.frame(MessageType::Hello, Epoch(0), &messages::put_hello(&hello), &[]);
        Self {
            reader: FrameReader::default(),
            writer,
            interval,
            next_beat: now,
            body: HeartbeatBody::default(),
            peer: None,
            last_beat: now,
            heard: None,
            events: VecDeque::new(),
            silent: false,
            peer_ended: false,
            failure: None,
        }
    }

    fn hello(identity: &Identity) -> Hello {
        Hello {
            channel: Channel::Heartbeat,
            versions: VersionRange::OURS,
            features: Features::OURS,
            node: identity.node.clone(),
            ram: None,
            facts: Facts::new(),
        }
    }

    /// Who is at the other end, once it said hello.
    pub fn peer(&self) -> Option<&Identity> {
        self.peer.as_ref()
    }

    /// Takes bytes from the connection, at most [`crate::limits::MAX_INPUT_BYTES`] at once.
    ///
    /// # Errors
    /// Whatever is wrong with them; the connection is over.
    pub fn handle_bytes(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        self.guarded(|this| {
            if this.silent {
                return Ok(());
            }
            this.reader.push(bytes)?;
            loop {
                let Self { reader, writer, peer, .. } = this;
                let Some(frame) = reader.next(|header| vet(header, writer.identity(), peer.as_ref()))? else {
                    return Ok(());
                };
                this.handle_frame(frame)?;
            }
        })
    }

    /// The peer closed the connection.
    ///
    /// # Errors
    /// [`Malformed::Truncated`] if a frame was under way.
    pub fn handle_eof(&mut self) -> Result<(), LinkError> {
        self.guarded(|this| if this.reader.at_boundary() { Ok(()) } else { Err(Malformed::Truncated.into()) })
    }

    /// The next thing learnt.
    pub fn poll_event(&mut self) -> Option<PulseEvent> {
        self.events.pop_front()
    }

    /// The next bytes to send, in this order and all of them. A heartbeat is made when it is due and asked for; beats that were missed
    /// are not made up for.
    pub fn poll_transmit(&mut self, now: Duration) -> Option<Bytes> {
        if self.writer.queued_bytes() == 0 && now >= self.next_beat && !self.silent {
            self.next_beat = now.saturating_add(self.interval);
            self.last_beat = now;
            let heartbeat = Heartbeat { body: self.body, said: Stamp::new(now), answers: self.heard };
            self.writer.frame(MessageType::Heartbeat, Epoch(0), &messages::put_heartbeat(&heartbeat), &[]);
        }
        self.writer.poll().map(|(bytes, _)| bytes)
    }

    /// When to call [`poll_transmit`](Self::poll_transmit) next if nothing else happens; `None` once nothing more will be sent.
    pub fn next_deadline(&self) -> Option<Duration> {
        (!self.silent).then_some(self.next_beat)
    }

    /// What heartbeats say from now on.
    pub fn set_body(&mut self, body: HeartbeatBody) {
        self.body = body;
    }

    /// A higher generation became known: heartbeats carry it from now on, and those of lower ones are dropped.
    ///
    /// # Errors
    /// [`ApiMisuse::GenerationFell`] if `generation` is lower than what is known.
    pub fn raise_generation(&mut self, generation: Generation) -> Result<(), LinkError> {
        self.guarded(|this| {
            if generation < this.writer.identity().generation {
                return Err(ApiMisuse::GenerationFell.into());
            }
            this.writer.set_generation(generation);
            Ok(())
        })
    }

    /// Ends the connection in order. Transmit it, then close.
    ///
    /// # Errors
    /// [`ApiMisuse`] if this side ended it before.
    pub fn goodbye(&mut self, reason: GoodbyeReason, text: &str) -> Result<(), LinkError> {
        self.guarded(|this| {
            if this.silent {
                return Err(ApiMisuse::State { needs: "a connection that was not ended by this side" }.into());
            }
            this.silent = true;
            let goodbye = Goodbye::new(reason, text);
            this.writer.frame(MessageType::Goodbye, Epoch(0), &messages::put_goodbye(&goodbye), &[]);
            Ok(())
        })
    }

    fn guarded<T>(&mut self, step: impl FnOnce(&mut Self) -> Result<T, LinkError>) -> Result<T, LinkError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let result = step(self);
        if let Err(failure) = &result {
            self.failure = Some(failure.clone());
            // Noise from who knows whom is not answered.
            let stranger = self.peer.is_none() && matches!(failure, LinkError::Malformed(_));
            if !self.silent && !self.peer_ended && !stranger {
                self.writer.frame(MessageType::Refuse, Epoch(0), &messages::put_refuse(&failure.refusal()), &[]);
            }
            self.silent = true;
        }
        result
    }

    fn handle_frame(&mut self, Frame { header, payload }: Frame) -> Result<(), LinkError> {
        if self.peer_ended {
            return Err(Misbehaved::AfterEnd.into());
        }
        let generation = header.generation;
        match (&mut self.peer, header.message) {
            (_, MessageType::Refuse) => {
                let refuse = messages::refuse(&payload)?;
                self.peer_ended = true;
                self.events.push_back(PulseEvent::Refused { refuse, generation });
            }
            (None, MessageType::Hello) => self.handle_hello(&header, &payload)?,
            (Some(_), MessageType::Goodbye) => {
                let goodbye = messages::goodbye(&payload)?;
                self.peer_ended = true;
                self.events.push_back(PulseEvent::Goodbye { goodbye, generation });
            }
            (Some(peer), MessageType::Heartbeat) => {
                let Heartbeat { body, said, answers } = messages::heartbeat(&payload)?;
                self.heard = Some(said);
                let answers = answers.map(|stamp| stamp.latest_until(self.last_beat));
                peer.generation = generation;
                let peer = peer.clone();
                let stale = generation < self.writer.identity().generation;
                self.tell(if stale { PulseEvent::Stale { peer } } else { PulseEvent::Heard { peer, body, answers } });
            }
            (peer, other) => {
                let waiting_for = if peer.is_none() { "Hello" } else { "Heartbeat" };
                return Err(Misbehaved::Unexpected { message: other.name(), waiting_for }.into());
            }
        }
        Ok(())
    }

    fn handle_hello(&mut self, header: &Header, payload: &[u8]) -> Result<(), LinkError> {
        let theirs = messages::hello(payload)?;
        let Header { vm, generation, incarnation, .. } = *header;
        let peer = Identity { vm, node: theirs.node.clone(), generation, incarnation };
        let ours = Self::hello(self.writer.identity());
        let _agreed = negotiate((self.writer.identity(), &ours), (&peer, &theirs)).map_err(LinkError::Incompatible)?;
        self.peer = Some(peer.clone());
        self.events.push_back(PulseEvent::Opened { peer });
        Ok(())
    }

    /// A flood of heartbeats becomes one event.
    fn tell(&mut self, event: PulseEvent) {
        if self.events.back().is_some_and(|last| core::mem::discriminant(last) == core::mem::discriminant(&event)) {
            self.events.pop_back();
        }
        self.events.push_back(event);
    }
}

/// Each frame is of our VM and, after the hello, of the same process, whose generation never falls.
fn vet(header: &Header, ours: &Identity, peer: Option<&Identity>) -> Result<(), LinkError> {
    if header.vm != ours.vm {
        let differences = vec![Difference::new("vm", &ours.vm.to_string(), &header.vm.to_string())];
        return Err(LinkError::Incompatible(Incompatible { code: RefuseCode::OtherVm, differences }));
    }
    let Some(peer) = peer else { return Ok(()) };
    if header.incarnation != peer.incarnation {
        return Err(Misbehaved::OtherIncarnation.into());
    }
    if header.generation < peer.generation {
        return Err(Misbehaved::GenerationChanged { expected: peer.generation, found: header.generation }.into());
    }
    Ok(())
}
