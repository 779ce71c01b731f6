//! What can go wrong on a connection, by whose fault it is. After any of these the connection is over and stays over; what was committed
//! stays committed.

use crate::ids::{Epoch, Generation, PageIndex};
use crate::message::{Difference, Refuse, RefuseCode};

/// Why a connection failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Bytes that are no message, whoever spoilt them.
    #[error("malformed: {0}")]
    Malformed(#[from] Malformed),
    /// Messages that break the protocol.
    #[error("peer misbehaved: {0}")]
    PeerMisbehaved(#[from] Misbehaved),
    /// The two sides cannot work together as they are.
    #[error("{0}")]
    Incompatible(Incompatible),
    /// One side's right to run is over.
    #[error("stale generation: ours is {ours}, the peer's is {theirs}")]
    StaleGeneration {
        /// The highest that this side knows.
        ours: Generation,
        /// The peer's.
        theirs: Generation,
    },
    /// This side's own code used the connection wrongly.
    #[error("misuse of the connection by this side: {0}")]
    ApiMisuse(#[from] ApiMisuse),
}

impl LinkError {
    /// Stable word for metrics, `class` or `class.detail`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed(malformed) => malformed.code(),
            Self::PeerMisbehaved(misbehaved) => misbehaved.code(),
            Self::Incompatible(incompatible) => incompatible.metric_code(),
            Self::StaleGeneration { .. } => "stale_generation",
            Self::ApiMisuse(_) => "api_misuse",
        }
    }

    /// What the peer is told.
    pub(crate) fn refusal(&self) -> Refuse {
        let (code, differences) = match self {
            Self::Malformed(_) => (RefuseCode::Malformed, Vec::new()),
            Self::PeerMisbehaved(Misbehaved::EpochTooLarge { .. }) => (RefuseCode::Overload, Vec::new()),
            Self::PeerMisbehaved(_) => (RefuseCode::Misbehaved, Vec::new()),
            Self::Incompatible(incompatible) => (incompatible.code, incompatible.differences.clone()),
            Self::StaleGeneration { .. } => (RefuseCode::StaleGeneration, Vec::new()),
            Self::ApiMisuse(_) => (RefuseCode::Internal, Vec::new()),
        };
        Refuse::new(code, &self.to_string(), differences)
    }
}

