//! Single frames: headers, each message, page batches. Checksums are made right, because a random one never is.

use arbitrary::Unstructured;
use replication_proto::limits::{HEADER_BYTES, MAX_FRAME_BYTES, MAX_INPUT_BYTES, MAX_PAGES_PER_MESSAGE, PAGE_BYTES};
use replication_proto::{
    CheckpointKind, Epoch, Generation, Greeting, LinkError, Pulse, Receiver, ReceiverConfig, ReceiverEvent, Sender,
};

use super::support::{self, Backup, Forge, GOODBYE, HELLO, PAGES, REFUSE, receiver_config, sender_config};

/// A backup that holds the all-zero base of epoch 7, and the forger that goes on from there.
pub(super) fn opened() -> (Backup, Forge) {
    let mut forge = Forge::primary();
    let mut backup = Backup::new(receiver_config());
    backup.feed(&forge.opening(), usize::MAX).expect("the opening is sound");
    drop(backup.answers());
    (backup, forge)
}

/// A primary whose epoch 7 left the house and whose epoch 8 did not, and the forger of its backup.
fn waiting() -> (Sender, Forge) {
    let mut sender = Sender::new(sender_config(false));
    let mut forge = Forge::backup();
    let sound = "a sound session";
    sender.handle_bytes(&forge.accept()).expect(sound);
    let all = support::all_pages(&support::ram());
    sender.begin(Epoch(7), CheckpointKind::Base).expect(sound);
    sender.pages(&all, &vec![0; all.len() * PAGE_BYTES]).expect(sound);
    sender.end(false).expect(sound);
    drop(support::drain(|| sender.poll_transmit()));
    sender.begin(Epoch(8), CheckpointKind::Delta).expect(sound);
    sender.end(false).expect(sound);
    while sender.poll_event().is_some() {}
    (sender, forge)
}

/// Once there is an error, it is the same error for ever, and there is at most one last word.
pub(super) fn assert_final(receiver: &mut Receiver, error: &LinkError) {
    super::assert_harmless(&error.to_string());
    assert_eq!(receiver.handle_bytes(&[0; 100]).as_ref(), Err(error));
    assert_eq!(receiver.poll_event().as_ref(), Err(error));
    assert_eq!(receiver.handle_eof().as_ref(), Err(error));
    assert_eq!(receiver.ack(Epoch(8)).as_ref(), Err(error));
    let answers = support::drain(|| receiver.poll_transmit());
    let starts = support::frame_starts(&answers);
    let words: Vec<u8> = starts.iter().filter_map(|start| answers.get(start + 10).copied()).collect();
    let before_the_last = words.split_last().map_or(&[][..], |(_, before)| before);
    assert!(!before_the_last.iter().any(|word| [REFUSE, GOODBYE].contains(word)), "more than one last word: {words:?}");
    assert_eq!(receiver.poll_transmit(), None);
}

/// Feeds an opened backup; nothing that ends no checkpoint commits one.
fn to_opened_backup(before: &dyn Fn(&mut Forge) -> Vec<u8>, frame: &dyn Fn(&mut Forge) -> Vec<u8>, piece: usize) {
    let (mut backup, mut forge) = opened();
    let stream = [before(&mut forge), frame(&mut forge)].concat();
    let memory = backup.memory.clone();
    let result = backup.feed(&stream, piece);
    // The only checkpoint that one frame can end is one that came without a page.
    assert!(backup.committed.len() <= 2 && backup.memory == memory, "one frame changed the memory");
    if let Err(error) = result {
        assert_final(&mut backup.receiver, &error);
    }
}

fn to_fresh_receiver(stream: &[u8]) {
    let config =
        ReceiverConfig { identity: support::identity("b", Generation(2), support::BACKUP), ..receiver_config() };
    let mut receiver = Receiver::new(config);
    if receiver.handle_bytes(stream).is_err() {
        return;
    }
    loop {
        match receiver.poll_event() {
            Ok(Some(ReceiverEvent::End(end))) => panic!("{end:?} of one frame"),
            Ok(Some(_)) => {}
            Ok(None) => return,
            Err(error) => return assert_final(&mut receiver, &error),
        }
    }
}

fn to_greeting(stream: &[u8]) {
    let mut greeting = Greeting::new();
    for piece in stream.chunks(97) {
        match greeting.handle_bytes(piece) {
            Ok(None) => {}
            Ok(Some(_)) => break,
            Err(error) => return super::assert_harmless(&error.to_string()),
        }
    }
    let kept = greeting.into_bytes();
    assert!(kept.len() <= MAX_FRAME_BYTES + MAX_INPUT_BYTES && stream.starts_with(&kept));
}

