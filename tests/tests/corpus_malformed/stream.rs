//! The protocol's families: what a primary says to a backup, what a backup answers, heartbeats.

use core::time::Duration;

use replication_proto::limits::{HEADER_BYTES, MAX_INPUT_BYTES, MAX_PAYLOAD_BYTES, PAGE_BYTES};
use replication_proto::{CheckpointKind, Epoch, LinkError, Pulse, Receiver, Sender, SenderEvent};

use crate::support::{
    self, ACK, Backup, END, Forge, GOODBYE, INBOUND, PAGES, SECTION, Session, frame_starts, receiver_config,
    sender_config,
};

/// Values at the edges of lengths and counts; each is written as 16, 32 and 64 bits.
const EDGES: [u64; 14] = [
    0,
    1,
    63,
    64,
    65,
    (1 << 20) - 1,
    1 << 20,
    (1 << 20) + 1,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 63,
    u64::MAX,
];

fn sessions() -> [Session; 2] {
    [support::session(false), support::session(true)]
}

/// The frames of a stream.
fn frames(stream: &[u8]) -> Vec<&[u8]> {
    frame_starts(stream).windows(2).map(|ends| &stream[ends[0]..ends[1]]).collect()
}

/// How many checkpoints end in the first `bytes` bytes.
fn whole_epochs(stream: &[u8], bytes: usize) -> usize {
    let ends = |start: usize| stream[start + 10] == END;
    frame_starts(stream).windows(2).filter(|frame| ends(frame[0]) && frame[1] <= bytes).count()
}

/// Makes length and checksums of a frame right.
fn seal(frame: &mut [u8]) {
    let length = u32::try_from(frame.len() - HEADER_BYTES).unwrap().to_le_bytes();
    frame[12..16].copy_from_slice(&length);
    seal_checksums(frame);
}

fn seal_checksums(frame: &mut [u8]) {
    let payload = crc32fast::hash(&frame[HEADER_BYTES..]).to_le_bytes();
    frame[16..20].copy_from_slice(&payload);
    let header = crc32fast::hash(&frame[8..HEADER_BYTES]).to_le_bytes();
    frame[4..8].copy_from_slice(&header);
}

/// Gives a backup `stream`; it holds a checkpoint of the session, whole, and could be promoted at it; an error is for ever.
/// How many checkpoints it committed, and what it said.
fn hear(session: &Session, stream: &[u8], at_most: usize) -> (usize, Result<(), LinkError>) {
    let mut backup = Backup::new(receiver_config());
    let result = backup.feed(stream, MAX_INPUT_BYTES).and_then(|()| backup.receiver.handle_eof());
    let committed = backup.committed.len();
    assert!(committed <= at_most, "{committed} commits, {at_most} were earned");
    assert!(backup.committed.iter().map(|end| &end.epoch).eq(&session.epochs[..committed]));
    match committed.checked_sub(1) {
        None => assert!(backup.memory.iter().all(|byte| *byte == 0xEE), "memory was touched before a commit"),
        Some(last) => assert!(backup.memory == session.memory_after[last], "memory is not that of the commit"),
    }
    if let Err(error) = &result {
        assert!(!error.code().is_empty());
        assert_eq!(backup.receiver.poll_event().as_ref(), Err(error), "an error is for ever");
        assert_eq!(backup.receiver.ack(Epoch(8)).as_ref(), Err(error));
    }
    (committed, result)
}

pub(crate) fn ends() -> usize {
    let mut cases = 0;
    for session in sessions() {
        let stream = &session.to_backup;
        let starts = frame_starts(stream);
        for cut in 0..=stream.len() {
            let (committed, result) = hear(&session, &stream[..cut], 3);
            assert_eq!(committed, whole_epochs(stream, cut), "cut at {cut}");
            assert_eq!(result.is_ok(), starts.contains(&cut), "cut at {cut}");
            cases += 1;
        }
    }
    cases
}

pub(crate) fn flips() -> usize {
    let mut cases = 0;
    for session in sessions() {
        let mut stream = session.to_backup.clone();
        for bit in 0..stream.len() * 8 {
            stream[bit / 8] ^= 1 << (bit % 8);
            let earned = whole_epochs(&session.to_backup, bit / 8);
            let (committed, result) = hear(&session, &stream, earned);
            assert!(result.is_err() && committed == earned, "bit {bit}: {result:?}");
            stream[bit / 8] ^= 1 << (bit % 8);
            cases += 1;
        }
    }
    cases
}

