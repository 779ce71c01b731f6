//! The simulated machine: real guest memory, the real dirty ledger, and a tiny program whose whole history is folded into one number. It
//! writes memory, answers clients' requests, and says things on the network; it never depends on time except through what it is told.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, never};
use vm_memory::{Bytes, GuestAddress};
use vmm::disk::{ByteRange, Disk};
use vmm::hot::{KeptLog, Tracking};
use vmm::machine::{
    BootError, CaptureError, DirtyError, MachineEvent, PauseError, RestoreError, RunError, StopTimings, ThrottleError,
};
use vmm::pause::Stopped;
use vmm::{
    ClockPolicy, DirtyLedger, DirtySet, Fact, GuestRam, Machine, Outputs, PAGE_SIZE, Section, SectionKind, Throttle,
};

use super::on_write::Watch;
use crate::real::rng::mix;

/// Pages of memory: one word of every bitmap.
pub const PAGES: usize = 64;
/// The same, as a page number.
const PAGE_END: u64 = 64;
/// Clients that the guest knows.
pub const CLIENTS: usize = 2;
/// First page that the program scribbles on; the one before holds its state and what a capture writes.
const SCRATCH: u64 = 1;
/// Where the program's state is.
const STATE: u64 = 0;
/// Written by every capture, as steal time is.
const CAPTURES: u64 = 0x800;
/// Processor time for each page that it writes, and for doing anything.
const WORK: Duration = Duration::from_micros(100);
const VERSION: u16 = 1;

/// What the guest is, but for its memory: lives in page 0, and a copy of it in the section, as registers would.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// Which boot this is.
    pub boot: u64,
    /// Steps since the boot.
    pub step: u64,
    /// Everything that ever happened to this guest, folded into one number.
    pub history: u64,
    /// The last request of each client that was carried out.
    pub done: [u64; CLIENTS],
    /// What it is at with its disk, if it has one.
    pub disk: Option<DiskRegisters>,
}

/// What the guest is at with its disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskRegisters {
    /// The request that is not completed, and all that it is about; 0: none.
    pub request: u64,
    /// Changes that were completed.
    pub writes: u64,
    /// … and how many of them when a flush was completed last,
    pub flushed: u64,
    /// which was this request.
    pub promise: u64,
}

/// What the guest says: a frame's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Utterance {
    /// The client that it answers; over the last one: nobody's business.
    pub client: u64,
    /// The guest's state when it said it.
    pub registers: Registers,
}

/// Words of the registers without a disk, and with one.
const WORDS: usize = 3 + CLIENTS;
const WORDS_MAX: usize = WORDS + 4;

impl Registers {
    fn words(&self) -> ([u64; WORDS_MAX], usize) {
        let mut words = [0; WORDS_MAX];
        [words[0], words[1], words[2]] = [self.boot, self.step, self.history];
        words[3..WORDS].copy_from_slice(&self.done);
        let Some(DiskRegisters { request, writes, flushed, promise }) = self.disk else { return (words, WORDS) };
        words[WORDS..].copy_from_slice(&[request, writes, flushed, promise]);
        (words, WORDS_MAX)
    }

    fn of(words: &[u64]) -> Self {
        let mut done = [0; CLIENTS];
        done.copy_from_slice(&words[3..WORDS]);
        let disk = match words[WORDS..] {
            [request, writes, flushed, promise] => Some(DiskRegisters { request, writes, flushed, promise }),
            _ => None,
        };
        Self { boot: words[0], step: words[1], history: words[2], done, disk }
    }
}

impl Utterance {
    fn encode(&self) -> Vec<u8> {
        let (words, count) = self.registers.words();
        std::iter::once(self.client).chain(words).take(1 + count).flat_map(u64::to_le_bytes).collect()
    }

    /// Reads a frame of this guest.
    ///
    /// # Panics
    /// On any other frame: nobody else speaks on a simulated LAN.
    pub fn decode(frame: &[u8]) -> Self {
        let words: Vec<u64> = frame.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        let whole = [WORDS, WORDS_MAX].contains(&(words.len() - 1)) && frame.len() == words.len() * 8;
        assert!(whole, "a frame of the simulated guest");
        Self { client: words[0], registers: Registers::of(&words[1..]) }
    }
}

