//! When a pair may be down for good, and when not. Read from the arbiter's record and from what was done to the processes, never from
//! what a process says about itself.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use crate::real::{Error, Node, Result};

/// A row of the failure matrix in which nobody can go on by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outage {
    /// Row 16: both sides died before either could say that it goes on alone.
    BothDead,
    /// Row 17: the side that ran alone died.
    SoloDied,
    /// Row 21: the side that had won the right died before its guest ran.
    WinnerDied,
    /// The guest was ended in order: the side that was told to end had just become its owner.
    Ended,
}

/// A process, as the record names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    /// Its host.
    pub(super) node: Node,
    /// Its incarnation.
    pub(super) incarnation: String,
}

/// As much of the arbiter's record as is needed here. Read by code of its own, not by the product's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// The generation of the right to run.
    pub(super) generation: u64,
    /// Who has it.
    pub(super) owner: Named,
    /// Who may take over.
    pub(super) in_sync: Option<Named>,
    /// Why it was written.
    pub(super) reason: String,
}

impl Record {
    /// Reads the record of a file arbiter.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(Error::io(format!("cannot read {place}")))?;
        let value: Value = serde_json::from_str(&text).map_err(|e| Error::answer(&place, e.to_string()))?;
        Self::of(&value["record"]).ok_or_else(|| Error::answer(place, format!("no record in {text}")))
    }

    fn of(record: &Value) -> Option<Self> {
        let in_sync = match &record["in_sync"] {
            Value::Null => None,
            named => Some(Named::of(named)?),
        };
        Some(Self {
            generation: record["generation"].as_u64()?,
            owner: Named::of(&record["owner"])?,
            in_sync,
            reason: record["reason"].as_str()?.to_owned(),
        })
    }
}

impl Named {
    fn of(value: &Value) -> Option<Self> {
        let node = Node::BOTH.into_iter().find(|node| value["node"] == node.as_str())?;
        Some(Self { node, incarnation: value["incarnation"].as_str()?.to_owned() })
    }
}

/// What is known of one side's processes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Side {
    /// Incarnation of the process that runs there now, if one does.
    pub(super) living: Option<String>,
    /// This round did something to a process there that ends it.
    pub(super) ended_by_us: bool,
    /// The last process there that was ever granted a takeover also ran the guest.
    pub(super) activated: bool,
}

/// Whether nobody is left who may run the guest, and why. An error: nobody is left, and it is not our doing.
pub(super) fn outage(record: &Record, side: impl Fn(Node) -> Side) -> Result<Option<Outage>, String> {
    let gone = |named: &Named| side(named.node).living.as_deref() != Some(named.incarnation.as_str());
    if !gone(&record.owner) || record.in_sync.as_ref().is_some_and(|named| !gone(named)) {
        return Ok(None);
    }
    let owner = side(record.owner.node);
    let blame = |node: Node| format!("nobody may run the guest, and nothing was done to {node}: {record:?}");
    if !owner.ended_by_us {
        return Err(blame(record.owner.node));
    }
    match &record.in_sync {
        Some(named) if !side(named.node).ended_by_us => Err(blame(named.node)),
        Some(_) => Ok(Some(Outage::BothDead)),
        None if record.reason == "stopped" => Ok(Some(Outage::Ended)),
        None if matches!(record.reason.as_str(), "takeover" | "switchover") && !owner.activated => {
            Ok(Some(Outage::WinnerDied))
        }
        None => Ok(Some(Outage::SoloDied)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(in_sync: bool, reason: &str) -> Record {
        let named = |node: Node| Named { node, incarnation: format!("{node}-1") };
        Record { generation: 3, owner: named(Node::A), in_sync: in_sync.then(|| named(Node::B)), reason: reason.into() }
    }

    /// `a` and `b`: whether the named process lives; killed by us in any case but `innocent`.
    fn judged(record: &Record, a: bool, b: bool, innocent: Option<Node>) -> Result<Option<Outage>, String> {
        outage(record, |node| Side {
            living: if [a, b][usize::from(node == Node::B)] { Some(format!("{node}-1")) } else { Some("new".into()) },
            ended_by_us: innocent != Some(node),
            activated: false,
        })
    }

    #[test]
    fn the_rows_of_the_matrix_and_nothing_else() {
        let protected = record(true, "protected");
        assert_eq!(judged(&protected, true, true, None), Ok(None));
        assert_eq!(judged(&protected, false, true, None), Ok(None));
        assert_eq!(judged(&protected, false, false, None), Ok(Some(Outage::BothDead)));
        let solo = record(false, "backup_lost");
        assert_eq!(judged(&solo, true, false, None), Ok(None));
        assert_eq!(judged(&solo, false, true, None), Ok(Some(Outage::SoloDied)));
        assert_eq!(judged(&record(false, "takeover"), false, true, None), Ok(Some(Outage::WinnerDied)));
        assert_eq!(judged(&record(false, "stopped"), false, true, None), Ok(Some(Outage::Ended)));
        assert!(judged(&solo, false, true, Some(Node::A)).is_err());
        assert!(judged(&protected, false, false, Some(Node::B)).is_err());
    }

    #[test]
    fn a_record_is_read_as_the_product_writes_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        let text = r#"{"revision":2,"record":{"v":1,"cluster_id":"x","generation":5,"owner":{"node":"a","incarnation":"1"},
            "in_sync":{"node":"b","incarnation":"2"},"reason":"protected","written_by":{"node":"a","incarnation":"1"},"note":""}}"#;
        std::fs::write(&path, text).unwrap();
        let named = |node, incarnation: &str| Named { node, incarnation: incarnation.into() };
        let in_sync = Some(named(Node::B, "2"));
        let record = Record { generation: 5, owner: named(Node::A, "1"), in_sync, reason: "protected".into() };
        assert_eq!(Record::read(&path).unwrap(), record);
        std::fs::write(&path, text.replace("\"node\":\"b\"", "\"node\":\"c\"")).unwrap();
        assert!(Record::read(&path).is_err());
    }
}
