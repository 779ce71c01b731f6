//! Which process is meant, and how errors become exit codes.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use failover::config::PairConfig;
use failover::control::{Client, ClientError, ErrorCode};
use failover::exit::CtlExit;

use super::Failure;
use super::args::TargetArgs;

impl TargetArgs {
    /// The configuration, which `config check` and `arbiter show` need.
    pub(crate) fn load(&self) -> Result<PairConfig, Failure> {
        let Some(path) = &self.config else {
            return Err(Failure::new(CtlExit::Usage, "say which configuration: --config PAIR.TOML"));
        };
        PairConfig::load(path).map_err(|error| Failure::new(CtlExit::Config, error.to_string()))
    }

    pub(crate) fn socket(&self) -> Result<PathBuf, Failure> {
        if let Some(socket) = &self.socket {
            return Ok(socket.clone());
        }
        let Some(node) = &self.node else {
            return Err(Failure::new(
                CtlExit::Usage,
                "say whom to ask: --config PAIR.TOML --node NAME, or --socket PATH",
            ));
        };
        let config = self.load()?;
        let name = config.pick(node).map_err(|error| Failure::new(CtlExit::Usage, error.to_string()))?;
        let section = config.node(&name).expect("picked from the configuration");
        Ok(section.control.clone())
    }

    pub(crate) fn connect(&self, timeout: Duration) -> Result<Client, Failure> {
        Client::connect(&self.socket()?, timeout).map_err(|error| failure(&error))
    }
}

/// What an error of the control socket means.
pub(crate) fn failure(error: &ClientError) -> Failure {
    let code = match error {
        ClientError::NotThere { .. } => CtlExit::Unknown,
        ClientError::Permission(_) => CtlExit::Permission,
        ClientError::Broken(text) if text == "time ran out" => CtlExit::Timeout,
        ClientError::Broken(_) => CtlExit::OutcomeUnknown,
        ClientError::Answered(body) => match body.code {
            ErrorCode::Denied => CtlExit::Permission,
            ErrorCode::Refused | ErrorCode::Ending => CtlExit::Refused,
            ErrorCode::OutcomeUnknown => CtlExit::OutcomeUnknown,
            ErrorCode::BadRequest | ErrorCode::TooLong | ErrorCode::Busy => CtlExit::Unknown,
        },
    };
    let text: String = error.to_string().chars().filter(|c| !c.is_control()).collect();
    Failure::new(code, text)
}

/// Asks before something that cannot be taken back; without a terminal, `--yes` is needed.
pub(crate) fn agreed(question: &str, yes: bool) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Failure::new(CtlExit::Refused, "not a terminal: add --yes if you mean it"));
    }
    eprint!("{question} [y/N] ");
    let _ = std::io::stderr().flush();
    let mut answer = String::new();
    let read = std::io::stdin().read_line(&mut answer);
    if read.is_ok() && matches!(answer.trim(), "y" | "yes") {
        return Ok(());
    }
    Err(Failure::new(CtlExit::Refused, "not done"))
}

/// Prints data to standard output; a reader that went away is no error.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
