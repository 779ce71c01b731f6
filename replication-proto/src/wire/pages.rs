//! The Pages message: runs of consecutive pages in the order sent, each run of zero pages (no bytes), of whole pages, or of patches.

use bytes::{BufMut, Bytes, BytesMut};

use crate::error::{LinkError, Malformed, Misbehaved};
use crate::history::PageHistory;
use crate::ids::PageIndex;
use crate::limits::{MAX_PAGES_PER_MESSAGE, MAX_PATCH_BYTES, PAGE_BYTES, PAGE_INDEX_END};
use crate::wire::codec::{Reader, narrow16, narrow32, wide};
use crate::wire::patch;
use crate::wire::zstd::Decoder;

const RAW: u8 = 0;
const ZSTD: u8 = 1;
const FIXED_BYTES: usize = 16;
const RUN_BYTES: usize = 16;

static ZEROS: [u8; MAX_PAGES_PER_MESSAGE * PAGE_BYTES] = [0; MAX_PAGES_PER_MESSAGE * PAGE_BYTES];

/// How the pages of a run are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RunKind {
    /// As a whole.
    Data,
    /// As a whole, and both sides keep a copy.
    Kept,
    /// All zeros: no bytes.
    Zero,
    /// As patches of the copies that both sides have: of each its length, in 2 bytes, and the patch.
    Patch,
}

impl RunKind {
    fn code(self) -> u32 {
        match self {
            Self::Data => 0,
            Self::Zero => 1,
            Self::Patch => 2,
            Self::Kept => 3,
        }
    }

    fn of(code: u32) -> Result<Self, Malformed> {
        match code {
            0 => Ok(Self::Data),
            1 => Ok(Self::Zero),
            2 => Ok(Self::Patch),
            3 => Ok(Self::Kept),
            _ => Err(Malformed::Value { field: "run kind" }),
        }
    }
}

/// Consecutive pages of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: PageIndex,
    pub(crate) pages: usize,
    pub(crate) kind: RunKind,
}

/// How one message's pages are sent.
#[derive(Debug)]
pub(crate) struct Plan {
    runs: Vec<Run>,
    /// What the runs of patches send, one after the other.
    patches: Bytes,
    /// Bytes of it that each of them has.
    patch_bytes: Vec<usize>,
}

/// A piece of a message's body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Part {
    /// Of the pages' own bytes.
    Pages(core::ops::Range<usize>),
    /// Patches.
    Patches(Bytes),
}

impl Part {
    /// Its bytes, out of the pages' own or of the patches.
    pub(crate) fn of<'a>(&'a self, pages: &'a [u8]) -> &'a [u8] {
        match self {
            Self::Pages(range) => &pages[range.clone()],
            Self::Patches(patches) => patches,
        }
    }
}

/// Splits pages into what fits one message each.
pub(crate) fn messages_of<'a>(
    indexes: &'a [PageIndex],
    bytes: &'a [u8],
) -> impl Iterator<Item = (&'a [PageIndex], &'a [u8])> + use<'a> {
    indexes.chunks(MAX_PAGES_PER_MESSAGE).zip(bytes.chunks(MAX_PAGES_PER_MESSAGE * PAGE_BYTES))
}

impl Plan {
    /// For these pages, `bytes` one after the other. With a history, pages that it has are patched and others enter it.
    pub(crate) fn new(indexes: &[PageIndex], bytes: &[u8], mut history: Option<&mut PageHistory>) -> Self {
        let (mut runs, mut patches, mut patch_bytes): (Vec<Run>, _, Vec<usize>) = (Vec::new(), Vec::new(), Vec::new());
        for (index, page) in indexes.iter().zip(bytes.chunks_exact(PAGE_BYTES)) {
            let before = patches.len();
            let kind = match &mut history {
                _ if is_zero(page) => RunKind::Zero,
                Some(history) => against(history, *index, page, &mut patches),
                None => RunKind::Data,
            };
            let grown = patches.len() - before;
            match runs.last_mut() {
                Some(run) if run.kind == kind && run.first.0 + wide(run.pages) == index.0 => {
                    run.pages += 1;
                    if let (RunKind::Patch, Some(last)) = (kind, patch_bytes.last_mut()) {
                        *last += grown;
                    }
                }
                _ => {
                    runs.push(Run { first: *index, pages: 1, kind });
                    if kind == RunKind::Patch {
                        patch_bytes.push(grown);
                    }
                }
            }
        }
        Self { runs, patches: patches.into(), patch_bytes }
    }