/// Bytes of a piece of the disk: what the guest changes at a time.
pub const PIECE_BYTES: u64 = 4096;
/// Pieces of the disk: 16 blocks of a dirty map.
pub const PIECES: u64 = 256;

/// What the guest asks of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill a piece with the request's number.
    Write(u64),
    /// Fill it with zeroes.
    Zero(u64),
    /// Everything that was completed is on stable storage.
    Flush,
}

impl Request {
    /// The meaning of a request's number. The guest works in one corner of its disk for a while, so that others become quiet.
    fn of(request: u64, writes: u64) -> Self {
        let block = (writes / 24 + (request >> 8) % 2) % 16;
        let piece = block * 16 + (request >> 16) % 16;
        match (request >> 32) % 10 {
            0 | 1 => Self::Flush,
            2 => Self::Zero(piece),
            _ => Self::Write(piece),
        }
    }

    fn range(self) -> Option<ByteRange> {
        match self {
            Self::Write(piece) | Self::Zero(piece) => Some(ByteRange { offset: piece * PIECE_BYTES, len: PIECE_BYTES }),
            Self::Flush => None,
        }
    }
}

/// A piece that is full of one number.
pub fn stamped(stamp: u64) -> Vec<u8> {
    stamp.to_le_bytes().repeat(512)
}

/// A client's request to the `boot`-th guest, as a frame. Any other guest only answers who it is, as a host resets a connection that it does not
/// know: numbers begin anew with each of them.
pub fn request(client: usize, boot: u64, number: u64) -> Vec<u8> {
    [u64::try_from(client).expect("few clients"), boot, number].map(u64::to_le_bytes).concat()
}

/// The machine.
pub struct SimMachine {
    ram: Arc<GuestRam>,
    ledger: Arc<DirtyLedger>,
    log: KeptLog,
    outputs: Arc<dyn Outputs>,
    skew: u64,
    ready: bool,
    running: bool,
    registers: Registers,
    waiting: VecDeque<Vec<u8>>,
    /// Pages written since the last call of [`SimMachine::take_touched`], by whomever: the checkers' own record.
    touched: u64,
    /// Processor time that it has used.
    ran: Duration,
    disk: Option<Arc<dyn Disk>>,
    /// What must be durable before the request that is not completed begins is so.
    announced: bool,
    throttle: Throttle,
    /// Asked before each write.
    watch: Watch,
}

impl SimMachine {
    /// A machine that never ran. `skew`: machines of different skews are not the same machine.
    ///
    /// # Panics
    /// When the host has no memory.
    pub fn build(outputs: Arc<dyn Outputs>, skew: u64, disk: Option<Arc<dyn Disk>>) -> Self {
        let ram = Arc::new(GuestRam::tiny(1).expect("256 KiB of memory"));
        let ledger = DirtyLedger::new();
        Self {
            ram,
            ledger,
            log: KeptLog::default(),
            outputs,
            skew,
            ready: false,
            running: false,
            registers: Registers::default(),
            waiting: VecDeque::new(),
            touched: 0,
            ran: Duration::ZERO,
            disk,
            announced: false,
            throttle: Throttle::NONE,
            watch: Watch::default(),
        }
    }

    /// Knows which pages may not be written before they are copied.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Makes it the `boot`-th guest of this world.
    pub fn boot(&mut self, boot: u64) {
        let disk = self.disk.as_ref().map(|_| DiskRegisters::default());
        self.registers = Registers { boot, history: mix(boot), disk, ..Registers::default() };
        self.ready = true;
        self.store();
    }

    /// Whether guest code may execute now.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// The guest's registers.
    pub fn registers(&self) -> Registers {
        self.registers
    }

    /// The pages written since the last call, one bit each, by the guest or around it.
    pub fn take_touched(&mut self) -> u64 {
        std::mem::take(&mut self.touched)
    }

    /// The content of a page, hashed.
    pub fn page_hash(&self, page: usize) -> u64 {
        let mut bytes = [0; PAGE_SIZE];
        let number = vmm::PageNo(u64::try_from(page).expect("a small number"));
        self.ram.copy_out(number, &mut bytes).expect("a page of this machine");
        xxhash_rust::xxh3::xxh3_64(&bytes)
    }

    /// Processor time that the guest has used: as much for each page as a host takes that logs writes.
    pub fn ran(&self) -> Duration {
        self.ran
    }

