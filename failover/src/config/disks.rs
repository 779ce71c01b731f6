//! `[[disk]]` and each node's `disks`: what the guest sees, and where each side keeps its image.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use replication_proto::NodeName;
use serde::{Deserialize, Serialize};

use super::check::{Wrong, shown, wrong};
use super::{NodeSection, PairConfig, format_size, units};

/// Most disks of a VM.
pub const MAX_DISKS: usize = 4;
/// Largest disk, in bytes.
const MAX_DISK_BYTES: u64 = 16 << 40;

/// Name of a disk: 1 to 20 characters out of `a-z`, `0-9` and `-`. The guest reads it as the disk's serial number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskName(String);

impl DiskName {
    /// Longest name, in bytes: what a virtio disk has room for.
    pub const MAX_BYTES: usize = 20;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for DiskName {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if name.is_empty() || name.len() > Self::MAX_BYTES || !name.bytes().all(allowed) {
            return Err("not a disk name (1 to 20 characters out of a-z, 0-9 and '-')");
        }
        Ok(Self(name))
    }
}

impl From<DiskName> for String {
    fn from(name: DiskName) -> Self {
        name.0
    }
}

impl fmt::Display for DiskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// `[[disk]]`: the guest sees them in this order. Each node has an image of its own, which its `disks` names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSection {
    /// Its name.
    pub name: DiskName,
    /// Its size in bytes, a multiple of 512; when absent, that of the image.
    #[serde(default, with = "units::maybe_size", skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// The guest may not write to it.
    #[serde(default)]
    pub read_only: bool,
}

/// Where a node keeps its images, by the disk's name.
pub type DiskPaths = BTreeMap<DiskName, PathBuf>;

impl PairConfig {
    pub(super) fn check_disks(&self) -> Result<(), Wrong> {
        if self.disk.len() > MAX_DISKS {
            return Err(wrong("disk", format!("{} disks: at most {MAX_DISKS} are supported", self.disk.len())));
        }
        for (at, disk) in self.disk.iter().enumerate() {
            if self.disk[..at].iter().any(|other| other.name == disk.name) {
                return Err(wrong("disk.name", format!("{} is there twice", shown(disk.name.as_str()))));
            }
            check_size(disk)?;
        }
        for (name, node) in &self.nodes {
            self.check_paths(name, node)?;
        }
        self.check_not_shared()
    }

    fn check_paths(&self, name: &NodeName, node: &NodeSection) -> Result<(), Wrong> {
        let key = |disk: &DiskName| format!("nodes.{name}.disks.{disk}");
        for disk in &self.disk {
            match node.disks.get(&disk.name) {
                None => return Err(wrong(key(&disk.name), "missing: the path of this node's image or block device")),
                Some(path) if path.file_name().is_none() => return Err(wrong(key(&disk.name), "names no file")),
                Some(_) => {}
            }
        }
        let mut seen: BTreeMap<&Path, &DiskName> = BTreeMap::new();
        for (disk, path) in &node.disks {
            if !self.disk.iter().any(|known| known.name == *disk) {
                return Err(wrong(key(disk), "there is no [[disk]] of this name"));
            }
            if let Some(other) = seen.insert(path, disk) {
                return Err(wrong(key(disk), format!("the same image as that of disk {other}")));
            }
        }
        Ok(())
    }

    /// A stopped side that wakes could overwrite what the other has written since: every side needs images of its own.
    fn check_not_shared(&self) -> Result<(), Wrong> {
        let mut nodes = self.nodes.iter();
        let (Some((name_a, a)), Some((name_b, b))) = (nodes.next(), nodes.next()) else { return Ok(()) };
        // On two hosts the same path is two files. (Two namespaces of one host may look like two hosts: locks tell then.)
        if a.replication.ip() != b.replication.ip() {
            return Ok(());
        }
        let shared = b.disks.iter().find(|(_, path)| a.disks.values().any(|other| other == *path));
        shared.map_or(Ok(()), |(disk, _)| {
            let cause = format!("an image of node {name_a}, too: disks are not shared, each node needs its own image");
            Err(wrong(format!("nodes.{name_b}.disks.{disk}"), cause))
        })
    }

    /// What follows for disks, for people; one line.
    pub(super) fn derived_disks(&self) -> String {
        if self.disk.is_empty() {
            return "disks: none".into();
        }
        let one = |disk: &DiskSection| {
            let size = disk.size.map_or_else(|| "as large as its image".into(), format_size);
            let how = if disk.read_only { "read-only, compared and never replicated" } else { "replicated" };
            format!("{} ({size}, {how})", disk.name)
        };
        let all: Vec<String> = self.disk.iter().map(one).collect();
        format!("disks: {}; each side has its own images", all.join(", "))
    }
}

fn check_size(disk: &DiskSection) -> Result<(), Wrong> {
    let Some(size) = disk.size else { return Ok(()) };
    let key = || format!("disk.{}.size", disk.name);
    if size == 0 || size > MAX_DISK_BYTES {
        return Err(wrong(
            key(),
            format!("{} is out of bounds: at most {}", format_size(size), format_size(MAX_DISK_BYTES)),
        ));
    }
    if !size.is_multiple_of(512) {
        return Err(wrong(key(), "must be a multiple of 512B"));
    }
    Ok(())
}
