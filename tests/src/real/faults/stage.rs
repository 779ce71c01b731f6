//! One pair on its stage: what can be done to it, and how it heals.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;

use super::judge::{self, Outage, Record, Side};
use super::load::Load;
use super::plan::Act;
use super::rights::Rights;
use crate::real::artifacts::Artifacts;
use crate::real::events::{Event, Tail};
use crate::real::lineage::{Turn, Witness};
use crate::real::network::Wire;
use crate::real::pair::{Pair, PairOptions, START_LIMIT};
use crate::real::resp::Connection;
use crate::real::rng::Rng;
use crate::real::shaper::Shaper;
use crate::real::{Error, MachineKind, Node, Result, clock};

/// How often files are looked at while something is waited for.
const POLL: Duration = Duration::from_millis(5);
/// How long a pair may take to be protected again after everything was healed.
const HEAL_LIMIT: Duration = Duration::from_secs(90);
/// States in which a side's guest runs.
const RUNS: [&str; 5] = ["solo", "resync", "protected", "contending", "switching_over"];
/// Guest memory: little, so that rounds are short.
const MEMORY: &str = "64MiB";
/// The pair asks again for its backup soon; nobody's guest is booted anew; all else as the product has it.
const EXTRA: &str = "[timers]\nprotect_retry = \"100ms\"\n\n[policy]\ncold_start = \"never\"\n";

/// How a round ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Settled {
    /// Protected and armed again; the guest runs here.
    Protected(Node),
    /// Nobody can go on, legitimately.
    Outage(Outage),
}

/// What was done to one side in this round.
#[derive(Clone, Copy, Debug, Default)]
struct Deeds {
    killed: bool,
    ended: bool,
    unplugged: bool,
    stopped: bool,
    hidden: bool,
}

/// A pair with its clients and its witness.
pub(super) struct Stage {
    // Declared first: clients and witness end before the wires are taken down.
    pub(super) load: Load,
    pub(super) witness: Witness,
    pub(super) auditor: Connection,
    switchovers: Vec<Child>,
    shaper: Option<Shaper>,
    lock: Option<File>,
    pub(super) pair: Pair,
    pub(super) rights: Rights,
    tails: [Tail; 2],
    alive: [bool; 2],
    /// Told to end, and not ended yet.
    ending: [bool; 2],
    deeds: [Deeds; 2],
    cut: Vec<Wire>,
    switched: bool,
    /// When a process was killed last in this round, microseconds.
    pub(super) killed_us: Option<u64>,
    rng: Rng,
    /// Guests that were resumed by force after the winner had died.
    pub(super) resumed: u64,
    pub(super) owner: Node,
}

fn at(node: Node) -> usize {
    usize::from(node == Node::B)
}

impl Stage {
    /// A pair that is protected and armed, with its clients at work on the keys of `era`.
    pub(super) fn set(
        artifacts: &Artifacts,
        (machine, epoch): (MachineKind, &str),
        files: Option<PathBuf>,
        seed: u64,
        era: u64,
    ) -> Result<Self> {
        let (memory, extra, epoch) = (MEMORY.into(), EXTRA.into(), epoch.into());
        let options = PairOptions { memory, extra, epoch, files, ..PairOptions::new(machine) };
        let mut pair = Pair::prepare(artifacts.clone(), &options)?;
        let mut rng = Rng::new(seed);
        prepare_views(&pair)?;
        start(&mut pair, &mut rng, Node::B, "ft-backup")?;
        start(&mut pair, &mut rng, Node::A, "ft-primary")?;
        let auditor = pair.wait_guest(START_LIMIT)?;
        let witness = Witness::start(pair.network())?;
        let load = Load::start(pair.network(), machine, seed, era)?;
        let tails = Node::BOTH.map(|node| Tail::new(pair.dir().join(node.as_str()).join("events.jsonl")));
        let mut stage = Self {
            load,
            witness,
            auditor,
            switchovers: Vec::new(),
            shaper: None,
            lock: None,
            pair,
            rights: Rights::default(),
            tails,
            alive: [true; 2],
            ending: [false; 2],
            deeds: [Deeds::default(); 2],
            cut: Vec::new(),
            switched: false,
            killed_us: None,
            rng,
            resumed: 0,
            owner: Node::A,
        };
        match stage.settle()? {
            Settled::Protected(owner) => stage.owner = owner,
            Settled::Outage(row) => return Err(Error::answer("a fresh pair", format!("{row:?}"))),
        }
        Ok(stage)
    }

