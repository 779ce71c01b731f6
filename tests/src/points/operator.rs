//! What a person does until the pair is protected again: starts what has ended, ends what is fenced for good, and, where an outage is the defined
//! outcome, forces the copy that is left or boots the guest anew. Never does he act where the pair is to help itself.

use std::thread;
use std::time::{Duration, Instant};

use failover::exit::CtlExit;

use super::Case;
use super::ground::{Ground, POLL};
use crate::real::client::Writer;
use crate::real::{Error, Node, Result};

/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(40);
/// Longer than any timer after which a side could do something by itself.
const QUIET: Duration = Duration::from_millis(600);
/// Answers that show that output flows.
const FLOWING: u64 = 5;

/// A person at work.
pub struct Operator<'g, 'w> {
    ground: &'g mut Ground,
    writer: Option<&'w Writer>,
    /// When it began to look as if nothing happened by itself any more.
    quiet_since: Option<Instant>,
}

/// What a person sees of one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sees {
    Ended,
    Serves,
    Fenced,
    Other,
}

impl<'g, 'w> Operator<'g, 'w> {
    /// `writer`: a client whose connection must live on as long as the guest does.
    pub fn new(ground: &'g mut Ground, writer: Option<&'w Writer>) -> Self {
        Self { ground, writer, quiet_since: None }
    }

    /// Works until one side is protected by the other and answers flow. Returns which.
    pub fn make_whole(mut self, case: Case) -> Result<Node> {
        let deadline = Instant::now() + LIMIT;
        let mut flowing = None;
        loop {
            if let Some(owner) = self.ground.whole()? {
                let acked = self.writer.map_or(u64::MAX, Writer::acked);
                let enough = *flowing.get_or_insert(acked.saturating_add(FLOWING));
                if acked >= enough || self.writer.is_none_or(|writer| !writer.is_writing()) {
                    return Ok(owner);
                }
            } else {
                flowing = None;
                self.act()?;
            }
            if Instant::now() >= deadline {
                let (a, b) = (self.ground.state(Node::A)?, self.ground.state(Node::B)?);
                let detail = format!(
                    "a is {a:?}, b is {b:?}, the record: {:?}, the client writes: {:?}",
                    self.ground.record()?,
                    self.writer.map(Writer::is_writing)
                );
                let what = format!("a protected pair after {case}");
                return Err(Error::Timeout { what, waited: LIMIT, detail });
            }
            thread::sleep(POLL);
        }
    }

    fn sees(&mut self, node: Node) -> Result<Sees> {
        Ok(match self.ground.state(node)?.as_deref() {
            None => Sees::Ended,
            Some("solo") => Sees::Serves,
            Some("fenced") => Sees::Fenced,
            Some(_) => Sees::Other,
        })
    }

    fn act(&mut self) -> Result<()> {
        for node in Node::BOTH {
            let (here, there) = (self.sees(node)?, self.sees(node.peer())?);
            match (here, there) {
                (Sees::Serves, Sees::Ended) => {
                    self.assert_unprotected(node)?;
                    return self.ground.start_backup(node.peer());
                }
                // Its guest is of no use any more.
                (Sees::Serves, Sees::Fenced) => {
                    if !self.says_fenced(node.peer())? {
                        return Ok(());
                    }
                    self.ground.pair.kill(node.peer())?;
                    return self.ground.start_backup(node.peer());
                }
                (Sees::Fenced, Sees::Ended) => return self.force(node),
                (Sees::Other, Sees::Ended) if self.left_alone(node)? => return self.boot_anew(node.peer()),
                _ => {}
            }
        }
        if self.sees(Node::A)? == Sees::Ended && self.sees(Node::B)? == Sees::Ended {
            return self.boot_anew_both();
        }
        Ok(())
    }

    /// A standby that the record does not name says for long enough that it does nothing.
    fn left_alone(&mut self, node: Node) -> Result<bool> {
        let waits = self.ground.state(node)?.as_deref() == Some("standby");
        let named = self.ground.record()?.is_some_and(|r| r.in_sync.is_some_and(|s| s.node.as_str() == node.as_str()));
        if !waits || named {
            self.quiet_since = None;
            return Ok(false);
        }
        Ok(self.quiet_since.get_or_insert_with(Instant::now).elapsed() >= QUIET)
    }

    /// The guest is gone, or was switched off: the host that the record names as its owner boots it anew.
    fn boot_anew(&mut self, node: Node) -> Result<()> {
        self.quiet_since = None;
        self.writer = None;
        self.ground.start_primary(node)
    }

    fn boot_anew_both(&mut self) -> Result<()> {
        self.writer = None;
        let owner = match self.ground.record()? {
            Some(record) if record.owner.node.as_str() == Node::B.as_str() => Node::B,
            _ => Node::A,
        };
        self.ground.start_backup(owner.peer())?;
        self.ground.start_primary(owner)
    }

    /// Row 21: the side that won the record died before it ran; the other one kept its guest.
    fn force(&mut self, node: Node) -> Result<()> {
        if !self.says_fenced(node)? {
            return Ok(());
        }
        let said = self.ground.pair.ftctl(node, &["failover", "--force", "--confirm", "demo", "--yes"])?;
        if said.status.code() == Some(i32::from(CtlExit::Refused.number())) {
            // Another one is under way: the case's own.
            return Ok(());
        }
        said.success("ftctl failover --force").map(drop)
    }

    /// A side whose peer is dead claims no protection.
    fn assert_unprotected(&self, node: Node) -> Result<()> {
        let status = self.ground.pair.status(node)?;
        if status.flag("protected") == Some(false) && status.flag("armed") == Some(false) {
            return Ok(());
        }
        Err(Error::answer(format!("{node} runs alone"), format!("and its status says otherwise: {}", status.json())))
    }

    /// Whether a side that was fenced still is; an operator's order may have made it run in the meantime.
    fn says_fenced(&mut self, node: Node) -> Result<bool> {
        let status = match self.ground.pair.status(node) {
            Ok(status) => status,
            // It has just begun anew as a backup, and cannot be asked yet.
            Err(_) if self.ground.state(node)?.as_deref() != Some("fenced") => return Ok(false),
            Err(error) => return Err(error),
        };
        if status.state() == "fenced" && status.flag("protected") == Some(false) {
            return Ok(true);
        }
        if self.ground.state(node)?.as_deref() != Some("fenced") {
            return Ok(false);
        }
        Err(Error::answer(format!("{node} is fenced"), format!("and its status says otherwise: {}", status.json())))
    }
}
