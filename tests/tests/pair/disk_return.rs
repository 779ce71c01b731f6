//! A backup that was away gets of a disk what differs, and not the disk; and what the record of that does not know of is found by comparing.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use primary::disk::BLOCK_BYTES;
use primary::disk::header::BITS_AT;
use primary::disk::open::map_path;
use tests::real::pair::{Pair, PairOptions};
use tests::real::resp::{Connection, Reply};
use tests::real::rng::Rng;
use tests::real::scene::{Scene, play};
use tests::real::{Error, MachineKind, Node, Result, clock};

const LIMIT: Duration = Duration::from_secs(240);
/// What the guest's commands count.
const PIECE: u64 = 4096;

fn options(scene: &Scene, disk: u64) -> PairOptions {
    PairOptions {
        memory: "16MiB".into(),
        disks: vec![disk],
        extra: "[timers]\nsolo = \"2s\"\ntakeover = \"4s\"\nprotect_retry = \"100ms\"\n".into(),
        ..scene.options()
    }
}

/// Fills pieces of the disk with text that hardly compresses.
fn write(guest: &mut Connection, pieces: &[u64], rng: &mut Rng) -> Result<()> {
    const DIGITS: &[u8; 64] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+/";
    for some in pieces.chunks(32) {
        for piece in some {
            let digit = |_| char::from(DIGITS[usize::try_from(rng.range(0, 64)).unwrap_or(0)]);
            let text: String = (0..PIECE).map(digit).collect();
            guest.send(&["FT.DISK", "WRITE", &piece.to_string(), &text]).map_err(Error::io("a write"))?;
        }
        for piece in some {
            let answer = guest.receive().map_err(Error::io("an answer"))?;
            assert_eq!(answer, Reply::Simple("OK".into()), "writing piece {piece}");
        }
    }
    Ok(())
}

fn wire_bytes(pair: &Pair, node: Node) -> Result<u64> {
    let status = pair.status(node)?;
    let counters = &status.json()["counters"];
    let bytes = counters["replication_wire_bytes"].as_u64();
    bytes.ok_or_else(|| Error::answer("ftctl status", format!("no bytes on the wire in {counters}")))
}

const GIB_4: u64 = 4 << 30;
/// For so long the backup is away, while the guest goes on writing.
const AWAY: Duration = Duration::from_secs(10);
const ROUNDS: u32 = 20;

