//! `pair.toml`: one file, the same on both hosts; `--node` picks a side. Plain data, checked before anything is built on it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use replication_proto::{NodeName, VmId};
use serde::{Deserialize, Serialize};

mod check;
mod disks;
mod epoch;
mod etcd;
mod units;

pub use disks::{DiskName, DiskPaths, DiskSection, MAX_DISKS};
pub use epoch::{CaptureStrategy, EPOCHS_IN_FLIGHT, EpochPace, EpochSection, Overload, Precopy};
pub use etcd::EtcdSection;
pub use units::{format_size, format_span, parse_size, parse_span};

use crate::arbiter::NodeRef;
use crate::decide::{ColdStart, CoreConfig, CoreTimers, OnBackupLoss, Rejoin, Role};
use crate::text::harmless;
use replication_proto::{Generation, Incarnation};

/// Longest configuration file, in bytes.
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// A wrong configuration: one line that names the place and says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{file}: {cause}")]
    Unreadable {
        /// The file.
        file: String,
        /// The cause.
        cause: String,
    },
    /// Not TOML, an unknown key, or a value of the wrong form.
    #[error("{file} line {line}: {cause}")]
    Syntax {
        /// The file.
        file: String,
        /// Line number, from 1.
        line: usize,
        /// The cause, with the line's text.
        cause: String,
    },
    /// A value is out of its bounds or contradicts another.
    #[error("{file}: {key}: {cause}")]
    Invalid {
        /// The file.
        file: String,
        /// The key, as `section.key`.
        key: String,
        /// The cause, and what to write.
        cause: String,
    },
}

/// Name of a VM: 1 to 64 characters out of letters, digits, `.`, `_` and `-`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

impl VmName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for VmName {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if name.is_empty() || name.len() > 64 || !name.bytes().all(allowed) || name.starts_with('.') {
            return Err("not a VM name (1 to 64 letters, digits, '.', '_', '-', not starting with '.')");
        }
        Ok(Self(name))
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> Self {
        name.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// An Ethernet address, written `52:54:00:12:34:56`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl TryFrom<String> for Mac {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let wrong = "not a MAC address (write it like \"52:54:00:12:34:56\", unicast)";
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or(wrong)?, 16).map_err(|_| wrong)?;
        }
        if parts.next().is_some() || bytes[0] & 1 == 1 || bytes == [0; 6] {
            return Err(wrong);
        }
        Ok(Self(bytes))
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineKind {
    /// A KVM virtual machine.
    #[default]
    Kvm,
    /// The model machine: no KVM needed, for tests and demonstrations only.
    Model,
}

/// `[vm]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSection {
    /// Name for people; `ftctl failover --force --confirm NAME` asks for it.
    pub name: VmName,
    /// Identity; never changes.
    pub id: VmId,
    /// What runs it.
    #[serde(default)]
    pub machine: MachineKind,
    /// Guest memory in bytes, a multiple of 4096.
    #[serde(with = "units::size")]
    pub memory: u64,
    /// Number of vCPUs.
    #[serde(default = "defaults::vcpus")]
    pub vcpus: u8,
    /// PVH ELF or vmlinux; needed on KVM. A relative path starts at the configuration file.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// The guest's address; derived from `id` when absent.
    pub mac: Option<Mac>,
}

impl VmSection {
    /// The configured address, or one derived from the VM's identity: the same on both hosts.
    pub fn mac(&self) -> Mac {
        self.mac.unwrap_or_else(|| {
            let mut folded = [0_u8; 3];
            for (at, byte) in self.id.0.to_be_bytes().into_iter().enumerate() {
                folded[at % 3] ^= byte;
            }
            Mac([0x52, 0x54, 0x00, folded[0], folded[1], folded[2]])
        })
    }
}

