//! The arbiter for two processes on one host: a file on a local filesystem.
//!
//! A write holds a lock on a file of its own, compares the stored revision, and replaces the record by temp file, fsync, rename and fsync of the
//! directory. A read takes no lock: a rename is atomic, so it sees the old record or the new one, and a stopped writer blocks no reader.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::failpoint;

use super::{Arbiter, ArbiterError, CasOutcome, MAX_RECORD_BYTES, Record, RecordError, Revision, Versioned};
use crate::text::harmless;
use serde::{Deserialize, Serialize};

/// `f_type` of filesystems on which a lock or a rename is not the atomic act that this needs.
const REMOTE_FILESYSTEMS: [(u64, &str); 8] = [
    (0x6969, "NFS"),
    (0xFF53_4D42, "CIFS"),
    (0xFE53_4D42, "SMB"),
    (0x517B, "SMB"),
    (0x6573_5546, "FUSE"),
    (0x00C3_6400, "Ceph"),
    (0x0102_1997, "9p"),
    (0x5346_414F, "AFS"),
];

/// What is in the file: the record and its revision.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    revision: Revision,
    record: Record,
}

/// An arbiter in a file. Both processes must see the same local filesystem.
#[derive(Debug)]
pub struct FileArbiter {
    path: PathBuf,
    directory: PathBuf,
}

impl FileArbiter {
    /// Uses the record at `path`; the directory must exist, the file need not.
    ///
    /// # Errors
    /// [`ArbiterError::Unusable`] when the directory is missing or on a network filesystem.
    pub fn open(path: &Path) -> Result<Self, ArbiterError> {
        let unusable = |text: String| ArbiterError::Unusable(text);
        if path.file_name().is_none() {
            return Err(unusable(format!("{}: names no file", path.display())));
        }
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let info = rustix::fs::statfs(&directory).map_err(|error| {
            let text = io::Error::from(error);
            unusable(format!(
                "directory {}: {text}: create it, on a local filesystem that both processes see",
                directory.display()
            ))
        })?;
        // f_type is signed on some targets; only the low 32 bits carry the magic.
        let magic = u64::try_from(i128::from(info.f_type) & 0xFFFF_FFFF).unwrap_or(0);
        if let Some((_, name)) = REMOTE_FILESYSTEMS.iter().find(|(remote, _)| *remote == magic) {
            return Err(unusable(format!(
                "{} is on {name}: a file arbiter needs a local filesystem (locks and renames over a network are not atomic)",
                directory.display()
            )));
        }
        Ok(Self { path: path.to_path_buf(), directory })
    }

    fn load(&self) -> Result<Option<Stored>, ArbiterError> {
        let place = self.path.display();
        let file = match OpenOptions::new().read(true).custom_flags(libc_nonblock()).open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ArbiterError::Unreachable(format!("{place}: {error}"))),
        };
        let limit = u64::try_from(MAX_RECORD_BYTES).expect("a small constant");
        let mut bytes = Vec::new();
        let read = file.metadata().and_then(|meta| {
            if !meta.is_file() {
                return Err(io::Error::other("not a regular file"));
            }
            file.take(limit + 1).read_to_end(&mut bytes)
        });
        read.map_err(|error| ArbiterError::Unreachable(format!("{place}: {error}")))?;
        if bytes.len() > MAX_RECORD_BYTES {
            return Err(ArbiterError::Unusable(format!("{place}: {}", RecordError::TooLong(bytes.len()))));
        }
        parse(&bytes).map(Some).map_err(|error| {
            ArbiterError::Unusable(format!(
                "{place}: {error}: restore it, or remove it once you are certain that no guest of this VM runs anywhere"
            ))
        })
    }

    fn replace(&self, stored: &Stored) -> Result<(), ReplaceError> {
        let mut name = self.path.clone().into_os_string();
        name.push(".new");
        let temporary = PathBuf::from(name);
        let bytes = serde_json::to_vec(stored).expect("a record has only string keys and plain values");
        // Only the holder of the lock writes the temporary file, so a left-over one belongs to a dead writer.
        let write = || -> io::Result<()> {
            failpoint!(RecordWrite => return Err(crate::failpoint::injected()));
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&bytes)?;
            file.sync_all()
        };
        if let Err(error) = write() {
            let _ = fs::remove_file(&temporary);
            return Err(ReplaceError::NotDone(format!("{}: {error}", temporary.display())));
        }
        failpoint!(RecordRename => return Err(ReplaceError::NotDone("a failpoint says so".into())));
        fs::rename(&temporary, &self.path)
            .map_err(|error| ReplaceError::NotDone(format!("rename to {}: {error}", self.path.display())))?;
        failpoint!(RecordFsync => return Err(ReplaceError::Uncertain("a failpoint says so".into())));
        // From here on the others see the new record; without the directory on disk a power cut could still take it back.
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| ReplaceError::Uncertain(format!("fsync of {}: {error}", self.directory.display())))
    }

    fn lock(&self) -> io::Result<File> {
        let mut name = self.path.clone().into_os_string();
        name.push(".lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(PathBuf::from(name))?;
        // Belongs to the open file, not to the process, and the kernel frees it when its holder dies.
        lock.lock()?;
        Ok(lock)
    }
}

/// How far a failed write got.
enum ReplaceError {
    NotDone(String),
    Uncertain(String),
}

fn libc_nonblock() -> i32 {
    // Opening a FIFO that someone put there must not hang.
    i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).expect("O_NONBLOCK fits")
}

