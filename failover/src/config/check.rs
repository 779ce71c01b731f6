//! Bounds of every number in `pair.toml`, and the relations between them.

use std::path::Path;
use std::time::Duration;

use super::{ArbiterSection, Console, MachineKind, NodeSection, PairConfig, format_size, format_span};

/// Longest path of a unix socket, in bytes (`sun_path` less the final zero).
const MAX_SOCKET_PATH: usize = 107;
/// Longest name of a network device, in bytes.
const MAX_DEVICE_NAME: usize = 15;
/// Longest kernel command line, in bytes.
const MAX_CMDLINE: usize = 2048;

/// What is wrong, and where.
#[derive(Debug)]
pub(super) struct Wrong {
    pub(super) key: String,
    pub(super) cause: String,
}

pub(super) fn wrong(key: impl Into<String>, cause: impl Into<String>) -> Wrong {
    Wrong { key: key.into(), cause: cause.into() }
}

/// Text that came from a file or a person, safe to print: quoted, bounded, no control characters.
pub(super) fn shown(text: &str) -> String {
    let short: String = text.chars().take(80).collect();
    let dots = if short.len() < text.len() { "…" } else { "" };
    format!("{short:?}{dots}")
}

pub(super) fn span_within(key: &str, value: Duration, least: Duration, most: Duration) -> Result<(), Wrong> {
    if value < least || value > most {
        let cause = format!("{} is out of bounds: {} to {}", format_span(value), format_span(least), format_span(most));
        return Err(wrong(key, cause));
    }
    Ok(())
}

fn size_within(key: &str, value: u64, least: u64, most: u64) -> Result<(), Wrong> {
    if value < least || value > most {
        let cause = format!("{} is out of bounds: {} to {}", format_size(value), format_size(least), format_size(most));
        return Err(wrong(key, cause));
    }
    Ok(())
}

impl PairConfig {
    pub(super) fn check(&self) -> Result<(), Wrong> {
        self.check_vm()?;
        self.check_epoch()?;
        self.check_timers()?;
        self.check_limits()?;
        self.check_arbiter()?;
        self.check_nodes()?;
        self.check_disks()
    }

    fn check_arbiter(&self) -> Result<(), Wrong> {
        match &self.arbiter {
            ArbiterSection::File { path } if path.file_name().is_none() => Err(wrong("arbiter.path", "names no file")),
            ArbiterSection::File { path: _ } => Ok(()),
            ArbiterSection::Etcd(section) => section.check(),
        }
    }

    fn check_vm(&self) -> Result<(), Wrong> {
        let vm = &self.vm;
        if vm.id.0 == 0 {
            return Err(wrong("vm.id", "must not be zero: use a random UUID, the same on both hosts"));
        }
        size_within("vm.memory", vm.memory, 1 << 20, 1 << 42)?;
        if !vm.memory.is_multiple_of(4096) {
            return Err(wrong("vm.memory", "must be a multiple of 4KiB"));
        }
        if vm.vcpus == 0 || vm.vcpus > 2 {
            return Err(wrong("vm.vcpus", format!("{} vCPUs: 1 or 2 are supported", vm.vcpus)));
        }
        if vm.machine == MachineKind::Kvm && vm.kernel.is_none() {
            return Err(wrong("vm.kernel", "missing: the path of a PVH ELF or vmlinux (or machine = \"model\")"));
        }
        if vm.cmdline.len() > MAX_CMDLINE || vm.cmdline.chars().any(char::is_control) {
            return Err(wrong("vm.cmdline", format!("at most {MAX_CMDLINE} bytes, no control characters")));
        }
        Ok(())
    }

    fn check_timers(&self) -> Result<(), Wrong> {
        let (ms, hour) = (Duration::from_millis(1), Duration::from_secs(3600));
        let t = &self.timers;
        span_within("timers.heartbeat", t.heartbeat, ms, Duration::from_secs(10))?;
        span_within("timers.solo", t.solo, 3 * ms, Duration::from_secs(60))?;
        span_within("timers.takeover", t.takeover, 5 * ms, Duration::from_secs(120))?;
        span_within("timers.eof_grace", t.eof_grace, ms, Duration::from_secs(10))?;
        span_within("timers.max_hold", t.max_hold, 50 * ms, Duration::from_secs(60))?;
        span_within("timers.fenced_keep", t.fenced_keep, Duration::from_secs(1), 24 * hour)?;
        span_within("timers.isolation_halt", t.isolation_halt, Duration::from_secs(1), hour)?;
        span_within("timers.protect_retry", t.protect_retry, 100 * ms, hour)?;
        span_within("timers.arbiter_probe", t.arbiter_probe, 100 * ms, Duration::from_secs(60))?;
        if t.takeover <= t.solo {
            let cause = format!(
                "{} must be longer than timers.solo ({}): on a cut link the VM stays where it is",
                format_span(t.takeover),
                format_span(t.solo)
            );
            return Err(wrong("timers.takeover", cause));
        }
        if t.heartbeat * 3 >= t.solo {
            let cause = format!(
                "{} is too long: three of them must be shorter than timers.solo ({})",
                format_span(t.heartbeat),
                format_span(t.solo)
            );
            return Err(wrong("timers.heartbeat", cause));
        }
        if t.eof_grace > t.solo {
            return Err(wrong(
                "timers.eof_grace",
                format!("must not be longer than timers.solo ({})", format_span(t.solo)),
            ));
        }
        if t.isolation_halt <= t.takeover {
            return Err(wrong("timers.isolation_halt", "must be longer than timers.takeover"));
        }
        Ok(())
    }