/// While the backup is away, a hundredth of a disk of 4 GiB changes, all over it. Its return costs at most twice as many bytes on the wire.
fn returns_after_ten_seconds(scene: &mut Scene) -> Result<()> {
    // Of file systems in memory: sparse, and holes are read at no cost.
    let space = Node::BOTH.map(|node| (node, 512 << 20)).into();
    let options = PairOptions { disk_space: space, ..options(scene, GIB_4) };
    let pair = scene.prepare(&options)?;
    pair.start_backup(Node::B)?;
    pair.start_primary(Node::A, &[])?;
    pair.wait_protected(Node::A, LIMIT)?;
    let whole = wire_bytes(pair, Node::A)?;
    let mut guest = Connection::open(pair.network().client(), LIMIT)?;
    let mut rng = Rng::new(7);
    let left = Instant::now();
    let since = pair.kill(Node::B)?;
    pair.wait_event(Node::A, since, LIMIT, "the way to solo", |event| event.enters("solo"))?;
    let changed = GIB_4 / PIECE / 100;
    for round in 1..=ROUNDS {
        let pieces: Vec<u64> = (0..changed / u64::from(ROUNDS)).map(|_| rng.range(0, GIB_4 / PIECE)).collect();
        write(&mut guest, &pieces, &mut rng)?;
        // A load is so much in so much time.
        thread::sleep((AWAY * round / ROUNDS).saturating_sub(left.elapsed()));
    }
    let (away, before) = (left.elapsed(), wire_bytes(pair, Node::A)?);
    let back = Instant::now();
    pair.start_backup(Node::B)?;
    pair.wait_protected(Node::A, LIMIT)?;
    let took = back.elapsed();
    let sent = wire_bytes(pair, Node::A)? - before;
    println!(
        "first synchronisation of an empty disk of 4 GiB: {whole} bytes on the wire; backup away for {away:.1?}, {changed} pieces of 4 KiB changed \
         ({:.2} % of the disk); protected again {took:.1?} after it was started, {sent} bytes on the wire ({:.2} % of the disk)",
        percent(changed * PIECE),
        percent(sent)
    );
    assert!(sent <= GIB_4 / 50, "{sent} bytes are more than 2 % of the disk");
    // What changed is on the wire, so the counter counts.
    assert!(sent >= GIB_4 / 200, "{sent} bytes are less than what changed, compressed");
    assert_eq!(pair.wait_equal_images(0, LIMIT)?, None, "the first byte that differs");
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn percent(bytes: u64) -> f64 {
    bytes as f64 * 100.0 / GIB_4 as f64
}

const SMALL: u64 = 8 << 20;

/// The owner's map loses a bit while nobody runs: the next synchronisation passes the block over, and a comparison names what differs in it. The same with the
/// bit in its place finds nothing.
fn lost_bit_is_found(scene: &mut Scene) -> Result<()> {
    for lose in [false, true] {
        let pair = scene.protected(&options(scene, SMALL))?;
        let mut guest = Connection::open(pair.network().client(), LIMIT)?;
        let mut rng = Rng::new(8);
        write(&mut guest, &[3, 500], &mut rng)?;
        let since = pair.kill(Node::B)?;
        pair.wait_event(Node::A, since, LIMIT, "the way to solo", |event| event.enters("solo"))?;
        // Of three neighbours in one block of the map, and one in another.
        write(&mut guest, &[4, 1000, 1001, 1002], &mut rng)?;
        pair.kill(Node::A)?;
        if lose {
            lose_bit(&pair.image(Node::A, 0), 1000 * PIECE / BLOCK_BYTES)?;
        }
        let began = clock::mono_us();
        pair.start_backup(Node::B)?;
        pair.start_primary(Node::A, &[])?;
        pair.wait_protected(Node::A, LIMIT)?;
        let booted = pair.events(Node::A, began)?.iter().any(|event| event.right.as_deref() == Some("boot"));
        assert!(booted, "nobody took over: the owner's disk is the one that counts;\n{}", pair.logs());
        let said = pair.ftctl(Node::A, &["verify", "--timeout", "60s"])?;
        if lose {
            let named = [1000, 1001, 1002].map(|piece| format!("disk 0 at byte {:#x}", piece * PIECE)).join(", ");
            assert!(!said.status.success() && said.stderr.contains(&format!("DIFFERS: {named};")), "{said:?}");
        } else {
            assert!(said.status.success() && said.stdout.contains("both sides are equal"), "{said:?}");
        }
    }
    Ok(())
}

/// Clears the bit of a block in the map of an image.
fn lose_bit(image: &Path, block: u64) -> Result<()> {
    let path = map_path(image, false, Path::new(""), "");
    let change = || {
        let file = File::options().read(true).write(true).open(&path)?;
        let (at, bit, mut byte) = (BITS_AT + block / 8, 1 << (block % 8), [0]);
        file.read_exact_at(&mut byte, at)?;
        assert_ne!(byte[0] & bit, 0, "block {block} had its bit");
        file.write_all_at(&[byte[0] & !bit], at)
    };
    change().map_err(Error::io(format!("cannot change {}", path.display())))
}

#[test]
fn model_returns_after_ten_seconds() {
    play(MachineKind::Model, "returns_after_ten_seconds", returns_after_ten_seconds);
}

#[test]
fn model_lost_bit_is_found() {
    play(MachineKind::Model, "lost_bit_is_found", lost_bit_is_found);
}
