//! Reading fields out of a payload, and lengths that fit their fields. What is left over is an error: silence about unknown bytes is how
//! two versions drift apart.

use crate::error::Malformed;

/// A length or count of this host as a number of the wire.
pub(crate) const fn wide(n: usize) -> u64 {
    n as u64
}

/// A length or count that a limit keeps within 32 bits.
pub(crate) fn narrow32(n: usize) -> u32 {
    u32::try_from(n).expect("limits keep lengths within 32 bits")
}

/// A length or count that a limit keeps within 16 bits.
pub(crate) fn narrow16(n: usize) -> u16 {
    u16::try_from(n).expect("limits keep this length within 16 bits")
}

pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(payload: &'a [u8]) -> Self {
        Self { rest: payload }
    }

    pub(crate) fn bytes(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or(Malformed::TooShort)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Malformed::TooShort)?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn u128(&mut self) -> Result<u128, Malformed> {
        self.array().map(u128::from_le_bytes)
    }

    /// Bytes that must be 0, so that a later version can give them a meaning.
    pub(crate) fn zeros(&mut self, n: usize) -> Result<(), Malformed> {
        if self.bytes(n)?.iter().all(|&byte| byte == 0) { Ok(()) } else { Err(Malformed::Reserved) }
    }

    /// Text of `n` bytes without control characters.
    pub(crate) fn text(&mut self, n: usize, max: usize, field: &'static str) -> Result<&'a str, Malformed> {
        if n > max {
            return Err(Malformed::Count { field });
        }
        let text = core::str::from_utf8(self.bytes(n)?).map_err(|_| Malformed::Value { field })?;
        if text.chars().any(char::is_control) { Err(Malformed::Value { field }) } else { Ok(text) }
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn end(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed::Leftover) }
    }
}
