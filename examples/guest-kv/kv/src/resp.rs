//! RESP2, the protocol of Redis: requests are parsed in place, replies are appended to a buffer.

use alloc::vec::Vec;

/// Most bytes in one argument.
pub const MAX_BULK: usize = 8 << 20;
/// Most arguments in one request.
pub const MAX_ARGS: usize = 1 << 20;
/// Most bytes in one inline request, its line end not counted.
pub const MAX_INLINE: usize = 64 << 10;
/// Most bytes in one request.
pub const MAX_REQUEST: usize = 64 << 20;
/// Most digits (and sign) in a length line.
const MAX_NUMBER: usize = 20;
/// Arguments for which the argument table is kept allocated between requests.
const ARGS_KEPT: usize = 1024;

/// Memory ran out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfMemory;

/// Why a byte stream is not RESP. The connection cannot go on: where the next request starts is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProtocolError {
    /// The argument count is no number, or out of bounds.
    InvalidMultibulkLength,
    /// The length of an argument is no number, or out of bounds.
    InvalidBulkLength,
    /// An argument does not start with `$`.
    ExpectedDollar,
    /// An argument is not followed by CR LF.
    ExpectedLineEnd,
    /// An inline request without a line end within [`MAX_INLINE`] bytes.
    InlineTooLong,
    /// A request of more than [`MAX_REQUEST`] bytes.
    RequestTooLong,
    /// The table of arguments does not fit in memory.
    OutOfMemory,
}

impl ProtocolError {
    /// The text of the error reply, as Redis words it where it has the same error.
    #[must_use]
    pub fn message(self) -> &'static str {
        match self {
            Self::InvalidMultibulkLength => "ERR Protocol error: invalid multibulk length",
            Self::InvalidBulkLength => "ERR Protocol error: invalid bulk length",
            Self::ExpectedDollar => "ERR Protocol error: expected '$'",
            Self::ExpectedLineEnd => "ERR Protocol error: expected CR LF",
            Self::InlineTooLong => "ERR Protocol error: too big inline request",
            Self::RequestTooLong => "ERR Protocol error: too big request",
            Self::OutOfMemory => "OOM request does not fit in memory",
        }
    }
}

impl From<OutOfMemory> for ProtocolError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// What was found at the start of the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// A whole request of so many bytes; its arguments are in the [`Args`].
    Request(usize),
    /// Not yet a whole request: there is no point in asking again before the buffer holds so many bytes.
    NeedsBytes(usize),
}

/// Where the arguments of a request lie in its buffer. Reused from request to request.
#[derive(Debug, Default)]
pub struct Args {
    spans: Vec<(usize, usize)>,
}

impl Args {
    /// An empty table.
    #[must_use]
    pub const fn new() -> Self {
        Self { spans: Vec::new() }
    }

    /// The number of arguments, the command's name included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether the request was empty (such requests are ignored).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Argument `index` of the request parsed from `buffer`; empty if there is none.
    #[must_use]
    pub fn get<'a>(&self, buffer: &'a [u8], index: usize) -> &'a [u8] {
        self.spans.get(index).and_then(|&(start, end)| buffer.get(start..end)).unwrap_or_default()
    }

    /// Bytes of [`Self::write`] for all arguments, or a few more.
    pub(crate) fn written_length(&self) -> usize {
        let each = |(start, end): &(usize, usize)| end - start + MAX_NUMBER + 5;
        self.spans.iter().map(each).sum::<usize>() + MAX_NUMBER + 3
    }

    /// Appends the first `count` arguments as a request; there is room for it.
    pub(crate) fn write(&self, buffer: &[u8], count: usize, out: &mut Vec<u8>) {
        let count = count.min(self.len());
        let head = |out: &mut Vec<u8>, kind: u8, value: usize| {
            out.push(kind);
            out.extend_from_slice(Decimal::new(i64::try_from(value).unwrap_or(i64::MAX)).as_bytes());
            out.extend_from_slice(b"\r\n");
        };
        head(out, b'*', count);
        for index in 0..count {
            let argument = self.get(buffer, index);
            head(out, b'$', argument.len());
            out.extend_from_slice(argument);
            out.extend_from_slice(b"\r\n");
        }
    }

    fn clear(&mut self) {
        if self.spans.capacity() > ARGS_KEPT {
            self.spans = Vec::new();
        }
        self.spans.clear();
    }

    fn push(&mut self, start: usize, end: usize) -> Result<(), OutOfMemory> {
        self.spans.try_reserve(1).map_err(|_| OutOfMemory)?;
        self.spans.push((start, end));
        Ok(())
    }
}

