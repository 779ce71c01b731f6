//! The guest from the start to the end: set up, then the one loop that everything happens in.

use alloc::vec;
use alloc::vec::Vec;
use core::convert::Infallible;

use kv::cmdline::{self, Options};
use kv::resp::OutOfMemory;
use kv::{Database, DiskJob, Machine, Store};
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketSet};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Address};
use virtio_drivers::transport::{DeviceType, Transport};

use crate::blk::Blk;
use crate::clock::Clock;
use crate::console::println;
use crate::dirty::DirtyLoad;
use crate::disks::{Disks, MAX_DISKS};
use crate::net::Net;
use crate::serve::{self, Connection, Server};
use crate::work::WorkLoad;
use crate::{apic, boot, heap, pvh, virtio};

/// Frames taken from the device before the requests in them are served.
pub(crate) const INGRESS_BATCH: usize = 64;
/// Least RAM in bytes: below this the sockets' buffers do not fit.
const MIN_RAM: u64 = 32 << 20;

/// Time between two looks whether the last reply has left, in nanoseconds.
const POWER_OFF_POLL_NS: u64 = 1_000_000;

/// What commands may ask of the machine.
struct Guest {
    clock: Clock,
    dirty: DirtyLoad,
    work: WorkLoad,
    disks: Disks,
    counters: Counters,
    connected: usize,
    power_off: bool,
}

/// Counted by the loop.
#[derive(Default)]
struct Counters {
    received: u64,
    sent: u64,
    rounds: u64,
    sleeps: u64,
}

impl Machine for Guest {
    fn uptime_ms(&self) -> u64 {
        self.clock.now_ns() / 1_000_000
    }

    fn counters(&self, line: &mut dyn FnMut(&str, u64)) {
        line("device_interrupts", boot::device_interrupts());
        line("timer_interrupts", boot::timer_interrupts());
        line("frames_received", self.counters.received);
        line("frames_sent", self.counters.sent);
        line("loop_rounds", self.counters.rounds);
        line("sleeps", self.counters.sleeps);
        line("pages_dirtied", self.dirty.written());
        line("work_units", self.work.units());
        line("connections", u64::try_from(self.connected).unwrap_or(u64::MAX));
        line("heap_bytes", u64::try_from(heap::used()).unwrap_or(u64::MAX));
        line("uptime_ms", self.uptime_ms());
        line("tsc_khz", self.clock.tsc_khz());
    }

    fn dirty(&mut self, pages_per_second: u64, pages: Option<u64>) -> Result<(), OutOfMemory> {
        self.dirty.configure(pages_per_second, pages, self.clock.now_ns())
    }

    fn work(&mut self, on: bool) {
        self.work.set(on);
    }

    fn connected(&self) -> usize {
        self.connected
    }

    fn heap_used(&self) -> usize {
        heap::used()
    }

    fn power_off(&mut self) {
        self.power_off = true;
    }

    fn crash(&mut self) {
        println(format_args!("guest-kv: crashing, as ordered"));
        boot::crash()
    }

    fn disk(&mut self, session: u64, job: DiskJob) -> Result<(), &'static str> {
        self.disks.begin(session, job, self.clock.now_ns())
    }

    fn disks(&self, line: &mut dyn FnMut(&str, u64)) {
        self.disks.describe(line);
    }
}

/// Runs the guest.
///
/// # Errors
/// Why it cannot start.
#[expect(unsafe_code, reason = "claims the heap and the devices")]
pub(crate) fn run(start_info: u64) -> Result<Infallible, &'static str> {
    let handover = pvh::read_handover(start_info, boot::image_end())?;
    let options = cmdline::parse(handover.command_line()).map_err(|bad| {
        println(format_args!("guest-kv: cannot understand {:?} on the command line", bad.0));
        "bad command line"
    })?;
    let (start, size) = handover.ram;
    let size = size.min(options.heap.unwrap_or(u64::MAX));
    if size < MIN_RAM {
        return Err("too little RAM");
    }
    let buffers = u64::try_from(serve::BUFFERS).map_err(|_| "too little RAM")?;
    // SAFETY: RAM after the image and its stack; what the VMM left there has been copied out.
    let memory = unsafe { heap::reserve(start, serve::BUFFERS) }.ok_or("no RAM")?;
    // SAFETY: likewise, and after the part that was just taken.
    if !unsafe { heap::claim(start + buffers, size - buffers) } {
        return Err("too little RAM");
    }
    apic::init();
    let clock = Clock::calibrate();
    let (mut net, disks) = find_devices(&options).inspect_err(|_| {
        println(format_args!("guest-kv: command line {:?}", handover.command_line()));
    })?;
    let interface = configure(&options, &mut net);
    let disks = Disks::new(disks);
    let (dirty, work, counters) = (DirtyLoad::new(), WorkLoad::default(), Counters::default());
    let mut guest = Guest { clock, dirty, work, disks, counters, connected: 0, power_off: false };
    let database = open_log(&options, &mut guest)?;
    let [a, b, c, d] = options.address;
    let mac = EthernetAddress(net.mac());
    let kind = if net.is_legacy() { "legacy" } else { "modern" };
    let (mib, mhz) = ((size - buffers) >> 20, guest.clock.tsc_khz() / 1000);
    println(format_args!(
        "guest-kv ready {a}.{b}.{c}.{d}:{} mac {mac} ({kind} virtio-net) heap {mib} MiB tsc {mhz} MHz{}",
        options.port,
        LogLine(&database, &options),
    ));
    Loop::new(interface, net, database, guest, &options, memory).run()
}

