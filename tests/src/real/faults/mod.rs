//! A loop of real faults against the real pair, its guest under load from several clients, and the judgement of each.
//!
//! One round: the pair is protected and armed, a fault drawn from the seed happens, what died comes back as the backup of the survivor, and
//! the pair is protected again. All that clients asked is checked for linearizability; a witness on the guest LAN follows who speaks
//! for the guest and what; the event logs say who had which right, and whether RAM was compared. Where two faults legitimately end in an
//! outage, exactly that is recognised, and a fresh pair takes over.

mod checker;
mod judge;
mod load;
mod plan;
mod report;
mod rights;
mod run;
mod stage;

pub use judge::Outage;
pub use plan::{Fault, Kind};
pub use report::{Report, Round};
pub use run::{Options, run};