fn parse(bytes: &[u8]) -> Result<Stored, RecordError> {
    #[derive(Deserialize)]
    struct Envelope<'a> {
        revision: Revision,
        #[serde(borrow)]
        record: &'a serde_json::value::RawValue,
    }
    let envelope: Envelope<'_> =
        serde_json::from_slice(bytes).map_err(|error| RecordError::Malformed(harmless(&error.to_string())))?;
    let record = Record::parse(envelope.record.get().as_bytes())?;
    Ok(Stored { revision: envelope.revision, record })
}

impl Arbiter for FileArbiter {
    fn read(&mut self) -> Result<Option<Versioned>, ArbiterError> {
        Ok(self.load()?.map(|Stored { revision, record }| Versioned { revision, record }))
    }

    fn compare_and_swap(&mut self, expected: Option<Revision>, record: &Record) -> CasOutcome {
        record.validate().expect("we write only records that we would read");
        let _lock = match self.lock() {
            Ok(lock) => lock,
            Err(error) => return CasOutcome::Failed(format!("lock of {}: {error}", self.path.display())),
        };
        let current = match self.load() {
            Ok(current) => current.map(|stored| stored.revision),
            Err(error) => return CasOutcome::Failed(error.to_string()),
        };
        if current != expected {
            return CasOutcome::Conflict;
        }
        let Some(next) = current.map_or(Some(1), |revision| revision.0.checked_add(1)).map(Revision) else {
            return CasOutcome::Failed("the 64 bits of the revision are used up".into());
        };
        match self.replace(&Stored { revision: next, record: record.clone() }) {
            Ok(()) => CasOutcome::Applied(next),
            Err(ReplaceError::NotDone(why)) => CasOutcome::Failed(why),
            Err(ReplaceError::Uncertain(why)) => CasOutcome::Unknown(why),
        }
    }

    fn describe(&self) -> String {
        format!("file {}", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbiter::contract::{self, sample};

    fn place() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record.json");
        (directory, path)
    }

    #[test]
    fn keeps_the_contract_of_arbiters() {
        let (_directory, path) = place();
        contract::check(|| FileArbiter::open(&path).unwrap());
    }

    #[test]
    fn what_is_no_record_is_an_error_and_never_overwritten() {
        let (_directory, path) = place();
        let mut arbiter = FileArbiter::open(&path).unwrap();
        arbiter.compare_and_swap(None, &sample(1));
        let good = fs::read(&path).unwrap();
        let newer = String::from_utf8(good.clone()).unwrap().replace("\"v\":1", "\"v\":2");
        let own_backup = String::from_utf8(good.clone()).unwrap().replace("\"node\":\"b\"", "\"node\":\"a\"");
        let deep = format!("{{\"revision\":1,\"record\":{}{}}}", "[".repeat(500), "]".repeat(500));
        let wrong: Vec<Vec<u8>> = [
            &b""[..],
            b"{",
            b"null",
            b"<html>502</html>",
            b"{\"revision\":1}",
            b"{\"revision\":-1,\"record\":{}}",
            b"\xff\xfe",
            newer.as_bytes(),
            own_backup.as_bytes(),
            deep.as_bytes(),
        ]
        .map(<[u8]>::to_vec)
        .into_iter()
        .chain([vec![b' '; MAX_RECORD_BYTES + 1]])
        .chain((0..good.len()).step_by(7).map(|length| good[..length].to_vec()))
        .collect();
        for bytes in wrong {
            fs::write(&path, &bytes).unwrap();
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned();
            assert!(matches!(arbiter.read(), Err(ArbiterError::Unusable(_))), "{text}");
            for expected in [None, Some(Revision(1))] {
                assert!(matches!(arbiter.compare_and_swap(expected, &sample(2)), CasOutcome::Failed(_)), "{text}");
            }
            assert_eq!(fs::read(&path).unwrap(), bytes, "{text}");
        }
        fs::write(&path, good).unwrap();
        assert!(arbiter.read().unwrap().is_some());
    }

    #[test]
    fn a_writer_that_died_half_way_leaves_the_old_record() {
        let (directory, path) = place();
        let mut arbiter = FileArbiter::open(&path).unwrap();
        arbiter.compare_and_swap(None, &sample(1));
        fs::write(directory.path().join("record.json.new"), b"{\"revi").unwrap();
        assert_eq!(arbiter.read().unwrap().unwrap().record, sample(1));
        assert_eq!(arbiter.compare_and_swap(Some(Revision(1)), &sample(2)), CasOutcome::Applied(Revision(2)));
    }

    #[test]
    fn a_reader_is_not_held_up_by_a_stopped_writer() {
        let (_directory, path) = place();
        let mut arbiter = FileArbiter::open(&path).unwrap();
        arbiter.compare_and_swap(None, &sample(1));
        let _held = FileArbiter::open(&path).unwrap().lock().unwrap();
        assert!(arbiter.read().unwrap().is_some());
    }

    #[test]
    fn odd_places_are_refused_in_one_line() {
        let (directory, path) = place();
        assert!(matches!(
            FileArbiter::open(&directory.path().join("none/record.json")),
            Err(ArbiterError::Unusable(_))
        ));
        assert!(matches!(FileArbiter::open(Path::new("/")), Err(ArbiterError::Unusable(_))));
        // A kernel filesystem on which nothing can be written, and a directory in the record's place.
        let outcome = FileArbiter::open(Path::new("/proc/record.json")).unwrap().compare_and_swap(None, &sample(1));
        assert!(matches!(outcome, CasOutcome::Failed(_)), "{outcome:?}");
        fs::create_dir(&path).unwrap();
        let mut arbiter = FileArbiter::open(&path).unwrap();
        assert!(arbiter.read().is_err());
        assert!(matches!(arbiter.compare_and_swap(None, &sample(1)), CasOutcome::Failed(_)));
    }
}
