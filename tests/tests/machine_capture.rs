//! What every capture strategy copies of a KVM guest that goes on running is what its memory was in the pause: compared byte by byte, all of RAM, under the
//! demo guest's own load with a client, at random instants, on write and after pre-copy.
//!
//! `FT_CAPTURES` sets the number of checkpoints of each kind (250), `FT_SEED` the instants.

use std::sync::Arc;
use std::time::Duration;

use failover::config::{CaptureStrategy, Precopy};
use primary::capture::Capture;
use primary::staging::{Arena, StagedPages};
use tests::machine::client::Counter;
use tests::machine::{Recorder, build, demo_config, demo_guest, no_kvm};
use tests::real::rng::Rng;
use vmm::{GuestRam, KvmMachine, Machine, PAGE_SIZE, PageNo, PausedVm, SocketPort, Tracking};

const RAM_BYTES: u64 = 48 << 20;

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}={v:?} is not a number")))
}

/// All of a guest's memory: one region, so that a page's number is its place.
struct Image(Vec<[u8; PAGE_SIZE]>);

impl Image {
    fn of(ram: &GuestRam) -> Self {
        let mut image = Self(vec![[0; PAGE_SIZE]; ram.pages().count()]);
        image.read(ram);
        image
    }

    fn read(&mut self, ram: &GuestRam) {
        (0..).zip(&mut self.0).for_each(|(page, into)| ram.copy_out(PageNo(page), into).expect("a page of RAM"));
    }

    fn apply(&mut self, pages: &StagedPages) {
        for (page, bytes) in pages.indexes.iter().zip(pages.bytes().as_chunks().0) {
            self.0[usize::try_from(page.0).expect("a small number")] = *bytes;
        }
    }
}

/// Checkpoints of one guest, each applied to a copy that is then compared with the memory as it was in the pause.
fn captures(
    strategy: CaptureStrategy,
    precopy: Precopy,
    tracking: Tracking,
    vcpus: u8,
) -> failover::status::CaptureStatus {
    let (outputs, frames) = Recorder::new();
    let (guest_end, host_end) = SocketPort::pair().expect("a socket pair");
    let config = demo_config(demo_guest(), vcpus, RAM_BYTES);
    let mut machine: KvmMachine = build(&config, &outputs, &Arc::new(guest_end));
    machine.load().expect("the demo guest is bootable");
    machine.track_dirty(tracking).expect("writes can be logged");
    let mut copy = Image::of(machine.ram());
    machine.run().expect("a loaded machine runs");
    let client = Counter::start(frames, Arc::new(host_end), vec!["FT.DIRTY 40000 2048".into()]);
    let (capture, arena) = (Capture::new(strategy, precopy), Arena::new(1 << 30));
    let mut expected = Image(copy.0.clone());
    let mut rng = Rng::new(from_env("FT_SEED", 1));
    let (mut pages, count) = (0, from_env("FT_CAPTURES", 250));
    for n in 1..=count {
        std::thread::sleep(rng.duration(Duration::from_micros(50), Duration::from_millis(12)));
        let early = capture.precopy(&mut machine, &arena).expect("pages can be copied before the pause");
        let mut paused = PausedVm::pause(&mut machine).expect("the guest stops");
        paused.capture().expect("the state can be read");
        let dirty = paused.take_dirty().expect("the log can be read");
        expected.read(paused.ram());
        let copying = capture.copy(&paused, &arena, dirty, early, true).expect("pages are safe from the guest");
        paused.resume().expect("the guest resumes");
        let (staged, dirty) = capture.finish(copying).expect("the rest can be copied");
        assert_eq!(staged.len(), dirty.len(), "checkpoint {n}");
        dirty.retire();
        copy.apply(&staged);
        pages += staged.len();
        let differing: Vec<_> = (0..copy.0.len()).filter(|page| copy.0[*page] != expected.0[*page]).collect();
        assert!(differing.is_empty(), "checkpoint {n}: pages {differing:x?} are not what they were in the pause");
        assert!(client.is_alive(), "checkpoint {n}: {:?}", machine.events().try_recv());
    }
    let answers = client.finish().expect("every answer in its turn");
    let status = capture.status();
    println!(
        "{strategy:?}, pre-copy {precopy:?}, {tracking:?}, {vcpus} vCPU: {count} checkpoints, {pages} pages, {answers} answers; {status:?}"
    );
    assert!(answers > count / 20, "the guest served {answers} requests in {count} checkpoints");
    status
}

#[test]
fn copies_on_write_are_of_the_pause() {
    if no_kvm("copies_on_write_are_of_the_pause") {
        return;
    }
    for (precopy, vcpus) in [(Precopy::Never, 1), (Precopy::Always, 2)] {
        let status = captures(CaptureStrategy::CopyOnWrite, precopy, Tracking::HotPages, vcpus);
        assert!(status.copied_on_write_total > 0 && status.copied_on_write_total < status.protected_pages_total);
        assert_eq!(status.precopied_pages_total > 0, precopy == Precopy::Always);
    }
}

#[test]
fn copies_before_the_pause_are_part_of_it() {
    if no_kvm("copies_before_the_pause_are_part_of_it") {
        return;
    }
    for tracking in [Tracking::Plain, Tracking::HotPages] {
        let status = captures(CaptureStrategy::Postponed, Precopy::Always, tracking, 1);
        assert!(status.precopied_pages_total > 0, "{status:?}");
        assert!(tracking == Tracking::HotPages || status.precopied_again_total > 0, "{status:?}");
    }
}

#[test]
fn what_auto_chooses_is_right() {
    if !no_kvm("what_auto_chooses_is_right") {
        captures(CaptureStrategy::Auto, Precopy::Auto, Tracking::HotPages, 1);
    }
}
