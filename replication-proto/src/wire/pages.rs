//! The Pages message: runs of consecutive pages, each run either zero pages (no bytes) or pages with bytes, in the order sent.

use bytes::{BufMut, Bytes, BytesMut};

use crate::error::{LinkError, Malformed, Misbehaved};
use crate::ids::PageIndex;
use crate::limits::{MAX_PAGES_PER_MESSAGE, PAGE_BYTES, PAGE_INDEX_END};
use crate::wire::codec::{Reader, narrow16, narrow32};
use crate::wire::zstd::Decoder;

const RAW: u8 = 0;
const ZSTD: u8 = 1;
const FIXED_BYTES: usize = 16;
const RUN_BYTES: usize = 16;
const RUN_DATA: u32 = 0;
const RUN_ZERO: u32 = 1;

static ZEROS: [u8; MAX_PAGES_PER_MESSAGE * PAGE_BYTES] = [0; MAX_PAGES_PER_MESSAGE * PAGE_BYTES];

/// Consecutive pages of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: PageIndex,
    pub(crate) pages: usize,
    pub(crate) zero: bool,
}

/// The runs of one message's pages. `bytes` holds the pages one after the other.
pub(crate) fn runs(indexes: &[PageIndex], bytes: &[u8]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (index, page) in indexes.iter().zip(bytes.chunks_exact(PAGE_BYTES)) {
        let zero = is_zero(page);
        match runs.last_mut() {
            Some(run) if run.zero == zero && run.first.0 + run.pages as u64 == index.0 => run.pages += 1,
            _ => runs.push(Run { first: *index, pages: 1, zero }),
        }
    }
    runs
}

/// Almost every page that is not zero says so in its first bytes.
fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(128).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

/// The payload in front of the pages' bytes.
pub(crate) fn put_runs(out: &mut impl BufMut, runs: &[Run], compressed: bool) {
    let pages = runs.iter().map(|run| run.pages).sum();
    let data = runs.iter().filter(|run| !run.zero).map(|run| run.pages).sum::<usize>() * PAGE_BYTES;
    out.put_u8(if compressed { ZSTD } else { RAW });
    out.put_u8(0);
    out.put_u16_le(narrow16(runs.len()));
    out.put_u32_le(narrow32(pages));
    out.put_u32_le(narrow32(data));
    out.put_bytes(0, 4);
    for run in runs {
        out.put_u64_le(run.first.0);
        out.put_u32_le(narrow32(run.pages));
        out.put_u32_le(if run.zero { RUN_ZERO } else { RUN_DATA });
    }
}

/// Bytes that [`put_runs`] writes.
pub(crate) fn runs_bytes(runs: &[Run]) -> usize {
    FIXED_BYTES + runs.len() * RUN_BYTES
}

/// Where in the pages' bytes the runs with bytes lie; what lies side by side is one range.
pub(crate) fn data_ranges(runs: &[Run]) -> Vec<core::ops::Range<usize>> {
    let mut ranges: Vec<core::ops::Range<usize>> = Vec::new();
    let mut at = 0;
    for run in runs {
        let end = at + run.pages * PAGE_BYTES;
        match ranges.last_mut() {
            _ if run.zero => {}
            Some(range) if range.end == at => range.end = end,
            _ => ranges.push(at..end),
        }
        at = end;
    }
    ranges
}

/// One message's pages, decoded.
#[derive(Debug)]
pub(crate) struct PagesFrame {
    pub(crate) indexes: Vec<PageIndex>,
    pub(crate) bytes: Bytes,
}

/// `decoder` is there if compression was agreed on. Page numbers are in 52 bits of address; whether they are memory is the caller's to say.
pub(crate) fn pages(payload: &Bytes, decoder: Option<&mut Decoder>) -> Result<PagesFrame, LinkError> {
    let mut reader = Reader::new(payload);
    let encoding = reader.u8()?;
    reader.zeros(1)?;
    let run_count = usize::from(reader.u16()?);
    let page_count = reader.u32()? as usize;
    let data_bytes = reader.u32()? as usize;
    reader.zeros(4)?;
    if page_count == 0 || page_count > MAX_PAGES_PER_MESSAGE || run_count == 0 || run_count > page_count {
        return Err(Malformed::Count { field: "pages" }.into());
    }
    let runs = read_runs(&mut reader, run_count, page_count)?;
    let data_pages: usize = runs.iter().filter(|run| !run.zero).map(|run| run.pages).sum();
    if data_bytes != data_pages * PAGE_BYTES {
        return Err(Malformed::Count { field: "page bytes" }.into());
    }
    let body = reader.rest();
    let data = match encoding {
        RAW if body.len() == data_bytes => payload.slice_ref(body),
        RAW => return Err(Malformed::Count { field: "page bytes" }.into()),
        ZSTD if data_bytes == 0 => return Err(Malformed::Count { field: "page bytes" }.into()),
        ZSTD => Bytes::from(decoder.ok_or(Misbehaved::NotNegotiated)?.decode(body, data_bytes)?),
        _ => return Err(Malformed::Value { field: "page encoding" }.into()),
    };
    let indexes = runs.iter().flat_map(|run| (0..run.pages as u64).map(|n| PageIndex(run.first.0 + n))).collect();
    Ok(PagesFrame { indexes, bytes: with_zeros(&runs, page_count, data) })
}

fn read_runs(reader: &mut Reader<'_>, run_count: usize, page_count: usize) -> Result<Vec<Run>, Malformed> {
    let mut runs = Vec::with_capacity(run_count);
    let mut left = page_count;
    for _ in 0..run_count {
        let (first, pages, kind) = (reader.u64()?, reader.u32()?, reader.u32()?);
        let zero = match kind {
            RUN_DATA => false,
            RUN_ZERO => true,
            _ => return Err(Malformed::Value { field: "run kind" }),
        };
        let in_range = first.checked_add(u64::from(pages)).is_some_and(|end| end <= PAGE_INDEX_END);
        if !in_range {
            return Err(Malformed::Value { field: "page index" });
        }
        let pages = pages as usize;
        left = left.checked_sub(pages).filter(|_| pages > 0).ok_or(Malformed::Count { field: "pages" })?;
        runs.push(Run { first: PageIndex(first), pages, zero });
    }
    if left == 0 { Ok(runs) } else { Err(Malformed::Count { field: "pages" }) }
}

/// Puts the zero pages back between those that have bytes; copies only if there are both.
fn with_zeros(runs: &[Run], page_count: usize, data: Bytes) -> Bytes {
    if data.len() == page_count * PAGE_BYTES {
        return data;
    }
    if data.is_empty() {
        return Bytes::from_static(&ZEROS[..page_count * PAGE_BYTES]);
    }
    let mut out = BytesMut::with_capacity(page_count * PAGE_BYTES);
    let mut rest = &data[..];
    for run in runs {
        let bytes = run.pages * PAGE_BYTES;
        if run.zero {
            out.put_bytes(0, bytes);
        } else {
            let (taken, left) = rest.split_at(bytes);
            out.put_slice(taken);
            rest = left;
        }
    }
    out.freeze()
}
