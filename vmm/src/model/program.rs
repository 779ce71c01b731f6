//! The program: one step at a time, without thread, clock or randomness of its own.

use std::sync::Arc;

use super::bus::{Bus, Fault};
use super::commands::{self, Call};
use super::disks::{Announcement, DiskFailure, Disks};
use super::layout::Layout;
use super::log;
use super::options::ProgramOptions;
use super::registers::{LAST_TIME, LogPhase, Registers, count};
use super::resp::Reply;
use super::server;
use super::store::Store;
use super::tcb::Table;
use super::tcp::Tcp;
use super::wire::{self, Packet, Station};
use crate::dirty::{DirtyLedger, DirtySet};
use crate::disk::Disk;
use crate::machine::RestoreError;
use crate::memory::{GuestRam, PAGE_SIZE};
use crate::section::{Section, SectionKind};
use crate::state::codec::Saved;

const SECOND: u64 = 1_000_000_000;
/// Most pages that the load dirties in one step; what it missed while nobody ran it is not made up for.
const LOAD_PER_STEP: u64 = 8192;
/// Shortest sleep of the load in nanoseconds: touches come in bursts of a millisecond's worth.
const LOAD_NAP: u64 = 1_000_000;
/// Port of the beacon, source and target.
const BEACON_PORT: u16 = 6380;

/// Why the program cannot be put on this machine.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The working set is larger than the pages that there are for it.
    #[error("a working set of {wanted} pages does not fit: this much RAM has {available} pages for it")]
    WorkingSet {
        /// As configured.
        wanted: u64,
        /// A quarter of RAM.
        available: u64,
    },
    /// There is nothing to keep a log on.
    #[error("disklog=1 needs a disk that may be changed")]
    NoLogDisk,
}

/// How the program can end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It switched the machine off.
    PoweredOff,
    /// It cannot go on, and why.
    Crashed(String),
}

/// What one step brought out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Ethernet frames sent, in order, all on network device 0.
    pub frames: Vec<Vec<u8>>,
    /// Bytes written to the console.
    pub console: Vec<u8>,
    /// Guest time in nanoseconds of the next step that is due without any frame; `None` if only a frame can wake it.
    pub wake_at: Option<u64>,
    /// Changes of disks for [`ModelProgram::announced`], after which another step is due at once.
    pub announce: Vec<Announcement>,
    /// The program ended in this step: it makes no other.
    pub end: Option<End>,
}

/// The guest program of the model machine. Its state is guest RAM and its registers, nothing else: two programs that agree in
/// both, and get the same times and frames and the same of their disks, agree for ever.
#[derive(Debug)]
pub struct ModelProgram {
    ram: Arc<GuestRam>,
    layout: Layout,
    us: Station,
    port: u16,
    boot: Registers,
    registers: Registers,
    disks: Disks,
}

impl ModelProgram {
    /// A program for this RAM, whose contents it does not touch yet. `mac` is its address on network device 0.
    pub fn new(ram: Arc<GuestRam>, mac: [u8; 6], options: &ProgramOptions) -> Result<Self, ProgramError> {
        let layout = Layout::of(&ram);
        match options.working_set_pages {
            Some(wanted) if wanted > layout.load_pages => {
                return Err(ProgramError::WorkingSet { wanted, available: layout.load_pages });
            }
            _ => {}
        }
        let boot = Registers::boot(options, &layout);
        let us = Station { mac, ip: options.ip };
        Ok(Self { ram, layout, us, port: options.port, registers: boot.clone(), boot, disks: Disks::default() })
    }

    /// With these disks.
    ///
    /// # Errors
    /// [`ProgramError::NoLogDisk`] when the options ask for a log and the first disk cannot take it.
    pub fn with_disks(mut self, disks: Vec<Arc<dyn Disk>>) -> Result<Self, ProgramError> {
        self.disks = Disks::new(disks);
        if self.boot.log.on && log::capacity(&self.disks).is_none() {
            return Err(ProgramError::NoLogDisk);
        }
        Ok(self)
    }