    /// Forgets what was done in the round before.
    pub(super) fn begin_round(&mut self) {
        self.deeds = [Deeds::default(); 2];
        self.switched = false;
        self.killed_us = None;
    }

    /// Whether the record names a backup in sync at this moment.
    pub(super) fn is_protected(&self) -> bool {
        Record::read(&self.record_path()).is_ok_and(|record| record.in_sync.is_some())
    }

    fn record_path(&self) -> PathBuf {
        self.pair.dir().join("arbiter.json")
    }

    /// All events of both sides so far.
    pub(super) fn poll(&mut self) -> Result<[&[Event]; 2]> {
        for tail in &mut self.tails {
            tail.poll()?;
        }
        let [a, b] = &self.tails;
        Ok([&a.events, &b.events])
    }

    /// Rights and voices since the last call: what must not be.
    pub(super) fn look(&mut self, turns: &[Turn]) -> Vec<String> {
        let [a, b] = &self.tails;
        self.rights.look([&a.events, &b.events], turns)
    }

    /// Standbys that were activated, and in how many of them RAM was compared with the checkpoint's digest.
    pub(super) fn activations(&self) -> (u64, u64) {
        let all = || self.tails.iter().flat_map(|tail| &tail.events).filter(|event| event.event == "activated");
        (all().count() as u64, all().filter(|event| event.ram_digest.is_some()).count() as u64)
    }

    /// What both sides wrote since a time, and who spoke on the guest LAN, in words, in order; times in milliseconds after it.
    pub(super) fn trace(&self, since_us: u64, turns: &[Turn]) -> Vec<String> {
        let mut told: Vec<(u64, String)> = Vec::new();
        for (node, tail) in Node::BOTH.into_iter().zip(&self.tails) {
            told.extend(tail.since(since_us).map(|event| {
                let Event { right, to, reason, .. } = event;
                let words: Vec<&str> = [right, to, reason].into_iter().filter_map(Option::as_deref).collect();
                (event.mono_us, format!("{node} {} {}", event.event, words.join(" ")))
            }));
        }
        let spoke = |turn: &Turn| {
            let begun = turn.first_us.max(since_us);
            let lasts = turn.last_us.saturating_sub(begun) / 1_000;
            (begun, format!("{} speaks for {lasts} ms, {} frames", turn.from, turn.frames))
        };
        told.extend(turns.iter().filter(|turn| turn.last_us >= since_us).map(spoke));
        told.sort();
        told.into_iter().map(|(at_us, what)| format!("{:>6} ms {what}", (at_us - since_us) / 1_000)).collect()
    }

    // ---- deeds -------------------------------------------------------------------------------------------------------------------

    /// Does one thing. What cannot be done to a process that has ended is left.
    pub(super) fn act(&mut self, act: Act) -> Result<()> {
        match act {
            Act::Kill(node) => {
                if self.lives(node)? {
                    self.deeds[at(node)].killed = true;
                    self.killed_us = Some(self.pair.kill(node)?);
                }
            }
            Act::Unplug(node) => {
                self.deeds[at(node)].unplugged = true;
                // The replication cable is one wire; the other host's end of it goes dead with it.
                self.pair.network().cut(&[Wire::Replication, Wire::Lan(node)])?;
                self.cut.extend([Wire::Replication, Wire::Lan(node)]);
            }
            Act::Stop(node) => self.signal(node, Signal::STOP)?,
            Act::Continue(node) => self.signal(node, Signal::CONT)?,
            Act::End(node) => {
                self.deeds[at(node)].ended = true;
                self.signal(node, Signal::TERM)?;
                self.ending[at(node)] = self.lives(node)?;
            }
            Act::Start(node, program) => {
                if !self.lives(node)? {
                    self.start(node, program)?;
                }
            }
            Act::Cut(wire) => {
                self.pair.network().cut(&[wire])?;
                self.cut.push(wire);
            }
            Act::Mend(wire) => self.mend(wire)?,
            Act::Shape(shapes) => {
                self.unshape()?;
                self.shaper = Some(Shaper::start(self.pair.network(), shapes, self.rng.next_u64())?);
            }
            Act::Unshape => self.unshape()?,
            Act::Hide(node) => self.view(node, true)?,
            Act::Show(node) => self.view(node, false)?,
            Act::Lock => self.lock = Some(self.lock_record()?),
            Act::Unlock => self.lock = None,
            Act::Switchover(node) => {
                self.switched = true;
                self.switchovers.push(self.pair.start_ftctl(node, &["failover", "--yes", "--timeout", "10s"])?);
            }
        }
        Ok(())
    }

