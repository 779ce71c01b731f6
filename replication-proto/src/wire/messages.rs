//! Payloads of all messages but Pages.

use bytes::{BufMut, Bytes};

use crate::digest::CheckpointDigest;
use crate::disk::{DiskStanding, Standing};
use crate::error::{LinkError, Malformed, Misbehaved};
use crate::facts::Facts;
use crate::ids::{Epoch, Generation, NodeName, PageIndex, Point};
use crate::limits::{
    MAX_DIFFERENCE_VALUE_BYTES, MAX_DIFFERENCES, MAX_DIRTY_BYTES, MAX_DISKS, MAX_FACT_NAME_BYTES, MAX_FACT_VALUE_BYTES,
    MAX_FACTS, MAX_RAM_RANGES, MAX_SECTION_BYTES, MAX_TEXT_BYTES, MIN_COMPRESSED_SECTION_BYTES,
};
use crate::message::{
    Accept, Channel, CheckpointKind, Difference, EndOfCheckpoint, Features, Goodbye, GoodbyeReason, HeartbeatBody,
    Hello, Refuse, RefuseCode, VersionRange,
};
use crate::ram::{PageRange, RamLayout};
use crate::stamp::Stamp;
use crate::wire::codec::{Reader, narrow16, narrow32};
use crate::wire::zstd::{Decoder, Encoder};

const RAW: u8 = 0;
const ZSTD: u8 = 1;
/// An age in a heartbeat that says that there is none.
const NEVER: u32 = u32::MAX;

fn put_short(out: &mut Vec<u8>, text: &str) {
    out.put_u8(u8::try_from(text.len()).expect("limits keep names within 8 bits of length"));
    out.put_slice(text.as_bytes());
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.put_u16_le(narrow16(text.len()));
    out.put_slice(text.as_bytes());
}

fn short_text<'a>(reader: &mut Reader<'a>, max: usize, field: &'static str) -> Result<&'a str, Malformed> {
    let length = reader.u8()?;
    reader.text(usize::from(length), max, field)
}

fn text<'a>(reader: &mut Reader<'a>, max: usize, field: &'static str) -> Result<&'a str, Malformed> {
    let length = reader.u16()?;
    reader.text(usize::from(length), max, field)
}

fn node(reader: &mut Reader<'_>) -> Result<NodeName, Malformed> {
    let name = short_text(reader, NodeName::MAX_BYTES, "node name")?;
    NodeName::new(name).map_err(|_| Malformed::Value { field: "node name" })
}

pub(crate) fn put_hello(hello: &Hello) -> Vec<u8> {
    let Hello { channel, versions, features, node, ram, facts } = hello;
    let mut out = Vec::new();
    out.put_u8(match channel {
        Channel::Data => 1,
        Channel::Heartbeat => 2,
    });
    out.put_bytes(0, 3);
    out.put_u16_le(versions.min);
    out.put_u16_le(versions.max);
    out.put_u64_le(features.offered);
    out.put_u64_le(features.required);
    put_short(&mut out, node.as_str());
    let ranges = ram.as_ref().map_or(&[][..], RamLayout::ranges);
    out.put_u16_le(narrow16(ranges.len()));
    for range in ranges {
        out.put_u64_le(range.first.0);
        out.put_u64_le(range.pages);
    }
    out.put_u16_le(narrow16(facts.len()));
    for (name, value) in facts.iter() {
        put_short(&mut out, name);
        put_text(&mut out, value);
    }
    out
}

pub(crate) fn hello(payload: &[u8]) -> Result<Hello, Malformed> {
    let mut reader = Reader::new(payload);
    let channel = match reader.u8()? {
        1 => Channel::Data,
        2 => Channel::Heartbeat,
        _ => return Err(Malformed::Value { field: "channel" }),
    };
    reader.zeros(3)?;
    let versions = VersionRange { min: reader.u16()?, max: reader.u16()? };
    if versions.min == 0 || versions.min > versions.max {
        return Err(Malformed::Value { field: "version range" });
    }
    let features = Features { offered: reader.u64()?, required: reader.u64()? };
    if features.required & !features.offered != 0 {
        return Err(Malformed::Value { field: "required features" });
    }
    let node = node(&mut reader)?;
    let ram = ram(&mut reader)?;
    let facts = facts(&mut reader)?;
    reader.end()?;
    // Data needs a layout; a heartbeat has no use for one, nor for facts.
    if ram.is_some() != (channel == Channel::Data) || channel == Channel::Heartbeat && !facts.is_empty() {
        return Err(Malformed::Value { field: "memory layout" });
    }
    Ok(Hello { channel, versions, features, node, ram, facts })
}