    /// Says how an announcement that a step wanted went, after [`Disk::announce`] was called outside of any step.
    pub fn announced(&mut self, what: Announcement, result: &std::io::Result<()>) {
        self.disks.announced(what, result.is_ok());
    }

    /// Announces what a step wanted, for who runs the program on one thread and can wait.
    pub fn announce(&mut self, wanted: &[Announcement]) {
        for what in wanted {
            if let Some(disk) = self.disks.get(what.disk) {
                let result = disk.announce(what.range);
                self.announced(*what, &result);
            }
        }
    }

    /// Puts the program into the state of a machine that was just switched on. RAM is all zeroes.
    pub fn boot(&mut self) {
        self.registers = self.boot.clone();
        self.disks.forget();
    }

    /// Guest time in nanoseconds: that of the last step or [`ModelProgram::pass_time`].
    pub fn now(&self) -> u64 {
        self.registers.now
    }

    /// Guest RAM.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The pages written since the last call, united with what was given back to `ledger`, which belongs to the same RAM.
    pub fn take_dirty(&self, ledger: &Arc<DirtyLedger>) -> DirtySet {
        ledger.take(self.ram.take_own_writes())
    }

    /// The registers, as the one section of this machine.
    pub fn capture(&self) -> Section {
        self.registers.to_section(SectionKind::MODEL)
    }

    /// Takes over captured registers. On an error nothing has changed.
    pub fn restore(&mut self, section: &Section) -> Result<(), RestoreError> {
        if section.kind != SectionKind::MODEL {
            return Err(RestoreError::Unexpected(section.kind));
        }
        let registers = Registers::from_section(section)?;
        registers.validate(&self.layout, log::capacity(&self.disks)).map_err(|e| e.of(section.kind))?;
        self.registers = registers;
        self.disks.forget();
        Ok(())
    }

    /// Moves guest time to `now` in nanoseconds and does nothing else: the program slept until then, and is about to be
    /// captured. An earlier time than that of the last step changes nothing.
    pub fn pass_time(&mut self, now: u64) {
        self.registers.now = self.registers.now.max(now.min(LAST_TIME));
    }

    /// The program was kept from running for so many nanoseconds until now: its background load, which takes a processor's time, does not make up for them.
    pub fn stood_still(&mut self, nanoseconds: u64) {
        let Registers { now, load, .. } = &mut self.registers;
        load.since = load.since.saturating_add(nanoseconds).min(*now);
    }

    /// Runs the program once: `inbound` are the Ethernet frames that arrived, `now` is guest time in nanoseconds (an earlier
    /// time than that of the last step counts as that one: guest time never runs backwards).
    pub fn step(&mut self, now: u64, inbound: &[Vec<u8>]) -> Step {
        self.pass_time(now);
        let mut step = Step::default();
        if let Err(Fault(reason)) = self.try_step(inbound, &mut step) {
            step.end = Some(End::Crashed(reason.into()));
        }
        count(&mut self.registers.frames_out, step.frames.len() as u64);
        step.announce = self.disks.take_wanted();
        step
    }

    fn try_step(&mut self, inbound: &[Vec<u8>], step: &mut Step) -> Result<(), Fault> {
        let Self { ram, layout, us, port, boot: _, registers, disks } = self;
        let bus = Bus(ram.tracked());
        if !registers.greeted {
            let [a, b, c, d] = us.ip;
            step.console.extend_from_slice(format!("model ready {a}.{b}.{c}.{d}:{port}\n").as_bytes());
            registers.greeted = true;
        }
        let mut table = Table::load(bus, layout)?;
        let mut tcp = Tcp { bus, layout, us: *us, port: *port, table: &mut table, frames: &mut step.frames };
        for frame in inbound {
            count(&mut registers.frames_in, 1);
            match wire::parse(frame, *us) {
                Some(Packet::ArpRequest(from)) => tcp.frames.push(wire::arp_reply(*us, from)),
                Some(Packet::Echo(from, message)) => tcp.frames.push(wire::echo_reply(*us, from, message)),
                Some(Packet::Tcp(from, segment)) => tcp.segment(registers, from, &segment)?,
                None => {}
            }
        }
        tcp.timers(registers.now)?;
        if open_log(bus, layout, registers, disks)? {
            step.end = server::serve(bus, layout, registers, disks, tcp.table)?;
        }
        for slot in 0..layout.connections {
            tcp.output(slot, registers.now)?;
        }
        table.store(bus)?;
        let load = run_load(bus, layout, registers)?;
        let beacon = run_beacon(*us, registers, &mut step.frames);
        let timers = table.tcbs.iter().filter(|t| t.timer != 0).map(|t| t.timer).min();
        step.wake_at = [load, beacon, timers].into_iter().flatten().min();
        Ok(())
    }
}