    /// The payload in front of the body.
    pub(crate) fn put_head(&self, out: &mut impl BufMut, compressed: bool) {
        out.put_u8(if compressed { ZSTD } else { RAW });
        out.put_u8(0);
        out.put_u16_le(narrow16(self.runs.len()));
        out.put_u32_le(narrow32(self.runs.iter().map(|run| run.pages).sum()));
        out.put_u32_le(narrow32(whole_pages_of(&self.runs) * PAGE_BYTES + self.patches.len()));
        out.put_bytes(0, 4);
        for run in &self.runs {
            out.put_u64_le(run.first.0);
            out.put_u32_le(narrow32(run.pages));
            out.put_u32_le(run.kind.code());
        }
    }

    /// Bytes that [`Self::put_head`] writes.
    pub(crate) fn head_bytes(&self) -> usize {
        FIXED_BYTES + self.runs.len() * RUN_BYTES
    }

    /// The body, in order; what lies side by side in the pages' bytes is one part.
    pub(crate) fn body(&self) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        let (mut at, mut patches, mut patch_bytes) = (0, self.patches.clone(), self.patch_bytes.iter());
        for run in &self.runs {
            let end = at + run.pages * PAGE_BYTES;
            match (run.kind, parts.last_mut()) {
                (RunKind::Zero, _) => {}
                (RunKind::Data | RunKind::Kept, Some(Part::Pages(range))) if range.end == at => range.end = end,
                (RunKind::Data | RunKind::Kept, _) => parts.push(Part::Pages(at..end)),
                (RunKind::Patch, _) => {
                    let bytes = *patch_bytes.next().expect("a length for each run of patches");
                    parts.push(Part::Patches(patches.split_to(bytes)));
                }
            }
            at = end;
        }
        parts
    }
}

/// How a page is best sent: as a patch, if both sides have a copy and not much changed. Both then hold the new content.
fn against(history: &mut PageHistory, index: PageIndex, page: &[u8], patches: &mut Vec<u8>) -> RunKind {
    if let Some(copy) = history.copy_of(index) {
        let start = patches.len();
        patches.extend_from_slice(&[0; 2]);
        if patch::put(patches, copy, page) {
            let bytes = patches.len() - start - 2;
            patches[start..start + 2].copy_from_slice(&narrow16(bytes).to_le_bytes());
            patch::apply(copy, &patches[start + 2..]).expect("our own patch");
            history.paid(index);
            return RunKind::Patch;
        }
        patches.truncate(start);
    }
    if history.is_worth_keeping(index) {
        history.keep(index, page);
        RunKind::Kept
    } else {
        RunKind::Data
    }
}

/// Almost every page that is not zero says so in its first bytes.
fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(128).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

fn pages_of(runs: &[Run], kind: RunKind) -> usize {
    runs.iter().filter(|run| run.kind == kind).map(|run| run.pages).sum()
}

fn whole_pages_of(runs: &[Run]) -> usize {
    pages_of(runs, RunKind::Data) + pages_of(runs, RunKind::Kept)
}

/// One message's pages, decoded.
#[derive(Debug)]
pub(crate) struct PagesFrame {
    pub(crate) indexes: Vec<PageIndex>,
    pub(crate) bytes: Bytes,
}

