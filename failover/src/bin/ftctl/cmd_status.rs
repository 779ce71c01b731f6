//! `ftctl status`.

use std::thread;
use std::time::{Duration, Instant};

use failover::decide::StateName;
use failover::exit::CtlExit;
use failover::status::Status;

use super::Failure;
use super::args::{Output, StatusArgs, TargetArgs};
use super::target::{failure, print};

/// A process that lives answers within this.
const ANSWER: Duration = Duration::from_secs(5);
/// Time between two looks of `--watch` and `--wait`.
const LOOK: Duration = Duration::from_millis(500);
const LOOK_WAITING: Duration = Duration::from_millis(20);

pub(crate) fn run(target: &TargetArgs, args: &StatusArgs) -> Result<CtlExit, Failure> {
    if let Some(word) = &args.wait {
        return wait(target, args, word);
    }
    loop {
        let status = ask(target, ANSWER)?;
        if args.watch {
            // Home, and clear below: no flicker, and nothing is left when the block gets shorter.
            print("\x1b[H\x1b[J");
        }
        show(&status, args.output);
        if !args.watch {
            return Ok(verdict(&status));
        }
        thread::sleep(LOOK);
    }
}

fn ask(target: &TargetArgs, timeout: Duration) -> Result<Status, Failure> {
    target.connect(timeout)?.status().map_err(|error| {
        let failure = failure(&error);
        // A question without an answer has no effect whose outcome could be unknown.
        let code = match failure.code {
            CtlExit::Timeout | CtlExit::OutcomeUnknown => CtlExit::Unknown,
            code => code,
        };
        Failure { code, ..failure }
    })
}

fn show(status: &Status, output: Output) {
    match output {
        Output::Table => print(&status.to_table()),
        Output::Json => print(&(status.to_json() + "\n")),
        Output::Prom => print(&status.to_prometheus()),
    }
}

fn verdict(status: &Status) -> CtlExit {
    match status.state {
        _ if status.protected && status.armed => CtlExit::Ok,
        // A backup that waits for its base is as degraded as its primary.
        StateName::Standby | StateName::InSync | StateName::TakingOver => CtlExit::Degraded,
        state if state.runs() => CtlExit::Degraded,
        _ => CtlExit::Down,
    }
}

fn wait(target: &TargetArgs, args: &StatusArgs, word: &str) -> Result<CtlExit, Failure> {
    if word != "armed" && StateName::ALL.iter().all(|state| state.word() != word) {
        let words: Vec<&str> = StateName::ALL.iter().map(|state| state.word()).collect();
        return Err(Failure::new(CtlExit::Usage, format!("--wait: no such state; one of armed, {}", words.join(", "))));
    }
    let until = Instant::now() + args.timeout;
    loop {
        // The process may not have started yet: that is what one waits for. What no waiting mends ends it.
        let why = match ask(target, ANSWER) {
            Ok(status) if reached(&status, word) => {
                show(&status, args.output);
                return Ok(CtlExit::Ok);
            }
            Ok(status) => format!("state {} ({})", status.state.word(), status.reason_text),
            Err(failure) if failure.code == CtlExit::Unknown => failure.text,
            Err(failure) => return Err(failure),
        };
        let now = Instant::now();
        if now >= until {
            return Err(Failure::new(CtlExit::Timeout, format!("not {word} in time: {why}")));
        }
        thread::sleep(LOOK_WAITING.min(until - now));
    }
}

fn reached(status: &Status, word: &str) -> bool {
    if word == "armed" { status.protected && status.armed } else { status.state.word() == word }
}
