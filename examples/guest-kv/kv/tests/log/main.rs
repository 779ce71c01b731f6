//! The log on disks that lose power, fail, are full or were damaged.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod crash;
mod damage;
mod disk;
