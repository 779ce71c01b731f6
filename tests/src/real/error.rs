use std::io;
use std::time::Duration;

/// Shorthand for what can go wrong in the harness.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a pair of real processes could not be set up or did not do what was waited for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program of the host is not installed.
    #[error("{tool} is not installed: {hint}")]
    MissingTool {
        /// The program.
        tool: String,
        /// How to get it.
        hint: &'static str,
    },
    /// The host does not let us build network namespaces.
    #[error(
        "cannot make a network namespace ({source}): run as root, or where user namespaces are allowed under `unshare -Ur`"
    )]
    NoNamespaces {
        /// The kernel's answer.
        source: io::Error,
    },
    /// A command ran and failed.
    #[error("{command} failed: {detail}")]
    Command {
        /// The command.
        command: String,
        /// Its status and what it wrote to standard error.
        detail: String,
    },
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The answer.
        source: io::Error,
    },
    /// Something that was waited for did not happen.
    #[error("waited {waited:?} for {what}; {detail}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
        /// What was there in its place.
        detail: String,
    },
    /// A process of the pair ended by itself.
    #[error("{name} ended ({status}); its last lines:\n{tail}")]
    Ended {
        /// Which process.
        name: String,
        /// How it ended.
        status: String,
        /// The end of its log.
        tail: String,
    },
    /// Something else happened than what was to be judged: this host is too busy for the timers of the pair.
    #[error("{what}: {detail}")]
    Busy {
        /// What happened.
        what: String,
        /// In which circumstances.
        detail: String,
    },
    /// A peer, file or tool said something that cannot be read.
    #[error("{what}: {detail}")]
    Answer {
        /// Who was asked.
        what: String,
        /// What is wrong with the answer.
        detail: String,
    },
}

impl Error {
    /// Wraps an answer of the operating system with what was tried.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// Adds to the message of an error what was there at the time.
    #[must_use]
    pub fn with_detail(self, more: &str) -> Self {
        Self::Answer { what: self.to_string(), detail: more.to_owned() }
    }

    /// An answer that cannot be used.
    pub fn answer(what: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Answer { what: what.into(), detail: detail.into() }
    }
}
