//! What disks do when they fail: for each row of the table in docs/operating.md a defined outcome, and never a silent difference of the two sides. The processes
//! are those with failpoints, whose files of disks fail on order; file systems that are full are real ones.
//!
//! After each fault both images are compared, by `ftctl verify` and byte by byte.

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use primary::disk::open::map_path;
use primary::disk::{DirtyMap, DiskIdentity, Journal, open_image, open_storage};
use replication_proto::{Incarnation, VmId};
use tests::real::artifacts::Artifacts;
use tests::real::load::LoadReport;
use tests::real::pair::{Pair, PairOptions};
use tests::real::resp::{Connection, Reply};
use tests::real::scene::{self, Scene, play_with};
use tests::real::{Error, MachineKind, Node, Result, clock, tools};

const LIMIT: Duration = Duration::from_secs(60);
const DISK_BYTES: u64 = 8 << 20;
/// Of these, the guest's commands count 4 KiB.
const BLOCKS: u64 = DISK_BYTES / 4096;
/// A file system with less room than the disk.
const SMALL: u64 = 256 << 10;

fn play(name: &str, test: impl FnOnce(&mut Scene) -> Result<()>) {
    play_with(MachineKind::Model, name, || Artifacts::build_failpoints(MachineKind::Model, |_| {}), test);
}

fn options(scene: &Scene) -> PairOptions {
    PairOptions {
        memory: "16MiB".into(),
        disks: vec![DISK_BYTES],
        extra: "[timers]\nsolo = \"2s\"\ntakeover = \"4s\"\nprotect_retry = \"100ms\"\n[limits]\njournal = \"1MiB\"\n"
            .into(),
        ..scene.options()
    }
}

/// A file of a host's disk, and the way in which it fails.
struct Order(PathBuf);

impl Order {
    fn give(file: &Path, way: &str) -> Result<Self> {
        let path = PathBuf::from(format!("{}.fails-{way}", file.display()));
        fs::write(&path, "").map_err(Error::io("cannot give an order"))?;
        Ok(Self(path))
    }

    fn withdraw(self) -> Result<()> {
        fs::remove_file(&self.0).map_err(Error::io("cannot withdraw an order"))
    }
}

fn map_of(image: &Path) -> PathBuf {
    map_path(image, false, Path::new(""), "")
}

/// A protected pair whose files of disks fail on order, and a client.
fn pair<'a>(scene: &'a mut Scene, options: &PairOptions) -> Result<(&'a mut Pair, Connection)> {
    let pair = scene.prepare(options)?;
    pair.set_env("FT_DISK_FAULTS", Some("1".into()));
    pair.start_protected()?;
    let guest = Connection::open(pair.network().client(), LIMIT)?;
    Ok((pair, guest))
}

fn ask(guest: &mut Connection, words: &[&str]) -> Result<Reply> {
    guest.call(words).map_err(Error::io(words.join(" ")))
}

/// Fills blocks, all requests at once; how many were answered with OK, and how many with an I/O error.
fn fill(guest: &mut Connection, blocks: impl Iterator<Item = u64>, value: &str) -> Result<(u64, u64)> {
    let blocks: Vec<String> = blocks.map(|block| block.to_string()).collect();
    let (mut done, mut refused) = (0, 0);
    for some in blocks.chunks(64) {
        for block in some {
            guest.send(&["FT.DISK", "WRITE", block, value]).map_err(Error::io("a request"))?;
        }
        for block in some {
            match guest.receive().map_err(Error::io("an answer"))? {
                Reply::Simple(_) => done += 1,
                Reply::Error(text) if text == "EIO disk" => refused += 1,
                other => return Err(Error::answer(format!("writing block {block}"), format!("{other:?}"))),
            }
        }
    }
    Ok((done, refused))
}

fn assert_refused(answer: &Reply, what: &str) {
    assert!(matches!(answer, Reply::Error(text) if text == "EIO disk"), "{what}: {answer:?}");
}

/// Both sides are equal: as the pair itself finds, and byte by byte.
fn assert_equal(pair: &mut Pair, owner: Node) -> Result<()> {
    pair.wait_protected(owner, LIMIT)?;
    let said = pair.ftctl(owner, &["verify", "--timeout", "60s"])?;
    assert!(said.status.success() && said.stdout.contains("both sides are equal"), "{said:?}\n{}", pair.logs());
    assert_eq!(pair.wait_equal_images(0, LIMIT)?, None, "the first byte that differs");
    Ok(())
}

