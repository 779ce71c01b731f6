//! Table of who fits whom.

use replication_proto::{
    Agreed, Channel, Facts, Features, Generation, Hello, Identity, Incarnation, NodeName, PageIndex, PageRange,
    RamLayout, RefuseCode, VersionRange, VmId, limits, negotiate,
};

fn identity(node: &str, incarnation: u128) -> Identity {
    let node = NodeName::new(node).unwrap();
    Identity { vm: VmId(1), node, generation: Generation(1), incarnation: Incarnation(incarnation) }
}

fn facts(facts: &[(&str, &str)]) -> Facts {
    let mut stated = Facts::new();
    facts.iter().for_each(|(name, value)| stated.insert(*name, *value).unwrap());
    stated
}

fn hello(node: &str) -> Hello {
    Hello {
        channel: Channel::Data,
        versions: VersionRange { min: 2, max: 4 },
        features: Features { offered: 0b0111, required: 0b0001 },
        node: NodeName::new(node).unwrap(),
        ram: Some(RamLayout::new(vec![PageRange { first: PageIndex(0), pages: 8 }]).unwrap()),
        facts: facts(&[("cpuid", "aa"), ("approx.tsc-khz", "2000000"), ("info.host", "h1")]),
    }
}

/// The two sides with changes; both must come to the same answer, seen from their own side.
fn meet(
    change_ours: impl Fn(&mut Hello),
    change_theirs: impl Fn(&mut Hello),
) -> Result<Agreed, (RefuseCode, Vec<String>)> {
    let (mut ours, mut theirs) = (hello("a"), hello("b"));
    change_ours(&mut ours);
    change_theirs(&mut theirs);
    let (our_identity, their_identity) = (identity("a", 1), identity("b", 2));
    let here = negotiate((&our_identity, &ours), (&their_identity, &theirs));
    let there = negotiate((&their_identity, &theirs), (&our_identity, &ours));
    match (here, there) {
        (Ok(here), Ok(there)) => {
            assert_eq!(here, there);
            Ok(here)
        }
        (Err(here), Err(there)) => {
            assert_eq!((here.code, here.differences.len()), (there.code, there.differences.len()));
            Err((here.code, here.differences.iter().map(ToString::to_string).collect()))
        }
        (here, there) => panic!("one side agrees, the other does not: {here:?}, {there:?}"),
    }
}

#[test]
fn newest_common_version_and_common_features() {
    let agreed = Ok(Agreed { version: 4, features: 0b0111 });
    assert_eq!(meet(|_| {}, |_| {}), agreed);
    for ((min, max), expected) in
        [((1, 2), Some(2)), ((3, 3), Some(3)), ((4, 9), Some(4)), ((1, 1), None), ((5, 9), None)]
    {
        let met = meet(|_| {}, |theirs| theirs.versions = VersionRange { min, max });
        assert_eq!(met.as_ref().ok().map(|agreed| agreed.version), expected, "{min} to {max}");
        if let Err((code, differences)) = met {
            assert_eq!(code, RefuseCode::Version);
            assert_eq!(differences, [format!("protocol version: here 2 to 4, there {min} to {max}")]);
        }
    }
    for (offered, required, expected) in
        [(0b1001, 0, Some(0b0001)), (0b0001, 0b0001, Some(0b0001)), (0b0110, 0, None), (0b1001, 0b1000, None)]
    {
        let met = meet(|_| {}, |theirs| theirs.features = Features { offered, required });
        assert_eq!(met.as_ref().ok().map(|agreed| agreed.features), expected, "{offered:b} {required:b}");
        assert!(met.is_ok() || met.is_err_and(|(code, _)| code == RefuseCode::Features));
    }
}

#[test]
fn facts_are_compared_by_name() {
    let with = |changed: &[(&str, &str)]| meet(|_| {}, |theirs| theirs.facts = facts(changed));
    let (tsc, host) = (("approx.tsc-khz", "2000000"), ("info.host", "h2"));
    assert!(with(&[("cpuid", "aa"), tsc, host]).is_ok(), "what is for people is not compared");
    assert!(with(&[("cpuid", "aa"), tsc]).is_ok());
    let refused = |changed: &[(&str, &str)]| {
        let (code, differences) = with(changed).unwrap_err();
        assert_eq!(code, RefuseCode::Facts);
        differences
    };
    assert_eq!(refused(&[("cpuid", "bb"), tsc]), ["cpuid: here aa, there bb"]);
    assert_eq!(refused(&[tsc]), ["cpuid: here aa, there (absent)"]);
    assert_eq!(refused(&[("cpuid", "aa"), tsc, ("msr", "1")]), ["msr: here (absent), there 1"]);
    assert_eq!(refused(&[("cpuid", "aa")]), ["approx.tsc-khz: here 2000000, there (absent)"]);
    assert_eq!(refused(&[]).len(), 2);
}

#[test]
fn approximate_facts_may_differ_by_250_ppm() {
    let met = |ours: &str, theirs: &str| {
        let with = |value: &str| facts(&[("approx.x", value)]);
        meet(|side| side.facts = with(ours), |side| side.facts = with(theirs)).is_ok()
    };
    assert!(met("2000000", "2000500"));
    assert!(!met("2000000", "2000501"));
    assert!(met("0", "0") && !met("0", "1"));
    assert!(met("18446744073709551615", "18446744073709551615") && !met("18446744073709551615", "0"));
    for no_number in ["", "x", "-1", "1.5", "18446744073709551616", "1e6"] {
        assert!(!met(no_number, no_number), "{no_number:?} is no whole number");
    }
}

#[test]
fn different_memory_vm_and_self_are_refused() {
    let ram = RamLayout::new(vec![PageRange { first: PageIndex(0), pages: 9 }]).unwrap();
    let (code, differences) = meet(|_| {}, |theirs| theirs.ram = Some(ram.clone())).unwrap_err();
    assert_eq!((code, differences), (RefuseCode::Ram, vec!["memory pages: here 0+8, there 0+9".to_owned()]));
    let (code, _) = meet(|_| {}, |theirs| theirs.node = NodeName::new("a").unwrap()).unwrap_err();
    assert_eq!(code, RefuseCode::SelfConnection);
    let (here, there) = (identity("a", 1), identity("b", 1));
    let error = negotiate((&here, &hello("a")), (&there, &hello("b"))).unwrap_err();
    assert_eq!(error.code, RefuseCode::SelfConnection);
    let there = Identity { vm: VmId(2), ..identity("b", 2) };
    assert_eq!(negotiate((&here, &hello("a")), (&there, &hello("b"))).unwrap_err().code, RefuseCode::OtherVm);
    let (code, _) = meet(|_| {}, |theirs| theirs.channel = Channel::Heartbeat).unwrap_err();
    assert_eq!(code, RefuseCode::Features);
}

#[test]
fn all_differences_are_named_up_to_a_limit_under_the_code_of_the_first() {
    let many: Vec<(String, String)> = (0..100).map(|n| (format!("fact{n}"), "v".repeat(1000))).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let (code, differences) = meet(
        |_| {},
        |theirs| {
            theirs.versions = VersionRange { min: 9, max: 9 };
            theirs.facts = facts(&many);
        },
    )
    .unwrap_err();
    assert_eq!(code, RefuseCode::Version);
    assert_eq!(differences.len(), limits::MAX_DIFFERENCES);
    assert!(differences.iter().all(|text| text.len() < 2 * limits::MAX_DIFFERENCE_VALUE_BYTES));
}
