//! The side that waits: collect, verify, commit, apply, and, when it must, activate.
//!
//! In reading order:
//! * [`inbox`]: the incomplete epoch, which the standby never sees
//! * [`inbound`]: copies of frames that reached the guest in epochs that are not committed
//! * [`commit`]: **the story** of a commit: verify, commit, acknowledge
//! * [`intake`]: ties these to the data connection's bytes; pure
//! * [`standby`]: the machine that never ran, and the thread that applies committed checkpoints
//! * [`disk`]: committed changes of disks: journal, then images
//! * [`activate`]: **the other story**: the standby becomes the machine that runs
//! * [`silent`]: taps that listen and say nothing
//! * [`link`]: the listening sockets, and their thread
//! * [`wait`]: [`wait::course`] ties what happens to the decision core, purely; the event loop around it carries its orders out

pub mod activate;
pub mod commit;
pub mod disk;
pub mod inbound;
pub mod inbox;
pub mod intake;
pub mod link;
pub mod standby;
pub mod wait;
