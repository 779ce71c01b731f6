//! One process of the pair.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::netns::NetNs;
use super::{Error, Node, Result, clock, tools};

/// A running `ft-primary` or `ft-backup`. Killed when dropped.
pub struct Daemon {
    node: Node,
    name: String,
    log: PathBuf,
    child: Child,
    started_us: u64,
    gone_us: Option<u64>,
}

impl Daemon {
    /// Starts `command` in a host's namespace; both its outputs go to the file `log`.
    pub fn start(node: Node, ns: &NetNs, mut command: Command, log: &Path) -> Result<Self> {
        let tool = command.get_program().to_string_lossy().into_owned();
        let name = Path::new(&tool).file_name().map_or(tool.clone(), |n| n.to_string_lossy().into_owned());
        let to = File::options()
            .create(true)
            .append(true)
            .open(log)
            .map_err(Error::io(format!("cannot open {}", log.display())))?;
        let also = to.try_clone().map_err(Error::io("cannot duplicate a descriptor"))?;
        // Ctrl-C in the terminal is for the demo, which then ends its processes itself.
        command.stdin(Stdio::null()).stdout(to).stderr(also).process_group(0);
        let started_us = clock::mono_us();
        let child = ns.spawn(command).map_err(|e| tools::start_error(&tool, e))?;
        Ok(Self { node, name: format!("{name} on {node}"), log: log.to_path_buf(), child, started_us, gone_us: None })
    }

    /// The host on which it runs.
    #[must_use]
    pub fn node(&self) -> Node {
        self.node
    }

    /// Program and host, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// When it was started, `CLOCK_MONOTONIC` in microseconds. Its event log may hold older lines, of processes before it.
    #[must_use]
    pub fn started_us(&self) -> u64 {
        self.started_us
    }

    /// Sends a signal. It must not have been waited for.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        signalled(&self.child, signal).map_err(Error::io(format!("cannot signal {}", self.name)))
    }

    /// SIGKILL, and wait until the kernel has taken the process apart. Returns the time of the kill in microseconds.
    pub fn kill(&mut self) -> Result<u64> {
        let at = clock::mono_us();
        self.signal(Signal::KILL)?;
        self.child.wait().map_err(Error::io(format!("waiting for {}", self.name)))?;
        self.gone_us = Some(clock::mono_us());
        Ok(at)
    }

    /// When the kernel had taken it apart after [`Self::kill`], its connections closed, in microseconds.
    #[must_use]
    pub fn gone_us(&self) -> Option<u64> {
        self.gone_us
    }

    /// How it ended, `None` while it runs.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().map_err(Error::io(format!("waiting for {}", self.name)))
    }

    /// Fails with the end of its log when it has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => {
                Err(Error::Ended { name: self.name.clone(), status: status.to_string(), tail: self.log_tail() })
            }
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        tools::wait_until(&mut self.child, Instant::now() + limit)
            .map_err(Error::io(format!("waiting for {}", self.name)))?
            .ok_or_else(|| Error::Timeout {
                what: format!("the end of {}", self.name),
                waited: limit,
                detail: format!("it still runs; its last lines:\n{}", self.log_tail()),
            })
    }

    /// The last lines of what it wrote.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }

    /// Resident memory in bytes, and the largest it ever was.
    pub fn resident(&self) -> Result<(u64, u64)> {
        let path = format!("/proc/{}/status", self.id());
        let text = std::fs::read_to_string(&path).map_err(Error::io(format!("cannot read {path}")))?;
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok())
                .map(|kib| kib * 1024)
                .ok_or_else(|| Error::answer(&path, format!("no {name}")))
        };
        Ok((field("VmRSS:")?, field("VmHWM:")?))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

/// The last 4 KiB of a text file, whole lines, or why there are none.
#[must_use]
pub fn tail(path: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let start = file.metadata()?.len().saturating_sub(4096);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Ok(match text.split_once('\n') {
            Some((_cut, rest)) if start > 0 => rest.to_owned(),
            _ => text,
        })
    };
    read().unwrap_or_else(|e| format!("(no log: {e})"))
}

/// Signals a child. After [`Signal::STOP`] none of its threads runs any more: the kernel stops them one by one, and one that answers a request meanwhile
/// would make a test of what happens to requests wrong.
pub(super) fn signalled(child: &Child, signal: Signal) -> io::Result<()> {
    let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a process id is positive");
    kill_process(id, signal)?;
    let deadline = Instant::now() + STOP_LIMIT;
    while signal == Signal::STOP && !stands_still(child.id())? {
        if Instant::now() > deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "some of its threads do not stop"));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// How long the kernel may take to stop all threads of a process.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Whether no thread of a process runs, or can.
fn stands_still(process: u32) -> io::Result<bool> {
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        // A thread that has ended meanwhile is none. Its name is in parentheses and may hold anything.
        let Ok(stat) = fs::read_to_string(task?.path().join("stat")) else { continue };
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        if !matches!(state, Some('T' | 't' | 'Z' | 'X')) {
            return Ok(false);
        }
    }
    Ok(true)
}