/// Gets the log ready, if there is one; false when that is not done yet.
pub(super) fn open_log(
    bus: Bus<'_>,
    layout: &Layout,
    registers: &mut Registers,
    disks: &mut Disks,
) -> Result<bool, Fault> {
    if !registers.log.on {
        return Ok(true);
    }
    if registers.log.phase == LogPhase::Replay {
        registers.log.phase = LogPhase::Cut;
        let store = Store::open(bus, layout)?;
        loop {
            let arguments = match log::next(&mut registers.log, disks) {
                Ok(Some(arguments)) => arguments,
                Ok(None) => break,
                Err(_) => {
                    registers.log.phase = LogPhase::Broken;
                    break;
                }
            };
            let arguments: Vec<&[u8]> = arguments.iter().map(Vec::as_slice).collect();
            let (store, arguments) = (&store, &arguments[..]);
            let (reply, end) = (&mut Reply::default(), &mut None);
            commands::replay(Call { store, registers, disks, layout, slot: 0, connected: 0, arguments, reply, end })?;
        }
    }
    if registers.log.phase == LogPhase::Cut {
        match log::cut(&mut registers.log, disks) {
            Ok(()) => {}
            Err(DiskFailure::Wait) => return Ok(false),
            Err(DiskFailure::Io) => registers.log.phase = LogPhase::Broken,
        }
    }
    Ok(true)
}

/// Writes to the pages that are due and says when the next ones are.
fn run_load(bus: Bus<'_>, layout: &Layout, registers: &mut Registers) -> Result<Option<u64>, Fault> {
    if registers.load.rate == 0 {
        return Ok(None);
    }
    let elapsed = registers.now - registers.load.since;
    let due_in_all = u128::from(elapsed) * u128::from(registers.load.rate) / u128::from(SECOND);
    let due = u64::try_from(due_in_all).unwrap_or(u64::MAX).saturating_sub(registers.load.done);
    let touches = due.min(LOAD_PER_STEP);
    for _ in 0..touches {
        let value = registers.random();
        let load = &mut registers.load;
        let page = load.touches % load.pages;
        let word = value % (PAGE_SIZE as u64 / 8);
        bus.put_u64(layout.load + page * PAGE_SIZE as u64 + word * 8, value)?;
        count(&mut load.touches, 1);
    }
    count(&mut registers.load.done, touches);
    if touches < due {
        registers.load.since = registers.now;
        registers.load.done = 0;
    }
    Ok(Some(registers.now + LOAD_NAP.max(SECOND / registers.load.rate)))
}

/// Broadcasts when it is time and says when the next time is.
fn run_beacon(us: Station, registers: &mut Registers, frames: &mut Vec<Vec<u8>>) -> Option<u64> {
    if registers.beacon.every == 0 {
        return None;
    }
    if registers.now >= registers.beacon.next {
        let (number, now, random) = (registers.beacon.number, registers.now, registers.random());
        let mut payload = b"beacon\0\0".to_vec();
        for value in [number, now, random] {
            payload.extend_from_slice(&value.to_le_bytes());
        }
        frames.push(wire::broadcast(us, BEACON_PORT, &payload));
        count(&mut registers.beacon.number, 1);
        // Counted from now: after a long stop there is one beacon and not one for each that was missed.
        registers.beacon.next = now + registers.beacon.every;
    }
    Some(registers.beacon.next)
}