/// What there is to say about the log at the start.
struct LogLine<'a>(&'a Database, &'a Options);

impl core::fmt::Display for LogLine<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Some(records) = self.0.replayed() else { return f.write_str(" no log") };
        let (keys, policy) = (self.0.store().len(), self.1.appendfsync.name());
        write!(f, " log {records} records replayed, {keys} keys, appendfsync {policy}")
    }
}

/// The data set: what the log on disk 0 holds, if there is such a disk.
fn open_log(options: &Options, guest: &mut Guest) -> Result<Database, &'static str> {
    let store = Store::new(boot::tsc());
    let mut disks = core::mem::take(&mut guest.disks.disks);
    let database = match disks.first_mut() {
        None if options.disk == Some(true) => return Err("disk=on, and there is no disk"),
        None => Database::in_memory(store),
        Some(mut disk) => {
            let read_only = disk.is_read_only();
            Database::open(store, &mut disk, boot::tsc(), read_only, options.appendfsync, guest).map_err(|error| {
                println(format_args!("guest-kv: disk 0: {error}"));
                "no log on the disk (disk=off does without)"
            })?
        }
    };
    guest.disks.log_end = database.log_end();
    guest.disks.disks = disks;
    Ok(database)
}

/// The first network device of the command line and its disks; every device gets its interrupt routed.
#[expect(unsafe_code, reason = "touches the registers that the command line names")]
fn find_devices(options: &Options) -> Result<(Net, Vec<Blk>), &'static str> {
    let (mut net, mut disks) = (None, Vec::new());
    for device in options.devices() {
        let Some(address) = u32::try_from(device.address).ok().filter(|_| device.size >= 0x108) else { continue };
        // Routed before the device starts: an edge on an input that is still masked is lost, and a device whose
        // interrupt nobody acknowledged raises no other.
        let routed = boot::set_device(device.irq, address) && apic::route(device.irq);
        // SAFETY: the VMM says that there are virtio-mmio registers; each device is looked at once.
        let Some(transport) = (unsafe { virtio::transport(device) }) else { continue };
        let kind = transport.device_type();
        let is_disk = kind == DeviceType::Block && options.disk != Some(false) && disks.len() < MAX_DISKS;
        let is_net = kind == DeviceType::Network && net.is_none();
        if (is_disk || is_net) && !routed {
            return Err("the interrupt of a device is not an input of the first I/O APIC");
        }
        if is_disk {
            disks.push(Blk::start(transport)?);
        } else if is_net {
            net = Some(Net::start(transport)?);
        }
    }
    let none = "no network device: the command line names none as virtio_mmio.device=<size>@<address>:<irq>";
    Ok((net.ok_or(none)?, disks))
}

fn configure(options: &Options, net: &mut Net) -> Interface {
    let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(net.mac())));
    config.random_seed = boot::tsc();
    let mut interface = Interface::new(config, net, Instant::ZERO);
    interface.update_ip_addrs(|addresses| {
        // There is room for one.
        let _ = addresses.push(IpCidr::new(Ipv4Address::from(options.address).into(), options.prefix));
    });
    if let Some(gateway) = options.gateway {
        // Likewise.
        let _ = interface.routes_mut().add_default_ipv4_route(gateway.into());
    }
    interface
}

/// Everything that lives as long as the guest.
struct Loop {
    interface: Interface,
    net: Net,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    server: Server<Guest>,
    /// Nanoseconds between two lines of counters, and when the next is due.
    report: Option<(u64, u64)>,
}