/// Gives a backup the session with one frame replaced. Either the change means nothing, or nothing that it touches is committed.
fn replaced(session: &Session, number: usize, with: &[u8]) {
    let stream = &session.to_backup;
    let starts = frame_starts(stream);
    let changed = [&stream[..starts[number]], with, &stream[starts[number + 1]..]].concat();
    let (committed, result) = hear(session, &changed, 3);
    let earned = whole_epochs(stream, starts[number]);
    assert!(result.is_ok() || committed >= earned, "an earlier commit is gone");
    // The goodbye comes after all commits; of the hello, what is not negotiated means nothing.
    assert!(committed <= earned || committed == 3, "{committed} commits around a changed frame {number}");
}

pub(crate) fn sound_flips() -> usize {
    let mut cases = 0;
    for session in sessions() {
        for (number, frame) in frames(&session.to_backup).into_iter().enumerate() {
            let mut frame = frame.to_vec();
            for byte in 8..frame.len() {
                // Every bit where the fields are, one bit of each byte in the bulk behind them.
                let bits = if byte < HEADER_BYTES + 64 { 0..8 } else { byte % 8..byte % 8 + 1 };
                for bit in bits {
                    frame[byte] ^= 1 << bit;
                    let mut sealed = frame.clone();
                    seal_checksums(&mut sealed);
                    replaced(&session, number, &sealed);
                    frame[byte] ^= 1 << bit;
                    cases += 1;
                }
            }
        }
    }
    cases
}

pub(crate) fn edges() -> usize {
    let mut cases = 0;
    for session in sessions() {
        for (number, frame) in frames(&session.to_backup).into_iter().enumerate() {
            for at in 8..frame.len().min(HEADER_BYTES + 48) {
                for (edge, width) in EDGES.into_iter().flat_map(|edge| [(edge, 2), (edge, 4), (edge, 8)]) {
                    let fits = width == 8 || edge == u64::MAX || edge >> (8 * width) == 0;
                    if !fits || at + width > frame.len() {
                        continue;
                    }
                    let mut changed = frame.to_vec();
                    changed[at..at + width].copy_from_slice(&edge.to_le_bytes()[..width]);
                    seal_checksums(&mut changed);
                    replaced(&session, number, &changed);
                    cases += 1;
                }
            }
        }
    }
    cases
}

pub(crate) fn cuts() -> usize {
    let mut cases = 0;
    for session in sessions() {
        for (number, frame) in frames(&session.to_backup).into_iter().enumerate() {
            let payload = frame.len() - HEADER_BYTES;
            for cut in (0..payload).step_by(payload / 200 + 1) {
                let mut changed = frame[..HEADER_BYTES + cut].to_vec();
                seal(&mut changed);
                replaced(&session, number, &changed);
                cases += 1;
            }
            for more in [1, 2, 4, 8, 16, 4096, 100_000] {
                let mut changed = [frame, &vec![0; more]].concat();
                seal(&mut changed);
                replaced(&session, number, &changed);
                cases += 1;
            }
        }
    }
    cases
}

/// A session of these frames; with `renumbered`, the numbers in the connection are made right.
fn said(frames: &[Vec<u8>], renumbered: bool) -> Vec<u8> {
    let mut stream = Vec::new();
    for (frame, number) in frames.iter().zip(0u64..) {
        let mut frame = frame.clone();
        if renumbered {
            frame[24..32].copy_from_slice(&number.to_le_bytes());
            seal_checksums(&mut frame);
        }
        stream.extend(frame);
    }
    stream
}