    fn mend(&mut self, wire: Wire) -> Result<()> {
        let unplugged = self.deeds.iter().any(|deeds| deeds.unplugged);
        // A host without power keeps its dead cables until the round is over.
        if unplugged && wire == Wire::Replication {
            return Ok(());
        }
        self.cut.retain(|cut| *cut != wire);
        self.pair.network().mend(&[wire])
    }

    fn unshape(&mut self) -> Result<()> {
        match self.shaper.take() {
            Some(shaper) => shaper.finish(self.pair.network()).map(drop),
            None => Ok(()),
        }
    }

    fn signal(&mut self, node: Node, signal: Signal) -> Result<()> {
        if !self.lives(node)? {
            return Ok(());
        }
        self.deeds[at(node)].stopped = signal == Signal::STOP;
        self.pair.signal(node, signal)
    }

    fn view(&mut self, node: Node, hidden: bool) -> Result<()> {
        self.deeds[at(node)].hidden = hidden;
        let dir = self.pair.dir();
        let (view, new) = (dir.join(format!("view-{node}")), dir.join(format!("view-{node}.new")));
        let target = if hidden { "down" } else { "." };
        let point = || {
            std::os::unix::fs::symlink(target, &new)?;
            fs::rename(&new, &view)
        };
        point().map_err(Error::io("cannot point a host to its arbiter"))
    }

    fn lock_record(&self) -> Result<File> {
        let path = self.pair.dir().join("arbiter.json.lock");
        let open = || -> std::io::Result<File> {
            let file = File::options().create(true).append(true).open(path)?;
            flock(&file, FlockOperation::LockExclusive)?;
            Ok(file)
        };
        open().map_err(Error::io("cannot lock the record"))
    }

    fn start(&mut self, node: Node, program: &str) -> Result<()> {
        start(&mut self.pair, &mut self.rng, node, program)?;
        self.alive[at(node)] = true;
        self.ending[at(node)] = false;
        self.deeds[at(node)].stopped = false;
        Ok(())
    }

    /// Ends everything that outlasts the timeline: dead cables, stopped processes, hidden records.
    pub(super) fn mend_all(&mut self) -> Result<()> {
        self.lock = None;
        self.unshape()?;
        let wires = std::mem::take(&mut self.cut);
        if !wires.is_empty() {
            self.pair.network().mend(&wires)?;
        }
        for node in Node::BOTH {
            let Deeds { stopped, hidden, .. } = self.deeds[at(node)];
            self.deeds[at(node)].unplugged = false;
            if hidden {
                self.view(node, false)?;
            }
            if stopped {
                self.signal(node, Signal::CONT)?;
            }
        }
        Ok(())
    }

    // ---- healing -----------------------------------------------------------------------------------------------------------------

    /// Whether the process on a host runs. One that has ended in a way that nothing accounts for is an error.
    fn lives(&mut self, node: Node) -> Result<bool> {
        if !self.alive[at(node)] {
            return Ok(false);
        }
        let Some(status) = self.pair.daemon(node).ended()? else { return Ok(true) };
        self.alive[at(node)] = false;
        self.ending[at(node)] = false;
        if self.accounts_for(node, status)? {
            return Ok(false);
        }
        let daemon = self.pair.daemon(node);
        let (name, tail) = (daemon.name().to_owned(), daemon.log_tail());
        Err(Error::Ended { name, status: status.to_string(), tail })
    }

