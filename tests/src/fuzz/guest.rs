//! What clients and the network can say to the two demo guests.

use std::collections::BTreeSet;
use std::sync::Arc;

use arbitrary::Unstructured;
use kv::resp::OutOfMemory;
use kv::{Args, Out, Outcome, Parsed, Session, Store};
use vmm::dirty::DirtyLedger;
use vmm::model::ProgramOptions;
use vmm::{GuestRam, ModelProgram, PageNo};

/// Answers for the demo guest's machine.
#[derive(Default)]
struct FakeMachine;

impl kv::Machine for FakeMachine {
    fn uptime_ms(&self) -> u64 {
        1
    }
    fn counters(&self, line: &mut dyn FnMut(&str, u64)) {
        line("frames", 7);
    }
    fn dirty(&mut self, _: u64, pages: Option<u64>) -> Result<(), OutOfMemory> {
        if pages.is_some_and(|pages| pages > 1000) { Err(OutOfMemory) } else { Ok(()) }
    }
    fn work(&mut self, _: bool) {}
    fn connected(&self) -> usize {
        1
    }
    fn heap_used(&self) -> usize {
        0
    }
    fn power_off(&mut self) {}
    fn crash(&mut self) {}
    fn disk(&mut self, _: u64, _: kv::DiskJob) -> Result<(), &'static str> {
        Err("ERR there is no disk")
    }
    fn disks(&self, line: &mut dyn FnMut(&str, u64)) {
        line("disks", 0);
    }
}

/// Target `resp`: what a client sends to the demo guest, in pieces.
///
/// A parser that wants more bytes wants more than it has; one that is content took no more than it had; a request reads the same
/// whole and in pieces.
pub fn resp(data: &[u8]) {
    let Some((&piece, data)) = data.split_first() else { return };
    let (mut store, mut machine, mut args, mut out) = (Store::new(1), FakeMachine, Args::new(), Out::new());
    let session = Session { id: 1 };
    let (mut at, mut end, mut wanted) = (0, 0, 1);
    while end < data.len() {
        end = (end + usize::from(piece).max(1)).min(data.len());
        store.set_now(u64::try_from(end).unwrap_or(0));
        loop {
            let buffer = &data[at..end];
            match kv::parse(buffer, &mut args) {
                Err(error) => {
                    assert!(error.message().is_ascii());
                    return;
                }
                Ok(Parsed::NeedsBytes(bytes)) => {
                    assert!(bytes > buffer.len(), "{bytes} are wanted, {} are there", buffer.len());
                    wanted = bytes;
                    break;
                }
                Ok(Parsed::Request(length)) => {
                    assert!(length > 0 && length <= buffer.len() && wanted <= buffer.len());
                    let before = out.bytes().len();
                    let outcome = kv::execute(&mut store, &mut machine, &session, buffer, &args, &mut out);
                    assert!(!out.failed() && (args.is_empty() || out.bytes().len() > before), "no reply");
                    assert!(out.bytes().ends_with(b"\r\n") || out.bytes().is_empty());
                    out.clear(1 << 16);
                    if outcome == Outcome::Close {
                        return;
                    }
                    (at, wanted) = (at + length, 1);
                }
            }
        }
    }
}

const US: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 9];
const OUR_IP: [u8; 4] = [10, 77, 0, 10];
const STEPS: usize = 80;

/// Target `model_frames`: frames to the model machine's program, sound and wrong ones; and its registers, captured and put back.
///
/// The program never crashes, its frames are whole, and a copy made of its memory and registers goes on as it does.
pub fn model_frames(data: &[u8]) {
    let mut client = Client::new();
    let mut input = Unstructured::new(data);
    for _ in 0..STEPS {
        if input.is_empty() || client.step(&mut input).is_err() || client.ended {
            break;
        }
    }
}

/// A client that knows TCP well enough to get through to the server, and to say anything there.
struct Client {
    program: ModelProgram,
    ledger: Arc<DirtyLedger>,
    written: BTreeSet<PageNo>,
    now: u64,
    port: u16,
    sequence: u32,
    acknowledged: u32,
    ended: bool,
}

fn program() -> ModelProgram {
    let ram = Arc::new(GuestRam::new(2 << 20).expect("2 MiB of memory"));
    let options = ProgramOptions { dirty_pages_per_second: 2, beacon_ms: 10, ..ProgramOptions::default() };
    let mut program = ModelProgram::new(ram, US, &options).expect("a program for 2 MiB");
    program.boot();
    program
}

impl Client {
    fn new() -> Self {
        let program = program();
        let ledger = DirtyLedger::new();
        Self {
            program,
            ledger,
            written: BTreeSet::new(),
            now: 0,
            port: 4000,
            sequence: 100,
            acknowledged: 0,
            ended: false,
        }
    }