/// Parses one request at the start of `buffer`.
///
/// # Errors
/// The bytes are not RESP, or beyond the limits of this module.
pub fn parse(buffer: &[u8], args: &mut Args) -> Result<Parsed, ProtocolError> {
    args.clear();
    match buffer.first() {
        None => Ok(Parsed::NeedsBytes(1)),
        Some(b'*') => parse_array(buffer, args),
        Some(_) => parse_inline(buffer, args),
    }
}

fn parse_array(buffer: &[u8], args: &mut Args) -> Result<Parsed, ProtocolError> {
    let Some((count, mut at)) = number_line(buffer, 1, ProtocolError::InvalidMultibulkLength)? else {
        return Ok(Parsed::NeedsBytes(buffer.len() + 1));
    };
    // Redis takes a negative count as an empty request.
    let count = usize::try_from(count).unwrap_or(0);
    if count > MAX_ARGS {
        return Err(ProtocolError::InvalidMultibulkLength);
    }
    for left in (1..=count).rev() {
        match buffer.get(at) {
            // Each argument still to come takes at least "$0\r\n\r\n".
            None => return Ok(Parsed::NeedsBytes(at + 6 * left)),
            Some(b'$') => {}
            Some(_) => return Err(ProtocolError::ExpectedDollar),
        }
        let Some((length, start)) = number_line(buffer, at + 1, ProtocolError::InvalidBulkLength)? else {
            return Ok(Parsed::NeedsBytes(buffer.len() + 1));
        };
        let length = usize::try_from(length).map_err(|_| ProtocolError::InvalidBulkLength)?;
        if length > MAX_BULK {
            return Err(ProtocolError::InvalidBulkLength);
        }
        let end = start + length;
        if end > MAX_REQUEST {
            return Err(ProtocolError::RequestTooLong);
        }
        match buffer.get(end..end + 2) {
            None => return Ok(Parsed::NeedsBytes(end + 2)),
            Some(b"\r\n") => {}
            Some(_) => return Err(ProtocolError::ExpectedLineEnd),
        }
        args.push(start, end)?;
        at = end + 2;
    }
    Ok(Parsed::Request(at))
}

/// The number between `start` and the next CR LF, and the index after it; `None` if the line is not complete.
fn number_line(buffer: &[u8], start: usize, error: ProtocolError) -> Result<Option<(i64, usize)>, ProtocolError> {
    let line = buffer.get(start..).unwrap_or_default();
    let window = line.get(..MAX_NUMBER + 2).unwrap_or(line);
    let Some(length) = window.iter().position(|&byte| byte == b'\r') else {
        return if window.len() > MAX_NUMBER { Err(error) } else { Ok(None) };
    };
    match line.get(length + 1) {
        None => Ok(None),
        Some(b'\n') => {
            let value = line.get(..length).and_then(parse_integer).ok_or(error)?;
            Ok(Some((value, start + length + 2)))
        }
        Some(_) => Err(error),
    }
}

fn parse_inline(buffer: &[u8], args: &mut Args) -> Result<Parsed, ProtocolError> {
    let Some(end) = buffer.iter().take(MAX_INLINE + 1).position(|&byte| byte == b'\n') else {
        return if buffer.len() > MAX_INLINE {
            Err(ProtocolError::InlineTooLong)
        } else {
            Ok(Parsed::NeedsBytes(buffer.len() + 1))
        };
    };
    let mut at = 0;
    while at < end {
        let word = buffer.get(at..end).unwrap_or_default();
        let length = word.iter().position(u8::is_ascii_whitespace).unwrap_or(word.len());
        if length > 0 {
            args.push(at, at + length)?;
        }
        at += length + 1;
    }
    Ok(Parsed::Request(end + 1))
}