fn to_sender(frame: &dyn Fn(&mut Forge) -> Vec<u8>) {
    let (mut sender, mut forge) = waiting();
    let stream = frame(&mut forge);
    let result = sender.handle_bytes(&stream);
    while let Some(event) = sender.poll_event() {
        if let replication_proto::SenderEvent::Committed { epoch } = event {
            assert_eq!(epoch, Epoch(7), "released what never left");
        }
    }
    if let Err(error) = result {
        super::assert_harmless(&error.to_string());
        assert_eq!(sender.handle_bytes(&[]), Err(error));
        assert_eq!(sender.poll_transmit(), None);
        assert!(!sender.can_begin());
    }
}

fn to_fresh_sender(stream: &[u8]) {
    let mut sender = Sender::new(sender_config(true));
    let result = sender.handle_bytes(stream);
    if let Err(error) = result {
        assert_eq!(sender.handle_eof(), Err(error));
        assert!(!sender.can_begin() && sender.poll_transmit().is_none());
    }
}

fn to_pulse(frame: &dyn Fn(&mut Forge) -> Vec<u8>) {
    let ms = core::time::Duration::from_millis;
    let mut pulse = Pulse::new(support::backup(), ms(20), ms(0));
    drop(support::drain(|| pulse.poll_transmit(ms(0))));
    let mut forge = Forge::primary();
    let mut hello = support::hello_payload()[..26].to_vec();
    hello[0] = 2;
    hello.extend([0; 4]);
    let stream = [forge.frame(HELLO, 0, &hello), frame(&mut forge)].concat();
    if let Err(error) = pulse.handle_bytes(&stream) {
        super::assert_harmless(&error.to_string());
        assert_eq!(pulse.next_deadline(), None);
        assert_eq!(pulse.handle_eof(), Err(error));
    }
}

fn everywhere(frame: &dyn Fn(&mut Forge) -> Vec<u8>, piece: usize) {
    to_opened_backup(&|_| Vec::new(), frame, piece);
    to_opened_backup(&|forge| forge.begin(8, 1), frame, piece);
    let (from_primary, from_backup) = (frame(&mut Forge::primary()), frame(&mut Forge::backup()));
    to_fresh_receiver(&from_primary);
    to_greeting(&from_primary);
    to_sender(frame);
    to_fresh_sender(&from_backup);
    to_pulse(frame);
}

/// Target `header`: one byte of choices, 80 bytes of header, a payload. What the choices say is made right, the rest stays as it is.
pub fn header(data: &[u8]) {
    let Some((&choices, rest)) = data.split_first() else { return };
    if rest.len() < HEADER_BYTES {
        return;
    }
    let frame = |forge: &mut Forge| {
        let mut frame = rest.to_vec();
        let sound =
            forge.frame(frame[10], u64::from_le_bytes(frame[32..40].try_into().expect("8 bytes")), &frame[80..]);
        let mut keep = |bit: u8, fields: core::ops::Range<usize>| {
            if choices & (1 << bit) != 0 {
                frame[fields.clone()].copy_from_slice(&sound[fields]);
            }
        };
        keep(0, 0..4);
        keep(1, 8..10);
        keep(2, 11..12);
        keep(3, 12..16);
        keep(4, 16..20);
        keep(5, 20..24);
        keep(6, 24..32);
        keep(7, 40..80);
        let checksum = crc32fast::hash(&frame[8..80]).to_le_bytes();
        frame[4..8].copy_from_slice(&checksum);
        frame
    };
    everywhere(&frame, usize::MAX);
}

/// Target `message`: type, epoch, size of the pieces, payload; header and checksums are right.
pub fn message(data: &[u8]) {
    let [kind, epoch, piece, payload @ ..] = data else { return };
    let epoch = if *epoch == 255 { u64::MAX } else { u64::from(*epoch) };
    let frame = |forge: &mut Forge| forge.frame(*kind % 13, epoch, payload);
    everywhere(&frame, usize::from(*piece).max(1) * 16);
}

/// Target `pages`: a batch of runs with a body that is raw, compressed, or a compressed frame with something wrong about it.
pub fn pages(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let _ = batch(&mut input);
}

