//! How a running process is told where to fail, and what it says of it. The other end is `failover::failpoint::orders`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};

use crate::real::{Error, Node, Result, clock};

const POLL: Duration = Duration::from_millis(3);
/// How long a process may take to read an order.
const OBEY: Duration = Duration::from_secs(10);

/// The directory through which both processes of a pair take orders.
pub struct Orders {
    dir: PathBuf,
}

impl Orders {
    /// Makes the directory in `parent`.
    pub fn new(parent: &Path) -> Result<Self> {
        let dir = parent.join("points");
        fs::create_dir(&dir).map_err(Error::io("cannot make the directory for orders"))?;
        let orders = Self { dir };
        for node in Node::BOTH {
            mknodat(CWD, orders.fifo(node), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
                .map_err(|e| Error::io("cannot make a FIFO")(e.into()))?;
        }
        Ok(orders)
    }

    /// The directory, for the environment of the processes.
    #[must_use]
    pub fn dir(&self) -> OsString {
        self.dir.clone().into_os_string()
    }

    fn fifo(&self, node: Node) -> PathBuf {
        self.dir.join(format!("{node}.orders"))
    }

    /// Gives an order to the process on a host, and waits until it has been taken.
    pub fn give(&self, node: Node, order: &str) -> Result<()> {
        let since = clock::mono_us();
        let deadline = Instant::now() + OBEY;
        let nonblock = i32::try_from(OFlags::NONBLOCK.bits()).expect("O_NONBLOCK fits");
        let mut fifo: File = loop {
            match OpenOptions::new().write(true).custom_flags(nonblock).open(self.fifo(node)) {
                Ok(fifo) => break fifo,
                // Nobody reads: the process has not come that far.
                Err(e) if e.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => {
                    Self::in_time(deadline, "a process that takes orders")?;
                    thread::sleep(POLL);
                }
                Err(e) => return Err(Error::io("cannot give an order")(e)),
            }
        };
        fifo.write_all(format!("{order}\n").as_bytes()).map_err(Error::io("cannot give an order"))?;
        let answer = if order == "disarm" { "disarmed".into() } else { format!("armed {order}") };
        self.wait(node, &answer, since, OBEY).map(drop)
    }

    fn in_time(deadline: Instant, what: &str) -> Result<()> {
        if Instant::now() < deadline {
            return Ok(());
        }
        Err(Error::Timeout { what: what.into(), waited: OBEY, detail: String::new() })
    }

    /// Waits until a host's process has said `what` since `since_us`. Returns when it did, in microseconds.
    pub fn wait(&self, node: Node, what: &str, since_us: u64, limit: Duration) -> Result<u64> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some((at, _)) = self.lines(node)?.into_iter().find(|(at, said)| *at >= since_us && said == what) {
                return Ok(at);
            }
            if Instant::now() >= deadline {
                let detail = format!("{:?}", self.lines(node)?);
                return Err(Error::Timeout { what: format!("{what:?} from {node}"), waited: limit, detail });
            }
            thread::sleep(POLL);
        }
    }

    fn lines(&self, node: Node) -> Result<Vec<(u64, String)>> {
        let path = self.dir.join(format!("{node}.log"));
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(Error::io("cannot read what a process says of its failpoints")(e)),
        };
        let line = |line: &str| {
            let (at, said) = line.split_once(' ')?;
            Some((at.parse().ok()?, said.to_owned()))
        };
        Ok(text.lines().filter_map(line).collect())
    }

    /// Names of the points that the processes on both hosts passed.
    #[must_use]
    pub fn passed(&self) -> BTreeSet<String> {
        let lines = Node::BOTH.into_iter().flat_map(|node| self.lines(node).unwrap_or_default());
        lines.filter_map(|(_, said)| said.strip_prefix("passed ").map(str::to_owned)).collect()
    }
}
