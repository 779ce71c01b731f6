//! Target `patches`: deltas whose pages come as patches, read by the real receiver and by a slow reader of this file's own.

use arbitrary::Unstructured;
use replication_proto::limits::PAGE_BYTES;
use replication_proto::{CheckpointKind, Epoch, EpochDigest, ReceiverEvent};

use super::support::{self, Backup, Forge, PAGES, receiver_config};

/// The pages that the test guest has.
const ALL: [u64; 5] = [0, 1, 2, 16, 17];
/// zstd and patches.
const BOTH: u8 = 3;

/// Target `patches`.
pub fn patches(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let _ = deltas(&mut input);
}

/// How many deltas were taken.
fn deltas(input: &mut Unstructured<'_>) -> arbitrary::Result<u64> {
    let (mut backup, mut forge) = (Backup::new(receiver_config()), Forge::primary());
    let hello = forge.hello_offering(BOTH);
    backup.feed(&forge.opening_after(hello), usize::MAX).expect("a sound base");

    let mut copies: [Option<Vec<u8>>; ALL.len()] = Default::default();
    for epoch in 8..=10 {
        let mut runs = Vec::new();
        let (mut body, mut expected) = (Vec::new(), Some(Vec::new()));
        let mut chosen = vec![input.choose_index(ALL.len())?];
        for at in 0..ALL.len() {
            if input.ratio(1, if chosen.contains(&at) { 32 } else { 2 })? {
                chosen.push(at);
            }
        }
        for at in chosen {
            let (kind, sent, page) = page(input, copies[at].as_deref())?;
            runs.push((ALL[at], 1, kind));
            body.extend(sent);
            if let Some(page) = &page
                && kind >= 2
            {
                copies[at] = Some(page.clone());
            }
            expected = expected.zip(page).map(|(all, page)| [all, page].concat());
        }
        let count = u32::try_from(runs.len()).expect("five");
        let length = u32::try_from(body.len()).expect("five pages");
        let compressed = length > 0 && input.ratio(1, 4)?;
        if compressed {
            body = zstd::bulk::compress(&body, 1).expect("memory to compress");
        }
        let payload = support::pages_payload(u8::from(compressed), &runs, count, length, &body);
        let mut numbers: Vec<u64> = runs.iter().map(|(page, ..)| *page).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let twice = numbers.len() < runs.len();
        let said = [forge.begin(epoch, 1), forge.frame(PAGES, epoch, &payload)].concat();
        let came = heard(&mut backup, &said);
        assert_eq!(came, expected.filter(|_| !twice), "{runs:?}");
        let Some(bytes) = came else { return Ok(epoch - 8) };
        let mut digest = EpochDigest::new(Epoch(epoch), CheckpointKind::Delta);
        runs.iter()
            .zip(bytes.chunks_exact(PAGE_BYTES))
            .for_each(|((page, ..), bytes)| digest.pages(&[replication_proto::PageIndex(*page)], bytes));
        let end = forge.end(epoch, u64::from(count), 0, digest.finish());
        backup.receiver.handle_bytes(&end).expect("room");
        assert!(matches!(backup.receiver.poll_event(), Ok(Some(ReceiverEvent::End(_)))), "a sound end");
    }
    Ok(3)
}

/// How a page is sent, the bytes of that, and what it must become; `None`: it must be refused.
fn page(input: &mut Unstructured<'_>, copy: Option<&[u8]>) -> arbitrary::Result<(u32, Vec<u8>, Option<Vec<u8>>)> {
    match input.int_in_range(0..=5)? {
        0 => Ok((1, Vec::new(), Some(vec![0; PAGE_BYTES]))),
        kind if kind == 1 || (kind < 4 && copy.is_none()) => {
            let page = support::page(input.arbitrary()?);
            Ok((*input.choose(&[0, 3, 3, 3])?, page.clone(), Some(page)))
        }
        _ if copy.is_none() && input.ratio(7, 8)? => Ok((1, Vec::new(), Some(vec![0; PAGE_BYTES]))),
        _ => {
            let length = input.int_in_range(0..=40usize)?;
            let mut patch = input.bytes(length)?.to_vec();
            if input.ratio(7, 8)? {
                patch = sound(&patch);
            }
            let sent = [&u16::try_from(patch.len()).expect("short").to_le_bytes()[..], &patch].concat();
            Ok((2, sent, copy.and_then(|copy| slowly(copy, &patch))))
        }
    }
}

/// A patch that is one, out of noise.
fn sound(noise: &[u8]) -> Vec<u8> {
    let (mut patch, mut at) = (Vec::new(), 0usize);
    for &[low, high, count, fill] in noise.as_chunks::<4>().0 {
        let skip = usize::from(low & 0x7f) + usize::from(high % 16) * 128;
        let count = usize::from(count % 16) + 1;
        if at + skip + count > PAGE_BYTES {
            break;
        }
        at += skip + count;
        if high % 16 == 0 {
            patch.push(low & 0x7f)
        } else {
            patch.extend([low | 0x80, high % 16])
        }
        patch.push(u8::try_from(count).expect("at most 16"));
        patch.extend(std::iter::repeat_n(fill, count));
    }
    patch
}

/// docs/protocol.md, a byte at a time.
fn slowly(copy: &[u8], patch: &[u8]) -> Option<Vec<u8>> {
    let (mut page, mut bytes, mut at) = (copy.to_vec(), patch.iter().copied(), 0);
    while let Some(first) = bytes.next() {
        let number = |first: u8, bytes: &mut dyn Iterator<Item = u8>| match first {
            0..=127 => Some(usize::from(first)),
            _ => bytes
                .next()
                .filter(|high| (1..128).contains(high))
                .map(|high| usize::from(first - 128) + usize::from(high) * 128),
        };
        at += number(first, &mut bytes)?;
        let second = bytes.next()?;
        let count = number(second, &mut bytes)?;
        if count == 0 {
            return None;
        }
        for _ in 0..count {
            *page.get_mut(at)? = bytes.next()?;
            at += 1;
        }
    }
    Some(page)
}

/// What comes of a delta's pages: `None` if the connection is over.
fn heard(backup: &mut Backup, stream: &[u8]) -> Option<Vec<u8>> {
    backup.receiver.handle_bytes(stream).expect("the size of an input");
    let mut pages = None;
    loop {
        match backup.receiver.poll_event() {
            Ok(Some(ReceiverEvent::Pages { bytes, .. })) => pages = Some(bytes.to_vec()),
            Ok(Some(_)) => {}
            Ok(None) => return pages,
            Err(error) => {
                super::frames::assert_final(&mut backup.receiver, &error);
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::real::rng::mix;

    #[test]
    fn noise_finds_both_readers_of_one_mind() {
        let mut taken = [0; 4];
        for seed in 0..20_000u64 {
            let bytes: Vec<u8> = (0..128).flat_map(|n| mix(seed << 16 | n).to_le_bytes()).collect();
            let deltas = deltas(&mut Unstructured::new(&bytes)).expect("more bytes than it can want");
            taken[usize::try_from(deltas).expect("at most 3")] += 1;
        }
        assert!(taken.iter().all(|count| *count > 100), "deltas taken until one was refused: {taken:?}");
    }
}
