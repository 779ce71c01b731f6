//! What a checkpoint of 1000 pages costs on each side, beside a plain copy of the same bytes in the same run.

#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock that the crate itself does not have")]
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on panics")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use bytes::Bytes;
use replication_proto::limits::PAGE_BYTES;
use replication_proto::{
    CheckpointKind, Epoch, EpochDigest, Facts, Generation, Identity, Incarnation, NodeName, PageIndex, PageRange,
    RamLayout, Receiver, ReceiverConfig, ReceiverEvent, ReceiverLimits, Sender, SenderConfig, Standing, VmId,
};

const PAGES: usize = 1000;
const ROUNDS: usize = 300;

fn identity(node: &str, incarnation: u128) -> Identity {
    let node = NodeName::new(node).unwrap();
    Identity { vm: VmId(1), node, generation: Generation(1), incarnation: Incarnation(incarnation) }
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |part: usize| times[times.len() * part / 100].as_micros();
    println!("{what:<34} p50 {:>6} us   p99 {:>6} us", at(50), at(99));
}

fn drain(sender: &mut Sender, wire: &mut Vec<Bytes>) {
    wire.clear();
    while let Some(bytes) = sender.poll_transmit() {
        wire.push(bytes);
    }
}

fn receive(receiver: &mut Receiver, wire: &[u8], digest: bool) {
    let mut sum = None;
    for piece in wire.chunks(256 << 10) {
        receiver.handle_bytes(piece).unwrap();
        while let Some(event) = receiver.poll_event().unwrap() {
            match event {
                ReceiverEvent::Begin { epoch, kind } => sum = Some(EpochDigest::new(epoch, kind)),
                ReceiverEvent::Pages { indexes, bytes } if digest => sum.as_mut().unwrap().pages(&indexes, &bytes),
                ReceiverEvent::End(end) => {
                    assert!(!digest || sum.take().unwrap().finish() == end.digest);
                    receiver.ack(end.epoch).unwrap();
                }
                other => drop(black_box(other)),
            }
        }
    }
}

/// Bytes that look random and are the same each time.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1u64;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        })
        .collect()
}

fn main() {
    let pages = u64::try_from(PAGES).unwrap();
    let ram = RamLayout::new(vec![PageRange { first: PageIndex(0), pages }]).unwrap();
    let facts = Facts::new();
    let config = SenderConfig {
        identity: identity("a", 1),
        ram: ram.clone(),
        disks: Vec::new(),
        facts: facts.clone(),
        max_in_flight: 1,
        compress_base: false,
        patches: false,
    };
    let limits = ReceiverLimits { max_epoch_pages: pages, max_epoch_section_bytes: 1 << 20, max_epoch_disk_bytes: 0 };
    let mut sender = Sender::new(config);
    let mut receiver = Receiver::new(ReceiverConfig {
        identity: identity("b", 2),
        ram,
        disks: Vec::new(),
        standing: Standing::default(),
        facts,
        limits,
    });
    // Every other page, as after a checkpoint of a real guest: runs are short.
    let indexes: Vec<PageIndex> =
        (0..pages / 2).map(|n| PageIndex(2 * n)).chain((0..pages / 2).map(|n| PageIndex(2 * n + 1))).collect();
    let memory = noise(PAGES * PAGE_BYTES);
    let shared = Bytes::from(memory.clone());
    let mut copy_target = vec![1; memory.len()];
    let mut wire = Vec::new();
    let mut times = [const { Vec::new() }; 6];
    drain(&mut sender, &mut wire);
    for round in 0..ROUNDS {
        let start = Instant::now();
        black_box(&mut copy_target).copy_from_slice(black_box(&memory));
        times[0].push(start.elapsed());
        let epoch = Epoch(1 + u64::try_from(round).unwrap());
        if round == 0 {
            receive(&mut receiver, &wire.concat(), true);
            sender.handle_bytes(&receiver.poll_transmit().unwrap()).unwrap();
        }
        let start = Instant::now();
        sender.begin(epoch, if round == 0 { CheckpointKind::Base } else { CheckpointKind::Delta }).unwrap();
        if round % 2 == 0 {
            sender.pages(&indexes, &memory).unwrap();
        } else {
            sender.pages_shared(&indexes, &shared).unwrap();
        }
        sender.end(false).unwrap();
        drain(&mut sender, &mut wire);
        times[1 + round % 2].push(start.elapsed());
        let stream = wire.concat();
        let start = Instant::now();
        receive(&mut receiver, &stream, true);
        times[3].push(start.elapsed());
        sender.handle_bytes(&receiver.poll_transmit().unwrap()).unwrap();
        let start = Instant::now();
        let mut digest = EpochDigest::new(epoch, CheckpointKind::Delta);
        digest.pages(&indexes, &memory);
        black_box(digest.finish());
        times[4].push(start.elapsed());
        let start = Instant::now();
        black_box(crc32fast::hash(black_box(&memory)));
        times[5].push(start.elapsed());
    }
    println!("1000 pages, 4,096,000 bytes");
    let names =
        ["plain copy", "send, copying", "send, shared", "receive, with digest", "of it: digest", "of it: checksum"];
    names.into_iter().zip(times).for_each(|(name, times)| report(name, times));
}
