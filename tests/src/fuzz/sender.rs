//! A primary's connection against a bad backup, and both ends of a heartbeat connection against a bad peer.

use core::time::Duration;
use std::collections::VecDeque;

use arbitrary::Unstructured;
use replication_proto::limits::{HEADER_BYTES, MAX_IN_FLIGHT, PAGE_BYTES};
use replication_proto::{
    CheckpointKind, Comparable, DiskChange, DiskContent, Epoch, Generation, GoodbyeReason, HeartbeatBody, LinkError,
    PageIndex, PieceHashes, Pulse, PulseEvent, Sender, SenderEvent,
};

use super::session::seal;
use super::support::{self, ACCEPT, ACK, END, Forge, GOODBYE, HEARTBEAT, REFUSE, sender_config};

const STEPS: usize = 300;

/// Target `sender_session`: orders of the primary and answers of a bad backup, in the order of the input's bytes.
///
/// Output is released (a `Committed` event) for each epoch once, in order, and never for one whose last byte had not left.
pub fn sender_session(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut primary = Primary::new(input.arbitrary().unwrap_or_default());
    for _ in 0..STEPS {
        if input.is_empty() || primary.step(&mut input).is_err() || primary.failed.is_some() {
            break;
        }
    }
}

struct Primary {
    sender: Sender,
    forge: Forge,
    /// What was handed out and is not parsed yet.
    wire: Vec<u8>,
    /// The last epoch whose end left.
    left: Option<Epoch>,
    begun: Option<Epoch>,
    released: Option<Epoch>,
    accepted: bool,
    /// Questions without an answer.
    asked: VecDeque<(Comparable, u64, usize)>,
    failed: Option<LinkError>,
}

impl Primary {
    fn new(compress: bool) -> Self {
        Self {
            sender: Sender::new(sender_config(compress)),
            forge: Forge::backup(),
            wire: Vec::new(),
            left: None,
            begun: None,
            released: None,
            accepted: false,
            asked: VecDeque::new(),
            failed: None,
        }
    }

    fn step(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        match input.int_in_range(0..=19u8)? {
            0..=2 => self.order(input)?,
            3 => self.whole_checkpoint(input)?,
            4 | 5 => self.transmit(input.int_in_range(1..=4)?),
            6 => self.transmit(usize::MAX),
            7 => {
                let accept = self.forge.accept();
                self.hear(accept);
            }
            8..=10 => {
                let epoch = self.released.map_or(7, |released| released.0.wrapping_add(1));
                let ack = self.forge.frame(ACK, epoch, &[]);
                self.hear(ack);
            }
            11 => {
                let epoch = *input.choose(&[0, 1, 6, 7, 8, 9, 10, 11, 20, u64::MAX - 1, u64::MAX])?;
                let ack = self.forge.frame(ACK, epoch, &[]);
                self.hear(ack);
            }
            12 => self.as_another(input)?,
            13 => self.changed(input)?,
            14 => self.any_message(input)?,
            15 => {
                let flood: Vec<u8> = (0..1000).flat_map(|_| self.forge.frame(ACK, 7, &[])).collect();
                self.hear(flood);
            }
            16 => {
                let refuse = self.forge.frame(REFUSE, 0, &[8, 0, 0, 0, 0, 0, 0, 0]);
                self.hear(refuse);
            }
            17 => {
                let goodbye = self.forge.frame(GOODBYE, 0, &[1, 0, 0, 0]);
                self.hear(goodbye);
            }
            18 => {
                let result = self.sender.handle_eof();
                self.check(result);
            }
            _ => {
                let result = self.sender.goodbye(GoodbyeReason::Switchover, "x");
                self.check(result);
            }
        }
        Ok(())
    }

    fn hear(&mut self, bytes: Vec<u8>) {
        let result = self.sender.handle_bytes(&bytes);
        self.check(result);
    }

