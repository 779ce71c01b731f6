//! One state of the explored disks, and what may happen in it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::Duration;

use backup::disk::Retire;
use backup::intake::{News, Question, Stable};
use primary::bulk::blocks_to_look_at;
use primary::disk::book::QUIET;
use primary::disk::copy::{DiskCopy, DiskStep};
use primary::disk::{DiskChanges, Epoch, Generation, Point};
use replication_proto::{CheckpointKind, Comparable, Incarnation, Standing};
use vmm::disk::ByteRange;

use super::Bounds;
use super::ghost::Ghost;
use super::node::{Node, Owner, PIECES, Process, Session, Waiter};
use super::op::{Op, Step};
use crate::explore::world::print_of;
use crate::world::keeper::Told;
use crate::world::storage::HostFiles;

/// Why a state is wrong.
pub type Violation = String;

/// Long enough for every record to be synced.
const LATE: Duration = Duration::from_secs(10);

/// From the backup to the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Up {
    Ack(u64),
    Durable(u64),
}

/// A connection.
#[derive(Default)]
struct Link {
    /// It stands; `None`: there is none.
    from: Option<usize>,
    /// The life that listens.
    listener: u8,
    /// The backup's end is in use.
    open: bool,
    down: VecDeque<(Epoch, CheckpointKind, DiskChanges)>,
    up: VecDeque<Up>,
}

/// Who may run, and who may take over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Record {
    owner: usize,
    generation: u64,
    /// The life of the other node's process that is in sync.
    in_sync: Option<u8>,
}

/// What was used of the bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Used {
    flushes: u8,
    epochs: u8,
    bases: u8,
    takeovers: u8,
    kills: u8,
    cuts: u8,
}

/// A state.
pub struct World {
    bounds: Bounds,
    /// Both hosts.
    pub nodes: [Node; 2],
    record: Option<Record>,
    link: Link,
    used: Used,
    ghost: Ghost,
    /// What the last power cut chose, and out of how many.
    pub chosen: Vec<Choice>,
    /// How often files were looked at as a power cut left them.
    pub looked: u64,
}

/// What was chosen, and out of how many.
pub type Choice = (u8, u8);

fn counted(kept: &[u8], chosen: &mut Vec<Choice>, count: usize) -> usize {
    let of = u8::try_from(count).expect("few contents");
    let choice = kept.get(chosen.len()).copied().unwrap_or(0);
    chosen.push((choice, of));
    usize::from(choice)
}

/// The power is gone: the files keep what is said in `kept`, and the first of what is not. Hands back all choices, and out of how many.
fn lose(files: &HostFiles, kept: &[u8]) -> Vec<Choice> {
    // The journal and the image lose whole pieces; sectors of the map are looked at one by one.
    let (mut groups, mut chosen) = (BTreeMap::new(), Vec::new());
    files.lose_as(&mut |file, sector, count, alike| {
        if count < 2 || alike {
            return 0;
        }
        let group = sector.map(|number| if file == "map" { number } else { number / 8 });
        *groups.entry((file, group, count)).or_insert_with(|| counted(kept, &mut chosen, count))
    });
    chosen
}

/// The choices that follow, counted up like the digits of a number.
pub fn following(chosen: &[Choice]) -> Option<Vec<u8>> {
    let last = chosen.iter().rposition(|(choice, of)| choice + 1 < *of)?;
    let mut kept: Vec<u8> = chosen[..=last].iter().map(|(choice, _)| *choice).collect();
    kept[last] += 1;
    Some(kept)
}