    fn check_limits(&self) -> Result<(), Wrong> {
        let limits = &self.limits;
        let (least, most) = (1 << 20, 1 << 40);
        size_within("limits.staging", limits.staging, least, most)?;
        size_within("limits.inbox", limits.inbox, least, most)?;
        size_within("limits.backlog", limits.backlog, least, most)?;
        size_within("limits.disk_log", limits.disk_log, least, most)?;
        size_within("limits.journal", limits.journal, least, most)?;
        size_within("limits.output", limits.output, 64 << 10, most)
    }

    fn check_nodes(&self) -> Result<(), Wrong> {
        let mut nodes = self.nodes.iter();
        let (Some((name_a, a)), Some((name_b, b)), None) = (nodes.next(), nodes.next(), nodes.next()) else {
            return Err(wrong(
                "nodes",
                format!("{} nodes: a pair has exactly two, [nodes.a] and [nodes.b]", self.nodes.len()),
            ));
        };
        for (name, node) in &self.nodes {
            self.check_node(name.as_str(), node)?;
        }
        let same = |what: &str| {
            let cause = format!("the same as that of node {name_a}: each node needs its own");
            Err(wrong(format!("nodes.{name_b}.{what}"), cause))
        };
        if a.replication == b.replication {
            return same("replication");
        }
        // On two hosts the same path is two files. (Two namespaces of one host may look like two hosts: locks tell then.)
        let one_host = a.replication.ip() == b.replication.ip();
        if one_host && a.control == b.control {
            return same("control");
        }
        if one_host && a.state_dir == b.state_dir {
            return same("state_dir");
        }
        Ok(())
    }

    fn check_node(&self, name: &str, node: &NodeSection) -> Result<(), Wrong> {
        let key = |what: &str| format!("nodes.{name}.{what}");
        if node.replication.port() == 0
            || node.replication.ip().is_unspecified()
            || node.replication.ip().is_multicast()
        {
            return Err(wrong(key("replication"), "must be the address and port that the other node connects to"));
        }
        if !node.replication.ip().is_loopback() && !self.link.insecure_lab {
            let cause = format!(
                "{} is not loopback, and the link is not authenticated: use 127.0.0.1, or say [link] insecure_lab = true",
                node.replication
            );
            return Err(wrong(key("replication"), cause));
        }
        for (what, device) in [("tap", Some(&node.tap)), ("bridge", node.bridge.as_ref())] {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
            let Some(device) = device else { continue };
            if device.is_empty()
                || device.len() > MAX_DEVICE_NAME
                || !device.bytes().all(allowed)
                || device == "."
                || device == ".."
            {
                return Err(wrong(key(what), format!("not a device name (1 to {MAX_DEVICE_NAME} letters and digits)")));
            }
        }
        check_socket(&key("control"), &node.control)?;
        if let Some(Console::Unix(path)) = &node.console {
            check_socket(&key("console"), path)?;
        }
        if node.health.is_some_and(|health| health.port() == 0) {
            return Err(wrong(key("health"), "port 0: name the port that probes connect to"));
        }
        Ok(())
    }

    /// What follows from the timers, for people.
    pub fn derived(&self) -> String {
        let t = &self.timers;
        let heartbeats = t.solo.as_micros() / t.heartbeat.as_micros().max(1);
        let span = format_span;
        [
            self.derived_epoch(),
            self.derived_overload(),
            self.derived_capture(),
            format!(
                "heartbeats that may be lost in a row before the primary holds output: {}",
                heartbeats.saturating_sub(1)
            ),
            format!(
                "backup killed: output stalls for about {} (closed connection) to {} (silence)",
                span(t.eof_grace),
                span(t.solo)
            ),
            format!(
                "primary killed: takeover begins after about {} (closed connection) to {} (silence)",
                span(t.eof_grace),
                span(t.takeover)
            ),
            format!(
                "link cut: the primary has {} to go on alone before the backup contends",
                span(t.takeover.saturating_sub(t.solo))
            ),
            format!(
                "frames held for longer than {} are dropped; a fenced guest is kept for {}",
                span(t.max_hold),
                span(t.fenced_keep)
            ),
            self.derived_disks(),
            match &self.arbiter {
                ArbiterSection::File { path: _ } => {
                    "arbiter: a file, for two processes on one host; two hosts need etcd".to_owned()
                }
                ArbiterSection::Etcd(section) => section.derived(),
            },
            format!(
                "link: {}",
                if self.link.insecure_lab {
                    "INSECURE (insecure_lab = true): neither authenticated nor encrypted"
                } else {
                    "loopback only"
                }
            ),
        ]
        .join("\n")
    }
}

fn check_socket(key: &str, path: &Path) -> Result<(), Wrong> {
    let length = path.as_os_str().len();
    if path.file_name().is_none() || length > MAX_SOCKET_PATH {
        return Err(wrong(key, format!("{length} bytes: the path of a unix socket has 1 to {MAX_SOCKET_PATH}")));
    }
    Ok(())
}