/// Waits until a host's status says this somewhere.
fn wait_says(pair: &Pair, node: Node, words: &str) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let status = pair.status(node)?.json().to_string();
        if status.contains(words) {
            return Ok(());
        }
        assert!(Instant::now() < deadline, "{node} never says {words:?}: {status}\n{}", pair.logs());
        thread::sleep(Duration::from_millis(20));
    }
}

/// Nothing but the guest's request failed: protection has stood since, and the status tells of it.
fn assert_still_protected(pair: &mut Pair, since_us: u64, warning: &str) -> Result<()> {
    wait_says(pair, Node::A, &format!("trouble with a disk: {warning}"))?;
    let left = pair.events(Node::A, since_us)?.into_iter().find(|event| event.event == "state");
    assert!(left.is_none(), "{left:?}");
    Ok(())
}

// ---- the owner's side --------------------------------------------------------------------------------------------------------------

#[test]
fn owner_s_disk_full() {
    play("owner_s_disk_full", |scene| {
        let options = PairOptions { disk_space: vec![(Node::A, SMALL)], ..options(scene) };
        let (pair, mut guest) = pair(scene, &options)?;
        let since = clock::mono_us();
        let (done, refused) = fill(&mut guest, 0..100, "one")?;
        assert!(done > 10 && refused > 10, "{done} written, {refused} refused");
        assert_still_protected(pair, since, "disk 0 (disk0): a write failed: No space left")?;
        assert_equal(pair, Node::A)?;
        pair.remount(Node::A, "size=64m")?;
        assert_eq!(fill(&mut guest, 0..100, "two")?, (100, 0));
        assert_equal(pair, Node::A)
    });
}

#[test]
fn owner_s_image_takes_no_writes() {
    play("owner_s_image_takes_no_writes", |scene| {
        let options = options(scene);
        let (pair, mut guest) = pair(scene, &options)?;
        let since = clock::mono_us();
        assert_eq!(fill(&mut guest, 0..3, "one")?, (3, 0));
        let order = Order::give(&pair.image(Node::A, 0), "write")?;
        assert_eq!(fill(&mut guest, 0..6, "two")?, (0, 6));
        assert_still_protected(pair, since, "disk 0 (disk0): a write failed: Input/output error")?;
        assert_equal(pair, Node::A)?;
        order.withdraw()?;
        assert_eq!(fill(&mut guest, 0..6, "two")?, (6, 0));
        assert_equal(pair, Node::A)
    });
}

#[test]
fn owner_s_map_takes_no_writes() {
    play("owner_s_map_takes_no_writes", |scene| {
        let options = options(scene);
        let (pair, mut guest) = pair(scene, &options)?;
        let since = clock::mono_us();
        assert_eq!(fill(&mut guest, 0..1, "one")?, (1, 0));
        let order = Order::give(&map_of(&pair.image(Node::A, 0)), "write")?;
        // Blocks of the map that have no bit yet.
        let fresh = || (0..BLOCKS).step_by(64).skip(1);
        assert_eq!(fill(&mut guest, fresh(), "two")?.0, 0);
        assert_still_protected(pair, since, "disk 0 (disk0): setting a bit of its map failed: Input/output error")?;
        assert_equal(pair, Node::A)?;
        order.withdraw()?;
        assert_eq!(fill(&mut guest, fresh(), "two")?.1, 0);
        assert_equal(pair, Node::A)
    });
}

#[test]
fn owner_s_image_cannot_be_read() {
    play("owner_s_image_cannot_be_read", |scene| {
        let options = options(scene);
        let (pair, mut guest) = pair(scene, &options)?;
        let since = clock::mono_us();
        assert_eq!(fill(&mut guest, 0..3, "one")?, (3, 0));
        let order = Order::give(&pair.image(Node::A, 0), "read")?;
        assert_refused(&ask(&mut guest, &["FT.DISK", "READ", "1"])?, "a read");
        assert_still_protected(pair, since, "disk 0 (disk0): a read failed: Input/output error")?;
        order.withdraw()?;
        assert!(
            matches!(ask(&mut guest, &["FT.DISK", "READ", "1"])?, Reply::Bulk(Some(bytes)) if bytes.starts_with(b"oneone"))
        );
        assert_equal(pair, Node::A)
    });
}