    fn step(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        match input.int_in_range(0..=11u8)? {
            0 | 1 => self.say(2, &[]),
            2 => self.say(16, &[]),
            3..=5 => {
                let length = input.int_in_range(0..=200usize)?.min(input.len());
                let payload = input.bytes(length)?.to_vec();
                self.say(24, &payload);
                self.sequence = self.sequence.wrapping_add(u32::try_from(payload.len()).expect("at most 200"));
            }
            6 => {
                let flags: u8 = input.arbitrary()?;
                let length = input.int_in_range(0..=40usize)?.min(input.len());
                let payload = input.bytes(length)?.to_vec();
                self.say(flags, &payload);
            }
            7 => {
                let length = input.int_in_range(0..=100usize)?.min(input.len());
                let mut frame = input.bytes(length)?.to_vec();
                if input.arbitrary()? && frame.len() >= 14 {
                    frame[..6].copy_from_slice(&US);
                    frame[12..14].copy_from_slice(if input.arbitrary()? { &[8, 0] } else { &[8, 6] });
                }
                self.hear(&[frame]);
            }
            8 => {
                let (length, kind) = (input.int_in_range(0..=60usize)?.min(input.len()), input.arbitrary()?);
                let body = input.bytes(length)?.to_vec();
                self.hear(&[ipv4(kind, &body)]);
            }
            9 => self.port = 4000 + u16::from(input.arbitrary::<u8>()? % 4),
            10 => self.sequence = self.sequence.wrapping_add(input.arbitrary::<u32>()? >> input.int_in_range(0..=31)?),
            _ => {
                self.now += u64::from(input.arbitrary::<u32>()?) << input.int_in_range(0..=4)?;
                self.hear(&[]);
            }
        }
        if input.ratio(1, 60)? {
            self.twin();
        }
        Ok(())
    }

    fn say(&mut self, flags: u8, payload: &[u8]) {
        let mut segment = Vec::new();
        segment.extend(self.port.to_be_bytes());
        segment.extend(6379u16.to_be_bytes());
        segment.extend(self.sequence.to_be_bytes());
        segment.extend(self.acknowledged.to_be_bytes());
        segment.extend([0x50, flags, 0x20, 0, 0, 0, 0, 0]);
        segment.extend(payload);
        self.hear(&[ipv4(6, &segment)]);
    }

    fn hear(&mut self, frames: &[Vec<u8>]) {
        self.now += 1000;
        let step = self.program.step(self.now, frames);
        for frame in &step.frames {
            assert!(frame.len() >= 14 && frame.len() <= 1514, "a frame of {} bytes", frame.len());
            assert_eq!(frame[6..12], US);
            // The SYN and ACK of our handshake: from then on we know what to acknowledge.
            if frame.len() >= 54 && frame[12..14] == [8, 0] && frame[23] == 6 {
                let sequence = u32::from_be_bytes(frame[38..42].try_into().expect("4 bytes"));
                let length = u32::try_from(frame.len() - 54).unwrap_or(0);
                if frame[47] & 2 != 0 {
                    self.sequence = u32::from_be_bytes(frame[42..46].try_into().expect("4 bytes"));
                    self.acknowledged = sequence.wrapping_add(1);
                } else {
                    self.acknowledged = sequence.wrapping_add(length);
                }
            }
        }
        match step.end {
            None => {}
            // The store's own command; a client may ask for it.
            Some(vmm::model::End::PoweredOff) => self.ended = true,
            Some(vmm::model::End::Crashed(why)) if why.contains("crash") => self.ended = true,
            Some(vmm::model::End::Crashed(why)) => panic!("the guest crashed: {why}"),
        }
    }

    /// A second program that gets memory and registers of this one, and a step like this one's.
    fn twin(&mut self) {
        if self.ended {
            return;
        }
        let mut twin = program();
        // What was never written is zero in both.
        let written = self.program.take_dirty(&self.ledger);
        self.written.extend(written.iter());
        written.retire();
        for page in self.written.iter().copied() {
            let mut bytes = [0; vmm::PAGE_SIZE];
            self.program.ram().copy_out(page, &mut bytes).expect("a page of RAM");
            twin.ram().copy_in(page, &bytes).expect("a page of RAM");
        }
        twin.restore(&self.program.capture()).expect("a captured state");
        self.now += 1_000_000;
        let (one, two) = (self.program.step(self.now, &[]), twin.step(self.now, &[]));
        assert_eq!(one, two, "a copy goes on differently");
        assert_eq!(self.program.capture(), twin.capture());
    }
}

fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// A packet to the program whose checksums are right.
fn ipv4(protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut body = body.to_vec();
    let at = match protocol {
        1 if body.len() >= 4 => Some(2),
        6 if body.len() >= 18 => Some(16),
        _ => None,
    };
    let length = u16::try_from(body.len()).expect("short");
    let from = [10, 77, 0, 1];
    if let Some(at) = at {
        body[at..at + 2].fill(0);
        let pseudo = if protocol == 6 {
            [&from[..], &OUR_IP, &[0, protocol], &length.to_be_bytes()].concat()
        } else {
            Vec::new()
        };
        let checksum = internet_checksum(&[pseudo, body.clone()].concat());
        body[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    }
    let mut header = vec![0x45, 0];
    header.extend((20 + length).to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    header.extend(from);
    header.extend(OUR_IP);
    let checksum = internet_checksum(&header);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    [&US[..], &PEER, &[8, 0], &header, &body].concat()
}