fn ram(reader: &mut Reader<'_>) -> Result<Option<RamLayout>, Malformed> {
    let count = usize::from(reader.u16()?);
    if count > MAX_RAM_RANGES {
        return Err(Malformed::Count { field: "memory ranges" });
    }
    if count == 0 {
        return Ok(None);
    }
    let mut ranges = Vec::with_capacity(count);
    for _ in 0..count {
        ranges.push(PageRange { first: PageIndex(reader.u64()?), pages: reader.u64()? });
    }
    RamLayout::new(ranges).map(Some).map_err(|_| Malformed::Value { field: "memory layout" })
}

fn facts(reader: &mut Reader<'_>) -> Result<Facts, Malformed> {
    let count = usize::from(reader.u16()?);
    if count > MAX_FACTS {
        return Err(Malformed::Count { field: "facts" });
    }
    let mut facts = Facts::new();
    for _ in 0..count {
        let name = short_text(reader, MAX_FACT_NAME_BYTES, "fact name")?;
        let value = text(reader, MAX_FACT_VALUE_BYTES, "fact value")?;
        facts.insert(name, value).map_err(|_| Malformed::Value { field: "fact" })?;
    }
    Ok(facts)
}

pub(crate) fn put_accept(accept: &Accept) -> Vec<u8> {
    let Accept { version, features, node, standing } = accept;
    let mut out = Vec::new();
    out.put_u16_le(*version);
    out.put_bytes(0, 6);
    out.put_u64_le(*features);
    put_short(&mut out, node.as_str());
    let Standing { warm_memory, disks } = standing;
    assert!(disks.len() <= MAX_DISKS, "a machine has few disks");
    out.put_u8(u8::from(*warm_memory));
    out.put_u8(u8::try_from(disks.len()).unwrap_or(0));
    for DiskStanding { base, was_owner, dirty } in disks {
        assert!(dirty.len() <= MAX_DIRTY_BYTES, "who keeps the set bounds its encoding");
        let Point { generation, epoch } = base.unwrap_or(Point { generation: Generation(0), epoch: Epoch(0) });
        out.put_u64_le(generation.0);
        out.put_u64_le(epoch.0);
        out.put_u8(u8::from(*was_owner));
        out.put_bytes(0, 3);
        out.put_u32_le(narrow32(dirty.len()));
        out.put_slice(dirty);
    }
    out
}

fn standing(reader: &mut Reader<'_>) -> Result<Standing, Malformed> {
    let warm_memory = flag(reader, "warm memory")?;
    let count = usize::from(reader.u8()?);
    if count > MAX_DISKS {
        return Err(Malformed::Count { field: "disks" });
    }
    let mut disks = Vec::with_capacity(count);
    for _ in 0..count {
        let point = Point { generation: Generation(reader.u64()?), epoch: Epoch(reader.u64()?) };
        let base = (point.generation != Generation(0)).then_some(point);
        let was_owner = flag(reader, "former owner")?;
        reader.zeros(3)?;
        let length = reader.u32()? as usize;
        if length > MAX_DIRTY_BYTES {
            return Err(Malformed::Count { field: "dirty blocks" });
        }
        disks.push(DiskStanding { base, was_owner, dirty: Bytes::copy_from_slice(reader.bytes(length)?) });
    }
    Ok(Standing { warm_memory, disks })
}

fn flag(reader: &mut Reader<'_>, field: &'static str) -> Result<bool, Malformed> {
    match reader.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Malformed::Value { field }),
    }
}

pub(crate) fn accept(payload: &[u8]) -> Result<Accept, Malformed> {
    let mut reader = Reader::new(payload);
    let version = reader.u16()?;
    reader.zeros(6)?;
    let accept =
        Accept { version, features: reader.u64()?, node: node(&mut reader)?, standing: standing(&mut reader)? };
    reader.end()?;
    Ok(accept)
}

