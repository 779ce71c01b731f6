//! The demo: a protected guest, a client that writes, a primary that is killed, and a verdict.
//!
//! [`run`] reads as the story of one run; the rest prepares it and shows what came of it.

mod args;
mod chain;
mod error;
mod host;
mod interrupt;
mod keep;
mod outcome;
mod report;
mod run;
mod screen;
mod summary;
mod timeline;

use std::process::ExitCode;

use tests::real::artifacts::Artifacts;

use args::Args;
use error::DemoError;
use interrupt::Interrupt;
use outcome::Outcome;
use screen::Screen;

/// Runs the demo with the process's arguments. Exit codes: 0 everything was kept; 1 something was lost or did not work; 10 no
/// usable `/dev/kvm`; 64 wrong arguments; 69 a program is missing or namespaces are not allowed; 130 interrupted.
#[must_use]
pub fn main() -> ExitCode {
    let args = match Args::read() {
        Ok(args) => args,
        Err(e) => {
            // Help and version arrive here as well. Nowhere to report a closed terminal.
            let _closed = e.print();
            return if e.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS };
        }
    };
    match demo(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            anstream::eprintln!("demo: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

/// The whole of it; `Ok(true)` when every run kept everything.
fn demo(args: &Args) -> Result<bool, DemoError> {
    host::enter_user_namespace_unless_root()?;
    host::check(args)?;
    let screen = Screen::new();
    screen.banner(args);
    let artifacts = screen.during("building", |step| match &args.guest {
        Some(guest) => Artifacts::build_with(args.machine.into(), Some(guest), step),
        None => Artifacts::build(args.machine.into(), step),
    })?;
    let interrupt = Interrupt::install()?;
    if args.keep {
        return keep::keep(args, artifacts, &screen, &interrupt).map(|()| true);
    }
    let seed = match args.seed {
        Some(seed) => seed,
        None => getrandom::u64().map_err(|e| DemoError::Host(format!("no randomness for the seed: {e}")))?,
    };
    if let Some(length) = args.chain {
        return chain::chain(args, length, seed, artifacts, &screen, &interrupt);
    }
    let mut outcomes: Vec<Outcome> = Vec::new();
    for number in 1..=args.runs {
        let seed = seed.wrapping_add(u64::from(number) - 1);
        let outcome = run::run(args, seed, artifacts.clone(), &screen, &interrupt)?;
        if args.runs == 1 {
            timeline::print(&outcome);
        } else {
            summary::print_line(number, args.runs, &outcome);
        }
        outcomes.push(outcome);
    }
    if args.runs > 1 {
        summary::print(&outcomes);
    }
    if let Some(path) = &args.json {
        report::write(path, &outcomes)?;
    }
    Ok(outcomes.iter().all(Outcome::passed))
}