fn batch(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let (mut runs, mut total, mut filled) = (Vec::new(), 0u32, 0u32);
    for _ in 0..input.int_in_range(0..=5)? {
        let first = *input.choose(&[0, 1, 2, 3, 16, 17, 18, 1 << 40, u64::MAX])?;
        let pages = *input.choose(&[1, 1, 1, 2, 3, 0, 64, u32::MAX])?;
        let kind = *input.choose(&[0, 0, 1, 1, 2])?;
        total = total.wrapping_add(pages);
        filled = filled.wrapping_add(if kind == 0 { pages } else { 0 });
        runs.push((first, pages, kind));
    }
    let mut announced = filled.wrapping_mul(4096);
    let honest = announced as usize <= MAX_PAGES_PER_MESSAGE * PAGE_BYTES;
    let size = if honest { announced as usize } else { 4096 };
    let fill: u8 = input.arbitrary()?;
    let content: Vec<u8> = (0..size).map(|n| fill ^ (n % 251).to_le_bytes()[0]).collect();
    let encoding = *input.choose(&[0, 1, 1, 1, 2])?;
    let mut body = body(input, encoding, &content)?;
    for _ in 0..input.int_in_range(0..=3)? {
        damage(input, &mut body, &mut announced, &mut total)?;
    }
    let epoch_kind = u8::from(input.arbitrary::<bool>()?);
    let payload = support::pages_payload(encoding, &runs, total, announced, &body);
    let (mut backup, mut forge) =
        if epoch_kind == 1 { opened() } else { (Backup::new(receiver_config()), Forge::primary()) };
    let (hello, epoch) = if epoch_kind == 1 { (Vec::new(), 8) } else { (forge.hello(), 7) };
    let stream = [hello, forge.begin(epoch, epoch_kind), forge.frame(PAGES, epoch, &payload)].concat();
    backup.receiver.handle_bytes(&stream).expect("the size of an input");
    loop {
        match backup.receiver.poll_event() {
            Ok(Some(ReceiverEvent::Pages { indexes, bytes })) => {
                assert_eq!(indexes.len() * PAGE_BYTES, bytes.len());
                assert!(!indexes.is_empty() && indexes.len() <= MAX_PAGES_PER_MESSAGE);
                assert!(indexes.iter().all(|page| support::ram().contains(*page)), "{indexes:?}");
                let distinct: std::collections::BTreeSet<_> = indexes.iter().collect();
                assert!(epoch_kind == 0 || distinct.len() == indexes.len(), "{indexes:?} in a delta");
            }
            Ok(Some(_)) => {}
            Ok(None) => return Ok(()),
            Err(error) => {
                assert_final(&mut backup.receiver, &error);
                return Ok(());
            }
        }
    }
}

fn body(input: &mut Unstructured<'_>, encoding: u8, content: &[u8]) -> arbitrary::Result<Vec<u8>> {
    let compress = |content: &[u8]| zstd::bulk::compress(content, 1).expect("memory to compress");
    Ok(match input.int_in_range(0..=8)? {
        0 => input.bytes(input.len().min(64))?.to_vec(),
        1 => compress(&content[..content.len() / 2]),
        2 => compress(&[content, content].concat()),
        3 => compress(&vec![0; input.int_in_range(0..=64usize)? << 14]),
        4 => [compress(content), compress(content)].concat(),
        5 => [&0x184D_2A50_u32.to_le_bytes()[..], &4u32.to_le_bytes(), &[0; 4], &compress(content)].concat(),
        6 => zstd::stream::encode_all(content, 3).expect("memory to compress"),
        _ if encoding == 0 => content.to_vec(),
        _ => compress(content),
    })
}

fn damage(
    input: &mut Unstructured<'_>,
    body: &mut Vec<u8>,
    announced: &mut u32,
    total: &mut u32,
) -> arbitrary::Result<()> {
    match input.int_in_range(0..=6)? {
        0 if !body.is_empty() => {
            // The frame's header is where the lies are.
            let at = input.int_in_range(0..=body.len().min(24) - 1)?;
            body[at] = input.arbitrary()?;
        }
        1 if !body.is_empty() => {
            let at = input.int_in_range(0..=body.len() - 1)?;
            body[at] ^= input.arbitrary::<u8>()?;
        }
        2 => body.truncate(input.int_in_range(0..=body.len())?),
        3 => body.push(input.arbitrary()?),
        4 => *announced = *input.choose(&[0, 1, 4095, 4097, 1 << 31, u32::MAX])?,
        5 => *total = *input.choose(&[0, 1, 64, 65, 1 << 31, u32::MAX])?,
        _ => {}
    }
    Ok(())
}
