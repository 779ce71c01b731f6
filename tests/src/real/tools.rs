//! Programs of the host: found or reported missing, run with a deadline.

use std::io::{self, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::netns::NetNs;
use super::{Error, Result};

/// What a finished command left.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Standard output of a success, an error for anything else.
    pub fn success(self, command: &str) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        let said = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        Err(Error::Command { command: command.to_owned(), detail: format!("{}: {}", self.status, said.trim()) })
    }
}

/// How to get a program that is missing.
fn hint(tool: &str) -> &'static str {
    match tool {
        "ip" => "install the package iproute2",
        "redis-cli" | "redis-benchmark" => "install the package redis-tools",
        "qemu-system-x86_64" => "install the package qemu-system-x86",
        "etcd" => "install the package etcd-server (apt-get install etcd-server)",
        "nsenter" | "unshare" => "install the package util-linux",
        "cargo" => "install Rust from https://rustup.rs",
        _ => "see README.md",
    }
}

/// Turns the failure to start `tool` into one that says what to do.
#[must_use]
pub fn start_error(tool: &str, source: io::Error) -> Error {
    if source.kind() == io::ErrorKind::NotFound {
        Error::MissingTool { tool: tool.to_owned(), hint: hint(tool) }
    } else {
        Error::Io { what: format!("cannot start {tool}"), source }
    }
}

/// Checks that a program is on the `PATH`.
pub fn require(tool: &str) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // iproute2 lives in sbin, which an ordinary user's PATH may lack while the kernel's exec would not find it either.
    if std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()) {
        return Ok(());
    }
    Err(Error::MissingTool { tool: tool.to_owned(), hint: hint(tool) })
}

/// Runs a command inside a namespace to its end, killing it at the deadline. `input` goes to its standard input.
pub fn run(ns: &NetNs, mut command: Command, input: &str, limit: Duration) -> Result<Finished> {
    let name = describe(&command);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let tool = command.get_program().to_string_lossy().into_owned();
    let child = ns.spawn(command).map_err(|e| start_error(&tool, e))?;
    finish(child, &name, input, limit)
}

/// The command line as a person would type it.
#[must_use]
pub fn describe(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

/// Feeds and drains a child until it ends, killing it at the deadline.
pub fn finish(mut child: Child, name: &str, input: &str, limit: Duration) -> Result<Finished> {
    let started = Instant::now();
    let stdin = child.stdin.take();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        // A child that does not read its input is no error of ours.
        scope.spawn(move || stdin.map(|mut pipe| pipe.write_all(input.as_bytes())));
        let stdout = scope.spawn(move || drain(stdout));
        let stderr = scope.spawn(move || drain(stderr));
        let status = wait_until(&mut child, started + limit);
        if !matches!(status, Ok(Some(_))) {
            // Also ends the three threads: the pipes close.
            let _already_gone = child.kill();
            let _status = child.wait();
        }
        let stdout = stdout.join().expect("the reader does not panic");
        let stderr = stderr.join().expect("the reader does not panic");
        match status.map_err(Error::io(format!("waiting for {name}")))? {
            Some(status) => Ok(Finished { status, stdout, stderr }),
            None => Err(Error::Timeout {
                what: format!("the end of {name}"),
                waited: limit,
                detail: format!("it was killed; output so far:\n{stdout}{stderr}"),
            }),
        }
    })
}

/// Waits for a child until a deadline; `None` when it still runs then.
pub fn wait_until(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn drain(pipe: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        // What was read before an error is still worth showing.
        let _partial = pipe.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