    /// How much it is slowed.
    pub fn throttle_in_force(&self) -> Throttle {
        self.throttle
    }

    /// The guest runs for a moment, and as much less as it is slowed: writes `pages` pages and perhaps says something.
    ///
    /// # Panics
    /// When it is not running.
    pub fn work(&mut self, pages: u64, speaks: bool) {
        assert!(self.running, "a stopped guest does nothing");
        while let Some(frame) = self.waiting.pop_front() {
            self.take_frame(&frame);
        }
        let pages = pages * u64::from(100 - self.throttle.as_percent()) / 100;
        self.ran += WORK * u32::try_from(pages + 1).expect("few pages");
        for n in 0..pages {
            self.turn(mix(self.registers.history ^ n));
            let page = SCRATCH + self.registers.history % (PAGE_END - SCRATCH);
            let offset = (self.registers.history >> 32) % 512 * 8;
            self.write(page * 4096 + offset, self.registers.history);
        }
        self.store();
        if speaks {
            self.say(CLIENTS);
        }
    }

    /// The guest's disk driver queues a request when none is there; otherwise the device carries on with the one that is. `None`: the guest does
    /// not run, or has no disk.
    pub fn next_request(&mut self) -> Option<(Request, u64)> {
        let DiskRegisters { request, writes, .. } = self.registers.disk.filter(|_| self.running)?;
        if request != 0 {
            return Some((Request::of(request, writes), request));
        }
        self.turn(11);
        let request = self.registers.history | 1;
        self.set_disk(|disk| disk.request = request);
        Some((Request::of(request, writes), request))
    }

    /// What must be durable before the request begins, becomes so. True: it is so already, and the request may begin.
    ///
    /// # Errors
    /// The disk's.
    pub fn announce(&mut self, request: Request) -> io::Result<bool> {
        if std::mem::replace(&mut self.announced, true) {
            return Ok(true);
        }
        match (&self.disk, request.range()) {
            (Some(disk), Some(range)) => disk.announce(range).map(|()| false),
            _ => Ok(true),
        }
    }

    /// The device does what the request wants.
    ///
    /// # Errors
    /// The disk's.
    pub fn carry_out(&mut self, request: Request, stamp: u64) -> io::Result<()> {
        let Some(disk) = &self.disk else { return Ok(()) };
        match request {
            Request::Write(piece) => disk.write(piece * PIECE_BYTES, &stamped(stamp)),
            Request::Zero(piece) => disk.discard(ByteRange { offset: piece * PIECE_BYTES, len: PIECE_BYTES }),
            Request::Flush => disk.flush(),
        }
    }

    /// The request is completed, well or not: the guest is told, and sometimes tells the world.
    pub fn complete(&mut self, request: Request, well: bool) {
        self.announced = false;
        self.turn(if well { 13 } else { 17 });
        self.set_disk(|disk| {
            let DiskRegisters { request: pending, writes, flushed, promise } = disk;
            match request {
                Request::Flush if well => (*flushed, *promise) = (*writes, *pending),
                Request::Flush => {}
                Request::Write(_) | Request::Zero(_) => *writes += 1,
            }
            *pending = 0;
        });
        if request == Request::Flush {
            self.say(CLIENTS);
        }
    }

    fn set_disk(&mut self, change: impl FnOnce(&mut DiskRegisters)) {
        if let Some(disk) = &mut self.registers.disk {
            change(disk);
        }
        self.store();
    }

    /// A frame reached the guest's network device.
    pub fn receive(&mut self, frame: &[u8]) {
        if self.running {
            self.take_frame(frame);
            self.store();
        } else {
            self.waiting.push_back(frame.to_vec());
        }
    }

    fn take_frame(&mut self, frame: &[u8]) {
        let words: Vec<u64> = frame.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        let [client, boot, number] = words[..] else { return };
        let Some(at) = usize::try_from(client).ok().filter(|at| *at < CLIENTS) else { return };
        if boot == self.registers.boot && number == self.registers.done[at] + 1 {
            self.registers.done[at] = number;
            self.turn(mix(client ^ number.rotate_left(17)));
            self.write(0x400 + client * 8, number);
        }
        self.store();
        self.say(at);
    }