impl World {
    /// Nothing was ever started.
    pub fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            nodes: [Node::new(bounds.journal_bytes), Node::new(bounds.journal_bytes)],
            record: None,
            link: Link::default(),
            used: Used::default(),
            ghost: Ghost::default(),
            chosen: Vec::new(),
            looked: 0,
        }
    }

    /// Its fingerprint.
    pub fn print(&self) -> u128 {
        let prints = [self.nodes[0].print, self.nodes[1].print];
        let down: Vec<(u64, usize)> = self.link.down.iter().map(|(epoch, _, d)| (epoch.0, d.changes.len())).collect();
        let link = (self.link.from, self.link.listener, self.link.open, down, &self.link.up);
        print_of(&(prints, self.record, link, self.used, &self.ghost))
    }

    /// Whether the power may still fail.
    pub fn may_cut(&self) -> bool {
        self.used.cuts < self.bounds.cuts
    }

    /// Changes of files so far, on each host.
    pub fn spent(&self) -> [u64; 2] {
        [0, 1].map(|node| self.nodes[node].files.supply.spent())
    }

    /// What this state shows, for those who must know that a search was not vacuous.
    pub fn sights(&self) -> Vec<&'static str> {
        let Some(record) = self.record else { return Vec::new() };
        let mut sights = Vec::new();
        let owner = self.nodes[record.owner].owner();
        let seen = [
            (record.in_sync.is_some(), "in sync"),
            (self.used.takeovers > 0, "taken over"),
            (self.used.takeovers > 0 && record.in_sync.is_some(), "protected after a takeover"),
            (self.used.cuts > 0, "power cut"),
            (self.used.cuts > 0 && owner.is_some_and(|o| o.generation > 1) && self.used.takeovers == 0, "booted anew"),
            (owner.is_some_and(|owner| !owner.held.is_empty()), "output held"),
            (
                self.nodes.iter().any(|node| node.waiter().is_some_and(|w| w.stable.told().is_some())),
                "told of stable storage",
            ),
        ];
        sights.extend(seen.iter().filter(|(is, _)| *is).map(|(_, name)| *name));
        sights
    }

    // ---- what may happen ---------------------------------------------------------------------------------------------------------

    /// All of it, in a fixed order.
    pub fn ops(&self) -> Vec<Op> {
        let mut ops = Vec::new();
        if self.bounds.ends_with_cuts && !self.may_cut() {
            return ops;
        }
        for node in 0..2 {
            match &self.nodes[node].process {
                Process::Off => {
                    if self.record.is_some() || node == 0 {
                        ops.push(Op::Start(node));
                    }
                }
                Process::Owner(owner) => self.ops_of_owner(node, owner, &mut ops),
                Process::Waiting(waiter) => self.ops_of_waiter(node, waiter, &mut ops),
            }
            if !matches!(self.nodes[node].process, Process::Off) {
                let (kill, cut) = (self.used.kills < self.bounds.kills, self.may_cut());
                ops.extend(kill.then_some(Op::Kill(node)));
                ops.extend(cut.then_some(Op::Cut(node)));
            }
        }
        ops
    }

    fn ops_of_owner(&self, node: usize, owner: &Owner, ops: &mut Vec<Op>) {
        let rightful = self.record.is_some_and(|record| record.owner == node);
        let (used, bounds) = (&self.used, &self.bounds);
        if self.ghost.changes < bounds.writes {
            // Both pieces are alike: the first change is one of the first.
            let places = PIECES.len().min(usize::from(self.ghost.changes) + 1);
            ops.extend((0..places).map(|place| Op::Write(node, place)));
        }
        if used.flushes < bounds.flushes {
            ops.push(Op::Flush(node));
        }
        if owner.unprepared {
            ops.push(Op::Prepare(node));
        }
        if owner.durable.is_some() {
            ops.push(Op::Tidy(node));
        }
        let connected = self.link.from == Some(node);
        if connected && !self.link.up.is_empty() {
            ops.push(Op::Hear(node));
        }
        if !rightful {
            return ops.push(Op::Rejoin(node));
        }
        match &owner.session {
            None if used.bases < bounds.bases
                && self.link.from.is_none()
                && self.nodes[1 - node].waiter().is_some() =>
            {
                ops.push(Op::BeginBase(node));
            }
            None => {}
            Some(Session::Copying(..)) if self.link.open => ops.push(Op::EndBase(node)),
            // One on its way at a time.
            Some(Session::Epochs) if self.link.open && used.epochs < bounds.epochs && self.link.down.is_empty() => {
                ops.push(Op::EndEpoch(node));
            }
            Some(_) => {}
        }
        if owner.session.is_some() {
            ops.push(Op::Solo(node));
        }
    }

    fn ops_of_waiter(&self, node: usize, waiter: &Waiter, ops: &mut Vec<Op>) {
        if self.link.from == Some(1 - node) && self.link.open && !self.link.down.is_empty() {
            ops.push(Op::Deliver(node));
        }
        match waiter.keeper.patience(Duration::ZERO) {
            Some(Duration::ZERO) => ops.push(Op::Disk(node)),
            Some(_) => ops.push(Op::DiskLate(node)),
            None => {}
        }
        let life = self.nodes[node].life;
        let named = self.record.is_some_and(|record| record.owner != node && record.in_sync == Some(life));
        if named && self.used.takeovers < self.bounds.takeovers {
            ops.push(Op::TakeOver(node));
        }
    }

    // ---- what happens ------------------------------------------------------------------------------------------------------------

    /// It does.
    ///
    /// # Errors
    /// Something that must never be.
    pub fn perform(&mut self, step: &Step) -> Result<(), Violation> {
        self.chosen.clear();
        self.looked = 0;
        if let Some((node, change)) = step.cut {
            self.nodes[node].files.supply.cut_within(change);
        }
        self.act(step.op)?;
        for node in 0..2 {
            if self.nodes[node].files.supply.is_off() || step.op == Op::Cut(node) {
                self.power_off(node, &step.kept)?;
            }
        }
        Ok(())
    }

    fn act(&mut self, op: Op) -> Result<(), Violation> {
        match op {
            Op::Start(node) => self.start(node),
            Op::Write(node, place) => self.write(node, place),
            Op::Flush(node) => self.flush(node),
            Op::BeginBase(node) => self.begin_base(node),
            Op::EndBase(node) => self.end_base(node),
            Op::EndEpoch(node) => self.end_epoch(node),
            Op::Deliver(node) => self.deliver(node),
            Op::Disk(node) => self.disk(node, Duration::ZERO),
            Op::DiskLate(node) => self.disk(node, LATE),
            Op::Hear(node) => self.hear(node),
            Op::Tidy(node) => {
                self.nodes[node].note(op);
                if let Some(owner) = self.nodes[node].owner_mut()
                    && let Some(point) = owner.durable.take()
                {
                    // Nothing changed for long: whatever may go goes.
                    for _ in 0..2 {
                        owner.looked += QUIET;
                        owner.disks.owner.durable(point, owner.looked);
                    }
                    owner.disks.owner.tidy(point);
                }
                Ok(())
            }
            Op::Prepare(node) => {
                self.nodes[node].note(op);
                self.owner(node).unprepared = false;
                let done = self.owner(node).disks.owner.first_change().prepare();
                self.must(node, done, "the journal is not retired")
            }
            Op::Solo(node) => {
                self.solo(node);
                Ok(())
            }
            Op::TakeOver(node) => self.take_over(node),
            Op::Rejoin(node) => {
                self.off(node);
                Ok(())
            }
            Op::Kill(node) => {
                self.used.kills += 1;
                self.off(node);
                Ok(())
            }
            Op::Cut(_) => Ok(()),
        }
    }

    fn owner(&mut self, node: usize) -> &mut Owner {
        self.nodes[node].owner_mut().expect("an owner's operation")
    }

    fn waiter(&mut self, node: usize) -> &mut Waiter {
        self.nodes[node].waiter_mut().expect("a standby's operation")
    }

    /// It may fail only when the power did.
    fn must<T, E: fmt::Display>(&self, node: usize, result: Result<T, E>, what: &str) -> Result<(), Violation> {
        match result {
            Err(why) if !self.nodes[node].files.supply.is_off() => Err(format!("{what}: {why}")),
            _ => Ok(()),
        }
    }

    fn off(&mut self, node: usize) {
        if self.link.from == Some(node) {
            self.backup_lost_link();
            self.link = Link::default();
        } else {
            self.link.open = false;
            self.link.down.clear();
        }
        self.ghost.running[node] = None;
        self.nodes[node].off();
    }

    fn backup_lost_link(&mut self) {
        let Some(from) = self.link.from.filter(|_| self.link.open) else { return };
        self.link.open = false;
        self.link.down.clear();
        let backup = &mut self.nodes[1 - from];
        backup.note("lost");
        if let Some(waiter) = backup.waiter_mut() {
            waiter.commits.connection_lost();
        }
    }

    fn power_off(&mut self, node: usize, kept: &[u8]) -> Result<(), Violation> {
        self.used.cuts += 1;
        let life = self.nodes[node].life;
        let could_run = self.record.is_some_and(|r| r.owner == node || r.in_sync == Some(life));
        if self.bounds.ends_with_cuts && !self.may_cut() {
            // Nothing follows: all that may be left is looked at here and now.
            let mut next = could_run.then(Vec::new);
            while let Some(kept) = next {
                let copy = self.nodes[node].files.copy();
                next = following(&lose(&copy, &kept));
                self.look(&copy).map_err(|why| format!("{why}; kept {kept:?}"))?;
            }
            self.off(node);
            return Ok(());
        }
        self.chosen = lose(&self.nodes[node].files, kept);
        self.off(node);
        if !could_run {
            return Ok(());
        }
        let copy = self.nodes[node].files.copy();
        self.look(&copy)
    }

    /// What a process that opens these files finds keeps every promise.
    fn look(&mut self, files: &HostFiles) -> Result<(), Violation> {
        self.looked += 1;
        files.open(Incarnation(99))?;
        let kept = self.ghost.check_promise(&files.image());
        kept.map(|_| ()).map_err(|why| format!("no released flush is lost: after the power failed: {why}"))
    }

    fn start(&mut self, node: usize) -> Result<(), Violation> {
        let opened = self.nodes[node].open();
        let life = self.nodes[node].life;
        self.nodes[node].note(("start", life));
        let disks = match opened {
            Ok(disks) => disks,
            Err(_) if self.nodes[node].files.supply.is_off() => return Ok(()),
            Err(why) => return Err(format!("the files are refused: {why}")),
        };
        // Whoever the record names in sync boots nothing away; if that process is gone for certain, the owner may boot.
        let peer = &self.nodes[1 - node];
        let may_boot = self.record.is_none_or(|record| {
            record.owner == node && record.in_sync.is_none_or(|life| life != peer.life && peer.waiter().is_some())
        });
        if !may_boot {
            self.nodes[node].process = Process::Waiting(Box::new(Waiter::new(disks)));
            return Ok(());
        }
        let generation = self.record.map_or(0, |record| record.generation) + 1;
        self.record = Some(Record { owner: node, generation, in_sync: None });
        self.nodes[node].note(("boot", generation));
        self.nodes[node].process = Process::Owner(Box::new(Owner::new(disks, generation, 0, false)));
        let image = self.nodes[node].files.image();
        self.ghost.boots(node, &image)
    }

    fn write(&mut self, node: usize, place: usize) -> Result<(), Violation> {
        self.nodes[node].note(("write", place, self.ghost.changes));
        let number = self.ghost.begins(node);
        let disk = self.owner(node).disk();
        let range = ByteRange { offset: PIECES[place] as u64 * 4096, len: 4096 };
        let done = disk.announce(range).and_then(|()| disk.write(range.offset, &[number; 4096]));
        self.owner(node).unprepared = false;
        if done.is_ok() {
            self.ghost.completed(node, place, number);
        }
        self.must(node, done, "a change fails")
    }

    fn flush(&mut self, node: usize) -> Result<(), Violation> {
        self.nodes[node].note("flush");
        self.used.flushes += 1;
        let done = self.owner(node).disk().flush();
        self.owner(node).unprepared = false;
        if done.is_ok() {
            self.ghost.flushed(node);
            if self.owner(node).held_since.is_none() {
                self.says(node);
            }
        }
        self.must(node, done, "a flush fails")
    }

    /// What the guest says leaves at once.
    fn says(&mut self, node: usize) {
        if let Some(disk) = self.ghost.running[node].filter(|_| !self.ghost.superseded[node]) {
            self.ghost.heard(&disk);
        }
    }

    // ---- protection --------------------------------------------------------------------------------------------------------------

    fn begin_base(&mut self, node: usize) -> Result<(), Violation> {
        self.used.bases += 1;
        let prints = (self.nodes[0].print, self.nodes[1].print);
        self.nodes.iter_mut().for_each(|node| node.note(("base", prints)));
        let ours = self.owner(node).disks.owner.still_ours();
        if ours.as_ref().is_ok_and(|ours| !ours) {
            return Err("a map is somebody else's".into());
        }
        self.must(node, ours, "a map is not ours")?;
        let standing = Standing { disks: self.waiter(1 - node).keeper.standing(), ..Standing::default() };
        let waiter = self.waiter(1 - node);
        waiter.commits.begin_base();
        waiter.keeper.begin_base();
        (waiter.holding, waiter.stable) = (None, Stable::default());
        let first = Epoch(self.owner(node).last + 1);
        self.waiter(1 - node).stable.base_begun(first);
        let owner = &self.owner(node).disks.owner;
        owner.begin_log(first);
        let mut copy = DiskCopy::begin(&**owner, &blocks_to_look_at(owner, &standing));
        self.link = Link { from: Some(node), listener: self.nodes[1 - node].life, open: true, ..Link::default() };
        self.copy(node, &mut copy, false)?;
        self.owner(node).session = Some(Session::Copying(first, copy));
        Ok(())
    }

    /// The copy goes on until little is left, or all is sent.
    fn copy(&mut self, node: usize, copy: &mut DiskCopy, finish: bool) -> Result<(), Violation> {
        loop {
            let step = copy.next_step(&*self.owner(node).disks.owner, finish);
            if self.nodes.iter().any(|node| node.files.supply.is_off()) {
                return Ok(());
            }
            let keeper = &mut self.waiter(1 - node).keeper;
            match step.map_err(|e| e.to_string())? {
                DiskStep::Ask(ask) => keeper.compare(Question(0), ask),
                DiskStep::Send(changes) => changes.into_iter().for_each(|change| keeper.apply_hollow(change)),
                DiskStep::Await => return Err("a question is not answered".into()),
                DiskStep::Few | DiskStep::End => return Ok(()),
            }
            while self.waiter(1 - node).keeper.patience(Duration::ZERO) == Some(Duration::ZERO) {
                let told = self.waiter(1 - node).turn(Duration::ZERO);
                for news in self.hear_disks(1 - node, told)? {
                    if let Comparable::Disk(disk) = news.of {
                        copy.answered(disk, &news);
                    }
                }
                if self.nodes[1 - node].files.supply.is_off() {
                    return Ok(());
                }
            }
        }
    }

    fn end_base(&mut self, node: usize) -> Result<(), Violation> {
        let prints = (self.nodes[0].print, self.nodes[1].print);
        self.nodes.iter_mut().for_each(|node| node.note(("end", prints)));
        let Some(Session::Copying(first, mut copy)) = self.owner(node).session.take() else {
            return Err("no base is under way".into());
        };
        self.copy(node, &mut copy, true)?;
        if self.nodes.iter().any(|node| node.files.supply.is_off()) {
            self.owner(node).session = Some(Session::Copying(first, copy));
            return Ok(());
        }
        let owner = self.owner(node);
        owner.disks.owner.cover(first);
        owner.session = Some(Session::Epochs);
        // R5: outputs are held again from here on.
        owner.held_since = Some(first.0);
        self.seal(node, first, CheckpointKind::Base)
    }

    fn end_epoch(&mut self, node: usize) -> Result<(), Violation> {
        self.used.epochs += 1;
        self.nodes[node].note("epoch");
        let epoch = Epoch(self.owner(node).last + 1);
        self.seal(node, epoch, CheckpointKind::Delta)
    }

    fn seal(&mut self, node: usize, epoch: Epoch, kind: CheckpointKind) -> Result<(), Violation> {
        let end = self.ghost.running[node].ok_or("no guest runs")?;
        let owner = self.owner(node);
        let changes = owner.disks.owner.seal(epoch);
        owner.last = epoch.0;
        owner.held.push((epoch.0, end));
        let generation = owner.generation;
        self.ghost.ends.insert((generation, epoch.0), end);
        self.link.down.push_back((epoch, kind, changes));
        Ok(())
    }

    fn deliver(&mut self, node: usize) -> Result<(), Violation> {
        let Some((epoch, kind, changes)) = self.link.down.pop_front() else { return Ok(()) };
        let generation = self.owner(1 - node).generation;
        let content = print_of(&format!("{changes:?}"));
        self.nodes[node].note(("deliver", generation, epoch.0, content));
        let point = Point { generation: Generation(generation), epoch };
        let committed = self.waiter(node).commit(point, kind, &changes);
        self.must(node, committed, "a checkpoint is refused")?;
        self.acknowledge(node);
        Ok(())
    }

    fn acknowledge(&mut self, node: usize) {
        let due = self.waiter(node).commits.acks_due();
        if self.link.open && self.link.from == Some(1 - node) {
            self.link.up.extend(due.into_iter().map(|epoch| Up::Ack(epoch.0)));
        }
    }

    fn disk(&mut self, node: usize, now: Duration) -> Result<(), Violation> {
        self.nodes[node].note(("disk", now));
        let told = self.waiter(node).turn(now);
        self.hear_disks(node, told).map(|_| ())
    }

    /// What the disks' thread says is carried out. Hands back answers to questions.
    fn hear_disks(&mut self, node: usize, told: Vec<Told>) -> Result<Vec<replication_proto::PiecesWanted>, Violation> {
        let mut answers = Vec::new();
        for told in told {
            match told {
                Told::Based(point) => {
                    let image = self.nodes[node].files.image();
                    self.ghost.based((point.generation.0, point.epoch.0), &image)?;
                }
                Told::News(News::Applied(bytes)) => self.waiter(node).commits.applied(bytes),
                Told::News(News::Compared(_, answer)) => answers.push(answer),
                Told::News(News::Stable { ackable, durable }) => self.stable(node, ackable, durable),
                Told::News(News::DiskFailed { why, .. }) => self.must::<(), _>(node, Err(why), "the disks fail")?,
                Told::News(other) => return Err(format!("the disks' thread says {other:?}")),
            }
        }
        if !self.nodes[node].files.supply.is_off() {
            self.acknowledge(node);
        }
        Ok(answers)
    }

    fn stable(&mut self, node: usize, ackable: Point, durable: Point) {
        if !self.link.open || self.link.from != Some(1 - node) {
            return;
        }
        let generation = Generation(self.owner(1 - node).generation);
        let waiter = self.waiter(node);
        if let Some(epoch) = waiter.stable.hear(generation, (ackable, durable), &mut waiter.commits) {
            self.link.up.push_back(Up::Durable(epoch.0));
        }
    }

    fn hear(&mut self, node: usize) -> Result<(), Violation> {
        let Some(up) = self.link.up.pop_front() else { return Ok(()) };
        self.nodes[node].note(up);
        let rightful = self.record.is_some_and(|record| record.owner == node);
        let life = self.link.listener;
        let owner = self.owner(node);
        match up {
            Up::Durable(epoch) => owner.durable = Some(owner.point(epoch)),
            Up::Ack(epoch) => {
                if !owner.trusted && rightful && owner.held_since.is_some_and(|first| epoch >= first) {
                    owner.trusted = true;
                    if let Some(record) = &mut self.record {
                        record.in_sync = Some(life);
                    }
                }
                let owner = self.owner(node);
                if owner.trusted {
                    let (heard, held) = owner.held.iter().partition(|(of, _)| *of <= epoch);
                    owner.held = held;
                    let heard: Vec<_> = heard;
                    heard.iter().for_each(|(_, end)| self.ghost.heard(end));
                }
            }
        }
        Ok(())
    }

    fn solo(&mut self, node: usize) {
        self.nodes[node].note("solo");
        self.backup_lost_link();
        self.link = Link::default();
        if let Some(record) = &mut self.record {
            record.in_sync = None;
        }
        let owner = self.owner(node);
        (owner.session, owner.held_since, owner.trusted) = (None, None, false);
        owner.held.clear();
        owner.disks.owner.end_log();
        self.says(node);
    }

    fn take_over(&mut self, node: usize) -> Result<(), Violation> {
        self.used.takeovers += 1;
        self.nodes[node].note("takeover");
        let record = self.record.as_mut().ok_or("no record")?;
        record.generation += 1;
        (record.owner, record.in_sync) = (node, None);
        let generation = record.generation;
        self.link.open = false;
        self.link.down.clear();
        let Process::Waiting(waiter) = std::mem::replace(&mut self.nodes[node].process, Process::Off) else {
            return Err("not a standby".into());
        };
        let Waiter { disks, keeper, mut commits, holding, .. } = *waiter;
        commits.close();
        let point = holding.ok_or("a hollow standby is activated")?;
        let from = (point.generation.0, point.epoch.0);
        let retire: Retire = match keeper.finish(Duration::ZERO) {
            Ok(retire) => retire,
            // The record says that it owns the guest: what it knew of the last epochs is on its way to whoever hears it later.
            Err(_) if self.nodes[node].files.supply.is_off() => {
                self.ghost.superseded = [true; 2];
                return Ok(());
            }
            Err(why) => return Err(format!("the standby does not run: {why}")),
        };
        if retire.point() != point {
            return Err(format!("the disks are at {:?}, the standby at {point:?}", retire.point()));
        }
        disks.before_first_change(move || retire.run());
        let owner = Owner::new(disks, generation, point.epoch.0, true);
        self.nodes[node].process = Process::Owner(Box::new(owner));
        let image = self.nodes[node].files.image();
        self.ghost.goes_on(node, from, &image)
    }
}
