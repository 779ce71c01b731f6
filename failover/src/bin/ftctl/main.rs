//! `ftctl`: ask and command one process of a protected pair. Exit codes: `docs/exit-codes.md`.

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use failover::exit::CtlExit;

mod args;
mod cmd_arbiter;
mod cmd_config;
mod cmd_control;
mod cmd_status;
mod target;

use args::{Action, Args};

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Help and version are answers, not errors. A closed pipe is nobody's fault.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => CtlExit::Ok.into(),
                _ => CtlExit::Usage.into(),
            };
        }
    };
    let done = match &args.action {
        Action::Status(status) => cmd_status::run(&args.target, status),
        Action::Failover(failover) => cmd_control::failover(&args.target, failover),
        Action::Stop(stop) => cmd_control::stop(&args.target, stop),
        Action::Protect(wait) => cmd_control::protect(&args.target, wait, true),
        Action::Unprotect(wait) => cmd_control::protect(&args.target, wait, false),
        Action::PauseProtection(pause) => cmd_control::pause(&args.target, pause),
        Action::Drill(wait) => cmd_control::drill(&args.target, wait),
        Action::Rejoin(wait) => cmd_control::rejoin(&args.target, wait),
        Action::Verify(wait) => cmd_control::verify(&args.target, wait),
        Action::Config(action) => cmd_config::run(&args.target, *action),
        Action::Arbiter(action) => cmd_arbiter::run(&args.target, *action),
    };
    match done {
        Ok(code) => code.into(),
        Err(failure) => {
            // Much of it is quoted from the process or a file.
            let text: Vec<String> = failure.text.lines().map(failover::text::harmless).collect();
            eprintln!("ftctl: {}", text.join("\n"));
            failure.code.into()
        }
    }
}

/// Why `ftctl` could not do what it was asked: one line for people, one code for scripts.
#[derive(Debug)]
struct Failure {
    code: CtlExit,
    text: String,
}

impl Failure {
    fn new(code: CtlExit, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}