pub(crate) fn put_refuse(refuse: &Refuse) -> Vec<u8> {
    let Refuse { code, text, differences } = refuse;
    let mut out = Vec::new();
    out.put_u16_le(code.number());
    out.put_u16_le(narrow16(differences.len()));
    out.put_bytes(0, 2);
    put_text(&mut out, text);
    for Difference { name, ours, theirs } in differences {
        put_short(&mut out, name);
        put_text(&mut out, ours);
        put_text(&mut out, theirs);
    }
    out
}

pub(crate) fn refuse(payload: &[u8]) -> Result<Refuse, Malformed> {
    let mut reader = Reader::new(payload);
    let code = RefuseCode::from_number(reader.u16()?);
    let count = usize::from(reader.u16()?);
    if count > MAX_DIFFERENCES {
        return Err(Malformed::Count { field: "differences" });
    }
    reader.zeros(2)?;
    let why = text(&mut reader, MAX_TEXT_BYTES, "refusal's text")?.to_owned();
    let mut differences = Vec::with_capacity(count);
    for _ in 0..count {
        let name = short_text(&mut reader, MAX_FACT_NAME_BYTES, "difference")?.to_owned();
        // What was the speaker's own value is the other side's value here.
        let theirs = text(&mut reader, MAX_DIFFERENCE_VALUE_BYTES, "difference")?.to_owned();
        let ours = text(&mut reader, MAX_DIFFERENCE_VALUE_BYTES, "difference")?.to_owned();
        differences.push(Difference { name, ours, theirs });
    }
    reader.end()?;
    Ok(Refuse { code, text: why, differences })
}

pub(crate) fn put_begin(kind: CheckpointKind) -> [u8; 8] {
    [kind.code(), 0, 0, 0, 0, 0, 0, 0]
}

pub(crate) fn begin(payload: &[u8]) -> Result<CheckpointKind, Malformed> {
    let mut reader = Reader::new(payload);
    let kind = match reader.u8()? {
        0 => CheckpointKind::Base,
        1 => CheckpointKind::Delta,
        _ => return Err(Malformed::Value { field: "checkpoint kind" }),
    };
    reader.zeros(7)?;
    reader.end()?;
    Ok(kind)
}

/// A section's fields in front of its bytes, and its bytes if they are sent compressed.
pub(crate) fn put_section(
    kind: u16,
    version: u16,
    bytes: &[u8],
    encoder: Option<&mut Encoder>,
) -> (Vec<u8>, Option<Vec<u8>>) {
    assert!(bytes.len() <= MAX_SECTION_BYTES, "the caller bounds sections");
    let encoder = encoder.filter(|_| bytes.len() >= MIN_COMPRESSED_SECTION_BYTES);
    let encoded = encoder.and_then(|encoder| encoder.encode(bytes));
    let mut out = Vec::with_capacity(16);
    out.put_u16_le(kind);
    out.put_u16_le(version);
    out.put_u8(if encoded.is_some() { ZSTD } else { RAW });
    out.put_bytes(0, 3);
    out.put_u32_le(narrow32(bytes.len()));
    out.put_bytes(0, 4);
    (out, encoded)
}

/// A section as it came, decoded.
#[derive(Debug)]
pub(crate) struct SectionFrame {
    pub(crate) kind: u16,
    pub(crate) version: u16,
    pub(crate) bytes: Bytes,
}

/// `decoder` is there if compression was agreed on.
pub(crate) fn section(payload: &Bytes, decoder: Option<&mut Decoder>) -> Result<SectionFrame, LinkError> {
    let mut reader = Reader::new(payload);
    let (kind, version, encoding) = (reader.u16()?, reader.u16()?, reader.u8()?);
    reader.zeros(3)?;
    let length = reader.u32()? as usize;
    reader.zeros(4)?;
    let body = reader.rest();
    if length > MAX_SECTION_BYTES {
        return Err(Malformed::Count { field: "section bytes" }.into());
    }
    let bytes = match encoding {
        RAW if body.len() == length => payload.slice_ref(body),
        RAW => return Err(Malformed::Count { field: "section bytes" }.into()),
        ZSTD => Bytes::from(decoder.ok_or(Misbehaved::NotNegotiated)?.decode(body, length)?),
        _ => return Err(Malformed::Value { field: "section encoding" }.into()),
    };
    Ok(SectionFrame { kind, version, bytes })
}

