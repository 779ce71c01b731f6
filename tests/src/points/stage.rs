//! How each moment is brought about, and the course of a case.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use failover::arbiter::Record;
use failover::failpoint::{Moment, Side};
use rustix::process::Signal;

use super::ground::{Ground, LIMIT};
use super::operator::Operator;
use super::verdict::{self, Fault};
use super::{Action, Case, Row, STALL};
use crate::real::client::{Writer, WriterConfig};
use crate::real::watch::Watch;
use crate::real::{Error, Node, Result, clock};

/// Answers that a client has before its fault comes.
const WARM: u64 = 8;
/// What a fault sets off is under way after this, beyond the fault itself.
const SETTLE: Duration = Duration::from_millis(120);

/// Plays one case on a pair that is whole, and leaves it whole.
pub fn play(ground: &mut Ground, case: Case) -> Result<Row> {
    // What a case before may have left armed and never passed.
    for node in Node::BOTH {
        ground.orders.give(node, "disarm")?;
    }
    let began_us = clock::mono_us();
    let watch = Watch::start(ground.pair.network())?;
    let writer = start_writer(ground, began_us)?;
    let mut stage = Stage { ground, case, began_us, stopped: None, ordered: None, writer: Some(writer) };
    let fired_us = stage.fire()?;
    let record = stage.after_fire()?;
    let Stage { ground, ordered, writer, .. } = stage;
    let operator = Operator::new(ground, writer.as_ref().filter(|writer| writer.is_writing()));
    let owner = operator.make_whole(case)?;
    if let Some(mut child) = ordered {
        // Whatever it was told, the case is over.
        child.kill().map_err(Error::io("cannot end ftctl"))?;
        child.wait().map_err(Error::io("cannot wait for ftctl"))?;
    }
    let before = ground.owner;
    let fault = Fault { case, began_us, fired_us, before, after: owner, record };
    ground.owner = owner;
    verdict::judge(ground, &fault, writer, watch)
}