macro_rules! coded {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident $({ $($(#[$fdoc:meta])* $field:ident: $type:ty),* })? = $code:literal $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
        pub enum $name {
            $($(#[$vdoc])* #[error($text)] $variant $({ $($(#[$fdoc])* $field: $type),* })?,)*
        }

        impl $name {
            /// Stable word for metrics.
            pub fn code(&self) -> &'static str {
                match self {
                    $(Self::$variant { .. } => $code,)*
                }
            }
        }
    };
}

coded! {
    /// Bytes that are no message.
    Malformed {
        /// The frame does not start with the magic.
        Magic = "malformed.magic" "no frame starts here (wrong magic)",
        /// The header's checksum is wrong.
        HeaderChecksum = "malformed.header_checksum" "checksum of the header is wrong",
        /// A field that must be 0 is not.
        Reserved = "malformed.reserved" "a reserved field or flag is set",
        /// No such message.
        MessageType { /// As sent.
            number: u8 } = "malformed.message_type" "unknown message type {number}",
        /// The payload's length is not one that this message can have.
        Length { /// As announced, in bytes.
            bytes: u32 } = "malformed.length" "a message of this type cannot have {bytes} bytes",
        /// The payload's checksum is wrong.
        PayloadChecksum = "malformed.payload_checksum" "checksum of the payload is wrong",
        /// The stream ended within a frame.
        Truncated = "malformed.truncated" "the stream ended within a frame",
        /// The payload ends before its last field.
        TooShort = "malformed.too_short" "a payload ends before its last field",
        /// The payload goes on after its last field.
        Leftover = "malformed.leftover" "a payload goes on after its last field",
        /// A field has a value that it cannot have.
        Value { /// Which field.
            field: &'static str } = "malformed.value" "impossible value of {field}",
        /// A count is 0 or over its limit, or two counts contradict each other.
        Count { /// Which count.
            field: &'static str } = "malformed.count" "impossible number of {field}",
        /// Compressed bytes are not exactly one plain zstd frame of the announced size.
        Zstd { /// What is wrong with them.
            why: &'static str } = "malformed.zstd" "compressed data refused: {why}",
    }
}

coded! {
    /// Messages that break the protocol.
    Misbehaved {
        /// A message that does not belong here.
        Unexpected { /// What came.
            message: &'static str, /// What the connection waited for.
            waiting_for: &'static str } = "misbehaved.unexpected" "{message} came, waiting for {waiting_for}",
        /// A frame is missing, repeated or out of order.
        Sequence { /// The number that was due.
            expected: u64, /// The number that came.
            found: u64 } = "misbehaved.sequence" "frame {found} came, frame {expected} was due",
        /// A frame is of another VM than the hello.
        OtherVm = "misbehaved.other_vm" "a frame is of another VM",
        /// A frame is of another incarnation than the hello.
        OtherIncarnation = "misbehaved.other_incarnation" "a frame is of another incarnation",
        /// The generation rose within a connection, which needs a new one.
        GenerationChanged { /// Of the connection.
            expected: Generation, /// Of the frame.
            found: Generation } = "misbehaved.generation_changed" "generation went from {expected} to {found} within a connection",
        /// A hello or checkpoint of generation 0.
        NoGeneration = "misbehaved.no_generation" "generation 0 cannot send checkpoints",
        /// The answer to the hello chose what was not offered.
        NotOffered = "misbehaved.not_offered" "the peer accepted a version or feature that was not offered",
        /// The message's epoch is not the one that is due.
        Epoch { /// Due.
            expected: Epoch, /// Came.
            found: Epoch } = "misbehaved.epoch" "epoch {found} came, epoch {expected} was due",
        /// An epoch where none belongs, or one of 2^62 or later.
        BadEpoch { /// Came.
            found: Epoch } = "misbehaved.bad_epoch" "epoch {found} cannot be here",
        /// The first checkpoint of a connection is no base, or a later one is.
        Kind = "misbehaved.kind" "the first checkpoint of a connection is the base, and only the first",
        /// Compressed data or a patch without that feature.
        NotNegotiated = "misbehaved.not_negotiated" "compressed data or patches without having agreed on it",
        /// A patch of a page of which no copy went over the connection, or in a base.
        PatchOfNothing { /// Which.
            page: PageIndex } = "misbehaved.patch_of_nothing" "a patch of page {page}, which did not come before",
        /// A page that is no memory of the guest.
        PageOutside { /// Which.
            page: PageIndex } = "misbehaved.page_outside" "page {page} is not memory of the guest",
        /// A page twice in one delta.
        PageTwice { /// Which.
            page: PageIndex } = "misbehaved.page_twice" "page {page} came twice in one delta",
        /// A change that is not in a disk.
        DiskOutside { /// Which disk.
            disk: u8, /// Where, in bytes.
            offset: u64 } = "misbehaved.disk_outside" "a change at byte {offset} of disk {disk} is not in a disk of the guest",
        /// A base ended without some pages.
        BaseIncomplete { /// How many.
            missing: u64 } = "misbehaved.base_incomplete" "the base ended without {missing} pages",
        /// A checkpoint is over a limit of the receiver.
        EpochTooLarge { /// Which limit.
            what: &'static str } = "misbehaved.epoch_too_large" "the checkpoint has more {what} than this side takes",
        /// The counts at the end of a checkpoint are not what came.
        WrongCount { /// Which.
            what: &'static str } = "misbehaved.wrong_count" "number of {what} at the end of a checkpoint is not what came",
        /// The digest at the end of a checkpoint is not that of what came.
        WrongDigest = "misbehaved.wrong_digest" "digest at the end of a checkpoint is not that of what came",
        /// Too many checkpoints without an ack.
        TooManyInFlight = "misbehaved.too_many_in_flight" "too many checkpoints without an ack",
        /// An ack of an epoch that is not in flight.
        AckNotInFlight { /// Which.
            epoch: Epoch } = "misbehaved.ack_not_in_flight" "ack of epoch {epoch}, which is not in flight",
        /// Anything after a goodbye or a refusal.
        AfterEnd = "misbehaved.after_end" "a message after goodbye or refusal",
    }
}

coded! {
    /// Wrong use by this side's own code.
    ApiMisuse {
        /// The call does not belong in this state.
        State { /// What the call needs.
            needs: &'static str } = "api_misuse.state" "this call needs {needs}",
        /// An epoch out of order.
        Epoch { /// Given.
            found: Epoch } = "api_misuse.epoch" "epoch {found} is not the next one",
        /// Bytes and indexes do not fit together, or a section is too large.
        Size = "api_misuse.size" "wrong number of bytes",
        /// A page outside of memory, or twice in a delta.
        Page { /// Which.
            page: PageIndex } = "api_misuse.page" "page {page} is not memory of the guest, or twice in a delta",
        /// A base is ended without some pages.
        BaseIncomplete { /// How many.
            missing: u64 } = "api_misuse.base_incomplete" "the base lacks {missing} pages",
        /// More sections than a checkpoint may have.
        TooManySections = "api_misuse.too_many_sections" "too many sections",
        /// More input without taking the events of the last.
        InputNotPolled = "api_misuse.input_not_polled" "more input before the events of the last were taken",
        /// A generation lower than before.
        GenerationFell = "api_misuse.generation_fell" "a generation never falls",
    }
}

/// The two sides cannot work together as they are: an operator must change one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incompatible {
    /// The first kind of difference.
    pub code: RefuseCode,
    /// All differences, at most [`crate::limits::MAX_DIFFERENCES`].
    pub differences: Vec<Difference>,
}

impl Incompatible {
    fn metric_code(&self) -> &'static str {
        match self.code {
            RefuseCode::OtherVm => "incompatible.other_vm",
            RefuseCode::SelfConnection => "incompatible.self_connection",
            RefuseCode::Version => "incompatible.version",
            RefuseCode::Features => "incompatible.features",
            RefuseCode::Ram => "incompatible.ram",
            RefuseCode::Facts => "incompatible.facts",
            _ => "incompatible",
        }
    }
}

impl core::fmt::Display for Incompatible {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "the two sides do not fit together ({})", self.code)?;
        for difference in &self.differences {
            write!(f, "; {difference}")?;
        }
        Ok(())
    }
}

impl core::error::Error for Incompatible {}