pub(crate) fn sequences() -> usize {
    let mut cases = 0;
    for session in sessions() {
        let sound: Vec<Vec<u8>> = frames(&session.to_backup).into_iter().map(<[u8]>::to_vec).collect();
        let mut hear_both = |frames: &[Vec<u8>]| {
            for renumbered in [false, true] {
                // What is committed is checked to be what the primary committed to; how much, is the change's affair.
                let _ = hear(&session, &said(frames, renumbered), 3);
                cases += 1;
            }
        };
        for one in 0..sound.len() {
            let mut frames = sound.clone();
            let taken = frames.remove(one);
            hear_both(&frames);
            for two in 0..=frames.len() {
                let mut moved = frames.clone();
                moved.insert(two, taken.clone());
                hear_both(&moved);
                let mut doubled = sound.clone();
                doubled.insert(two, taken.clone());
                hear_both(&doubled);
            }
            for two in one + 1..sound.len() {
                let mut exchanged = sound.clone();
                exchanged.swap(one, two);
                hear_both(&exchanged);
            }
        }
        for at in 0..=sound.len() {
            for (message, epoch) in
                (0..14u8).flat_map(|message| [(message, 0), (message, 7), (message, 8), (message, 9)])
            {
                for length in [0, 4, 5, 8, 16, 24, 32, 48] {
                    let mut frames = sound.clone();
                    frames.insert(at, Forge::primary().frame(message, epoch, &vec![0; length]));
                    hear_both(&frames);
                }
            }
        }
    }
    cases
}

pub(crate) fn compressed() -> usize {
    let session = support::session(true);
    let mut cases = 0;
    for (number, frame) in frames(&session.to_backup).into_iter().enumerate() {
        let body = match frame[10] {
            PAGES if frame[HEADER_BYTES] == 1 => HEADER_BYTES + 16,
            SECTION if frame[HEADER_BYTES + 4] == 1 => HEADER_BYTES + 16,
            _ => continue,
        };
        for at in body..frame.len() {
            for value in [0, 1, 0x7F, 0x80, 0xFF, frame[at] ^ 1, frame[at] ^ 0x10, frame[at] ^ 0x80] {
                let mut changed = frame.to_vec();
                changed[at] = value;
                seal_checksums(&mut changed);
                replaced(&session, number, &changed);
                cases += 1;
            }
        }
    }
    cases
}

/// A primary that has sent epochs 7 to 9 and read none of the answers.
fn deaf_sender() -> Sender {
    let mut sender = Sender::new(sender_config(false));
    sender.handle_bytes(&Forge::backup().accept()).unwrap();
    assert!(matches!(sender.poll_event(), Some(SenderEvent::Accepted { .. })));
    let all = support::all_pages(&support::ram());
    for epoch in 7..10 {
        let kind = if epoch == 7 { CheckpointKind::Base } else { CheckpointKind::Delta };
        sender.begin(Epoch(epoch), kind).unwrap();
        sender
            .pages(&all[..if epoch == 7 { 5 } else { 1 }], &vec![0; if epoch == 7 { 5 } else { 1 } * PAGE_BYTES])
            .unwrap();
        sender.end(false).unwrap();
    }
    drop(support::drain(|| sender.poll_transmit()));
    sender
}

/// Gives a primary what a backup answers after its acceptance. What is released, is released once and in order.
fn answer(stream: &[u8], earned: usize) -> Result<(), LinkError> {
    let mut sender = deaf_sender();
    let result = sender.handle_bytes(stream).and_then(|()| sender.handle_eof());
    let mut released = 0;
    while let Some(event) = sender.poll_event() {
        if let SenderEvent::Committed { epoch } = event {
            assert_eq!(epoch, Epoch(7 + released));
            released += 1;
        }
    }
    assert!(released <= u64::try_from(earned).unwrap(), "{released} epochs were released for {earned}");
    if result.is_err() {
        assert!(sender.poll_transmit().is_none() && !sender.can_begin());
        assert_eq!(sender.handle_eof(), result);
    }
    result
}