/// A decimal number the way Redis takes it: an optional minus, digits, nothing else.
#[must_use]
pub fn parse_integer(text: &[u8]) -> Option<i64> {
    // `from_str` would take a plus sign, which Redis does not.
    if text.first() == Some(&b'+') || text.len() > MAX_NUMBER {
        return None;
    }
    core::str::from_utf8(text).ok()?.parse().ok()
}

/// Replies, to be sent in order. Running out of memory is remembered instead of reported by each call: the connection
/// must then be closed, for its client can no longer tell which reply belongs to which request.
#[derive(Debug, Default)]
pub struct Out {
    bytes: Vec<u8>,
    failed: bool,
}

impl Out {
    /// An empty buffer.
    #[must_use]
    pub const fn new() -> Self {
        Self { bytes: Vec::new(), failed: false }
    }

    /// What was written.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether a reply was lost for want of memory.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// What was written; nothing is left.
    pub fn take(&mut self) -> Vec<u8> {
        self.failed = false;
        core::mem::take(&mut self.bytes)
    }

    /// Forgets what was written; memory above `keep` bytes is given back.
    pub fn clear(&mut self, keep: usize) {
        if self.bytes.capacity() > keep {
            self.bytes = Vec::new();
        }
        self.bytes.clear();
        self.failed = false;
    }

    /// Makes room for `length` bytes.
    ///
    /// # Errors
    /// There is no room.
    pub fn reserve(&mut self, length: usize) -> Result<(), OutOfMemory> {
        self.bytes.try_reserve(length).map_err(|_| OutOfMemory)
    }

    /// Appends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) {
        if self.failed || self.reserve(bytes.len()).is_err() {
            self.failed = true;
        } else {
            self.bytes.extend_from_slice(bytes);
        }
    }

    /// `+text`
    pub fn simple(&mut self, text: &str) {
        self.raw(b"+");
        self.raw(text.as_bytes());
        self.raw(b"\r\n");
    }

    /// `-text`; line ends in it become spaces.
    pub fn error(&mut self, text: &str) {
        self.raw(b"-");
        for part in text.split_inclusive(['\r', '\n']) {
            match part.strip_suffix(['\r', '\n']) {
                Some(line) => {
                    self.raw(line.as_bytes());
                    self.raw(b" ");
                }
                None => self.raw(part.as_bytes()),
            }
        }
        self.raw(b"\r\n");
    }

    /// `:value`
    pub fn integer(&mut self, value: i64) {
        self.number(b':', value);
    }

    /// A count as an integer reply.
    pub fn count(&mut self, value: usize) {
        self.integer(i64::try_from(value).unwrap_or(i64::MAX));
    }

    /// `$length` and the bytes.
    pub fn bulk(&mut self, bytes: &[u8]) {
        self.number(b'$', i64::try_from(bytes.len()).unwrap_or(i64::MAX));
        self.raw(bytes);
        self.raw(b"\r\n");
    }

    /// The reply for a value that is not there.
    pub fn null(&mut self) {
        self.raw(b"$-1\r\n");
    }

    /// The reply for an array that is not there.
    pub fn null_array(&mut self) {
        self.raw(b"*-1\r\n");
    }

    /// The head of an array of `length` replies, which must follow.
    pub fn array(&mut self, length: usize) {
        self.number(b'*', i64::try_from(length).unwrap_or(i64::MAX));
    }

    fn number(&mut self, kind: u8, value: i64) {
        self.raw(&[kind]);
        self.raw(Decimal::new(value).as_bytes());
        self.raw(b"\r\n");
    }
}

/// A number in decimal, without an allocation.
pub(crate) struct Decimal {
    digits: [u8; MAX_NUMBER],
    start: usize,
}

