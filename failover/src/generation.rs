//! What a node remembers across restarts: the highest generation that it has ever seen (R7), in a directory that one process at a time may use.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use replication_proto::{Generation, VmId};
use serde::{Deserialize, Serialize};

use crate::exit::ExitCode;
use crate::failpoint;
use crate::text::harmless;

/// Longest generation file, in bytes.
const MAX_BYTES: u64 = 4096;

/// The state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another process of this VM runs on this node. Two would not know of each other.
    #[error("{0}: in use by another process of this VM: stop that one first")]
    InUse(String),
    /// An I/O error.
    #[error("{place}: {cause}")]
    Io {
        /// File or directory.
        place: String,
        /// The cause.
        cause: io::Error,
    },
    /// The file is not what this program writes.
    #[error("{place}: {cause}: restore it, or remove it once you know that the arbiter's record is the newest")]
    Corrupt {
        /// The file.
        place: String,
        /// In what way.
        cause: String,
    },
    /// The directory belongs to another VM.
    #[error("{place}: belongs to VM {theirs}, this is VM {ours}: give each VM a state directory of its own")]
    OtherVm {
        /// The file.
        place: String,
        /// Whose it is.
        theirs: VmId,
        /// Whose it should be.
        ours: VmId,
    },
}

impl StateError {
    /// What a process that cannot go on ends with.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::InUse(_) => ExitCode::AlreadyRunning,
            Self::Io { .. } | Self::Corrupt { .. } | Self::OtherVm { .. } => ExitCode::StateUnusable,
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    schema: String,
    vm: VmId,
    generation: Generation,
    /// Catches a flipped digit, which JSON alone does not.
    check: u64,
}

const SCHEMA: &str = "ft.generation/1";

fn check(vm: VmId, generation: Generation) -> u64 {
    // FNV-1a: this is about accidents, not attackers.
    let bytes = vm.0.to_le_bytes().into_iter().chain(generation.0.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The state directory, held by this process until it ends.
#[derive(Debug)]
pub struct StateDir {
    directory: PathBuf,
    vm: VmId,
    highest: Generation,
    _lock: File,
}

impl StateDir {
    /// Opens the directory (created if missing, mode 0700), locks it against a second process, and reads the highest generation.
    ///
    /// The lock is part of the safety argument: that the former process of this node is dead follows from it. The kernel frees it with the process.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(directory: &Path, vm: VmId) -> Result<Self, StateError> {
        let io = |place: &Path, cause: io::Error| StateError::Io { place: place.display().to_string(), cause };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|error| io(directory, error))?;
        let path = directory.join("lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let lock = lock.map_err(|error| io(&path, error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StateError::InUse(directory.display().to_string())),
            Err(TryLockError::Error(error)) => return Err(io(&path, error)),
        }
        let mut state = Self { directory: directory.to_path_buf(), vm, highest: Generation(0), _lock: lock };
        state.highest = state.load()?;
        Ok(state)
    }

    /// The highest generation that this node has seen; 0 before the first.
    pub fn highest(&self) -> Generation {
        self.highest
    }

    fn file(&self) -> PathBuf {
        self.directory.join("generation.json")
    }

    fn load(&self) -> Result<Generation, StateError> {
        let path = self.file();
        let place = || path.display().to_string();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Generation(0)),
            Err(cause) => return Err(StateError::Io { place: place(), cause }),
        };
        let mut bytes = Vec::new();
        let read = file.take(MAX_BYTES + 1).read_to_end(&mut bytes);
        read.map_err(|cause| StateError::Io { place: place(), cause })?;
        let corrupt = |cause: String| StateError::Corrupt { place: place(), cause };
        if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_BYTES) {
            return Err(corrupt(format!("longer than {MAX_BYTES} bytes")));
        }
        let stored: Stored = serde_json::from_slice(&bytes).map_err(|error| corrupt(harmless(&error.to_string())))?;
        if stored.schema != SCHEMA {
            return Err(corrupt(format!("schema {:?}, expected {SCHEMA:?}", stored.schema)));
        }
        if stored.check != check(stored.vm, stored.generation) {
            return Err(corrupt("its check number does not fit its content".into()));
        }
        if stored.vm != self.vm {
            return Err(StateError::OtherVm { place: place(), theirs: stored.vm, ours: self.vm });
        }
        Ok(stored.generation)
    }

    /// Remembers `generation`, durably, if it is higher than what is remembered.
    ///
    /// # Errors
    /// [`StateError::Io`]. The process must then end: it may not act on a generation that it could forget.
    pub fn persist(&mut self, generation: Generation) -> Result<(), StateError> {
        if generation <= self.highest {
            return Ok(());
        }
        let stored = Stored { schema: SCHEMA.into(), vm: self.vm, generation, check: check(self.vm, generation) };
        let bytes = serde_json::to_vec(&stored).expect("plain values");
        let (path, new) = (self.file(), self.directory.join("generation.json.new"));
        let write = || -> io::Result<()> {
            failpoint!(GenerationWrite => return Err(crate::failpoint::injected()));
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            failpoint!(GenerationRename => return Err(crate::failpoint::injected()));
            fs::rename(&new, &path)?;
            failpoint!(GenerationFsync => return Err(crate::failpoint::injected()));
            File::open(&self.directory)?.sync_all()
        };
        write().map_err(|cause| StateError::Io { place: path.display().to_string(), cause })?;
        self.highest = generation;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId(7);

    #[test]
    fn remembers_the_highest_across_restarts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let mut state = StateDir::open(&path, VM).unwrap();
        assert_eq!(state.highest(), Generation(0));
        state.persist(Generation(5)).unwrap();
        state.persist(Generation(3)).unwrap();
        drop(state);
        assert_eq!(StateDir::open(&path, VM).unwrap().highest(), Generation(5));
    }

    #[test]
    fn two_processes_of_one_node_exclude_each_other() {
        let directory = tempfile::tempdir().unwrap();
        let first = StateDir::open(directory.path(), VM).unwrap();
        let error = StateDir::open(directory.path(), VM).unwrap_err();
        assert!(matches!(error, StateError::InUse(_)));
        assert_eq!(error.exit_code(), ExitCode::AlreadyRunning);
        drop(first);
        StateDir::open(directory.path(), VM).unwrap();
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        StateDir::open(directory.path(), VM).unwrap().persist(Generation(41)).unwrap();
        let path = directory.path().join("generation.json");
        let good = fs::read(&path).unwrap();
        let refused = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let state = StateDir::open(directory.path(), VM);
            // A flipped letter case in the UUID's hex digits is the same UUID.
            assert!(
                state.as_ref().is_err() || state.as_ref().is_ok_and(|state| state.highest() == Generation(41)),
                "{bytes:?}"
            );
            state.is_err()
        };
        for length in 0..good.len() {
            assert!(refused(&good[..length]), "truncated to {length}");
        }
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            refused(&bytes);
        }
        fs::write(&path, good).unwrap();
        assert!(matches!(StateDir::open(directory.path(), VmId(8)), Err(StateError::OtherVm { .. })));
    }

    #[test]
    fn a_half_done_write_of_a_dead_process_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        StateDir::open(directory.path(), VM).unwrap().persist(Generation(9)).unwrap();
        fs::write(directory.path().join("generation.json.new"), b"{\"sch").unwrap();
        let mut state = StateDir::open(directory.path(), VM).unwrap();
        assert_eq!(state.highest(), Generation(9));
        state.persist(Generation(10)).unwrap();
    }
}
