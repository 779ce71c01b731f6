//! The checkpoint stream: epochs, pages and sections on the wire. Bytes and events in, bytes and events out; no I/O, no clock, no thread,
//! no randomness.
//!
//! [`Sender`] is the primary's half of a data connection, [`Receiver`] the backup's; [`Pulse`] is either end of a heartbeat connection;
//! [`Greeting`] tells the two kinds of connection apart. docs/protocol.md describes the bytes.

#![forbid(unsafe_code)]

mod digest;
mod disk;
mod error;
mod facts;
mod greeting;
mod history;
pub mod ids;
pub mod limits;
mod liveness;
mod message;
pub mod mutant;
mod negotiate;
mod pulse;
mod ram;
mod receiver;
mod sender;
mod stamp;
mod wire;

pub use digest::{CheckpointDigest, EpochDigest};
pub use disk::{
    Comparable, DiskChange, DiskChanges, DiskContent, DiskStanding, PieceHashes, PiecesWanted, Standing, Verified,
    disk_pieces, piece_hash,
};
pub use error::{ApiMisuse, Incompatible, LinkError, Malformed, Misbehaved};
pub use facts::{FactError, Facts};
pub use greeting::{Caller, Greeting};
pub use ids::{Epoch, Generation, IdError, Identity, Incarnation, NodeName, PageIndex, Point, VmId};
pub use liveness::Liveness;
pub use message::{
    Accept, Channel, CheckpointKind, Difference, EndOfCheckpoint, Features, Goodbye, GoodbyeReason, HeartbeatBody,
    Hello, Refuse, RefuseCode, VersionRange,
};
pub use negotiate::{Agreed, negotiate};
pub use pulse::{Pulse, PulseEvent};
pub use ram::{PageRange, RamError, RamLayout};
pub use receiver::{Receiver, ReceiverConfig, ReceiverEvent, ReceiverLimits};
pub use sender::{Sender, SenderConfig, SenderEvent};
