//! RESP, the Redis protocol: requests in, replies out.

/// Most arguments of a request.
const MAX_ARGUMENTS: usize = 16_384;
/// Longest inline request in bytes.
const MAX_INLINE: usize = 4096;

/// What the beginning of a buffer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Parsed<'a> {
    /// The beginning of a request.
    Incomplete,
    /// A request, possibly an empty one, and how many bytes it took.
    Request(Vec<&'a [u8]>, usize),
    /// Something else: what to tell the peer before closing.
    Malformed(&'static str),
}

/// Reads the first request of a buffer.
pub(super) fn parse(buffer: &[u8]) -> Parsed<'_> {
    match buffer.first() {
        None => Parsed::Incomplete,
        Some(b'*') => parse_array(buffer),
        Some(_) => parse_inline(buffer),
    }
}

/// The line that begins at `from`, without its CR LF, and where the next begins.
fn line(buffer: &[u8], from: usize) -> Option<(&[u8], usize)> {
    let rest = buffer.get(from..)?;
    let end = rest.iter().position(|byte| *byte == b'\n')?;
    let text = rest.get(..end)?;
    Some((text.strip_suffix(b"\r").unwrap_or(text), from + end + 1))
}

fn parse_inline(buffer: &[u8]) -> Parsed<'_> {
    match line(buffer, 0) {
        None if buffer.len() > MAX_INLINE => Parsed::Malformed("ERR Protocol error: too big inline request"),
        None => Parsed::Incomplete,
        Some((text, used)) => {
            Parsed::Request(text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).collect(), used)
        }
    }
}

fn parse_array(buffer: &[u8]) -> Parsed<'_> {
    const BAD_COUNT: Parsed<'_> = Parsed::Malformed("ERR Protocol error: invalid multibulk length");
    const BAD_LENGTH: Parsed<'_> = Parsed::Malformed("ERR Protocol error: invalid bulk length");
    let Some((text, mut at)) = line(buffer, 0) else {
        return if buffer.len() > 32 { BAD_COUNT } else { Parsed::Incomplete };
    };
    let count = match text.get(1..).and_then(integer) {
        Some(count) if count <= 0 => return Parsed::Request(Vec::new(), at),
        Some(count) => usize::try_from(count).ok().filter(|count| *count <= MAX_ARGUMENTS),
        None => None,
    };
    let Some(count) = count else { return BAD_COUNT };
    let mut arguments = Vec::with_capacity(count.min(64));
    for _ in 0..count {
        let Some((text, start)) = line(buffer, at) else {
            let waiting = buffer.get(at..).unwrap_or_default();
            let plausible = waiting.first().is_none_or(|byte| *byte == b'$') && waiting.len() <= 32;
            return if plausible { Parsed::Incomplete } else { BAD_LENGTH };
        };
        if text.first() != Some(&b'$') {
            return Parsed::Malformed("ERR Protocol error: expected '$'");
        }
        let length = text.get(1..).and_then(integer).and_then(|length| usize::try_from(length).ok());
        // A request has to fit into the connection's ring; whether a value is too long for the store is the command's matter.
        let Some(length) = length.filter(|length| *length <= super::layout::RING as usize) else { return BAD_LENGTH };
        match (buffer.get(start..start + length), buffer.get(start + length..start + length + 2)) {
            (Some(bytes), Some(b"\r\n")) => arguments.push(bytes),
            (_, Some(_)) => return Parsed::Malformed("ERR Protocol error: expected CR LF"),
            (_, None) => return Parsed::Incomplete,
        }
        at = start + length + 2;
    }
    Parsed::Request(arguments, at)
}

/// A decimal number as Redis takes it: no spaces, no plus, nothing after it.
pub(super) fn integer(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let plain = !digits.is_empty() && digits.len() <= 19 && digits.iter().all(u8::is_ascii_digit);
    if plain { std::str::from_utf8(text).ok()?.parse().ok() } else { None }
}