/// Neither written nor read: what the range holds is not known, so the other side is no copy any more.
#[test]
fn owner_s_disk_dead() {
    play("owner_s_disk_dead", |scene| {
        let options = options(scene);
        let (pair, mut guest) = pair(scene, &options)?;
        let since = clock::mono_us();
        let image = pair.image(Node::A, 0);
        let orders = [Order::give(&image, "write")?, Order::give(&image, "read")?];
        assert_eq!(fill(&mut guest, 0..1, "two")?, (0, 1));
        pair.wait_event(Node::A, since, LIMIT, "protection to end", |event| event.enters("solo"))?;
        wait_says(pair, Node::A, "protection ended: disk 0 (disk0): a write failed: Input/output error")?;
        for order in orders {
            order.withdraw()?;
        }
        assert_eq!(fill(&mut guest, 0..1, "three")?, (1, 0));
        assert_equal(pair, Node::A)
    });
}

/// The guest's flush fails, and all later ones: nothing that is written later can bring back what the host's kernel dropped. The other side's disk is
/// whole, so the guest is moved there.
#[test]
fn owner_s_disk_cannot_be_flushed() {
    play("owner_s_disk_cannot_be_flushed", |scene| {
        let options = options(scene);
        let (pair, mut guest) = pair(scene, &options)?;
        let since = clock::mono_us();
        assert_eq!(fill(&mut guest, 0..3, "one")?, (3, 0));
        let order = Order::give(&pair.image(Node::A, 0), "sync")?;
        assert_refused(&ask(&mut guest, &["FT.FSYNC"])?, "a flush");
        order.withdraw()?;
        assert_refused(&ask(&mut guest, &["FT.FSYNC"])?, "a flush after one that failed");
        assert_still_protected(pair, since, "disk 0 (disk0): a flush failed: Input/output error")?;
        let moved = pair.ftctl(Node::A, &["failover", "--yes"])?;
        assert!(moved.status.success(), "{moved:?}");
        assert_eq!(ask(&mut guest, &["FT.FSYNC"])?, Reply::Simple("OK".into()));
        assert_eq!(fill(&mut guest, 2..5, "two")?, (3, 0));
        assert_equal(pair, Node::B)
    });
}

#[test]
fn owner_s_image_shrinks_while_it_runs() {
    play("owner_s_image_shrinks_while_it_runs", |scene| {
        let options = options(scene);
        let (pair, mut guest) = pair(scene, &options)?;
        assert_eq!(fill(&mut guest, 0..BLOCKS, "one")?, (BLOCKS, 0));
        let since = clock::mono_us();
        shrink(&pair.image(Node::A, 0), DISK_BYTES / 2)?;
        for block in [0, BLOCKS - 1] {
            assert_eq!(fill(&mut guest, block..block + 1, "two")?, (0, 1));
        }
        pair.wait_event(Node::A, since, LIMIT, "protection to end", |event| event.enters("solo"))?;
        wait_says(pair, Node::A, "the image has shrunk from 8388608 to 4194304 bytes")?;
        let len = fs::metadata(pair.image(Node::A, 0)).map_err(Error::io("the image's length"))?.len();
        assert_eq!(len, DISK_BYTES / 2, "no write beyond its end makes it grow again");
        Ok(())
    });
}

