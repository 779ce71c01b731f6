//! Whether two sides can work together, decided from their hellos before any state flows. Pure: the same answer on both sides.

use crate::error::Incompatible;
use crate::facts::Facts;
use crate::ids::Identity;
use crate::limits::MAX_DIFFERENCES;
use crate::message::{Channel, Difference, Features, Hello, RefuseCode, VersionRange};
use crate::ram::RamLayout;

/// A value that one side does not have.
const ABSENT: &str = "(absent)";

/// What both sides agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    /// The newest version that both speak.
    pub version: u16,
    /// Abilities that both offer, as bits of [`Features`].
    pub features: u64,
}

impl Agreed {
    /// Whether all of `features` are agreed on.
    pub const fn has(self, features: u64) -> bool {
        self.features & features == features
    }
}

/// Compares the two hellos. The generations are not compared: whose right is over is no matter of fitting together.
///
/// # Errors
/// [`Incompatible`] with all differences, each value named, under the code of the first.
pub fn negotiate(
    (our_identity, ours): (&Identity, &Hello),
    (their_identity, theirs): (&Identity, &Hello),
) -> Result<Agreed, Incompatible> {
    let mut found = Found(None);
    if our_identity.vm != their_identity.vm {
        found.add(RefuseCode::OtherVm, "vm", &our_identity.vm.to_string(), &their_identity.vm.to_string());
    }
    if our_identity.incarnation == their_identity.incarnation {
        let incarnation = our_identity.incarnation.to_string();
        found.add(RefuseCode::SelfConnection, "incarnation", &incarnation, &incarnation);
    }
    if ours.node == theirs.node {
        found.add(RefuseCode::SelfConnection, "node", ours.node.as_str(), theirs.node.as_str());
    }
    if ours.channel != theirs.channel {
        found.add(RefuseCode::Features, "channel", channel(ours.channel), channel(theirs.channel));
    }
    let version = ours.versions.max.min(theirs.versions.max);
    if version < ours.versions.min.max(theirs.versions.min) {
        found.add(RefuseCode::Version, "protocol version", &versions(ours.versions), &versions(theirs.versions));
    }
    features(&mut found, ours.features, theirs.features);
    if ours.ram != theirs.ram {
        found.add(RefuseCode::Ram, "memory pages", &layout(ours.ram.as_ref()), &layout(theirs.ram.as_ref()));
    }
    facts(&mut found, &ours.facts, &theirs.facts);
    match found.0 {
        None => Ok(Agreed { version, features: ours.features.offered & theirs.features.offered }),
        Some(incompatible) => Err(incompatible),
    }
}

struct Found(Option<Incompatible>);

impl Found {
    fn add(&mut self, code: RefuseCode, name: &str, ours: &str, theirs: &str) {
        let found = self.0.get_or_insert(Incompatible { code, differences: Vec::new() });
        if found.differences.len() < MAX_DIFFERENCES {
            found.differences.push(Difference::new(name, ours, theirs));
        }
    }
}

fn channel(channel: Channel) -> &'static str {
    match channel {
        Channel::Data => "data",
        Channel::Heartbeat => "heartbeat",
    }
}

fn versions(VersionRange { min, max }: VersionRange) -> String {
    format!("{min} to {max}")
}

fn features(found: &mut Found, ours: Features, theirs: Features) {
    let lacking = (ours.required & !theirs.offered) | (theirs.required & !ours.offered);
    if lacking != 0 {
        let side = |side: Features| format!("offers {:#x}, requires {:#x}", side.offered, side.required);
        found.add(RefuseCode::Features, "features", &side(ours), &side(theirs));
    }
}

fn layout(ram: Option<&RamLayout>) -> String {
    let Some(ram) = ram else { return ABSENT.to_owned() };
    let ranges: Vec<String> = ram.ranges().iter().map(|range| format!("{}+{}", range.first, range.pages)).collect();
    ranges.join(" ")
}

fn facts(found: &mut Found, ours: &Facts, theirs: &Facts) {
    let only_theirs = theirs.iter().map(|(name, _)| name).filter(|name| ours.value(name).is_none());
    let names = ours.iter().map(|(name, _)| name).chain(only_theirs);
    for name in names.filter(|name| !name.starts_with(Facts::INFO)) {
        let (our_value, their_value) = (ours.value(name), theirs.value(name));
        let equal = match (our_value, their_value) {
            (Some(our_value), Some(their_value)) if name.starts_with(Facts::APPROX) => {
                nearly_equal(our_value, their_value)
            }
            (our_value, their_value) => our_value == their_value,
        };
        if !equal {
            found.add(RefuseCode::Facts, name, our_value.unwrap_or(ABSENT), their_value.unwrap_or(ABSENT));
        }
    }
}

/// What is no whole number is equal to nothing, not even to itself: the name promised one.
fn nearly_equal(ours: &str, theirs: &str) -> bool {
    let (Ok(ours), Ok(theirs)) = (ours.parse::<u64>(), theirs.parse::<u64>()) else { return false };
    u128::from(ours.abs_diff(theirs)) * 1_000_000 <= u128::from(ours.max(theirs)) * Facts::APPROX_PPM
}
