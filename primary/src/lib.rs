//! The side that runs: pause, stage, send, release.
//!
//! In reading order:
//! * [`epoch`]: **the story** of a checkpoint, from the end of an epoch to the send
//! * [`stream`]: the data connection's pure half; the story goes on there to the commit, the release and the retirement
//! * [`link`]: its socket and thread
//! * [`capture`]: how pages come out of the guest: before the pause, in it, after it; and when the guest runs on
//! * [`staging`]: buffers that own a checkpoint once the guest runs on
//! * [`output`]: the gate that holds what the guest says until its epoch is committed
//! * [`announce`]: the LAN learns where the guest is
//! * [`mirror`]: inbound frames, told to the backup as they arrive
//! * [`verify`]: both sides compared, part by part, while the pair is protected
//! * [`disk`]: disks: images, dirty maps, the log of an epoch's changes, the journal
//! * [`bulk`]: the base, copied while the guest runs
//! * [`pacer`]: when an epoch ends
//! * [`runner`]: the thread that owns the machine
//! * [`protect`]: the life of a protection session; pure
//! * [`owner`]: [`owner::course`] ties that to the decision core, purely; the event loop around it carries its orders out
//! * [`decider`]: the decision core as a process holds it
//! * [`host`]: what both sides' processes have in common: configuration, arbiter, control socket, health, status, events

pub mod alone;
pub mod announce;
pub mod attention;
pub mod bulk;
pub mod capture;
pub mod clock;
pub mod contention;
pub mod decider;
pub mod desk;
pub mod dial;
pub mod disk;
pub mod epoch;
pub mod events;
pub mod heap;
pub mod host;
pub mod link;
pub mod metrics;
pub mod mirror;
pub mod outgoing;
pub mod output;
pub mod owner;
pub mod pacer;
pub mod protect;
pub mod pulse;
pub mod ram_digest;
pub mod rejoin;
pub mod runner;
pub mod setup;
pub mod silent;
pub mod staging;
pub mod start;
pub mod stream;
pub mod tcp_info;
pub mod verify;