    fn accounts_for(&self, node: Node, status: ExitStatus) -> Result<bool> {
        let Deeds { killed, ended, .. } = self.deeds[at(node)];
        Ok(match (status.signal(), status.code()) {
            (Some(9), _) => killed,
            // Ended in order; or so, but the arbiter could not be told.
            (None, Some(0 | 25)) => ended,
            // Handed over.
            (None, Some(24)) => self.switched,
            // Started again as the primary after it had died alone, and nothing boots the guest anew by itself: row 17, as the judge will find.
            (None, Some(26)) if killed => {
                let record = Record::read(&self.record_path())?;
                record.owner.node == node && record.in_sync.is_none()
            }
            _ => false,
        })
    }

    /// The state of the process on a host, as its event log has it.
    fn state(&mut self, node: Node) -> String {
        let since = self.pair.daemon(node).started_us();
        let last = self.tails[at(node)].since(since).rev().find(|event| event.event == "state");
        last.and_then(|event| event.to.clone()).unwrap_or_default()
    }

    fn side(&mut self, node: Node) -> Side {
        let since = self.pair.daemon(node).started_us();
        let tail = &self.tails[at(node)];
        // A primary that offers itself as the backup begins a second life in the same process.
        let started = tail.since(since).rev().find(|event| event.event == "started");
        let Deeds { killed, ended, .. } = self.deeds[at(node)];
        Side {
            living: started.and_then(|event| event.incarnation.clone()).filter(|_| self.alive[at(node)]),
            ended_by_us: killed || ended,
            activated: {
                let granted = tail.events.iter().rposition(|e| e.right.as_deref() == Some("takeover"));
                granted.is_some_and(|granted| tail.events[granted..].iter().any(|e| e.event == "activated"))
            },
        }
    }

    /// Brings back what died, as the backup of who survived, until the pair is protected and armed, or nobody is left who can go on.
    pub(super) fn settle(&mut self) -> Result<Settled> {
        let deadline = Instant::now() + HEAL_LIMIT;
        loop {
            self.poll()?;
            let mut lives = [false; 2];
            for node in Node::BOTH {
                lives[at(node)] = self.lives(node)?;
            }
            let states = Node::BOTH.map(|node| self.state(node));
            let runs = |node: Node| lives[at(node)] && RUNS.contains(&states[at(node)].as_str());
            match Node::BOTH.map(runs) {
                [true, false] => self.heal(Node::A, &lives, &states)?,
                [false, true] => self.heal(Node::B, &lives, &states)?,
                // One of them does not know yet that it lost the right.
                [true, true] => {}
                [false, false] => {
                    if let Some(row) = self.look_for_outage(&states)? {
                        return Ok(Settled::Outage(row));
                    }
                }
            }
            for owner in Node::BOTH {
                let together = states[at(owner)] == "protected" && states[at(owner.peer())] == "in_sync";
                // Whoever is about to end may say so for a moment more.
                let stays = lives == [true; 2] && self.ending == [false; 2];
                if together && stays && self.says_so(owner) {
                    self.reap_switchovers()?;
                    return Ok(Settled::Protected(owner));
                }
            }
            if Instant::now() >= deadline {
                let detail = format!("lives {lives:?}, states {states:?}\n{}", self.pair.logs());
                return Err(Error::Timeout {
                    what: "the pair to be protected again".into(),
                    waited: HEAL_LIMIT,
                    detail,
                });
            }
            thread::sleep(POLL);
        }
    }

    /// `owner` runs the guest alone among the living: the other side becomes its backup.
    fn heal(&mut self, owner: Node, lives: &[bool; 2], states: &[String; 2]) -> Result<()> {
        let peer = owner.peer();
        if lives[at(peer)] && states[at(peer)] == "fenced" {
            self.deeds[at(peer)].killed = true;
            self.pair.kill(peer)?;
            self.alive[at(peer)] = false;
            return self.start(peer, "ft-backup");
        }
        if !lives[at(peer)] {
            let program = if self.rng.range(0, 4) == 0 { "ft-primary" } else { "ft-backup" };
            return self.start(peer, program);
        }
        Ok(())
    }

    /// `ftctl status` of both sides says what the event logs say, and that a takeover would be granted.
    fn says_so(&self, owner: Node) -> bool {
        // No answer: one of them has just been ended.
        let (Ok(here), Ok(there)) = (self.pair.status(owner), self.pair.status(owner.peer())) else { return false };
        let flags = here.flag("protected") == Some(true) && here.flag("armed") == Some(true);
        here.state() == "protected" && flags && there.state() == "in_sync"
    }

