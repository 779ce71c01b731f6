//! `ftctl failover`, `drill`, `stop`, `protect`, `unprotect`, `pause-protection`, `rejoin` and `verify`. Nothing here is needed to finish what was begun: whoever
//! interrupts a command stops watching, and the pair goes on.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::thread;
use std::time::{Duration, Instant};

use failover::control::{FailoverMode, Request};
use failover::exit::CtlExit;
use failover::status::{NodeRole, Status};
use serde_json::{Value, json};

use super::Failure;
use super::args::{FailoverArgs, PauseArgs, TargetArgs, WaitArgs};
use super::target::{agreed, failure, print};

/// Time between two looks at the state that is waited for.
const LOOK: Duration = Duration::from_millis(50);

pub(crate) fn failover(target: &TargetArgs, args: &FailoverArgs) -> Result<CtlExit, Failure> {
    let common = &args.common;
    let status = target.connect(common.timeout)?.status().map_err(|error| failure(&error))?;
    if args.force {
        let age = status.lag_seconds.map_or_else(|| "never".to_owned(), |age| format!("{age:.3} s ago"));
        eprintln!(
            "ftctl: {} is {} ({}); last committed epoch {} ({age}). Whatever the other side let out since then is lost.",
            status.node,
            status.state.word(),
            status.reason_text,
            status.epoch
        );
        agreed(&format!("Run {} here, by force?", status.vm), common.yes)?;
    } else {
        let (from, to) = if status.role == NodeRole::Backup {
            (&status.peer.node, &status.node)
        } else {
            (&status.node, &status.peer.node)
        };
        agreed(&format!("Move {} from {from} to {to}?", status.vm), common.yes)?;
    }
    let mode = if args.force { FailoverMode::Force } else { FailoverMode::Planned };
    let request = Request::Failover { mode, confirm: args.confirm.clone(), without_arbiter: args.without_arbiter };
    let watch = Watch::start(common);
    watch.finish("failover", || {
        let answer = ask(target, &request, &watch)?;
        let waits = args.wait || (!args.no_wait && std::io::stdout().is_terminal());
        if waits && !args.force {
            await_protected(target, other(status.role), &watch)?;
        }
        Ok(answer)
    })
}

/// There and back. The way back is asked of this side, which is the backup by then.
pub(crate) fn drill(target: &TargetArgs, args: &WaitArgs) -> Result<CtlExit, Failure> {
    let status = target.connect(args.timeout)?.status().map_err(|error| failure(&error))?;
    refuse_unless_ready(&status)?;
    agreed(&format!("Move {} to {} and back?", status.vm, status.peer.node), args.yes)?;
    let watch = Watch::start(args);
    let order = Request::Failover { mode: FailoverMode::Planned, confirm: None, without_arbiter: false };
    watch.finish("drill", || {
        let there = ask(target, &order, &watch)?;
        await_protected(target, NodeRole::Backup, &watch)?;
        let back = ask(target, &order, &watch)?;
        await_protected(target, NodeRole::Primary, &watch)?;
        let [there, back] = [there, back].map(|answer| answer["gap_seconds"].clone());
        let said = |gap: &Value| gap.as_f64().map_or("unknown".to_owned(), |gap| format!("{:.1} ms", gap * 1e3));
        let text = format!(
            "{} runs on {} again; it stood still for {} on the way there and {} on the way back",
            status.vm,
            status.node,
            said(&there),
            said(&back)
        );
        Ok(json!({ "text": text, "there_gap_seconds": there, "back_gap_seconds": back }))
    })
}

fn refuse_unless_ready(status: &Status) -> Result<(), Failure> {
    let refused = |text: String| Err(Failure::new(CtlExit::Refused, text));
    if status.role == NodeRole::Backup {
        return refused(format!("{} is the backup: ask {}, which runs the guest", status.node, status.peer.node));
    }
    if !status.protected || !status.armed {
        let word = if status.protected { "not armed" } else { "not protected" };
        return refused(format!("{word} ({}): wait with `ftctl status --wait armed`", status.reason_text));
    }
    Ok(())
}

pub(crate) fn stop(target: &TargetArgs, args: &WaitArgs) -> Result<CtlExit, Failure> {
    agreed("Stop it?", args.yes)?;
    order(target, "stop", &Request::Stop {}, args)
}

pub(crate) fn protect(target: &TargetArgs, args: &WaitArgs, on: bool) -> Result<CtlExit, Failure> {
    if on {
        return order(target, "protect", &Request::Protect {}, args);
    }
    agreed("Go on without a backup?", args.yes)?;
    order(target, "unprotect", &Request::Unprotect {}, args)
}