/// A reply being written.
#[derive(Debug, Default)]
pub(super) struct Reply {
    /// The bytes so far.
    pub(super) bytes: Vec<u8>,
    /// More was written than a reply may have.
    pub(super) overflowed: bool,
}

impl Reply {
    fn raw(&mut self, bytes: &[u8]) {
        if self.bytes.len() + bytes.len() > super::layout::RING as usize {
            self.overflowed = true;
        } else {
            self.bytes.extend_from_slice(bytes);
        }
    }

    /// `+text`
    pub(super) fn simple(&mut self, text: &str) {
        self.raw(format!("+{text}\r\n").as_bytes());
    }

    /// `-text`; whatever could end the line becomes a space.
    pub(super) fn error(&mut self, text: &str) {
        let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        self.raw(format!("-{text}\r\n").as_bytes());
    }

    pub(super) fn integer(&mut self, value: i64) {
        self.raw(format!(":{value}\r\n").as_bytes());
    }

    pub(super) fn count(&mut self, value: u64) {
        self.raw(format!(":{value}\r\n").as_bytes());
    }

    pub(super) fn bulk(&mut self, bytes: &[u8]) {
        self.raw(format!("${}\r\n", bytes.len()).as_bytes());
        self.raw(bytes);
        self.raw(b"\r\n");
    }

    pub(super) fn null(&mut self) {
        self.raw(b"$-1\r\n");
    }

    pub(super) fn array(&mut self, length: usize) {
        self.raw(format!("*{length}\r\n").as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(buffer: &[u8]) -> Vec<String> {
        match parse(buffer) {
            Parsed::Request(words, used) => {
                assert_eq!(used, buffer.len());
                words.iter().map(|w| String::from_utf8_lossy(w).into_owned()).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn arrays_and_inline_requests() {
        assert_eq!(words(b"*2\r\n$3\r\nGET\r\n$2\r\na\n\r\n"), ["GET", "a\n"]);
        assert_eq!(words(b"*1\r\n$0\r\n\r\n"), [""]);
        assert_eq!(words(b"  set  a b \r\n"), ["set", "a", "b"]);
        assert_eq!(words(b"ping\n"), ["ping"]);
        for empty in [&b"\r\n"[..], b"*0\r\n", b"*-1\r\n"] {
            assert!(words(empty).is_empty());
        }
    }

    #[test]
    fn a_prefix_is_never_a_request() {
        let request = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$11\r\nhello\r\nall \r\n";
        for length in 0..request.len() {
            assert_eq!(parse(&request[..length]), Parsed::Incomplete, "{length}");
        }
        assert!(matches!(parse(request), Parsed::Request(_, used) if used == request.len()));
    }

    #[test]
    fn bad_requests_are_named_and_none_panics() {
        for bad in [
            &b"*x\r\n"[..],
            b"*99999999999999999999\r\n",
            b"*16385\r\n",
            b"*1\r\n:1\r\n",
            b"*1\r\n$-1\r\n",
            b"*1\r\n$9999999\r\n",
            b"*1\r\n$1\r\nabc",
            b"*1\r\n$1111111111111111111111111111111111111",
        ] {
            assert!(matches!(parse(bad), Parsed::Malformed(_)), "{:?}", String::from_utf8_lossy(bad));
        }
        assert!(matches!(parse(&[b'x'; 5000]), Parsed::Malformed(_)));
        let request = b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n";
        for at in 0..request.len() {
            for byte in 0..=255 {
                let mut changed = request.to_vec();
                changed[at] = byte;
                if let Parsed::Request(_, used) = parse(&changed) {
                    assert!(used <= changed.len());
                }
            }
        }
    }

    #[test]
    fn integers() {
        assert_eq!(integer(b"-9223372036854775808"), Some(i64::MIN));
        for bad in [&b""[..], b"-", b"+1", b" 1", b"1x", b"9223372036854775808"] {
            assert_eq!(integer(bad), None);
        }
    }
}