    fn check(&mut self, result: Result<(), LinkError>) {
        while let Some(event) = self.sender.poll_event() {
            match event {
                SenderEvent::Accepted { .. } => {
                    assert!(!self.accepted, "accepted twice");
                    self.accepted = true;
                }
                SenderEvent::Committed { epoch } => {
                    assert!(self.left.is_some_and(|left| epoch <= left), "{epoch} is released and had not left");
                    assert!(self.released.is_none_or(|before| before.checked_next() == Some(epoch)));
                    self.released = Some(epoch);
                }
                SenderEvent::Wanted(answer) => {
                    assert_eq!(self.asked.pop_front(), Some((answer.of, answer.first, answer.wanted.len())));
                }
                SenderEvent::Durable { epoch } | SenderEvent::Verified { epoch, .. } => {
                    assert!(self.left.is_some_and(|left| epoch <= left), "{epoch} is told of and had not left");
                }
                SenderEvent::Refused { refuse, .. } => super::assert_harmless(&refuse.text),
                SenderEvent::Goodbye { goodbye, .. } => super::assert_harmless(&goodbye.text),
            }
        }
        assert!(self.sender.in_flight() <= MAX_IN_FLIGHT);
        if let Err(error) = result {
            super::assert_harmless(&error.to_string());
            assert_eq!(self.sender.handle_bytes(&[]).as_ref(), Err(&error));
            assert_eq!(self.sender.begin(Epoch(7), CheckpointKind::Base).as_ref(), Err(&error));
            assert!(self.sender.poll_transmit().is_none() && self.sender.poll_event().is_none());
            assert!(self.sender.queued_bytes() == 0 && !self.sender.can_begin());
            self.failed = Some(error);
        }
    }

    fn transmit(&mut self, pieces: usize) {
        for _ in 0..pieces {
            let Some(bytes) = self.sender.poll_transmit() else { break };
            self.wire.extend_from_slice(&bytes);
        }
        // The frames that are whole, read as docs/protocol.md draws them.
        while let Some(header) = self.wire.get(..HEADER_BYTES) {
            let length = u32::from_le_bytes(header[12..16].try_into().expect("4 bytes")) as usize;
            let (message, epoch) = (header[10], u64::from_le_bytes(header[32..40].try_into().expect("8 bytes")));
            let Some(rest) = self.wire.get(HEADER_BYTES + length..) else { break };
            let rest = rest.to_vec();
            if message == END {
                assert!(self.left.is_none_or(|left| left.checked_next() == Some(Epoch(epoch))));
                self.left = Some(Epoch(epoch));
            }
            self.wire = rest;
        }
    }

    fn order(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let next = self.begun.map_or(7, |begun| begun.0.wrapping_add(1));
        let result = match input.int_in_range(0..=11u8)? {
            0 | 1 => {
                let epoch = if input.ratio(1, 10)? { input.arbitrary()? } else { next };
                let kind =
                    if (epoch == 7) == input.ratio(9, 10)? { CheckpointKind::Base } else { CheckpointKind::Delta };
                let result = self.sender.begin(Epoch(epoch), kind);
                if result.is_ok() {
                    self.begun = Some(Epoch(epoch));
                }
                result
            }
            2 | 3 => {
                let page = *input.choose(&[0, 1, 2, 16, 17, 3, u64::MAX])?;
                let length = *input.choose(&[PAGE_BYTES, PAGE_BYTES, 0, 4095, 2 * PAGE_BYTES])?;
                self.sender.pages(&[PageIndex(page)], &vec![input.arbitrary()?; length])
            }
            4 => {
                let all = support::all_pages(&support::ram());
                let bytes = bytes::Bytes::from(vec![input.arbitrary()?; all.len() * PAGE_BYTES]);
                self.sender.pages_shared(&all, &bytes)
            }
            5 => self.sender.section(input.arbitrary()?, 1, &vec![1; input.int_in_range(0..=9000)?]),
            6 | 7 => self.sender.end(false).map(drop),
            8 => {
                let content = if input.arbitrary()? {
                    DiskContent::Zeros(input.arbitrary()?)
                } else {
                    DiskContent::Bytes(vec![7; *input.choose(&[512, 4096, 0, 511, 300 << 10])?].into())
                };
                let change = DiskChange { disk: input.int_in_range(0..=2)?, offset: input.arbitrary()?, content };
                let at = input.int_in_range(0..=2047)? * 512;
                self.sender.disk_change(&if input.arbitrary()? { change } else { DiskChange { offset: at, ..change } })
            }
            9 => {
                let of = *input.choose(&[Comparable::Memory, Comparable::Disk(0), Comparable::Disk(2)])?;
                let (first, count) = (*input.choose(&[0, 1, 16, 255, u64::MAX])?, input.int_in_range(0..=3usize)?);
                let result = self.sender.hashes(&PieceHashes { of, first, hashes: vec![1; count] });
                if result.is_ok() {
                    self.asked.push_back((of, first, count));
                }
                result
            }
            10 => self.sender.inbound(Epoch(input.int_in_range(0..=9)?), 0, &vec![1; input.int_in_range(0..=70_000)?]),
            _ => Ok(()),
        };
        self.check(result);
        Ok(())
    }

