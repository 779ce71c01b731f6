//! Payloads of the messages about disks and about comparing before sending.

use bytes::{BufMut, Bytes};

use crate::disk::{Comparable, DiskChange, DiskContent, PieceHashes, PiecesWanted, Verified};
use crate::error::{LinkError, Malformed, Misbehaved};
use crate::limits::{MAX_DISK_CHANGE_BYTES, MAX_PIECES_PER_MESSAGE, MAX_VERIFY_FINDINGS};
use crate::wire::codec::{Reader, narrow32, wide};
use crate::wire::zstd::{Decoder, Encoder};

const RAW: u8 = 0;
const ZEROS: u8 = 1;
const ZSTD: u8 = 2;
const MEMORY: u8 = 0;
const DISK: u8 = 1;

/// A change's fields in front of its bytes, and its bytes as they are sent.
pub(crate) fn put_change(change: &DiskChange, encoder: Option<&mut Encoder>) -> (Vec<u8>, Option<Bytes>) {
    let DiskChange { disk, offset, content } = change;
    let (kind, body) = match content {
        DiskContent::Zeros(_) => (ZEROS, None),
        DiskContent::Bytes(bytes) => match encoder.and_then(|encoder| encoder.encode(bytes)) {
            Some(encoded) => (ZSTD, Some(Bytes::from(encoded))),
            None => (RAW, Some(bytes.clone())),
        },
    };
    let mut out = Vec::with_capacity(24);
    out.put_u8(*disk);
    out.put_u8(kind);
    out.put_bytes(0, 6);
    out.put_u64_le(*offset);
    out.put_u64_le(change.len());
    (out, body)
}

/// `decoder` is there if compression was agreed on. Whether the change lies in a disk is the caller's to say.
pub(crate) fn change(payload: &Bytes, decoder: Option<&mut Decoder>) -> Result<DiskChange, LinkError> {
    let mut reader = Reader::new(payload);
    let (disk, kind) = (reader.u8()?, reader.u8()?);
    reader.zeros(6)?;
    let (offset, length) = (reader.u64()?, reader.u64()?);
    let body = reader.rest();
    let data = |max: usize| {
        usize::try_from(length).ok().filter(|n| *n > 0 && *n <= max).ok_or(Malformed::Count { field: "disk bytes" })
    };
    let content = match kind {
        ZEROS if body.is_empty() => DiskContent::Zeros(length),
        RAW if wide(body.len()) == length => DiskContent::Bytes(payload.slice_ref(body)),
        ZEROS | RAW => return Err(Malformed::Count { field: "disk bytes" }.into()),
        ZSTD => {
            let size = data(MAX_DISK_CHANGE_BYTES)?;
            DiskContent::Bytes(Bytes::from(decoder.ok_or(Misbehaved::NotNegotiated)?.decode(body, size)?))
        }
        _ => return Err(Malformed::Value { field: "disk encoding" }.into()),
    };
    Ok(DiskChange { disk, offset, content })
}

fn put_of(out: &mut Vec<u8>, of: Comparable) {
    let (kind, disk) = match of {
        Comparable::Memory => (MEMORY, 0),
        Comparable::Disk(disk) => (DISK, disk),
    };
    out.put_u8(kind);
    out.put_u8(disk);
}

fn of(reader: &mut Reader<'_>) -> Result<Comparable, Malformed> {
    match (reader.u8()?, reader.u8()?) {
        (MEMORY, 0) => Ok(Comparable::Memory),
        (DISK, disk) => Ok(Comparable::Disk(disk)),
        _ => Err(Malformed::Value { field: "what is compared" }),
    }
}

fn count(reader: &mut Reader<'_>) -> Result<usize, Malformed> {
    reader.zeros(2)?;
    let count = reader.u32()? as usize;
    if count == 0 || count > MAX_PIECES_PER_MESSAGE { Err(Malformed::Count { field: "pieces" }) } else { Ok(count) }
}

pub(crate) fn put_hashes(hashes: &PieceHashes) -> Vec<u8> {
    let PieceHashes { of, first, hashes } = hashes;
    let mut out = Vec::with_capacity(16 + 16 * hashes.len());
    put_of(&mut out, *of);
    out.put_bytes(0, 2);
    out.put_u32_le(narrow32(hashes.len()));
    out.put_u64_le(*first);
    hashes.iter().for_each(|hash| out.put_u128_le(*hash));
    out
}