/// `decoder` is there if compression was agreed on, `history` if patches were, and in a delta. Page numbers are in 52 bits of address; whether they are
/// memory is the caller's to say.
pub(crate) fn pages(
    payload: &Bytes,
    decoder: Option<&mut Decoder>,
    history: Option<&mut PageHistory>,
) -> Result<PagesFrame, LinkError> {
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
    let patched = pages_of(&runs, RunKind::Patch);
    let least = whole_pages_of(&runs) * PAGE_BYTES + patched * 2;
    if data_bytes < least || data_bytes > least + patched * MAX_PATCH_BYTES {
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
    let indexes = runs.iter().flat_map(|run| (0..wide(run.pages)).map(|n| PageIndex(run.first.0 + n))).collect();
    Ok(PagesFrame { indexes, bytes: whole_pages(&runs, page_count, data, history)? })
}

fn read_runs(reader: &mut Reader<'_>, run_count: usize, page_count: usize) -> Result<Vec<Run>, Malformed> {
    let mut runs = Vec::with_capacity(run_count);
    let mut left = page_count;
    for _ in 0..run_count {
        let (first, pages, kind) = (reader.u64()?, reader.u32()?, RunKind::of(reader.u32()?)?);
        let in_range = first.checked_add(u64::from(pages)).is_some_and(|end| end <= PAGE_INDEX_END);
        if !in_range {
            return Err(Malformed::Value { field: "page index" });
        }
        let pages = pages as usize;
        left = left.checked_sub(pages).filter(|_| pages > 0).ok_or(Malformed::Count { field: "pages" })?;
        runs.push(Run { first: PageIndex(first), pages, kind });
    }
    if left == 0 { Ok(runs) } else { Err(Malformed::Count { field: "pages" }) }
}

/// The pages out of the body; copies only if some are not in it as they are.
fn whole_pages(
    runs: &[Run],
    page_count: usize,
    data: Bytes,
    mut history: Option<&mut PageHistory>,
) -> Result<Bytes, LinkError> {
    let only = |kinds: &[RunKind]| runs.iter().all(|run| kinds.contains(&run.kind));
    if only(&[RunKind::Zero]) {
        return Ok(Bytes::from_static(&ZEROS[..page_count * PAGE_BYTES]));
    }
    if only(&[RunKind::Data, RunKind::Kept]) {
        let mut rest = &data[..];
        for run in runs {
            rest = whole(run, rest, history.as_deref_mut())?.1;
        }
        return Ok(data);
    }
    let mut out = BytesMut::with_capacity(page_count * PAGE_BYTES);
    let mut rest = &data[..];
    for run in runs {
        match run.kind {
            RunKind::Zero => out.put_bytes(0, run.pages * PAGE_BYTES),
            RunKind::Data | RunKind::Kept => {
                let (pages, behind) = whole(run, rest, history.as_deref_mut())?;
                out.put_slice(pages);
                rest = behind;
            }
            RunKind::Patch => {
                let history = history.as_deref_mut().ok_or(Misbehaved::NotNegotiated)?;
                rest = patched(history, run, rest, &mut out)?;
            }
        }
    }
    if rest.is_empty() { Ok(out.freeze()) } else { Err(Malformed::Count { field: "page bytes" }.into()) }
}

/// The run's pages, which are in front of `data` and are kept if the run says so, and what is behind them.
fn whole<'a>(run: &Run, data: &'a [u8], history: Option<&mut PageHistory>) -> Result<(&'a [u8], &'a [u8]), LinkError> {
    let bytes = run.pages * PAGE_BYTES;
    let (pages, rest) = data.split_at_checked(bytes).ok_or(Malformed::Count { field: "page bytes" })?;
    if run.kind == RunKind::Kept {
        let history = history.ok_or(Misbehaved::NotNegotiated)?;
        let indexes = (run.first.0..).map(PageIndex);
        indexes.zip(pages.chunks_exact(PAGE_BYTES)).for_each(|(index, page)| history.keep(index, page));
    }
    Ok((pages, rest))
}

/// Patches the run's pages and appends them to `out`. Returns what is behind the patches.
fn patched<'a>(
    history: &mut PageHistory,
    run: &Run,
    mut data: &'a [u8],
    out: &mut BytesMut,
) -> Result<&'a [u8], LinkError> {
    for page in (run.first.0..).map(PageIndex).take(run.pages) {
        let mut reader = Reader::new(data);
        let length = usize::from(reader.u16()?);
        let rest = reader.rest();
        if length > MAX_PATCH_BYTES || length > rest.len() {
            return Err(Malformed::Count { field: "page bytes" }.into());
        }
        let (patch, rest) = rest.split_at(length);
        let copy = history.copy_of(page).ok_or(Misbehaved::PatchOfNothing { page })?;
        patch::apply(copy, patch)?;
        out.put_slice(copy);
        data = rest;
    }
    Ok(data)
}