    fn words(&self) -> usize {
        if self.disk.is_some() { WORDS_MAX } else { WORDS }
    }

    fn turn(&mut self, with: u64) {
        self.registers.step += 1;
        self.registers.history = mix(self.registers.history ^ with.rotate_left(9));
    }

    fn say(&mut self, client: usize) {
        self.turn(7);
        self.store();
        let client = u64::try_from(client).expect("few clients");
        self.outputs.frame(0, &Utterance { client, registers: self.registers }.encode());
    }

    fn store(&mut self) {
        let (words, count) = self.registers.words();
        for (at, word) in (0u64..).zip(&words[..count]) {
            self.write(STATE + at * 8, *word);
        }
    }

    fn write(&mut self, address: u64, value: u64) {
        self.watch.writes(&self.ram, vmm::PageNo(address / 4096));
        self.touched |= 1 << (address / 4096);
        self.ram.tracked().write_obj(value, GuestAddress(address)).expect("an address of this machine");
    }

    fn read(&self, address: u64) -> u64 {
        self.ram.tracked().read_obj(GuestAddress(address)).expect("an address of this machine")
    }
}

impl Machine for SimMachine {
    fn facts(&self) -> Vec<Fact> {
        vec![Fact { name: "sim.skew".into(), value: self.skew.to_string() }]
    }

    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    fn ledger(&self) -> &Arc<DirtyLedger> {
        &self.ledger
    }

    fn load(&mut self) -> Result<(), BootError> {
        self.boot(0);
        Ok(())
    }

    fn restore(&mut self, sections: &[Section], _clock: ClockPolicy) -> Result<(), RestoreError> {
        let [section] = sections else {
            return Err(sections
                .get(1)
                .map_or(RestoreError::Missing(SectionKind::MODEL), |s| RestoreError::Unexpected(s.kind)));
        };
        let words: Vec<u64> = section.bytes.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        if section.kind != SectionKind::MODEL || section.version != VERSION || words.len() != self.words() {
            return Err(RestoreError::Unexpected(section.kind));
        }
        self.registers = Registers::of(&words);
        self.ready = true;
        Ok(())
    }

    fn queue_inbound(&mut self, nic: u8, frames: Vec<Vec<u8>>) {
        assert_eq!(nic, 0, "one network device");
        self.waiting.extend(frames);
    }

    fn run(&mut self) -> Result<(), RunError> {
        if !self.ready {
            return Err(RunError::Hollow);
        }
        self.running = true;
        Ok(())
    }

    fn track_dirty(&mut self, tracking: Tracking) -> Result<(), DirtyError> {
        if tracking != Tracking::Off {
            self.ram.take_own_writes();
            self.ledger.clear();
        }
        self.log.begin(tracking);
        Ok(())
    }

    fn take_dirty(&mut self) -> Result<DirtySet, DirtyError> {
        Ok(self.ledger.take(self.log.take(self.ram.take_own_writes())))
    }

    fn share_work(&self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..pieces).for_each(work);
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<(), ThrottleError> {
        self.throttle = throttle;
        Ok(())
    }

    fn take_cold_dirty(&mut self) -> Result<DirtySet, DirtyError> {
        Ok(self.ledger.take(self.log.take_cold(self.ram.take_own_writes())))
    }

    fn events(&self) -> Receiver<MachineEvent> {
        never()
    }

    fn stop(&mut self, _token: &Stopped) -> Result<StopTimings, PauseError> {
        self.running = false;
        Ok(StopTimings::default())
    }

    fn capture(&mut self, _token: &Stopped) -> Result<Vec<Section>, CaptureError> {
        let captures = self.read(CAPTURES) + 1;
        self.write(CAPTURES, captures);
        let (words, count) = self.registers.words();
        let same = |(at, word): (u64, &u64)| self.read(STATE + at * 8) == *word;
        if !(0u64..).zip(&words[..count]).all(same) {
            let source = io::Error::other("the guest's memory is not that of its registers");
            return Err(CaptureError::Host { what: "registers".into(), source });
        }
        let bytes = words[..count].iter().flat_map(|w| w.to_le_bytes()).collect();
        Ok(vec![Section { kind: SectionKind::MODEL, version: VERSION, bytes }])
    }

    fn shut_down(&mut self) {
        self.running = false;
        self.ready = false;
    }
}
