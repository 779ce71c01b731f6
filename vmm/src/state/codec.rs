//! The byte codec of saved state: little-endian, fixed order, nothing optional, every length checked before it is used.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::machine::RestoreError;
use crate::section::{Section, SectionKind};

/// What is wrong with some bytes that should be a saved state.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) String);

impl Malformed {
    /// From a reason for people.
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }

    /// As the error of the section that held the bytes.
    pub(crate) fn of(self, kind: SectionKind) -> RestoreError {
        RestoreError::Malformed { kind, reason: self.0 }
    }
}

/// A saved type: plain data apart from the runtime type, with the version in its name.
pub(crate) trait Saved: Sized {
    /// Version of the encoding.
    const VERSION: u16;
    /// Appends the encoding.
    fn encode(&self, out: &mut Encoder);
    /// Reads the encoding. Checks form; whether the values suit a machine is checked where they are put in.
    fn decode(input: &mut Decoder<'_>) -> Result<Self, Malformed>;

    /// Wraps the encoding into a section.
    fn to_section(&self, kind: SectionKind) -> Section {
        let mut out = Encoder::default();
        self.encode(&mut out);
        Section { kind, version: Self::VERSION, bytes: out.0 }
    }

    /// Opens a section: version, form and exact length.
    fn from_section(section: &Section) -> Result<Self, RestoreError> {
        let kind = section.kind;
        if section.version != Self::VERSION {
            return Err(RestoreError::Version { kind, got: section.version, reads: Self::VERSION });
        }
        let mut input = Decoder::new(&section.bytes);
        let saved = Self::decode(&mut input).map_err(|e| e.of(kind))?;
        if !input.0.is_empty() {
            return Err(Malformed::new(format!("{} bytes too many", input.0.len())).of(kind));
        }
        Ok(saved)
    }
}

/// Collects encoded bytes.
#[derive(Default)]
pub(crate) struct Encoder(Vec<u8>);

impl Encoder {
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
    pub(crate) fn u8(&mut self, v: u8) {
        self.0.push(v);
    }
    pub(crate) fn u16(&mut self, v: u16) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    pub(crate) fn u32(&mut self, v: u32) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    pub(crate) fn u64(&mut self, v: u64) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }
    pub(crate) fn bytes(&mut self, v: &[u8]) {
        self.0.extend_from_slice(v);
    }
    /// A structure of the kernel's x86 ABI, whose layout is frozen and little-endian.
    pub(crate) fn abi<T: IntoBytes + Immutable>(&mut self, v: &T) {
        self.0.extend_from_slice(v.as_bytes());
    }
}

/// Hands out encoded bytes and never more than there are.
pub(crate) struct Decoder<'a>(&'a [u8]);

impl<'a> Decoder<'a> {
    /// Begins at the first of `bytes`.
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn bytes(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self
            .0
            .split_at_checked(n)
            .ok_or_else(|| Malformed(format!("ends {} bytes too early", n.saturating_sub(self.0.len()))))?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N)?);
        Ok(out)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(u8::from_le_bytes(self.array()?))
    }
    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    pub(crate) fn flag(&mut self) -> Result<bool, Malformed> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Malformed(format!("{other} is not a yes or a no"))),
        }
    }
    pub(crate) fn abi<T: FromBytes>(&mut self) -> Result<T, Malformed> {
        let bytes = self.bytes(size_of::<T>())?;
        T::read_from_bytes(bytes).map_err(|_| Malformed::new("wrong size of a kernel structure"))
    }
}
