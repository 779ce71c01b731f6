//! Progress for people: a spinner on a terminal, plain lines elsewhere.

use std::io::{IsTerminal as _, stderr};
use std::time::{Duration, Instant};

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressStyle};

use super::args::{Args, Machine};

/// Emphasis.
pub(super) const BOLD: Style = Style::new().bold();
/// Good news.
pub(super) const GOOD: Style = AnsiColor::Green.on_default().bold();
/// Bad news.
pub(super) const BAD: Style = AnsiColor::Red.on_default().bold();
/// Things to notice.
pub(super) const NOTICE: Style = AnsiColor::Yellow.on_default().bold();
/// Things that may be overlooked.
pub(super) const FAINT: Style = Style::new().dimmed();

/// Where progress is shown: standard error, so that results can be piped.
pub(super) struct Screen {
    terminal: bool,
}

impl Screen {
    /// Looks at what standard error is.
    pub(super) fn new() -> Self {
        Self { terminal: stderr().is_terminal() }
    }

    /// Says what is going to happen.
    pub(super) fn banner(&self, args: &Args) {
        if args.machine == Machine::Model {
            anstream::eprintln!(
                "{NOTICE}MODEL MACHINE: no KVM here, the guest is modelled in software. Its figures say nothing about KVM.{NOTICE:#}"
            );
        }
        anstream::eprintln!(
            "{BOLD}Two hosts, one guest, one kill.{BOLD:#} machine {}, {}, {} vCPU, epochs of {}, client window {}, arbiter {}",
            tests::real::MachineKind::from(args.machine),
            args.memory,
            args.vcpus,
            args.epoch,
            args.window,
            args.arbiter.as_str(),
        );
    }

    /// Shows a step while it is under way; the work may rename it.
    pub(super) fn during<T, E>(
        &self,
        what: &str,
        work: impl FnOnce(&mut dyn FnMut(&str)) -> Result<T, E>,
    ) -> Result<T, E> {
        let started = Instant::now();
        if !self.terminal {
            eprintln!("  {what} ...");
            return work(&mut |step| eprintln!("  {step} ..."));
        }
        let bar = ProgressBar::new_spinner().with_message(what.to_owned());
        if let Ok(style) = ProgressStyle::with_template("  {spinner} {msg} {elapsed:.dim}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(80));
        let mut last = what.to_owned();
        let result = work(&mut |step| {
            last = step.to_owned();
            bar.set_message(step.to_owned());
        });
        bar.finish_and_clear();
        if result.is_ok() {
            anstream::eprintln!("  {GOOD}✓{GOOD:#} {last} {FAINT}{:.1} s{FAINT:#}", started.elapsed().as_secs_f64());
        }
        result
    }
}