/// `[timers]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TimersSection {
    /// Time between two heartbeats.
    #[serde(with = "units::span")]
    pub heartbeat: Duration,
    /// The primary goes on alone after this much silence.
    #[serde(with = "units::span")]
    pub solo: Duration,
    /// The backup takes over after this much silence.
    #[serde(with = "units::span")]
    pub takeover: Duration,
    /// A closed connection counts as silence after this.
    #[serde(with = "units::span")]
    pub eof_grace: Duration,
    /// Frames held for longer are dropped (R8).
    #[serde(with = "units::span")]
    pub max_hold: Duration,
    /// A fenced guest is kept for this long.
    #[serde(with = "units::span")]
    pub fenced_keep: Duration,
    /// A primary that reaches nobody halts after this.
    #[serde(with = "units::span")]
    pub isolation_halt: Duration,
    /// Least pause between a loss of protection and the next base copy.
    #[serde(with = "units::span")]
    pub protect_retry: Duration,
    /// The record is read this often while nothing happens.
    #[serde(with = "units::span")]
    pub arbiter_probe: Duration,
}

/// `[policy]`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicySection {
    /// Go on alone, or hold all output.
    pub on_backup_loss: OnBackupLoss,
    /// Whether the recorded owner boots anew after everything was lost.
    pub cold_start: ColdStart,
    /// Whether a fenced side becomes the backup by itself.
    pub rejoin: Rejoin,
}

/// A share of something, written `"20%"`: 1 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Percent(u8);

impl Percent {
    /// As a part of one: above 0, at most 1.
    pub fn share(self) -> f64 {
        f64::from(self.0) / 100.0
    }
}

impl TryFrom<String> for Percent {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let number = text.strip_suffix('%').and_then(|number| number.parse().ok());
        number.filter(|number| (1..=100).contains(number)).map(Self).ok_or("not a share (write \"1%\" to \"100%\")")
    }
}

impl From<Percent> for String {
    fn from(percent: Percent) -> Self {
        format!("{}%", percent.0)
    }
}

/// `[protect]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProtectSection {
    /// Most of its time that a base is copied in. Less when the guest's vCPUs have to wait for a processor meanwhile.
    pub base_share: Percent,
}

/// `[limits]`, all in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSection {
    /// Staged checkpoint bytes in flight at the primary.
    #[serde(with = "units::size")]
    pub staging: u64,
    /// Bytes of one incomplete epoch at the backup.
    #[serde(with = "units::size")]
    pub inbox: u64,
    /// Committed but unapplied bytes at the backup.
    #[serde(with = "units::size")]
    pub backlog: u64,
    /// Held output.
    #[serde(with = "units::size")]
    pub output: u64,
    /// Changes of disks in one epoch at the primary: over it, the guest's writers wait for the next checkpoint.
    #[serde(with = "units::size")]
    pub disk_log: u64,
    /// The journal file at the backup: over it, images are synced and it starts anew.
    #[serde(with = "units::size")]
    pub journal: u64,
}

/// `[arbiter]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum ArbiterSection {
    /// A file on a local filesystem that both processes see.
    File {
        /// The file.
        path: PathBuf,
    },
    /// An etcd cluster.
    Etcd(Box<EtcdSection>),
}

/// `[link]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkSection {
    /// Accept an unauthenticated, unencrypted replication link that is not loopback.
    pub insecure_lab: bool,
    /// Send what changed in a page since its last copy, where that is less. Costs each side a copy of the pages that change often, 64 MiB at most.
    pub patches: bool,
}

/// Where the guest's console goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Console {
    /// Appended to a file.
    File(PathBuf),
    /// A unix socket that one client at a time may open.
    Unix(PathBuf),
    /// The process's own terminal.
    Stdio,
}

impl TryFrom<String> for Console {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let path = |text: &str| (!text.is_empty()).then(|| PathBuf::from(text));
        let wrong = "not a console (write a file's path, \"unix:PATH\" or \"stdio\")";
        match text.split_once(':') {
            Some(("unix", rest)) => path(rest).map(Self::Unix).ok_or(wrong),
            Some(("file", rest)) => path(rest).map(Self::File).ok_or(wrong),
            _ if text == "stdio" => Ok(Self::Stdio),
            _ => path(&text).map(Self::File).ok_or(wrong),
        }
    }
}

impl From<Console> for String {
    fn from(console: Console) -> Self {
        match console {
            Console::File(path) => path.display().to_string(),
            Console::Unix(path) => format!("unix:{}", path.display()),
            Console::Stdio => "stdio".into(),
        }
    }
}

