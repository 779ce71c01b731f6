//! `ftctl failover`, `stop`, `protect` and `unprotect`.

use std::time::{Duration, Instant};

use failover::control::{FailoverMode, Request};
use failover::exit::CtlExit;
use failover::status::NodeRole;

use super::Failure;
use super::args::{FailoverArgs, TargetArgs, WaitArgs};
use super::target::{agreed, failure, print};

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
    ask(target, &request, args.timeout)
}

pub(crate) fn stop(target: &TargetArgs, args: &WaitArgs) -> Result<CtlExit, Failure> {
    agreed("Stop it?", args.yes)?;
    ask(target, &Request::Stop {}, args.timeout)
}

pub(crate) fn protect(target: &TargetArgs, args: &WaitArgs, on: bool) -> Result<CtlExit, Failure> {
    if !on {
        agreed("Go on without a backup?", args.yes)?;
    }
    ask(target, &if on { Request::Protect {} } else { Request::Unprotect {} }, args.timeout)
}

/// One connection per command: the time that a person took to answer does not count.
fn ask(target: &TargetArgs, request: &Request, timeout: Duration) -> Result<CtlExit, Failure> {
    let started = Instant::now();
    let stamp = move || format!("{:7.3} s", started.elapsed().as_secs_f64());
    let mut client = target.connect(timeout)?;
    let answer = client.ask(request, |text| {
        let text: String = text.chars().filter(|c| !c.is_control()).collect();
        print(&format!("{}  {text}\n", stamp()));
    });
    let value = answer.map_err(|error| failure(&error))?;
    let text: String = value["text"].as_str().unwrap_or("done").chars().filter(|c| !c.is_control()).collect();
    print(&format!("{}  {text}\n", stamp()));
    Ok(CtlExit::Ok)
}