    /// What an honest primary does, as far as it may.
    fn whole_checkpoint(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        if !self.accepted {
            let accept = self.forge.accept();
            self.hear(accept);
        }
        if !self.sender.can_begin() {
            return Ok(());
        }
        let (epoch, kind) = match self.begun {
            None => (7, CheckpointKind::Base),
            Some(begun) => (begun.0 + 1, CheckpointKind::Delta),
        };
        let all = support::all_pages(&support::ram());
        let result = self
            .sender
            .begin(Epoch(epoch), kind)
            .and_then(|()| self.sender.pages(&all, &vec![input.arbitrary().unwrap_or(1); all.len() * PAGE_BYTES]))
            .and_then(|()| self.sender.end(false).map(drop));
        self.begun = Some(Epoch(epoch));
        assert_eq!(result, Ok(()), "an honest checkpoint");
        self.check(result);
        Ok(())
    }

    fn as_another(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let by = input.int_in_range(1..=u64::MAX)?;
        match input.int_in_range(0..=4u8)? {
            0 => self.forge.generation = self.forge.generation.wrapping_add(by),
            1 => self.forge.vm ^= u128::from(by),
            2 => self.forge.incarnation ^= u128::from(by),
            3 => self.forge.sequence = self.forge.sequence.wrapping_add(by),
            _ => self.forge.incarnation = support::PRIMARY.0,
        }
        Ok(())
    }

    fn changed(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let mut frame = if input.arbitrary()? { self.forge.accept() } else { self.forge.frame(ACK, 7, &[]) };
        let bit = input.int_in_range(64..=frame.len() * 8 - 1)?;
        frame[bit / 8] ^= 1 << (bit % 8);
        if input.arbitrary()? {
            seal(&mut frame);
        }
        let cut = if input.arbitrary()? { frame.len() } else { input.int_in_range(0..=frame.len())? };
        frame.truncate(cut);
        self.hear(frame);
        Ok(())
    }

    fn any_message(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let (kind, epoch) = (input.int_in_range(0..=17u8)?, input.int_in_range(0..=9u64)?);
        let length = input.int_in_range(0..=60usize)?.min(input.len());
        let payload = input.bytes(length)?.to_vec();
        let frame = self.forge.frame(if kind == ACK { ACCEPT } else { kind }, epoch, &payload);
        self.hear(frame);
        Ok(())
    }
}

/// Target `pulse_session`: two ends of a heartbeat connection whose frames are changed, cut, lost and made up on the way.
///
/// A heartbeat is only heard with a generation that is not lower than one's own, events do not pile up, errors are for ever.
pub fn pulse_session(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let ms = Duration::from_millis;
    let mut ends = [support::primary(), support::backup()].map(|identity| End::new(identity, ms(20)));
    let mut now = ms(0);
    for _ in 0..STEPS {
        if input.is_empty() || beat(&mut input, &mut ends, &mut now).is_err() {
            break;
        }
    }
}

struct End {
    pulse: Pulse,
    forge: Forge,
    generation: u64,
    failed: Option<LinkError>,
}