/// `[nodes.NAME]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSection {
    /// Where this node listens for the stream when it is the backup.
    pub replication: SocketAddr,
    /// The guest's tap device on this host.
    pub tap: String,
    /// The bridge that the tap belongs to; informational.
    pub bridge: Option<String>,
    /// The control socket.
    pub control: PathBuf,
    /// The HTTP listener for probes and metrics; none when absent.
    pub health: Option<SocketAddr>,
    /// Where the console goes; default `console.log` in the state directory.
    pub console: Option<Console>,
    /// What this node remembers across restarts.
    pub state_dir: PathBuf,
    /// This node's images (raw files or block devices), one for each `[[disk]]`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disks: DiskPaths,
}

impl NodeSection {
    /// The configured console, or `console.log` in the state directory.
    pub fn console(&self) -> Console {
        self.console.clone().unwrap_or_else(|| Console::File(self.state_dir.join("console.log")))
    }
}

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairConfig {
    /// The guest.
    pub vm: VmSection,
    /// Its disks, in the order in which it sees them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disk: Vec<DiskSection>,
    /// Checkpointing.
    #[serde(default)]
    pub epoch: EpochSection,
    /// Intervals.
    #[serde(default)]
    pub timers: TimersSection,
    /// Choices.
    #[serde(default)]
    pub policy: PolicySection,
    /// How protection comes about.
    #[serde(default)]
    pub protect: ProtectSection,
    /// Memory bounds.
    #[serde(default)]
    pub limits: LimitsSection,
    /// Who decides.
    pub arbiter: ArbiterSection,
    /// The replication link.
    #[serde(default)]
    pub link: LinkSection,
    /// Exactly two.
    pub nodes: BTreeMap<NodeName, NodeSection>,
}

mod defaults {
    use super::{Duration, LimitsSection, LinkSection, Percent, ProtectSection, TimersSection};

    pub(super) fn vcpus() -> u8 {
        1
    }

    impl Default for TimersSection {
        fn default() -> Self {
            Self {
                heartbeat: Duration::from_millis(20),
                solo: Duration::from_millis(150),
                takeover: Duration::from_millis(300),
                eof_grace: Duration::from_millis(20),
                max_hold: Duration::from_secs(1),
                fenced_keep: Duration::from_secs(600),
                isolation_halt: Duration::from_secs(10),
                protect_retry: Duration::from_secs(1),
                arbiter_probe: Duration::from_secs(1),
            }
        }
    }

    impl Default for LinkSection {
        fn default() -> Self {
            Self { insecure_lab: false, patches: true }
        }
    }

    impl Default for ProtectSection {
        fn default() -> Self {
            Self { base_share: Percent(100) }
        }
    }

    impl Default for LimitsSection {
        fn default() -> Self {
            Self {
                staging: 128 << 20,
                inbox: 256 << 20,
                backlog: 256 << 20,
                output: 64 << 20,
                disk_log: 64 << 20,
                journal: 256 << 20,
            }
        }
    }
}