fn absent(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

fn shrink(image: &Path, bytes: u64) -> Result<()> {
    let file = File::options().write(true).open(image).map_err(Error::io("cannot open an image"))?;
    file.set_len(bytes).map_err(Error::io("cannot change an image's length"))
}

// ---- the backup's side -------------------------------------------------------------------------------------------------------------

/// The guest notices nothing; protection ends with its reason on both sides and comes back by itself when the fault is gone.
fn backup_fails(
    scene: &mut Scene,
    options: &PairOptions,
    says: &str,
    begin: impl FnOnce(&Pair) -> Result<()>,
    end: impl FnOnce(&mut Pair) -> Result<()>,
) -> Result<()> {
    let (pair, mut guest) = pair(scene, options)?;
    assert_eq!(fill(&mut guest, 0..8, "one")?, (8, 0));
    assert_equal(pair, Node::A)?;
    let since = clock::mono_us();
    begin(pair)?;
    // More than the journal may have.
    assert_eq!(fill(&mut guest, 4..404, "two")?, (400, 0), "the guest's disk works");
    assert_eq!(ask(&mut guest, &["FT.FSYNC"])?, Reply::Simple("OK".into()));
    pair.wait_event(Node::A, since, LIMIT, "protection to end", |event| event.enters("solo"))?;
    wait_says(pair, Node::B, says)?;
    wait_says(pair, Node::A, says)?;
    assert_eq!(fill(&mut guest, 390..410, "three")?, (20, 0));
    end(pair)?;
    assert_equal(pair, Node::A)
}

#[test]
fn backup_s_disk_full() {
    play("backup_s_disk_full", |scene| {
        let options = PairOptions { disk_space: vec![(Node::B, SMALL)], ..options(scene) };
        let says = "No space left on device";
        backup_fails(scene, &options, says, |_| Ok(()), |pair| pair.remount(Node::B, "size=64m"))
    });
}

/// One of the backup's files fails in one way for a while.
fn backup_file_fails(name: &str, says: &str, file: impl Fn(&Pair) -> PathBuf, way: &'static str) {
    play(name, |scene| {
        let (options, given) = (options(scene), Cell::new(None));
        let begin = |pair: &Pair| {
            given.set(Some(Order::give(&file(pair), way)?));
            Ok(())
        };
        let end = |_: &mut Pair| given.take().map_or(Ok(()), Order::withdraw);
        backup_fails(scene, &options, says, begin, end)
    });
}

/// First a commit cannot be applied; then each new synchronisation fails at its first block. Which of the two a status still shows depends on how soon it
/// is asked.
#[test]
fn backup_s_image_takes_no_writes() {
    let says = ": Input/output error";
    backup_file_fails("backup_s_image_takes_no_writes", says, |pair| pair.image(Node::B, 0), "write");
}

/// An image is synced when the journal has reached its limit and starts anew. When that fails only a new process believes what it reads, and status says so.
#[test]
fn backup_s_image_cannot_be_synced() {
    play("backup_s_image_cannot_be_synced", |scene| {
        let (options, given) = (options(scene), Cell::new(None));
        let begin = |pair: &Pair| {
            given.set(Some(Order::give(&pair.image(Node::B, 0), "sync")?));
            Ok(())
        };
        let end = |pair: &mut Pair| {
            given.take().map_or(Ok(()), Order::withdraw)?;
            for node in Node::BOTH {
                wait_says(pair, node, "which only a new process forgets")?;
            }
            pair.kill(Node::B)?;
            pair.start_backup(Node::B)
        };
        backup_fails(scene, &options, "its image cannot be synced", begin, end)
    });
}

#[test]
fn backup_s_journal_takes_no_writes() {
    let journal = |pair: &Pair| pair.dir().join("b/journal");
    let says = "it cannot be written: Input/output error";
    backup_file_fails("backup_s_journal_takes_no_writes", says, journal, "write");
}

#[test]
fn backup_s_image_cannot_be_read() {
    play("backup_s_image_cannot_be_read", |scene| {
        let options = options(scene);
        let (pair, mut guest) = pair(scene, &options)?;
        assert_eq!(fill(&mut guest, 0..8, "one")?, (8, 0));
        let order = Order::give(&pair.image(Node::B, 0), "read")?;
        let said = pair.ftctl(Node::A, &["verify", "--timeout", "60s"])?;
        assert!(!said.status.success() && !said.stdout.contains("equal"), "{said:?}");
        wait_says(pair, Node::B, "an image cannot be read: Input/output error")?;
        order.withdraw()?;
        assert_equal(pair, Node::A)
    });
}

#[test]
fn backup_s_image_shrinks_while_it_waits() {
    play("backup_s_image_shrinks_while_it_waits", |scene| {
        let options = options(scene);
        let says = "the image has shrunk from 8388608 to 4096 bytes";
        let begin = |pair: &Pair| shrink(&pair.image(Node::B, 0), 4096);
        let end = |pair: &mut Pair| shrink(&pair.image(Node::B, 0), DISK_BYTES);
        backup_fails(scene, &options, says, begin, end)
    });
}

// ---- the same on KVM ---------------------------------------------------------------------------------------------------------------

/// A full file system on either side, under the demo guest's own load.
#[test]
fn kvm_disk_full() {
    scene::play(MachineKind::Kvm, "disk_full", |scene| {
        for side in Node::BOTH {
            let options = PairOptions {
                memory: "64MiB".into(),
                disks: vec![64 << 20],
                disk_space: vec![(side, 4 * SMALL)],
                ..options(scene)
            };
            let pair = scene.protected(&options)?;
            let mut guest = Connection::open(pair.network().client(), LIMIT)?;
            let mut load =
                || LoadReport::run(&mut guest, &["randwrite", "400", "4096", "4"]).map_err(Error::io("FT.DISK"));
            let since = clock::mono_us();
            let report = load()?;
            if side == Node::A {
                assert!((1..400).contains(&report.errors), "{report:?}");
                assert_still_protected(pair, since, "disk 0 (disk0): a write failed: No space left")?;
            } else {
                assert_eq!(report.errors, 0, "{report:?}");
                pair.wait_event(Node::A, since, LIMIT, "protection to end", |event| event.enters("solo"))?;
                wait_says(pair, Node::A, "No space left on device")?;
            }
            pair.remount(side, "size=96m")?;
            assert_eq!(load()?.errors, 0);
            pair.wait_protected(Node::A, LIMIT)?;
            assert_eq!(pair.wait_equal_images(0, LIMIT)?, None, "the first byte that differs");
        }
        Ok(())
    });
}

// ---- what a process refuses to start with ------------------------------------------------------------------------------------------

/// Starts a program on a host; it ends with this code and these words, and the files of its disk are as they were.
fn assert_refuses(pair: &Pair, (node, program): (Node, &str), config: &Path, code: i32, says: &str) -> Result<()> {
    let before = fs::read(pair.image(node, 0)).map_err(Error::io("an image"))?;
    let mut command = std::process::Command::new(pair.artifacts().program(program));
    command.arg("--config").arg(config).args(["--node", node.as_str()]);
    let ended = tools::run(pair.network().host(node), command, "", LIMIT)?;
    assert_eq!(ended.status.code(), Some(code), "{program}: {ended:?}");
    assert!(ended.stderr.contains(says), "{program} does not say {says:?}: {}", ended.stderr);
    assert_eq!(fs::read(pair.image(node, 0)).map_err(Error::io("an image"))?, before);
    Ok(())
}

const PROGRAMS: [(Node, &str); 2] = [(Node::A, "ft-primary"), (Node::B, "ft-backup")];

#[test]
fn images_that_cannot_be_used() {
    play("images_that_cannot_be_used", |scene| {
        let options = PairOptions { disk_space: Node::BOTH.map(|node| (node, SMALL)).into(), ..options(scene) };
        let pair = scene.prepare(&options)?;
        let plain = pair.config().to_owned();
        let sized = pair.altered_config("sized.toml", "name = \"disk0\"", "name = \"disk0\"\nsize = \"16MiB\"")?;
        for who in PROGRAMS {
            let image = pair.image(who.0, 0);
            assert_refuses(pair, who, &sized, 28, "has 8388608 bytes, it should have 16777216")?;
            pair.remount(who.0, "ro")?;
            assert_refuses(pair, who, &plain, 28, "no permission to open the disk image")?;
            pair.remount(who.0, "rw")?;
            shrink(&image, 1000)?;
            assert_refuses(pair, who, &plain, 28, "has 1000 bytes, which is not a positive multiple of 512")?;
            shrink(&image, DISK_BYTES)?;
        }
        Ok(())
    });
}

#[test]
fn image_or_map_of_another_vm_or_disk() {
    play("image_or_map_of_another_vm_or_disk", |scene| {
        let options = options(scene);
        let pair = scene.prepare(&options)?;
        let plain = pair.config().to_owned();
        for who in PROGRAMS {
            let path = pair.image(who.0, 0);
            let image = open_image(&path, None, false).map_err(|e| Error::answer("an image", e.to_string()))?;
            let storage = open_storage(&map_of(&path)).map_err(Error::io("a map"))?;
            let identity = DiskIdentity { vm: VmId(7), name: "disk0".into(), bytes: DISK_BYTES };
            let made = DirtyMap::open_or_create(storage, Arc::new(image), identity, Incarnation(1));
            drop(made.map_err(|e| Error::answer("a map", e.to_string()))?);
            let map = fs::read(map_of(&path)).map_err(Error::io("a map"))?;
            assert_refuses(pair, who, &plain, 29, "not to disk0 of VM")?;
            assert_eq!(fs::read(map_of(&path)).map_err(Error::io("a map"))?, map, "the map is as it was");
            fs::write(map_of(&path), vec![7; map.len()]).map_err(Error::io("a map"))?;
            assert_refuses(pair, who, &plain, 29, "move it away to have the whole disk compared anew")?;
            fs::remove_file(map_of(&path)).map_err(Error::io("a map"))?;
            let file = pair.dir().join(who.0.as_str()).join("journal");
            fs::remove_file(&file).or_else(absent).map_err(Error::io("a journal"))?;
            let storage = open_storage(&file).map_err(Error::io("a journal"))?;
            let made = Journal::open_or_create(storage, file, VmId(7), 1);
            drop(made.map_err(|e| Error::answer("a journal", e.to_string()))?);
            assert_refuses(pair, who, &plain, 29, "journal")?;
        }
        Ok(())
    });
}

/// Two processes with one image would destroy it: the second is kept out by a lock, whatever name it uses.
#[test]
fn image_that_both_sides_share() {
    play("image_that_both_sides_share", |scene| {
        let options = options(scene);
        let (pair, mut guest) = pair(scene, &options)?;
        assert_eq!(fill(&mut guest, 0..8, "one")?, (8, 0));
        let [a, b] = Node::BOTH.map(|node| pair.image(node, 0));
        pair.kill(Node::B)?;
        let (from, to) = (b.display().to_string(), a.display().to_string());
        let same = pair.altered_config("same.toml", &from, &to)?;
        assert_refuses(pair, PROGRAMS[1], &same, 28, "is in use by another process on this host")?;
        fs::rename(&b, pair.images(Node::B).join("kept.img")).map_err(Error::io("an image"))?;
        fs::hard_link(&a, &b).map_err(Error::io("a second name"))?;
        let plain = pair.config().to_owned();
        assert_refuses(pair, PROGRAMS[1], &plain, 28, "is in use by another process on this host")?;
        fs::remove_file(&b).map_err(Error::io("a second name"))?;
        fs::rename(pair.images(Node::B).join("kept.img"), &b).map_err(Error::io("an image"))?;
        assert_eq!(fill(&mut guest, 4..20, "two")?, (16, 0), "the owner is none the worse");
        pair.start_backup(Node::B)?;
        assert_equal(pair, Node::A)
    });
}

/// Images of different sizes are no pair: the backup says so and ends, the guest runs on.
#[test]
fn images_of_different_sizes() {
    play("images_of_different_sizes", |scene| {
        let options = options(scene);
        let pair = scene.prepare(&options)?;
        shrink(&pair.image(Node::B, 0), DISK_BYTES / 2)?;
        pair.start_backup(Node::B)?;
        pair.start_primary(Node::A, &[])?;
        let status = pair.daemon(Node::B).wait(LIMIT)?;
        assert_eq!(status.code(), Some(13), "{}", pair.logs());
        assert!(pair.daemon(Node::B).log_tail().contains("disk"), "{}", pair.logs());
        let mut guest = pair.wait_guest(LIMIT)?;
        assert_eq!(fill(&mut guest, 0..8, "one")?, (8, 0));
        Ok(())
    });
}

/// A disk that the guest may not write: its writes fail, nobody else's business.
#[test]
fn disk_that_is_read_only() {
    play("disk_that_is_read_only", |scene| {
        let options = options(scene);
        let pair = scene.prepare(&options)?;
        let config = pair.altered_config("ro.toml", "name = \"disk0\"", "name = \"disk0\"\nread_only = true")?;
        for node in Node::BOTH {
            fs::write(pair.image(node, 0), vec![5; usize::try_from(DISK_BYTES).unwrap_or(0)])
                .map_err(Error::io("an image"))?;
        }
        pair.start_with(Node::B, "ft-backup", &config, &[])?;
        pair.start_with(Node::A, "ft-primary", &config, &[])?;
        pair.wait_protected(Node::A, LIMIT)?;
        let mut guest = pair.wait_guest(LIMIT)?;
        assert_eq!(fill(&mut guest, 0..1, "one")?, (0, 1));
        assert!(matches!(ask(&mut guest, &["FT.DISK", "READ", "1"])?, Reply::Bulk(Some(bytes)) if bytes == [5; 4096]));
        assert_equal(pair, Node::A)
    });
}