pub(crate) fn answers() -> usize {
    let mut cases = 0;
    let to_primary = support::session(false).to_primary;
    // The acceptance was heard already.
    let acks = to_primary[frame_starts(&to_primary)[1]..].to_vec();
    let whole = |bytes: usize| frame_starts(&acks).iter().filter(|start| **start > 0 && **start <= bytes).count();
    for cut in 0..=acks.len() {
        assert_eq!(answer(&acks[..cut], whole(cut)).is_ok(), cut % HEADER_BYTES == 0);
        cases += 1;
    }
    for bit in 0..acks.len() * 8 {
        let mut changed = acks.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(answer(&changed, whole(bit / 8)).is_err(), "bit {bit}");
        let frame = bit / 8 / HEADER_BYTES * HEADER_BYTES;
        if bit / 8 - frame >= 8 {
            seal_checksums(&mut changed[frame..frame + HEADER_BYTES]);
            // An ack of epoch 9 in the place of another stands for all before it.
            drop(answer(&changed, 3));
        }
        cases += 2;
    }
    for (at, edge) in (8..HEADER_BYTES - 8).flat_map(|at| EDGES.into_iter().map(move |edge| (at, edge))) {
        let mut forge = Forge::backup();
        forge.sequence = 1;
        let mut ack = forge.frame(ACK, 7, &[]);
        ack[at..at + 8].copy_from_slice(&edge.to_le_bytes());
        seal_checksums(&mut ack);
        drop(answer(&ack, 3));
        cases += 1;
    }
    for message in 0..14u8 {
        for length in 0..64 {
            let mut forge = Forge::backup();
            forge.sequence = 1;
            drop(answer(&forge.frame(message, u64::from(message == ACK) * 10, &vec![0; length]), 0));
            cases += 1;
        }
    }
    cases
}

pub(crate) fn heartbeats() -> usize {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/proto-v1-heartbeat.bin");
    let golden = std::fs::read(path).unwrap();
    let ms = Duration::from_millis;
    let hear = |stream: &[u8]| {
        let mut pulse = Pulse::new(support::backup(), ms(20), ms(0));
        let result = pulse.handle_bytes(stream).and_then(|()| pulse.handle_eof());
        let mut events = 0;
        while pulse.poll_event().is_some() {
            events += 1;
        }
        assert!(events <= 4, "{events} events");
        assert_eq!(result.is_err(), pulse.next_deadline().is_none());
        result
    };
    assert_eq!(hear(&golden), Ok(()));
    let starts = frame_starts(&golden);
    let mut cases = 0;
    for cut in 0..golden.len() {
        assert_eq!(hear(&golden[..cut]).is_ok(), starts.contains(&cut));
        cases += 1;
    }
    for bit in 0..golden.len() * 8 {
        let mut changed = golden.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(hear(&changed).is_err(), "bit {bit}");
        let frame = starts.windows(2).find(|ends| bit / 8 < ends[1]).unwrap();
        seal_checksums(&mut changed[frame[0]..frame[1]]);
        drop(hear(&changed));
        cases += 2;
    }
    for (frame, edge) in starts.windows(2).flat_map(|frame| EDGES.into_iter().map(move |edge| (frame, edge))) {
        for at in frame[0] + 8..frame[1] - 8 {
            let mut changed = golden.clone();
            changed[at..at + 8].copy_from_slice(&edge.to_le_bytes());
            seal_checksums(&mut changed[frame[0]..frame[1]]);
            drop(hear(&changed));
            cases += 1;
        }
    }
    cases
}

/// Payloads as long as they may be, byte by byte or at once, and ends before their end: one frame of memory.
pub(crate) fn long_ones() -> usize {
    let mut cases = 0;
    for message in 1..=GOODBYE + 1 {
        for length in
            [0, 1, 24, 32, 516, 65_554, 263_184, MAX_PAYLOAD_BYTES - 1, MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES + 1]
        {
            let mut forge = Forge::primary();
            let opening = forge.opening();
            let begin = forge.begin(8, 1);
            let epoch = if matches!(message, PAGES | SECTION | END | INBOUND) { 8 } else { 0 };
            let frame = forge.frame(message, epoch, &vec![if message == INBOUND { 0 } else { 0xAA }; length]);
            for piece in [977, 65_536, MAX_INPUT_BYTES] {
                let mut receiver = Receiver::new(receiver_config());
                let mut result = Ok(());
                for bytes in opening.chunks(piece).chain(begin.chunks(piece)).chain(frame.chunks(piece)) {
                    result = receiver.handle_bytes(bytes);
                    while result.is_ok() {
                        match receiver.poll_event() {
                            Ok(Some(_)) => {}
                            Ok(None) => break,
                            Err(error) => result = Err(error),
                        }
                    }
                    if result.is_err() {
                        break;
                    }
                }
                let allowed = message == INBOUND && (5..=65_554).contains(&length);
                assert_eq!(result.is_ok(), allowed, "message {message} of {length} bytes: {result:?}");
                cases += 1;
            }
        }
    }
    cases
}