fn start_writer(ground: &Ground, seed: u64) -> Result<Writer> {
    let config = WriterConfig { seed, pace: Duration::from_millis(2), patience: LIMIT, ..WriterConfig::default() };
    let writer = ground.pair.start_writer(config)?;
    while writer.acked() < WARM {
        if !writer.is_writing() {
            return Err(Error::answer("the client", "lost its connection before the fault"));
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(writer)
}

struct Stage<'g> {
    ground: &'g mut Ground,
    case: Case,
    began_us: u64,
    /// A host whose process was stopped to bring the moment about.
    stopped: Option<Node>,
    /// An `ftctl` that was started to bring it about.
    ordered: Option<Child>,
    writer: Option<Writer>,
}

impl Stage<'_> {
    /// The host whose process is to fail.
    fn target(&self) -> Node {
        match self.case.side {
            Side::Owner => self.ground.owner,
            Side::Standby => self.ground.standby(),
        }
    }

    fn arm(&self) -> Result<()> {
        self.ground.orders.give(self.target(), &self.case.order())
    }

    fn stop(&mut self, node: Node) -> Result<()> {
        self.stopped = Some(node);
        self.ground.signal(node, Signal::STOP).map(drop)
    }

    fn go_on(&mut self) -> Result<()> {
        match self.stopped.take() {
            Some(node) => self.ground.signal(node, Signal::CONT).map(drop),
            None => Ok(()),
        }
    }

    /// Brings the moment about with the point armed, and waits until it has fired. Returns when.
    fn fire(&mut self) -> Result<u64> {
        let (owner, standby) = (self.ground.owner, self.ground.standby());
        match self.case.moment {
            Moment::Epochs => self.arm()?,
            Moment::Base => self.begin_base(owner, standby)?,
            Moment::Solo => {
                self.arm()?;
                self.stop(standby)?;
            }
            Moment::Takeover => {
                self.arm()?;
                self.stop(owner)?;
            }
            Moment::Fence => {
                self.arm()?;
                self.stop(owner)?;
                self.ground.wait_event(standby, self.began_us, "a takeover", |e| e.event == "activated")?;
                self.go_on()?;
            }
            Moment::Switchover => {
                self.arm()?;
                self.order(owner, &["failover", "--yes"])?;
            }
            Moment::Force => self.begin_force(owner, standby)?,
            Moment::Stop => {
                self.arm()?;
                self.ground.signal(owner, Signal::TERM)?;
            }
            Moment::Boot => self.begin_boot(owner)?,
        }
        let fired = format!("fired {}", self.case.order());
        self.ground.orders.wait(self.target(), &fired, self.began_us, LIMIT)
    }

    fn begin_base(&mut self, owner: Node, standby: Node) -> Result<()> {
        self.ground.pair.kill(standby)?;
        self.ground.wait_state(owner, "solo")?;
        match self.case.side {
            Side::Owner => self.arm()?,
            Side::Standby => self.ground.pair.set_env("FAILPOINTS", Some(self.case.order().into())),
        }
        self.ground.pair.start_backup(standby)?;
        self.ground.pair.set_env("FAILPOINTS", None);
        Ok(())
    }

    /// The standby wins the record and dies; the owner keeps its guest, and an operator tells it to run again (row 21).
    fn begin_force(&mut self, owner: Node, standby: Node) -> Result<()> {
        self.ground.orders.give(standby, "takeover.restored=crash")?;
        self.arm()?;
        self.stop(owner)?;
        self.ground.wait_end(standby)?;
        self.go_on()?;
        self.ground.wait_state(owner, "fenced")?;
        self.order(owner, &["failover", "--force", "--confirm", "demo", "--yes"])
    }

    /// The guest is switched off, and its owner's host boots it again.
    fn begin_boot(&mut self, owner: Node) -> Result<()> {
        self.writer = None;
        self.ground.signal(owner, Signal::TERM)?;
        self.ground.wait_end(owner)?;
        self.ground.pair.set_env("FAILPOINTS", Some(self.case.order().into()));
        self.ground.pair.start_primary(owner, &[])?;
        self.ground.pair.set_env("FAILPOINTS", None);
        Ok(())
    }

    /// Starts an `ftctl` and does not wait for it.
    fn order(&mut self, node: Node, words: &[&str]) -> Result<()> {
        let pair = &self.ground.pair;
        let mut command = Command::new(pair.artifacts().program("ftctl"));
        command.arg("--config").arg(pair.config()).args(["--node", node.as_str()]).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.ordered = Some(pair.network().host(node).spawn(command).map_err(Error::io("cannot start ftctl"))?);
        Ok(())
    }

    /// Waits until the fault itself is over, and lets what was stopped go on when its part is played. Returns what the arbiter holds in between.
    fn after_fire(&mut self) -> Result<Option<Record>> {
        let target = self.target();
        match self.case.action {
            Action::Crash => self.ground.assert_killed(target)?,
            Action::Pause => thread::sleep(STALL),
            Action::Stop => {
                thread::sleep(STALL);
                self.ground.signal(target, Signal::CONT)?;
            }
            Action::Fail => {}
        }
        let record = self.ground.record()?;
        if self.stopped.is_some() && self.case.action != Action::Crash {
            self.part_played(target)?;
        }
        self.go_on()?;
        thread::sleep(SETTLE);
        Ok(record)
    }

    /// Waits until the side that did not crash has done what its moment is named for, or has ended.
    fn part_played(&mut self, target: Node) -> Result<()> {
        let since_us = self.began_us;
        let takeover = self.case.moment == Moment::Takeover;
        self.ground.wait(&format!("the rest of a {:?} on {target}", self.case.moment), |ground| {
            let events = ground.pair.events(target, since_us)?;
            let done = events.iter().any(|e| if takeover { e.event == "activated" } else { e.enters("solo") });
            let already = !takeover && ground.state(target)?.as_deref() == Some("solo");
            Ok(done || already || ground.pair.daemon(target).ended()?.is_some())
        })
    }
}