impl Decimal {
    pub(crate) fn new(value: i64) -> Self {
        let mut digits = [b'0'; MAX_NUMBER];
        let mut start = MAX_NUMBER;
        let mut rest = value.unsigned_abs();
        loop {
            start -= 1;
            digits[start] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        if value < 0 {
            start -= 1;
            digits[start] = b'-';
        }
        Self { digits, start }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.digits[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(buffer: &[u8]) -> Result<(Vec<Vec<u8>>, usize), String> {
        let mut args = Args::new();
        match parse(buffer, &mut args) {
            Ok(Parsed::Request(used)) => {
                Ok(((0..args.len()).map(|index| args.get(buffer, index).to_vec()).collect(), used))
            }
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn arrays_and_inline_requests() {
        let (args, used) = words(b"*2\r\n$4\r\nECHO\r\n$2\r\n\r\n\r\nrest").unwrap();
        assert_eq!((args, used), (vec![b"ECHO".to_vec(), b"\r\n".to_vec()], 22));
        let (args, used) = words(b"  SET a  b\r\nnext").unwrap();
        assert_eq!((args.len(), used), (3, 12));
        assert_eq!(words(b"\r\n").unwrap(), (vec![], 2));
        assert_eq!(words(b"*0\r\n").unwrap(), (vec![], 4));
        assert_eq!(words(b"*-1\r\n").unwrap(), (vec![], 5));
    }

    /// Each prefix of a request asks for more bytes, and never for more than the request has.
    #[test]
    fn a_prefix_is_never_a_request() {
        let whole = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$12\r\nhello, world\r\n";
        let mut args = Args::new();
        for length in 0..whole.len() {
            let Ok(Parsed::NeedsBytes(needed)) = parse(&whole[..length], &mut args) else { panic!("at {length}") };
            assert!(needed > length && needed <= whole.len(), "at {length}: {needed}");
        }
        assert_eq!(parse(whole, &mut args), Ok(Parsed::Request(whole.len())));
    }

    #[test]
    fn bad_input_is_an_error() {
        let mut args = Args::new();
        let mut error = |bytes: &[u8]| parse(bytes, &mut args).unwrap_err();
        assert_eq!(error(b"*1048577\r\n"), ProtocolError::InvalidMultibulkLength);
        assert_eq!(error(b"*x\r\n"), ProtocolError::InvalidMultibulkLength);
        assert_eq!(error(b"*111111111111111111111111"), ProtocolError::InvalidMultibulkLength);
        assert_eq!(error(b"*1\r\n$8388609\r\n"), ProtocolError::InvalidBulkLength);
        assert_eq!(error(b"*1\r\n$-1\r\n"), ProtocolError::InvalidBulkLength);
        assert_eq!(error(b"*1\r\n+OK\r\n"), ProtocolError::ExpectedDollar);
        assert_eq!(error(b"*1\r\n$1\r\nabc"), ProtocolError::ExpectedLineEnd);
        assert_eq!(error(&vec![b'a'; MAX_INLINE + 1]), ProtocolError::InlineTooLong);
    }

    #[test]
    fn no_single_byte_change_panics() {
        let whole = b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n";
        let mut args = Args::new();
        for at in 0..whole.len() {
            for byte in 0..=255 {
                let mut bytes = whole.to_vec();
                bytes[at] = byte;
                if let Ok(Parsed::Request(used)) = parse(&bytes, &mut args) {
                    assert!(used <= bytes.len());
                }
            }
        }
    }

    #[test]
    fn replies() {
        let mut out = Out::new();
        out.simple("OK");
        out.error("ERR a\r\nb");
        out.integer(i64::MIN);
        out.bulk(b"x");
        out.null();
        out.array(0);
        assert_eq!(out.bytes(), b"+OK\r\n-ERR a  b\r\n:-9223372036854775808\r\n$1\r\nx\r\n$-1\r\n*0\r\n");
    }

    #[test]
    fn integers() {
        assert_eq!(parse_integer(b"-12"), Some(-12));
        for bad in [&b"+1"[..], b"", b"-", b"1 ", b"9223372036854775808", b"1e3"] {
            assert_eq!(parse_integer(bad), None, "{bad:?}");
        }
    }
}