    fn reap_switchovers(&mut self) -> Result<()> {
        for mut child in self.switchovers.drain(..) {
            // Done, refused or unknown: all of it may be, depending on what else happened.
            let limit = Instant::now() + Duration::from_secs(30);
            let ended = crate::real::tools::wait_until(&mut child, limit).map_err(Error::io("waiting for ftctl"))?;
            if ended.is_none() {
                let _gone = child.kill();
                let what = "the end of ftctl failover, which was given ten seconds".into();
                return Err(Error::Timeout { what, waited: Duration::from_secs(30), detail: String::new() });
            }
        }
        Ok(())
    }

    fn look_for_outage(&mut self, states: &[String; 2]) -> Result<Option<Outage>> {
        let record = Record::read(&self.record_path())?;
        let sides = Node::BOTH.map(|node| self.side(node));
        let row = judge::outage(&record, |node| sides[at(node)].clone());
        let row = row.map_err(|what| Error::answer("the pair", format!("{what}\n{}", self.pair.logs())))?;
        let Some(row) = row else { return Ok(None) };
        // The loser of that race still has the guest, paused: an operator may resume it, and nothing was ever let out since.
        let fenced = Node::BOTH.into_iter().find(|node| self.alive[at(*node)] && states[at(*node)] == "fenced");
        if row == Outage::WinnerDied
            && let Some(fenced) = fenced
        {
            self.pair
                .ftctl(fenced, &["failover", "--force", "--confirm", "demo", "--yes"])?
                .success("ftctl failover --force")?;
            self.resumed += 1;
            return Ok(None);
        }
        self.nobody_runs()?;
        Ok(Some(row))
    }

    /// For a while that is longer than any timer nobody runs the guest and nobody speaks for it.
    fn nobody_runs(&mut self) -> Result<()> {
        let began = clock::mono_us();
        // Frames of a side that was just killed may still be on their way to the witness.
        thread::sleep(Duration::from_millis(50));
        let from = clock::mono_us();
        while clock::mono_us() < began + 1_000_000 {
            self.poll()?;
            for node in Node::BOTH {
                let ran =
                    self.tails[at(node)].since(from).find(|e| e.to.as_deref().is_some_and(|to| RUNS.contains(&to)));
                if let Some(ran) = ran {
                    return Err(Error::answer(format!("{node} runs in an outage"), format!("{ran:?}")));
                }
            }
            thread::sleep(POLL);
        }
        let seen = self.witness.take();
        match seen.turns.iter().find(|turn| turn.last_us > from) {
            Some(turn) => Err(Error::answer("somebody speaks in an outage", format!("{turn:?}"))),
            None => Ok(()),
        }
    }
}

/// Starts a program on a host, with its own view of the arbiter. Half of the processes add a digest of RAM to its checkpoints.
fn start(pair: &mut Pair, rng: &mut Rng, node: Node, program: &str) -> Result<()> {
    let config = if rng.range(0, 2) == 0 { format!("{node}-digest.toml") } else { format!("{node}.toml") };
    let path = pair.dir().join(config);
    pair.start_with(node, program, &path, &[])
}

/// Each host gets a path of its own to the record, which can be pointed to where there is none.
fn prepare_views(pair: &Pair) -> Result<()> {
    let dir = pair.dir().to_path_buf();
    // What lies there cannot be read as a record, nor replaced by one.
    fs::create_dir_all(dir.join("down/arbiter.json")).map_err(Error::io("cannot make a directory"))?;
    for node in Node::BOTH {
        let view = dir.join(format!("view-{node}"));
        std::os::unix::fs::symlink(".", &view).map_err(Error::io("cannot make a link"))?;
        let (name, plain) = (format!("{node}.toml"), dir.join("arbiter.json").display().to_string());
        let own = view.join("arbiter.json").display().to_string();
        let path = pair.altered_config(&name, &plain, &own)?;
        let text = fs::read_to_string(&path).map_err(Error::io("cannot read a configuration"))?;
        let digest = text.replace("[epoch]\n", "[epoch]\nram_digest = true\n");
        fs::write(dir.join(format!("{node}-digest.toml")), digest)
            .map_err(Error::io("cannot write a configuration"))?;
    }
    Ok(())
}
