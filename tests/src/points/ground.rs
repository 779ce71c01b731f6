//! A pair that is used for one case after another.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::{Duration, Instant};

use failover::arbiter::{Arbiter, FileArbiter, Record};
use rustix::process::Signal;

use super::orders::Orders;
use crate::real::artifacts::Artifacts;
use crate::real::events::Event;
use crate::real::pair::{Pair, PairOptions};
use crate::real::watch::Seen;
use crate::real::{Error, MachineKind, Node, Result, clock};

/// How long anything may take that a healthy pair does by itself.
pub const LIMIT: Duration = Duration::from_secs(20);
/// How often files are looked at while something is waited for.
pub const POLL: Duration = Duration::from_millis(5);

/// A pair whose processes take orders.
pub struct Ground {
    /// The pair.
    pub pair: Pair,
    /// Where its processes take orders.
    pub orders: Orders,
    /// The host that runs the guest when a case begins.
    pub owner: Node,
    /// Everything that was seen on the guest LAN since the beginning.
    pub seen: Vec<Seen>,
}

impl Ground {
    /// A protected pair with programs that have failpoints.
    pub fn open(machine: MachineKind, artifacts: &Artifacts) -> Result<Self> {
        let memory = match machine {
            MachineKind::Model => "16MiB",
            MachineKind::Kvm => "64MiB",
        };
        // Protection is to come back at once, however often it was lost. A busy host stalls everybody for some hundred milliseconds now and then: that
        // is not the fault that a case is about.
        let extra = "[timers]\nsolo = \"350ms\"\ntakeover = \"700ms\"\nprotect_retry = \"100ms\"\n".into();
        let options = PairOptions { memory: memory.into(), extra, ..PairOptions::new(machine) };
        let mut pair = Pair::prepare(artifacts.clone(), &options)?;
        let orders = Orders::new(pair.dir())?;
        pair.set_env("FAILPOINTS_DIR", Some(orders.dir()));
        pair.start_protected()?;
        Ok(Self { pair, orders, owner: Node::A, seen: Vec::new() })
    }

    /// The host that stands by when a case begins.
    #[must_use]
    pub fn standby(&self) -> Node {
        self.owner.peer()
    }

    /// What the arbiter holds.
    pub fn record(&self) -> Result<Option<Record>> {
        let failed = |e: failover::arbiter::ArbiterError| Error::answer("the arbiter's record", e.to_string());
        let mut arbiter = FileArbiter::open(&self.pair.dir().join("arbiter.json")).map_err(failed)?;
        Ok(arbiter.read().map_err(failed)?.map(|versioned| versioned.record))
    }

    /// The last state that the process on a host announced; `None` when it has ended. A stopped process has not.
    pub fn state(&mut self, node: Node) -> Result<Option<String>> {
        if self.pair.daemon(node).ended()?.is_some() {
            return Ok(None);
        }
        let since = self.pair.daemon(node).started_us();
        let events = self.pair.events(node, since)?;
        let last = events.into_iter().rev().find(|event| event.event == "state").and_then(|event| event.to);
        Ok(Some(last.unwrap_or_else(|| "starting".into())))
    }

    /// Waits for a state of the process on a host.
    pub fn wait_state(&mut self, node: Node, state: &str) -> Result<()> {
        self.wait(&format!("state {state} of {node}"), |ground| Ok(ground.state(node)?.as_deref() == Some(state)))
    }

    /// Waits for an event of a host since a time.
    pub fn wait_event(&mut self, node: Node, since_us: u64, what: &str, wanted: impl Fn(&Event) -> bool) -> Result<()> {
        self.wait(&format!("{what} on {node}"), |ground| Ok(ground.pair.events(node, since_us)?.iter().any(&wanted)))
    }

    /// Waits until the process on a host has ended.
    pub fn wait_end(&mut self, node: Node) -> Result<()> {
        self.wait(&format!("the end of {node}"), |ground| Ok(ground.pair.daemon(node).ended()?.is_some()))
    }

    /// Waits for anything, within [`LIMIT`].
    pub fn wait(&mut self, what: &str, mut until: impl FnMut(&mut Self) -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while !until(self)? {
            if Instant::now() >= deadline {
                let detail = format!("a is {:?}, b is {:?}", self.state(Node::A)?, self.state(Node::B)?);
                return Err(Error::Timeout { what: what.into(), waited: LIMIT, detail });
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Checks that a process that was told to crash was killed, not ended by itself.
    pub fn assert_killed(&mut self, node: Node) -> Result<()> {
        self.wait_end(node)?;
        match self.pair.daemon(node).ended()? {
            Some(status) if status.signal() == Some(Signal::KILL.as_raw()) => Ok(()),
            other => Err(Error::answer(format!("{node} was to crash"), format!("it ended with {other:?}"))),
        }
    }

    /// Starts a backup on a host, in place of what was there.
    pub fn start_backup(&mut self, node: Node) -> Result<()> {
        self.pair.set_env("FAILPOINTS", None);
        self.pair.start_backup(node)
    }

    /// Starts a primary on a host, in place of what was there.
    pub fn start_primary(&mut self, node: Node) -> Result<()> {
        self.pair.set_env("FAILPOINTS", None);
        self.pair.start_primary(node, &[])
    }

    /// Sends a signal to the process on a host, unless it has ended.
    pub fn signal(&mut self, node: Node, signal: Signal) -> Result<u64> {
        let at = clock::mono_us();
        if self.pair.daemon(node).ended()?.is_none() {
            self.pair.signal(node, signal)?;
        }
        Ok(at)
    }

    /// The host whose guest is protected by the other, if one is.
    pub fn whole(&mut self) -> Result<Option<Node>> {
        let (a, b) = (self.state(Node::A)?, self.state(Node::B)?);
        Ok(match (a.as_deref(), b.as_deref()) {
            (Some("protected"), Some("in_sync")) => Some(Node::A),
            (Some("in_sync"), Some("protected")) => Some(Node::B),
            _ => None,
        })
    }

    /// Names of all points that were passed on this ground.
    #[must_use]
    pub fn passed(&self) -> BTreeSet<String> {
        self.orders.passed()
    }

    /// The last lines of both processes.
    #[must_use]
    pub fn logs(&self) -> String {
        format!("{}files: {}", self.pair.logs(), self.pair.dir().display())
    }

    /// Keeps logs and events after this value is gone.
    pub fn keep_files(&mut self) {
        self.pair.keep_files();
    }
}