impl PairConfig {
    /// Reads and checks a file. Relative paths in it start at its directory.
    ///
    /// # Errors
    /// [`ConfigError`]: one line that names the place and says what to do.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let file = path.display().to_string();
        let unreadable = |cause: String| ConfigError::Unreadable { file: file.clone(), cause };
        let opened = File::open(path).map_err(|error| unreadable(error.to_string()))?;
        let mut bytes = Vec::new();
        // One byte more than allowed tells a file that is too long from one that just fits.
        opened.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| unreadable(error.to_string()))?;
        if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_FILE_BYTES) {
            return Err(unreadable(format!("longer than {}: not a pair.toml", format_size(MAX_FILE_BYTES))));
        }
        if bytes.starts_with(&[0xFF, 0xFE]) || bytes.starts_with(&[0xFE, 0xFF]) {
            return Err(unreadable("UTF-16 text: save it as UTF-8".into()));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            unreadable(format!("not UTF-8 text (byte {}): save it as UTF-8", error.utf8_error().valid_up_to()))
        })?;
        let directory = path.parent().unwrap_or(Path::new(""));
        Self::parse(&text, &file, directory)
    }

    /// Reads and checks the text of a file; `file` is its name in messages, `directory` where its relative paths start.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn parse(text: &str, file: &str, directory: &Path) -> Result<Self, ConfigError> {
        let text = text.strip_prefix('\u{FEFF}').unwrap_or(text);
        let mut config: Self = toml::from_str(text).map_err(|error| syntax(text, file, &error))?;
        config.resolve(directory);
        config.check().map_err(|wrong| ConfigError::Invalid {
            file: file.into(),
            key: wrong.key,
            cause: wrong.cause,
        })?;
        Ok(config)
    }

    fn resolve(&mut self, directory: &Path) {
        let absolute = |path: &mut PathBuf| *path = directory.join(&*path);
        self.vm.kernel.iter_mut().for_each(absolute);
        self.vm.initrd.iter_mut().for_each(absolute);
        match &mut self.arbiter {
            ArbiterSection::File { path } => absolute(path),
            ArbiterSection::Etcd(section) => section.resolve(directory),
        }
        for node in self.nodes.values_mut() {
            absolute(&mut node.control);
            absolute(&mut node.state_dir);
            node.disks.values_mut().for_each(absolute);
            if let Some(Console::File(path) | Console::Unix(path)) = &mut node.console {
                absolute(path);
            }
        }
    }

    /// The section of a node, if there is one of that name.
    pub fn node(&self, name: &NodeName) -> Option<&NodeSection> {
        self.nodes.get(name)
    }

    /// The other node.
    pub fn peer_of(&self, name: &NodeName) -> Option<(&NodeName, &NodeSection)> {
        self.nodes.contains_key(name).then(|| self.nodes.iter().find(|(other, _)| *other != name)).flatten()
    }

    /// The node that is called `name`, or an error that names those that exist.
    ///
    /// # Errors
    /// One line, for a wrong `--node`.
    pub fn pick(&self, name: &str) -> Result<NodeName, ConfigError> {
        self.nodes.keys().find(|node| node.as_str() == name).cloned().ok_or_else(|| {
            let known: Vec<&str> = self.nodes.keys().map(NodeName::as_str).collect();
            ConfigError::Invalid {
                file: "--node".into(),
                key: check::shown(name),
                cause: format!("no such node: the configuration has {}", known.join(" and ")),
            }
        })
    }

    /// What the decision core of one process needs.
    ///
    /// # Panics
    /// When `me` is none of the two nodes.
    pub fn core(&self, me: &NodeName, incarnation: Incarnation, role: Role, highest: Generation) -> CoreConfig {
        let (peer, _) = self.peer_of(me).expect("a node of this configuration");
        CoreConfig {
            vm: self.vm.id,
            me: NodeRef { node: me.clone(), incarnation },
            peer: peer.clone(),
            role,
            highest_generation: highest,
            on_backup_loss: self.policy.on_backup_loss,
            cold_start: self.policy.cold_start,
            rejoin: self.policy.rejoin,
            force_cold_boot: false,
            timers: CoreTimers {
                solo: self.timers.solo,
                takeover: self.timers.takeover,
                eof_grace: self.timers.eof_grace,
                fenced_keep: self.timers.fenced_keep,
                isolation_halt: self.timers.isolation_halt,
                protect_retry: self.timers.protect_retry,
                arbiter_probe: self.timers.arbiter_probe,
                ..CoreTimers::default()
            },
        }
    }

    /// The configuration with every default filled in, as TOML.
    pub fn effective(&self) -> String {
        toml::to_string_pretty(self).expect("plain data with string keys")
    }
}

fn syntax(text: &str, file: &str, error: &toml::de::Error) -> ConfigError {
    let at = error.span().map_or(0, |span| span.start.min(text.len()));
    let before = text.as_bytes().get(..at).unwrap_or_default();
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let place = text.lines().nth(line - 1).unwrap_or_default().trim();
    let message = harmless(error.message());
    ConfigError::Syntax { file: file.into(), line, cause: format!("{message} (in {})", check::shown(place)) }
}

#[cfg(test)]
mod tests;