pub(crate) fn pause(target: &TargetArgs, args: &PauseArgs) -> Result<CtlExit, Failure> {
    let PauseArgs { length, wait } = args;
    agreed(&format!("Go on without a backup for {} s?", length.as_secs()), wait.yes)?;
    order(target, "pause-protection", &Request::PauseProtection { seconds: length.as_secs() }, wait)
}

pub(crate) fn rejoin(target: &TargetArgs, args: &WaitArgs) -> Result<CtlExit, Failure> {
    agreed("Drop the guest that is kept here, and become the backup?", args.yes)?;
    order(target, "rejoin", &Request::Rejoin {}, args)
}

pub(crate) fn verify(target: &TargetArgs, args: &WaitArgs) -> Result<CtlExit, Failure> {
    order(target, "verify", &Request::Verify {}, args)
}

fn order(target: &TargetArgs, name: &str, request: &Request, args: &WaitArgs) -> Result<CtlExit, Failure> {
    let watch = Watch::start(args);
    watch.finish(name, || ask(target, request, &watch))
}

/// How long a command has taken, how long it may, and what a person reads of it.
struct Watch {
    started: Instant,
    timeout: Duration,
    json: bool,
    last: RefCell<String>,
}

impl Watch {
    fn start(args: &WaitArgs) -> Self {
        Self { started: Instant::now(), timeout: args.timeout, json: args.json, last: RefCell::default() }
    }

    fn left(&self) -> Option<Duration> {
        self.timeout.checked_sub(self.started.elapsed()).filter(|left| !left.is_zero())
    }

    /// Progress, unless it is what was said last.
    fn say(&self, text: &str) {
        let text: String = text.chars().filter(|c| !c.is_control()).collect();
        if !self.json && *self.last.borrow() != text {
            print(&format!("{:7.3} s  {text}\n", self.started.elapsed().as_secs_f64()));
        }
        *self.last.borrow_mut() = text;
    }

    /// Carries a command out and says what came of it.
    fn finish(&self, name: &str, work: impl FnOnce() -> Result<Value, Failure>) -> Result<CtlExit, Failure> {
        let done = work();
        let seconds = self.started.elapsed().as_secs_f64();
        match done {
            Ok(mut answer) => {
                let text = answer["text"].as_str().unwrap_or("done").to_owned();
                if self.json {
                    answer["schema"] = json!("ft.command/1");
                    answer["command"] = json!(name);
                    answer["ok"] = json!(true);
                    answer["seconds"] = json!(seconds);
                    print(&format!("{answer}\n"));
                } else {
                    self.say(&text);
                }
                Ok(CtlExit::Ok)
            }
            Err(failure) => {
                if self.json {
                    let (code, text) = (failure.code.number(), &failure.text);
                    let answer = json!({
                        "schema": "ft.command/1", "command": name, "ok": false, "exit_code": code, "text": text,
                        "seconds": seconds,
                    });
                    print(&format!("{answer}\n"));
                }
                Err(failure)
            }
        }
    }
}

const fn other(role: NodeRole) -> NodeRole {
    match role {
        NodeRole::Primary => NodeRole::Backup,
        NodeRole::Backup => NodeRole::Primary,
    }
}

/// Waits until the pair is protected and armed, with the side that is asked in this role.
fn await_protected(target: &TargetArgs, role: NodeRole, watch: &Watch) -> Result<(), Failure> {
    loop {
        let Some(left) = watch.left() else {
            let text = format!("not protected again in time: {}; look with `ftctl status`", watch.last.borrow());
            return Err(Failure::new(CtlExit::Timeout, text));
        };
        // Between its two lives the process cannot be asked.
        let seen = target.connect(left).and_then(|mut client| client.status().map_err(|error| failure(&error)));
        match seen {
            Ok(status) if status.protected && status.armed && status.role == role => {
                let (owner, backup) = match role {
                    NodeRole::Primary => (&status.node, &status.peer.node),
                    NodeRole::Backup => (&status.peer.node, &status.node),
                };
                watch.say(&format!("protected: {owner} runs the guest, {backup} is its backup"));
                return Ok(());
            }
            Ok(status) => watch.say(&format!("{} is {} ({})", status.node, status.state.word(), status.reason_text)),
            Err(failure) if failure.code == CtlExit::Permission => return Err(failure),
            Err(_) => {}
        }
        thread::sleep(LOOK.min(left));
    }
}

/// One connection per request: the time that a person took to answer does not count.
fn ask(target: &TargetArgs, request: &Request, watch: &Watch) -> Result<Value, Failure> {
    let Some(left) = watch.left() else { return Err(Failure::new(CtlExit::Timeout, "time ran out")) };
    let answer = target.connect(left)?.ask(request, |text| watch.say(text)).map_err(|error| failure(&error))?;
    watch.say(answer["text"].as_str().unwrap_or("done"));
    Ok(answer)
}