impl Loop {
    fn new(
        interface: Interface,
        net: Net,
        database: Database,
        guest: Guest,
        options: &Options,
        memory: &'static mut [u8],
    ) -> Self {
        let mut sockets = SocketSet::new(vec![]);
        let connections = serve::connections(&mut sockets, memory);
        let report = options.counters.map(|seconds| (u64::from(seconds) * 1_000_000_000, 0));
        let server = Server::new(database, guest, options.port);
        Self { interface, net, sockets, connections, server, report }
    }

    fn run(mut self) -> ! {
        loop {
            // Whatever interrupts from here on is a reason not to sleep at the end.
            let seen = boot::events();
            let now = self.server.machine.clock.now_ns();
            if self.round(now) {
                continue;
            }
            if self.server.machine.power_off && self.server.database.settle() && self.net.is_drained() {
                boot::power_off();
            }
            self.sleep(seen);
        }
    }

    /// Takes frames, serves requests, sends frames, dirties pages. True if there is more to do.
    fn round(&mut self, now: u64) -> bool {
        let instant = instant(now);
        let guest = &mut self.server.machine;
        guest.counters.rounds += 1;
        self.server.database.set_uptime(now / 1_000_000);
        self.interface.poll_maintenance(instant);
        let mut busy = true;
        for _ in 0..INGRESS_BATCH {
            let result = self.interface.poll_ingress_single(instant, &mut self.net, &mut self.sockets);
            if result == PollIngressSingleResult::None {
                busy = false;
                break;
            }
        }
        busy |= self.work_on_disks(now);
        busy |= self.server.serve(&mut self.connections, &mut self.sockets, instant.total_micros());
        busy |= self.server.database.work();
        let guest = &mut self.server.machine;
        guest.disks.submit(&mut self.server.database, &guest.clock);
        // A load whose time ran out since this round began has submitted nothing: no interrupt would come, and its answer is due.
        busy |= guest.disks.has_answer(guest.clock.now_ns());
        while self.interface.poll_egress(instant, &mut self.net, &mut self.sockets) != PollResult::None {}
        self.net.flush();
        let guest = &mut self.server.machine;
        (guest.counters.received, guest.counters.sent) = self.net.frames();
        guest.connected = serve::connected(&self.connections);
        busy |= guest.dirty.work(now);
        busy |= guest.work.work();
        self.report_counters(now);
        busy
    }

    /// Takes what the disks have done, and answers those who wait for it. True if the disks have done something.
    fn work_on_disks(&mut self, now: u64) -> bool {
        let Server { database, machine, .. } = &mut self.server;
        machine.disks.collect(database, &machine.clock);
        let Some((session, reply)) = machine.disks.answer(now) else { return false };
        serve::answer(&mut self.connections, session, reply);
        true
    }

    /// Sleeps until there is something to do, unless there is already.
    fn sleep(&mut self, seen: u32) {
        let guest = &mut self.server.machine;
        let now = guest.clock.now_ns();
        let network = self.interface.poll_at(instant(now), &self.sockets);
        let network = network.map(|at| u64::try_from(at.total_micros()).unwrap_or(0).saturating_mul(1000));
        let report = self.report.map(|(_, at)| at);
        // The ring is looked at again if the last reply is still in it: nothing else would wake the guest up.
        let leave = guest.power_off.then(|| now + POWER_OFF_POLL_NS);
        let log = self.server.database.next_deadline().map(|ms| ms.saturating_mul(1_000_000));
        let deadline = [network, guest.dirty.next(now), report, leave, log].into_iter().flatten().min();
        if deadline.is_some_and(|at| at <= now) && !self.net.is_full() {
            return;
        }
        let done = guest.disks.enable_interrupts();
        if !self.net.enable_interrupts() && !done {
            if let Some(at) = deadline.filter(|at| *at > now) {
                guest.clock.wake_at(at);
            }
            guest.counters.sleeps += 1;
            boot::wait(seen);
        }
        self.net.disable_interrupts();
        self.server.machine.disks.disable_interrupts();
    }

    fn report_counters(&mut self, now: u64) {
        let Some((period, at)) = &mut self.report else { return };
        if now < *at {
            return;
        }
        *at = now + *period;
        let (received, sent) = self.net.frames();
        println(format_args!(
            "guest-kv up {} ms, {} requests, {} keys, {received} frames in, {sent} out, {} device and {} timer interrupts",
            now / 1_000_000,
            self.server.requests(),
            self.server.database.store().len(),
            boot::device_interrupts(),
            boot::timer_interrupts(),
        ));
    }
}

fn instant(ns: u64) -> Instant {
    Instant::from_micros(i64::try_from(ns / 1000).unwrap_or(i64::MAX))
}
