//! Names of things on the wire and in the arbiter's record. Plain values: each has one encoding for machines (a number) and one for people.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

/// A text is not the name that it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not 32 hexadecimal digits in the groups 8-4-4-4-12.
    #[error("not a UUID (expected a form like 6f3c0000-1111-4222-8333-444455556666)")]
    NotUuid,
    /// Not a decimal number that fits 64 bits.
    #[error("not a decimal number of at most 64 bits")]
    NotNumber,
    /// A node name is empty, too long, or holds another character than `a-z`, `0-9` and `-`.
    #[error("not a node name (1 to {} characters out of a-z, 0-9 and '-')", NodeName::MAX_BYTES)]
    NotNodeName,
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                uuid::Uuid::from_u128(self.0).hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                // Only the hyphenated form: what was written down is found again by a plain text search.
                if text.len() != uuid::fmt::Hyphenated::LENGTH {
                    return Err(IdError::NotUuid);
                }
                uuid::Uuid::try_parse(text).map(|id| Self(id.as_u128())).map_err(|_| IdError::NotUuid)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }
    };
}

uuid_id! {
    /// One protected VM: the same on both hosts, for ever. People read and write it as a hyphenated UUID.
    VmId
}

uuid_id! {
    /// Random identity of one process's life: a restarted process is another one. Shown as a hyphenated UUID.
    Incarnation
}

macro_rules! counter_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                text.parse().map(Self).map_err(|_| IdError::NotNumber)
            }
        }

        impl $name {
            /// The one after this, or `None` when the 64 bits are used up: numbers are never used twice.
            pub const fn checked_next(self) -> Option<Self> {
                match self.0.checked_add(1) {
                    Some(next) => Some(Self(next)),
                    None => None,
                }
            }

            /// The one after this.
            ///
            /// # Panics
            /// When the 64 bits are used up; use [`Self::checked_next`] on a number that a peer or a file chose.
            pub const fn next(self) -> Self {
                self.checked_next().expect("64-bit counter used up")
            }
        }
    };
}

counter_id! {
    /// Number of the right to run; grows with every takeover. 0 (the default) means that nobody has run yet.
    Generation
}

counter_id! {
    /// Number of the interval between two checkpoints, from 1. 0 (the default) means none yet.
    Epoch
}

/// A committed state of the VM. Epoch numbers are never used twice within a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Point {
    /// Under which the guest ran.
    pub generation: Generation,
    /// The epoch at whose end it was.
    pub epoch: Epoch,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {} of generation {}", self.epoch, self.generation)
    }
}

impl Epoch {
    /// Every epoch on the wire is below this. No pair comes near it; a peer that names a later one is refused, so that whoever activates what
    /// the peer sent never runs out of numbers.
    pub const END: Self = Self(1 << 62);
}

/// Number of a page of guest memory: guest-physical address / 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Name of one of the two hosts, as in the configuration: 1 to 32 characters out of `a-z`, `0-9` and `-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(String);

impl NodeName {
    /// Longest name, in bytes (all of them ASCII).
    pub const MAX_BYTES: usize = 32;

    /// Checks `name` and takes it.
    ///
    /// # Errors
    /// [`IdError::NotNodeName`] when it is empty, too long or holds another character than those allowed.
    pub fn new(name: impl Into<String>) -> Result<Self, IdError> {
        let name = name.into();
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if name.is_empty() || name.len() > Self::MAX_BYTES || !name.bytes().all(allowed) {
            return Err(IdError::NotNodeName);
        }
        Ok(Self(name))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for NodeName {
    type Err = IdError;

    fn from_str(name: &str) -> Result<Self, IdError> {
        Self::new(name)
    }
}

impl TryFrom<String> for NodeName {
    type Error = IdError;

    fn try_from(name: String) -> Result<Self, IdError> {
        Self::new(name)
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> Self {
        name.0
    }
}

/// Who speaks: which VM, from which host, with which right to run, in which process life.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// The VM that both sides protect.
    pub vm: VmId,
    /// The speaker's host.
    pub node: NodeName,
    /// The highest generation that the speaker knows; of a primary, the one that it runs under.
    pub generation: Generation,
    /// The speaker's process life.
    pub incarnation: Incarnation,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_read_what_they_write_and_nothing_else() {
        let id = VmId(0x6f3c_0000_1111_4222_8333_4444_5555_6666);
        assert_eq!(id.to_string(), "6f3c0000-1111-4222-8333-444455556666");
        assert_eq!(id.to_string().parse(), Ok(id));
        for wrong in ["", "6f3c", "6f3c00001111422283334444555566667777", "6f3c0000-1111-4222-8333-44445555666g"] {
            assert_eq!(wrong.parse::<VmId>(), Err(IdError::NotUuid), "{wrong}");
        }
    }

    #[test]
    fn node_names_are_short_plain_words() {
        assert_eq!(NodeName::new("host-a1").map(String::from), Ok("host-a1".to_owned()));
        for wrong in ["", "A", "a b", "a\n", "../a", "ä", &"a".repeat(NodeName::MAX_BYTES + 1)] {
            assert_eq!(NodeName::new(wrong), Err(IdError::NotNodeName), "{wrong:?}");
        }
    }

    #[test]
    fn counters_end_instead_of_wrapping() {
        assert_eq!(Generation::default().next(), Generation(1));
        assert_eq!(Epoch(u64::MAX).checked_next(), None);
        assert_eq!("-1".parse::<Epoch>(), Err(IdError::NotNumber));
    }
}
