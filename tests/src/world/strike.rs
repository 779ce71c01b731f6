//! Faults, carried out.

use failover::decide::Input;

use super::env::Event;
use super::faults::Fault;
use super::net::{ConnId, End};
use super::process::Part;
use super::storage::Supply;
use super::{MS, Program, World, node_name};

impl World {
    /// Something goes wrong, or is put right, now.
    pub fn strike(&mut self, fault: Fault) {
        if !matches!(fault, Fault::Forge(_)) {
            self.env.note(|| format!("FAULT {fault:?}"));
        }
        match fault {
            Fault::Cut(node) => self.env.net.cut[node] = true,
            Fault::Mend(node) => self.mend(node),
            Fault::Slow(node, extra) => self.env.net.slow[node] = extra,
            Fault::Kill(node) => self.kill(node),
            Fault::PowerOff(node) => self.power_off(node),
            Fault::PowerOn(node) => {
                self.env.conditions.host_up[node] = true;
                self.env.at(self.env.now + MS, Event::Start(node));
            }
            Fault::Pause(node, length) => {
                if self.nodes[node].process.is_some() && !self.nodes[node].paused {
                    self.nodes[node].paused = true;
                    self.env.at(self.env.now + length, Event::Resume(node));
                }
            }
            Fault::Reset => self.reset(),
            Fault::Truncate => self.damage(|net, conn, end, at| net.truncate(conn, end, at)),
            Fault::FlipBit => self.damage(|net, conn, end, at| net.flip_bit(conn, end, at)),
            Fault::Replay => {
                if let Some(old) = self.env.conditions.old_packet.clone() {
                    self.damage(|net, conn, _, _| net.inject(conn, End::Caller, old.clone()));
                }
            }
            Fault::Forge(another) => {
                self.env.net.living().into_iter().any(|conn| self.env.net.forge(conn, another));
            }
            Fault::Arbiter(node, way) => self.env.conditions.way[node] = way,
            Fault::ArbiterSlow(extra) => self.env.conditions.arbiter_slow = extra,
            Fault::RollBack(steps) => self.roll_back(steps),
            Fault::Command(node, command) => {
                let ticket = self.ticket();
                if let Some(process) = &mut self.nodes[node].process {
                    process.input(Input::Command { ticket, command }, &mut self.env);
                }
            }
            Fault::GuestEnds(end) => {
                for node in self.nodes.iter_mut().filter(|node| !node.paused) {
                    if let Some(process) = &mut node.process
                        && let Part::Owner(owner) = &mut process.part
                    {
                        owner.guest_ends(end, &mut process.base, &mut self.env);
                    }
                }
            }
            Fault::Lan(node, cut) => self.env.conditions.lan_cut[node] = cut,
            Fault::DiskFull(node, full) => self.env.conditions.disk_full[node] = full,
            Fault::Storm(on) => self.env.conditions.storm = on,
            Fault::SlowApplier(on) => self.env.conditions.slow_applier = on,
            Fault::CutWithin(node, changes) => self.with_supply(node, |supply| supply.cut_within(changes)),
            Fault::Storage(node, trouble) => self.with_supply(node, |supply| supply.set_trouble(trouble)),
            Fault::SlowDisk(on) => self.env.conditions.slow_disk = on,
            Fault::Skew(node, skew) => {
                if self.nodes[node].skew != skew {
                    self.nodes[node].skew = skew;
                    self.kill(node);
                }
            }
        }
    }

    fn roll_back(&mut self, steps: usize) {
        if self.env.register.roll_back(steps) {
            // Within one generation nobody can tell an old record from a new one: what was written since is lost, and with it what was promised. Generations
            // must hold all the same.
            self.env.ghost.operator_forced();
        }
    }

    fn with_supply(&self, node: usize, change: impl FnOnce(&Supply)) {
        if let Some(hosts) = &self.env.hosts {
            change(&hosts[node].supply);
        }
    }

    fn mend(&mut self, node: usize) {
        for (conn, end, owed) in self.env.net.mend(node) {
            // Retransmission finds out a little later.
            let at = self.env.now + self.env.rng.range(MS, 100 * MS);
            for _ in 0..owed {
                self.env.at(at, Event::Deliver(conn, end));
            }
        }
    }

    fn kill(&mut self, node: usize) {
        if self.nodes[node].process.is_some() {
            self.end(node);
            self.nodes[node].program = Program::Primary;
            let after = self.env.rng.range(5, 2_000) * MS;
            self.env.at(self.env.now + after, Event::Start(node));
        }
    }

    pub(super) fn power_off(&mut self, node: usize) {
        self.env.files_lose(node);
        self.env.conditions.host_up[node] = false;
        self.nodes[node].paused = false;
        self.nodes[node].deferred.clear();
        let Some(process) = self.nodes[node].process.take() else { return };
        let who = process.base.who;
        let env = &mut self.env;
        let rng = &mut env.rng;
        env.net.lose_unsent(who, |waiting| usize::try_from(rng.range(0, waiting as u64 + 1)).expect("a few packets"));
        env.net.forget(who, env.now);
        env.ghost.died(who, env.now);
        self.nodes[node].program = Program::Primary;
        self.env.note(|| format!("{} is without power", node_name(node)));
    }

    fn reset(&mut self) {
        let living = self.env.net.living();
        if living.is_empty() {
            return;
        }
        let conn = living[usize::try_from(self.env.rng.range(0, living.len() as u64)).expect("a few")];
        // Both ends notice, each in its time: whoever's end is closed here reads the other's.
        let late = self.env.rng.range(0, 20 * MS);
        for (end, after) in [(End::Caller, 0), (End::Callee, late)] {
            self.env.net.inject_end(conn, end);
            self.env.at(self.env.now + after, Event::Deliver(conn, end));
        }
    }

    /// Damages what is on the way on some connection on which something is.
    fn damage(&mut self, how: impl Fn(&mut super::net::Net, ConnId, End, u64) -> bool) {
        for conn in self.env.net.living() {
            let end = if self.env.one_in(2) { End::Caller } else { End::Callee };
            let at = self.env.rng.next_u64();
            if self.env.one_in(2) && how(&mut self.env.net, conn, end, at) {
                return;
            }
        }
    }
}
