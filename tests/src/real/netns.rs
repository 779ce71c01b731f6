//! An anonymous network namespace, held by a thread that lives in it.

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam::channel::{Sender, bounded, unbounded};

use super::{Error, Result, sys, tools};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace. Children started in it die when it is dropped; the kernel then takes its interfaces apart.
pub struct NetNs {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
    /// It has mounts of its own.
    mounts: Cell<bool>,
}

impl NetNs {
    /// Makes an empty namespace with only the loopback interface, which is up.
    pub fn new(name: &str) -> Result<Self> {
        let (jobs, queue) = unbounded::<Job>();
        let (ready, made) = bounded(1);
        let thread = thread::Builder::new()
            .name(format!("netns-{name}"))
            .spawn(move || {
                let path = sys::unshare_net().map(|()| own_path());
                let failed = path.is_err();
                if ready.send(path).is_err() || failed {
                    return;
                }
                while let Ok(job) = queue.recv() {
                    job();
                }
            })
            .map_err(Error::io("cannot start a thread"))?;
        let path = made.recv().expect("the thread answers once").map_err(|source| Error::NoNamespaces { source })?;
        let ns = Self { jobs: Some(jobs), thread: Some(thread), path, mounts: Cell::new(false) };
        ns.run(quiet).map_err(Error::io("cannot set the namespace's sysctls"))?;
        ns.ip("link set lo up\n")?;
        Ok(ns)
    }

    /// A path that names this namespace for `nsenter` and `ip`, as long as it lives.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs something on the thread that lives in the namespace: sockets made there stay there.
    ///
    /// # Panics
    /// If `f` panics.
    pub fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = bounded(1);
        let job = Box::new(move || {
            // The caller waits in `recv` below, so the answer is always taken.
            let _always_taken = tell.send(f());
        });
        self.jobs.as_ref().expect("taken only by drop").send(job).expect("the thread runs until drop");
        told.recv().expect("the job did not panic")
    }

    /// Starts a child in the namespace. It dies with this value.
    pub fn spawn(&self, mut command: Command) -> io::Result<Child> {
        sys::die_with_parent(&mut command);
        self.run(move || command.spawn())
    }

    /// Puts an empty file system of `bytes` bytes, in memory, in the place of a directory: for children that are started from now on. Nobody else sees it there; it
    /// goes with this value.
    pub fn mount_memory(&self, at: &Path, bytes: u64) -> Result<()> {
        if !self.mounts.replace(true) {
            self.run(sys::unshare_mounts).map_err(|source| Error::NoNamespaces { source })?;
            self.mount(&["--make-rprivate".as_ref(), "/".as_ref()])?;
        }
        let size = format!("size={bytes},mode=0700");
        self.mount(&["-t".as_ref(), "tmpfs".as_ref(), "-o".as_ref(), size.as_ref(), "none".as_ref(), at.as_os_str()])
    }

    /// Changes how such a file system is mounted: `size=BYTES`, `ro`, `rw`.
    pub fn remount(&self, at: &Path, options: &str) -> Result<()> {
        let options = format!("remount,{options}");
        self.mount(&["-o".as_ref(), options.as_ref(), at.as_os_str()])
    }

    fn mount(&self, words: &[&OsStr]) -> Result<()> {
        let mut command = Command::new("mount");
        command.args(words);
        tools::run(self, command, "", Duration::from_secs(10))?.success("mount").map(drop)
    }

    /// The file that children in the namespace call `path`, by a name under which everybody finds it.
    #[must_use]
    pub fn seen_from_outside(&self, path: &Path) -> PathBuf {
        let (true, Ok(below)) = (self.mounts.get(), path.strip_prefix("/")) else { return path.to_owned() };
        self.path.ancestors().nth(2).unwrap_or(&self.path).join("root").join(below)
    }

    /// Runs lines of `ip -batch` in the namespace.
    pub fn ip(&self, batch: &str) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["-batch", "-"]);
        tools::run(self, command, batch, Duration::from_secs(10))?.success("ip -batch").map(drop)
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A job's panic has already reached its caller.
            let _panicked = thread.join();
        }
    }
}

/// The calling thread's namespace as a path that other processes can open.
fn own_path() -> PathBuf {
    let thread = rustix::thread::gettid().as_raw_nonzero();
    PathBuf::from(format!("/proc/{}/task/{thread}/ns/net", std::process::id()))
}

/// Switches off what would put frames of the hosts' own on the wires.
fn quiet() -> io::Result<()> {
    for scope in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
        if Path::new(&path).exists() {
            fs::write(path, "1")?;
        }
    }
    Ok(())
}