impl End {
    fn new(identity: replication_proto::Identity, interval: Duration) -> Self {
        let generation = identity.generation.0;
        // Its forger is the other end.
        let forge = if identity == support::primary() { Forge::backup() } else { Forge::primary() };
        Self { pulse: Pulse::new(identity, interval, Duration::ZERO), forge, generation, failed: None }
    }

    fn hear(&mut self, bytes: &[u8]) {
        let result = self.pulse.handle_bytes(bytes);
        let mut events = 0;
        while let Some(event) = self.pulse.poll_event() {
            events += 1;
            match event {
                PulseEvent::Heard { peer, .. } => assert!(peer.generation.0 >= self.generation, "{peer:?}"),
                PulseEvent::Stale { peer } => assert!(peer.generation.0 < self.generation, "{peer:?}"),
                PulseEvent::Refused { refuse, .. } => super::assert_harmless(&refuse.text),
                PulseEvent::Goodbye { goodbye, .. } => super::assert_harmless(&goodbye.text),
                PulseEvent::Opened { .. } => {}
            }
        }
        assert!(events <= 5, "{events} events of one input");
        self.check(result);
    }

    fn check(&mut self, result: Result<(), LinkError>) {
        if let Some(failed) = &self.failed {
            assert_eq!(result.as_ref(), Err(failed), "an error is for ever");
        }
        if let Err(error) = result {
            super::assert_harmless(&error.to_string());
            assert_eq!(self.pulse.next_deadline(), None);
            self.failed = Some(error);
        }
    }
}

fn beat(input: &mut Unstructured<'_>, ends: &mut [End; 2], now: &mut Duration) -> arbitrary::Result<()> {
    let at = usize::from(input.arbitrary::<bool>()?);
    match input.int_in_range(0..=9u8)? {
        0..=3 => {
            *now += Duration::from_millis(u64::from(input.arbitrary::<u8>()?));
            let mut said = support::drain(|| ends[at].pulse.poll_transmit(*now));
            assert!(said.len() <= 2 << 20);
            if !said.is_empty() && input.ratio(1, 8)? {
                let bit = input.int_in_range(0..=said.len() * 8 - 1)?;
                said[bit / 8] ^= 1 << (bit % 8);
                if said.len() >= HEADER_BYTES && input.arbitrary()? {
                    seal(&mut said);
                }
            }
            if input.ratio(1, 16)? {
                said.truncate(input.int_in_range(0..=said.len())?);
            }
            ends[1 - at].hear(&said);
        }
        4 => {
            let generation = input.int_in_range(0..=6)?;
            let end = &mut ends[at];
            let result = end.pulse.raise_generation(Generation(generation));
            if result.is_ok() {
                end.generation = generation.max(end.generation);
            }
            end.check(result);
        }
        5 => {
            let end = &mut ends[at];
            let (kind, length) = (input.int_in_range(0..=17)?, input.int_in_range(0..=60usize)?.min(input.len()));
            let payload = input.bytes(length)?.to_vec();
            let frame = end.forge.frame(kind, 0, &payload);
            end.hear(&frame);
        }
        6 => {
            let end = &mut ends[at];
            end.forge.generation = input.int_in_range(0..=9)?;
            let mut beat = [0; 24];
            beat[16..20].copy_from_slice(&input.int_in_range(1..=u32::MAX)?.to_le_bytes());
            beat[20..].copy_from_slice(&u32::to_le_bytes(input.arbitrary()?));
            let flood: Vec<u8> = (0..100).flat_map(|_| end.forge.frame(HEARTBEAT, 0, &beat)).collect();
            end.hear(&flood);
        }
        7 => ends[at].pulse.set_body(HeartbeatBody {
            committed_epoch: Epoch(input.arbitrary()?),
            state: input.arbitrary()?,
            armed: input.arbitrary()?,
            arbiter_ok_ms: input.arbitrary()?,
        }),
        8 => {
            let result = ends[at].pulse.handle_eof();
            ends[at].check(result);
        }
        _ => {
            let result = ends[at].pulse.goodbye(GoodbyeReason::Stopped, "x\ny");
            ends[at].check(result);
        }
    }
    Ok(())
}
