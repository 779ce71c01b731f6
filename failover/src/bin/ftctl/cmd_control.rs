//! `ftctl failover`, `stop`, `protect`, `unprotect` and `rejoin`.

use std::io::IsTerminal;
use std::thread;
use std::time::{Duration, Instant};

use failover::control::{FailoverMode, Request};
use failover::exit::CtlExit;
use failover::status::NodeRole;

use super::Failure;
use super::args::{FailoverArgs, TargetArgs, WaitArgs};
use super::target::{agreed, failure, print};

/// Time between two looks at the state that is waited for.
const LOOK: Duration = Duration::from_millis(50);

pub(crate) fn failover(target: &TargetArgs, args: &FailoverArgs) -> Result<CtlExit, Failure> {
    let mut client = target.connect(args.timeout)?;
    let status = client.status().map_err(|error| failure(&error))?;
    if args.force {
        let age = status.lag_seconds.map_or_else(|| "never".to_owned(), |age| format!("{age:.3} s ago"));
        eprintln!(
            "ftctl: {} is {} ({}); last committed epoch {} ({age}). Whatever the other side let out since then is lost.",
            status.node,
            status.state.word(),
            status.reason_text,
            status.epoch
        );
        agreed(&format!("Run {} here, by force?", status.vm), args.yes)?;
    } else {
        if status.role == NodeRole::Backup {
            let text = format!(
                "{} is the backup: a planned failover is asked of the owner, {}",
                status.node, status.peer.node
            );
            return Err(Failure::new(CtlExit::Refused, text));
        }
        agreed(&format!("Move {} from {} to {}?", status.vm, status.node, status.peer.node), args.yes)?;
    }
    let mode = if args.force { FailoverMode::Force } else { FailoverMode::Planned };
    let request = Request::Failover { mode, confirm: args.confirm.clone(), without_arbiter: args.without_arbiter };
    let watch = Watch { started: Instant::now(), timeout: args.timeout };
    let code = ask(target, &request, &watch)?;
    let waits = args.wait || (!args.no_wait && std::io::stdout().is_terminal());
    if args.force || !waits { Ok(code) } else { await_protected(target, &watch) }
}

pub(crate) fn rejoin(target: &TargetArgs, args: &WaitArgs) -> Result<CtlExit, Failure> {
    agreed("Drop the guest that is kept here, and become the backup?", args.yes)?;
    ask(target, &Request::Rejoin {}, &args.watch())
}

impl WaitArgs {
    fn watch(&self) -> Watch {
        Watch { started: Instant::now(), timeout: self.timeout }
    }
}

/// How long a command has taken, and how long it may.
struct Watch {
    started: Instant,
    timeout: Duration,
}

impl Watch {
    fn left(&self) -> Option<Duration> {
        self.timeout.checked_sub(self.started.elapsed()).filter(|left| !left.is_zero())
    }

    fn say(&self, text: &str) {
        let text: String = text.chars().filter(|c| !c.is_control()).collect();
        print(&format!("{:7.3} s  {text}\n", self.started.elapsed().as_secs_f64()));
    }
}

/// Waits until the side that was asked is an armed backup. Whoever stops waiting stops nothing else.
fn await_protected(target: &TargetArgs, watch: &Watch) -> Result<CtlExit, Failure> {
    let mut last = String::new();
    loop {
        let Some(left) = watch.left() else {
            return Err(Failure::new(
                CtlExit::Timeout,
                format!("not protected again in time: {last}; look with `ftctl status`"),
            ));
        };
        // Between its two lives the process cannot be asked.
        let seen = target.connect(left).and_then(|mut client| client.status().map_err(|error| failure(&error)));
        match seen {
            Ok(status) if status.protected && status.armed => {
                watch.say(&format!(
                    "protected again: {} runs the guest, {} is its backup",
                    status.peer.node, status.node
                ));
                return Ok(CtlExit::Ok);
            }
            Ok(status) => {
                let now = format!("{} is {} ({})", status.node, status.state.word(), status.reason_text);
                if now != last {
                    watch.say(&now);
                    last = now;
                }
            }
            Err(failure) if failure.code == CtlExit::Permission => return Err(failure),
            Err(_) => {}
        }
        thread::sleep(LOOK.min(left));
    }
}

pub(crate) fn stop(target: &TargetArgs, args: &WaitArgs) -> Result<CtlExit, Failure> {
    agreed("Stop it?", args.yes)?;
    ask(target, &Request::Stop {}, &args.watch())
}

pub(crate) fn protect(target: &TargetArgs, args: &WaitArgs, on: bool) -> Result<CtlExit, Failure> {
    if !on {
        agreed("Go on without a backup?", args.yes)?;
    }
    ask(target, &if on { Request::Protect {} } else { Request::Unprotect {} }, &args.watch())
}

/// One connection per command: the time that a person took to answer does not count.
fn ask(target: &TargetArgs, request: &Request, watch: &Watch) -> Result<CtlExit, Failure> {
    let mut client = target.connect(watch.timeout)?;
    let answer = client.ask(request, |text| watch.say(text));
    let value = answer.map_err(|error| failure(&error))?;
    watch.say(value["text"].as_str().unwrap_or("done"));
    Ok(CtlExit::Ok)
}