pub(crate) fn put_end(end: &EndOfCheckpoint) -> Vec<u8> {
    let EndOfCheckpoint { epoch: _, kind: _, pages, sections, disk_changes, flushed, digest } = end;
    let mut out = Vec::with_capacity(40);
    out.put_u64_le(*pages);
    out.put_u64_le(*disk_changes);
    out.put_u32_le(*sections);
    out.put_u8(u8::from(*flushed));
    out.put_bytes(0, 3);
    out.put_u128_le(digest.0);
    out
}

pub(crate) fn end(payload: &[u8], epoch: Epoch, kind: CheckpointKind) -> Result<EndOfCheckpoint, Malformed> {
    let mut reader = Reader::new(payload);
    let (pages, disk_changes, sections) = (reader.u64()?, reader.u64()?, reader.u32()?);
    let flushed = flag(&mut reader, "flush")?;
    reader.zeros(3)?;
    let digest = CheckpointDigest(reader.u128()?);
    reader.end()?;
    Ok(EndOfCheckpoint { epoch, kind, pages, sections, disk_changes, flushed, digest })
}

/// What a heartbeat carries: what its speaker says of itself, and its place in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heartbeat {
    pub(crate) body: HeartbeatBody,
    /// When it was said, on the speaker's clock.
    pub(crate) said: Stamp,
    /// The listener's stamp on the last heartbeat that the speaker had heard by then.
    pub(crate) answers: Option<Stamp>,
}

pub(crate) fn put_heartbeat(heartbeat: &Heartbeat) -> Vec<u8> {
    let Heartbeat { body, said, answers } = heartbeat;
    let HeartbeatBody { committed_epoch, state, armed, arbiter_ok_ms } = *body;
    let mut out = Vec::with_capacity(24);
    out.put_u64_le(committed_epoch.0);
    out.put_u8(state);
    out.put_u8(armed);
    out.put_bytes(0, 2);
    // An age that does not fit (50 days) is no success worth telling.
    out.put_u32_le(arbiter_ok_ms.unwrap_or(NEVER));
    out.put_u32_le(said.to_wire());
    out.put_u32_le(answers.map_or(0, Stamp::to_wire));
    out
}

pub(crate) fn heartbeat(payload: &[u8]) -> Result<Heartbeat, Malformed> {
    let mut reader = Reader::new(payload);
    let (committed_epoch, state, armed) = (Epoch(reader.u64()?), reader.u8()?, reader.u8()?);
    reader.zeros(2)?;
    let age = reader.u32()?;
    let said = Stamp::from_wire(reader.u32()?).ok_or(Malformed::Value { field: "time of a heartbeat" })?;
    let answers = Stamp::from_wire(reader.u32()?);
    reader.end()?;
    let body = HeartbeatBody { committed_epoch, state, armed, arbiter_ok_ms: (age != NEVER).then_some(age) };
    Ok(Heartbeat { body, said, answers })
}

/// A frame's fields in front of its bytes.
pub(crate) fn put_inbound(nic: u8) -> [u8; 4] {
    [nic, 0, 0, 0]
}

/// The network device and the frame that arrived on it.
pub(crate) fn inbound(payload: &Bytes) -> Result<(u8, Bytes), Malformed> {
    let mut reader = Reader::new(payload);
    let nic = reader.u8()?;
    reader.zeros(3)?;
    let frame = reader.rest();
    Ok((nic, payload.slice_ref(frame)))
}

pub(crate) fn put_goodbye(goodbye: &Goodbye) -> Vec<u8> {
    let Goodbye { reason, text } = goodbye;
    let mut out = Vec::new();
    out.put_u8(reason.number());
    out.put_u8(0);
    put_text(&mut out, text);
    out
}

pub(crate) fn goodbye(payload: &[u8]) -> Result<Goodbye, Malformed> {
    let mut reader = Reader::new(payload);
    let reason = GoodbyeReason::from_number(reader.u8()?);
    reader.zeros(1)?;
    let why = text(&mut reader, MAX_TEXT_BYTES, "goodbye's text")?.to_owned();
    reader.end()?;
    Ok(Goodbye { reason, text: why })
}