pub(crate) fn hashes(payload: &[u8]) -> Result<PieceHashes, Malformed> {
    let mut reader = Reader::new(payload);
    let of = of(&mut reader)?;
    let count = count(&mut reader)?;
    let first = reader.u64()?;
    let hashes = (0..count).map(|_| reader.u128()).collect::<Result<_, _>>()?;
    reader.end()?;
    Ok(PieceHashes { of, first, hashes })
}

pub(crate) fn put_wanted(answer: &PiecesWanted) -> Vec<u8> {
    let PiecesWanted { of, first, wanted } = answer;
    let mut out = Vec::with_capacity(16 + wanted.len().div_ceil(8));
    put_of(&mut out, *of);
    out.put_bytes(0, 2);
    out.put_u32_le(narrow32(wanted.len()));
    out.put_u64_le(*first);
    for eight in wanted.chunks(8) {
        out.put_u8(eight.iter().rev().fold(0, |byte, wanted| byte << 1 | u8::from(*wanted)));
    }
    out
}

pub(crate) fn wanted(payload: &[u8]) -> Result<PiecesWanted, Malformed> {
    let mut reader = Reader::new(payload);
    let of = of(&mut reader)?;
    let count = count(&mut reader)?;
    let first = reader.u64()?;
    let bits = reader.bytes(count.div_ceil(8))?;
    reader.end()?;
    let wanted = (0..count).map(|n| bits[n / 8] >> (n % 8) & 1 == 1).collect();
    if count % 8 != 0 && bits[count / 8] >> (count % 8) != 0 {
        return Err(Malformed::Reserved);
    }
    Ok(PiecesWanted { of, first, wanted })
}

pub(crate) fn put_verified(verified: &Verified) -> Vec<u8> {
    let Verified { compared, differing } = verified;
    let mut out = Vec::with_capacity(16 + 16 * differing.len());
    out.put_u64_le(*compared);
    out.put_u32_le(narrow32(differing.len()));
    out.put_bytes(0, 4);
    for (of, piece) in differing {
        put_of(&mut out, *of);
        out.put_bytes(0, 6);
        out.put_u64_le(*piece);
    }
    out
}

pub(crate) fn verified(payload: &[u8]) -> Result<Verified, Malformed> {
    let mut reader = Reader::new(payload);
    let (compared, count) = (reader.u64()?, reader.u32()? as usize);
    reader.zeros(4)?;
    if count > MAX_VERIFY_FINDINGS {
        return Err(Malformed::Count { field: "differences" });
    }
    let mut differing = Vec::with_capacity(count);
    for _ in 0..count {
        let of = of(&mut reader)?;
        reader.zeros(6)?;
        differing.push((of, reader.u64()?));
    }
    reader.end()?;
    Ok(Verified { compared, differing })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_read() {
        let hashes_of = PieceHashes { of: Comparable::Disk(3), first: 7, hashes: vec![1, u128::MAX] };
        assert_eq!(hashes(&put_hashes(&hashes_of)), Ok(hashes_of));
        for count in [1, 7, 8, 9, 4096] {
            let answer = PiecesWanted {
                of: Comparable::Memory,
                first: 1 << 40,
                wanted: (0..count).map(|n| n % 3 == 0).collect(),
            };
            assert_eq!(wanted(&put_wanted(&answer)), Ok(answer));
        }
        let found = Verified { compared: 512, differing: vec![(Comparable::Memory, 9), (Comparable::Disk(1), 2)] };
        assert_eq!(verified(&put_verified(&found)), Ok(found));
        for content in [DiskContent::Zeros(1024), DiskContent::Bytes(Bytes::from(vec![5; 512]))] {
            let one = DiskChange { disk: 1, offset: 4096, content };
            let (head, body) = put_change(&one, None);
            let payload = Bytes::from([&head[..], &body.unwrap_or_default()].concat());
            assert_eq!(change(&payload, None).unwrap(), one);
        }
    }

    #[test]
    fn spare_bits_and_wrong_lengths_are_refused() {
        let answer = PiecesWanted { of: Comparable::Memory, first: 0, wanted: vec![true; 3] };
        let mut payload = put_wanted(&answer);
        *payload.last_mut().unwrap() |= 8;
        assert_eq!(wanted(&payload), Err(Malformed::Reserved));
        let one = DiskChange { disk: 0, offset: 0, content: DiskContent::Bytes(Bytes::from(vec![5; 512])) };
        let (mut head, body) = put_change(&one, None);
        head[16] = 1;
        let payload = Bytes::from([&head[..], &body.unwrap()].concat());
        assert!(change(&payload, None).is_err());
    }
}
